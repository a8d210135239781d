"""How the products of a GEMM are summed: in FP32, or by the rule of a card's tensor cores, emulated bit for bit.

The rule of one step (found from outputs of real GPUs: 32 sets of 5,000 vectors of V100, A100, A2, L40S, H100, H200 and
B200 agree in every bit):

1. A step takes ``step`` products along the contraction and the sum so far, c. All of them are terms.
2. The exponent of an operand is floor(log2 |value|), but not below that of its format's smallest normal value: what is
   subnormal there stays unnormalised. The exponent of a product is the sum of its operands', although its significand
   may be 2 or more. That of c is the one of FP32. A zero is no term.
3. top is the largest exponent of a term, and at least ``least``.
4. Every term is cut towards zero to a multiple of 2^(top - bits); these are added exactly.
5. The sum is cut towards zero to 24 significant bits, or to ``bits`` + 1 where ``bits`` is below 23, and to a multiple
   of 2^-149: that is the next c. From 2^128 on it is an infinity.

Terms that are not finite make the sum what IEEE 754 says: an infinity, or NaN where they disagree.

With ``promote_every`` c starts again from 0 after so many products; what it was is added to an FP32 accumulator by an
ordinary addition, rounded to nearest even. The rest at the end of the contraction is added likewise. Where operands
have scales of their own for each such interval (blocks along the contraction), acc = fl(acc + fl(c * fl(a's scale *
b's scale))).

What the vectors of real GPUs do not show: how c enters FP8 sums on Hopper, where all were taken with c = 0 (here: as on
Ada, as a term like others); whether it is B200 that adds c to FP8 sums late, or the program that took its vectors (here
``B200_FP8`` is promoted at every step, which is that addition); FP16 and BF16 beyond one step, TF32 beyond 4 products;
scales inside the contraction (here part of the values, so that exponents shift); the sign of a sum that is zero (here
+0), and sums beyond FP32's range. Exponents of subnormal operands, and of powers of two as scales, are as in MMA-Sim
(microsoft/MMA-Sim), whose models are compared with GPUs there.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .suggest import close

ZERO = -4096
"""The exponent of a zero: below that of every sum of two others."""
_TINY = -126  # the exponent of FP32's subnormal numbers
_ELEMENTS = 1 << 21  # of products that are held at a time


class Sums(enum.Enum):
    """How products are summed where no rule is to be emulated.

    FP32: in FP32; native FP8 products of Ada and Hopper are added up there between intervals. FAST: native FP8 products
    may sum without such additions (``use_fast_accum``; steps keep 13 fraction bits either way), which is faster. AUTO:
    the backend decides. Emulation sums in FP32 in all three.
    """

    FP32 = "fp32"
    FAST = "fast"
    AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulate:
    """The rule of a tensor core, as this module's first lines state it.

    Args:
        step: products that are summed at once.
        bits: fraction bits that a term keeps below the largest exponent of its step.
        least: what that exponent is at least.
        promote_every: products after which the sum so far is added to an FP32 accumulator; None: never.

    Raises ValueError for a step outside 1 .. 256, bits outside 1 .. 30, least outside -1024 .. 127, and an interval
    that is no multiple of the step.
    """

    step: int
    bits: int
    least: int = -133
    promote_every: int | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("step", self.step, 1, 256),
            ("bits", self.bits, 1, 30),
            ("least", self.least, -1024, 127),
        ):
            if not low <= value <= high:
                raise ValueError(f"accumulate: {name} is {low} to {high}, not {value}: {min(max(value, low), high)}?")
        every = self.promote_every
        if every is not None and (every < self.step or every % self.step):
            nearest = max(1, round(every / self.step)) * self.step
            raise ValueError(f"accumulate: promote_every={every} is no multiple of the step of {self.step}: {nearest}?")

    @property
    def significant(self) -> int:
        """Significant bits of the sum after each step."""
        return 24 if self.bits >= 23 else self.bits + 1

    def __str__(self) -> str:
        parts = [f"sums of {self.step} products at {self.bits} bits"]
        parts += [f"not below 2^{self.least}"] if self.least != -133 else []
        parts += [f"in fp32 every {self.promote_every}"] if self.promote_every is not None else []
        return " ".join(parts)


# FP16 accumulators, which round to nearest at the end, are not among these.
V100_FP16 = Accumulate(step=4, bits=23, least=-1024)
A100_FP16 = A100_BF16 = Accumulate(step=8, bits=24, least=-132)
A100_TF32 = Accumulate(step=4, bits=24, least=-132)
ADA_FP16 = ADA_BF16 = A100_BF16
ADA_TF32 = A100_TF32
ADA_FP8 = Accumulate(step=16, bits=13, least=-132)
H100_FP16 = H100_BF16 = Accumulate(step=16, bits=25)
H100_TF32 = Accumulate(step=8, bits=25)
H100_FP8 = Accumulate(step=32, bits=13)
H100_FP8_PROMOTED = Accumulate(step=32, bits=13, promote_every=128)  # DeepSeek-V3 (arXiv 2412.19437), section 3.3
B200_FP16 = B200_BF16 = H100_BF16
B200_TF32 = H100_TF32
B200_FP8 = Accumulate(step=32, bits=25, promote_every=32)

RULES: dict[str, Accumulate] = {
    "v100_fp16": V100_FP16,
    "a100_fp16": A100_FP16,
    "a100_bf16": A100_BF16,
    "a100_tf32": A100_TF32,
    "ada_fp16": ADA_FP16,
    "ada_bf16": ADA_BF16,
    "ada_tf32": ADA_TF32,
    "ada_fp8": ADA_FP8,
    "h100_fp16": H100_FP16,
    "h100_bf16": H100_BF16,
    "h100_tf32": H100_TF32,
    "h100_fp8": H100_FP8,
    "h100_fp8_promoted": H100_FP8_PROMOTED,
    "b200_fp16": B200_FP16,
    "b200_bf16": B200_BF16,
    "b200_tf32": B200_TF32,
    "b200_fp8": B200_FP8,
}


def by_name(name: str) -> Accumulate:
    """The rule called ``card_format``, as in ``RULES``. Raises ValueError, with the close matches, for another name."""
    if name not in RULES:
        raise ValueError(f"accumulate={name}: fp32, or one of {', '.join(RULES)}{close(str(name), ['fp32', *RULES])}")
    return RULES[name]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Side:
    """One operand of a GEMM, as a tensor core reads it.

    Args:
        values: FP32 [rows, k], those of the codes.
        tiny: the exponent of the format's smallest normal value.
        powers: int32 [rows, k], k of scales 2^k inside the contraction, which are part of the values; or None.
        factors: FP32 [rows, ceil(k / promote_every)], scales that multiply promoted sums; or None.
    """

    values: Tensor
    tiny: int = _TINY
    powers: Tensor | None = None
    factors: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Terms:
    """A side taken apart: value = significand * 2^exponent, FP32 and int32 [rows, k], all finite. ``factors``: its."""

    significands: Tensor
    exponents: Tensor
    factors: Tensor | None


class Summing(Protocol):
    """Who sums terms."""

    def why_not(self, rule: Accumulate) -> str | None:
        """None if it sums by the rule, else why not: plain torch does then."""

    def sum(self, a: Terms, b: Terms, rule: Accumulate, acc: Tensor) -> Tensor:
        """As ``sum_terms``; ``acc`` is its own."""


def summed(a: Side, b: Side, rule: Accumulate, start: Tensor | None = None, by: Summing | None = None) -> Tensor:
    """FP32 [m, n]: the products of a's rows with b's, summed by the rule.

    ``start``: FP32 [m, n], what the sum begins with (c, or with ``promote_every`` the accumulator); None: 0.
    ``by``: who sums; None: plain torch.

    Raises ValueError for scales inside the contraction that the rule's intervals are not those of.
    """
    (m, k), n = a.values.shape, b.values.shape[0]
    for side in (a, b):
        wanted = None if rule.promote_every is None else -(-k // rule.promote_every)
        if side.factors is not None and side.factors.shape[1] != wanted:
            raise ValueError(f"{rule} takes {wanted} scales a row of {k} products, not {side.factors.shape[1]}")
    acc = torch.zeros(m, n, device=a.values.device) if start is None else start.float().clone()
    plain = a.values.isfinite().all() and b.values.isfinite().all()
    add = sum_terms if by is None or by.why_not(rule) is not None else by.sum
    y = add(_terms(a, finite=bool(plain)), _terms(b, finite=bool(plain)), rule, acc)
    if plain:
        return y
    # Finite products are exact in FP64 and far within its range: what is not finite here is so in the sum.
    special = a.values.double() @ b.values.double().mT
    return torch.where(special.isfinite(), y, special.float() + y)


def _terms(side: Side, *, finite: bool) -> Terms:
    v = side.values if finite else side.values.nan_to_num(0.0, 0.0, 0.0)
    bits = v.view(torch.int32)
    tiny = max(side.tiny, _TINY)
    e = ((bits >> 23) & 0xFF) - 127
    small = e < tiny
    normal = ((bits & -0x7F800001) | 0x3F800000).view(torch.float32)
    significands = torch.where(small, v * 2.0**-tiny, normal)
    e = torch.where(v == 0, ZERO, e.clamp(min=tiny) if side.powers is None else e.clamp(min=tiny) + side.powers)
    return Terms(significands=significands, exponents=e, factors=side.factors)


def sum_terms(a: Terms, b: Terms, rule: Accumulate, acc: Tensor) -> Tensor:
    """The rule in plain torch, in FP64 and int64, in which all of it is exact: the definition."""
    height = max(1, _ELEMENTS // max(1, len(b.significands) * rule.step))
    sums = [acc[:0]]
    for first in range(0, len(acc), height):
        rows = slice(first, first + height)
        factors = None if a.factors is None else a.factors[rows]
        part = Terms(significands=a.significands[rows], exponents=a.exponents[rows], factors=factors)
        sums.append(_sum_rows(part, b, rule, acc[rows]))
    return torch.cat(sums)


def _sum_rows(a: Terms, b: Terms, rule: Accumulate, acc: Tensor) -> Tensor:
    k, every = a.significands.shape[1], rule.promote_every
    c = acc if every is None else torch.zeros_like(acc)
    sa, sb = a.significands.double(), b.significands.double()
    for first in range(0, k, rule.step):
        part = slice(first, first + rule.step)
        e = a.exponents[:, None, part] + b.exponents[None, :, part]
        c = _step(sa[:, None, part] * sb[None, :, part], e, c, rule)
        done = min(first + rule.step, k)
        if every is not None and (done % every == 0 or done == k):
            acc = acc + _scaled(c, a, b, (done - 1) // every)
            c = torch.zeros_like(acc)
    return c if every is None else acc


def _scaled(c: Tensor, a: Terms, b: Terms, block: int) -> Tensor:
    scales = [t.factors[:, block] for t in (a, b) if t.factors is not None]
    if len(scales) == 2:
        return c * (scales[0][:, None] * scales[1])
    if not scales:
        return c
    return c * (scales[0][:, None] if a.factors is not None else scales[0])


def _step(products: Tensor, exponents: Tensor, c: Tensor, rule: Accumulate) -> Tensor:
    """c [m, n] after a step, from significands FP64 and exponents [m, n, step] of its products."""
    of_c = torch.where(c == 0, ZERO, (((c.view(torch.int32) >> 23) & 0xFF) - 127).clamp(min=_TINY))
    top = torch.maximum(exponents.amax(-1), of_c).clamp(min=rule.least)
    total = (products * _power(exponents + (rule.bits - top)[..., None])).trunc().sum(-1)
    total = total + (c.double().nan_to_num(0.0, 0.0, 0.0) * _power(rule.bits - top)).trunc()
    low = (1 << (53 - rule.significant)) - 1
    total = (total.view(torch.int64) & ~low).view(torch.float64) * _power(top - rule.bits)
    subnormal = (total * 2.0**149).trunc() * 2.0**-149
    total = torch.where(total.abs() < 2.0**_TINY, subnormal, total)
    return torch.where(c.isfinite(), total.float() + 0.0, c)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent in FP64; what would be below its normal numbers is so small that it cuts any term to nothing."""
    return ((exponent.long().clamp(-1022, 1023) + 1023) << 52).view(torch.float64)
