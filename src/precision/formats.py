"""Number formats, and what they do to numbers: ``round``, ``encode``, ``decode``.

A format is a grid of values. ``round`` takes any float tensor to the grid and stays in FP32; ``encode`` turns grid
values into codes and ``decode`` codes into values. Scales are no business of this module. Three leaves of one protocol
stand here side by side, which is why this file is long.

``NumberFormat`` is the protocol. Its leaves: ``ExMy`` (sign, exponent, mantissa), ``Integer``, ``PowersOfTwo`` (E8M0,
for scales), and ``precision.codebook.Codebook``, a table of values. A recipe may bring another: plain torch computes
it by its own methods, kernels refuse it.

Non-finite values: ``round`` saturates, so an infinity becomes the largest finite value of its sign, also in formats
that have infinities; NaN stays NaN. ``encode`` gives NaN its code; in formats without one it becomes the largest
positive value, as the PTX conversion instructions do.

How the bits of ``ExMy`` and ``Integer`` are defined (every operation below is one FP32 operation rounded to nearest
even, or an integer one):

* ``a = min(|x|, max)``; ``e = max(floor(log2(a)), min_exponent)``, from the exponent field of ``a``; the spacing of the
  grid around ``a`` is ``ulp = 2^(e - mantissa_bits)``. Integers are as if every value were subnormal: spacing 1.
* nearest even: ``(a + c) - c`` with ``c = 2^(e - mantissa_bits + 23)``: the sum has the spacing ``ulp``. Without
  mantissa bits, ties go to the even code all the same.
* stochastic: ``f = a / ulp`` (exact), ``q = floor(f)``, up by one if ``noise < f - q``, times ``ulp`` (exact).
* formats with FP32's own exponent range work on the bits of ``a``, whose low ``23 - mantissa_bits`` bits are dropped.
* the sign of ``x`` is put back, that of zero included.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .suggest import close


class NumberFormat(ABC):
    """The protocol of a number format: a grid of FP32 values.

    A format of a recipe's own subclasses it, as hashable data (a frozen dataclass, say), and defines ``name`` (as in
    plan.txt), ``bits`` of one code, ``max`` and ``round``; and where codes have at most 8 bits ``encode`` and
    ``decode``. Values of wider formats are stored as they are. The other defaults hold for every format.
    """

    __slots__ = ()

    if TYPE_CHECKING:  # at run time a dataclass would take them for the defaults of its fields

        @property
        def name(self) -> str: ...

        @property
        def bits(self) -> int: ...

        @property
        def max(self) -> float:
            """The largest finite value: ``round`` saturates there, and scale rules put amaxes there."""

    @property
    def min(self) -> float:
        """The smallest finite value."""
        return -self.max

    @property
    def dtype(self) -> torch.dtype | None:
        """Torch's storage dtype, or None where there is none. That of E2M1 holds two codes and has no casts."""
        return None

    @property
    def nan(self) -> int | None:
        """The code of NaN, or None in a format without one."""
        return None

    @property
    def scales_only(self) -> bool:
        """Whether it holds scales alone, without sign or zero."""
        return False

    @property
    def max_exponent(self) -> int:
        """floor(log2(max))."""
        return math.frexp(self.max)[1] - 1

    @property
    def tiny_exponent(self) -> int:
        """floor(log2) of the smallest positive value; FP32's where nothing is known."""
        return -149

    @property
    def significant_bits(self) -> int:
        """Bits that the significand of any value fits in, the implicit one included; FP32's where nothing is known."""
        return 24

    @property
    def mantissa_bits(self) -> int:
        """Stored bits of the significand. Raises ValueError in a format without significands, as a table of values."""
        raise ValueError(
            f"{self.name} has no mantissa to round an amax to: power-of-two scales by floor, ceil or rceil need none"
        )

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """The values of ``x`` rounded to this format's grid, in FP32.

        Args:
            x: any shape, any float dtype (brought to FP32 first).
            noise: None for round to nearest; else FP32 in [0, 1), of the shape of ``x``: rounds away from zero where it
                is below the fraction of the grid's spacing that would be cut off. Values on the grid stay.
        """

    def truncate(self, x: Tensor) -> Tensor:
        """The values of ``x`` cut off towards zero to this format's grid, in FP32; beyond ``max`` they saturate."""
        return self.round(x, torch.ones((), device=x.device))  # no fraction is above 1: nothing rounds up

    def encode(self, values: Tensor) -> Tensor:
        """The codes (uint8) of values on the grid, as ``round`` gives them. Raises ValueError where there are none."""
        raise ValueError(f"{self.name} has {self.bits} bits; codes are for formats of at most 8 that define encode")

    def decode(self, codes: Tensor) -> Tensor:
        """The FP32 values of codes (uint8): the inverse of ``encode``. Raises ValueError where there are none."""
        raise ValueError(f"{self.name} has {self.bits} bits; codes are for formats of at most 8 that define decode")

    def _require_codes(self) -> None:
        if self.bits > 8:
            raise ValueError(f"{self.name} has {self.bits} bits; codes are for formats of at most 8")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExMy(NumberFormat):
    """A binary floating-point format of up to 16 bits: sign, exponent, mantissa.

    Args:
        name: as in ``by_name`` and in plan.txt.
        bits: of one code.
        exponent_bits: at least 1.
        mantissa_bits: stored bits of the significand, without the implicit one; 0 for powers of two and zero.
        min_exponent: of the smallest normal value, 2^min_exponent.
        max: largest finite value.
        inf: whether the magnitude code after that of ``max`` is an infinity.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int = field()  # without a default: the protocol's property is none
    min_exponent: int
    max: float
    dtype: torch.dtype | None = None
    nan: int | None = None
    inf: bool = False

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field of a normal value."""
        return 1 - self.min_exponent

    @property
    def tiny_exponent(self) -> int:
        """log2 of the smallest positive value."""
        return self.min_exponent - self.mantissa_bits

    @property
    def significant_bits(self) -> int:
        return self.mantissa_bits + 1

    @property
    def max_code(self) -> int:
        """The code of ``max``."""
        significand = round(self.max / 2.0 ** (self.max_exponent - self.mantissa_bits))
        return ((self.max_exponent + self.bias) << self.mantissa_bits) + significand - (1 << self.mantissa_bits)

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        x = x.float()
        a = x.abs().clamp(max=self.max)
        bits = a.view(torch.int32)
        if self.min_exponent == -126:
            return torch.copysign(self._round_bits(a, bits, noise), x)
        e = (bits >> 23).clamp(self.min_exponent + 127, max(self.min_exponent, self.max_exponent) + 127)
        if noise is None and self.mantissa_bits == 0:
            return torch.copysign(self._round_powers(a, bits), x)
        if noise is None:
            c = ((e + (23 - self.mantissa_bits)) << 23).view(torch.float32)
            return torch.copysign((a + c) - c, x)
        f = a * ((254 + self.mantissa_bits - e) << 23).view(torch.float32)
        floor = f.floor()
        q = floor + (noise < f - floor).float()
        return torch.copysign(q * ((e - self.mantissa_bits) << 23).view(torch.float32), x)

    def _round_bits(self, a: Tensor, bits: Tensor, noise: Tensor | None) -> Tensor:
        drop = 23 - self.mantissa_bits
        mask = (1 << drop) - 1
        if noise is None:
            rounded = (bits + (mask >> 1) + ((bits >> drop) & 1)) & ~mask
        else:
            up = noise < (bits & mask).float() * 2.0**-drop
            rounded = (bits & ~mask) + (up.int() << drop)
        return torch.where(a.isnan(), a, rounded.view(torch.float32))

    def _round_powers(self, a: Tensor, bits: Tensor) -> Tensor:
        # The neighbours 2^e and 2^(e+1) are 1 and 2 times the spacing: as multiples the upper one would always be even.
        least = 2.0**self.min_exponent
        odd = (bits >> 23) - (self.min_exponent + 126) & 1
        normal = (bits + 0x3FFFFF + odd) & ~0x7FFFFF
        below = torch.where(a > least / 2, least, 0.0)
        rounded = torch.where(a < least, below, normal.view(torch.float32))
        return torch.where(a.isnan(), a, rounded)

    def encode(self, values: Tensor) -> Tensor:
        """The codes (uint8) of values on the grid, as ``round`` gives them.

        Raises ValueError for formats of more than 8 bits, which are stored in their torch dtype.
        """
        self._require_codes()
        values = values.float()
        values = torch.where(values.isnan(), self.max, values) if self.nan is None else values
        m = self.mantissa_bits
        a = values.abs().clamp(max=self.max)
        bits = a.view(torch.int32)
        normal = (bits >> (23 - m)) - ((127 - self.bias) << m)
        # NaN is taken out before it becomes an integer: that conversion is undefined.
        subnormal = (a.nan_to_num() * 2.0**-self.tiny_exponent).clamp(max=float(1 << m)).int()
        code = torch.where(a < 2.0**self.min_exponent, subnormal, normal)
        code = code | ((values.view(torch.int32) < 0).int() << (self.bits - 1))
        if self.nan is not None:
            code = torch.where(values.isnan(), self.nan, code)
        return code.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The FP32 values of codes (uint8): the inverse of ``encode``, infinities and NaN included.

        Bits above those of the format are ignored. Raises ValueError for formats of more than 8 bits.
        """
        self._require_codes()
        code = codes.int() & ((1 << self.bits) - 1)
        half = 1 << (self.bits - 1)
        m = self.mantissa_bits
        magnitude = code & (half - 1)
        normal = ((magnitude + ((127 - self.bias) << m)) << (23 - m)).view(torch.float32)
        value = torch.where(magnitude < (1 << m), magnitude.float() * 2.0**self.tiny_exponent, normal)
        if self.nan is not None:
            value = torch.where(magnitude > self.max_code + int(self.inf), math.nan, value)
        if self.inf:
            value = torch.where(magnitude == self.max_code + 1, math.inf, value)
        return torch.where(code >= half, -value, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Integer(NumberFormat):
    """A two's complement integer of 2 to 16 bits on the symmetric grid -max .. max, as INT2 on -1, 0, 1 (BitNet).

    The most negative code is decoded and never encoded. A zero has the sign of what became it, until it is encoded.
    Raises ValueError for other widths.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"integers have 2 to 16 bits, not {self.bits}")

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def max(self) -> float:
        return float(self.max_code)

    @property
    def max_code(self) -> int:
        """The code of ``max``."""
        return (1 << (self.bits - 1)) - 1

    @property
    def dtype(self) -> torch.dtype | None:
        return torch.int8 if self.bits == 8 else None

    @property
    def mantissa_bits(self) -> int:
        return self.bits - 1

    @property
    def min_exponent(self) -> int:
        """That of a float in which every integer is subnormal."""
        return self.bits - 1

    @property
    def tiny_exponent(self) -> int:
        return 0

    @property
    def significant_bits(self) -> int:
        return self.bits - 1

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        x = x.float()
        a = x.abs().clamp(max=self.max)
        if noise is None:
            return torch.copysign((a + 2.0**23) - 2.0**23, x)
        floor = a.floor()
        return torch.copysign(floor + (noise < a - floor).float(), x)

    def encode(self, values: Tensor) -> Tensor:
        self._require_codes()
        values = values.float()
        values = torch.where(values.isnan(), self.max, values)
        return (values.int() & ((1 << self.bits) - 1)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        self._require_codes()
        code = codes.int() & ((1 << self.bits) - 1)
        half = 1 << (self.bits - 1)
        return ((code ^ half) - half).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class PowersOfTwo(NumberFormat):
    """OCP's scale format E8M0: powers of two from 2^-127 to 2^127 and NaN, no sign, no zero."""

    name: ClassVar[str] = "e8m0"
    bits: ClassVar[int] = 8
    max: ClassVar[float] = 2.0**127
    min: ClassVar[float] = 2.0**-127
    dtype: ClassVar[torch.dtype | None] = torch.float8_e8m0fnu
    nan: ClassVar[int | None] = 0xFF
    scales_only: ClassVar[bool] = True
    tiny_exponent: ClassVar[int] = -127
    significant_bits: ClassVar[int] = 1

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Raises ValueError: how scales round is a rule of ``precision.scaling``."""
        raise ValueError("e8m0 holds scales and has no rounding of its own; see precision.scaling.PowerOfTwo")

    def encode(self, values: Tensor) -> Tensor:
        """The codes (uint8) of powers of two."""
        return ((values.float().view(torch.int32) >> 23) & 0xFF).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        code = codes.int() & 0xFF
        bits = torch.where(code == 0, 1 << 22, torch.where(code == 255, 0x7FC00000, code << 23))
        return bits.view(torch.float32)


def pack4(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte: uint8 [..., n] -> uint8 [..., ceil(n / 2)].

    The element of even index lies in the LOW nibble; after an odd number of elements comes a zero code.
    """
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[..., 0::2] & 0xF) | ((codes[..., 1::2] & 0xF) << 4)


def unpack4(packed: Tensor, size: int) -> Tensor:
    """The inverse of ``pack4``: uint8 [..., ceil(size / 2)] -> uint8 [..., size].

    Raises ValueError when ``size`` is not what the bytes hold.
    """
    if packed.shape[-1] != (size + 1) // 2:
        raise ValueError(f"{size} codes of 4 bits take {(size + 1) // 2} bytes, not {packed.shape[-1]}")
    return torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)[..., :size]


def _float(
    name: str,
    exponent_bits: int,
    mantissa_bits: int,
    max: float,
    *,
    dtype: torch.dtype | None = None,
    nan: int | None = None,
    inf: bool = False,
) -> ExMy:
    """The signed format with the bias 2^(exponent_bits - 1) - 1."""
    return ExMy(
        name=name,
        bits=1 + exponent_bits + mantissa_bits,
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        min_exponent=2 - (1 << (exponent_bits - 1)),
        max=max,
        dtype=dtype,
        nan=nan,
        inf=inf,
    )


# OCP FP8 (E4M3 has no infinity and one NaN), and E4M3 as on Gaudi 2: an IEEE-like top exponent, so the maximum is 240.
E4M3 = _float("e4m3", 4, 3, 448.0, dtype=torch.float8_e4m3fn, nan=0x7F)
E4M3_240 = _float("e4m3_240", 4, 3, 240.0, nan=0x7C, inf=True)
E5M2 = _float("e5m2", 5, 2, 57344.0, dtype=torch.float8_e5m2, nan=0x7E, inf=True)
# OCP FP4 and FP6: neither infinities nor NaN.
E2M1 = _float("e2m1", 2, 1, 6.0, dtype=torch.float4_e2m1fn_x2)
E3M2 = _float("e3m2", 3, 2, 28.0)
E2M3 = _float("e2m3", 2, 3, 7.5)
BF16 = _float("bf16", 8, 7, torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16, nan=0x7FC0, inf=True)
FP16 = _float("fp16", 5, 10, 65504.0, dtype=torch.float16, nan=0x7E00, inf=True)
E8M0 = PowersOfTwo()
INT8, INT4 = Integer(bits=8), Integer(bits=4)

FORMATS: dict[str, NumberFormat] = {
    f.name: f for f in (E4M3, E4M3_240, E5M2, E2M1, E3M2, E2M3, E8M0, BF16, FP16, INT8, INT4)
}


def exmy(exponent_bits: int, mantissa_bits: int, *, ieee: bool = True) -> ExMy:
    """The signed format with these field widths and the bias 2^(exponent_bits - 1) - 1.

    One exponent bit gives a uniform grid (E1M2: 0, 0.5 .. 3.5), no mantissa bits zero and powers of two (E3M0: 0, 0.25,
    0.5 .. 16).

    Args:
        ieee: whether the top exponent is reserved for infinity and NaN, as in E5M2 and BF16; else it holds numbers, as
            in E2M1. E4M3 with its one NaN is neither.

    Gives the constant of this module where one has the same grid; else one named ``eXmY_ieee`` or ``eXmY_finite``.
    Raises ValueError for other than 1 to 8 exponent bits, for what does not fit in 16 bits, for IEEE specials that
    leave no normal numbers or no mantissa for NaN, and for 8 exponent bits without them.
    """
    bits = 1 + exponent_bits + mantissa_bits
    name = f"e{exponent_bits}m{mantissa_bits}"
    if not (1 <= exponent_bits <= 8 and mantissa_bits >= 0 and bits <= 16):
        raise ValueError(f"no format {name}: exponents have 1 to 8 bits, and all of it fits in 16 bits")
    if ieee and (exponent_bits == 1 or mantissa_bits == 0):
        other = f"; there is {name}_finite" if exponent_bits < 8 else ""
        raise ValueError(f"no format {name}: IEEE specials need 2 exponent bits and a mantissa bit{other}")
    if exponent_bits == 8 and not ieee:
        raise ValueError(f"no format {name}_finite: 8 exponent bits are FP32's, with IEEE specials; there is {name}")
    top = (1 << (exponent_bits - 1)) - 1 if ieee else 1 << (exponent_bits - 1)
    format = _float(
        f"{name}_{'ieee' if ieee else 'finite'}",
        exponent_bits,
        mantissa_bits,
        (2.0 - 2.0**-mantissa_bits) * 2.0**top,
        nan=(((1 << exponent_bits) - 1) << mantissa_bits) | (1 << (mantissa_bits - 1)) if ieee else None,
        inf=ieee,
    )
    known = (f for f in FORMATS.values() if isinstance(f, ExMy) and (f.bits, f.max) == (bits, format.max))
    return next(known, format)


def by_name(name: str) -> NumberFormat:
    """The format of this name: one of ``FORMATS``, or ``intN``, or ``eXmY_ieee`` (or just ``eXmY``) or ``eXmY_finite``.

    Raises ValueError with the close matches for any other name.
    """
    if name in FORMATS:
        return FORMATS[name]
    if match := re.fullmatch(r"e(\d)m(\d+)(_ieee|_finite)?", name):
        return exmy(int(match[1]), int(match[2]), ieee=match[3] != "_finite")
    if match := re.fullmatch(r"int(\d+)", name):
        return Integer(bits=int(match[1]))
    near, known = close(name, FORMATS), ", ".join(FORMATS)
    raise ValueError(f"no number format named {name!r}{near}; there are: {known}, and any eXmY and intN")
