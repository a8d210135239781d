"""Formats against ml_dtypes, gfloat, torchao and torch's own casts: every code, every midpoint and its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from narrowgauge.precision.formats import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E4M3_240,
    E5M2,
    E8M0,
    FORMATS,
    FP16,
    INT4,
    INT8,
    Integer,
    NumberFormat,
    by_name,
    exmy,
    pack4,
    unpack4,
)
from narrowgauge.precision.quantize import dequantize, operand, quantize
from narrowgauge.precision.scaling import TENSOR, Fp32, PowerOfTwo, Tile, TwoLevel
from narrowgauge.precision.spec import OperandSpec
from torch import Tensor
from torchao.prototype.mx_formats.kernels import pack_uint4

ML_DTYPES = {
    E4M3: ml_dtypes.float8_e4m3fn,
    E4M3_240: ml_dtypes.float8_e4m3,
    E5M2: ml_dtypes.float8_e5m2,
    E2M1: ml_dtypes.float4_e2m1fn,
    E3M2: ml_dtypes.float6_e3m2fn,
    E2M3: ml_dtypes.float6_e2m3fn,
    exmy(3, 4): ml_dtypes.float8_e3m4,
}
FLOATS = list(ML_DTYPES)
GFLOAT = {
    E4M3: gfloat.formats.format_info_ocp_e4m3,
    E5M2: gfloat.formats.format_info_ocp_e5m2,
    E2M1: gfloat.formats.format_info_ocp_e2m1,
    E3M2: gfloat.formats.format_info_ocp_e3m2,
    E2M3: gfloat.formats.format_info_ocp_e2m3,
    E8M0: gfloat.formats.format_info_ocp_e8m0,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NONFINITE = torch.tensor([torch.inf, -torch.inf])


def gfloat_exmy(e: int, m: int, *, ieee: bool) -> gfloat.FormatInfo:
    return gfloat.FormatInfo(
        name=f"e{e}m{m}",
        k=1 + e + m,
        precision=m + 1,
        bias=2 ** (e - 1) - 1,
        has_nz=True,
        domain=gfloat.Domain.Extended if ieee else gfloat.Domain.Finite,
        num_high_nans=2**m - 1 if ieee else 0,
        has_subnormals=True,
        is_signed=True,
        is_twos_complement=False,
    )


def codes(fmt: NumberFormat) -> Tensor:
    return torch.arange(1 << fmt.bits, dtype=torch.int32).to(torch.uint8)


def grid(fmt: NumberFormat) -> Tensor:
    """Every finite value, ascending."""
    values = fmt.decode(codes(fmt))
    return values[values.isfinite() & (values.abs() <= fmt.max)].sort().values


def points(values: Tensor) -> Tensor:
    """Grid, midpoints, both neighbours of each, points beyond the ends, and FP32's own extremes."""
    middles = (values[1:].double() + values[:-1].double()).float() / 2
    exact = torch.cat((values, middles, values[[0, -1]] * 1.0625, values[[0, -1]] * 2))
    inf = torch.tensor(torch.inf)
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 1.2e-38, 3e38, -3e38])
    return torch.cat((exact, exact.nextafter(inf), exact.nextafter(-inf), tiny, NONFINITE))


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float32
    assert torch.equal(got.view(torch.int32), want.float().contiguous().view(torch.int32))


@pytest.mark.parametrize("fmt", [*FLOATS, E8M0], ids=str)
def test_codes_match_ml_dtypes(fmt: NumberFormat) -> None:
    oracle = {**ML_DTYPES, E8M0: ml_dtypes.float8_e8m0fnu}[fmt]
    want = torch.from_numpy(codes(fmt).numpy().view(oracle).astype(np.float32))
    got = fmt.decode(codes(fmt))
    assert torch.equal(got.isnan(), want.isnan())
    assert_same_bits(got[~got.isnan()], want[~got.isnan()])
    finite = got.isfinite()
    assert torch.equal(fmt.encode(got[finite]), codes(fmt)[finite])
    assert fmt.max == want[finite].max()
    if fmt.nan is not None:
        assert fmt.encode(torch.tensor([torch.nan])).item() == fmt.nan
        assert got[fmt.nan].isnan()


@pytest.mark.parametrize("fmt", GFLOAT, ids=str)
def test_codes_match_gfloat(fmt: NumberFormat) -> None:
    want = [gfloat.decode_float(GFLOAT[fmt], code).fval for code in range(1 << fmt.bits)]
    got = fmt.decode(codes(fmt)).nan_to_num(999.0, torch.inf, -torch.inf)
    assert got.tolist() == [999.0 if w != w else w for w in want]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FLOATS, ids=str)
def test_rounding_matches_ml_dtypes(fmt: NumberFormat, dtype: torch.dtype) -> None:
    x = points(grid(fmt)).to(dtype)
    want = x.float().clamp(-fmt.max, fmt.max).numpy().astype(ML_DTYPES[fmt]).astype(np.float32)
    assert_same_bits(fmt.round(x), torch.from_numpy(want))
    assert_same_bits(fmt.decode(fmt.encode(fmt.round(x))), torch.from_numpy(want))


@pytest.mark.parametrize(
    ("fmt", "info"),
    [(fmt, info) for fmt, info in GFLOAT.items() if fmt != E8M0]
    + [(exmy(e, m), gfloat_exmy(e, m, ieee=True)) for e, m in [(2, 5), (3, 4), (3, 2), (4, 3), (5, 2)]]
    + [
        (exmy(e, m, ieee=False), gfloat_exmy(e, m, ieee=False))
        for e, m in [(2, 1), (2, 5), (4, 2), (4, 3), (1, 1), (1, 2), (1, 6), (2, 0), (3, 0), (5, 0), (7, 0)]
    ],
    ids=str,
)
def test_rounding_matches_gfloat(fmt: NumberFormat, info: gfloat.FormatInfo) -> None:
    values = grid(fmt)
    assert fmt.max == info.max
    assert values[values > 0].min() == info.smallest
    x = points(values)
    want = gfloat.round_ndarray(info, x.double().numpy(), gfloat.RoundMode.TiesToEven, sat=True)
    assert_same_bits(fmt.round(x), torch.from_numpy(np.clip(want, -fmt.max, fmt.max)))


@pytest.mark.parametrize(("e", "m"), [(1, 0), (1, 2), (1, 6), (2, 0), (3, 0), (7, 0)])
def test_few_bits(e: int, m: int) -> None:
    """One exponent bit is a uniform grid, no mantissa bits are powers of two: every code, and what noise does."""
    fmt = exmy(e, m, ieee=False)
    info = gfloat_exmy(e, m, ieee=False)
    got = fmt.decode(codes(fmt))
    assert got.tolist() == [gfloat.decode_float(info, code).fval for code in range(1 << fmt.bits)]
    assert torch.equal(fmt.encode(got), codes(fmt))
    assert fmt.max_code == got.argmax()
    values = grid(fmt).unique()
    if e == 1 and m:
        assert values.diff().unique().tolist() == [2.0 ** (1 - m)]
    x = points(grid(fmt)).clamp(-fmt.max, fmt.max)
    low = values[(torch.bucketize(x.abs(), values, right=True) - 1)]
    high = values[torch.bucketize(x.abs(), values)]
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    up = noise < ((x.abs() - low) / (high - low)).nan_to_num(0.0)
    assert_same_bits(fmt.round(x, noise), torch.copysign(torch.where(up, high, low), x))
    assert_same_bits(fmt.truncate(x), torch.copysign(low, x))


def test_few_bits_of_the_literature() -> None:
    assert grid(exmy(1, 2, ieee=False))[8:].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert grid(exmy(3, 0, ieee=False))[8:].tolist() == [0, 0.25, 0.5, 1, 2, 4, 8, 16]
    ties = torch.tensor([0.125, 0.375, 0.75, 1.5, 3.0, 6.0, 12.0])  # to codes 0, 2, 2, 4, 4, 6, 6
    assert exmy(3, 0, ieee=False).round(ties).tolist() == [0, 0.5, 0.5, 2, 2, 8, 8]
    ternary = Integer(bits=2)
    assert ternary.round(torch.tensor([-9, -0.51, -0.5, 0.5, 0.51, torch.inf])).tolist() == [-1, -1, 0, 0, 1, 1]
    assert ternary.encode(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [3, 0, 1]


@pytest.mark.parametrize(("e", "m"), [(8, 3), (8, 1), (5, 7), (6, 9), (7, 8), (8, 6)])
def test_wide_formats_match_gfloat(e: int, m: int) -> None:
    fmt = exmy(e, m)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(e * 10 + m)) * 2.0 ** torch.linspace(-149, 127, 4000)
    x = torch.cat((x, NONFINITE, torch.tensor([0.0, -0.0, fmt.max, -fmt.max])))
    want = gfloat.round_ndarray(gfloat_exmy(e, m, ieee=True), x.double().numpy(), gfloat.RoundMode.TiesToEven, sat=True)
    assert_same_bits(fmt.round(x), torch.from_numpy(np.clip(want, -fmt.max, fmt.max)))


@pytest.mark.parametrize("fmt", [E4M3, E5M2, BF16, FP16], ids=str)
def test_rounding_matches_torch_casts(fmt: NumberFormat) -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=gen) * 2.0 ** torch.randint(-149, 127, (20_000,), generator=gen)
    if fmt.bits == 16:  # every midpoint of the format, at random codes, and its neighbours
        code = torch.randint(-32768, 32767, (20_000,), generator=gen).to(torch.int16)
        low, high = (c.view(fmt.dtype).float() for c in (code, code + 1))
        middle = ((low.double() + high.double()) / 2).float()
        inf = torch.tensor(torch.inf)
        x = torch.cat((x, middle, middle.nextafter(inf), middle.nextafter(-inf)))
        x = x[x.isfinite()]
    assert fmt.dtype is not None
    assert_same_bits(fmt.round(x), x.clamp(-fmt.max, fmt.max).to(fmt.dtype).float())


@pytest.mark.parametrize("fmt", [INT8, INT4, *(Integer(bits=bits) for bits in (2, 3, 5, 6, 7))], ids=str)
def test_integers(fmt: NumberFormat) -> None:
    values = fmt.decode(codes(fmt))
    assert sorted(values.tolist()) == list(range(-int(fmt.max) - 1, int(fmt.max) + 1))
    assert torch.equal(values[: 1 << (fmt.bits - 1)], torch.arange(1 << (fmt.bits - 1)).float())
    x = points(grid(fmt))
    want = x.round().clamp(-fmt.max, fmt.max)
    assert_same_bits(fmt.round(x), want)
    assert torch.equal(fmt.decode(fmt.encode(want)), want)
    if fmt == INT8:
        assert torch.equal(fmt.encode(want).view(torch.int8), want.to(torch.int8))


@pytest.mark.parametrize("bits", [9, 12, 16])
def test_wide_integers(bits: int) -> None:
    fmt = Integer(bits=bits)
    x = torch.linspace(-1.5, 1.5, 20_001) * fmt.max
    x = torch.cat((x, x.round() + 0.5, NONFINITE))
    assert_same_bits(fmt.round(x), x.round().clamp(-fmt.max, fmt.max))
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    assert (fmt.round(x, noise) - x.clamp(-fmt.max, fmt.max)).abs().max() < 1
    assert fmt.truncate(x).tolist() == x.clamp(-fmt.max, fmt.max).trunc().tolist()


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if not f.scales_only], ids=str)
@pytest.mark.parametrize("noisy", [False, True])
def test_every_format_on_the_odd_values(fmt: NumberFormat, noisy: bool) -> None:
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45])
    noise = torch.full((7,), 0.5) if noisy else None
    got = fmt.round(x, noise)
    smallest = 2.0**-133 if fmt == BF16 else 0.0
    assert got[:4].tolist() == [0.0, 0.0, fmt.max, -fmt.max]
    assert torch.equal(got.signbit(), x.signbit())
    assert got[4].isnan()
    assert got[5].abs() in (0.0, smallest)
    if fmt.bits <= 8:
        nan = fmt.decode(fmt.encode(got[4:5]))
        assert nan.isnan() if fmt.nan is not None else nan == fmt.max


@pytest.mark.parametrize("fmt", [E4M3, E2M1, INT4], ids=str)
def test_views_and_shapes(fmt: NumberFormat) -> None:
    x = torch.randn(6, 10) * 3
    assert torch.equal(fmt.round(x.mT), fmt.round(x).mT)
    assert torch.equal(fmt.round(x[::2, 1::3]), fmt.round(x)[::2, 1::3])
    assert torch.equal(fmt.encode(fmt.round(x).mT), fmt.encode(fmt.round(x)).mT)
    assert fmt.round(x[:0]).shape == (0, 10)
    assert fmt.round(torch.tensor(1.25)).shape == ()


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if not f.scales_only], ids=str)
def test_stochastic_rounding_never_moves_what_is_on_the_grid(fmt: NumberFormat) -> None:
    gen = torch.Generator().manual_seed(1)
    values = grid(fmt) if fmt.bits <= 8 else fmt.round(torch.randn(1000, generator=gen) * 2.0**-120)
    for noise in (torch.zeros_like(values), torch.full_like(values, 1 - 2.0**-24)):
        assert torch.equal(fmt.round(values, noise), values)
    assert (fmt.round(torch.tensor([fmt.max, 3.4e38, -torch.inf]), torch.zeros(3)).abs() == fmt.max).all()


@pytest.mark.parametrize("fmt", [*FLOATS, BF16, FP16, INT8, INT4, exmy(8, 2)], ids=str)
def test_stochastic_rounding_compares_noise_with_the_fraction(fmt: NumberFormat) -> None:
    ulp = 2.0**fmt.tiny_exponent  # among the subnormals, where the spacing is the smallest value
    for base in (0.0, ulp):
        x = torch.full((3,), base + ulp / 4)
        noise = torch.tensor([0.0, 0.25 - 2.0**-24, 0.25])
        assert fmt.round(x, noise).tolist() == [base + ulp, base + ulp, base]
        assert fmt.round(-x, noise).tolist() == [-base - ulp, -base - ulp, -base]


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1, BF16, INT4], ids=str)
@pytest.mark.parametrize("value", [0.3, 1.7, 2.6, "subnormal", "small", "negative"])
def test_stochastic_rounding_is_unbiased(fmt: NumberFormat, value: float | str) -> None:
    ulp = 2.0**fmt.tiny_exponent
    x = {"subnormal": 1.3 * ulp, "small": 0.07 * ulp, "negative": -1.1}.get(value, value)  # type: ignore[call-overload]
    num = 100_000
    noise = torch.rand(num, generator=torch.Generator().manual_seed(2))
    scale = 1 / ulp if abs(x) < 1e-30 else 1.0  # statistics away from FP32's subnormals
    drawn = fmt.round(torch.full((num,), x), noise).double() * scale
    exact = torch.tensor(x, dtype=torch.float32).double() * scale
    assert (drawn.mean() - exact).abs() <= 4 * drawn.std() / num**0.5
    assert len(drawn.unique()) == 2


def test_packing() -> None:
    x = torch.randint(0, 16, (3, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    packed = pack4(x)
    assert packed.shape == (3, 3)
    assert packed[0, 0] == x[0, 0] + 16 * x[0, 1]
    assert (packed[:, 2] == x[:, 4]).all()
    assert torch.equal(unpack4(packed, 5), x)
    assert torch.equal(pack4(x[:, :4]), pack_uint4(x[:, :4].contiguous()))
    assert torch.equal(pack4(x.mT), pack4(x.mT.contiguous()))
    assert pack4(x[:, :0]).shape == (3, 0)
    assert unpack4(pack4(x[:0]), 5).shape == (0, 5)
    with pytest.raises(ValueError, match="take 4 bytes, not 3"):
        unpack4(packed, 7)


def test_names() -> None:
    few = [exmy(1, 2, ieee=False), exmy(3, 0, ieee=False), Integer(bits=2), Integer(bits=16)]
    for fmt in [*FORMATS.values(), exmy(3, 4), exmy(2, 5, ieee=False), exmy(8, 3), *few]:
        assert by_name(fmt.name) == fmt
    assert by_name("e5m7") == exmy(5, 7)
    same = [exmy(5, 2), exmy(4, 3), exmy(8, 7), exmy(5, 10), exmy(2, 1, ieee=False), exmy(3, 2, ieee=False)]
    assert same == [E5M2, E4M3_240, BF16, FP16, E2M1, E3M2]
    assert exmy(2, 3, ieee=False) == E2M3
    assert exmy(4, 3, ieee=False).max == 480.0
    assert E4M3.bias == 7
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        by_name("int 8")


@pytest.mark.parametrize(
    ("e", "m", "ieee", "hint"),
    [
        (1, 2, True, "; there is e1m2_finite"),
        (4, 0, True, "; there is e4m0_finite"),
        (8, 3, False, "; there is e8m3"),
        (8, 0, True, "need 2 exponent bits and a mantissa bit"),
        (9, 2, True, "1 to 8 bits"),
        (0, 2, False, "1 to 8 bits"),
        (8, 8, True, "fits in 16 bits"),
    ],
)
def test_formats_that_cannot_be(e: int, m: int, ieee: bool, hint: str) -> None:
    with pytest.raises(ValueError, match=f"no format e{e}m{m}.*{hint}"):
        exmy(e, m, ieee=ieee)


@pytest.mark.parametrize("bits", [1, 17])
def test_integers_that_cannot_be(bits: int) -> None:
    with pytest.raises(ValueError, match=f"2 to 16 bits, not {bits}"):
        Integer(bits=bits)
    with pytest.raises(ValueError, match=f"2 to 16 bits, not {bits}"):
        by_name(f"int{bits}")


@dataclass(frozen=True)
class Halves(NumberFormat):
    """A format of a recipe's own, with no more than it must have."""

    name: str = "halves"
    bits: int = 3
    max: float = 1.5

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        a = 2 * x.float().abs().clamp(max=self.max)
        a = a.round() if noise is None else a.floor() + (noise < a.frac())
        return torch.copysign(a / 2, x.float())

    def encode(self, values: Tensor) -> Tensor:
        return ((2 * values.abs()).nan_to_num(3.0).int() + 4 * values.signbit()).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.where(codes & 4 > 0, -0.5, 0.5) * (codes & 3).float()


def test_what_a_format_of_a_recipes_own_need_not_say() -> None:
    fmt = Halves()
    x = torch.tensor([0.7, -0.7, 9.0])
    assert str(fmt) == "halves"
    assert fmt.truncate(x).tolist() == [0.5, -0.5, 1.5]
    assert (fmt.min, fmt.dtype, fmt.nan, fmt.scales_only, fmt.max_exponent) == (-1.5, None, None, False, 0)
    assert (fmt.significant_bits, fmt.tiny_exponent) == (24, -149)  # no claim
    with pytest.raises(ValueError, match="halves has no mantissa"):
        fmt.mantissa_bits  # noqa: B018
    x = torch.randn(6, 40)
    for tile, rule in ((TENSOR, Fp32()), (Tile(1, 16), PowerOfTwo()), (Tile(1, 16), TwoLevel())):
        q = quantize(x, OperandSpec(format=fmt, tile=tile, scale=rule))
        assert operand(q)[0].dtype == torch.float32
        assert (dequantize(q) - x).abs().max() < 2.0


def test_what_a_format_must_say() -> None:
    class Unrounded(NumberFormat):
        name, bits, max = "unrounded", 8, 1.0

    class WithoutCodes(Unrounded):
        def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
            return x.float().sign()

    with pytest.raises(TypeError, match="round"):
        Unrounded()  # type: ignore[abstract]
    for call in (WithoutCodes().encode, WithoutCodes().decode):
        with pytest.raises(ValueError, match="unrounded has 8 bits; codes are for formats of at most 8 that define"):
            call(torch.ones(1))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no rounding of its own"):
        E8M0.round(torch.ones(1))
    for call in (FP16.encode, FP16.decode):
        with pytest.raises(ValueError, match="at most 8"):
            call(torch.ones(1))


ALL_BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("m", range(1, 8))
def test_truncation_with_eight_exponent_bits_masks_the_bf16_word(m: int) -> None:
    x = ALL_BF16[ALL_BF16.isfinite()]
    masked = (x.view(torch.int16) & ~((1 << (7 - m)) - 1)).view(torch.bfloat16)
    assert torch.equal(exmy(8, m).truncate(x).view(torch.int32), masked.float().view(torch.int32))


@pytest.mark.parametrize("fmt", [E5M2, E4M3_240, exmy(7, 7), exmy(6, 3)], ids=str)
def test_truncation_gives_the_next_value_of_the_grid_towards_zero(fmt: NumberFormat) -> None:
    x = ALL_BF16[ALL_BF16.isfinite()].double().numpy()
    a = np.minimum(np.abs(x), fmt.max)
    spacing = 2.0 ** (np.maximum(np.frexp(a)[1] - 1, fmt.min_exponent) - fmt.mantissa_bits)
    expected = np.copysign(np.floor(a / spacing) * spacing, x)
    assert np.array_equal(fmt.truncate(torch.tensor(x)).double().numpy(), expected)
    if fmt in ML_DTYPES:  # a cast there is exact: the values are on its grid
        assert np.array_equal(expected.astype(ML_DTYPES[fmt]).astype(np.float64), expected)
    assert fmt.truncate(NONFINITE).tolist() == [fmt.max, -fmt.max]
    assert fmt.truncate(torch.tensor(torch.nan)).isnan()
