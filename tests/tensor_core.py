"""A slow model of a tensor core's sums (``precision.sums``) in rational arithmetic: one sum at a time."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from narrowgauge.precision.sums import Accumulate
from torch import Tensor


def cut(x: Fraction, exponent: int) -> Fraction:
    """x towards zero, to a multiple of 2^exponent."""
    unit = Fraction(2) ** exponent
    return int(x / unit) * unit


def log2(x: Fraction) -> int:
    """floor(log2 |x|)."""
    n = abs(x.numerator).bit_length() - x.denominator.bit_length()
    return n if abs(x) >= Fraction(2) ** n else n - 1


def nearest(x: Fraction) -> Fraction:
    """x in FP32, ties to even; whatever its size, so that overflow is seen by the caller."""
    if x == 0:
        return x
    unit = Fraction(2) ** max(log2(x) - 23, -149)
    return round(x / unit) * unit  # of a tie Python takes the even one


def model(a: list[float], b: list[float], tiny: tuple[int, int], rule: Accumulate, start: float = 0.0) -> float:
    pairs = list(zip(a, b, strict=True))
    special = [x * y for x, y in pairs if not (math.isfinite(x) and math.isfinite(y))]
    pairs = [(x, y) if math.isfinite(x) and math.isfinite(y) else (0.0, 0.0) for x, y in pairs]
    promoted = rule.promote_every is not None
    acc, c = (start, 0.0) if promoted else (0.0, start)
    for first in range(0, len(a), rule.step):
        c = c if math.isinf(c) else step_of_model(pairs[first : first + rule.step], tiny, rule, Fraction(c))
        if promoted and ((first + rule.step) % rule.promote_every == 0 or first + rule.step >= len(a)):
            infinite = math.isinf(acc) or math.isinf(c)
            acc, c = acc + c if infinite else number(nearest(Fraction(acc) + Fraction(c))), 0.0
    return sum(special) + (acc if promoted else c)


def step_of_model(pairs: list[tuple[float, float]], tiny: tuple[int, int], rule: Accumulate, c: Fraction) -> float:
    terms = [(c, max(log2(c), -126))] if c else []
    for x, y in pairs:
        if x and y:
            exponents = [max(log2(Fraction(v)), least) for v, least in ((x, tiny[0]), (y, tiny[1]))]
            terms.append((Fraction(x) * Fraction(y), sum(exponents)))
    top = max([exponent for _, exponent in terms] + [rule.least])
    c = sum((cut(term, top - rule.bits) for term, _ in terms), Fraction(0))
    if not c:
        return 0.0
    significant = 24 if rule.bits >= 23 else rule.bits + 1
    return number(cut(c, max(log2(c) - significant + 1, -149)))


def number(x: Fraction) -> float:
    return float(x) if abs(x) < 2**128 else math.copysign(math.inf, x)


def modelled(a: Tensor, b: Tensor, tiny: tuple[int, int], rule: Accumulate, start: Tensor | None = None) -> Tensor:
    rows = [
        [model(x, y, tiny, rule, 0.0 if start is None else float(start[i, j])) for j, y in enumerate(b.tolist())]
        for i, x in enumerate(a.tolist())
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(a), len(b)).float()


def same(x: Tensor, y: Tensor) -> bool:
    """Equal numbers, NaN in the same places, and no zero that is negative."""
    negative = bool(((x == 0) & x.signbit()).any())
    return x.shape == y.shape and not negative and torch.equal(x.nan_to_num(7e30), y.nan_to_num(7e30))
