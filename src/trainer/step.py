"""A training step: forward and backward over its micro-batches, and one update, if host or device decide for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..precision.states.updates import can_gate, gated_step, multiply
from .data.batches import Batch, DataSource
from .distributed import World
from .optim import OptimConfig, learning_rate, measured_step
from .spikes import Spike
from .state import TrainState, local


@dataclass(frozen=True)
class StepResult:
    """What became of a step.

    ``read`` gives the loss, in nats a token over the global batch, and the gradient's norm before clipping; after them
    the auxiliary losses, each as the loss. It waits for the device where the step has not: so do the properties, the
    first time.
    """

    lr: float
    read: Callable[[], tuple[float, ...]]
    loss_scale: float | None = None  # of this step, if the recipe scales the loss
    caught: bool = False  # an overflow of scaled gradients that lowers the loss scale: no sign of divergence
    telemetry: dict[str, float] = field(default_factory=dict)  # of the update, at the steps it is asked for
    spike: Spike | None = None  # found in its numbers
    aux_names: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        return self.read()[0]

    @property
    def grad_norm(self) -> float:
        return self.read()[1]

    @property
    def aux(self) -> dict[str, float]:
        """The auxiliary losses by name."""
        return dict(zip(self.aux_names, self.read()[2:], strict=True))

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.read()[:2]))

    @property
    def applied(self) -> bool:
        """False: something was not finite, or the step a spike, and the parameters are as before."""
        return self.finite and self.spike is None


def update_from(
    state: TrainState, source: DataSource, world: World, config: OptimConfig, step: int, total_steps: int
) -> StepResult:
    """Forward and backward over the micro-batches of ``step``; one update, or none if it is not finite, or a spike."""
    model, optimizer, plan, device = state.model, state.optimizer, state.plan, world.device
    data_step = state.data_step(step)
    plan.begin_step(step, source.first_sample(data_step), total_steps)
    world.watch.at(f"step {step + 1}, reading its batch")
    batches = [source.batch(data_step, micro) for micro in range(source.num_micro)]
    world.watch.at(f"step {step + 1}")
    # Over all ranks and micro-batches, so that accumulation and world size change nothing but the order of sums.
    (total_weight,) = world.sum(sum(float(batch.weights.sum()) for batch in batches))
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    aux_sums: dict[str, Tensor] = {}
    counts = counts_of(state, batches, world) if model.counts_first else None
    own_counts: dict[str, Tensor] = {}
    loss_scale = plan.loss_scale
    for batch in batches:
        plan.begin_micro(batch.first_sample, len(batch.tokens))
        model.set_requires_gradient_sync(batch is batches[-1])
        outputs = _outputs(model, batch, device, counts)
        weights_BT = batch.weights.to(device, non_blocking=True)
        losses_BT = (outputs if isinstance(outputs, Tensor) else outputs.losses_BT) * weights_BT
        scaled = losses_BT.sum() / total_weight
        if not isinstance(outputs, Tensor):
            for name, aux_BT in outputs.aux.items():
                weighted_BT = aux_BT * weights_BT
                scaled = scaled + weighted_BT.sum() / total_weight
                here = weighted_BT.detach().sum(dtype=torch.float64)
                aux_sums[name] = aux_sums[name] + here if name in aux_sums else here
            if counts is None:
                _add(own_counts, outputs.counts)
        if plan.wants("loss_terms"):
            scaled = scaled + plan.loss_terms() * (float(batch.weights.sum()) / total_weight)
        (scaled if loss_scale is None else scaled * loss_scale).backward()
        loss_sum += losses_BT.detach().sum(dtype=torch.float64)

    counts = add_up_counts(own_counts, world) if counts is None else counts
    gradients = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    # Of parameters that every rank has, and not a part of.
    replicated = [world.add_up_there(p.grad) for p in plan.hook_parameters().values() if p.grad is not None]
    if loss_scale is not None:
        torch._foreach_mul_([*gradients, *replicated], 1.0 / loss_scale)
    if plan.wants("before_update"):
        plan.before_update({name: local(p.grad) for name, p in state.parameters().items() if p.grad is not None})
    lr = learning_rate(config, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    measured = due(config.telemetry_every, step + 1)
    factor = None
    if world.deferred and not replicated and not plan.wants("after_update"):
        totals = _totals_there(world, loss_sum, gradients, aux_sums)
        if config.clip_norm > 0:
            there = (totals[1] / state.num_replicas).sqrt()
            factor = (config.clip_norm / (there + 1e-6)).clamp(max=1.0).float()
        # A new loss scale, the telemetry, and whether it is a spike hang on the numbers of this very step.
        if loss_scale is None and not measured and state.spikes is None and can_gate(optimizer):
            return _update_there(state, totals, factor, total_weight, lr, counts, tuple(aux_sums))
        total_loss, total_squares, *aux_totals = totals.tolist()
    else:
        # In float64, so that neither sum depends on how the tensors are sharded.
        squares = _squares(gradients) + _squares(replicated) * (state.num_replicas / world.size)
        total_loss, total_squares, *aux_totals = world.sum(float(loss_sum), squares, *map(float, aux_sums.values()))
    loss, grad_norm = total_loss / total_weight, math.sqrt(total_squares / state.num_replicas)
    state.settle()
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    spike = state.spikes.observe(loss, grad_norm) if finite and state.spikes is not None else None
    applied = finite and spike is None
    overflow = math.isfinite(loss) and not math.isfinite(grad_norm)
    caught = overflow and plan.can_back_off
    telemetry: dict[str, float] = {}
    gradients += replicated
    if applied:
        if factor is not None:
            multiply(optimizer, gradients, factor)
        elif config.clip_norm > 0:
            torch._foreach_mul_(gradients, min(1.0, config.clip_norm / (grad_norm + 1e-6)))
        if measured:
            telemetry = measured_step(optimizer, world, state.num_replicas)
        else:
            optimizer.step()
        if plan.wants("after_update"):
            plan.after_update({name: local(parameter.detach()) for name, parameter in state.parameters().items()})
        if counts:
            with torch.no_grad():
                model.after_step(counts)
    optimizer.zero_grad(set_to_none=True)
    loss_of_step = torch.full((), loss, dtype=torch.float64, device=device) if plan.wants_loss else None
    plan.end_step(applied=applied, overflow=overflow, loss=loss_of_step)
    numbers = (loss, grad_norm, *(total / total_weight for total in aux_totals))
    return StepResult(lr, lambda: numbers, loss_scale, caught, telemetry, spike, tuple(aux_sums))


def counts_of(state: TrainState, batches: list[Batch], world: World) -> dict[str, Tensor]:
    """The counts of the global batch, from a forward pass of each micro-batch without gradients.

    In training mode, with the noise of the pass that follows: what is rounded, and so what is chosen, is the same; but
    for histories of amaxes that move at every micro-batch, which stand still here. The probe looks at passes with
    gradients alone.
    """
    counts: dict[str, Tensor] = {}
    with torch.no_grad(), state.plan.counting():
        for batch in batches:
            state.plan.begin_micro(batch.first_sample, len(batch.tokens))
            tokens_BT, positions_BT = _inputs(batch, world.device)
            _add(counts, state.model(tokens_BT[:, :-1], None, positions_BT, counting=True))
    return add_up_counts(counts, world)


def _add(counts: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, count in more.items():
        counts[name] = counts[name] + count if name in counts else count.detach()


def add_up_counts(counts: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Counts summed over ranks, in one message, in float64: whole numbers stay exact."""
    if world.size == 1 or not counts:
        return counts
    flat = torch.cat([count.flatten().double() for count in counts.values()])
    parts = world.add_up_there(flat).split([count.numel() for count in counts.values()])
    return {
        name: part.view(count.shape).to(count.dtype) for (name, count), part in zip(counts.items(), parts, strict=True)
    }


def _squares(gradients: list[Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2 for gradient in gradients)


def _totals_there(world: World, loss_sum: Tensor, gradients: list[Tensor], aux_sums: Mapping[str, Tensor]) -> Tensor:
    """The loss, the squares of the gradient and auxiliary losses, summed over all ranks on the device: float64.

    Norms are in float64 here too, but their squares are added up in another order than on the host.
    """
    some = [gradient for gradient in gradients if gradient.numel()]
    norms = torch._foreach_norm(some, 2, torch.float64) if some else [loss_sum.new_zeros(())]
    return world.add_up_there(torch.stack([loss_sum, torch.stack(norms).square().sum(), *aux_sums.values()]))


def _update_there(
    state: TrainState,
    totals: Tensor,
    factor: Tensor | None,
    total_weight: float,
    lr: float,
    counts: dict[str, Tensor],
    aux_names: tuple[str, ...],
) -> StepResult:
    """The end of a step that the device decides about: as in ``update_from``, but no number is waited for."""
    num_replicas, arriving = state.num_replicas, to_host(totals)
    applied = totals[:2].isfinite().all()
    # The number of this update hangs on whether the last one was applied. That is known by now, unless the device is
    # a full step behind: then it has this step's forward and backward pass to do while the host waits.
    state.settle()
    leave_out = gated_step(state.optimizer, applied, factor)
    state.optimizer.zero_grad(set_to_none=True)
    if counts:
        _after_step_there(state.model, counts, applied)
    state.plan.end_step(applied=applied, loss=totals[0] / total_weight if state.plan.wants_loss else None)

    @functools.cache
    def read() -> tuple[float, ...]:
        total_loss, total_squares, *aux_totals = arriving()
        loss, grad_norm = total_loss / total_weight, math.sqrt(total_squares / num_replicas)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            leave_out()
        return loss, grad_norm, *(total / total_weight for total in aux_totals)

    state.unread = read
    return StepResult(lr, read, aux_names=aux_names)


@torch.no_grad()
def _after_step_there(model: Any, counts: dict[str, Tensor], applied: Tensor) -> None:
    """``model.after_step``, whose writes into buffers are undone on the device where the step was not applied."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.after_step(counts)
    if any(one is not now for (one, _), now in zip(before, model.buffers(), strict=True)):
        raise RuntimeError(f"{type(model).__name__}.after_step replaces a buffer: write into it, as by copy_")
    for buffer, old in before:
        buffer.copy_(torch.where(applied, buffer, old))


def to_host(numbers: Tensor) -> Callable[[], list[float]]:
    """Send ``numbers`` [n] to the host. Calling the result waits for them, and for nothing that comes after them."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    there.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[float]:
        arrived.synchronize()
        return there.tolist()  # type: ignore[no-any-return]

    return wait


def losses_of(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """The losses of the tokens, [B, T], without auxiliary ones."""
    outputs = _outputs(model, batch, device, None)
    losses_BT: Tensor = outputs if isinstance(outputs, Tensor) else outputs.losses_BT
    return losses_BT


def _outputs(model: nn.Module, batch: Batch, device: torch.device, counts: Mapping[str, Tensor] | None) -> Any:
    tokens_BT, positions_BT = _inputs(batch, device)
    given = {} if counts is None else {"counts": counts}
    return model(tokens_BT[:, :-1], tokens_BT[:, 1:], positions_BT, **given)


def _inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor | None]:
    positions_BT = None if batch.positions is None else batch.positions.to(device, non_blocking=True)
    return batch.tokens.to(device, non_blocking=True), positions_BT


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
