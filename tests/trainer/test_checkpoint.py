"""A checkpoint is whole or not there; a damaged one is named and passed over."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from conftest import sign, tiny_overrides
from narrowgauge.trainer import checkpoint, checkpointer, distributed
from narrowgauge.trainer.build import build_state, resolve_model
from narrowgauge.trainer.checkpoint import examine, list_checkpoints, load_into, newest, read_tensors
from narrowgauge.trainer.checkpointer import CheckpointConfig, Checkpointer
from narrowgauge.trainer.config import TrainConfig, load_config
from narrowgauge.trainer.distributed import World
from narrowgauge.trainer.errors import UserError
from narrowgauge.trainer.state import TrainState, local
from torch.distributed.checkpoint import metadata as kinds

META = {"recipe": {"name": "fp32", "args": {}}, "data": "x", "world_size": 1, "micro_batch_size": 8}
T = TypeVar("T")
Tiny = Callable[..., TrainConfig]


def make_state(config: TrainConfig, world: World, seed: int = 0) -> TrainState:
    model = resolve_model(config.model, 257, config.data.seq_len)
    return build_state(model, config.values.precision, config.parallel, config.optim, world, seed=seed)


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
    return {name: local(tensor).clone() for name, tensor in state.tensors().items()}


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


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made")
    config = load_config(tiny_overrides(corpus, path / "run"))
    world = distributed.start(config.parallel)
    state, checkpointer = make_state(config, world), saver(path / "two", world)
    for _ in range(2):
        change(state)
        checkpointer.save(state)
    checkpointer.wait()
    distributed.finish()
    return path / "two"


@pytest.fixture
def two(made: Path, tmp_path: Path) -> Path:
    """Checkpoints at steps 1 and 2."""
    return shutil.copytree(made, tmp_path / "two")


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
        local(next(state.model.parameters())).view(-1)[5] = torch.nan
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
    monkeypatch.setattr(checkpointer.shutil, "disk_usage", lambda path: _Usage)
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


@pytest.mark.parametrize("number", ["ESTALE", "EIO", "EACCES", "EMFILE"])
@pytest.mark.parametrize("where", ["data", "description"])
def test_an_error_that_passes_is_no_damage(
    two: Path, number: str, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(getattr(errno, number), os.strerror(getattr(errno, number)), str(two / "step-00000002" / "file"))

    def fail(file: Path) -> Any:
        raise error

    with monkeypatch.context() as patch:
        if where == "data":
            patch.setattr(checkpoint, "sha256_of", fail)
        else:
            patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(UserError, match=r"file cannot be read now .*no damage") as caught:
            newest(two, tidy=True)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in two.iterdir()) == ["step-00000001", "step-00000002"]
    found = newest(two, tidy=True)
    assert found is not None
    assert found.meta["step"] == 2


DESCRIPTIONS = {
    "list": "[1]",
    "number": "3",
    "null": "null",
    "string": '"x"',
    "nested": "[" * 100_000,
    "object": "{}",
    "bytes": b"\xff\xfe",
}


@pytest.mark.parametrize("name", ["meta.json", "checksums.json"])
@pytest.mark.parametrize("content", DESCRIPTIONS)
def test_a_description_that_is_another_json_is_damage(
    two: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = DESCRIPTIONS[content]
    (two / "step-00000002" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if name == "meta.json":
        sign(two / "step-00000002")
    found = newest(two)
    assert found is not None
    assert found.meta["step"] == 1
    assert capsys.readouterr().out.count("\n") == 1


class Executes:
    """Unpickled, it makes a file."""

    def __init__(self, inner: object, marker: Path) -> None:
        self.inner, self.marker = inner, marker

    def __reduce__(self) -> tuple[Any, ...]:
        return _touch, (str(self.marker), self.inner)


def _touch(marker: str, inner: object) -> object:
    Path(marker).touch()
    return inner


def index_of(checkpoint: Path) -> Any:
    return pickle.loads((checkpoint / ".metadata").read_bytes())  # our own, just written


def replace_index(checkpoint: Path, index: object) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    sign(checkpoint)


def test_an_index_never_executes_anything(two: Path, tmp_path: Path) -> None:
    last, marker = two / "step-00000002", tmp_path / "executed"
    plain = index_of(last)
    replace_index(last, Executes(plain, marker))
    for use in (lambda: newest(two, tidy=True), lambda: read_tensors(last)):
        with pytest.raises(UserError, match=r"it names .*_touch") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert sorted(path.name for path in two.iterdir()) == ["step-00000001", "step-00000002"]
    # Of what is not a tensor torch's own loader unpickles the content.
    name = next(iter(plain.state_dict_metadata))
    plain.state_dict_metadata[name] = kinds.BytesStorageMetadata()
    replace_index(last, plain)
    with pytest.raises(UserError, match=r"names .*BytesStorageMetadata"):
        newest(two)


def test_an_index_changes_no_class(two: Path) -> None:
    last = two / "step-00000002"
    made_of = kinds.__name__
    for named in ("cpathlib\nPosixPath\n", f"c{made_of}\nMetadata\n", f"c{made_of}\n_MEM_FORMAT_ENCODING\n(K\x00tR"):
        poison = f"{named}N}}X\x08\x00\x00\x00__slot__X\x04\x00\x00\x00evils\x86b."
        (last / ".metadata").write_bytes(poison.encode("latin-1"))
        sign(last)
        with pytest.raises(UserError, match="it sets attributes of "):
            newest(two, tidy=True)
    assert not any(hasattr(kind, "__slot__") for kind in (kinds.Metadata, *kinds._MEM_FORMAT_ENCODING))


@pytest.mark.parametrize("name", ["null", "surrogate", "long", "above"])
def test_names_that_no_checkpoint_has_are_damage(two: Path, name: str) -> None:
    names = {"null": "a\0b", "surrogate": "\ud800", "long": "n" * 300, "above": "../meta.json"}
    file = two / "step-00000002" / "checksums.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {names[name]: [1, "x"]}))
    found = newest(two)
    assert found is not None
    assert found.meta["step"] == 1


def test_an_index_reads_nothing_outside_of_its_checkpoint(two: Path) -> None:
    last = two / "step-00000002"
    plain = index_of(last)
    for info in plain.storage_data.values():
        info.relative_path = "../step-00000001/__0_0.distcp"
    replace_index(last, plain)
    with pytest.raises(UserError, match="outside of the checkpoint"):
        newest(two)


def test_an_index_of_other_tensors_is_damage(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = two / "step-00000002"
    plain = index_of(last)
    plain.state_dict_metadata.pop("train.step")
    replace_index(last, plain)
    (last / ".metadata").write_bytes(
        (last / ".metadata").read_bytes() + b"tail"
    )  # what follows the pickle plays no part
    sign(last)
    found = newest(two)
    assert found is not None
    assert found.meta["step"] == 1
    assert "damaged (.metadata cannot be read" in capsys.readouterr().out


class Rank:
    """One of two ranks; the other finds nothing."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_main(self, function: Callable[[], T]) -> T:
        return function()

    def gather_written(self, value: T) -> list[T]:
        return [value]


def test_ranks_share_the_files_to_check(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[str]] = []
    real = checkpoint.sha256_of
    for rank in (0, 1):
        names: list[str] = []
        monkeypatch.setattr(checkpoint, "sha256_of", lambda file, names=names: (names.append(file.name), real(file))[1])
        examine(two / "step-00000002", Rank(rank))
        read.append(names)
    assert sorted(read[0] + read[1]) == [".metadata", "__0_0.distcp", "meta.json"]
    assert all(read)


def test_a_file_system_that_cannot_flush_directories(
    tiny: Tiny, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    state, checkpointer = make_state(tiny(), world), saver(tmp_path, world)
    for state.step in (1, 2):
        checkpointer.save(state)
        checkpointer.wait()
    assert checkpointer.saved_step == 2
    assert capsys.readouterr().out.count("cannot flush directories") == 1


def test_writes_that_keep_failing_are_given_up(two: Path, tiny: Tiny, world: World) -> None:
    (two.parent / "file").write_text("")
    state, checkpointer = make_state(tiny(), world), saver(two.parent / "file" / "x", world, max_failures=2)
    for state.step, given_up in ((3, False), (4, True)):
        checkpointer.save(state)
        checkpointer.wait()
        assert checkpointer.given_up is given_up


def test_a_slow_write_says_so(
    two: Path, tiny: Tiny, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpointer, "_SLOW_SECONDS", 0.05)
    real = checkpointer.sha256_of
    monkeypatch.setattr(checkpointer, "sha256_of", lambda file: (time.sleep(0.1), real(file))[1])
    state = make_state(tiny(), world)
    state.step = 3
    saver(two, world, asynchronous=False).save(state)
    assert "s for the checkpoint of step 3, which took" in capsys.readouterr().out


def test_a_checkpoint_is_due_by_the_clock(two: Path, world: World) -> None:
    assert not saver(two, world).overdue
    assert not saver(two, world, every_minutes=60).overdue
    assert saver(two, world, every_minutes=1e-9).overdue
