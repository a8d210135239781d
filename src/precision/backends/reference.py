"""Plain torch on any device: the definition that the other backends are held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..noise import Noise
from ..quantize import Prepared, Quantized, amax, operand, quantize
from ..scaling import FP32_MAX, TENSOR, Tile, TwoLevel
from ..spec import GemmSpec, OperandSpec, Transform


class Reference:
    """Emulation: operands that BF16 holds exactly meet in one BF16 product with float32 sums, others in an FP32 one."""

    name = "reference"
    notes = False
    reads_rows = False
    by_column = False

    @property
    def identity(self) -> tuple[str, ...]:
        return (self.name,)

    def why_not(self, gemm: GemmSpec, shape: tuple[int | None, int, int], device: torch.device) -> str | None:
        return None

    def quantize(self, x: Tensor, spec: OperandSpec, *, amax: Tensor | None, noise: Noise | None) -> Quantized:
        return quantize(x, spec, amax=amax, noise=noise)

    def operand(self, q: Quantized) -> tuple[Tensor, Tensor | None]:
        return operand(q)

    def amax(self, x: Tensor, tile: Tile) -> Tensor:
        return amax(x, tile)

    def transformed(self, transform: Transform, x: Tensor, *, left: bool) -> Tensor:
        return transform.left(x) if left else transform.right(x)

    def prepare(
        self,
        x: Tensor,
        spec: OperandSpec,
        *,
        amax: Tensor | None,
        noise: Noise | None,
        transform: Transform | None,
        left: bool,
        codes: bool,
        note: Tensor | None = None,
    ) -> Quantized | Prepared:
        x = x if transform is None else self.transformed(transform, x, left=left)
        return self.quantize(x, spec, amax=amax, noise=noise)

    def both(
        self,
        x: Tensor,
        spec: OperandSpec,
        *,
        amax: Tensor | None = None,
        noise: tuple[Noise, Noise] | None = None,
        note: Tensor | None = None,
        values: bool = False,
    ) -> tuple[Quantized, Quantized] | tuple[Prepared, Prepared] | None:
        return None

    def gemm(
        self,
        a: Quantized | Prepared | Tensor,
        b: Quantized | Prepared | Tensor,
        *,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """a [m, k] @ b [n, k].mT + bias [n] in ``dtype``.

        Factors of a whole operand (a scale per tensor, the outer one of two levels) multiply the float32 sums, never
        the terms, whatever ``dtype``; the result is rounded to it once. Where a product of BF16 operands does not come
        out in ``dtype`` (float32 and FP16 on a CPU), the operands are widened, which is exact. Other scales (rows,
        blocks that are no powers of two) are part of the operands (``precision.quantize.operand``).
        """
        left, left_factor = self._matrix(a)
        right, right_factor = self._matrix(b)
        wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), dtype)
        if wide == torch.float16 and left.device.type == "cpu":
            wide = torch.float32  # the same sums, one rounding at the end; CPUs multiply FP16 in a scalar loop
        return scaled_product(left.to(wide), right.to(wide), left_factor, right_factor, bias).to(dtype)

    def _matrix(self, operand: Quantized | Prepared | Tensor) -> tuple[Tensor, Tensor | None]:
        if isinstance(operand, Quantized):
            return self.operand(operand)
        return (operand.matrix, operand.factor) if isinstance(operand, Prepared) else (operand, None)

    def note(self, gemm: GemmSpec) -> str:
        """Whether the product is in float32, which is slow: BF16 does not hold its operands. What is not done."""
        wide = any(spec is not None and not _fits_bf16(spec) for spec in (gemm.a, gemm.b))
        return ", ".join(["fp32 product"] * wide + ["emulated: sums in fp32, none fast"] * bool(gemm.fast_accum))


def scaled_product(
    a: Tensor, b: Tensor, a_factor: Tensor | None, b_factor: Tensor | None, bias: Tensor | None
) -> Tensor:
    """(a @ b.mT) * factors + bias: float32 sums, then the factors, then the bias, then the operands' dtype."""
    factors = [factor for factor in (a_factor, b_factor) if factor is not None]
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


def _fits_bf16(spec: OperandSpec) -> bool:
    """Whether ``precision.quantize.operand`` gives BF16 for this spec."""
    bits, rule = spec.format.significant_bits, spec.scale
    if isinstance(rule, TwoLevel):
        return not rule.rows and bits + rule.block.significant_bits <= 8
    return bits <= 8 and (rule.levels == 0 or spec.tile == TENSOR or rule.power_of_two)
