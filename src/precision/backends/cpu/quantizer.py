"""Fused C++ passes over memory: the codes, scales and operands of the reference, bit for bit.

Scales are computed by the rules themselves (``precision.scaling``), on grids that are small beside the matrix; only
what reads or writes a whole matrix is compiled. The matrix product is torch's.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .... import native
from ...formats import ExMy, NumberFormat
from ...noise import Noise
from ...quantize import Prepared, Quantized, check, operand_dtype, prepare, quantize
from ...scaling import FP32_MAX, TENSOR, Fp32, Power, PowerOfTwo, Tile, TwoLevel, encode_power, scaled
from ...spec import GemmSpec, OperandSpec, Rounding, Transform, specs_of
from ...transforms import Composed, Hadamard
from ..interface import Cast, knows_rule, knows_transform, mapped_otherwise, unknown
from ..reference import Reference, one_noise
from .library import CButterflies, CRule, CSource, c_format, c_noise, kernels, library

_DTYPES = (torch.float32, torch.bfloat16)
_ROWS_OF_A_PART = 64  # of a tensor's amax: what one thread takes at a time
_LANES, _DEPTH = 16, 128  # of vectors.h and hadamard.h
_TENSOR, _RCEIL, _TWO_LEVEL = 1, 2, 3  # of scales.h
_NO_NOISE, _NO_BUTTERFLIES = ctypes.byref(c_noise(None)), CButterflies()
_TRANSFORMED_IN_PASSING = 16  # the size for which quantize_source has butterflies


class Cpu(Reference):
    """The passes of ``precision.quantize`` in C++; plain torch where a dtype or a format has no kernel."""

    name = "cpu"

    def why_not(self, gemm: GemmSpec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"the model is on {device.type}"
        if reason := unknown(gemm.a, gemm.b):
            return reason
        for spec in specs_of(gemm.a, gemm.b):
            if not _fits(spec.format):
                return f"no kernel for {spec.format}"
            if spec.rounding is Rounding.TRUNCATE:
                return "no kernel truncates"
        return None if library() is not None else "no C++ compiler"

    def cast(self, x: Tensor, cast: Cast) -> Quantized | Prepared:
        spec, amax, noise, transform = cast.spec, cast.amax, one_noise(cast), cast.transform
        in_passing = None
        while type(transform) is Composed:
            x, transform = self.transformed(transform.first, x, left=cast.left), transform.second
        if knows_transform(transform) and transform.size == _TRANSFORMED_IN_PASSING and _in_columns(x, spec.tile):
            in_passing = transform
        elif transform is not None:
            x = self.transformed(transform, x, left=cast.left)
        check(x, spec, amax, noise)
        result = self._in_one_call(x, spec, amax, noise, cast.codes, in_passing)
        if result is not None:
            return result
        if in_passing is not None:
            x = self.transformed(in_passing, x, left=cast.left)
        return (quantize if cast.codes else prepare)(x, spec, amax=amax, noise=noise, passes=self)

    def transformed(self, transform: Transform, x: Tensor, *, left: bool) -> Tensor:
        if not knows_transform(transform) or x.dtype not in _DTYPES:
            return super().transformed(transform, x, left=left)
        columns = not x.is_contiguous() and x.mT.is_contiguous()
        x = x if columns else contiguous(x)
        y = torch.empty(x.shape, dtype=x.dtype, device="cpu")
        sizes = (native.size(x.shape[0]), native.size(x.shape[1]))
        butterflies = ctypes.byref(_butterflies(transform)[0])
        source = native.pointer(x.mT if columns else x)
        kernels().hadamard(source, native.pointer(y), *sizes, butterflies, x.dtype == torch.bfloat16, columns)
        return y

    def _in_one_call(
        self,
        x: Tensor,
        spec: OperandSpec,
        amax: Tensor | None,
        noise: Noise | None,
        codes: bool,
        transform: Hadamard | None,
    ) -> Quantized | Prepared | None:
        """``quantize`` or ``prepare`` of what the transform makes of x, in one call, scales included.

        None where that is not to be had: rules and tiles that have no kernel, and tensors with an amax that is not
        finite.
        """
        ready = _ready(spec, x.dtype)
        if ready is None or x.numel() == 0 or (amax is not None and ready.kind == _RCEIL):
            return None
        if not x.is_cpu or not (amax is None or amax.is_cpu):  # an address elsewhere means nothing here
            return None
        x = x.detach()
        if not x.is_contiguous():
            x = self._readable(x, spec.tile)
        outer, inner = x.shape
        tall, wide = spec.tile.extent(outer, inner)
        columns = _in_columns(x, spec.tile)
        if _DEPTH % wide != 0 if columns else wide % _LANES != 0 and wide < inner:
            return None
        grid = spec.tile.grid(outer, inner)
        stored = torch.empty(grid, dtype=torch.uint8, device="cpu") if codes and ready.kind != _TENSOR else None
        out = _empty_codes(spec, x.shape) if codes else torch.empty(x.shape, dtype=torch.bfloat16, device="cpu")
        factor = torch.empty((), dtype=torch.float32, device="cpu")
        given = None if amax is None else amax.detach().float().contiguous()  # named: it must outlive the call
        # All of these are contiguous: plain addresses save what native.pointer costs, which shows beside small tensors.
        rows, cols = (inner, outer) if columns else (outer, inner)
        butterflies = _NO_BUTTERFLIES if transform is None else _butterflies(transform)[0]
        source = CSource(x.data_ptr(), rows, cols, tall, wide, x.dtype == torch.bfloat16, columns, butterflies)
        failed = _quantize_source()(
            ctypes.byref(source),
            ready.rule,
            None if given is None else given.data_ptr(),
            out.data_ptr(),
            None if stored is None else stored.data_ptr(),
            factor.data_ptr(),
            ready.format,
            _NO_NOISE if noise is None else ctypes.byref(c_noise(noise)),
            not codes,
        )
        if failed:
            return None
        if not codes:
            return Prepared(matrix=out, factor=factor)
        scales = factor.reshape(grid) if stored is None else stored
        tensor = factor if ready.kind == _TWO_LEVEL else None
        return Quantized(codes=out, scales=scales, tensor_scale=tensor, shape=(outer, inner), spec=spec)

    def amax(self, x: Tensor, tile: Tile) -> Tensor:
        if x.dtype not in _DTYPES or x.numel() == 0:
            return super().amax(x, tile)
        x = x.detach()
        if tile.outer == tile.inner and not x.is_contiguous() and x.mT.is_contiguous():
            return self.amax(x.mT, tile).mT.contiguous()  # square tiles of a transpose: no copy is needed
        x = x if _in_columns(x, tile) else contiguous(x)
        part = Tile(min(x.shape[0], _ROWS_OF_A_PART), tile.inner) if tile.outer < 0 else tile
        out = torch.empty(part.grid(*x.shape), dtype=torch.float32, device="cpu")
        kernels().source_amax(ctypes.byref(_source(x, part)), native.pointer(out))
        return out.amax(0, keepdim=True) if tile.outer < 0 else out

    def centred(self, codes: Tensor, tiny_exponent: int) -> tuple[Tensor, Tensor]:
        codes = codes.contiguous()
        factors = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
        pointers = map(native.pointer, (codes, factors))
        centre = kernels().centred_factors(*pointers, native.size(codes.numel()), ctypes.c_int32(tiny_exponent))
        return factors, encode_power(torch.tensor(254 - centre, device="cpu"))

    def encode(self, x: Tensor, scales: Tensor, spec: OperandSpec, noise: Noise | None) -> Tensor:
        if not _rounds(spec) or x.numel() == 0:
            return super().encode(x, scales, spec, noise)
        _require_grid(scales, spec.tile, x.shape)
        codes = _empty_codes(spec, x.shape)
        readable, tile = self._readable(x, spec.tile), spec.tile
        if not _in_vectors(readable, tile):  # several tiles in a vector: torch multiplies by their scales
            readable, tile = contiguous(scaled(x.float(), scales, tile)), TENSOR
            scales = torch.ones_like(scales[:1, :1])
        self._round(readable, tile, scales, None, spec.format, noise, codes)
        return codes

    def rounded(
        self,
        x: Tensor,
        scales: Tensor,
        factors: Tensor | None,
        spec: OperandSpec,
        noise: Noise | None,
        dtype: torch.dtype,
    ) -> Tensor:
        readable = self._readable(x, spec.tile) if _rounds(spec) and x.numel() else x
        if dtype != torch.bfloat16 or readable.numel() == 0 or not _in_vectors(readable, spec.tile):
            return super().rounded(x, scales, factors, spec, noise, dtype)
        _require_grid(scales, spec.tile, x.shape)
        if factors is not None:
            _require_grid(factors, spec.tile, x.shape)
        out = torch.empty(x.shape, dtype=dtype, device="cpu")
        self._round(readable, spec.tile, scales, factors, spec.format, noise, out)
        return out

    def _readable(self, x: Tensor, tile: Tile) -> Tensor:
        x = x if x.dtype in _DTYPES else x.float()
        return x if _in_columns(x, tile) else contiguous(x)

    def _round(
        self,
        x: Tensor,
        tile: Tile,
        scales: Tensor,
        factors: Tensor | None,
        format: NumberFormat,
        noise: Noise | None,
        out: Tensor,
    ) -> None:
        scales = scales.contiguous()  # named: its memory must outlive the call
        factors = None if factors is None else factors.contiguous()
        pointers = map(native.pointer, (scales, factors, out))
        structures = (ctypes.byref(c_format(format)), ctypes.byref(c_noise(noise)))
        kernels().round_source(ctypes.byref(_source(x, tile)), *pointers, *structures, out.dtype == torch.bfloat16)

    def values(self, q: Quantized, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
        if not _fits(q.spec.format) or dtype not in (torch.float32, torch.bfloat16) or q.codes.numel() == 0:
            return super().values(q, factors, dtype)
        outer, inner = q.stored_shape
        row = _bytes_of_a_row(q.spec, inner)
        if q.codes.dtype != torch.uint8 or q.codes.shape != (outer, row):
            raise ValueError(
                f"codes of {q.spec.format} of {[outer, inner]} are uint8 {[outer, row]}, "
                f"not {q.codes.dtype} {list(q.codes.shape)}"
            )
        if factors is not None:
            _require_grid(factors, q.spec.tile, q.stored_shape)
        if factors is None:
            factors = torch.ones(q.spec.tile.grid(outer, inner), dtype=torch.float32, device="cpu")
        out = torch.empty(outer, inner, dtype=dtype, device="cpu")
        sizes = map(native.size, (outer, inner, *q.spec.tile.extent(outer, inner)))
        pointers = map(native.pointer, (q.codes, factors.contiguous(), out))
        kernels().values(*pointers, *sizes, ctypes.byref(c_format(q.spec.format)), dtype == torch.bfloat16)
        return out.mT if q.transposed else out


class _Ready(NamedTuple):
    """What a spec is to ``quantize_source``: pointers to its rule and its format."""

    kind: int
    rule: Any
    format: Any


@functools.cache
def _ready(spec: OperandSpec, dtype: torch.dtype) -> _Ready | None:
    rule = _rule(spec, dtype) if dtype in _DTYPES else None
    return None if rule is None else _Ready(rule.kind, ctypes.byref(rule), ctypes.byref(c_format(spec.format)))


@functools.cache
def _quantize_source() -> Callable[..., int]:
    function = kernels().quantize_source
    function.argtypes = [*[ctypes.c_void_p] * 8, ctypes.c_int32]
    return function


@functools.cache
def _butterflies(transform: Hadamard) -> tuple[CButterflies, Tensor]:
    """The transform as C++ reads it, and its signs, which must outlive that."""
    signs = torch.tensor(transform.vector(), dtype=torch.float32, device="cpu")
    return CButterflies(transform.size, 1 / math.sqrt(transform.size), native.pointer(signs)), signs


def _source(x: Tensor, tile: Tile) -> CSource:
    columns = _in_columns(x, tile)
    memory, extent, bf16 = x.mT if columns else x, tile.extent(*x.shape), x.dtype == torch.bfloat16
    return CSource(native.pointer(memory), *memory.shape, *extent, bf16, columns, _NO_BUTTERFLIES)


def _bytes_of_a_row(spec: OperandSpec, inner: int) -> int:
    return (inner + 1) // 2 if spec.format.bits == 4 else inner


def _empty_codes(spec: OperandSpec, shape: torch.Size) -> Tensor:
    return torch.empty(shape[0], _bytes_of_a_row(spec, shape[1]), dtype=torch.uint8, device="cpu")


def _rule(spec: OperandSpec, dtype: torch.dtype) -> CRule | None:
    """The spec's rule, if kernels know how just its scales come from amaxes, and operands are BF16."""
    rule, element = spec.scale, spec.format
    if not _rounds(spec) or not knows_rule(rule) or operand_dtype(spec) != torch.bfloat16 or mapped_otherwise(spec):
        return None
    common = {"inverse_max": 1 / element.max, "tiny_exponent": element.tiny_exponent}
    if type(rule) is Fp32 and spec.tile == TENSOR:
        limit = torch.finfo(dtype).max if rule.input_max and dtype != torch.float64 else FP32_MAX
        top = element.max * 2.0**-rule.margin
        flags = {"kind": _TENSOR, "pow2": rule.pow2, "nan_decodes": element.nan is None}
        return CRule(**flags, eps=rule.eps, top=top, limit=limit, **common)
    if type(rule) is PowerOfTwo and rule.mode is Power.RCEIL:
        return CRule(kind=_RCEIL, **common)
    if type(rule) is not TwoLevel or rule.outer != TENSOR:
        return None
    if not _fits(rule.block):
        return None
    return CRule(kind=_TWO_LEVEL, top=rule.top(element), block=c_format(rule.block), **common)


def contiguous(x: Tensor) -> Tensor:
    """``x.contiguous()`` of a matrix; compiled for transposes."""
    if x.is_contiguous() or x.numel() == 0 or not x.mT.is_contiguous() or x.element_size() not in (1, 2, 4):
        return x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    sizes = (native.size(x.shape[1]), native.size(x.shape[0]), ctypes.c_int32(x.element_size()))
    kernels().transpose(native.pointer(x.mT), native.pointer(y), *sizes)
    return y


def _fits(format: NumberFormat) -> bool:
    return type(format) is ExMy and format.bits <= 8 and format.mantissa_bits > 0 and format.min_exponent > -100


def _rounds(spec: OperandSpec) -> bool:
    return _fits(spec.format) and spec.rounding is not Rounding.TRUNCATE


def _in_columns(x: Tensor, tile: Tile) -> bool:
    """Whether x is the transpose of what lies in memory, in tiles that kernels can read so."""
    if x.is_contiguous() or tile.outer != 1 or x.dtype not in _DTYPES or x.numel() == 0 or not x.mT.is_contiguous():
        return False
    wide = tile.extent(*x.shape)[1]
    return _DEPTH % wide == 0 or wide % _DEPTH == 0


def _in_vectors(x: Tensor, tile: Tile) -> bool:
    wide = tile.extent(*x.shape)[1]
    return wide % _LANES == 0 or wide >= x.shape[1] or _in_columns(x, tile)


def _require_grid(scales: Tensor, tile: Tile, shape: tuple[int, ...]) -> None:
    outer, inner = shape
    wanted = tile.grid(outer, inner)
    if scales.dtype != torch.float32 or scales.shape != wanted:
        raise ValueError(
            f"tiles of {tile} of {[outer, inner]} have float32 {list(wanted)}, not {scales.dtype} {list(scales.shape)}"
        )
