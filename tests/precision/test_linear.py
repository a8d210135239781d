"""Laws of the quantized linear, on the reference and on whatever backend this machine offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from narrowgauge.precision.amax import UNKNOWN
from narrowgauge.precision.apply import apply
from narrowgauge.precision.backends import ORDER, REFERENCE, quantize_by
from narrowgauge.precision.formats import BF16, E2M1, E4M3, E5M2, exmy
from narrowgauge.precision.linear import QuantLinear, quantized
from narrowgauge.precision.loading import load, names
from narrowgauge.precision.quantize import dequantize, quantize
from narrowgauge.precision.recipe import BLOCK_LINEARS, Phase, Recipe, Rule, keep
from narrowgauge.precision.scaling import Current, Delayed, Fp32, PowerOfTwo, Tile, TwoLevel, Unit
from narrowgauge.precision.schedule import Span
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding, Source
from narrowgauge.precision.transforms import Hadamard
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROWS, INS, OUTS = 64, 48, 80
TENSOR8 = OperandSpec(format=E4M3)
MX8 = OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())
NV4 = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())
# exmy may change nothing, and what smooths a SwiGLU needs one.
SMOOTH = ["smooth_swiglu", "fp8_full"]
RECIPES = [name for name in names() if name not in ("bf16", "fp16", "fp32", "exmy", *SMOOTH)]


def block_model(width: int = INS, out: int = OUTS, *, bias: bool = False, layers: int = 1) -> nn.Module:
    """layers.N.up_proj, with weights of a fixed seed."""
    torch.manual_seed(0)
    blocks = (nn.ModuleDict({"up_proj": nn.Linear(width, out, bias=bias)}) for _ in range(layers))
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)}).bfloat16()


def linear_of(spec: LinearSpec, *, bias: bool = False, **options: Any) -> QuantLinear:
    model = block_model(bias=bias)
    apply(Recipe(rules=(Rule(kind=nn.Linear, path=".*", make=quantized(spec)),)), model, **options)
    module = model.get_submodule("layers.0.up_proj")
    assert isinstance(module, QuantLinear)
    return module


def samples(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def run(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, dw, and db where there is one."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


def plain(weight: Tensor, bias: Tensor | None, x: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, weight, *([] if bias is None else [bias]))]
    y = F.linear(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("shape", [(ROWS,), (2, ROWS // 2), (2, 4, ROWS // 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_an_empty_spec_is_a_plain_linear(shape: tuple[int, ...], bias: bool) -> None:
    module = linear_of(LinearSpec(), bias=bias)
    x, dy = samples(*shape, INS), samples(*shape, OUTS, seed=2)
    assert all(map(torch.equal, run(module, x, dy), plain(module.weight, module.bias, x, dy)))


@pytest.mark.parametrize("shape", [(ROWS,), (2, ROWS // 2), (0, 3)])
def test_the_output_can_be_written_to_and_differentiated_once(shape: tuple[int, ...]) -> None:
    """As that of a plain linear, but that codes have no second derivative: it is refused, not wrong."""
    module = linear_of(LinearSpec(fprop=GemmSpec(a=TENSOR8, b=TENSOR8)))
    x = samples(*shape, INS).requires_grad_()
    y = module(x)
    expected = y.detach() + 1
    y += 1
    assert torch.equal(y, expected)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert dx.shape == x.shape
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("shape", [(6, 32), (48, 2), (3, 2, 32)])
def test_an_input_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    """Also where its elements would make whole rows."""
    module = linear_of(LinearSpec(fprop=GemmSpec(a=TENSOR8, b=TENSOR8)))
    with pytest.raises(ValueError, match=r"layers\.0\.up_proj takes 48 features; its input has shape \("):
        module(samples(*shape))


@pytest.mark.parametrize("slot", range(6))
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_slot_alone_changes_its_own_gemm(slot: int, backend: str) -> None:
    gemm = ("fprop", "dgrad", "wgrad")[slot // 2]
    spec = LinearSpec(**{gemm: GemmSpec(**{"ab"[slot % 2]: MX8})})
    module = linear_of(spec, bias=True, backend=backend)
    x, dy = samples(2, ROWS // 2, INS), samples(2, ROWS // 2, OUTS, seed=2)
    ours, exact = run(module, x, dy), plain(module.weight, module.bias, x, dy)
    same = [torch.equal(a, b) for a, b in zip(ours, exact, strict=True)]
    assert same == [gemm != "fprop", gemm != "dgrad", gemm != "wgrad", True]
    error = [float((a - b).float().norm() / b.float().norm()) for a, b in zip(ours, exact, strict=True)]
    assert max(error) < 0.05


GEMMS = [
    pytest.param(TENSOR8, id="tensor"),
    pytest.param(MX8, id="mx"),
    pytest.param(replace(MX8, tile=Tile(32, 32)), id="mx square"),
    pytest.param(NV4, id="nv"),
    pytest.param(OperandSpec(format=E5M2, tile=Tile(1, 128), scale=Fp32(pow2=True)), id="pow2 blocks"),
]


@pytest.mark.parametrize("spec", GEMMS)
@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_the_product_is_one_rounding_from_exact(spec: OperandSpec, size: float) -> None:
    """|y - exact| <= half a BF16 unit of |y|, and what float32 sums may lose."""
    for backend in ORDER:
        if backend.product.why_not(GemmSpec(a=spec, b=spec), (ROWS, OUTS, 256), torch.device("cpu")):
            continue
        a, b = samples(ROWS, 256).float() * size, samples(OUTS, 256, seed=2).float()
        qa, qb = (quantize_by(backend.quantizer, x.bfloat16(), spec) for x in (a, b))
        y = backend.product.gemm(qa, qb, bias=None, dtype=torch.bfloat16).double()
        wide = dequantize(qa).double(), dequantize(qb).double()
        exact, terms = wide[0] @ wide[1].mT, wide[0].abs() @ wide[1].abs().mT
        assert ((y - exact).abs() <= 2.0**-8 * exact.abs() * 1.001 + 2.0**-20 * terms).all()


def test_fp32_block_scales_take_fp32_products_and_say_so() -> None:
    spec = OperandSpec(format=E4M3, tile=Tile(1, 128), scale=Fp32())
    model = block_model()
    gemm = GemmSpec(a=spec, b=spec)
    rule = Rule(kind=nn.Linear, path=".*", make=quantized(LinearSpec(fprop=gemm)))
    plan = apply(Recipe(rules=(rule,)), model)
    assert "fp32 product" in str(plan)
    a, b = samples(ROWS, 256), samples(OUTS, 256, seed=2)
    qa, qb = quantize(a, spec), quantize(b, spec)
    y = REFERENCE.product.gemm(qa, qb, bias=None, dtype=torch.float32)
    torch.testing.assert_close(y, dequantize(qa) @ dequantize(qb).mT)


def delayed(history: int = 3) -> LinearSpec:
    x = OperandSpec(format=E4M3, amax=Delayed(history=history))
    dy = OperandSpec(format=E5M2, amax=Delayed(history=history))
    return LinearSpec(fprop=GemmSpec(a=x, b=x), dgrad=GemmSpec(a=dy, b=x), wgrad=GemmSpec(a=dy, b=x))


def test_delayed_scaling_by_hand() -> None:
    """Scale 1 at first, then that of the largest amax seen; forward alone writes slot 0."""
    module = linear_of(delayed())
    plan = apply(load("fp8_delayed", {"history": 3}), model := block_model())
    module = model.get_submodule("layers.0.up_proj")
    dy = samples(ROWS, OUTS, seed=2)
    scales = [448.0 / float(samples(ROWS, INS, seed=seed).abs().max()) for seed in range(3)]
    seen = []
    for step in range(3):
        plan.begin_step(step, 0)
        x = samples(ROWS, INS, seed=step)
        y, *_ = run(module, x, dy)
        held = float(module.amax_held[0])
        seen.append(held)
        spec = OperandSpec(format=E4M3)
        amaxes = (torch.tensor([h]) for h in module.amax_held[:2].tolist())
        qx, qw = (
            quantize(t, replace(spec, amax=Delayed()), amax=a) for t, a in zip((x, module.weight), amaxes, strict=True)
        )
        assert torch.equal(y, REFERENCE.product.gemm(qx, qw, bias=None, dtype=torch.bfloat16))
        assert float(module.amax_history[0, 0]) == float(x.abs().max())
        plan.end_step()
        assert float(module.amax_history[0, 0]) == 0.0
    assert seen[0] == 0.0
    assert seen[1:] == [448.0 / scales[0], max(448.0 / scales[0], 448.0 / scales[1])]


class Meta:
    """TransformerEngine's state of one tensor, by its own rule: slot 0 is staged; ``left`` is an autocast's exit."""

    def __init__(self, length: int, top: float) -> None:
        self.history, self.scale, self.top = [0.0] * length, 1.0, top

    def cast(self, x: Tensor) -> float:
        self.history[0] = max(self.history[0], float(x.float().abs().max()))
        return self.scale

    def left(self) -> None:
        amax = max(self.history)
        self.history = [0.0, *self.history[2:], self.history[0]][: len(self.history)]
        if amax > 0:
            self.scale = float(torch.tensor(self.top) / torch.tensor(amax))


@pytest.mark.parametrize("length", [1, 2, 3, 16])
def test_histories_that_roll_by_micro_batch_are_transformer_engines(length: int) -> None:
    """Two micro-batches a step: forward tensors move on when their autocast is left, gradients after backward."""
    plan = apply(load("fp8_delayed", {"history": length, "roll": "micro"}), model := block_model())
    module = model.get_submodule("layers.0.up_proj")
    metas = {"x": Meta(length, 448), "w": Meta(length, 448), "dy": Meta(length, 57344)}
    places = {column.tensor: place for place, column in enumerate(module.columns)}
    assert places.keys() == metas.keys()
    seen = set()
    for step in range(4):
        plan.begin_step(step, 0)
        for micro in range(2):
            plan.begin_micro(4 * micro, 4)
            number = 2 * step + micro
            size = 2.0 ** (3 * number % 8 - 3)  # rises and falls
            x, dy = samples(ROWS, INS, seed=number) * size, samples(ROWS, OUTS, seed=50 + number) / size
            operands = {"x": x, "w": module.weight.detach(), "dy": dy}
            for name, meta in metas.items():
                held = float(module.amax_held[places[name]])
                scale = float(torch.tensor(meta.top) / torch.tensor(held)) if held else 1.0
                assert scale == meta.cast(operands[name]), (name, number)
                seen.add((name, scale))
            y, *_ = run(module, x, dy)
            made = [
                quantize(
                    operands[name], OperandSpec(format=E4M3, amax=Delayed()), amax=module.amax_held[[places[name]]]
                )
                for name in ("x", "w")
            ]
            assert torch.equal(y, REFERENCE.product.gemm(*made, bias=None, dtype=torch.bfloat16))
            for meta in metas.values():
                meta.left()
        plan.end_step()
    for name, meta in metas.items():
        assert module.amax_history[:, places[name]].tolist() == meta.history
    assert len({scale for name, scale in seen if name == "x"}) > 2


def test_without_accumulation_histories_roll_alike() -> None:
    held = []
    for roll in ("step", "micro"):
        plan = apply(load("fp8_delayed", {"history": 3, "roll": roll}), model := block_model())
        module = model.get_submodule("layers.0.up_proj")
        for step in range(5):
            plan.begin_step(step, 0)
            plan.begin_micro(0, 4)
            run(module, samples(ROWS, INS, seed=step), samples(ROWS, OUTS, seed=step))
            plan.end_step()
        held.append([value.clone() for value in plan.state_tensors().values()])
    assert all(map(torch.equal, *held))


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_writes_no_state_and_high_precision_is_plain(recipe: str) -> None:
    model = block_model(layers=2)
    plan = apply(load(recipe, {}), model)
    module = model.get_submodule("layers.0.up_proj")
    before = {name: value.clone() for name, value in plan.state_tensors().items()}
    model.eval()
    x = samples(ROWS, INS)
    with torch.no_grad():
        quantized_y = module(x)
        with plan.high_precision():
            assert torch.equal(module(x), F.linear(x, module.weight))
    assert not torch.equal(quantized_y, F.linear(x, module.weight))
    assert all(torch.equal(value, before[name]) for name, value in plan.state_tensors().items())


@pytest.mark.parametrize("rows", [ROWS, INS])
@pytest.mark.parametrize("spec", GEMMS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_backward_keeps_of_its_own_is_read_as_it_was_written(spec: OperandSpec, rows: int, backend: str) -> None:
    """Fprop in another format, or none: wgrad has codes of its own; square tiles are seen through a transpose."""
    for first in (None, replace(spec, format=E5M2) if spec.format is E4M3 else None):
        module = linear_of(LinearSpec(fprop=GemmSpec(a=first), wgrad=GemmSpec(b=spec)), backend=backend)
        x, dy = samples(rows, INS), samples(rows, OUTS, seed=2)
        *_, dw = run(module, x, dy)
        expected = REFERENCE.product.gemm(dy.mT, quantize(x.mT, spec), bias=None, dtype=torch.bfloat16)
        assert float((dw - expected).float().norm()) <= 0.01 * float(expected.float().norm())


def test_forward_returns_to_high_precision_also_where_codes_were_reused() -> None:
    again = replace(TENSOR8, source=Source.QUANTIZED)
    spec = LinearSpec(
        fprop=GemmSpec(a=TENSOR8, b=TENSOR8), dgrad=GemmSpec(a=TENSOR8, b=again), wgrad=GemmSpec(a=again, b=again)
    )
    model = block_model()
    rule = Rule(kind=nn.Linear, path=".*", make=quantized(spec))
    plan = apply(Recipe(rules=(rule,), schedule=(Phase(span=Span(start=0.5, end=1), gemms=("fprop",)),)), model)
    module = model.get_submodule("layers.0.up_proj")
    x, dy = samples(ROWS, INS), samples(ROWS, OUTS, seed=2)
    before, exact = run(module, x, dy), plain(module.weight, None, x, dy)
    plan.begin_step(1, 0, 2)
    after = run(module, x, dy)
    assert torch.equal(after[0], exact[0])
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])
    assert "schedule: from 0.5 to 1 of the run: fprop in high precision" in str(plan)


@pytest.mark.parametrize("shape", [(4, 32), (4, 2, 16), (128,)])
def test_noise_goes_by_global_rows_whatever_the_shape(shape: tuple[int, ...]) -> None:
    """With the number of samples told, two micro-batches have the noise of one, also as a plain matrix."""
    sr = replace(MX8, rounding=Rounding.STOCHASTIC)
    module = linear_of(LinearSpec(fprop=GemmSpec(a=sr)))
    x = samples(*shape, INS)
    half = shape[0] // 2
    module.context.set(3, 8, 4)
    whole = module(x)
    module.context.set(3, 8, 2)
    first = module(x[:half])
    module.context.set(3, 10, 2)
    assert torch.equal(whole, torch.cat((first, module(x[half:]))))


class Meeting:
    """Ranks that run one after the other: each all-reduce(MAX) gives what the ranks of an earlier round had there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heard: list[list[Tensor]] = []
        self.said: list[Tensor] = []
        for name, value in (("is_initialized", True), ("get_world_size", 2)):
            monkeypatch.setattr(f"narrowgauge.precision.amax.dist.{name}", lambda value=value: value)
        monkeypatch.setattr("narrowgauge.precision.amax.dist.all_reduce", self.all_reduce)

    def all_reduce(self, x: Tensor, op: object) -> None:
        place = len(self.said)
        self.said.append(x.clone())
        for one in self.heard:
            torch.maximum(x, one[place], out=x)

    def each(self, work: Callable[[int], list[Tensor]]) -> list[list[Tensor]]:
        """What each of two ranks has of ``work`` when they meet."""
        results = []
        for heard in (False, True):
            results, rounds = [], []
            for rank in range(2):
                self.said = []
                results.append(work(rank))
                rounds.append(self.said)
            assert len(rounds[0]) == len(rounds[1])
            self.heard = rounds if not heard else []
        self.met = len(rounds[0])
        return results


@pytest.mark.parametrize(
    ("recipe", "args", "reduces"),
    [
        ("fp8_current", {}, 2),  # x, dy: wgrad reads their codes transposed
        ("fp8_rowwise", {"pow2": False}, 2),
        ("nvfp4", {}, 4),
        ("nvfp4", {"row_scaled_activations": True}, 3),
    ],
    ids=["tensor", "rows", "two_levels", "two_levels_of_rows"],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_with_the_amax_of_a_step_two_ranks_are_one(
    recipe: str, args: dict[str, Any], reduces: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal but for the order of sums, in float32; without it they are not. Evaluation asks no other rank."""
    x = torch.randn(8, 16, INS, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)[:, None, None]
    dy = torch.randn(8, 16, OUTS, generator=torch.Generator().manual_seed(1)) / torch.arange(1, 9)[:, None, None]
    own = {"keep_last": 0, "bf16_forward": 0} if recipe == "nvfp4" else {}

    def whole(amax: str, first: int, samples: int) -> list[Tensor]:
        model = block_model().float()
        plan = apply(load(recipe, {**own, **args, "amax": amax}), model, backend=backend)
        plan.begin_step(0, first)
        plan.begin_micro(first, samples)
        part = slice(first, first + samples)
        return run(model.get_submodule("layers.0.up_proj"), x[part], dy[part])

    wanted = whole("micro", 0, 8)
    assert all(map(torch.equal, wanted, whole("step", 0, 8)))
    meeting = Meeting(monkeypatch)
    for amax in ("step", "micro"):
        meeting.heard = []
        first, second = meeting.each(lambda rank, amax=amax: whole(amax, 4 * rank, 4))  # type: ignore[misc]
        assert meeting.met == (reduces if amax == "step" else 0)
        y, dx = (torch.cat(pair) for pair in zip(first[:2], second[:2], strict=True))
        errors = [
            float((ours - one).norm() / one.norm())
            for ours, one in zip((y, dx, first[2] + second[2]), wanted, strict=True)
        ]
        assert max(errors) < 1e-5 if amax == "step" else max(errors) > 1e-3, errors
    model = block_model()
    apply(load(recipe, {**own, **args, "amax": "step"}), model, backend=backend)
    meeting.said = []
    model.eval().get_submodule("layers.0.up_proj")(samples(ROWS, INS))
    assert not meeting.said


def test_what_is_not_finite_on_one_rank_is_so_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(monkeypatch)
    spec = replace(NV4, amax=Current(step=True))
    module = linear_of(LinearSpec(fprop=GemmSpec(a=spec)))
    x = [samples(ROWS, INS), samples(ROWS, INS)]
    x[1][3, 4] = torch.nan
    for y in meeting.each(lambda rank: [module(x[rank]).detach()]):
        assert bool(y[0].isnan().all())


@pytest.mark.parametrize(
    ("recipe", "tokens", "said"),
    [
        ("mxfp4", 200, [32]),
        ("mxfp4", 192, []),
        ("nvfp4", 200, [16]),
        ("mxfp8", 100, [32]),
        ("fp8_block", 192, [128]),
        ("fp8_rowwise", 33, []),
        ("fp8_current", 33, []),
    ],
)
def test_the_plan_says_where_a_micro_batch_cuts_blocks(recipe: str, tokens: int, said: list[int]) -> None:
    own = {"keep_last": 0} if recipe in ("mxfp4", "nvfp4") else {}
    plan = apply(load(recipe, own), block_model(), tokens=tokens)
    lines = [line for line in str(plan).splitlines() if "cuts blocks" in line]
    notes = [f"a micro-batch of {tokens} tokens cuts blocks of {size}: another has other scales]" for size in said]
    assert len(lines) == len(said)
    assert all(
        line.strip().startswith("wgrad: ") and line.endswith(note) for line, note in zip(lines, notes, strict=True)
    )


def test_gradients_are_those_of_the_whole_where_no_block_is_cut() -> None:
    """Blocks lie alike in every micro-batch that is whole blocks, and not where one is cut."""
    errors = []
    for tokens in (64, 50):
        model = block_model().float()
        apply(load("mxfp4", {"keep_last": 0, "stochastic": False}), model)
        module = model.get_submodule("layers.0.up_proj")
        x, dy = samples(2 * tokens, INS).float(), samples(2 * tokens, OUTS, seed=2).float()
        whole = run(module, x, dy)[2].clone()
        parts = run(module, x[:tokens], dy[:tokens])[2].clone() + run(module, x[tokens:], dy[tokens:])[2]
        errors.append(float((parts - whole).norm() / whole.norm()))
    assert errors[0] < 1e-5
    assert errors[1] > 1e-2


@pytest.mark.parametrize("roll", ["step", "micro"])
def test_a_skipped_step_leaves_no_amax(roll: str) -> None:
    model = block_model()
    plan = apply(load("fp8_delayed", {"roll": roll}), model)
    module = model.get_submodule("layers.0.up_proj")
    x, dy = samples(4, 32, INS), samples(4, 32, OUTS, seed=2)
    plan.begin_step(0, 0)
    run(module, x, dy)
    plan.end_step()
    before = [value.clone() for value in plan.state_tensors().values()]
    plan.begin_step(1, 0)
    for sample in (0, 4):
        plan.begin_micro(sample, 4)
        run(module, x * 1e20, dy)
    plan.end_step(applied=False)
    assert all(map(torch.equal, before, plan.state_tensors().values()))


def test_nothing_is_made_for_a_backward_pass_that_will_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    module = linear_of(LinearSpec(fprop=GemmSpec(a=MX8), wgrad=GemmSpec(b=MX8)), backend="reference")
    calls: list[tuple[int, ...]] = []
    real = type(REFERENCE.quantizer).cast

    def counted(self: Any, x: Tensor, *arguments: Any, **more: Any) -> Any:
        calls.append(tuple(x.shape))
        return real(self, x, *arguments, **more)

    monkeypatch.setattr(type(REFERENCE.quantizer), "cast", counted)
    with torch.no_grad():
        module(samples(ROWS, INS))
    assert calls == [(ROWS, INS)]
    module(samples(ROWS, INS))
    assert calls[1:] == [(ROWS, INS), (INS, ROWS)]


@pytest.mark.parametrize(
    ("recipe", "args", "message"),
    [
        ("mxfp4", {"stochastic": "off"}, r"stochastic='off' is no bool"),
        ("fp8_delayed", {"history": "abc"}, r"history='abc' is no int"),
        ("fp8_current", {"amax": "run"}, r"amax=run: one of micro, step"),
        ("fp8_delayed", {"roll": "batch"}, r"roll=batch: one of step, micro"),
        ("fp8_delayed", {"history": True}, r"history=True is no int"),
        ("fp8_delayed", {"history": 0}, r"\(history=0\): an amax history has at least one slot"),
        ("fp8_delayed", {"margin": -1}, r"\(margin=-1\): the margin"),
        ("fp8_delayed", {"keep_last": float("nan")}, r"keep_last=nan is no float"),
        ("fp8_delayed", {"keep_paths": "abc"}, r"keep_paths='abc' is no .*Sequence"),
        ("fp8_delayed", {"keep_paths": ["["]}, r"keep_paths='\[': not a regular expression"),
        ("mxfp8", {"block": 16.5}, r"block=16.5 is no int"),
        ("mxfp8", {"block": 0}, r"\(block=0\): the inner extent"),
        ("nvfp4", {"signs": None}, r"signs=None is no str \| int"),
        ("nvfp4", {"hadamard": 7}, r"\(hadamard=7\): a Hadamard transform has a size"),
        ("nvfp4", {"bf16_forward": 2}, r"\(bf16_forward=2\): the part of a run"),
    ],
)
def test_a_wrong_argument_is_one_line_with_its_name(recipe: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(recipe, args)
    assert "\n" not in str(caught.value)


def test_a_recipe_with_nothing_left_to_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all 3 linears in 3 blocks are to be kept in high precision \(last 9 of"):
        apply(load("fp8_delayed", {"keep_last": 9}), block_model(layers=3))
    rule = Rule(kind=nn.Linear, path=".*", make=quantized(LinearSpec()), keep=keep(kinds=[nn.Linear]))
    with pytest.raises(ValueError, match=r"kept in high precision \(Linear\)"):
        apply(Recipe(rules=(rule,)), block_model())


def steps_of(
    recipe: str, step: Callable[[nn.Module, Tensor, Tensor], list[Tensor]], steps: int = 3, **options: Any
) -> list[list[Tensor]]:
    """Outputs of several steps under a recipe, and its state at the end."""
    model = block_model()
    plan = apply(load(recipe, {"keep_last": 0}), model, **options)
    module = model.get_submodule("layers.0.up_proj")
    result = []
    for number in range(steps):
        plan.begin_step(number, 4 * number)
        x, dy = samples(4, 32, INS, seed=number), samples(4, 32, OUTS, seed=10 + number) / 1024
        result.append(step(module, x, dy))
        plan.end_step()
    return [*result, list(plan.state_tensors().values())]


def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recompute_changes_nothing(recipe: str) -> None:
    def again(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        module.zero_grad()
        y = checkpoint(module, x, use_reentrant=False, preserve_rng_state=False)
        y.backward(dy)
        return [y.detach(), x.grad, module.weight.grad]

    assert same(steps_of(recipe, run), steps_of(recipe, again))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_backend_gives_the_same_bits(recipe: str) -> None:
    assert same(steps_of(recipe, run), steps_of(recipe, run, backend="reference"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_noise_depends_on_step_and_seed_alone(recipe: str) -> None:
    first = steps_of(recipe, run)
    assert same(first, steps_of(recipe, run))
    stochastic = recipe in ("mxfp4", "nvfp4")
    assert same(first[:1], steps_of(recipe, run, seed=1)[:1]) is not stochastic


def test_compiled_is_eager() -> None:
    def compiled(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
        return run(torch.compile(module), x, dy)

    for recipe in ("fp8_delayed", "nvfp4"):
        assert same(steps_of(recipe, run, 2), steps_of(recipe, compiled, 2))


@pytest.mark.parametrize("recipe", ["mxfp8", "mxfp4"])
def test_micro_batches_see_the_same_noise(recipe: str) -> None:
    """Rows of dx do not depend on what else is in the batch, and dw adds up."""
    model = block_model()
    plan = apply(load(recipe, {"keep_last": 0}), model)
    module = model.get_submodule("layers.0.up_proj")
    x, dy = samples(4, 32, INS), samples(4, 32, OUTS, seed=2)
    plan.begin_step(5, 100)
    whole = run(module, x, dy)
    parts = []
    for start in (0, 1, 3):
        stop = {0: 1, 1: 3, 3: 4}[start]
        plan.begin_micro(100 + start)
        parts.append(run(module, x[start:stop], dy[start:stop]))
    assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
    assert torch.equal(whole[1], torch.cat([part[1] for part in parts]))
    torch.testing.assert_close(
        whole[2].float(), sum(part[2].float() for part in parts), rtol=0.02, atol=0.2
    )  # sums of BF16 values


def test_amax_over_micro_batches_is_that_of_the_batch() -> None:
    model = block_model()
    plan = apply(load("fp8_delayed", {}), model)
    module = model.get_submodule("layers.0.up_proj")
    x, dy = samples(4, 32, INS), samples(4, 32, OUTS, seed=2)
    plan.begin_step(0, 0)
    run(module, x, dy)
    whole = module.amax_history[0].clone()
    module.reset_state()
    for part in range(4):
        run(module, x[part : part + 1], dy[part : part + 1])
    assert torch.equal(module.amax_history[0], whole)
    assert whole.tolist() == [float(t.abs().max()) for t in (x, module.weight, dy)]


def test_poisoned_buffers_change_nothing() -> None:
    clean = steps_of("fp8_delayed", run)
    model = block_model()
    plan = apply(load("fp8_delayed", {"keep_last": 0}), model)
    for value in plan.state_tensors().values():
        value.fill_(torch.nan)
    plan.reset_state()
    module = model.get_submodule("layers.0.up_proj")
    plan.begin_step(0, 0)
    x, dy = samples(4, 32, INS, seed=0), samples(4, 32, OUTS, seed=10) / 1024
    assert all(map(torch.equal, run(module, x, dy), clean[0]))


def test_an_unknown_amax_is_that_of_the_tensor_for_one_step() -> None:
    model, current = block_model(), block_model()
    plan = apply(load("fp8_delayed", {}), model)
    apply(load("fp8_current", {}), current)
    plan.forget()
    module, other = (m.get_submodule("layers.0.up_proj") for m in (model, current))
    assert module.amax_held.tolist() == [UNKNOWN] * 3
    x, dy = samples(4, 32, INS), samples(4, 32, OUTS, seed=2) / 1024
    plan.begin_step(7, 0)
    assert all(map(torch.equal, run(module, x, dy), run(other, x, dy)))
    plan.end_step()
    assert module.amax_held.tolist() == [float(t.abs().max()) for t in (x, module.weight, dy)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_amax_that_is_not_finite_leaves_no_trace(bad: float) -> None:
    model = block_model()
    plan = apply(load("fp8_delayed", {}), model)
    module = model.get_submodule("layers.0.up_proj")
    x, dy = samples(4, 32, INS), samples(4, 32, OUTS, seed=2)
    plan.begin_step(0, 0)
    run(module, x, dy)
    plan.end_step()
    held = module.amax_held.clone()
    broken = x.clone()
    broken[0, 0, 0] = bad
    y, *_ = run(module, broken, dy)
    assert bool(y.isfinite().all()) is (bad == torch.inf)  # infinities saturate, NaN is passed on
    plan.end_step()
    assert torch.equal(module.amax_held, held)
    assert bool(module.amax_history.isfinite().all())


class Both(nn.Module):
    """Two linears that read one tensor."""

    def __init__(self, *linears: nn.Module) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.linears]


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Of the tensors that backward keeps, parameters aside."""
    weights = {parameter.data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x.requires_grad_())
    return sum(kept.values())


@pytest.mark.parametrize(
    ("recipe", "bits"), [("fp8_delayed", 8), ("fp8_current", 8), ("mxfp8", 8.25), ("mxfp4", 4.25), ("nvfp4", 4.5)]
)
def test_backward_keeps_codes_and_scales_of_x_and_nothing_of_the_weight(recipe: str, bits: float) -> None:
    model = block_model()
    apply(load(recipe, {"keep_last": 0}), model)
    kept = saved_bytes(model.get_submodule("layers.0.up_proj"), samples(64, 32, INS))
    assert kept - 8 <= 64 * 32 * INS * bits / 8 <= kept


@pytest.mark.parametrize("recipe", RECIPES)
def test_siblings_share_the_codes_of_one_input(recipe: str) -> None:
    """As many bytes for two linears that read one tensor as for one; bit for bit as if each had made its own."""
    model = block_model(layers=2)
    plan = apply(load(recipe, {"keep_last": 0}), model)
    first, second = (model.get_submodule(f"layers.{block}.up_proj") for block in range(2))
    x, dy = samples(4, 32, INS), samples(4, 32, OUTS, seed=2) / 1024
    plan.begin_step(3, 0)
    leaf = x.clone().requires_grad_()
    together = [first(leaf), second(leaf)]
    sum((y * dy).sum() for y in together).backward()
    ours = [leaf.grad, first.weight.grad, second.weight.grad, *(buffer.clone() for buffer in model.buffers())]
    plan.reset_state()
    apart, gradients = [x.clone().requires_grad_() for _ in range(2)], []
    model.zero_grad()
    for linear, own in zip((first, second), apart, strict=True):
        (linear(own) * dy).sum().backward()
        gradients.append(linear.weight.grad)
    theirs = [apart[0].grad + apart[1].grad, *gradients, *model.buffers()]
    assert all(map(torch.equal, ours, theirs))
    one = saved_bytes(first, x.clone())
    both = saved_bytes(Both(first, second), x.clone())
    assert both == one


def test_a_tensor_that_was_written_to_is_not_taken_for_what_it_was() -> None:
    module = linear_of(LinearSpec(fprop=GemmSpec(a=MX8)))
    x = samples(ROWS, INS)
    with torch.no_grad():
        before = module(x)
        x.mul_(2)
        after = module(x)
    assert torch.equal(after, linear_of(LinearSpec(fprop=GemmSpec(a=MX8)))(x.clone()))
    assert not torch.equal(before, after)


def test_codes_can_be_reused() -> None:
    """QUANTIZED: dgrad reads the weight as fprop rounded it, wgrad x and dy as they were rounded before."""
    again = replace(MX8, source=Source.QUANTIZED)
    spec = LinearSpec(fprop=GemmSpec(a=MX8, b=MX8), dgrad=GemmSpec(a=MX8, b=again), wgrad=GemmSpec(a=again, b=again))
    module = linear_of(spec)
    x, dy = samples(ROWS, INS), samples(ROWS, OUTS, seed=2)
    _, dx, dw = run(module, x, dy)
    twice = [quantize(dequantize(quantize(t, MX8)).mT, MX8) for t in (module.weight, dy, x)]
    assert torch.equal(dx, REFERENCE.product.gemm(quantize(dy, MX8), twice[0], bias=None, dtype=torch.bfloat16))
    assert torch.equal(dw, REFERENCE.product.gemm(twice[1], twice[2], bias=None, dtype=torch.bfloat16))


def test_a_transform_of_wgrad_leaves_the_rest_alone_and_cancels() -> None:
    fine = OperandSpec(format=exmy(8, 7), scale=PowerOfTwo(), tile=Tile(1, 32))
    spec = LinearSpec(wgrad=GemmSpec(a=fine, b=fine, transform=Hadamard()))
    module = linear_of(spec)
    x, dy = samples(ROWS, INS), samples(ROWS, OUTS, seed=2)
    ours, exact = run(module, x, dy), plain(module.weight, None, x, dy)
    assert torch.equal(ours[0], exact[0])
    assert torch.equal(ours[1], exact[1])
    assert float((ours[2] - exact[2]).float().norm() / exact[2].float().norm()) < 0.01


@pytest.mark.parametrize(
    ("selectors", "left"),
    [
        ({"last": 0.15}, [4]),
        ({"last": 2}, [3, 4]),
        ({"first": 1, "last": 1}, [0, 4]),
        ({"first": 0.3}, [0, 1]),
        ({"paths": [r"layers\.[13]\..*"]}, [1, 3]),
        ({}, []),
    ],
)
def test_what_stays_in_high_precision(selectors: dict[str, Any], left: list[int]) -> None:
    model = block_model(layers=5)
    rule = Rule(
        kind=nn.Linear, path=BLOCK_LINEARS, make=quantized(LinearSpec(fprop=GemmSpec(a=MX8))), keep=keep(**selectors)
    )
    apply(Recipe(rules=(rule,)), model)
    kinds = [type(model.get_submodule(f"layers.{block}.up_proj")) for block in range(5)]
    assert [block for block, kind in enumerate(kinds) if kind is nn.Linear] == left


def test_a_selector_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"keep in high precision: path 'layers.9.*' matches no Linear"):
        apply(load("mxfp8", {"keep_paths": ["layers.9.up_proj"]}), block_model())
    with pytest.raises(ValueError, match=r"keep_last=1.5: a number of blocks, or a fraction"):
        load("mxfp8", {"keep_last": 1.5})
    with pytest.raises(ValueError, match=r"algo=newest: one of max, most_recent"):
        load("fp8_delayed", {"algo": "newest"})
    with pytest.raises(ValueError, match=r"no backend named 'refrence' \(did you mean 'reference'\?\)"):
        apply(load("mxfp8", {}), block_model(), backend="refrence")


def test_the_plan_names_operands_and_backends() -> None:
    plan = str(apply(load("nvfp4", {}), block_model(layers=2), backend="reference"))
    assert "fprop: e2m1/1x16/e4m3+fp32 x e2m1/16x16/e4m3+fp32  [reference]" in plan
    assert "wgrad: e2m1/1x16/e4m3+fp32/sr x e2m1/1x16/e4m3+fp32 [hadamard16]  [reference]" in plan
    assert "layers.1.up_proj" in plan
    assert "bfloat16 (torch)" in plan


def test_forward_returns_to_high_precision_for_the_last_part_of_a_run() -> None:
    model = block_model()
    plan = apply(load("nvfp4", {"keep_last": 0, "bf16_forward": 0.25}), model)
    module = model.get_submodule("layers.0.up_proj")
    x, dy = samples(ROWS, INS), samples(ROWS, OUTS, seed=2)
    exact = plain(module.weight, None, x, dy)
    for step in range(8):
        plan.begin_step(step, 0, 8)
        y, dx, dw = run(module, x, dy)
        assert torch.equal(y, exact[0]) is (step >= 6)
        assert not torch.equal(dx, exact[1])
        assert not torch.equal(dw, exact[2])
    plan.begin_step(7, 0)  # a run of unknown length
    assert not torch.equal(run(module, x, dy)[0], exact[0])


@pytest.fixture
def transformers_llama() -> Iterator[nn.Module]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("recipe", [*RECIPES, *SMOOTH])
def test_a_transformers_model_trains(transformers_llama: nn.Module, recipe: str) -> None:
    plan = apply(load(recipe, {}), transformers_llama)
    quantized_linears = [m for m in transformers_llama.modules() if isinstance(m, QuantLinear)]
    assert len(quantized_linears) == (14 if not recipe.endswith("4") else 7)
    assert type(transformers_llama.lm_head) is nn.Linear
    optimizer = torch.optim.AdamW(transformers_llama.parameters(), lr=1e-2)
    tokens = torch.arange(32).repeat(4, 1)
    losses = []
    for step in range(8):
        plan.begin_step(step, 0)
        loss = transformers_llama(input_ids=tokens, labels=tokens).loss
        loss.backward()
        plan.end_step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 1


def test_rounding_and_source_are_part_of_what_is_shared() -> None:
    """Stochastic codes of dgrad are not those of wgrad, unless the spec says so."""
    sr = replace(TENSOR8, rounding=Rounding.STOCHASTIC)
    module = linear_of(LinearSpec(dgrad=GemmSpec(a=sr), wgrad=GemmSpec(a=sr)))
    shared = linear_of(LinearSpec(dgrad=GemmSpec(a=sr), wgrad=GemmSpec(a=replace(sr, source=Source.QUANTIZED))))
    x, dy = torch.eye(ROWS, INS).bfloat16(), samples(ROWS, OUTS, seed=2)
    own, reused = run(module, x, dy), run(shared, x, dy)
    assert torch.equal(own[1], reused[1])
    assert not torch.equal(own[2], reused[2])


@pytest.mark.parametrize("bias", [False, True])
def test_slots_of_the_compute_dtype_change_nothing(bias: bool) -> None:
    """BF16 rounded to BF16: the whole path of codes, shared inputs and transposes gives a plain linear's bits."""
    same = OperandSpec(format=BF16, scale=Unit())
    gemm = GemmSpec(a=same, b=same)
    module = linear_of(LinearSpec(fprop=gemm, dgrad=gemm, wgrad=gemm), bias=bias)
    x, dy = samples(2, 32, INS), samples(2, 32, OUTS, seed=2)
    assert all(map(torch.equal, run(module, x, dy), plain(module.weight, module.bias, x, dy)))
