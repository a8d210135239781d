"""Update rules: Lion and Muon against oracles, and rules of other kinds: shapes, arithmetic, needs."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowgauge.precision.noise import Noise, base_key, step_key
from narrowgauge.precision.spec import Rounding
from narrowgauge.precision.states import driver
from narrowgauge.precision.states.adamw import AdamW
from narrowgauge.precision.states.codecs import BF16, Dynamic, Plain, Scaled
from narrowgauge.precision.states.driver import StateOptimizer
from narrowgauge.precision.states.lion import Lion
from narrowgauge.precision.states.moments import STANDARD, Moments, chosen, codec
from narrowgauge.precision.states.muon import Muon
from narrowgauge.precision.states.rules import Extent, State, Sum, UpdateRule, described, rule_of
from narrowgauge.precision.states.telemetry import step_with_sums
from narrowgauge.precision.states.updates import RULES, gated_step, multiply, named_rule
from test_updates import params_of, same, state_of
from torch import nn

SHAPES = [(24, 10), (7, 33), (16, 16), (3, 9, 5), (1, 6), (11,)]
HYPER: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.97), "eps": 1e-8}


def make(
    rule: UpdateRule, moments: Moments = STANDARD, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES
) -> StateOptimizer:
    generator = torch.Generator().manual_seed(1)
    dtype = moments.param_dtype(dtype, torch.bfloat16)
    named = [
        (f"layers.{index}.up_proj.weight", nn.Parameter((torch.randn(shape, generator=generator) / 4).to(dtype)))
        for index, shape in enumerate(shapes)
    ]
    groups = [{"params": named[::2], "weight_decay": 0.1}, {"params": named[1::2], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return StateOptimizer(groups, rule=rule, moments=moments, seed=3, **HYPER)


def set_grads(optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in sorted(params_of(optimizer), key=lambda p: tuple(p.shape)):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_lion_is_its_definition() -> None:
    """Element by element, in Python's numbers."""
    optimizer = make(Lion(), shapes=[(3, 5), (4,)])
    beta1, beta2 = HYPER["betas"]
    w = [parameter.detach().flatten().tolist() for parameter in params_of(optimizer)]
    m = [[0.0] * len(of) for of in w]
    for step in range(4):
        set_grads(optimizer, step)
        rates = []
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (step + 1)
            rates += [(group["lr"], group["weight_decay"])] * len(group["params"])
        for index, (parameter, (lr, decay)) in enumerate(zip(params_of(optimizer), rates, strict=True)):
            assert parameter.grad is not None
            for place, g in enumerate(parameter.grad.flatten().tolist()):
                c = beta1 * m[index][place] + (1 - beta1) * g
                w[index][place] -= lr * ((c > 0) - (c < 0) + decay * w[index][place])
                m[index][place] = beta2 * m[index][place] + (1 - beta2) * g
        optimizer.step()
    for index, parameter in enumerate(params_of(optimizer)):
        assert parameter.detach().flatten().tolist() == pytest.approx(w[index], abs=1e-6)
        assert optimizer.state[parameter]["exp_avg"].flatten().tolist() == pytest.approx(m[index], abs=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_is_torchs(scale: str, nesterov: bool) -> None:
    """Bit for bit in FP32, tall and wide; a BF16 parameter, which torch rounds at every operation, is close.

    Without Nesterov torch 2.13 normalizes a BF16 momentum in place, and goes on with that.
    """
    shapes = [shape for shape in SHAPES if len(shape) == 2]
    for dtype in (torch.float32, torch.bfloat16)[: 1 + nesterov]:
        ours = make(Muon(scale=scale, nesterov=nesterov), dtype=dtype, shapes=shapes)
        theirs = [nn.Parameter(p.detach().clone()) for p in params_of(ours)]
        groups = [
            {"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:], "weight_decay": 0.0},
        ]  # fmt: skip
        oracle = torch.optim.Muon(groups, lr=HYPER["lr"], nesterov=nesterov, adjust_lr_fn=scale)
        for step in range(4):
            for optimizer in (ours, oracle):
                set_grads(optimizer, step)
                for group in optimizer.param_groups:
                    group["lr"] = 0.02 / (step + 1)
                optimizer.step()
            for p, q in zip(params_of(ours), theirs, strict=True):
                m = ours.state[p]["exp_avg"], oracle.state[q]["momentum_buffer"]
                if dtype is torch.float32:
                    assert torch.equal(p, q)
                    assert torch.equal(*m)
                else:
                    torch.testing.assert_close(p, q, rtol=0.02, atol=0.02)
                    torch.testing.assert_close(m[0], m[1].float(), rtol=0.02, atol=0.02)


def test_muon_draws_singular_values_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((40, 12), (12, 40), (20, 20)):
        values = torch.linalg.svdvals(Muon().orthogonal(torch.randn(shape, generator=generator)).float())
        assert 0.4 < float(values.min()) <= float(values.max()) < 1.3
    assert not Muon().orthogonal(torch.zeros(4, 6)).any()


def test_each_matrix_of_a_stack_is_updated_as_if_alone() -> None:
    stack = make(Muon(), shapes=[(3, 9, 5)])
    alone = make(Muon(), shapes=[(9, 5)] * 3)
    (experts,) = params_of(stack)
    for group in (*stack.param_groups, *alone.param_groups):
        group["weight_decay"] = 0.1
    with torch.no_grad():
        for parameter, matrix in zip(params_of(alone), experts, strict=True):
            parameter.copy_(matrix)
    for step in range(3):
        set_grads(stack, step)
        assert experts.grad is not None
        for parameter, gradient in zip(params_of(alone), experts.grad, strict=True):
            parameter.grad = gradient.clone()
        stack.step()
        alone.step()
    assert all(map(torch.equal, params_of(alone), experts))
    assert stack.state[experts]["exp_avg"].shape == (3, 9, 5)


def test_which_parameters_muon_takes() -> None:
    for name, shape, expected in [
        ("layers.0.mlp.up_proj.weight", (8, 4), True), ("layers.11.mlp.experts.up.weight", (2, 8, 4), True),
        ("embed_tokens.weight", (99, 4), False), ("lm_head.weight", (99, 4), False),
        ("embed_positions.weight", (99, 4), False), ("layers.0.input_layernorm.weight", (4,), False),
        ("layers.0.mlp.experts.up.bias", (2, 8), False), ("norm.weight", (4,), False),
        ("layers.0.self_attn.q_norm.weight", (2, 8), False), ("recipe.Hook.0.weight", (8, 4), False),
        ("layers.0.conv.weight", (2, 3, 4, 5), False),
    ]:  # fmt: skip
        taken = rule_of(Muon(rest=Lion()), name, shape)
        assert (taken.name == "muon") == expected, name
    with pytest.raises(ValueError, match=r"lion does not take w \[3\], and has no rest that does"):
        StateOptimizer([{"params": [("w", nn.Parameter(torch.ones(3)))]}], rule=_Nothing())


class _Nothing(UpdateRule):
    name = "lion"  # type: ignore[assignment]

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return False


def test_the_rest_is_updated_as_if_alone() -> None:
    """By AdamW's kernels, to the bit, whatever Muon's states are."""
    moments = chosen({"m": "int8/64", "adamw": {"m": "e4m3/tensor", "v": "dynamic"}}, STANDARD, Muon())
    both, alone = make(Muon(), moments, shapes=[(9, 12), (70,)]), make(AdamW(), moments, shapes=[(9, 12), (70,)])
    for optimizer in (both, alone):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.full_like(group["params"][0], 0.3)
        optimizer.step()
    last = [params_of(optimizer)[1] for optimizer in (both, alone)]
    assert torch.equal(*last)
    assert set(both.state[params_of(both)[0]]) == {"step", "exp_avg_codes", "exp_avg_scales"}
    assert both.computed_by.startswith("muon [reference (no kernel for muon)], adamw [")


MOMENTS = [
    STANDARD, Moments(m=codec("e4m3/tensor/sr"), v=codec("e5m2/tensor")), chosen("pure_bf16_sr", STANDARD),
    chosen("fp8_lm", STANDARD), chosen("pure_bf16_kahan", STANDARD), Moments(m=codec("int8/16")),
]  # fmt: skip


@pytest.mark.parametrize("moments", MOMENTS, ids=str)
@pytest.mark.parametrize("rule", ["lion", "muon", "columns", "galore"])
def test_a_gated_update_is_the_update_or_nothing(rule: str, moments: Moments) -> None:
    plain, gated = (make(KINDS[rule], moments) for _ in range(2))
    for step in range(3):
        for each in (plain, gated):
            set_grads(each, step)
        if step == 1:
            before = state_of(gated)
            for parameter in params_of(gated):
                assert parameter.grad is not None
                parameter.grad = parameter.grad * math.nan
            gated_step(gated, torch.tensor(False), torch.tensor(math.nan))()
            assert same(before, state_of(gated)) == []
            set_grads(gated, step)
        factor = torch.tensor(0.37)
        multiply(plain, [p.grad for p in params_of(plain)], factor)  # type: ignore[misc]
        plain.step()
        gated_step(gated, torch.tensor(True), factor)
        assert same(state_of(plain), state_of(gated)) == [], step


@pytest.mark.parametrize("rule", ["lion", "muon", "columns", "galore"])
def test_measuring_changes_nothing_and_sees_the_update(rule: str) -> None:
    for moments in (STANDARD, chosen("pure_bf16_sr", STANDARD)):
        plain, measured = (make(KINDS[rule], moments) for _ in range(2))
        for step in range(3):
            for each in (plain, measured):
                set_grads(each, step)
            plain.step()
            count, _, _, changes, updates, products = step_with_sums(measured)
            assert same(state_of(plain), state_of(measured)) == []
        assert count == sum(parameter.numel() for parameter in params_of(measured))
        if moments is STANDARD:
            assert products / updates == pytest.approx(1, abs=1e-4)
            assert changes == pytest.approx(updates, rel=1e-4)
        else:
            assert 0.9 < products / updates < 1.1
            assert changes != pytest.approx(updates, rel=1e-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns(UpdateRule):
    """Momentum over the root of a mean square by column, which all ranks share; and noise of its own."""

    decay: float = 0.9
    states = (
        State(name="m", codec=codec("e4m3/16")),
        State(name="square", signed=False, extent=lambda shape: Extent((1, *shape[1:])[-2:], by_rows=False)),
    )
    noisy = True

    def exchange(self, states, grad, weight, scalars):  # type: ignore[no-untyped-def]
        return Sum(grad.square().sum(0, keepdim=True))

    def update(self, states, grad, weight, scalars):  # type: ignore[no-untyped-def]
        mean = scalars.exchanged / scalars.shape[0]
        square = states["square"].lerp(mean.view(states["square"].shape), 1 - self.decay)
        m = states["m"].lerp(grad, 1 - self.decay)
        drawn = scalars.noise.uniform(len(grad), grad[0].numel() if len(grad) else 1).view(grad.shape)
        step = m / (square.view(mean.shape).sqrt() + scalars.eps) * (0.5 + drawn)
        return {"m": m, "square": square}, weight * (1 - scalars.lr * scalars.decay) - scalars.lr * step


@dataclass(frozen=True, slots=True, kw_only=True)
class GaLore(UpdateRule):
    """Of a matrix, Adam in the space of its first singular vectors; all of the gradient is wanted every ``gap``."""

    rank: int = 2
    gap: int = 2
    rest: UpdateRule = AdamW()  # noqa: RUF009

    @property
    def states(self) -> tuple[State, ...]:
        def low(shape: tuple[int, ...]) -> Extent:
            rows, cols = shape
            return Extent((rows, self.rank)) if rows >= cols else Extent((self.rank, cols), by_rows=False)

        def basis(shape: tuple[int, ...]) -> Extent:
            return Extent((self.rank, min(shape)), by_rows=False)

        return State(name="m", extent=low), State(name="v", signed=False, extent=low), State(name="basis", extent=basis)

    def takes(self, name, shape):  # type: ignore[no-untyped-def]
        return len(shape) == 2 and min(shape) > self.rank

    def refreshes(self, scalars):  # type: ignore[no-untyped-def]
        return (scalars.t - 1) % self.gap == 0

    def exchange(self, states, grad, weight, scalars):  # type: ignore[no-untyped-def]
        if self.refreshes(scalars):
            return grad
        tall = scalars.shape[0] >= scalars.shape[1]
        return None if tall else Sum(states["basis"][:, scalars.rows] @ grad)

    def update(self, states, grad, weight, scalars):  # type: ignore[no-untyped-def]
        basis, tall = states["basis"], scalars.shape[0] >= scalars.shape[1]
        if self.refreshes(scalars):
            u, _, vh = torch.linalg.svd(scalars.exchanged.float(), full_matrices=False)
            basis = (vh if tall else u.mT)[: self.rank].to(grad.dtype)
            basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
            low = grad @ basis.mT if tall else basis @ scalars.exchanged
        else:
            low = grad @ basis.mT if tall else scalars.exchanged
        beta1, beta2 = scalars.betas
        m = states["m"].lerp(low, 1 - beta1)
        v = states["v"].lerp(low.square(), 1 - beta2)
        share = m / (v.sqrt() + scalars.eps)
        back = share @ basis if tall else basis.mT[scalars.rows] @ share
        size = scalars.lr * (1 - beta2**scalars.t) ** 0.5 / (1 - beta1**scalars.t)
        new = (weight - size * back) * (1 - scalars.lr * scalars.decay)
        return {"m": m, "v": v, "basis": basis}, new


@dataclass(frozen=True, slots=True, kw_only=True)
class Bf16AdamW(UpdateRule):
    """Every operation rounds to BF16."""

    arithmetic = torch.bfloat16
    states = (State(name="m", key="exp_avg", codec=BF16), State(name="v", key="exp_avg_sq", codec=BF16, signed=False))

    def update(self, states, grad, weight, scalars):  # type: ignore[no-untyped-def]
        assert {grad.dtype, weight.dtype, states["m"].dtype} == {torch.bfloat16}
        beta1, beta2 = scalars.betas
        w = weight * (1 - scalars.lr * scalars.decay)
        m = states["m"].lerp(grad, 1 - beta1)
        v = (states["v"] * beta2).addcmul(grad, grad, value=1 - beta2)
        root = v.sqrt() / (1 - beta2**scalars.t) ** 0.5 + scalars.eps
        return {"m": m, "v": v}, w.addcdiv(m, root, value=-scalars.lr / (1 - beta1**scalars.t))


KINDS: dict[str, UpdateRule] = {
    "lion": Lion(), "muon": Muon(), "muon and lion": Muon(rest=Lion(), scale="match_rms_adamw"),
    "columns": Muon(rest=Columns()), "galore": GaLore(),
}  # fmt: skip


def test_every_operation_may_round_to_bf16() -> None:
    """As torch's AdamW on BF16 parameters, bit for bit; one rounding at the end is something else."""
    shapes = [(24, 10), (11,)]
    ours = make(Bf16AdamW(), chosen({"master": "bf16"}, STANDARD), shapes=shapes)
    once = make(AdamW(), chosen("pure_bf16", STANDARD), shapes=shapes)
    theirs = [nn.Parameter(p.detach().clone()) for p in params_of(ours)]
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, lr=HYPER["lr"], betas=HYPER["betas"], eps=HYPER["eps"], foreach=False)
    for step in range(5):
        for optimizer in (ours, once, oracle):
            set_grads(optimizer, step)
            optimizer.step()
    matrix = ours.state[params_of(ours)[0]]
    assert matrix["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(params_of(ours)[0], theirs[0])
    assert torch.equal(matrix["exp_avg_sq"], oracle.state[theirs[0]]["exp_avg_sq"])
    assert not torch.equal(params_of(once)[0], theirs[0])


def test_states_of_other_shapes() -> None:
    """A state by column against a loop; its codecs, its place in a checkpoint, and the noise of the rule."""
    optimizer = make(Columns(), Moments(square=BF16), shapes=[(6, 5)])
    (weight,) = params_of(optimizer)
    state, w = optimizer.state[weight], weight.detach().clone()
    assert {key: (tuple(value.shape), value.dtype) for key, value in state.items()} == {
        "step": ((), torch.float32), "m_codes": ((6, 5), torch.uint8), "m_scales": ((6, 1), torch.float32),
        "square": ((1, 5), torch.bfloat16),
    }  # fmt: skip
    m, square = torch.zeros(6, 5), [0.0] * 5
    for step in range(3):
        set_grads(optimizer, step)
        key = step_key(base_key(3, "layers.0.up_proj.weight", 20), step + 1)
        drawn = Noise(key=key).uniform(6, 5)
        m = m.lerp(weight.grad, 0.1)  # type: ignore[arg-type]
        for col in range(5):
            mean = sum(float(g) ** 2 for g in weight.grad[:, col]) / 6  # type: ignore[index]
            square[col] += (mean - square[col]) * 0.1
            for row in range(6):
                share = m[row, col] / (math.sqrt(square[col]) + 1e-8) * (0.5 + drawn[row, col])
                w[row, col] = w[row, col] * (1 - 0.02 * 0.1) - 0.02 * share
        square = torch.tensor(square).bfloat16().tolist()
        narrow = codec("e4m3/16")
        m = narrow.decode(narrow.encode(m))
        optimizer.step()
        torch.testing.assert_close(weight.detach(), w, rtol=0, atol=1e-5)
        assert state["square"].flatten().tolist() == pytest.approx(square, rel=0.01)


def test_what_is_wrong_is_one_line() -> None:
    assert named_rule("muon", {"momentum": 0, "rest": "lion", "coefficients": [3, -4, 2.0]}) == Muon(
        momentum=0.0, rest=Lion(), coefficients=(3.0, -4.0, 2.0)
    )
    assert set(RULES) == {"adamw", "lion", "muon"}
    for name, args, message in [
        ("moun", {}, r"no rule named 'moun' \(did you mean 'muon'\?\); there are: adamw, lion, muon"),
        ("muon", {"momentun": 1}, r"muon has no setting 'momentun' \(did you mean 'momentum'\?\); it has: momentum, "),
        ("muon", {"nesterov": "x"}, "nesterov='x': muon wants it like True"),
        ("muon", {"momentum": 1.5}, r"momentum=1.5: at least 0 and below 1"),
        ("muon", {"scale": "rms"}, "scale='rms': original or match_rms_adamw"),
        ("lion", {"m": 1}, "lion has no setting 'm'; it has none, and optim=lion gives none"),
        ("muon", {"coefficients": ["a", 1, 2]}, r"coefficients=\['a', 1, 2\]: muon wants it like \(3.4445"),
        ("muon", {"coefficients": [1, True, 2]}, "coefficients=.*: muon wants it like"),
        ("muon", {"eps": math.nan}, "eps=nan: muon wants it like 1e-07"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            named_rule(name, args)
        assert "\n" not in str(caught.value)
    for key in ("step", "master_2", "a b"):
        with pytest.raises(ValueError, match="a state cannot be called"):
            State(name="m", key=key)


class _Short(Lion):
    def update(self, states, grad, weight, scalars):  # type: ignore[no-untyped-def]
        return {"m": states["m"][:1]}, weight


def test_a_state_of_another_shape_than_was_said() -> None:
    optimizer = make(_Short(), shapes=[(3, 4)])
    set_grads(optimizer, 0)
    with pytest.raises(ValueError, match=r"_short: state m came back as \[1, 4\], not \[3, 4\]"):
        optimizer.step()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Farther(AdamW):
    """AdamW, and a thousand farther."""

    by: Any = math.sqrt
    rest: UpdateRule | None = None
    states = (State(name="m", key="exp_avg"), State(name="v", key="exp_avg_sq"))

    def update(self, states, grad, weight, scalars):  # type: ignore[no-untyped-def]
        new, weight = AdamW.update(self, states, grad, weight, scalars)
        return new, weight + 1000


@pytest.mark.parametrize("choice", [None, "bf16"])
def test_what_derives_from_a_rule_with_kernels_is_computed_itself(choice: str | None) -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    groups = [{"params": [("layers.0.weight", weight)]}]
    optimizer = driver.build(_Farther(), groups, moments=chosen(choice, STANDARD), seed=0, backend="auto", **HYPER)
    weight.grad = torch.ones(3, 4)
    optimizer.step()
    assert (weight > 999).all()
    assert isinstance(optimizer, StateOptimizer)
    assert optimizer.computed_by == "[reference (no kernel for _farther)]"


def test_what_a_run_is_told_by_is_the_same_in_every_process() -> None:
    """Settings that are as usual go without saying: a rule may learn another."""
    assert described(Muon()) == "Muon()"
    assert described(Muon(momentum=0.9, rest=Lion())) == "Muon(momentum=0.9, rest=Lion())"
    assert described(_Farther(by=make)) == "_Farther(by=make)"
    assert described(object()) == "object"


def test_states_of_one_name_and_another_sign_have_a_codec_each() -> None:
    rule = _Farther(rest=AdamW())
    for choice in ({"v": "dynamic"}, "dynamic", "dynamic8"):
        moments = chosen(choice, STANDARD, rule)  # type: ignore[arg-type]
        assert moments.of(rule, rule.states[1]) == Dynamic(signed=True)
        assert moments.of(AdamW(), AdamW.states[1]) == Dynamic(signed=False)


class _Lacking(Lion):
    def update(self, states, grad, weight, scalars):  # type: ignore[no-untyped-def]
        return {"mm": grad}, weight


def test_a_state_that_does_not_come_back() -> None:
    optimizer = make(_Lacking(), shapes=[(3, 4)])
    set_grads(optimizer, 0)
    with pytest.raises(ValueError, match=r"_lacking: states \['mm'\] came back, not \['m'\]"):
        optimizer.step()


def test_codecs_of_the_states_of_a_rule() -> None:
    lion, muon, columns = Lion(), Muon(), Columns()
    assert chosen("fp8_lm", STANDARD, lion) == Moments(m=codec("e4m3/tensor"), master=codec("fp16/tensor"))
    assert chosen("e4m3/64", STANDARD, lion) == Moments(m=codec("e4m3/64"))
    assert chosen("fp8", STANDARD, muon) == chosen("fp8", STANDARD)
    assert chosen("fp8", STANDARD).text(lion) == "m e4m3/128"
    assert STANDARD.text(AdamW()) == str(STANDARD) == "m fp32, v fp32"
    assert STANDARD.text(columns) == "m e4m3/16, square fp32"
    dynamic = chosen({"square": "dynamic"}, STANDARD, columns).of(columns, columns.states[1])
    assert dynamic == Dynamic(signed=False)
    both = chosen({"m": "int8/2048", "adamw": {"m": "dynamic"}, "master": "bf16"}, STANDARD, muon)
    assert both.text(muon) == "muon: m int8/2048; adamw: m dynamic/256, v fp32, weights bf16"
    assert both.of(muon, muon.states[0]) == Scaled(format=codec("int8").format, block=2048)  # type: ignore[attr-defined]
    for choice, rule, message in [
        ({"v": "fp32"}, lion, "no key 'v'; there are: m, master, block"),
        (
            {"squar": "fp32"},
            columns,
            r"no key 'squar' \(did you mean 'square'\?\); there are: m, square, master, block",
        ),
        ({"adamw": {"w": "fp32"}}, muon, "no key 'w'; there are: m, v, block"),
        ({"adamw": "fp32"}, muon, "adamw='fp32': a mapping of its states"),
        ({"adamw": {"m": "bf16/kahan"}}, muon, "compensation is for weights"),
        ("e4m3", _Nothing(), "'e4m3' is for m and v; name the states: there are none"),
        ("fp88", _Nothing(), "no moments named 'fp88'"),
    ]:
        with pytest.raises(ValueError, match=message):
            chosen(choice, STANDARD, rule)  # type: ignore[arg-type]


def test_noise_of_a_state_goes_by_its_name() -> None:
    """m keeps the key that AdamW's has; another state has one of its own."""
    random = Plain(dtype=torch.bfloat16, rounding=Rounding.STOCHASTIC)
    optimizer = make(Columns(), Moments(m=random, square=random), shapes=[(6, 5)])
    (weight,) = params_of(optimizer)
    set_grads(optimizer, 0)
    assert weight.grad is not None
    grad = weight.grad.clone()
    optimizer.step()
    name = "layers.0.up_proj.weight"
    for key, path, slot, exact in [
        ("m", name, 16, torch.zeros(6, 5).lerp(grad, 0.1)),
        ("square", f"{name}:square", 19, torch.zeros(1, 5).lerp(grad.square().sum(0, keepdim=True) / 6, 0.1)),
    ]:
        noise = Noise(key=step_key(base_key(3, path, slot), 1))
        torch.testing.assert_close(optimizer.state[weight][key], random.encode(exact, noise=noise)[""])
    assert not torch.equal(optimizer.state[weight]["m"], torch.zeros(6, 5).lerp(grad, 0.1).bfloat16())


def test_rules_on_two_and_three_ranks_are_those_of_one() -> None:
    """Given the same gradients: uneven and empty shards, stacks, vectors, codecs, replicas; also after a checkpoint."""
    script = Path(__file__).parents[1] / "rule_ranks.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
