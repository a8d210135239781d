# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernels: the codes and scales of ``precision.quantize``, bit for bit, in few passes over memory.

Every rounding is done with integer operations and single FP32 operations, as ``precision.formats`` defines it, so that
Triton's interpreter (whose narrow casts are wrong) gives the same bits as a GPU. On a GPU, ``HARDWARE`` lets the
conversion instructions do what they provably do alike: to round a finite value of at most the format's maximum to the
nearest, ties to even, has one answer; NaN and saturation are dealt with before. Compile with
``enable_fp_fusion=False``: a product and a sum that become one FMA round once instead of twice.

A block [BLOCK_R, BLOCK_C] of a matrix [rows, cols] (any strides, contraction last) holds whole tiles [TALL, WIDE],
powers of two. A tile of whole extent (WHOLE_R, WHOLE_C) is as large as the block here; its index in its grid is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from ... import swiglu
from ...formats import NumberFormat

NEAREST, STOCHASTIC, TRUNCATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
UNIT, FP32, FP32_DECODE, POWER, TWO_LEVEL = (tl.constexpr(kind) for kind in range(5))
FLOOR, CEIL, EVEN, RCEIL = (tl.constexpr(mode) for mode in range(4))
SCALED_VALUES = tl.constexpr(2)
E4M3, E5M2, E2M1 = (tl.constexpr(kind) for kind in (1, 2, 3))
INF_BITS = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
LOG2_E, C1, C2 = (tl.constexpr(constant) for constant in (swiglu.LOG2_E, swiglu.C1, swiglu.C2))
P0, P1, P2, P3, P4, P5 = (tl.constexpr(constant) for constant in swiglu.POLYNOMIAL)
MAGIC, MAGIC_BITS = tl.constexpr(swiglu.MAGIC), tl.constexpr(swiglu.MAGIC_BITS)
TOP, BOTTOM = tl.constexpr(swiglu.TOP), tl.constexpr(swiglu.BOTTOM)


@dataclass(frozen=True, slots=True)
class Grid:
    """A number format as constants of a kernel."""

    bits: int
    m: int
    low: int  # exponent field of the smallest normal value
    high: int
    bias_shift: int
    max: float
    max_code: int
    nan_code: int
    has_nan: bool
    inf_code: int
    integer: bool
    least_normal: float
    to_small: float
    from_small: float
    hardware: int  # which conversion instruction there is: 1 E4M3, 2 E5M2, 3 E2M1, else 0


def grid_of(format: NumberFormat) -> Grid:
    known = {"e4m3": 1, "e5m2": 2, "e2m1": 3}
    return Grid(
        bits=format.bits,
        m=format.mantissa_bits,
        low=format.min_exponent + 127,
        high=max(format.min_exponent, format.max_exponent) + 127,
        bias_shift=(126 + format.min_exponent) << format.mantissa_bits,
        max=format.max,
        max_code=format.max_code,
        nan_code=format.max_code if format.nan is None else format.nan,
        has_nan=format.nan is not None,
        inf_code=format.max_code + 1 if format.inf else 1 << 30,
        integer=format.integer,
        least_normal=2.0**format.min_exponent,
        to_small=2.0**-format.tiny_exponent,
        from_small=2.0**format.tiny_exponent,
        hardware=known.get(format.name, 0),
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """A scale rule as constants of a kernel; every real number is one of FP32."""

    kind: int
    mode: int = 0  # of powers of two
    top: float = 1.0  # max, times 2^-margin or times the largest block scale
    floor: float = 0.0  # of amax
    limit: float = 1.0  # what an infinite encode scale becomes
    pow2: bool = False
    inverse_max: float = 1.0  # 1 / max, rounded once
    max_exponent: int = 0
    half_bit: int = 0
    element_has_nan: bool = True
    block: Grid | None = None


def _inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of kernels; plain Python to the interpreter, which sets itself up anew at every call of a jit function."""
    return function if triton.knobs.runtime.interpret else triton.jit(function)


@_inlined
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@_inlined
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@_inlined
def _fmix32(h):
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@_inlined
def _words(key, step):
    """The two words of a noise's key: those at ``key``, or with a step (int64), what it makes of them."""
    key0 = tl.load(key).to(tl.uint32, bitcast=True)
    key1 = tl.load(key + 1).to(tl.uint32, bitcast=True)
    if step is not None:
        number = tl.load(step)
        low, high = (number & 0xFFFFFFFF).to(tl.uint32), (number >> 32).to(tl.uint32)
        key0, key1 = _fmix32(_fmix32(key0 ^ low) + high), _fmix32(_fmix32(key1 ^ low) + high)
    return key0, key1


@_inlined
def _uniform(row, col, key, step, first, rows_of_a_sample):
    """precision.noise at places row x col (int32, broadcast against each other), of ``Noise.of``'s parts.

    ``first`` int64: rows are counted from first * rows_of_a_sample; None: from 0.
    """
    key0, key1 = _words(key, step)
    place = row.to(tl.int64)
    if first is not None:
        place = place + tl.load(first) * rows_of_a_sample
    row_hash = _fmix32(_fmix32((place & 0xFFFFFFFF).to(tl.uint32) ^ key0) + (place >> 32).to(tl.uint32))
    element = _fmix32((row_hash + col.to(tl.uint32) * 0x9E3779B9) ^ key1)
    return (element >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


@_inlined
def _codes(y, uniform, F: tl.constexpr, ROUNDING: tl.constexpr, HARDWARE: tl.constexpr):
    """The codes (int32) of FP32 values; ``uniform`` is read if ROUNDING is STOCHASTIC."""
    bits = _bits(y) & MAGNITUDE
    nan = bits > INF_BITS
    magnitude = _float(bits)
    a = tl.where(magnitude < F.max, magnitude, F.max)  # NaN gives max
    sign = (_bits(y) >> 31) & 1
    if HARDWARE and ROUNDING == NEAREST and F.hardware == E4M3:
        code = a.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    elif HARDWARE and ROUNDING == NEAREST and F.hardware == E5M2:
        code = a.to(tl.float8e5).to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        e = tl.minimum(tl.maximum(_bits(a) >> 23, F.low), F.high)
        if ROUNDING == NEAREST:
            c = _float((e + (23 - F.m)) << 23)
            r = (a + c) - c
        else:
            scaled = a * _float((254 + F.m - e) << 23)
            whole = scaled.to(tl.int32).to(tl.float32)  # below 2^(m + 1) + 1: its floor
            if ROUNDING == STOCHASTIC:
                whole = tl.where(uniform < scaled - whole, whole + 1.0, whole)
            r = whole * _float((e - F.m) << 23)
        if F.integer:
            code = r.to(tl.int32)
        else:
            normal = (_bits(r) >> (23 - F.m)) - F.bias_shift
            small = tl.minimum(r * F.to_small, 2.0**F.m).to(tl.int32)
            code = tl.where(r < F.least_normal, small, normal)
    negative = (-code & ((1 << F.bits) - 1)) if F.integer else code | (1 << (F.bits - 1))
    return tl.where(nan, F.nan_code, tl.where(sign == 1, negative, code))


@_inlined
def _value(code, F: tl.constexpr):
    """The FP32 values of codes (int32)."""
    if F.integer:
        half = 1 << (F.bits - 1)
        value = ((code ^ half) - half).to(tl.float32)
    else:
        magnitude = code & ((1 << (F.bits - 1)) - 1)
        normal = _float((magnitude + F.bias_shift) << (23 - F.m))
        value = tl.where(magnitude < (1 << F.m), magnitude.to(tl.float32) * F.from_small, normal)
        bits = _bits(value)
        if F.has_nan:
            bits = tl.where(magnitude > F.max_code, 0x7FC00000, bits)
            bits = tl.where(magnitude == F.inf_code, INF_BITS, bits)
        value = _float(bits | ((code >> (F.bits - 1)) << 31))
    return value


@_inlined
def _power(code):
    """2^(127 - code) for E8M0 codes (int32)."""
    field = 254 - code
    return _float(tl.where(field > 0, field << 23, tl.where(field < 0, 0x7FC00000, 1 << 22)))


@_inlined
def _tensor_level(amax, R: tl.constexpr):
    """Encode and decode scale of the tensor in a two-level rule, from its amax (FP32 scalar)."""
    limit = R.limit
    s = tl.math.div_rn(tl.full([1], R.top, tl.float32), amax)
    s = tl.where(s > limit, limit, s)  # NaN stays
    s = tl.where((amax == 0.0) | (s == 0.0), 1.0, s)
    exact = (amax > 0.0) & (amax < float("inf")) & (s < limit)
    quotient = tl.math.div_rn(amax, tl.full([1], R.top, tl.float32))
    inverse = tl.math.div_rn(tl.full([1], 1.0, tl.float32), s)
    return s, tl.where(exact | (s != s), quotient, inverse)


@_inlined
def _scales(amax, s, R: tl.constexpr, HARDWARE: tl.constexpr):
    """Encode scales (FP32) and what is stored (FP32, or codes as int32) from the amaxes of tiles.

    ``s`` is the encode scale of the tensor, read by a two-level rule.
    """
    one = tl.full(amax.shape, 1.0, tl.float32)
    nan = amax != amax
    finite = amax < float("inf")
    if R.kind == UNIT:
        encode = one
        stored = one
    elif R.kind == FP32:
        a = tl.where(amax < R.floor, R.floor, amax)
        e = tl.math.div_rn(one * R.top, a)
        e = tl.where(e == float("inf"), R.limit, e)
        e = tl.where(e < 2.0**-126, 2.0**-126, e)
        e = tl.where((a > 0.0) & (a < float("inf")), e, 1.0)
        if R.pow2:
            e = _float(_bits(e) & INF_BITS)
        encode = e
        stored = tl.math.div_rn(one, e)
        if not R.element_has_nan:
            stored = tl.where(nan, float("nan"), stored)
    elif R.kind == FP32_DECODE:
        a = tl.where(amax < R.floor, R.floor, amax)
        d = tl.math.div_rn(a, one * R.top)
        if R.pow2:
            bits = _bits(d)
            exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
            exponent = tl.minimum(tl.maximum(exponent, 1), 254)
            d = tl.where(finite, _float(exponent << 23), d)
        encode = tl.math.div_rn(one, d)
        stored = tl.where(amax == float("inf"), float("nan"), d)
    elif R.kind == POWER:
        if R.mode == RCEIL:
            bits = _bits(amax * R.inverse_max)
            exponent = bits >> 23
            up = ((bits & 0x7FFFFF) > tl.where(exponent == 0, 0x400000, 0)) & (exponent < 254)
            code = tl.minimum(exponent + up.to(tl.int32), 254)
        else:
            bits = tl.where(nan, 0, _bits(amax))
            if R.mode == EVEN:
                bits = bits + R.half_bit
            exponent = bits >> 23
            if R.mode == CEIL:
                exponent = exponent + ((bits & 0x7FFFFF) != 0).to(tl.int32)
            code = tl.minimum(tl.maximum(exponent - R.max_exponent, 0), 255)
        stored = tl.where(nan, 255, code)
        encode = _power(stored)
    else:
        c = s * R.inverse_max
        scaled = amax * c
        block: tl.constexpr = R.block
        stored = _codes(scaled, scaled, block, 0, HARDWARE)
        inverse = tl.math.div_rn(tl.full([1], 1.0, tl.float32), s)
        encode = tl.math.div_rn(one, _value(stored, block) * inverse)
        encode = tl.where(encode > R.limit, R.limit, encode)
    return encode, stored


@_inlined
def _widened(x):
    """FP32 from any dtype, exactly: from BF16 by its bits, since the interpreter loses subnormals."""
    return _float(x.to(tl.int16, bitcast=True).to(tl.int32) << 16) if x.dtype == tl.bfloat16 else x.to(tl.float32)


@_inlined
def _rounded(y, x, HARDWARE: tl.constexpr):
    """FP32 values rounded to the dtype of ``x`` and back: what a transform leaves in a tensor of that dtype."""
    if x.dtype == tl.bfloat16:
        if HARDWARE:
            y = y.to(tl.bfloat16).to(tl.float32)
        else:
            bits = _bits(y)
            up = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            y = _float(tl.where((bits & MAGNITUDE) > INF_BITS, 0x7FC00000, up))
    elif x.dtype == tl.float16:
        y = y.to(tl.float16).to(tl.float32)
    return y


@_inlined
def _exp(x):
    """precision.swiglu.exp."""
    x = tl.where(x > TOP, TOP, x)
    x = tl.where(x < BOTTOM, BOTTOM, x)
    shifted = x * LOG2_E + MAGIC
    n = shifted - MAGIC
    r = (x - n * C1) - n * C2
    p = ((((P0 * r + P1) * r + P2) * r + P3) * r + P4) * r + P5
    p = (p * (r * r) + r) + 1.0
    whole = _bits(shifted) - MAGIC_BITS
    low = whole >> 1
    return (p * _float((low + 127) << 23)) * _float((whole - low + 127) << 23)


@_inlined
def _divided(y, like, d, r, c, rows, cols, ALONG: tl.constexpr, HARDWARE: tl.constexpr):
    """y / d, rounded to the dtype of ``like``: d FP32 by row (ALONG 0) or column (1); -1: y as it is."""
    if ALONG == 0:
        by = tl.load(d + r, mask=r < rows, other=1.0)
        y = _rounded(tl.math.div_rn(y, by + tl.zeros(y.shape, tl.float32)), like, HARDWARE)
    elif ALONG == 1:
        by = tl.load(d + c, mask=c < cols, other=1.0)
        y = _rounded(tl.math.div_rn(y, by + tl.zeros(y.shape, tl.float32)), like, HARDWARE)
    return y


@_inlined
def _hadamard(wide, x, col, cols, signs, SIZE: tl.constexpr, HARDWARE: tl.constexpr):
    """precision.transforms.Hadamard along the columns of a block [R, C] in FP32, rounded to the dtype of x; a ragged
    last group stays as it is.

    A stage pairs elements 1, 2, 4 ... apart. An element learns its partner's bits from the sum of both, as integers:
    the compiler reduces over a dimension of two within a thread for nothing, between threads of a warp by shuffles,
    where splitting and joining the pairs would move the block through shared memory at every stage.
    """
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    y = wide * tl.load(signs + tl.arange(0, C)[None, :] % SIZE)
    for stage in tl.static_range(7):
        if 2**stage < SIZE:
            bits = _bits(y)
            pairs = tl.reshape(bits, [R, C // 2 ** (stage + 1), 2, 2**stage])
            sums = tl.broadcast_to(tl.sum(pairs, 2, keep_dims=True), [R, C // 2 ** (stage + 1), 2, 2**stage])
            partner = _float(tl.reshape(sums, [R, C]) - bits)
            y = _float(bits ^ ((tl.arange(0, C)[None, :] >> stage) << 31)) + partner
    y = _rounded(y * (1.0 / SIZE**0.5), x, HARDWARE)
    return tl.where(col < cols // SIZE * SIZE, y, wide)


@_inlined
def _places(block_r, block_c, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows [BLOCK_R, 1] and columns [1, BLOCK_C] of a block."""
    return (
        block_r * BLOCK_R + tl.arange(0, BLOCK_R)[:, None],
        block_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :],
    )


@_inlined
def _at(pointer, block_r, block_c, stride_r, stride_c, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to a block of a matrix: within it by 32 bits, which are half the registers of 64."""
    first = (block_r.to(tl.int64) * BLOCK_R) * stride_r + (block_c.to(tl.int64) * BLOCK_C) * stride_c
    return (pointer + first) + (tl.arange(0, BLOCK_R)[:, None] * stride_r + tl.arange(0, BLOCK_C)[None, :] * stride_c)


@_inlined
def _block(
    x, up, d, signs, block_r, block_c, rows, cols, stride_r, stride_c,
    ALONG: tl.constexpr, HADAMARD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """A block of the matrix in FP32, transformed; zeros outside. With ``up``, that of precision.swiglu.Hidden."""
    r, c = _places(block_r, block_c, BLOCK_R, BLOCK_C)
    mask = (r < rows) & (c < cols)
    loaded = tl.load(_at(x, block_r, block_c, stride_r, stride_c, BLOCK_R, BLOCK_C), mask=mask, other=0.0)
    y = _widened(loaded)
    if up is not None:
        beside = tl.load(_at(up, block_r, block_c, stride_r, stride_c, BLOCK_R, BLOCK_C), mask=mask, other=0.0)
        silu = tl.math.div_rn(y, 1.0 + _exp(-y))
        y = _rounded(silu * _widened(beside), loaded, HARDWARE)
        y = _divided(y, loaded, d, r, c, rows, cols, ALONG, HARDWARE)
    return _hadamard(y, loaded, c, cols, signs, HADAMARD, HARDWARE) if HADAMARD else y


@_inlined
def _tile_amax(y, TALL: tl.constexpr, WIDE: tl.constexpr):
    """Bits of the amax of every tile of a block: compared as integers, a NaN is larger than everything."""
    R: tl.constexpr = y.shape[0]
    C: tl.constexpr = y.shape[1]
    bits = tl.max(tl.reshape(_bits(y) & MAGNITUDE, [R, C // WIDE, WIDE]), 2)
    if TALL > 1:
        bits = tl.max(tl.reshape(bits, [R // TALL, TALL, C // WIDE]), 1)
    return bits


@_inlined
def _each(tiles, R: tl.constexpr, C: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr):
    """What belongs to tiles [R / TALL, C / WIDE], for every element of the block [R, C]."""
    tall = tl.broadcast_to(tiles[:, None, :, None], [R // TALL, TALL, C // WIDE, WIDE])
    return tl.reshape(tall, [R, C])


@_inlined
def _tile_places(first, BLOCK: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """Indices in the grid of tiles along one dimension of a block that starts at tile ``first``."""
    place = tl.arange(0, BLOCK // TILE)
    return place * 0 if WHOLE else first + place


@_inlined
def _top(amaxes, PARTS: tl.constexpr):
    """The largest of PARTS amaxes, FP32 [1]: compared as integers, a NaN is larger than everything."""
    return _float(tl.max(_bits(tl.load(amaxes + tl.arange(0, PARTS))), 0, keep_dims=True))


@_inlined
def _largest(bits):
    """Of a block of bits, as a scalar."""
    return tl.max(tl.max(bits, 1), 0)


@triton.jit
def amax_kernel(
    x, up, d, out, out_t, signs, rows, cols, stride_r, stride_c, grid_rows, grid_cols,
    ALONG: tl.constexpr, PARTS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, WHOLE_R: tl.constexpr,
    WHOLE_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HADAMARD: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """Amaxes of tiles of what ``quantize_kernel`` reads: out, their bits, int32 [grid_rows, grid_cols].

    Where a tile has many blocks, over what stands there (zeros); with PARTS, the amax of the whole matrix in as many
    parts as there are programs: FP32. ``out_t`` int32 [cols], or None: those of columns beside, over zeros.
    """
    blocks_c = tl.cdiv(cols, BLOCK_C)
    most = tl.program_id(0) * 0
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_R) * blocks_c, tl.num_programs(0), disable_licm=True):
        block_r, block_c = block // blocks_c, block % blocks_c
        y = _block(
            x, up, d, signs, block_r, block_c, rows, cols, stride_r, stride_c,
            ALONG, HADAMARD, BLOCK_R, BLOCK_C, HARDWARE,
        )  # fmt: skip
        if WHOLE_R and WHOLE_C:
            most = tl.maximum(most, _largest(_bits(y) & MAGNITUDE))
        else:
            top = _tile_amax(y, TALL, WIDE)
            i = _tile_places(block_r * (BLOCK_R // TALL), BLOCK_R, TALL, WHOLE_R)[:, None]
            j = _tile_places(block_c * (BLOCK_C // WIDE), BLOCK_C, WIDE, WHOLE_C)[None, :]
            mask = (i < grid_rows) & (j < grid_cols)
            if WHOLE_R or WHOLE_C:
                tl.atomic_max(out + i * grid_cols + j, top, mask=mask, sem="relaxed")
            else:
                tl.store(out + i * grid_cols + j, top, mask=mask)
            if out_t is not None:
                _, c = _places(block_r, block_c, BLOCK_R, BLOCK_C)
                tl.atomic_max(out_t + c, _tile_amax(y, BLOCK_R, 1), mask=c < cols, sem="relaxed")
    if WHOLE_R and WHOLE_C:
        if PARTS:
            tl.store(out + tl.program_id(0), _float(most))
        else:
            tl.atomic_max(out, most, sem="relaxed")


@_inlined
def _decoded(stored, R: tl.constexpr):
    """The FP32 decode scales of what ``_scales`` stores."""
    if R.kind == POWER:
        decode = tl.where(stored == 255, float("nan"), _power(254 - stored))
    elif R.kind == TWO_LEVEL:
        block: tl.constexpr = R.block
        decode = _value(stored, block)
    else:
        decode = stored
    return decode


@_inlined
def _tensor_scales(
    amaxes, scales, tensor_scale, R: tl.constexpr, GIVEN: tl.constexpr, PARTS: tl.constexpr,
    WHOLE_R: tl.constexpr, WHOLE_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """What is the same for every block: encode and decode scale (FP32 [1]) of the tensor, or of a rule's tensor level.

    The first program writes what is stored of it. ``amaxes``: PARTS, whose largest is the tensor's.
    """
    encode = tl.full([1], 1.0, tl.float32)
    decode = encode
    if R.kind == TWO_LEVEL:
        encode, decode = _tensor_level(_top(amaxes, PARTS), R)
        if tl.program_id(0) == 0:
            tl.store(tensor_scale + tl.arange(0, 1), decode)
    elif WHOLE_R and WHOLE_C and (GIVEN or R.kind == UNIT):
        if R.kind != UNIT:
            encode = _top(amaxes, PARTS)
        encode, stored = _scales(encode, encode, R, HARDWARE)
        if scales is not None:
            tl.store(
                scales + tl.arange(0, 1), stored.to(scales.dtype.element_ty), mask=tl.arange(0, 1) == tl.program_id(0)
            )
        decode = _decoded(stored, R)
    return encode, decode


@_inlined
def _bf16_bits(value):
    """FP32 as the bits of BF16 (int16), to nearest even; stored as such, since the interpreter narrows otherwise."""
    bits = _bits(value)
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & MAGNITUDE) > INF_BITS, 0x7FC0, up).to(tl.int16)


@_inlined
def _emit(
    y, whole, whole_decode, codes, scales, tile_amax, key, step, first, block_r, block_c, rows, cols, bytes_c,
    grid_rows, grid_cols, rows_of_a_sample,
    F: tl.constexpr, R: tl.constexpr, ROUNDING: tl.constexpr, TRANSPOSED_NOISE: tl.constexpr, GIVEN: tl.constexpr,
    VALUES: tl.constexpr, BY_COLUMN: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, WHOLE_R: tl.constexpr,
    WHOLE_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
    E2M1_HARDWARE: tl.constexpr,
):  # fmt: skip
    """Write the codes and scales of a block y in FP32, or its VALUES; arguments as in ``quantize_kernel``.

    ``whole`` and ``whole_decode``: of ``_tensor_scales``.
    """
    ONE: tl.constexpr = R.kind == UNIT or (WHOLE_R and WHOLE_C and GIVEN)  # scale, and it is known
    if ONE:
        if R.kind != UNIT:
            y = y * whole[:, None]
    else:
        i = _tile_places(block_r * (BLOCK_R // TALL), BLOCK_R, TALL, WHOLE_R)[:, None]
        j = _tile_places(block_c * (BLOCK_C // WIDE), BLOCK_C, WIDE, WHOLE_C)[None, :]
        inside = (i < grid_rows) & (j < grid_cols)
        if GIVEN:
            amax = _float(_bits(tl.load(tile_amax + i * grid_cols + j, mask=inside, other=0)))
        else:
            amax = _float(_tile_amax(y, TALL, WIDE))
        encode, stored = _scales(amax, whole[:, None], R, HARDWARE)
        if scales is not None:
            mask = inside
            if WHOLE_R:
                mask = mask & (i + block_r < 1)
            if WHOLE_C:
                mask = mask & (j + block_c < 1)
            place = j * grid_rows + i if BY_COLUMN else i * grid_cols + j
            tl.store(scales + place, stored.to(scales.dtype.element_ty), mask=mask)
        y = y * _each(encode, BLOCK_R, BLOCK_C, TALL, WIDE)
    r, c = _places(block_r, block_c, BLOCK_R, BLOCK_C)
    mask, uniform = (r < rows) & (c < cols), y
    if ROUNDING == STOCHASTIC:
        if TRANSPOSED_NOISE:
            uniform = _uniform(c, r, key, step, first, rows_of_a_sample)
        else:
            uniform = _uniform(r, c, key, step, first, rows_of_a_sample)
    if VALUES:
        value = _value(_codes(y, uniform, F, ROUNDING, HARDWARE) & ((1 << F.bits) - 1), F)
        if VALUES == SCALED_VALUES:
            if ONE:
                value = value * whole_decode[:, None]
            else:
                value = value * _each(_decoded(stored, R), BLOCK_R, BLOCK_C, TALL, WIDE)
        bits = codes.to(tl.pointer_type(tl.int16))
        tl.store(_at(bits, block_r, block_c, bytes_c, 1, BLOCK_R, BLOCK_C), _bf16_bits(value), mask=mask)
    elif F.bits == 4:
        half = block_c * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)[None, :]
        if E2M1_HARDWARE and ROUNDING == NEAREST and F.hardware == E2M1:
            low, high = tl.split(tl.reshape(tl.where(c < cols, y, 0.0), [BLOCK_R, BLOCK_C // 2, 2]))
            packed = _packed_e2m1(low, high)
        else:
            code = tl.where(c < cols, _codes(y, uniform, F, ROUNDING, HARDWARE), 0)
            low, high = tl.split(tl.reshape(code, [BLOCK_R, BLOCK_C // 2, 2]))
            packed = low | (high << 4)
        place = _at(codes, block_r, block_c, bytes_c, 1, BLOCK_R, BLOCK_C // 2)
        tl.store(place, packed.to(tl.uint8), mask=(r < rows) & (half < bytes_c))
    else:
        code = _codes(y, uniform, F, ROUNDING, HARDWARE)
        tl.store(_at(codes, block_r, block_c, bytes_c, 1, BLOCK_R, BLOCK_C), code.to(tl.uint8), mask=mask)


_SCALARS = ["tensor_amax", "note", "key", "step", "first"]  # read one by one, at any address: held amaxes are columns


@triton.jit(do_not_specialize_on_alignment=_SCALARS)
def quantize_kernel(
    x, up, d, codes, scales, tile_amax, tensor_amax, tensor_scale, note, signs, key, step, first,
    rows, cols, stride_r, stride_c, bytes_c, grid_rows, grid_cols, rows_of_a_sample,
    ALONG: tl.constexpr, F: tl.constexpr, R: tl.constexpr, ROUNDING: tl.constexpr, TRANSPOSED_NOISE: tl.constexpr,
    GIVEN: tl.constexpr, PARTS: tl.constexpr, VALUES: tl.constexpr, BY_COLUMN: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, WHOLE_R: tl.constexpr, WHOLE_C: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HADAMARD: tl.constexpr, HARDWARE: tl.constexpr,
    E2M1_HARDWARE: tl.constexpr,
):  # fmt: skip
    """Codes and scales of x in one read and one write; with ``up``, of silu(x) * up / d (precision.swiglu.Hidden).

    ``tile_amax`` FP32 [grid_rows, grid_cols] is read if GIVEN; otherwise amaxes are those of the block's tiles, which
    must lie in it as a whole. ``tensor_amax``, FP32 [PARTS], whose largest is the amax, is read instead where the tile
    is the tensor, and always by a two-level rule, which writes ``tensor_scale`` FP32 [1]. ``scales``: FP32, or uint8
    codes, row by row or BY_COLUMN. ``codes``: uint8 [rows, bytes_c], two codes of 4 bits a byte; with VALUES BF16
    [rows, cols], of code values (1) or times their tile's scale (2), and ``scales`` is written for a tensor's, or None.
    ``note`` FP32 [1]: becomes the amax of x if that is larger. ``key``, ``step``, ``first``: as in ``_uniform``.
    """
    blocks_c = tl.cdiv(cols, BLOCK_C)
    whole, whole_decode = _tensor_scales(tensor_amax, scales, tensor_scale, R, GIVEN, PARTS, WHOLE_R, WHOLE_C, HARDWARE)
    most = tl.program_id(0) * 0
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_R) * blocks_c, tl.num_programs(0), disable_licm=True):
        block_r, block_c = block // blocks_c, block % blocks_c
        y = _block(
            x, up, d, signs, block_r, block_c, rows, cols, stride_r, stride_c,
            ALONG, HADAMARD, BLOCK_R, BLOCK_C, HARDWARE,
        )  # fmt: skip
        if note is not None:
            most = tl.maximum(most, _largest(_bits(y) & MAGNITUDE))
        _emit(
            y, whole, whole_decode, codes, scales, tile_amax, key, step, first, block_r, block_c, rows, cols, bytes_c,
            grid_rows, grid_cols, rows_of_a_sample,
            F, R, ROUNDING, TRANSPOSED_NOISE, GIVEN, VALUES, BY_COLUMN, TALL, WIDE, WHOLE_R, WHOLE_C, BLOCK_R, BLOCK_C,
            HARDWARE, E2M1_HARDWARE,
        )  # fmt: skip
    if note is not None:
        tl.atomic_max(note.to(tl.pointer_type(tl.int32)), most, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=[*_SCALARS, "key_t"])
def quantize_both_kernel(
    x, up, d, codes, scales, codes_t, scales_t, tile_amax, tile_amax_t, tensor_amax, tensor_scale, note,
    key, key_t, step, first, rows, cols, stride_r, stride_c, bytes_c, grid_c, bytes_r, grid_r, rows_of_a_sample,
    ALONG: tl.constexpr, F: tl.constexpr, R: tl.constexpr, ROUNDING: tl.constexpr, TRANSPOSED_NOISE: tl.constexpr,
    GIVEN: tl.constexpr, PARTS: tl.constexpr, VALUES: tl.constexpr, BY_COLUMN: tl.constexpr,
    WIDE: tl.constexpr, WHOLE_R: tl.constexpr, WHOLE_C: tl.constexpr,
    BLOCK: tl.constexpr, HARDWARE: tl.constexpr, E2M1_HARDWARE: tl.constexpr,
):  # fmt: skip
    """What ``quantize_kernel`` makes of x and of its transpose, in one read: tiles of 1 x WIDE, rows, or the tensor.

    ``codes``: [rows, bytes_c], ``scales`` [rows, grid_c]; ``codes_t``: [cols, bytes_r], ``scales_t`` [cols, grid_r];
    scales row by row or BY_COLUMN; that of the tensor is one for both. ``key_t`` is that of the transpose's noise,
    whose rows are the columns of the transpose; TRANSPOSED_NOISE: x's own rows are columns of what is counted, and its
    transpose's are not.
    """
    TALL: tl.constexpr = BLOCK if WHOLE_R else 1
    blocks_c = tl.cdiv(cols, BLOCK)
    whole, whole_decode = _tensor_scales(tensor_amax, scales, tensor_scale, R, GIVEN, PARTS, WHOLE_R, WHOLE_C, HARDWARE)
    most = tl.program_id(0) * 0
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK) * blocks_c, tl.num_programs(0), disable_licm=True):
        block_r, block_c = block // blocks_c, block % blocks_c
        y = _block(
            x, up, d, None, block_r, block_c, rows, cols, stride_r, stride_c, ALONG, 0, BLOCK, BLOCK, HARDWARE
        )  # fmt: skip
        if note is not None:
            most = tl.maximum(most, _largest(_bits(y) & MAGNITUDE))
        _emit(
            y, whole, whole_decode, codes, scales, tile_amax, key, step, first, block_r, block_c, rows, cols, bytes_c,
            rows, grid_c, rows_of_a_sample,
            F, R, ROUNDING, TRANSPOSED_NOISE, GIVEN, VALUES, BY_COLUMN, TALL, WIDE, WHOLE_R, WHOLE_C, BLOCK, BLOCK,
            HARDWARE, E2M1_HARDWARE,
        )  # fmt: skip
        _emit(
            tl.trans(y), whole, whole_decode, codes_t, scales_t, tile_amax_t, key_t, step, first, block_c, block_r,
            cols, rows, bytes_r, cols, grid_r, rows_of_a_sample,
            F, R, ROUNDING, not TRANSPOSED_NOISE, GIVEN, VALUES, BY_COLUMN, TALL, WIDE, WHOLE_R, WHOLE_C, BLOCK, BLOCK,
            HARDWARE, E2M1_HARDWARE,
        )  # fmt: skip
    if note is not None:
        tl.atomic_max(note.to(tl.pointer_type(tl.int32)), most, sem="relaxed")


@triton.jit
def hadamard_kernel(
    x, out, signs, rows, cols, stride_r, stride_c,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HADAMARD: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """out [rows, cols], contiguous: the transform of x in its dtype; for BF16 its bits as int16."""
    blocks_c = tl.cdiv(cols, BLOCK_C)
    block_r, block_c = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c
    r, c = _places(block_r, block_c, BLOCK_R, BLOCK_C)
    y = _block(
        x, None, None, signs, block_r, block_c, rows, cols, stride_r, stride_c,
        -1, HADAMARD, BLOCK_R, BLOCK_C, HARDWARE,
    )  # fmt: skip
    place, mask = _at(out, block_r, block_c, cols, 1, BLOCK_R, BLOCK_C), (r < rows) & (c < cols)
    if out.dtype.element_ty == tl.int16:
        tl.store(place, (_bits(y) >> 16).to(tl.int16), mask=mask)  # already rounded to BF16
    else:
        tl.store(place, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def swizzle_kernel(scales, out, rows, cols, cols_of_4):
    """uint8 scales [rows, cols] in the order tensor cores of Blackwell read: 128 x 4 at a time, padded with zeros.

    The 128 rows of a piece are 4 groups of 32: row 32 g + i and column j of it lie at 16 i + 4 g + j.
    """
    piece_r, piece_c = tl.program_id(0) // cols_of_4, tl.program_id(0) % cols_of_4
    place = tl.arange(0, 512)
    i, g, j = place // 16, place // 4 % 4, place % 4
    r, c = piece_r * 128 + g * 32 + i, piece_c * 4 + j
    code = tl.load(scales + r.to(tl.int64) * cols + c, mask=(r < rows) & (c < cols), other=0)
    tl.store(out + tl.program_id(0).to(tl.int64) * 512 + place, code)


@_inlined
def _packed_e2m1(low, high):
    """Two E2M1 codes in a byte by the conversion instruction (Blackwell); NaN gives 6, as in ``_codes``."""
    return tl.inline_asm_elementwise(
        "{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, $2, $1; cvt.u32.u8 $0, pair; }",
        "=r,f,f",
        [low, high],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def values_kernel(
    codes, factors, out, rows, cols, bytes_c, grid_rows, grid_cols,
    F: tl.constexpr, R: tl.constexpr, SCALED: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, WHOLE_R: tl.constexpr, WHOLE_C: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Code value * factor of its tile ([grid_rows, grid_cols], read if SCALED): FP32, or the scale codes of rule R.

    out [rows, cols]: FP32 or BF16.
    """
    blocks_c = tl.cdiv(cols, BLOCK_C)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_R) * blocks_c, tl.num_programs(0), disable_licm=True):
        block_r, block_c = block // blocks_c, block % blocks_c
        r, c = _places(block_r, block_c, BLOCK_R, BLOCK_C)
        mask = (r < rows) & (c < cols)
        if F.bits == 4:
            half = block_c * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)[None, :]
            place = _at(codes, block_r, block_c, bytes_c, 1, BLOCK_R, BLOCK_C // 2)
            packed = tl.load(place, mask=(r < rows) & (half < bytes_c), other=0).to(tl.int32)
            code = tl.reshape(tl.join(packed & 0xF, packed >> 4), [BLOCK_R, BLOCK_C])
        else:
            place = _at(codes, block_r, block_c, bytes_c, 1, BLOCK_R, BLOCK_C)
            code = tl.load(place, mask=mask, other=0).to(tl.int32)
        value = _value(code & ((1 << F.bits) - 1), F)
        if SCALED:
            i = _tile_places(block_r * (BLOCK_R // TALL), BLOCK_R, TALL, WHOLE_R)[:, None]
            j = _tile_places(block_c * (BLOCK_C // WIDE), BLOCK_C, WIDE, WHOLE_C)[None, :]
            factor = tl.load(factors + i * grid_cols + j, mask=(i < grid_rows) & (j < grid_cols), other=0)
            if factors.dtype.element_ty == tl.uint8:
                factor = _decoded(factor.to(tl.int32), R)
            value = value * _each(factor, BLOCK_R, BLOCK_C, TALL, WIDE)
        if out.dtype.element_ty == tl.bfloat16:
            bits = out.to(tl.pointer_type(tl.int16))
            tl.store(_at(bits, block_r, block_c, cols, 1, BLOCK_R, BLOCK_C), _bf16_bits(value), mask=mask)
        else:
            tl.store(_at(out, block_r, block_c, cols, 1, BLOCK_R, BLOCK_C), value, mask=mask)
