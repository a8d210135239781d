"""Products whose sums are not FP32's own: by the rule of a tensor core, or exact, of integers.

Both read codes. Scales that are the same along the contraction multiply the sums, each in FP32 and in this order: those
of a's rows, of b's rows, of whole operands; then the bias is added, and the result is rounded once to its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..formats import ExMy, Integer, NumberFormat
from ..quantize import Quantized
from ..quantize import _decoded as decoded_scales
from ..scaling import FP32_MAX, reads
from ..spec import GemmSpec, OperandSpec, Source
from ..sums import Accumulate, Side, Summing, summed
from .interface import Operand, Product, Quantizer, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class OfCodes:
    """A product that reads codes.

    Args:
        quantizer: who made the codes.
        otherwise: who multiplies in a step that the recipe leaves in high precision.
    """

    quantizer: Quantizer
    otherwise: Product

    reads_rows: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.quantizer.name

    def why_not(self, gemm: GemmSpec, shape: Shape, device: torch.device) -> str | None:
        return self.otherwise.why_not(gemm, shape, device)

    def for_gemm(self, gemm: GemmSpec, shape: Shape, device: torch.device, quantizer: Quantizer) -> Product:
        return self.otherwise.for_gemm(gemm, shape, device, quantizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summed(OfCodes):
    """Emulation of a tensor core's sums.

    Args:
        rule: of the sums.
        by: who sums, where it knows the rule; None: plain torch.
    """

    rule: Accumulate
    by: Summing | None = None

    @property
    def identity(self) -> tuple[str, ...]:
        return (repr(self.rule),)

    def gemm(self, a: Operand, b: Operand, *, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """a [m, k] @ b [n, k].mT + bias [n] in ``dtype``."""
        if isinstance(a, Tensor) and isinstance(b, Tensor):  # a step that the recipe leaves alone
            return self.otherwise.gemm(a, b, bias=bias, dtype=dtype)
        assert isinstance(a, Quantized)
        assert isinstance(b, Quantized)
        left, right = (read(q, self.quantizer, self.rule.promote_every) for q in (a, b))
        y = summed(left.side, right.side, self.rule, by=self.by)
        return finished(y, left, right, bias, dtype)

    def note(self, gemm: GemmSpec) -> str:
        """Why no kernel sums, if none does."""
        reason = "no kernel sums by a rule" if self.by is None else self.by.why_not(self.rule)
        return "" if reason is None else f"sums in plain torch: {reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactIntegers(OfCodes):
    """Products of integers whose sums are exact, also where FP32 does not hold them, and rounded once to FP32.

    Exact below 2^53: 2^23 products of INT16, 2^39 of INT8. Where FP32 holds every sum of the two matrices and no scale
    is of a row, ``otherwise`` multiplies, to the same bits.
    """

    identity: ClassVar[tuple[str, ...]] = ("exact integers",)

    def gemm(self, a: Operand, b: Operand, *, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """a [m, k] @ b [n, k].mT + bias [n] in ``dtype``."""
        if isinstance(a, Tensor) and isinstance(b, Tensor):  # a step that the recipe leaves alone
            return self.otherwise.gemm(a, b, bias=bias, dtype=dtype)
        assert isinstance(a, Quantized)
        assert isinstance(b, Quantized)
        left, right = (read(q, self.quantizer, None) for q in (a, b))
        x, w = left.side.values, right.side.values
        small = _held_by_fp32(a.spec.format, b.spec.format, x.shape[1])
        if left.rows is None and right.rows is None and x.numel() and w.numel() and x.device.type == "cpu":
            small = small or bool(x.abs().double().sum(1).amax() * w.abs().amax() <= 2**24)
            if small:
                return self.otherwise.gemm(a, b, bias=bias, dtype=dtype)
        y = x @ w.mT if small else (x.double() @ w.double().mT).float()
        return finished(y, left, right, bias, dtype)

    def note(self, gemm: GemmSpec) -> str:
        return "exact integer sums"


def sums_integers(gemm: GemmSpec, shape: Shape) -> bool:
    """Whether a GEMM is of two integers, scaled alike along the contraction, whose sums FP32 may round."""
    a, b = gemm.a, gemm.b
    if not isinstance(a, OperandSpec) or not isinstance(b, OperandSpec):
        return False
    for spec in (a, b):
        constant = spec.scale.levels == 0 or (spec.scale.levels == 1 and spec.tile.inner == -1)
        across = spec.source is Source.VALUES and spec.tile.outer != spec.tile.inner
        if not constant or across or reads(spec.scale) or type(spec.format) is not Integer:
            return False
    rows = any(spec.scale.levels and spec.tile.outer != -1 for spec in (a, b))
    return rows or not _held_by_fp32(a.format, b.format, shape[2])


def _held_by_fp32(a: NumberFormat, b: NumberFormat, k: int) -> bool:
    """Whether FP32 holds all sums of k products; k < 0: nobody knows how many there will be."""
    return k >= 0 and k * a.max * b.max <= 2**24


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Read:
    """An operand: what meets in the sums; FP32 [outer, 1] for rows of the output, FP32 scalars for all of it."""

    side: Side
    rows: Tensor | None
    factors: Sequence[Tensor]


def read(q: Quantized, quantizer: Quantizer, promote_every: int | None) -> Read:
    """The values of codes, and where their scales go.

    To the sums: those of the tensor and of rows. To promoted sums: those of ``promote_every`` values. Into the values:
    others, which are powers of two; a NaN among them makes its values NaN.
    """
    spec, tile = q.spec, q.spec.tile
    values = quantizer.values(q, None, torch.float32).contiguous()
    tiny = spec.format.min_exponent if type(spec.format) is ExMy else -126
    outer, inner = q.shape
    rows, factors = None, []
    if q.tensor_scale is not None:
        rows, factors = (q.tensor_scale, []) if q.tensor_scale.dim() else (None, [q.tensor_scale])
    if spec.scale.levels == 0:
        return Read(side=Side(values=values, tiny=tiny), rows=rows, factors=factors)
    scales = decoded_scales(spec, q.scales)
    scales = scales.mT if q.transposed else scales
    if tile.outer < 0 and tile.inner < 0:
        return Read(side=Side(values=values, tiny=tiny), rows=rows, factors=[scales.reshape(()), *factors])
    scales = _spread(scales, tile.outer, outer, 0)
    if tile.inner < 0:
        return Read(side=Side(values=values, tiny=tiny), rows=scales, factors=factors)
    if tile.inner == promote_every:
        return Read(side=Side(values=values, tiny=tiny, factors=scales.contiguous()), rows=rows, factors=factors)
    scales = _spread(scales, tile.inner, inner, 1)
    values = torch.where(scales.isfinite(), values * (scales != 0), torch.nan)
    powers = torch.frexp(scales.nan_to_num(1.0, 1.0, 1.0)).exponent - 1
    return Read(side=Side(values=values, tiny=tiny, powers=powers), rows=rows, factors=factors)


def _spread(scales: Tensor, extent: int, size: int, dim: int) -> Tensor:
    """Scales of tiles, for each row or column."""
    if extent < 0:
        shape = list(scales.shape)
        shape[dim] = size
        return scales.expand(shape)
    return scales if extent == 1 else scales.repeat_interleave(extent, dim).narrow(dim, 0, size)


def finished(y: Tensor, left: Read, right: Read, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sums FP32 [m, n] times the operands' scales, plus the bias, in ``dtype``."""
    if left.rows is not None:
        y = y * left.rows
    if right.rows is not None:
        y = y * right.rows.mT
    return times(y, [*left.factors, *right.factors], bias).to(dtype)


def times(y: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """y * factors + bias in FP32, as ``reference.scaled_product``: on a CPU by their product, if FP32 holds it."""
    alpha = math.prod(map(float, factors)) if factors and y.device.type == "cpu" else math.inf
    if abs(alpha) <= FP32_MAX:
        y = y * alpha
    else:
        for factor in factors:
            y = y * factor
    return y if bias is None else y + bias.float()
