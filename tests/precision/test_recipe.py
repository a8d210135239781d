"""Recipes as values: what loads, what applies, what is refused."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from narrowgauge.precision.apply import apply
from narrowgauge.precision.loading import load, names
from narrowgauge.precision.recipe import Dtypes, Recipe, Rule
from narrowgauge.precision.states.adamw import AdamW
from torch import nn

CONFIGS = Path(__file__).parents[2] / "configs" / "precision"


class Doubled(nn.Linear):
    """A linear that a rule can put in."""


def doubled(module: nn.Module, path: str) -> nn.Module:
    assert isinstance(module, nn.Linear)
    return Doubled(module.in_features, module.out_features, bias=False)


def small() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.ModuleDict({"up_proj": nn.Linear(8, 4)})})


@pytest.mark.parametrize("name", names())
def test_every_recipe_names_its_paper_and_has_a_yaml(name: str) -> None:
    doc = importlib.import_module(f"narrowgauge.precision.recipes.{name}").__doc__ or ""
    assert re.search(r"arXiv \d{4}\.\d{4,5}|IEEE 754", doc)
    assert any(yaml.safe_load(file.read_text())["recipe"] == name for file in CONFIGS.glob("*.yaml"))


def test_a_rule_replaces_what_it_matches_in_full() -> None:
    model = small()
    plan = apply(Recipe(rules=(Rule(kind=nn.Linear, path=r".*\.up_proj", make=doubled),)), model)
    assert type(model.get_submodule("b.up_proj")) is Doubled
    assert type(model.get_submodule("a")) is nn.Linear
    assert [str(row).split()[0] for row in plan.rows] == ["a"]


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"matches no Linear.*did you mean 'b.up_proj'"):
        apply(Recipe(rules=(Rule(kind=nn.Linear, path="b.up_prj", make=doubled),)), small())


def test_load_names_the_close_matches() -> None:
    with pytest.raises(ValueError, match=r"no recipe named 'bf61'.*did you mean 'bf16'"):
        load("bf61", {})
    with pytest.raises(ValueError, match="'bf16' has no argument 'margin'; it takes: none"):
        load("bf16", {"margin": 0})


def test_bf16_keeps_float32_where_sums_are_long() -> None:
    assert load("bf16", {}).dtypes == Dtypes(param=torch.float32, compute=torch.bfloat16, reduce=torch.float32)


def test_the_plan_lists_every_linear() -> None:
    text = str(apply(load("bf16", {}), small()))
    assert "compute bfloat16" in text
    assert re.search(r"a +4 -> 8 ", text)
    assert re.search(r"b.up_proj +8 -> 4 ", text)


def test_hooks_hear_every_step() -> None:
    heard: list[tuple[str, int]] = []

    class Hook:
        def begin_step(self, model: nn.Module, step: int, total_steps: int | None) -> None:
            heard.append(("begin", step))

        def end_step(self, model: nn.Module, step: int, applied: torch.Tensor) -> None:
            assert applied.dtype == torch.bool
            heard.append(("end" if applied else "skipped", step))

    plan = apply(Recipe(hooks=(Hook(),)), small())
    plan.begin_step(7, 0)
    plan.end_step()
    plan.end_step(applied=False)
    plan.end_step(applied=torch.tensor(True))
    assert heard == [("begin", 7), ("end", 7), ("skipped", 7), ("end", 7)]


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_is_torchs_adamw_with_its_state_made_early(fused: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    update = AdamW(fused=fused).build([{"params": [ours], "weight_decay": 0.1}], lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    assert set(update.state[ours]) == {"step", "exp_avg", "exp_avg_sq"}
    oracle = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=fused, foreach=False)
    for _ in range(5):
        gradient = torch.randn(7, 5, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        update.step()
        oracle.step()
    assert torch.equal(ours, theirs)


def test_the_bit_ladder_masks_both_operands_of_all_three_products() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 6, bias=False)})])})
    plain = model["layers"][0]["up"].weight.detach().bfloat16()
    x, dy = (torch.randn(4, size, generator=generator).bfloat16() for size in (8, 6))
    apply(load("exmy", {"mantissa_bits": 3}), model.bfloat16())
    linear, given = model["layers"][0]["up"], x.clone().requires_grad_()
    y = linear(given)
    y.backward(dy)
    a, b, g = ((t.view(torch.int16) & ~0xF).view(torch.bfloat16) for t in (x, plain, dy))
    assert torch.equal(y, a @ b.mT)
    assert torch.equal(given.grad, g @ b)
    assert torch.equal(linear.weight.grad, g.mT @ a)
    for wrong in ({"mantissa_bits": 8}, {"exponent_bits": 1}, {"rounding": "nearset"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            load("exmy", wrong)
