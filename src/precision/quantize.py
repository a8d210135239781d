"""Quantization of matrices: amax over tiles, codes and scales, and the way back. Pure functions in plain torch.

This is the definition: other backends give the same bits. For x [outer, inner], contraction last:

1. x is brought to FP32 (exact from BF16 and FP16; FP64 is rounded).
2. amax of every tile: the maximum of |x|, NaN if there is one; or another statistic (``precision.scaling``). Ragged
   last tiles have fewer elements.
3. the scale rule gives the encode scale of every tile (``precision.scaling``).
4. y = x * encode, one FP32 product per element; values = format.round(y, noise), or format.truncate(y): saturating;
   codes = format.encode.
5. a rule that ``Finishes`` sees what came of that, and decides on scales and codes.

Back: code value * stored scale, one FP32 product (exact in two-level scales), or as a rule ``Reads`` them; then * the
scale of the tensor, of rows or of groups, if there is one.

Non-finite values: what amax does with them stands in ``precision.scaling``; elements follow ``precision.formats``: an
infinity saturates, NaN stays NaN where the format has one. In a format without NaN the scale tells of it, except when
the amax comes from elsewhere (delayed): then NaN becomes the largest positive value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from .codebook import Codebook
from .formats import E8M0, ExMy, Integer, PowersOfTwo, pack4, unpack4
from .noise import Noise
from .scaling import (
    TENSOR,
    Amax,
    Delayed,
    Scales,
    Tile,
    Trial,
    encode_power,
    finishes,
    outer_of,
    reads,
    scaled,
    spread,
    statistic_of,
    tiled,
)
from .spec import OperandSpec, Rounding


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Quantized:
    """A quantized matrix.

    Args:
        codes: uint8 [outer, inner]; [outer, ceil(inner / 2)] for formats of 4 bits (even element in the low nibble);
            for formats over 8 bits the values themselves, in the format's dtype (FP32 if it has none).
        scales: [rows, columns] of the grid of tiles: FP32 decode scales, or codes (uint8) of the rule's scale format.
        tensor_scale: FP32 of a two-level rule: a scalar, or one for each tile of the rule's ``outer`` level [rows,
            groups]. Of a rule of one level a factor of the tensor. None without one.
        shape: outer, inner.
        spec: how it was quantized.
        transposed: whether codes and scales are those of the matrix [inner, outer].
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    shape: tuple[int, int]
    spec: OperandSpec
    transposed: bool = False

    def t(self) -> Quantized:
        """The same codes and scales, seen as a matrix [inner, outer]: nothing is copied.

        Raises ValueError for tiles that are not square: along the other dimension they would be another quantization.
        """
        tile = self.spec.tile
        if tile.outer != tile.inner:
            raise ValueError(
                f"tiles of {tile} cannot be transposed: quantize the transposed tensor, or use square tiles"
            )
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Of the matrix whose rows the codes follow."""
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Prepared:
    """One side of an emulated GEMM, where nobody needs its codes: ``matrix * factor`` as ``operand`` gives them.

    Args:
        matrix: [outer, inner].
        factor: FP32 scalar for the GEMM's output, or None.
    """

    matrix: Tensor
    factor: Tensor | None

    def t(self) -> Prepared:
        """The operand of the transposed matrix, for square tiles: nothing is copied."""
        return replace(self, matrix=self.matrix.mT)


class Passes(Protocol):
    """The passes over memory that quantization consists of; what is left is arithmetic on scales.

    In plain torch: that is their definition, whoever computes them.
    """

    def amax(self, x: Tensor, tile: Tile) -> Tensor:
        """As ``amax`` below."""
        return amax(x, tile)

    def centred(self, codes: Tensor, tiny_exponent: int) -> tuple[Tensor, Tensor]:
        """Factors of tiles relative to the largest power of two, from E8M0 codes, and that power (see ``operand``)."""
        code = codes.int()
        nan = code == 255
        centre = pad(torch.where(nan, 0, code).flatten(), (0, 1), value=1).amax()
        # 127 + k - c as an E8M0 code; what lies too far below is multiplied by zero.
        shifted = 127 + code - centre
        factor = encode_power(254 - shifted.clamp(min=1))
        factor = torch.where(shifted + tiny_exponent < 1, 0.0, factor)
        return torch.where(nan, torch.nan, factor), encode_power(254 - centre)

    def encode(self, x: Tensor, scales: Tensor, spec: OperandSpec, noise: Noise | None) -> Tensor:
        """``Quantized.codes`` of x [outer, inner], given FP32 encode scales [rows, columns]."""
        y = x.float() if spec.scale.levels == 0 else scaled(x.float(), scales, spec.tile)
        if spec.rounding is Rounding.TRUNCATE:
            values = spec.format.truncate(y)
        else:
            values = spec.format.round(y, noise.uniform(*x.shape) if noise is not None else None)
        if spec.format.bits <= 8:
            codes = spec.format.encode(values)
            return (pack4(codes) if spec.format.bits == 4 else codes).contiguous()
        return values.to(spec.format.dtype or torch.float32).contiguous()

    def values(self, q: Quantized, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Code value * factor of its tile (FP32 [rows, columns]; None for 1) in ``dtype``, [outer, inner]."""
        codes = unpack4(q.codes, q.stored_shape[1]) if q.spec.format.bits == 4 else q.codes
        wide = q.spec.format.decode(codes) if q.spec.format.bits <= 8 else codes.float()
        if factors is not None:
            wide = scaled(wide, factors, q.spec.tile)
        # Laid out as the codes are, whoever makes them: a GEMM's order of sums depends on the layout.
        narrow = wide.to(dtype).contiguous()
        return narrow.mT if q.transposed else narrow

    def rounded(
        self,
        x: Tensor,
        scales: Tensor,
        factors: Tensor | None,
        spec: OperandSpec,
        noise: Noise | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """``values`` of what ``encode`` would give."""
        codes = self.encode(x, scales, spec, noise)
        q = Quantized(codes=codes, scales=scales, tensor_scale=None, shape=(x.shape[0], x.shape[1]), spec=spec)
        return self.values(q, factors, dtype)


class TorchPasses(Passes):
    """Those of the definition."""


TORCH = TorchPasses()


def amax(x: Tensor, tile: Tile) -> Tensor:
    """The absolute maximum of every tile of x [outer, inner]: FP32 [rows, columns], detached.

    0 for tiles without elements (a whole extent of an empty matrix is one tile). NaN where a tile has one.
    """
    x = x.detach()
    return tiled(x if x.dtype != torch.float64 else x.float(), tile).abs().amax((1, 3)).float()


def quantize(
    x: Tensor, spec: OperandSpec, *, amax: Tensor | None = None, noise: Noise | None = None, passes: Passes = TORCH
) -> Quantized:
    """Codes and scales of x [outer, inner]; any float dtype, any strides, ragged and empty shapes included.

    Args:
        amax: what the scale is computed from: FP32, one per tile, or one in all for a two-level rule (its tensor level;
            the tiles' own amaxes are always current). None: that of ``x``. Delayed scaling needs it.
        noise: for stochastic rounding, which needs it; refused otherwise.
        passes: who reads and writes the matrix.

    Raises ValueError for a tensor that is not a float matrix, for an amax of the wrong size, and for amax or noise that
    is missing or of no use.
    """
    scales, codes = _scales(x, spec, amax, noise, passes)
    if codes is None:
        codes = passes.encode(x.detach(), scales.encode, spec, _of_elements(spec, noise))
    return Quantized(
        codes=codes, scales=scales.stored, tensor_scale=scales.tensor, shape=(x.shape[0], x.shape[1]), spec=spec
    )


def prepare(
    x: Tensor, spec: OperandSpec, *, amax: Tensor | None = None, noise: Noise | None = None, passes: Passes = TORCH
) -> Prepared:
    """``operand(quantize(x, ...))``, bit for bit, without the codes in between. Raises as ``quantize``."""
    if not _has_factors(spec):
        matrix, factor = operand(quantize(x, spec, amax=amax, noise=noise, passes=passes), passes=passes)
        return Prepared(matrix=matrix, factor=factor)
    scales, codes = _scales(x, spec, amax, noise, passes)
    factors, factor, dtype = _factors(spec, scales.stored, scales.tensor, passes)
    if codes is None:
        matrix = passes.rounded(x.detach(), scales.encode, factors, spec, _of_elements(spec, noise), dtype)
    else:
        matrix = passes.values(_unscaled(x, codes, spec), factors, dtype)
    return Prepared(matrix=matrix, factor=factor)


def _of_elements(spec: OperandSpec, noise: Noise | None) -> Noise | None:
    """The noise of elements: that of an operand may be for its scales alone."""
    return noise if spec.rounding is Rounding.STOCHASTIC else None


def _unscaled(x: Tensor, codes: Tensor, spec: OperandSpec) -> Quantized:
    """Codes of x without their scales, for ``Passes.values``."""
    one = torch.ones(1, 1, dtype=torch.float32, device=codes.device)
    return Quantized(codes=codes, scales=one, tensor_scale=None, shape=(x.shape[0], x.shape[1]), spec=spec)


def _scales(
    x: Tensor, spec: OperandSpec, amax: Tensor | None, noise: Noise | None, passes: Passes
) -> tuple[Scales, Tensor | None]:
    """The scales, the outer ones as ``Quantized.tensor_scale``; and the codes, where the rule decided on them."""
    check(x, spec, amax, noise)
    x = x.detach()
    rule, grid = spec.scale, spec.tile.grid(*x.shape)
    group, tensor = TENSOR, None
    if rule.levels == 0:
        tiles = torch.zeros(grid, dtype=torch.float32, device=x.device)
    elif rule.levels == 1:
        tiles = amax.float().reshape(grid) if amax is not None else _statistic(x, spec, passes)
    else:
        tiles = _statistic(x, spec, passes)
        group = outer_of(rule).of_grid(spec.tile)
        tensor = _outer_level(tiles, group) if amax is None else amax.float()
        tensor = tensor.reshape(() if group == TENSOR else group.grid(*grid))
        tensor = spread(tensor, group, grid)
    target = {} if spec.top == 1.0 else {"top": spec.top}
    scales, codes = rule.scales(tiles, spec.format, tensor_amax=tensor, dtype=x.dtype, **target), None
    if finishes(rule):
        scales, codes = rule.finish(_trial(x, spec, tiles, tensor, scales, noise, passes))
    if group != TENSOR and scales.tensor is not None:
        scales = scales._replace(tensor=scales.tensor[:: max(group.outer, 1), :: max(group.inner, 1)])
    return scales, codes


def scaled_values(
    x: Tensor, spec: OperandSpec, *, amax: Tensor | None = None, noise: Noise | None = None, passes: Passes = TORCH
) -> Tensor:
    """What ``quantize`` rounds: FP32 [outer, inner], x times the scale of its tile. Arguments and errors as there."""
    scales, _ = _scales(x, spec, amax, noise, passes)
    return x.detach().float() if spec.scale.levels == 0 else scaled(x.detach().float(), scales.encode, spec.tile)


def _statistic(x: Tensor, spec: OperandSpec, passes: Passes) -> Tensor:
    if type(spec.statistic) is Amax:
        return passes.amax(x, spec.tile)
    return statistic_of(x, spec.tile, spec.statistic, spec.format)


def _outer_level(tiles: Tensor, group: Tile) -> Tensor:
    """The largest of every group of tiles; 0 of none."""
    if group == TENSOR:
        return _largest(tiles.reshape(1, -1))
    return _largest(tiles) if group == (1, -1) else amax(tiles, group)


def _largest(amaxes: Tensor) -> Tensor:
    return amaxes.amax(1) if amaxes.shape[1] else amaxes.new_zeros(amaxes.shape[0])


def _trial(
    x: Tensor,
    spec: OperandSpec,
    tiles: Tensor,
    tensor: Tensor | None,
    scales: Scales,
    noise: Noise | None,
    passes: Passes,
) -> Trial:
    return Trial(
        matrix=x,
        element=spec.format,
        tile=spec.tile,
        top=spec.top,
        statistic=tiles,
        tensor_statistic=tensor,
        scales=scales,
        noise=noise,
        code=lambda y, encode, noise: passes.encode(y, encode, spec, _of_elements(spec, noise)),
        decode=lambda codes, factors: passes.values(_unscaled(x, codes, spec), factors, torch.float32),
    )


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32, *, passes: Passes = TORCH) -> Tensor:
    """The values [outer, inner] that ``q`` stands for: FP32, then rounded to ``dtype``."""
    rule = q.spec.scale
    scales = _decoded(q.spec, q.scales) if rule.levels else None
    if reads(rule):
        codes = unpack4(q.codes, q.stored_shape[1]) if q.spec.format.bits == 4 else q.codes
        values = rule.read(codes, q.scales, q.spec.format, q.spec.tile)
        values = values.mT if q.transposed else values
    elif q.tensor_scale is None:
        return passes.values(q, scales, dtype)
    else:
        values = passes.values(q, scales, torch.float32)
    tensor = q.tensor_scale
    if tensor is None:
        return values.to(dtype)
    if tensor.dim() == 0:
        return (values * tensor).to(dtype)
    return scaled(values, tensor.mT if q.transposed else tensor, outer_of(rule)).to(dtype)


def decode_scales(q: Quantized) -> Tensor | None:
    """What code values are multiplied by, all levels together: FP32 [rows, columns] of the grid; None for nothing."""
    rule = q.spec.scale
    if rule.levels == 0:
        return None
    scales, tensor = _decoded(q.spec, q.scales), q.tensor_scale
    scales = scales.abs() if reads(rule) else scales  # a sign is a mark of the rule's
    if tensor is None:
        return scales
    return scales * spread(tensor, outer_of(rule).of_grid(q.spec.tile), (scales.shape[0], scales.shape[1]))


def operand(q: Quantized, *, passes: Passes = TORCH) -> tuple[Tensor, Tensor | None]:
    """What goes into an emulated GEMM: a matrix [outer, inner], and a factor (FP32 scalar) for its output, or None.

    ``matrix * factor`` is ``dequantize(q)`` but for what is flushed, and for the rounding of that last product. The
    matrix is BF16 where that holds the values exactly, without BF16 subnormals:

    * one FP32 scale for the tensor: the code values; the factor is the scale. Without a scale there is no factor.
    * two levels: code value * tile scale; the factor is the tensor's scale (of rows or groups: all of it in FP32).
    * powers of two per tile: code value * 2^(k - c), with 2^k the tile's scale and the factor 2^c; c is the largest k
      of the tensor that is not NaN's, but at least -126. Tiles whose smallest positive value would fall below 2^-126
      are flushed to zeros, but for their signs: for E4M3 those with k < c - 117.

    A factor beyond the power of two (``PowerOfTwo`` with a top) joins that of the output. Else it is FP32 (values of
    too many bits, FP32 scales per tile, rules that read codes themselves) and wants an FP32 GEMM.
    """
    if not _has_factors(q.spec):
        return dequantize(q, passes=passes), None
    factors, factor, dtype = _factors(q.spec, q.scales, q.tensor_scale, passes)
    return passes.values(q, factors, dtype), factor


def _has_factors(spec: OperandSpec) -> bool:
    """Whether values are code value * factor of the tile * factor of the matrix."""
    rule = spec.scale
    return outer_of(rule) == TENSOR and not reads(rule)


def _factors(
    spec: OperandSpec, stored: Tensor, tensor_scale: Tensor | None, passes: Passes
) -> tuple[Tensor | None, Tensor | None, torch.dtype]:
    """For an operand: the factors of tiles (None: 1) and of the GEMM's output, and the matrix's dtype."""
    rule, dtype = spec.scale, operand_dtype(spec)
    if rule.levels == 0:
        return None, None, dtype
    if rule.levels == 2:
        return _decoded(spec, stored), tensor_scale, dtype
    if rule.format is None and spec.tile == TENSOR:
        return None, stored.reshape(()), dtype
    if dtype == torch.bfloat16:
        codes = stored if rule.format is E8M0 else E8M0.encode(stored)
        factors, centre = passes.centred(codes, spec.format.tiny_exponent)
        return factors, centre if tensor_scale is None else centre * tensor_scale, dtype
    return _decoded(spec, stored), tensor_scale, dtype


def knows_format(format: object) -> bool:
    """Whether a number format rounds and is coded as its fields say: exactly a leaf of ``precision.formats``.

    A subclass or a look-alike means what its own methods say; nothing is concluded from its fields.
    """
    return type(format) in (ExMy, Integer, PowersOfTwo)


def operand_dtype(spec: OperandSpec) -> torch.dtype:
    """That of the matrix of ``operand``: BF16 where it is known to hold the values exactly, else FP32."""
    element, rule = spec.format, spec.scale
    if not _known_values(element) or not _has_factors(spec):
        return torch.float32
    bits, tiny = element.significant_bits, element.tiny_exponent
    if rule.levels == 2:
        block = rule.format
        if block is None or not _known_values(block):
            return torch.float32
        exact = bits + block.significant_bits <= 8 and tiny + block.tiny_exponent >= -126
        return torch.bfloat16 if exact else torch.float32
    one_scale = rule.levels == 0 or (rule.format is None and spec.tile == TENSOR)
    # With one scale BF16 holds the values of a float as they are, its subnormals included; a table's may lie below.
    exact = tiny >= -126 or (one_scale and type(element) is not Codebook)
    return torch.bfloat16 if exact and (one_scale or rule.power_of_two) and bits <= 8 else torch.float32


def _known_values(format: object) -> bool:
    return type(format) is Codebook or knows_format(format)


def check(x: Tensor, spec: OperandSpec, amax: Tensor | None, noise: Noise | None) -> None:
    """Raises ValueError for what ``quantize`` does not take."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"quantize takes a float matrix, not {x.dtype} of shape {list(x.shape)}")
    if amax is None and isinstance(spec.amax, Delayed):
        raise ValueError(f"{spec} scales by an earlier amax: pass it")
    if amax is not None:
        shared = {0: None, 1: spec.tile, 2: outer_of(spec.scale)}[spec.scale.levels]
        wanted = math.prod(shared.grid(*x.shape)) if shared is not None else 0
        if amax.numel() != wanted:
            raise ValueError(f"{spec} of shape {list(x.shape)} takes {wanted} amaxes, not {amax.numel()}")
    if (noise is not None) != (spec.rounding is Rounding.STOCHASTIC) and not (noise is not None and spec.stochastic):
        raise ValueError(
            f"{spec} rounds {spec.rounding.value}: {'no noise' if noise is not None else 'it needs noise'}"
        )


def _decoded(spec: OperandSpec, stored: Tensor) -> Tensor:
    """The tiles' scales as FP32 [rows, columns]."""
    format = spec.scale.format
    return stored if format is None else format.decode(stored)
