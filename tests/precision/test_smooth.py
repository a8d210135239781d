"""Smooth-SwiGLU: exact but for rounding, scales of this pass, the promised mending, and what is refused."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from narrowgauge.precision.apply import apply
from narrowgauge.precision.backends.reference import Reference
from narrowgauge.precision.estimator import ClipMask
from narrowgauge.precision.formats import E4M3
from narrowgauge.precision.linear import QuantLinear, quantized
from narrowgauge.precision.loading import load
from narrowgauge.precision.plan import Plan
from narrowgauge.precision.probe import Probe
from narrowgauge.precision.quantize import dequantize, quantize
from narrowgauge.precision.recipe import Recipe, Rule
from narrowgauge.precision.recipes.smooth_swiglu import fused
from narrowgauge.precision.recipes.smooth_swiglu.scales import FORMS, smooth, smoothed
from narrowgauge.precision.scaling import Unit
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Source
from narrowgauge.precision.swiglu import scales_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

HIDDEN, CHANNELS = 24, 40


@dataclass(frozen=True)
class AsItIs:
    """float32, rounded to nothing else."""

    name = "as it is"
    bits = 32
    max = math.inf
    dtype = torch.float32
    nan = math.nan
    scales_only = False
    significant_bits = 24

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return x.float()


EXACT = OperandSpec(format=AsItIs(), scale=Unit())
CURRENT8 = OperandSpec(format=E4M3)


class SwiGLU(nn.Module):
    gated_activation = "silu"

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, CHANNELS, bias=bias)
        self.up_proj = nn.Linear(HIDDEN, CHANNELS, bias=bias)
        self.down_proj = nn.Linear(CHANNELS, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def model_of(*, bias: bool = False, dtype: torch.dtype = torch.float32, layers: int = 1) -> nn.ModuleDict:
    """layers.N.mlp with weights of a fixed seed, of which one channel is large, and one dead."""
    torch.manual_seed(0)
    mlps = []
    for _ in range(layers):
        mlp = SwiGLU(bias)
        with torch.no_grad():
            mlp.gate_proj.weight[3] = mlp.up_proj.weight[3] = 30 * mlp.up_proj.weight[3]
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight[5] = 0
                if bias:
                    linear.bias[5] = 0
        mlps.append(nn.ModuleDict({"mlp": mlp}))
    return nn.ModuleDict({"layers": nn.ModuleList(mlps)}).to(dtype)


def over(spec: LinearSpec, form: str, *, pow2: bool = True) -> Recipe:
    base = Rule(kind=nn.Linear, path=r".*down_proj", make=quantized(spec))
    siblings = ("gate_proj", "up_proj")
    make = smooth(FORMS[form], pow2=pow2)
    return Recipe(rules=(base, Rule(kind=QuantLinear, path=".*", make=make, siblings=siblings)))


def spec_of(operand: OperandSpec) -> LinearSpec:
    gemm = GemmSpec(a=operand, b=operand)
    return LinearSpec(fprop=gemm, dgrad=gemm, wgrad=gemm)


def samples(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, and the gradients of all parameters."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


def mlp_of(model: nn.Module, block: int = 0) -> nn.Module:
    return model.get_submodule(f"layers.{block}.mlp")


def distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_rounding_it_is_the_plain_linear(form: str, pow2: bool, dtype: torch.dtype) -> None:
    """Operands in float32 as they are: all gradients are float64's, up to the rounding of the dtype."""
    model, exact = model_of(bias=True, dtype=dtype), model_of(bias=True, dtype=dtype).double()
    apply(over(spec_of(EXACT), form, pow2=pow2), model, backend="reference")
    x, dy = samples(2, 7, HIDDEN, dtype=dtype), samples(2, 7, HIDDEN, dtype=dtype, seed=2)
    errors = list(map(distance, run(mlp_of(model), x, dy), run(mlp_of(exact), x.double(), dy.double())))
    assert max(errors) < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("form", FORMS)
def test_powers_of_two_round_nothing(form: str) -> None:
    """The plain linear in high precision, in every gradient, but for the order of sums (MKL's goes by alignment)."""
    ours, plain = model_of(), model_of()
    apply(over(spec_of(EXACT), form), ours, backend="reference")
    apply(
        Recipe(rules=(Rule(kind=nn.Linear, path=r".*down_proj", make=quantized(spec_of(EXACT))),)),
        plain,
        backend="reference",
    )
    x, dy = samples(5, HIDDEN), samples(5, HIDDEN, seed=2)
    for one, other in zip(run(mlp_of(ours), x, dy), run(mlp_of(plain), x, dy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


def test_the_channel_form_by_hand() -> None:
    model = model_of()
    apply(over(spec_of(CURRENT8), "channel", pow2=False), model)
    mlp = mlp_of(model)
    down, h, dy = mlp.down_proj, samples(9, CHANNELS) * torch.logspace(-3, 3, CHANNELS), samples(9, HIDDEN, seed=2)
    d, w = h.abs().amax(0), mlp.down_proj.weight.detach()
    y, dh, dw = run(down, h, dy)

    def cast(x: Tensor) -> Tensor:
        return dequantize(quantize(x, CURRENT8)).double()

    assert distance(y, cast(h / d) @ cast(w * d).mT) < 1e-6
    assert distance(dh, cast(dy) @ cast(w)) < 1e-6
    assert distance(dw, cast(dy).mT @ cast(h / d) * d) < 1e-6


def test_the_token_form_by_hand() -> None:
    model = model_of()
    apply(over(spec_of(CURRENT8), "token", pow2=False), model)
    mlp = mlp_of(model)
    x = samples(9, HIDDEN) * torch.logspace(-1, 1, 9)[:, None]
    x[4] = 0  # 0 / 0 in the released code
    dy, w, seen = samples(9, HIDDEN, seed=2), mlp.down_proj.weight.detach(), {}
    mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.update(h=inputs[0].detach()))
    mlp.down_proj.register_full_backward_hook(lambda module, gradients, _: seen.update(dh=gradients[0]))
    y, dx, *_, dw = run(mlp, x, dy)
    h, d = seen["h"], mlp.up_proj(x).detach().abs().amax(1, keepdim=True)
    d[4] = 1

    def cast(x: Tensor) -> Tensor:
        return dequantize(quantize(x, CURRENT8)).double()

    assert distance(y, cast(h / d) @ cast(w).mT * d) < 1e-6
    assert distance(seen["dh"], cast(dy * d) @ cast(w) / d) < 1e-6
    assert distance(dw, cast(dy * d).mT @ cast(h / d)) < 1e-6
    assert (y[4] == 0).all()
    assert dx.isfinite().all()


def test_an_outlier_no_longer_swallows_the_others() -> None:
    """One channel 2^20 times the others: per-tensor E4M3 loses all of them, channel scales none."""
    h = samples(64, CHANNELS)
    h[:, 7] *= 2.0**20
    dy = samples(64, HIDDEN, seed=2)
    others = torch.arange(CHANNELS) != 7
    errors = {}
    for form in (None, "channel"):
        model = model_of()
        recipe = over(spec_of(CURRENT8), form) if form else Recipe(rules=over(spec_of(CURRENT8), "channel").rules[:1])
        apply(recipe, model)
        exact = (dy.double().mT @ h.double())[:, others]
        errors[form] = distance(run(mlp_of(model).down_proj, h, dy)[2][:, others], exact)
    assert errors[None] > 0.99
    assert errors["channel"] < 0.05


@pytest.mark.parametrize(
    ("amax", "pow2", "want"),
    [
        (0.0, True, 1.0),
        (math.inf, True, 1.0),
        (math.nan, True, 1.0),
        (2.0**-140, True, 1.0),
        (2.0**-126, True, 2.0**-126),
        (3.0, True, 2.0),
        (4.0, True, 4.0),
        (3.0, False, 3.0),
        (0.0, False, 1.0),
        (math.nan, False, 1.0),
    ],
)
def test_scales(amax: float, pow2: bool, want: float) -> None:
    assert float(scales_of(torch.tensor([amax]), pow2=pow2)) == want


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_is_seen(form: str, bad: float) -> None:
    model = model_of(dtype=torch.bfloat16)
    apply(over(spec_of(CURRENT8), form), model)
    x = samples(6, HIDDEN, dtype=torch.bfloat16)
    x[2, 1] = bad
    y = mlp_of(model)(x)
    assert not y.isfinite().all() or bad == math.inf  # an infinity saturates, as it does in the base
    assert y[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", ["fp8_delayed", "fp8_current", "mxfp8", "nvfp4", "fp8_rowwise"])
def test_recompute_and_backends_change_nothing(form: str, base: str) -> None:
    results = []
    for backend, recompute in (("auto", False), ("auto", True), ("reference", False)):
        model = model_of(dtype=torch.bfloat16, layers=2)
        keep_last = {"base_args": {"keep_last": 0}} if base == "nvfp4" else {}
        plan = apply(load("smooth_swiglu", {"base": base, "form": form, **keep_last}), model, backend=backend)
        x, dy = samples(4, 32, HIDDEN, dtype=torch.bfloat16), samples(4, 32, HIDDEN, dtype=torch.bfloat16, seed=2)
        for step in range(2):
            plan.begin_step(step, 0)
            mlp = mlp_of(model)
            if recompute:
                leaf = x.clone().requires_grad_()
                model.zero_grad()
                y = checkpoint(mlp, leaf, use_reentrant=False)
                y.backward(dy)
                out = [y.detach(), leaf.grad, *(parameter.grad for parameter in mlp.parameters())]
            else:
                out = run(mlp, x, dy)
            plan.end_step()
        results.append([*out, *model.buffers()])
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_delayed_scaling_keeps_no_history_of_a_weight_that_follows_this_step() -> None:
    """A channel that grows a thousandfold from one step to the next costs the plain recipe its values, not this one."""
    errors = {}
    for name, args in (("fp8_delayed", {}), ("smooth_swiglu", {})):
        model = model_of(dtype=torch.bfloat16)
        plan = apply(load(name, {**args}), model)
        down = mlp_of(model).down_proj
        h = samples(64, CHANNELS, dtype=torch.bfloat16)
        for step in range(2):
            plan.begin_step(step, 0)
            down(h)
            plan.end_step()
        h[:, 7] *= 1024
        errors[name] = distance(down(h).detach(), h.double() @ down.weight.detach().double().mT)
    assert errors["fp8_delayed"] > 0.9
    assert errors["smooth_swiglu"] < 0.1


def test_evaluation_writes_nothing_and_high_precision_is_plain() -> None:
    model, plain = model_of(dtype=torch.bfloat16), model_of(dtype=torch.bfloat16)
    plan = apply(load("smooth_swiglu", {"form": "token"}), model)
    before = {name: buffer.clone() for name, buffer in plan.state_tensors().items()}
    x = samples(3, 8, HIDDEN, dtype=torch.bfloat16)
    model.eval()
    with torch.no_grad():
        mlp_of(model)(x)
        with plan.high_precision():
            assert torch.equal(mlp_of(model)(x), mlp_of(plain)(x))
    assert all(torch.equal(before[name], buffer) for name, buffer in plan.state_tensors().items())


def test_a_copy_reads_its_own_tokens() -> None:
    model = model_of()
    apply(over(spec_of(CURRENT8), "token"), model)
    other = copy.deepcopy(model)
    x = samples(6, HIDDEN)
    mlp_of(model).up_proj(samples(3, HIDDEN))
    assert torch.equal(mlp_of(other)(x), mlp_of(model)(x))
    with pytest.raises(RuntimeError, match="down_proj with scales of tokens reads 6 of them"):
        mlp_of(other).down_proj(samples(6, CHANNELS))


def test_the_plan_says_what_is_smoothed() -> None:
    recipe = load("smooth_swiglu", {"base": "nvfp4", "base_args": {"keep_last": 1}})
    rows = {str(row).split()[0]: str(row) for row in apply(recipe, model_of(layers=2)).rows}
    assert rows["layers.0.mlp.down_proj"].count("[smooth-channel]") == 1
    assert rows["layers.0.mlp.down_proj"].count("[smooth-channel, hadamard16]") == 1
    assert "smooth" not in rows["layers.0.mlp.up_proj"]
    assert "bfloat16" in rows["layers.1.mlp.down_proj"]


def mlp_without_gate() -> nn.Module:
    mlp = nn.ModuleDict({"up_proj": nn.Linear(8, 16), "down_proj": nn.Linear(16, 8)})
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": mlp})])})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, r"matches no QuantLinear beside gate_proj and up_proj; there are 2"),
        ({"base": "bf16"}, r"the base bf16 quantizes no linear: there is nothing to smooth"),
        ({"base": "fp8_delaid"}, r"no recipe named 'fp8_delaid' \(did you mean 'fp8_delayed'"),
        ({"base_args": {"histry": 3}}, r"'fp8_delayed' has no argument 'histry' \(did you mean 'history'"),
        ({"base_args": 3}, r"base_args=3: arguments of fp8_delayed by name"),
        ({"form": "chanel"}, r"form=chanel: one of channel, token \(did you mean 'channel'\?\)"),
    ],
)
def test_refusals(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        apply(load("smooth_swiglu", args), mlp_without_gate())
    assert "\n" not in str(caught.value)


def test_bases_that_cannot_be_smoothed() -> None:
    again = replace(CURRENT8, source=Source.QUANTIZED)
    reusing = LinearSpec(fprop=GemmSpec(a=CURRENT8, b=CURRENT8), dgrad=GemmSpec(a=CURRENT8, b=again))
    with pytest.raises(ValueError, match="no base that reads codes again"):
        smoothed(reusing, FORMS["channel"])
    with pytest.raises(ValueError, match="no base with sums of parts or derivatives of rounding"):
        smoothed(LinearSpec(fprop=GemmSpec(a=CURRENT8), dx=ClipMask()), FORMS["channel"])
    with pytest.raises(ValueError, match=r"in fprop - x e4m3/tensor.* it is not quantized"):
        smoothed(LinearSpec(fprop=GemmSpec(b=CURRENT8)), FORMS["channel"])
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj is smoothed already"):
        apply(load("smooth_swiglu", {"base": "smooth_swiglu"}), model_of())


def test_compiled_is_eager() -> None:
    """The up-projection's hook and the down-projection that reads from it lie in one compiled module."""
    results = []
    for compiled in (False, True):
        model = model_of(dtype=torch.bfloat16)
        plan: Plan = apply(load("smooth_swiglu", {"form": "token"}), model)
        plan.begin_step(0, 0)
        mlp = mlp_of(model)
        x, dy = (samples(4, 32, HIDDEN, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
        leaf = x.requires_grad_()
        y = (torch.compile(mlp, backend="eager") if compiled else mlp)(leaf)
        y.backward(dy)
        results.append([mlp.down_proj.weight.grad, plan.state_tensors()["layers.0.mlp.down_proj.amax_history"]])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("form", FORMS)
def test_the_probe_sees_what_is_quantized_and_changes_nothing(form: str) -> None:
    x, dy = (samples(4, 32, HIDDEN, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    results = []
    for watch in (False, True):
        model = model_of(dtype=torch.bfloat16)
        plan = apply(load("smooth_swiglu", {"base": "fp8_current", "form": form}), model)
        plan.begin_step(0, 0)
        probe = Probe(plan, every=1)
        with probe.watching() if watch else nullcontext():
            results.append(run(mlp_of(model), x, dy))
    assert all(map(torch.equal, *results))
    rows = {row.slot: row for row in probe.rows() if row.module.endswith("down_proj")}
    assert 1 <= rows["fprop.x"].amax < (2 if form == "channel" else 100)
    assert all(rows[slot].sqnr_db > 20 for slot in ("fprop.x", "fprop.w", "dgrad.dy", "wgrad.dy", "wgrad.x"))


@pytest.fixture
def fusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the fused function run on a CPU: what it calls is plain torch there."""
    monkeypatch.setattr(fused, "Triton", Reference)
    monkeypatch.setattr(fused, "runs_on", lambda device: True)


def block_of(mlp: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": mlp})])})


def calls_of_fused(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Grows by the inputs of the fused function."""
    calls: list[Tensor] = []
    apply_ = fused._Fused.apply
    monkeypatch.setattr(fused._Fused, "apply", lambda x, *rest: calls.append(x) or apply_(x, *rest))
    return calls


TRANSFORMERS: dict[type[nn.Module], Any] = {
    LlamaMLP: LlamaConfig,
    MistralMLP: MistralConfig,
    Qwen2MLP: Qwen2Config,
    Qwen3MLP: Qwen3Config,
}


def of_transformers(kind: type[nn.Module] = LlamaMLP, activation: str = "silu") -> nn.Module:
    config = TRANSFORMERS.get(kind, LlamaConfig)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": CHANNELS, "num_attention_heads": 1}
    mlp: nn.Module = kind(config(**sizes, hidden_act=activation))
    return mlp


class Derived(SwiGLU):
    """A SwiGLU that says nothing more."""


class Clamped(SwiGLU):
    """What its base says holds for another forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


class Geglu(SwiGLU):
    gated_activation = "gelu"

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class Unnamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = SwiGLU().children()

    forward = SwiGLU.forward


class Configured(Unnamed):
    """Its activation is that of a configuration."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    @property
    def gated_activation(self) -> str:
        return self.activation


class DerivedLlama(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def replaced() -> nn.Module:
    mlp = SwiGLU()
    mlp.forward = lambda x: x
    return mlp


UNNAMED = "the model does not name its activation"


class WithAct(SwiGLU):
    """Its product is a module, in whose place a rule has put another."""

    gated_activation = "silu"

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


LEFT_ALONE = {
    "a replaced activation": (WithAct, "its act became a ReLU"),
    "another forward pass": (Clamped, UNNAMED),
    "another activation": (Geglu, "its activation is gelu"),
    "a configured activation": (lambda: Configured("gelu"), "its activation is gelu"),
    "no name": (Unnamed, UNNAMED),
    "a replaced forward pass": (replaced, "the forward pass of this SwiGLU was replaced"),
    "transformers with gelu": (lambda: of_transformers(activation="gelu"), UNNAMED),
    "derived from transformers": (lambda: of_transformers(DerivedLlama), UNNAMED),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_does_not_say_that_it_is_a_swiglu_is_left_alone(case: str, fusing: None) -> None:
    make, reason = LEFT_ALONE[case]
    mlp = make()
    own = {name: value for name, value in vars(mlp).items() if name != "plan_row"}
    plan = apply(load("smooth_swiglu", {}), block_of(mlp))
    assert all(vars(mlp)[name] is value for name, value in own.items())
    assert vars(mlp).keys() - own.keys() == {"plan_row"}
    assert f"(not fused: {reason}" in str(plan)
    with pytest.raises(ValueError, match=rf"layers\.0\.mlp: {reason}") as caught:
        apply(load("smooth_swiglu", {"fuse": "always"}), block_of(make()))
    assert "\n" not in str(caught.value)


KNOWN = {
    "named": SwiGLU,
    "derived": Derived,
    "configured": lambda: Configured("silu"),
    **{kind.__name__: lambda kind=kind: of_transformers(kind) for kind in TRANSFORMERS},
}


@pytest.mark.parametrize("case", KNOWN)
def test_a_swiglu_is_known_by_what_it_says(case: str, fusing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, x = KNOWN[case](), samples(4, HIDDEN)
    assert torch.equal(mlp(x), mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))
    model = block_of(mlp)
    plan = apply(load("smooth_swiglu", {}), model)
    assert "[triton, fused with" in str(plan)
    calls = calls_of_fused(monkeypatch)
    mlp_of(copy.deepcopy(model))(x)
    assert len(calls) == 1
    mlp.__class__ = type("Sharded", (type(mlp),), {})  # as FSDP makes of a module
    mlp(x)
    assert len(calls) == 2


def test_a_fused_mlp_is_still_itself(fusing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attributes, its mode and that of its children, and its hooks, which see what goes in and comes out."""
    mlp = of_transformers()
    model = block_of(mlp)
    apply(load("smooth_swiglu", {}), model)
    calls, x, seen = calls_of_fused(monkeypatch), samples(5, HIDDEN), []
    model.eval()
    assert mlp_of(model) is mlp
    assert mlp.intermediate_size == CHANNELS
    assert not mlp.training
    assert not mlp.act_fn.training
    mlp.register_forward_hook(lambda module, inputs, y: seen.append((module, inputs[0], y)))
    y = mlp(x)
    assert len(calls) == 1
    assert seen[0][0] is mlp
    assert seen[0][1] is x
    assert seen[0][2] is y


@pytest.mark.parametrize("what", ["gate_proj", "up_proj", "down_proj", "act_fn"])
def test_hooks_within_are_called(what: str, fusing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = of_transformers()
    apply(load("smooth_swiglu", {"form": "token"}), block_of(mlp))
    calls, x, seen = calls_of_fused(monkeypatch), samples(5, HIDDEN), []
    with torch.no_grad():
        fused = mlp(x)
        handle = mlp.get_submodule(what).register_forward_hook(lambda module, inputs, y: seen.append(y))
        torch.testing.assert_close(mlp(x), fused, rtol=1e-2, atol=1e-2)
        assert (len(calls), len(seen)) == (1, 1)
        handle.remove()
        assert torch.equal(mlp(x), fused)
    assert (len(calls), len(seen)) == (2, 1)


@pytest.mark.parametrize("name", fused.PROJECTIONS)
def test_a_forward_pass_of_a_projection_is_called(name: str, fusing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tools set one on a module to move it or its inputs between devices."""
    mlp = SwiGLU()
    apply(load("smooth_swiglu", {}), block_of(mlp))
    calls, x, seen = calls_of_fused(monkeypatch), samples(5, HIDDEN), []
    linear = mlp.get_submodule(name)
    forward = linear.forward
    linear.forward = lambda x: seen.append(x) or forward(x)
    mlp(x)
    assert (len(calls), len(seen)) == (0, 1)


class Lora(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x.sum()


@pytest.mark.parametrize("fuse", ["auto", "always"])
def test_an_mlp_that_is_changed_later_computes_as_it_does_itself(
    fuse: str, fusing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, x = calls_of_fused(monkeypatch), samples(5, HIDDEN)
    for reason in ("gate_proj became a Lora", UNNAMED, "its activation is gelu"):
        mlp = of_transformers() if reason is UNNAMED else Configured("silu")
        plan = apply(load("smooth_swiglu", {"fuse": fuse}), block_of(mlp))
        if "Lora" in reason:
            mlp.gate_proj = Lora(mlp.gate_proj)
        elif reason is UNNAMED:
            mlp.act_fn = nn.GELU()
        else:
            mlp.activation = "gelu"
        assert torch.equal(mlp(x), type(mlp).forward(mlp, x))
        assert reason in str(plan)
    assert calls == []


@pytest.mark.parametrize("base", ["fp8_delayed", "mxfp8"])
@pytest.mark.parametrize("frozen", ["gate up x", "down x", "gate x", "up x", "gate up down", "gate", "x"])
def test_frozen_weights_have_the_state_of_plain_torch(
    base: str, frozen: str, fusing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with what is remembered: of the gradients that nobody needs, nothing is."""
    calls, results = calls_of_fused(monkeypatch), []
    for kernels in (True, False):
        model = model_of(dtype=torch.bfloat16)
        mlp = mlp_of(model)
        for name in frozen.replace("x", "").split():
            mlp.get_submodule(f"{name}_proj").requires_grad_(False)
        plan = apply(load("smooth_swiglu", {"base": base, "fuse": "always"}), model)
        monkeypatch.setattr(fused, "runs_on", lambda device, kernels=kernels: kernels)
        x, dy = (samples(4, 32, HIDDEN, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
        x.requires_grad_("x" not in frozen)
        for step in range(2):
            plan.begin_step(step, 0)
            mlp(x).backward(dy)
            plan.end_step()
        tensors = [x.grad, *(parameter.grad for parameter in mlp.parameters())]
        results.append([tensor is None or tensor for tensor in tensors] + [*plan.state_tensors().values()])
    assert len(calls) == 2
    for one, other in zip(*results, strict=True):
        assert one is other or torch.equal(one, other)


@pytest.mark.parametrize("form", ["channel", "token"])
def test_no_tokens_at_all(form: str) -> None:
    """As an expert has that none has chosen."""
    model = nn.ModuleDict({"layers": nn.ModuleList([LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=64))])})
    plan = apply(load("smooth_swiglu", {"form": form}), model)
    plan.begin_step(1, 0)
    y = model.get_submodule("layers.0")(torch.randn(0, 32, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 32)
