"""NVFP4 with two candidates a tile, and with a scale per row, against scalar transcriptions in numpy."""

from __future__ import annotations

import itertools
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from narrowgauge.precision.apply import apply
from narrowgauge.precision.backends import QUANTIZERS, Cast, choose, quantize_by
from narrowgauge.precision.formats import E2M1, E4M3, unpack4
from narrowgauge.precision.linear import QuantLinear
from narrowgauge.precision.loading import load
from narrowgauge.precision.noise import Noise, base_key, step_key
from narrowgauge.precision.quantize import Quantized, dequantize, operand, quantize
from narrowgauge.precision.scaling import ROW, TENSOR, Delayed, Error, Form, FourOverSix, Tile, TwoLevel, outer_of
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding
from narrowgauge.precision.transforms import Hadamard
from torch import Tensor

F = np.float32
FLT_MAX = np.finfo(np.float32).max
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TE_ERRORS = (Error.MAE, Error.MSE)
RULES = [
    FourOverSix(error=error, block_max=top, outer=outer)
    for error, top, outer in itertools.product(TE_ERRORS, (None, 256.0), (TENSOR, ROW))
]
OTHERS = [FourOverSix(error=Error.MSE, form=form) for form in (Form.AUTHORS, Form.QUARTET2)]
TALL = [FourOverSix(error=error) for error in TE_ERRORS]


def spec_of(rule: FourOverSix | TwoLevel, outer: int = 1) -> OperandSpec:
    return OperandSpec(format=E2M1, tile=Tile(outer, 16), scale=rule)


def sample(dtype: torch.dtype, outer: int = 20, inner: int = 48, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(outer, inner, generator=gen) * 2.0 ** torch.randint(-4, 4, (outer, 1), generator=gen)
    x[1], x[2, :16] = 0.0, -0.0
    x[3] *= 1e-4
    x[4, 16:32] = torch.linspace(-6, 6, 16)
    return x.to(dtype)


def candidate(tile: np.ndarray, amax: F, top_amax: F, top: F, widen: F) -> tuple[np.ndarray, F, list[F]]:
    """Codes as values, the block's scale, and back-and-forth differences of one tile, one float32 operation a line."""
    s = F(1) if top_amax == 0 else min(F(top / top_amax), FLT_MAX)
    d = F(min(F(F(F(amax / F(6)) * s) * widen), F(448)).astype(ml_dtypes.float8_e4m3fn))
    with np.errstate(divide="ignore"):
        encode = min(F(F(1) / F(d * F(F(1) / s))), FLT_MAX)
    q = np.clip((tile * encode).astype(F), F(-6), F(6)).astype(ml_dtypes.float4_e2m1fn).astype(F)
    differences = [F(F(F(F(v * d) * top_amax) / top) - x) for v, x in zip(q.flat, tile.flat, strict=True)]
    return q, d, differences


def error_of(differences: list[F], kind: Error, tall: int) -> F:
    rows = []
    for row in range(tall):
        total = F(0)
        for difference in differences[row * 16 : row * 16 + 16]:
            total = F(total + (abs(difference) if kind is Error.MAE else F(difference * difference)))
        rows.append(total)
    while len(rows) > 1:
        rows = [F(a + b) for a, b in zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True)]
    return rows[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rule", "tall"), [*((rule, 1) for rule in RULES), *((rule, 16) for rule in TALL)], ids=str)
def test_every_tile_takes_the_better_of_both(rule: FourOverSix, tall: int, dtype: torch.dtype) -> None:
    x = sample(dtype, 32 if tall == 16 else 20)
    if tall == 16:  # at 6 most of this tile lies in the middle between 4 and 6
        x[16:, :16] = x[16:, :16].sign() * 0.8 * x.abs().max()
        x[20, 3] = x.abs().max()
    q = quantize(x, spec_of(rule, tall))
    values, wide = E2M1.decode(unpack4(q.codes, 48)), x.float().numpy()
    scales = E4M3.decode(q.scales).numpy()
    taken = set()
    for i, j in np.ndindex(*q.scales.shape):
        rows, columns = slice(i * tall, (i + 1) * tall), slice(16 * j, 16 * j + 16)
        tile = wide[rows, columns]
        top_amax = F(np.abs(wide[rows] if rule.outer == ROW else wide).max())
        top = F(6 * (rule.block_max or 448))
        six, four = (candidate(tile, F(np.abs(tile).max()), top_amax, top, F(w)) for w in (1, 1.5))
        errors = [error_of(c[2], rule.error, tall) for c in (six, four)]
        best = four if errors[1] < errors[0] else six
        taken.add(best is four)
        assert np.array_equal(values[rows, columns].numpy(), best[0])
        assert scales[i, j] == best[1]
    assert taken == {False, True}
    back = dequantize(q)
    assert torch.allclose(back, x.float(), atol=float(x.float().abs().max()) / 3)
    plain = dequantize(quantize(x, spec_of(TwoLevel(block_max=rule.block_max, outer=rule.outer), tall)))
    measure = (lambda e: e.abs().sum()) if rule.error is Error.MAE else (lambda e: e.square().sum())
    assert measure(back - x.float()) < measure(plain - x.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_with_a_scale_of_its_own_is_a_tensor_of_one_row(dtype: torch.dtype) -> None:
    x = sample(dtype, inner=50)
    by_row, whole = spec_of(TwoLevel(outer=ROW)), spec_of(TwoLevel())
    q = quantize(x, by_row)
    assert q.tensor_scale is not None
    assert q.tensor_scale.shape == (20, 1)
    for row in range(len(x)):
        own = quantize(x[row : row + 1], whole)
        assert torch.equal(q.codes[row], own.codes[0])
        assert torch.equal(q.scales[row], own.scales[0])
        assert torch.equal(q.tensor_scale[row, 0], own.tensor_scale)
        assert torch.equal(dequantize(q)[row], dequantize(own)[0])
    matrix, factor = operand(q)
    assert factor is None
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, dequantize(q))
    assert torch.equal(quantize(x, by_row, amax=x.float().abs().amax(1)).codes, q.codes)
    with pytest.raises(ValueError, match="takes 20 amaxes, not 1"):
        quantize(x, by_row, amax=torch.ones(1))


@pytest.mark.parametrize("rule", [RULES[0], RULES[-1], *OTHERS, TwoLevel(outer=ROW)], ids=str)
def test_backends_agree_bit_for_bit(rule: FourOverSix | TwoLevel) -> None:
    for tall, dtype in itertools.product((1,) if rule.outer == ROW else (1, 16), DTYPES):
        spec = spec_of(rule, tall)
        for number, shape in enumerate([(20, 48), (33, 50), (1, 1), (0, 7), (7, 0)]):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(number)).exp()
            cases = [x, x.mT.contiguous().mT, x * 1e-38, x * 0, torch.cat((x, x * torch.nan)), torch.cat((x, x / 0))]
            for case in (case.to(dtype) for case in cases):
                theirs = quantize(case, spec)
                for quantizer in QUANTIZERS:
                    if quantizer.why_not(GemmSpec(a=spec), torch.device("cpu")) is not None:
                        continue
                    ours = quantize_by(quantizer, case, spec)
                    assert torch.equal(ours.codes, theirs.codes)
                    assert torch.equal(ours.scales, theirs.scales)
                    assert torch.equal(ours.tensor_scale.nan_to_num(7), theirs.tensor_scale.nan_to_num(7))
                    pair = quantizer.operand(ours)[0], operand(theirs)[0]
                    assert torch.equal(*(matrix.nan_to_num(7) for matrix in pair))


def test_what_does_not_go_together() -> None:
    chosen = FourOverSix()
    for wrong, message in (
        ({"rounding": Rounding.TRUNCATE}, "to truncate is not for it"),
        ({"tile": Tile(1, 32)}, "in tiles of 1x16 or 16x16"),
        ({"format": E4M3}, "is for e2m1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(spec_of(chosen), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="its tiles are parts of a row, not 16x16"):
        spec_of(TwoLevel(outer=ROW), 16)
    with pytest.raises(ValueError, match="one amax per tensor"):
        replace(spec_of(TwoLevel(outer=ROW)), amax=Delayed())
    with pytest.raises(ValueError, match="four_over_six=some: one of none, weights"):
        load("nvfp4", {"four_over_six": "some"})
    with pytest.raises(ValueError, match=r"four_over_six=gradient: .*did you mean 'gradients'"):
        load("nvfp4", {"four_over_six": "gradient"})
    with pytest.raises(ValueError, match="row_scaled_activations=wgrad: one of fprop"):
        load("nvfp4", {"row_scaled_activations": "wgrad"})


def spec_for(**args: object) -> LinearSpec:
    (rule,) = load("nvfp4", {"keep_last": 0, "bf16_forward": 0, **args}).rules
    linear = rule.make(torch.nn.Linear(64, 48, bias=False), "layers.0.up")
    assert isinstance(linear, QuantLinear)
    return linear.spec


def compares(operand: OperandSpec | None) -> bool:
    assert operand is not None
    return isinstance(operand.scale, FourOverSix)


@pytest.mark.parametrize(
    ("scope", "tensors"),
    [
        ("none", ""),
        ("weights", "w"),
        ("activations", "x"),
        ("gradients", "dy"),
        ("all", "w x"),
        ("everything", "w x dy"),
    ],
)
@pytest.mark.parametrize("trained", [False, True], ids=["as_te", "as_the_authors"])
def test_each_tensor_is_compared_where_it_is_named(scope: str, tensors: str, trained: bool) -> None:
    """Never a gradient in TransformerEngine's forms; all that is quantized of a tensor, or none of it."""
    switches = {} if trained else {"hadamard": 0, "stochastic": False}
    spec, wanted = spec_for(four_over_six=scope, **switches), tensors.split()
    assert [compares(spec.fprop.a), compares(spec.wgrad.b)] == ["x" in wanted] * 2
    assert [compares(spec.fprop.b), compares(spec.dgrad.b)] == ["w" in wanted] * 2
    assert [compares(spec.dgrad.a), compares(spec.wgrad.a)] == ["dy" in wanted] * 2
    assert spec.dgrad.a is not None
    assert spec.dgrad.a.rounding is (Rounding.STOCHASTIC if trained else Rounding.NEAREST)


@pytest.mark.parametrize(
    ("given", "rows"), [(False, (0, 0)), (True, (1, 1)), ("fprop", (1, 0))], ids=["not", "as_te", "fprop"]
)
def test_rows_of_x_are_scaled_in_both_of_its_products(given: bool | str, rows: tuple[int, int]) -> None:
    """A channel's gradient of the weight does not depend on other channels, as a token's output on other tokens."""
    spec = spec_for(row_scaled_activations=given)
    operands = [spec.fprop.a, spec.wgrad.b, spec.dgrad.a, spec.wgrad.a, spec.fprop.b, spec.dgrad.b]
    scales = [each.scale for each in operands if each is not None]
    assert [outer_of(scale) == ROW for scale in scales] == [*map(bool, rows), *[False] * 4]
    args = {"row_scaled_activations": given, "stochastic": False, "keep_last": 0, "bf16_forward": 0}
    results = []
    for outlier in (False, True):
        generator = torch.Generator().manual_seed(0)
        model = torch.nn.ModuleDict(
            {"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"up": torch.nn.Linear(64, 48)})])}
        )
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        apply(load("nvfp4", args), model.bfloat16())
        linear = model.get_submodule("layers.0.up")
        x, dy = (torch.randn(32, size, generator=generator).bfloat16() for size in (64, 48))
        if outlier:
            x[5, 7] = 1e6
        y = linear(x)
        y.backward(dy)
        results.append((y.detach()[:5], linear.weight.grad[:, :7]))  # other tokens; other channels
    same = [torch.equal(*pair) for pair in zip(*results, strict=True)]
    assert same == [bool(wanted) for wanted in rows]


@pytest.mark.parametrize("error", TE_ERRORS, ids=str)
def test_with_stochastic_rounding_the_codes_that_are_kept_are_those_compared(error: Error) -> None:
    rule = FourOverSix(error=error)
    spec = replace(spec_of(rule), rounding=Rounding.STOCHASTIC)
    x = sample(torch.float32, 32)
    noise = Noise(key=step_key(base_key(1, "layers.0", 2), 0))
    q = quantize(x, spec, noise=noise)
    amax = x.abs().reshape(32, 3, 16).amax(-1)
    errors = []
    for scales in (
        rule.scales(amax, E2M1, tensor_amax=x.abs().max(), dtype=x.dtype),
        rule.at_four(amax, E2M1, x.abs().max()),
    ):
        y = E2M1.round(x * scales.encode.repeat_interleave(16, 1), noise.uniform(32, 48))
        back = y * E4M3.decode(scales.stored).repeat_interleave(16, 1) * x.abs().max() / (6 * 256)
        e = (back - x).reshape(32, 3, 16)
        errors.append(e.abs().sum(-1) if error is Error.MAE else e.square().sum(-1))
    got = (dequantize(q) - x).reshape(32, 3, 16)
    ours = got.abs().sum(-1) if error is Error.MAE else got.square().sum(-1)
    torch.testing.assert_close(ours, torch.minimum(*errors))
    assert 0.1 < float((errors[1] < errors[0]).float().mean()) < 0.9


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("rule", [RULES[0], RULES[1], TwoLevel(outer=ROW)], ids=str)
def test_backends_agree_on_what_a_transform_makes(rule: FourOverSix | TwoLevel, rounding: Rounding) -> None:
    spec = replace(spec_of(rule), rounding=rounding)
    noise = Noise(key=step_key(base_key(1, "layers.0", 2), 0)) if rounding is Rounding.STOCHASTIC else None
    for dtype, shape in itertools.product(DTYPES[:2], [(64, 48), (48, 40), (16, 16)]):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).exp().to(dtype)
        for seen in (x, x.mT):
            direct = quantize(Hadamard().left(seen), spec, noise=noise)
            for quantizer in QUANTIZERS:
                if quantizer.why_not(GemmSpec(a=spec), torch.device("cpu")) is None:
                    made = quantizer.cast(seen, Cast(spec=spec, noise=noise, transform=Hadamard()))
                    assert isinstance(made, Quantized)
                    assert torch.equal(made.codes, direct.codes), (quantizer.name, dtype, shape)
                    assert torch.equal(made.scales, direct.scales)


def test_the_plan_says_what_is_switched_on() -> None:
    args = {"four_over_six": "all", "row_scaled_activations": True, "hadamard": 0, "stochastic": False, "keep_last": 0}
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"up": torch.nn.Linear(32, 32)})])})
    (rule,) = load("nvfp4", args).rules
    spec = rule.make(model["layers"][0]["up"], "layers.0.up").spec  # type: ignore[index, union-attr]
    assert str(spec.fprop) == "e2m1/1x16/e4m3max256+fp32row-4over6mae x e2m1/16x16/e4m3max256+fp32-4over6mae"
    assert str(spec.wgrad) == "e2m1/1x16/e4m3+fp32 x e2m1/1x16/e4m3max256+fp32row-4over6mae"
    assert "fp32 product" in choose(spec.fprop, (32, 32, 32), torch.device("cpu")).backend.note(spec.fprop)
    weights = load("nvfp4", {"four_over_six": "weights", "four_over_six_256": False, "four_over_six_error": "mse"})
    spec = weights.rules[0].make(model["layers"][0]["up"], "layers.0.up").spec  # type: ignore[index, union-attr]
    assert str(spec.dgrad) == "e2m1/1x16/e4m3+fp32/sr x e2m1/16x16/e4m3+fp32-4over6mse"


def e2m1(y: np.ndarray) -> np.ndarray:
    return np.clip(y, F(-6), F(6)).astype(ml_dtypes.float4_e2m1fn).astype(F)


def e4m3(value: F) -> F:
    return F(min(value, F(448)).astype(ml_dtypes.float8_e4m3fn))


def quartet2(tile: np.ndarray, largest: F) -> list[tuple[np.ndarray, F, list[F]]]:
    """Both candidates: values of codes, scale, differences; one float32 operation each. Divisions throughout."""
    s = F(1) if largest == 0 else F(F(largest / F(256)) / F(6))
    e = e4m3(F(F(np.abs(tile).max() / F(6)) / s)) or F(1)
    both = []
    for scale in (e, e4m3(F(e * F(1.5)))):
        q = e2m1((tile / F(scale * s)).astype(F))
        both.append((q, scale, [F(F(F(v * scale) * s) - x) for v, x in zip(q.flat, tile.flat, strict=True)]))
    return both


def authors(tile: np.ndarray, largest: F) -> list[tuple[np.ndarray, F, list[F]]]:
    """As TransformerEngine's, but for tiles whose scale is 0: all codes are."""
    six, four = (candidate(tile, F(np.abs(tile).max()), largest, F(6 * 256), F(widen)) for widen in (1, 1.5))
    return [(q * F(scale != 0), scale, differences) for q, scale, differences in (six, four)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("form", "error"), [(Form.QUARTET2, Error.MSE), (Form.AUTHORS, Error.MSE), (Form.AUTHORS, Error.ABSMAX)]
)
def test_the_other_published_forms(form: Form, error: Error, dtype: torch.dtype) -> None:
    x = sample(dtype)
    x[6, :16] = 1e-12 if dtype != torch.float16 else 6e-8
    q = quantize(x, spec_of(FourOverSix(form=form, error=error)))
    values, scales = E2M1.decode(unpack4(q.codes, 48)).numpy(), E4M3.decode(q.scales).numpy()
    wide, taken = x.float().numpy(), set()
    largest = F(np.abs(wide).max())
    for i, j in np.ndindex(20, 3):
        tile = wide[i : i + 1, 16 * j : 16 * j + 16]
        six, four = (quartet2 if form is Form.QUARTET2 else authors)(tile, largest)
        sizes = [max(map(abs, c[2])) if error is Error.ABSMAX else error_of(c[2], error, 1) for c in (six, four)]
        best = four if sizes[1] < sizes[0] else six
        taken.add(best is four)
        assert np.array_equal(values[i, 16 * j : 16 * j + 16], best[0][0])
        assert scales[i, j] == best[1]
    assert taken == {False, True}
    assert scales[1, 0] == (1 if form is Form.QUARTET2 else 0)  # a tile of zeros
    assert scales[6, 0] == (1 if form is Form.QUARTET2 else 0)  # one that underflows
    assert not values[6, :16].any()


def test_the_authors_draw_anew_for_the_second_candidate() -> None:
    """Independent noise: the better of both is chosen among more, so the error is smaller, and the bias larger."""
    x = sample(torch.float32, 64)
    errors = {}
    for form in (Form.TE, Form.AUTHORS):
        spec = replace(spec_of(FourOverSix(form=form, error=Error.MSE)), rounding=Rounding.STOCHASTIC)
        draws = [quantize(x, spec, noise=Noise(key=step_key(base_key(1, "m", 2), step))) for step in range(8)]
        assert torch.equal(draws[0].codes, quantize(x, spec, noise=Noise(key=step_key(base_key(1, "m", 2), 0))).codes)
        errors[form] = sum(float((dequantize(q) - x).square().sum()) for q in draws)
    assert 0.8 * errors[Form.TE] < errors[Form.AUTHORS] < errors[Form.TE]


def test_forms_of_the_recipe() -> None:
    spec = spec_for(four_over_six="all", four_over_six_form="quartet2", four_over_six_error="mse")
    assert str(spec.fprop.a) == "e2m1/1x16/e4m3max256+fp32-4over6mse-quartet2"
    assert str(spec_for(four_over_six="everything", four_over_six_form="authors").dgrad.a) == (
        "e2m1/1x16/e4m3max256+fp32-4over6mae-authors/sr"
    )
    for args, message in (
        ({"four_over_six_form": "quartet2"}, "as Quartet II has it compares mse, not mae"),
        ({"four_over_six_error": "absmax"}, "absmax is form=authors"),
        ({"four_over_six_form": "quartet"}, "four_over_six_form=quartet: .*did you mean 'quartet2'"),
    ):
        with pytest.raises(ValueError, match=message):
            load("nvfp4", {"four_over_six": "all", **args})
