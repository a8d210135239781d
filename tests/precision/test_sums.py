"""Sums by the rules of tensor cores: the definition against a slow model, the kernel against the definition."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from narrowgauge.precision.backends import choose
from narrowgauge.precision.backends.cpu.accumulate import MAX_BITS, CompiledSums
from narrowgauge.precision.formats import BF16, E4M3, E5M2, FP16, INT4, NumberFormat
from narrowgauge.precision.spec import GemmSpec, OperandSpec
from narrowgauge.precision.sums import (
    B200_FP8,
    H100_FP8,
    H100_FP8_PROMOTED,
    RULES,
    Accumulate,
    Side,
    summed,
)
from tensor_core import modelled, same
from torch import Tensor

CPU = torch.device("cpu")
TF32 = replace(BF16, name="tf32", bits=19, mantissa_bits=10, max=(2 - 2.0**-10) * 2.0**127, dtype=None)
ODD = Accumulate(step=3, bits=5, least=-20, promote_every=9)
WIDE = Accumulate(step=7, bits=30, least=-1024, promote_every=14)
ALL = {**RULES, "odd": ODD, "wide": WIDE, "single": Accumulate(step=1, bits=1, least=3)}
DISTINCT = {rule: name for name, rule in reversed(ALL.items())}
FP8 = OperandSpec(format=E4M3)
FORMATS = [E4M3, E5M2, BF16, FP16, TF32]


def matrices(format: NumberFormat, shape: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Values on the format's grid: by kind."""
    normal = torch.randn(shape, generator=generator)
    exponents = torch.randint(format.tiny_exponent, format.max_exponent + 1, shape, generator=generator)
    spread = torch.ldexp(normal, exponents.float().clamp(-140, 126))
    cancelling = normal * 8
    cancelling[:, 1::2] = -cancelling[:, : shape[1] - 1 : 2]
    sparse = normal * (torch.rand(shape, generator=generator) < 0.1)
    tiny = torch.ldexp(normal, torch.tensor(float(format.min_exponent - 1)))
    kinds = {"normal": normal, "spread": spread, "cancelling": cancelling, "sparse": sparse, "tiny": tiny}
    return {name: format.round(x) for name, x in kinds.items()}


@pytest.mark.parametrize("name", DISTINCT.values())
def test_sums_are_those_of_the_model(name: str) -> None:
    rule, generator = ALL[name], torch.Generator().manual_seed(1)
    lengths = itertools.cycle([rule.step, 2 * rule.step + 1, 1, 41, 3 * rule.step - 1])
    different = 0
    for format, other in [(f, f) for f in FORMATS] + [(E5M2, E4M3), (E4M3, INT4)]:
        k = next(lengths)
        sides = [matrices(x, (rows, k), generator) for x, rows in ((format, 3), (other, 4))]
        for one, two in (*zip(sides[0], sides[1], strict=True), ("tiny", "spread"), ("cancelling", "normal")):
            a, b = sides[0][one], sides[1][two]
            tiny = (format.min_exponent, other.min_exponent)
            y = summed(Side(values=a, tiny=tiny[0]), Side(values=b, tiny=tiny[1]), rule)
            assert same(y, modelled(a, b, tiny, rule)), (format, other, one, two)
            different += not torch.equal(y, (a.double() @ b.double().mT).float())
    assert different  # or the rule would not have been tested


@pytest.mark.parametrize("name", ["h100_fp8", "h100_bf16", "b200_fp8", "ada_fp8", "odd"])
def test_accumulators_that_are_not_zero(name: str) -> None:
    rule, generator = ALL[name], torch.Generator().manual_seed(2)
    a, b = (BF16.round(torch.randn(rows, 37, generator=generator)) for rows in (3, 5))
    for scale in (1.0, 1e4, 1e-4, 1e30, 1e-41):
        start = torch.randn(3, 5, generator=generator) * scale
        before = start.clone()
        y = summed(Side(values=a), Side(values=b), rule, start)
        assert same(y, modelled(a, b, (-126, -126), rule, start))
        assert torch.equal(start, before)


@pytest.mark.parametrize("name", ["h100_fp8", "b200_bf16", "b200_fp8"])
def test_sums_that_are_not_finite(name: str) -> None:
    """Infinities, NaN, 0 * inf, inf - inf, each in a row or a column; sums beyond FP32's range are infinities, too."""
    rule = ALL[name]
    a, b = torch.ones(7, 40), torch.ones(5, 40)
    for row, values in enumerate([{}, {3: math.inf}, {3: -math.inf}, {39: math.nan}, {0: math.inf, 39: -math.inf}]):
        for place, value in values.items():
            a[row, place] = value
    b[1, 3], b[2, 0], b[3, 39] = 0.0, -math.inf, -2.0
    a[5] = a[6] = 2.0**127
    a[6, 20:] *= -1
    y = summed(Side(values=a), Side(values=b), rule)
    assert same(y, modelled(a, b, (-126, -126), rule))
    assert y[5, 0] == math.inf
    assert int(y.isnan().sum()) >= 10


def test_shapes_without_elements_and_views() -> None:
    for m, n, k in ((0, 3, 5), (3, 0, 5), (3, 4, 0), (1, 1, 1)):
        for rule in (H100_FP8, H100_FP8_PROMOTED):
            y = summed(Side(values=torch.ones(m, k)), Side(values=torch.ones(n, k)), rule)
            assert torch.equal(y, torch.full((m, n), float(k)))
    a, b = E4M3.round(torch.randn(50, 9)), E4M3.round(torch.randn(7, 100))
    expected = summed(Side(values=a.mT.contiguous()), Side(values=b[:, ::2].contiguous()), H100_FP8)
    assert torch.equal(summed(Side(values=a.mT), Side(values=b[:, ::2]), H100_FP8), expected)


def test_what_a_long_sum_loses() -> None:
    """The errors of K = 4096 by H100's rule are those known of it: 1.4e-3 of the sum, a tenth of that if promoted."""
    a, b = (E4M3.round(torch.randn(24, 4096, generator=torch.Generator().manual_seed(seed))) for seed in (1, 2))
    exact = a.double() @ b.double().mT
    bounds = {H100_FP8: (1e-3, 2e-3), H100_FP8_PROMOTED: (0.8e-4, 2e-4), B200_FP8: (0.0, 1e-6)}
    for rule, (low, high) in bounds.items():
        error = (summed(Side(values=a, tiny=-6), Side(values=b, tiny=-6), rule) - exact).square().mean().sqrt()
        assert low <= float(error / exact.square().mean().sqrt()) <= high


@pytest.mark.parametrize("name", [name for rule, name in DISTINCT.items() if rule.bits <= MAX_BITS])
def test_the_kernel_gives_the_same_bits(name: str) -> None:
    """Over random, cancelling, spread and tiny operands, any accumulator, factors on either side, and ragged shapes."""
    rule, compiled = ALL[name], CompiledSums()
    if reason := compiled.why_not(rule):
        pytest.skip(reason)
    for number, (m, n, k) in enumerate([(37, 29, 100), (300, 17, 64), (1, 16, 513), (5, 1, 7), (4, 3, 1)]):
        generator = torch.Generator().manual_seed(number)
        for format, other in ((BF16, BF16), (E4M3, E5M2), (TF32, FP16)):
            sides = [matrices(x, (rows, k), generator) for x, rows in ((format, m), (other, n))]
            intervals = -(-k // (rule.promote_every or k))
            factors = [torch.rand(rows, intervals, generator=generator) for rows in (m, n)]
            for turn, (a, b) in enumerate(zip(sides[0].values(), sides[1].values(), strict=True)):
                start = None if turn == 0 else torch.randn(m, n, generator=generator) * 10.0 ** (15 * turn - 45)
                fa, fb = (
                    x if rule.promote_every and turn & bit else None for x, bit in zip(factors, (1, 2), strict=True)
                )
                powers = torch.randint(-60, 60, (m, k), generator=generator) if turn == 3 else None
                left = Side(values=a, tiny=format.min_exponent, factors=fa, powers=powers)
                right = Side(values=b, tiny=other.min_exponent, factors=fb)
                y = summed(left, right, rule, start, compiled)
                expected = summed(left, right, rule, start)
                assert torch.equal(y.view(torch.int32), expected.view(torch.int32)), (format, turn)


def test_what_the_kernel_leaves_to_torch() -> None:
    """Significands whose products FP32 does not hold; rules of more bits, which the plan names."""
    a, b = torch.randn(5, 40), torch.randn(6, 40)
    y = summed(Side(values=a), Side(values=b), H100_FP8, by=CompiledSums())
    assert same(y, modelled(a, b, (-126, -126), H100_FP8))
    gemm = GemmSpec(a=FP8, b=FP8, accumulate=WIDE)
    assert choose(gemm, (5, 6, 40), CPU).backend.note(gemm).startswith("sums in plain torch: no kernel for terms of")
    gemm = replace(gemm, accumulate=H100_FP8)
    assert choose(gemm, (5, 6, 40), CPU).backend.note(gemm) == ""
    plain = choose(gemm, (5, 6, 40), CPU, "reference").backend
    assert plain.note(gemm) == "sums in plain torch: no kernel sums by a rule"
