"""The metrics file survives torn lines, full disks and trackers that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer import metrics
from trainer.metrics import LogConfig, MetricsFile, Trackers, read_metrics


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 1 / 3 + step} | more


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_floats_keep_every_digit_and_rows_are_there_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m")
    file.write(row(1))
    assert lines(tmp_path / "m") == [row(1)]


def test_a_loss_that_is_not_finite_is_still_json(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "m").write(row(1, loss=float("nan"), grad_norm=float("inf")))
    assert lines(tmp_path / "m") == [row(1, loss=None, grad_norm=None)]


@pytest.mark.parametrize(
    "torn",
    [b'{"kind": "tr', b"\x00\x00\x00", b'{"kind": "train"}garbage\n', b"\n"],
    ids=["cut", "zeros", "garbage", "an empty line"],
)
def test_a_torn_last_line_is_repaired(tmp_path: Path, torn: bytes) -> None:
    good = json.dumps(row(1)).encode() + b"\n"
    (tmp_path / "m").write_bytes(good + torn)
    file = MetricsFile(tmp_path / "m")
    file.write(row(2))
    assert lines(tmp_path / "m") == [row(1), row(2)]


def test_of_a_repeated_step_the_last_row_counts(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m")
    for step, loss in ((1, 3.0), (2, 2.0), (1, 4.0)):
        file.write(row(step, loss=loss))
    file.write({"kind": "eval", "step": 2, "loss": 9.0})
    assert {step: r["loss"] for step, r in read_metrics(tmp_path / "m", "train").items()} == {1: 4.0, 2: 2.0}
    assert read_metrics(tmp_path / "none", "train") == {}


def test_rows_wait_while_the_disk_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = MetricsFile(tmp_path / "m")
    file.write(row(1))
    real = file._file

    class Full:
        def write(self, data: bytes) -> int:
            return real.write(data[:5])  # what a nearly full disk does: part of the line

        def truncate(self, size: int) -> int:
            raise OSError(30, "Read-only file system")

    file._file = Full()  # type: ignore[assignment]
    file.write(row(2))
    file.write(row(3))
    assert (tmp_path / "m").read_bytes().count(b"\n") == 1  # two torn tails, which could not be cut off
    file._file = real
    file.write(row(4))
    assert lines(tmp_path / "m") == [row(step) for step in (1, 2, 3, 4)]
    assert capsys.readouterr().out.count("cannot be written") == 1


def test_tensorboard_gets_the_rows(tmp_path: Path) -> None:
    trackers = Trackers(LogConfig(trackers=["tensorboard"]), tmp_path, {"seed": 0})
    trackers.log(row(1))
    trackers.close()
    assert list(tmp_path.glob("tensorboard/**/events*"))


@pytest.mark.parametrize("when", ["start", "log", "finish"])
def test_a_failing_tracker_stops_nothing(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        def log(self, values: dict[str, Any], step: int | None) -> None:
            if when == "log":
                raise OSError("no network")

        def finish(self) -> None:
            if when == "finish":
                raise SystemExit(3)

    def start(*arguments: Any) -> Failing:
        if when == "start":
            raise ValueError("no key")
        return Failing()

    monkeypatch.setattr(metrics, "_start_tracker", start)
    trackers = Trackers(LogConfig(trackers=["wandb"]), tmp_path, {})
    trackers.log(row(1))
    trackers.log(row(2))
    trackers.close()
    assert capsys.readouterr().out.count("warning: tracker wandb") == 1


def test_wandb_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start in (1, 2):  # the second time as after a resume, from an earlier step
        trackers = Trackers(LogConfig(trackers=["wandb"]), tmp_path, {"seed": 0})
        for step in range(start, start + 3):
            trackers.log(row(step))
        trackers.close()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    assert len((tmp_path / "wandb_id.txt").read_text()) == 12


CONFIG = {
    "precision": {"name": "exmy_e8m3", "recipe": "exmy", "args": {"bits": [8, 3]}},
    "model": {"name": "llama_tiny"},
}


def test_wandb_gets_the_whole_config_a_group_and_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Fake:
        """As accelerate's tracker of W&B."""

        def __init__(self, project: str, **options: Any) -> None:
            told.append(options)
            self.run = self

        def start(self) -> None:
            pass

        def define_metric(self, name: str, **options: Any) -> None:
            pass

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.append(values)

        def log(self, values: dict[str, Any], step: int | None) -> None:
            told.append(values)

        def finish(self) -> None:
            pass

    monkeypatch.setitem(metrics.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    run = tmp_path / "grid" / "seed=0"
    run.mkdir(parents=True)
    (run.parent / "multirun.yaml").touch()
    for _ in range(2):
        trackers = Trackers(LogConfig(trackers=["wandb"]), run, CONFIG)
        trackers.log(row(3, time=1e9))
        trackers.close()
    options, values, logged, again = told[:4]
    assert (options["name"], options["group"], options["resume"]) == ("seed=0", "grid", "allow")
    assert options["tags"] == ["exmy", "exmy_e8m3", "llama_tiny"]
    assert values == CONFIG
    assert logged == {"train/loss": 1 / 3 + 3, "trainer/step": 3}  # of which the last is the x axis
    assert again["id"] == options["id"]


def test_a_run_alone_is_of_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(metrics.SWEEP, raising=False)
    assert metrics.sweep_of(tmp_path / "runs" / "a") is None
    monkeypatch.setenv(metrics.SWEEP, "x")
    assert metrics.sweep_of(tmp_path / "runs" / "a") == "runs"


def test_tensorboard_shows_the_config_as_text_and_no_clock(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trackers = Trackers(LogConfig(trackers=["tensorboard"]), tmp_path, CONFIG)
    trackers.log(row(3, time=1e9))
    trackers.close()
    (file,) = tmp_path.glob("tensorboard/events*")
    events = accumulator.EventAccumulator(str(file)).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert events.Scalars("train/loss")[0].step == 3
    (text,) = events.Tensors("config/text_summary")
    assert b"    recipe: exmy\n" in text.tensor_proto.string_val[0]
