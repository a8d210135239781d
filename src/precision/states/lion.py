"""Lion: the sign of an interpolated momentum (arXiv 2302.06675, algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .rules import Scalars, State, UpdateRule, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Lion(UpdateRule):
    """One state: w = w (1 - lr decay) - lr sign(beta1 m + (1 - beta1) g), then m = beta2 m + (1 - beta2) g.

    Every element moves by the learning rate, which is 3 to 10 times less than AdamW's, with as much more decay.
    """

    states = (State(name="m", key="exp_avg"),)

    def update(self, states: Values, grad: Tensor, weight: Tensor, scalars: Scalars) -> tuple[Values, Tensor]:
        (beta1, beta2), m = scalars.betas, states["m"]
        direction = (m * beta1).add_(grad, alpha=1 - beta1).sign_()
        decayed = weight * (1 - scalars.lr * scalars.decay)
        return {"m": (m * beta2).add_(grad, alpha=1 - beta2)}, decayed.add_(direction, alpha=-scalars.lr)
