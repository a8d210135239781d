"""Derivatives of rounding (``spec.Estimator``), and their factors on the way from forward to backward.

A gradient that passes through a quantizer is multiplied elementwise by a function of the operand as it was rounded.
Straight-through is the constant 1, which nobody computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .formats import NumberFormat

_SLACK = 1 + 2.0**-22


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipMask:
    """1 where a value lies inside the format's range, 0 where it was clipped.

    A scale that maps an amax to the largest value may put it an FP32 step or two beyond: 2^-22 of it are inside.

    Args:
        strict: whether the format's largest and smallest value count as clipped, as in Quartet (arXiv 2505.14669).
    """

    mask: ClassVar[bool] = True

    strict: bool = False

    def factor(self, scaled: Tensor, format: NumberFormat) -> Tensor:
        """bool of the shape of ``scaled``; False for NaN."""
        if self.strict:
            return (scaled > format.min) & (scaled < format.max)
        return (scaled >= format.min * _SLACK) & (scaled <= format.max * _SLACK)

    def __str__(self) -> str:
        return f"clip-mask{'-strict' * self.strict}"


def pack_bits(mask: Tensor) -> Tensor:
    """Eight elements a byte, the first in the lowest bit: bool [rows, n] -> uint8 [rows, ceil(n / 8)]."""
    rows, columns = mask.shape
    bits = pad(mask.to(torch.uint8), (0, -columns % 8)).view(rows, -(-columns // 8), 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """The inverse of ``pack_bits``: uint8 [rows, ceil(columns / 8)] -> bool [rows, columns]."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[:, :columns].bool()


def multiplied(gradient: Tensor, factor: Tensor) -> Tensor:
    """``gradient * factor``, one FP32 product (FP64 of FP64) per element, rounded to the gradient's dtype.

    Where the factor is False or 0, a gradient that is not finite gives 0: the value was clipped, whatever came back.
    """
    if factor.dtype == torch.bool:
        return torch.where(factor, gradient, 0)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return torch.where(factor == 0, 0, gradient.to(wide) * factor.to(wide)).to(gradient.dtype)
