"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, GELU (tanh form), biases, tied head.

Query, key and value are three linears and every module has the name `transformers` gives it in Llama, so that one
recipe's rules fit both families.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .kernels.documents import KeyBlocks
from .layers import Attention, Init, init_of, key_blocks, token_losses


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
        for field in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "max_seq_len"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be at least 1")
        if self.arch != "gpt":
            raise ValueError(f"model.arch={self.arch}: {self.name} is a gpt; choose another model instead")
        if not self.norm_eps > 0:
            raise ValueError(f"model.norm_eps={self.norm_eps}: must be positive")
        if not self.init_std >= 0:
            raise ValueError(f"model.init_std={self.init_std}: must not be negative")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}")


class GeluMLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_BTC), approximate="tanh"))


class GPTBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.recompute = False  # activation checkpointing
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config.hidden_size, config.num_heads, config.num_heads, config.head_size, bias=True)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GeluMLP(config)

    def forward(self, x_BTC: Tensor, positions_BT: Tensor | None, blocks: KeyBlocks | None) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(self._forward, x_BTC, positions_BT, blocks, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x_BTC, positions_BT, blocks)

    def _forward(self, x_BTC: Tensor, positions_BT: Tensor | None, blocks: KeyBlocks | None) -> Tensor:
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), None, positions_BT, blocks)
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))


class GPT(nn.Module):
    """Tokens [B, T] -> logits [B, T, V]; with targets [B, T] -> losses [B, T] in nats, float32.

    With ``positions_BT``, every token's place in its document, documents of a row neither see nor follow one another.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary is known once the data is open"
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.layers = nn.ModuleList(GPTBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
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
        places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) if positions_BT is None else positions_BT
        x_BTC = self.embed_tokens(tokens_BT) + self.embed_positions(places)
        blocks = key_blocks(positions_BT, tokens_BT)
        for layer in self.layers:
            x_BTC = layer(x_BTC, positions_BT, blocks)
        logits_BTV = self.lm_head(self.norm(x_BTC))
        return logits_BTV if targets_BT is None else token_losses(logits_BTV, targets_BT)
