# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Device functions on numbers: rounding to codes and back, scales, noise, exp; the bits of ``precision.quantize``.

Every rounding is done with integer operations and single FP32 operations, as ``precision.formats`` defines it, so that
Triton's interpreter (whose narrow casts are wrong) gives the same bits as a GPU. On a GPU, ``HARDWARE`` lets the
conversion instructions do what they provably do alike: to round a finite value of at most the format's maximum to the
nearest, ties to even, has one answer; NaN and saturation are dealt with before.

``F`` is a ``specs.Grid`` and ``R`` a ``specs.ScaleConstants``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from ... import swiglu

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


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of kernels; plain Python to the interpreter, which sets itself up anew at every call of a jit function."""
    return function if triton.knobs.runtime.interpret else triton.jit(function)


@inline
def to_bits(x):
    return x.to(tl.int32, bitcast=True)


@inline
def from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@inline
def fmix32(h):
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@inline
def noise_words(key, step):
    """The two words of a noise's key: those at ``key``, or with a step (int64), what it makes of them."""
    key0 = tl.load(key).to(tl.uint32, bitcast=True)
    key1 = tl.load(key + 1).to(tl.uint32, bitcast=True)
    if step is not None:
        number = tl.load(step)
        low, high = (number & 0xFFFFFFFF).to(tl.uint32), (number >> 32).to(tl.uint32)
        key0, key1 = fmix32(fmix32(key0 ^ low) + high), fmix32(fmix32(key1 ^ low) + high)
    return key0, key1


@inline
def uniform_noise(row, col, key, step, first, rows_of_a_sample):
    """precision.noise at places row x col (int32, broadcast against each other), of ``Noise.of``'s parts.

    ``first`` int64: rows are counted from first * rows_of_a_sample; None: from 0.
    """
    key0, key1 = noise_words(key, step)
    place = row.to(tl.int64)
    if first is not None:
        place = place + tl.load(first) * rows_of_a_sample
    row_hash = fmix32(fmix32((place & 0xFFFFFFFF).to(tl.uint32) ^ key0) + (place >> 32).to(tl.uint32))
    element = fmix32((row_hash + col.to(tl.uint32) * 0x9E3779B9) ^ key1)
    return (element >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


@inline
def to_codes(y, uniform, F: tl.constexpr, ROUNDING: tl.constexpr, HARDWARE: tl.constexpr):
    """The codes (int32) of FP32 values; ``uniform`` is read if ROUNDING is STOCHASTIC."""
    bits = to_bits(y) & MAGNITUDE
    nan = bits > INF_BITS
    magnitude = from_bits(bits)
    a = tl.where(magnitude < F.max, magnitude, F.max)  # NaN gives max
    sign = (to_bits(y) >> 31) & 1
    if HARDWARE and ROUNDING == NEAREST and F.hardware == E4M3:
        code = a.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    elif HARDWARE and ROUNDING == NEAREST and F.hardware == E5M2:
        code = a.to(tl.float8e5).to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        e = tl.minimum(tl.maximum(to_bits(a) >> 23, F.low), F.high)
        if ROUNDING == NEAREST:
            c = from_bits((e + (23 - F.m)) << 23)
            r = (a + c) - c
        else:
            scaled = a * from_bits((254 + F.m - e) << 23)
            floor = scaled.to(tl.int32).to(tl.float32)  # exact: below 2^(m + 1) + 1
            if ROUNDING == STOCHASTIC:
                floor = tl.where(uniform < scaled - floor, floor + 1.0, floor)
            r = floor * from_bits((e - F.m) << 23)
        if F.integer:
            code = r.to(tl.int32)
        else:
            normal = (to_bits(r) >> (23 - F.m)) - F.bias_shift
            small = tl.minimum(r * F.to_small, 2.0**F.m).to(tl.int32)
            code = tl.where(r < F.least_normal, small, normal)
    negative = (-code & ((1 << F.bits) - 1)) if F.integer else code | (1 << (F.bits - 1))
    return tl.where(nan, F.nan_code, tl.where(sign == 1, negative, code))


@inline
def from_codes(code, F: tl.constexpr):
    """The FP32 values of codes (int32)."""
    if F.integer:
        half = 1 << (F.bits - 1)
        value = ((code ^ half) - half).to(tl.float32)
    else:
        magnitude = code & ((1 << (F.bits - 1)) - 1)
        normal = from_bits((magnitude + F.bias_shift) << (23 - F.m))
        value = tl.where(magnitude < (1 << F.m), magnitude.to(tl.float32) * F.from_small, normal)
        bits = to_bits(value)
        if F.has_nan:
            bits = tl.where(magnitude > F.max_code, 0x7FC00000, bits)
            bits = tl.where(magnitude == F.inf_code, INF_BITS, bits)
        value = from_bits(bits | ((code >> (F.bits - 1)) << 31))
    return value


@inline
def power_of_code(code):
    """2^(127 - code) for E8M0 codes (int32)."""
    field = 254 - code
    return from_bits(tl.where(field > 0, field << 23, tl.where(field < 0, 0x7FC00000, 1 << 22)))


@inline
def tensor_level(amax, R: tl.constexpr):
    """Encode and decode scale of the tensor in a two-level rule, from its amax (FP32 scalar)."""
    limit = R.limit
    s = tl.math.div_rn(tl.full([1], R.top, tl.float32), amax)
    s = tl.where(s > limit, limit, s)  # NaN stays
    s = tl.where((amax == 0.0) | (s == 0.0), 1.0, s)
    exact = (amax > 0.0) & (amax < float("inf")) & (s < limit)
    quotient = tl.math.div_rn(amax, tl.full([1], R.top, tl.float32))
    inverse = tl.math.div_rn(tl.full([1], 1.0, tl.float32), s)
    return s, tl.where(exact | (s != s), quotient, inverse)


@inline
def tile_scales(amax, s, R: tl.constexpr, HARDWARE: tl.constexpr):
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
            e = from_bits(to_bits(e) & INF_BITS)
        encode = e
        stored = tl.math.div_rn(one, e)
        if not R.element_has_nan:
            stored = tl.where(nan, float("nan"), stored)
    elif R.kind == FP32_DECODE:
        a = tl.where(amax < R.floor, R.floor, amax)
        d = tl.math.div_rn(a, one * R.top)
        if R.pow2:
            bits = to_bits(d)
            exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
            exponent = tl.minimum(tl.maximum(exponent, 1), 254)
            d = tl.where(finite, from_bits(exponent << 23), d)
        encode = tl.math.div_rn(one, d)
        stored = tl.where(amax == float("inf"), float("nan"), d)
    elif R.kind == POWER:
        if R.mode == RCEIL:
            bits = to_bits(amax * R.inverse_max)
            exponent = bits >> 23
            up = ((bits & 0x7FFFFF) > tl.where(exponent == 0, 0x400000, 0)) & (exponent < 254)
            code = tl.minimum(exponent + up.to(tl.int32), 254)
        else:
            bits = tl.where(nan, 0, to_bits(amax))
            if R.mode == EVEN:
                bits = bits + R.half_bit
            exponent = bits >> 23
            if R.mode == CEIL:
                exponent = exponent + ((bits & 0x7FFFFF) != 0).to(tl.int32)
            code = tl.minimum(tl.maximum(exponent - R.max_exponent, 0), 255)
        stored = tl.where(nan, 255, code)
        encode = power_of_code(stored)
    else:
        c = s * R.inverse_max
        scaled = amax * c
        block: tl.constexpr = R.block
        stored = to_codes(scaled, scaled, block, 0, HARDWARE)
        inverse = tl.math.div_rn(tl.full([1], 1.0, tl.float32), s)
        encode = tl.math.div_rn(one, from_codes(stored, block) * inverse)
        encode = tl.where(encode > R.limit, R.limit, encode)
    return encode, stored


@inline
def to_fp32(x):
    """FP32 from any dtype, exactly: from BF16 by its bits, since the interpreter loses subnormals."""
    return from_bits(x.to(tl.int16, bitcast=True).to(tl.int32) << 16) if x.dtype == tl.bfloat16 else x.to(tl.float32)


@inline
def round_to_dtype(y, x, HARDWARE: tl.constexpr):
    """FP32 values rounded to the dtype of ``x`` and back: what a transform leaves in a tensor of that dtype."""
    if x.dtype == tl.bfloat16:
        if HARDWARE:
            y = y.to(tl.bfloat16).to(tl.float32)
        else:
            bits = to_bits(y)
            up = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            y = from_bits(tl.where((bits & MAGNITUDE) > INF_BITS, 0x7FC00000, up))
    elif x.dtype == tl.float16:
        y = y.to(tl.float16).to(tl.float32)
    return y


@inline
def exp_fp32(x):
    """precision.swiglu.exp."""
    x = tl.where(x > TOP, TOP, x)
    x = tl.where(x < BOTTOM, BOTTOM, x)
    shifted = x * LOG2_E + MAGIC
    n = shifted - MAGIC
    r = (x - n * C1) - n * C2
    p = ((((P0 * r + P1) * r + P2) * r + P3) * r + P4) * r + P5
    p = (p * (r * r) + r) + 1.0
    exponent = to_bits(shifted) - MAGIC_BITS
    low = exponent >> 1
    return (p * from_bits((low + 127) << 23)) * from_bits((exponent - low + 127) << 23)


@inline
def divide_by(y, like, d, r, c, rows, cols, ALONG: tl.constexpr, HARDWARE: tl.constexpr):
    """y / d, rounded to the dtype of ``like``: d FP32 by row (ALONG 0) or column (1); -1: y as it is."""
    if ALONG >= 0:
        by = tl.load(d + r, mask=r < rows, other=1.0) if ALONG == 0 else tl.load(d + c, mask=c < cols, other=1.0)
        y = round_to_dtype(tl.math.div_rn(y, by + tl.zeros(y.shape, tl.float32)), like, HARDWARE)
    return y


@inline
def decode_scales(stored, R: tl.constexpr):
    """The FP32 decode scales of what ``tile_scales`` stores."""
    if R.kind == POWER:
        decode = tl.where(stored == 255, float("nan"), power_of_code(254 - stored))
    elif R.kind == TWO_LEVEL:
        block: tl.constexpr = R.block
        decode = from_codes(stored, block)
    else:
        decode = stored
    return decode


@inline
def to_bf16_bits(value):
    """FP32 as the bits of BF16 (int16), to nearest even; stored as such, since the interpreter narrows otherwise."""
    bits = to_bits(value)
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & MAGNITUDE) > INF_BITS, 0x7FC0, up).to(tl.int16)


@inline
def pack_e2m1(low, high):
    """Two E2M1 codes in a byte by the conversion instruction (Blackwell); NaN gives 6, as in ``to_codes``."""
    return tl.inline_asm_elementwise(
        "{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, $2, $1; cvt.u32.u8 $0, pair; }",
        "=r,f,f",
        [low, high],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
