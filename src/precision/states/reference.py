"""Updates of any rule in plain torch, parameter by parameter: decode, the rule's function, encode. The definition.

A per-tensor scale needs the amax of the new values, on all ranks, before the first of them is encoded. So there are two
passes, and the second computes the values again: FP32 copies are of one tensor at a time. Where ranks exchanged
something for an update, its values are computed once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..noise import Noise
from .codecs import FP32, Codec, Parts
from .rules import Extent, Scalars, Shape, Sum, UpdateRule


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Encoded:
    """One matrix in its codec: ``parts`` are changed in place. ``key``: int32 [2], of its rounding noise.

    ``shared``: every rank has all of it, so its noise counts rows from 0.
    """

    codec: Codec
    parts: Parts
    key: Tensor | None = None
    shared: bool = False


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Kind:
    """What the updates of a parameter have in common: its rule and the shapes of its states, in the rule's order."""

    rule: UpdateRule
    extents: tuple[Extent, ...]
    shape: Shape  # of the full parameter


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Update:
    """One parameter's update on this rank.

    Args:
        kind: rule and shapes.
        grad: [rows, cols], FP32 or BF16, contiguous.
        states: those of the rule in its order, and last the weights.
        weight: the parameter [rows, cols], if the weights are separate master weights; else None: it is their plain
            part.
        row_offset: index of the first row in the full parameter.
        lr, betas, eps, decay: as in torch; ``decay`` is the coefficient.
        t: number of this update, from 1.
        gate: FP32 [2]: what the gradient is multiplied by, and 1, or 0 for an update that is left out; None: 1 and 1.
        exchanged: what the rule's ``exchange`` asked for.
        key: int32 [2], of the rule's own noise.
    """

    kind: Kind
    grad: Tensor
    states: tuple[Encoded, ...]
    weight: Tensor | None
    row_offset: int
    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float
    t: float
    gate: Tensor | None = None
    exchanged: Tensor | None = None
    key: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        """FP32, multiplied, and rounded to its own dtype, as in place."""
        if self.gate is None:
            return self.grad.float()
        return (self.grad.float() * self.gate[0]).to(self.grad.dtype).float()

    @property
    def plain(self) -> bool:
        """Whether no state is narrow: then even the square roots of AdamW are torch's."""
        return self.weight is None and all(state.codec == FP32 for state in self.states)

    @property
    def per_tensor(self) -> bool:
        """Whether one scale of a state wants an amax over all ranks."""
        return any(state.codec.per_tensor for state in self.states)

    @property
    def scalars(self) -> Scalars:
        rows = slice(self.row_offset, self.row_offset + self.grad.shape[0])
        return Scalars(
            lr=self.lr,
            decay=self.decay,
            betas=self.betas,
            eps=self.eps,
            t=self.t,
            shape=self.kind.shape,
            rows=rows,
            plain=self.plain,
            exchanged=self.exchanged,
            noise=Noise(key=self.key, row_offset=self.row_offset) if self.key is not None else None,
        )


class Backend(Protocol):
    """Who computes updates of one rule."""

    name: str

    def why_not(self, device: torch.device, codecs: Collection[Codec] = (), beta1: float = 0.9) -> str | None:
        """None if this backend can update parameters on ``device`` whose states have these codecs, with this least
        beta1; else why not.
        """

    def amaxes(self, updates: Sequence[Update]) -> Tensor:
        """FP32 [updates, states]: amax of the new states and weights of this rank where one scale serves the tensor,
        else 0.
        """

    def update(self, updates: Sequence[Update], amaxes: Tensor | None) -> None:
        """All updates, in place. ``amaxes`` [updates, states]: over all ranks; None if no scale wants one."""


Given = tuple[dict[str, Tensor], Tensor, Tensor, Scalars]


def given(u: Update) -> Given:
    """The arguments of the rule's functions: states, gradient, weight, scalars."""
    rule, rows = u.kind.rule, u.grad.shape[0]
    *states, weight = (state.codec.decode(state.parts) for state in u.states)
    extents = u.kind.extents
    own = Extent(u.kind.shape).local(rows)
    named = {
        state.name: value.view(extent.local(rows)).to(rule.arithmetic)
        for state, extent, value in zip(rule.states, extents, states, strict=True)
    }
    return named, u.gradient.view(own).to(rule.arithmetic), weight.view(own).to(rule.arithmetic), u.scalars


def asked(u: Update) -> Tensor | Sum | None:
    """What ranks must exchange for this update."""
    return u.kind.rule.exchange(*given(u))


def new_values(u: Update) -> list[Tensor]:
    """The new states and weights, before they are encoded: FP32, each as the matrix that its codec sees."""
    rule, rows = u.kind.rule, u.grad.shape[0]
    states, weight = rule.update(*given(u))
    if states.keys() != (names := {state.name for state in rule.states}):
        raise ValueError(f"{rule.name}: states {sorted(states)} came back, not {sorted(names)}")
    result = []
    for state, extent in zip(rule.states, u.kind.extents, strict=True):
        value = states[state.name]
        if value.shape != extent.local(rows):
            raise ValueError(
                f"{rule.name}: state {state.name} came back as {list(value.shape)}, not {list(extent.local(rows))}"
            )
        result.append(value.float().reshape(extent.matrix(rows)))
    return [*result, weight.float().reshape(u.grad.shape)]


def amaxes_of(u: Update, values: Sequence[Tensor], into: Tensor) -> None:
    """The amaxes that scales of ``values`` want, FP32 [states]."""
    for which, (state, value) in enumerate(zip(u.states, values, strict=True)):
        if state.codec.per_tensor and value.numel():
            into[which] = value.abs().amax()


def store(u: Update, values: Sequence[Tensor], amaxes: Tensor | None) -> None:
    """Encode ``values`` into the parts of an update, unless its gate is closed."""
    for which, (state, value) in enumerate(zip(u.states, values, strict=True)):
        offset = 0 if state.shared else u.row_offset
        noise = Noise(key=state.key, row_offset=offset) if state.key is not None else None
        amax = amaxes[which] if amaxes is not None and state.codec.per_tensor else None
        for name, part in state.codec.encode(value, amax=amax, noise=noise).items():
            stored = state.parts[name]
            stored.copy_(part if u.gate is None else torch.where(u.gate[1] != 0, part, stored))
    if u.weight is not None:
        u.weight.copy_(u.states[-1].codec.decode(u.states[-1].parts))


class Reference:
    """Plain torch on any device, any rule, parameter by parameter."""

    name = "reference"

    def why_not(self, device: torch.device, codecs: Collection[Codec] = (), beta1: float = 0.9) -> str | None:
        return None

    def amaxes(self, updates: Sequence[Update]) -> Tensor:
        shape = len(updates), len(updates[0].states)
        result = torch.zeros(shape, dtype=torch.float32, device=updates[0].grad.device)
        for row, u in zip(result, updates, strict=True):
            if u.per_tensor:
                amaxes_of(u, new_values(u), row)
        return result

    def update(self, updates: Sequence[Update], amaxes: Tensor | None) -> None:
        for index, u in enumerate(updates):
            store(u, new_values(u), amaxes[index] if amaxes is not None else None)


REFERENCE: Backend = Reference()
