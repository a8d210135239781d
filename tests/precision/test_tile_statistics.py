"""What of a tile its scale is made of, and to what that is mapped: against sums in rational arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from narrowgauge.precision.backends import Cast, choose
from narrowgauge.precision.backends.cpu.quantizer import Cpu
from narrowgauge.precision.backends.triton.quantizer import Triton
from narrowgauge.precision.formats import E2M1, E4M3, INT8, Integer, NumberFormat, unpack4
from narrowgauge.precision.quantize import Quantized, dequantize, operand, prepare, quantize
from narrowgauge.precision.scaling import (
    AMAX,
    TENSOR,
    Current,
    Delayed,
    Fp32,
    Fp32Decode,
    Mean,
    Power,
    PowerOfTwo,
    Quantile,
    Rms,
    ScaleRule,
    Scales,
    Statistic,
    Std,
    Tile,
    TwoLevel,
    Unit,
    statistic_of,
)
from narrowgauge.precision.spec import GemmSpec, OperandSpec
from torch import Tensor

INF, NAN = math.inf, math.nan
TILES = [TENSOR, Tile(1, -1), Tile(-1, 1), Tile(1, 16), Tile(16, 16), Tile(3, 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INT2 = Integer(bits=2)


def exactly(statistic: Statistic, values: list[float]) -> float:
    """Of finite values, rounded to FP64 once or twice."""
    fractions = [Fraction(value) for value in values]
    n = len(fractions)
    match statistic:
        case Mean():
            return float(sum(map(abs, fractions)) / n)
        case Rms():
            return math.sqrt(sum(x * x for x in fractions) / n)
        case Std():
            mean = sum(fractions) / n
            return math.sqrt(sum((x - mean) ** 2 for x in fractions) / n)
        case Quantile(q=q):
            ordered = sorted(map(abs, fractions))
            place = Fraction(q * (n - 1))
            low = ordered[math.floor(place)]
            return float(low + (ordered[math.ceil(place)] - low) * (place - math.floor(place)))
        case _:
            return float(max(map(abs, fractions)))


def pieces(x: Tensor, tile: Tile) -> dict[tuple[int, int], Tensor]:
    tall, wide = tile.extent(*x.shape)
    rows, columns = tile.grid(*x.shape)
    return {
        (i, j): x[i * tall : (i + 1) * tall, j * wide : (j + 1) * wide]
        for i, j in itertools.product(range(rows), range(columns))
    }


@pytest.mark.parametrize(
    "statistic", [AMAX, Mean(), Rms(), Std(), Quantile(0.0), Quantile(0.3), Quantile(1.0)], ids=str
)
def test_equals_rational_arithmetic(statistic: Statistic) -> None:
    for number, (dtype, tile) in enumerate(itertools.product(DTYPES, TILES)):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(9, 37, generator=generator) * 2.0 ** torch.randint(-12, 6, (9, 1), generator=generator)
        x[2], x[3, 5:9], x[4] = 0.0, -0.0, 1e-7
        if dtype == torch.float32:
            x[5] *= 1e-39  # subnormal
        x = x.to(dtype)
        for view in (x, x.mT.contiguous().mT, torch.stack((x, x), -1)[..., 0]):
            got = statistic_of(view, tile, statistic, E4M3)
            assert got.dtype == torch.float32
            assert got.shape == tile.grid(*x.shape)
            for place, piece in pieces(x.float(), tile).items():
                assert float(got[place]) == np.float32(exactly(statistic, piece.flatten().tolist())), (place, tile)


@pytest.mark.parametrize("statistic", [AMAX, Mean(), Rms(), Std(), Quantile(0.5)], ids=str)
def test_of_what_is_not_finite_and_of_nothing(statistic: Statistic) -> None:
    x = torch.ones(4, 20)
    x[0, 0], x[1, 17], x[2] = NAN, NAN, INF
    got = statistic_of(x, Tile(1, 16), statistic, E4M3)
    assert got.isnan().tolist()[0] == [True, False]
    assert got.isnan().tolist()[1] == [False, True]
    assert all(value == INF or isinstance(statistic, Std) for value in got[2].tolist())
    assert got[3].tolist() == ([0.0] if isinstance(statistic, Std) else [1.0]) * 2
    for shape in ((0, 7), (7, 0), (0, 0)):
        for tile in (TENSOR, Tile(1, -1), Tile(-1, 16)):
            found = statistic_of(torch.ones(shape), tile, statistic, E4M3)
            assert found.shape == tile.grid(*shape)
            assert not found.any()


def test_an_infinity_above_the_quantile_does_not_show() -> None:
    x = torch.tensor([[1.0, INF, 2.0, 3.0, INF]])
    assert [statistic_of(x, TENSOR, Quantile(q), E4M3).item() for q in (0.25, 0.5, 0.75, 1.0)] == [2.0, 3.0, INF, INF]


def fp64(value: float) -> float:
    return float(np.float32(value))


def model_of(rule: ScaleRule, top: float) -> Callable[[float, float], tuple[float, float]]:
    """(statistic, the largest of them) -> encode and decode scales of E2M1 in FP64, on rounded stored scales."""
    m = 6 * top

    def fp32(a: float, _: float) -> tuple[float, float]:
        return m / a, a / m

    def power(a: float, _: float) -> tuple[float, float]:
        assert isinstance(rule, PowerOfTwo)
        by_ratio, above = math.log2(a / m), math.log2(a)
        k = {
            Power.RCEIL: math.ceil(by_ratio),
            Power.RFLOOR: math.floor(by_ratio),
            Power.RNEAREST: round(by_ratio),
            Power.FLOOR: math.floor(above) - 2,
            Power.CEIL: math.ceil(above) - 2,
            Power.EVEN: math.floor(math.log2(a * 1.25 if math.frexp(a)[0] >= 0.875 else a)) - 2,
        }[rule.mode]
        beyond = top if rule.mode in (Power.FLOOR, Power.CEIL, Power.EVEN) else 1.0
        return 2.0**-k * beyond, 2.0**k / beyond

    def two_level(a: float, largest: float) -> tuple[float, float]:
        assert isinstance(rule, TwoLevel)
        t = largest / (m * (rule.block_max or 448))
        decode = float(E4M3.round(torch.tensor(a / m / t))) * t
        return 1 / decode, decode

    return {Fp32: fp32, Fp32Decode: fp32, PowerOfTwo: power, TwoLevel: two_level}[type(rule)]


RULES = [Fp32(), Fp32Decode(floor=1e-9), TwoLevel(block_max=255.99), *(PowerOfTwo(mode=mode) for mode in Power)]


@pytest.mark.parametrize("top", [1.0, 0.75, 16 / 17, 1 / 2.92247856], ids=["1", "3/4", "16/17", "quest"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_statistic_is_mapped_to_the_top(rule: ScaleRule, top: float) -> None:
    statistic = [AMAX, Std(), Quantile(0.9)][RULES.index(rule) % 3]
    spec = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=rule, statistic=statistic, top=top)
    x = torch.randn(12, 50, generator=torch.Generator().manual_seed(1))
    x *= 2.0 ** torch.linspace(-3, 3, 12)[:, None]
    q, model = quantize(x, spec), model_of(rule, top)
    found = statistic_of(x, spec.tile, statistic, E2M1)
    back, values = dequantize(q).double(), E2M1.decode(unpack4(q.codes, 50)).double()
    for place, piece in pieces(x.double(), spec.tile).items():
        encode, decode = model(float(found[place]), float(found.max()))
        scaled = piece * encode
        grid = E2M1.round(scaled.float()).double()
        got = pieces(values, spec.tile)[place]
        near_tie = E2M1.round((scaled * (1 + 1e-5)).float()) != E2M1.round((scaled * (1 - 1e-5)).float())
        assert ((got == grid) | near_tie).all()
        torch.testing.assert_close(pieces(back, spec.tile)[place], got * decode, rtol=1e-6, atol=0)
    matrix, factor = operand(q)
    torch.testing.assert_close(matrix.float() * (1 if factor is None else factor), dequantize(q), rtol=1e-6, atol=0)
    prepared = prepare(x, spec)
    assert torch.equal(prepared.matrix, matrix)
    assert prepared.factor is None or torch.equal(prepared.factor, factor)  # type: ignore[arg-type]


def test_quartets_backward_operand_is_floor_with_a_factor_beyond() -> None:
    """The exponent floor(log2 amax), codes of 3 x / 2^e, and 1 / 3 * 2^e back; nothing saturates."""
    spec = OperandSpec(format=E2M1, tile=Tile(1, 32), scale=PowerOfTwo(mode=Power.FLOOR), top=0.75)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    exponent = x.reshape(64, 2, 32).abs().amax(-1).log2().floor()
    spread = exponent.exp2().repeat_interleave(32, 1)
    codes = E2M1.round(3 * x / spread)
    assert (3 * x / spread).abs().max() < 6
    q = quantize(x, spec)
    assert torch.equal(E2M1.decode(unpack4(q.codes, 64)), codes)
    torch.testing.assert_close(dequantize(q), codes * spread / 3)
    assert q.tensor_scale is not None
    assert q.tensor_scale.item() == np.float32(4 / 3)
    assert operand(q)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("mode", "error"), [(Power.RFLOOR, 2.4e-2), (Power.RNEAREST, 1.36e-2)], ids=["released", "published"]
)
def test_quartets_forward_errors(mode: Power, error: float) -> None:
    """Squared errors of Gaussian data over an octave of amplitudes, as measured of the authors' code."""
    spec = OperandSpec(format=E2M1, tile=Tile(1, 32), scale=PowerOfTwo(mode=mode), statistic=Std(), top=1 / 2.92247856)
    amplitude = 2.0 ** torch.linspace(0, 1, 8193)[1:, None]
    x = torch.randn(8192, 32, generator=torch.Generator().manual_seed(3)) * amplitude
    relative = (dequantize(quantize(x, spec)) - x).square().mean() / x.square().mean()
    assert float(relative) == pytest.approx(error, rel=0.04)


def test_bitnets_ternary_weights() -> None:
    spec = OperandSpec(format=INT2, scale=Fp32Decode(floor=1e-5), statistic=Mean())
    w = torch.randn(48, 33, generator=torch.Generator().manual_seed(4)) * 0.02
    scale = w.abs().mean(dtype=torch.float64)
    q = quantize(w, spec)
    assert torch.equal(INT2.decode(q.codes), (w / scale).round().clamp(-1, 1).float())
    assert q.scales.item() == np.float32(scale)


@dataclass(frozen=True, slots=True)
class LeastError:
    """As a recipe may write one: the share of the amax at which the tile's squared error by FP32 scales is least."""

    def of(self, values: Tensor, inside: Tensor, element: NumberFormat) -> Tensor:
        top = values.abs().amax(-1, keepdim=True)
        shares = torch.linspace(0.5, 1.0, 26, dtype=torch.float64)
        errors = []
        for share in shares:
            scale = share * top / element.max
            back = element.round((values / scale).nan_to_num().float()).double() * scale
            errors.append(torch.where(inside, back - values, 0.0).square().sum(-1))
        return shares[torch.stack(errors).argmin(0)] * top.squeeze(-1)

    def __str__(self) -> str:
        return "leasterror"


def test_a_recipes_own_statistic_sees_the_tile_and_the_format() -> None:
    x = torch.randn(64, 50, generator=torch.Generator().manual_seed(5))
    spec = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=Fp32())
    clipped = replace(spec, statistic=LeastError())
    assert str(clipped) == "e2m1/1x16/fp32/leasterror"
    errors = [(dequantize(quantize(x, each)) - x).square() for each in (spec, clipped)]
    of_tiles = [torch.stack([piece.sum() for piece in pieces(e, spec.tile).values()]) for e in errors]
    assert (of_tiles[1] <= of_tiles[0] * (1 + 1e-6)).all()
    assert of_tiles[1].sum() < 0.9 * of_tiles[0].sum()
    reason = choose(GemmSpec(a=clipped, b=spec), (64, 64, 50), torch.device("cpu"))
    assert str(reason) == "reference (not cpu: no kernel for scales of the leasterror of a tile)"


CLIPPED = OperandSpec(format=E4M3, scale=Fp32(), statistic=Std(), top=0.5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"top": 1.0}, "no kernel for scales of the std of a tile"),
        ({"statistic": AMAX}, "no kernel for scales with a top of 0.5"),
        ({"scale": PowerOfTwo(), "tile": Tile(1, 32)}, "no kernel for scales of the std of a tile"),
        (
            {"statistic": AMAX, "scale": TwoLevel(), "tile": Tile(1, 16)},
            "no kernel for scales with a top",
        ),
    ],
    ids=["statistic", "top", "powers", "levels"],
)
def test_kernels_refuse_and_never_take_it_for_an_amax(changes: dict[str, object], reason: str) -> None:
    spec = replace(CLIPPED, **changes)  # type: ignore[arg-type]
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(6)).bfloat16()
    assert str(Cpu().why_not(GemmSpec(a=spec), x.device)).startswith(reason)
    assert reason in str(choose(GemmSpec(a=spec, b=spec), (32, 32, 64), x.device))
    wanted = quantize(x, spec)
    for quantizer in (Cpu(), Triton()):  # who is asked all the same gives the reference's bits
        for seen in (x, x.mT.contiguous().mT):
            made = quantizer.cast(seen, Cast(spec=spec))
            assert isinstance(made, Quantized)
            assert torch.equal(made.codes, wanted.codes)
            assert torch.equal(made.scales, wanted.scales)
        prepared = quantizer.cast(x, Cast(spec=spec, codes=False))
        assert isinstance(prepared, Quantized) or torch.equal(prepared.matrix, operand(wanted)[0])


class NoTop:
    format, levels, power_of_two = None, 1, False

    def scales(
        self, amax: Tensor, element: NumberFormat, *, tensor_amax: Tensor | None = None, dtype: torch.dtype
    ) -> Scales:
        return Scales(1 / amax, amax)

    def __str__(self) -> str:
        return "notop"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": Unit(), "statistic": AMAX}, "neither a statistic nor a top is of use"),
        ({"top": 0.0}, "top is a factor on the largest value of e4m3, above 0, not 0"),
        ({"top": INF}, "above 0, not inf"),
        ({"amax": Delayed()}, "delayed scaling remembers and exchanges amaxes alone: no std"),
        ({"amax": Current(step=True)}, "step scaling remembers and exchanges amaxes alone: no std"),
        ({"scale": NoTop()}, "notop maps a tile as its own `scales` says, which takes no top: leave it at 1"),
    ],
    ids=["unscaled", "zero", "infinite", "delayed", "step", "no top"],
)
def test_what_cannot_be(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CLIPPED, **wrong)  # type: ignore[arg-type]


def test_what_plan_txt_says() -> None:
    with pytest.raises(ValueError, match=r"share from 0 to 1, not of 1\.5"):
        Quantile(1.5)
    assert str(CLIPPED) == "e4m3/tensor/fp32/std/top0.5"
    assert str(replace(CLIPPED, statistic=AMAX, top=1.0)) == "e4m3/tensor/fp32"
    assert str(replace(CLIPPED, statistic=AMAX, amax=Delayed())) == "e4m3/tensor/top0.5/delayed"
    quest = OperandSpec(format=INT8, tile=Tile(1, 32), scale=PowerOfTwo(mode=Power.RNEAREST), statistic=Quantile(0.99))
    assert str(quest) == "int8/1x32/e8m0-rnearest/quantile0.99"
