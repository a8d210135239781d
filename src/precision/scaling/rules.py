"""Rules with one scale per tile, and what a rule of scales is.

Divisions and products are single FP32 operations rounded to nearest even; powers of two are built from bits, never by
``exp2`` or ``log2``. The order of operations is part of a rule: two rules that are equal on paper differ in the last
bit, and then in codes. Equations stand with each rule.
"""

from __future__ import annotations

import enum
import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from ..formats import E8M0, NumberFormat
from .tiles import TENSOR, Tile

if TYPE_CHECKING:
    from .trial import Trial

FP32_MAX = torch.finfo(torch.float32).max
FP32_TINY = torch.finfo(torch.float32).tiny


class Scales(NamedTuple):
    """What a rule makes of the amaxes of a grid of tiles [rows, columns].

    ``encode`` is FP32 [rows, columns]. ``stored`` has the same shape and holds decode scales in FP32, or codes (uint8)
    of a scale format. ``tensor`` is the outer level: an FP32 scalar, or one for every tile (broadcast), or None.
    """

    encode: Tensor
    stored: Tensor
    tensor: Tensor | None = None


class ScaleRule(Protocol):
    """A rule. Values are stored as round(x * encode) and read as code * stored * tensor.

    A rule of two levels may have ``outer``, the tile of its outer level (``outer_of``); ``scales`` may take ``top``
    (``takes_top``); a rule may decide after the codes (``Finishes``), draw noise for its scales (``draws_noise``) and
    read its codes itself (``Reads``).
    """

    @property
    def format(self) -> NumberFormat | None:
        """The format that ``Scales.stored`` is coded in; None for FP32 values."""

    @property
    def levels(self) -> int:
        """0: no scale. 1: one per tile. 2: one per tile and an FP32 one of the tensor, or of ``outer``."""

    @property
    def power_of_two(self) -> bool:
        """Whether every finite decode scale is a power of two."""

    def scales(
        self, amax: Tensor, element: NumberFormat, *, tensor_amax: Tensor | None = None, dtype: torch.dtype
    ) -> Scales:
        """The scales for tiles with these amaxes, or what else ``OperandSpec.statistic`` makes of a tile.

        Args:
            amax: FP32 [rows, columns], not negative.
            element: the format of the values.
            tensor_amax: for two levels, the largest of what shares an outer scale: FP32 scalar, or of an ``outer`` of
                its own one for every tile [rows, columns] (1 where that extends over all).
            dtype: of the input, for the rule that saturates there.
            top: optional (a float, by default 1): the factor on ``element.max``, to which a tile is mapped.
        """


class Finishes(Protocol):
    """A rule that decides on scales, or on codes, when it has seen what they make of the tile."""

    def finish(self, trial: Trial) -> tuple[Scales, Tensor | None]:
        """The scales, and the codes; None for codes: those that x rounds to by these scales."""


class Reads(Protocol):
    """A rule that says itself what codes stand for, as where marks in the scales say how to read them."""

    def read(self, codes: Tensor, stored: Tensor, element: NumberFormat, tile: Tile) -> Tensor:
        """FP32 [outer, inner] without the outer level.

        Args:
            codes: [outer, inner], one code each (values themselves, for formats over 8 bits).
            stored: [rows, columns], as ``Scales.stored``.
            element, tile: of the operand.
        """


def outer_of(rule: ScaleRule) -> Tile:
    """What the outer scale of a rule of two levels extends over: the tensor, unless the rule says otherwise."""
    return getattr(rule, "outer", TENSOR)


def finishes(rule: object) -> TypeGuard[Finishes]:
    return hasattr(rule, "finish")


def reads(rule: object) -> TypeGuard[Reads]:
    return hasattr(rule, "read")


def draws_noise(rule: ScaleRule) -> bool:
    """Whether a rule draws noise for its scales: ``stochastic`` of the rule, False where it has none."""
    return getattr(rule, "stochastic", False)


def takes_top(rule: ScaleRule) -> bool:
    """Whether the rule's ``scales`` takes ``top``."""
    return "top" in inspect.signature(rule.scales).parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """No scale: the format's own range has to do."""

    format: ClassVar[NumberFormat | None] = None
    levels: ClassVar[int] = 0
    power_of_two: ClassVar[bool] = True

    def scales(
        self, amax: Tensor, element: NumberFormat, *, tensor_amax: Tensor | None = None, dtype: torch.dtype
    ) -> Scales:
        one = torch.ones_like(amax)
        return Scales(one, one)

    def __str__(self) -> str:
        return "unscaled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp32:
    """An FP32 scale derived from its encode side (TransformerEngine: current, delayed and block scaling).

    1. a = max(amax, eps)
    2. s = (max * top * 2^-margin) / a, correctly rounded
    3. s = 1 where a is 0 or not finite; an infinite s becomes the largest finite FP32 value, or with ``input_max`` the
       largest of the input's dtype; s is at least 2^-126 so that 1/s is finite
    4. with ``pow2``: the mantissa bits of s are cleared (down to a power of two)
    5. encode = s, decode = 1 / s, correctly rounded

    TransformerEngine's tensor scales are ``Fp32()``, its block scales ``Fp32(pow2=True, input_max=True)``.
    """

    format: ClassVar[NumberFormat | None] = None
    levels: ClassVar[int] = 1

    margin: int = 0
    eps: float = 0.0
    pow2: bool = False
    input_max: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.margin <= 64:
            raise ValueError(f"the margin is a number of bits from 0 to 64, not {self.margin}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps is a floor of amax and cannot be {self.eps}")

    @property
    def power_of_two(self) -> bool:
        return self.pow2

    def scales(
        self,
        amax: Tensor,
        element: NumberFormat,
        *,
        tensor_amax: Tensor | None = None,
        dtype: torch.dtype,
        top: float = 1.0,
    ) -> Scales:
        a = amax.clamp(min=self.eps)
        most = torch.full_like(a, element.max * top * 2.0**-self.margin)
        limit = torch.finfo(dtype).max if self.input_max and dtype != torch.float64 else FP32_MAX
        s = most / a
        s = torch.where(s.isinf(), limit, s).clamp(min=FP32_TINY)
        s = torch.where((a > 0) & (a < math.inf), s, 1.0)
        if self.pow2:
            s = (s.view(torch.int32) & 0x7F800000).view(torch.float32)
        decode = 1.0 / s
        if element.nan is None:
            decode = torch.where(a.isnan(), math.nan, decode)
        return Scales(s, decode)

    def __str__(self) -> str:
        parts = ["fp32"]
        parts += ["pow2"] * self.pow2
        parts += [f"margin{self.margin}"] * (self.margin > 0)
        parts += [f"eps{self.eps:g}"] * (self.eps > 0)
        parts += ["inputmax"] * self.input_max
        return "-".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp32Decode:
    """An FP32 scale derived from its decode side (DeepSeek-V3, DeepGEMM).

    1. d = max(amax, floor) / (max * top), correctly rounded
    2. with ``ceil_pow2``: d goes up to a power of two: exponent field + (mantissa is not 0), clamped to [1, 254]
    3. decode = d, encode = 1 / d, correctly rounded

    DeepGEMM does not saturate the product x * encode; ours saturates as every quantizer here does.
    """

    format: ClassVar[NumberFormat | None] = None
    levels: ClassVar[int] = 1

    floor: float = 1e-4
    ceil_pow2: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.floor) and self.floor > 0):
            raise ValueError(f"the floor of amax keeps scales from being 0 and cannot be {self.floor}")

    @property
    def power_of_two(self) -> bool:
        return self.ceil_pow2

    def scales(
        self,
        amax: Tensor,
        element: NumberFormat,
        *,
        tensor_amax: Tensor | None = None,
        dtype: torch.dtype,
        top: float = 1.0,
    ) -> Scales:
        a = amax.clamp(min=self.floor)
        d = a / torch.full_like(a, element.max * top)
        if self.ceil_pow2:
            bits = d.view(torch.int32)
            exponent = ((bits >> 23) + ((bits & 0x7FFFFF) != 0).int()).clamp(1, 254)
            d = torch.where(a < math.inf, (exponent << 23).view(torch.float32), d)
        encode = 1.0 / d
        # An infinite value times 0 is NaN, the others would be 0 * inf = NaN on the way back: say so at once.
        return Scales(encode, torch.where(a.isinf(), math.nan, d))

    def __str__(self) -> str:
        return f"fp32-{'ceilpow2' if self.ceil_pow2 else 'decode'}-floor{self.floor:g}"


class Power(enum.Enum):
    """How a power-of-two scale is found from amax.

    OCP MX and its variants, with E = floor(log2(max)) of the element format:

    * FLOOR: 2^(floor(log2(amax)) - E), the OCP text: the largest values of a block may saturate.
    * CEIL: 2^(ceil(log2(amax)) - E).
    * EVEN: FLOOR of amax rounded to the element's mantissa, half up.

    By the ratio v = amax * (1 / (max * top)), that is the scale that is no power of two:

    * RCEIL: the smallest power of two that is not below v, as hardware does (``cvt.rp.ue8m0``).
    * RFLOOR: the largest that is not above v (Quartet's released forward quantizer, of a std).
    * RNEAREST: the nearest by its exponent, 2^round(log2(v)) (Quartet's published errors).
    """

    FLOOR = "floor"
    CEIL = "ceil"
    EVEN = "even"
    RCEIL = "rceil"
    RFLOOR = "rfloor"
    RNEAREST = "rnearest"


MX_POWERS = (Power.FLOOR, Power.CEIL, Power.EVEN, Power.RCEIL)
"""Those of MX formats, which kernels know."""
_BY_RATIO = (Power.RCEIL, Power.RFLOOR, Power.RNEAREST)
_SQRT2 = 0x3504F3  # mantissa bits of the largest FP32 number below the square root of 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOfTwo:
    """A power-of-two scale, stored as an E8M0 code (MXFP8, MXFP6, MXFP4).

    With F and M the exponent field and mantissa bits of an FP32 number (so a subnormal has F = 0):

    * FLOOR: code = F(amax) - E. CEIL: one more where M(amax) is not 0. EVEN: F of the bits of amax plus half a unit of
      the element's last mantissa bit. All three are clamped to [0, 255]; 255 also where amax is NaN.
    * RCEIL: v = amax * r, with r = 1 / (max * top) rounded to FP32; code = F(v), plus 1 where M(v) is not 0, but
      F = 254 stays and F = 0 goes up only where M(v) > 0x400000, that is v > 2^-127. NaN: 255, infinity: 254.
    * RFLOOR: code = F(v). RNEAREST: plus 1 where M(v) is above that of the square root of 2, and F(v) is not 0. Both
      as RCEIL where v is not finite; a subnormal v has code 0.

    encode = 2^(127 - code), exactly: code 254 gives the subnormal 2^-127, code 255 NaN.

    FLOOR, CEIL and EVEN know no max but its exponent: ``top`` does not enter the code there, but lies beyond the power
    of two: encode = top * 2^(127 - code), rounded once, and 1 / top is a factor of the whole operand. (So Quartet's
    backward: floor, top 3/4, E2M1: amax lands between 3 and 6, and a product of two is multiplied by 16/9.)
    """

    format: ClassVar[NumberFormat | None] = E8M0
    levels: ClassVar[int] = 1
    power_of_two: ClassVar[bool] = True

    mode: Power = Power.RCEIL

    def scales(
        self,
        amax: Tensor,
        element: NumberFormat,
        *,
        tensor_amax: Tensor | None = None,
        dtype: torch.dtype,
        top: float = 1.0,
    ) -> Scales:
        nan = amax.isnan()
        by_ratio = self.mode in _BY_RATIO
        if by_ratio:
            v = amax * (1.0 / torch.full_like(amax, element.max * top))
            bits = v.view(torch.int32)
            exponent, mantissa = bits >> 23, bits & 0x7FFFFF
            if self.mode is Power.RCEIL:
                up = (mantissa > torch.where(exponent == 0, 0x400000, 0)) & (exponent < 254)
                exponent = exponent + up.int()
            elif self.mode is Power.RNEAREST:
                exponent = exponent + ((mantissa > _SQRT2) & (exponent > 0)).int()
            code = exponent.clamp(max=254)
        else:
            bits = torch.where(nan, 0, amax.view(torch.int32))
            if self.mode is Power.EVEN:
                bits = bits + (1 << (23 - element.mantissa_bits - 1))
            exponent = bits >> 23
            if self.mode is Power.CEIL:
                exponent = exponent + ((bits & 0x7FFFFF) != 0).int()
            code = (exponent - element.max_exponent).clamp(0, 255)
        code = torch.where(nan, 255, code)
        encode = encode_power(code)
        if by_ratio or top == 1.0:
            return Scales(encode, code.to(torch.uint8))
        beyond = torch.full((), 1.0 / top, dtype=torch.float32, device=amax.device)
        return Scales(encode * top, code.to(torch.uint8), beyond)

    def __str__(self) -> str:
        return f"e8m0-{self.mode.value}"


def encode_power(code: Tensor) -> Tensor:
    """2^(127 - code) in FP32 for integer E8M0 codes; NaN for 255."""
    field = 254 - code.int()
    bits = torch.where(field > 0, field << 23, torch.where(field < 0, 0x7FC00000, (field + 1) << 22))
    return bits.view(torch.float32)
