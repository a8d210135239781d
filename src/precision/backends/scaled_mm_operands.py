"""How native products read their operands: codes padded, translated and row-major, scales in the hardware's layout."""

from __future__ import annotations

import enum
import functools

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType, pad

from ..formats import E8M0, NumberFormat, pack4, unpack4
from ..quantize import Quantized
from ..scaling import TENSOR, Tile
from ..spec import OperandSpec
from .triton.device import installed, runs_on
from .triton.quantizer import swizzled

ROWS, TILE_K = 128, 4  # of the swizzled blocks of scales


class Granularity(enum.Enum):
    """What a product's scales extend over."""

    TENSOR = "tensor"
    ROW = "row"
    ROW_AFTERWARDS = "row afterwards"  # the product has no scales: its FP32 output is multiplied by them
    BLOCK = "1x128 or 128x128"
    MX = "1x32"
    NV = "1x16 and tensor"


def granularity(spec: OperandSpec) -> Granularity | None:
    """Tensor or row, where a spec's scales are of one of these alone."""
    if spec.scale.levels == 0 or (spec.scale.levels == 1 and spec.tile == TENSOR):
        return Granularity.TENSOR
    return Granularity.ROW if spec.scale.levels == 1 and spec.tile == Tile(1, -1) else None


class Side:
    """How an operand of one spec and shape is read: codes [rows, k] (or [rows, k / 2] of E2M1), row-major.

    Args:
        kind: over what the product's scales extend.
        spec, shape: of the operand.
        carrier: the format that the hardware takes its codes for.
        rows, k: the shape that the hardware reads.
    """

    def __init__(
        self, kind: Granularity, spec: OperandSpec, carrier: NumberFormat, shape: tuple[int, int], rows: int, k: int
    ) -> None:
        self.kind, self.carrier, self.rows, self.k = kind, carrier, rows, k
        fitting = shape == (rows, k)
        # What lies in memory as the hardware reads it.
        self.codes_dtype = spec.format.dtype if fitting and spec.format.dtype in _NATIVE and min(shape) > 1 else None
        plain = spec.scale.format is None
        self.scales_shape: tuple[int, ...] | None = None
        if plain and kind is Granularity.TENSOR:
            self.scales_shape = (1,)
        elif plain and kind is Granularity.ROW and fitting and granularity(spec) is Granularity.ROW:
            self.scales_shape = (rows, 1)
        self.column_scales = (rows, k // 128) if plain and fitting and spec.tile.outer == 1 else None
        flat, swizzled = SwizzleType.NO_SWIZZLE, SwizzleType.SWIZZLE_32_4_4
        self.recipes, self.swizzles = {
            Granularity.TENSOR: ([ScalingType.TensorWise], [flat]),
            Granularity.ROW_AFTERWARDS: ([ScalingType.TensorWise], [flat]),
            Granularity.ROW: ([ScalingType.RowWise], [flat]),
            Granularity.BLOCK: (
                [ScalingType.BlockWise1x128 if spec.tile.outer == 1 else ScalingType.BlockWise128x128],
                [flat],
            ),
            Granularity.MX: ([ScalingType.BlockWise1x32], [swizzled]),
            Granularity.NV: ([ScalingType.BlockWise1x16, ScalingType.TensorWise], [swizzled, flat]),
        }[kind]

    def codes(self, q: Quantized) -> Tensor:
        if self.codes_dtype is not None and not q.transposed and q.codes.is_contiguous():
            return q.codes.view(self.codes_dtype)
        return _codes(q, self.carrier, self.rows, self.k)

    def scales(self, q: Quantized) -> list[Tensor]:
        scales, shape, rows, k = q.scales, self.scales_shape, self.rows, self.k
        if shape is not None and not q.transposed and scales.is_contiguous():
            return [scales if scales.shape == shape else scales.view(shape)]
        match self.kind:
            case Granularity.TENSOR:
                return [_decode_scales(q).reshape(1)]
            case Granularity.ROW_AFTERWARDS:
                return [_one(scales.device)]
            case Granularity.ROW:
                return [row_scales(q, rows)]
            case Granularity.BLOCK:
                columns = scales.mT if q.transposed else scales
                if self.column_scales == columns.shape and columns.stride() == (1, len(columns)):
                    return [columns]
                return [_block_scales(q, rows, k)]
            case Granularity.MX:
                exponents = scales if q.spec.scale.format == E8M0 else E8M0.encode(scales)
                return [_in_order(_per_vector(q, exponents, rows, k, 32)).view(torch.float8_e8m0fnu)]
            case Granularity.NV:
                assert q.tensor_scale is not None
                vectors = _in_order(_per_vector(q, scales, rows, k, 16)).view(torch.float8_e4m3fn)
                return [vectors, q.tensor_scale.reshape(1)]


def _codes(q: Quantized, carrier: NumberFormat, rows: int, k: int) -> Tensor:
    """The codes as the hardware reads them, row-major [rows, k], padded with code 0: the value 0 in every format."""
    element = q.spec.format
    assert carrier.dtype is not None
    inner, packed = q.shape[1], carrier.bits == 4
    if packed and carrier == element and not q.transposed and inner % 2 == 0:
        return _row_major(_padded(q.codes, rows, k // 2)).view(carrier.dtype)
    codes = unpack4(q.codes, q.stored_shape[1]) if element.bits == 4 else q.codes
    if carrier != element:
        codes = _translation(element, carrier, codes.device)[codes.int()]
    codes = _padded(codes.mT if q.transposed else codes, rows, k)
    return _row_major(pack4(codes) if packed else codes).view(carrier.dtype)


_NATIVE = (torch.float8_e4m3fn, torch.float8_e5m2)


def _padded(x: Tensor, rows: int, columns: int, value: float = 0) -> Tensor:
    """x, filled up to [rows, columns]; itself where nothing is missing, as ``pad`` would copy it."""
    missing = rows - x.shape[0], columns - x.shape[1]
    return x if missing == (0, 0) else pad(x, (0, missing[1], 0, missing[0]), value=value)


def _row_major(x: Tensor) -> Tensor:
    """Contiguous, with the strides of a matrix of rows also where there is but one: they are looked at."""
    x = x.contiguous()
    return x if min(x.shape) > 1 else x.view(-1).view(x.shape)


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones(1, dtype=torch.float32, device=device)


@functools.cache
def _translation(element: NumberFormat, carrier: NumberFormat, device: torch.device) -> Tensor:
    """The carrier's code of every code of ``element``."""
    return carrier.encode(element.decode(torch.arange(2**element.bits, device=device)))


def _decode_scales(q: Quantized) -> Tensor:
    """FP32 decode scales of one level [rows, columns] of the grid; 1 without scales."""
    format = q.spec.scale.format
    scales = q.scales if format is None else format.decode(q.scales)
    return scales.mT if q.transposed else scales


def row_scales(q: Quantized, rows: int) -> Tensor:
    """FP32 [rows, 1]: of every row of the operand, and 1 of padding."""
    return _padded(_decode_scales(q).expand(q.shape[0], 1), rows, 1, value=1.0).contiguous()


def _block_scales(q: Quantized, rows: int, k: int) -> Tensor:
    """FP32, column-major: [rows, k / 128], or [k / 128 rounded up to 4, rows / 128]; 1 for padding."""
    scales = _decode_scales(q)
    columns = k // 128
    if q.spec.tile.outer == 1:
        scales = _padded(scales, rows, columns, value=1.0)
        return scales.mT.contiguous().mT
    squares = -(-rows // 128)
    columns = round_up(columns, 4)
    scales = _padded(scales, squares, columns, value=1.0)
    return scales.contiguous().mT


def _per_vector(q: Quantized, scales: Tensor, rows: int, k: int, size: int) -> Tensor:
    """Scale codes (uint8) of every ``size`` elements of every row, [rows, k / size]; code 0 for padding."""
    (outer, inner), scales = q.shape, scales.mT if q.transposed else scales
    tall, wide = q.spec.tile.extent(outer, inner)
    if tall > 1:
        scales = scales.repeat_interleave(tall, 0)[:outer]
    if wide > size:
        scales = scales.repeat_interleave(wide // size, 1)[:, : -(-inner // size)]
    return _padded(scales, rows, k // size)


def swizzle(scales: Tensor) -> Tensor:
    """Scale codes [rows, columns] in blocks of 128 x 4: the layout ``SWIZZLE_32_4_4``, flat.

    Of a block, the four columns of row r lie at (r % 32) * 16 + (r // 32) * 4; blocks follow each other along a row of
    blocks. Rows and columns are filled up with code 0.
    """
    rows, columns = scales.shape
    tall, wide = round_up(rows, ROWS), round_up(columns, TILE_K)
    scales = pad(scales, (0, wide - columns, 0, tall - rows))
    return scales.view(tall // ROWS, 4, 32, wide // TILE_K, TILE_K).permute(0, 3, 2, 1, 4).reshape(-1)


def _in_order(scales: Tensor) -> Tensor:
    """``swizzle(scales)``; by a kernel where there is one."""
    return swizzled(scales) if runs_on(scales.device) and installed() else swizzle(scales)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
