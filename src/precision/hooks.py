"""What runs once per optimizer step, or per micro-batch, on all ranks alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .module import QuantizedModule, quantized_modules
from .scaling import Delayed


@dataclass(frozen=True, slots=True, kw_only=True)
class RollAmax:
    """Delayed scaling goes on: one all-reduce(MAX) of all amaxes, then every history moves on.

    A step that the trainer skips leaves no trace, nor does an amax that is not finite: a history that remembered an
    infinity would hold its scale still for a thousand steps. (A finite outlier does keep its scale low that long.)

    Args:
        reduce: take the maximum over ranks. Without it every rank scales by what it has seen itself; a checkpoint holds
            the histories of all ranks and is resumed by as many.
        micro: after every micro-batch, as TransformerEngine does, instead of after every optimizer step: with
            accumulation a slot of a history is then one micro-batch, and later ones are scaled by the amaxes of those
            before.
    """

    reduce: bool = True
    micro: bool = False

    @property
    def differs_by_rank(self) -> bool:
        return not self.reduce

    def __str__(self) -> str:
        often = " at every micro-batch" if self.micro else ""
        return f"amax histories roll{often}, {'one maximum over all ranks' if self.reduce else 'each rank its own'}"

    @torch.no_grad()
    def begin_step(self, model: nn.Module, step: int, total_steps: int | None) -> None:
        """Where micro-batches move the histories, a skipped step has to be undone."""
        if self.micro:
            for module in _delayed(model):
                module.amax_before = module.amax_history.clone(), module.amax_held.clone()

    @torch.no_grad()
    def begin_micro(self, model: nn.Module) -> None:
        """Where nothing was seen since, as before the first, nothing moves."""
        if self.micro:
            self._roll(model, None)

    @torch.no_grad()
    def end_step(self, model: nn.Module, step: int, applied: Tensor) -> None:
        """``applied``: bool scalar on the device of the histories, not read here: nothing waits for a device."""
        self._roll(model, applied)
        if self.micro:
            for module in _delayed(model):
                if module.amax_before is not None:
                    buffers = module.amax_history, module.amax_held
                    after = [torch.where(applied, *pair) for pair in zip(buffers, module.amax_before, strict=True)]
                    torch._foreach_copy_(buffers, after)
                module.amax_before = None

    def _roll(self, model: nn.Module, applied: Tensor | None) -> None:
        """All histories of one shape move at once, in as many kernels as those of a single module."""
        alike: dict[tuple[Delayed, int], list[QuantizedModule]] = {}
        for module in _delayed(model):
            assert module.delayed is not None
            alike.setdefault((module.delayed, len(module.amax_held)), []).append(module)
        if not alike:
            return
        # [length, modules, columns] and [modules, columns]: views of what lies module by module.
        histories = [torch.stack([each.amax_history for each in group]).movedim(1, 0) for group in alike.values()]
        newest = torch.cat([history[0].flatten() for history in histories])
        # As an infinity first: a maximum over ranks may lose a NaN.
        newest = newest.nan_to_num(nan=math.inf, posinf=math.inf)
        if self.reduce and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(newest, op=dist.ReduceOp.MAX)
        # Where slot 0 is 0 a history stays as it is.
        newest = newest.nan_to_num(posinf=0.0)
        newest = newest if applied is None else newest * applied
        parts = torch.split(newest, [history[0].numel() for history in histories])
        for ((delayed, _), group), history, part in zip(alike.items(), histories, parts, strict=True):
            history[0] = part.view_as(history[0])
            before = torch.stack([module.amax_held for module in group])
            # An amax that is still unknown, below 0, stays so until a step has shown one.
            moved, held = delayed.update(history, before.clamp(min=0.0))
            held = torch.where(held == 0.0, before, held)
            moved = moved.movedim(1, 0).contiguous()
            torch._foreach_copy_([module.amax_history for module in group], list(moved.unbind()))
            torch._foreach_copy_([module.amax_held for module in group], list(held.unbind()))


def _delayed(model: nn.Module) -> Iterator[QuantizedModule]:
    return (module for _, module in quantized_modules(model) if module.delayed is not None)
