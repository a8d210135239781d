"""Which codecs the states of AdamW have, by name: ``optim.moments``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..formats import by_name
from ..spec import Rounding
from ..suggest import close
from .codecs import FP32, Codec, Dynamic, Expanded, Kahan, Plain, Scaled

# By name. Keys that a choice leaves out stay those of the recipe.
CHOICES: dict[str, dict[str, str]] = {
    "fp32": {"m": "fp32", "v": "fp32"},
    "bf16": {"m": "bf16", "v": "bf16"},
    "bf16_sr": {"m": "bf16/sr", "v": "bf16/sr"},
    "fp8": {"m": "e4m3/128", "v": "e5m2/128"},
    "fp8_tensor": {"m": "e4m3/tensor", "v": "e5m2/tensor"},
    "fp8_fishman": {"m": "e4m3_240/tensor", "v": "e5m2/tensor", "master": "fp16/tensor"},  # arXiv 2409.12517
    "fp8_lm": {"m": "e4m3/tensor", "v": "fp16/tensor", "master": "fp16/tensor"},  # arXiv 2310.18313
    "dynamic8": {"m": "dynamic/256", "v": "dynamic/256"},
    "coat": {"m": "expanded/128", "v": "expanded/128"},
    "pure_bf16": {"m": "bf16", "v": "bf16", "master": "bf16"},
    "pure_bf16_sr": {"m": "bf16", "v": "bf16", "master": "bf16/sr"},
    "pure_bf16_kahan": {"m": "bf16", "v": "bf16", "master": "bf16/kahan"},
}
_SPELLED = "FORMAT[/BLOCK or /tensor][/sr], as in e4m3/128, e5m2/tensor/sr, fp16/tensor, fp32, bf16, dynamic, expanded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """The codecs of the two moments and of the weights that are updated.

    Args:
        m: the first moment (``exp_avg``).
        v: the second moment (``exp_avg_sq``).
        master: the weights. None: the parameter itself, in the recipe's parameter dtype, rounded to nearest.
            ``Plain`` or ``Kahan``: the parameter itself, in that codec's dtype. ``Scaled``: codes and scales; after
            every update the parameter, in the compute dtype, becomes what the codes stand for.
    """

    m: Codec = FP32
    v: Codec = FP32
    master: Codec | None = None

    def __post_init__(self) -> None:
        for name in ("m", "v"):
            if isinstance(getattr(self, name), Kahan):
                raise ValueError(f"{name}={getattr(self, name)}: compensation is for weights, optim.moments.master")
        if isinstance(self.master, (Dynamic, Expanded)):
            raise ValueError(
                f"master={self.master}: weights are kept as fp32, bf16, or scaled floats such as fp16/tensor"
            )

    def param_dtype(self, param: torch.dtype, compute: torch.dtype) -> torch.dtype:
        """Of the model's parameters, for a recipe with these dtypes."""
        if isinstance(self.master, Plain):
            return self.master.dtype
        if isinstance(self.master, Kahan):
            return torch.bfloat16
        return param if self.master is None else compute

    def __str__(self) -> str:
        master = f", weights {self.master}" if self.master is not None else ""
        return f"m {self.m}, v {self.v}{master}"


STANDARD = Moments()


def chosen(choice: str | Mapping[str, Any] | None, base: Moments) -> Moments:
    """``base``, with what ``choice`` names: one of ``CHOICES``, one codec for both moments, or a mapping of m, v,
    master, and ``block`` for those of them that do not say.

    Raises ValueError, one line with the near matches, for a name that is none.
    """
    if choice is None:
        return base
    if isinstance(choice, str):
        near = close(choice, CHOICES)
        if choice not in CHOICES:
            try:
                return replace(base, m=codec(choice), v=codec(choice, signed=False))
            except ValueError as error:
                message = f"no moments named {choice!r}{near}; there are: {', '.join(CHOICES)}; or {_SPELLED}"
                raise ValueError(message if "no codec named" in str(error) else str(error)) from error
        choice = CHOICES[choice]
    if not isinstance(choice, Mapping):
        raise ValueError(f"{choice!r}: a name, or a mapping of m, v, master, block")
    keys = [part.name for part in fields(Moments)]
    for key in choice:
        if key not in (*keys, "block"):
            raise ValueError(f"no key {key!r}{close(str(key), (*keys, 'block'))}; there are: m, v, master, block")
    block = choice.get("block")
    if block is not None and (not isinstance(block, int) or isinstance(block, bool)):
        raise ValueError(f"block={block!r}: a number of elements")
    given = {key: codec(choice[key], signed=key != "v", block=block) for key in keys if choice.get(key) is not None}
    return replace(base, **given)


def codec(text: Any, *, signed: bool = True, block: int | None = None) -> Codec:
    """The codec spelled ``text``; ``signed``: whether values may be negative; ``block``: where the text names none.

    Raises ValueError, one line, for what is none.
    """
    name, *options = str(text).split("/")
    stochastic, kahan = ("sr" in options, "kahan" in options)
    sizes = [option for option in options if option not in ("sr", "kahan")]
    rounding = Rounding.STOCHASTIC if stochastic else Rounding.NEAREST
    known = ["fp32", "bf16", "dynamic", "expanded", "fp16", "e4m3", "e4m3_240", "e5m2"]
    if len(sizes) > 1 or any(size != "tensor" and not size.isdigit() for size in sizes):
        raise ValueError(f"{text!r} is no codec: {_SPELLED}")
    if sizes and name in ("fp32", "bf16"):
        raise ValueError(f"{text!r}: {name} has no scale, and so no block")
    if kahan and (name != "bf16" or stochastic):
        raise ValueError(f"{text!r}: compensation is for bf16 rounded to nearest: bf16/kahan")
    size = None if sizes == ["tensor"] else int(sizes[0]) if sizes else block
    usual = {"dynamic": 256}.get(name, 128) if size is None else size
    match name:
        case "fp32":
            return Plain(rounding=rounding)
        case "bf16":
            return Kahan() if kahan else Plain(dtype=torch.bfloat16, rounding=rounding)
        case "dynamic" | "expanded" if stochastic or sizes == ["tensor"]:
            raise ValueError(f"{text!r}: {name} is of blocks, rounded to nearest")
        case "dynamic":
            return Dynamic(block=usual, signed=signed)
        case "expanded":
            return Expanded(block=usual)
    try:
        format = by_name(name)
    except ValueError as error:
        raise ValueError(f"no codec named {text!r}{close(name, known)}; {_SPELLED}") from error
    return Scaled(format=format, block=None if sizes == ["tensor"] else usual, rounding=rounding)
