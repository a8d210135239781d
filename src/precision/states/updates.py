"""Update rules by name, and updates that the device may leave out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..suggest import close
from .adamw import AdamW
from .driver import StateOptimizer
from .lion import Lion
from .muon import Muon
from .rules import UpdateRule

RULES: dict[str, type[UpdateRule]] = {rule.__name__.lower(): rule for rule in (AdamW, Lion, Muon)}
"""What ``optim.update`` may name."""


def named_rule(name: str, args: Mapping[str, Any]) -> UpdateRule:
    """The rule of this name with these settings, the fields of its dataclass; ``rest`` may be a name.

    Raises ValueError, one line with the near matches, for an unknown name or setting, and for a value of another type.
    """
    if name not in RULES:
        raise ValueError(f"no rule named {name!r}{close(name, RULES)}; there are: {', '.join(RULES)}")
    known = {field.name: field for field in fields(RULES[name])}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in args.items():
        if key not in known:
            there = f"it has: {', '.join(known)}" if known else f"it has none, and optim={name} gives none"
            raise ValueError(f"{name} has no setting {key!r}{close(str(key), known)}; {there}")
        usual = known[key].default
        assert usual is not MISSING, f"{name}.{key} needs a default"
        if isinstance(usual, UpdateRule):
            given[key] = named_rule(str(value), {})
        else:
            given[key] = _like(usual, value)
            if not _alike(usual, given[key]):
                raise ValueError(f"{key}={value!r}: {name} wants it like {usual!r}")
    return RULES[name](**given)


def _like(usual: Any, value: Any) -> Any:
    """``value`` as the type of ``usual``, where YAML writes that otherwise."""
    if isinstance(usual, tuple) and isinstance(value, (list, tuple)):
        return tuple(_like(usual[0], item) for item in value)
    return float(value) if isinstance(usual, float) and type(value) is int else value


def _alike(usual: Any, value: Any) -> bool:
    """Whether they are of one type, item by item, and no number is infinite or none."""
    if isinstance(usual, tuple) and isinstance(value, tuple):
        return len(usual) == len(value) and all(map(_alike, usual, value))
    return type(value) is type(usual) and not (isinstance(value, float) and not math.isfinite(value))


def can_gate(optimizer: Optimizer) -> bool:
    """Whether ``gated_step`` knows this optimizer."""
    return _is_fused(optimizer) or isinstance(optimizer, StateOptimizer)


def _is_fused(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults["fused"])


def gated_step(optimizer: Optimizer, applied: Tensor, factor: Tensor | None) -> Callable[[], None]:
    """``optimizer.step()`` if ``applied``, and else nothing: the device decides, and nobody waits for it.

    Args:
        applied: bool scalar on the parameters' device. Where it is false, parameters, moments and counters stay as
            they were, to the bit.
        factor: FP32 scalar, of all gradients; None: 1. ``multiply`` says how they are multiplied.

    Returns what must be called, before the next step and before a counter is read, once it is known that the update was
    left out. Raises ValueError where ``can_gate`` is false.
    """
    if isinstance(optimizer, StateOptimizer):
        one = torch.ones((), dtype=torch.float32, device=applied.device)
        optimizer.step(gate=torch.stack([one if factor is None else factor, applied.float()]))
        return optimizer.uncount
    if not can_gate(optimizer):
        raise ValueError(f"{type(optimizer).__name__} cannot be told on the device to leave an update out")
    there: Any = optimizer  # as torch.amp.GradScaler tells it
    there.found_inf = (~applied).float()
    there.grad_scale = None if factor is None else 1.0 / factor
    try:
        optimizer.step()
    finally:
        del there.found_inf, there.grad_scale
    return lambda: None


@torch.no_grad()
def multiply(optimizer: Optimizer, gradients: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place, to the bit as ``gated_step`` takes them: by ``factor`` rounded to their dtype, but
    for torch's fused AdamW, which divides by its inverse.
    """
    alike: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        alike.setdefault(gradient.dtype, []).append(gradient)
    for dtype, tensors in alike.items():
        if _is_fused(optimizer):
            torch._foreach_div_(tensors, 1.0 / factor)
        else:
            torch._foreach_mul_(tensors, factor.to(dtype))
