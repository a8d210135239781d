"""How much memory a model takes in training, apart from its parameters and their states."""

from __future__ import annotations

from . import ModelConfig
from .layers import BLOCK_ATTENTION_MAX_POSITIONS


def activation_bytes(config: ModelConfig, seq_len: int, itemsize: int | None = None, *, recompute: bool = False) -> int:
    """A generous count of what a sequence saves for backward.

    ``itemsize``: bytes an element, if compiled blocks save the operands of their products and little else; the logits
    are then overwritten by their gradient. None: all is saved in float32, as in eager blocks, and the logits thrice.
    ``recompute``: blocks are computed again in backward.
    """
    size = itemsize or 4
    block = (10 if itemsize else 12) * config.hidden_size + 4 * config.intermediate_size
    if itemsize is None and seq_len <= BLOCK_ATTENTION_MAX_POSITIONS:
        block += config.num_heads * seq_len  # attention on a CPU saves its probabilities
    inputs = config.hidden_size * config.num_layers
    blocks = size * (inputs + block if recompute else block * config.num_layers)
    # Logits in the compute dtype and in float32, and their gradient; or the logits, and room for a chunk.
    return seq_len * (blocks + (2 * size if itemsize else 12) * (config.vocab_size or 0))
