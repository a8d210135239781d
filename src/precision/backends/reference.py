"""Plain torch on any device: the definition that the other backends are held against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..noise import Noise
from ..quantize import Prepared, Quantized, TorchPasses, operand, operand_dtype, quantize
from ..scaling import FP32_MAX
from ..spec import GemmSpec, Transform, specs_of
from ..sums import Accumulate, Summing, Sums
from ..transforms import Composed
from .interface import Cast, Operand, Product, Quantizer, Shape
from .summed import ExactIntegers, Summed, sums_integers


class Reference(TorchPasses):
    """The quantizer in plain torch. Those of machines replace what they have kernels for."""

    name = "reference"
    notes = False
    takes_rows = True
    by_column = False

    def why_not(self, gemm: GemmSpec, device: torch.device) -> str | None:
        return None

    def transformed(self, transform: Transform, x: Tensor, *, left: bool) -> Tensor:
        if type(transform) is Composed:  # each part by the kernels that there are for it
            return self.transformed(transform.second, self.transformed(transform.first, x, left=left), left=left)
        return transform.left(x) if left else transform.right(x)

    def cast(self, x: Tensor, cast: Cast) -> Quantized | Prepared:
        x = x if cast.transform is None else self.transformed(cast.transform, x, left=cast.left)
        return quantize(x, cast.spec, amax=cast.amax, noise=one_noise(cast), passes=self)

    def cast_both(self, x: Tensor, cast: Cast) -> tuple[Quantized, Quantized] | tuple[Prepared, Prepared] | None:
        return None

    def operand(self, q: Quantized) -> tuple[Tensor, Tensor | None]:
        return operand(q, passes=self)


def one_noise(cast: Cast) -> Noise | None:
    """The noise of a cast of one matrix."""
    assert not isinstance(cast.noise, tuple)
    return cast.noise


@dataclass(frozen=True, slots=True)
class Emulated:
    """Emulation: operands that BF16 holds exactly meet in one BF16 product with float32 sums, others in an FP32 one.

    ``by``: who sums by the rules of tensor cores that it knows; None: plain torch.
    """

    quantizer: Quantizer
    by: Summing | None = None

    reads_rows: ClassVar[bool] = False
    identity: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return self.quantizer.name

    def why_not(self, gemm: GemmSpec, shape: Shape, device: torch.device) -> str | None:
        return self.quantizer.why_not(gemm, device)

    def for_gemm(self, gemm: GemmSpec, shape: Shape, device: torch.device, quantizer: Quantizer) -> Product:
        if isinstance(gemm.accumulate, Accumulate):
            return Summed(quantizer=self.quantizer, rule=gemm.accumulate, otherwise=self, by=self.by)
        return ExactIntegers(quantizer=self.quantizer, otherwise=self) if sums_integers(gemm, shape) else self

    def gemm(self, a: Operand, b: Operand, *, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """a [m, k] @ b [n, k].mT + bias [n] in ``dtype``.

        Factors of a whole operand (a scale per tensor, the outer one of two levels) multiply the float32 sums, never
        the terms, whatever ``dtype``; the result is rounded to it once. Where a product of BF16 operands does not come
        out in ``dtype`` (float32 and FP16 on a CPU), the operands are widened, which is exact. Other scales (rows,
        blocks that are no powers of two) are part of the operands (``precision.quantize.operand``).
        """
        return scaled_product(*self.matrices(a, b), bias, dtype)

    def matrices(self, a: Operand, b: Operand) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Both operands as matrices, and the factors of the output."""
        pairs = [
            self.quantizer.operand(x)
            if isinstance(x, Quantized)
            else (x.matrix, x.factor)
            if isinstance(x, Prepared)
            else (x, None)
            for x in (a, b)
        ]
        return pairs[0][0], pairs[1][0], [factor for _, factor in pairs if factor is not None]

    def note(self, gemm: GemmSpec) -> str:
        """Whether the product is in float32, which is slow: BF16 does not hold its operands. What is not done."""
        wide = any(operand_dtype(spec) != torch.bfloat16 for spec in specs_of(gemm.a, gemm.b))
        return ", ".join(
            ["fp32 product"] * wide + ["emulated: sums in fp32, none fast"] * (gemm.accumulate is Sums.FAST)
        )


def scaled_product(a: Tensor, b: Tensor, factors: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(a @ b.mT) * factors + bias: float32 sums, then the factors, then the bias, then ``dtype``."""
    common = torch.promote_types(torch.promote_types(a.dtype, b.dtype), dtype)
    if common == torch.float16 and a.device.type == "cpu":
        common = torch.float32  # the same sums, one rounding at the end; CPUs multiply FP16 in a scalar loop
    return _scaled_product(a.to(common), b.to(common), factors, bias).to(dtype)


def _scaled_product(a: Tensor, b: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The same of operands of one dtype, in which it comes out."""
    if not factors:
        return a @ b.mT if bias is None else torch.addmm(bias.to(a.dtype), a, b.mT)
    alpha = math.prod(map(float, factors)) if a.device.type == "cpu" else math.inf
    held, wide = abs(alpha) <= FP32_MAX, a.dtype in (torch.float32, torch.float64)
    # A wide product is scaled apart: given alpha, BLAS may multiply the terms by it.
    if held and not wide:
        beta, start = (0, a.new_empty(())) if bias is None else (1, bias.to(a.dtype))
        return torch.addmm(start, a, b.mT, beta=beta, alpha=alpha)
    # On a GPU the factors stay there: reading them would stop it. A CPU comes here with one that no float32 holds, too.
    if wide:
        y = a @ b.mT
    elif a.device.type == "cpu":
        y = a.float() @ b.float().mT
    else:
        y = torch.mm(a, b.mT, out_dtype=torch.float32)
    if held:
        y = y * alpha
    else:
        for factor in factors:
            y = y * factor
    return (y if bias is None else y + bias).to(a.dtype)
