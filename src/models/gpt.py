"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, GELU (tanh form), biases, tied head.

Query, key and value are three linears and every module has the name `transformers` gives it in Llama, so that one
recipe's rules fit both families.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Attention, Block, Decoder, require_shape


@dataclass(kw_only=True)
class GPTConfig:
    """Shape of a GPT-2. ``vocab_size: null`` follows the tokenizer."""

    name: str
    arch: str = "gpt"
    vocab_size: int | None = None
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_seq_len: int = 1024
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init_std: float = 0.02
    init_from: str | None = None  # a `transformers` directory to start from instead of random weights

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def position_limit(self) -> int | None:
        """Longest sequence the model can take."""
        return self.max_seq_len

    def validate(self) -> None:
        """Raises ValueError for a shape no GPT can have."""
        require_shape(self, "gpt", counts=("max_seq_len",), positive=("norm_eps",))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}")


class GeluMLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_BTC), approximate="tanh"))


class GPT(Decoder):
    """A GPT-2."""

    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        norm = partial(nn.LayerNorm, config.hidden_size, eps=config.norm_eps)
        heads = config.num_heads, config.num_heads, config.head_size

        def block() -> Block:
            return Block(norm, Attention(config.hidden_size, *heads, bias=True), GeluMLP(config))

        super().__init__(config, norm, block, learned_positions=config.max_seq_len)

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, None]:
        places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) if positions_BT is None else positions_BT
        return self.embed_tokens(tokens_BT) + self.embed_positions(places), None
