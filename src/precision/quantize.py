"""Quantization of matrices: amax over tiles, codes and scales, and the way back. Pure functions in plain torch.

This is the definition: other backends give the same bits. For x [outer, inner], contraction last:

1. x is brought to FP32 (exact from BF16 and FP16; FP64 is rounded).
2. amax of every tile: the maximum of |x|, NaN if there is one. Ragged last tiles have fewer elements.
3. the scale rule gives the encode scale of every tile (``precision.scaling``).
4. y = x * encode, one FP32 product per element; values = format.round(y, noise), or format.truncate(y): saturating;
   codes = format.encode.

Back: code value * stored scale, one FP32 product (exact in two-level scales); then * tensor scale, if there is one.

Non-finite values: what amax does with them stands in ``precision.scaling``; elements follow ``precision.formats``: an
infinity saturates, NaN stays NaN where the format has one. In a format without NaN the scale tells of it, except when
the amax comes from elsewhere (delayed): then NaN becomes the largest positive value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from .codebook import Codebook
from .formats import E8M0, ExMy, Integer, PowersOfTwo, pack4, unpack4
from .noise import Noise
from .scaling import TENSOR, Delayed, Error, Scales, Tile, TwoLevel, encode_power
from .spec import OperandSpec, Rounding


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Quantized:
    """A quantized matrix.

    Args:
        codes: uint8 [outer, inner]; [outer, ceil(inner / 2)] for formats of 4 bits (even element in the low nibble);
            for formats over 8 bits the values themselves, in the format's dtype (FP32 if it has none).
        scales: [rows, columns] of the grid of tiles: FP32 decode scales, or codes (uint8) of the rule's scale format.
        tensor_scale: FP32 scalar of a two-level rule, or [outer, 1] of one that scales rows; else None.
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
        y = x.float() if spec.scale.levels == 0 else _scaled(x.float(), scales, spec.tile)
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
            wide = _scaled(wide, factors, q.spec.tile)
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
    return _tiled(x if x.dtype != torch.float64 else x.float(), tile).abs().amax((1, 3)).float()


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
    scales = _scales(x, spec, amax, noise, passes)
    return Quantized(
        codes=passes.encode(x.detach(), scales.encode, spec, noise),
        scales=scales.stored,
        tensor_scale=scales.tensor,
        shape=(x.shape[0], x.shape[1]),
        spec=spec,
    )


def prepare(
    x: Tensor, spec: OperandSpec, *, amax: Tensor | None = None, noise: Noise | None = None, passes: Passes = TORCH
) -> Prepared:
    """``operand(quantize(x, ...))``, bit for bit, without the codes in between. Raises as ``quantize``."""
    if isinstance(spec.scale, TwoLevel) and spec.scale.rows:
        matrix, factor = operand(quantize(x, spec, amax=amax, noise=noise, passes=passes), passes=passes)
        return Prepared(matrix=matrix, factor=factor)
    scales = _scales(x, spec, amax, noise, passes)
    factors, factor, dtype = _factors(spec, scales.stored, scales.tensor, passes)
    return Prepared(matrix=passes.rounded(x.detach(), scales.encode, factors, spec, noise, dtype), factor=factor)


def _scales(x: Tensor, spec: OperandSpec, amax: Tensor | None, noise: Noise | None, passes: Passes) -> Scales:
    check(x, spec, amax, noise)
    x = x.detach()
    rule, grid = spec.scale, spec.tile.grid(*x.shape)
    tensor_amax = None
    if rule.levels == 0:
        tile_amax = torch.zeros(grid, dtype=torch.float32, device=x.device)
    elif rule.levels == 1:
        tile_amax = amax.float().reshape(grid) if amax is not None else passes.amax(x, spec.tile)
    else:
        tile_amax = passes.amax(x, spec.tile)
        by_row = isinstance(rule, TwoLevel) and rule.rows
        if amax is not None:
            tensor_amax = amax.float()
        else:
            tensor_amax = _largest(tile_amax, 1) if by_row else _largest(tile_amax.reshape(1, -1), 1)
        tensor_amax = tensor_amax.reshape((grid[0], 1) if by_row else ())
        if isinstance(rule, TwoLevel) and rule.four_over_six is not None:
            return _better_scales(x, spec, tile_amax, tensor_amax, noise, passes)
    return rule.scales(tile_amax, spec.format, tensor_amax=tensor_amax, dtype=x.dtype)


def _largest(amaxes: Tensor, dim: int) -> Tensor:
    return amaxes.amax(dim) if amaxes.shape[dim] else amaxes.new_zeros(amaxes.shape[0])


def _better_scales(
    x: Tensor, spec: OperandSpec, tile_amax: Tensor, tensor_amax: Tensor, noise: Noise | None, passes: Passes
) -> Scales:
    """Four over six: of both candidates the scales with which a tile comes out closer to x.

    Per element, in FP32: back = ((code value * d) * A) / (max * top); e = |back - x|, or its square. Per tile: the sum
    of e along each row, from its first element on; then of the upper half of the rows and the lower half, and again.
    A tile with a NaN in its errors takes the first candidate.
    """
    rule = spec.scale
    assert isinstance(rule, TwoLevel)
    six, four = rule.candidates(tile_amax, spec.format, tensor_amax)
    errors = []
    for scales in (six, four):
        codes = passes.encode(x, scales.encode, spec, noise)
        q = Quantized(codes=codes, scales=scales.stored, tensor_scale=None, shape=(x.shape[0], x.shape[1]), spec=spec)
        back = passes.values(q, _decoded(q.spec, q.scales), torch.float32) * tensor_amax
        difference = back / torch.full_like(back, rule.top(spec.format)) - x.float()
        e = _tiled(difference.abs() if rule.four_over_six is Error.MAE else difference * difference, spec.tile)
        total = e[..., 0]
        for column in range(1, e.shape[-1]):
            total = total + e[..., column]
        while total.shape[1] > 1:
            half = total.shape[1] // 2
            total = total[:, :half] + total[:, half:]
        errors.append(total[:, 0])
    better = errors[1] < errors[0]
    encode, stored = (torch.where(better, b, a) for a, b in zip(six[:2], four[:2], strict=True))
    return Scales(encode, stored, six.tensor)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32, *, passes: Passes = TORCH) -> Tensor:
    """The values [outer, inner] that ``q`` stands for: FP32, then rounded to ``dtype``."""
    scales = _decoded(q.spec, q.scales) if q.spec.scale.levels else None
    if q.tensor_scale is None:
        return passes.values(q, scales, dtype)
    return (passes.values(q, scales, torch.float32) * q.tensor_scale).to(dtype)


def operand(q: Quantized, *, passes: Passes = TORCH) -> tuple[Tensor, Tensor | None]:
    """What goes into an emulated GEMM: a matrix [outer, inner], and a factor (FP32 scalar) for its output, or None.

    ``matrix * factor`` is ``dequantize(q)`` but for what is flushed, and for the rounding of that last product. The
    matrix is BF16 where that holds the values exactly, without BF16 subnormals:

    * one FP32 scale for the tensor: the code values; the factor is the scale. Without a scale there is no factor.
    * two levels: code value * tile scale; the factor is the tensor's scale (of rows: all of it in FP32).
    * powers of two per tile: code value * 2^(k - c), with 2^k the tile's scale and the factor 2^c; c is the largest k
      of the tensor that is not NaN's, but at least -126. Tiles whose smallest positive value would fall below 2^-126
      are flushed to zeros, but for their signs: for E4M3 those with k < c - 117.

    Else it is FP32 (values of too many bits, FP32 scales per tile) and wants an FP32 GEMM.
    """
    if isinstance(q.spec.scale, TwoLevel) and q.spec.scale.rows:
        return dequantize(q, passes=passes), None
    factors, factor, dtype = _factors(q.spec, q.scales, q.tensor_scale, passes)
    return passes.values(q, factors, dtype), factor


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
        return factors, centre, dtype
    return _decoded(spec, stored), None, dtype


def knows_format(format: object) -> bool:
    """Whether a number format rounds and is coded as its fields say: exactly a leaf of ``precision.formats``.

    A subclass or a look-alike means what its own methods say; nothing is concluded from its fields.
    """
    return type(format) in (ExMy, Integer, PowersOfTwo)


def operand_dtype(spec: OperandSpec) -> torch.dtype:
    """That of the matrix of ``operand``: BF16 where it is known to hold the values exactly, else FP32."""
    element, rule = spec.format, spec.scale
    if not _known_values(element):
        return torch.float32
    bits, tiny = element.significant_bits, element.tiny_exponent
    if rule.levels == 2:
        block, rows = rule.format, isinstance(rule, TwoLevel) and rule.rows
        if not _known_values(block) or block is None or rows:
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
        rows, columns = spec.tile.grid(*x.shape)
        by_row = isinstance(spec.scale, TwoLevel) and spec.scale.rows
        wanted = {0: 0, 1: rows * columns, 2: rows if by_row else 1}[spec.scale.levels]
        if amax.numel() != wanted:
            raise ValueError(f"{spec} of shape {list(x.shape)} takes {wanted} amaxes, not {amax.numel()}")
    if (noise is not None) != (spec.rounding is Rounding.STOCHASTIC):
        raise ValueError(
            f"{spec} rounds {spec.rounding.value}: {'no noise' if noise is not None else 'it needs noise'}"
        )


def _tiled(x: Tensor, tile: Tile) -> Tensor:
    """x [outer, inner] -> [rows, tile outer, columns, tile inner], ragged tiles filled with zeros."""
    outer, inner = x.shape
    rows, columns = tile.grid(outer, inner)
    tall, wide = tile.extent(outer, inner)
    if (rows * tall, columns * wide) != (outer, inner):
        x = pad(x, (0, columns * wide - inner, 0, rows * tall - outer))
    return x.reshape(rows, tall, columns, wide)


def _scaled(x: Tensor, scales: Tensor, tile: Tile) -> Tensor:
    """x [outer, inner] times the scale of its tile, from scales [rows, columns]."""
    outer, inner = x.shape
    rows, columns = scales.shape
    if rows * columns == 1:
        return x * scales.reshape(())
    tall, wide = tile.extent(outer, inner)
    if (rows * tall, columns * wide) == (outer, inner):
        return (x.reshape(rows, tall, columns, wide) * scales[:, None, :, None]).reshape(outer, inner)
    # Ragged: by index, since Inductor (torch 2.13, CPU) drops the ragged tile of what is scaled in tiles and then
    # sliced: it splits the loop at the tile's size as if that divided it. It would see through a floor division, too.
    row = torch.arange(outer, device=x.device).div(tall, rounding_mode="trunc")
    column = torch.arange(inner, device=x.device).div(wide, rounding_mode="trunc")
    return x * scales[row[:, None], column]


def _decoded(spec: OperandSpec, stored: Tensor) -> Tensor:
    """The tiles' scales as FP32 [rows, columns]."""
    format = spec.scale.format
    return stored if format is None else format.decode(stored)
