"""AdamW with decoupled decay (arXiv 1711.05101), as torch computes it.

For one parameter, with the step's scalars computed in float64 and rounded once to FP32, every operation in FP32:

    w = w * (1 - lr * weight_decay)                    where there is decay
    m = lerp(m, g, 1 - beta1)                          one fused multiply-add
    v = fma((1 - beta2) * g, g, v * beta2)
    w = w + (-lr / (1 - beta1^t)) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

as ``torch.optim.AdamW(foreach=False, fused=False)`` does; bit for bit where all three are plain FP32. Elsewhere square
roots are rounded correctly, as torch's on a CPU are not (nor are MKL's fast). m, v and w are what their
codecs stand for; the new w comes from the new moments before they are rounded. The C++ kernel gives the bits of plain
torch, and so does the one in Triton in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .adamw_cpu import CpuAdam, correction, step_size
from .adamw_triton import TritonAdam
from .codecs import FP32
from .driver import StateOptimizer
from .moments import STANDARD, Moments
from .rules import Scalars, State, UpdateRule, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW(UpdateRule):
    """As the rule of all parameters, FP32 with FP32 states, it is torch's own, fused unless ``fused`` is false."""

    fused: bool = True
    states = (State(name="m", key="exp_avg"), State(name="v", key="exp_avg_sq", signed=False))
    kernels = (CpuAdam(), TritonAdam())

    def update(self, states: Values, grad: Tensor, weight: Tensor, scalars: Scalars) -> tuple[Values, Tensor]:
        (beta1, beta2), w = scalars.betas, weight
        if scalars.decay != 0:
            w = w * (1 - scalars.lr * scalars.decay)
        m = states["m"].lerp(grad, 1 - beta1)
        v = states["v"].mul(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = v.sqrt() if scalars.plain else v.double().sqrt().to(v.dtype)
        denominator = (root / correction(scalars)).add_(scalars.eps)
        return {"m": m, "v": v}, w.addcdiv(m, denominator, value=-step_size(scalars))

    def intended(self, states: Values, grad: Tensor, weight: Tensor, scalars: Scalars) -> Tensor:
        new, _ = self.update(states, grad, weight, scalars)
        share = new["m"] / (new["v"].sqrt() / correction(scalars) + scalars.eps)
        return share * -step_size(scalars) - weight * (scalars.lr * scalars.decay)

    def build(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        moments: Moments = STANDARD,
        seed: int = 0,
        backend: str = "auto",
    ) -> Optimizer:
        """torch's optimizer where all is FP32, else ``StateOptimizer``; that, too, for a rule derived from this one."""
        groups = list(groups)
        codecs = *(moments.of(self, state) for state in self.states), moments.master or FP32
        if (
            type(self) is not AdamW
            or any(codec != FP32 for codec in codecs)
            or any(_dtype_of(group) != torch.float32 for group in groups)
        ):
            return StateOptimizer(
                groups, rule=self, lr=lr, betas=betas, eps=eps, moments=moments, seed=seed, backend=backend
            )
        optimizer = torch.optim.AdamW(
            groups, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=self.fused, foreach=False
        )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                # What torch's AdamW would create at its first step; a fused update has its step counter on the device.
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device if self.fused else "cpu"),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return optimizer


def _dtype_of(group: dict[str, Any]) -> torch.dtype:
    first = group["params"][0]
    parameter: Tensor = first[1] if isinstance(first, tuple) else first
    return parameter.dtype
