# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernels: the codes and scales of ``precision.quantize``, bit for bit, in few passes over memory.

Compile with ``enable_fp_fusion=False``: a product and a sum that become one FMA round once instead of twice.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from .numerics import MAGNITUDE, decode_scales, from_bits, from_codes, to_bf16_bits, to_bits, to_fp32
from .tiles import (
    block_indices,
    block_max,
    block_pointers,
    expand_tiles,
    load_block,
    tensor_scales,
    tile_amax_bits,
    tile_indices,
    write_block,
)


@triton.jit
def amax_kernel(
    x, up, d, out, out_t, signs, rows, cols, stride_r, stride_c, grid_rows, grid_cols,
    ALONG: tl.constexpr, PARTS: tl.constexpr, B: tl.constexpr, HADAMARD: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Amaxes of tiles of what ``quantize_kernel`` reads: out, their bits, int32 [grid_rows, grid_cols].

    Where a tile has many blocks, ``out`` holds zeros before; with PARTS, it becomes the amax of the matrix in as many
    parts as there are programs: FP32. ``out_t`` int32 [cols], or None: those of columns as well, over zeros.
    """
    blocks_c = tl.cdiv(cols, B.block_c)
    largest = tl.program_id(0) * 0
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, B.block_r) * blocks_c, tl.num_programs(0), disable_licm=True):
        block_r, block_c = block // blocks_c, block % blocks_c
        y = load_block(x, up, d, signs, block_r, block_c, rows, cols, stride_r, stride_c, ALONG, HADAMARD, B, HARDWARE)
        if B.full_r and B.full_c:
            largest = tl.maximum(largest, block_max(to_bits(y) & MAGNITUDE))
        else:
            top = tile_amax_bits(y, B.tall, B.wide)
            i, j, mask = tile_indices(block_r, block_c, grid_rows, grid_cols, B)
            if B.full_r or B.full_c:
                tl.atomic_max(out + i * grid_cols + j, top, mask=mask, sem="relaxed")
            else:
                tl.store(out + i * grid_cols + j, top, mask=mask)
            if out_t is not None:
                _, c = block_indices(block_r, block_c, B.block_r, B.block_c)
                tl.atomic_max(out_t + c, tile_amax_bits(y, B.block_r, 1), mask=c < cols, sem="relaxed")
    if B.full_r and B.full_c:
        if PARTS:
            tl.store(out + tl.program_id(0), from_bits(largest))
        else:
            tl.atomic_max(out, largest, sem="relaxed")


# Each is read alone, at any address: an amax may be an element of a history.
_SCALARS = ["tensor_amax", "note", "key", "step", "first"]


@triton.jit(do_not_specialize_on_alignment=_SCALARS)
def quantize_kernel(
    x, up, d, codes, scales, tile_amax, tensor_amax, tensor_scale, note, signs, key, step, first,
    rows, cols, stride_r, stride_c, bytes_c, grid_rows, grid_cols, rows_of_a_sample,
    ALONG: tl.constexpr, TRANSPOSED_NOISE: tl.constexpr, Q: tl.constexpr, B: tl.constexpr, HADAMARD: tl.constexpr,
):  # fmt: skip
    """Codes and scales of x in one read and one write; with ``up``, of silu(x) * up / d (precision.swiglu.Hidden).

    ``tile_amax`` FP32 [grid_rows, grid_cols] is read if Q.given; otherwise amaxes are those of the block's tiles, which
    must lie in it completely. ``tensor_amax``, FP32 [Q.parts], whose largest is the amax, is read instead where the
    tile is the tensor, and always by a two-level rule, which writes ``tensor_scale`` FP32 [1]. ``scales``: FP32, or
    uint8 codes, row by row or by column. ``codes``: uint8 [rows, bytes_c], two codes of 4 bits a byte; with Q.values
    BF16 [rows, cols], and ``scales`` is written for a tensor's, or None. ``note`` FP32 [1]: becomes the amax of x if
    that is larger. ``key``, ``step``, ``first``: as in ``uniform_noise``.
    """
    blocks_c = tl.cdiv(cols, B.block_c)
    tensor_encode, tensor_decode = tensor_scales(tensor_amax, scales, tensor_scale, Q, B)
    largest = tl.program_id(0) * 0
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, B.block_r) * blocks_c, tl.num_programs(0), disable_licm=True):
        block_r, block_c = block // blocks_c, block % blocks_c
        y = load_block(
            x, up, d, signs, block_r, block_c, rows, cols, stride_r, stride_c, ALONG, HADAMARD, B, Q.hardware
        )
        if note is not None:
            largest = tl.maximum(largest, block_max(to_bits(y) & MAGNITUDE))
        write_block(
            y, tensor_encode, tensor_decode, codes, scales, tile_amax, key, step, first, block_r, block_c, rows, cols,
            bytes_c, grid_rows, grid_cols, rows_of_a_sample, TRANSPOSED_NOISE, Q, B,
        )  # fmt: skip
    if note is not None:
        tl.atomic_max(note.to(tl.pointer_type(tl.int32)), largest, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=[*_SCALARS, "key_t"])
def quantize_both_kernel(
    x, up, d, codes, scales, codes_t, scales_t, tile_amax, tile_amax_t, tensor_amax, tensor_scale, note,
    key, key_t, step, first, rows, cols, stride_r, stride_c, bytes_c, grid_c, bytes_r, grid_r, rows_of_a_sample,
    ALONG: tl.constexpr, TRANSPOSED_NOISE: tl.constexpr, Q: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """What ``quantize_kernel`` makes of x and of its transpose, in one read of square blocks.

    ``codes``: [rows, bytes_c], ``scales`` [rows, grid_c]; ``codes_t``: [cols, bytes_r], ``scales_t`` [cols, grid_r];
    scales row by row or by column; that of the tensor is one for both. ``key_t`` is that of the transpose's noise,
    whose rows are the columns of the transpose; TRANSPOSED_NOISE: x's own rows are columns of what is counted, and its
    transpose's are not.
    """
    blocks_c = tl.cdiv(cols, B.block_c)
    tensor_encode, tensor_decode = tensor_scales(tensor_amax, scales, tensor_scale, Q, B)
    largest = tl.program_id(0) * 0
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, B.block_r) * blocks_c, tl.num_programs(0), disable_licm=True):
        block_r, block_c = block // blocks_c, block % blocks_c
        y = load_block(x, up, d, None, block_r, block_c, rows, cols, stride_r, stride_c, ALONG, 0, B, Q.hardware)
        if note is not None:
            largest = tl.maximum(largest, block_max(to_bits(y) & MAGNITUDE))
        write_block(
            y, tensor_encode, tensor_decode, codes, scales, tile_amax, key, step, first, block_r, block_c, rows, cols,
            bytes_c, rows, grid_c, rows_of_a_sample, TRANSPOSED_NOISE, Q, B,
        )  # fmt: skip
        write_block(
            tl.trans(y), tensor_encode, tensor_decode, codes_t, scales_t, tile_amax_t, key_t, step, first,
            block_c, block_r, cols, rows, bytes_r, cols, grid_r, rows_of_a_sample, not TRANSPOSED_NOISE, Q, B,
        )  # fmt: skip
    if note is not None:
        tl.atomic_max(note.to(tl.pointer_type(tl.int32)), largest, sem="relaxed")


@triton.jit
def hadamard_kernel(
    x, out, signs, rows, cols, stride_r, stride_c, B: tl.constexpr, HADAMARD: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """out [rows, cols], contiguous: the transform of x in its dtype; for BF16 its bits as int16."""
    blocks_c = tl.cdiv(cols, B.block_c)
    block_r, block_c = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c
    r, c = block_indices(block_r, block_c, B.block_r, B.block_c)
    y = load_block(x, None, None, signs, block_r, block_c, rows, cols, stride_r, stride_c, -1, HADAMARD, B, HARDWARE)
    place, mask = block_pointers(out, block_r, block_c, cols, 1, B.block_r, B.block_c), (r < rows) & (c < cols)
    if out.dtype.element_ty == tl.int16:
        tl.store(place, (to_bits(y) >> 16).to(tl.int16), mask=mask)  # already rounded to BF16
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


@triton.jit
def values_kernel(
    codes, factors, out, rows, cols, bytes_c, grid_rows, grid_cols,
    F: tl.constexpr, R: tl.constexpr, SCALED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Code value * factor of its tile ([grid_rows, grid_cols], read if SCALED): FP32, or the scale codes of rule R.

    out [rows, cols]: FP32 or BF16.
    """
    blocks_c = tl.cdiv(cols, B.block_c)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, B.block_r) * blocks_c, tl.num_programs(0), disable_licm=True):
        block_r, block_c = block // blocks_c, block % blocks_c
        r, c = block_indices(block_r, block_c, B.block_r, B.block_c)
        mask = (r < rows) & (c < cols)
        if F.bits == 4:
            half = block_c * (B.block_c // 2) + tl.arange(0, B.block_c // 2)[None, :]
            place = block_pointers(codes, block_r, block_c, bytes_c, 1, B.block_r, B.block_c // 2)
            packed = tl.load(place, mask=(r < rows) & (half < bytes_c), other=0).to(tl.int32)
            code = tl.reshape(tl.join(packed & 0xF, packed >> 4), [B.block_r, B.block_c])
        else:
            place = block_pointers(codes, block_r, block_c, bytes_c, 1, B.block_r, B.block_c)
            code = tl.load(place, mask=mask, other=0).to(tl.int32)
        value = from_codes(code & ((1 << F.bits) - 1), F)
        if SCALED:
            i, j, inside = tile_indices(block_r, block_c, grid_rows, grid_cols, B)
            factor = tl.load(factors + i * grid_cols + j, mask=inside, other=0)
            if factors.dtype.element_ty == tl.uint8:
                factor = decode_scales(factor.to(tl.int32), R)
            value = value * expand_tiles(factor, B.block_r, B.block_c, B.tall, B.wide)
        if out.dtype.element_ty == tl.bfloat16:
            place = block_pointers(out.to(tl.pointer_type(tl.int16)), block_r, block_c, cols, 1, B.block_r, B.block_c)
            tl.store(place, to_bf16_bits(value), mask=mask)
        else:
            tl.store(block_pointers(out, block_r, block_c, cols, 1, B.block_r, B.block_c), value, mask=mask)


@triton.jit
def scaled_output_kernel(y, a, b, bias, out, size, cols, BLOCK: tl.constexpr):
    """out = y * a * b + bias, for y FP32 [size], flat rows of ``cols``; a and b FP32 [1], bias [cols].

    Each is left out where it is None. One rounding to the dtype of ``out``.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = tl.load(y + place, mask=inside, other=0.0)
    if a is not None:
        value = value * tl.load(a)
    if b is not None:
        value = value * tl.load(b)
    if bias is not None:
        value = value + to_fp32(tl.load(bias + place % cols, mask=inside, other=0.0))
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(out.to(tl.pointer_type(tl.int16)) + place, to_bf16_bits(value), mask=inside)
    else:
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
