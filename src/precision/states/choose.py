"""Which backend updates parameters."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from .adamw import REFERENCE, AdamBackend
from .adamw_cpu import CpuAdam
from .adamw_triton import TritonAdam
from .codecs import Codec

ORDER: tuple[AdamBackend, ...] = (CpuAdam(), TritonAdam(), REFERENCE)


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend of updates, and why those before it refused."""

    backend: AdamBackend
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.backend.name}{''.join(f' ({reason})' for reason in self.refused)}"


def choose(device: torch.device, wanted: str = "auto", *, codecs: Collection[Codec] = (), beta1: float = 0.9) -> Choice:
    """The backend of updates on ``device``: the one of that name if it can, else the first that can.

    A name that only matrix products know means nothing here.
    """
    reasons = {backend.name: backend.why_not(device, codecs, beta1) for backend in ORDER}
    if wanted in reasons and reasons[wanted] is None:
        return Choice(next(backend for backend in ORDER if backend.name == wanted))
    first = next(index for index, backend in enumerate(ORDER) if reasons[backend.name] is None)
    asked = {wanted, *(backend.name for backend in ORDER[:first])}
    refused = {name: reason for name, reason in reasons.items() if name in asked and reason is not None}
    obvious = f"the parameters are on {device.type}"  # unless it was asked for by name
    said = [f"not {name}: {reason}" for name, reason in refused.items() if name == wanted or reason != obvious]
    return Choice(ORDER[first], tuple(said))
