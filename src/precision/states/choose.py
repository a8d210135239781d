"""Who computes the updates of a rule: the first of its kernels that can, else plain torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from .codecs import Codec
from .reference import REFERENCE, Backend
from .rules import UpdateRule


@dataclass(frozen=True, slots=True)
class UpdateChoice:
    """The backend of a rule's updates, and why those before it refused."""

    backend: Backend
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.backend.name}{''.join(f' ({reason})' for reason in self.refused)}"


def choose_update(
    rule: UpdateRule,
    device: torch.device,
    wanted: str = "auto",
    *,
    codecs: Collection[Codec] = (),
    beta1: float = 0.9,
) -> UpdateChoice:
    """The backend of a rule's updates on ``device``: the one of that name if it can, else the first that can.

    A name that only matrix products know means nothing here.
    """
    # Kernels are of one class: what derives from it computes something else.
    kernels: tuple[Backend, ...] = vars(type(rule)).get("kernels", ())
    if not kernels:
        return UpdateChoice(REFERENCE, () if wanted == REFERENCE.name else (f"no kernel for {rule.name}",))
    order: tuple[Backend, ...] = (*kernels, REFERENCE)
    reasons = {backend.name: backend.why_not(device, codecs, beta1) for backend in order}
    if wanted in reasons and reasons[wanted] is None:
        return UpdateChoice(next(backend for backend in order if backend.name == wanted))
    first = next(index for index, backend in enumerate(order) if reasons[backend.name] is None)
    asked_for = {wanted, *(backend.name for backend in order[:first])}
    refused = {name: reason for name, reason in reasons.items() if name in asked_for and reason is not None}
    obvious = f"the parameters are on {device.type}"  # unless it was asked for by name
    said = [f"not {name}: {reason}" for name, reason in refused.items() if name == wanted or reason != obvious]
    return UpdateChoice(order[first], tuple(said))
