"""``metrics.jsonl`` at full precision, progress on the console, experiment trackers."""

from __future__ import annotations

import json
import math
import os
import queue
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tqdm import tqdm

from .distributed import say
from .errors import RunFailed, UserError, one_line

TRACKERS = ("wandb", "tensorboard", "trackio")
SWEEP = "NARROWGAUGE_SWEEP"  # the environment of a sweep's jobs has it
_X_AXIS = "trainer/step"


@dataclass(kw_only=True)
class LogConfig:
    """What is shown while training, beside ``metrics.jsonl``, which always has every step."""

    every: int = 10  # steps between lines where there is no terminal for a progress bar
    trackers: list[str] = field(default_factory=list)  # of wandb, tensorboard, trackio
    project: str = "narrowgauge"
    wandb_mode: str = "offline"  # offline, online or disabled

    def validate(self) -> None:
        """Raises ValueError for an unknown tracker or mode."""
        if self.every < 1:
            raise ValueError(f"log.every={self.every}: must be at least 1")
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise ValueError(f"log.trackers: no tracker named {tracker!r}; there are: {', '.join(TRACKERS)}")
        if self.wandb_mode not in ("offline", "online", "disabled"):
            raise ValueError(f"log.wandb_mode={self.wandb_mode}: one of offline, online, disabled")


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, flushed as written.

    A last line that a killed run left torn is cut off. Rows that cannot be written (a full disk) are kept and tried
    again with the next one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[bytes] = []
        self._warned = False
        self._file = path.open("ab", buffering=0)
        self._length = _repair(path)
        self._file.truncate(self._length)

    def write(self, *rows: dict[str, Any]) -> None:
        for row in rows:
            clean = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in row.items()
            }
            self._pending.append(json.dumps(clean, allow_nan=False).encode() + b"\n")
        self.flush()

    def flush(self) -> bool:
        """Write what is waiting; False if it still waits."""
        try:
            if self._pending and self._path.stat().st_size != self._length:
                self._file.truncate(self._length)  # what an earlier failure left torn
            while self._pending:
                line = self._pending[0]
                written = self._file.write(line)
                if written != len(line):
                    raise OSError(28, "No space left on device")
                self._length += len(line)
                self._pending.pop(0)
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._length)  # no torn line in the middle
            if not self._warned:
                say(f"warning: {self._path} cannot be written ({error.strerror}); rows are kept and tried again")
            self._warned = True
            return False
        return True

    def close(self) -> None:
        if not self.flush():
            say(f"error: {len(self._pending)} rows of {self._path} are lost")
        self._file.close()


def _repair(path: Path) -> int:
    """The length of ``path`` up to its last whole JSON line."""
    data = path.read_bytes()
    length = data.rfind(b"\n") + 1
    while length:
        start = data.rfind(b"\n", 0, length - 1) + 1
        try:
            json.loads(data[start:length])
            return length
        except (ValueError, RecursionError):
            length = start
    return 0


def read_metrics(path: Path, kind: str) -> dict[int, dict[str, Any]]:
    """The rows of one kind by step; of a step that was done twice the last counts, lines that are not JSON do not."""
    rows: dict[int, dict[str, Any]] = {}
    for row in _rows(path):
        if row.get("kind") == kind:
            rows[row["step"]] = row
    return dict(sorted(rows.items()))


def read_rows(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """All rows of one kind, as they stand; for kinds with several rows a step."""
    return (row for row in _rows(path) if row["kind"] == kind)


def evaluated_step(path: Path) -> int:
    """The newest validation of the path that the run is on, -1 if there is none: those before a rollback are not."""
    newest = -1
    for row in _rows(path):
        if row["kind"] == "eval":
            newest = max(newest, row["step"])
        elif row["kind"] == "spike" and isinstance(row.get("back_to"), int):
            newest = min(newest, row["back_to"])
    return newest


def corrupt_lines(path: Path) -> list[int]:
    """The numbers, from 1, of the lines that ``read_metrics`` passes over: what is no row, a torn last one too."""
    return [number for number, row in _numbered(path) if row is None]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    return (row for _, row in _numbered(path) if row is not None)


def _numbered(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) and _is_whole(row) else None


def _is_whole(row: dict[str, Any]) -> bool:
    return type(row.get("step")) is int and 0 <= row["step"] < 2**63 and isinstance(row.get("kind"), str)


def number(value: Any) -> float | None:
    """``value`` as float, None if it is no finite number."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None


class ConsoleLog:
    """A file that gets what this process prints while the context lasts, and what ends it; attempts one after another.

    Where standard output is that file already, as in a sweep, nothing is written twice. ``on`` False: it does nothing.
    """

    def __init__(self, path: Path, *, on: bool = True) -> None:
        self._path = path
        self._on = on
        self._begun = False

    def __enter__(self) -> ConsoleLog:
        if self._on:
            sys.stdout, sys.stderr = _Both(sys.stdout, self), _Both(sys.stderr, self)  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for name in ("stdout", "stderr"):
            if isinstance(stream := getattr(sys, name), _Both):
                setattr(sys, name, stream.stream)
        if isinstance(error, UserError | RunFailed):
            self.write(f"error: {error}\n", sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            self.write("interrupted\n", sys.stderr)
        elif error is not None:
            self.write("".join(traceback.format_exception(kind, error, where)), sys.stderr)

    def write(self, text: str, shown_on: TextIO | None = None) -> None:
        """Append ``text``, unless ``shown_on``, where it is written too, is the file itself."""
        if not self._on or (shown_on is not None and self._is(shown_on)):
            return
        with suppress(OSError), self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            if not self._begun:
                self._begun = True
                file.write(f"--- {time.strftime('%Y-%m-%dT%H:%M:%S%z')} {shlex.join(sys.argv[1:])}\n")
            file.write(text)

    def _is(self, stream: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(stream.fileno()), self._path.stat())
        except (OSError, ValueError, AttributeError):  # no file, or none yet
            return False


class _Both:
    """A stream whose text goes into the log, too; it may be closed at the other end."""

    def __init__(self, stream: TextIO, log: ConsoleLog) -> None:
        self.stream = stream
        self._log = log

    def write(self, text: str) -> int:
        self._log.write(text, self.stream)
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            self.stream.write(text.encode("ascii", "backslashreplace").decode())
        except (ValueError, OSError):
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (ValueError, OSError):
            self._give_up()

    def _give_up(self) -> None:
        self.stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Console:
    """A progress bar on a terminal, plain lines elsewhere and in the log; at the end a total.

    ``flops``: of a token; ``peak``: FLOP/s of all devices together, None where it is not known. ``memory``: bytes of
    this process at most so far.
    """

    def __init__(
        self,
        config: LogConfig,
        total_steps: int,
        first_step: int,
        *,
        memory: Callable[[], float],
        flops: float = 0.0,
        peak: float | None = None,
        log: ConsoleLog | None = None,
    ) -> None:
        self._every = config.every
        self._total = total_steps
        self._memory, self._flops, self._peak, self._log = memory, flops, peak, log
        self._began = time.monotonic()
        self._steps, self._tokens, self._in_steps = 0, 0.0, 0.0
        self._seconds: float | None = None  # a step, smoothed
        self._last: dict[str, Any] = {}
        self._most = ""
        self._bar = None
        terminal = getattr(sys.stderr, "stream", sys.stderr)  # the log gets lines
        if terminal.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=first_step,
                file=terminal,
                dynamic_ncols=True,
                smoothing=0.1,
                bar_format="{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",
            )

    def train(self, row: dict[str, Any], seconds: float) -> None:
        """Show a train row; ``seconds`` is how long its step took."""
        step, tokens = row["step"], row["tokens_per_second"] * seconds
        self._steps, self._tokens, self._in_steps = self._steps + 1, self._tokens + tokens, self._in_steps + seconds
        # The first step may compile: it is no measure of the others.
        new = self._seconds is None or self._steps == 2
        self._seconds = seconds if new else 0.9 * (self._seconds or 0.0) + 0.1 * seconds
        due = step % self._every == 0 or step in (1, self._total)
        if due or not self._most:
            self._most = gigabytes(self._memory())
        speed = tokens / self._seconds
        told = f"{speed:,.0f} tok/s{self._share(speed, '  MFU ')}"
        if due:
            left = _clock(self._seconds * (self._total - step))
            line = (
                f"step {step:>{len(str(self._total))}}/{self._total}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
                f"grad norm {row['grad_norm']:.3f}  {told}  memory {self._most}  {left} left"
            )
            if self._bar is None:
                say(line)
            elif self._log is not None:
                self._log.write(f"{line}\n")
        if self._bar is not None:
            shown = f"loss {row['loss']:.4f} lr {row['lr']:.1e} norm {row['grad_norm']:.2f} {told} {self._most}"
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        self._last = row

    def line(self, text: str) -> None:
        if self._bar is not None:
            with self._bar.external_write_mode(file=self._bar.fp):
                say(text)
        else:
            say(text)

    def totals(self) -> list[tuple[str, str]]:
        """What this process has done: of an attempt that went on, its own part. Empty if that is no step."""
        if not self._steps:
            return []
        speed = self._tokens / self._in_steps
        done = f"{self._steps:,} step{'s' if self._steps > 1 else ''}, {self._tokens:,.0f} tokens"
        told = [
            ("trained", f"{done} in {_clock(time.monotonic() - self._began)}, at {speed:,.0f} tokens/s in steps"),
            ("training loss", f"{self._last['loss']:.4f} nats per token, at step {self._last['step']:,}"),
            ("peak memory", f"{gigabytes(self._memory())}, of rank 0"),
        ]
        return [*told, *([("MFU", self._share(speed))] if self._peak else [])]

    def _share(self, tokens_per_second: float, before: str = "") -> str:
        """Of the peak; nothing where that is not known."""
        return f"{before}{tokens_per_second * self._flops / self._peak:.1%}" if self._peak else ""

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Trackers:
    """Experiment trackers of `accelerate`, fed from a thread of their own: whatever they do, training goes on.

    ``values``: the whole config, as nested mappings of plain values.
    """

    _GIVE_UP_SECONDS = 20.0
    _NO_CURVES = ("step", "time")  # the one is the x axis, the other every tracker's own

    def __init__(self, config: LogConfig, directory: Path, values: dict[str, Any]) -> None:
        self._queue: queue.SimpleQueue[tuple[dict[str, Any], int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if config.trackers:
            arguments = (config, directory, values)
            self._thread = threading.Thread(target=self._run, args=arguments, name="trackers", daemon=True)
            self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        if self._thread is not None:
            kind = row["kind"]
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            values = {f"{kind}/{key}": value for key, value in numbers.items() if key not in self._NO_CURVES}
            self._queue.put((values, row["step"]))

    def close(self) -> None:
        """Let the trackers finish, but do not wait for ever."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(self._GIVE_UP_SECONDS)
            if self._thread.is_alive():
                say(f"warning: a tracker did not finish within {self._GIVE_UP_SECONDS:.0f} s and is left behind")

    def _run(self, config: LogConfig, directory: Path, values: dict[str, Any]) -> None:
        trackers = {}
        for name in config.trackers:
            try:
                trackers[name] = _start_tracker(name, config, directory, values)
            except BaseException as error:
                say(f"warning: tracker {name} cannot start ({one_line(error)}); training goes on without it")
        while (item := self._queue.get()) is not None:
            for name in list(trackers):
                try:
                    row, step = item
                    if name == "wandb":  # it drops a step that goes back, as after a resume: it gets its own counter
                        trackers[name].log(row | {_X_AXIS: step}, step=None)
                    else:
                        trackers[name].log(row, step=step)
                except BaseException as error:
                    say(f"warning: tracker {name} failed ({one_line(error)}); training goes on without it")
                    del trackers[name]
        for name, tracker in trackers.items():
            try:
                tracker.finish()
            except BaseException as error:
                say(f"warning: tracker {name} did not finish: {one_line(error)}")


def _start_tracker(name: str, config: LogConfig, directory: Path, values: dict[str, Any]) -> Any:
    if name not in {str(tracker) for tracker in get_available_trackers()}:
        raise RuntimeError(f"the package {name} is not installed")
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker = kind("tensorboard", logging_dir=directory)
    elif name == "wandb":
        identity = _wandb_id(directory)
        tracker = kind(
            config.project,
            dir=directory,
            id=identity,
            name=directory.resolve().name,
            group=sweep_of(directory),
            tags=_tags(values),
            mode=config.wandb_mode,
            resume="allow",
            settings={"silent": True},
        )
    else:
        tracker = kind(config.project, name=directory.resolve().name, group=sweep_of(directory), resume="allow")
    tracker.start()
    if name == "wandb":
        tracker.run.define_metric(_X_AXIS, hidden=True)
        tracker.run.define_metric("*", step_metric=_X_AXIS)
    if name == "tensorboard":
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        tracker.writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))  # as Markdown's code
        tracker.writer.flush()
    else:
        tracker.store_init_configuration(values)
    return tracker


def sweep_of(directory: Path) -> str | None:
    """The name of the sweep whose run this is, None if it is of none."""
    parent = directory.resolve().parent
    return parent.name if SWEEP in os.environ or (parent / "multirun.yaml").is_file() else None


def _tags(values: dict[str, Any]) -> list[str]:
    """Recipe and model."""
    parts = (("precision", "recipe"), ("precision", "name"), ("model", "name"))
    found = [values[group].get(key) for group, key in parts if isinstance(values.get(group), dict)]
    return list(dict.fromkeys(str(tag)[:64] for tag in found if tag))  # W&B takes no longer ones


def _wandb_id(directory: Path) -> str:
    """One W&B run for one run directory, over all its restarts."""
    file = directory / "wandb_id.txt"
    if not file.exists():
        file.write_text(os.urandom(6).hex(), encoding="utf-8")
    return file.read_text(encoding="utf-8")
