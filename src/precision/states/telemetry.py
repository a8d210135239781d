"""How much of a computed update reaches the stored weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .adamw import AdamW
from .driver import StateOptimizer
from .exchange import local
from .rules import Scalars


@torch.no_grad()
def step_with_sums(optimizer: Optimizer) -> tuple[float, float, float, float, float, float]:
    """``optimizer.step()``, one parameter at a time, and sums over this rank's elements.

    With w the old weights, e the change of the stored ones, u the update as computed in FP32: the number of elements;
    that of those with e = 0 and u != 0; the sums of w^2, e^2, u^2 and e u. Those with u are NaN for an optimizer that
    is neither ``StateOptimizer`` nor torch's AdamW. FP32 copies of one parameter at a time are allocated.
    """
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grads = [parameter.grad for parameter, _ in parameters]
    for parameter, _ in parameters:
        parameter.grad = None
    sums = torch.zeros(6, dtype=torch.float64)
    for (parameter, group), grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
        u = _intended(optimizer, parameter, group)
        before = _stored_weight(optimizer, parameter)
        optimizer.step()
        e = (_stored_weight(optimizer, parameter) - before).double()
        u = torch.full_like(e, torch.nan) if u is None else u.double()
        lost = ((e == 0) & (u != 0)).sum()
        parts = [lost, before.double().square().sum(), e.square().sum(), u.square().sum(), (e * u).sum()]
        sums += torch.tensor([e.numel(), *map(float, parts)], dtype=torch.float64)
        parameter.grad = None
    for (parameter, _), grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    count, lost_count, weights, changes, updates, products = sums.tolist()
    return count, lost_count, weights, changes, updates, products


def _stored_weight(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """A copy of the stored weights, FP32."""
    if isinstance(optimizer, StateOptimizer):
        return optimizer.stored_weight(parameter)
    return local(parameter.detach()).float().clone()


def _intended(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> Tensor | None:
    """The update that the next step computes, before any weight is rounded: of the parameter's shape here."""
    if isinstance(optimizer, StateOptimizer):
        return optimizer.intended(parameter, group)
    if not isinstance(optimizer, torch.optim.AdamW):
        return None
    state = optimizer.state[parameter]
    assert parameter.grad is not None
    grad, m, v, w = map(local, (parameter.grad, state["exp_avg"], state["exp_avg_sq"], parameter.detach()))
    scalars = Scalars(
        lr=float(group["lr"]), decay=group["weight_decay"], betas=group["betas"], eps=group["eps"],
        t=float(state["step"]) + 1, shape=tuple(parameter.shape), rows=slice(None), plain=True,
    )  # fmt: skip
    return AdamW().intended({"m": m, "v": v}, grad, w, scalars)
