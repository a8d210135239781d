"""What runs once per optimizer step, on all ranks alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from precision.linear import UNKNOWN, QuantLinear


def quant_linears(model: nn.Module) -> Iterator[QuantLinear]:
    """The quantized linears of a model, in order."""
    return (module for module in model.modules() if isinstance(module, QuantLinear))


@dataclass(frozen=True, slots=True, kw_only=True)
class RollAmax:
    """Ends a step of delayed scaling: one all-reduce(MAX) of all amaxes, then every history moves on.

    A step that the trainer skips leaves no trace, nor does an amax that is not finite: a history that remembered an
    infinity would hold its scale still for a thousand steps. (A finite outlier does keep its scale low that long.)

    Args:
        reduce: take the maximum over ranks. Without it every rank scales by what it has seen itself; a checkpoint holds
            the histories of all ranks and is resumed by as many.
    """

    reduce: bool = True

    @property
    def differs_by_rank(self) -> bool:
        return not self.reduce

    def __str__(self) -> str:
        return f"amax histories roll, {'one maximum over all ranks' if self.reduce else 'each rank its own'}"

    def begin_step(self, model: nn.Module, step: int, total_steps: int | None) -> None:
        pass

    @torch.no_grad()
    def end_step(self, model: nn.Module, step: int, applied: bool) -> None:
        linears = [linear for linear in quant_linears(model) if linear.delayed is not None]
        if not linears:
            return
        if not applied:
            for linear in linears:
                linear.amax_history[0] = 0.0
            return
        newest = torch.cat([linear.amax_history[0] for linear in linears])
        # As an infinity first: a maximum over ranks may lose a NaN.
        newest = torch.where(newest.isnan(), math.inf, newest)
        if self.reduce and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(newest, op=dist.ReduceOp.MAX)
        newest = torch.where(newest.isinf(), 0.0, newest)
        parts = torch.split(newest, [len(linear.columns) for linear in linears])
        for linear, part in zip(linears, parts, strict=True):
            assert linear.delayed is not None
            linear.amax_history[0] = part
            # An amax that is still unknown stays so until a step has shown one.
            known = linear.amax_held.clamp(min=0.0)
            history, held = linear.delayed.update(linear.amax_history, known)
            linear.amax_history.copy_(history)
            linear.amax_held.copy_(torch.where((linear.amax_held == UNKNOWN) & (held == 0.0), UNKNOWN, held))
