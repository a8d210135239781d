"""The backend of a GEMM: the first pair of ``ORDER`` that takes it, unless the user names a product.

A choice is made once, when shapes are known, and stands in ``plan.txt`` with the reasons of those that refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..spec import GemmSpec
from ..suggest import close
from .cpu.accumulate import CompiledSums
from .cpu.quantizer import Cpu
from .interface import Backend, Product, Quantizer, Shape
from .reference import Emulated, Reference
from .scaled_mm import ScaledMM
from .triton.quantizer import EmulatedOnGpu, Triton

_CPU, _TRITON, _PLAIN = Cpu(), Triton(), Reference()
# Native products read scales by column.
_FOR_CODES: tuple[Quantizer, ...] = (_CPU, Triton(by_column=True), _PLAIN)
QUANTIZERS: tuple[Quantizer, ...] = (_CPU, _TRITON, _PLAIN)
NATIVE = ScaledMM()
REFERENCE = Backend(_PLAIN, Emulated(_PLAIN))


def native(product: Product, quantizers: tuple[Quantizer, ...] = _FOR_CODES) -> tuple[Backend, ...]:
    """The pairs of a product of codes: the first quantizer that has kernels makes them."""
    return tuple(Backend(quantizer, product) for quantizer in quantizers)


ORDER: tuple[Backend, ...] = (
    *native(NATIVE),
    Backend(_CPU, Emulated(_CPU, CompiledSums())),
    Backend(_TRITON, EmulatedOnGpu(_TRITON)),
    REFERENCE,
)
"""The reference takes everything."""


def require_backend(name: str) -> None:
    """Raises ValueError, with the close matches, unless ``name`` is ``auto`` or that of a backend."""
    names = list(dict.fromkeys(["auto", *(backend.name for backend in ORDER)]))
    if name not in names:
        raise ValueError(f"no backend named {name!r}{close(name, names)}; there are: {', '.join(names)}")


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend of one GEMM, and why faster ones were refused."""

    backend: Backend
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.backend.name}{''.join(f' ({reason})' for reason in self.refused)}"


def choose(
    gemm: GemmSpec, shape: Shape, device: torch.device, wanted: str = "auto", *, experts: bool = False
) -> Choice:
    """The backend for a GEMM; ``experts``: each multiplies rows of its own, some none.

    Raises ValueError for a name that no backend has, and where the named one refuses.
    """
    require_backend(wanted)
    reasons: dict[str, str] = {}
    for backend in ORDER:
        quantizer, product = backend.quantizer, backend.product
        if wanted not in ("auto", product.name):
            continue
        reason = product.why_not(gemm, shape, device)
        if reason is None and experts and isinstance(product, ScaledMM):
            reason = "no native product over the rows of experts, of which there may be none"
        if reason:
            reasons[product.name] = reason
        elif quantizer.why_not(gemm, device) is None:
            refused = tuple(
                f"not {name}: {reason}"
                for name, reason in reasons.items()
                if reason != "the model is on cpu"  # where a GPU's backends go without saying
            )
            return Choice(Backend(quantizer, product.for_gemm(gemm, shape, device, quantizer)), refused)
    raise ValueError(f"backend {wanted!r} does not take {gemm} of shape {shape}: {reasons[wanted]}")
