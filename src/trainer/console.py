"""What a run prints: progress while it trains, and a file with all of it."""

from __future__ import annotations

import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from .distributed import say
from .errors import RunFailed, UserError, require_at_least

TRACKERS = ("wandb", "tensorboard", "trackio")


@dataclass(kw_only=True)
class LogConfig:
    """What is shown while training, besides ``metrics.jsonl``, which always has every step."""

    every: int = 10  # steps between lines where there is no terminal for a progress bar
    trackers: list[str] = field(default_factory=list)  # of wandb, tensorboard, trackio
    project: str = "narrowgauge"
    wandb_mode: str = "offline"  # offline, online or disabled

    def validate(self) -> None:
        """Raises ValueError for an unknown tracker or mode."""
        require_at_least("log", self, every=1)
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise ValueError(f"log.trackers: no tracker named {tracker!r}; there are: {', '.join(TRACKERS)}")
        if self.wandb_mode not in ("offline", "online", "disabled"):
            raise ValueError(f"log.wandb_mode={self.wandb_mode}: one of offline, online, disabled")


class ConsoleLog:
    """A file that gets what this process prints while the context lasts, and what ends it; attempts one after another.

    Where standard output is that file already, as in a sweep, nothing is written twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun = False

    def __enter__(self) -> ConsoleLog:
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
        if shown_on is not None and self._is(shown_on):
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
        rate = f"{speed:,.0f} tok/s{self._share(speed, '  MFU ')}"
        if due:
            left = _clock(self._seconds * (self._total - step))
            line = (
                f"step {step:>{len(str(self._total))}}/{self._total}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
                f"grad norm {row['grad_norm']:.3f}  {rate}  memory {self._most}  {left} left"
            )
            if self._bar is None:
                say(line)
            elif self._log is not None:
                self._log.write(f"{line}\n")
        if self._bar is not None:
            shown = f"loss {row['loss']:.4f} lr {row['lr']:.1e} norm {row['grad_norm']:.2f} {rate} {self._most}"
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
        totals = [
            ("trained", f"{done} in {_clock(time.monotonic() - self._began)}, at {speed:,.0f} tokens/s in steps"),
            ("training loss", f"{self._last['loss']:.4f} nats per token, at step {self._last['step']:,}"),
            ("peak memory", f"{gigabytes(self._memory())}, of rank 0"),
        ]
        return [*totals, *([("MFU", self._share(speed))] if self._peak else [])]

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
