"""Cross-entropy over a vocabulary in chunks of rows, for CPUs.

The definition makes three float32 tensors of the logits' size, in memory that a CPU has to fault in and write through.
Here a chunk of rows is turned into float32, reduced and forgotten; backward makes the gradient chunk by chunk too, in
the logits' dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

_CHUNK_ELEMENTS = 1 << 19  # 2 MB in float32: stays in a core's cache


def cross_entropy_definition(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log softmax(logits)[target], in nats, float32 [N]: what ``chunked_cross_entropy`` computes."""
    return cross_entropy(logits_NV.float(), targets_N, reduction="none")


def chunked_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The same, with float32 inside whatever the logits are."""
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
