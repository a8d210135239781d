"""Triton kernels on GPUs, or in Triton's interpreter: the codes, scales and operands of the reference, bit for bit.

A quantized operand is read once and written once where its tiles fit into a block of the kernel; where a scale spans
more (a tensor, long rows, the tensor level of NVFP4), finding the amax is a read of its own. A Hadamard transform is
done while reading. ``docs/kernels.md`` counts the bytes.

With TRITON_INTERPRET=1 the kernels run on the CPU, one operation at a time in numpy: for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from precision.backends.reference import Reference
from precision.formats import NumberFormat
from precision.noise import Noise
from precision.quantize import TORCH, Quantized, check, operand, quantize
from precision.scaling import (
    FP32_MAX,
    TENSOR,
    Delayed,
    Fp32,
    Fp32Decode,
    Power,
    PowerOfTwo,
    ScaleRule,
    Scales,
    Tile,
    TwoLevel,
    Unit,
)
from precision.spec import GemmSpec, OperandSpec, Rounding, Transform
from precision.swiglu import Hidden
from precision.transforms import Hadamard

if TYPE_CHECKING:
    from precision.backends import triton_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = {Rounding.NEAREST: 0, Rounding.STOCHASTIC: 1, Rounding.TRUNCATE: 2}
MODES = {Power.FLOOR: 0, Power.CEIL: 1, Power.EVEN: 2, Power.RCEIL: 3}
MAX_TILE = 128 * 128  # elements that one program holds


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def version() -> tuple[int, int]:
    """Major and minor version of triton, which must be installed."""
    import triton  # type: ignore[import-untyped]

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True, slots=True)
class Launch:
    """What a kernel would be launched with: its arguments by name, tensors for pointers."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int


@dataclass(slots=True)
class Recording:
    """Launches for a GPU of this compute capability, instead of running them."""

    capability: tuple[int, int]
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Note launches instead of running them; tensors may be on the meta device. For ahead-of-time compilation."""
    record = Recording(capability)
    token = _recording.set(record)
    try:
        yield record.launches
    finally:
        _recording.reset(token)


def runs_on(device: torch.device) -> bool:
    """Whether tensors of this device are what kernels take: those of a GPU, or interpreted, of the CPU."""
    return _recording.get() is not None or device.type == ("cpu" if interpreted() else "cuda")


class Triton(Reference):
    """The reference with Triton kernels for all that reads or writes a matrix, but for the products.

    Plain torch where there is no kernel: for other devices, empty matrices, odd tiles.
    """

    name = "triton"

    def why_not(self, gemm: GemmSpec, shape: tuple[int | None, int, int], device: torch.device) -> str | None:
        if not runs_on(device):
            return f"the model is on {device.type}"
        if not installed():
            return "triton is not installed"
        for spec in (gemm.a, gemm.b):
            if spec is None:
                continue
            if not _fits(spec.format):
                return f"no kernel for {spec.format}"
            if not _tile_fits(spec.tile):
                return f"no kernel for tiles of {spec.tile}"
            if not _rule_fits(spec.scale):
                return f"no kernel for scales by {spec.scale}"
        return None

    def quantize(self, x: Tensor, spec: OperandSpec, *, amax: Tensor | None, noise: Noise | None) -> Quantized:
        return quantize_fused(x, spec, amax=amax, noise=noise)

    def operand(self, q: Quantized) -> tuple[Tensor, Tensor | None]:
        return operand(q, passes=PASSES)

    def amax(self, x: Tensor, tile: Tile) -> Tensor:
        return tile_amax(x, tile)

    def transformed(self, transform: Transform, x: Tensor, *, left: bool) -> Tensor:
        if not isinstance(transform, Hadamard) or x.dtype not in DTYPES or x.numel() == 0 or not runs_on(x.device):
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
    ) -> Quantized:
        """The codes of what ``transform`` makes of x, in the passes that those of x take."""
        if transform is None or (isinstance(transform, Hadamard) and x.dtype in DTYPES):
            return quantize_fused(x, spec, amax=amax, noise=noise, transform=transform)
        return self.quantize(self.transformed(transform, x, left=left), spec, amax=amax, noise=noise)

    def both(self, x: Tensor, spec: OperandSpec) -> tuple[Quantized, Quantized] | None:
        return quantize_both(x, spec)


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a matrix is cut for the programs of a kernel; names as there."""

    tall: int
    wide: int
    whole_r: bool
    whole_c: bool
    block_r: int
    block_c: int
    fused: bool  # every tile lies in one block

    @property
    def constexprs(self) -> dict[str, Any]:
        return {
            "TALL": self.tall,
            "WIDE": self.wide,
            "WHOLE_R": self.whole_r,
            "WHOLE_C": self.whole_c,
            "BLOCK_R": self.block_r,
            "BLOCK_C": self.block_c,
        }

    @property
    def num_warps(self) -> int:
        return min(16, max(4, self.block_r * self.block_c // 1024))

    def programs(self, rows: int, cols: int) -> int:
        return -(-rows // self.block_r) * -(-cols // self.block_c)


def blocks(tile: Tile, rows: int, cols: int, *, rows_adjoin: bool = False, group: int = 1) -> Blocks:
    """Blocks of some 4096 elements: wide ones where a row is contiguous, else (``rows_adjoin``) about square.

    ``group``: how many columns a transform takes together.
    """
    tall, wide = tile
    low_r, low_c = max(tall, 1), max(wide, group, 1)
    high_r, high_c = max(low_r, _power_above(rows)), max(low_c, _power_above(cols), 2)
    if tile == Tile(1, -1) and high_c <= (512 if rows_adjoin else 8192):  # a whole row in a block
        block_r, block_c = min(high_r, 32 if rows_adjoin else max(1, 4096 // high_c)), high_c
    else:
        block_c = min(high_c, max(low_c, 64 if rows_adjoin else 128))
        block_r = min(high_r, max(low_r, 4096 // block_c))
    whole_r, whole_c = tall < 0, wide < 0
    fused = (not whole_r or block_r >= rows) and (not whole_c or block_c >= cols)
    return Blocks(
        tall=block_r if whole_r else tall,
        wide=block_c if whole_c else wide,
        whole_r=whole_r,
        whole_c=whole_c,
        block_r=block_r,
        block_c=block_c,
        fused=fused,
    )


def rule_of(spec: OperandSpec, dtype: torch.dtype) -> triton_kernels.Rule:
    """The spec's scale rule as constants of a kernel; ``dtype`` is that of the input."""
    from precision.backends.triton_kernels import Rule, grid_of

    element, rule = spec.format, spec.scale
    inverse = float(1.0 / torch.tensor(element.max, dtype=torch.float32))
    if isinstance(rule, Unit):
        return Rule(kind=0)
    if isinstance(rule, Fp32):
        return Rule(
            kind=1,
            top=_fp32(element.max * 2.0**-rule.margin),
            floor=_fp32(rule.eps),
            limit=torch.finfo(dtype).max if rule.input_max and dtype != torch.float64 else FP32_MAX,
            pow2=rule.pow2,
            element_has_nan=element.nan is not None,
        )
    if isinstance(rule, Fp32Decode):
        return Rule(kind=2, top=element.max, floor=_fp32(rule.floor), pow2=rule.ceil_pow2)
    if isinstance(rule, PowerOfTwo):
        return Rule(
            kind=3,
            mode=MODES[rule.mode],
            inverse_max=inverse,
            max_exponent=element.max_exponent,
            half_bit=1 << (22 - element.mantissa_bits),
        )
    assert isinstance(rule, TwoLevel)
    top = _fp32(element.max * (rule.block_max or rule.block.max))
    return Rule(kind=4, top=top, limit=FP32_MAX, inverse_max=inverse, block=grid_of(rule.block))


def _sources(x: Tensor | Hidden) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The pointers that a kernel reads a matrix by."""
    return (x.gate, x.up, x.d) if isinstance(x, Hidden) else (x, None, None)


def _along(x: Tensor | Hidden) -> int:
    return x.along if isinstance(x, Hidden) and x.d is not None else -1


def _computed(x: Tensor | Hidden, transform: Hadamard | None) -> Tensor:
    y = x.computed() if isinstance(x, Hidden) else x
    return y if transform is None else transform.left(y)


def quantize_fused(
    x: Tensor | Hidden,
    spec: OperandSpec,
    *,
    amax: Tensor | None = None,
    noise: Noise | None = None,
    transform: Hadamard | None = None,
) -> Quantized:
    """As ``precision.quantize.quantize`` of ``transform.left(x)``, bit for bit, without writing that."""
    if isinstance(x, Tensor):
        x = x.detach()
        x = (
            x if x.dtype in DTYPES else x.float()
        )  # where a transform of FP64 would be one in FP64: the caller's concern
    of = _sources(x)[0]  # shaped and laid out as the matrix is
    check(of, spec, amax, noise)
    known = _fits(spec.format) and _tile_fits(spec.tile) and _rule_fits(spec.scale)
    if of.numel() == 0 or not runs_on(of.device) or not known:
        return quantize(_computed(x, transform), spec, amax=amax, noise=noise)
    from precision.backends.triton_kernels import quantize_kernel

    levels, cut = spec.scale.levels, blocks_of(of, spec.tile, transform)
    given = None
    if levels == 2:
        tensor_amax = tile_amax(x, TENSOR, transform) if amax is None else amax
        given = None if cut.fused else tile_amax(x, spec.tile, transform)
    else:
        tensor_amax = None
        given = tile_amax(x, spec.tile, transform) if levels and amax is None and not cut.fused else amax
    made = output(spec, of.shape, of.device, of.dtype, cut=cut, amax=given, tensor_amax=tensor_amax, noise=noise)
    launch(
        quantize_kernel,
        cut.programs(*of.shape),
        *_sources(x),
        *made.pointers[:5],
        signs_of(transform, of.device),
        *made.pointers[5:],
        *(*of.shape, *of.stride(), *made.sizes[2:]),
        ALONG=_along(x),
        TRANSPOSED_NOISE=noise is not None and noise.transposed,
        HADAMARD=transform.size if transform is not None else 0,
        **made.constexprs,
        num_warps=cut.num_warps,
    )
    return made.quantized


def both_fit(spec: OperandSpec) -> bool:
    """Whether ``quantize_both`` takes the spec: one level of scales, for parts of a row, made of the tensor itself."""
    known = _fits(spec.format) and _tile_fits(spec.tile) and _rule_fits(spec.scale) and spec.scale.levels == 1
    own = not isinstance(spec.amax, Delayed) and spec.rounding is not Rounding.STOCHASTIC
    return known and own and spec.tile.outer == 1 and 16 <= spec.tile.inner <= 128


def quantize_both(x: Tensor | Hidden, spec: OperandSpec) -> tuple[Quantized, Quantized] | None:
    """``quantize_fused`` of x and of its transpose, bit for bit, in one read; None where that is not to be had."""
    x = x.detach() if isinstance(x, Tensor) else x
    of = _sources(x)[0]
    if not both_fit(spec) or of.numel() == 0 or of.dtype not in DTYPES or not runs_on(of.device):
        return None
    from precision.backends.triton_kernels import quantize_both_kernel

    (rows, cols), side = of.shape, max(64, spec.tile.inner)
    cut = replace(blocks(spec.tile, rows, cols), block_r=side, block_c=side)
    row, column = (
        output(spec, torch.Size(shape), of.device, of.dtype, cut=cut) for shape in ((rows, cols), (cols, rows))
    )
    constexprs = {key: row.constexprs[key] for key in ("F", "R", "ROUNDING", "WIDE", "HARDWARE", "E2M1_HARDWARE")}
    launch(
        quantize_both_kernel,
        cut.programs(rows, cols),
        *(*_sources(x), row.codes, row.scales, column.codes, column.scales),
        *(rows, cols, *of.stride()),
        *(row.codes.shape[1], row.scales.shape[1], column.codes.shape[1], column.scales.shape[1]),
        ALONG=_along(x),
        BLOCK=side,
        **constexprs,
        num_warps=cut.num_warps,
    )
    return row.quantized, column.quantized


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Output:
    """A quantized matrix yet to be written by a kernel, and what the kernel wants to know for it."""

    spec: OperandSpec
    shape: tuple[int, int]
    cut: Blocks
    codes: Tensor
    scales: Tensor
    given: Tensor | None
    tensor_amax: Tensor | None
    tensor_scale: Tensor | None
    key: Tensor | None
    row_offset: Tensor | None
    constexprs: dict[str, Any]

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        written = (self.codes, self.scales, self.given, self.tensor_amax, self.tensor_scale)
        return (*written, self.key, self.row_offset)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*self.shape, self.codes.shape[1], *self.scales.shape)

    @property
    def quantized(self) -> Quantized:
        scale = self.tensor_scale
        return Quantized(
            codes=self.codes,
            scales=self.scales,
            tensor_scale=scale.reshape(()) if scale is not None else None,
            shape=self.shape,
            spec=self.spec,
        )


def output(
    spec: OperandSpec,
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
    *,
    cut: Blocks | None = None,
    amax: Tensor | None = None,
    tensor_amax: Tensor | None = None,
    noise: Noise | None = None,
) -> Output:
    """Room for the codes and scales of a matrix of this shape and dtype.

    ``amax``: what is given, one for each tile; or, for two levels without ``tensor_amax``, that of the tensor.
    """
    from precision.backends.triton_kernels import grid_of

    rows, cols = shape
    cut = cut or blocks(spec.tile, rows, cols)
    if spec.scale.levels == 2 and tensor_amax is None:
        tensor_amax, amax = amax, None
    assert amax is not None or cut.fused or spec.scale.levels == 0, f"{spec}: its amax spans blocks and must be given"
    assert (tensor_amax is not None) == (spec.scale.levels == 2), f"{spec}: the amax of the tensor"
    grid = spec.tile.grid(rows, cols)
    four = spec.format.bits == 4
    offset = None
    if noise is not None:
        offset = torch.as_tensor(noise.row_offset, dtype=torch.int64, device=device).reshape(1)
    return Output(
        spec=spec,
        shape=(rows, cols),
        cut=cut,
        codes=torch.empty(rows, (cols + 1) // 2 if four else cols, dtype=torch.uint8, device=device),
        scales=torch.empty(grid, dtype=torch.float32 if spec.scale.format is None else torch.uint8, device=device),
        given=amax.float().reshape(grid).contiguous() if amax is not None else None,
        tensor_amax=tensor_amax.float().reshape(1) if tensor_amax is not None else None,
        tensor_scale=torch.empty(1, dtype=torch.float32, device=device) if tensor_amax is not None else None,
        key=noise.key.contiguous() if noise is not None else None,
        row_offset=offset,
        constexprs={
            "F": grid_of(spec.format),
            "R": rule_of(spec, dtype),
            "ROUNDING": ROUNDINGS[spec.rounding],
            "GIVEN": amax is not None,
            **hardware(device),
            **cut.constexprs,
        },
    )


def tile_amax(x: Tensor | Hidden, tile: Tile, transform: Hadamard | None = None) -> Tensor:
    """As ``precision.quantize.amax`` of ``transform.left(x)``, bit for bit."""
    if isinstance(x, Tensor):
        x = x.detach()
    of = _sources(x)[0]
    if of.numel() == 0 or not runs_on(of.device) or not _tile_fits(tile):
        return TORCH.amax(_computed(x, transform), tile)
    from precision.backends.triton_kernels import amax_kernel

    if isinstance(x, Tensor) and x.dtype not in DTYPES:
        x = of = x.float()
    (outer, inner), cut = of.shape, blocks_of(of, tile, transform)
    grid = tile.grid(outer, inner)
    make = torch.zeros if cut.whole_r or cut.whole_c else torch.empty
    out = make(grid, dtype=torch.int32, device=of.device)
    launch(
        amax_kernel,
        cut.programs(outer, inner),
        *_sources(x),
        out,
        signs_of(transform, of.device),
        *(outer, inner, *of.stride(), *grid),
        ALONG=_along(x),
        HADAMARD=transform.size if transform is not None else 0,
        HARDWARE=hardware(of.device)["HARDWARE"],
        **cut.constexprs,
        num_warps=cut.num_warps,
    )
    return out.view(torch.float32)


def hadamard(x: Tensor, transform: Hadamard) -> Tensor:
    """As ``transform.left(x)``, bit for bit."""
    from precision.backends.triton_kernels import hadamard_kernel

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


def swizzled(scales: Tensor) -> Tensor:
    """Scale codes uint8 [rows, cols] as tensor cores of Blackwell read them: uint8 [128 * R * 4 * C], flat.

    Padded with zeros to [128 R, 4 C]; then ``view(R, 4, 32, C, 4).permute(0, 3, 2, 1, 4)``.
    """
    from precision.backends.triton_kernels import swizzle_kernel

    rows, cols = scales.shape
    pieces_r, pieces_c = -(-rows // 128), -(-cols // 4)
    out = scales.new_empty(pieces_r * pieces_c * 512)
    if out.numel():
        launch(swizzle_kernel, pieces_r * pieces_c, scales.contiguous(), out, rows, cols, pieces_c, num_warps=4)
    return out


class _Passes:
    """The passes of ``precision.quantize`` that are of use without fusion."""

    def amax(self, x: Tensor, tile: Tile) -> Tensor:
        return tile_amax(x, tile)

    def scales(self, spec: OperandSpec, amax: Tensor, tensor_amax: Tensor | None, dtype: torch.dtype) -> Scales:
        return TORCH.scales(spec, amax, tensor_amax, dtype)

    def centred(self, codes: Tensor, tiny_exponent: int) -> tuple[Tensor, Tensor]:
        return TORCH.centred(codes, tiny_exponent)

    def encode(self, x: Tensor, scales: Tensor, spec: OperandSpec, noise: Noise | None) -> Tensor:
        return TORCH.encode(x, scales, spec, noise)

    def values(self, q: Quantized, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
        known = _fits(q.spec.format) and _tile_fits(q.spec.tile) and dtype in (torch.float32, torch.bfloat16)
        if not known or q.codes.numel() == 0 or not runs_on(q.codes.device):
            return TORCH.values(q, factors, dtype)
        from precision.backends.triton_kernels import grid_of, values_kernel

        outer, inner = q.stored_shape
        out = q.codes.new_empty(outer, inner, dtype=dtype)
        cut = blocks(q.spec.tile, outer, inner)
        launch(
            values_kernel,
            cut.programs(outer, inner),
            q.codes,
            factors.contiguous() if factors is not None else None,
            out.view(torch.int16) if dtype == torch.bfloat16 else out,
            *(outer, inner, q.codes.shape[1], *q.spec.tile.grid(outer, inner)),
            F=grid_of(q.spec.format),
            SCALED=factors is not None,
            **cut.constexprs,
            num_warps=cut.num_warps,
        )
        return out.mT if q.transposed else out

    def rounded(
        self,
        x: Tensor,
        scales: Tensor,
        factors: Tensor | None,
        spec: OperandSpec,
        noise: Noise | None,
        dtype: torch.dtype,
    ) -> Tensor:
        return TORCH.rounded(x, scales, factors, spec, noise, dtype)


PASSES = _Passes()


def hardware(device: torch.device) -> dict[str, bool]:
    """Which conversion instructions a device has: FP8 from Ada on, FP4 from Blackwell on.

    Before triton 3.9 not FP8 on Ada, where it casts to FP16 on the way: values would be rounded twice.
    """
    fp8 = (8, 9) if version() >= (3, 9) else (9, 0)
    return {"HARDWARE": capability(device) >= fp8, "E2M1_HARDWARE": capability(device) >= (10, 0)}


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability: of the GPU, of what is recorded for, or that of nothing in the interpreter."""
    record = _recording.get()
    if record is not None:
        return record.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def launch(kernel: Any, programs: int, *args: Any, num_warps: int, **kwargs: Any) -> None:
    """No product and sum may become one FMA: it would round once."""
    if (record := _recording.get()) is not None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        record.launches.append(Launch(kernel, programs, arguments, num_warps))
        return
    kernel[(programs,)](*args, **kwargs, num_warps=num_warps, enable_fp_fusion=False)


def blocks_of(x: Tensor, tile: Tile, transform: Hadamard | None) -> Blocks:
    group = transform.size if transform is not None else 1
    return blocks(tile, *x.shape, rows_adjoin=x.stride(1) != 1 and x.stride(0) == 1, group=group)


def _fits(format: NumberFormat) -> bool:
    return format.bits <= 8 and not format.scales_only and format.min_exponent > -126


def _tile_fits(tile: Tile) -> bool:
    if any(extent > 0 and extent & (extent - 1) for extent in tile):
        return False
    return tile in (TENSOR, Tile(1, -1), Tile(-1, 1)) or (min(tile) > 0 and tile.outer * tile.inner <= MAX_TILE)


def _rule_fits(rule: ScaleRule) -> bool:
    if isinstance(rule, TwoLevel):
        return _fits(rule.block) and not rule.rows and rule.four_over_six is None
    return isinstance(rule, (Unit, Fp32, Fp32Decode, PowerOfTwo))


def _power_above(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def signs_of(transform: Hadamard | None, device: torch.device) -> Tensor | None:
    return None if transform is None else _sign_vector(transform, device)


@functools.cache
def _sign_vector(transform: Hadamard, device: torch.device) -> Tensor:
    return torch.tensor(transform.vector(), dtype=torch.float32, device=device)
