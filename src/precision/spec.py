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

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from torch import Tensor

from .formats import E2M1, Integer, NumberFormat
from .scaling import (
    AMAX,
    ROW,
    TENSOR,
    AmaxSource,
    Current,
    Delayed,
    FourOverSix,
    Fp32,
    Power,
    PowerOfTwo,
    ScaleRule,
    Statistic,
    Tile,
    draws_noise,
    outer_of,
    reads,
    takes_top,
)
from .suggest import close
from .sums import Accumulate, Sums


def draws(transform: object) -> bool:
    """Whether a transform is drawn anew at every step; one that does not say so is not."""
    return bool(getattr(transform, "draws", False))


def changes(transform: Transform | None, *, left: bool) -> bool:
    """Whether a transform changes this operand; one that does not say does."""
    if transform is None:
        return False
    says = getattr(transform, "changes", None)
    return True if says is None else bool(says(left))


class Rounding(enum.Enum):
    NEAREST = "nearest"
    STOCHASTIC = "stochastic"
    TRUNCATE = "truncate"  # towards zero


_ROUNDING_NAMES = {Rounding.STOCHASTIC: "sr", Rounding.TRUNCATE: "rz"}  # in plan.txt; nearest goes without saying


class Source(enum.Enum):
    """What a backward operand is quantized from.

    ORIGINAL: the high-precision tensor. QUANTIZED: what an earlier GEMM of the same linear made of that tensor, as a
    transposed view of its codes where the tile allows that, else dequantized and quantized again. VALUES: the values of
    those codes, which are not rounded again; the operand's spec is that of the earlier GEMM but for this.

    Codes that fprop made of a transformed operand are read as they are, so that the gradient which comes of them is one
    with respect to the transformed operand: ``Transform.back`` takes it to that of the operand.
    """

    ORIGINAL = "original"
    QUANTIZED = "quantized"
    VALUES = "values"


_SOURCE_NAMES = {Source.QUANTIZED: ["requantized"], Source.VALUES: ["values"]}  # in plan.txt


class Transform(Protocol):
    """An exact rewrite of a GEMM: ``output(left(a) @ right(b).mT)`` is ``a @ b.mT`` but for rounding.

    Hashable data. ``stats`` are what the transform learned from operands that exist in the forward pass, or None.

    ``left``, ``right`` and ``output`` are all that a recipe's own transform must have; the others stand for what is
    written here where it leaves them out. One that leaves an operand as it is may say so: ``changes(left) -> bool``.
    Callers ask by functions: ``changes``, ``draws``, and ``drawn`` and ``back`` of ``precision.transforms``.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class OperandSpec:
    """How one operand of a GEMM is rounded.

    Args:
        format: of the elements.
        tile: what shares a scale.
        scale: how amax becomes a scale.
        amax: of this tensor, or of earlier steps.
        rounding: of the elements; scales round as their rule says.
        source: see ``Source``.
        statistic: what of a tile its scale is made of, in place of the amax.
        top: factor on the format's largest value, to which that is mapped: below 1 leaves head-room. Each rule's
            equations say where it enters.

    Raises ValueError for what cannot be: a scale format as elements, an empty tile, delayed amaxes of many tiles, two
    levels of scales on one tile, a tile without a scale, amaxes rounded to a mantissa that a format lacks, another
    statistic of earlier steps or of all ranks.
    """

    format: NumberFormat
    tile: Tile = TENSOR
    scale: ScaleRule = field(default_factory=Fp32)
    amax: AmaxSource = field(default_factory=Current)
    rounding: Rounding = Rounding.NEAREST
    source: Source = Source.ORIGINAL
    statistic: Statistic = AMAX
    top: float = 1.0

    def __post_init__(self) -> None:
        if self.format.scales_only:
            raise ValueError(f"{self.format} holds scales: it cannot be the format of elements")
        for name, extent in zip(Tile._fields, self.tile, strict=True):
            if extent != -1 and extent < 1:
                raise ValueError(f"the {name} extent of a tile is at least 1, or -1 for the whole; not {extent}")
        of_tensor = self.tile == TENSOR
        if self.scale.levels == 0 and not of_tensor:
            raise ValueError(f"{self.scale} has no scales to give to tiles of {self.tile}: leave the tile out")
        if self.scale.levels == 2 and of_tensor:
            raise ValueError(f"{self.scale} has a scale for the tensor and one per tile: the tile must be smaller")
        if isinstance(self.amax, Delayed):
            if self.scale.levels == 0:
                raise ValueError("an unscaled operand has no use for a delayed amax")
            if self.scale.levels == 1 and not of_tensor:
                raise ValueError(f"delayed scaling keeps one amax per tensor: it cannot scale tiles of {self.tile}")
        shared = outer_of(self.scale) if self.scale.levels == 2 else self.tile
        if isinstance(self.amax, Current) and self.amax.step and shared.inner != -1:
            raise ValueError(f"tiles of {shared} lie within a sample: no scale of them is of the whole step")
        if isinstance(self.amax, Current) and self.amax.step and self.scale.levels == 0:
            raise ValueError("an unscaled operand has no use for the amax of a step")
        if self.scale.levels == 2:
            self._check_outer_level(outer_of(self.scale))
        if isinstance(self.scale, FourOverSix):
            self._check_four_over_six()
        if self.statistic != AMAX or self.top != 1:
            self._check_mapping()
        if isinstance(self.scale, PowerOfTwo) and self.scale.mode is Power.EVEN:
            _ = self.format.mantissa_bits  # raises where there are none

    def _check_outer_level(self, outer: Tile) -> None:
        if outer == TENSOR:
            return
        whole = all(n == -1 or (part > 0 and n > 0 and n % part == 0) for n, part in zip(outer, self.tile, strict=True))
        if not whole or outer == self.tile:
            raise ValueError(
                f"{self.scale} scales {outer}s by themselves: its tiles are parts of a {outer}, not {self.tile}"
            )
        if self.tile.outer == self.tile.inner and outer.outer != outer.inner:
            raise ValueError(
                f"tiles of {self.tile} are read in both directions: their outer level is square, not {outer}"
            )
        if isinstance(self.amax, Delayed):
            raise ValueError(f"delayed scaling keeps one amax per tensor: it cannot scale {outer}s by themselves")

    def _check_four_over_six(self) -> None:
        if self.format != E2M1 or self.tile not in ((1, 16), (16, 16)):
            raise ValueError(f"four over six is for e2m1 in tiles of 1x16 or 16x16, not {self.format} in {self.tile}")
        if self.rounding is Rounding.TRUNCATE:
            raise ValueError("four over six is for nearest or stochastic rounding: to truncate is not for it")

    def _check_mapping(self) -> None:
        """Of a statistic and a top that are not the defaults."""
        if self.scale.levels == 0:
            raise ValueError(f"{self.scale}: neither a statistic nor a top is of use without a scale")
        if not 0 < self.top < math.inf:
            raise ValueError(f"top is a factor on the largest value of {self.format}, above 0, not {self.top:g}")
        if self.top != 1 and not takes_top(self.scale):
            raise ValueError(f"{self.scale} maps a tile as its own `scales` says, which takes no top: leave it at 1")
        if self.statistic != AMAX and self.amax != Current():
            raise ValueError(f"{self.amax} scaling remembers and exchanges amaxes alone: no {self.statistic} of a tile")

    @property
    def stochastic(self) -> bool:
        """Whether it needs noise, for its elements or for its scales."""
        return self.rounding is Rounding.STOCHASTIC or draws_noise(self.scale)

    def __str__(self) -> str:
        delayed = isinstance(self.amax, Delayed)
        scale = str(self.scale)
        parts = [str(self.format)]
        parts += [str(self.tile)] if self.scale.levels else []
        parts += [] if delayed and self.scale == Fp32() else [scale]
        parts += [str(self.statistic)] if self.statistic != AMAX else []
        parts += [f"top{self.top:g}"] if self.top != 1 else []
        parts += [str(self.amax)] if self.amax != Current() else []
        parts += [_ROUNDING_NAMES[self.rounding]] if self.rounding in _ROUNDING_NAMES else []
        parts += _SOURCE_NAMES.get(self.source, [])
        return "/".join(parts)


class Splitter(Protocol):
    """Takes a tensor apart into tensors that add up to it. Hashable data; its text stands in plan.txt."""

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts of x, w or dy, as the linear reads it: tokens or output features first, whatever the GEMM.

        Each of the shape of ``x`` [rows, columns], or [1, columns] where all its rows are equal: the product then has
        one row, too. FP32 or the dtype of ``x``.
        """


class Part(NamedTuple):
    """A part of an operand: its name in plan.txt and in the probe, and how it is rounded; None: not at all."""

    name: str
    spec: OperandSpec | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """An operand that is a sum of parts, with a spec each: the GEMM is the sum of the parts' products, in FP32.

    The tensor is split first; each part is then transposed, transformed and rounded as an operand of its own. So a
    residual stands beside clamped values (arXiv 2501.17116), or a mean beside what is left (arXiv 2603.10444).

    Args:
        by: what splits.
        parts: in the order in which ``by`` gives them.
        source: ORIGINAL, or VALUES to read the parts of an earlier GEMM.
        reused: names of the parts that a later GEMM reads which reuses this one's codes; all of them, if left out.

    Raises ValueError for less than two parts, for names that are not apart, and for parts that are all in high
    precision, of an earlier source, or scaled by anything but their own amax.
    """

    by: Splitter
    parts: tuple[Part, ...]
    source: Source = Source.ORIGINAL
    reused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if len(set(names)) != len(names) or len(names) < 2:
            raise ValueError(f"an operand is split into two or more parts with names of their own, not {names}")
        if all(part.spec is None for part in self.parts):
            raise ValueError(f"{self.by}: none of its parts {', '.join(names)} is quantized: leave the split out")
        if unknown := [name for name in self.reused if name not in names]:
            raise ValueError(f"no part named {unknown[0]!r}{close(unknown[0], names)}; there are: {', '.join(names)}")
        if self.source is Source.QUANTIZED:
            raise ValueError("a sum of parts is quantized from the original, or the values of earlier parts are read")
        for part in self.parts:
            if part.spec is not None and (part.spec.source is not Source.ORIGINAL or part.spec.amax != Current()):
                raise ValueError(
                    f"part {part.name!r}: {part.spec}: a part is scaled by its own amax of this micro-batch"
                )

    @property
    def read_again(self) -> tuple[int, ...]:
        """The numbers of the parts that a later GEMM reads."""
        return tuple(number for number, part in enumerate(self.parts) if not self.reused or part.name in self.reused)

    @property
    def read(self) -> tuple[Part, ...]:
        """The parts that the GEMM which says this reads."""
        return self.parts if self.source is Source.ORIGINAL else tuple(self.parts[place] for place in self.read_again)

    def __str__(self) -> str:
        return f"{self.by}({' + '.join(part.name for part in self.read)}){'/values' * (self.source is Source.VALUES)}"


SlotSpec = OperandSpec | Split
"""What a GEMM may say of an operand."""


def specs_of(*operands: SlotSpec | None) -> tuple[OperandSpec, ...]:
    """The specs of operands, those of parts each."""
    found: list[OperandSpec] = []
    for operand in operands:
        parts = [part.spec for part in operand.parts] if isinstance(operand, Split) else [operand]
        found += [spec for spec in parts if spec is not None]
    return tuple(found)


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
        for name, estimator, slot in (("dx", self.dx, self.fprop.a), ("dw", self.dw, self.fprop.b)):
            if estimator is not None and not isinstance(slot, OperandSpec):
                what = "is not rounded" if slot is None else "is a sum of parts"
                raise ValueError(f"{name}: {estimator} is the derivative of one rounding; its operand of fprop {what}")

    def _check_reuse(self, name: str, slot: SlotSpec, tensor: str, earlier: SlotSpec | None) -> None:
        if earlier is None:
            raise ValueError(f"{name} is to reuse the codes of {tensor}, which no GEMM before it quantizes")
        if slot.source is Source.VALUES and replace(slot, source=Source.ORIGINAL) != earlier:
            raise ValueError(f"{name} reads the values of {tensor}: it is {earlier} but for its source, not {slot}")
        if tensor == "dy" and self.dgrad.transform is not None:
            raise ValueError(f"{name} is to reuse the codes of dy, which {self.dgrad.transform} changed along features")

    def __str__(self) -> str:
        derivatives = [f", {name} * {e}" for name, e in (("dx", self.dx), ("dw", self.dw)) if e is not None]
        return f"fprop {self.fprop}, dgrad {self.dgrad}, wgrad {self.wgrad}{''.join(derivatives)}"


def values_of(operand: SlotSpec | None) -> SlotSpec | None:
    """The operand of a backward GEMM that reads what an earlier GEMM made of its tensor, without rounding it again."""
    return None if operand is None else replace(operand, source=Source.VALUES)


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
