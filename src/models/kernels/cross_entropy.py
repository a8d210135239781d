"""Cross-entropy over a vocabulary: in chunks of rows, and compiled for BF16 on a CPU.

torch's own makes three float32 tensors of the logits' size: memory that a CPU has to fault in and write through, and
that a GPU may not have (25 GB at 16,384 tokens of 128,256).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import native
from . import compiled

_CHUNK_ELEMENTS = 1 << 19  # 2 MB in float32: stays in a core's cache
_GPU_CHUNK_ELEMENTS = 1 << 27  # 0.5 GB in float32, if a chunk is ever stored so; offsets fit into 32 bits


def chunked_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log softmax(logits)[target], in nats, float32 [N]: a chunk is turned into float32, reduced, forgotten."""
    return _ChunkedCrossEntropy.apply(logits_NV, targets_N)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, _CHUNK_ELEMENTS // logits.shape[1])
        log_sums = torch.cat([chunk.float().logsumexp(-1) for chunk in logits.split(rows)])
        ctx.save_for_backward(logits, targets, log_sums)
        ctx.rows = rows
        return log_sums - logits.gather(1, targets[:, None])[:, 0].float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_sums = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        for start in range(0, logits.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            p = logits[part].float().sub_(log_sums[part, None]).exp_()
            p.scatter_add_(1, targets[part, None], torch.full_like(log_sums[part, None], -1.0))
            dlogits[part] = p.mul_(dlosses[part, None])
        return dlogits, None


def overwriting_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The same for GPUs: backward writes the gradient over the logits, which nobody else may need by then.

    Raises RuntimeError in a second backward.
    """
    return _OverwritingCrossEntropy.apply(logits_NV, targets_N)


class _OverwritingCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        parts = [_on(logits, _losses)(*part) for part in _chunks(logits.detach(), targets)]
        losses, log_sums = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(logits, targets, log_sums)
        ctx.spent = False
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, None]:
        if ctx.spent:
            raise RuntimeError("the first backward overwrote the logits: compute the losses anew for a second one")
        ctx.spent = True
        logits, targets, log_sums = ctx.saved_tensors
        dlogits = logits.detach()
        for part in _chunks(dlogits, targets, log_sums, dlosses):
            _on(logits, _overwrite)(*part)
        return dlogits, None


def _chunks(logits: Tensor, *of_rows: Tensor) -> zip[tuple[Tensor, ...]]:
    """Views of equally many rows each, as nearly as can be: each number of them is compiled for.

    Rows come in sixteens, so that no chunk begins within 16 bytes, and is copied for it.
    """
    rows, width = logits.shape
    number = max(1, -(-rows * width // _GPU_CHUNK_ELEMENTS))
    size = max(1, -(-rows // (16 * number))) * 16
    return zip(*(x.split(size) for x in (logits, *of_rows)), strict=True)


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    largest = wide.amax(-1, keepdim=True)
    log_sums = (largest + (wide - largest).exp().sum(-1, keepdim=True).log())[:, 0]
    return log_sums - logits.gather(1, targets[:, None])[:, 0].float(), log_sums


def _overwrite(logits: Tensor, targets: Tensor, log_sums: Tensor, dlosses: Tensor) -> None:
    p = (logits.float() - log_sums[:, None]).exp()
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    logits.copy_(torch.where(is_target, p - 1, p) * dlosses[:, None])


def _on(logits: Tensor, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, as one kernel on a GPU, whether blocks are compiled or not."""
    return function if logits.device.type == "cpu" else _compiled(function)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def native_serves(logits: Tensor) -> bool:
    """Whether the compiled kernel takes this."""
    return logits.device.type == "cpu" and logits.dtype == torch.bfloat16 and compiled.library() is not None


def native_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The same, compiled, for BF16 logits. Raises IndexError for a target outside the vocabulary."""
    if targets_N.numel() and not 0 <= int(targets_N.min()) <= int(targets_N.max()) < logits_NV.shape[1]:
        raise IndexError(f"a target is outside the vocabulary of {logits_NV.shape[1]}")
    losses_N, _ = _cross_entropy(logits_NV.contiguous(), targets_N.contiguous())
    return losses_N


@torch.library.custom_op("narrowgauge::cross_entropy", mutates_args=())
def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    kernels = compiled.loaded()
    assert logits.dtype == torch.bfloat16
    assert targets.dtype == torch.int64
    assert logits.ndim == 2
    assert targets.shape == logits.shape[:1]
    losses, log_sums = (torch.empty_like(targets, dtype=torch.float32) for _ in range(2))
    arguments = (logits, targets, losses, log_sums)
    kernels.cross_entropy_forward(*map(native.pointer, arguments), *map(native.size, logits.shape))
    return losses, log_sums


@_cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(targets, dtype=torch.float32), torch.empty_like(targets, dtype=torch.float32)


@torch.library.custom_op("narrowgauge::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(logits: Tensor, targets: Tensor, log_sums: Tensor, dlosses: Tensor) -> Tensor:
    kernels = compiled.loaded()
    assert dlosses.dtype == torch.float32
    assert dlosses.shape == targets.shape
    dlogits = torch.empty_like(logits)
    arguments = (logits, targets, log_sums, dlosses, dlogits)
    kernels.cross_entropy_backward(*map(native.pointer, arguments), *map(native.size, logits.shape))
    return dlogits


@_cross_entropy_backward.register_fake
def _(logits: Tensor, targets: Tensor, log_sums: Tensor, dlosses: Tensor) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dlosses: Tensor, _: Any) -> tuple[Tensor, None]:
    return _cross_entropy_backward(*ctx.saved_tensors, dlosses.contiguous()), None


_cross_entropy.register_autograd(_backward, setup_context=_save)
