"""Specs as data: what prints, what hashes, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from narrowgauge.precision.formats import BF16, E2M1, E4M3, E5M2, E8M0
from narrowgauge.precision.scaling import Current, Delayed, Fp32, PowerOfTwo, Tile, TwoLevel, Unit
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding, Source
from narrowgauge.precision.transforms import Hadamard

FP8 = OperandSpec(format=E4M3, amax=Delayed())
BLOCK = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())
AGAIN = replace(FP8, source=Source.QUANTIZED)


def test_names() -> None:
    stochastic = replace(BLOCK, rounding=Rounding.STOCHASTIC)
    assert str(FP8) == "e4m3/tensor/delayed"
    assert str(stochastic) == "e2m1/1x16/e4m3+fp32/sr"
    assert str(OperandSpec(format=E5M2)) == "e5m2/tensor/fp32"
    assert str(replace(FP8, scale=Fp32(margin=1))) == "e4m3/tensor/fp32-margin1/delayed"
    assert str(OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())) == "e4m3/1x32/e8m0-rceil"
    assert str(OperandSpec(format=BF16, scale=Unit())) == "bf16/unscaled"
    assert str(AGAIN) == "e4m3/tensor/delayed/requantized"
    linear = LinearSpec(fprop=GemmSpec(a=FP8), wgrad=GemmSpec(a=stochastic, b=BLOCK, transform=Hadamard()))
    assert str(linear) == (
        "fprop e4m3/tensor/delayed x -, dgrad -, wgrad e2m1/1x16/e4m3+fp32/sr x e2m1/1x16/e4m3+fp32 [hadamard16]"
    )


def test_values() -> None:
    assert LinearSpec() == LinearSpec()
    same = [LinearSpec(fprop=GemmSpec(a=FP8, b=BLOCK, transform=Hadamard(size=32, signs=1))) for _ in range(2)]
    assert len(set(same)) == 1
    assert hash(replace(same[0], dgrad=GemmSpec(a=FP8))) != hash(same[0])
    with pytest.raises(AttributeError):
        FP8.format = E5M2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": E8M0}, "cannot be the format of elements"),
        ({"tile": Tile(1, 0)}, "inner extent .* not 0"),
        ({"tile": Tile(-2, 16)}, "outer extent .* not -2"),
        ({"tile": Tile(1, 16), "scale": Unit()}, "leave the tile out"),
        ({"scale": TwoLevel()}, "the tile must be smaller"),
        ({"tile": Tile(1, 128), "amax": Delayed()}, "one amax per tensor"),
        ({"scale": Unit(), "amax": Delayed()}, "no use for a delayed amax"),
        ({"scale": Unit(), "amax": Current(step=True)}, "no use for the amax of a step"),
        ({"tile": Tile(1, 128), "amax": Current(step=True)}, "lie within a sample"),
    ],
)
def test_operands_that_cannot_be(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        OperandSpec(**{"format": E4M3, **change})


def test_operands_that_can_be() -> None:
    replace(BLOCK, amax=Delayed())  # the tensor's amax is delayed, the tiles' amaxes are current
    replace(BLOCK, tile=Tile(1, 32))
    replace(BLOCK, tile=Tile(1, -1))


def test_gemms_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="hadamard16 rewrites a GEMM neither"):
        GemmSpec(transform=Hadamard())


@pytest.mark.parametrize(
    ("gemms", "match"),
    [
        ({"fprop": GemmSpec(a=AGAIN)}, "x is quantized here for the first time"),
        ({"fprop": GemmSpec(b=AGAIN)}, "w is quantized"),
        ({"dgrad": GemmSpec(a=AGAIN)}, "dy is quantized"),
        ({"dgrad": GemmSpec(b=AGAIN)}, "dgrad.b is to reuse the codes of w"),
        ({"wgrad": GemmSpec(a=AGAIN)}, "wgrad.a is to reuse the codes of dy"),
        ({"wgrad": GemmSpec(b=AGAIN)}, "wgrad.b is to reuse the codes of x"),
    ],
)
def test_linears_that_cannot_be(gemms: dict[str, GemmSpec], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LinearSpec(**gemms)


def test_reuse_of_codes() -> None:
    LinearSpec(fprop=GemmSpec(a=FP8, b=FP8), dgrad=GemmSpec(a=FP8, b=AGAIN), wgrad=GemmSpec(a=AGAIN, b=AGAIN))


def test_no_scale_of_the_whole_step_is_of_rows_that_are_tokens() -> None:
    whole = OperandSpec(format=E4M3, amax=Current(step=True))
    row = replace(whole, tile=Tile(1, -1))
    assert LinearSpec(fprop=GemmSpec(a=whole), wgrad=GemmSpec(a=row, b=row)) != LinearSpec()
    for spec in ({"fprop": GemmSpec(a=row)}, {"dgrad": GemmSpec(a=row)}):
        with pytest.raises(ValueError, match="are tokens of one rank"):
            LinearSpec(**spec)
