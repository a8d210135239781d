"""Causal attention for CPUs, where torch's fused kernel spends most of its time in backward.

Two forms of one function, softmax(rotate(q) rotate(k)^T / sqrt(D), causal, within a document) v: ``block_attention``
is batched matrix products over blocks of queries, for any dtype; ``native_attention`` is the compiled BF16 kernel,
which rotates, transposes and never stores probabilities.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import native
from . import compiled

QUERY_BLOCK = 128
# Beyond this length the probabilities that block attention stores outweigh what it saves (scripts/bench_attention.py).
BLOCK_ATTENTION_MAX_POSITIONS = 1024
_MAX_HEAD_DIM = 128


class Rope(NamedTuple):
    """Angles of rotary positions (arXiv 2104.09864): cos and sin, float32 [P, D/2], a row a position."""

    cos_PE: Tensor
    sin_PE: Tensor


def rotate(x_BTHD: Tensor, rope: Rope, positions_BT: Tensor | None = None) -> Tensor:
    """Rotate the pairs (i, i + D/2), the half-split layout of `transformers`; one rounding to the dtype of ``x``."""
    angles = (part[: x_BTHD.shape[1]] if positions_BT is None else part[positions_BT] for part in rope)
    cos, sin = (part.unsqueeze(-2) for part in angles)
    first, second = x_BTHD.to(torch.promote_types(x_BTHD.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHD.dtype)


def starts_of(positions_BT: Tensor) -> Tensor:
    """Where in its row the document of every token begins, int64 [B, T]."""
    return torch.arange(positions_BT.shape[1], device=positions_BT.device) - positions_BT


def visible_keys(num_positions: int, starts_NT: Tensor | None, device: torch.device) -> Tensor:
    """Which keys a query may see: True where key <= query and key >= its document's start. [T, T] or [N, T, T]."""
    places = torch.arange(num_positions, device=device)
    visible_TT = places <= places[:, None]
    return visible_TT if starts_NT is None else visible_TT & (places >= starts_NT[..., None])


def block_attention(q_NTD: Tensor, k_NTD: Tensor, v_NTE: Tensor, starts_NT: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D), masked) v of N heads, [N, T, E]. Saves the probabilities for backward: N*T*T/2."""
    return _BlockAttention.apply(q_NTD, k_NTD, v_NTE, starts_NT)


class _BlockAttention(torch.autograd.Function):
    """Each block of queries meets only the keys before its end; backward adds into dk and dv in place."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> Tensor:
        num_positions, head_dim = q.shape[1:]
        q = q * head_dim**-0.5
        mask = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
        y = q.new_empty((*q.shape[:2], v.shape[-1]))
        probabilities = []
        for start in range(0, num_positions, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, num_positions)
            scores = torch.bmm(q[:, start:stop], k[:, :stop].mT)
            scores[:, :, start:] += mask[: stop - start, : stop - start]  # only the diagonal block is masked
            if starts is not None:
                places = torch.arange(stop, device=q.device)
                scores.masked_fill_(places < starts[:, start:stop, None], -torch.inf)
            p = scores.softmax(-1)
            y[:, start:stop] = torch.bmm(p, v[:, :stop])
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
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
        return dq.mul_(head_dim**-0.5), dk, dv, None


def native_serves(q_BTHD: Tensor, v_BTKE: Tensor) -> bool:
    """Whether the compiled kernel takes this: heads of q, k and v are of one width."""
    if v_BTKE.shape[-1] != q_BTHD.shape[-1]:
        return False
    fits = q_BTHD.dtype == torch.bfloat16 and q_BTHD.shape[-1] <= _MAX_HEAD_DIM and q_BTHD.shape[-1] % 2 == 0
    return q_BTHD.device.type == "cpu" and fits and compiled.has_attention()


def native_attention(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    rope: Rope | None = None,
    positions_BT: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> Tensor:
    """Rotation and attention in one kernel, [B, T, H, D]; H is a multiple of K. Keeps log sums for backward: B*T*H.

    ``positions_BT``: the angles of every token; ``starts_BT``: the first token it sees.
    """
    cos, sin = (None, None) if rope is None else (part.float().contiguous() for part in rope)
    shape = q_BTHD.shape[:2]
    positions_BT, starts_BT = (
        None if x is None else x.to(torch.int64).expand(shape).contiguous() for x in (positions_BT, starts_BT)
    )
    if positions_BT is not None and int(positions_BT.min()) < 0:
        raise ValueError("a position in a document is negative")
    if rope is not None:
        needed = q_BTHD.shape[1] if positions_BT is None else 1 + int(positions_BT.max())
        if rope.cos_PE.shape[0] < needed or rope.cos_PE.shape[1] * 2 != q_BTHD.shape[-1]:
            shape = list(rope.cos_PE.shape)
            raise ValueError(f"angles of shape {shape} for {needed} positions of heads of {q_BTHD.shape[-1]}")
    y_BTHD, _ = _attention(
        q_BTHD.contiguous(), k_BTKD.contiguous(), v_BTKD.contiguous(), cos, sin, positions_BT, starts_BT
    )
    return y_BTHD


def _sizes(q: Tensor, k: Tensor) -> list[Any]:
    batch, length, heads, head_dim = q.shape
    return [native.size(value) for value in (batch, length, heads, k.shape[2], head_dim)]


def _check(q: Tensor, k: Tensor, v: Tensor, *like_q: Tensor) -> None:
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert k.shape == v.shape
    assert k.shape[:2] == q.shape[:2]
    assert k.shape[3] == q.shape[3]
    assert q.shape[2] % k.shape[2] == 0
    assert q.shape[3] <= _MAX_HEAD_DIM
    assert all(x.shape == q.shape and x.dtype == q.dtype for x in like_q)


@torch.library.custom_op("narrowgauge::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    kernels = compiled.loaded()
    _check(q, k, v)
    y, log_sums = torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    arguments = (q, k, v, cos, sin, positions, starts, y, log_sums)
    kernels.attention_forward(*map(native.pointer, arguments), *_sizes(q, k))
    return y, log_sums


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("narrowgauge::attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    starts: Tensor | None,
    y: Tensor,
    log_sums: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = compiled.loaded()
    _check(q, k, v, y, dy)
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    arguments = (q, k, v, cos, sin, positions, starts, y, log_sums, dy, *gradients)
    kernels.attention_backward(*map(native.pointer, arguments), *_sizes(q, k))
    return gradients


@_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_attention_backward(*ctx.saved_tensors, dy.contiguous()), None, None, None, None


_attention.register_autograd(_backward, setup_context=_save)
