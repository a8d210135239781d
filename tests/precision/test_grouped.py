"""Quantized experts against a loop of quantized linears, with noise that follows a token wherever it is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from narrowgauge.models.grouped import GroupedLinear, Routing
from narrowgauge.precision import Plan, apply, load
from narrowgauge.precision.backends import ORDER, Cast, choose
from narrowgauge.precision.backends.cpu.quantizer import Cpu
from narrowgauge.precision.backends.triton.quantizer import Triton
from narrowgauge.precision.blocks import Experts
from narrowgauge.precision.estimator import ClipMask
from narrowgauge.precision.formats import E2M1, E4M3, E5M2, INT8
from narrowgauge.precision.grouped import QuantGroupedLinear
from narrowgauge.precision.linear import QuantLinear, quantized
from narrowgauge.precision.module import QuantizedModule
from narrowgauge.precision.noise import Noise, base_key, step_key
from narrowgauge.precision.operand_spec import Part, Split
from narrowgauge.precision.probe import Probe
from narrowgauge.precision.quantize import dequantize, quantize
from narrowgauge.precision.recipe import BLOCK_LINEARS, Phase, Recipe, Rule, block_linears, keep
from narrowgauge.precision.scaling import Fp32, Mean, PowerOfTwo, Quantile, Rms, Std, Tile, TwoLevel
from narrowgauge.precision.schedule import Span
from narrowgauge.precision.slots import OUTPUTS, SLOTS
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding, Source, values_of
from narrowgauge.precision.sums import by_name
from narrowgauge.precision.transforms import Hadamard, Outer
from test_linear import RECIPES, Meeting
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INS, OUTS = 48, 32
COUNTS = [5, 0, 18, 9]
PATH = "layers.0.up_proj"
ROW8 = OperandSpec(format=E4M3, tile=Tile(1, -1))
TENSOR8 = OperandSpec(format=E4M3)
MX8 = OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())
NV4 = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())
RANDOM8 = replace(ROW8, rounding=Rounding.STOCHASTIC)


def model_of(expert: Callable[[], nn.Module], names: tuple[str, ...] = ("up_proj",), layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({name: expert() for name in names}) for _ in range(layers)]
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)}).bfloat16()


def experts(num: int = len(COUNTS), ins: int = INS, outs: int = OUTS) -> Callable[[], GroupedLinear]:
    return lambda: GroupedLinear(num, ins, outs)


def routed(counts: list[int], ids: Tensor | None = None, total: int | None = None) -> Routing:
    ids = torch.arange(sum(counts)) if ids is None else ids
    return Routing(torch.tensor(counts), ids, total or max(len(ids), 1))


def rows(num: int, width: int, seed: int) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def run(module: nn.Module, x: Tensor, dy: Tensor, *more: Any) -> list[Tensor]:
    """y, dx, dw."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x, *more)
    y.backward(dy)
    return [y.detach(), x.grad, module.weight.grad]


def recipe_of(spec: LinearSpec, **more: Any) -> Recipe:
    return Recipe(rules=(block_linears(spec),), **more)


def loaded(name: str) -> Recipe:
    return load(name, {"keep_last": 0} if name in ("mxfp4", "nvfp4") else {})


def both_ways(
    recipe: Recipe, steps: int = 2, counts: list[int] = COUNTS, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """What experts give, and what a loop of linears gives, each at the place in the data where its rows lie."""
    model = model_of(experts(len(counts))).to(dtype)
    weights = model.get_submodule(PATH).weight.detach().clone()
    plan = apply(recipe, model, seed=3, **options)
    loop = []
    for weight in weights:
        one = model_of(lambda: nn.Linear(INS, OUTS, bias=False)).to(dtype)
        with torch.no_grad():
            one.get_submodule(PATH).weight.copy_(weight)
        loop.append(apply(recipe, one, seed=3, **options))
    ours, theirs = [], []
    for step in range(steps):
        x, dy = rows(sum(counts), INS, step).to(dtype), rows(sum(counts), OUTS, 9 + step).to(dtype) / 1024
        plan.begin_step(step, 7)
        ours.append(run(plan.model.get_submodule(PATH), x, dy, routed(counts)))
        plan.end_step()
        parts, first = [], 0
        for one, count in zip(loop, counts, strict=True):
            one.begin_step(step, 7 + first)
            part = slice(first, first + count)
            parts.append(run(one.model.get_submodule(PATH), x[part], dy[part]))
            one.end_step()
            first += count
        y, dx, dw = zip(*parts, strict=True)
        theirs.append([torch.cat(y), torch.cat(dx), torch.stack(dw)])
    ours.append([plan.model.get_buffer(name) for name, _ in plan.model.named_buffers()])
    theirs.append([torch.cat([*together], -1) for together in zip(*(one.model.buffers() for one in loop), strict=True)])
    return ours, theirs


def alike(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for one, two in zip(ours, theirs, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_experts_of_every_recipe_are_linears_of_their_rows(name: str) -> None:
    """One of them has no row: its gradient is zero, and its amaxes are those of its weight."""
    recipe = loaded(name)
    assert alike(*both_ways(recipe))
    ours, _ = both_ways(recipe)
    assert not ours[0][2][1].any()
    assert ours[0][2][2].any()


class Centred:
    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.float().mean(0, keepdim=True)
        return mean, x - mean

    def __str__(self) -> str:
        return "centred"


SPLIT = Split(by=Centred(), parts=(Part("mean", NV4), Part("rest", NV4)))
SPECS = {
    "blocks along rows": LinearSpec(wgrad=GemmSpec(a=MX8, b=MX8, transform=Hadamard())),
    "squares": LinearSpec(fprop=GemmSpec(a=replace(MX8, tile=Tile(32, 32)), b=replace(MX8, tile=Tile(32, 32)))),
    "noise of x and dy": LinearSpec(
        fprop=GemmSpec(a=RANDOM8),
        dgrad=GemmSpec(a=replace(RANDOM8, format=E5M2)),
        wgrad=GemmSpec(a=replace(NV4, rounding=Rounding.STOCHASTIC), b=values_of(RANDOM8)),
    ),
    "signs of the step": LinearSpec(
        fprop=GemmSpec(a=ROW8, b=ROW8, transform=Hadamard(size=-1, signs="none")),
        wgrad=GemmSpec(a=ROW8, b=ROW8, transform=Hadamard(signs="step")),
    ),
    "along tokens": LinearSpec(fprop=GemmSpec(a=NV4, b=NV4, transform=Outer(a=Hadamard(), b=Hadamard()))),
    "parts": LinearSpec(
        fprop=GemmSpec(a=SPLIT, b=NV4), dgrad=GemmSpec(a=SPLIT, b=NV4), wgrad=GemmSpec(a=SPLIT, b=SPLIT)
    ),
    "derivatives": LinearSpec(
        fprop=GemmSpec(a=NV4, b=NV4, transform=Hadamard()), dx=ClipMask(), dw=ClipMask(strict=True)
    ),
    "requantized": LinearSpec(
        fprop=GemmSpec(a=ROW8, b=ROW8),
        dgrad=GemmSpec(a=ROW8, b=replace(ROW8, source=Source.QUANTIZED)),
        wgrad=GemmSpec(a=replace(ROW8, source=Source.QUANTIZED), b=replace(ROW8, source=Source.QUANTIZED)),
    ),
    "a rule of sums": LinearSpec(fprop=GemmSpec(a=TENSOR8, b=TENSOR8, accumulate=by_name("h100_fp8"))),
    "integers": LinearSpec(
        fprop=GemmSpec(a=replace(TENSOR8, format=INT8), b=replace(TENSOR8, format=INT8)),
        wgrad=GemmSpec(a=replace(TENSOR8, format=INT8), b=replace(TENSOR8, format=INT8)),
    ),
    **{
        str(statistic): LinearSpec(fprop=GemmSpec(a=s, b=s), wgrad=GemmSpec(a=s, b=s))
        for statistic in (Mean(), Rms(), Std(), Quantile(q=0.9))
        for s in [OperandSpec(format=E2M1, tile=Tile(1, 16), scale=Fp32(), statistic=statistic)]
    },
}


@pytest.mark.parametrize("name", list(SPECS))
def test_what_a_spec_can_say_holds_for_experts(name: str) -> None:
    assert alike(*both_ways(recipe_of(SPECS[name]), steps=1))
    every = both_ways(recipe_of(SPECS[name]), steps=1, counts=[0, 0])[0][0]
    assert [list(tensor.shape) for tensor in every] == [[0, OUTS], [0, INS], [2, OUTS, INS]]
    assert not every[2].any()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_expert(bad: float, backend: str) -> None:
    model = model_of(experts())
    plan = apply(loaded("fp8_current"), model, backend=backend)
    plan.begin_step(0, 0)
    x, dy = rows(sum(COUNTS), INS, 0), rows(sum(COUNTS), OUTS, 1)
    clean = run(model.get_submodule(PATH), x, dy, routed(COUNTS))
    x[7, 3] = bad
    y, dx, dw = run(model.get_submodule(PATH), x, dy, routed(COUNTS))
    others = [*range(5), *range(23, 32)]
    assert torch.equal(y[others], clean[0][others])
    assert torch.equal(dx, clean[1])
    assert torch.equal(dw[[0, 1, 3]], clean[2][[0, 1, 3]])
    assert not torch.equal(dw[2], clean[2][2])


def test_an_empty_recipe_is_the_plain_module() -> None:
    model = model_of(experts())
    plain = copy.deepcopy(model.get_submodule(PATH))
    apply(recipe_of(LinearSpec()), model)
    module = model.get_submodule(PATH)
    assert isinstance(module, QuantGroupedLinear)
    x, dy = rows(sum(COUNTS), INS, 0), rows(sum(COUNTS), OUTS, 1)
    assert all(map(torch.equal, run(module, x, dy, routed(COUNTS)), run(plain, x, dy, routed(COUNTS))))
    assert module.state_dict().keys() == plain.state_dict().keys()
    apply(load("fp16"), fp16 := model_of(experts()).half())
    y = fp16.get_submodule(PATH)(x.half(), routed(COUNTS))
    assert torch.equal(y[:5], (x[:5].float() @ fp16.get_submodule(PATH).weight[0].float().mT).half())


IDENTITY = LinearSpec(fprop=GemmSpec(a=RANDOM8), dgrad=GemmSpec(a=replace(RANDOM8, format=E5M2)))


def passed(plan: Plan, x: Tensor, dy: Tensor, order: Tensor, counts: list[int], first: int, samples: int) -> Tensor:
    """x and dy as they were rounded [tokens, 2, width], by a module whose experts are identities; tokens in ``order``,
    which all lie in one micro-batch."""
    plan.begin_step(4, first)
    plan.begin_micro(first, samples)
    per_sample = 8
    local = order - first * per_sample
    y, dx, _ = run(plan.model.get_submodule(PATH), x[order], dy[order], routed(counts, local, samples * per_sample))
    return torch.stack((y, dx), 1)


def test_noise_goes_with_a_token_wherever_it_is_computed() -> None:
    """Whatever expert, neighbours, micro-batch or rank it has; and it is the noise of its place in the data."""
    width, tokens = 32, 48
    model = model_of(experts(3, width, width))
    with torch.no_grad():
        model.get_submodule(PATH).weight.copy_(torch.eye(width))
    plan = apply(recipe_of(IDENTITY), model, seed=11)
    x, dy = rows(tokens, width, 0), rows(tokens, width, 1)
    for slot, (of, spec) in enumerate(((x, RANDOM8), (dy, replace(RANDOM8, format=E5M2)))):
        noise = Noise(key=step_key(base_key(11, PATH, 2 * slot), 4))
        expected = dequantize(quantize(of, spec, noise=noise)).bfloat16()
        shuffled = torch.randperm(tokens, generator=torch.Generator().manual_seed(5))
        for order, counts in ((torch.arange(tokens), [20, 0, 28]), (shuffled, [3, 30, 15])):
            got = passed(plan, x, dy, order, counts, 0, 6)
            assert torch.equal(got[:, slot], expected[order])
        # Two micro-batches, or two ranks, of 2 and 4 samples; half of the tokens are dropped in the second.
        head, tail = torch.arange(16).flip(0), torch.arange(16, 48, 2)
        for order, first, samples in ((head, 0, 2), (tail, 2, 4)):
            got = passed(plan, x, dy, order, [10, 6, 0], first, samples)
            assert torch.equal(got[:, slot], expected[order])
    assert not torch.equal(expected, dy)


def test_noise_of_weights_goes_by_expert_and_row() -> None:
    spec = LinearSpec(fprop=GemmSpec(b=RANDOM8))
    plan = apply(recipe_of(spec), model_of(experts(3, 32, 16)), seed=2)
    plan.begin_step(1, 5)
    module = plan.model.get_submodule(PATH)
    y = module(torch.eye(32).bfloat16().repeat(3, 1), routed([32, 32, 32]))
    noise = Noise(key=step_key(base_key(2, PATH, 1), 1))
    expected = dequantize(quantize(module.weight.detach().flatten(0, 1), RANDOM8, noise=noise)).bfloat16()
    assert torch.equal(y.unflatten(0, (3, 32)).mT.flatten(0, 1), expected)


def test_two_ranks_with_the_amax_of_a_step_are_one_whatever_their_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They meet as often, though each has experts without rows."""
    x, dy = rows(32, INS, 0).float(), rows(32, OUTS, 1).float() / 1024
    x *= torch.arange(1, 33)[:, None]
    of_rank = {0: ([4, 0, 12], torch.arange(16)), 1: ([0, 8, 8], torch.arange(16, 32))}

    def part(amax: str, counts: list[int], which: Tensor) -> list[Tensor]:
        model = model_of(experts(3)).float()
        plan = apply(load("fp8_current", {"amax": amax}), model)
        plan.begin_step(0, 0)
        return run(model.get_submodule(PATH), x[which], dy[which], routed(counts))

    order = torch.tensor([*range(4), *range(16, 24), *range(4, 16), *range(24, 32)])
    wanted = part("micro", [4, 8, 20], order)
    meeting = Meeting(monkeypatch)
    first, second = meeting.each(lambda rank: part("step", *of_rank[rank]))
    assert meeting.met == 6  # x and dy of every expert
    for place in range(2):
        got = torch.cat((first[place], second[place]))[order]
        torch.testing.assert_close(got, wanted[place], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(first[2] + second[2], wanted[2], rtol=1e-4, atol=1e-6)


def state_after(name: str, call: Callable[..., list[Tensor]] = run, steps: int = 2) -> list[Tensor]:
    plan = apply(loaded(name), model_of(experts()))
    result = []
    for step in range(steps):
        plan.begin_step(step, 32 * step)
        x, dy = rows(sum(COUNTS), INS, step), rows(sum(COUNTS), OUTS, 9 + step) / 1024
        result += call(plan.model.get_submodule(PATH), x, dy, routed(COUNTS))
        plan.end_step()
    return [*result, *(tensor.clone() for tensor in plan.state_tensors().values())]


@pytest.mark.parametrize("name", ["fp8_delayed", "nvfp4"])
def test_recomputed_compiled_and_copied_experts_are_the_same(name: str) -> None:
    def again(module: nn.Module, x: Tensor, dy: Tensor, routing: Routing) -> list[Tensor]:
        x = x.clone().requires_grad_()
        module.zero_grad()
        y = checkpoint(module, x, routing, use_reentrant=False, preserve_rng_state=False)
        y.backward(dy)
        return [y.detach(), x.grad, module.weight.grad]

    def compiled(module: nn.Module, *arguments: Any) -> list[Tensor]:
        return run(torch.compile(module), *arguments)

    def copied(module: nn.Module, *arguments: Any) -> list[Tensor]:
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        twin = copy.deepcopy(module)
        result = run(twin, *arguments)
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
        assert all(expert.owner is twin for expert in twin.experts)
        for mine, its in zip(module.buffers(), twin.buffers(), strict=True):
            mine.copy_(its)
        return result

    def autocast(module: nn.Module, x: Tensor, dy: Tensor, routing: Routing) -> list[Tensor]:
        module.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, dx, dw = run(module, x.float(), dy, routing)
        module.bfloat16()
        for buffer in module.buffers():
            buffer.data = buffer.float()
        return [y, dx.bfloat16(), dw.bfloat16()]

    expected = state_after(name)
    for call in (again, compiled, copied):
        assert all(map(torch.equal, state_after(name, call), expected)), call
    assert all(map(torch.equal, state_after(name, autocast, steps=1)[:3], expected[:3]))


def saved_codes(modules: list[nn.Module], x: Tensor) -> int:
    """Bytes of all codes that are kept for backward."""
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:
            kept.append(tensor)
            sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for module in modules:
            module(x, routed(COUNTS))
    return sum(sizes.values())


def test_gate_and_up_share_the_codes_of_their_rows() -> None:
    for name in ("fp8_current", "fp8_delayed"):
        model = model_of(experts(), ("gate_proj", "up_proj"))
        plan = apply(loaded(name), model)
        gate, up = (model.get_submodule(f"layers.0.{name}") for name in ("gate_proj", "up_proj"))
        plan.begin_step(0, 0)
        leaf = rows(sum(COUNTS), INS, 0).requires_grad_()
        ours = [gate(leaf, routed(COUNTS)), up(leaf, routed(COUNTS))]
        assert all(map(torch.equal, ours, [m(leaf.clone(), routed(COUNTS)) for m in (gate, up)]))
        sum(y.sum() for y in ours).backward()
        one, both = (saved_codes(modules, leaf.detach().clone()) for modules in ([gate], [gate, up]))
        assert one == both == leaf.numel()
        # Rows that another routing deals out otherwise are not taken for these.
        other = [9, 0, 18, 5]
        assert torch.equal(up(leaf, routed(other)), up(leaf.clone(), routed(other)))


def test_rules_reach_experts_and_keep_them_as_they_do_linears() -> None:
    class Moe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(INS, 4, bias=False)
            self.experts = nn.ModuleDict({"up": GroupedLinear(4, INS, OUTS), "down": GroupedLinear(4, OUTS, INS)})

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"layers": nn.ModuleList(Moe() for _ in range(2)), "head": nn.Linear(INS, 8)})

    rule = block_linears(LinearSpec(fprop=GemmSpec(a=ROW8, b=ROW8)), keep(first=1, paths=[r".*router"]))
    plan = apply(Recipe(rules=(rule,)), moe := model())
    assert [path for path, module in moe.named_modules() if isinstance(module, QuantizedModule)] == [
        "layers.1.experts.up",
        "layers.1.experts.down",
    ]
    text = str(plan)
    assert (
        "layers.1.experts.up                          4 x 48 -> 32\n    fprop: e4m3/row/fp32 x e4m3/row/fp32  [" in text
    )
    assert "layers.0.experts.down                        4 x 32 -> 48  fprop, dgrad, wgrad: bfloat16 (torch)" in text
    size = 4 * INS * OUTS
    assert plan.coverage.quantized == 2 * size
    left = {(one.name, one.why): one.size for one in plan.coverage.left}
    assert left["linears to keep", "first 1 of the blocks"] == 3 * (2 * size + 4 * INS)
    assert left["wgrad of quantized linears", "in high precision by the recipe"] == 2 * size
    assert not plan.coverage.surprises

    # A rule for linears alone leaves them, and coverage says so; paths name them.
    linears = Recipe(rules=(Rule(kind=nn.Linear, path=".*router", make=quantized(LinearSpec())),))
    assert not any(isinstance(module, QuantGroupedLinear) for module in apply(linears, model()).model.modules())
    apart = (Rule(kind=Experts, path=BLOCK_LINEARS, make=quantized(LinearSpec(fprop=GemmSpec(a=MX8)))), *linears.rules)
    text = str(apply(Recipe(rules=apart), model()))
    assert text.count("fprop: e4m3/1x32/e8m0-rceil x -") == 4
    assert text.count("fprop: high precision") == 2
    plan = apply("mxfp8", moe := model(), paths=r".*experts\.up")
    assert sum(isinstance(module, QuantGroupedLinear) for module in moe.modules()) == 2
    with pytest.raises(ValueError, match=r"the model is itself a Linear"):
        apply("mxfp8", GroupedLinear(4, INS, OUTS))
    with pytest.raises(ValueError, match="quantized already"):
        apply("mxfp8", moe)


def test_phases_validation_and_state() -> None:
    phase = Phase(span=Span(start=1, end=2), gemms=("fprop", "wgrad"))
    other = Phase(span=Span(start=2, end=3), rules=(block_linears(LinearSpec(fprop=GemmSpec(a=ROW8))),), name="rows")
    model = model_of(experts())
    plain = copy.deepcopy(model.get_submodule(PATH))
    plan = apply(replace(loaded("fp8_delayed"), schedule=(phase, other)), model)
    module = model.get_submodule(PATH)
    x, dy = rows(sum(COUNTS), INS, 0), rows(sum(COUNTS), OUTS, 1)
    exact = run(plain, x, dy, routed(COUNTS))
    got = []
    for step in range(3):
        plan.begin_step(step, 0)
        got.append(run(module, x, dy, routed(COUNTS)))
        plan.end_step()
    assert [torch.equal(step[0], exact[0]) for step in got] == [False, True, False]
    assert [torch.equal(step[2], exact[2]) for step in got] == [False, True, True]
    # Measured in phases that do not read them, too; an expert without rows keeps what it had of x and dy.
    held = module.amax_held.view(len(COUNTS), -1)
    assert torch.equal(held[:, 1], plain.weight.abs().amax((1, 2)).float())
    starts = torch.tensor([0, *COUNTS]).cumsum(0)
    for tensor, column in ((x, 0), (dy, 2)):
        parts = [tensor[first:last] for first, last in pairwise(starts)]
        assert held[:, column].tolist() == [float(part.abs().max()) if len(part) else 0.0 for part in parts]
    assert plan.state_tensors()[f"{PATH}.amax_history"].shape == (1024, 12)
    with plan.high_precision():
        assert torch.equal(module(x, routed(COUNTS)), plain(x, routed(COUNTS)))
    before = [tensor.clone() for tensor in plan.state_tensors().values()]
    module.eval()(x * 100, routed(COUNTS))
    assert all(map(torch.equal, plan.state_tensors().values(), before))
    plan.reset_state()
    assert not any(tensor.any() for tensor in plan.state_tensors().values())
    assert isinstance(module.reads_weight, str)


def test_the_probe_adds_up_experts() -> None:
    """The sums of the probe of a loop, without a word on an expert without rows; nothing that is computed changes."""
    recipe = recipe_of(LinearSpec(fprop=GemmSpec(a=ROW8, b=ROW8), wgrad=GemmSpec(a=RANDOM8)))
    x, dy = rows(sum(COUNTS), INS, 0), rows(sum(COUNTS), OUTS, 1)

    def seen(plan: Plan, *more: Any, part: slice = slice(None)) -> tuple[dict[str, Any], list[Tensor]]:
        probe = Probe(plan, every=1)
        plan.begin_step(0, part.start or 0)
        with probe.watching():
            result = run(plan.model.get_submodule(PATH), x[part], dy[part], *more)
        return {row.slot: row for row in probe.rows()}, result

    plan = apply(recipe, model_of(experts()))
    plan.begin_step(0, 0)
    unwatched = run(plan.model.get_submodule(PATH), x, dy, routed(COUNTS))
    ours, watched = seen(plan, routed(COUNTS))
    assert all(map(torch.equal, watched, unwatched))
    assert tuple(ours) == SLOTS + OUTPUTS
    loop, first = [], 0
    for expert, count in enumerate(COUNTS):
        one = model_of(lambda: nn.Linear(INS, OUTS, bias=False))
        with torch.no_grad():
            one.get_submodule(PATH).weight.copy_(plan.model.get_submodule(PATH).weight[expert])
        loop.append(seen(apply(recipe, one), part=slice(first, first + count))[0])
        first += count
    for slot, row in ours.items():
        each = [rows[slot] for rows in loop]
        assert row.elements == sum(one.elements for one in each)
        assert row.mse == pytest.approx(sum((one.mse or 0) * one.elements for one in each) / row.elements, rel=1e-9)
        assert row.amax == max(one.amax for one in each)
        assert row.scale_max == max((one.scale_max for one in each if one.scale_max is not None), default=None)
    assert ours["fprop.x"].format == "e4m3/row/fp32"
    assert ours["fprop.x"].elements == sum(COUNTS) * INS

    plain, _ = seen(apply(load("bf16"), model_of(experts())), routed(COUNTS))
    assert plain["fprop.x"].elements == plain["dgrad.dy"].elements // OUTS * INS == sum(COUNTS) * INS
    assert plain["fprop.y"].relative_error is not None
    assert plain["fprop.y"].relative_error < 0.01


def test_who_computes_stands_in_the_plan() -> None:
    def refused(spec: LinearSpec, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            apply(recipe_of(spec), model_of(experts()))

    whole = GemmSpec(a=ROW8, b=ROW8, transform=Hadamard(size=-1, signs="none"))
    refused(LinearSpec(wgrad=whole), rf"{PATH}, wgrad: hadamard.* is of all rows of an expert")
    with pytest.raises(ValueError, match="Smooth-SwiGLU is not for experts"):
        apply("smooth_swiglu", model_of(experts(), ("gate_proj", "up_proj", "down_proj")))
    plan = apply(loaded("mxfp8"), model_of(experts()))
    with pytest.raises(ValueError, match=r"takes rows with a place each: .* shape \(3, 48\), with 2 places"):
        plan.model.get_submodule(PATH)(rows(3, INS, 0), routed([3], torch.arange(2)))
    with pytest.raises(ValueError, match="takes 48 features"):
        plan.model.get_submodule(PATH)(rows(3, 7, 0), routed([3]))


def test_native_products_and_kernels_without_noise_of_rows_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cpu, "takes_rows", False)
    text = str(apply(loaded("mxfp4"), model_of(experts())))
    assert text.count("cpu, dy rounded in plain torch: no kernel for the noise of routed rows]") == 2
    native = next(backend.product for backend in ORDER if backend.name == "scaled_mm")
    monkeypatch.setattr(type(native), "why_not", lambda *arguments: None)
    gemm, device = GemmSpec(a=TENSOR8, b=TENSOR8), torch.device("cpu")
    assert choose(gemm, (None, 32, 48), device).backend.name == "scaled_mm"
    choice = choose(gemm, (None, 32, 48), device, experts=True)
    assert choice.backend.name != "scaled_mm"
    assert "not scaled_mm: no native product over the rows of experts" in str(choice)
    x = rows(8, 32, 0)
    ids = torch.tensor([5, 1, 9, 2**40, 7, 0, 3, 30])
    noise = Noise(key=step_key(base_key(0, "a", 0), 1), row_offset=2**33, rows=ids)
    note = torch.zeros(1)
    got = Triton().cast(x, Cast(spec=RANDOM8, noise=noise, note=note, transform=Hadamard()))
    wanted = quantize(Hadamard().left(x), RANDOM8, noise=noise)
    assert torch.equal(got.codes, wanted.codes)
    assert float(note) == float(Hadamard().left(x).abs().max())
    assert Triton().cast_both(x, Cast(spec=RANDOM8, noise=(noise, noise))) is None
    assert not Triton.takes_rows


def test_a_checkpoint_has_the_histories_of_all_experts() -> None:
    plan = apply(loaded("fp8_delayed"), model_of(experts()))
    module = plan.model.get_submodule(PATH)
    assert isinstance(module, QuantGroupedLinear)
    assert not isinstance(module, QuantLinear)
    plan.begin_step(0, 0)
    run(module, rows(sum(COUNTS), INS, 0), rows(sum(COUNTS), OUTS, 1), routed(COUNTS))
    plan.end_step()
    state = {name: tensor.clone() for name, tensor in plan.state_tensors().items()}
    fresh = apply(loaded("fp8_delayed"), model_of(experts()))
    for name, tensor in fresh.state_tensors().items():
        tensor.copy_(state[name])
    results = []
    for one in (plan, fresh):
        one.begin_step(1, 32)
        results.append(
            run(one.model.get_submodule(PATH), rows(sum(COUNTS), INS, 2), rows(sum(COUNTS), OUTS, 3), routed(COUNTS))
        )
    assert all(map(torch.equal, *results))
