"""Which codecs states and weights have, by name: ``optim.moments``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..formats import by_name
from ..spec import Rounding
from ..suggest import close
from .codecs import FP32, Codec, Dynamic, Expanded, Kahan, Plain, Scaled
from .rules import WEIGHTS, State, UpdateRule, chain

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


@dataclass(frozen=True, slots=True, init=False)
class Moments:
    """The codecs of states by name, and of the weights that are updated: ``Moments(m=BF16, v=BF16, master=...)``.

    A state that is not named is stored as its rule says. ``RULE.STATE`` names that of one rule of several.

    Args:
        m: the first moment (``exp_avg``) of AdamW, Lion and Muon.
        v: the second moment (``exp_avg_sq``) of AdamW.
        master: the weights. None: the parameter itself, in the recipe's parameter dtype, rounded to nearest.
            ``Plain`` or ``Kahan``: the parameter itself, in that codec's dtype. ``Scaled``: codes and scales; after
            every update the parameter, in the compute dtype, becomes what the codes stand for.
    """

    codecs: tuple[tuple[str, Codec], ...]

    def __init__(self, **codecs: Codec | None) -> None:
        given = {name: codec for name, codec in codecs.items() if codec is not None}
        for name, codec in given.items():
            if name != WEIGHTS and isinstance(codec, Kahan):
                raise ValueError(f"{name}={codec}: compensation is for weights, optim.moments.master")
        if isinstance(master := given.get(WEIGHTS), (Dynamic, Expanded)):
            raise ValueError(f"master={master}: weights are kept as fp32, bf16, or scaled floats such as fp16/tensor")
        object.__setattr__(self, "codecs", tuple(sorted(given.items())))

    def with_(self, **codecs: Codec) -> Moments:
        """These, and others for the names given."""
        return Moments(**dict(self.codecs) | codecs)

    def named(self, name: str) -> Codec | None:
        """The codec of this name, if there is one."""
        return next((codec for other, codec in self.codecs if other == name), None)

    @property
    def m(self) -> Codec:
        """As AdamW has it."""
        return self.named("m") or FP32

    @property
    def v(self) -> Codec:
        return self.named("v") or FP32

    @property
    def master(self) -> Codec | None:
        return self.named(WEIGHTS)

    def of(self, rule: UpdateRule, state: State) -> Codec:
        """The codec of a state of a rule."""
        return self.named(f"{rule.name}.{state.name}") or self.named(state.name) or state.codec

    def param_dtype(self, param: torch.dtype, compute: torch.dtype) -> torch.dtype:
        """Of the model's parameters, for a recipe with these dtypes."""
        if isinstance(self.master, Plain):
            return self.master.dtype
        if isinstance(self.master, Kahan):
            return torch.bfloat16
        return param if self.master is None else compute

    def text(self, rule: object) -> str:
        """How the states of ``rule`` are stored; of what is no ``UpdateRule``, what is named here."""
        if not isinstance(rule, UpdateRule):
            return str(self)
        rules = list(chain(rule))
        parts = []
        for one in rules:
            states = ", ".join(f"{state.name} {self.of(one, state)}" for state in one.states) or "no states"
            parts.append(states if len(rules) == 1 else f"{one.name}: {states}")
        return "; ".join(parts) + self._weights()

    def __str__(self) -> str:
        usual = {"m": FP32, "v": FP32} | dict(self.codecs)
        return ", ".join(f"{name} {codec}" for name, codec in usual.items() if name != WEIGHTS) + self._weights()

    def _weights(self) -> str:
        return f", weights {self.master}" if self.master is not None else ""


STANDARD = Moments()

Signs = dict[str, dict[str, bool]]
"""Of states by name, and of each by the rule that has it: whether values may be negative."""


def chosen(choice: str | Mapping[str, Any] | None, base: Moments, rule: object = None) -> Moments:
    """``base``, with what ``choice`` names: one of ``CHOICES``, one codec for m and v, or a mapping of states,
    ``master``, and ``block`` for those of them that do not say. A mapping may have the name of one of several rules,
    and under it a mapping of that rule's states.

    ``rule``: whose states may be named; AdamW's, if it is no ``UpdateRule``. What a named choice says of states that
    the rule does not have is passed over. Raises ValueError, one line with the near matches, for a name that is none.
    """
    if choice is None:
        return base
    rules = list(chain(rule)) if isinstance(rule, UpdateRule) else []
    signs: Signs = {} if rules else {"m": {"": True}, "v": {"": False}}
    for one in rules:
        for state in one.states:
            signs.setdefault(state.name, {})[one.name] = state.signed
    if isinstance(choice, str):
        near = close(choice, CHOICES)
        if choice in CHOICES:
            named = {name: text for name, text in CHOICES[choice].items() if name in signs or name == WEIGHTS}
            return base.with_(**_spelled(named, signs))
        try:
            codec(choice)
            both = _spelled({name: choice for name in ("m", "v") if name in signs}, signs)
        except ValueError as error:
            message = f"no moments named {choice!r}{near}; there are: {', '.join(CHOICES)}; or {_SPELLED}"
            raise ValueError(message if "no codec named" in str(error) else str(error)) from error
        if not both:
            raise ValueError(f"{choice!r} is for m and v; name the states: {', '.join(signs) or 'there are none'}")
        return base.with_(**both)
    if not isinstance(choice, Mapping):
        raise ValueError(f"{choice!r}: a name, or a mapping of {', '.join((*signs, WEIGHTS, 'block'))}")
    of_rules = {one.name: one for one in rules} if len(rules) > 1 else {}
    known = (*signs, WEIGHTS, *of_rules, "block")
    _require_known(choice, known)
    given = _spelled({name: text for name, text in choice.items() if name not in of_rules}, signs, choice.get("block"))
    for name, one in of_rules.items():
        if (inner := choice.get(name)) is not None:
            if not isinstance(inner, Mapping):
                raise ValueError(f"{name}={inner!r}: a mapping of its states")
            own = {state.name: {one.name: state.signed} for state in one.states}
            _require_known(inner, (*own, "block"))
            codecs = _spelled(inner, own, inner.get("block", choice.get("block")))
            given |= {f"{name}.{state}": codec for state, codec in codecs.items()}
    return base.with_(**given)


def _require_known(given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"no key {key!r}{close(str(key), known)}; there are: {', '.join(known)}")


def _spelled(given: Mapping[str, Any], signs: Signs, block: Any = None) -> dict[str, Codec]:
    """The codecs of a mapping from names to texts: one for all rules that have a state of a name, unless the values of
    some may be negative and those of others not."""
    if block is not None and (not isinstance(block, int) or isinstance(block, bool)):
        raise ValueError(f"block={block!r}: a number of elements")
    result = {}
    for name, text in given.items():
        if name == "block" or text is None:
            continue
        of_rules = signs.get(name, {"": True})
        if len(set(of_rules.values())) == 1:
            result[name] = codec(text, signed=next(iter(of_rules.values())), block=block)
        else:
            result |= {f"{rule}.{name}": codec(text, signed=signed, block=block) for rule, signed in of_rules.items()}
    return result


def codec(text: Any, *, signed: bool = True, block: int | None = None) -> Codec:
    """The codec spelled ``text``; ``signed``: whether values may be negative; ``block``: where the text names none.

    Raises ValueError, one line, for what is none.
    """
    name, *options = str(text).split("/")
    stochastic, kahan = ("sr" in options, "kahan" in options)
    sizes = [option for option in options if option not in ("sr", "kahan")]
    rounding = Rounding.STOCHASTIC if stochastic else Rounding.NEAREST
    known = ["fp32", "bf16", "dynamic", "expanded", "fp16", "int8", "e4m3", "e4m3_240", "e5m2"]
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
