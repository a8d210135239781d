"""The metrics file survives torn lines, full disks and trackers that fail."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from conftest import train_here
from narrowgauge.trainer import trackers as module
from narrowgauge.trainer.config import TrainConfig
from narrowgauge.trainer.console import Console, ConsoleLog, LogConfig
from narrowgauge.trainer.distributed import say
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.metrics import MetricsFile, read_metrics
from narrowgauge.trainer.trackers import Trackers


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

    monkeypatch.setattr(module, "_start_tracker", start)
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

    monkeypatch.setitem(module.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
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
    monkeypatch.delenv(module.SWEEP, raising=False)
    assert module.sweep_of(tmp_path / "runs" / "a") is None
    monkeypatch.setenv(module.SWEEP, "x")
    assert module.sweep_of(tmp_path / "runs" / "a") == "runs"


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


def shown(step: int) -> dict[str, Any]:
    return row(step, lr=3e-4, grad_norm=0.5, tokens_per_second=2000.0)


def test_a_line_tells_what_one_looks_for(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(LogConfig(every=2), 10, 0, memory=lambda: 1.5e9, flops=1e9, peak=1e13)
    for step in range(1, 5):
        console.train(shown(step), seconds=1.0)
    told = capsys.readouterr().out.splitlines()
    assert [line.partition("  loss")[0] for line in told] == ["step  1/10", "step  2/10", "step  4/10"]
    assert told[-1] == (
        "step  4/10  loss 4.3333  lr 3.00e-04  grad norm 0.500  2,000 tok/s  MFU 20.0%  memory 1.50 GB  0:06 left"
    )


def test_no_share_is_told_of_a_device_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(LogConfig(), 10, 0, memory=lambda: 2e9, flops=1e9)
    console.train(shown(1), seconds=1.0)
    assert "MFU" not in capsys.readouterr().out
    assert "MFU" not in dict(console.totals())


def test_a_first_step_that_compiles_is_no_measure_of_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(LogConfig(every=1), 100, 0, memory=lambda: 1e9)
    console.train(row(1, lr=0.1, grad_norm=0.5, tokens_per_second=20.0), seconds=100.0)
    for step in (2, 3):
        console.train(shown(step), seconds=1.0)
    assert capsys.readouterr().out.splitlines()[-1].endswith("2,000 tok/s  memory 1.00 GB  1:37 left")


def test_the_total_is_of_this_attempt() -> None:
    console = Console(LogConfig(), 40, 30, memory=lambda: 3.25e9, flops=1e9, peak=4e12)
    assert console.totals() == []
    for step in (31, 32, 33):
        console.train(shown(step), seconds=0.5)
    told = dict(console.totals())
    assert told["trained"].startswith("3 steps, 3,000 tokens in 0:0")
    assert told["trained"].endswith(", at 2,000 tokens/s in steps")
    assert told["training loss"] == "33.3333 nats per token, at step 33"
    assert told["peak memory"] == "3.25 GB, of rank 0"
    assert told["MFU"] == "50.0%"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_for_the_terminal_and_lines_for_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ConsoleLog(tmp_path / "console.log") as log:
        console = Console(LogConfig(every=2), 4, 0, memory=lambda: 1.5e9, log=log)
        for step in range(1, 5):
            console.train(shown(step), seconds=1.0)
            console.line(f"after {step}")
        console.close()
    bar = terminal.getvalue()
    for word in ("4/4", "loss 4.3333", "lr 3.0e-04", "norm 0.50", "2,000 tok/s", "1.50 GB"):
        assert word in bar
    kept = (tmp_path / "console.log").read_text().splitlines()
    assert [line.split("  ")[0] for line in kept[1:]] == [
        *("step 1/4", "after 1", "step 2/4", "after 2", "after 3", "step 4/4", "after 4"),
    ]
    assert "\r" not in (tmp_path / "console.log").read_text()


def fail(error: Exception) -> None:
    say("two \udcff")
    raise error


def test_the_log_has_what_is_printed_and_what_ends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "console.log"
    out, err = sys.stdout, sys.stderr
    with ConsoleLog(path):
        say("one")
        print("a warning", file=sys.stderr)
    for error in (UserError("no such thing"), ZeroDivisionError("by zero")):  # attempts after the first
        with pytest.raises(type(error)), ConsoleLog(path):
            fail(error)
    assert (sys.stdout, sys.stderr) == (out, err)
    text = path.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("---")]
    assert lines[:4] == ["one", "a warning", "two \\udcff", "error: no such thing"]
    assert lines[5].startswith("Traceback")
    assert lines[-1] == "ZeroDivisionError: by zero"
    assert text.count("\n--- ") == 2  # and the first line
    assert capsys.readouterr().out == "one\ntwo \\udcff\ntwo \\udcff\n"


def test_nothing_is_written_twice_where_the_output_is_the_log(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    with path.open("a") as file, redirect_stdout(file), ConsoleLog(path):
        say("once")
    assert path.read_text() == "once\n"


def test_a_closed_terminal_and_a_full_disk_stop_neither_run_nor_log(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    reading, writing = os.pipe()
    os.close(reading)
    terminal = os.fdopen(writing, "w", buffering=1)
    with redirect_stdout(terminal):
        with ConsoleLog(path):
            say("one")
            say("two")
        assert sys.stdout is not terminal  # what is left in its buffer would be an error at the end
        with ConsoleLog(tmp_path / "no" / "directory"):
            say("three")
    assert path.read_text().splitlines()[1:] == ["one", "two"]


def test_a_run_tells_its_checkpoints_and_its_total(
    tiny: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("train.steps=4")
    assert train_here(config) is ExitCode.FINISHED
    told = capsys.readouterr().out
    for step in (2, 4):
        assert re.search(rf"^checkpoint of step {step} written: [\d.,]+ [kM]B in \d+\.\d s$", told, re.M)
    for label in ("trained", "training loss", "peak memory", "validation loss", "checkpoint"):
        assert re.search(rf"^{label} +\S", told, re.M), label
    assert re.search(r"^trained            4 steps, 1,024 tokens in ", told, re.M)
    log = Path(config.run.dir) / "console.log"
    first = log.read_text()
    assert first.partition("\n")[2] == told
    assert train_here(config) is ExitCode.FINISHED  # nothing to do
    second = log.read_text()
    assert second.startswith(first)
    assert second.endswith("raise train.steps to go on\n")


def test_a_run_that_is_bad_input_says_so_in_its_log(tiny: Callable[..., TrainConfig]) -> None:
    config = tiny("run.resume=must")
    with pytest.raises(UserError):
        train_here(config)
    assert "error: run.resume=must" in (Path(config.run.dir) / "console.log").read_text()
