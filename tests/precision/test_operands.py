"""What a slot can say beside one quantization of its tensor: values of earlier codes, sums of parts, derivatives of
rounding, and transforms that are drawn anew. Each against a model in float64 that knows nothing of slots."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from narrowgauge.precision import Plan, apply
from narrowgauge.precision.estimator import ClipMask, multiplied, pack_bits, unpack_bits
from narrowgauge.precision.formats import E2M1, E4M3, NumberFormat, unpack4
from narrowgauge.precision.hooks import RollAmax
from narrowgauge.precision.linear import QuantLinear, quantized
from narrowgauge.precision.probe import Probe
from narrowgauge.precision.quantize import Quantized, dequantize, quantize, scaled_values
from narrowgauge.precision.recipe import Phase, Recipe, Rule, require_apart
from narrowgauge.precision.scaling import Current, Delayed, Fp32, Fp32Decode, Power, PowerOfTwo, Tile, Unit
from narrowgauge.precision.schedule import Span
from narrowgauge.precision.spec import (
    GemmSpec,
    LinearSpec,
    OperandSpec,
    Part,
    Rounding,
    Source,
    Split,
    Transform,
    values_of,
)
from narrowgauge.precision.sums import H100_FP8, Side, summed
from narrowgauge.precision.transforms import Along, Composed, Hadamard, Outer, Rescale
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROWS, INS, OUTS = 48, 64, 32
BLOCK = OperandSpec(format=E4M3, tile=Tile(1, 16), scale=PowerOfTwo())
ROW4 = OperandSpec(format=E2M1, tile=Tile(1, -1))
SQUARE = OperandSpec(format=E4M3, tile=Tile(16, 16), scale=Fp32(pow2=True))
TENSOR8 = OperandSpec(format=E4M3)


def plan_of(spec: LinearSpec, *, layers: int = 1, backend: str = "auto", **options: Any) -> tuple[Plan, list[Any]]:
    """FP32 linears of a fixed seed in a model of their own."""
    torch.manual_seed(0)
    model = nn.ModuleDict({f"l{number}": nn.Linear(INS, OUTS) for number in range(layers)})
    rules = (Rule(kind=nn.Linear, path=".*", make=quantized(spec)),)
    plan = apply(Recipe(rules=rules, **options), model, backend=backend, tokens=ROWS)
    plan.begin_step(0, 0)
    return plan, list(model.values())


def linear_of(spec: LinearSpec, **options: Any) -> QuantLinear:
    module = plan_of(spec, **options)[1][0]
    assert isinstance(module, QuantLinear)
    return module


def samples(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape[-1:], generator=generator).exp()


X, DY = samples(ROWS, INS), samples(ROWS, OUTS, seed=2)


def run(module: nn.Module, x: Tensor = X, dy: Tensor = DY) -> list[Tensor]:
    """y, dx, dw, db."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    return [y.detach(), x.grad, module.weight.grad, module.bias.grad]


def rounded(x: Tensor, spec: OperandSpec) -> Tensor:
    """The values of codes, in float64."""
    return dequantize(quantize(x, replace(spec, source=Source.ORIGINAL))).double()


def close(ours: Tensor, model: Tensor) -> bool:
    """But for float32's rounding of sums."""
    return torch.allclose(ours.double(), model, rtol=1e-5, atol=1e-5 * float(model.detach().abs().max()))


# Values of earlier codes.


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("operand", [BLOCK, ROW4, SQUARE, TENSOR8], ids=str)
def test_values_of_earlier_codes_are_not_rounded_again(operand: OperandSpec, backend: str) -> None:
    again = values_of(operand)
    spec = LinearSpec(
        fprop=GemmSpec(a=operand, b=operand), dgrad=GemmSpec(a=operand, b=again), wgrad=GemmSpec(a=again, b=again)
    )
    module = linear_of(spec, backend=backend)
    y, dx, dw, _ = run(module)
    x, w, dy = (rounded(tensor.detach(), operand) for tensor in (X, module.weight, DY))
    assert close(y, x @ w.mT + module.bias.double())
    assert close(dx, dy @ w)
    assert close(dw, dy.mT @ x)
    alone = X.clone()  # no gradient is wanted of it: dy is quantized for wgrad alone, as it would be for dgrad
    module.zero_grad()
    module(alone).backward(DY)
    assert torch.equal(module.weight.grad, dw)


def test_values_in_square_tiles_are_reused_codes() -> None:
    """And of rectangular ones they are another thing than codes that are quantized again."""

    def dx(operand: OperandSpec, source: Source) -> Tensor:
        again = replace(operand, source=source)
        return run(linear_of(LinearSpec(fprop=GemmSpec(b=operand), dgrad=GemmSpec(b=again))))[1]

    assert torch.equal(dx(SQUARE, Source.VALUES), dx(SQUARE, Source.QUANTIZED))
    assert not torch.equal(dx(ROW4, Source.VALUES), dx(ROW4, Source.QUANTIZED))


@pytest.mark.parametrize("source", [Source.VALUES, Source.QUANTIZED])
def test_codes_of_a_transformed_operand_give_a_gradient_that_is_taken_back(source: Source) -> None:
    """y = (x R)(w R)^T: dgrad reads the codes of w R, and its output goes through R^T (Quartet, HALO)."""
    again = replace(ROW4, source=source)
    spec = LinearSpec(
        fprop=GemmSpec(a=ROW4, b=ROW4, transform=Hadamard()), dgrad=GemmSpec(b=again), wgrad=GemmSpec(b=again)
    )
    module = linear_of(spec)
    y, dx, dw, _ = run(module)
    matrix = Hadamard().right(torch.eye(INS, dtype=torch.float64))
    x, w = (rounded((tensor.detach().double() @ matrix).float(), ROW4) for tensor in (X, module.weight))
    assert close(y, x @ w.mT + module.bias.double())
    if source is Source.QUANTIZED:
        x, w = (rounded(tensor.mT.float(), ROW4).mT for tensor in (x, w))
    assert close(dx, DY.double() @ w @ matrix.mT)
    assert close(dw, DY.double().mT @ x @ matrix.mT)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"fprop": GemmSpec(a=values_of(BLOCK))}, "x is quantized here for the first time"),
        ({"dgrad": GemmSpec(b=values_of(BLOCK))}, r"dgrad\.b is to reuse the codes of w, which no GEMM before"),
        (
            {"fprop": GemmSpec(b=ROW4), "dgrad": GemmSpec(b=values_of(BLOCK))},
            r"dgrad\.b reads the values of w: it is e2m1/row/fp32 but for its source, not e4m3/1x16/e8m0-rceil/values",
        ),
        (
            {"dgrad": GemmSpec(a=BLOCK, transform=Hadamard()), "wgrad": GemmSpec(a=values_of(BLOCK))},
            r"wgrad\.a is to reuse the codes of dy, which hadamard16 changed along features",
        ),
        (
            {"fprop": GemmSpec(b=BLOCK, transform=Outer(b=Hadamard())), "dgrad": GemmSpec(b=values_of(BLOCK))},
            r"dgrad\.b is to reuse the codes of w, but hadamard16 along the rows of b rewrites the output of fprop",
        ),
    ],
)
def test_values_that_nobody_makes_are_refused(spec: dict[str, GemmSpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearSpec(**spec)
    with pytest.raises(ValueError, match="hadamard16 would transform values of codes"):
        GemmSpec(b=values_of(BLOCK), transform=Hadamard())


# Sums of parts.


@dataclass(frozen=True, slots=True, kw_only=True)
class Clamped:
    """Values inside a bound, and what exceeds it."""

    bound: float = 1.0

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        inside = x.clamp(-self.bound, self.bound)
        return inside, x - inside

    def __str__(self) -> str:
        return f"clamp{self.bound:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Centred:
    """The mean of all rows, as one row, and the rest."""

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        mean = x.mean(0, keepdim=True)
        return mean, x - mean

    def __str__(self) -> str:
        return "mean"


CLAMPED = Split(by=Clamped(), parts=(Part("inside", ROW4), Part("outliers", None)))
CENTRED = Split(by=Centred(), parts=(Part("mean", BLOCK), Part("rest", ROW4)))


def sum_of(split: Split, x: Tensor, *, transposed: bool = False, transform: Hadamard | None = None) -> Tensor:
    """Of the rounded parts, in float64: each transposed and transformed before it is rounded."""
    total = torch.zeros(x.mT.shape if transposed else x.shape, dtype=torch.float64)
    for tensor, part in zip(split.by.split(x), split.parts, strict=True):
        if transposed and len(tensor) == 1 and part.spec is not None:  # rounded as the row it is
            given = rounded(tensor, part.spec).expand_as(x).mT
            total = total + (given if transform is None else transform.left(given))
            continue
        given = tensor.expand_as(x).mT if transposed else tensor
        given = given if transform is None else transform.left(given)
        total = total + (given.double() if part.spec is None else rounded(given, part.spec))
    return total


@pytest.mark.parametrize("split", [CLAMPED, CENTRED], ids=str)
@pytest.mark.parametrize("transform", [None, Hadamard()], ids=str)
def test_a_product_of_sums_is_the_sum_of_the_products_of_parts(split: Split, transform: Hadamard | None) -> None:
    gemm = GemmSpec(a=split, b=split, transform=transform)
    module = linear_of(LinearSpec(fprop=gemm, dgrad=gemm, wgrad=gemm))
    y, dx, dw, db = run(module)
    w = module.weight.detach()
    both = {"transform": transform}
    assert close(y, sum_of(split, X, **both) @ sum_of(split, w, **both).mT + module.bias.double())
    assert close(dx, sum_of(split, DY, **both) @ sum_of(split, w, transposed=True, **both).mT)
    transposed = {"transposed": True, **both}
    assert close(dw, sum_of(split, DY, **transposed) @ sum_of(split, X, **transposed).mT)
    assert torch.equal(db, DY.sum(0))


def test_each_product_of_parts_is_summed_by_the_rule() -> None:
    parts = (Part("inside", ROW4), Part("outliers", TENSOR8))
    split = replace(CLAMPED, parts=parts)
    module = linear_of(LinearSpec(fprop=GemmSpec(a=split, b=TENSOR8, accumulate=H100_FP8)))
    total = torch.zeros(ROWS, OUTS)
    w = quantize(module.weight.detach(), TENSOR8)
    for tensor, (_, spec) in zip(Clamped().split(X), parts, strict=True):
        q = quantize(tensor, spec)
        codes = [Side(values=one.spec.format.decode(unpacked(one)), tiny=-6) for one in (q, w)]
        codes[0] = replace(codes[0], tiny=spec.format.min_exponent)
        total = total + summed(*codes, H100_FP8) * q.scales * w.scales
    assert torch.allclose(run(module)[0], total + module.bias.detach(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="a rule of a product of two quantized operands"):
        GemmSpec(a=CLAMPED, b=TENSOR8, accumulate=H100_FP8)
    with pytest.raises(ValueError, match="codes in tiles of row are not read across them"):
        GemmSpec(a=values_of(ROW4), b=TENSOR8, accumulate=H100_FP8)


def unpacked(q: Quantized) -> Tensor:
    return unpack4(q.codes, q.shape[1]) if q.spec.format.bits == 4 else q.codes


@pytest.mark.parametrize("reused", [(), ("inside",)])
def test_a_later_gemm_reads_the_parts_that_the_split_names(reused: tuple[str, ...]) -> None:
    """The clamped part alone, as the code of arXiv 2501.17116 does, or all of it; as values, or quantized again."""
    split = replace(CLAMPED, reused=reused)
    spec = LinearSpec(
        fprop=GemmSpec(a=split, b=split),
        dgrad=GemmSpec(b=values_of(split)),
        wgrad=GemmSpec(b=replace(BLOCK, source=Source.QUANTIZED)),
    )
    module = linear_of(spec)
    _, dx, dw, _ = run(module)

    def read(x: Tensor) -> Tensor:
        inside = rounded(Clamped().split(x)[0], ROW4)
        return inside if reused else inside + Clamped().split(x)[1].double()

    assert close(dx, DY.double() @ read(module.weight.detach()))
    assert close(dw, DY.double().mT @ rounded(read(X).float().mT, BLOCK).mT)


@pytest.mark.parametrize("split", [CLAMPED, CENTRED], ids=str)
@pytest.mark.parametrize("transform", [None, Hadamard()], ids=str)
def test_parts_are_quantized_again_one_by_one(split: Split, transform: Hadamard | None) -> None:
    """Each by the spec of its name there, from the values of its codes, turned and rotated (TetraJet-v2)."""
    later = replace(split, source=Source.QUANTIZED, parts=tuple(Part(part.name, BLOCK) for part in split.parts))
    again = GemmSpec(b=later, transform=transform)
    module = linear_of(LinearSpec(fprop=GemmSpec(a=split, b=split), dgrad=again, wgrad=again))
    _, dx, dw, _ = run(module)

    def read(x: Tensor) -> Tensor:
        total = torch.zeros(x.mT.shape, dtype=torch.float64)
        for tensor, part in zip(split.by.split(x), split.parts, strict=True):
            codes = tensor.float() if part.spec is None else rounded(tensor, part.spec).float()
            if len(codes) == 1:
                turned = rounded(codes, BLOCK).float().expand_as(x).mT
                total = total + (turned if transform is None else transform.left(turned)).double()
                continue
            total = total + rounded(codes.mT if transform is None else transform.left(codes.mT), BLOCK)
        return total

    dy = DY.double() if transform is None else transform.left(DY.double())
    assert close(dx, dy @ read(module.weight.detach()).mT)
    dy_t = DY.mT.double() if transform is None else transform.left(DY.mT.double())
    assert close(dw, dy_t @ read(X).mT)


def test_parts_have_noise_of_their_own_which_is_that_of_the_step() -> None:
    """The first has that of an operand which is one."""
    random = replace(ROW4, rounding=Rounding.STOCHASTIC)

    @dataclass(frozen=True, slots=True)
    class Twice:
        weight: float

        def split(self, x: Tensor) -> tuple[Tensor, ...]:
            return x * self.weight, x * (1 - self.weight)

    def y(operand: OperandSpec | Split, step: int = 0) -> Tensor:
        plan, (module,) = plan_of(LinearSpec(fprop=GemmSpec(a=operand)))
        plan.begin_step(step, 0)
        return run(module)[0]

    def split(weight: float) -> Split:
        return Split(by=Twice(weight), parts=(Part("one", random), Part("other", random)))

    half = split(0.5)
    assert torch.equal(y(half), y(half))
    assert not torch.equal(y(half), y(half, step=1))
    assert torch.equal(y(split(1.0)), y(random))
    assert not torch.equal(y(split(0.0)), y(random))


def test_a_sum_of_parts_stands_in_the_plan_line_by_line_and_in_the_probe_row_by_row() -> None:
    spec = LinearSpec(fprop=GemmSpec(a=CLAMPED, b=ROW4), wgrad=GemmSpec(b=values_of(CLAMPED)))
    plan, (module,) = plan_of(spec)
    lines = [line.strip() for line in str(plan).splitlines()]
    at = next(place for place, line in enumerate(lines) if line.startswith("fprop: clamp1(inside + outliers) x "))
    assert "reference (not cpu: no kernel for a sum of parts, as clamp1(inside + outliers)" in lines[at]
    assert lines[at + 1 : at + 3] == ["x, inside: e2m1/row/fp32", "x, outliers: high precision"]
    probe = Probe(plan, every=1)
    exact = run(module)
    with probe.watching():
        watched = run(module)
    assert all(map(torch.equal, exact, watched))
    rows = {row.slot: row for row in probe.rows()}
    assert set(rows) >= {"fprop.x", "fprop.x.inside", "fprop.x.outliers", "wgrad.x", "fprop.y"}
    assert rows["fprop.x.inside"].format == "e2m1/row/fp32"
    assert rows["fprop.x.inside"].amax == 1.0
    assert rows["fprop.x.outliers"].mse == 0.0
    error = sum_of(CLAMPED, X) - X.double()
    assert rows["fprop.x"].mse == pytest.approx(float(error.square().mean()), rel=1e-4)
    assert rows["wgrad.x"].mse == pytest.approx(rows["fprop.x"].mse, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Split(by=Clamped(), parts=(Part("one", ROW4),)), "two or more parts with names of their own"),
        (lambda: Split(by=Clamped(), parts=(Part("a", ROW4), Part("a", None))), "with names of their own"),
        (lambda: Split(by=Clamped(), parts=(Part("a", None), Part("b", None))), "clamp1: none of its parts a, b is"),
        (lambda: replace(CLAMPED, reused=("insid",)), r"no part named 'insid' \(did you mean 'inside'\?\)"),
        (
            lambda: LinearSpec(fprop=GemmSpec(a=CLAMPED), wgrad=GemmSpec(b=replace(CENTRED, source=Source.QUANTIZED))),
            "wgrad.b quantizes parts of x again: inside, outliers, not mean, rest",
        ),
        (
            lambda: Split(by=Clamped(), parts=(Part("a", replace(TENSOR8, amax=Delayed())), Part("b", None))),
            "part 'a': e4m3/tensor/delayed: a part is scaled by its own amax",
        ),
        (lambda: LinearSpec(fprop=GemmSpec(a=CLAMPED), dx=ClipMask()), "dx: clip-mask .* is a sum of parts"),
        (lambda: LinearSpec(fprop=GemmSpec(a=ROW4), dw=ClipMask()), "dw: clip-mask .* is not rounded"),
        (
            lambda: LinearSpec(fprop=GemmSpec(a=ROW4, transform=Rescale(name="by columns")), dx=ClipMask()),
            "dx: clip-mask multiplies where by columns led, and no gradient gets there but by codes",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_splitter_that_breaks_its_word_is_named() -> None:
    @dataclass(frozen=True, slots=True)
    class Odd:
        def split(self, x: Tensor) -> tuple[Tensor, ...]:
            return x[:, :1], x

        def __str__(self) -> str:
            return "odd"

    module = linear_of(LinearSpec(fprop=GemmSpec(a=replace(CLAMPED, by=Odd()))))
    with pytest.raises(ValueError, match=r"l0: odd split \[48, 64\] into \[48, 1\], \[48, 64\]: 2 parts of that shape"):
        module(X)


# Derivatives of rounding.

POW4 = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=PowerOfTwo(mode=Power.FLOOR))  # which clips


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """A derivative that is no mask."""

    mask: ClassVar[bool] = False

    def factor(self, scaled: Tensor, format: NumberFormat) -> Tensor:
        return scaled.cos() + format.max

    def __str__(self) -> str:
        return "wave"


def inside(x: Tensor) -> Tensor:
    """The mask in float64, from what the format is: E2M1 times 2^(floor(log2(amax)) - 2) per 1x16."""
    blocks = x.double().view(len(x), -1, 16)
    exponent = blocks.abs().amax(-1, keepdim=True).log2().floor() - 2
    return ((blocks / 2.0**exponent).abs() <= 6.0).view(x.shape)


def scaled_by_pow4(x: Tensor) -> Tensor:
    blocks = x.double().view(len(x), -1, 16)
    return (blocks / 2.0 ** (blocks.abs().amax(-1, keepdim=True).log2().floor() - 2)).view(x.shape)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("reuses", [False, True])
@pytest.mark.parametrize("estimator", [ClipMask(), Wave()], ids=str)
def test_a_derivative_multiplies_where_the_operand_was_rounded(
    rotated: bool, reuses: bool, estimator: ClipMask | Wave
) -> None:
    """That is after the transform: dx = ((dy w R) * factor(x R)) R^T, whatever dgrad reads."""
    transform = Hadamard() if rotated else None
    again = values_of(POW4) if reuses else None
    fprop = GemmSpec(a=POW4, b=POW4, transform=transform)
    spec = LinearSpec(fprop=fprop, dgrad=GemmSpec(b=again), wgrad=GemmSpec(b=again), dx=estimator, dw=estimator)
    module = linear_of(spec)
    _, dx, dw, _ = run(module)
    w = module.weight.detach()
    matrix = Hadamard().right(torch.eye(INS, dtype=torch.float64)) if rotated else torch.eye(INS, dtype=torch.float64)
    x_r, w_r = (Hadamard().left(tensor) if rotated else tensor for tensor in (X, w))
    assert 0.001 < (~inside(x_r)).double().mean() < 0.4
    factors = [
        inside(tensor).double() if estimator.mask else scaled_by_pow4(tensor).cos() + 6.0 for tensor in (x_r, w_r)
    ]
    read_w = rounded(w_r, POW4) if reuses else w.double() @ matrix
    read_x = rounded(x_r, POW4) if reuses else X.double() @ matrix
    assert close(dx, (DY.double() @ read_w * factors[0]) @ matrix.mT)
    assert close(dw, (DY.double().mT @ read_x * factors[1]) @ matrix.mT)
    straight = run(linear_of(replace(spec, dx=None, dw=None)))
    assert not torch.equal(straight[1], dx)
    assert not torch.equal(straight[2], dw)


def test_what_a_mask_saves_is_a_bit_for_each_element() -> None:
    spec = LinearSpec(fprop=GemmSpec(a=POW4), wgrad=GemmSpec(b=POW4), dx=ClipMask())

    def saved(spec: LinearSpec) -> int:
        sizes: list[int] = []

        def record(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            linear_of(spec)(X.clone().requires_grad_())
        return sum(sizes)

    assert saved(spec) - saved(replace(spec, dx=None)) == X.numel() // 8


@pytest.mark.parametrize("columns", [1, 7, 8, 13, 64])
def test_bits(columns: int) -> None:
    mask = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)) > 0
    packed = pack_bits(mask)
    assert packed.shape == (5, -(-columns // 8))
    assert packed.dtype == torch.uint8
    assert int(packed[0, 0]) & 1 == int(mask[0, 0])
    assert torch.equal(unpack_bits(packed, columns), mask)


def test_a_clipped_gradient_is_zero_whatever_came_back() -> None:
    g = torch.tensor([float("inf"), float("nan"), 3.0]).bfloat16()
    assert multiplied(g, torch.tensor([False, False, True])).tolist() == [0.0, 0.0, 3.0]
    assert multiplied(g, torch.tensor([0.0, 0.0, 0.1])).tolist() == [0.0, 0.0, float(torch.tensor(0.3).bfloat16())]


@pytest.mark.parametrize("spec", [ROW4, TENSOR8, replace(ROW4, scale=Fp32Decode())], ids=str)
def test_no_row_clips_its_own_maximum(spec: OperandSpec) -> None:
    """Although max / amax * amax may be a step of FP32 beyond."""
    x = samples(2048, 64, seed=7)
    scaled = scaled_values(x, spec)
    assert spec is TENSOR8 or (scaled.abs() > spec.format.max).any()
    assert ClipMask().factor(scaled, spec.format).all()


def test_a_strict_mask_counts_the_largest_value_as_clipped() -> None:
    scaled = torch.tensor([[-6.0, 5.999, 6.0, 6.001, float("nan"), float("-inf")]])
    assert ClipMask().factor(scaled, E2M1).tolist() == [[True, True, True, False, False, False]]
    assert ClipMask(strict=True).factor(scaled, E2M1).tolist() == [[False, True, False, False, False, False]]


@pytest.mark.parametrize("scale", [Unit(), Fp32(margin=1)], ids=str)
def test_a_delayed_amax_gives_the_factors_that_it_gave_the_codes(scale: Unit | Fp32) -> None:
    amax = Delayed(history=2) if isinstance(scale, Fp32) else Current()
    operand = OperandSpec(format=E2M1, scale=scale, amax=amax)
    spec = LinearSpec(fprop=GemmSpec(a=operand, b=operand), dx=ClipMask(), dw=ClipMask())
    plan, (module,) = plan_of(spec, hooks=(RollAmax(),))
    grads = []
    for step, size in enumerate((0.5, 3.0)):  # the second step clips by the amax of the first
        plan.begin_step(step, 0)
        grads.append(run(module, X * size)[1])
        plan.end_step()
    top = float((X * 0.5).abs().max()) * 2 if isinstance(scale, Fp32) else 6.0
    expected = (DY @ module.weight.detach()) * ((X * 3.0).abs() <= top)
    assert torch.allclose(grads[1], expected, rtol=1e-5, atol=1e-6)
    assert (expected == 0).any()
    if isinstance(scale, Fp32):
        assert module.amax_held[0] == (X * 3.0).abs().max()


# Transforms that are drawn anew.


def test_a_random_transform_is_that_of_its_step_its_layer_and_its_gemm() -> None:
    """And of nothing else: micro-batches, recompute and siblings that read the same input do not change it."""
    gemm = GemmSpec(a=ROW4, b=ROW4, transform=Hadamard(signs="step"))
    plan, modules = plan_of(LinearSpec(fprop=gemm, dgrad=gemm, wgrad=gemm), layers=2)
    modules[1].load_state_dict(modules[0].state_dict())
    first = run(modules[0])
    assert all(map(torch.equal, run(modules[0]), first))
    x = X.clone().requires_grad_()
    both = [module(x) for module in modules]  # of one x, which they do not share the codes of
    assert torch.equal(both[0], first[0])
    assert not torch.equal(both[1], first[0])
    modules[0].zero_grad()
    again = checkpoint(modules[0], x, use_reentrant=False)
    again.backward(DY)
    assert torch.equal(x.grad, first[1])
    assert torch.equal(modules[0].weight.grad, first[2])
    plan.begin_step(1, 0)
    assert not any(map(torch.equal, run(modules[0])[:3], first))
    plan.begin_step(0, ROWS)  # another place in the data: the same signs
    assert torch.equal(run(modules[0])[0], first[0])
    assert modules[0].goes_by_step == "a random transform"
    exact = X.double() @ modules[0].weight.detach().double().mT + modules[0].bias.double()
    assert (first[0] - exact).norm() < 0.3 * exact.norm()
    with pytest.raises(ValueError, match="delayed scaling remembers amaxes, and hadamard16/step is drawn anew"):
        GemmSpec(a=replace(TENSOR8, amax=Delayed()), transform=Hadamard(signs="step"))


def test_one_matrix_of_both_operands_cancels() -> None:
    """Of operands that nothing rounds but float32."""
    wide = OperandSpec(format=E4M3, scale=Unit())
    gemm = GemmSpec(a=wide, transform=Hadamard(signs="step"))
    y = run(linear_of(LinearSpec(fprop=gemm)))[0]
    plain = run(linear_of(LinearSpec(fprop=GemmSpec(a=wide))))[0]
    assert (y - plain).norm() < 0.1 * plain.norm()


# All of it.


def everything() -> LinearSpec:
    random = replace(ROW4, rounding=Rounding.STOCHASTIC)
    return LinearSpec(
        fprop=GemmSpec(a=POW4, b=POW4, transform=Hadamard()),
        dgrad=GemmSpec(a=Split(by=Clamped(), parts=(Part("in", random), Part("out", BLOCK))), b=values_of(POW4)),
        wgrad=GemmSpec(a=random, b=replace(BLOCK, source=Source.QUANTIZED), transform=Hadamard(signs="step")),
        dx=ClipMask(),
        dw=Wave(),
    )


def test_recompute_micro_batches_copies_and_compiled_code_change_nothing() -> None:
    plan, (module,) = plan_of(everything())
    first = run(module)
    x = X.clone().requires_grad_()
    module.zero_grad()
    checkpoint(module, x, use_reentrant=False).backward(DY)
    assert torch.equal(x.grad, first[1])
    assert torch.equal(module.weight.grad, first[2])
    assert all(map(torch.equal, run(copy.deepcopy(module)), first))
    assert all(map(torch.equal, run(torch.compile(module)), first))
    probe = Probe(plan, every=1)
    with probe.watching():
        assert all(map(torch.equal, run(module), first))
    rows = {row.slot: row for row in probe.rows()}
    assert 5 < rows["dgrad.w"].sqnr_db < 40  # the values, against the transformed weight
    assert 0.01 < rows["dgrad.dx"].relative_error < 0.5


def test_high_precision_is_that_of_a_plain_linear_and_a_phase_switches_all_of_it() -> None:
    schedule = (Phase(span=Span(start=2, end=4)), Phase(span=Span(start=5, end=6), gemms=("fprop",)))
    plan, (module,) = plan_of(everything(), schedule=schedule)
    plain = nn.Linear(INS, OUTS)
    plain.load_state_dict(module.state_dict())
    with plan.high_precision():
        assert all(map(torch.equal, run(module)[:1], run(plain)))
    plan.begin_step(2, 0)
    assert all(map(torch.equal, run(module), run(plain)))
    plan.begin_step(5, 0)
    y, dx, _, _ = run(module)
    assert torch.equal(y, run(plain)[0])
    # No derivative of a rounding that is not done; dgrad's own operands are as its spec says, of the weight itself.
    split = everything().dgrad.a
    assert isinstance(split, Split)
    error = dx - run(plain)[1]
    assert 0.01 < error.norm() / dx.norm() < 0.5


def test_a_phase_that_cannot_be_is_refused_before_the_first_step() -> None:
    """The derivative was reached by codes of a rescaled operand; a phase that reads none leaves no way."""
    scale = Rescale(name="by columns", a=Along(1, -1), b=Along(1, 1))
    fprop = GemmSpec(a=BLOCK, b=BLOCK, transform=scale)
    spec = LinearSpec(fprop=fprop, dgrad=GemmSpec(b=values_of(BLOCK)), dx=ClipMask())
    plan_of(spec)
    with pytest.raises(
        ValueError, match=r"schedule \(steps 2 to 3\): l0: dx: clip-mask multiplies where by columns led"
    ):
        plan_of(spec, schedule=(Phase(span=Span(start=2, end=4), gemms=("dgrad",)),))


def test_a_phase_that_no_step_begins_is_for_hooks() -> None:
    """As where backward goes back to BF16 by a criterion; it stands in the plan, and what a step begins goes before."""

    @dataclass
    class Criterion:
        met: bool = False

        def begin_step(self, model: nn.Module, step: int, total_steps: int | None) -> None:
            for module in model.values():
                module.use((0, 1, 1) if self.met else (0, 0, 0))

        def __str__(self) -> str:
            return "a criterion"

    hook = Criterion()
    gemm = GemmSpec(a=ROW4, b=ROW4)
    phase = Phase(span=None, gemms=("dgrad", "wgrad"))
    plan, (module,) = plan_of(LinearSpec(fprop=gemm, dgrad=gemm, wgrad=gemm), schedule=(phase,), hooks=(hook,))
    assert "when a hook says so: high precision (torch)" in str(plan)
    require_apart((phase, Phase(span=Span(start=0, end=3))), 10)
    narrow = run(module)
    hook.met = True
    plan.begin_step(1, 0)
    y, dx, dw, _ = run(module)
    assert torch.equal(y, narrow[0])
    assert close(dx, DY.double() @ module.weight.detach().double())
    assert close(dw, DY.double().mT @ X.double())


def test_a_transform_without_a_way_back_is_named() -> None:
    @dataclass(frozen=True, slots=True)
    class Flip:
        def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
            return a.flip(-1)

        right = left

        def output(self, y: Tensor, stats: Tensor | None = None) -> Tensor:
            return y

        def __str__(self) -> str:
            return "flip"

    transform: Transform = Flip()
    fprop = GemmSpec(a=ROW4, b=ROW4, transform=transform)
    assert run(linear_of(LinearSpec(fprop=fprop)))  # nothing needs it
    with pytest.raises(ValueError, match="flip names no way back"):
        run(linear_of(LinearSpec(fprop=fprop, dgrad=GemmSpec(b=values_of(ROW4)))))


# What meets: rows that stand for all, products of two kinds, linears without a gradient of their weight.


@dataclass(frozen=True)
class MeanRow:
    """The mean of all rows, as one row, and the rest."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.float().mean(0, keepdim=True)
        return mean, x - mean

    def __str__(self) -> str:
        return "mean-row"


def test_a_part_of_one_row_may_be_all_that_is_read_again() -> None:
    split = Split(by=MeanRow(), parts=(Part("mean", BLOCK), Part("rest", BLOCK)), reused=("mean",))
    again = values_of(split)
    spec = LinearSpec(fprop=GemmSpec(a=split, b=split), dgrad=GemmSpec(b=again), wgrad=GemmSpec(b=again))
    module = linear_of(spec)
    _, dx, dw, _ = run(module)
    x, w = (rounded(tensor.detach().mean(0, keepdim=True), BLOCK) for tensor in (X, module.weight))
    assert close(dx, DY.double() @ w.expand(OUTS, INS))
    assert close(dw, DY.double().mT @ x.expand(ROWS, INS))


@pytest.mark.parametrize("operand", [SQUARE, TENSOR8], ids=str)
def test_a_rule_in_wgrad_reads_codes_where_dgrad_needs_none(operand: OperandSpec) -> None:
    plain = GemmSpec(a=operand, b=operand)
    by_rule = replace(plain, accumulate=H100_FP8)
    mixed = run(linear_of(LinearSpec(dgrad=plain, wgrad=by_rule)))
    both = run(linear_of(LinearSpec(dgrad=by_rule, wgrad=by_rule)))
    assert torch.equal(mixed[2], both[2])


def test_siblings_share_no_operand_of_products_that_read_otherwise() -> None:
    plain = GemmSpec(a=ROW4, b=ROW4)
    specs = {"a": LinearSpec(fprop=plain), "b": LinearSpec(fprop=replace(plain, accumulate=H100_FP8))}
    for order in ("ab", "ba"):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(INS, OUTS) for name in "ab"})
        rules = tuple(Rule(kind=nn.Linear, path=name, make=quantized(spec)) for name, spec in specs.items())
        apply(Recipe(rules=rules), model, tokens=ROWS).begin_step(0, 0)
        x = X.clone()
        together = [model[name](x) for name in order]
        assert all(torch.equal(y, model[name](X.clone())) for name, y in zip(order, together, strict=True))


@pytest.mark.parametrize("spec", [ROW4, TENSOR8], ids=str)
def test_dx_has_its_derivative_where_the_weight_is_frozen(spec: OperandSpec) -> None:
    module = linear_of(LinearSpec(fprop=GemmSpec(a=spec, b=spec), dx=ClipMask(strict=True)))
    trained = run(module)[1]
    module.weight.requires_grad_(False)
    x = X.clone().requires_grad_()
    module(x).backward(DY)
    assert torch.equal(x.grad, trained)


def test_bits_of_no_rows() -> None:
    assert unpack_bits(pack_bits(torch.ones(0, 9, dtype=torch.bool)), 9).shape == (0, 9)


def test_a_derivative_wants_the_weight_and_not_its_codes() -> None:
    gemm = GemmSpec(a=SQUARE, b=SQUARE)
    assert isinstance(linear_of(LinearSpec(fprop=gemm, dgrad=gemm)).reads_weight, OperandSpec)
    assert isinstance(linear_of(LinearSpec(fprop=gemm, dgrad=gemm, dw=ClipMask())).reads_weight, str)


def test_transforms_that_leave_no_way_back_are_refused() -> None:
    scale = Rescale(name="scale", a=Along(1, -1), b=Along(1, 1))
    tokens = Rescale(name="tokens", a=Along(0, -1), y=Along(0, 1))
    for transform in (Outer(b=Hadamard()), tokens, Composed(first=tokens, second=Hadamard())):
        fprop = GemmSpec(a=BLOCK, b=BLOCK, transform=transform)
        for again in ({"dgrad": GemmSpec(b=values_of(BLOCK))}, {"wgrad": GemmSpec(b=values_of(BLOCK))}):
            with pytest.raises(ValueError, match="rewrites the output of fprop, too"):
                LinearSpec(fprop=fprop, **again)
    for name in ("dx", "dw"):
        with pytest.raises(ValueError, match=f"{name}: clip-mask multiplies where scale led"):
            LinearSpec(fprop=GemmSpec(a=BLOCK, b=BLOCK, transform=scale), **{name: ClipMask()})
    split = Split(by=MeanRow(), parts=(Part("mean", BLOCK), Part("rest", BLOCK)))
    with pytest.raises(ValueError, match="a sum, and no codes"):
        GemmSpec(a=BLOCK, b=values_of(split), accumulate=H100_FP8)
