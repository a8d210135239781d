"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783): RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Modules are named as in `transformers`, so a state dict differs from ``LlamaForCausalLM`` by a prefix only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .kernels.attention import Rope
from .kernels.documents import KeyBlocks
from .layers import Attention, Init, RMSNorm, init_of, key_blocks, rope_frequencies, swiglu, token_losses


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
        for field in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be at least 1")
        if self.arch != "llama":
            raise ValueError(f"model.arch={self.arch}: {self.name} is a llama; choose another model instead")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"model.head_dim={self.head_dim}: must be at least 1, or null")
        for field in ("rope_theta", "norm_eps"):
            if not getattr(self, field) > 0:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be positive")
        if not self.init_std >= 0:
            raise ValueError(f"model.init_std={self.init_std}: must not be negative")
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
    """The angles of every position. Made on the fly: a buffer would be state to reset."""
    inv_freq = rope_frequencies(config.head_size, config.rope_theta, device)
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


class LlamaBlock(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.recompute = False  # activation checkpointing
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_size, bias=False
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x_BTC: Tensor, rope: Rope, positions_BT: Tensor | None, blocks: KeyBlocks | None) -> Tensor:
        context = (rope, positions_BT, blocks)
        if self.recompute and self.training:
            return checkpoint(self._forward, x_BTC, *context, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x_BTC, *context)

    def _forward(self, x_BTC: Tensor, rope: Rope, positions_BT: Tensor | None, blocks: KeyBlocks | None) -> Tensor:
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), rope, positions_BT, blocks)
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))


class Llama(nn.Module):
    """Tokens [B, T] -> logits [B, T, V]; with targets [B, T] -> losses [B, T] in nats, float32.

    With ``positions_BT``, every token's place in its document, documents of a row neither see nor follow one another.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary is known once the data is open"
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let head and embedding share one parameter, if the config says so (materializing a meta model parts them)."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def init_of(self, name: str) -> Init:
        """How the parameter ``name`` starts."""
        return init_of(name, std=self.config.init_std, num_layers=self.config.num_layers)

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        x_BTC = self.embed_tokens(tokens_BT)
        rope = rope_table(self.config, tokens_BT.shape[1], x_BTC.device)
        blocks = key_blocks(positions_BT, tokens_BT)
        for layer in self.layers:
            x_BTC = layer(x_BTC, rope, positions_BT, blocks)
        logits_BTV = self.lm_head(self.norm(x_BTC))
        return logits_BTV if targets_BT is None else token_losses(logits_BTV, targets_BT)
