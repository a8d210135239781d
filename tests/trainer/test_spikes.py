"""Spikes: the rule, steps that are skipped, and runs that go back; stopped and killed anywhere, the same digits."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_overrides, train_here
from narrowgauge.trainer import checkpointer, distributed
from narrowgauge.trainer.checkpoint import list_checkpoints, read_tensors
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data.batches import Batch
from narrowgauge.trainer.errors import ExitCode
from narrowgauge.trainer.metrics import evaluated_step, read_metrics, read_rows
from narrowgauge.trainer.spikes import COUNT, LEFT_OUT, SPIKE_PREFIX, SpikeAction, SpikeWatch
from narrowgauge.trainer.tools.restore import restore_run
from test_deferred import defer
from test_deferred import rows as all_rows
from test_run import tamper
from test_stream import texts  # noqa: F401 (a fixture)
from whole_runs import compare_runs

RULE = ("train.spike_window=6", "train.spike_deviations=30")
# A batch that is a spike is told by its index, from 0, in the order of the data; without rollbacks its step's less one.
LONG = (
    *("sample.tokens=0", "eval.tokens=64", "eval.sharpness=0", "eval.every=3", "optim.clip_norm=0"),
    *("parallel.threads=1", "model.num_layers=1", "train.micro_batch_size=8", "train.steps=14", "checkpoint.every=4"),
    *RULE,
)


class Killed(BaseException):
    """As far as a run in this process can be killed."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowgauge.trainer.reporting.figures.plot_losses", lambda *_: None)


def test_a_value_far_above_the_last_ones_is_a_spike() -> None:
    watch = SpikeWatch(8, 3.0)
    for number in range(8):
        assert watch.observe(5.0 + 0.1 * (number % 2), 1.0 + 0.01 * (number % 3)) is None
    assert watch.observe(2.0, 0.1) is None  # only upward, and this one makes the window wide
    spike = watch.observe(9.0, 1.0)
    assert spike is not None
    assert str(spike).startswith("loss 9 is ")
    assert [excess.name for excess in spike.excesses] == ["loss"]
    assert spike.deviations == pytest.approx((9.0 - spike.excesses[0].mean) / deviation_of(watch, 0))
    both = watch.observe(9.0, 7.0)
    assert both is not None
    assert [excess.name for excess in both.excesses] == ["loss", "gradient norm"]
    assert watch.observe(5.0, 1.0) is None  # what was a spike has not entered the window


def deviation_of(watch: SpikeWatch, row: int) -> float:
    values: torch.Tensor = watch.tensors()[f"{SPIKE_PREFIX}window"][row]
    return float(values.std())


@pytest.mark.parametrize(("window", "least"), [(2, 2), (3, 2), (8, 4), (128, 64)])
def test_half_a_window_decides(window: int, least: int) -> None:
    watch = SpikeWatch(window, 6.0)
    for _ in range(least - 1):
        assert watch.observe(1.0, 1.0) is None
    assert watch.observe(1e6, 1.0) is None
    watch.forget()
    for _ in range(least):
        assert watch.observe(1.0, 1.0) is None
    assert watch.observe(1.0, 1.0 + 1e-8) is None  # rounding is no spike
    watch.forget()
    for _ in range(least):
        watch.observe(1.0, 1.0)
    assert watch.observe(1.0, 1.1) is not None


def test_the_window_moves() -> None:
    watch = SpikeWatch(4, 2.0)
    for value in range(9, -1, -1):
        assert watch.observe(float(value), 1.0) is None, value
    assert watch.tensors()[f"{SPIKE_PREFIX}window"].tolist() == [[3.0, 2.0, 1.0, 0.0], [1.0] * 4]


def test_a_constant_of_zero_leaves_no_deviation_to_count_in() -> None:
    watch = SpikeWatch(2, 6.0)
    assert watch.observe(0.0, 0.0) is None
    assert watch.observe(0.0, 0.0) is None
    spike = watch.observe(1.0, 0.0)
    assert spike is not None
    assert spike.deviations == math.inf


def test_a_config_that_says_off_is_read_back(corpus: Path, tmp_path: Path) -> None:
    config = load_config(tiny_overrides(corpus, tmp_path))
    assert config.train.spike is SpikeAction.off
    assert load_config(["train.spike=off"]).train.spike is SpikeAction.off
    assert "spike: 'off'" in config.to_yaml()


# Whole runs


class Runs:
    """Runs over one corpus, some of whose batches make a spike or are not finite; stopped and killed where wanted."""

    def __init__(self, path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path, self._root, self._monkeypatch = path, root, monkeypatch
        self.batches: list[int] = []  # indices of those that the last run asked for

    def __getitem__(self, name: str) -> Path:
        return self._root / name

    def __call__(
        self,
        name: str,
        *overrides: str,
        spikes: tuple[int, ...] = (),
        poisoned: tuple[int, ...] = (),
        stop: int | None = None,
        kill: int | None = None,
        deferred: bool = False,
    ) -> ExitCode | None:
        """The exit code, or None for a run that was killed. ``stop``, ``kill``: at which batch that it asks for."""
        self.batches = []

        def act(index: int, batch: Batch) -> Batch:
            if len(self.batches) == kill:
                raise Killed
            if len(self.batches) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            self.batches.append(index)
            if index in spikes:
                weights = batch.weights.clone()
                weights[:, ::2] = -0.95  # together they weigh little, and the loss is divided by that
                return replace(batch, weights=weights)
            return replace(batch, weights=batch.weights * torch.nan) if index in poisoned else batch

        with self._monkeypatch.context() as patch:
            tamper(patch, act)
            if deferred:
                defer(patch)
            try:
                return train_here(load_config(tiny_overrides(self._path, self[name], *LONG, *overrides)))
            except Killed:
                return None

    def rows(self, name: str) -> dict[int, dict[str, Any]]:
        return read_metrics(self[name] / "metrics.jsonl", "train")

    def skipped(self, name: str) -> dict[int, str]:
        return {step: row["skipped"].split(":")[0] for step, row in self.rows(name).items() if "skipped" in row}

    def spikes(self, name: str) -> list[tuple[Any, ...]]:
        rows = read_rows(self[name] / "metrics.jsonl", "spike")
        return [(row["step"], row["action"], row["samples"], row["back_to"]) for row in rows]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return read_tensors(list_checkpoints(self[name] / "checkpoints")[-1])

    def steps(self, name: str) -> list[int]:
        return [int(path.name[5:]) for path in list_checkpoints(self[name] / "checkpoints")]

    def done(self, name: str) -> dict[str, Any]:
        return json.loads((self[name] / "done.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture
def runs(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(corpus, tmp_path, monkeypatch)


@pytest.fixture
def streamed(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:  # noqa: F811
    return Runs(texts, tmp_path, monkeypatch)


def test_a_spike_is_skipped_and_named(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    options, spikes = ("train.spike=skip", "precision=fp8_delayed"), (9, 13)
    assert runs("alone", *options, spikes=spikes) is ExitCode.FINISHED
    assert runs.spikes("alone") == [(10, "skip", [72, 79], None), (14, "skip", [104, 111], None)]
    row = runs.rows("alone")[10]
    assert row["skipped"].startswith("spike: ")
    assert "gradient norm" in row["skipped"]
    assert "deviations above" in row["skipped"]
    assert row["samples"] == [72, 79]
    assert list(runs.skipped("alone")) == [10, 14]
    assert "warning: step 10 skipped on all ranks: spike: " in capsys.readouterr().out
    tensors = runs.tensors("alone")
    assert float(tensors["optim.norm.weight.step"]) == 12.0  # two updates were not done
    assert [int(tensors[name]) for name in (COUNT, LEFT_OUT)] == [2, 0]
    norms = [row["grad_norm"] for step, row in runs.rows("alone").items() if step in (7, 8, 9, 11, 12, 13)]
    assert tensors[f"{SPIKE_PREFIX}window"][1].tolist() == norms
    assert runs.done("alone")["status"] == "finished"
    # Stopped in the very step, and killed before a checkpoint: the same digits.
    assert runs("run", *options, spikes=spikes, stop=9) is ExitCode.STOPPED
    assert runs("run", *options, spikes=spikes, kill=1) is None
    assert runs("run", *options, spikes=spikes) is ExitCode.FINISHED
    assert compare_runs(runs["alone"], runs["run"]) == []


def test_without_a_spike_nothing_changes_and_off_saves_nothing(runs: Runs) -> None:
    for name in ("off", "rollback"):
        assert runs(name, f"train.spike={name}") is ExitCode.FINISHED
    assert not [name for name in runs.tensors("off") if name.startswith(SPIKE_PREFIX)]
    (problem,) = compare_runs(runs["off"], runs["rollback"])
    assert problem == "names of the final tensors: train.spike_count is in one alone, of 3"
    assert runs.spikes("rollback") == []
    try:
        assert restore_run(runs["rollback"]).state.step == 14  # who only looks at the weights opens it too
    finally:
        distributed.finish()


def test_a_run_goes_back_and_leaves_the_batches_out(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """Two spikes in a row, and one in the last step; also on a device that is not waited for otherwise."""
    for name in ("deferred", "run"):
        deferred = name == "deferred"
        assert runs(name, "train.spike=rollback", spikes=(9, 12, 18), deferred=deferred) is ExitCode.FINISHED
    assert runs.spikes("run") == [
        (10, "rollback", [64, 79], 8),
        (11, "rollback", [80, 103], 8),
        (14, "rollback", [136, 151], 12),
    ]
    assert runs.batches == list(range(21))
    assert "back to step 8: samples 64 to 79 of the run are left out" in capsys.readouterr().out
    tensors = runs.tensors("run")
    assert float(tensors["optim.norm.weight.step"]) == 14.0
    assert [int(tensors[name]) for name in ("train.step", COUNT, LEFT_OUT)] == [14, 3, 7]
    written = [row["step"] for row in read_rows(runs["run"] / "metrics.jsonl", "train")]
    assert written == [*range(1, 11), *range(9, 12), *range(9, 15), *range(13, 15)]
    assert not runs.skipped("run")  # of a step that was done twice the last row counts
    # Norms are not of the same digits, and so the words about them.
    told = [[row | {"skipped": None} for row in all_rows(runs[name])] for name in ("deferred", "run")]
    waited, there = ([row for row in rows if row["kind"] != "spike"] for rows in told)
    assert waited == there
    assert runs.spikes("deferred") == runs.spikes("run")


@pytest.mark.slow
@pytest.mark.parametrize("data", [pytest.param("shards", marks=pytest.mark.long), "stream"])
def test_a_rollback_is_the_same_wherever_a_run_is_stopped_or_killed(
    runs: Runs, streamed: Runs, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    runs, options = (streamed, ("data=c4_stream",)) if data == "stream" else (runs, ("precision=fp8_delayed",))
    options, spikes = ("train.spike=rollback", *options), (10, 12)

    def go_on(**until: int) -> ExitCode | None:
        return runs("run", *options, spikes=spikes, **until)  # type: ignore[arg-type]

    assert runs("alone", *options, spikes=spikes) is ExitCode.FINISHED
    assert runs.batches == list(range(19))
    assert go_on(stop=8) is ExitCode.STOPPED
    assert go_on(stop=0) is ExitCode.STOPPED
    assert runs.steps("run") == [8, 9, 10]  # the scheduled one stays, beside the last two

    def die_after_one(paths: Iterable[Path]) -> None:
        real(itertools.islice(paths, 1))
        raise Killed

    with monkeypatch.context() as patch:
        real = checkpointer._remove
        patch.setattr(checkpointer, "_remove", die_after_one)
        assert go_on() is None
    assert runs.steps("run") == [8, 9]  # the newest went first: these are of one path
    assert go_on(kill=3) is None
    assert runs.batches == [9, 10, 11]
    assert runs.steps("run") == [8]
    assert go_on(stop=3) is ExitCode.STOPPED
    assert runs.batches == [8, 9, 10, 11]
    assert go_on(stop=0) is ExitCode.STOPPED  # in the very step that is a spike
    assert runs.batches == [12]
    assert runs.done("run")["step"] == 8
    assert go_on(kill=9) is None
    assert runs.batches == [*range(8, 17)]
    assert runs.steps("run") == [8, 12]
    assert go_on() is ExitCode.FINISHED
    assert runs.batches == [17, 18]
    assert compare_runs(runs["alone"], runs["run"]) == []
    assert set(map(str, runs.spikes("run"))) == set(map(str, runs.spikes("alone")))


@pytest.mark.parametrize(("action", "step"), [("skip", 10), ("rollback", 7)])
def test_more_spikes_than_the_limit_are_a_divergence(runs: Runs, action: str, step: int) -> None:
    options, spikes = (f"train.spike={action}", "train.spike_limit=1", "train.steps=10"), (6, 9)
    assert runs("run", *options, spikes=spikes) is ExitCode.DIVERGED
    assert [(spike[0], spike[1]) for spike in runs.spikes("run")] == [(7, action), (step, "end")]
    assert runs.done("run")["step"] == step
    assert runs.done("run")["reason"].startswith(f"more than train.spike_limit=1 spikes: at step {step} gradient norm")
    assert runs("run", *options, "train.spike_limit=2", spikes=spikes) is ExitCode.FINISHED


def test_what_is_not_finite_is_no_spike_and_enters_no_window(runs: Runs) -> None:
    fp16 = ("precision=fp16", "precision.args.init_scale=1.0e11", "precision.args.backoff=1.0e-8")
    assert runs("run", "train.spike=skip", *fp16, spikes=(10,), poisoned=(8, 9)) is ExitCode.FINISHED
    skipped = runs.skipped("run")
    assert {step: skipped.pop(step) for step in (9, 10, 11)} == {
        9: "loss nan, grad norm nan",
        10: "loss nan, grad norm nan",
        11: "spike",
    }
    assert set(skipped.values()) == {next(iter(skipped.values()))}
    assert next(iter(skipped.values())).startswith("gradient overflow at loss scale")
    assert runs.spikes("run") == [(11, "skip", [80, 87], None)]
    tensors = runs.tensors("run")
    norms = [row["grad_norm"] for step, row in runs.rows("run").items() if "skipped" not in row]
    assert tensors[f"{SPIKE_PREFIX}window"][1].tolist() == norms[-6:]
    assert int(tensors["train.nonfinite_in_a_row"]) == 0


def test_where_there_is_nothing_to_go_back_to_the_step_is_skipped(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("train.spike=rollback", "train.steps=11")
    assert runs("run", *options, spikes=(3, 9), stop=8) is ExitCode.STOPPED
    assert runs.spikes("run") == [(4, "skip", [24, 31], None)]
    assert "warning: not back to step 0: there is no checkpoint before it" in capsys.readouterr().out
    damaged = runs["run"] / "checkpoints" / "step-00000008" / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert runs("run", *options, spikes=(3, 9)) is ExitCode.FINISHED
    assert runs.spikes("run")[1:] == [(10, "skip", [72, 79], None)]
    assert "not back to step 8: checkpoint" in (said := capsys.readouterr().out)
    assert "is damaged (__0_0.distcp has" in said
    assert int(runs.tensors("run")[COUNT]) == 2


def test_a_checkpoint_amid_nonfinite_steps_is_none_to_go_back_to(runs: Runs) -> None:
    """Only a run that is stopped there writes one."""
    options = ("train.spike=rollback", "train.steps=10")
    assert runs("alone", *options, spikes=(8,), poisoned=(7,)) is ExitCode.FINISHED
    assert runs.spikes("alone") == [(9, "skip", [64, 71], None)]
    assert runs("run", *options, spikes=(8,), poisoned=(7,), stop=7) is ExitCode.STOPPED
    assert runs.steps("run")[-1] == 8
    assert runs("run", *options, spikes=(8,), poisoned=(7,)) is ExitCode.FINISHED
    assert compare_runs(runs["alone"], runs["run"]) == []


def test_what_is_done_about_spikes_can_change_within_a_run(streamed: Runs) -> None:
    runs, data = streamed, "data=c4_stream"
    assert runs("run", data, stop=4) is ExitCode.STOPPED
    assert runs("run", data, "train.spike=rollback", spikes=(9,), stop=6) is ExitCode.STOPPED
    assert runs.spikes("run") == [(10, "rollback", [64, 79], 8)]
    window = runs.tensors("run")[f"{SPIKE_PREFIX}window"]
    assert int((window[1] >= 0).sum()) == 5  # of steps 6 to 10: it began empty
    changed = ("train.spike=skip", "train.spike_window=4")
    assert runs("run", data, *changed, spikes=(14,), stop=2) is ExitCode.STOPPED
    assert runs.batches == [12, 13, 14]
    assert runs.spikes("run")[1:] == [(13, "skip", [112, 119], None)]  # the window had begun again at step 11
    assert runs("run", data, "train.spike=off") is ExitCode.FINISHED
    assert runs.batches == [15]  # what was left out stays so
    tensors = runs.tensors("run")
    assert [name for name in tensors if name.startswith(SPIKE_PREFIX)] == [LEFT_OUT]
    assert int(tensors[LEFT_OUT]) == 2


def test_a_validation_before_a_rollback_is_of_another_path(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows: list[dict[str, Any]] = [{"kind": "eval", "step": 20}, {"kind": "eval", "step": 25}]
    for row, newest in (
        (rows[1], 25),
        ({"kind": "spike", "step": 27, "back_to": None}, 25),
        ({"kind": "spike", "step": 28, "back_to": 20}, 20),
        ({"kind": "eval", "step": 22}, 22),
    ):
        rows.append(row)
        file.write_text("".join(json.dumps(each) + "\n" for each in rows))
        assert evaluated_step(file) == newest
    assert evaluated_step(tmp_path / "none") == -1
