"""What a recipe says about one operand of a GEMM: how it is rounded, or which parts it is a sum of. Data only."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

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
    Power,
    PowerOfTwo,
    ScaleRule,
    Statistic,
    Tile,
    draws_noise,
    outer_of,
    takes_top,
)
from .suggest import close


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

    The tensor is split first; each part is then transposed, transformed and rounded as an operand of its own. But a
    part of one row, which stands for equal rows, is rounded as the row it is, before. So a residual stands beside
    clamped values (arXiv 2501.17116), or a mean beside what is left (arXiv 2603.10444).

    Args:
        by: what splits.
        parts: in the order in which ``by`` gives them.
        source: ORIGINAL; VALUES to read the parts of an earlier GEMM; or QUANTIZED to quantize each of those again.
        reused: names of the parts that a later GEMM reads which reuses this one's codes; all of them, if left out.

    Raises ValueError for less than two parts, for names that are not apart, and for parts that are all in high
    precision, have a source of their own, or are scaled by anything but their own amax.
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
        for part in self.parts:
            if part.spec is not None and (part.spec.source is not Source.ORIGINAL or part.spec.amax != Current()):
                raise ValueError(
                    f"part {part.name!r}: {part.spec}: a part is scaled by its own amax of this micro-batch"
                )

    def of(self, x: Tensor) -> list[Tensor]:
        """The parts of x [rows, columns]. Raises ValueError for another number of parts than are named, and for another
        shape."""
        parts = list(self.by.split(x))
        if len(parts) != len(self.parts) or any(part.shape not in (x.shape, (1, x.shape[1])) for part in parts):
            shapes = ", ".join(str(list(part.shape)) for part in parts)
            raise ValueError(
                f"{self.by} split {list(x.shape)} into {shapes}: {len(self.parts)} parts of that shape, or of one row, "
                "are wanted"
            )
        return parts

    @property
    def read_again(self) -> tuple[int, ...]:
        """The numbers of the parts that a later GEMM reads."""
        return tuple(number for number, part in enumerate(self.parts) if not self.reused or part.name in self.reused)

    @property
    def read(self) -> tuple[Part, ...]:
        """The parts that the GEMM which says this reads."""
        return tuple(self.parts[place] for place in self.read_again) if self.source is Source.VALUES else self.parts

    def __str__(self) -> str:
        text = f"{self.by}({' + '.join(part.name for part in self.read)})"
        return "/".join([text, *_SOURCE_NAMES.get(self.source, [])])


SlotSpec = OperandSpec | Split
"""What a GEMM may say of an operand."""


def specs_of(*operands: SlotSpec | None) -> tuple[OperandSpec, ...]:
    """The specs of operands, those of parts each."""
    found: list[OperandSpec] = []
    for operand in operands:
        parts = [part.spec for part in operand.parts] if isinstance(operand, Split) else [operand]
        found += [spec for spec in parts if spec is not None]
    return tuple(found)


def values_of(operand: SlotSpec | None) -> SlotSpec | None:
    """The operand of a backward GEMM that reads what an earlier GEMM made of its tensor, without rounding it again."""
    return None if operand is None else replace(operand, source=Source.VALUES)
