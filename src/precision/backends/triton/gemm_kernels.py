# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Matrix products of codes on tensor cores: ``a @ b.mT`` with FP32 sums, scaled on the way or at the end.

Nothing is asked of the shapes: what is outside of a matrix counts as zeros. Codes of 4 bits lie two a byte along the
contraction.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from .fused_kernels import _narrow
from .kernels import NEAREST, _each, _inlined, _value


@_inlined
def _places(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Rows and columns of this program's block of the output; GROUP rows of blocks go together and share reads."""
    blocks_m, blocks_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group = tl.program_id(0) // (GROUP * blocks_n)
    height = tl.minimum(blocks_m - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * blocks_n)
    row = (group * GROUP + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, within // height * BLOCK_N + tl.arange(0, BLOCK_N)


@_inlined
def _write(y, bias, out, row, col, m, n):
    mask = (row[:, None] < m) & (col[None, :] < n)
    if bias is not None:
        y = y + tl.load(bias + col, mask=col < n, other=0.0)[None, :]
    place = out + row[:, None].to(tl.int64) * n + col[None, :]
    if out.dtype.element_ty == tl.int16:
        tl.store(place, _narrow(y, y, NEAREST), mask=mask)
    else:
        tl.store(place, y, mask=mask)


@_inlined
def _decoded(codes, scales, F: tl.constexpr, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr):
    """FP32 [R, C] of packed codes of 4 bits [R, C / 2] and codes of scales [R, C / WIDE]."""
    packed = codes.to(tl.int32)
    code = tl.reshape(tl.join(packed & 0xF, packed >> 4), [R, C])
    return _value(code, F) * _each(_value(scales.to(tl.int32), S), R, C, 1, WIDE)


@triton.jit
def block_scaled_gemm_kernel(
    a, a_scales, a_tensor, b, b_scales, b_tensor, bias, out,
    m, n, k, a_stride_r, a_stride_c, b_stride_r, b_stride_c, scales_k,
    A: tl.constexpr, B: tl.constexpr, E4M3_SCALES: tl.constexpr,
    F: tl.constexpr, S: tl.constexpr, DECODED: tl.constexpr,
    A_TALL: tl.constexpr, B_TALL: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [m, n] of codes a, b under a scale per WIDE values of the contraction and A_TALL (B_TALL) rows.

    A, B: the formats, "e4m3", "e5m2" or "e2m1". Scales: uint8 codes of E8M0, or with
    E4M3_SCALES of E4M3, [ceil(m / A_TALL), scales_k]. ``a_tensor``
    and ``b_tensor``: FP32 [1], the second level, or None. DECODED: multiply the values of codes of format F under
    scales of format S, for the interpreter, which takes E4M3 scales for powers of two.
    """
    A_PACK: tl.constexpr = 2 if A == "e2m1" else 1
    B_PACK: tl.constexpr = 2 if B == "e2m1" else 1
    row, col = _places(m, n, BLOCK_M, BLOCK_N, GROUP)
    at_a, at_b = tl.arange(0, BLOCK_K // A_PACK), tl.arange(0, BLOCK_K // B_PACK)
    at_scale = tl.arange(0, BLOCK_K // WIDE)
    a_rows, b_rows = row[:, None].to(tl.int64) * a_stride_r, col[None, :].to(tl.int64) * b_stride_r
    a_scale_rows, b_scale_rows = (row // A_TALL)[:, None] * scales_k, (col // B_TALL)[:, None] * scales_k
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        place = at_a[None, :] + start // A_PACK
        inside = (row[:, None] < m) & (place < (k + A_PACK - 1) // A_PACK)
        left = tl.load(a + a_rows + place * a_stride_c, mask=inside, other=0)
        place = at_b[:, None] + start // B_PACK
        inside = (col[None, :] < n) & (place < (k + B_PACK - 1) // B_PACK)
        right = tl.load(b + b_rows + place * b_stride_c, mask=inside, other=0)
        place = at_scale[None, :] + start // WIDE
        left_scale = tl.load(a_scales + a_scale_rows + place, mask=(row[:, None] < m) & (place < scales_k), other=0)
        right_scale = tl.load(b_scales + b_scale_rows + place, mask=(col[:, None] < n) & (place < scales_k), other=0)
        if DECODED:
            left_values = _decoded(left, left_scale, F, S, BLOCK_M, BLOCK_K, WIDE)
            right_values = _decoded(tl.trans(right), right_scale, F, S, BLOCK_N, BLOCK_K, WIDE)
            sums += tl.dot(left_values, tl.trans(right_values), input_precision="ieee")
        else:
            if E4M3_SCALES:
                left_scale = left_scale.to(tl.float8e4nv, bitcast=True)
                right_scale = right_scale.to(tl.float8e4nv, bitcast=True)
            sums = tl.dot_scaled(left, left_scale, A, right, right_scale, B, sums)
    if a_tensor is not None:
        sums = sums * tl.load(a_tensor)
    if b_tensor is not None:
        sums = sums * tl.load(b_tensor)
    _write(sums, bias, out, row, col, m, n)


@triton.jit
def fp8_gemm_kernel(
    a, a_scales, b, b_scales, bias, out,
    m, n, k, a_stride_r, a_stride_c, b_stride_r, b_stride_c,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [m, n] of E4M3 or E5M2 matrices under FP32 scales: one for the tensor, or (A_ROWS, B_ROWS) one for each row.

    SPLIT: the tensor core's sums, which on Hopper keep some 14 bits, go into FP32 registers after every BLOCK_K.
    """
    row, col = _places(m, n, BLOCK_M, BLOCK_N, GROUP)
    at = tl.arange(0, BLOCK_K)
    a_rows, b_rows = row[:, None].to(tl.int64) * a_stride_r, col[None, :].to(tl.int64) * b_stride_r
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        place = at[None, :] + start
        left = tl.load(a + a_rows + place * a_stride_c, mask=(row[:, None] < m) & (place < k), other=0.0)
        place = at[:, None] + start
        right = tl.load(b + b_rows + place * b_stride_c, mask=(col[None, :] < n) & (place < k), other=0.0)
        if SPLIT:
            sums += tl.dot(left, right)
        else:
            sums = tl.dot(left, right, sums)
    # A vector, of which one scale for the tensor is the first element throughout.
    sums = sums * tl.load(a_scales + (row if A_ROWS else row * 0), mask=row < m, other=1.0)[:, None]
    sums = sums * tl.load(b_scales + (col if B_ROWS else col * 0), mask=col < n, other=1.0)[None, :]
    _write(sums, bias, out, row, col, m, n)
