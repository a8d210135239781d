"""Triton kernels on GPUs, or in Triton's interpreter: the codes, scales and operands of the reference, bit for bit.

A quantized operand is read once and written once where its tiles fit into a block of the kernel; where a scale spans
more (a tensor, long rows, the tensor level of NVFP4), finding the amax is a read of its own. A Hadamard transform is
done while reading. ``docs/kernels.md`` counts the bytes.

With TRITON_INTERPRET=1 the kernels run on the CPU, one operation at a time in numpy: for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...quantize import Prepared, Quantized, operand
from ...scaling import TENSOR, Tile
from ...spec import GemmSpec, OperandSpec, Transform, specs_of
from ...transforms import Composed, Hadamard
from ..interface import Cast, Operand, knows_transform, unknown
from ..reference import Emulated, Reference, one_noise, scaled_product
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
    takes_rows = False

    def __init__(self, *, by_column: bool = False) -> None:
        self.by_column = by_column

    def why_not(self, gemm: GemmSpec, device: torch.device) -> str | None:
        if not runs_on(device):
            return f"the model is on {device.type}"
        if not installed():
            return "triton is not installed"
        if reason := unknown(gemm.a, gemm.b):
            return reason
        reasons = (lacking(spec) for spec in specs_of(gemm.a, gemm.b))
        return next(filter(None, reasons), None)

    def amax(self, x: Tensor, tile: Tile) -> Tensor:
        return tile_amax(x, tile)

    def values(self, q: Quantized, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
        if not _has_kernel(q) or dtype not in (torch.float32, torch.bfloat16):
            return super().values(q, factors, dtype)
        return decoded(q, factors, dtype)

    def operand(self, q: Quantized) -> tuple[Tensor, Tensor | None]:
        """As ``precision.quantize.operand``, bit for bit; but powers of two per tile, which it takes relative to the
        largest so that nothing depends on subnormals, are applied as they are: code value * 2^k, without a factor.

        BF16 holds that exactly, down to its own subnormals (2^-133), which GPUs do not flush; elements below are
        rounded there, and a tile whose largest values exceed BF16's is infinite.
        """
        rule = q.spec.scale
        in_tiles = (rule.power_of_two or rule.levels == 2) and not one_factor(q.spec)
        if in_tiles and values_fit(q.spec) and _has_kernel(q):
            return decoded(q, q.scales, torch.bfloat16), q.tensor_scale
        return operand(q, passes=self)

    def transformed(self, transform: Transform, x: Tensor, *, left: bool) -> Tensor:
        if not knows_transform(transform) or x.dtype not in DTYPES or x.numel() == 0 or not runs_on(x.device):
            return super().transformed(transform, x, left=left)
        if not near(x, blocks_of(x, TENSOR, transform)):
            return super().transformed(transform, x, left=left)
        return hadamard(x, transform)

    def cast(self, x: Tensor, cast: Cast) -> Quantized | Prepared:
        """The codes of what the transform makes of x, in the passes that those of x take; or, without ``codes``, what
        ``operand`` gives of them, where BF16 holds that. ``note``: as in ``quantize_fused``.
        """
        spec, amax, noise, note = cast.spec, cast.amax, one_noise(cast), cast.note
        if noise is not None and noise.rows is not None:
            if note is not None:
                y = x if cast.transform is None else self.transformed(cast.transform, x, left=cast.left)
                note.copy_(torch.maximum(note, self.amax(y, TENSOR).reshape(note.shape)))
            return super().cast(x, replace(cast, note=None))
        said = cast.transform
        while type(said) is Composed:
            x, said = self.transformed(said.first, x, left=cast.left), said.second
        transform = said if knows_transform(said) and x.dtype in DTYPES else None
        if transform is None and said is not None:
            x = self.transformed(said, x, left=cast.left)
        if not cast.codes:
            prepared = prepare_fused(x, spec, amax=amax, noise=noise, transform=transform, note=note)
            if prepared is not None:
                return prepared
        return quantize_fused(x, spec, amax=amax, noise=noise, transform=transform, note=note, by_column=self.by_column)

    def cast_both(self, x: Tensor, cast: Cast) -> tuple[Quantized, Quantized] | tuple[Prepared, Prepared] | None:
        noise, values, by_column = cast.noise, not cast.codes, self.by_column
        assert noise is None or isinstance(noise, tuple)
        if noise is not None and noise[0].rows is not None:
            return None
        return quantize_both(
            x, cast.spec, amax=cast.amax, noise=noise, note=cast.note, values=values, by_column=by_column
        )


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
        B=cut,
        HADAMARD=transform.size,
        HARDWARE=hardware(x.device).fp8,
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


def _has_kernel(q: Quantized) -> bool:
    """Whether ``decoded`` takes the codes."""
    return format_fits(q.spec.format) and tile_fits(q.spec.tile) and runs_on(q.codes.device)


def decoded(q: Quantized, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``Passes.values`` by a kernel, in FP32 or BF16; ``factors`` may be the scale codes that a known rule stores."""
    shape, device = q.stored_shape, q.codes.device
    if q.codes.numel() == 0:
        return torch.empty(q.shape, dtype=dtype, device=device)
    scaled = None if factors is None else factors.dtype
    if factors is not None and not factors.is_contiguous():
        factors = factors.contiguous()
    key = "values", number(q.spec), shape, device, dtype, scaled
    launcher = recall(key) or remember(key, _values_launcher(q.spec, shape, q.codes, scaled))
    out = torch.empty(shape, dtype=dtype, device=device)
    start(launcher, q.codes, factors, out)
    return out.mT if q.transposed else out


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
            "B": cut,
        },
        num_warps=cut.num_warps,
        device=codes.get_device(),
    )
