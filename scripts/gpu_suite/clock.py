"""Time of calls by the device's own clock: what the host needs to launch them is left out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

_CYCLES = 1.7e9  # of a multiprocessor in a second, about
_LONGEST_PAUSE = 0.4  # seconds
_TRIES = 3


class Timing(NamedTuple):
    """``ms`` of one call; ``of_device`` is False where the host may have been slower than the device."""

    ms: float
    of_device: bool

    def __str__(self) -> str:
        return f"{self.ms:.4f} ms{'' if self.of_device else ', host bound'}"


def timed(*calls: Callable[[], object], launches: int = 20) -> Timing:
    """The median of three rounds of ``launches`` calls, which take turns.

    Give several over inputs of their own, together larger than the cache.

    The device is kept busy while the host launches a whole round, so that the events around it see the device alone. A
    round in which the device had caught up before the last launch is repeated behind a longer pause, then with fewer
    launches; if that does not help, the figure is called the host's. Without a GPU: one call, by the host's clock.
    """
    if not torch.cuda.is_available():
        calls[0]()
        begun = time.perf_counter()
        calls[-1]()
        return Timing(1e3 * (time.perf_counter() - begun), False)
    for call in calls:
        call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for turn in range(3):
        calls[turn % len(calls)]()
    host = (time.perf_counter() - begun) / 3
    torch.cuda.synchronize()
    pause = 2 * host * launches + 1e-3
    for _ in range(_TRIES):
        rounds = [_round(calls, launches, min(pause, _LONGEST_PAUSE)) for _ in range(3)]
        if all(ahead for _, ahead in rounds):
            break
        pause *= 3
        launches = max(4, launches // 2)
    return Timing(statistics.median(ms for ms, _ in rounds), all(ahead for _, ahead in rounds))


def _round(calls: tuple[Callable[[], object], ...], launches: int, pause: float) -> tuple[float, bool]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(pause * _CYCLES))
    start.record()
    for turn in range(launches):
        calls[turn % len(calls)]()
    ahead = not start.query()  # the device is still in its pause: everything waits in its queue
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / launches, ahead
