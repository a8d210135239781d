"""The optimizer of a recipe's update rule, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch.optim import Optimizer

from ..precision.plan import Plan
from ..precision.states.driver import build
from ..precision.states.telemetry import step_with_sums
from .distributed import World
from .errors import require_at_least


class Schedule(Enum):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"  # warm-up, stable, decay (arXiv 2405.18392): constant, then linear over the last part


@dataclass(kw_only=True)
class OptimConfig:
    """Hyperparameters of the update; the rule itself is the precision recipe's, unless ``update`` names one."""

    name: str
    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # decoupled; not on norms and biases
    clip_norm: float = 1.0  # of the global gradient; 0 = off
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = 100
    warmup_max_fraction: float = 0.1  # of the run: a short run is not all warm-up
    min_lr_ratio: float = 0.1  # where linear, cosine and wsd end
    decay_fraction: float = 0.2  # of the run, for wsd
    update: str | None = None  # the update rule: adamw, lion, muon; null: as the recipe says
    update_args: dict[str, Any] = field(default_factory=dict)  # settings of a rule that is named
    moments: Any = None  # how moments and weights are held; null: as the recipe says
    telemetry_every: int = 0  # steps between measurements of what updates do to weights; 0 = none

    def validate(self) -> None:
        """Raises ValueError for a hyperparameter outside its range."""
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"optim.lr={self.lr}: must be positive")
        require_at_least("optim", self, eps=0, weight_decay=0, clip_norm=0, warmup_steps=0, telemetry_every=0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must be at least 0 and below 1")
        for name in ("warmup_max_fraction", "min_lr_ratio", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must be between 0 and 1")


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of update ``step`` (from 0) of a run of ``total_steps``."""
    warmup = min(config.warmup_steps, int(config.warmup_max_fraction * total_steps))
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    start = warmup
    if config.schedule is Schedule.wsd:
        start = max(warmup, total_steps - round(config.decay_fraction * total_steps))
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    floor = config.min_lr_ratio
    match config.schedule:
        case Schedule.constant:
            factor = 1.0
        case Schedule.linear | Schedule.wsd:
            factor = 1.0 - (1.0 - floor) * progress
        case Schedule.cosine:
            factor = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * factor


def build_optimizer(
    config: OptimConfig,
    plan: Plan,
    *,
    seed: int,
    backend: str,
) -> Optimizer:
    """The update rule of the plan's recipe over groups of parameters of one learning rate and decay.

    ``seed``: of rounding noise. Raises ValueError if the rule cannot hold its states as the recipe's ``moments`` say,
    and for hooks that change weights of which there is a master copy or a residual.
    """
    moments = plan.recipe.moments
    groups = plan.parameter_groups(lr=config.lr, weight_decay=config.weight_decay)
    betas = (config.beta1, config.beta2)
    optimizer = build(
        plan.recipe.update,
        groups,
        lr=config.lr,
        betas=betas,
        eps=config.eps,
        moments=moments,
        seed=seed,
        backend=backend,
    )
    masters = any(key.startswith("master") for state in optimizer.state.values() for key in state)
    if masters and plan.wants("after_update"):
        raise ValueError(f"{moments}: the next update would undo what a hook of the recipe does to weights")
    return optimizer


def measured_step(optimizer: Optimizer, world: World, num_replicas: int = 1) -> dict[str, float]:
    """``optimizer.step()`` with the same bits, and what it did to the weights of all ranks.

    With w the weights, u the updates as computed in FP32, decay included, and e = new w - old w as they are held:

    * ``update_ratio``: ||e|| / ||w||
    * ``lost_updates``: fraction of elements whose weight did not change though their update is not zero
    * ``edq``: effective descent quality <e, u> / ||u||, and ``edq_ratio``: that over ||u||, 1 where nothing is lost
      (Collage, ICML 2024). Of two-term weights only the high part counts.

    Only ``update_ratio`` for an optimizer that does not say what it computes.
    """
    count, lost, weights, changes, updates, products = world.sum(*step_with_sums(optimizer))
    result = {"update_ratio": math.sqrt(changes / weights) if weights else 0.0}
    if not math.isnan(updates):
        result["lost_updates"] = lost / count
        result["edq"] = products / math.sqrt(updates * num_replicas) if updates else 0.0
        result["edq_ratio"] = products / updates if updates else 1.0
    return result
