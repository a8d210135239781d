"""How much of a model's matrix products with weights a recipe quantizes, and what it does not, and why.

Counted are floating-point operations a token of fprop, dgrad and wgrad, as the shapes of the weights give them: 2 for
every element of a weight and each of the three. So a weight that only some tokens use, as an expert's, counts as if all
did, and one that a token uses more than once, as a convolution's, counts once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .blocks import LINEARS
from .module import QuantizedModule
from .spec import GEMMS

OUTSIDE = "outside the blocks"
_MOST = 6  # things named
_TABLES = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)  # whose parameters multiply no matrix


class CoverageWarning(UserWarning):
    """A large part of a model's matrix products is not quantized, though nobody asked for that."""


@dataclass(frozen=True, slots=True)
class Left:
    """What is not quantized: modules or parameters of one kind (``*`` for numbers), elements times GEMMs, why."""

    name: str
    size: int
    why: str
    foreign: bool  # no nn.Linear, so that no recipe can have it


@dataclass(frozen=True, slots=True)
class Coverage:
    """``quantized``: elements of weights times GEMMs both of whose operands are; ``left``: the rest, largest first.

    ``scheduled``: phases of a schedule have other shares.
    """

    quantized: int = 0
    left: tuple[Left, ...] = ()
    scheduled: bool = False

    @property
    def share(self) -> float:
        """Of the operations, from 0 to 1; 0 for a model without matrix products."""
        return self.quantized / (self._total or 1)

    @property
    def surprises(self) -> bool:
        """Whether much is left out that neither the recipe nor its user chose to leave out."""
        foreign = sum(left.size for left in self.left if left.foreign)
        outside = sum(left.size for left in self.left if left.why == OUTSIDE)
        return self.quantized > 0 and (foreign >= 0.1 * self._total or foreign + outside >= 0.5 * self._total)

    @property
    def short(self) -> str:
        if not self.quantized:
            return f"quantized: no matrix product with weights{', but in phases of the schedule' * self.scheduled}"
        when = ", outside the phases of the schedule" * self.scheduled
        return f"quantized: {_percent(self.share)} of the FLOPs of matrix products with weights{when}"

    @property
    def _total(self) -> int:
        return self.quantized + sum(left.size for left in self.left)

    def __str__(self) -> str:
        if not self.quantized:
            return self.short
        named = [f"{left.name} {_percent(left.size / self._total)} ({left.why})" for left in self.left[:_MOST]]
        if rest := self.left[_MOST:]:
            named.append(f"{len(rest)} more {_percent(sum(left.size for left in rest) / self._total)}")
        parts = [f"{self.short} ({', '.join(GEMMS)})", *([f"not: {', '.join(named)}"] if named else [])]
        if any("expert" in left.name for left in self.left):
            parts.append("experts count as if every one were used")
        return "; ".join([*parts, "attention's score products have no weights and are not counted"])


def covered(model: nn.Module, selected: Mapping[str, str], reasons: Mapping[str, str]) -> Coverage:
    """Of a model with a recipe in it.

    ``selected``: by whose wish a linear stays in high precision, by path; ``reasons``: why another is left as it is.
    """
    quantized = 0
    left: dict[tuple[str, str, bool], int] = {}

    def leave(path: str, size: int, why: str, foreign: bool = False) -> None:
        key = re.sub(r"(?<=\.)\d+(?![^.])", "*", path), why, foreign
        left[key] = left.get(key, 0) + size

    seen: set[int] = set()  # a linear that shares its weight multiplies for itself; any other parameter counts once
    for path, module in model.named_modules():
        if not isinstance(module, QuantizedModule) and not isinstance(module, LINEARS):
            continue
        seen.update(map(id, module._parameters.values()))
        products = module.coverage() if isinstance(module, QuantizedModule) else None
        if products is None:
            size = len(GEMMS) * sum(p.numel() for p in module._parameters.values() if p is not None and p.ndim >= 2)
            if path in selected:
                leave("linears to keep", size, selected[path])
            else:
                leave(path, size, reasons.get(path, "not chosen by the recipe"))
            continue
        for name, size, narrow in products:
            if narrow:
                quantized += size
            else:
                leave(f"{name} of quantized linears", size, "in high precision by the recipe")
    for path, module in model.named_modules():
        if isinstance(module, (QuantizedModule, *_TABLES)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            new = id(parameter) not in seen
            seen.add(id(parameter))
            # One whose first dimension is 1 is a table of positions or a token, which is added.
            if new and parameter.is_floating_point() and parameter.ndim >= 2 and parameter.shape[0] > 1:
                why = f"{parameter.ndim}-D parameter of {type(module).__name__}, no nn.Linear"
                leave(f"{path}.{name}" if path else name, len(GEMMS) * parameter.numel(), why, foreign=True)
    found = [Left(name, size, why, foreign) for (name, why, foreign), size in left.items() if size]
    return Coverage(quantized, tuple(sorted(found, key=lambda one: -one.size)))


def _percent(share: float) -> str:
    return "<0.1%" if 0 < share < 0.0005 else f"{100 * share:.1f}%"
