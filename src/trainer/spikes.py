"""Spikes: steps whose loss or gradient norm lies far above those of the steps before.

The rule is that of OLMo's SkipStepOptimizer (arXiv 2501.00656), for rises only: a value more than so many standard
deviations above the mean of the last applied steps' values. What follows is either OLMo's, that step's update is left
out, or PaLM's (arXiv 2204.02311): back to an earlier checkpoint, and on with the batches after the spike. What is lost:
the window cannot tell a bad batch from a run that is about to diverge, which is why there is a limit, and a slow rise
is no spike.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

SPIKE_PREFIX = "train.spike_"
"""Of the names of what a checkpoint says about spikes."""
COUNT, LEFT_OUT = f"{SPIKE_PREFIX}count", f"{SPIKE_PREFIX}left_out"

_RESOLUTION = 2.0**-24  # of float32, relative: below it a deviation is no more than rounding


class SpikeAction(Enum):
    """What is done about a spike."""

    off = "off"  # nothing: none is looked for
    skip = "skip"  # its update is not applied
    rollback = "rollback"  # back to the last scheduled checkpoint, and on with the batches after the spike


@dataclass(frozen=True)
class Excess:
    """A number of a step that is too large."""

    name: str
    value: float
    mean: float
    deviations: float  # above the mean

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} is {self.deviations:.1f} deviations above {self.mean:.4g}"


@dataclass(frozen=True)
class Spike:
    """A step that was found to be one."""

    excesses: tuple[Excess, ...]

    @property
    def deviations(self) -> float:
        return max(excess.deviations for excess in self.excesses)

    def __str__(self) -> str:
        return ", ".join(map(str, self.excesses))


@dataclass
class SpikeWatch:
    """The rule, and what it remembers.

    Its decisions are the same on every rank that sees the same numbers: sums and deviations are exact before they are
    rounded.

    Args:
        window: how many values of applied steps it looks back on; half of them must be there before it decides.
        deviations: standard deviations above the mean from which a value is a spike.
    """

    window: int
    deviations: float
    count: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))  # of spikes in the run so far
    _values: Tensor = field(init=False)  # float64 [2, window]: losses, norms; the newest last, -1 where there is none

    def __post_init__(self) -> None:
        self._values = torch.empty(2, self.window, dtype=torch.float64)
        self.forget()

    def forget(self) -> None:
        """Start with an empty window."""
        self._values.fill_(-1.0)

    def observe(self, loss: float, grad_norm: float) -> Spike | None:
        """Judge a step with finite numbers; one that is no spike enters the window."""
        there = self._values[:, self._values[1] >= 0].tolist()
        if len(there[0]) >= max(2, (self.window + 1) // 2):
            named = zip(("loss", "gradient norm"), (loss, grad_norm), there, strict=True)
            excesses = tuple(excess for each in named if (excess := self._excess(*each)) is not None)
            if excesses:
                return Spike(excesses)
        self._values.copy_(self._values.roll(-1, 1))
        self._values[:, -1] = torch.tensor([loss, grad_norm], dtype=torch.float64)
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What has to be saved, alive, by name."""
        return {f"{SPIKE_PREFIX}window": self._values, COUNT: self.count}

    def _excess(self, name: str, value: float, before: list[float]) -> Excess | None:
        mean = statistics.fmean(before)
        deviation = max(statistics.stdev(before), _RESOLUTION * abs(mean))
        if value <= mean + self.deviations * deviation:
            return None
        return Excess(name, value, mean, (value - mean) / deviation if deviation else math.inf)
