"""What Llama and GPT share: attention, blocks, the loss, how a parameter is drawn.

Shape suffixes: B sequences, T positions, C hidden, H heads, K key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .kernels import attention, cross_entropy, documents, pointwise
from .kernels.attention import Rope
from .kernels.documents import KeyBlocks


class Init(NamedTuple):
    """How a parameter starts: normal with this mean and standard deviation (0 = constant)."""

    mean: float
    std: float

    def draw(self, seed: int, name: str, shape: torch.Size) -> Tensor:
        """The full parameter, float32 on the CPU: a pure function of (seed, name, shape).

        Keyed by the name and not by a running generator, so that neither the world size, nor the order of modules,
        nor a layer more or less changes what another parameter gets.
        """
        if self.std == 0.0:
            return torch.full(shape, self.mean)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.empty(shape).normal_(self.mean, self.std, generator=generator)


def require_shape(config: Any, arch: str, *, counts: tuple[str, ...], positive: tuple[str, ...]) -> None:
    """Raises ValueError for a field of a model's config that no model can have."""
    for field in ("hidden_size", "intermediate_size", "num_layers", "num_heads", *counts):
        if getattr(config, field) < 1:
            raise ValueError(f"model.{field}={getattr(config, field)}: must be at least 1")
    if config.arch != arch:
        raise ValueError(f"model.arch={config.arch}: {config.name} is a {arch}; choose another model instead")
    for field in positive:
        if not getattr(config, field) > 0:
            raise ValueError(f"model.{field}={getattr(config, field)}: must be positive")
    if not config.init_std >= 0:
        raise ValueError(f"model.init_std={config.init_std}: must not be negative")


# Beyond this length the probabilities that block attention stores outweigh what it saves (scripts/bench_attention.py).
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


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). [B, T, C] -> [B, T, C]."""

    def __init__(self, norm: Callable[[], nn.Module], self_attn: Attention, mlp: nn.Module) -> None:
        super().__init__()
        self.recompute = False  # activation checkpointing
        self.input_layernorm = norm()
        self.self_attn = self_attn
        self.post_attention_layernorm = norm()
        self.mlp = mlp

    def forward(
        self, x_BTC: Tensor, rope: Rope | None, positions_BT: Tensor | None, blocks: KeyBlocks | None
    ) -> Tensor:
        context = (rope, positions_BT, blocks)
        if self.recompute and self.training:
            return checkpoint(self._forward, x_BTC, *context, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x_BTC, *context)

    def _forward(self, x_BTC: Tensor, *context: Any) -> Tensor:
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), *context)
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))


class Decoder(nn.Module):
    """Tokens [B, T] -> logits [B, T, V]; with targets [B, T] -> losses [B, T] in nats, float32.

    With ``positions_BT``, every token's place in its document, documents of a row neither see nor follow one another.
    """

    config: Any

    def __init__(
        self, config: Any, norm: Callable[[], nn.Module], block: Callable[[], Block], *, learned_positions: int = 0
    ) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary is known once the data is open"
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if learned_positions:
            self.embed_positions = nn.Embedding(learned_positions, config.hidden_size)
        self.layers = nn.ModuleList(block() for _ in range(config.num_layers))
        self.norm = norm()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Rope | None]:
        """What the first block reads, [B, T, C], and the angles by which attention rotates."""
        raise NotImplementedError

    def tie_weights(self) -> None:
        """Let head and embedding share one parameter, if the config says so (materializing a meta model parts them)."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def init_of(self, name: str) -> Init:
        """How the parameter ``name`` starts, as in GPT-2: normal(0, std), residual outputs by 1/sqrt(2 x layers) less,
        norms one, biases zero."""
        std = self.config.init_std
        if name.endswith("bias"):
            return Init(0.0, 0.0)
        if "norm" in name.split(".")[-2]:
            return Init(1.0, 0.0)
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        return Init(0.0, std / math.sqrt(2 * self.config.num_layers) if residual else std)

    def multipliers_of(self, name: str, shape: torch.Size) -> tuple[float, float]:
        """Factors of the learning rate and of the weight decay of the parameter ``name``: vectors do not decay."""
        return 1.0, 1.0 if len(shape) > 1 else 0.0

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        x_BTC, rope = self.embed(tokens_BT, positions_BT)
        blocks = key_blocks(positions_BT, tokens_BT)
        for layer in self.layers:
            x_BTC = layer(x_BTC, rope, positions_BT, blocks)
        logits_BTV = self.lm_head(self.norm(x_BTC))
        return logits_BTV if targets_BT is None else token_losses(logits_BTV, targets_BT)


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of every position in nats, float32, [B, T]. On a GPU backward overwrites the logits."""
    compute = cross_entropy.overwriting_cross_entropy
    if logits_BTV.device.type == "cpu":
        native = cross_entropy.native_serves(logits_BTV)
        compute = cross_entropy.native_cross_entropy if native else cross_entropy.chunked_cross_entropy
    losses_N = compute(logits_BTV.flatten(0, 1), targets_BT.flatten())
    return losses_N.unflatten(0, targets_BT.shape).clone()  # not a view: sharding hooks onto a module's output
