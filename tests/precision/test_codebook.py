"""Tables of values against a model in rational numbers, at every tie, and against the formats that are tables, too."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from narrowgauge.precision.codebook import Codebook, Ties
from narrowgauge.precision.formats import E2M1, E4M3, E4M3_240, E8M0, ExMy, Integer, exmy
from narrowgauge.precision.quantize import dequantize, operand, quantize
from narrowgauge.precision.scaling import TENSOR, Fp32, Power, PowerOfTwo, Tile, TwoLevel, Unit
from narrowgauge.precision.spec import OperandSpec
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TINY, INF, NAN = 2.0**-149, math.inf, math.nan


def normal_float4() -> Codebook:
    """QLoRA's NF4: normal quantiles, over the largest. Codes ascend; half-way goes to the smaller value."""
    upper = np.linspace(0.9677083, 0.5, 9)[:-1]
    lower = np.linspace(0.9677083, 0.5, 8)[:-1]
    values = [NormalDist().inv_cdf(p) for p in upper] + [0.0] + [-NormalDist().inv_cdf(p) for p in lower]
    return Codebook(name="nf4", values=tuple(sorted(v / max(values) for v in values)), ties=Ties.LOWER)


def posit_value(code: int, bits: int, es: int) -> Fraction:
    """Of a code that is neither 0 nor NaR, by the definition: regime, es exponent bits, fraction."""
    if code >> (bits - 1):
        return -posit_value((1 << bits) - code, bits, es)
    body = f"{code:0{bits}b}"[1:]
    run = len(body) - len(body.lstrip(body[0]))
    k = run - 1 if body[0] == "1" else -run
    rest = body[run + 1 :]
    exponent = int(rest[:es].ljust(es, "0") or "0", 2)
    fraction = rest[es:]
    significand = 1 + Fraction(int(fraction or "0", 2), 1 << len(fraction))
    return significand * Fraction(2) ** (k * (1 << es) + exponent)


def posit(bits: int, es: int) -> Codebook:
    nar = 1 << (bits - 1)
    codes = [*range(nar + 1, 1 << bits), *range(nar)]  # ascending values
    values = [float(posit_value(code, bits, es)) if code else 0.0 for code in codes]
    # The middle is the posit of a bit more between two neighbours, but beside 0, where nothing is rounded to 0.
    longer = [(2 * code + 1) % (4 * nar) for code in codes[:-1]]
    return Codebook(
        name=f"posit{bits}_{es}",
        values=tuple(values),
        codes=tuple(codes),
        middles=tuple(float(posit_value(code, bits + 1, es)) for code in longer),
        nan=nar,
        keeps_nonzero=True,
    )


NF4 = normal_float4()
MAGNITUDES = [v / 12 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
BNB_FP4 = Codebook(name="bnb_fp4", values=(*MAGNITUDES, *(-v for v in MAGNITUDES)), ties=Ties.LOWER)
POSITS = [posit(8, 0), posit(8, 2), posit(6, 1), posit(4, 2)]
LOPSIDED = Codebook(name="lopsided", values=(-1.0, 3.0, 0.0, -8.0, 7.0), codes=(3, 9, 4, 12, 1), nan=6)
WITHOUT_ZERO = Codebook(name="without_zero", values=(-1.0, 1.0))
UNEVEN = Codebook(name="uneven", values=(-1.0, 3.0, 4.0), codes=(0, 2, 5))
EXTREMES = Codebook(
    name="extremes",
    values=(0.0, TINY, 3 * TINY, 1.0, 1.0 + 2.0**-23, 1.0 + 2.0**-22, 1.5 * 2.0**127, -3 * TINY, -(2.0**127), -1e-30),
)
BOOKS = [NF4, BNB_FP4, *POSITS, LOPSIDED, WITHOUT_ZERO, UNEVEN, EXTREMES]


def tied(ties: Ties) -> Codebook:
    """Neighbours whose codes are even and odd, odd and even, both even, both odd, on both sides of zero."""
    return Codebook(
        name=ties.value,
        values=(-6.0, -4.0, -3.0, -1.0, 1.0, 2.0, 4.0, 5.0, 8.0),
        codes=(0, 2, 5, 7, 9, 4, 3, 1, 6),
        ties=ties,
    )


@functools.cache
def sorted_values(book: Codebook) -> list[float]:
    return sorted({float(np.float32(v)) for v in book.values})


def code_of(book: Codebook, value: float, zero: float = 0.0) -> int:
    """``zero``: its sign, where there are two."""
    codes = book.codes or range(len(book.values))
    table = {(float(np.float32(v)), math.copysign(1, v)): c for v, c in zip(book.values, codes, strict=True)}
    signs = (math.copysign(1, value or zero), math.copysign(1, value or -zero or -0.0))
    return next(table[value, sign] for sign in (*signs, 1.0) if (value, sign) in table)


def nearest(book: Codebook, x: float) -> float:
    """In rational numbers."""
    values = sorted_values(book)
    if x <= values[0] or x >= values[-1]:
        return values[0] if x <= values[0] else values[-1]
    place = next(i for i in range(len(values)) if x < values[i + 1])
    low, high = values[place], values[place + 1]
    if book.keeps_nonzero and 0 in (low, high) and x != 0:
        return low or high
    middle = (Fraction(low) + Fraction(high)) / 2 if book.middles is None else Fraction(book.middles[place])
    if Fraction(x) != middle:
        return low if Fraction(x) < middle else high
    larger = max(low, high, key=lambda v: (abs(v), v))
    smaller = min(low, high, key=lambda v: (abs(v), -v))
    even = [v for v in (low, high) if code_of(book, v, zero=-1.0 if v == high else 1.0) % 2 == 0]
    return {
        Ties.LOWER: low,
        Ties.UPPER: high,
        Ties.AWAY_FROM_ZERO: larger,
        Ties.TOWARDS_ZERO: smaller,
        Ties.EVEN_CODE: even[0] if len(even) == 1 else low,
    }[book.ties]


def neighbours(book: Codebook, x: float) -> tuple[float, float]:
    """v and w of the definition; both x itself where it is a value of the table."""
    values = sorted_values(book)
    x = min(max(x, values[0]), values[-1])
    if x in values:
        return x, x
    low, high = next((a, b) for a, b in pairwise(values) if a < x < b)
    return (low, high) if abs(low) <= abs(high) else (high, low)


def points(book: Codebook) -> Tensor:
    """Values, middles, what lies beside them, beyond the ends, and FP32's own extremes."""
    values = sorted_values(book)
    middles = [float((Fraction(a) + Fraction(b)) / 2) for a, b in pairwise(values)]
    exact = torch.tensor([*values, *middles, *(book.middles or ()), values[0] * 1.5, values[-1] * 1.5]).float()
    inf = torch.tensor(INF)
    odd = torch.tensor([0.0, -0.0, TINY, -TINY, 3 * TINY, -1e-40, 1.2e-38, 3.4e38, -3.4e38, INF, -INF])
    random = torch.randn(200, generator=torch.Generator().manual_seed(0)) * book.max
    return torch.cat((exact, exact.nextafter(inf), exact.nextafter(-inf), odd, random))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("book", [*BOOKS, *map(tied, Ties)], ids=str)
def test_nearest_is_that_of_rational_numbers(book: Codebook, dtype: torch.dtype) -> None:
    x = points(book).to(dtype)
    got = book.round(x)
    assert got.dtype == torch.float32
    assert got.tolist() == [nearest(book, v) for v in x.tolist()]


def test_ties_by_each_rule() -> None:
    x = torch.tensor([-5.0, -3.5, -2.0, 0.0, 1.5, 3.0, 4.5, 6.5])
    #                  0 2   2 5   5 7   7 9  9 4  4 3  3 1  1 6: the codes of the neighbours
    want = {
        Ties.EVEN_CODE: [-6, -4, -3, -1, 2, 2, 4, 8],
        Ties.AWAY_FROM_ZERO: [-6, -4, -3, 1, 2, 4, 5, 8],
        Ties.TOWARDS_ZERO: [-4, -3, -1, 1, 1, 2, 4, 5],
        Ties.LOWER: [-6, -4, -3, -1, 1, 2, 4, 5],
        Ties.UPPER: [-4, -3, -1, 1, 2, 4, 5, 8],
    }
    for ties, values in want.items():
        assert tied(ties).round(x).tolist() == values, ties


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("book", BOOKS, ids=str)
def test_truncated_and_stochastic(book: Codebook, dtype: torch.dtype) -> None:
    x = points(book).to(dtype)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    noise[::3] = 0.0
    noise[1::3] = 1 - 2.0**-24
    truncated, drawn = book.truncate(x).tolist(), book.round(x, noise).tolist()
    for place, number in enumerate(x.tolist()):
        near, far = neighbours(book, number)
        away = book.keeps_nonzero and near == 0 and number != 0
        assert truncated[place] == (far if away else near), number
        if near == far:
            assert drawn[place] == near, number
            continue
        fraction = abs(np.float32(number) - np.float32(near)) / abs(np.float32(far) - np.float32(near))
        assert drawn[place] == (far if away or noise[place].item() < fraction else near), number


@pytest.mark.parametrize("value", [0.21, -0.37, -0.99, 0.045])
def test_stochastic_rounding_is_unbiased(value: float) -> None:
    num = 100_000
    noise = torch.rand(num, generator=torch.Generator().manual_seed(2))
    drawn = NF4.round(torch.full((num,), value), noise).double()
    assert (drawn.mean() - value).abs() <= 4 * drawn.std() / num**0.5
    assert len(drawn.unique()) == 2


def table_of(fmt: ExMy | Integer) -> Codebook:
    codes = torch.arange(1 << fmt.bits, dtype=torch.int32).to(torch.uint8)
    values = fmt.decode(codes)
    kept = [c for c, v in enumerate(values.tolist()) if fmt.min <= v <= fmt.max]
    table = Codebook(
        name="table", values=tuple(values[kept].tolist()), codes=tuple(kept), nan=getattr(fmt, "nan", None)
    )
    assert (table.bits, table.max, table.min) == (fmt.bits, fmt.max, fmt.min)
    assert (table.significant_bits, table.tiny_exponent) == (fmt.significant_bits, fmt.tiny_exponent)
    return table


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(99.0).view(torch.int32), b.nan_to_num(99.0).view(torch.int32))


@pytest.mark.parametrize("fmt", [E2M1, E4M3, E4M3_240, exmy(1, 2, ieee=False), exmy(3, 0, ieee=False)], ids=str)
def test_a_table_of_a_formats_values_is_that_format(fmt: ExMy) -> None:
    """Noise, signs of zeros and NaN included; every code."""
    table = table_of(fmt)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20_000, generator=generator) * 2.0 ** torch.randint(-12, 10, (20_000,), generator=generator)
    x = torch.cat((x, points(table), torch.tensor([NAN])))
    noise = torch.rand(x.shape, generator=generator)
    for ours, theirs in (
        (table.round(x), fmt.round(x)),
        (table.round(x, noise), fmt.round(x, noise)),
        (table.truncate(x), fmt.truncate(x)),
    ):
        assert same_bits(ours, theirs)
        assert torch.equal(table.encode(ours), fmt.encode(theirs))
    codes = torch.tensor([c for c in range(1 << fmt.bits) if c in (table.codes or ())], dtype=torch.uint8)
    assert same_bits(table.decode(codes), fmt.decode(codes))


@pytest.mark.parametrize("book", BOOKS, ids=str)
def test_every_code(book: Codebook) -> None:
    given = torch.tensor(list(book.codes or range(len(book.values))), dtype=torch.uint8)
    values = book.decode(given)
    assert same_bits(values, torch.tensor(book.values, dtype=torch.float32))
    assert torch.equal(book.encode(values), given)
    assert same_bits(book.round(values), values)
    others = torch.tensor([c for c in range(1 << book.bits) if c not in given.tolist()], dtype=torch.uint8)
    assert book.decode(others).isnan().all()
    nan = book.encode(torch.tensor([NAN, -NAN])).tolist()
    assert nan == [code_of(book, book.max) if book.nan is None else book.nan] * 2
    for got in (book.round(torch.tensor([NAN])), book.truncate(torch.tensor([NAN]))):
        assert got.isnan().all()
    assert book.round(torch.tensor([NAN]), torch.zeros(1)).isnan().all()
    if book.bits < 8:
        assert same_bits(book.decode(given | (1 << book.bits)), values)


def test_facts_of_the_literature() -> None:
    stated = (-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635)
    stated += (-0.18477343022823334, -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725)
    stated += (0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1)
    assert NF4.values == pytest.approx(stated, abs=2e-7)
    assert BNB_FP4.decode(torch.tensor([8], dtype=torch.uint8)).signbit().item()
    assert [(p.max, p.decode(torch.tensor([1], dtype=torch.uint8)).item()) for p in POSITS[:2]] == [
        (2.0**6, 2.0**-6), (2.0**24, 2.0**-24)
    ]  # fmt: skip
    es2 = POSITS[1]
    assert es2.round(torch.tensor([2.0**22, 2.0**22 * 1.01, 1e30, 1e-30, -1e-30, 0.0])).tolist() == [
        2.0**20, 2.0**24, 2.0**24, 2.0**-24, -(2.0**-24), 0.0
    ]  # fmt: skip
    wide = posit(16, 1)
    assert (wide.bits, wide.max, wide.significant_bits) == (16, 2.0**28, 13)
    assert wide.round(torch.tensor([1.0 + 2.0**-13, 1.0 + 3 * 2.0**-13, 3e38])).tolist() == [1.0, 1 + 2.0**-11, 2.0**28]
    with pytest.raises(ValueError, match="at most 8"):
        wide.encode(torch.ones(1))


def test_views_and_shapes() -> None:
    x = torch.randn(6, 10)
    noise = torch.rand(6, 10)
    assert torch.equal(NF4.round(x.mT), NF4.round(x).mT)
    assert torch.equal(NF4.round(x[::2, 1::3], noise[::2, 1::3]), NF4.round(x, noise)[::2, 1::3])
    assert torch.equal(NF4.encode(NF4.round(x).mT), NF4.encode(NF4.round(x)).mT)
    assert NF4.round(x[:0]).shape == (0, 10)
    assert NF4.round(torch.tensor(0.3)).shape == NF4.decode(torch.tensor(3, dtype=torch.uint8)).shape == ()
    assert NF4.round(torch.tensor([0.3, -0.0], dtype=torch.float64)).dtype == torch.float32
    assert not NF4.round(torch.tensor([-0.0, -0.01])).signbit().any()
    assert BNB_FP4.round(torch.tensor([-0.0, -0.001])).signbit().all()


def test_a_table_may_be_the_format_of_scales() -> None:
    x = torch.randn(6, 40)
    ours, theirs = (
        quantize(x, OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel(block=block)))
        for block in (table_of(E4M3), E4M3)
    )
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.scales, theirs.scales)
    for mine, other in zip(operand(ours), operand(theirs), strict=True):
        assert mine is not None
        assert other is not None
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


DEEP, DEEPER = (Codebook(name=f"down_to_{k}", values=(0.0, 2.0**k, -1.0, 1.0)) for k in (-120, -130))


@pytest.mark.parametrize("book", [NF4, POSITS[1], LOPSIDED, UNEVEN, DEEP, DEEPER], ids=str)
@pytest.mark.parametrize(
    ("tile", "rule"),
    [(TENSOR, Unit()), (TENSOR, Fp32()), (Tile(1, 8), Fp32()), (Tile(1, 8), PowerOfTwo(mode=Power.FLOOR)),
     (Tile(1, 16), TwoLevel())],
    ids=str,
)  # fmt: skip
def test_operands_are_in_bf16_only_where_that_is_exact(book: Codebook, tile: Tile, rule: Fp32) -> None:
    spec = OperandSpec(format=book, tile=tile, scale=rule)
    x = torch.randn(5, 44, generator=torch.Generator().manual_seed(4)) * 3
    x[1, :4], x[2, :4] = 1e-36, 1e-38
    q = quantize(x, spec)
    matrix, factor = operand(q)
    wide = book in (NF4, DEEPER) or (rule == Fp32() and tile != TENSOR) or (book is DEEP and rule.levels == 2)
    assert matrix.dtype == (torch.float32 if wide else torch.bfloat16)
    if book is not DEEP or rule.format != E8M0:  # whose tiles of small scales are flushed
        assert torch.equal(matrix.float() if factor is None else matrix.float() * factor, dequantize(q))


def test_a_table_has_no_mantissa() -> None:
    rule = PowerOfTwo(mode=Power.EVEN)
    with pytest.raises(ValueError, match=r"nf4 has no mantissa .* by floor, ceil or rceil need none"):
        OperandSpec(format=NF4, tile=Tile(1, 32), scale=rule)
    with pytest.raises(ValueError, match="nf4 has no mantissa"):
        rule.scales(torch.ones(2, 1), NF4, dtype=torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": (1.0,)}, "two values at least"),
        ({"values": (-1.0, 0.0)}, "one above zero"),
        ({"values": (0.1, 0.1 + 1e-12)}, "the value 0.1 twice, as FP32 numbers"),
        ({"values": (0.0, -0.0, 0.0, 1.0)}, "the value 0 twice"),
        ({"values": (1.0, NAN)}, "finite FP32 numbers"),
        ({"values": (1.0, 1e39)}, "finite FP32 numbers"),
        ({"values": (3e38, -3e38)}, "does not hold the distance"),
        ({"values": (1.0, 2.0), "codes": (1,)}, "2 values and 1 codes"),
        ({"values": (1.0, 2.0), "codes": (1, 1)}, "the code 1 twice"),
        ({"values": (1.0, 2.0), "nan": 1}, "the code 1 twice"),
        ({"values": (1.0, 2.0), "codes": (0, 1 << 16)}, "from 0 to 65535, not 0 to 65536"),
        ({"values": (1.0, 2.0), "codes": (-1, 0)}, "from 0 to 65535, not -1 to 0"),
        ({"values": (1.0, 2.0), "middles": ()}, "2 values and 0 middles"),
        ({"values": (1.0, 2.0), "middles": (2.5,)}, "2.5 is no middle of 1 and 2"),
        ({"values": (-1.0, 1.0), "keeps_nonzero": True}, "leave keeps_nonzero out"),
    ],
)
def test_tables_that_are_none(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Codebook(name="mine", **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
