"""RMSNorm and SwiGLU in one pass each for CPUs: float32 inside, one rounding to BF16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ... import native
from . import compiled

_ROWS_OF_A_CHUNK = 64  # dweight is summed over rows within a chunk, then over chunks: the same for any thread count


def rms_norm_definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467), at float32 or better inside."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def swiglu_definition(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), at float32 or better inside."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def native_serves(*inputs: Tensor) -> bool:
    """Whether the compiled kernels take these."""
    fits = all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in inputs)
    return fits and compiled.library() is not None


def native_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm_definition``, compiled."""
    y, _ = _rms_norm(x.contiguous(), weight.contiguous(), eps)
    return y


def native_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``swiglu_definition``, compiled."""
    return _swiglu(gate.contiguous(), up.contiguous())


def _rows_and_width(x: Tensor) -> list[Any]:
    return [native.size(x.numel() // x.shape[-1]), native.size(x.shape[-1])]


@torch.library.custom_op("narrowgauge::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    kernels = compiled.loaded()
    assert x.dtype == weight.dtype == torch.bfloat16
    assert weight.shape == x.shape[-1:]
    y, inverse_rms = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    pointers = map(native.pointer, (x, weight, y, inverse_rms))
    kernels.rms_norm_forward(*pointers, *_rows_and_width(x), native.real(eps))
    return y, inverse_rms


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("narrowgauge::rms_norm_backward", mutates_args=())
def _rms_norm_backward(x: Tensor, weight: Tensor, inverse_rms: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    kernels = compiled.loaded()
    assert dy.dtype == x.dtype
    assert dy.shape == x.shape
    dx = torch.empty_like(x)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    chunks = torch.zeros(-(-rows // _ROWS_OF_A_CHUNK), width, dtype=torch.float32)
    pointers = map(native.pointer, (x, weight, inverse_rms, dy, dx, chunks))
    kernels.rms_norm_backward(*pointers, *_rows_and_width(x), native.size(_ROWS_OF_A_CHUNK))
    return dx, chunks.sum(0).to(weight.dtype)


@_rms_norm_backward.register_fake
def _(x: Tensor, weight: Tensor, inverse_rms: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save_rms_norm(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_rms_norm(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
    return *_rms_norm_backward(*ctx.saved_tensors, dy.contiguous()), None


_rms_norm.register_autograd(_backward_rms_norm, setup_context=_save_rms_norm)


@torch.library.custom_op("narrowgauge::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    kernels = compiled.loaded()
    assert gate.dtype == up.dtype == torch.bfloat16
    assert gate.shape == up.shape
    y = torch.empty_like(gate)
    kernels.swiglu_forward(*map(native.pointer, (gate, up, y)), native.size(gate.numel()))
    return y


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("narrowgauge::swiglu_backward", mutates_args=())
def _swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    kernels = compiled.loaded()
    assert dy.dtype == gate.dtype
    assert dy.shape == gate.shape
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    kernels.swiglu_backward(*map(native.pointer, (gate, up, dy, dgate, dup)), native.size(gate.numel()))
    return dgate, dup


@_swiglu_backward.register_fake
def _(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _save_swiglu(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_swiglu(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_backward(*ctx.saved_tensors, dy.contiguous())


_swiglu.register_autograd(_backward_swiglu, setup_context=_save_swiglu)
