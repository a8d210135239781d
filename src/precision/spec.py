"""What a recipe says about a linear's three GEMMs: data only.

Every GEMM is ``a @ b.mT`` with the contraction last in both operands, so nothing here names an axis:

=====  ======  ======
GEMM   a       b
=====  ======  ======
fprop  x       w
dgrad  dy      w.mT
wgrad  dy.mT   x.mT
=====  ======  ======
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from .formats import Integer, NumberFormat
from .operand_spec import OperandSpec, Part, Rounding, SlotSpec, Source, Split, Splitter, specs_of, values_of
from .scaling import (
    ROW,
    TENSOR,
    Current,
    Delayed,
    outer_of,
    reads,
)
from .sums import Accumulate, Sums

__all__ = [
    "GEMMS",
    "Estimator",
    "GemmSpec",
    "LinearSpec",
    "OperandSpec",
    "Part",
    "Rounding",
    "SlotSpec",
    "Source",
    "Split",
    "Splitter",
    "Transform",
    "assembled",
    "changes",
    "draws",
    "is_orthogonal",
    "rewrites_output",
    "specs_of",
    "values_of",
]


class Transform(Protocol):
    """An exact rewrite of a GEMM: ``output(left(a) @ right(b).mT)`` is ``a @ b.mT`` but for rounding.

    Hashable data. ``stats`` are what the transform learned from operands that exist in the forward pass, or None.

    ``left``, ``right`` and ``output`` are all that a recipe's own transform must have; the others stand for what is
    written here where it leaves them out. Three things are taken for granted that it may deny or claim: it changes both
    operands (``changes(left) -> bool``), its ``output`` does nothing (``rewrites_output``), and it is no rotation
    (``orthogonal``: ``back`` undoes ``left`` and ``right``). Callers ask by functions, here and in
    ``precision.transforms``.
    """

    def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
        """What is quantized in place of a [m, k]."""

    def right(self, b: Tensor, stats: Tensor | None = None) -> Tensor:
        """What is quantized in place of b [n, k]."""

    def output(self, y: Tensor, stats: Tensor | None = None) -> Tensor:
        """What the GEMM's output [m, n] becomes."""

    def back(self, g: Tensor, *, left: bool, stats: Tensor | None = None) -> Tensor:
        """The gradient with respect to an operand, from that with respect to the transformed operand, of one shape: the
        transposed map of ``left`` or of ``right``. For x' = x R it is g R^T.

        Raises ValueError where the transform names no way back.
        """
        raise ValueError(f"{self} names no way back: it has no method back(g, left, stats)")

    @property
    def draws(self) -> bool:
        """Whether it is drawn anew at every step; what ``drawn`` gives is then applied in its place."""
        return False

    def drawn(self, key: Tensor) -> Transform:
        """The transform of a step, which draws no more. ``key``: int32 [2], as ``noise.step_key`` gives, on the device
        of the operands; the transform depends on nothing else."""
        return self


def draws(transform: object) -> bool:
    """Whether a transform is drawn anew at every step; one that does not say so is not."""
    return bool(getattr(transform, "draws", False))


def changes(transform: Transform | None, *, left: bool) -> bool:
    """Whether a transform changes this operand; one that does not say does."""
    if transform is None:
        return False
    says = getattr(transform, "changes", None)
    return True if says is None else bool(says(left))


def rewrites_output(transform: Transform | None) -> bool:
    """Whether ``output`` does anything; a transform that does not say so (``rewrites_output``) leaves it alone."""
    return bool(getattr(transform, "rewrites_output", False))


def is_orthogonal(transform: Transform | None) -> bool:
    """Whether ``back`` undoes a transform, so that gradients can be taken to where its operands are; one that does not
    say so (``orthogonal``) is not known to."""
    return transform is None or bool(getattr(transform, "orthogonal", False))


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmSpec:
    """The operands of ``a @ b.mT``; None leaves one in high precision.

    ``accumulate``: how products are summed: see ``Sums``; by an ``Accumulate``, which emulation follows in every bit.
    Scales of parts of the contraction are then powers of two, and so part of the values, or multiply the sums that
    ``promote_every`` adds up in FP32, if it is their extent: that has precedence.

    Raises ValueError for a transform of operands that are both left alone, which would only add rounding; for fast sums
    and rules of what is not quantized; for a rule where scales fit no sums, or where integers are summed exactly.
    """

    a: SlotSpec | None = None
    b: SlotSpec | None = None
    transform: Transform | None = None
    accumulate: Accumulate | Sums = Sums.FP32

    def __post_init__(self) -> None:
        if self.transform is not None and self.a is None and self.b is None:
            raise ValueError(f"{self.transform} rewrites a GEMM neither of whose operands is quantized")
        for left, operand in ((True, self.a), (False, self.b)):
            values = operand is not None and operand.source is Source.VALUES
            if values and changes(self.transform, left=left):
                raise ValueError(f"{self.transform} would transform values of codes: quantize them again (QUANTIZED)")
            if isinstance(operand, OperandSpec) and isinstance(operand.amax, Delayed) and draws(self.transform):
                raise ValueError(f"delayed scaling remembers amaxes, and {self.transform} is drawn anew at every step")
        if self.accumulate is Sums.FAST and (self.a is None or self.b is None):
            raise ValueError("fast accumulation is that of a product of two quantized operands")
        if isinstance(self.accumulate, Accumulate):
            self._check_rule(self.accumulate)

    def _check_rule(self, rule: Accumulate) -> None:
        parts = [part.spec for side in (self.a, self.b) if isinstance(side, Split) for part in side.parts]
        if self.a is None or self.b is None or None in parts:
            raise ValueError(f"{rule}: a rule of a product of two quantized operands")
        if any(isinstance(side, Split) and side.source is Source.VALUES for side in (self.a, self.b)):
            raise ValueError(
                f"{rule}: values of parts, read again, are a sum, and no codes: quantize from the original"
            )
        for operand in specs_of(self.a, self.b):
            if isinstance(operand.format, Integer):
                raise ValueError(f"{operand.format} is summed exactly: no rule of sums is for it (accumulate=fp32)")
            if operand.source is Source.VALUES and operand.tile.outer != operand.tile.inner:
                raise ValueError(f"{rule}: {operand}: codes in tiles of {operand.tile} are not read across them")
            if reads(operand.scale) or (operand.scale.levels == 2 and outer_of(operand.scale) not in (TENSOR, ROW)):
                raise ValueError(f"{rule}: {operand}: no rule of sums is for operands whose values are more than codes")
            every = operand.tile.inner
            if operand.scale.levels and every > 0 and not operand.scale.power_of_two and every != rule.promote_every:
                raise ValueError(
                    f"{rule}: {operand} has a scale for every {every} products, which multiplies a sum of these: "
                    f"promote_every={every}"
                )

    def __str__(self) -> str:
        a, b = (str(operand) if operand is not None else "-" for operand in (self.a, self.b))
        suffix = f" [{self.transform}]" if self.transform is not None else ""
        suffix += ", fast accumulation" if self.accumulate is Sums.FAST else ""
        suffix += f", {self.accumulate}" if isinstance(self.accumulate, Accumulate) else ""
        return f"{a} x {b}{suffix}" if (self.a, self.b) != (None, None) else "-"


class Estimator(Protocol):
    """The derivative of rounding, elementwise; straight-through without one: 1. Hashable data; its text stands in
    plan.txt. ``precision.estimator`` has those of more than one paper.
    """

    mask: bool
    """Whether factors are 0 and 1: those of x are then saved for backward as bits, else computed again from x."""

    def factor(self, scaled: Tensor, format: NumberFormat) -> Tensor:
        """What multiplies the gradient: bool or FP32, of the shape of ``scaled``, on its device.

        Args:
            scaled: FP32 [rows, columns], the operand of fprop as it is rounded: transformed, and times its scale.
            format: which it is rounded to.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """The three GEMMs of a linear. An empty spec is a plain linear.

    Args:
        fprop, dgrad, wgrad: how their operands are rounded.
        dx, dw: derivatives of the rounding of fprop's operands; None: straight-through. They multiply dx and dw where
            the operand was rounded, that is after its transform: the gradient is taken there and back.

    Raises ValueError where an operand is to come from codes that nobody makes: x, w and dy appear first in fprop and
    dgrad, and must come from the original there; later operands can reuse only what was quantized before. Also where
    rows of x or dy, which are tokens of one rank there, are to be scaled by the amax of the whole step; where values
    are read by another spec than they were made by; and for derivatives of what is not rounded.
    """

    fprop: GemmSpec = GemmSpec()
    dgrad: GemmSpec = GemmSpec()
    wgrad: GemmSpec = GemmSpec()
    dx: Estimator | None = None
    dw: Estimator | None = None

    def __post_init__(self) -> None:
        slots = {"x": self.fprop.a, "w": self.fprop.b, "dy": self.dgrad.a}
        for tensor, slot in slots.items():
            if slot is not None and slot.source is not Source.ORIGINAL:
                raise ValueError(f"{tensor} is quantized here for the first time: its source must be ORIGINAL")
            if isinstance(slot, OperandSpec) and slot.amax == Current(step=True):
                rows = (outer_of(slot.scale) if slot.scale.levels == 2 else slot.tile) != TENSOR
                if tensor != "w" and rows:
                    raise ValueError(f"rows of {tensor} are tokens of one rank: no scale of them is of the whole step")
        reuses = {"dgrad.b": (self.dgrad.b, "w"), "wgrad.a": (self.wgrad.a, "dy"), "wgrad.b": (self.wgrad.b, "x")}
        for name, (slot, tensor) in reuses.items():
            if slot is not None and slot.source is not Source.ORIGINAL:
                self._check_reuse(name, slot, tensor, slots[tensor])
        self._check_derivative("dx", self.dx, self.fprop.a, self.dgrad.b)
        self._check_derivative("dw", self.dw, self.fprop.b, self.wgrad.b)

    def _check_derivative(
        self, name: str, estimator: Estimator | None, slot: SlotSpec | None, later: SlotSpec | None
    ) -> None:
        if estimator is None:
            return
        if not isinstance(slot, OperandSpec):
            what = "is not rounded" if slot is None else "is a sum of parts"
            raise ValueError(f"{name}: {estimator} is the derivative of one rounding; its operand of fprop {what}")
        transform, reuses = self.fprop.transform, later is not None and later.source is not Source.ORIGINAL
        if not reuses and not is_orthogonal(transform):
            raise ValueError(
                f"{name}: {estimator} multiplies where {transform} led, and no gradient gets there but by codes that "
                "are read again, or by an orthogonal transform"
            )

    def _check_reuse(self, name: str, slot: SlotSpec, tensor: str, earlier: SlotSpec | None) -> None:
        if earlier is None:
            raise ValueError(f"{name} is to reuse the codes of {tensor}, which no GEMM before it quantizes")
        if slot.source is Source.VALUES and replace(slot, source=Source.ORIGINAL) != earlier:
            raise ValueError(f"{name} reads the values of {tensor}: it is {earlier} but for its source, not {slot}")
        if isinstance(slot, Split) and isinstance(earlier, Split) and slot.source is Source.QUANTIZED:
            there, here = (
                [earlier.parts[place].name for place in earlier.read_again],
                [part.name for part in slot.parts],
            )
            if there != here:
                raise ValueError(f"{name} quantizes parts of {tensor} again: {', '.join(there)}, not {', '.join(here)}")
        if tensor != "dy" and rewrites_output(self.fprop.transform):
            raise ValueError(
                f"{name} is to reuse the codes of {tensor}, but {self.fprop.transform} rewrites the output of fprop, "
                "too: dy is that of another output; read the original"
            )
        if tensor == "dy" and changes(self.dgrad.transform, left=True):
            raise ValueError(f"{name} is to reuse the codes of dy, which {self.dgrad.transform} changed along features")

    def __str__(self) -> str:
        derivatives = [f", {name} * {e}" for name, e in (("dx", self.dx), ("dw", self.dw)) if e is not None]
        return f"fprop {self.fprop}, dgrad {self.dgrad}, wgrad {self.wgrad}{''.join(derivatives)}"


GEMMS = ("fprop", "dgrad", "wgrad")


def assembled(specs: Sequence[LinearSpec], picks: tuple[int, int, int]) -> LinearSpec:
    """fprop, dgrad and wgrad, each of one of ``specs``.

    An operand that was to reuse the codes of a GEMM which is now another's is quantized from the original. Derivatives
    are of what fprop rounds.
    """
    fprop, dgrad, wgrad = (getattr(specs[pick], gemm) for pick, gemm in zip(picks, GEMMS, strict=True))

    def fresh(operand: SlotSpec | None, same: bool) -> SlotSpec | None:
        return operand if operand is None or same else replace(operand, source=Source.ORIGINAL)

    of_fprop, of_dgrad, of_wgrad = picks
    return LinearSpec(
        fprop=fprop,
        dgrad=replace(dgrad, b=fresh(dgrad.b, of_dgrad == of_fprop)),
        wgrad=replace(wgrad, a=fresh(wgrad.a, of_wgrad == of_dgrad), b=fresh(wgrad.b, of_wgrad == of_fprop)),
        dx=specs[of_fprop].dx,
        dw=specs[of_fprop].dw,
    )
