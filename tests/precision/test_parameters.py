"""What a recipe or a model says of single parameters."""

from __future__ import annotations

import math

import pytest
import torch
from narrowgauge.precision import apply
from narrowgauge.precision.parameters import Parameters, Setting, groups, settings
from narrowgauge.precision.recipe import Recipe
from torch import nn

SHAPES = {
    name: torch.Size(shape) for name, shape in {"embed.weight": (8, 4), "up.weight": (6, 4), "norm": (4,)}.items()
}


class ByWidth:
    """A function of name and shape."""

    def of(self, name: str, shape: torch.Size) -> Setting | None:
        return Setting(lr=shape[-1] ** -0.5) if name == "up.weight" else None

    def __str__(self) -> str:
        return "by width"


def test_a_later_part_wins_field_by_field() -> None:
    parts = (Parameters(path=".*weight", setting=Setting(decay=0.0, init=(0.0, 1.0))), ByWidth())
    found = settings((*parts, Parameters(path="up.*", setting=Setting(init=(1.0, 0.0)))), SHAPES)
    assert found["embed.weight"] == Setting(decay=0.0, init=(0.0, 1.0))
    assert found["up.weight"] == Setting(lr=0.5, decay=0.0, init=(1.0, 0.0))
    assert found["norm"] == Setting()
    assert str(found["up.weight"]) == "learning rate x 0.5, decay x 0, starts at 1"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: settings((Parameters(path="upp.weight", setting=Setting()),), SHAPES), "upp.weight.*did you mean"),
        (lambda: settings((ByWidth(),), {"norm": torch.Size((4,))}), "by width says nothing of any parameter"),
        (lambda: Parameters(path="(", setting=Setting()), "not a regular expression"),
        (lambda: Setting(lr=-1.0), "lr=-1.0 of a parameter: a finite number from 0"),
        (lambda: Setting(lr="2"), "lr='2' of a parameter"),  # type: ignore[arg-type]
        (lambda: Setting(init=(math.nan, 1.0)), r"init=\(nan, 1.0\) of a parameter: a mean and a standard deviation"),
        (lambda: Setting(init=(1.0,)), r"init=\(1.0,\) of a parameter"),  # type: ignore[arg-type]
        (lambda: Setting(decay=float("nan")), "decay=nan of a parameter"),
        (lambda: Setting(init=(0.0, -0.1)), r"init=\(0.0, -0.1\) of a parameter"),
        (
            lambda: groups(
                [("a", torch.zeros(1))], {"a": Setting(lr=0.0, independent=True)}, lr=1.0, weight_decay=0.1,
                of_model=lambda name, shape: (1.0, 1.0),
            ),
            "a: a learning rate of 0 has no decay",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_groups_are_of_one_rate_and_decay_and_independent_decay_is_of_no_rate() -> None:
    """An update decays by lr * decay: with both settings that is 0.01 x 0.1 at the peak, and 0.1 whatever the rate."""
    model = nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4), "head": nn.Linear(4, 8, bias=False)})
    parts = (
        Parameters(path=r"down\.weight", setting=Setting(lr=0.25, independent=True)),
        Parameters(path=r"head\.weight", setting=Setting(lr=0.5, decay=2.0)),
    )
    plan = apply(Recipe(parameters=parts), model)
    found = plan.parameter_groups(lr=0.01, weight_decay=0.1)
    assert [[name for name, _ in group["params"]] for group in found] == [
        ["up.weight"], ["up.bias", "down.bias"], ["down.weight"], ["head.weight"],
    ]  # fmt: skip
    assert [group["lr"] for group in found] == [0.01, 0.01, 0.0025, 0.005]
    assert [group["lr"] * group["weight_decay"] for group in found] == pytest.approx([0.001, 0.0, 0.1, 0.001])
    assert [group["lr_scale"] for group in found] == [1.0, 1.0, 0.25, 0.5]
    assert "parameters: down.weight: learning rate x 0.25, decay independent of the learning rate" in str(plan)


def test_a_models_own_multipliers_hold_where_the_recipe_says_nothing() -> None:
    class Model(nn.Sequential):
        def multipliers_of(self, name: str, shape: torch.Size) -> tuple[float, float]:
            return (2.0, 0.0) if name.startswith("0") else (1.0, 1.0)

    model = Model(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    said = (Parameters(path=r"0\.weight", setting=Setting(decay=3.0)),)
    for parts, expected in (((), [(2.0, 0.0), (1.0, 0.1)]), (said, [(2.0, 0.3), (1.0, 0.1)])):
        found = apply(Recipe(parameters=parts), Model(*model)).parameter_groups(lr=1.0, weight_decay=0.1)
        assert [(group["lr_scale"], group["weight_decay"]) for group in found] == [
            (rate, pytest.approx(decay)) for rate, decay in expected
        ]


def test_a_hooks_parameter_starts_by_its_hook() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

    said = Parameters(path="recipe.Gain.gain", setting=Setting(init=(0.0, 1.0)))
    with pytest.raises(ValueError, match=r"recipe\.Gain\.gain is a hook's"):
        apply(Recipe(parameters=(said,), hooks=(Gain(),)), nn.Sequential(nn.Linear(2, 2)))
    faster = Parameters(path="recipe.Gain.gain", setting=Setting(lr=10.0))
    plan = apply(Recipe(parameters=(faster,), hooks=(Gain(),)), nn.Sequential(nn.Linear(2, 2)))
    assert plan.parameter_groups(lr=1.0, weight_decay=0.1)[-1]["lr"] == 10.0


def test_what_is_said_of_a_tied_parameter_by_any_of_its_names_is_said_of_it() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "up": nn.Linear(4, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    plan = apply(Recipe(parameters=(Parameters(path=r"head\.weight", setting=Setting(lr=0.5)),)), model)
    assert plan.settings["embed.weight"] == Setting(lr=0.5)


def test_the_plan_says_what_is_left_to_a_training_loop() -> None:
    said = (Parameters(path="0.weight", setting=Setting(lr=0.5, init=(0.0, 1.0))),)
    plan = apply(Recipe(parameters=said), nn.Sequential(nn.Linear(2, 2)))
    left = "parameters: learning rates and decay are left to the training loop", "parameters: they start as they are"
    assert [line in str(plan) for line in left] == [True, True]
    plan.parameter_groups(lr=1.0, weight_decay=0.0)
    assert plan.initial("0.weight") == (0.0, 1.0)
    assert [line in str(plan) for line in left] == [False, False]
