"""How single parameters are trained and start: factors of learning rate and weight decay, and the initial values.

A model says it of its own, and a recipe may say otherwise (``Recipe.parameters``), as unit scaling and muP do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from .suggest import close

Multipliers = Callable[[str, torch.Size], tuple[float, float]]
"""What a model says: factors of learning rate and weight decay of a parameter, by its name and full shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is said of one parameter. None: as the model says.

    Args:
        lr: factor of the learning rate, with its schedule.
        decay: factor of the weight decay.
        independent: the decay of an update is of the schedule's height alone, and not of the peak learning rate: the
            coefficient is divided by the parameter's own peak (arXiv 2407.17465).
        init: mean and standard deviation of the normal distribution that it is drawn from; a standard deviation of 0
            for a constant.

    Raises ValueError for a factor or a deviation that is negative or not finite.
    """

    lr: float | None = None
    decay: float | None = None
    independent: bool = False
    init: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name, value in (("lr", self.lr), ("decay", self.decay)):
            if value is not None and not (_is_finite(value) and value >= 0):
                raise ValueError(f"{name}={value!r} of a parameter: a finite number from 0")
        init = self.init
        if init is not None and not (
            isinstance(init, tuple) and len(init) == 2 and all(map(_is_finite, init)) and init[1] >= 0
        ):
            raise ValueError(f"init={init!r} of a parameter: a mean and a standard deviation from 0, both finite")

    def __str__(self) -> str:
        factors = (("learning rate", self.lr), ("decay", self.decay))
        parts = [f"{name} x {factor:.6g}" for name, factor in factors if factor is not None]
        parts += ["decay independent of the learning rate"] * self.independent
        if self.init is not None:
            mean, std = self.init
            parts.append(f"starts as normal({mean:.6g}, {std:.6g})" if std else f"starts at {mean:.6g}")
        return ", ".join(parts) or "as the model says"


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class ForParameters(Protocol):
    """A part of ``Recipe.parameters``."""

    def of(self, name: str, shape: torch.Size) -> Setting | None:
        """What it says of a parameter of this full shape; None where it says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The same setting for all parameters whose name matches ``path``, a regex, in full.

    Raises ValueError for what is no regular expression.
    """

    path: str
    setting: Setting

    def __post_init__(self) -> None:
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(f"parameters={self.path!r}: not a regular expression: {error}") from error

    def of(self, name: str, shape: torch.Size) -> Setting | None:
        return self.setting if re.fullmatch(self.path, name) else None

    def __str__(self) -> str:
        return repr(self.path)


def settings(
    said: Sequence[ForParameters], shapes: Mapping[str, torch.Size], tied: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Setting]:
    """What is said of every parameter of these full shapes, by name; a later part wins, field by field.

    ``tied``: other names of a parameter, and its own: what is said of one is said of the parameter, whose own name
    comes first. Raises ValueError for a part that says nothing of any of them.
    """
    result = {name: Setting() for name in shapes}
    names = dict(tied) | {name: name for name in shapes}
    for part in said:
        meant = {names[name]: setting for name in names if (setting := part.of(name, shapes[names[name]])) is not None}
        if not meant:
            near = close(part.path, names) if isinstance(part, Parameters) else ""
            raise ValueError(
                f"parameters: {part} says nothing of any parameter{near}; the first is {next(iter(shapes))}"
            )
        result |= {name: _over(result[name], setting) for name, setting in meant.items()}
    return result


def _over(earlier: Setting, later: Setting) -> Setting:
    given = {part.name: getattr(later, part.name) for part in fields(Setting)}
    kept = {name: getattr(earlier, name) for name, value in given.items() if value is None or value is False}
    return Setting(**(given | kept))


def groups(
    parameters: Iterable[tuple[str, Tensor]],
    said: Mapping[str, Setting],
    *,
    lr: float,
    weight_decay: float,
    of_model: Multipliers,
) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer: one for each learning rate and decay.

    ``lr``: the peak; a group's ``lr_scale`` is the factor of its parameters.
    """
    alike: dict[tuple[float, float], list[tuple[str, Tensor]]] = {}
    for name, parameter in parameters:
        own, (of_lr, of_decay) = said.get(name, Setting()), of_model(name, parameter.shape)
        factor = of_lr if own.lr is None else own.lr
        decay = weight_decay * (of_decay if own.decay is None else own.decay)
        if own.independent and decay:
            if not lr * factor:
                raise ValueError(f"{name}: a learning rate of 0 has no decay that is independent of it")
            decay /= lr * factor
        alike.setdefault((factor, decay), []).append((name, parameter))
    return [
        {"params": pairs, "weight_decay": decay, "lr": lr * factor, "lr_scale": factor}
        for (factor, decay), pairs in alike.items()
    ]


def described(said: Mapping[str, Setting], *, drawn: bool, grouped: bool) -> list[str]:
    """Lines of plan.txt: what is said of which parameters.

    ``drawn``, ``grouped``: whether a training loop draws initial values, and learns in groups, as is said.
    """
    alike: dict[Setting, list[str]] = {}
    for name, setting in said.items():
        if setting != Setting():
            alike.setdefault(setting, []).append(name)
    lines = [
        f"parameters: {names[0]}{f' and {len(names) - 1} others' if len(names) > 1 else ''}: {setting}"
        for setting, names in alike.items()
    ]
    if any(setting != Setting(init=setting.init) for setting in alike) and not grouped:
        lines.append(
            "parameters: learning rates and decay are left to the training loop: plan.parameter_groups has them"
        )
    if any(setting.init is not None for setting in alike) and not drawn:
        lines.append("parameters: they start as they are, and not as the recipe says: plan.initial has that")
    return lines
