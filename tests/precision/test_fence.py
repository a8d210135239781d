"""What a kernel does not know it does not compute: formats, scale rules and transforms that a recipe file brings."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace

import pytest
import torch
from hardware import pretend
from narrowgauge.precision.apply import apply
from narrowgauge.precision.backends import QUANTIZERS, Cast, choose
from narrowgauge.precision.backends.scaled_mm import find
from narrowgauge.precision.backends.triton import quantizer as triton
from narrowgauge.precision.codebook import Codebook
from narrowgauge.precision.formats import E2M1, E4M3, ExMy, Integer, NumberFormat, exmy
from narrowgauge.precision.linear import quantized
from narrowgauge.precision.quantize import Quantized, operand, quantize
from narrowgauge.precision.recipe import Recipe, Rule
from narrowgauge.precision.scaling import Error, FourOverSix, Power, PowerOfTwo, Scales, Tile, TwoLevel
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Source
from narrowgauge.precision.transforms import Hadamard
from torch import Tensor, nn

VALUES = torch.tensor([0, 0.5, 1, 2, 3, 4, 5, 6])
CPU = torch.device("cpu")


def to_grid(x: Tensor) -> Tensor:
    near = (x.float().abs()[..., None] - VALUES).abs().argmin(-1)
    return torch.where(x.isnan(), torch.nan, torch.copysign(VALUES[near], x.float()))


def codes_of(values: Tensor) -> Tensor:
    return (torch.searchsorted(VALUES, values.abs().contiguous()) + 8 * values.signbit()).to(torch.uint8)


def values_of(codes: Tensor) -> Tensor:
    return torch.where(codes & 8 > 0, -1, 1) * VALUES[(codes & 7).long()]


@dataclass(frozen=True, slots=True, kw_only=True)
class OddGrid(ExMy):
    """A subclass with the facts of E2M1 and another grid."""

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return to_grid(x)

    def encode(self, values: Tensor) -> Tensor:
        return codes_of(values)

    def decode(self, codes: Tensor) -> Tensor:
        return values_of(codes)


@dataclass(frozen=True)
class LookAlike:
    """No subclass: what quantization reads of a format, and no more."""

    name: str = "e2m1"
    bits: int = 4
    max: float = 6.0
    nan: int | None = None
    scales_only: bool = False

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return to_grid(x)

    def encode(self, values: Tensor) -> Tensor:
        return codes_of(values)

    def decode(self, codes: Tensor) -> Tensor:
        return values_of(codes)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Bare(NumberFormat):
    """What a format of a recipe's own must say, and no more."""

    name: str = "e2m1"
    bits: int = 4
    max: float = 6.0

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return to_grid(x)

    def encode(self, values: Tensor) -> Tensor:
        return codes_of(values)

    def decode(self, codes: Tensor) -> Tensor:
        return values_of(codes)


TABLE = Codebook(name="e2m1", values=(*VALUES.tolist(), *(-VALUES).tolist()))
ODD = OddGrid(name="e2m1", bits=4, exponent_bits=2, mantissa_bits=1, min_exponent=0, max=6.0, dtype=E2M1.dtype)


class Halved(TwoLevel):
    """Block scales of half the size that NVFP4 would have."""

    def scales(
        self, amax: Tensor, element: NumberFormat, *, tensor_amax: Tensor | None = None, dtype: torch.dtype
    ) -> Scales:
        return TwoLevel.scales(self, amax / 2, element, tensor_amax=tensor_amax, dtype=dtype)


class Doubled(Hadamard):
    def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
        return 2 * Hadamard.left(self, a)

    def output(self, y: Tensor, stats: Tensor | None = None) -> Tensor:
        return y / 2


def linear_spec(operand: OperandSpec, transform: Hadamard | None = None) -> LinearSpec:
    gemm = GemmSpec(a=operand, b=operand, transform=transform)
    return LinearSpec(fprop=gemm, dgrad=gemm, wgrad=gemm)


FORMAT = "no kernel for e2m1, a format of its own: {}"
SCALE = "no kernel for scales by e4m3+fp32, a rule of its own: Halved"
TRANSFORM = "hadamard16 in plain torch: no kernel for a transform of its own, Doubled"
NV = {"tile": Tile(1, 16), "scale": TwoLevel()}
#: What a recipe brings -> its spec, and what plan.txt says of it.
FOREIGN = {
    "a subclass of the format": (linear_spec(OperandSpec(format=ODD, **NV)), FORMAT.format("OddGrid")),
    "a look-alike": (linear_spec(OperandSpec(format=LookAlike())), FORMAT.format("LookAlike")),
    "a look-alike in blocks": (
        linear_spec(OperandSpec(format=LookAlike(), tile=Tile(1, 32), scale=PowerOfTwo())),
        FORMAT.format("LookAlike"),
    ),
    "a format of its own": (linear_spec(OperandSpec(format=Bare(), **NV)), FORMAT.format("Bare")),
    "a table": (linear_spec(OperandSpec(format=TABLE, **NV)), "no kernel for e2m1, a table of values"),
    "a table in squares": (
        linear_spec(OperandSpec(format=TABLE, tile=Tile(32, 32), scale=PowerOfTwo(mode=Power.FLOOR))),
        "no kernel for e2m1, a table of values",
    ),
    "a subclass of the rule": (
        linear_spec(OperandSpec(format=E2M1, tile=Tile(1, 16), scale=Halved())),
        SCALE,
    ),
    "a subclass of the transform": (
        linear_spec(OperandSpec(format=E2M1, **NV), Doubled()),
        TRANSFORM,
    ),
}


def trained(spec: LinearSpec, backend: str) -> tuple[str, list[Tensor]]:
    """What plan.txt says, and outputs, gradients and weights of three steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    recipe = Recipe(rules=(Rule(kind=nn.Linear, path=".*", make=quantized(spec)),))
    plan = apply(recipe, model, tokens=32, backend=backend)
    seen: list[Tensor] = []
    for step in range(3):
        plan.begin_step(step, 32 * step)
        x = torch.randn(32, 64, requires_grad=True)
        y = model(x)
        y.square().mean().backward()
        assert x.grad is not None
        with torch.no_grad():
            for weight in model.parameters():
                assert weight.grad is not None
                weight.sub_(0.1 * weight.grad)
                seen.append(weight.clone())
                weight.grad = None
        plan.end_step()
        seen += [y.detach(), x.grad]
    return str(plan), seen


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_recipes_own_kind_is_computed_as_it_says(kind: str) -> None:
    spec, reason = FOREIGN[kind]
    plan, ours = trained(spec, "auto")
    assert plan.count(reason) == 3, plan
    assert all(map(torch.equal, ours, trained(spec, "reference")[1]))


@pytest.mark.parametrize("kind", [kind for kind in FOREIGN if "transform" not in kind])
@pytest.mark.parametrize("backend", ["cpu", "triton", "scaled_mm"])
def test_kernels_refuse_what_they_do_not_know(monkeypatch: pytest.MonkeyPatch, kind: str, backend: str) -> None:
    spec, reason = FOREIGN[kind]
    monkeypatch.setattr(triton, "runs_on", lambda device: True)
    with pretend(monkeypatch, 100), pytest.raises(ValueError, match=f"{re.escape(reason)}$"):
        choose(spec.fprop, (32, 32, 32), CPU, backend)


def test_a_format_in_the_place_of_a_scale_is_refused_too() -> None:
    block = OddGrid(
        name="e4m3", bits=8, exponent_bits=4, mantissa_bits=3, min_exponent=-6, max=448.0, dtype=E4M3.dtype, nan=0x7F
    )
    spec = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel(block=block))
    reason = "no kernel for scales by e4m3+fp32, in e4m3, a format of its own: OddGrid"
    assert find(spec, spec, 100) == reason
    assert reason in str(choose(GemmSpec(a=spec), (None, 8, 8), CPU))
    assert choose(GemmSpec(a=spec), (None, 8, 8), CPU).backend.name == "reference"


@pytest.mark.parametrize("kind", FOREIGN)
def test_quantizers_that_are_asked_all_the_same_do_as_it_says(kind: str) -> None:
    gemm = FOREIGN[kind][0].fprop
    assert gemm.a is not None
    x = torch.randn(32, 48)
    for quantizer, of in itertools.product(QUANTIZERS, (x, x.mT.contiguous().mT)):
        made = quantizer.cast(of, Cast(spec=gemm.a, transform=gemm.transform))
        assert isinstance(made, Quantized)
        plain = quantize(of if gemm.transform is None else gemm.transform.left(of), gemm.a)
        assert torch.equal(made.codes, plain.codes)
        assert torch.equal(made.scales, plain.scales)
        assert all(map(torch.equal, quantizer.operand(made)[:1], operand(plain)[:1]))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_foreign_transform_is_not_taken_for_its_parent(backend: str) -> None:
    quantizer = next(quantizer for quantizer in QUANTIZERS if quantizer.name == backend)
    x = torch.randn(32, 48)
    assert torch.equal(quantizer.transformed(Doubled(), x, left=True), 2 * Hadamard().left(x))


def test_operands_of_unknown_formats_are_in_fp32() -> None:
    """BF16 would be a claim about values that nobody has seen."""
    for spec in (OperandSpec(format=LookAlike()), OperandSpec(format=Bare()), OperandSpec(format=ODD, **NV)):
        assert operand(quantize(torch.randn(8, 32), spec))[0].dtype == torch.float32
    assert operand(quantize(torch.randn(8, 32), OperandSpec(format=E2M1)))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("fmt", [exmy(3, 0, ieee=False), Integer(bits=16)], ids=str)
def test_known_types_of_shapes_that_kernels_do_not_know(monkeypatch: pytest.MonkeyPatch, fmt: NumberFormat) -> None:
    """They refuse, and give the reference's bits to whoever asks all the same."""
    gemm = GemmSpec(a=OperandSpec(format=fmt))
    monkeypatch.setattr(triton, "runs_on", lambda device: True)
    for backend in ("cpu", "triton"):
        with pytest.raises(ValueError, match=f"no kernel for {fmt}$"):
            choose(gemm, (32, 32, 32), CPU, backend)
    assert choose(gemm, (None, 8, 8), CPU).backend.name == "reference"
    monkeypatch.undo()
    assert gemm.a is not None
    x = torch.randn(32, 48)
    for quantizer in QUANTIZERS:
        made = quantizer.cast(x, Cast(spec=gemm.a))
        assert isinstance(made, Quantized)
        assert torch.equal(made.codes, quantize(x, gemm.a).codes)
        assert all(map(torch.equal, quantizer.operand(made), operand(quantize(x, gemm.a))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fmt", "why"),
    [(E4M3, None), (TABLE, None), (replace(TABLE, values=(0.0, 1 / 3, 1.0), name="thirds"), "thirds"), (ODD, "e2m1")],
    ids=["known", "table", "thirds", "subclass"],
)
def test_codes_are_gathered_only_where_bf16_holds_their_values(fmt: NumberFormat, why: str | None) -> None:
    """A weight comes as BF16 values, which have the codes back when they are rounded."""
    gemm = GemmSpec(a=OperandSpec(format=E4M3), b=OperandSpec(format=fmt))
    spec = LinearSpec(fprop=gemm, dgrad=replace(gemm, b=replace(gemm.b, source=Source.QUANTIZED)))  # type: ignore[type-var]
    model = nn.Sequential(nn.Linear(64, 48))
    apply(Recipe(rules=(Rule(kind=nn.Linear, path=".*", make=quantized(spec)),)), model, tokens=32)
    found = model[0].plan.weight_once
    assert (
        found == gemm.b
        if why is None
        else found == f"BF16 is not known to hold the values of {why}, as which codes are gathered"
    )


def test_four_over_six_is_for_the_format_and_not_for_its_name() -> None:
    with pytest.raises(ValueError, match="four over six is for e2m1"):
        OperandSpec(format=ODD, tile=Tile(1, 16), scale=FourOverSix(error=Error.MAE))
