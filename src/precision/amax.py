"""Amaxes that are not the tensor's own: of earlier steps (delayed scaling), and of all ranks (``Current(step=True)``).

A linear with delayed scaling has two buffers, ``amax_history`` FP32 [length, columns] and ``amax_held`` FP32 [columns],
as ``precision.scaling.Delayed`` describes them. They are written in training mode alone, never in evaluation, and only
slot 0 of the history inside a step: activation recompute and micro-batches change nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .scaling import TENSOR, outer_of
from .slots import TENSORS, TRANSPOSED, SlotPlan

if TYPE_CHECKING:
    from .grouped import Multiplier
    from .layer import Layer, Named

UNKNOWN = -1.0
"""A held amax that is not known: this step scales by the tensor's own."""


class Amaxes:
    """Reads and writes the amax buffers of one linear, and remembers what the device was asked about them."""

    def __init__(self, linear: Multiplier | Layer) -> None:
        self._linear = linear
        self.ask_again()

    def ask_again(self) -> None:
        """The buffers may have been written from outside: forget the device's answers."""
        self._maybe_unknown = self._linear.delayed is not None
        self._followed: dict[int, tuple[Multiplier | Layer, int, int]] = {}
        self._views: tuple[Tensor, Tensor, tuple[tuple[Tensor, Tensor], ...]] | None = None
        self.measured: dict[int, int] = {}  # how often the tensor of each column was measured

    def held(self, slot: SlotPlan | Named, x: Tensor, now: Tensor | None = None) -> Tensor | None:
        """The amax that scales this slot's tensor: None for its own. In training records the new one (``now``)."""
        column = slot.column
        if column is None:
            return None
        linear = self._linear
        now = slot.quantizer.amax(x, TENSOR).reshape(()) if now is None else now
        held = linear.amax_held[column]
        if linear.training:
            # maximum passes a NaN on: the rule then leaves what it held.
            linear.amax_history[0, column] = torch.maximum(linear.amax_history[0, column], now)
        return torch.where(held == UNKNOWN, now, held)

    def held_and_note(self, slot: SlotPlan, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The amax that scales this slot's tensor, None for its own; and where the quantizer records the new one while
        it quantizes, if it is to: FP32 [1] each, for quantizers that do (``notes``)."""
        column, linear = slot.column, self._linear
        if column is None:
            return None, None
        self.measured[column] = self.measured.get(column, 0) + 1
        if not slot.quantizer.notes or self.unknown():
            return self.held(slot, x), None
        views, history, held = self._views, linear._buffers["amax_history"], linear._buffers["amax_held"]
        if views is None or views[0] is not history or views[1] is not held:
            both = (tensor.view(-1, 1).unbind() for tensor in (linear.amax_held, linear.amax_history[0]))
            views = self._views = linear.amax_history, linear.amax_held, tuple(zip(*both, strict=True))
        scaling, note = views[2][column]
        return scaling, note if linear.training else None

    def unknown(self) -> bool:
        """Whether a held amax may be unknown. Asks the device until it is not."""
        if self._maybe_unknown:
            self._maybe_unknown = bool((self._linear.amax_held == UNKNOWN).any())
        return self._maybe_unknown

    def follows(self, first: Multiplier, slot: SlotPlan) -> bool:
        """Whether this linear's history of the slot's tensor equals that of ``first``, which has measured this very x.

        If so, it takes over what was measured. Two histories that are equal once, and are given the same from then on,
        stay equal: the device is asked when the two meet, and again where one of them was given more.
        """
        linear, number = self._linear, slot.number
        column, other = slot.column, first.plan.slots[number].column
        if column is None or other is None or linear.delayed != first.delayed:
            return False
        met, times, own = self._followed.get(column), first.amaxes.measured.get(other, 0), self.measured.get(column, 0)
        if met is None or met[0] is not first or times - met[1] not in (0, 1) or met[2] != own:
            same = torch.equal(linear.amax_held[column], first.amax_held[other])
            if not same or not torch.equal(linear.amax_history[1:, column], first.amax_history[1:, other]):
                return False
        if linear.training and (met is None or met[1] != times):
            newest, other_newest = linear.amax_history[0, column], first.amax_history[0, other]
            torch.maximum(newest, other_newest, out=newest)
        self._followed[column] = first, times, own
        return True

    def meets_ranks(self) -> bool:
        """Whether amaxes of a step are exchanged between ranks."""
        return self._linear.training and dist.is_initialized() and dist.get_world_size() > 1

    def of_all_ranks(self, slot: SlotPlan | Named, x: Tensor) -> Tensor | None:
        """The amax of this slot's tensor over all ranks; None for its own, where no other rank is asked."""
        spec = slot.spec
        if spec is None or not self.meets_ranks():
            return None
        shared = outer_of(spec.scale) if spec.scale.levels == 2 else spec.tile  # rows, or the tensor
        amax = slot.quantizer.amax(x, shared).flatten()
        # A maximum over ranks may lose a NaN.
        nan = amax.isnan()
        both = torch.stack((torch.where(nan, 0.0, amax), nan.float()))
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return torch.where(both[1] > 0, torch.nan, both[0])

    def measure_rest(self, stats: Tensor | None, **tensors: Tensor) -> None:
        """Record, in training, the amaxes of x and w, or of dy, that no slot of the plan in use measures.

        A GEMM that comes back from high precision then finds the history it would have had.
        """
        linear = self._linear
        if not linear.training:
            return
        for column, number, transform in linear.plan.unmeasured:
            x = tensors.get(TENSORS[number])
            if x is None:
                continue
            if transform is not None:
                x = x.mT if TRANSPOSED[number] else x
                x = transform.left(x, stats) if number % 2 == 0 else transform.right(x, stats)
            now = linear.plan.slots[number].quantizer.amax(x.detach(), TENSOR).reshape(())
            linear.amax_history[0, column] = torch.maximum(linear.amax_history[0, column], now)
