# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Device functions on blocks: loading and transforming one, amaxes of its tiles, writing its codes and scales.

A block of a matrix [rows, cols] (any strides, contraction last) holds complete tiles. ``B`` is a ``blocks.Blocks``,
``Q`` a ``specs.Quantization``.
"""

from __future__ import annotations

import triton.language as tl  # type: ignore[import-untyped]

from .numerics import (
    E2M1,
    MAGNITUDE,
    NEAREST,
    SCALED_VALUES,
    STOCHASTIC,
    TWO_LEVEL,
    UNIT,
    decode_scales,
    divide_by,
    exp_fp32,
    from_bits,
    from_codes,
    inline,
    pack_e2m1,
    round_to_dtype,
    tensor_level,
    tile_scales,
    to_bf16_bits,
    to_bits,
    to_codes,
    to_fp32,
    uniform_noise,
)


@inline
def transform_columns(wide, x, col, cols, signs, SIZE: tl.constexpr, HARDWARE: tl.constexpr):
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
            bits = to_bits(y)
            pairs = tl.reshape(bits, [R, C // 2 ** (stage + 1), 2, 2**stage])
            sums = tl.broadcast_to(tl.sum(pairs, 2, keep_dims=True), [R, C // 2 ** (stage + 1), 2, 2**stage])
            partner = from_bits(tl.reshape(sums, [R, C]) - bits)
            y = from_bits(bits ^ ((tl.arange(0, C)[None, :] >> stage) << 31)) + partner
    y = round_to_dtype(y * (1.0 / SIZE**0.5), x, HARDWARE)
    return tl.where(col < cols // SIZE * SIZE, y, wide)


@inline
def block_indices(block_r, block_c, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows [BLOCK_R, 1] and columns [1, BLOCK_C] of a block."""
    return (
        block_r * BLOCK_R + tl.arange(0, BLOCK_R)[:, None],
        block_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :],
    )


@inline
def block_pointers(pointer, block_r, block_c, stride_r, stride_c, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to a block of a matrix: within it by 32 bits, which are half the registers of 64."""
    first = (block_r.to(tl.int64) * BLOCK_R) * stride_r + (block_c.to(tl.int64) * BLOCK_C) * stride_c
    return (pointer + first) + (tl.arange(0, BLOCK_R)[:, None] * stride_r + tl.arange(0, BLOCK_C)[None, :] * stride_c)


@inline
def load_block(
    x, up, d, signs, block_r, block_c, rows, cols, stride_r, stride_c,
    ALONG: tl.constexpr, HADAMARD: tl.constexpr, B: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """A block of the matrix in FP32, transformed; zeros outside. With ``up``, that of precision.swiglu.Hidden."""
    r, c = block_indices(block_r, block_c, B.block_r, B.block_c)
    mask = (r < rows) & (c < cols)
    place = block_pointers(x, block_r, block_c, stride_r, stride_c, B.block_r, B.block_c)
    loaded = tl.load(place, mask=mask, other=0.0)
    y = to_fp32(loaded)
    if up is not None:
        place = block_pointers(up, block_r, block_c, stride_r, stride_c, B.block_r, B.block_c)
        other = tl.load(place, mask=mask, other=0.0)
        silu = tl.math.div_rn(y, 1.0 + exp_fp32(-y))
        y = round_to_dtype(silu * to_fp32(other), loaded, HARDWARE)
        y = divide_by(y, loaded, d, r, c, rows, cols, ALONG, HARDWARE)
    return transform_columns(y, loaded, c, cols, signs, HADAMARD, HARDWARE) if HADAMARD else y


@inline
def tile_amax_bits(y, TALL: tl.constexpr, WIDE: tl.constexpr):
    """Bits of the amax of every tile of a block: compared as integers, a NaN is larger than everything."""
    R: tl.constexpr = y.shape[0]
    C: tl.constexpr = y.shape[1]
    bits = tl.max(tl.reshape(to_bits(y) & MAGNITUDE, [R, C // WIDE, WIDE]), 2)
    if TALL > 1:
        bits = tl.max(tl.reshape(bits, [R // TALL, TALL, C // WIDE]), 1)
    return bits


@inline
def expand_tiles(tiles, R: tl.constexpr, C: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr):
    """What belongs to tiles [R / TALL, C / WIDE], for every element of the block [R, C]."""
    tall = tl.broadcast_to(tiles[:, None, :, None], [R // TALL, TALL, C // WIDE, WIDE])
    return tl.reshape(tall, [R, C])


@inline
def tile_indices(block_r, block_c, grid_rows, grid_cols, B: tl.constexpr):
    """Rows [tiles, 1] and columns [1, tiles] in the grid of a block's tiles, and whether they are in it."""
    i = tl.arange(0, B.block_r // B.tall)
    i = (i * 0 if B.full_r else block_r * (B.block_r // B.tall) + i)[:, None]
    j = tl.arange(0, B.block_c // B.wide)
    j = (j * 0 if B.full_c else block_c * (B.block_c // B.wide) + j)[None, :]
    return i, j, (i < grid_rows) & (j < grid_cols)


@inline
def amax_of_parts(amaxes, PARTS: tl.constexpr):
    """The largest of PARTS amaxes, FP32 [1]: compared as integers, a NaN is larger than everything."""
    return from_bits(tl.max(to_bits(tl.load(amaxes + tl.arange(0, PARTS))), 0, keep_dims=True))


@inline
def block_max(bits):
    """Of a block of bits, as a scalar."""
    return tl.max(tl.max(bits, 1), 0)


@inline
def tensor_scales(amaxes, scales, tensor_scale, Q: tl.constexpr, B: tl.constexpr):
    """What is the same for every block: encode and decode scale (FP32 [1]) of the tensor, or of a rule's tensor level.

    The first program writes what is stored of it. ``amaxes``: as many as Q.parts, whose largest is the tensor's.
    """
    R: tl.constexpr = Q.rule
    encode = tl.full([1], 1.0, tl.float32)
    decode = encode
    if R.kind == TWO_LEVEL:
        encode, decode = tensor_level(amax_of_parts(amaxes, Q.parts), R)
        if tl.program_id(0) == 0:
            tl.store(tensor_scale + tl.arange(0, 1), decode)
    elif B.full_r and B.full_c and (Q.given or R.kind == UNIT):
        if R.kind != UNIT:
            encode = amax_of_parts(amaxes, Q.parts)
        encode, stored = tile_scales(encode, encode, R, Q.hardware)
        if scales is not None:
            tl.store(
                scales + tl.arange(0, 1), stored.to(scales.dtype.element_ty), mask=tl.arange(0, 1) == tl.program_id(0)
            )
        decode = decode_scales(stored, R)
    return encode, decode


@inline
def write_block(
    y, tensor_encode, tensor_decode, codes, scales, tile_amax, key, step, first, block_r, block_c, rows, cols, bytes_c,
    grid_rows, grid_cols, rows_of_a_sample,
    TRANSPOSED_NOISE: tl.constexpr, Q: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Write the codes and scales of a block y in FP32, or its values; arguments as in ``quantize_kernel``.

    ``tensor_encode`` and ``tensor_decode``: of ``tensor_scales``.
    """
    F: tl.constexpr = Q.element
    R: tl.constexpr = Q.rule
    ONE: tl.constexpr = R.kind == UNIT or (B.full_r and B.full_c and Q.given)  # scale, and it is known
    if ONE:
        if R.kind != UNIT:
            y = y * tensor_encode[:, None]
    else:
        i, j, inside = tile_indices(block_r, block_c, grid_rows, grid_cols, B)
        if Q.given:
            amax = from_bits(to_bits(tl.load(tile_amax + i * grid_cols + j, mask=inside, other=0)))
        else:
            amax = from_bits(tile_amax_bits(y, B.tall, B.wide))
        encode, stored = tile_scales(amax, tensor_encode[:, None], R, Q.hardware)
        if scales is not None:
            mask = inside
            if B.full_r:
                mask = mask & (i + block_r < 1)
            if B.full_c:
                mask = mask & (j + block_c < 1)
            place = j * grid_rows + i if Q.by_column else i * grid_cols + j
            tl.store(scales + place, stored.to(scales.dtype.element_ty), mask=mask)
        y = y * expand_tiles(encode, B.block_r, B.block_c, B.tall, B.wide)
    r, c = block_indices(block_r, block_c, B.block_r, B.block_c)
    mask, uniform = (r < rows) & (c < cols), y
    if Q.rounding == STOCHASTIC:
        if TRANSPOSED_NOISE:
            uniform = uniform_noise(c, r, key, step, first, rows_of_a_sample)
        else:
            uniform = uniform_noise(r, c, key, step, first, rows_of_a_sample)
    if Q.values:
        value = from_codes(to_codes(y, uniform, F, Q.rounding, Q.hardware) & ((1 << F.bits) - 1), F)
        if Q.values == SCALED_VALUES:
            if ONE:
                value = value * tensor_decode[:, None]
            else:
                value = value * expand_tiles(decode_scales(stored, R), B.block_r, B.block_c, B.tall, B.wide)
        place = block_pointers(codes.to(tl.pointer_type(tl.int16)), block_r, block_c, bytes_c, 1, B.block_r, B.block_c)
        tl.store(place, to_bf16_bits(value), mask=mask)
    elif F.bits == 4:
        half = block_c * (B.block_c // 2) + tl.arange(0, B.block_c // 2)[None, :]
        if Q.e2m1_hardware and Q.rounding == NEAREST and F.hardware == E2M1:
            low, high = tl.split(tl.reshape(tl.where(c < cols, y, 0.0), [B.block_r, B.block_c // 2, 2]))
            packed = pack_e2m1(low, high)
        else:
            code = tl.where(c < cols, to_codes(y, uniform, F, Q.rounding, Q.hardware), 0)
            low, high = tl.split(tl.reshape(code, [B.block_r, B.block_c // 2, 2]))
            packed = low | (high << 4)
        place = block_pointers(codes, block_r, block_c, bytes_c, 1, B.block_r, B.block_c // 2)
        tl.store(place, packed.to(tl.uint8), mask=(r < rows) & (half < bytes_c))
    else:
        code = to_codes(y, uniform, F, Q.rounding, Q.hardware)
        place = block_pointers(codes, block_r, block_c, bytes_c, 1, B.block_r, B.block_c)
        tl.store(place, code.to(tl.uint8), mask=mask)
