"""The emulated product on a GPU: torch multiplies, one kernel does the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from ..interface import Operand
from ..reference import Emulated, scaled_product
from .device import interpreted, runs_on
from .quantizer import scaled_output


class EmulatedOnGpu(Emulated):
    """As ``Emulated``; the operands' factors, the bias and the rounding of the sums are one pass."""

    __slots__ = ()

    def gemm(self, a: Operand, b: Operand, *, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        left, right, factors = self.matrices(a, b)
        narrow = left.dtype == right.dtype == torch.bfloat16
        if interpreted() or not factors or not narrow or not runs_on(left.device) or 0 in (*left.shape, len(right)):
            return scaled_product(left, right, factors, bias, dtype)
        if left.device.type == "cuda":
            y = torch.mm(left, right.mT, out_dtype=torch.float32)
        else:
            y = left.float() @ right.float().mT
        return scaled_output(y, factors, bias, dtype)
