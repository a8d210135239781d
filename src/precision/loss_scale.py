"""Dynamic loss scaling: what keeps FP16 gradients inside FP16's narrow range (arXiv 1710.03740, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScaler:
    """The loss is multiplied by a scale before backward, and gradients are divided by it before anything reads them.

    What is remembered: the scale, FP32, and the number of clean steps since it last changed. The rules and constants
    are those of ``torch.amp.GradScaler``, but for the floor.

    Args:
        init: the scale of the first step.
        growth: its factor after ``interval`` clean steps in a row; a scale that would overflow FP32 stays.
        backoff: its factor after a step whose gradients overflowed.
        interval: clean steps between two tries to grow.
        floor: the scale goes no lower. An overflow there is not for scaling to mend: it counts towards divergence.

    Raises ValueError for constants that cannot be.
    """

    init: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    floor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.floor <= self.init <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"loss scale: 0 < floor <= init, finite in float32; not floor {self.floor}, init {self.init}"
            )
        if not (math.isfinite(self.growth) and self.growth >= 1):
            raise ValueError(f"loss scale: growth={self.growth} must be at least 1")
        if not 0 < self.backoff < 1:
            raise ValueError(f"loss scale: backoff={self.backoff} must lie between 0 and 1")
        if self.interval < 1:
            raise ValueError(f"loss scale: interval={self.interval} must be at least 1")

    def start(self) -> tuple[Tensor, Tensor]:
        """Scale and clean steps before the first step."""
        return torch.tensor(self.init, dtype=torch.float32), torch.zeros((), dtype=torch.int64)

    def update(self, scale: Tensor, clean_steps: Tensor, overflow: bool) -> tuple[Tensor, Tensor]:
        """Both for the next step; pure."""
        if overflow:
            lower = torch.tensor(float(scale) * self.backoff, dtype=torch.float32)
            return lower.clamp(min=self.floor), torch.zeros_like(clean_steps)
        if int(clean_steps) + 1 < self.interval:
            return scale, clean_steps + 1
        grown = torch.tensor(float(scale) * self.growth, dtype=torch.float32)
        return (grown if bool(grown.isfinite()) else scale), torch.zeros_like(clean_steps)

    def __str__(self) -> str:
        return (
            f"loss scale from {self.init:g}, x{self.growth:g} after {self.interval} clean steps, x{self.backoff:g} on "
            f"overflow, at least {self.floor:g}"
        )
