"""A layer of a recipe's own: what it quantizes, when, with which noise and amaxes, and what linears take of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from narrowgauge.precision import Plan, apply
from narrowgauge.precision.backends import Cast
from narrowgauge.precision.backends.cpu.quantizer import Cpu
from narrowgauge.precision.backends.reference import Reference
from narrowgauge.precision.formats import E2M1, E4M3, E5M2, Integer
from narrowgauge.precision.hooks import RollAmax
from narrowgauge.precision.layer import Layer
from narrowgauge.precision.linear import quantized
from narrowgauge.precision.noise import Noise, base_key, step_key
from narrowgauge.precision.packing import values
from narrowgauge.precision.probe import Probe
from narrowgauge.precision.quantize import dequantize, quantize
from narrowgauge.precision.recipe import Keep, Phase, Recipe, Rule, block_linears, keep
from narrowgauge.precision.scaling import Current, Delayed, PowerOfTwo, Tile, TwoLevel
from narrowgauge.precision.schedule import Span
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding, Source
from narrowgauge.precision.transforms import Hadamard
from test_linear import Meeting, samples
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 32
TENSOR8 = OperandSpec(format=E4M3)
GROUPS = OperandSpec(format=E4M3, tile=Tile(1, 16))
RANDOM = replace(GROUPS, rounding=Rounding.STOCHASTIC)
MX8 = OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())
SAVED, GRAD, OUT, OUT_T = "saved.x", "dy", "out", "out, transposed"


class Square(torch.autograd.Function):
    """y = x^2 with x as it was saved, and dy as it was quantized, in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Any) -> Tensor:
        at.save(ctx, at.quantized(SAVED, x) if at.narrow else x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.at.saved(ctx)
        if ctx.at.narrow:
            x, dy = (values(q).view(dy.shape) for q in (x, ctx.at.quantized(GRAD, dy)))
        return (2 * x * dy).bfloat16(), None


class Squared(Layer):
    def __init__(self, saved: OperandSpec = GROUPS, grad: OperandSpec = RANDOM, **out: OperandSpec) -> None:
        names = {"out": OUT, "turned": OUT_T}
        outputs = {names[name]: spec for name, spec in out.items()}
        super().__init__({SAVED: saved, GRAD: grad, **outputs}, handed_on=list(outputs))

    def forward(self, x: Tensor) -> Tensor:
        at = self.at(x)
        y = Square.apply(x, at)
        for name in self.handed_on if at.narrow else ():
            turned = name == OUT_T
            at.hand_on(y, at.quantized(name, y.flatten(0, -2).mT if turned else y), transposed=turned)
        return y


class Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


def model_of(blocks: int = 1) -> nn.Module:
    torch.manual_seed(0)

    def block() -> nn.Module:
        linears = {name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("q_proj", "k_proj")}
        return nn.ModuleDict({"act": Activation(), **linears})

    return nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(blocks))}).bfloat16()


def rule_of(make: Callable[[], Layer] = Squared, **more: Any) -> Rule:
    return Rule(kind=Activation, path=r".*act", make=lambda module, path: make(), **more)


def plan_of(make: Callable[[], Layer] = Squared, linears: LinearSpec | None = None, **more: Any) -> Plan:
    rules = (rule_of(make), *([] if linears is None else [block_linears(linears)]))
    recipe = {name: more.pop(name) for name in ("hooks", "schedule") if name in more}
    return apply(Recipe(rules=rules, **recipe), model_of(), seed=3, **more)


def gradient(module: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    module(leaf).backward(dy)
    assert leaf.grad is not None
    return leaf.grad


def noise_of(name: str, step: int, first_row: int) -> Noise:
    return Noise(key=step_key(base_key(3, f"layers.0.act: {name}", 0), step), row_offset=first_row)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_is_saved_and_what_comes_back_is_quantized_by_its_spec(backend: str) -> None:
    """With the noise of its rows in the data, whoever quantizes; and not in high precision, nor in such a phase."""
    phase = Phase(span=Span(start=5, end=6))
    plan = plan_of(schedule=(phase, Phase(span=Span(start=6, end=7), gemms=("dgrad", "wgrad"))), backend=backend)
    layer, x, dy = plan.model.get_submodule("layers.0.act"), samples(4, 6, WIDTH), samples(4, 6, WIDTH, seed=2)
    plan.begin_step(2, 0)
    plan.begin_micro(10, 4)
    near = dequantize(quantize(x.flatten(0, 1), GROUPS)).view(x.shape)
    rough = dequantize(quantize(dy.flatten(0, 1), RANDOM, noise=noise_of(GRAD, 2, 60))).view(x.shape)
    expected, exact = (2 * near * rough).bfloat16(), (2 * x * dy)
    got = gradient(layer, x, dy)
    assert torch.equal(got, expected)
    assert not torch.equal(got, exact)
    plan.begin_micro(12, 2)  # half of it, as another rank or micro-batch has it
    assert torch.equal(gradient(layer, x[2:], dy[2:]), expected[2:])
    with plan.high_precision():
        assert torch.equal(gradient(layer, x, dy), exact)
    for step, plain in ((5, True), (6, False), (7, False)):
        plan.begin_step(step, 10)
        assert torch.equal(gradient(layer, x, dy), exact) is plain
    who = "cpu" if backend == "auto" else "reference"
    lines = "layers.0.act                                 Squared\n    saved.x: e4m3/1x16/fp32"
    assert f"{lines}  [{who}]\n    dy: {RANDOM}  [{who}]\n" in str(plan)
    with torch.no_grad():
        layer.train()(x)
        plan.model.get_submodule("layers.0.q_proj").weight.add_(1.0)
    layer(x)


def test_recomputed_compiled_and_copied_it_is_the_same() -> None:
    plan = plan_of(lambda: Squared(replace(TENSOR8, amax=Delayed(history=2)), RANDOM), hooks=(RollAmax(),))
    layer, x, dy = plan.model.get_submodule("layers.0.act"), samples(4, 6, WIDTH), samples(4, 6, WIDTH, seed=2)
    plan.begin_step(1, 4)
    ways: list[Callable[[Tensor], Tensor]] = [
        layer,
        lambda x: checkpoint(layer, x, use_reentrant=False),
        torch.compile(layer),
        copy.deepcopy(layer),
    ]
    assert ways[-1].amaxes._linear is ways[-1]  # type: ignore[attr-defined]
    results = [gradient(way, x, dy) for way in ways]  # type: ignore[arg-type]
    assert all(torch.equal(result, results[0]) for result in results)
    assert layer.amax_history[0].tolist() == ways[-1].amax_history[0].tolist() == [float(x.abs().max())]


def test_delayed_amaxes_are_of_earlier_steps() -> None:
    plan = plan_of(lambda: Squared(replace(TENSOR8, amax=Delayed(history=2)), GROUPS), hooks=(RollAmax(),))
    layer, x = plan.model.get_submodule("layers.0.act"), samples(4, 6, WIDTH)
    dy = torch.ones_like(x)
    assert plan.state_tensors().keys() == {"layers.0.act.amax_history", "layers.0.act.amax_held"}
    held = 448.0  # a scale of 1, as at the start
    for step, size in enumerate((1.0, 0.25, 4.0)):
        plan.begin_step(step, 0)
        codes = quantize(x.flatten(0, 1) * size, replace(TENSOR8), amax=torch.tensor(held))
        expected = (2 * dequantize(codes).view(x.shape)).bfloat16()
        assert torch.equal(gradient(layer, x * size, dy), expected)
        plan.end_step()
        held = max(float((x * s).abs().max()) for s in (1.0, 0.25, 4.0)[max(0, step - 1) : step + 1])
        assert float(layer.amax_held) == held
    layer.eval()(x * 100)
    assert float(layer.amax_history[0]) == 0.0
    plan.reset_state()
    assert float(layer.amax_held) == 0.0


def test_amaxes_of_a_step_are_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(TENSOR8, amax=Current(step=True))
    x, dy = samples(4, 6, WIDTH) * torch.arange(1, 5)[:, None, None], samples(4, 6, WIDTH, seed=2)

    def part(which: slice) -> list[Tensor]:
        plan = plan_of(lambda: Squared(spec, spec))
        plan.begin_step(0, which.start)
        return [gradient(plan.model.get_submodule("layers.0.act"), x[which], dy[which])]

    wanted = part(slice(0, 4))[0]
    meeting = Meeting(monkeypatch)
    first, second = meeting.each(lambda rank: part(slice(2 * rank, 2 * rank + 2)))
    assert meeting.met == 2
    assert torch.equal(torch.cat((first[0], second[0])), wanted)


LINEARS = {
    "as they are": LinearSpec(
        fprop=GemmSpec(a=TENSOR8, b=TENSOR8),
        wgrad=GemmSpec(a=TENSOR8, b=replace(TENSOR8, source=Source.QUANTIZED)),
    ),
    "both ways": LinearSpec(fprop=GemmSpec(a=MX8, b=MX8), wgrad=GemmSpec(a=MX8, b=MX8)),
    "two levels": LinearSpec(fprop=GemmSpec(a=OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel()))),
}
OUTPUTS: dict[str, dict[str, Any]] = {
    "as they are": {"out": TENSOR8},
    "both ways": {"out": MX8, "turned": MX8},
    "two levels": {"out": LINEARS["two levels"].fprop.a},
}


class Counting:
    """How often x was quantized, and which codes are kept for backward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.casts = 0
        for kind in (Cpu, Reference):
            monkeypatch.setattr(kind, "cast", self._counted(kind.cast))

    def _counted(self, cast: Callable[..., Any]) -> Callable[..., Any]:
        def counted(quantizer: Any, x: Tensor, how: Cast) -> Any:
            self.casts += 1
            return cast(quantizer, x, how)

        return counted


def steps_of(plan: Plan, x: Tensor) -> list[Tensor]:
    """What two linears that read the layer's output give, and all gradients."""
    block, leaf = plan.model.get_submodule("layers.0"), x.clone().requires_grad_()
    plan.model.zero_grad()
    plan.begin_step(1, 0)
    h = block["act"](leaf)
    y = [block[name](h) for name in ("q_proj", "k_proj")]
    sum(one.square().sum() for one in y).backward()
    return [*(one.detach() for one in y), leaf.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", list(LINEARS))
def test_linears_take_codes_that_are_handed_on(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what they do without, with as many quantizations less as there are sorts of codes."""
    x = samples(2, 16, WIDTH)
    results, casts = [], []
    for outputs in ({}, OUTPUTS[name]):
        plan = plan_of(lambda outputs=outputs: Squared(**outputs), LINEARS[name], backend=backend)
        with monkeypatch.context() as patch:
            counting = Counting(patch)
            results.append(steps_of(plan, x))
            casts.append(counting.casts)
    assert all(map(torch.equal, *results))
    assert casts[0] == casts[1]  # the layer's own in place of those of the linears, which share theirs
    # The very codes of the layer are among what the linears computed of its output.
    plan = plan_of(lambda: Squared(**OUTPUTS[name]), LINEARS[name], backend=backend)
    layer, linear = (plan.model.get_submodule(f"layers.0.{path}") for path in ("act", "q_proj"))
    y = layer(x)
    shared = linear.context.shared.operands_of(y)
    q = linear.context.shared.handed_on(shared, OUTPUTS[name]["out"], False)
    assert torch.equal(q.codes, quantize(y.flatten(0, 1), OUTPUTS[name]["out"]).codes)
    linear(y)
    assert any(operand is q for operand in shared.values())


def test_codes_by_another_spec_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where a transform comes first, where noise or other amaxes are wanted, or after the output was written to."""
    x = samples(2, 16, WIDTH)
    others = [
        GemmSpec(a=GROUPS),
        GemmSpec(a=replace(TENSOR8, format=E5M2)),
        GemmSpec(a=TENSOR8, transform=Hadamard()),
        GemmSpec(a=replace(TENSOR8, rounding=Rounding.STOCHASTIC)),
        GemmSpec(a=replace(TENSOR8, amax=Delayed(history=2))),
        GemmSpec(),
    ]
    for gemm in others:
        spec = LinearSpec(fprop=gemm)
        ours, alone = (steps_of(plan_of(make, spec), x) for make in (lambda: Squared(out=TENSOR8), Squared))
        assert all(map(torch.equal, ours, alone)), gemm
    plan = plan_of(lambda: Squared(out=TENSOR8), LinearSpec(fprop=GemmSpec(a=TENSOR8)))
    layer, linear = (plan.model.get_submodule(f"layers.0.{path}") for path in ("act", "q_proj"))
    y = layer(x)
    y.data.mul_(1.0)
    with torch.no_grad():
        y.mul_(3.0)
    assert torch.equal(linear(y), linear(y.clone()))
    compiled = torch.compile(plan.model.get_submodule("layers.0.q_proj"))
    y = layer(x)
    assert torch.equal(compiled(y), linear(y.clone()))


class Zeros(Squared):
    """Hands on codes that are all zero: who takes them gives the bias."""

    def forward(self, x: Tensor) -> Tensor:
        at = self.at(x)
        y = x + 0
        q = at.quantized(OUT, y)
        at.hand_on(y, replace(q, codes=torch.zeros_like(q.codes)))
        return y


def test_compiled_blocks_take_codes_that_are_handed_on() -> None:
    plan = plan_of(lambda: Zeros(out=TENSOR8), LinearSpec(fprop=GemmSpec(a=TENSOR8)))
    layer, linear = (plan.model.get_submodule(f"layers.0.{path}") for path in ("act", "q_proj"))
    block = nn.Sequential(layer, linear)
    plan.begin_step(0, 0)
    outputs = [way(samples(2, 16, WIDTH)).detach() for way in (block, torch.compile(block))]
    assert not outputs[0].any()
    assert torch.equal(*outputs)


def test_the_probe_counts_each_tensor_once() -> None:
    spec = LinearSpec(fprop=GemmSpec(a=TENSOR8))
    plan = plan_of(lambda: Squared(out=TENSOR8), spec)
    x = samples(2, 16, WIDTH)
    unwatched = steps_of(plan, x)
    layer = plan.model.get_submodule("layers.0.act")
    probe = Probe(plan, every=1)
    with probe.watching():
        assert all(map(torch.equal, steps_of(plan, x), unwatched))
        layer.eval()(x)
        layer.train()
        with torch.no_grad():
            layer(x)
    rows = {(row.module, row.slot): row for row in probe.rows()}
    own = {name: rows["layers.0.act", name] for name in (SAVED, GRAD, OUT)}
    assert {row.elements for row in own.values()} == {x.numel()}
    assert [row.format for row in own.values()] == [str(GROUPS), str(RANDOM), str(TENSOR8)]
    assert own[SAVED].amax == float(x.abs().max())
    assert own[OUT].mse == rows["layers.0.q_proj", "fprop.x"].mse > 0
    with probe.watching():
        plan.begin_step(1, 0)
        leaf = x.clone().requires_grad_()
        checkpoint(layer, leaf, use_reentrant=False).sum().backward()
    again = {(row.module, row.slot): row for row in probe.rows()}
    assert again["layers.0.act", SAVED].elements == x.numel()


def test_rules_of_several_kinds_go_in_order_and_keep_what_each_keeps() -> None:
    seen: list[str] = []

    def noted(name: str) -> Callable[..., nn.Module]:
        def make(module: nn.Module, path: str) -> nn.Module:
            seen.append(f"{name} {path} {type(module).__name__}")
            return quantized(LinearSpec(fprop=GemmSpec(a=GROUPS)))(module, path) if name == "linear" else Squared()

        return make

    rules = (
        Rule(kind=Activation, path=r".*act", make=noted("act"), keep=(Keep(first=1), Keep(path=r"layers\.2\.act"))),
        Rule(kind=nn.Linear, path=r".*q_proj", make=noted("linear"), keep=keep(last=1)),
        Rule(kind=Squared, path=r".*act", make=noted("later")),
    )
    plan = apply(Recipe(rules=rules), model_of(4))
    assert seen == [
        "act layers.1.act Activation",
        "act layers.3.act Activation",
        *(f"linear layers.{block}.q_proj Linear" for block in range(3)),
        "later layers.1.act Squared",
        "later layers.3.act Squared",
    ]
    assert [type(block["act"]).__name__ for block in plan.model["layers"]] == ["Activation", "Squared"] * 2
    assert plan.coverage.quantized == 0
    assert str(plan).count("saved.x: ") == 2
    with pytest.raises(ValueError, match=r"all 4 Activation in 4 blocks are to be kept .* \(first 9 of"):
        apply(Recipe(rules=(rule_of(keep=keep(first=9)),)), model_of(4))
    with pytest.raises(ValueError, match=r"to keep in high precision: path .* matches no Activation"):
        apply(Recipe(rules=(rule_of(keep=keep(paths=[r"layers\.7\.act"])),)), model_of(4))


def test_what_cannot_be_is_one_line() -> None:
    for arguments, message in (
        (
            {"saved": replace(GROUPS, source=Source.QUANTIZED)},
            "saved.x is quantized from what it is: its source must be",
        ),
        ({"out": RANDOM}, "out is handed on by .*: linears take codes that they would make themselves, without noise"),
        ({"out": replace(TENSOR8, amax=Delayed())}, "out is handed on by .* scaled by the amaxes of this tensor"),
        (
            {"saved": replace(TENSOR8, amax=Delayed(history=3)), "grad": replace(TENSOR8, amax=Delayed(history=4))},
            "one kind of amax history, not delayed3, delayed4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Squared(**arguments)
    with pytest.raises(ValueError, match=r"handed on: no tensor named 'outt' \(did you mean 'out'\?\): out"):
        Layer({"out": TENSOR8}, handed_on=["outt"])
    plan = plan_of(lambda: Squared(out=TENSOR8))
    layer, x = plan.model.get_submodule("layers.0.act"), samples(2, 16, WIDTH)
    with pytest.raises(ValueError, match=r"layers\.0\.act: codes of \[32, 32\] are not those of y \[4, 16, 32\]"):
        layer.at(x).hand_on(samples(4, 16, WIDTH), layer.at(x).quantized(OUT, x))
    with pytest.raises(
        ValueError, match=r"schedule \(steps 0 to 1\): no step can switch layers\.0\.act to another Squared"
    ):
        plan_of(schedule=(Phase(span=Span(start=0, end=2), rules=(rule_of(lambda: Squared(TENSOR8)),), name="other"),))
    own = plan_of(lambda: Squared(replace(GROUPS, format=Integer(bits=7))))
    assert "saved.x: int7/1x16/fp32  [reference (not cpu: no kernel for int7" in str(own)
