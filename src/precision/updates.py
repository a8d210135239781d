"""Update rules: how a step changes the parameters and the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer


class UpdateRule(Protocol):
    """Builds the optimizer of a recipe.

    The state of every parameter must exist when ``build`` returns, as plain tensors or DTensors in
    ``optimizer.state[parameter]``: a checkpoint then loads in place, without a pickle and without a dry-run step.
    """

    def build(
        self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> Optimizer: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """AdamW with decoupled decay (arXiv 1711.05101), moments in the parameters' dtype, by ``torch.optim``."""

    fused: bool = True

    def build(
        self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> Optimizer:
        optimizer = torch.optim.AdamW(
            list(groups), lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=self.fused, foreach=False
        )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = self._fresh(parameter)
        return optimizer

    def _fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        # What torch's AdamW would make at its first step; the step counter lies beside a fused update.
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device if self.fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
