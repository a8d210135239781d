"""What decoders share: attention, blocks, the loss, how a parameter is drawn.

Shape suffixes: B sequences, T positions, C hidden, H heads, K key-value heads, D size of a head of q and k, E of v,
V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .kernels import attention, cross_entropy, documents, pointwise
from .kernels.attention import BLOCK_ATTENTION_MAX_POSITIONS, Rope
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


class Places(NamedTuple):
    """Where the tokens of a batch stand, once for all layers.

    ``positions_BT``: the place of every token that it is rotated by; None: in order. ``starts_BT``: where in its row
    its document begins, before which it sees nothing; None: a row is one document. On a GPU ``blocks`` is what
    ``key_blocks`` makes of ``starts_BT``.
    """

    positions_BT: Tensor | None = None
    starts_BT: Tensor | None = None
    blocks: KeyBlocks | None = None


NOWHERE = Places()


def places_of(positions_BT: Tensor | None, tokens_BT: Tensor) -> Places:
    """``positions_BT``: every token's place in its document; None, where documents are not kept apart."""
    if positions_BT is None:
        return NOWHERE
    # A window may begin in the middle of a document.
    starts_BT = attention.starts_of(positions_BT).clamp(min=0).expand(tokens_BT.shape)
    return Places(positions_BT, starts_BT, key_blocks(starts_BT))


def key_blocks(starts_BT: Tensor) -> KeyBlocks | None:
    """What attention on a GPU makes of documents; None where it makes nothing of them."""
    return None if starts_BT.device.type == "cpu" else documents.key_blocks(starts_BT)


def causal_attention(
    q_BTHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, rope: Rope | None = None, places: Places = NOWHERE
) -> Tensor:
    """softmax(rotate(q) rotate(k)^T / sqrt(D), causal, within a document) v, [B, T, H, E]; H is a multiple of K."""
    positions_BT, starts_BT, blocks = places
    if blocks is None and attention.native_serves(q_BTHD, v_BTKE):
        return attention.native_attention(q_BTHD, k_BTKD, v_BTKE, rope, positions_BT, starts_BT)
    if q_BTHD.device.type == "cpu" and q_BTHD.dtype == torch.float16:  # whose products torch makes in a scalar loop
        q_wide, k_wide, v_wide = (x.float() for x in (q_BTHD, k_BTKD, v_BTKE))
        return causal_attention(q_wide, k_wide, v_wide, rope, places).to(torch.float16)
    if rope is not None:
        q_BTHD, k_BTKD = (attention.rotate(x, rope, positions_BT) for x in (q_BTHD, k_BTKD))
    batch, num_positions, heads, _ = q_BTHD.shape
    groups = heads // k_BTKD.shape[2]
    q_BHTD, k_BKTD, v_BKTE = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKE))
    if blocks is not None:
        return documents.document_attention(q_BHTD, k_BKTD, v_BKTE, blocks).transpose(1, 2)
    if q_BTHD.device.type != "cpu" or num_positions > BLOCK_ATTENTION_MAX_POSITIONS:
        if groups > 1 and q_BTHD.dtype == torch.float32 and q_BTHD.device.type != "cpu":
            # What torch has for groups in float32 on a GPU computes all T x T scores.
            k_BKTD, v_BKTE = (x.repeat_interleave(groups, dim=1) for x in (k_BKTD, v_BKTE))
            groups = 1
        mask = None if starts_BT is None else attention.visible_keys(num_positions, starts_BT, q_BTHD.device)[:, None]
        y_BHTE = F.scaled_dot_product_attention(
            q_BHTD, k_BKTD, v_BKTE, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1
        )
        return y_BHTE.transpose(1, 2)
    k_BHTD, v_BHTE = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_BKTD, v_BKTE))
    starts_NT = None if starts_BT is None else starts_BT.repeat_interleave(heads, dim=0)
    y_NTE = attention.block_attention(*(x.flatten(0, 1) for x in (q_BHTD, k_BHTD, v_BHTE)), starts_NT)
    return y_NTE.unflatten(0, (batch, heads)).transpose(1, 2)


class CausalAttention(nn.Module):
    """``causal_attention`` as a module without parameters: a recipe's rule may put another in its place."""

    def forward(
        self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, rope: Rope | None = None, places: Places = NOWHERE
    ) -> Tensor:
        return causal_attention(q_BTHD, k_BTKD, v_BTKE, rope, places)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    compute = pointwise.native_swiglu if pointwise.native_serves(gate, up) else pointwise.swiglu_definition
    return compute(gate, up)


class GatedSiLU(nn.Module):
    """``swiglu`` as a module without parameters: a recipe's rule may put another in its place."""

    activation = "silu"

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate, up)


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
        self.core = CausalAttention()
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)

    def forward(self, x_BTC: Tensor, rope: Rope | None = None, places: Places = NOWHERE) -> Tensor:
        q_BTHD = self.q_proj(x_BTC).unflatten(-1, (-1, self.head_dim))
        k_BTKD = self.k_proj(x_BTC).unflatten(-1, (-1, self.head_dim))
        v_BTKD = self.v_proj(x_BTC).unflatten(-1, (-1, self.head_dim))
        return self.o_proj(self.core(q_BTHD, k_BTKD, v_BTKD, rope, places).flatten(-2))


class Extras(NamedTuple):
    """What a part of a model gives beside its output.

    ``aux``: auxiliary losses by name, float32 [B, T], one for each token: the training loop weights and divides each
    as the loss of that token, adds it to what backward sees, and logs its mean apart. ``counts``: tensors by name,
    without gradients, that the loop adds up over the global batch.
    """

    aux: dict[str, Tensor]
    counts: dict[str, Tensor]


class Losses(NamedTuple):
    """What a model with auxiliary losses or counts gives for targets: the loss of every token, [B, T], and those."""

    losses_BT: Tensor
    aux: dict[str, Tensor]
    counts: dict[str, Tensor]


Counts = Mapping[str, Tensor]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). [B, T, C] -> [B, T, C].

    An MLP that returns (y, ``Extras``) has the block return (x, ``Extras``). It is called with a second argument where
    the block is given ``counts``: what it counted, over the global batch.
    """

    def __init__(self, norm: Callable[[], nn.Module], self_attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.recompute = False  # activation checkpointing
        self.input_layernorm = norm()
        self.self_attn = self_attn
        self.post_attention_layernorm = norm()
        self.mlp = mlp

    def forward(
        self, x_BTC: Tensor, rope: Rope | None = None, places: Places = NOWHERE, counts: Counts | None = None
    ) -> Tensor | tuple[Tensor, Extras]:
        context = (rope, places, counts)
        if self.recompute and self.training:
            # Counts are returned, not kept by a module: what is computed again counts once.
            return checkpoint(self._forward, x_BTC, *context, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x_BTC, *context)

    def _forward(
        self, x_BTC: Tensor, rope: Rope | None, places: Places, counts: Counts | None
    ) -> Tensor | tuple[Tensor, Extras]:
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), rope, places)
        h_BTC = self.post_attention_layernorm(x_BTC)
        y = self.mlp(h_BTC) if counts is None else self.mlp(h_BTC, counts)
        if isinstance(y, tuple):
            y, extras = y
            aux = {name: loss_BT.clone() for name, loss_BT in extras.aux.items()}  # no view: see ``token_losses``
            return x_BTC + y, Extras(aux, extras.counts)
        return x_BTC + y


class Decoder(nn.Module):
    """Tokens [B, T] -> logits [B, T, V]; with targets [B, T] -> losses [B, T] in nats, float32, or ``Losses``.

    With ``positions_BT``, every token's place in its document, documents of a row neither see nor follow one another.
    A model with counts is told of them by ``after_step``.
    """

    config: Any
    counts_first: ClassVar[bool] = False
    """Whether auxiliary losses are made of the counts of the current global batch. A step then begins with a forward
    pass of all its micro-batches without gradients, which counts; ``forward`` is then given the sums."""

    def __init__(
        self,
        config: Any,
        norm: Callable[[], nn.Module],
        block: Callable[[int], nn.Module],
        *,
        learned_positions: int = 0,
    ) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary is known once the data is open"
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if learned_positions:
            self.embed_positions = nn.Embedding(learned_positions, config.hidden_size)
        self.layers = nn.ModuleList(block(number) for number in range(config.num_layers))
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

    def reset_state(self) -> None:
        """Set buffers to zero, but those of modules that have a ``reset_state`` of their own, which is called, too.

        Raises ValueError for a buffer that is not persistent: nothing would set it again.
        """
        for path, module in self.named_modules():
            if module is self or not hasattr(module, "reset_state"):
                for name, buffer in module._buffers.items():
                    if buffer is None:
                        continue
                    if name in module._non_persistent_buffers_set:
                        raise ValueError(
                            f"the buffer {path}{'.' * bool(path)}{name} is not persistent, and {type(module).__name__} "
                            "has no reset_state that sets it: compute it in the forward pass"
                        )
                    buffer.zero_()

    def after_step(self, counts: Counts) -> None:
        """After an update that was applied; ``counts``: of the global batch, by "layers.N.NAME".

        May write buffers, in place, and nothing else: where a device decides, what was written is undone if the update
        was not applied.
        """

    def weights_per_token(self) -> int:
        """Weights of the matrix products that a token meets, the head's included: all that are matrices."""
        products = (each for each in self.modules() if not isinstance(each, nn.Embedding))
        return sum(
            each.weight.numel()
            for each in products
            if isinstance(getattr(each, "weight", None), nn.Parameter) and each.weight.ndim == 2
        )

    def flops_per_token(self, seq_len: int) -> float:
        """Of training, every product counted once: 6 N + 12 L d T (arXiv 2204.02311, appendix B).

        N: ``weights_per_token``; L: blocks; d: width of attention, all heads; T: ``seq_len``. What causality saves and
        what is computed again do not change it.
        """
        config = self.config
        heads = config.num_layers * config.num_heads * config.head_size
        return float(6 * self.weights_per_token() + 12 * heads * seq_len)

    def run_blocks(
        self, x_BTC: Tensor, rope: Rope | None, places: Places, counts: Counts | None = None
    ) -> tuple[Tensor, Extras | None]:
        """All blocks, and what they gave beside: auxiliary losses of one name added up, counts by "layers.N.NAME"."""
        extras: Extras | None = None
        for number, layer in enumerate(self.layers):
            own = {} if counts is None else _of_block(counts, f"layers.{number}.")
            y = layer(x_BTC, rope, places, own) if own else layer(x_BTC, rope, places)
            if isinstance(y, tuple):
                y, more = y
                extras = extras or Extras({}, {})
                for name, loss_BT in more.aux.items():
                    extras.aux[name] = extras.aux[name] + loss_BT if name in extras.aux else loss_BT
                extras.counts.update({f"layers.{number}.{name}": count for name, count in more.counts.items()})
            x_BTC = y
        return x_BTC, extras

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        *,
        counts: Counts | None = None,
        counting: bool = False,
    ) -> Tensor | Losses | Counts:
        """``counts``: of the global batch, where ``counts_first``. ``counting``: give those of this batch alone."""
        x_BTC, rope = self.embed(tokens_BT, positions_BT)
        x_BTC, extras = self.run_blocks(x_BTC, rope, places_of(positions_BT, tokens_BT), counts)
        if counting:
            return {} if extras is None else extras.counts
        logits_BTV = self.lm_head(self.norm(x_BTC))
        if targets_BT is None:
            return logits_BTV
        losses_BT = token_losses(logits_BTV, targets_BT)
        return losses_BT if extras is None else Losses(losses_BT, *extras)


def _of_block(counts: Counts, prefix: str) -> Counts:
    return {name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix)}


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of every position in nats, float32, [B, T]. On a GPU backward overwrites the logits."""
    compute = cross_entropy.overwriting_cross_entropy
    if logits_BTV.device.type == "cpu":
        native = cross_entropy.native_serves(logits_BTV)
        compute = cross_entropy.native_cross_entropy if native else cross_entropy.chunked_cross_entropy
    losses_N = compute(logits_BTV.flatten(0, 1), targets_BT.flatten())
    return losses_N.unflatten(0, targets_BT.shape).clone()  # not a view: sharding hooks onto a module's output
