"""Attention within documents for GPUs: torch's block-sparse kernel (FlexAttention), so that no T x T mask is built.

What is stored of a mask are the 128 x 128 blocks that hold something to see, found from positions on the device without
a read by the host, once a batch for all layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # FlexAttention's own size of a block


class KeyBlocks(NamedTuple):
    """Which blocks of keys a block of queries meets, and the other way round, for backward.

    N blocks a row, every field int32 [B, 1, N] (how many) or [B, 1, N, N] (which, the rest is padding), but ``starts``,
    int32 [B, T]: where in its row the document of a token begins. Full blocks are seen completely, by every query.
    """

    starts: Tensor
    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


def key_blocks(starts_BT: Tensor) -> KeyBlocks:
    """The blocks of a causal mask within documents that begin at ``starts_BT``, int64 [B, T]."""
    num_positions = starts_BT.shape[1]
    num_blocks = -(-num_positions // BLOCK)
    # Queries beyond the row see nothing, so that a ragged block of them meets no block unmasked.
    padded_BP = F.pad(starts_BT, (0, num_blocks * BLOCK - num_positions), value=num_blocks * BLOCK)
    starts_BNQ = padded_BP.unflatten(1, (num_blocks, BLOCK))
    blocks_N = torch.arange(num_blocks, device=starts_BT.device)
    before_NN = blocks_N < blocks_N[:, None]
    seen_BNN = (blocks_N >= starts_BNQ.amin(-1, keepdim=True) // BLOCK) & (blocks_N <= blocks_N[:, None])
    full_BNN = (blocks_N * BLOCK >= starts_BNQ.amax(-1, keepdim=True)) & before_NN
    partial_BNN = seen_BNN & ~full_BNN
    ways = (partial_BNN, full_BNN, partial_BNN.mT, full_BNN.mT)
    return KeyBlocks(starts_BT.to(torch.int32), *(part for dense in ways for part in _ordered(dense)))


def _ordered(dense_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many are True in a row, and where: those first, in their order."""
    dense_B1NN = dense_BNN[:, None].to(torch.int32)
    order = dense_B1NN.argsort(dim=-1, descending=True, stable=True)
    return dense_B1NN.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def document_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, blocks: KeyBlocks) -> Tensor:
    """softmax(q k^T / sqrt(D), causal, within a document) v, [B, H, T, E]; H is a multiple of K."""
    starts_BT, *tables = blocks

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts_BT[batch, query])

    num_positions = q_BHTD.shape[2]
    mask = BlockMask(
        seq_lengths=(num_positions, num_positions),
        **dict(zip(KeyBlocks._fields[1:], tables, strict=True)),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )
    attend = flex_attention if q_BHTD.device.type == "cpu" or torch.compiler.is_compiling() else _compiled()
    return attend(q_BHTD, k_BKTD, v_BKTE, block_mask=mask, enable_gqa=q_BHTD.shape[1] != k_BKTD.shape[1])


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention as a kernel: called as it is, it computes all T x T scores."""
    return torch.compile(flex_attention)
