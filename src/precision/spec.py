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
from typing import Protocol

from torch import Tensor

from .formats import E2M1, NumberFormat
from .scaling import (
    AMAX,
    TENSOR,
    AmaxSource,
    Current,
    Delayed,
    FourOverSix,
    Fp32,
    ScaleRule,
    Statistic,
    Tile,
    draws_noise,
    outer_of,
    takes_top,
)


class Rounding(enum.Enum):
    NEAREST = "nearest"
    STOCHASTIC = "stochastic"
    TRUNCATE = "truncate"  # towards zero


_ROUNDING_NAMES = {Rounding.STOCHASTIC: "sr", Rounding.TRUNCATE: "rz"}  # in plan.txt; nearest goes without saying


class Source(enum.Enum):
    """What a backward operand is quantized from.

    ORIGINAL: the high-precision tensor. QUANTIZED: what an earlier GEMM of the same linear made of that tensor, as a
    transposed view of its codes where the tile allows that, else dequantized and quantized again.
    """

    ORIGINAL = "original"
    QUANTIZED = "quantized"


class Transform(Protocol):
    """An exact rewrite of a GEMM: ``output(left(a) @ right(b).mT)`` is ``a @ b.mT`` but for rounding.

    Hashable data. ``stats`` are what the transform learned from operands that exist in the forward pass, or None.
    """

    def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
        """What is quantized in place of a [m, k]."""

    def right(self, b: Tensor, stats: Tensor | None = None) -> Tensor:
        """What is quantized in place of b [n, k]."""

    def output(self, y: Tensor, stats: Tensor | None = None) -> Tensor:
        """What the GEMM's output [m, n] becomes."""


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
    levels of scales on one tile, a tile without a scale, another statistic of earlier steps or of all ranks.
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
        parts += ["requantized"] if self.source is Source.QUANTIZED else []
        return "/".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmSpec:
    """The operands of ``a @ b.mT``; None leaves one in high precision.

    ``fast_accum``: native FP8 products may sum without additions in FP32 in between (``use_fast_accum`` of Ada and
    Hopper, whose steps keep 13 fraction bits either way), which is faster; None leaves it to the backend. Emulation
    sums in FP32 all the same.

    Raises ValueError for a transform of operands that are both left alone, which would only add rounding, and for fast
    sums of what is not quantized.
    """

    a: OperandSpec | None = None
    b: OperandSpec | None = None
    transform: Transform | None = None
    fast_accum: bool | None = False

    def __post_init__(self) -> None:
        if self.transform is not None and self.a is None and self.b is None:
            raise ValueError(f"{self.transform} rewrites a GEMM neither of whose operands is quantized")
        if self.fast_accum and (self.a is None or self.b is None):
            raise ValueError("fast accumulation is that of a product of two quantized operands")

    def __str__(self) -> str:
        a, b = (str(operand) if operand is not None else "-" for operand in (self.a, self.b))
        suffix = f" [{self.transform}]" if self.transform is not None else ""
        suffix += ", fast accumulation" if self.fast_accum else ""
        return f"{a} x {b}{suffix}" if (self.a, self.b) != (None, None) else "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """The three GEMMs of a linear. An empty spec is a plain linear.

    Raises ValueError where an operand is to come from codes that nobody makes: x, w and dy appear first in fprop and
    dgrad, and must come from the original there; later operands can reuse only what was quantized before. Also where
    rows of x or dy, which are tokens of one rank there, are to be scaled by the amax of the whole step.
    """

    fprop: GemmSpec = GemmSpec()
    dgrad: GemmSpec = GemmSpec()
    wgrad: GemmSpec = GemmSpec()

    def __post_init__(self) -> None:
        slots = {"x": self.fprop.a, "w": self.fprop.b, "dy": self.dgrad.a}
        for tensor, slot in slots.items():
            if slot is not None and slot.source is Source.QUANTIZED:
                raise ValueError(f"{tensor} is quantized here for the first time: its source must be ORIGINAL")
            if slot is not None and slot.amax == Current(step=True):
                rows = (outer_of(slot.scale) if slot.scale.levels == 2 else slot.tile) != TENSOR
                if tensor != "w" and rows:
                    raise ValueError(f"rows of {tensor} are tokens of one rank: no scale of them is of the whole step")
        reuses = {"dgrad.b": (self.dgrad.b, "w"), "wgrad.a": (self.wgrad.a, "dy"), "wgrad.b": (self.wgrad.b, "x")}
        for name, (slot, tensor) in reuses.items():
            if slot is not None and slot.source is Source.QUANTIZED and slots[tensor] is None:
                raise ValueError(f"{name} is to reuse the codes of {tensor}, which no GEMM before it quantizes")

    def __str__(self) -> str:
        return f"fprop {self.fprop}, dgrad {self.dgrad}, wgrad {self.wgrad}"


GEMMS = ("fprop", "dgrad", "wgrad")


def assembled(specs: Sequence[LinearSpec], picks: tuple[int, int, int]) -> LinearSpec:
    """fprop, dgrad and wgrad, each of one of ``specs``.

    An operand that was to reuse the codes of a GEMM which is now another's is quantized from the original.
    """
    fprop, dgrad, wgrad = (getattr(specs[pick], gemm) for pick, gemm in zip(picks, GEMMS, strict=True))

    def fresh(operand: OperandSpec | None, same: bool) -> OperandSpec | None:
        return operand if operand is None or same else replace(operand, source=Source.ORIGINAL)

    of_fprop, of_dgrad, of_wgrad = picks
    return LinearSpec(
        fprop=fprop,
        dgrad=replace(dgrad, b=fresh(dgrad.b, of_dgrad == of_fprop)),
        wgrad=replace(wgrad, a=fresh(wgrad.a, of_wgrad == of_dgrad), b=fresh(wgrad.b, of_wgrad == of_fprop)),
    )
