"""To and from `transformers` checkpoints, without importing `transformers`: what all models share.

What a model's tensors and config are called there, its own file says (``DecoderConfig.piece_of``, ``to_hf``,
``from_hf``).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import DecoderConfig
from .registry import architectures


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one of our parameters lies in a `transformers` state dict."""

    name: str
    transposed: bool = False
    third: int | None = None  # of q, k, v side by side
    experts: int = 0  # so many tensors with numbers at "{}" in the name are one of ours, [experts, ...]

    def read(self, tensor_of: Callable[[str], Tensor]) -> Tensor:
        """Our parameter, of the tensors of `transformers` by name."""
        if self.experts:
            return torch.stack([self.cut(tensor_of(self.name.format(expert))) for expert in range(self.experts)])
        return self.cut(tensor_of(self.name))

    def cut(self, tensor: Tensor) -> Tensor:
        """Our parameter, or that of an expert, out of the tensor of `transformers` (a view)."""
        if self.third is not None:
            tensor = tensor.chunk(3, dim=-1)[self.third]
        return tensor.t() if self.transposed else tensor


def piece_of(config: DecoderConfig, name: str) -> Piece:
    """Where our parameter ``name`` is found in the model of `transformers`. Raises ValueError if there is none such."""
    _require_converted(config)
    return config.piece_of(name)


def to_hf_tensors(config: DecoderConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A full state dict of ours as `transformers` names and lays it out; a tied head is left out."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        if config.tie_embeddings and name == "lm_head.weight":
            continue
        piece = piece_of(config, name)
        for place, one in enumerate(tensor.unbind() if piece.experts else [tensor]):
            part = piece.third or 0, one.t() if piece.transposed else one
            parts.setdefault(piece.name.format(place) if piece.experts else piece.name, []).append(part)
    result = {}
    for name, pieces in parts.items():
        ordered = [tensor for _, tensor in sorted(pieces, key=lambda part: part[0])]
        result[name] = (torch.cat(ordered, dim=-1) if len(ordered) > 1 else ordered[0]).contiguous()
    return result


def to_hf_config(config: DecoderConfig, end_of_text: int | None, trained_length: int | None = None) -> dict[str, Any]:
    """The ``config.json`` that lets `transformers`, before release 5 and since, build the same model.

    ``trained_length``: in tokens; rotary positions are said to end there, where learned ones end with their weights.
    Raises ValueError for a model that is not converted.
    """
    _require_converted(config)
    return config.to_hf(end_of_text, trained_length)


def from_hf_config(values: Mapping[str, Any], name: str) -> DecoderConfig:
    """Our config of the model that a ``config.json`` describes.

    Raises ValueError for an architecture, activation, bias or rotary scaling that is not built here, and for what is
    no size.
    """
    known = {kind: config for config in architectures().values() if (kind := _type_of(config)) is not None}
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"model_type {reprlib.repr(kind)} is not built here; there are: {', '.join(sorted(known))}")
    config = known[kind].from_hf(values, name)
    config.validate()
    return config


def _type_of(config: type[DecoderConfig]) -> str | None:
    """What the class itself says: one derived from it describes another model."""
    return vars(config).get("hf_type")


def _require_converted(config: DecoderConfig) -> None:
    if _type_of(type(config)) is None:
        raise ValueError(f"model.arch={config.arch}: its file says no conversion to transformers (piece_of, to_hf)")


def common(config: DecoderConfig, end_of_text: int | None) -> dict[str, Any]:
    """What every ``config.json`` says."""
    return {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "dtype": "float32",
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


def require(values: Mapping[str, Any], key: str, default: Any, allowed: tuple[Any, ...]) -> Any:
    """The value under ``key``. Raises ValueError unless it is one of ``allowed``."""
    value = values.get(key, default)
    if not any(value == one and type(value) is type(one) for one in allowed):
        shown = " or ".join(map(repr, allowed))
        raise ValueError(f"{key}={reprlib.repr(value)} is not built here; it must be {shown}")
    return value


def number(values: Mapping[str, Any], key: str, default: float | None = None, kind: type = int) -> Any:
    """The positive number under ``key``, of the kind of its default. Raises ValueError for anything else."""
    value = default if values.get(key) is None else values[key]
    kind = kind if default is None else type(default)
    if value is None:
        raise ValueError(f"{key} is missing")
    if type(value) not in {int, kind} or not 0 < value < math.inf:
        raise ValueError(f"{key} is {reprlib.repr(value)}, not a positive {'whole ' * (kind is int)}number")
    return value
