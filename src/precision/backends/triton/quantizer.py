"""Triton kernels on GPUs, or in Triton's interpreter: the codes, scales and operands of the reference, bit for bit.

A quantized operand is read once and written once where its tiles fit into a block of the kernel; where a scale spans
more (a tensor, long rows, the tensor level of NVFP4), finding the amax is a read of its own. A Hadamard transform is
done while reading. ``docs/kernels.md`` counts the bytes.

With TRITON_INTERPRET=1 the kernels run on the CPU, one operation at a time in numpy: for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...formats import NumberFormat
from ...noise import Noise
from ...quantize import TORCH, Prepared, Quantized, check, knows_format, operand, operand_dtype, quantize
from ...scaling import (
    FP32_MAX,
    TENSOR,
    Delayed,
    Fp32,
    Fp32Decode,
    Power,
    PowerOfTwo,
    ScaleRule,
    Tile,
    TwoLevel,
    Unit,
)
from ...spec import GemmSpec, OperandSpec, Rounding, Transform
from ...swiglu import Hidden
from ...transforms import Hadamard
from ..interface import Cast, knows_rule, knows_transform, unknown
from ..reference import Reference, one_noise

if TYPE_CHECKING:
    from . import kernels as triton_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = {Rounding.NEAREST: 0, Rounding.STOCHASTIC: 1, Rounding.TRUNCATE: 2}
MODES = {Power.FLOOR: 0, Power.CEIL: 1, Power.EVEN: 2, Power.RCEIL: 3}
MAX_TILE = 128 * 128  # elements that one program holds


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: Triton asks once, too."""
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

    Args:
        by_column: FP32 scales of parts of a row, where kernels write them, lie in memory column by column.
    """

    name = "triton"
    notes = True

    def __init__(self, *, by_column: bool = False) -> None:
        self.by_column = by_column

    def why_not(self, gemm: GemmSpec, device: torch.device) -> str | None:
        if not runs_on(device):
            return f"the model is on {device.type}"
        if not installed():
            return "triton is not installed"
        if reason := unknown(gemm.a, gemm.b):
            return reason
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
        in_tiles = (rule.power_of_two or rule.levels == 2) and not _one_factor(q.spec)
        if in_tiles and _rule_fits(rule) and _values_fit(q.spec) and _has_kernel(q):
            return decoded(q, q.scales, torch.bfloat16), q.tensor_scale
        return operand(q, passes=self)

    def transformed(self, transform: Transform, x: Tensor, *, left: bool) -> Tensor:
        if not knows_transform(transform) or x.dtype not in DTYPES or x.numel() == 0 or not runs_on(x.device):
            return super().transformed(transform, x, left=left)
        if not _near(x, blocks_of(x, TENSOR, transform)):
            return super().transformed(transform, x, left=left)
        return hadamard(x, transform)

    def cast(self, x: Tensor, cast: Cast) -> Quantized | Prepared:
        """The codes of what the transform makes of x, in the passes that those of x take; or, without ``codes``, what
        ``operand`` gives of them, where BF16 holds that. ``note``: as in ``quantize_fused``.
        """
        spec, amax, noise, note = cast.spec, cast.amax, one_noise(cast), cast.note
        transform = cast.transform if knows_transform(cast.transform) and x.dtype in DTYPES else None
        if transform is None and cast.transform is not None:
            x = self.transformed(cast.transform, x, left=cast.left)
        if not cast.codes:
            made = prepare_fused(x, spec, amax=amax, noise=noise, transform=transform, note=note)
            if made is not None:
                return made
        return quantize_fused(x, spec, amax=amax, noise=noise, transform=transform, note=note, by_column=self.by_column)

    def cast_both(self, x: Tensor, cast: Cast) -> tuple[Quantized, Quantized] | tuple[Prepared, Prepared] | None:
        noise, values, by_column = cast.noise, not cast.codes, self.by_column
        assert noise is None or isinstance(noise, tuple)
        return quantize_both(
            x, cast.spec, amax=cast.amax, noise=noise, note=cast.note, values=values, by_column=by_column
        )


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
    warps: int = 0  # 0: by the number of elements

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
        return self.warps or min(16, max(4, self.block_r * self.block_c // 1024))

    def programs(self, rows: int, cols: int) -> int:
        return -(-rows // self.block_r) * -(-cols // self.block_c)


class Choice(NamedTuple):
    """How large a program's blocks are, about, and by how many warps they are computed. Bits do not depend on it."""

    elements: int = 4096
    warps: int = 0  # 0: by the number of elements


def blocks(
    tile: Tile, rows: int, cols: int, *, rows_adjoin: bool = False, group: int = 1, choice: Choice | None = None
) -> Blocks:
    """Blocks of some 4096 elements: wide ones where a row is contiguous, else (``rows_adjoin``) about square.

    ``group``: how many columns a transform takes together.
    """
    elements, warps = choice or Choice()
    tall, wide = tile
    low_r, low_c = max(tall, 1), max(wide, group, 1)
    high_r, high_c = max(low_r, _power_above(rows)), max(low_c, _power_above(cols), 2)
    if tile == Tile(1, -1) and high_c <= (512 if rows_adjoin else 8192):  # a whole row in a block
        block_r, block_c = min(high_r, 32 if rows_adjoin else max(1, elements // high_c)), high_c
    else:
        block_c = min(high_c, max(low_c, 64 if rows_adjoin else 128))
        block_r = min(high_r, max(low_r, elements // block_c))
    if rows_adjoin and group > 1 and choice is None:
        # A load gives a thread 8 elements of a column, and a warp 8 columns: with few rows the columns of a group meet
        # in few warps, so that a transform's stages are shuffles and not trips through shared memory.
        block_r, warps = min(high_r, max(low_r, 32)), 2 if block_c <= 64 else 4
    if min(tall, wide) > 0 and tall * wide >= MAX_TILE and not warps:
        warps = 8  # of 16, sm_100's assembler gives a thread 64 registers, and spills
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
        warps=warps,
    )


def rule_of(spec: OperandSpec, dtype: torch.dtype) -> triton_kernels.Rule:
    """The spec's scale rule as constants of a kernel; ``dtype`` is that of the input."""
    from .kernels import Rule, grid_of

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
    note: Tensor | None = None,
    by_column: bool = False,
) -> Quantized:
    """As ``precision.quantize.quantize`` of ``transform.left(x)``, bit for bit, without writing that.

    Args:
        note: FP32 of one element: becomes the amax of what is quantized if that is larger (NaN is largest). For one
            scale of the tensor, or a tensor level, made of an ``amax`` that is given.
        by_column: as in ``Triton``.

    Raises ValueError as ``quantize``, and for a note where the amax is not given.
    """
    made = _made(x, spec, amax, noise, transform, note, values=False, by_column=by_column)
    if made is not None:
        assert isinstance(made, Quantized)
        return made
    y = _computed(x, transform)
    _noted(y, note)
    return quantize(y, spec, amax=amax, noise=noise)


def prepare_fused(
    x: Tensor | Hidden,
    spec: OperandSpec,
    *,
    amax: Tensor | None = None,
    noise: Noise | None = None,
    transform: Hadamard | None = None,
    note: Tensor | None = None,
) -> Prepared | None:
    """What ``Triton.operand`` gives of ``quantize_fused``, without codes; None where BF16 does not hold it."""
    if not _values_fit(spec):
        return None
    made = _made(x, spec, amax, noise, transform, note, values=True, by_column=False)
    assert not isinstance(made, Quantized)
    return made


def _made(
    x: Tensor | Hidden,
    spec: OperandSpec,
    amax: Tensor | None,
    noise: Noise | None,
    transform: Hadamard | None,
    note: Tensor | None,
    *,
    values: bool,
    by_column: bool,
) -> Quantized | Prepared | None:
    """Codes or values by kernels; None where there are none."""
    of, up, d = _sources(x)
    if not runs_on(of.device):
        check(of, spec, amax, noise)
        return None
    if amax is not None and (amax.dtype != torch.float32 or not amax.is_contiguous()):
        amax = amax.float().contiguous()
    parts = None if noise is None else noise_parts(noise, of.device)
    key = (
        values,
        _number(spec),
        of.shape,
        of.stride(),
        of.dtype,
        of.device,
        None if up is None else (d is None, _along(x)),
        None if transform is None else _number(transform),
        None if amax is None else amax.numel(),
        None if parts is None else parts.kind,
        note is None,
        by_column,
    )
    recorded = _recording.get() is not None
    plan = None if recorded else _PLANS.get(key)
    if plan is None:
        check(of, spec, amax, noise)
        if note is not None and (amax is None or not _of_tensor(spec)):
            raise ValueError(f"{spec}: an amax is noted where that of the tensor is given")
        known = _fits(spec.format) and _tile_fits(spec.tile) and _rule_fits(spec.scale)
        if of.numel() == 0 or not known or not _near(of, blocks_of(of, spec.tile, transform)):
            return None
        if of.dtype not in DTYPES:  # where a transform of FP64 would be one in FP64: the caller's concern
            assert isinstance(x, Tensor)
            return _made(x.float(), spec, amax, noise, transform, note, values=values, by_column=by_column)

        def planned(choice: Choice | None) -> QuantizePlan:
            return _quantize_plan(x, spec, amax, parts, transform, choice, values=values, by_column=by_column)

        def run(choice: Choice | None) -> Quantized | Prepared:
            return planned(choice).made(of, up, d, amax, parts, note)

        plan = planned(chosen(_kind("one", of, spec, transform, values), of.device, run))
        if not recorded:
            _remember(key, plan)
    return plan.made(of, up, d, amax, parts, note)


def _noted(y: Tensor, note: Tensor | None) -> None:
    if note is not None:
        note.copy_(torch.maximum(note, TORCH.amax(y, TENSOR).reshape(note.shape)))


def _of_tensor(spec: OperandSpec) -> bool:
    """Whether the amax that a scale is made of may be given as one number."""
    return spec.scale.levels == 2 or (spec.scale.levels == 1 and spec.tile == TENSOR)


def _values_fit(spec: OperandSpec) -> bool:
    """Whether ``prepare_fused`` gives BF16: exact products of code values and tiles' scales, or code values alone."""
    return spec.format.bits <= 8 and operand_dtype(spec) == torch.bfloat16


def _one_factor(spec: OperandSpec) -> bool:
    """Whether BF16 values are code values, to be multiplied by one FP32 scale of the tensor, or by none."""
    return spec.scale.levels == 0 or (spec.tile == TENSOR and spec.scale.format is None)


@dataclass(frozen=True, slots=True, eq=False)
class NoiseParts:
    """Noise as a kernel reads it: its tensors lie on the device.

    Args:
        key: int32 [2], of ``step_key``; with ``step`` (int64, 0-dim), of ``base_key``.
        first: int64, 0-dim: rows are counted from first * rows_of_a_sample; None: from 0.
    """

    key: Tensor
    step: Tensor | None
    first: Tensor | None
    rows_of_a_sample: int
    transposed: bool

    @property
    def kind(self) -> Hashable:
        """What a kernel is compiled for."""
        return self.transposed, self.step is None, self.first is None, self.rows_of_a_sample


def noise_parts(noise: Noise, device: torch.device) -> NoiseParts:
    """The noise for kernels of this device: nothing is computed or copied where its parts are there."""
    key, step, first, rows_of_a_sample = noise.base, noise.step, noise.first_sample, noise.rows_of_a_sample
    if step is not None and (isinstance(step, int) or step.device != device):
        key, step = noise.key, None
    if key.device != device:
        key = key.to(device)
    if rows_of_a_sample == 0 or (isinstance(first, int) and first == 0):
        return NoiseParts(key, step, None, 1, noise.transposed)
    if isinstance(first, int):
        first, rows_of_a_sample = torch.full((), first * rows_of_a_sample, dtype=torch.int64, device=device), 1
    elif first.device != device:
        first = first.to(device)
    return NoiseParts(key, step, first, rows_of_a_sample, noise.transposed)


_PLANS: dict[Hashable, Any] = {}
_NUMBERS: dict[int, tuple[Hashable, int]] = {}
_EQUAL: dict[Hashable, int] = {}
MAX_PLANS = 4096


def _number(thing: Hashable) -> int:
    """One small integer for all that are equal: a spec's own hash takes longer than a launch.

    Known by their place in memory, which stays theirs while they are held.
    """
    held = _NUMBERS.get(id(thing))
    if held is not None:
        return held[1]
    if len(_NUMBERS) >= MAX_PLANS:
        _NUMBERS.clear()
    number = _EQUAL.setdefault(thing, len(_EQUAL))
    _NUMBERS[id(thing)] = thing, number
    return number


def _remember(key: Hashable, plan: Any) -> None:
    if len(_PLANS) >= MAX_PLANS:
        _PLANS.clear()
    _PLANS[key] = plan


@dataclass(slots=True, eq=False, kw_only=True)
class Room:
    """Where a kernel writes a matrix: codes [outer, bytes] or BF16 values, scales, the tensor's scale.

    ``by_column``: as in ``Triton``; of no consequence to other scales.
    """

    spec: OperandSpec
    shape: tuple[int, int]
    device: torch.device
    values: bool
    by_column: bool = False

    codes: tuple[int, int] = field(init=False)
    grid: tuple[int, int] = field(init=False)
    scale_dtype: torch.dtype = field(init=False)
    two_level: bool = field(init=False)
    one_factor: bool = field(init=False)

    def __post_init__(self) -> None:
        rows, cols = self.shape
        four = self.spec.format.bits == 4 and not self.values
        self.codes = rows, (cols + 1) // 2 if four else cols
        self.grid = self.spec.tile.grid(rows, cols)
        self.scale_dtype = torch.float32 if self.spec.scale.format is None else torch.uint8
        self.two_level = self.spec.scale.levels == 2
        self.one_factor = self.spec.scale.levels == 1 and _one_factor(self.spec)
        of_parts = self.spec.tile.outer == 1 and self.spec.tile.inner > 0
        self.by_column = self.by_column and of_parts and self.spec.scale.format is None

    def make(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Codes or values, scales if they are kept, the scale of the tensor of a rule with two levels."""
        device = self.device
        tensor_scale = torch.empty(1, dtype=torch.float32, device=device) if self.two_level else None
        if self.values:
            scale = torch.empty(1, dtype=torch.float32, device=device) if self.one_factor else None
            return torch.empty(self.codes, dtype=torch.bfloat16, device=device), scale, tensor_scale
        codes = torch.empty(self.codes, dtype=torch.uint8, device=device)
        if self.by_column:
            return codes, torch.empty(self.grid[::-1], dtype=self.scale_dtype, device=device).mT, tensor_scale
        return codes, torch.empty(self.grid, dtype=self.scale_dtype, device=device), tensor_scale

    def filled(self, codes: Tensor, scales: Tensor | None, tensor_scale: Tensor | None) -> Quantized | Prepared:
        if self.values:
            factor = scales if tensor_scale is None else tensor_scale
            return Prepared(matrix=codes, factor=_scalar(factor))
        assert scales is not None
        tensor_scale = _scalar(tensor_scale)
        return Quantized(codes=codes, scales=scales, tensor_scale=tensor_scale, shape=self.shape, spec=self.spec)


@dataclass(slots=True, eq=False, kw_only=True)
class QuantizePlan:
    """The launches of ``quantize_fused``, ready but for their tensors.

    Args:
        tensor_amax: makes that of the tensor in ``parts`` pieces, if a pass of its own does.
        tile_amax: makes those of tiles, if a pass of its own does.
    """

    room: Room
    tensor_amax: Launcher | None
    parts: int
    tile_amax: Launcher | None
    write: Launcher
    of_tensor: bool
    signs: Tensor | None

    def made(
        self,
        x: Tensor,
        up: Tensor | None,
        d: Tensor | None,
        amax: Tensor | None,
        noise: NoiseParts | None,
        note: Tensor | None,
    ) -> Quantized | Prepared:
        room, signs = self.room, self.signs
        of_tiles = None if self.of_tensor else amax
        of_tensor = amax if self.of_tensor else None
        if self.tensor_amax is not None:
            of_tensor = torch.empty(self.parts, dtype=torch.float32, device=room.device)
            start(self.tensor_amax, x, up, d, of_tensor, None, signs)
        if self.tile_amax is not None:
            of_tiles = torch.zeros(room.grid, dtype=torch.int32, device=room.device)
            start(self.tile_amax, x, up, d, of_tiles, None, signs)
        codes, scales, tensor_scale = room.make()
        key, step, first = (None, None, None) if noise is None else (noise.key, noise.step, noise.first)
        start(
            self.write,
            *(x, up, d, codes, scales, of_tiles, of_tensor, tensor_scale, note, signs, key, step, first),
        )
        return room.filled(codes, scales, tensor_scale)


def _quantize_plan(
    x: Tensor | Hidden,
    spec: OperandSpec,
    amax: Tensor | None,
    noise: NoiseParts | None,
    transform: Hadamard | None,
    choice: Choice | None,
    *,
    values: bool,
    by_column: bool = False,
) -> QuantizePlan:
    from .kernels import quantize_kernel

    of = _sources(x)[0]
    cut, levels, device = blocks_of(of, spec.tile, transform, choice), spec.scale.levels, of.device
    whole = spec.tile == TENSOR
    # Of the tensor it is a pass of its own, unless given or found in one block.
    apart = levels > 0 and amax is None and (levels == 2 or (whole and not cut.fused))
    of_tiles = not whole and not cut.fused and (levels == 2 or (levels == 1 and amax is None))
    tops = amax_launcher(x, TENSOR, transform, parts=True) if apart else None
    parts = tops.programs if tops is not None else 1
    room = Room(spec=spec, shape=(of.shape[0], of.shape[1]), device=device, values=values, by_column=by_column)
    return QuantizePlan(
        room=room,
        tensor_amax=tops,
        parts=parts,
        tile_amax=amax_launcher(x, spec.tile, transform) if of_tiles else None,
        write=Launcher(
            kernel=quantize_kernel,
            programs=programs(cut.programs(*of.shape), cut.num_warps, device),
            numbers=(*of.shape, *of.stride(), room.codes[1], *room.grid, noise.rows_of_a_sample if noise else 1),
            constexprs={
                "ALONG": _along(x),
                **constants(spec, of.dtype, device),
                "TRANSPOSED_NOISE": noise is not None and noise.transposed,
                "GIVEN": of_tiles or (levels == 1 and (apart or amax is not None)),
                "PARTS": parts,
                "VALUES": 0 if not values else 1 if _one_factor(spec) else 2,
                "BY_COLUMN": room.by_column,
                **cut.constexprs,
                "HADAMARD": transform.size if transform is not None else 0,
            },
            num_warps=cut.num_warps,
            device=of.get_device(),
        ),
        of_tensor=_of_tensor(spec),
        signs=signs_of(transform, device),
    )


def constants(spec: OperandSpec, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What a kernel is told of a spec: constexprs by name; ``dtype`` is that of the input."""
    from .kernels import grid_of

    return {
        "F": grid_of(spec.format),
        "R": rule_of(spec, dtype),
        "ROUNDING": ROUNDINGS[spec.rounding],
        **hardware(device),
    }


def amax_launcher(
    x: Tensor | Hidden, tile: Tile, transform: Hadamard | None = None, *, parts: bool = False, columns: bool = False
) -> Launcher:
    """Of ``amax_kernel``. ``parts``: that of the tensor, in as many FP32 parts as programs, a power of two.

    ``columns``: those of columns, too.
    """
    from .kernels import amax_kernel

    of = _sources(x)[0]
    (rows, cols), cut = of.shape, blocks_of(of, tile, transform)
    if columns:
        cut = replace(blocks(tile, rows, cols), block_r=BOTH_SIDE, block_c=BOTH_SIDE, wide=BOTH_SIDE)
    most = programs(cut.programs(rows, cols), cut.num_warps, of.device)
    if parts:
        most = min(1024, 1 << (most.bit_length() - 1))
    return Launcher(
        kernel=amax_kernel,
        programs=most,
        numbers=(rows, cols, *of.stride(), *tile.grid(rows, cols)),
        constexprs={
            "ALONG": _along(x),
            "PARTS": parts,
            **cut.constexprs,
            "HADAMARD": transform.size if transform is not None else 0,
            "HARDWARE": hardware(of.device)["HARDWARE"],
        },
        num_warps=cut.num_warps,
        device=of.get_device(),
    )


def both_fit(spec: OperandSpec) -> bool:
    """Whether ``quantize_both`` takes the spec: scales of parts of a row, of rows, or of the tensor."""
    known = _fits(spec.format) and _tile_fits(spec.tile) and _rule_fits(spec.scale)
    parts = spec.tile.outer == 1 and 16 <= spec.tile.inner <= 128
    return known and (parts or (spec.scale.levels < 2 and spec.tile in (TENSOR, Tile(1, -1))))


BOTH_SIDE = 64  # of the blocks of quantize_both, at least


def quantize_both(
    x: Tensor | Hidden,
    spec: OperandSpec,
    *,
    amax: Tensor | None = None,
    noise: tuple[Noise, Noise] | None = None,
    note: Tensor | None = None,
    values: bool = False,
    by_column: bool = False,
) -> tuple[Quantized, Quantized] | tuple[Prepared, Prepared] | None:
    """``quantize_fused`` of x and of its transpose, bit for bit, in one read; None where that is not to be had.

    Args:
        amax: that of the tensor, for one scale of the tensor or for its level; None: found in a read before.
        noise: of x, and of its transpose: alike but for the key and ``transposed``.
        note: as in ``quantize_fused``.
        values: ``prepare_fused`` instead.
        by_column: as in ``Triton``.

    The second of the pair is a matrix of its own, not transposed, also where both have one scale.
    """
    of, up, d = _sources(x)
    if not runs_on(of.device):
        return None
    parts = None if noise is None else (noise_parts(noise[0], of.device), noise_parts(noise[1], of.device))
    key = (
        2 + values,
        _number(spec),
        of.shape,
        of.stride(),
        of.dtype,
        of.device,
        None if up is None else (d is None, _along(x)),
        amax is None,
        None if parts is None else (parts[0].kind, parts[1].kind),
        note is None,
        by_column,
    )
    recorded = _recording.get() is not None
    plan = None if recorded else _PLANS.get(key)
    if plan is None:

        def planned(choice: Choice | None) -> BothPlan | None:
            return _both_plan(x, spec, amax, parts, note is not None, choice, values=values, by_column=by_column)

        def run(choice: Choice | None) -> object:
            candidate = planned(choice)
            assert candidate is not None
            return candidate.made(of, up, d, amax, parts, note)

        plan = planned(None)
        if plan is None:
            return None
        choice = chosen(_kind("both", of, spec, None, values), of.device, run)
        plan = planned(choice) or plan
        if not recorded:
            _remember(key, plan)
    pair: tuple[Quantized, Quantized] | tuple[Prepared, Prepared] = plan.made(of, up, d, amax, parts, note)
    return pair


def _scalar(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dim() == 0 else x.view(())


@dataclass(slots=True, eq=False, kw_only=True)
class BothPlan:
    """The launches of ``quantize_both``, ready but for their tensors; as ``QuantizePlan``."""

    rooms: tuple[Room, Room]
    tensor_amax: Launcher | None
    parts: int
    tile_amaxes: Launcher | None
    write: Launcher

    def made(
        self,
        x: Tensor,
        up: Tensor | None,
        d: Tensor | None,
        amax: Tensor | None,
        noise: tuple[NoiseParts, NoiseParts] | None,
        note: Tensor | None,
    ) -> tuple[Quantized, Quantized] | tuple[Prepared, Prepared]:
        row, column = self.rooms
        of_rows = of_columns = None
        if self.tensor_amax is not None:
            amax = torch.empty(self.parts, dtype=torch.float32, device=row.device)
            start(self.tensor_amax, x, up, d, amax, None, None)
        elif amax is not None and amax.dtype != torch.float32:
            amax = amax.float()
        if self.tile_amaxes is not None:
            found = torch.zeros(sum(row.shape), dtype=torch.int32, device=row.device)
            of_rows, of_columns = found.split_with_sizes(row.shape)
            start(self.tile_amaxes, x, up, d, of_rows, of_columns, None)
        codes, scales, tensor_scale = row.make()
        if row.spec.tile == TENSOR:  # the transpose has the same
            codes_t, scales_t = column.make()[0], None
        else:
            codes_t, scales_t = column.make()[:2]
        first, second = noise if noise is not None else (None, None)
        start(
            self.write,
            *(x, up, d, codes, scales, codes_t, scales_t, of_rows, of_columns, amax, tensor_scale, note),
            None if first is None else first.key,
            None if second is None else second.key,
            None if first is None else first.step,
            None if first is None else first.first,
        )
        # What both have is one tensor, not two views: compiled code takes two for memory of their own.
        tensor_scale = _scalar(tensor_scale)
        if row.values and scales_t is None:
            scales = _scalar(scales)
        other = scales if scales_t is None else scales_t
        return row.filled(codes, scales, tensor_scale), column.filled(codes_t, other, tensor_scale)  # type: ignore[return-value]


def _both_plan(
    x: Tensor | Hidden,
    spec: OperandSpec,
    amax: Tensor | None,
    noise: tuple[NoiseParts, NoiseParts] | None,
    noted: bool,
    choice: Choice | None,
    *,
    values: bool,
    by_column: bool = False,
) -> BothPlan | None:
    from .kernels import quantize_both_kernel

    of, device = _sources(x)[0], _sources(x)[0].device
    if not both_fit(spec) or of.numel() == 0 or of.dtype not in DTYPES or (values and not _values_fit(spec)):
        return None
    if amax is None and (isinstance(spec.amax, Delayed) or noted):
        return None
    if (noise is not None) != (spec.rounding is Rounding.STOCHASTIC):
        return None
    if amax is not None and (not _of_tensor(spec) or amax.numel() != 1):
        raise ValueError(f"{spec} in both directions takes no amax but that of the tensor")
    if noise is not None:
        first, second = noise
        assert replace(first, transposed=not first.transposed).kind == second.kind, "the noise of both directions"
    large = choice is not None and choice.elements > BOTH_SIDE * BOTH_SIDE
    (rows, cols), side = of.shape, max(2 * BOTH_SIDE if large else BOTH_SIDE, spec.tile.inner)
    warps = 0 if choice is None else choice.warps
    cut = replace(blocks(spec.tile, rows, cols), block_r=side, block_c=side, warps=warps)
    if not _near(of, cut, both=True):
        return None
    whole = spec.tile == TENSOR
    apart = amax is None and _of_tensor(spec)
    of_rows = spec.tile == Tile(1, -1)
    tops = amax_launcher(x, TENSOR, parts=True) if apart else None
    parts = tops.programs if tops is not None else 1
    rooms = [
        Room(spec=spec, shape=shape, device=device, values=values, by_column=by_column)
        for shape in ((rows, cols), (cols, rows))
    ]
    (_, bytes_c), (_, bytes_r) = (room.codes for room in rooms)
    return BothPlan(
        rooms=(rooms[0], rooms[1]),
        tensor_amax=tops,
        parts=parts,
        tile_amaxes=amax_launcher(x, spec.tile, columns=True) if of_rows else None,
        write=Launcher(
            kernel=quantize_both_kernel,
            programs=programs(cut.programs(rows, cols), cut.num_warps, device),
            numbers=(
                *(rows, cols, *of.stride(), bytes_c, rooms[0].grid[1], bytes_r, rooms[1].grid[1]),
                noise[0].rows_of_a_sample if noise is not None else 1,
            ),
            constexprs={
                "ALONG": _along(x),
                **constants(spec, of.dtype, device),
                "TRANSPOSED_NOISE": noise is not None and noise[0].transposed,
                "GIVEN": of_rows or (whole and spec.scale.levels == 1),
                "PARTS": parts,
                "VALUES": 0 if not values else 1 if _one_factor(spec) else 2,
                "BY_COLUMN": rooms[0].by_column,
                "WIDE": side if whole or of_rows else spec.tile.inner,
                "WHOLE_R": whole,
                "WHOLE_C": whole or of_rows,
                "BLOCK": side,
            },
            num_warps=cut.num_warps,
            device=of.get_device(),
        ),
    )


def tile_amax(x: Tensor | Hidden, tile: Tile, transform: Hadamard | None = None) -> Tensor:
    """As ``precision.quantize.amax`` of ``transform.left(x)``, bit for bit."""
    of, up, d = _sources(x)
    if of.numel() == 0 or not runs_on(of.device) or not _tile_fits(tile):
        return TORCH.amax(_computed(x, transform), tile)
    if of.dtype not in DTYPES:
        assert isinstance(x, Tensor)
        return tile_amax(x.float(), tile, transform)
    key = (
        4,
        tile,
        of.shape,
        of.stride(),
        of.dtype,
        of.device,
        None if up is None else (d is None, _along(x)),
        None if transform is None else _number(transform),
    )
    recorded = _recording.get() is not None
    plan = None if recorded else _PLANS.get(key)
    if plan is None:
        if not _near(of, blocks_of(of, tile, transform)):
            return TORCH.amax(_computed(x, transform), tile)
        launcher = amax_launcher(x, tile, transform)
        whole = launcher.constexprs["WHOLE_R"] or launcher.constexprs["WHOLE_C"]
        plan = launcher, torch.zeros if whole else torch.empty, tile.grid(*of.shape), signs_of(transform, of.device)
        if not recorded:
            _remember(key, plan)
    launcher, make, grid, signs = plan
    out = make(grid, dtype=torch.int32, device=of.device)
    start(launcher, of, up, d, out, None, signs)
    return out.view(torch.float32)


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
    from .output_kernels import scaled_output_kernel

    out = torch.empty(y.shape, dtype=dtype, device=y.device)
    first, second = factors[0], factors[1] if len(factors) > 1 else None
    key = 6, y.shape, y.device, dtype, second is None, None if bias is None else bias.dtype
    recorded = _recording.get() is not None
    launcher = None if recorded else _PLANS.get(key)
    if launcher is None:
        launcher = Launcher(
            kernel=scaled_output_kernel,
            programs=-(-y.numel() // 4096),
            numbers=(y.numel(), y.shape[1]),
            constexprs={"BLOCK": 4096},
            num_warps=8,
            device=y.get_device(),
        )
        if not recorded:
            _remember(key, launcher)
    start(launcher, y, first, second, bias, out)
    return out


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
    return _fits(q.spec.format) and _tile_fits(q.spec.tile) and runs_on(q.codes.device)


def decoded(q: Quantized, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``Passes.values`` by a kernel, in FP32 or BF16; ``factors`` may be the scale codes that a known rule stores."""
    shape, device = q.stored_shape, q.codes.device
    if q.codes.numel() == 0:
        return torch.empty(q.shape, dtype=dtype, device=device)
    scaled = None if factors is None else factors.dtype
    if factors is not None and not factors.is_contiguous():
        factors = factors.contiguous()
    key = 5, _number(q.spec), shape, device, dtype, scaled
    recorded = _recording.get() is not None
    launcher = None if recorded else _PLANS.get(key)
    if launcher is None:
        launcher = _values_launcher(q.spec, shape, q.codes, scaled)
        if not recorded:
            _remember(key, launcher)
    out = torch.empty(shape, dtype=dtype, device=device)
    start(launcher, q.codes, factors, out)
    return out.mT if q.transposed else out


def _values_launcher(spec: OperandSpec, shape: tuple[int, int], codes: Tensor, factors: torch.dtype | None) -> Launcher:
    """Of ``values_kernel``; ``factors``: FP32, or the scale codes that the spec's rule stores (uint8), or None."""
    from .kernels import grid_of, values_kernel

    cut = blocks(spec.tile, *shape)
    return Launcher(
        kernel=values_kernel,
        programs=programs(cut.programs(*shape), cut.num_warps, codes.device),
        numbers=(*shape, codes.shape[1], *spec.tile.grid(*shape)),
        constexprs={
            "F": grid_of(spec.format),
            "R": rule_of(spec, torch.float32) if _rule_fits(spec.scale) else None,
            "SCALED": factors is not None,
            **cut.constexprs,
        },
        num_warps=cut.num_warps,
        device=codes.get_device(),
    )


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


@dataclass(slots=True, eq=False, kw_only=True)
class Launcher:
    """A kernel's launch but for its tensors, which ``start`` gives: always of the same dtypes, the same ones None.

    Args:
        numbers: the arguments after the tensors, in order.
        constexprs: the others, by name.
        device: of the tensors, as ``Tensor.get_device`` has it.
    """

    kernel: Any
    programs: int
    numbers: tuple[int, ...]
    constexprs: dict[str, Any]
    num_warps: int
    device: int
    known: bool = field(init=False)  # whether its compiled kernels may be kept
    compiled: dict[tuple[int, int], _Compiled] = field(default_factory=dict)  # by device and alignment

    def __post_init__(self) -> None:
        self.known = _launchers_known(self.kernel)


class _Compiled(NamedTuple):
    """What is launched, without triton's own way of finding it."""

    run: Any
    function: Any
    metadata: Any
    missing: int  # tensors that are None
    rest: tuple[Any, ...]  # what follows the tensors


def start(launcher: Launcher, *tensors: Tensor | None) -> None:
    """Launch on the current stream.

    Triton binds some 30 arguments anew at each launch, which takes tens of microseconds. What it compiles depends on
    dtypes, on constants, and on which pointers and integers are multiples of 16 or 1: of a ``Launcher`` all is fixed
    but the pointers. So a compiled kernel is kept for every set of pointers that are multiples of 16; kernels with
    hooks, and versions of triton whose launchers are not known to take the same arguments, go triton's way.
    """
    known = launcher.known and _recording.get() is None
    odd = 0
    if known:
        runtime, active = _runtime()
        device, at = active.get_current_device(), launcher.device
        pointers: list[int | None] = []
        ends = 0
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
            else:
                pointer = tensor.data_ptr()
                ends |= pointer
                pointers.append(pointer)
                known &= tensor.get_device() == at  # where one lies elsewhere, Triton says so
        if ends & 15:
            odd = sum(1 << place for place, pointer in enumerate(pointers) if (pointer or 0) & 15)
        compiled = launcher.compiled.get((device, odd)) if known else None
        if (
            compiled is not None
            and pointers.count(None) == compiled.missing
            and not runtime.launch_enter_hook.calls
            and not runtime.launch_exit_hook.calls
        ):
            compiled.run(
                launcher.programs,
                *(1, 1, active.get_current_stream(device), compiled.function, compiled.metadata, None, None, None),
                *pointers,
                *compiled.rest,
            )
            return
    kernel = launch(
        launcher.kernel,
        launcher.programs,
        *tensors,
        *launcher.numbers,
        **launcher.constexprs,
        num_warps=launcher.num_warps,
    )
    if known and compiled is None:
        names = launcher.kernel.arg_names[len(tensors) + len(launcher.numbers) :]
        launcher.compiled[device, odd] = _Compiled(
            run=kernel.run,
            function=kernel.function,
            metadata=kernel.packed_metadata,
            missing=tensors.count(None),
            rest=(*launcher.numbers, *(launcher.constexprs[name] for name in names)),
        )


@functools.cache
def _runtime() -> tuple[Any, Any]:
    """Triton's settings at run time, and its driver."""
    import triton
    from triton.runtime import driver  # type: ignore[import-untyped]

    return triton.knobs.runtime, driver.active


@functools.cache
def _launchers_known(kernel: Any) -> bool:
    """Whether this triton's compiled kernels are run as ``start`` runs them."""
    import triton
    from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return isinstance(kernel, JITFunction) and (3, 6) <= version <= (3, 9) and not kernel.pre_run_hooks


def launch(kernel: Any, programs: int, *args: Any, num_warps: int, **kwargs: Any) -> Any:
    """No product and sum may become one FMA: it would round once."""
    if (record := _recording.get()) is not None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        record.launches.append(Launch(kernel, programs, arguments, num_warps))
        return None
    return kernel[(programs,)](*args, **kwargs, num_warps=num_warps, enable_fp_fusion=False)


MULTIPROCESSORS = {(8, 9): 142, (9, 0): 132, (10, 0): 148, (12, 0): 188}
"""Of L40S, H100 SXM, B200 and RTX PRO 6000: for launches that are recorded."""


def programs(blocks: int, num_warps: int, device: torch.device) -> int:
    """How many programs share the blocks of a matrix: what fills a GPU, at most, so that each has many of a large one.

    In the interpreter three, so that a program has several.
    """
    if device.type == "cuda" and _recording.get() is None:
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        multiprocessors = MULTIPROCESSORS.get(capability(device), 0)
    return min(blocks, multiprocessors * (64 // num_warps) or 3)


def blocks_of(x: Tensor, tile: Tile, transform: Hadamard | None, choice: Choice | None = None) -> Blocks:
    group = transform.size if transform is not None else 1
    rows_adjoin = x.stride(1) != 1 and x.stride(0) == 1
    return blocks(tile, *x.shape, rows_adjoin=rows_adjoin, group=group, choice=choice)


CANDIDATES = (Choice(2048, 4), Choice(4096, 4), Choice(4096, 8), Choice(8192, 8))


def chosen(kind: str, device: torch.device, run: Callable[[Choice | None], object]) -> Choice | None:
    """The blocks of a kind of launch on this architecture, None for what ``blocks`` says.

    With NARROWGAUGE_TUNE=1 in the environment the candidates are measured at the first launch of a kind, by ``run``,
    and the best is kept for later processes, in triton's cache directory.
    """
    if device.type != "cuda" or _recording.get() is not None:
        return None
    major, minor = capability(device)
    name = f"sm_{major}{minor} {kind}"
    known = _tuned()
    if name not in known and os.environ.get("NARROWGAUGE_TUNE") == "1":
        times = {choice: _milliseconds(functools.partial(run, choice)) for choice in (None, *CANDIDATES)}
        known[name] = min(times, key=lambda choice: times[choice])
        path = _tuned_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(known, indent=1), encoding="utf-8")
        scratch.replace(path)
    return known.get(name)


def _tuned_path() -> Path:
    import triton

    return Path(triton.knobs.cache.dir) / "narrowgauge_blocks.json"


@functools.cache
def _tuned() -> dict[str, Choice | None]:
    """What was measured, by architecture and kind of launch."""
    path = _tuned_path()
    if not path.exists():
        return {}
    return {
        name: None if pair is None else Choice(*pair)
        for name, pair in json.loads(path.read_text(encoding="utf-8")).items()
    }


def _milliseconds(call: Callable[[], object], times: int = 20) -> float:
    """Of one call on the device's clock, the median of three."""
    call()
    measured: list[float] = []
    for _ in range(3):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        for _ in range(times):
            call()
        last.record()
        last.synchronize()
        measured.append(first.elapsed_time(last) / times)
    return sorted(measured)[1]


def _kind(what: str, of: Tensor, spec: OperandSpec, transform: Hadamard | None, values: bool) -> str:
    """What launches are measured together: those that differ in the matrix's size and in what costs little."""
    laid = "rows" if of.stride(1) == 1 else "columns"
    size = transform.size if transform is not None else 0
    parts = (what, laid, spec.format, spec.tile, spec.scale, spec.rounding.value, f"hadamard{size}", of.dtype, values)
    return "/".join(map(str, parts))


def _near(x: Tensor, cut: Blocks, *, both: bool = False) -> bool:
    """Whether 32 bits hold what lies between the elements of a block: of x, of what is made of it, and of its transpose
    (``both``).
    """
    rows, cols = x.shape
    tall, wide = max(x.stride(0), cols), max(x.stride(1), rows if both else 1)
    return cut.block_r * tall + cut.block_c * wide < 2**31


def _fits(format: NumberFormat) -> bool:
    return knows_format(format) and format.bits <= 8 and not format.scales_only and format.min_exponent > -126


def _tile_fits(tile: Tile) -> bool:
    if any(extent > 0 and extent & (extent - 1) for extent in tile):
        return False
    return tile in (TENSOR, Tile(1, -1), Tile(-1, 1)) or (min(tile) > 0 and tile.outer * tile.inner <= MAX_TILE)


def _rule_fits(rule: ScaleRule) -> bool:
    if isinstance(rule, TwoLevel) and (not _fits(rule.block) or rule.rows or rule.four_over_six is not None):
        return False
    return knows_rule(rule)


def _power_above(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def signs_of(transform: Hadamard | None, device: torch.device) -> Tensor | None:
    return None if transform is None else _sign_vector(transform, device)


@functools.cache
def _sign_vector(transform: Hadamard, device: torch.device) -> Tensor:
    return torch.tensor(transform.vector(), dtype=torch.float32, device=device)
