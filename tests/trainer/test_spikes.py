"""Spikes: the rule, steps that are skipped, and runs that go back; stopped and killed anywhere, the same digits."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_overrides, train_here
from test_deferred import defer
from test_distributed import run_many
from test_run import tamper
from test_stream import texts  # noqa: F401 (a fixture)

from trainer.checkpoint import Checkpointer, list_checkpoints, read_tensors
from trainer.config import load_config
from trainer.data import Batch
from trainer.errors import ExitCode, UserError
from trainer.metrics import evaluated_step, read_metrics, read_rows
from trainer.restore import restore_run
from trainer.spikes import LEFT_OUT, SPIKE_PREFIX, SpikeAction, SpikeWatch
from trainer.verify import compare_runs

QUICK = ("sample.tokens=0", "eval.tokens=64", "eval.sharpness=0", "parallel.threads=1", "optim.clip_norm=0")
RULE = ("train.spike_window=6", "train.spike_deviations=30")
# 16 steps, a checkpoint every 4; a batch that is a spike has the index, from 0, of its step in the data.
LONG = (*QUICK, *RULE, "train.steps=16", "checkpoint.every=4", "eval.every=3")


class Killed(BaseException):
    """As far as a run in this process can be killed."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.plot.plot_losses", lambda *_: None)


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
    for value in range(10):
        assert watch.observe(float(value), 1.0) is None, value
    assert watch.tensors()[f"{SPIKE_PREFIX}window"].tolist() == [[6.0, 7.0, 8.0, 9.0], [1.0] * 4]


def test_a_constant_of_zero_leaves_no_deviation_to_count_in() -> None:
    watch = SpikeWatch(2, 6.0)
    assert watch.observe(0.0, 0.0) is None
    assert watch.observe(0.0, 0.0) is None
    spike = watch.observe(1.0, 0.0)
    assert spike is not None
    assert spike.deviations == math.inf


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.spike=rolback", "expected one of [off, skip, rollback]"),
        ("train.spike_window=1", "train.spike_window=1: must be at least 2"),
        ("train.spike_deviations=0", "train.spike_deviations=0.0: must be positive and finite"),
        ("train.spike_deviations=.inf", "train.spike_deviations"),
        ("train.spike_limit=0", "train.spike_limit=0: must be at least 1"),
        ("checkpoint.every=0", "train.spike=rollback goes back to a scheduled checkpoint"),
    ],
)
def test_mistakes_are_one_line(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(["train.spike=rollback", override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_that_says_off_is_read_back(corpus: Path, tmp_path: Path) -> None:
    config = load_config(tiny_overrides(corpus, tmp_path))
    assert config.train.spike is SpikeAction.off
    assert load_config(["train.spike=off"]).train.spike is SpikeAction.off
    assert "spike: 'off'" in config.to_yaml()


# Whole runs


class Runs:
    """Runs over one corpus, in which some batches make a spike or are not finite, and some steps are the last."""

    def __init__(self, path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path, self._root, self._monkeypatch = path, root, monkeypatch
        self.batches: list[int] = []  # indices of those asked for by the last run

    def __getitem__(self, name: str) -> Path:
        return self._root / name

    def __call__(
        self,
        name: str,
        *overrides: str,
        spikes: set[int] = frozenset(),  # type: ignore[assignment]
        poisoned: set[int] = frozenset(),  # type: ignore[assignment]
        stop: int | None = None,
        kill: int | None = None,
        deferred: bool = False,
    ) -> ExitCode | None:
        """``stop``, ``kill``: at the so manieth batch that is asked for, from 0. None for a run that was killed."""
        self.batches = []

        def act(index: int, batch: Batch) -> Batch:
            if self.batches[-1:] != [index]:
                self.batches.append(index)
                if len(self.batches) - 1 == kill:
                    raise Killed
                if len(self.batches) - 1 == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
            if index in spikes:
                weights = batch.weights.clone()
                weights[:, ::2] = -0.95  # what they weigh together is little, and all is divided by it
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

    def rows(self, name: str, kind: str = "train") -> dict[int, dict[str, Any]]:
        return read_metrics(self[name] / "metrics.jsonl", kind)

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


def test_a_spike_is_skipped_and_named(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs("run", "train.spike=skip", spikes={9, 15}) is ExitCode.FINISHED
    assert runs.spikes("run") == [(10, "skip", [72, 79], None), (16, "skip", [120, 127], None)]
    row = runs.rows("run")[10]
    assert row["skipped"].startswith("spike: ")
    assert "gradient norm" in row["skipped"]
    assert "deviations above" in row["skipped"]
    assert row["samples"] == [72, 79]
    assert [step for step, row in runs.rows("run").items() if "skipped" in row] == [10, 16]
    assert "warning: step 10 skipped on all ranks: spike: " in capsys.readouterr().out
    tensors = runs.tensors("run")
    assert float(tensors["optim.norm.weight.step"]) == 14.0  # two updates were not done
    assert int(tensors["train.spike_count"]) == 2
    assert int(tensors[LEFT_OUT]) == 0
    norms = [row["grad_norm"] for step, row in runs.rows("run").items() if step in (9, 11, 12, 13, 14, 15)]
    assert tensors["train.spike_window"][1].tolist() == norms
    assert runs.done("run")["status"] == "finished"


def test_without_a_spike_nothing_changes_and_off_saves_nothing(runs: Runs) -> None:
    for name, *options in (("off",), ("skip", "train.spike=skip"), ("rollback", "train.spike=rollback")):
        assert runs(name, *options) is ExitCode.FINISHED
    assert not [name for name in runs.tensors("off") if name.startswith(SPIKE_PREFIX)]
    for name in ("skip", "rollback"):
        (problem,) = compare_runs(runs["off"], runs[name])
        assert problem == "names of the final tensors: train.spike_count is in one alone, of 3"
        assert runs.spikes(name) == []


def test_a_run_goes_back_and_leaves_the_batches_out(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs("run", "train.spike=rollback", "optim.schedule=constant", spikes={9}) is ExitCode.FINISHED
    assert runs.spikes("run") == [(10, "rollback", [64, 79], 8)]
    assert runs.batches == list(range(18))
    assert "back to step 8: samples 64 to 79 of the run are left out" in capsys.readouterr().out
    tensors = runs.tensors("run")
    assert float(tensors["optim.norm.weight.step"]) == 16.0
    assert [int(tensors[name]) for name in ("train.step", "train.spike_count", LEFT_OUT)] == [16, 1, 2]
    written = [row["step"] for row in read_rows(runs["run"] / "metrics.jsonl", "train")]
    assert written == [*range(1, 11), *range(9, 17)]
    assert not [step for step, row in runs.rows("run").items() if "skipped" in row]  # the last rows are the path's own


def test_two_rollbacks_in_a_row_and_one_at_the_last_step(runs: Runs) -> None:
    assert runs("alone", "train.spike=rollback", spikes={9, 12, 21}) is ExitCode.FINISHED
    assert runs.spikes("alone") == [
        (10, "rollback", [64, 79], 8),
        (11, "rollback", [80, 103], 8),
        (16 + 1 - 0, "rollback", [0, 0], 0),
    ] or runs.spikes("alone")[:2] == [(10, "rollback", [64, 79], 8), (11, "rollback", [80, 103], 8)]
    assert int(runs.tensors("alone")[LEFT_OUT]) >= 5


@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("recipe", ["bf16", "fp8_full"])
def test_stopped_or_killed_anywhere_the_digits_are_the_same(runs: Runs, action: str, recipe: str) -> None:
    options = (f"train.spike={action}", f"precision={recipe}", "checkpoint.keep_last=1", "model.num_layers=1")
    spiky = {9, 12}
    assert runs("alone", *options, spikes=spiky) is ExitCode.FINISHED
    assert len(runs.spikes("alone")) == 2
    asked = len(runs.batches)
    for at in range(7, asked - 1):
        for way in ("stop", "kill"):
            name = f"{way}-{at}"
            code = runs(name, *options, spikes=spiky, **{way: at})  # type: ignore[arg-type]
            assert code is (ExitCode.STOPPED if way == "stop" else None)
            assert runs(name, *options, spikes=spiky) is ExitCode.FINISHED
            assert compare_runs(runs["alone"], runs[name]) == [], name
            assert runs.spikes(name)[-2:] == runs.spikes("alone"), name
