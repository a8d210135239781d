"""What Llama and GPT share: attention, rotary positions, the loss, how a parameter is drawn.

Shape suffixes: B sequences, T positions, C hidden, H heads, K key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import attention, cross_entropy, documents, pointwise
from .kernels.attention import Rope
from .kernels.documents import KeyBlocks


class Init(NamedTuple):
    """How a parameter starts: normal with this mean and standard deviation (0 = constant)."""

    mean: float
    std: float

    def draw(self, seed: int, name: str, shape: torch.Size) -> Tensor:
        """The whole parameter, float32 on the CPU: a pure function of (seed, name, shape).

        Keyed by the name and not by a running generator, so that neither the world size, nor the order of modules,
        nor a layer more or less changes what another parameter gets.
        """
        if self.std == 0.0:
            return torch.full(shape, self.mean)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.empty(shape).normal_(self.mean, self.std, generator=generator)


def init_of(name: str, *, std: float, num_layers: int) -> Init:
    """The GPT-2 rule: normal(0, std), residual outputs by 1/sqrt(2 x layers) less, norms one, biases zero."""
    if name.endswith("bias"):
        return Init(0.0, 0.0)
    if "norm" in name.split(".")[-2]:
        return Init(1.0, 0.0)
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return Init(0.0, std / math.sqrt(2 * num_layers) if residual else std)


def rope_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Rotary frequencies (float32, [D/2]) in radians per position (RoFormer, arXiv 2104.09864, eq. 15)."""
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


# Beyond this length the probabilities that block attention keeps outweigh what it saves (scripts/bench_attention.py).
BLOCK_ATTENTION_MAX_POSITIONS = 1024


def key_blocks(positions_BT: Tensor | None, tokens_BT: Tensor) -> KeyBlocks | None:
    """What attention on a GPU makes of positions, once for all layers; None where it makes nothing of them."""
    if positions_BT is None or tokens_BT.device.type == "cpu":
        return None
    # A window may begin in the middle of a document.
    return documents.key_blocks(attention.starts_of(positions_BT).clamp(min=0).expand(tokens_BT.shape))


def causal_attention(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    rope: Rope | None = None,
    positions_BT: Tensor | None = None,
    blocks: KeyBlocks | None = None,
) -> Tensor:
    """softmax(rotate(q) rotate(k)^T / sqrt(D), causal) v, [B, T, H, D]; H is a multiple of K.

    ``positions_BT``: the place of every token in its document; a token then sees its own document only. On a GPU
    ``blocks`` are what ``key_blocks`` makes of them.
    """
    if blocks is None and attention.native_serves(q_BTHD):
        return attention.native_attention(q_BTHD, k_BTKD, v_BTKD, rope, positions_BT)
    if q_BTHD.device.type == "cpu" and q_BTHD.dtype == torch.float16:  # whose products torch makes in a scalar loop
        wide = (x.float() for x in (q_BTHD, k_BTKD, v_BTKD))
        return causal_attention(*wide, rope, positions_BT).to(torch.float16)
    if rope is not None:
        q_BTHD, k_BTKD = (attention.rotate(x, rope, positions_BT) for x in (q_BTHD, k_BTKD))
    batch, num_positions, heads, _ = q_BTHD.shape
    groups = heads // k_BTKD.shape[2]
    q_BHTD, k_BKTD, v_BKTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    if blocks is not None:
        return documents.document_attention(q_BHTD, k_BKTD, v_BKTD, blocks).transpose(1, 2)
    starts_BT = None if positions_BT is None else attention.starts_of(positions_BT)
    if q_BTHD.device.type != "cpu" or num_positions > BLOCK_ATTENTION_MAX_POSITIONS:
        if groups > 1 and q_BTHD.dtype == torch.float32 and q_BTHD.device.type != "cpu":
            # What torch has for groups in float32 on a GPU computes all T x T scores.
            k_BKTD, v_BKTD = (x.repeat_interleave(groups, dim=1) for x in (k_BKTD, v_BKTD))
            groups = 1
        mask = None if starts_BT is None else attention.visible_keys(num_positions, starts_BT, q_BTHD.device)[:, None]
        y_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BKTD, v_BKTD, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1
        )
        return y_BHTD.transpose(1, 2)
    k_BHTD, v_BHTD = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_BKTD, v_BKTD))
    starts_NT = None if starts_BT is None else starts_BT.repeat_interleave(heads, dim=0)
    y_NTD = attention.block_attention(*(x.flatten(0, 1) for x in (q_BHTD, k_BHTD, v_BHTD)), starts_NT)
    return y_NTD.unflatten(0, (batch, heads)).transpose(1, 2)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    compute = pointwise.native_swiglu if pointwise.native_serves(gate, up) else pointwise.swiglu_definition
    return compute(gate, up)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        native = pointwise.native_serves(x, self.weight)
        return (pointwise.native_rms_norm if native else pointwise.rms_norm_definition)(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads (arXiv 2305.13245). [B, T, C] -> [B, T, C]."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)

    def forward(
        self, x_BTC: Tensor, rope: Rope | None, positions_BT: Tensor | None, blocks: KeyBlocks | None = None
    ) -> Tensor:
        q_BTHD = self.q_proj(x_BTC).unflatten(-1, (-1, self.head_dim))
        k_BTKD = self.k_proj(x_BTC).unflatten(-1, (-1, self.head_dim))
        v_BTKD = self.v_proj(x_BTC).unflatten(-1, (-1, self.head_dim))
        return self.o_proj(causal_attention(q_BTHD, k_BTKD, v_BTKD, rope, positions_BT, blocks).flatten(-2))


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of every position in nats, float32, [B, T]. On a GPU backward overwrites the logits."""
    compute = cross_entropy.overwriting_cross_entropy
    if logits_BTV.device.type == "cpu":
        native = cross_entropy.native_serves(logits_BTV)
        compute = cross_entropy.native_cross_entropy if native else cross_entropy.chunked_cross_entropy
    losses_N = compute(logits_BTV.flatten(0, 1), targets_BT.flatten())
    return losses_N.unflatten(0, targets_BT.shape).clone()  # not a view: sharding hooks onto a module's output
