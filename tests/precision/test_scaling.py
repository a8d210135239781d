"""Scale rules by cases computed by hand, against numpy's FP32 division, and a slow simulation of delayed scaling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from narrowgauge.precision.formats import E2M1, E4M3, E4M3_240, E5M2, E8M0, INT8, NumberFormat
from narrowgauge.precision.scaling import (
    FP32_MAX,
    Current,
    Delayed,
    Fp32,
    Fp32Decode,
    Power,
    PowerOfTwo,
    Reduce,
    ScaleRule,
    Scales,
    Tile,
    TwoLevel,
    Unit,
    encode_power,
)
from torch import Tensor

INF, NAN = math.inf, math.nan
BF16_MAX = torch.finfo(torch.bfloat16).max


def above(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(np.inf)))


def below(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(0)))


def scales(
    rule: ScaleRule, *amaxes: float, element: NumberFormat = E4M3, dtype: torch.dtype = torch.float32, **kwargs: Tensor
) -> Scales:
    made = rule.scales(torch.tensor([amaxes]), element, dtype=dtype, **kwargs)
    assert made.encode.dtype == torch.float32
    assert made.encode.shape == made.stored.shape == (1, len(amaxes))
    return made


def encode(rule: ScaleRule, amax: float, element: NumberFormat = E4M3, dtype: torch.dtype = torch.float32) -> float:
    return scales(rule, amax, element=element, dtype=dtype).encode.item()


def code(mode: Power, amax: float, element: NumberFormat = E4M3) -> int:
    return int(scales(PowerOfTwo(mode=mode), amax, element=element).stored.item())


def random_amax(num: int = 20_000) -> Tensor:
    gen = torch.Generator().manual_seed(0)
    return torch.rand(num, generator=gen) * 2.0 ** torch.randint(-100, 100, (num,), generator=gen)


@pytest.mark.parametrize("element", [E4M3, E4M3_240, E5M2, E2M1, INT8], ids=str)
@pytest.mark.parametrize("margin", [0, 3])
def test_fp32_divides_once(element: NumberFormat, margin: int) -> None:
    amax = random_amax()
    made = Fp32(margin=margin).scales(amax, element, dtype=torch.float32)
    want = np.float32(element.max * 2.0**-margin) / amax.numpy()
    assert want.dtype == np.float32
    assert np.array_equal(made.encode.numpy(), want)
    assert np.array_equal(made.stored.numpy(), np.float32(1) / want)


def test_fp32_edges() -> None:
    assert encode(Fp32(), 448.0) == 1.0
    assert encode(Fp32(), 0.0) == encode(Fp32(), INF) == encode(Fp32(), NAN) == 1.0
    assert encode(Fp32(), 1e-40) == FP32_MAX
    assert encode(Fp32(input_max=True), 1e-40, dtype=torch.bfloat16) == BF16_MAX
    assert encode(Fp32(input_max=True), 1e-40, dtype=torch.float16) == 65504.0
    assert encode(Fp32(input_max=True), 1e-40, dtype=torch.float64) == FP32_MAX
    assert encode(Fp32(pow2=True), 1e-40) == 2.0**127
    assert encode(Fp32(eps=1.0), 0.0) == encode(Fp32(eps=1.0), 0.5) == 448.0
    assert encode(Fp32(margin=1), 448.0) == 0.5
    assert encode(Fp32(margin=64), 3e38) == 2.0**-126
    # Down to a power of two: 448 / 3 = 149.3 -> 128.
    assert encode(Fp32(pow2=True), 3.0) == 128.0
    assert encode(Fp32(pow2=True), 3.5) == 128.0
    assert encode(Fp32(pow2=True), above(3.5)) == 64.0
    assert scales(Fp32(), 448.0 * 3).stored.item() == 1 / np.float32(np.float32(1) / 3)
    assert scales(Fp32(), NAN).stored.item() == 1.0
    assert scales(Fp32(), NAN, element=INT8).stored.isnan().item()


def test_fp32_decode_is_deepgemm() -> None:
    amax = random_amax()
    made = Fp32Decode().scales(amax, E4M3, dtype=torch.float32)
    want = np.maximum(amax.numpy(), np.float32(1e-4)) / np.float32(448)
    assert np.array_equal(made.stored.numpy(), want)
    assert np.array_equal(made.encode.numpy(), np.float32(1) / want)
    assert scales(Fp32Decode(), 0.0).stored.item() == np.float32(1e-4) / np.float32(448)
    ceil = Fp32Decode(ceil_pow2=True)
    assert scales(ceil, 448.0, above(448.0), below(448.0), 3 * 448.0).stored.tolist() == [[1.0, 2.0, 1.0, 4.0]]
    for k in (-10, 30, 100):  # just above a power of two, where ceil(log2) in FP32 fails
        assert scales(ceil, above(448.0 * 2.0**k)).stored.item() == 2.0 ** (k + 1)
    for rule in (Fp32Decode(), ceil):
        assert scales(rule, INF, NAN).stored.isnan().all()


@pytest.mark.parametrize(
    ("amax", "floor", "ceil", "even", "rceil", "rfloor", "rnearest"),
    [
        # FLOOR: exponent - 8. CEIL rounds amax up. EVEN rounds up from 1.9375. By amax / 448: RCEIL up from above 1.75,
        # RFLOOR down, RNEAREST up from above 448 * 2^(k - 1/2).
        (256.0, 127, 127, 127, 127, 126, 126),
        (448.0, 127, 128, 127, 127, 127, 127),
        (above(448.0), 127, 128, 127, 128, 127, 127),
        (below(496.0), 127, 128, 127, 128, 127, 127),
        (496.0, 127, 128, 128, 128, 127, 127),
        (above(256.0), 127, 128, 127, 127, 126, 126),
        (316.7, 127, 128, 127, 127, 126, 126),
        (316.9, 127, 128, 127, 127, 126, 127),
        (633.5, 128, 129, 128, 128, 127, 127),
        (633.7, 128, 129, 128, 128, 127, 128),
        (1.0, 119, 119, 119, 119, 118, 118),
        (0.0, 0, 0, 0, 0, 0, 0),
        (2.0**-119, 0, 0, 0, 0, 0, 0),
        (2.0**-118, 1, 1, 1, 1, 0, 0),
        (2.0**-149, 0, 0, 0, 0, 0, 0),
        (FP32_MAX, 246, 247, 247, 247, 246, 246),
        (INF, 247, 247, 247, 254, 254, 254),
        (NAN, 255, 255, 255, 255, 255, 255),
    ],
)
def test_power_of_two_codes(
    amax: float, floor: int, ceil: int, even: int, rceil: int, rfloor: int, rnearest: int
) -> None:
    assert [code(mode, amax) for mode in Power] == [floor, ceil, even, rceil, rfloor, rnearest]


def test_rceil_among_subnormals() -> None:
    # E2M1: v = amax / 6; v = 2^-127 is the smallest scale, code 0; anything above goes to 2^-126, code 1.
    assert code(Power.RCEIL, 6 * 2.0**-127, E2M1) == 0
    assert code(Power.RCEIL, 6 * 2.0**-127 * (1 + 2.0**-20), E2M1) == 1
    assert code(Power.RCEIL, 6 * 2.0**-126, E2M1) == 1
    # A format with max below 1 does not exist; v of 2^127 and above needs amax > 448 * 2^127: only infinity.
    assert code(Power.RCEIL, FP32_MAX, E2M1) == 127 + 126


@pytest.mark.parametrize("mode", Power)
def test_power_of_two_multiplier_is_exact(mode: Power) -> None:
    made = PowerOfTwo(mode=mode).scales(random_amax(), E5M2, dtype=torch.float32)
    assert made.stored.dtype == torch.uint8
    assert torch.equal(made.encode.double() * E8M0.decode(made.stored).double(), torch.ones(20_000).double())


def test_encode_power() -> None:
    every = torch.arange(255, dtype=torch.int32)
    want = [2.0 ** (127 - c) for c in range(255)]
    assert encode_power(every).tolist() == want
    assert encode_power(torch.tensor(255)).isnan()
    assert encode_power(torch.tensor([254], dtype=torch.uint8)).item() == 2.0**-127


@pytest.mark.parametrize("mode", Power)
def test_power_rules_bound_the_largest_value(mode: Power) -> None:
    """What the modes promise: CEIL and RCEIL never saturate; the others may, by less than a factor 2."""
    amax = random_amax()
    top = amax * PowerOfTwo(mode=mode).scales(amax, E4M3, dtype=torch.float32).encode
    limit = {
        Power.FLOOR: 512.0,
        Power.CEIL: 256.0,
        Power.EVEN: 496.0,
        Power.RCEIL: 448.0,
        Power.RFLOOR: 896.0,
        Power.RNEAREST: 448.0 * 2**0.5,
    }[mode]
    assert top.max() <= limit
    assert top.min() > limit / 2.1


def two_level(tensor: float, *amaxes: float, rule: TwoLevel | None = None) -> Scales:
    return scales(rule or TwoLevel(), *amaxes, element=E2M1, tensor_amax=torch.tensor(tensor))


def test_two_level() -> None:
    made = two_level(2688.0, 2688.0, 6.0, 0.0, 0.001, 6.0 * 2**-9, 6.0 * 2**-10)
    # Global scale 1, so a tile's scale is E4M3(amax / 6): no lower clamp, ties to even at half the smallest.
    assert E4M3.decode(made.stored).tolist() == [[448.0, 1.0, 0.0, 0.0, 2.0**-9, 0.0]]
    assert made.encode.tolist() == [[np.float32(1) / np.float32(448), 1.0, FP32_MAX, FP32_MAX, 512.0, FP32_MAX]]
    assert made.tensor is not None
    assert made.tensor.item() == 1.0
    assert made.tensor.shape == ()
    # The largest tile of a tensor gets the largest scale, whatever the tensor's range.
    for amax in (1e-30, 1e-3, 7.0, 3e38):
        assert two_level(amax, amax).stored.item() == 0x7E
        assert two_level(amax, amax, rule=TwoLevel(block_max=256.0)).stored.item() == E4M3.encode(torch.tensor(256.0))


def test_two_level_edges() -> None:
    zero = two_level(0.0, 0.0)
    assert (zero.stored.item(), zero.tensor) == (0, torch.tensor(1.0))
    infinite = two_level(INF, INF, 6.0)
    assert E4M3.decode(infinite.stored).tolist() == [[448.0, 1.0]]
    assert infinite.tensor == 1.0
    tiny = two_level(1e-37, 1e-37)  # 2688 / amax overflows: the tile's scale makes up for it
    assert tiny.tensor is not None
    assert tiny.tensor.item() == pytest.approx(1 / FP32_MAX, rel=1e-6)
    assert (E4M3.decode(tiny.stored).double() * tiny.tensor.double() * 6).item() == pytest.approx(1e-37, rel=0.07)
    stale = two_level(1.0, 100.0)  # an amax from earlier steps may be too small: the tile's scale saturates
    assert stale.stored.item() == 0x7E
    nan = two_level(NAN, NAN, 1.0)
    assert E4M3.decode(nan.stored).isnan().all()
    assert nan.tensor is not None
    assert nan.tensor.isnan()
    assert E4M3.decode(two_level(2688.0, NAN, 6.0).stored).isnan().tolist() == [[True, False]]


def reference_update(
    history: list[list[float]], scale: list[float], recent: bool, margin: int
) -> tuple[list[list[float]], list[float]]:
    """TransformerEngine's update of encode scales, tensor by tensor, in numpy scalars."""
    length = len(history)
    for n in range(len(scale)):
        column = [row[n] for row in history]
        if column[0] == 0:
            continue
        a = column[0] if recent else float(np.max(column))
        if math.isfinite(a) and a > 0:
            with np.errstate(over="ignore"):
                new = np.float32(448.0 * 2.0**-margin) / np.float32(a)
            scale[n] = float(new) if np.isfinite(new) else FP32_MAX
        for i in range(length):
            history[i][n] = column[i + 1] if i + 1 < length else column[0]
        history[0][n] = 0.0
    return history, scale


@pytest.mark.parametrize("length", [1, 2, 3, 31])
@pytest.mark.parametrize("reduce", Reduce)
@pytest.mark.parametrize("margin", [0, 2])
def test_delayed_matches_a_simulation(length: int, reduce: Reduce, margin: int) -> None:
    source, rule = Delayed(history=length, reduce=reduce), Fp32(margin=margin)
    history, held = source.start(4)
    assert history.shape == (length, 4)
    want_history, want_scale = history.tolist(), [1.0] * 4
    gen = torch.Generator().manual_seed(length)
    odd = [0.0, 1e-40, 1e-45, INF, NAN, 3e38]
    for step in range(80):
        amax = torch.randn(4, generator=gen).abs() * 10
        if step % 3 == 0:
            amax[step % 4] = odd[step // 3 % len(odd)]
        for _ in range(2):  # idempotent: recomputation stages the same amaxes again
            history = torch.cat((torch.maximum(history[:1], amax), history[1:]))
        want_history[0] = amax.tolist()
        before = history.clone()
        new_history, held = source.update(history, held)
        assert torch.equal(history.nan_to_num(), before.nan_to_num()), "pure"
        history = new_history
        want_history, want_scale = reference_update(want_history, want_scale, reduce is Reduce.MOST_RECENT, margin)
        np.testing.assert_array_equal(history.numpy(), np.array(want_history, np.float32))
        np.testing.assert_array_equal(rule.scales(held, E4M3, dtype=torch.float32).encode.numpy(), want_scale)


def test_delayed_by_hand() -> None:
    source = Delayed(history=3)
    history, held = source.start(1)
    seen = []
    for amax in (4.0, 2.0, 1.0, 1.0, 0.0, INF, 1.0, 1.0):
        history[0] = amax
        history, held = source.update(history, held)
        seen.append(held.item())
    # Slot 0 counts, so an amax stays for 3 updates; 0: nothing moves; an infinity holds the amax while it stays.
    assert seen == [4.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    history[0] = 1.0
    assert source.update(history, held)[1].item() == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fp32(margin=-1),
        lambda: Fp32(eps=-1.0),
        lambda: Fp32(eps=NAN),
        lambda: Fp32Decode(floor=0.0),
        lambda: TwoLevel(block=E2M1),
        lambda: TwoLevel(block=E8M0),
        lambda: TwoLevel(block_max=500.0),
        lambda: Delayed(history=0),
    ],
)
def test_rules_that_cannot_be(make: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        make()  # type: ignore[operator]


def test_names() -> None:
    rules = [Unit(), Fp32(), Fp32(pow2=True, input_max=True), Fp32Decode(), PowerOfTwo(), TwoLevel(block_max=256.0)]
    assert [str(rule) for rule in rules] == [
        "unscaled",
        "fp32",
        "fp32-pow2-inputmax",
        "fp32-decode-floor0.0001",
        "e8m0-rceil",
        "e4m3max256+fp32",
    ]
    sources = [Current(), Delayed(), Delayed(history=16), Delayed(reduce=Reduce.MOST_RECENT)]
    assert [str(source) for source in sources] == ["current", "delayed", "delayed16", "delayed-recent"]
    assert [str(Tile(*t)) for t in [(-1, -1), (1, -1), (-1, 1), (1, 16), (128, 128), (-1, 8)]] == [
        "tensor",
        "row",
        "column",
        "1x16",
        "128x128",
        "*x8",
    ]
    assert Tile(1, 16).grid(3, 33) == (3, 3)
    assert Tile(-1, 16).grid(0, 0) == (1, 0)
