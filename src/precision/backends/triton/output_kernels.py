# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A Triton kernel for what follows an emulated product whose operands have a factor each."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from .kernels import _bf16_bits, _widened


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
        value = value + _widened(tl.load(bias + place % cols, mask=inside, other=0.0))
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(out.to(tl.pointer_type(tl.int16)) + place, _bf16_bits(value), mask=inside)
    else:
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
