"""To and from `transformers` checkpoints: names, layouts and configs, without importing `transformers`.

Llama differs by a prefix. GPT-2 has its weights as [in, out] and query, key and value in one matrix.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .gpt import GPTConfig
from .llama import LlamaConfig, RopeScaling

_GPT_TOP = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}
_GPT_BLOCK = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one of our parameters lies in a `transformers` state dict."""

    name: str
    transposed: bool = False
    third: int | None = None  # of q, k, v side by side

    def cut(self, tensor: Tensor) -> Tensor:
        """Our parameter out of the tensor of `transformers` (a view)."""
        if self.third is not None:
            tensor = tensor.chunk(3, dim=-1)[self.third]
        return tensor.t() if self.transposed else tensor


def piece_of(config: LlamaConfig | GPTConfig, name: str) -> Piece:
    """Where our parameter ``name`` is found in ``LlamaForCausalLM`` or ``GPT2LMHeadModel``."""
    if isinstance(config, LlamaConfig):
        return Piece(name if name.startswith("lm_head.") else f"model.{name}")
    if name.startswith("lm_head."):
        return Piece(name)
    if (match := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)) is None:
        module, _, kind = name.rpartition(".")
        return Piece(f"transformer.{_GPT_TOP[module]}.{kind}")
    layer, module, kind = match.groups()
    hf_name = f"transformer.h.{layer}.{_GPT_BLOCK[module]}.{kind}"
    third = {"q_proj": 0, "k_proj": 1, "v_proj": 2}.get(module.rpartition(".")[2])
    return Piece(hf_name, transposed=kind == "weight" and "proj" in module, third=third)


def to_hf_tensors(config: LlamaConfig | GPTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A full state dict of ours as `transformers` names and lays it out; a tied head is left out."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        if config.tie_embeddings and name == "lm_head.weight":
            continue
        piece = piece_of(config, name)
        parts.setdefault(piece.name, []).append((piece.third or 0, tensor.t() if piece.transposed else tensor))
    result = {}
    for name, pieces in parts.items():
        ordered = [tensor for _, tensor in sorted(pieces, key=lambda part: part[0])]
        result[name] = (torch.cat(ordered, dim=-1) if len(ordered) > 1 else ordered[0]).contiguous()
    return result


def to_hf_config(
    config: LlamaConfig | GPTConfig, end_of_text: int | None, trained_length: int | None = None
) -> dict[str, Any]:
    """The ``config.json`` that lets `transformers`, before release 5 and since, build the same model.

    ``trained_length``: in tokens; rotary positions are said to end there, where learned ones end with their weights.
    """
    common = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "dtype": "float32",
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }
    if isinstance(config, GPTConfig):
        return common | {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": config.max_seq_len,
            "n_embd": config.hidden_size,
            "n_inner": config.intermediate_size,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": "gelu_new",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    before_5 = {"rope_theta": config.rope_theta} | ({} if scaling is None else {"rope_scaling": rope})
    return common | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": trained_length or config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        **before_5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def from_hf_config(values: Mapping[str, Any], name: str) -> LlamaConfig | GPTConfig:
    """Our config of the model that a ``config.json`` describes.

    Raises ValueError for an architecture, activation, bias or rotary scaling that is not built here, and for what is
    no size.
    """
    kind = values.get("model_type")
    if kind == "gpt2":
        _require(values, "activation_function", "gelu_new", ("gelu_new", "gelu_pytorch_tanh"))
        _require(values, "scale_attn_by_inverse_layer_idx", False, (False,))
        _require(values, "scale_attn_weights", True, (True,))
        _require(values, "add_cross_attention", False, (False,))
        width = _number(values, "n_embd")
        gpt = GPTConfig(
            name=name,
            vocab_size=_number(values, "vocab_size"),
            hidden_size=width,
            intermediate_size=_number(values, "n_inner", 4 * width),
            num_layers=_number(values, "n_layer"),
            num_heads=_number(values, "n_head"),
            max_seq_len=_number(values, "n_positions", 1024),
            norm_eps=_number(values, "layer_norm_epsilon", 1e-5),
            tie_embeddings=_require(values, "tie_word_embeddings", True, (True, False)),
        )
        gpt.validate()
        return gpt
    if kind != "llama":
        raise ValueError(f"model_type {reprlib.repr(kind)} is not built here; there are: llama, gpt2")
    _require(values, "hidden_act", "silu", ("silu",))
    _require(values, "attention_bias", False, (False,))
    _require(values, "mlp_bias", False, (False,))
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}  # in the order of `transformers` 5
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters or rope_scaling is {reprlib.repr(rope)}, not an object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rotary scaling {reprlib.repr(rope_type)} is not built here; there are: default, llama3")
    for where in (values, rope):
        _require(where, "partial_rotary_factor", 1.0, (1.0, 1, None))
    scaling = None
    if rope_type == "llama3":
        scaling = RopeScaling(
            factor=_number(rope, "factor", kind=float),
            low_freq_factor=_number(rope, "low_freq_factor", kind=float),
            high_freq_factor=_number(rope, "high_freq_factor", kind=float),
            original_max_seq_len=_number(rope, "original_max_position_embeddings"),
        )
    heads = _number(values, "num_attention_heads")
    llama = LlamaConfig(
        name=name,
        vocab_size=_number(values, "vocab_size"),
        hidden_size=_number(values, "hidden_size"),
        intermediate_size=_number(values, "intermediate_size"),
        num_layers=_number(values, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_number(values, "num_key_value_heads", heads),
        head_dim=None if values.get("head_dim") is None else _number(values, "head_dim"),
        max_seq_len=_number(values, "max_position_embeddings", 2048),
        rope_theta=_number(rope, "rope_theta", _number(values, "rope_theta", 10_000.0)),
        rope_scaling=scaling,
        norm_eps=_number(values, "rms_norm_eps", 1e-6),
        tie_embeddings=_require(values, "tie_word_embeddings", False, (True, False)),
    )
    llama.validate()
    return llama


def _require(values: Mapping[str, Any], key: str, default: Any, allowed: tuple[Any, ...]) -> Any:
    value = values.get(key, default)
    if not any(value == one and type(value) is type(one) for one in allowed):
        shown = " or ".join(map(repr, allowed))
        raise ValueError(f"{key}={reprlib.repr(value)} is not built here; it must be {shown}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None, kind: type = int) -> Any:
    """The positive number under ``key``, of the kind of its default. Raises ValueError for anything else."""
    value = default if values.get(key) is None else values[key]
    kind = kind if default is None else type(default)
    if value is None:
        raise ValueError(f"{key} is missing")
    if type(value) not in {int, kind} or not 0 < value < math.inf:
        raise ValueError(f"{key} is {reprlib.repr(value)}, not a positive {'whole ' * (kind is int)}number")
    return value
