"""What a plan asks of a quantized module, of one that is no linear of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from narrowgauge.precision import Recipe, apply, load
from narrowgauge.precision.amax import UNKNOWN
from narrowgauge.precision.hooks import RollAmax
from narrowgauge.precision.linear import quantized
from narrowgauge.precision.module import QuantizedModule
from narrowgauge.precision.recipe import Phase, Rule
from narrowgauge.precision.scaling import Delayed
from narrowgauge.precision.schedule import Span
from narrowgauge.precision.spec import LinearSpec
from torch import Tensor, nn


class Own(QuantizedModule):
    """Says what it is told; remembers one amax."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.delayed = Delayed(history=2)
        history, held = self.delayed.start(1, "cpu")
        self.register_buffer("amax_history", history)
        self.register_buffer("amax_held", held)
        self.used: list[tuple[int, int, int]] = []
        self.asked = 0

    def use(self, picks: tuple[int, int, int]) -> None:
        self.used.append(picks)

    def coverage(self) -> tuple[tuple[str, int, bool], ...]:
        return ("fprop", self.weight.numel(), True), ("wgrad", self.weight.numel(), False)

    def plan_rows(self) -> tuple[str]:
        return (f"{self.path} has its own way",)

    @property
    def goes_by_step(self) -> str:
        return "its own way"

    def reset_state(self, value: float = 0.0) -> None:
        self.amax_history.zero_()
        self.amax_held.fill_(value)

    def ask_again(self) -> None:
        self.asked += 1

    def forward(self, x: Tensor) -> Tensor:
        self.amax_history[0, 0] = torch.maximum(self.amax_history[0, 0], x.detach().abs().amax())
        return x @ self.weight.mT


class Stiff(Own):
    use = QuantizedModule.use


def recipe(kind: type[Own] = Own, **more: Any) -> Recipe:
    return Recipe(rules=(Rule(kind=nn.Linear, path="0", make=lambda linear, path: kind(linear)),), **more)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 4, bias=False))


def test_the_plan_hears_what_it_says_and_switches_it() -> None:
    plan = apply(recipe(schedule=(Phase(span=Span(start=1, end=2), gemms=("fprop",)),)), model(), seed=5)
    own = plan.model[0]
    assert own.context is plan.context
    assert own.context.seed == 5
    assert "\n0 has its own way\n" in str(plan)
    for step in range(3):
        plan.begin_step(step, 0)
    assert own.used == [(0, 0, 0), (1, 0, 0), (0, 0, 0)]
    plan.model(torch.ones(2, 8)).sum().backward()
    with torch.no_grad():
        own.weight.add_(1.0)  # as an optimizer does
    with pytest.raises(RuntimeError, match="its own way and the schedule would stand still"):
        plan.model(torch.ones(2, 8))
    assert plan.coverage.quantized == 32
    assert {(left.name, left.size) for left in plan.coverage.left} == {("wgrad of quantized linears", 32), ("1", 48)}


def test_its_amaxes_roll_and_are_forgotten_as_those_of_a_linear() -> None:
    plan = apply(recipe(hooks=(RollAmax(),)), model())
    own = plan.model[0]
    assert plan.state_tensors().keys() == {"0.amax_history", "0.amax_held"}
    assert own.asked == 1
    plan.begin_step(0, 0)
    plan.model(torch.full((2, 8), -3.0))
    plan.end_step()
    assert float(own.amax_held) == 3.0
    assert own.amax_history.tolist() == [[0.0], [3.0]]
    plan.forget()
    assert float(own.amax_held) == UNKNOWN
    with pytest.raises(ValueError, match=r"quantized already \(0 is a Own\)"):
        apply("bf16", plan.model)


def test_what_no_step_can_switch_is_an_error() -> None:
    phase = Phase(span=Span(start=0, end=2))
    with pytest.raises(ValueError, match=r"schedule \(steps 0 to 1\): no step can switch 0: Stiff"):
        apply(recipe(Stiff, schedule=(phase,)), model())
    linears = Recipe(rules=(Rule(kind=nn.Linear, path=".*", make=quantized(LinearSpec())),))
    other = Phase(span=Span(start=0, end=2), rules=recipe().rules, name="own")
    with pytest.raises(ValueError, match="no step can switch 0 to a Own"):
        apply(Recipe(rules=linears.rules, schedule=(other,)), model())
    embedding = Rule(kind=nn.Embedding, path="0", make=lambda table, path: Own(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="0 is a Embedding outside the phases: no step can switch it"):
        apply(Recipe(schedule=(Phase(span=Span(start=0), rules=(embedding,)),)), nn.Sequential(nn.Embedding(4, 4)))


def test_a_linear_says_which_quantization_stands_for_its_weight() -> None:
    for name, stands in (("fp8_block", True), ("mxfp8", False), ("bf16", None)):
        plan = apply(load(name, {}), model(), paths=[] if name == "bf16" else ["0"])
        linear = plan.model[0]
        if stands is None:
            assert type(linear) is nn.Linear
        else:
            assert linear.reads_weight == linear.spec.fprop.b if stands else isinstance(linear.reads_weight, str)
