"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783): RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Modules are named as in `transformers`, so a state dict differs from ``LlamaForCausalLM`` by a prefix only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .kernels.attention import Rope
from .layers import Attention, Block, Decoder, RMSNorm, require_shape, swiglu


@dataclass(kw_only=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary frequencies to a longer context (arXiv 2407.21783; `rope_type: llama3`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(kw_only=True)
class LlamaConfig:
    """Shape of a Llama. ``vocab_size: null`` follows the tokenizer, ``head_dim: null`` is hidden_size / num_heads."""

    name: str
    arch: str = "llama"
    vocab_size: int | None = None
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    max_seq_len: int = 2048  # what an exported config says; rotary positions themselves have no limit
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    init_from: str | None = None  # a `transformers` directory to start from instead of random weights

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def position_limit(self) -> int | None:
        """Longest sequence the model can take; None where there is no limit."""
        return None

    def validate(self) -> None:
        """Raises ValueError for a shape no Llama can have."""
        require_shape(self, "llama", counts=("num_kv_heads",), positive=("rope_theta", "norm_eps"))
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"model.head_dim={self.head_dim}: must be at least 1, or null")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}: "
                "choose a divisor, or set model.head_dim"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}")
        if self.head_size % 2:
            raise ValueError(f"model.head_dim={self.head_size}: rotary positions need an even head size")


def rope_table(config: LlamaConfig, num_positions: int, device: torch.device) -> Rope:
    """The angles of every position. Computed on the fly: a buffer would be state to reset."""
    # Radians per position, float32 [D/2] (RoFormer, arXiv 2104.09864, eq. 15).
    pairs = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device)
    inv_freq = config.rope_theta ** -(pairs / config.head_size)
    if (scaling := config.rope_scaling) is not None:
        wavelength = 2 * math.pi / inv_freq
        low = scaling.original_max_seq_len / scaling.low_freq_factor
        high = scaling.original_max_seq_len / scaling.high_freq_factor
        # Between the two wavelengths the frequency moves smoothly from unscaled (1) to scaled (0).
        smooth = ((low / wavelength - 1) / (low / high - 1)).clamp(0.0, 1.0)
        inv_freq = inv_freq * (smooth + (1 - smooth) / scaling.factor)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), inv_freq)
    return Rope(angles.cos(), angles.sin())


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    gated_activation = "silu"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_BTC), self.up_proj(x_BTC)))


class Llama(Decoder):
    """A Llama."""

    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        norm = partial(RMSNorm, config.hidden_size, eps=config.norm_eps)
        heads = config.num_heads, config.num_kv_heads, config.head_size

        def block() -> Block:
            return Block(norm, Attention(config.hidden_size, *heads, bias=False), SwiGLU(config))

        super().__init__(config, norm, block)

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Rope]:
        x_BTC = self.embed_tokens(tokens_BT)
        return x_BTC, rope_table(self.config, tokens_BT.shape[1], x_BTC.device)
