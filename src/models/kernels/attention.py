"""Causal attention over blocks of queries, for CPUs.

torch's fused CPU attention spends most of its time in backward. Here each block of queries meets only the keys before
its end, as batched matrix products and a softmax; backward adds into the gradients of keys and values in place, where
autograd would make a whole zero-filled tensor for every block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 128


def attention_definition(q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D), causal) v: what ``block_attention`` computes."""
    num_positions = q_NTD.shape[1]
    scores_NTT = (q_NTD * q_NTD.shape[-1] ** -0.5) @ k_NTD.mT
    future_TT = torch.ones(num_positions, num_positions, dtype=torch.bool, device=q_NTD.device).triu(1)
    return scores_NTT.masked_fill(future_TT, -torch.inf).softmax(-1) @ v_NTD


def block_attention(q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor) -> Tensor:
    """Causal attention of N independent heads, [N, T, D] each. Keeps the probabilities for backward: N*T*T/2 values."""
    return _BlockAttention.apply(q_NTD, k_NTD, v_NTD)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_positions, head_dim = q.shape[1:]
        q = q * head_dim**-0.5
        mask = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
        y = torch.empty_like(q)
        probabilities = []
        for start in range(0, num_positions, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, num_positions)
            scores = torch.bmm(q[:, start:stop], k[:, :stop].mT)
            scores[:, :, start:] += mask[: stop - start, : stop - start]  # only the diagonal block is masked
            p = scores.softmax(-1)
            y[:, start:stop] = torch.bmm(p, v[:, :stop])
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *probabilities = ctx.saved_tensors
        num_positions, head_dim = q.shape[1:]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block, p in enumerate(probabilities):
            start, stop = block * QUERY_BLOCK, min((block + 1) * QUERY_BLOCK, num_positions)
            dy_block = dy[:, start:stop]
            dp = torch.bmm(dy_block, v[:, :stop].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, start:stop] = torch.bmm(ds, k[:, :stop])
            dk[:, :stop] += torch.bmm(ds.mT, q[:, start:stop])
            dv[:, :stop] += torch.bmm(p.mT, dy_block)
        return dq.mul_(head_dim**-0.5), dk, dv
