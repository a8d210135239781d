"""Who computes a linear's GEMMs, chosen once when shapes are known, and the linear's lines of plan.txt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .backends import Choice, choose
from .slots import gemms
from .spec import GEMMS, GemmSpec, LinearSpec
from .transforms import Composed, Hadamard

if TYPE_CHECKING:
    from .linear import QuantLinear

Choices = tuple[Choice, Choice, Choice]


@dataclass(frozen=True, slots=True)
class LinearRow:
    """The lines of plan.txt for a linear: one per GEMM, and one more per GEMM that a schedule switches.

    ``phases``: when, which GEMMs, with what. ``tokens``: of a micro-batch, where known.
    """

    path: str
    shape: tuple[int, int]
    spec: LinearSpec
    choices: Choices
    phases: tuple[tuple[str, tuple[str, ...], LinearSpec, Choices], ...] = ()
    tokens: int | None = None

    def __str__(self) -> str:
        out_features, in_features = self.shape
        lines = [f"{self.path:44} {in_features:>6} -> {out_features:<6}"]
        for name, choice in zip(GEMMS, self.choices, strict=True):
            lines.append(f"    {name}: {_line(self.spec, name, choice, self.tokens)}")
            for when, switched, spec, choices in self.phases:
                if name in switched:
                    lines.append(f"        {when}: {_line(spec, name, choices[GEMMS.index(name)], self.tokens)}")
        return "\n".join(lines)


def _line(spec: LinearSpec, name: str, choice: Choice, tokens: int | None) -> str:
    gemm: GemmSpec = getattr(spec, name)
    if gemm == GemmSpec():
        return "high precision (torch)"
    cut = [block for block in _along_tokens(gemm, wgrad=name == "wgrad") if tokens is not None and tokens % block]
    notes = [choice.backend.note(gemm)]
    notes += [f"a micro-batch of {tokens} tokens cuts blocks of {max(cut)}: another has other scales"] if cut else []
    return f"{gemm}  [{', '.join([str(choice), *filter(None, notes)])}]"


def _along_tokens(gemm: GemmSpec, *, wgrad: bool) -> list[int]:
    """How many tokens a tile of x or dy holds, or a block of a transform; not those that hold all there are."""
    if not wgrad:
        return [gemm.a.tile.outer] if gemm.a is not None and gemm.a.tile.outer > 0 else []
    sizes = [operand.tile.inner for operand in (gemm.a, gemm.b) if operand is not None and operand.tile.inner > 0]
    transform = gemm.transform.second if isinstance(gemm.transform, Composed) else gemm.transform
    return [*sizes, transform.size] if isinstance(transform, Hadamard) else sizes


def assign_backends(
    linear: QuantLinear,
    tokens: int | None,
    device: torch.device,
    wanted: str,
    phases: Sequence[tuple[str, tuple[str, ...], LinearSpec]] = (),
) -> LinearRow:
    """Choose a backend for each GEMM, and give the linear the specs of ``phases`` (when, which GEMMs, what).

    Raises ValueError if ``wanted`` is none or refuses.
    """
    n, k, spec = linear.out_features, linear.in_features, linear.spec
    shapes: tuple[tuple[int | None, int, int], ...] = ((tokens, n, k), (tokens, k, n), (n, k, tokens or -1))

    def chosen(spec: LinearSpec) -> Choices:
        pairs = zip(gemms(spec), shapes, strict=True)
        fprop, dgrad, wgrad = (choose(gemm, shape, device, wanted) for gemm, shape in pairs)
        return fprop, dgrad, wgrad

    choices = [chosen(each) for each in (spec, *(phase[2] for phase in phases))]
    backends = [(fprop.backend, dgrad.backend, wgrad.backend) for fprop, dgrad, wgrad in choices]
    linear.schedule((spec, *(phase[2] for phase in phases)), backends)
    switched = tuple((*phase, choice) for phase, choice in zip(phases, choices[1:], strict=True))
    return LinearRow(linear.path, (n, k), spec, choices[0], switched, tokens)
