"""Steps that the device decides about, read a step later, as on a GPU: on a CPU, against those that are waited for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_overrides, train_here
from narrowgauge.precision.states.updates import gated_step
from narrowgauge.trainer import distributed
from narrowgauge.trainer.build import build_state, resolve_model
from narrowgauge.trainer.checkpoint import list_checkpoints, read_tensors
from narrowgauge.trainer.config import TrainConfig, load_config
from narrowgauge.trainer.data.batches import Ahead, Batch, DataSource
from narrowgauge.trainer.distributed import ParallelConfig, World
from narrowgauge.trainer.errors import ExitCode
from narrowgauge.trainer.state import TrainState, local
from narrowgauge.trainer.step import update_from
from test_run import poison
from test_stream import positions_after, source, steps_of, stream, texts  # noqa: F401 (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode

Tiny = Callable[..., TrainConfig]
Runs = Callable[..., tuple[Path, Path]]
PLAIN = ("sample.tokens=0", "eval.tokens=64", "eval.sharpness=0", "parallel.threads=1")


def rows(path: Path) -> list[dict[str, Any]]:
    """Without what a clock says, and norms apart: their squares are added up in another order."""
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: x for key, x in row.items() if key not in ("time", "tokens_per_second", "grad_norm")} for row in found
    ]


def norms(path: Path) -> list[float]:
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row["grad_norm"] or 0.0 for row in found if row["kind"] == "train"]


def saved(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {each.name: read_tensors(each) for each in list_checkpoints(path / "checkpoints")}


def same(one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[step][name]) for step in one for name, tensor in one[step].items()
    )


def defer(patch: pytest.MonkeyPatch) -> None:
    start = distributed.start

    def started(config: ParallelConfig) -> World:
        return replace(start(config), deferred=True)

    patch.setattr(distributed, "start", started)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowgauge.trainer.reporting.figures.plot_losses", lambda *_: None)


@pytest.fixture
def runs(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Train twice, deferred the second time."""

    def both(*options: str, code: ExitCode = ExitCode.FINISHED, poisoned: set[int] | None = None) -> tuple[Path, Path]:
        paths = tmp_path / "waited", tmp_path / "deferred"
        for path in paths:
            with monkeypatch.context() as patch:
                if path.name == "deferred":
                    defer(patch)
                if poisoned:
                    poison(patch, poisoned)
                assert train_here(load_config(tiny_overrides(corpus, path, *PLAIN, *options))) is code
        return paths

    return both


@pytest.mark.parametrize("options", [
    ("precision=bf16", "probe.every=3"),
    ("precision=fp8_delayed", "optim.moments=fp8", "train.micro_batch_size=4"),
    ("precision=fp16", "precision.args.init_scale=2.0e8", "precision.args.backoff=0.001", "optim.telemetry_every=2"),
], ids=["bf16_probed", "fp8_delayed_fp8_moments", "fp16_telemetry"])  # fmt: skip
def test_a_deferred_run_is_the_run(runs: Runs, options: tuple[str, ...]) -> None:
    """Every row in its place, every checkpoint, bit for bit where nothing is clipped; also around skipped steps."""
    waited, deferred = runs(*options, "optim.clip_norm=0", "eval.every=3", poisoned={2})
    assert rows(waited) == rows(deferred)
    assert [row["step"] for row in rows(deferred) if "skipped" in row][-1:] == [3]
    assert norms(deferred) == pytest.approx(norms(waited), rel=1e-12)
    assert same(saved(waited), saved(deferred))


@pytest.mark.parametrize("moments", ["fp32", "pure_bf16_sr"])
def test_clipped_by_the_device(tiny: Tiny, world: World, moments: str) -> None:
    """torch's fused AdamW divides where the other way multiplies. A step that is measured is not another step."""
    config = tiny("precision=bf16", f"optim.moments={moments}", "optim.clip_norm=0.013")
    measured = replace(config.optim, telemetry_every=1)
    waited, deferred, watched = states = [made(config, world) for _ in range(3)]
    there = replace(world, deferred=True)
    for step in range(4):
        results = [
            update_from(state, Drawn(), at, optim, step, 4)
            for state, at, optim in zip(
                states, (world, there, there), (config.optim, config.optim, measured), strict=True
            )
        ]
        assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-5)
        assert results[1].grad_norm > 0.1
        assert results[1].loss == pytest.approx(results[0].loss, rel=1e-6)
        assert results[2].telemetry["update_ratio"] > 0
    for name, tensor in deferred.tensors().items():
        assert torch.equal(local(tensor), local(watched.tensors()[name])), name
        other = local(waited.tensors()[name])
        if moments == "fp32":
            assert torch.allclose(local(tensor), other, rtol=1e-3, atol=1e-6), name
        else:
            assert torch.equal(local(tensor), other), name


def made(config: TrainConfig, world: World) -> TrainState:
    model = resolve_model(config.model, 257, 16)
    return build_state(model, config.values.precision, config.parallel, config.optim, world, seed=0, tokens=32)


@pytest.mark.parametrize("limit", [1, 2])
def test_a_deferred_run_diverges_at_the_same_step(runs: Runs, limit: int) -> None:
    waited, deferred = runs(
        f"train.max_nonfinite_in_a_row={limit}", "optim.clip_norm=0",
        "train.steps=20", "eval.tokens=0", "checkpoint.every=3",
        code=ExitCode.DIVERGED, poisoned={1, *range(5, 99)} if limit > 1 else {5},
    )  # fmt: skip
    assert rows(waited) == rows(deferred)
    assert rows(deferred)[-1]["step"] == 5 + limit
    assert (waited / "done.json").read_text() == (deferred / "done.json").read_text()
    assert same(saved(waited), saved(deferred))


def test_a_deferred_run_goes_on_to_the_bit(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a checkpoint after a skipped step: the number of the update is among what it holds."""
    defer(monkeypatch)
    config = tiny("precision=fp8_delayed", "optim.moments=fp8", *PLAIN, "eval.tokens=0")
    poison(monkeypatch, {2})
    assert train_here(config) is ExitCode.FINISHED
    path = Path(config.run.dir)
    whole = read_tensors(path / "checkpoints" / "step-00000006")
    assert {float(tensor) for name, tensor in whole.items() if name.endswith(".step") and "optim" in name} == {5.0}
    before = rows(path)
    (path / "done.json").unlink()
    shutil.rmtree(path / "checkpoints" / "step-00000006")
    assert train_here(config) is ExitCode.FINISHED
    assert rows(path)[6:] == before[4:]
    again = read_tensors(path / "checkpoints" / "step-00000006")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_decide_as_one(corpus: Path, tmp_path: Path) -> None:
    """Loss, norm and skipping are those of all ranks; gradients of both replicas count once."""
    options = ("precision=fp8_delayed", "optim.moments=fp8_tensor", "parallel.replicate=2", "optim.clip_norm=0.5")
    script = str(Path(__file__).parents[1] / "deferred.py")
    paths = []
    for command in (["-m", "narrowgauge"], [script]):
        paths.append(tmp_path / str(len(paths)))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
        overrides = tiny_overrides(corpus, paths[-1], *PLAIN, *options)
        done = subprocess.run([*launcher, *overrides], capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert rows(paths[0]) == rows(paths[1])
    assert norms(paths[1]) == pytest.approx(norms(paths[0]), rel=1e-12)
    assert same(saved(paths[0]), saved(paths[1]))


class Reads(TorchDispatchMode):
    """Where tensors become Python numbers: on a GPU, each waits for all that was asked of it before."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.found = known, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].data_ptr() not in self.known:
            # Kernels, and linears, look at numbers of their own accord where they are on a CPU.
            frames = [frame for frame in traceback.extract_stack() if "/src/" in frame.filename]
            if not frames[-1].filename.endswith(("operands.py", "reference.py", "cross_entropy.py")):
                self.found.append(f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [
    ("precision=bf16",),
    ("precision=fp8_delayed",),
    ("precision=bf16", "optim.moments=fp8_tensor"),
    ("precision=nvfp4", "optim.moments=pure_bf16_sr"),
], ids=["bf16", "fp8_delayed", "fp8_moments", "nvfp4_bf16_states"])  # fmt: skip
def test_no_number_is_read_in_a_step(tiny: Tiny, world: World, options: tuple[str, ...]) -> None:
    config = tiny(*options, "precision.backend=reference")  # the compiled update of a CPU looks whether there is one
    found = {}
    for deferred in (False, True):
        state, there = made(config, world), replace(world, deferred=bool(deferred))
        # Counters that are the host's own, on a GPU too.
        known = {numbers["step"].data_ptr() for numbers in state.optimizer.state.values()}
        update_from(state, Drawn(), there, config.optim, 0, 4)
        state.settle()
        with Reads(known) as reads:
            result = update_from(state, Drawn(), there, config.optim, 1, 4)
        # What a batch weighs is counted before it goes to the device.
        found[deferred] = [place for place in reads.found if "weights.sum()" not in place]
        assert result.applied
        assert float(result.loss) > 1
    assert found[True] == []
    assert len(found[False]) > 3  # the norm of every gradient: what this test would see


class Drawn:
    """Two micro-batches of random tokens."""

    num_micro = 2

    def first_sample(self, step: int) -> int:
        return 4 * step

    def batch(self, step: int, micro: int) -> Batch:
        generator = torch.Generator().manual_seed(2 * step + micro)
        tokens = torch.randint(257, (2, 17), generator=generator)
        return Batch(tokens, torch.ones(2, 16), 4 * step + 2 * micro)


def test_one_process_asks_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: pytest.fail("there is nobody else"))
    assert world.sum(0.1, 2) == [0.1, 2.0]
    assert world.max(3) == [3.0]
    numbers = torch.tensor([1.5, 2.5], dtype=torch.float64)
    assert torch.equal(world.add_up(numbers), numbers)
    assert torch.equal(world.add_up_there(numbers), numbers)
    assert not world.deferred  # a CPU


def test_what_cannot_be_told_to_leave_an_update_out() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="SGD cannot be told"):
        gated_step(torch.optim.SGD([parameter], lr=1.0), torch.tensor(True), None)


def test_batches_made_ahead_are_the_sources_own() -> None:
    """In any order of steps, each made once where steps follow each other."""
    asked: list[tuple[int, int]] = []

    class Noted(Drawn):
        def batch(self, step: int, micro: int) -> Batch:
            asked.append((step, micro))
            return super().batch(step, micro)

    ahead = Ahead(Noted(), threaded=True, pin=False)
    for step in (3, 4, 5, 2):
        for micro in range(2):
            one, other = ahead.batch(step, micro), Drawn().batch(step, micro)
            assert torch.equal(one.tokens, other.tokens)
            assert one.first_sample == other.first_sample
    assert ahead.first_sample(7) == 28
    assert ahead.num_micro == 2
    ahead._thread.shutdown()  # type: ignore[union-attr]
    assert sorted(asked) == sorted((step, micro) for step in (3, 4, 5, 6, 2, 3) for micro in range(2))


def test_an_error_made_ahead_is_raised_at_its_step() -> None:
    class Broken(Drawn):
        def batch(self, step: int, micro: int) -> Batch:
            if step == 1:
                raise OSError(5, "Input/output error")
            return super().batch(step, micro)

    ahead = Ahead(Broken(), threaded=True, pin=False)
    assert ahead.batch(0, 1).first_sample == 2
    with pytest.raises(OSError, match="Input/output error"):
        ahead.batch(1, 0)


def test_a_streams_position_is_that_of_the_step_in_hand(texts: Path) -> None:  # noqa: F811
    of = stream(texts)
    one = source(of)
    ahead: DataSource = Ahead(one, threaded=one.position is None, pin=False)
    for step in range(3):
        for micro in range(ahead.num_micro):
            ahead.batch(step, micro)
        assert torch.equal(one.position, positions_after(of, step + 1))
    again = source(of)
    again.position.copy_(one.position)
    assert torch.equal(steps_of(again, 3, 5), torch.stack([_whole(ahead, step) for step in (3, 4)]))


def _whole(of: DataSource, step: int) -> torch.Tensor:
    return torch.cat([of.batch(step, micro).tokens for micro in range(of.num_micro)])
