"""Whether a process was asked to stop: by a signal, by the clock, or because its launcher is gone."""

from __future__ import annotations

import re
import signal
import time
from types import FrameType

import psutil

from .lifeline import launched_by_torchrun, launcher_pid, lost_launcher

TIME_IS_UP, LOST_LAUNCHER = 254, 255  # codes, as are the numbers of signals
_CLOCK = re.compile(r"\d+(:[0-5]\d){0,2}")


class StopRequest:
    """Whether this process was asked to stop: SIGTERM, SIGHUP, SIGUSR1, Ctrl-C, ``train.stop_after``, or the launcher
    is gone."""

    _SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, stop_after: str | None = None) -> None:
        """``stop_after``: HH:MM:SS since torchrun, or this process, began."""
        self._code = 0
        self._stop_after = stop_after
        self._deadline = None if stop_after is None else _began() + seconds_of(stop_after)

    def __enter__(self) -> StopRequest:
        # nohup's SIGHUP stays ignored.
        wanted = [number for number in self._SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._on_signal) for number in wanted}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._code:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self._code = number

    @property
    def code(self) -> int:
        """0, or the number of the signal, or TIME_IS_UP, or LOST_LAUNCHER. Cheap enough to ask at every step."""
        code = self._code  # read once: a signal that comes from here on is judged at the next step
        # The kernel tells the launcher's end by SIGTERM, as soon as its main thread is a zombie.
        if (code in (0, signal.SIGTERM) and lost_launcher()) or (code == signal.SIGTERM and _launcher_ends()):
            code = self._code = LOST_LAUNCHER
        if not code and self._deadline is not None and time.time() >= self._deadline:
            code = self._code = TIME_IS_UP
        return code

    def describe(self, code: int) -> str:
        if code == TIME_IS_UP:
            return f"train.stop_after={self._stop_after}"
        return "the launcher is gone" if code == LOST_LAUNCHER else signal.Signals(code).name


def _launcher_ends() -> bool:
    """Whether torchrun has begun to end: while its other threads still do, it is the parent of this process."""
    try:
        return launched_by_torchrun() and psutil.Process(launcher_pid()).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # not ours to see: a signal is a signal
        return False


def seconds_of(text: str) -> float:
    """HH:MM:SS, MM:SS or seconds. Raises ValueError for anything else."""
    if not _CLOCK.fullmatch(text):
        raise ValueError(f"{text!r} is not HH:MM:SS")
    return float(sum(int(part) * 60**place for place, part in enumerate(reversed(text.split(":")))))


def _began() -> float:
    """When torchrun, or this process without it, was started: a worker that it starts again has no more time."""
    try:
        return psutil.Process(launcher_pid()).create_time()
    except psutil.Error:
        return time.time()
