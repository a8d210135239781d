"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783): RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Modules are named as in `transformers`, so a state dict differs from ``LlamaForCausalLM`` by a prefix only.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .config import DecoderConfig
from .hf import Piece, common, number, require
from .kernels.attention import Rope
from .layers import Attention, Block, Decoder, GatedSiLU, RMSNorm


@dataclass(kw_only=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary frequencies to a longer context (arXiv 2407.21783; `rope_type: llama3`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(kw_only=True)
class LlamaConfig(DecoderConfig):
    """Shape of a Llama. ``head_dim: null`` is hidden_size / num_heads; rotary positions have no limit."""

    arch: str = "llama"
    num_kv_heads: int
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None

    hf_type: ClassVar[str | None] = "llama"

    def build(self) -> Llama:
        return Llama(self)

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    def validate(self) -> None:
        """Raises ValueError for a shape no Llama can have."""
        self.require(counts=("num_kv_heads",), positive=("rope_theta",))
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

    def piece_of(self, name: str) -> Piece:
        """In ``LlamaForCausalLM``, which differs by a prefix."""
        return Piece(name if name.startswith("lm_head.") else f"model.{name}")

    def to_hf(self, end_of_text: int | None, trained_length: int | None) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_type": "default"}
        if (scaling := self.rope_scaling) is not None:
            rope = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
        before_5 = {"rope_theta": self.rope_theta} | ({} if scaling is None else {"rope_scaling": rope})
        return common(self, end_of_text) | {
            "model_type": self.hf_type,
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": trained_length or self.max_seq_len,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": rope | {"rope_theta": self.rope_theta},
            **before_5,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], name: str) -> Self:
        require(values, "hidden_act", "silu", ("silu",))
        require(values, "attention_bias", False, (False,))
        require(values, "mlp_bias", False, (False,))
        rope = values.get("rope_scaling") or values.get("rope_parameters") or {}  # in the order of `transformers` 5
        if not isinstance(rope, dict):
            raise ValueError(f"rope_parameters or rope_scaling is {reprlib.repr(rope)}, not an object")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise ValueError(f"rotary scaling {reprlib.repr(rope_type)} is not built here; there are: default, llama3")
        for where in (values, rope):
            require(where, "partial_rotary_factor", 1.0, (1.0, 1, None))
        scaling = None
        if rope_type == "llama3":
            scaling = RopeScaling(
                factor=number(rope, "factor", kind=float),
                low_freq_factor=number(rope, "low_freq_factor", kind=float),
                high_freq_factor=number(rope, "high_freq_factor", kind=float),
                original_max_seq_len=number(rope, "original_max_position_embeddings"),
            )
        heads = number(values, "num_attention_heads")
        return cls(
            name=name,
            vocab_size=number(values, "vocab_size"),
            hidden_size=number(values, "hidden_size"),
            intermediate_size=number(values, "intermediate_size"),
            num_layers=number(values, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=number(values, "num_key_value_heads", heads),
            head_dim=None if values.get("head_dim") is None else number(values, "head_dim"),
            max_seq_len=number(values, "max_position_embeddings", 2048),
            rope_theta=number(rope, "rope_theta", number(values, "rope_theta", 10_000.0)),
            rope_scaling=scaling,
            norm_eps=number(values, "rms_norm_eps", 1e-6),
            tie_embeddings=require(values, "tie_word_embeddings", False, (True, False)),
        )


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
        self.act = GatedSiLU()
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x_BTC), self.up_proj(x_BTC)))


class Llama(Decoder):
    """A Llama. A model that differs in attention or MLP of a block, numbered from 0, derives from it."""

    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        norm = partial(RMSNorm, config.hidden_size, eps=config.norm_eps)
        super().__init__(config, norm, lambda number: Block(norm, self.make_attention(number), self.make_mlp(number)))

    def make_attention(self, number: int) -> nn.Module:
        config = self.config
        return Attention(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_size, bias=False)

    def make_mlp(self, number: int) -> nn.Module:
        return SwiGLU(self.config)

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Rope]:
        x_BTC = self.embed_tokens(tokens_BT)
        return x_BTC, rope_table(self.config, tokens_BT.shape[1], x_BTC.device)
