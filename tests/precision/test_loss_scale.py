"""Loss scaling against torch's own rule, and its limits."""

from __future__ import annotations

import random

import pytest
import torch
from narrowgauge.precision.apply import apply
from narrowgauge.precision.loading import load
from narrowgauge.precision.loss_scale import LossScaler
from torch import nn


@pytest.mark.parametrize(
    "scaler",
    [LossScaler(interval=3, floor=1e-30), LossScaler(init=3.0, growth=1.7, backoff=0.3, interval=2, floor=1e-30)],
)
def test_steps_as_torch_does(scaler: LossScaler) -> None:
    rng = random.Random(0)
    scale, clean = scaler.start()
    theirs, tracker = torch.tensor([scaler.init]), torch.zeros(1, dtype=torch.int32)
    for _ in range(200):
        overflow = rng.random() < 0.25
        scale, clean = scaler.update(scale, clean, overflow)
        found = torch.tensor([float(overflow)])
        torch._amp_update_scale_(theirs, tracker, found, scaler.growth, scaler.backoff, scaler.interval)
        assert (float(scale), int(clean)) == (float(theirs), int(tracker))
    assert scale.dtype == torch.float32


def test_neither_below_the_floor_nor_to_infinity() -> None:
    scaler = LossScaler(init=2.0**127, interval=1, floor=2.0**125)
    scale, clean = scaler.update(*scaler.start(), False)
    assert float(scale) == 2.0**127
    for wanted in (2.0**126, 2.0**125, 2.0**125):
        scale, clean = scaler.update(scale, clean, True)
        assert (float(scale), int(clean)) == (wanted, 0)


@pytest.mark.parametrize(
    "wrong", [{"init": 0.5}, {"init": 1e39}, {"floor": 0.0}, {"growth": 0.9}, {"backoff": 1.0}, {"interval": 0}]
)
def test_constants_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="loss scale: "):
        LossScaler(**wrong)  # type: ignore[arg-type]


def test_a_plan_remembers_its_scale_and_knows_when_it_can_back_off() -> None:
    plan = apply(load("fp16", {"init_scale": 4.0, "interval": 2}), nn.Sequential(nn.Linear(4, 4)).half())
    state = plan.state_tensors()
    assert set(state) == {"loss_scale", "loss_scale_clean_steps"}
    seen = []
    for applied, overflow in (
        (True, False),
        (False, False),
        (True, False),
        (False, True),
        (False, True),
        (False, True),
    ):
        plan.end_step(applied=applied, overflow=overflow)
        seen.append((plan.loss_scale, int(state["loss_scale_clean_steps"]), plan.can_back_off))
    # A step whose loss is not finite changes nothing.
    assert seen == [(4, 1, True), (4, 1, True), (8, 0, True), (4, 0, True), (2, 0, True), (1, 0, False)]
    plan.reset_state()
    assert float(state["loss_scale"]) == 4.0
    assert apply(load("bf16", {}), nn.Sequential(nn.Linear(4, 4))).loss_scale is None


@pytest.mark.parametrize("bias", [False, True])
def test_fp16_products_are_rounded_once(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32, bias=bias)).half()
    wide = nn.Linear(48, 32, bias=bias)
    wide.load_state_dict({name: value.float() for name, value in model[0].state_dict().items()})
    apply(load("fp16", {}), model)
    x, dy = torch.randn(5, 48).half().requires_grad_(), torch.randn(5, 32).half()
    model(x).backward(dy)
    z = x.detach().float().requires_grad_()
    wide(z).backward(dy.float())
    assert torch.equal(model(x), wide(z).half())
    assert torch.equal(x.grad, z.grad.half())
    assert torch.equal(model[0].weight.grad, wide.weight.grad.half())
