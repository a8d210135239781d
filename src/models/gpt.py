"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, GELU (tanh form), biases, tied head.

Query, key and value are three linears and every module has the name `transformers` gives it in Llama, so that one
recipe's rules fit both families.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DecoderConfig
from .hf import Piece, common, number, require
from .layers import Attention, Block, Decoder

_TOP = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}
_BLOCK = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


@dataclass(kw_only=True)
class GPTConfig(DecoderConfig):
    """Shape of a GPT-2."""

    arch: str = "gpt"
    max_seq_len: int = 1024
    tie_embeddings: bool = True

    hf_type: ClassVar[str | None] = "gpt2"

    def build(self) -> GPT:
        return GPT(self)

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def position_limit(self) -> int | None:
        return self.max_seq_len

    def validate(self) -> None:
        """Raises ValueError for a shape no GPT can have."""
        self.require(counts=("max_seq_len",))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}")

    def piece_of(self, name: str) -> Piece:
        """In ``GPT2LMHeadModel``: weights are [in, out], and query, key and value one matrix."""
        if name.startswith("lm_head."):
            return Piece(name)
        if (match := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)) is None:
            module, _, kind = name.rpartition(".")
            return Piece(f"transformer.{_TOP[module]}.{kind}")
        layer, module, kind = match.groups()
        hf_name = f"transformer.h.{layer}.{_BLOCK[module]}.{kind}"
        third = {"q_proj": 0, "k_proj": 1, "v_proj": 2}.get(module.rpartition(".")[2])
        return Piece(hf_name, transposed=kind == "weight" and "proj" in module, third=third)

    def to_hf(self, end_of_text: int | None, trained_length: int | None) -> dict[str, Any]:
        return common(self, end_of_text) | {
            "model_type": self.hf_type,
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": self.max_seq_len,
            "n_embd": self.hidden_size,
            "n_inner": self.intermediate_size,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "layer_norm_epsilon": self.norm_eps,
            "activation_function": "gelu_new",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], name: str) -> Self:
        require(values, "activation_function", "gelu_new", ("gelu_new", "gelu_pytorch_tanh"))
        require(values, "scale_attn_by_inverse_layer_idx", False, (False,))
        require(values, "scale_attn_weights", True, (True,))
        require(values, "add_cross_attention", False, (False,))
        width = number(values, "n_embd")
        return cls(
            name=name,
            vocab_size=number(values, "vocab_size"),
            hidden_size=width,
            intermediate_size=number(values, "n_inner", 4 * width),
            num_layers=number(values, "n_layer"),
            num_heads=number(values, "n_head"),
            max_seq_len=number(values, "n_positions", 1024),
            norm_eps=number(values, "layer_norm_epsilon", 1e-5),
            tie_embeddings=require(values, "tie_word_embeddings", True, (True, False)),
        )


class Gelu(nn.Module):
    """gelu(x) in its tanh form (arXiv 1606.08415). Without parameters: a rule may put another in its place."""

    activation = "gelu_tanh"

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class GeluMLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = Gelu()
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x_BTC)))


class GPT(Decoder):
    """A GPT-2."""

    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        norm = partial(nn.LayerNorm, config.hidden_size, eps=config.norm_eps)
        heads = config.num_heads, config.num_heads, config.head_size

        def block(number: int) -> Block:
            return Block(norm, Attention(config.hidden_size, *heads, bias=True), GeluMLP(config))

        super().__init__(config, norm, block, learned_positions=config.max_seq_len)

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, None]:
        places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) if positions_BT is None else positions_BT
        return self.embed_tokens(tokens_BT) + self.embed_positions(places), None
