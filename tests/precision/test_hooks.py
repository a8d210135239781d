"""The end of a step of delayed scaling: all histories at once are what each would be alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from narrowgauge.precision.amax import UNKNOWN
from narrowgauge.precision.apply import apply
from narrowgauge.precision.hooks import RollAmax
from narrowgauge.precision.linear import QuantLinear, quantized
from narrowgauge.precision.loading import load
from narrowgauge.precision.plan import Plan
from narrowgauge.precision.spec import GemmSpec
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def quant_linears(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def made(num: int) -> Plan:
    """Linears with three columns each, but for one whose products of gradients are in high precision: it has two."""
    blocks = [nn.ModuleDict({"up": nn.Linear(8, 8)}) for _ in range(num)]
    recipe = load("fp8_delayed", {"history": 5})
    (rule,) = recipe.rules
    part = replace(rule.make(nn.Linear(8, 8), "layers.1.up").spec, dgrad=GemmSpec(), wgrad=GemmSpec())
    odd = replace(rule, path="layers.1.up", make=quantized(part))
    return apply(replace(recipe, rules=(odd, rule)), nn.ModuleDict({"layers": nn.ModuleList(blocks)}))


def fill(plan: Plan, generator: torch.Generator, *odd: float) -> None:
    """As a step leaves them; ``odd`` amaxes first."""
    for linear in quant_linears(plan.model):
        linear.amax_history[0] = torch.rand(len(linear.columns), generator=generator)
        for column, value in enumerate(odd[: len(linear.columns)]):
            linear.amax_history[0, column] = value


def alone(plan: Plan, applied: bool) -> None:
    """The definition, linear by linear."""
    for linear in quant_linears(plan.model):
        assert linear.delayed is not None
        newest = linear.amax_history[0]
        newest = torch.where(newest.isfinite(), newest, 0.0)
        linear.amax_history[0] = newest if applied else 0.0
        if applied:
            history, held = linear.delayed.update(linear.amax_history, linear.amax_held.clamp(min=0.0))
            linear.amax_history.copy_(history)
            unknown = (linear.amax_held == UNKNOWN) & (held == 0.0)
            linear.amax_held.copy_(torch.where(unknown, UNKNOWN, held))


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copied"])
def test_all_histories_roll_as_each_would_alone(copied: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = made(4)
    ours.forget()
    before = {name: buffer.data_ptr() for name, buffer in ours.buffers().items()}
    ours, theirs = (copy.deepcopy(ours) if copied else ours), copy.deepcopy(ours)
    steps = [(), (math.nan, 0.0), (math.inf,), (2.0, 0.0), (), (0.0, 0.0, 0.0), (), (), ()]
    for number, odd in enumerate(steps):
        applied = number not in (3, 6)
        for plan in (ours, theirs):
            fill(plan, generator.manual_seed(number), *odd)
        ours.end_step(applied=torch.tensor(applied) if number % 2 else applied)
        alone(theirs, applied)
        assert all(torch.equal(buffer, theirs.buffers()[name]) for name, buffer in ours.buffers().items()), number
    held = torch.cat([linear.amax_held for linear in quant_linears(ours.model)])
    assert (held > 0).all()
    if not copied:  # written in place: whoever holds a buffer holds it still
        assert before == {name: buffer.data_ptr() for name, buffer in ours.buffers().items()}


def test_what_no_step_has_shown_stays_unknown() -> None:
    plan = made(2)
    plan.forget()
    plan.end_step()
    assert all(bool((linear.amax_held == UNKNOWN).all()) for linear in quant_linears(plan.model))


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_end_of_a_step_costs_the_same_however_many_linears_there_are() -> None:
    """In kernels: views, such as a row of a history, are none."""
    found = []
    for num in (3, 9):
        plan = made(num)
        with Counted() as counted:
            plan.end_step(applied=torch.tensor(True))
        views = ("select", "unbind", "split", "view", "t.default", "permute", "detach", "slice", "alias", "movedim")
        found.append([name for name in counted.names if not any(view in name for view in views)])
    assert found[0] == found[1]
    assert len(found[0]) < 50  # two kinds of histories
    assert not any("_local_scalar_dense" in name for name in found[0])
    assert isinstance(plan.recipe.hooks[0], RollAmax)
