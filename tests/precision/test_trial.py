"""Rules that decide after the codes, as recipes may write them: MS-EDEN and IF4 against FP64 models."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from narrowgauge.precision.apply import apply
from narrowgauge.precision.backends import Cast, choose
from narrowgauge.precision.backends.cpu.quantizer import Cpu
from narrowgauge.precision.formats import E2M1, E4M3, INT4, NumberFormat, pack4, unpack4
from narrowgauge.precision.linear import QuantLinear, quantized
from narrowgauge.precision.noise import Noise, base_key, step_key
from narrowgauge.precision.probe import of_operand
from narrowgauge.precision.quantize import Prepared, Quantized, dequantize, operand, prepare, quantize
from narrowgauge.precision.recipe import Recipe, Rule
from narrowgauge.precision.scaling import Error, Form, FourOverSix, Scales, Std, Tile, Trial, TwoLevel, scaled
from narrowgauge.precision.slots import is_stochastic
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding
from torch import Tensor, nn

BLOCK = Tile(1, 16)
NVFP4 = OperandSpec(format=E2M1, tile=BLOCK, scale=TwoLevel())


@dataclass(frozen=True, slots=True, kw_only=True)
class MsEden:
    """Quartet II's scales (arXiv 2601.22813): nearest codes, then the scale by which they are longest along y, rounded
    stochastically, so that the operand is right on average over rotations."""

    format: ClassVar[NumberFormat] = E4M3
    levels: ClassVar[int] = 2
    power_of_two: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True

    over: int = 16
    block_max: float = 255.99

    def scales(
        self, amax: Tensor, element: NumberFormat, *, tensor_amax: Tensor, dtype: torch.dtype, top: float = 1.0
    ) -> Scales:
        v = torch.full_like(amax, element.max * top)
        tensor = torch.where(tensor_amax == 0, 1.0, (tensor_amax / self.block_max) / v.flatten()[0])
        e = E4M3.round(amax / v / tensor)
        e = torch.where(e == 0, 1.0, e)
        return Scales(1 / (e * tensor), E4M3.encode(e), tensor)

    def finish(self, trial: Trial) -> tuple[Scales, Tensor | None]:
        first = trial.scales
        e = E4M3.decode(first.stored)
        y = trial.x / trial.scaled(torch.ones_like(trial.x), e * first.tensor)
        codes = trial.codes_of(y)
        q = trial.values(codes)
        long, along = (self._pooled(trial.sums(y * other)) for other in (y, q))
        wanted = e * torch.where(along == 0, 1.0, long / along)
        return first._replace(stored=E4M3.encode(E4M3.round(wanted, trial.uniform()))), codes

    def _pooled(self, sums: Tensor) -> Tensor:
        number = self.over // 16
        pooled = torch.nn.functional.pad(sums, (0, -sums.shape[1] % number)).unflatten(1, (-1, number)).sum(-1)
        return pooled.repeat_interleave(number, 1)[:, : sums.shape[1]]

    def __str__(self) -> str:
        return f"mseden{self.over}"


@dataclass(frozen=True, slots=True, kw_only=True)
class If4:
    """IF4 (arXiv 2603.28765): a tile in E2M1 or in INT4 times 6/7, marked in the sign bit of its scale."""

    format: ClassVar[NumberFormat] = E4M3
    levels: ClassVar[int] = 2
    power_of_two: ClassVar[bool] = False

    two_level: TwoLevel = field(default_factory=TwoLevel)

    def scales(self, amax: Tensor, element: NumberFormat, *, tensor_amax: Tensor, dtype: torch.dtype) -> Scales:
        return self.two_level.scales(amax, element, tensor_amax=tensor_amax, dtype=dtype)

    def finish(self, trial: Trial) -> tuple[Scales, Tensor | None]:
        y = trial.scaled(trial.x, trial.scales.encode)
        floats = trial.codes()
        integers = INT4.round(y * 7 / 6)
        errors = [trial.sums((values - y).square()) for values in (trial.values(floats), integers * 6 / 7)]
        marked = errors[1] < errors[0]
        stored = trial.scales.stored | (marked.to(torch.uint8) << 7)
        return trial.scales._replace(stored=stored), trial.chosen(marked, pack4(INT4.encode(integers)), floats)

    def read(self, codes: Tensor, stored: Tensor, element: NumberFormat, tile: Tile) -> Tensor:
        marked = scaled(torch.ones(codes.shape), (stored >> 7).float(), tile) > 0
        values = torch.where(marked, INT4.decode(codes) * 6 / 7, element.decode(codes))
        return scaled(values, E4M3.decode(stored & 0x7F), tile)

    def __str__(self) -> str:
        return "if4"


EDEN = OperandSpec(format=E2M1, tile=BLOCK, scale=MsEden(), top=1 / (17 / 16 * 0.93))
IF4 = OperandSpec(format=E2M1, tile=BLOCK, scale=If4())


TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)


def noise(**kwargs: object) -> Noise:
    return Noise(key=step_key(base_key(1, "layers.0", 2), 0), **kwargs)  # type: ignore[arg-type]


def normal(outer: int, inner: int, seed: int = 0) -> Tensor:
    return torch.randn(outer, inner, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("over", [16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ms_eden_against_fp64(over: int, dtype: torch.dtype) -> None:
    spec = replace(EDEN, scale=MsEden(over=over))
    x = (normal(24, 250) * 2.0 ** torch.linspace(-6, 6, 24)[:, None]).to(dtype)
    x[3], x[4, :32] = 0, 0
    q = quantize(x, spec, noise=noise())
    assert q.tensor_scale is not None
    v, wide = 6 / (17 / 16 * 0.93), x.float().double()
    tensor = float(wide.abs().max()) / 255.99 / v
    assert float(q.tensor_scale) == pytest.approx(tensor, rel=1e-6)
    values = E2M1.decode(unpack4(q.codes, 250)).double()
    uniform = noise().of_tiles((24, 16), (1, 16))
    decided = 0
    for row in range(24):
        blocks = [slice(16 * j, min(16 * j + 16, 250)) for j in range(16)]
        e = [float(E4M3.round((wide[row, b].abs().max() / v / tensor).float())) or 1.0 for b in blocks]
        y = torch.cat([wide[row, b] / (scale * tensor) for b, scale in zip(blocks, e, strict=True)])
        near = E2M1.round((y * (1 + 1e-6)).float()) != E2M1.round((y * (1 - 1e-6)).float())
        assert ((values[row] == E2M1.round(y.float())) | near).all()
        for j in range(16):
            pooled = slice(16 * j // over * over, min((16 * j // over + 1) * over, 250))
            along = float(y[pooled] @ values[row, pooled])
            wanted = e[j] * (float(y[pooled] @ y[pooled]) / along if along else 1.0)
            got = float(E4M3.decode(q.scales[row, j]))
            step = 2.0 ** (max(np.floor(np.log2(wanted)), -6) - 3)
            share = wanted / step - np.floor(wanted / step)
            if abs(share - float(uniform[row, j])) > 1e-4 and 1e-4 < share < 1 - 1e-4:
                decided += 1
                assert got == (np.floor(wanted / step) + (float(uniform[row, j]) < share)) * step
    assert decided > 350
    assert torch.equal(dequantize(q)[3], torch.zeros(250))


@pytest.mark.parametrize(
    ("spec", "error", "tolerance"),
    [
        (NVFP4, 9.0e-3, 0.02),
        (replace(NVFP4, scale=FourOverSix(error=Error.MSE, form=Form.QUARTET2)), 7.6e-3, 0.02),
        (replace(NVFP4, scale=FourOverSix(error=Error.MSE)), 7.6e-3, 0.02),
        (EDEN, 9.4e-3, 0.02),
        (replace(EDEN, scale=MsEden(over=128)), 9.8e-3, 0.02),
        (replace(NVFP4, rounding=Rounding.STOCHASTIC, top=16 / 17), 23.5e-3, 0.02),
    ],
    ids=["nearest", "four over six", "te's four over six", "ms-eden", "ms-eden over 128", "stochastic"],
)
def test_errors_are_those_published(spec: OperandSpec, error: float, tolerance: float) -> None:
    x = normal(512, 1024, 1)
    back = dequantize(quantize(x, spec, noise=noise() if spec.stochastic else None))
    assert float((back - x).square().mean()) == pytest.approx(error, rel=tolerance)


def test_ms_eden_is_unbiased_over_its_noise() -> None:
    """The mean of stored scales is what was wanted of them, however coarse E4M3 is."""
    x = normal(4, 64, 2)
    draws = []
    for step in range(500):
        source = Noise(key=step_key(base_key(1, "layers.0", 2), step))
        draws.append(E4M3.decode(quantize(x, EDEN, noise=source).scales))
    stacked = torch.stack(draws)
    y = x.reshape(4, 4, 16).double()
    tensor = float(x.abs().max()) / 255.99 / (6 * EDEN.top)
    e = E4M3.round((y.abs().amax(-1) / (6 * EDEN.top) / tensor).float()).double()
    y = y / (e * tensor)[..., None]
    wanted = e * y.square().sum(-1) / (y * E2M1.round(y.float())).sum(-1)
    error = (stacked.double().mean(0) - wanted) / stacked.double().std(0).clamp(min=1e-9)
    assert error.abs().max() < 4 / 500**0.5
    assert stacked.std(0).max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_if4_against_fp64(dtype: torch.dtype) -> None:
    x = (normal(20, 90) * 2.0 ** torch.linspace(-3, 3, 20)[:, None]).to(dtype)
    x[2] = 0
    q, plain = quantize(x, IF4), quantize(x, NVFP4)
    assert q.codes.shape == (20, 45)
    assert torch.equal(q.scales & 0x7F, plain.scales)
    assert q.tensor_scale is not None
    wide, back = x.float().double(), dequantize(q).double()
    tensor, marks = float(wide.abs().max()) / 2688, []
    for row in range(20):
        for j in range(6):
            block = slice(16 * j, min(16 * j + 16, 90))
            scale = float(E4M3.decode(plain.scales[row, j])) * tensor
            y = wide[row, block] / scale if scale else torch.zeros(block.stop - block.start).double()
            both = E2M1.round(y.float()).double(), (y * 7 / 6).round().clamp(-7, 7) * 6 / 7
            errors = [float((values - y).square().sum()) for values in both]
            marks.append(int(q.scales[row, j]) >> 7)
            if abs(errors[1] - errors[0]) > 1e-4:
                assert marks[-1] == (errors[1] < errors[0])
            tie = ((y * 7 / 6 % 1 - 0.5).abs() < 1e-5) if marks[-1] else torch.isin(y.abs(), TIES)
            close = (back[row, block] - both[marks[-1]] * scale).abs() <= 1e-5 * back[row, block].abs()
            assert (close | tie).all()
    assert 0.05 < np.mean(marks) < 0.95
    assert (back - wide).square().sum() < 0.9 * (dequantize(plain).double() - wide).square().sum()
    matrix, factor = operand(q)
    assert factor is None
    assert torch.equal(matrix, dequantize(q))
    assert torch.equal(prepare(x, IF4).matrix, matrix)
    # The probe sees sizes: a mark is no sign, and nothing lies beyond the largest code of a tile.
    figures = of_operand(x, q)
    assert -figures.extremes[2] >= 0
    assert figures.sums[4] == of_operand(x, plain).sums[4]


def test_marks_are_read_of_a_transpose() -> None:
    spec = replace(IF4, tile=Tile(16, 16))
    q = quantize(normal(40, 50), spec)
    assert torch.equal(dequantize(q.t()), dequantize(q).mT)


def test_noise_of_scales_goes_by_the_place_of_the_tile() -> None:
    """Not by rank or micro-batch, nor by the elements' own noise, and by the same element of a transpose."""
    x = normal(32, 64, 3)
    whole = noise().of_tiles((32, 4), (1, 16))
    assert torch.equal(noise(row_offset=20).of_tiles((12, 4), (1, 16)), whole[20:])
    assert not torch.equal(noise().uniform(32, 64)[:, ::16], whole)
    assert torch.equal(noise(transposed=True).of_tiles((4, 2), (16, 16)), noise().of_tiles((2, 4), (16, 16)).mT)
    amax = x.abs().max()
    parts = [
        quantize(x[rows], EDEN, amax=amax, noise=noise(row_offset=rows.start)) for rows in (slice(0, 20), slice(20, 32))
    ]
    q = quantize(x, EDEN, noise=noise())
    assert torch.equal(torch.cat([part.scales for part in parts]), q.scales)
    assert torch.equal(torch.cat([part.codes for part in parts]), q.codes)
    # Elements round to nearest all the while.
    assert torch.equal(q.codes, quantize(x, EDEN, noise=noise(row_offset=7)).codes)
    assert not torch.equal(q.scales, quantize(x, EDEN, noise=noise(row_offset=7)).scales)


@pytest.mark.parametrize(
    "spec",
    [EDEN, IF4, *(replace(NVFP4, scale=FourOverSix(error=Error.MSE, form=form)) for form in Form)],
    ids=lambda spec: str(spec.scale),
)
def test_values_without_codes_are_those_of_the_codes(spec: OperandSpec) -> None:
    x, source = normal(20, 90).bfloat16(), noise() if spec.stochastic else None
    matrix, factor = operand(quantize(x, spec, noise=source))
    for made in (prepare(x, spec, noise=source), Cpu().cast(x, Cast(spec=spec, noise=source, codes=False))):
        assert isinstance(made, Prepared)
        assert torch.equal(made.matrix, matrix)
        assert factor is made.factor or torch.equal(made.factor, factor)  # type: ignore[arg-type]


def test_a_shard_of_a_weight_is_quantized_alone_where_that_changes_nothing() -> None:
    square = Tile(16, 16)
    whole = [NVFP4.scale, FourOverSix()]
    parts: list[OperandSpec] = [
        replace(IF4, tile=square),
        replace(NVFP4, tile=square, scale=TwoLevel(outer=Tile(32, 32))),
        replace(NVFP4, tile=square, statistic=Std()),
    ]
    for spec in [*(replace(NVFP4, tile=square, scale=rule) for rule in whole), *parts]:
        gemm = GemmSpec(a=spec, b=spec)
        linear = quantized(LinearSpec(fprop=gemm, dgrad=gemm, wgrad=gemm))(nn.Linear(64, 48), "layers.0.up")
        assert isinstance(linear, QuantLinear)
        if spec in parts:
            assert "not known to be the same of a shard" in str(linear.reads_weight)
        else:
            assert linear.reads_weight == spec


def test_an_operand_whose_scales_are_random_needs_noise() -> None:
    assert is_stochastic(EDEN)
    assert not is_stochastic(IF4)
    with pytest.raises(ValueError, match="says so"):
        quantize(normal(4, 32), EDEN)
    with pytest.raises(ValueError, match="no noise"):
        quantize(normal(4, 32), IF4, noise=noise())


@pytest.mark.parametrize(("spec", "name"), [(EDEN, "MsEden"), (IF4, "If4")], ids=["ms-eden", "if4"])
def test_a_linear_trains_with_it_and_kernels_refuse(spec: OperandSpec, name: str) -> None:
    gemm = GemmSpec(a=spec, b=spec)
    assert f"no kernel for scales by {spec.scale}, a rule of its own: {name}" in str(
        choose(gemm, (32, 32, 64), torch.device("cpu"))
    )
    x = normal(32, 64)
    source = noise() if spec.stochastic else None
    made, wanted = Cpu().cast(x, Cast(spec=spec, noise=source)), quantize(x, spec, noise=source)
    assert isinstance(made, Quantized)
    assert torch.equal(made.codes, wanted.codes)
    assert torch.equal(made.scales, wanted.scales)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    linear = LinearSpec(fprop=gemm, dgrad=gemm, wgrad=gemm)
    plan = apply(Recipe(rules=(Rule(kind=nn.Linear, path=".*", make=quantized(linear)),)), model, tokens=32)
    assert f"/{spec.scale}" in str(plan)
    plan.begin_step(0, 0)
    exact = torch.nn.functional.linear(x, *model.parameters())
    y = model(x)
    y.square().mean().backward()
    assert 0 < (y - exact).norm() / exact.norm() < 0.2
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@dataclass(frozen=True, slots=True, kw_only=True)
class Looks:
    """Finishes without changing anything, and hands over what it was shown."""

    format: ClassVar[NumberFormat] = E4M3
    levels: ClassVar[int] = 2
    power_of_two: ClassVar[bool] = False
    seen: list[Trial]

    def scales(self, amax: Tensor, element: NumberFormat, *, tensor_amax: Tensor, dtype: torch.dtype) -> Scales:
        return TwoLevel().scales(amax, element, tensor_amax=tensor_amax, dtype=dtype)

    def finish(self, trial: Trial) -> tuple[Scales, Tensor | None]:
        self.seen.append(trial)
        return trial.scales, None


@pytest.mark.parametrize("tile", [Tile(1, 16), Tile(3, 5), Tile(16, 16), Tile(-1, 1)], ids=str)
def test_what_a_rule_is_shown(tile: Tile) -> None:
    seen: list[Trial] = []
    x = normal(20, 47).bfloat16()
    spec = replace(NVFP4, tile=tile, scale=Looks(seen=seen), rounding=Rounding.STOCHASTIC)
    plain = quantize(x, replace(spec, scale=TwoLevel()), noise=noise())
    q = quantize(x, spec, noise=noise())
    (trial,) = seen
    assert torch.equal(q.codes, plain.codes)
    assert torch.equal(trial.codes(), plain.codes)
    assert not torch.equal(trial.codes(again=True), plain.codes)
    assert torch.equal(trial.codes_of(trial.scaled(trial.x, trial.scales.encode)), plain.codes)
    assert torch.equal(
        trial.scaled(trial.values(plain.codes, E4M3.decode(plain.scales)), plain.tensor_scale), dequantize(plain)
    )
    assert torch.equal(trial.statistic, trial.tiles(trial.x).abs().amax((1, 3)))
    torch.testing.assert_close(trial.sums(trial.x), trial.tiles(trial.x).sum((1, 3)), rtol=1e-4, atol=1e-5)
    which = torch.rand(trial.statistic.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    other = trial.codes(again=True)
    mixed = unpack4(trial.chosen(which, plain.codes, other), 47)
    here = trial.scaled(torch.ones(20, 47), which.float()) > 0
    assert torch.equal(mixed, torch.where(here, unpack4(plain.codes, 47), unpack4(other, 47)))
