"""Scales: over which tiles of a matrix they extend, and how an absolute maximum becomes one.

A rule turns the absolute maxima (amax) of tiles into ``Scales``: ``encode``, the FP32 factor that values are multiplied
by before they are rounded, and what is stored to get them back. Divisions and products are single FP32 operations
rounded to nearest even; powers of two are built from bits, never by ``exp2`` or ``log2``. The order of operations is
part of a rule: two rules that are equal on paper differ in the last bit, and then in codes. Equations stand with
each rule, which is why this file is long.

Non-finite amax (an amax over values with a NaN is NaN):

===============  ==========================================  ====================================================
rule             inf                                         NaN
===============  ==========================================  ====================================================
Unit             nothing is scaled                           nothing is scaled
Fp32             scale 1: infinities saturate                scale 1; if the format has no NaN, decode scale NaN
Fp32Decode       decode inf, encode 0: the tile is NaN       the tile is NaN
PowerOfTwo       RCEIL: code 254; others: as if amax were    code 255 = NaN: the tile is NaN
                 2^128. Saturated, it decodes to inf again
TwoLevel         of the tensor: global encode scale 1; of    of the tensor: all is NaN; of a block: the block is
                 a block: its scale saturates                NaN
===============  ==========================================  ====================================================

``Delayed.update`` leaves the amax in use when the new one is zero or not finite.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .formats import E4M3, E8M0, NumberFormat

FP32_MAX = torch.finfo(torch.float32).max
FP32_TINY = torch.finfo(torch.float32).tiny


class Tile(NamedTuple):
    """How far one scale extends over a matrix [outer, inner] whose contraction is last; -1 is the full extent.

    ``(-1, -1)`` is the tensor, ``(1, -1)`` a row, ``(1, 16)`` a block, ``(128, 128)`` a square.
    """

    outer: int
    inner: int

    def __str__(self) -> str:
        names = {(-1, -1): "tensor", (1, -1): "row", (-1, 1): "column"}
        outer, inner = (str(n) if n > 0 else "*" for n in self)
        return names.get((self.outer, self.inner), f"{outer}x{inner}")

    def grid(self, outer: int, inner: int) -> tuple[int, int]:
        """How many tiles cover a matrix of this shape: the last ones may be ragged, a full extent is one tile."""
        tall, wide = self.extent(outer, inner)
        return (
            1 if self.outer < 0 else -(-outer // tall),
            1 if self.inner < 0 else -(-inner // wide),
        )

    def extent(self, outer: int, inner: int) -> tuple[int, int]:
        """The size of a tile of a matrix of this shape, at least 1 x 1."""
        return (
            max(outer, 1) if self.outer < 0 else self.outer,
            max(inner, 1) if self.inner < 0 else self.inner,
        )


TENSOR = Tile(-1, -1)


class Scales(NamedTuple):
    """What a rule makes of the amaxes of a grid of tiles [rows, columns].

    ``encode`` is FP32 [rows, columns]. ``stored`` has the same shape and holds decode scales in FP32, or codes (uint8)
    of a scale format. ``tensor`` is the second level: an FP32 scalar, or [rows, 1], or None.
    """

    encode: Tensor
    stored: Tensor
    tensor: Tensor | None = None


class ScaleRule(Protocol):
    """A rule. Values are stored as round(x * encode) and read as code * stored * tensor."""

    @property
    def format(self) -> NumberFormat | None:
        """The format that ``Scales.stored`` is coded in; None for FP32 values."""

    @property
    def levels(self) -> int:
        """0: no scale. 1: one per tile. 2: one per tile and one for the tensor."""

    @property
    def power_of_two(self) -> bool:
        """Whether every finite decode scale is a power of two."""

    def scales(
        self, amax: Tensor, element: NumberFormat, *, tensor_amax: Tensor | None = None, dtype: torch.dtype
    ) -> Scales:
        """The scales for tiles with these amaxes.

        Args:
            amax: FP32 [rows, columns], not negative.
            element: the format of the values.
            tensor_amax: FP32 scalar, for two levels; [rows, 1] where rows have a level of their own.
            dtype: of the input, for the rule that saturates there.
        """


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
    2. s = (max * 2^-margin) / a, correctly rounded
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
        self, amax: Tensor, element: NumberFormat, *, tensor_amax: Tensor | None = None, dtype: torch.dtype
    ) -> Scales:
        a = amax.clamp(min=self.eps)
        top = torch.full_like(a, element.max * 2.0**-self.margin)
        limit = torch.finfo(dtype).max if self.input_max and dtype != torch.float64 else FP32_MAX
        s = top / a
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

    1. d = max(amax, floor) / max, correctly rounded
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
        self, amax: Tensor, element: NumberFormat, *, tensor_amax: Tensor | None = None, dtype: torch.dtype
    ) -> Scales:
        a = amax.clamp(min=self.floor)
        d = a / torch.full_like(a, element.max)
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
    """How a power-of-two scale is found from amax (OCP MX and its variants).

    With E = floor(log2(max)) of the element format:

    * FLOOR: 2^(floor(log2(amax)) - E), the OCP text: the largest values of a block may saturate.
    * CEIL: 2^(ceil(log2(amax)) - E).
    * EVEN: FLOOR of amax rounded to the element's mantissa, half up.
    * RCEIL: the smallest power of two that is not below amax * (1 / max), as hardware does (``cvt.rp.ue8m0``).
    """

    FLOOR = "floor"
    CEIL = "ceil"
    EVEN = "even"
    RCEIL = "rceil"


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOfTwo:
    """A power-of-two scale, stored as an E8M0 code (MXFP8, MXFP6, MXFP4).

    With F and M the exponent field and mantissa bits of an FP32 number (so a subnormal has F = 0):

    * FLOOR: code = F(amax) - E. CEIL: one more where M(amax) is not 0. EVEN: F of the bits of amax plus half a unit of
      the element's last mantissa bit. All three are clamped to [0, 255]; 255 also where amax is NaN.
    * RCEIL: v = amax * r, with r = 1 / max rounded to FP32; code = F(v), plus 1 where M(v) is not 0, but F = 254
      stays and F = 0 goes up only where M(v) > 0x400000, that is v > 2^-127. NaN: 255, infinity: 254.

    encode = 2^(127 - code), exactly: code 254 gives the subnormal 2^-127, code 255 NaN.
    """

    format: ClassVar[NumberFormat | None] = E8M0
    levels: ClassVar[int] = 1
    power_of_two: ClassVar[bool] = True

    mode: Power = Power.RCEIL

    def scales(
        self, amax: Tensor, element: NumberFormat, *, tensor_amax: Tensor | None = None, dtype: torch.dtype
    ) -> Scales:
        nan = amax.isnan()
        if self.mode is Power.RCEIL:
            v = amax * (1.0 / torch.full_like(amax, element.max))
            bits = v.view(torch.int32)
            exponent, mantissa = bits >> 23, bits & 0x7FFFFF
            up = (mantissa > torch.where(exponent == 0, 0x400000, 0)) & (exponent < 254)
            code = (exponent + up.int()).clamp(max=254)
        else:
            bits = torch.where(nan, 0, amax.view(torch.int32))
            if self.mode is Power.EVEN:
                bits = bits + (1 << (23 - element.mantissa_bits - 1))
            exponent = bits >> 23
            if self.mode is Power.CEIL:
                exponent = exponent + ((bits & 0x7FFFFF) != 0).int()
            code = (exponent - element.max_exponent).clamp(0, 255)
        code = torch.where(nan, 255, code)
        return Scales(encode_power(code), code.to(torch.uint8))

    def __str__(self) -> str:
        return f"e8m0-{self.mode.value}"


def encode_power(code: Tensor) -> Tensor:
    """2^(127 - code) in FP32 for integer E8M0 codes; NaN for 255."""
    field = 254 - code.int()
    bits = torch.where(field > 0, field << 23, torch.where(field < 0, 0x7FC00000, (field + 1) << 22))
    return bits.view(torch.float32)


class Error(enum.Enum):
    """What is compared between two quantizations of a tile: the sum of absolute or of squared differences."""

    MAE = "mae"
    MSE = "mse"


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoLevel:
    """A scale per tile in a narrow format, and an FP32 scale for the tensor that centres them in its range (NVFP4).

    In FP32, with A the amax of the tensor, a that of a tile, ``top`` = ``block_max`` (448 if None, or 256 as in 4/6):

    1. S = min((max * top) / A, FLT_MAX); S = 1 where A is 0 or S is 0
    2. c = S * (1 / max), the reciprocal rounded once; d = block.round(min(a * c, block.max)): no lower clamp, so tiles
       that are zero or underflow store a literal 0
    3. encode = min(1 / (d * (1 / S)), FLT_MAX)
    4. decode = d * T with T = A / (max * top); T = 1 / S where S was set to 1 or to FLT_MAX

    Any tile but the tensor itself may carry such scales; native kernels take 1x16 and 16x16 of E2M1 only.

    ``rows``: A, S and T are of each row of the quantized matrix instead of the tensor (TransformerEngine's row-scaled
    activations: tokens in fprop, channels in wgrad).

    ``four_over_six`` (arXiv 2512.02010, in TransformerEngine's float order): E2M1 is sparse between 4 and 6, so a tile
    may be better off with its largest value at 4. Two candidates, the one of smaller error wins, a tie is the first's:

    2'. d = block.round(min((a / max) * S, block.max)), and block.round(min((a / max) * S * 1.5, block.max))

    Rounded stochastically, both candidates see the same noise and are compared as they come out, so the codes that are
    used are those that were compared (the authors' code draws anew for each).
    """

    levels: ClassVar[int] = 2
    power_of_two: ClassVar[bool] = False

    block: NumberFormat = E4M3
    block_max: float | None = None
    rows: bool = False
    four_over_six: Error | None = None

    def __post_init__(self) -> None:
        if self.block.bits > 8 or self.block.nan is None or self.block.scales_only:
            raise ValueError(f"block scales are floating-point codes of at most 8 bits with a NaN, not {self.block}")
        if self.block_max is not None and not 0 < self.block_max <= self.block.max:
            raise ValueError(f"block_max is at most the {self.block.max:g} of {self.block}, not {self.block_max:g}")

    @property
    def format(self) -> NumberFormat | None:
        return self.block

    def scales(
        self, amax: Tensor, element: NumberFormat, *, tensor_amax: Tensor | None = None, dtype: torch.dtype
    ) -> Scales:
        assert tensor_amax is not None, "two levels of scales need the tensor's amax"
        if self.four_over_six is not None:
            return self.candidates(amax, element, tensor_amax)[0]
        s, tensor = self.tensor_level(tensor_amax, element)
        c = s * (1.0 / torch.full_like(s, element.max))
        return self._of_block(amax * c, s, tensor)

    def candidates(self, amax: Tensor, element: NumberFormat, tensor_amax: Tensor) -> tuple[Scales, Scales]:
        """Four over six: the scales that put the largest value of a tile at 6, and at 4."""
        s, tensor = self.tensor_level(tensor_amax, element)
        base = (amax / torch.full_like(amax, element.max)) * s
        return self._of_block(base, s, tensor), self._of_block(base * 1.5, s, tensor)

    def _of_block(self, wanted: Tensor, s: Tensor, tensor: Tensor) -> Scales:
        d = self.block.round(wanted.clamp(max=self.block.max))
        encode = (1.0 / (d * (1.0 / s))).clamp(max=FP32_MAX)
        return Scales(encode, self.block.encode(d), tensor)

    def top(self, element: NumberFormat) -> float:
        """What the amax of the tensor is mapped to."""
        return element.max * (self.block_max or self.block.max)

    def tensor_level(self, tensor_amax: Tensor, element: NumberFormat) -> tuple[Tensor, Tensor]:
        """S and T of the tensor."""
        top = torch.full_like(tensor_amax, self.top(element))
        s = (top / tensor_amax).clamp(max=FP32_MAX)
        s = torch.where((tensor_amax == 0) | (s == 0), 1.0, s)
        exact = (tensor_amax > 0) & (tensor_amax < math.inf) & (s < FP32_MAX)
        return s, torch.where(exact | s.isnan(), tensor_amax / top, 1.0 / s)

    def __str__(self) -> str:
        top = f"max{self.block_max:g}" if self.block_max is not None else ""
        chosen = f"-4over6{self.four_over_six.value}" if self.four_over_six is not None else ""
        return f"{self.block}{top}+fp32{'row' if self.rows else ''}{chosen}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Current:
    """The amax of the tensor that is being quantized.

    Args:
        step: of that tensor on all ranks, in training: one all-reduce(MAX). Where a step is one micro-batch this is the
            tensor of the full step, whatever the number of ranks.
    """

    step: bool = False

    def __str__(self) -> str:
        return "step" if self.step else "current"


class Reduce(enum.Enum):
    """What delayed scaling makes of its history."""

    MAX = "max"
    MOST_RECENT = "most_recent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delayed:
    """The amax of earlier steps (TransformerEngine's delayed scaling, arXiv 2209.05433).

    What is remembered for n tensors: ``history`` FP32 [length, n], whose slot 0 collects the amaxes of the running
    step, and ``held`` FP32 [n], the amax in use, from which the scale rule (with its margin) makes this step's scale.
    ``held`` 0 is the start: the scale is 1. Keeping the amax instead of the scale loses nothing, since the rule is a
    function of it.

    Args:
        history: its length, slot 0 included.
        reduce: over the history.
    """

    history: int = 1024
    reduce: Reduce = Reduce.MAX

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"an amax history has at least one slot, not {self.history}")

    def start(self, num: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """``history`` and ``held`` before the first step."""
        return (
            torch.zeros(self.history, num, dtype=torch.float32, device=device),
            torch.zeros(num, dtype=torch.float32, device=device),
        )

    def update(self, history: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """``history`` and ``held`` for the next step; pure, to be called once per step after slot 0 was all-reduced.

        1. a = the maximum over all slots, slot 0 included (NaN wins), or slot 0 alone
        2. held' = a where a is finite and above 0, else as it was
        3. history' = history moved one slot down, with slot 0 moved to the end and a new slot 0 of 0

        Where slot 0 is 0, nothing of this happens: the history of a module that did not run stays. Under MAX an amax
        that is not finite leaves ``held`` as it was until it leaves the history.
        """
        newest = history[0]
        a = history.amax(0) if self.reduce is Reduce.MAX else newest
        ran = newest != 0
        moved = torch.cat((torch.zeros_like(history[:1]), history[2:], history[:1]))[: len(history)]
        return torch.where(ran, moved, history), torch.where(ran & (a > 0) & (a < math.inf), a, held)

    def __str__(self) -> str:
        if self.reduce is Reduce.MOST_RECENT:
            return "delayed-recent"
        return "delayed" if self.history == 1024 else f"delayed{self.history}"


AmaxSource = Current | Delayed
