"""What of a tile its scale is made of: the amax, or another statistic.

Of all of them: FP32 [rows, columns], computed in FP64 and rounded once, so that the order of sums does not show; of
what a ragged tile holds, alone; NaN where a tile has a NaN; 0 for tiles without elements. Elements are brought to FP32
first, as everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..formats import NumberFormat
from .tiles import Tile, tiled


class Statistic(Protocol):
    """Frozen data; ``str`` of it stands in plan.txt."""

    def of(self, values: Tensor, inside: Tensor, element: NumberFormat) -> Tensor:
        """The statistic of every tile [rows, columns], not negative; any float dtype.

        Args:
            values: FP64 [rows, columns, n], all elements of each tile, row by row; 0 where it has none.
            inside: bool, the same shape: which elements the tile has.
            element: the format that they are to be rounded to.
        """


@dataclass(frozen=True, slots=True)
class Amax:
    """max |x|."""

    def of(self, values: Tensor, inside: Tensor, element: NumberFormat) -> Tensor:
        return values.abs().amax(-1)

    def __str__(self) -> str:
        return "amax"


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of |x| (BitNet's weights: mapped to the 1 of a ternary grid). Infinite with an infinity."""

    def of(self, values: Tensor, inside: Tensor, element: NumberFormat) -> Tensor:
        return values.abs().sum(-1) / inside.sum(-1)

    def __str__(self) -> str:
        return "mean"


@dataclass(frozen=True, slots=True)
class Rms:
    """The square root of the mean of x^2. Infinite with an infinity."""

    def of(self, values: Tensor, inside: Tensor, element: NumberFormat) -> Tensor:
        return (values.square().sum(-1) / inside.sum(-1)).sqrt()

    def __str__(self) -> str:
        return "rms"


@dataclass(frozen=True, slots=True)
class Std:
    """The standard deviation of a population: the square root of the mean of (x - mean of x)^2 (Quartet's forward
    quantizer). NaN with an infinity."""

    def of(self, values: Tensor, inside: Tensor, element: NumberFormat) -> Tensor:
        count = inside.sum(-1)
        centred = values - (values.sum(-1) / count).unsqueeze(-1)
        return (torch.where(inside, centred, 0.0).square().sum(-1) / count).sqrt()

    def __str__(self) -> str:
        return "std"


@dataclass(frozen=True, slots=True)
class Quantile:
    """The q-quantile of |x|, with linear interpolation: of n values in order, the one at place q * (n - 1).

    Raises ValueError for a q outside of [0, 1].
    """

    q: float

    def __post_init__(self) -> None:
        if not 0 <= self.q <= 1:
            raise ValueError(f"a quantile is one of a share from 0 to 1, not of {self.q:g}")

    def of(self, values: Tensor, inside: Tensor, element: NumberFormat) -> Tensor:
        ordered = torch.where(inside, values.abs(), math.inf).sort(-1).values
        place = self.q * (inside.sum(-1, keepdim=True) - 1).clamp(min=0).double()
        below = place.floor()
        low = ordered.gather(-1, below.long())
        high = ordered.gather(-1, place.ceil().long())
        # A place between equal infinities is there, too, and one on a value does not look at the next.
        return torch.where(low == high, low, low + (high - low) * (place - below)).squeeze(-1)

    def __str__(self) -> str:
        return f"quantile{self.q:g}"


AMAX: Statistic = Amax()


def statistic_of(x: Tensor, tile: Tile, statistic: Statistic, element: NumberFormat) -> Tensor:
    """The statistic of every tile of x [outer, inner]: FP32 [rows, columns], detached."""
    x = x.detach().float().double()
    outer, inner = x.shape
    inside = torch.ones((outer, inner), dtype=torch.bool, device=x.device)
    values, mask = (_by_tile(part, tile) for part in (x, inside))
    found = statistic.of(values, mask, element).float()
    found = torch.where(values.isnan().any(-1), math.nan, found)
    return torch.where(mask.any(-1), found, 0.0)


def _by_tile(x: Tensor, tile: Tile) -> Tensor:
    parts = tiled(x, tile)
    rows, tall, columns, wide = parts.shape
    return parts.transpose(1, 2).reshape(rows, columns, tall * wide)
