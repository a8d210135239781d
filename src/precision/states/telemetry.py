"""How much of a computed update reaches the stored weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .adamw import Encoded, Update, new_values
from .codecs import FP32
from .updates import CodecAdamW, local


@torch.no_grad()
def step_with_sums(optimizer: Optimizer) -> tuple[float, float, float, float, float, float]:
    """``optimizer.step()``, one parameter at a time, and sums over this rank's elements.

    With w the old weights, e the change of the stored ones, u the update as computed in FP32: the number of elements;
    that of those with e = 0 and u != 0; the sums of w^2, e^2, u^2 and e u. Those with u are NaN for an optimizer that
    is neither ``CodecAdamW`` nor torch's AdamW. FP32 copies of one parameter at a time are allocated.
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
    """A copy of the stored weights, FP32: of two terms the high one; the master weights where there are any."""
    if isinstance(optimizer, CodecAdamW) and (place := optimizer.places[parameter]).has_master:
        return place.codecs[2].decode(place.parts[2]).clone().view(local(parameter).shape)
    return local(parameter.detach()).float().clone()


def _intended(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> Tensor | None:
    """The update that the next step computes, before any weight is rounded: FP32, of the parameter's shape here."""
    state = optimizer.state[parameter]
    if isinstance(optimizer, CodecAdamW):
        update = optimizer.next_update(parameter, group, float(state["step"]) + 1, {})
    elif isinstance(optimizer, torch.optim.AdamW):
        assert parameter.grad is not None
        tensors = (state["exp_avg"], state["exp_avg_sq"], parameter.detach())
        m, v, w = (Encoded(codec=FP32, parts={"": local(tensor)}) for tensor in tensors)
        update = Update(
            grad=local(parameter.grad), m=m, v=v, w=w, weight=None, row_offset=0, lr=float(group["lr"]),
            betas=group["betas"], eps=group["eps"], decay=group["weight_decay"], t=float(state["step"]) + 1,
        )  # fmt: skip
    else:
        return None
    new_m, new_v, _ = new_values(update)
    weight = update.w.codec.decode(update.w.parts)
    u = new_m / (new_v.sqrt() / update.correction + update.eps) * -update.step_size - weight * (
        update.lr * update.decay
    )
    return u.view(local(parameter).shape)
