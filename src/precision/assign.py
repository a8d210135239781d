"""Who computes a linear's GEMMs, chosen once when shapes are known, and the linear's lines of plan.txt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from .backends import Choice, choose
from .blocks import Experts
from .slots import TENSORS, WGRAD, gemms, is_stochastic
from .spec import GEMMS, GemmSpec, LinearSpec, Split, specs_of
from .transforms import check_shape, rotations

if TYPE_CHECKING:
    from .module import Site
    from .planned import Planned

Choices = tuple[Choice, Choice, Choice]


def shape_of(linear: nn.Linear | Experts | Planned) -> str:
    """In plan.txt."""
    shape, experts = f"{linear.in_features:>6} -> {linear.out_features:<6}", getattr(linear, "num_experts", 0)
    return f"{experts} x {shape.strip()}" if experts else shape


def assign_backends(linear: Planned, site: Site, phases: Sequence[tuple[str, tuple[str, ...], LinearSpec]]) -> str:
    """Choose a backend for each GEMM, and give the linear the specs of ``phases`` (when, which GEMMs, what).

    Returns its lines of plan.txt: one per GEMM, and one more per GEMM that a schedule switches. Raises ValueError if
    the wanted backend is none or refuses.
    """
    n, k, experts = linear.out_features, linear.in_features, linear.num_experts > 0
    tokens = None if experts else site.tokens  # of an expert any number
    shapes: tuple[tuple[int | None, int, int], ...] = ((tokens, n, k), (tokens, k, n), (n, k, tokens or -1))

    def chosen(spec: LinearSpec) -> Choices:
        pairs = zip(gemms(spec), shapes, strict=True)
        fprop, dgrad, wgrad = (choose(gemm, shape, site.device, site.backend, experts=experts) for gemm, shape in pairs)
        return fprop, dgrad, wgrad

    specs = [linear.spec, *(spec for _, _, spec in phases)]
    for spec in specs:
        for name, gemm, shape in zip(GEMMS, gemms(spec), shapes, strict=True):
            _check_transform(f"{linear.path}, {name}", gemm, shape)
            if experts and -1 in _along_tokens(gemm, wgrad=name == "wgrad"):
                raise ValueError(
                    f"{linear.path}, {name}: {gemm.transform} is of all rows of an expert, of which there is any "
                    "number: give it a size, or keep experts in high precision"
                )
    choices = [chosen(spec) for spec in specs]
    linear.set_specs(specs, [(fprop.backend, dgrad.backend, wgrad.backend) for fprop, dgrad, wgrad in choices])
    lines = [f"{linear.path:44} {shape_of(linear)}"]
    for number, name in enumerate(GEMMS):
        lines.append(f"    {name}: {_line(number, specs[0], choices[0], tokens, experts)}")
        for (when, switched, spec), choice in zip(phases, choices[1:], strict=True):
            if name in switched:
                lines.append(f"        {when}: {_line(number, spec, choice, tokens, experts)}")
    return "\n".join(lines)


def _check_transform(where: str, gemm: GemmSpec, shape: tuple[int | None, int, int]) -> None:
    try:
        check_shape(gemm.transform, shape)
    except ValueError as error:
        raise ValueError(f"{where}: {gemm.transform}: {error}") from None


def _line(number: int, spec: LinearSpec, choices: Choices, tokens: int | None, experts: bool) -> str:
    gemm, choice = gemms(spec)[number], choices[number]
    estimator = (None, spec.dx, spec.dw)[number]
    derivative = "" if estimator is None else f"{('', 'dx', 'dw')[number]} * {estimator}"
    if gemm == GemmSpec():
        return ", ".join(filter(None, ["high precision (torch)", derivative]))
    sides = TENSORS[2 * number : 2 * number + 2]
    blocks = _along_tokens(gemm, wgrad=number == WGRAD)
    cut = [block for block in blocks if tokens is not None and block > 0 and tokens % block]
    notes = [choice.backend.note(gemm)]
    notes += [f"a micro-batch of {tokens} tokens cuts blocks of {max(cut)}: another has other scales"] if cut else []
    notes += ["a transform of all tokens of a micro-batch: another has other scales"] if -1 in blocks else []
    random = [of for side, of in zip((gemm.a, gemm.b), sides, strict=True) if of != "w" and is_stochastic(side)]
    if experts and random and not choice.backend.quantizer.takes_rows:
        notes += [f"{' and '.join(random)} rounded in plain torch: no kernel for the noise of routed rows"]
    line = f"{', '.join(filter(None, [str(gemm), derivative]))}  [{', '.join([str(choice), *filter(None, notes)])}]"
    parts = [
        (name, part)
        for name, side in zip(sides, (gemm.a, gemm.b), strict=True)
        if isinstance(side, Split)
        for part in side.read
    ]
    lines = [f"            {name}, {part.name}: {part.spec or 'high precision'}" for name, part in parts]
    return "\n".join([line, *lines])


def _along_tokens(gemm: GemmSpec, *, wgrad: bool) -> list[int]:
    """How many tokens a tile of x or dy holds, but for those that hold all there are; and how many a transform takes
    together, -1 for all."""
    specs = specs_of(gemm.a, gemm.b) if wgrad else specs_of(gemm.a)
    extents = [spec.tile.inner if wgrad else spec.tile.outer for spec in specs]
    rotated = [at.hadamard.size for at in rotations(gemm.transform) if at.extent == ("k" if wgrad else "m")]
    return [*(extent for extent in extents if extent > 0), *rotated]
