# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernels that quantize what they compute: AdamW over narrow states, and the gradients of a SwiGLU.

AdamW's fused multiply-adds are written as such; there are no others. ``K`` is a ``fused.Storage``.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from .numerics import (
    INF_BITS,
    MAGNITUDE,
    STOCHASTIC,
    divide_by,
    exp_fp32,
    from_bits,
    from_codes,
    inline,
    round_to_dtype,
    tile_scales,
    to_bf16_bits,
    to_bits,
    to_codes,
    to_fp32,
    uniform_noise,
)
from .tiles import (
    block_indices,
    block_max,
    expand_tiles,
    tensor_scales,
    tile_amax_bits,
    tile_indices,
    transform_columns,
    write_block,
)

STORED_FP32, STORED_BF16, STORED_SCALED = (tl.constexpr(kind) for kind in range(3))


@inline
def _to_bf16(y, uniform, ROUNDING: tl.constexpr):
    """Bits (int16) of BF16: nearest even, or stochastic for finite values, saturating."""
    result = to_bf16_bits(y)
    if ROUNDING == STOCHASTIC:
        bits = to_bits(y)
        magnitude = bits & MAGNITUDE
        a = tl.minimum(magnitude, 0x7F7F0000)
        up = (uniform < (a & 0xFFFF).to(tl.float32) * (2.0**-16)).to(tl.int32)
        rounded = ((a >> 16) + up) | ((bits >> 16) & 0x8000)
        result = tl.where(magnitude < INF_BITS, rounded.to(tl.int16), result)
    return result


@inline
def _load_state(state, scales, r, c, rows, cols, K: tl.constexpr):
    """What a block of a state stands for, in FP32."""
    grid: tl.constexpr = K.grid
    place, mask = r.to(tl.int64) * cols + c, (r < rows) & (c < cols)
    stored = tl.load(state + place, mask=mask, other=0)
    if K.kind != STORED_SCALED:
        value = stored if K.kind == STORED_FP32 else from_bits(stored.to(tl.int32) << 16)
    elif K.block == 0:
        value = from_codes(stored.to(tl.int32), grid) * tl.load(scales)
    else:
        R: tl.constexpr = r.shape[0]
        C: tl.constexpr = c.shape[1]
        grid_cols = tl.cdiv(cols, K.block)
        j = tl.min(c, 1)[:, None] // K.block + tl.arange(0, C // K.block)[None, :]
        scale = tl.load(scales + r.to(tl.int64) * grid_cols + j, mask=(r < rows) & (j < grid_cols), other=1.0)
        value = from_codes(stored.to(tl.int32), grid) * expand_tiles(scale, R, C, 1, K.block)
    return value


@inline
def _store_state(
    value, state, scales, amax, key, row_offset, r, c, rows, cols, K: tl.constexpr, HARDWARE: tl.constexpr
):
    """Write a block of a state; gives what it now stands for. ``amax`` FP32 [1]: of the tensor, under one scale."""
    grid: tl.constexpr = K.grid
    rule: tl.constexpr = K.rule
    place, mask = r.to(tl.int64) * cols + c, (r < rows) & (c < cols)
    R: tl.constexpr = value.shape[0]
    C: tl.constexpr = value.shape[1]
    uniform = value
    if K.rounding == STOCHASTIC:
        uniform = uniform_noise(r, c, key, None, row_offset, 1)
    if K.kind == STORED_FP32:
        tl.store(state + place, value, mask=mask)
        result = value
    elif K.kind == STORED_BF16:
        bits = _to_bf16(value, uniform, K.rounding)
        tl.store(state + place, bits, mask=mask)
        result = from_bits(bits.to(tl.int32) << 16)
    else:
        if K.block == 0:
            encode, stored = tile_scales(tl.load(amax + tl.arange(0, 1)), value, rule, HARDWARE)
            if tl.program_id(0) == 0:
                tl.store(scales + tl.arange(0, 1), stored)
            encode, stored = encode[:, None], stored[:, None]
        else:
            top = from_bits(tile_amax_bits(tl.where(mask, value, 0.0), 1, K.block))
            block_encode, block_stored = tile_scales(top, value, rule, HARDWARE)
            grid_cols = tl.cdiv(cols, K.block)
            j = tl.min(c, 1)[:, None] // K.block + tl.arange(0, C // K.block)[None, :]
            where = (r < rows) & (j < grid_cols)
            tl.store(scales + r.to(tl.int64) * grid_cols + j, block_stored, mask=where)
            encode, stored = expand_tiles(block_encode, R, C, 1, K.block), expand_tiles(block_stored, R, C, 1, K.block)
        code = to_codes(value * encode, uniform, grid, K.rounding, HARDWARE)
        tl.store(state + place, code.to(tl.uint8), mask=mask)
        result = from_codes(code, grid) * stored
    return result


@inline
def _store_amax(value, amax, K: tl.constexpr):
    if K.kind == STORED_SCALED and K.block == 0:
        tl.atomic_max(amax, block_max(to_bits(value) & MAGNITUDE), sem="relaxed")


@triton.jit
def adamw_kernel(
    grad, m, m_scales, m_new, v, v_scales, v_new, w, w_scales, w_new, weight, amaxes, m_key, v_key, w_key, row_offset,
    gate, rows, cols, lerp, beta2, square, correction, eps, step, decay,
    M: tl.constexpr, V: tl.constexpr, W: tl.constexpr, AMAX_ONLY: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """AdamW on one parameter [rows, cols], contiguous, in place: states are decoded, updated in FP32 and encoded.

        w *= decay;  m = fma(lerp, g - m, m);  v = fma(square * g, g, v * beta2)
        w += step * m / (sqrt(v) / correction + eps)

    ``amaxes`` FP32 [3]: of the new m, v and w over all ranks, read for states under one scale; with AMAX_ONLY they are
    what is made, as bits, and nothing else is written. ``weight``: the parameter, where w is a copy, or None.
    New scales go to ``m_new`` and so on: those of blocks may be the old ones' place, that of a tensor, which other
    programs have yet to read, may not. ``gate`` FP32 [2] or None: what g is multiplied by, rounded as g is, and 0 where
    nothing is to be written.
    """
    if gate is not None:
        applied = tl.load(gate + 1)
        if applied == 0.0:
            return
    blocks_c = tl.cdiv(cols, BLOCK_C)
    block_r, block_c = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c
    r, c = block_indices(block_r, block_c, BLOCK_R, BLOCK_C)
    place, mask = r.to(tl.int64) * cols + c, (r < rows) & (c < cols)
    loaded = tl.load(grad + place, mask=mask, other=0.0)
    g = to_fp32(loaded)
    if gate is not None:
        g = round_to_dtype(g * tl.load(gate), loaded, HARDWARE)
    new_m = _load_state(m, m_scales, r, c, rows, cols, M)
    new_v = _load_state(v, v_scales, r, c, rows, cols, V)
    new_w = _load_state(w, w_scales, r, c, rows, cols, W) * decay
    new_m = tl.fma(tl.zeros([BLOCK_R, BLOCK_C], tl.float32) + lerp, g - new_m, new_m)
    new_v = tl.fma(g * square, g, new_v * beta2)
    root = tl.math.div_rn(tl.sqrt_rn(new_v), tl.zeros([BLOCK_R, BLOCK_C], tl.float32) + correction)
    new_w = new_w + tl.math.div_rn(new_m * step, root + eps)
    if AMAX_ONLY:
        zero = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        _store_amax(tl.where(mask, new_m, zero), amaxes, M)
        _store_amax(tl.where(mask, new_v, zero), amaxes + 1, V)
        _store_amax(tl.where(mask, new_w, zero), amaxes + 2, W)
    else:
        _store_state(new_m, m, m_new, amaxes, m_key, row_offset, r, c, rows, cols, M, HARDWARE)
        v_amax = None if amaxes is None else amaxes + 1
        w_amax = None if amaxes is None else amaxes + 2
        _store_state(new_v, v, v_new, v_amax, v_key, row_offset, r, c, rows, cols, V, HARDWARE)
        rounded_w = _store_state(new_w, w, w_new, w_amax, w_key, row_offset, r, c, rows, cols, W, HARDWARE)
        if weight is not None:
            if weight.dtype.element_ty == tl.int16:
                tl.store(weight + place, to_bf16_bits(rounded_w), mask=mask)
            else:
                tl.store(weight + place, rounded_w, mask=mask)


@inline
def _gradients(
    dh, gate, up, d, signs, r, c, rows, cols, stride_r, stride_c,
    ALONG: tl.constexpr, HADAMARD: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Blocks of dgate and dup in FP32 (precision.swiglu.Gradients), transformed; zeros outside."""
    place, mask = r.to(tl.int64) * stride_r + c.to(tl.int64) * stride_c, (r < rows) & (c < cols)
    loaded = tl.load(dh + place, mask=mask, other=0.0)
    wide = divide_by(to_fp32(loaded), loaded, d, r, c, rows, cols, ALONG, HARDWARE)
    g = to_fp32(tl.load(gate + place, mask=mask, other=0.0))
    u = to_fp32(tl.load(up + place, mask=mask, other=0.0))
    s = tl.math.div_rn(tl.full(g.shape, 1.0, tl.float32), 1.0 + exp_fp32(-g))
    dup = round_to_dtype(wide * (g * s), loaded, HARDWARE)
    dgate = round_to_dtype((wide * u) * (s * (1.0 + g * (1.0 - s))), loaded, HARDWARE)
    if HADAMARD:
        dgate = transform_columns(dgate, loaded, c, cols, signs, HADAMARD, HARDWARE)
        dup = transform_columns(dup, loaded, c, cols, signs, HADAMARD, HARDWARE)
    return dgate, dup


@triton.jit
def swiglu_backward_amax_kernel(
    dh, gate, up, d, signs, gate_out, up_out, rows, cols, stride_r, stride_c, grid_rows, grid_cols,
    ALONG: tl.constexpr, B: tl.constexpr, HADAMARD: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Amaxes of tiles of both gradients as bits, over zeros: int32 [grid_rows, grid_cols] each."""
    blocks_c = tl.cdiv(cols, B.block_c)
    block_r, block_c = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c
    r, c = block_indices(block_r, block_c, B.block_r, B.block_c)
    dgate, dup = _gradients(dh, gate, up, d, signs, r, c, rows, cols, stride_r, stride_c, ALONG, HADAMARD, HARDWARE)
    i, j, mask = tile_indices(block_r, block_c, grid_rows, grid_cols, B)
    tl.atomic_max(gate_out + i * grid_cols + j, tile_amax_bits(dgate, B.tall, B.wide), mask=mask, sem="relaxed")
    tl.atomic_max(up_out + i * grid_cols + j, tile_amax_bits(dup, B.tall, B.wide), mask=mask, sem="relaxed")


@triton.jit
def swiglu_backward_kernel(
    dh, gate, up, d, signs,
    gate_codes, gate_scales, gate_amax, gate_tensor_amax, gate_tensor_scale, gate_key,
    up_codes, up_scales, up_amax, up_tensor_amax, up_tensor_scale, up_key,
    step, first, rows, cols, stride_r, stride_c, bytes_c, grid_rows, grid_cols, rows_of_a_sample,
    ALONG: tl.constexpr, TRANSPOSED_NOISE: tl.constexpr, Q: tl.constexpr, B: tl.constexpr, HADAMARD: tl.constexpr,
):  # fmt: skip
    """Codes and scales of the gradients of gate and up, in one read: arguments as in ``quantize_kernel``, twice."""
    blocks_c = tl.cdiv(cols, B.block_c)
    gate_encode, gate_decode = tensor_scales(gate_tensor_amax, gate_scales, gate_tensor_scale, Q, B)
    up_encode, up_decode = tensor_scales(up_tensor_amax, up_scales, up_tensor_scale, Q, B)
    block_r, block_c = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c
    r, c = block_indices(block_r, block_c, B.block_r, B.block_c)
    dgate, dup = _gradients(dh, gate, up, d, signs, r, c, rows, cols, stride_r, stride_c, ALONG, HADAMARD, Q.hardware)
    write_block(
        dgate, gate_encode, gate_decode, gate_codes, gate_scales, gate_amax, gate_key, step, first,
        block_r, block_c, rows, cols, bytes_c, grid_rows, grid_cols, rows_of_a_sample, TRANSPOSED_NOISE, Q, B,
    )  # fmt: skip
    write_block(
        dup, up_encode, up_decode, up_codes, up_scales, up_amax, up_key, step, first,
        block_r, block_c, rows, cols, bytes_c, grid_rows, grid_cols, rows_of_a_sample, TRANSPOSED_NOISE, Q, B,
    )  # fmt: skip
