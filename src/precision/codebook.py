"""A number format that is a table of values, such as NF4 or a posit.

Rounding to nearest is exact: the midpoint of two neighbours is a rational number, which FP32 need not hold, so what is
compared with is the smallest FP32 number that goes to the upper one. To find the pair is one ``torch.bucketize``.
"""

from __future__ import annotations

import enum
import functools
import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .formats import NumberFormat

_FP32_MAX = (2 - 2.0**-23) * 2.0**127
_LEAST = 2.0**-149


class Ties(enum.Enum):
    """Where a value goes that is as far from one value of the table as from the next."""

    EVEN_CODE = "even code"  # the lower value where both codes are even, or neither
    AWAY_FROM_ZERO = "away from zero"  # the upper value where both are as far from zero, here and in the next
    TOWARDS_ZERO = "towards zero"
    LOWER = "lower value"
    UPPER = "upper value"


@dataclass(frozen=True, slots=True, kw_only=True)
class Codebook(NumberFormat):
    """A table of values.

    With v the value of the table next to x on the side of zero (of the two neighbours of x the one of less magnitude;
    the lower one if both are as far from zero), and w the other neighbour:

    * nearest: exact, ties by ``ties``. With ``middles``, to the upper neighbour above the middle, else to the lower.
    * stochastic: w where noise < |x - v| / |w - v|, in three FP32 operations; else v. On an evenly spaced stretch this
      is what ``ExMy`` does, bit for bit. Where a table lacks zero, v and w may have different signs.
    * truncated: the value itself for those of the table, else v.

    Beyond the ends values saturate. A zero has the sign of x where the table holds -0, else that of the table.

    Args:
        name: in plan.txt. Nothing else is told there of the table.
        values: finite, in any order, each taken as the nearest FP32 number; -0 may stand beside 0.
        codes: of the values, from 0 to 65535; None: 0, 1, 2 .. in the order of the values. Codes that are nobody's
            decode to NaN. ``bits`` is the length of the largest code, that of NaN included.
        ties: where values go that are as far from one neighbour as from the other, or in the middle between them.
        middles: between the values (less -0) in ascending order, as exact as given; None: where both are as far. Posits
            have those of the format with a bit more, which lie elsewhere between powers of two.
        nan: the code of NaN, if it has one.
        keeps_nonzero: what is not zero never becomes zero, but the neighbour of zero on its side, whatever the rounding
            (posits).

    Raises ValueError for a table that is none.
    """

    name: str
    values: tuple[float, ...]
    codes: tuple[int, ...] | None = None
    ties: Ties = Ties.EVEN_CODE
    middles: tuple[float, ...] | None = None
    nan: int | None = None
    keeps_nonzero: bool = False

    def __post_init__(self) -> None:
        codes = range(len(self.values)) if self.codes is None else self.codes
        taken = [*codes, *([] if self.nan is None else [self.nan])]
        if len(codes) != len(self.values):
            raise ValueError(f"{self.name} has {len(self.values)} values and {len(codes)} codes: each value needs one")
        if len(set(taken)) < len(taken):
            twice = next(code for code in taken if taken.count(code) > 1)
            raise ValueError(f"{self.name} has the code {twice} twice")
        if not all(0 <= code < 1 << 16 for code in taken):
            raise ValueError(f"{self.name}: codes are from 0 to 65535, not {min(taken)} to {max(taken)}")
        if not all(abs(value) <= _FP32_MAX for value in self.values):
            raise ValueError(f"{self.name}: values are finite FP32 numbers; NaN has a code of its own (nan=)")
        rounded = sorted(map(_fp32, self.values), key=_signed)
        for low, high in pairwise(rounded):
            if _signed(low) == _signed(high):
                raise ValueError(f"{self.name} has the value {low:g} twice, as FP32 numbers")
            if high - low > _FP32_MAX:
                raise ValueError(f"{self.name}: FP32 does not hold the distance of {low:g} and {high:g}")
        if len(set(rounded)) < 2 or rounded[-1] <= 0:
            raise ValueError(f"{self.name} needs two values at least, and one above zero")
        distinct = sorted(set(rounded))
        if self.middles is not None and len(self.middles) != len(distinct) - 1:
            raise ValueError(
                f"{self.name} has {len(distinct)} values and {len(self.middles)} middles: one less is needed"
            )
        for (low, high), middle in zip(pairwise(distinct), self.middles or (), strict=False):
            if not low <= middle <= high:
                raise ValueError(f"{self.name}: {middle:g} is no middle of {low:g} and {high:g}")
        if self.keeps_nonzero and 0.0 not in rounded:
            raise ValueError(f"{self.name} has no zero that nonzero values could become: leave keeps_nonzero out")

    def __hash__(self) -> int:
        return hash(self.name)  # a table of 65536 values is hashed for every operand

    @property
    def bits(self) -> int:
        return _table(self).bits

    @property
    def max(self) -> float:
        return _table(self).values[-1]

    @property
    def min(self) -> float:
        return _table(self).values[0]

    @property
    def tiny_exponent(self) -> int:
        """floor(log2) of the least magnitude that is not 0."""
        return _table(self).tiny_exponent

    @property
    def significant_bits(self) -> int:
        return _table(self).significant_bits

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """As ``NumberFormat.round``; see above for what noise means."""
        x, t = x.float(), _tensors(self, x.device)
        if noise is None:
            return self._signed(_pick(t.values, x, t.nearest), x)
        x = x.clamp(self.min, self.max)
        pair = _between(x, t.values[1:-1])
        near, far = t.near[pair], t.far[pair]
        up = noise < (x - near).abs() / t.gaps[pair]
        if self.keeps_nonzero:
            up |= (near == 0) & (x != 0)
        return self._signed(torch.where(up, far, near), x)

    def truncate(self, x: Tensor) -> Tensor:
        x, t = x.float(), _tensors(self, x.device)
        return self._signed(_pick(t.values, x, t.truncated), x)

    def _signed(self, values: Tensor, x: Tensor) -> Tensor:
        if _table(self).negative_zero is not None:
            values = torch.where(values == 0, torch.copysign(values, x), values)
        return torch.where(x.isnan(), x, values)

    def encode(self, values: Tensor) -> Tensor:
        """The codes (uint8) of values of the table; NaN without a code becomes the largest value.

        Raises ValueError for tables of more than 8 bits, whose values are stored in FP32.
        """
        self._require_codes()
        values, t, negative_zero = values.float(), _tensors(self, values.device), _table(self).negative_zero
        codes = _pick(t.codes, values, t.values[1:])
        if negative_zero is not None:
            codes = torch.where((values == 0) & values.signbit(), negative_zero, codes)
        if self.nan is not None:
            codes = torch.where(values.isnan(), self.nan, codes)
        return codes.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The FP32 values of codes (uint8); NaN for codes that are nobody's. Bits beyond ``bits`` are ignored.

        Raises ValueError for tables of more than 8 bits.
        """
        self._require_codes()
        return _tensors(self, codes.device).decoded[codes.int() & ((1 << self.bits) - 1)]


class _Table(NamedTuple):
    """A codebook in ascending order, the codes of its values, and what follows for every pair of neighbours."""

    values: list[float]  # -0 is none of them where 0 is
    codes: list[int]
    negative_zero: int | None  # the code of -0 beside 0
    bits: int
    tiny_exponent: int
    significant_bits: int
    nearest: list[float]  # the least number that goes to the upper neighbour
    truncated: list[float]
    upwards: list[bool]  # whether the lower neighbour is next on the side of zero


@functools.cache
def _table(book: Codebook) -> _Table:
    given = book.codes or range(len(book.values))
    pairs = sorted(zip(map(_fp32, book.values), given, strict=True), key=lambda pair: _signed(pair[0]))
    zeros = [code for value, code in pairs if value == 0]
    negative_zero = zeros[0] if len(zeros) == 2 else None
    pairs = [pair for pair in pairs if pair[1] != negative_zero]
    values, codes = [value for value, _ in pairs], [code for _, code in pairs]
    upwards = [abs(low) <= abs(high) for low, high in pairwise(values)]
    nearest, truncated = [], []
    for place, (low, high) in enumerate(pairwise(values)):
        if book.keeps_nonzero and 0.0 in (low, high):
            nearest.append(0.0 if high == 0 else _LEAST)
            truncated.append(nearest[-1])
            continue
        middle = (Fraction(low) + Fraction(high)) / 2 if book.middles is None else Fraction(book.middles[place])
        code = negative_zero if high == 0 and negative_zero is not None else codes[place + 1]
        nearest.append(_least(middle, above=not _tie_goes_up(book.ties, low, high, codes[place], code)))
        truncated.append(high if upwards[place] else _least(Fraction(low), above=True))
    return _Table(
        values=values,
        codes=codes,
        negative_zero=negative_zero,
        bits=max(1, *(code.bit_length() for code in given), (book.nan or 0).bit_length()),
        tiny_exponent=math.frexp(min(abs(value) for value in values if value))[1] - 1,
        significant_bits=max(_significant_bits(value) for value in values),
        nearest=nearest,
        truncated=truncated,
        upwards=upwards,
    )


def _tie_goes_up(ties: Ties, low: float, high: float, low_code: int, high_code: int) -> bool:
    match ties:
        case Ties.EVEN_CODE:
            return low_code % 2 > high_code % 2
        case Ties.AWAY_FROM_ZERO:
            return abs(high) >= abs(low)
        case Ties.TOWARDS_ZERO:
            return abs(high) <= abs(low)
    return ties is Ties.UPPER


class _Tensors(NamedTuple):
    """A table on a device: FP32, and int32 codes."""

    values: Tensor
    codes: Tensor
    decoded: Tensor  # by code
    nearest: Tensor
    truncated: Tensor
    near: Tensor
    far: Tensor
    gaps: Tensor


@functools.cache
def _tensors(book: Codebook, device: torch.device) -> _Tensors:
    table = _table(book)

    def fp32(numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=device)

    decoded = [math.nan] * (1 << table.bits)
    for value, code in zip(table.values, table.codes, strict=True):
        decoded[code] = value
    if table.negative_zero is not None:
        decoded[table.negative_zero] = -0.0
    neighbours = list(zip(table.values, table.values[1:], table.upwards, strict=False))
    near, far = (fp32([low if up is of_near else high for low, high, up in neighbours]) for of_near in (True, False))
    return _Tensors(
        values=fp32(table.values),
        codes=torch.tensor(table.codes, dtype=torch.int32, device=device),
        decoded=fp32(decoded),
        nearest=fp32(table.nearest),
        truncated=fp32(table.truncated),
        near=near,
        far=far,
        gaps=(far - near).abs(),
    )


def _between(x: Tensor, boundaries: Tensor) -> Tensor:
    """How many of the ascending boundaries are not above x: int32. All of them for NaN."""
    return torch.bucketize(x.contiguous(), boundaries, right=True, out_int32=True)


def _pick(of: Tensor, x: Tensor, boundaries: Tensor) -> Tensor:
    return of[_between(x, boundaries)]


def _signed(x: float) -> tuple[float, float]:
    """Sorts -0 below 0."""
    return x, math.copysign(1.0, x)


def _fp32(x: float) -> float:
    """x rounded to FP32."""
    rounded: float = struct.unpack("f", struct.pack("f", x))[0]
    return rounded


def _least(limit: Fraction, *, above: bool) -> float:
    """The smallest FP32 number that is not below ``limit``; with ``above``, that is above it."""
    x = _fp32(float(limit))
    while Fraction(x) > limit or (Fraction(x) == limit and not above):
        x = _next(x, -1)
    while Fraction(x) < limit or (Fraction(x) == limit and above):
        x = _next(x, 1)
    return x


def _next(x: float, step: int) -> float:
    """The FP32 number beside x, above it (step 1) or below (-1)."""
    bits: int = struct.unpack("i", struct.pack("f", x))[0]
    place = (bits if bits >= 0 else -(bits & 0x7FFFFFFF)) + step
    neighbour: float = struct.unpack("f", struct.pack("I", place if place >= 0 else 0x80000000 - place))[0]
    return neighbour


def _significant_bits(value: float) -> int:
    """Of a finite FP32 number."""
    numerator = abs(value).as_integer_ratio()[0]
    return numerator.bit_length() - (numerator & -numerator).bit_length() + 1 if numerator else 0
