"""AdamW over codecs: decode, update in FP32, encode. ``reference`` is the definition; ``cpu`` gives the same bits, and
so does ``triton`` in Triton's interpreter.

For one parameter, with the step's scalars computed in float64 and rounded once to FP32, every operation in FP32:

    w = w * (1 - lr * weight_decay)                    where there is decay
    m = lerp(m, g, 1 - beta1)                          one fused multiply-add
    v = fma((1 - beta2) * g, g, v * beta2)
    w = w + (-lr / (1 - beta1^t)) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

as ``torch.optim.AdamW(foreach=False, fused=False)`` does; bit for bit where all three are plain FP32. Elsewhere square
roots are rounded correctly, as torch's on a CPU are not (nor are MKL's fast). m, v and w are what their
codecs stand for; the new w comes from the new moments before they are rounded.

A per-tensor scale needs the amax of the new values, on all ranks, before the first of them is encoded. So there are two
passes, and the second computes the values again: no FP32 copy of anything is stored in between. (The reference, in
plain torch, has FP32 copies of one tensor at a time.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..noise import Noise
from .codecs import FP32, Codec, Parts


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Encoded:
    """One matrix in its codec: ``parts`` are changed in place. ``key``: int32 [2], of its rounding noise."""

    codec: Codec
    parts: Parts
    key: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Update:
    """One parameter's update on this rank.

    Args:
        grad: [rows, cols], FP32 or BF16, contiguous.
        m, v, w: the moments and the weights.
        weight: the parameter [rows, cols], if ``w`` are separate master weights; else None: it is ``w``'s plain part.
        row_offset: index of the first row in the full parameter.
        lr, betas, eps, decay: as in torch; ``decay`` is the coefficient.
        t: number of this update, from 1.
        gate: FP32 [2]: what the gradient is multiplied by, and 1, or 0 for an update that is left out; None: 1 and 1.
    """

    grad: Tensor
    m: Encoded
    v: Encoded
    w: Encoded
    weight: Tensor | None
    row_offset: int
    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float
    t: float
    gate: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        """FP32, multiplied, and rounded to its own dtype, as in place."""
        if self.gate is None:
            return self.grad.float()
        return (self.grad.float() * self.gate[0]).to(self.grad.dtype).float()

    @property
    def states(self) -> tuple[Encoded, Encoded, Encoded]:
        return self.m, self.v, self.w

    @property
    def step_size(self) -> float:
        return float(self.lr / (1 - self.betas[0] ** self.t))

    @property
    def correction(self) -> float:
        """What sqrt(v) is divided by."""
        return float((1 - self.betas[1] ** self.t) ** 0.5)

    @property
    def plain(self) -> bool:
        """Whether no state is narrow: then even the square roots are torch's."""
        return self.weight is None and all(state.codec == FP32 for state in self.states)

    @property
    def per_tensor(self) -> bool:
        """Whether one scale of a state wants an amax over all ranks."""
        return any(state.codec.per_tensor for state in self.states)


class AdamBackend(Protocol):
    name: str

    def why_not(self, device: torch.device, codecs: Collection[Codec] = (), beta1: float = 0.9) -> str | None:
        """None if this backend can update parameters on ``device`` whose states have these codecs, with this least
        beta1; else why not.
        """

    def amaxes(self, updates: Sequence[Update]) -> Tensor:
        """FP32 [updates, 3]: amax of the new m, v and w of this rank where one scale serves the tensor, else 0."""

    def update(self, updates: Sequence[Update], amaxes: Tensor | None) -> None:
        """All updates, in place. ``amaxes`` [updates, 3]: over all ranks; None if no scale wants one."""


def new_values(u: Update) -> tuple[Tensor, Tensor, Tensor]:
    """The new m, v and w: FP32 [rows, cols], before they are encoded."""
    grad = u.gradient
    m, v, w = (state.codec.decode(state.parts) for state in u.states)
    if u.decay != 0:
        w = w * (1 - u.lr * u.decay)
    m = m.lerp(grad, 1 - u.betas[0])
    v = v.mul(u.betas[1]).addcmul_(grad, grad, value=1 - u.betas[1])
    root = v.sqrt() if u.plain else v.double().sqrt().float()
    denominator = (root / u.correction).add_(u.eps)
    return m, v, w.addcdiv(m, denominator, value=-u.step_size)


class ReferenceAdam:
    """Plain torch on any device, parameter by parameter."""

    name = "reference"

    def why_not(self, device: torch.device, codecs: Collection[Codec] = (), beta1: float = 0.9) -> str | None:
        return None

    def amaxes(self, updates: Sequence[Update]) -> Tensor:
        result = torch.zeros(len(updates), 3, dtype=torch.float32, device=updates[0].grad.device)
        for row, u in zip(result, updates, strict=True):
            if u.per_tensor:
                for which, (state, value) in enumerate(zip(u.states, new_values(u), strict=True)):
                    if state.codec.per_tensor and value.numel():
                        row[which] = value.abs().amax()
        return result

    def update(self, updates: Sequence[Update], amaxes: Tensor | None) -> None:
        for index, u in enumerate(updates):
            values = new_values(u)
            for which, (state, value) in enumerate(zip(u.states, values, strict=True)):
                noise = Noise(key=state.key, row_offset=u.row_offset) if state.key is not None else None
                amax = amaxes[index, which] if amaxes is not None and state.codec.per_tensor else None
                for name, part in state.codec.encode(value, amax=amax, noise=noise).items():
                    stored = state.parts[name]
                    stored.copy_(part if u.gate is None else torch.where(u.gate[1] != 0, part, stored))
            if u.weight is not None:
                u.weight.copy_(u.w.codec.decode(u.w.parts))


REFERENCE: AdamBackend = ReferenceAdam()
