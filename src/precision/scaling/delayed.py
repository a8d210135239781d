"""Which tensors' amaxes a scale is made of: this one's, that of all ranks, or those of earlier steps."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Current:
    """The amax of the tensor that is being quantized.

    Args:
        step: of that tensor on all ranks, in training: one all-reduce(MAX). Where a step is one micro-batch this is the
            tensor of the full step, whatever the number of ranks.
    """

    step: bool = False

    def __str__(self) -> str:
        return "step" if self.step else "current"


class Reduce(enum.Enum):
    """What delayed scaling makes of its history."""

    MAX = "max"
    MOST_RECENT = "most_recent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delayed:
    """The amax of earlier steps (TransformerEngine's delayed scaling, arXiv 2209.05433).

    What is remembered for n tensors: ``history`` FP32 [length, n], whose slot 0 collects the amaxes of the running
    step, and ``held`` FP32 [n], the amax in use, from which the scale rule (with its margin) makes this step's scale.
    ``held`` 0 is the start: the scale is 1. Keeping the amax instead of the scale loses nothing, since the rule is a
    function of it.

    Args:
        history: its length, slot 0 included.
        reduce: over the history.
    """

    history: int = 1024
    reduce: Reduce = Reduce.MAX

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"an amax history has at least one slot, not {self.history}")

    def start(self, num: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """``history`` and ``held`` before the first step."""
        return (
            torch.zeros(self.history, num, dtype=torch.float32, device=device),
            torch.zeros(num, dtype=torch.float32, device=device),
        )

    def update(self, history: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """``history`` and ``held`` for the next step; pure, to be called once per step after slot 0 was all-reduced.

        1. a = the maximum over all slots, slot 0 included (NaN wins), or slot 0 alone
        2. held' = a where a is finite and above 0, else as it was
        3. history' = history moved one slot down, with slot 0 moved to the end and a new slot 0 of 0

        Where slot 0 is 0, nothing of this happens: the history of a module that did not run stays. Under MAX an amax
        that is not finite leaves ``held`` as it was until it leaves the history.
        """
        newest = history[0]
        a = history.amax(0) if self.reduce is Reduce.MAX else newest
        ran = newest != 0
        moved = torch.cat((torch.zeros_like(history[:1]), history[2:], history[:1]))[: len(history)]
        return torch.where(ran, moved, history), torch.where(ran & (a > 0) & (a < math.inf), a, held)

    def __str__(self) -> str:
        if self.reduce is Reduce.MOST_RECENT:
            return "delayed-recent"
        return "delayed" if self.history == 1024 else f"delayed{self.history}"


AmaxSource = Current | Delayed
