"""The config of a model: what all have in common, and what the trainer asks before a model is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .kernels.attention import BLOCK_ATTENTION_MAX_POSITIONS

if TYPE_CHECKING:
    from .hf import Piece
    from .layers import Decoder


@dataclass(kw_only=True)
class DecoderConfig:
    """Shape of a decoder: the keys of the ``model`` group. ``vocab_size: null`` follows the tokenizer.

    The file of a model has one public class derived from this, whose fields are added, and whose ``build`` gives the
    model. The other methods have defaults.
    """

    name: str
    arch: str
    vocab_size: int | None = None
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_seq_len: int = 2048  # what an exported config says; a model with learned positions ends there
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    init_from: str | None = None  # a `transformers` directory to start from instead of random weights

    hf_type: ClassVar[str | None] = None
    """``model_type`` in a ``config.json`` of `transformers`; None for a model that is not converted. Of the very class:
    one derived from it describes another model."""

    def build(self) -> Decoder:
        """The model, on the current default device."""
        raise NotImplementedError(f"{type(self).__name__} has no method build() -> Decoder")

    @property
    def head_size(self) -> int:
        """Of q and k, as counted in operations of attention."""
        return self.hidden_size // self.num_heads

    @property
    def position_limit(self) -> int | None:
        """Longest sequence the model can take; None where there is no limit."""
        return None

    def validate(self) -> None:
        """Raises ValueError for a shape no such model can have."""
        self.require()

    def require(self, *, counts: tuple[str, ...] = (), positive: tuple[str, ...] = ()) -> None:
        """Raises ValueError for a common field, or one of these of its own, that no model can have."""
        for field in ("hidden_size", "intermediate_size", "num_layers", "num_heads", *counts):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be at least 1")
        own = getattr(type(self), "arch", self.arch)
        if self.arch != own and not self.arch.endswith(".py"):
            raise ValueError(f"model.arch={self.arch}: {self.name} is a {own}; choose another model instead")
        for field in ("norm_eps", *positive):
            if not getattr(self, field) > 0:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be positive")
        if not self.init_std >= 0:
            raise ValueError(f"model.init_std={self.init_std}: must not be negative")

    def activation_bytes(self, seq_len: int, itemsize: int | None = None, *, recompute: bool = False) -> int:
        """A generous count of what a sequence saves for backward.

        ``itemsize``: bytes an element, if compiled blocks save the operands of their products and little else; the
        logits are then overwritten by their gradient. None: all is saved in float32, as in eager blocks, and the logits
        thrice. ``recompute``: blocks are computed again in backward.
        """
        size = itemsize or 4
        block = (10 if itemsize else 12) * self.hidden_size + 4 * self.intermediate_size
        if itemsize is None and seq_len <= BLOCK_ATTENTION_MAX_POSITIONS:
            block += self.num_heads * seq_len  # attention on a CPU saves its probabilities
        inputs = self.hidden_size * self.num_layers
        blocks = size * (inputs + block if recompute else block * self.num_layers)
        # Logits in the compute dtype and in float32, and their gradient; or the logits, and room for a chunk.
        return seq_len * (blocks + (2 * size if itemsize else 12) * (self.vocab_size or 0))

    # To and from `transformers` (``models.hf``), of a model that has an ``hf_type``.

    def piece_of(self, name: str) -> Piece:
        """Where the parameter ``name`` is found in the state dict of `transformers`."""
        raise NotImplementedError

    def to_hf(self, end_of_text: int | None, trained_length: int | None) -> dict[str, Any]:
        """Its ``config.json``; ``hf.common`` has what all share."""
        raise NotImplementedError

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], name: str) -> Self:
        """The config of the model that a ``config.json`` describes. Raises ValueError for what is not built here."""
        raise NotImplementedError
