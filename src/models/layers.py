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

from models.kernels.attention import block_attention
from models.kernels.cross_entropy import chunked_cross_entropy, cross_entropy_definition


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


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2): the half-split layout of `transformers`, so weights need no permutation."""
    half = x_BHTD.shape[-1] // 2
    turned = torch.cat((-x_BHTD[..., half:], x_BHTD[..., :half]), dim=-1)
    return x_BHTD * cos_TD + turned * sin_TD


# Beyond this length the probabilities that block attention keeps outweigh what it saves (scripts/bench_attention.py).
BLOCK_ATTENTION_MAX_POSITIONS = 1024


def causal_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D), causal) v. [B, H, T, D]; H is a multiple of K."""
    batch, heads, num_positions, _ = q_BHTD.shape
    groups = heads // k_BKTD.shape[1]
    if q_BHTD.device.type != "cpu" or num_positions > BLOCK_ATTENTION_MAX_POSITIONS:
        return F.scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=groups > 1)
    k_BHTD, v_BHTD = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_BKTD, v_BKTD))
    y_NTD = block_attention(q_BHTD.flatten(0, 1), k_BHTD.flatten(0, 1), v_BHTD.flatten(0, 1))
    return y_NTD.unflatten(0, (batch, heads))


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads (arXiv 2305.13245). [B, T, C] -> [B, T, C]."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)

    def forward(self, x_BTC: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        q_BHTD = self.q_proj(x_BTC).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k_BKTD = self.k_proj(x_BTC).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        v_BKTD = self.v_proj(x_BTC).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if rope is not None:
            q_BHTD, k_BKTD = rotate(q_BHTD, *rope), rotate(k_BKTD, *rope)
        y_BHTD = causal_attention(q_BHTD, k_BKTD, v_BKTD)
        return self.o_proj(y_BHTD.transpose(1, 2).flatten(-2))


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of every position in nats, float32, [B, T]."""
    compute = chunked_cross_entropy if logits_BTV.device.type == "cpu" else cross_entropy_definition
    losses_N = compute(logits_BTV.flatten(0, 1), targets_BT.flatten())
    return losses_N.unflatten(0, targets_BT.shape).clone()  # not a view: sharding hooks onto a module's output
