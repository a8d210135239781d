"""What an observer (``precision.module.Observer``) is shown of a linear's GEMMs: each operand, and each part of one, as
it was and as it was read, and the output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .backends import Operand
from .packing import AnyOperand, Parts
from .slots import OUTPUTS, SlotPlan

if TYPE_CHECKING:
    from .module import Observer
    from .operands import Call


def measured(
    call: Call,
    observer: Observer,
    gemm: int,
    given: tuple[Tensor, Tensor],
    used: tuple[AnyOperand, AnyOperand],
    y: Tensor,
    bias: Tensor | None = None,
) -> list[Any]:
    """The observer's figures of GEMM 0, 1 or 2, to be added."""
    rows: list[tuple[SlotPlan, Tensor, Operand]] = []
    for slot, x, q in zip(call.plan.slots[2 * gemm : 2 * gemm + 2], given, used, strict=True):
        if not isinstance(q, Parts):
            rows.append((slot, x, q))
            continue
        parts = [part.expand(x.mT.shape).mT if slot.transposed else part for part in call.split(slot, x)]
        rows += [(slot, x, q.sum()), *zip(slot.parts, parts, q.operands, strict=True)]
    figures = [
        observer.operand(call.linear.owner, slot.row, slot.described(x.dtype), call.transformed(slot, x), q)
        for slot, x, q in rows
    ]
    return [*figures, observer.output(call.linear.owner, OUTPUTS[gemm], *given, y, bias)]
