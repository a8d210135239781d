"""Phases of a run: which steps, which GEMMs, by what; and what is remembered meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from narrowgauge.precision.apply import apply
from narrowgauge.precision.linear import QuantLinear
from narrowgauge.precision.loading import load
from narrowgauge.precision.plan import Plan
from narrowgauge.precision.recipe import Recipe, require_apart
from narrowgauge.precision.schedule import Span, parse_span
from torch import Tensor, nn

INS, OUTS = 64, 48


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(INS, OUTS, bias=False)})])}
    ).bfloat16()


def linear_of(recipe: Recipe, **options: Any) -> tuple[Plan, QuantLinear]:
    tree = model()
    plan = apply(recipe, tree, **options)
    linear = tree.get_submodule("layers.0.up_proj")
    assert isinstance(linear, QuantLinear)
    return plan, linear


def step(plan: Plan, linear: QuantLinear, number: int, total: int | None = 10) -> list[Tensor]:
    """y, dx, dw of a step whose data are a function of its number."""
    generator = torch.Generator().manual_seed(number)
    x = (torch.randn(32, INS, generator=generator) * (1 + number)).bfloat16().requires_grad_()
    dy = (torch.randn(32, OUTS, generator=generator) / (1 + number)).bfloat16()
    plan.begin_step(number, 0, total)
    y = linear(x)
    dx, dw = torch.autograd.grad(y, (x, linear.weight), dy)
    plan.end_step()
    return [y.detach(), dx, dw]


@pytest.mark.parametrize(
    ("bounds", "total", "steps", "told"),
    [
        ([0, 3], None, range(3), "steps 0 to 2"),
        ([4, None], 9, range(4, 9), "from step 4 on"),
        ([1, 3], 9, range(1, 3), "steps 1 to 2"),
        ([0, 0.1], 50, range(5), "from 0 to 0.1 of the run"),
        ([0, 1], 7, range(7), "from 0 to 1 of the run"),
        ([0.82, 1.0], 50, range(41, 50), "from 0.82 to 1 of the run"),
        ([0.82, None], 50, range(41, 50), "from 0.82 to 1 of the run"),
        ([0.82, 1.0], 5, range(5, 5), "from 0.82 to 1 of the run"),
        ([0.5, 1.0], None, range(0), "from 0.5 to 1 of the run"),
    ],
)
def test_spans(bounds: list[Any], total: int | None, steps: range, told: str) -> None:
    span = parse_span(bounds)
    found = span.steps(total)
    assert [number for number in range(60) if number in found and (total is None or number < total)] == list(steps)
    assert str(span) == told


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"steps": [0.5, 0.5]}], r"precision\.schedule\[0\]: steps=\[0\.5, 0\.5\]: the range is empty"),
        ([{"steps": [5, 3]}], "the range is empty"),
        ([{"steps": [-1, 3]}], "-1 is no step"),
        ([{"steps": [0.5, 30]}], "either whole steps, or parts of the run"),
        ([{"steps": [2.5, 30]}], "either whole steps"),
        ([{"steps": [True, 3]}], "True is no step"),
        ([{"steps": ["a", 3]}], "'a' is no step"),
        ([{"steps": [0, float("nan")]}], "nan is no step"),
        ([{"steps": 3}], r"steps=3: a list of two bounds"),
        ([{"gemms": ["fprop"]}], "a phase needs steps"),
        ([[0, 3]], "is no phase; write"),
        ([{"steps": [0, 3], "gemm": ["fprop"]}], r"unknown key 'gemm' \(did you mean 'gemms'\?\)"),
        ([{"steps": [0, 3], "gemms": ["fprob"]}], r"no GEMM named 'fprob' \(did you mean 'fprop'\?\)"),
        ([{"steps": [0, 3], "gemms": "fprop"}], "gemms='fprop': a list of"),
        ([{"steps": [0, 3], "gemms": []}], "at least one of"),
        ([{"steps": [0, 3], "gemms": ["fprop", "fprop"]}], "each at most once"),
        ([{"steps": [0, 3], "recipe": "mxfp9"}], r"no recipe named 'mxfp9' \(did you mean"),
        ([{"steps": [0, 3], "args": {"block": 32}}], "args are those of a recipe"),
        ([{"steps": [0, 3], "recipe": "fp32"}], "recipe=fp32: its dtypes are not the run's"),
        ([{"steps": [0, 3], "recipe": "nvfp4"}], "recipe=nvfp4 has a schedule of its own"),
        ([{"steps": [0, 3]}, {"steps": [2, None], "gemms": ["dgrad"]}], "two phases switch dgrad at one step"),
        ([{"steps": [0.1, 0.3]}, {"steps": [0.2, 0.4], "gemms": ["dgrad"]}], "two phases switch dgrad at one step"),
    ],
)
def test_a_schedule_that_cannot_be(entries: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load("mxfp8", {}, entries)
    assert "\n" not in str(error.value)


def test_phases_that_meet_only_in_a_run_of_some_length() -> None:
    schedule = load("mxfp8", {}, [{"steps": [0, 30]}, {"steps": [0.5, 1.0]}]).schedule
    require_apart(schedule, 60)
    with pytest.raises(ValueError, match="two phases switch fprop"):
        require_apart(schedule, 50)
    with pytest.raises(ValueError, match="begins after the run's 30 steps"):
        require_apart(load("mxfp8", {}, [{"steps": [30, 40]}]).schedule, 30)
    load("mxfp8", {}, [{"steps": [0, 0.3]}, {"steps": [0.3, 1]}, {"steps": [7, 9], "gemms": ["fprop"]}])
    with pytest.raises(ValueError, match="switches nothing: no linear is quantized"):
        apply(load("bf16", {}, [{"steps": [0, 3]}]), model())
    other = {"steps": [0, 3], "recipe": "fp8_delayed", "args": {"history": 3}}
    with pytest.raises(ValueError, match="one kind of amax history"):
        apply(load("fp8_delayed", {}, [other]), model())
    with pytest.raises(ValueError, match="it wants another"):
        load("fp8_delayed", {}, [{"steps": [0, 3], "recipe": "fp8_delayed", "args": {"reduce_amax": False}}])


def test_gemms_follow_the_recipe_of_their_phase() -> None:
    entries = [
        {"steps": [2, 4], "recipe": "mxfp4", "args": {"keep_last": 0}},
        {"steps": [4, 6], "gemms": ["fprop"]},
        {"steps": [5, 6], "gemms": ["wgrad"], "recipe": "fp8_current"},
    ]
    mixed = linear_of(load("mxfp8", {}, entries))
    alone = {
        name: linear_of(load(name, args))
        for name, args in (("mxfp8", {}), ("mxfp4", {"keep_last": 0}), ("fp8_current", {}))
    }
    plain = linear_of(load("mxfp8", {}, [{"steps": [0, None]}]))
    for number in range(8):
        got = step(*mixed, number)
        own = {name: step(*pair, number) for name, pair in alone.items()} | {"plain": step(*plain, number)}
        names = ["mxfp8"] * 3 if number in (0, 1, 6, 7) else ["mxfp4"] * 3
        names = (
            ["plain", "mxfp8", "mxfp8"] if number == 4 else ["plain", "mxfp8", "fp8_current"] if number == 5 else names
        )
        assert all(torch.equal(a, own[name][gemm]) for gemm, (a, name) in enumerate(zip(got, names, strict=True)))
    text = str(mixed[0])
    assert "schedule: steps 2 to 3: fprop, dgrad, wgrad in mxfp4(keep_last=0)" in text
    assert "    fprop: e4m3/1x32/e8m0-rceil x e4m3/1x32/e8m0-rceil  [" in text
    assert "        steps 2 to 3: e2m1/1x32/e8m0-rceil x e2m1/1x32/e8m0-rceil  [" in text
    assert "        steps 4 to 5: high precision (torch)" in text


def test_a_linear_left_alone_can_be_quantized_for_a_phase() -> None:
    narrow = linear_of(load("mxfp8", {}))
    mixed = linear_of(load("bf16", {}, [{"steps": [0.5, 1.0], "gemms": ["fprop", "wgrad"], "recipe": "mxfp8"}]))
    for number in (0, 7):
        y, _, dw = step(*mixed, number)
        own = step(*narrow, number)
        assert torch.equal(y, own[0]) == torch.equal(dw, own[2]) == (number == 7)
    plan, linear = mixed
    plan.resume(8, 10)
    assert linear.active == linear.plan.spec != linear.spec
    plan.resume(3, 10)
    assert linear.active == linear.spec


@pytest.mark.parametrize(
    ("base", "entry"),
    [
        ("fp8_delayed", {"steps": [1, 4]}),
        ("fp8_delayed", {"steps": [1, 4], "gemms": ["fprop", "wgrad"]}),
        ("fp8_delayed", {"steps": [1, 4], "recipe": "mxfp8"}),
        ("bf16", {"steps": [4, None], "recipe": "fp8_delayed"}),
    ],
)
def test_histories_go_on_while_off(base: str, entry: dict[str, Any]) -> None:
    """Every amax is noted at every step: once back, scales and products are those of a run that never paused."""
    mixed, always = linear_of(load(base, {}, [entry])), linear_of(load("fp8_delayed", {}))
    for number in range(6):
        got, own = step(*mixed, number), step(*always, number)
        for name in ("amax_history", "amax_held"):
            assert torch.equal(getattr(mixed[1], name), getattr(always[1], name))
        if number >= 4:
            assert all(map(torch.equal, got, own))
    linear = mixed[1].eval()
    before = linear.amax_history.clone()
    mixed[0].resume(3, 10)
    linear(torch.randn(4, INS).bfloat16() * 1e6)
    assert torch.equal(linear.amax_history, before)


def test_span_of_a_recipe() -> None:
    assert load("nvfp4", {}).schedule[0].span == Span(start=1 - 0.18, end=1)
    assert load("nvfp4", {"bf16_forward": 0}).schedule == ()
    with pytest.raises(ValueError, match="the part of a run is between 0 and 1, not 2"):
        load("nvfp4", {"bf16_forward": 2})
    with pytest.raises(ValueError, match="two phases switch fprop"):
        load("nvfp4", {}, [{"steps": [0.9, 1.0]}])
