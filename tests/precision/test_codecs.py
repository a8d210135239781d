"""Codecs: what comes back lies within the stated bound; what is not finite shows; names say what is meant."""

from __future__ import annotations

import math
import re

import pytest
import torch
from narrowgauge.precision.codebook import Codebook
from narrowgauge.precision.formats import E2M1, E4M3, Integer
from narrowgauge.precision.noise import Noise, base_key, step_key
from narrowgauge.precision.quantize import amax
from narrowgauge.precision.scaling import Tile
from narrowgauge.precision.spec import Rounding
from narrowgauge.precision.states.codecs import (
    Codec,
    Dynamic,
    Expanded,
    Kahan,
    Plain,
    Scaled,
    dynamic_map,
    expanded_maps,
)
from narrowgauge.precision.states.moments import CHOICES, STANDARD, Moments, chosen, codec
from torch import Tensor
from torchao.optim.quant_utils import create_dynamic_map

NAMES = [
    "fp32", "bf16", "bf16/kahan", "e4m3", "e4m3/tensor", "e4m3_240/tensor", "e4m3_240/33", "e5m2", "e5m2/tensor",
    "e3m4/64", "int8", "int8/tensor", "fp16/tensor", "fp16/64", "dynamic", "dynamic/100", "expanded", "expanded/33",
]  # fmt: skip
SHAPES = [(7, 300), (1, 1), (5, 128), (3, 1), (0, 40), (33, 257)]


def matrices(shape: tuple[int, int], *, signed: bool = True) -> list[Tensor]:
    """Twelve decades in every block, zeros, one outlier, constant blocks, subnormals, huge values, a strided view."""
    generator = torch.Generator().manual_seed(shape[1])
    x = torch.randn(shape, generator=generator) * 10 ** (12 * torch.rand(shape, generator=generator) - 9)
    x = x if signed else x.abs()
    outlier = torch.full(shape, 1e-7)
    outlier[:, -1:] = 1e5
    zeros = x.clone()
    zeros[:, ::3], zeros[:, 1::3] = 0.0, -0.0
    constant = torch.full(shape, 0.3712)
    near = 1 + x.sign() * 1e-4
    cases = [x, torch.zeros(shape), outlier, zeros, constant, near, x * 1e-20, x * 1e25, x * 1e-37]
    return [*cases, torch.stack((x, x), -1)[..., 0], x.mT.contiguous().mT]


def error_bound(of: Codec, x: Tensor) -> Tensor:
    """What |x - decode(encode(x))| is at most, element by element, for finite x; FP32, rounding to nearest."""
    if isinstance(of, Plain):
        return x.abs() * 2.0**-8 + 2.0**-134 if of.dtype is torch.bfloat16 else torch.zeros_like(x)
    if isinstance(of, Kahan):
        return x.abs() * 2.0**-16 + 2.0**-133
    assert isinstance(of, (Scaled, Dynamic, Expanded))
    block = of.block or x.shape[1]
    top = amax(x, Tile(-1 if of.block is None else 1, block))

    def spread(of_blocks: Tensor) -> Tensor:
        return of_blocks.repeat_interleave(block, 1)[:, : x.shape[1]]

    if isinstance(of, Scaled):
        least = spread(top.clamp(min=of.floor)) * (2.0**of.format.tiny_exponent / of.format.max)
        return 0.5000005 * (x.abs() * 2.0**-of.format.mantissa_bits).maximum(least)
    if isinstance(of, Expanded):
        return x.abs() * (1.25 ** (16 / (spread(of.powers(x, top)) + 1)) - 1 + 2.0**-20)
    values, _ = dynamic_map(of.signed)
    share = torch.where(spread(top) > 0, x / spread(top), 0.0)
    above = torch.bucketize(share, values).clamp(1, 255)
    gap = torch.where(share < values[0], 2 * (values[0] - share), values[above] - values[above - 1])
    return (gap * 0.500001 + 2.0**-24) * spread(top)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_what_comes_back_lies_within_the_bound(name: str, shape: tuple[int, int]) -> None:
    for signed in (True, False):
        named = codec(name, signed=signed)
        for x in matrices(shape, signed=signed):
            parts = named.encode(x)
            layout = named.layout(*shape)
            assert {key: (tuple(part.shape), part.dtype) for key, part in parts.items()} == layout
            back = named.decode(parts)
            bound = error_bound(named, x)
            assert back.dtype == torch.float32
            assert ((back - x).abs() <= bound).all(), (name, (back - x).abs().sub(bound).max())
            assert bool((back == 0)[x == 0].all())
            if not signed:
                assert bool((back >= 0).all())


@pytest.mark.parametrize(
    ("name", "relative", "absolute"),
    [("bf16", 2**-8, 0), ("bf16/kahan", 2**-16, 0), ("e4m3", 2**-4, 2**-10 / 448),
     ("e5m2/tensor", 2**-3, 2**-17 / 57344), ("fp16/tensor", 2**-11, 2**-25 / 65504), ("dynamic", 0, 0.0071)],
)  # fmt: skip
def test_bounds_are_what_the_formats_promise(name: str, relative: float, absolute: float) -> None:
    """In numbers of their own, so that a bound cannot be right by being wide."""
    named = codec(name)
    x = matrices((7, 300))[0]
    limit = x.abs() * relative + absolute * float(x.abs().max()) * 1.0001
    assert (error_bound(named, x) <= limit * 1.001 + 1e-35).all()


def test_expanded_beats_e4m3_on_a_narrow_block_and_on_a_wide_one() -> None:
    """Why it is there: the bend fits the block (COAT)."""
    generator = torch.Generator().manual_seed(0)
    for decades in (0.3, 8):
        x = 10 ** (decades * torch.rand(4, 128, generator=generator))
        errors = [((k.decode(k.encode(x)) - x) / x).abs().max() for k in (Expanded(), Scaled(format=E4M3))]
        assert errors[0] < errors[1] / 2


def test_the_bend_is_coats_up_to_sixteen() -> None:
    """k of the authors' code has no bound: blocks whose magnitudes lie within a factor of 2.05 are bent less here."""
    ratios = torch.cat((torch.linspace(1e-4, 1.03, 200), torch.linspace(1.05, 90, 400))).double().exp2()
    x = torch.ones(len(ratios), 128)
    x[:, 7], x[:, 1] = (1 / ratios).float(), 0.0
    named = Expanded()
    ours = (named.encode(x)["powers"].flatten().double() + 1) / 16
    share = 16 * math.log2(448 * 448 / 2) / torch.log2(1 / x[:, 7].double())  # 16 k before it is rounded down
    theirs = share.floor() / 16
    steps = (share - share.round()).abs() > 1e-4  # elsewhere a last bit of a logarithm decides
    wide = ratios > (448 * 448 / 2) ** (1 / 16) * 1.0001
    assert torch.equal(ours[wide & steps], theirs[wide & steps])
    near = ratios < (448 * 448 / 2) ** (1 / 16) * 0.9999
    assert int(near.sum()) == 200
    assert bool((ours[near] == 16).all())
    assert bool((theirs[near] >= 16).all())
    assert float(theirs.max()) > 1e5
    error = ((named.decode(named.encode(x)) - x).abs() / x.clamp(min=1e-38))[near]
    assert float(error.max()) < 0.015


def test_the_dynamic_map_is_bitsandbytes() -> None:
    for signed in (True, False):
        values, middles = dynamic_map(signed)
        theirs = torch.tensor(create_dynamic_map(signed))
        torch.testing.assert_close(values, theirs, rtol=1e-6, atol=0)
        assert len(values.unique()) == 256
        assert bool(((values[:-1] < middles) & (middles < values[1:])).all())
    values, _ = expanded_maps()
    assert values.shape == (256, 128)
    torch.testing.assert_close(values[15, :127] * 448, E4M3.decode(torch.arange(127, dtype=torch.uint8)))  # k = 1


@pytest.mark.parametrize("name", [*NAMES, "e4m3/sr", "bf16/sr"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(name: str, bad: float) -> None:
    """In a float part, where a checkpoint looks, and in what shares the scale; other blocks are untouched."""
    named = codec(name)
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    x[1, 299] = bad
    noise = Noise(key=step_key(base_key(0, "w", 16), 1)) if named.stochastic else None
    parts = named.encode(x, noise=noise)
    assert not all(bool(part.isfinite().all()) for part in parts.values() if part.is_floating_point())
    back = named.decode(parts)
    assert not back[1, 299].isfinite()
    if not named.per_tensor:
        assert back[0].isfinite().all()
        assert back[1, :200].isfinite().all()


@pytest.mark.parametrize("name", ["bf16/sr", "e4m3/sr", "e5m2/tensor/sr", "fp16/64/sr"])
def test_stochastic_rounding_is_a_function_of_its_place_and_right_on_average(name: str) -> None:
    named, nearest = codec(name), codec(name.removesuffix("/sr"))
    x = torch.full((64, 256), 0.3)
    x[:, ::64] = 1.0  # every block has a scale that 0.3 is no multiple of
    key = step_key(base_key(3, "layers.0.weight", 16), 7)
    backs = named.decode(named.encode(x, noise=Noise(key=key)))
    lower = named.decode(named.encode(x[16:32], amax=x.max(), noise=Noise(key=key, row_offset=16)))
    assert torch.equal(lower, backs[16:32])
    other = named.decode(named.encode(x, noise=Noise(key=step_key(base_key(3, "layers.0.weight", 16), 8))))
    assert not torch.equal(other, backs)
    held = backs[x < 1]
    values = held.unique()
    assert len(values) == 2
    spread = float(values[1] - values[0])
    assert abs(float(held.double().mean()) - 0.3) < 5 * spread / 2 / math.sqrt(held.numel())
    assert float((nearest.decode(nearest.encode(x)) - x)[x < 1].abs().max()) <= spread / 2


def test_choices_and_spellings() -> None:
    for name, spelled in CHOICES.items():
        moments = chosen(name, STANDARD)
        assert str(moments.m) == spelled["m"]
        assert chosen({"m": str(moments.m), "v": str(moments.v), "master": spelled.get("master")}, STANDARD) == moments
    assert chosen("e4m3_240/64/sr", STANDARD) == Moments(m=codec("e4m3_240/64/sr"), v=codec("e4m3_240/64/sr"))
    assert chosen({"m": "e4m3", "v": "e5m2", "block": 32}, STANDARD).v == codec("e5m2/32")
    assert chosen({"v": "dynamic"}, STANDARD) == Moments(v=Dynamic(signed=False))
    recipe = Moments(m=codec("bf16"), v=codec("bf16"), master=codec("fp16/tensor"))
    assert chosen(None, recipe) is recipe
    assert chosen("fp8", recipe).master == recipe.master  # what a choice does not name stays the recipe's
    assert chosen("pure_bf16_kahan", recipe).param_dtype(torch.float32, torch.float32) == torch.bfloat16
    assert recipe.param_dtype(torch.float32, torch.bfloat16) == torch.bfloat16
    assert chosen({"master": "fp32"}, recipe).param_dtype(torch.bfloat16, torch.bfloat16) == torch.float32


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("fp88", r"no moments named 'fp88' \(did you mean 'fp8'"),
        ("pure_bf16_kahn", r"did you mean 'pure_bf16_kahan'"),
        ({"n": "fp32"}, "no key 'n'.*there are: m, v, master, block"),
        ({"m": "e4m33"}, r"no codec named 'e4m33' \(did you mean 'e4m3'"),
        ({"m": "e4m3/tenser"}, "'e4m3/tenser' is no codec"),
        ({"m": "e4m3", "block": "x"}, "block='x': a number"),
        ({"m": "e4m3", "block": 0}, "a block of a state has 1 to 4096 elements, not 0"),
        ({"m": "bf16/128"}, "bf16 has no scale"),
        ({"m": "bf16/kahan"}, "compensation is for weights"),
        ({"m": "e4m3/kahan"}, "compensation is for bf16"),
        ({"m": "fp32/sr"}, "nothing to round"),
        ({"m": "dynamic/sr"}, "rounded to nearest"),
        ({"m": "e2m1"}, "floats of 5 to 8 bits"),
        ({"master": "dynamic"}, "weights are kept as fp32, bf16, or scaled floats"),
        (8, "a name, or a mapping"),
    ],
)
def test_what_means_nothing_is_one_line(choice: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        chosen(choice, STANDARD)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_table_of_values_is_a_codec() -> None:
    values = tuple(math.copysign(n * n, n) for n in range(-60, 61))
    squares = Scaled(format=Codebook(name="squares", values=values), block=16)
    x = torch.randn(5, 40)
    back = squares.decode(squares.encode(x))
    top = amax(x, Tile(1, 16)).repeat_interleave(16, 1)[:, :40]
    shares = (x / top * 3600).double()
    near = (shares[..., None] - torch.tensor(values)).abs().amin(-1)
    assert ((back.double() - x.double()).abs() / top * 3600 <= near + 0.01).all()
    assert squares.layout(5, 40)["codes"] == ((5, 40), torch.uint8)
    assert str(squares) == "squares/16"


def test_codecs_that_cannot_be() -> None:
    for make in (
        lambda: Scaled(format=E2M1),
        lambda: Scaled(format=Integer(bits=7)),
        lambda: Scaled(format=Codebook(name="wide", values=(0.0, 1.0), codes=(0, 0x8000))),
        lambda: Scaled(format=E4M3, rounding=Rounding.TRUNCATE),
        lambda: Plain(dtype=torch.float16),
    ):
        with pytest.raises(ValueError, match=re.compile("bits|rounded|scale")):
            make()
    named: Codec = Scaled(format=E4M3, block=None)
    assert str(named) == "e4m3/tensor"
