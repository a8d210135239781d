"""A checkpoint is whole or not there; a damaged one is named and passed over."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import sign

from trainer import checkpoint as module
from trainer.build import build_state, resolve_model
from trainer.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    examine,
    list_checkpoints,
    load_into,
    newest,
    read_tensors,
)
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.errors import UserError
from trainer.state import TrainState

META = {"recipe": {"name": "fp32", "args": {}}, "data": "x", "world_size": 1, "micro_batch_size": 8}
Tiny = Callable[..., TrainConfig]


def make_state(config: TrainConfig, world: World, seed: int = 0) -> TrainState:
    model = resolve_model(config.model, 257, config.data.seq_len)
    return build_state(model, config.precision, config.parallel, config.optim, world, seed=seed)


def change(state: TrainState) -> None:
    """As a step does: other weights, other moments, one step on."""
    tokens = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(state.step))
    state.model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1


def saver(path: Path, world: World, **config: object) -> Checkpointer:
    return Checkpointer(CheckpointConfig(**config), path, world, META)  # type: ignore[arg-type]


def snapshot(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: module.local(tensor).clone() for name, tensor in state.tensors().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("gpt", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_comes_back(tiny: Tiny, world: World, tmp_path: Path, gpt: bool, asynchronous: bool) -> None:
    state = make_state(tiny(gpt=gpt), world)
    change(state)
    state.nonfinite_in_a_row = 3
    saved = snapshot(state)
    checkpointer = saver(tmp_path, world, asynchronous=asynchronous)
    checkpointer.save(state)
    change(state)  # training goes on while the thread writes: the file must not see it
    checkpointer.wait()
    other = make_state(tiny(gpt=gpt), world, seed=9)
    assert not equal(snapshot(other), saved)
    found = newest(tmp_path)
    assert found is not None
    load_into(found, other, world.checkpoint)
    assert equal(snapshot(other), saved)
    assert (other.step, other.nonfinite_in_a_row) == (1, 3)
    whole = read_tensors(found.path, "model.")
    assert all(torch.equal(whole[name], saved[name]) for name in whole)
    assert len(whole) == len(list(state.model.parameters()))


def test_last_and_every_are_kept(tiny: Tiny, world: World, tmp_path: Path) -> None:
    state = make_state(tiny(), world)
    checkpointer = saver(tmp_path, world, keep_last=2, keep_every=3)
    for _ in range(8):
        state.step += 1
        checkpointer.save(state)
    checkpointer.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{n:08}" for n in (3, 6, 7, 8)]
    assert not list(tmp_path.glob("*.incomplete"))


@pytest.fixture
def two(tiny: Tiny, world: World, tmp_path: Path) -> Path:
    """Checkpoints at steps 1 and 2."""
    state = make_state(tiny(), world)
    checkpointer = saver(tmp_path / "two", world)
    for _ in range(2):
        change(state)
        checkpointer.save(state)
    checkpointer.wait()
    return tmp_path / "two"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.json", "checksums.json"])
def test_a_damaged_one_is_named_and_the_one_before_used(
    two: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(two / "step-00000002" / name)
    found = newest(two)
    assert found is not None
    assert found.meta["step"] == 1
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"{two / 'step-00000002'} is damaged" in out


def test_a_half_written_one_is_named_and_passed_over(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (two / "step-00000002").rename(two / "step-00000002.incomplete")
    found = newest(two)
    assert found is not None
    assert found.meta["step"] == 1
    assert "step-00000002.incomplete was never finished" in capsys.readouterr().out


def test_a_start_tidies_what_kills_left(two: Path) -> None:
    (two / "step-00000007.incomplete").mkdir()
    (two / "step-00000001").rename(two / "step-00000001.deleting")
    flip(two / "step-00000002" / "__0_0.distcp")
    assert newest(two) is None
    assert len(list(two.iterdir())) == 3  # looking changes nothing
    assert newest(two, tidy=True) is None
    assert [path.name for path in two.iterdir()] == ["step-00000002.damaged"]


def test_damaged_ones_do_not_count_among_those_kept(two: Path, tiny: Tiny, world: World) -> None:
    for step in (1, 2):
        (two / f"step-{step:08}").rename(two / f"step-{step + 500:08}")
        flip(two / f"step-{step + 500:08}" / "__0_0.distcp")
    assert newest(two, tidy=True) is None
    state = make_state(tiny(), world)
    checkpointer = saver(two, world, keep_last=2)
    for state.step in (1, 2, 3):
        checkpointer.save(state)
    checkpointer.wait()
    assert [path.name for path in list_checkpoints(two)] == ["step-00000002", "step-00000003"]


def test_none_is_left(two: Path, tmp_path: Path) -> None:
    for path in list_checkpoints(two):
        (path / "meta.json").write_text(json.dumps({"format": 99}))
        sign(path)
    assert newest(two) is None
    assert newest(tmp_path / "nothing") is None


def test_a_damaged_one_is_replaced_when_its_step_comes_again(two: Path, tiny: Tiny, world: World) -> None:
    flip(two / "step-00000002" / "__0_0.distcp")
    state = make_state(tiny(), world)
    found = newest(two, tidy=True)
    assert found is not None
    checkpointer = saver(two, world)
    checkpointer.restore(state, found)
    change(state)
    checkpointer.save(state)
    checkpointer.wait()
    assert examine(two / "step-00000002").meta["step"] == 2


@pytest.mark.parametrize(
    ("overrides", "gpt", "words"),
    [
        (["model.hidden_size=64"], False, "of another model"),
        (["model.num_layers=1"], False, "of another model"),
        ([], True, "of another model"),
    ],
)
def test_another_models_checkpoint_is_refused(
    two: Path, tiny: Tiny, world: World, overrides: list[str], gpt: bool, words: str
) -> None:
    state = make_state(tiny(*overrides, gpt=gpt), world)
    found = newest(two)
    assert found is not None
    with pytest.raises(UserError, match=words) as caught:
        load_into(found, state, world.checkpoint)
    assert "\n" not in str(caught.value)


def test_a_state_that_is_not_finite_is_not_written(
    two: Path, tiny: Tiny, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    state = make_state(tiny(), world)
    state.step = 3
    with torch.no_grad():
        module.local(next(state.model.parameters())).view(-1)[5] = torch.nan
    checkpointer = saver(two, world)
    checkpointer.save(state)
    assert checkpointer.last_error is not None
    assert "not finite" in checkpointer.last_error
    assert [path.name for path in list_checkpoints(two)] == ["step-00000001", "step-00000002"]


def failing_save(two: Path, tiny: Tiny, world: World, directory: Path | None = None) -> str:
    """Try to save step 3; the message, after checking that it is one line and that nothing is lost."""
    state = make_state(tiny(), world)
    state.step = 3
    checkpointer = saver(directory or two, world)
    checkpointer.save(state)
    checkpointer.wait()
    assert checkpointer.saved_step is None
    assert checkpointer.last_error is not None
    assert "\n" not in checkpointer.last_error
    assert [path.name for path in list_checkpoints(two)] == ["step-00000001", "step-00000002"]
    assert not list(two.glob("*.incomplete"))
    assert newest(two) is not None
    return checkpointer.last_error


def test_a_directory_that_cannot_be_written(two: Path, tiny: Tiny, world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "no checkpoint can be written" in failing_save(two, tiny, world, tmp_path / "file" / "checkpoints")


def test_a_disk_without_room(two: Path, tiny: Tiny, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: _Usage)
    assert "no room for a checkpoint" in failing_save(two, tiny, world)


class _Usage:
    free = 1000


def test_a_disk_that_fills_up_while_writing(two: Path, tiny: Tiny, world: World) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        message = failing_save(two, tiny, world)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert "checkpoint at step 3 not written" in message
