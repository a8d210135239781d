"""Triton kernels on GPUs, or in Triton's interpreter: the codes, scales and operands of the reference, bit for bit.

A quantized operand is read once and written once where its tiles fit into a block of the kernel; where a scale spans
more (a tensor, long rows, the tensor level of NVFP4), finding the amax is a read of its own. A Hadamard transform is
done while reading. ``docs/kernels.md`` counts the bytes.

With TRITON_INTERPRET=1 the kernels run on the CPU, one operation at a time in numpy: for tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...noise import Noise
from ...quantize import TORCH, Prepared, Quantized, operand
from ...scaling import TENSOR, Tile
from ...spec import GemmSpec, OperandSpec, Transform
from ...transforms import Hadamard
from ..reference import Reference
from .amax import signs_of, tile_amax
from .blocks import blocks, blocks_of, near, tile_fits
from .both import quantize_both
from .device import hardware, installed, interpreted, programs, runs_on
from .launch import Launcher, launch, number, recall, remember, start
from .quantize import prepare_fused, quantize_fused
from .specs import DTYPES, format_fits, grid_of, lacking, one_factor, rule_fits, rule_of, values_fit


class Triton(Reference):
    """The reference with Triton kernels for all that reads or writes a matrix, but for the products.

    Plain torch where there is no kernel: for other devices, empty matrices, odd tiles.

    Args:
        by_column: FP32 scales of parts of a row, where kernels write them, lie in memory column by column.
    """

    name = "triton"
    notes = True

    def __init__(self, *, by_column: bool = False) -> None:
        self.by_column = by_column

    def why_not(self, gemm: GemmSpec, shape: tuple[int | None, int, int], device: torch.device) -> str | None:
        if not runs_on(device):
            return f"the model is on {device.type}"
        if not installed():
            return "triton is not installed"
        reasons = (lacking(spec) for spec in (gemm.a, gemm.b) if spec is not None)
        return next(filter(None, reasons), None)

    def quantize(self, x: Tensor, spec: OperandSpec, *, amax: Tensor | None, noise: Noise | None) -> Quantized:
        return quantize_fused(x, spec, amax=amax, noise=noise, by_column=self.by_column)

    def operand(self, q: Quantized) -> tuple[Tensor, Tensor | None]:
        """As ``precision.quantize.operand``, bit for bit; but powers of two per tile, which it takes relative to the
        largest so that nothing depends on subnormals, are applied as they are: code value * 2^k, without a factor.

        BF16 holds that exactly, down to its own subnormals (2^-133), which GPUs do not flush; elements below are
        rounded there, and a tile whose largest values exceed BF16's is infinite.
        """
        rule = q.spec.scale
        if (rule.power_of_two or rule.levels == 2) and not one_factor(q.spec) and values_fit(q.spec):
            return PASSES.values(q, q.scales, torch.bfloat16), q.tensor_scale
        return operand(q, passes=PASSES)

    def amax(self, x: Tensor, tile: Tile) -> Tensor:
        return tile_amax(x, tile)

    def transformed(self, transform: Transform, x: Tensor, *, left: bool) -> Tensor:
        if type(transform) is not Hadamard or x.dtype not in DTYPES or x.numel() == 0 or not runs_on(x.device):
            return super().transformed(transform, x, left=left)
        if not near(x, blocks_of(x, TENSOR, transform)):
            return super().transformed(transform, x, left=left)
        return hadamard(x, transform)

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
        """The codes of what ``transform`` makes of x, in the passes that those of x take; or, without ``codes``, what
        ``operand`` gives of them, where BF16 holds that. ``note``: as in ``quantize_fused``.
        """
        if transform is not None and not (type(transform) is Hadamard and x.dtype in DTYPES):
            x, transform = self.transformed(transform, x, left=left), None
        if not codes:
            made = prepare_fused(x, spec, amax=amax, noise=noise, transform=transform, note=note)
            if made is not None:
                return made
        return quantize_fused(x, spec, amax=amax, noise=noise, transform=transform, note=note, by_column=self.by_column)

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
        return quantize_both(x, spec, amax=amax, noise=noise, note=note, values=values, by_column=self.by_column)

    def gemm(
        self,
        a: Quantized | Prepared | Tensor,
        b: Quantized | Prepared | Tensor,
        *,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """As the reference; the operands' factors, the bias and the rounding of the sums are one pass."""
        (left, a_factor), (right, b_factor) = self._matrix(a), self._matrix(b)
        factors = [factor for factor in (a_factor, b_factor) if factor is not None]
        narrow = left.dtype == right.dtype == torch.bfloat16
        if interpreted() or not factors or not narrow or not runs_on(left.device) or 0 in (*left.shape, len(right)):
            return super().gemm(a, b, bias=bias, dtype=dtype)
        if left.device.type == "cuda":
            y = torch.mm(left, right.mT, out_dtype=torch.float32)
        else:
            y = left.float() @ right.float().mT
        return scaled_output(y, factors, bias, dtype)


FOR_PRODUCTS = Triton(by_column=True)
"""What quantizes for native products, which read them so."""


def hadamard(x: Tensor, transform: Hadamard) -> Tensor:
    """As ``transform.left(x)``, bit for bit."""
    from .kernels import hadamard_kernel

    (outer, inner), cut = x.shape, blocks_of(x, TENSOR, transform)
    out = torch.empty(outer, inner, dtype=x.dtype, device=x.device)
    launch(
        hadamard_kernel,
        cut.programs(outer, inner),
        x,
        out.view(torch.int16) if x.dtype == torch.bfloat16 else out,
        signs_of(transform, x.device),
        *(outer, inner, *x.stride()),
        BLOCK_R=cut.block_r,
        BLOCK_C=cut.block_c,
        HADAMARD=transform.size,
        HARDWARE=hardware(x.device)["HARDWARE"],
        num_warps=cut.num_warps,
    )
    return out


def scaled_output(y: Tensor, factors: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y [rows, cols] in FP32 times one or two factors (FP32 scalars), one after the other, plus bias [cols], rounded
    once to ``dtype``: FP32, BF16 or FP16."""
    out = torch.empty(y.shape, dtype=dtype, device=y.device)
    first, second = factors[0], factors[1] if len(factors) > 1 else None
    key = "output", y.shape, y.device, dtype, second is None, None if bias is None else bias.dtype
    start(recall(key) or remember(key, _output_launcher(y)), y, first, second, bias, out)
    return out


def _output_launcher(y: Tensor) -> Launcher:
    from .kernels import scaled_output_kernel

    return Launcher(
        kernel=scaled_output_kernel,
        programs=-(-y.numel() // 4096),
        numbers=(y.numel(), y.shape[1]),
        constexprs={"BLOCK": 4096},
        num_warps=8,
        device=y.get_device(),
    )


def swizzled(scales: Tensor) -> Tensor:
    """Scale codes uint8 [rows, cols] as tensor cores of Blackwell read them: uint8 [128 * R * 4 * C], flat.

    Padded with zeros to [128 R, 4 C]; then ``view(R, 4, 32, C, 4).permute(0, 3, 2, 1, 4)``.
    """
    from .kernels import swizzle_kernel

    rows, cols = scales.shape
    pieces_r, pieces_c = -(-rows // 128), -(-cols // 4)
    out = scales.new_empty(pieces_r * pieces_c * 512)
    if out.numel():
        launch(swizzle_kernel, pieces_r * pieces_c, scales.contiguous(), out, rows, cols, pieces_c, num_warps=4)
    return out


class _Passes:
    """The passes of ``precision.quantize`` that are of use without fusion; others are those of plain torch."""

    amax = staticmethod(tile_amax)
    scales, centred = staticmethod(TORCH.scales), staticmethod(TORCH.centred)
    encode, rounded = staticmethod(TORCH.encode), staticmethod(TORCH.rounded)

    def values(self, q: Quantized, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
        fits = format_fits(q.spec.format) and tile_fits(q.spec.tile) and dtype in (torch.float32, torch.bfloat16)
        if not fits or q.codes.numel() == 0 or not runs_on(q.codes.device):
            return TORCH.values(q, factors, dtype)
        shape, device = q.stored_shape, q.codes.device
        scaled = None if factors is None else factors.dtype
        if factors is not None and not factors.is_contiguous():
            factors = factors.contiguous()
        key = "values", number(q.spec), shape, device, dtype, scaled
        launcher = recall(key) or remember(key, _values_launcher(q.spec, shape, q.codes, scaled))
        out = torch.empty(shape, dtype=dtype, device=device)
        start(launcher, q.codes, factors, out)
        return out.mT if q.transposed else out


PASSES = _Passes()


def _values_launcher(spec: OperandSpec, shape: tuple[int, int], codes: Tensor, factors: torch.dtype | None) -> Launcher:
    """Of ``values_kernel``; ``factors``: FP32, or the scale codes that the spec's rule stores (uint8), or None."""
    from .kernels import values_kernel

    cut = blocks(spec.tile, *shape)
    return Launcher(
        kernel=values_kernel,
        programs=programs(cut.programs(*shape), cut.num_warps, codes.device),
        numbers=(*shape, codes.shape[1], *spec.tile.grid(*shape)),
        constexprs={
            "F": grid_of(spec.format),
            "R": rule_of(spec, torch.float32) if rule_fits(spec.scale) else None,
            "SCALED": factors is not None,
            **cut.constexprs,
        },
        num_warps=cut.num_warps,
        device=codes.get_device(),
    )
