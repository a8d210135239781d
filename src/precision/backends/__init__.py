"""Who quantizes and multiplies. The first backend of ``ORDER`` that takes a GEMM gets it, unless the user names one.

``reference`` is the definition and takes everything; the others give the same codes, and native matrix products within
a stated error. A choice is made once, when shapes are known, and stands in ``plan.txt`` with the reasons of those that
refused.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..noise import Noise
from ..quantize import Prepared, Quantized
from ..scaling import Tile
from ..spec import GemmSpec, OperandSpec, Transform
from .cpu.quantizer import Cpu
from .reference import Reference
from .scaled_mm import ScaledMM
from .triton.quantizer import Triton

Operand = Quantized | Prepared | Tensor
"""One side of a GEMM: codes and scales, or what they stand for, or a plain matrix left in high precision."""


class Backend(Protocol):
    @property
    def name(self) -> str:
        """In plan.txt and in ``precision.backend``."""

    @property
    def identity(self) -> tuple[str, ...]:
        """What it computes depends on: who quantizes first, and nothing that differs by process."""

    @property
    def notes(self) -> bool:
        """Whether ``prepare`` and ``both`` note amaxes while they quantize, in the same pass."""

    @property
    def reads_rows(self) -> bool:
        """Whether ``gemm`` reads codes along the contraction, so that those of a transpose would be copied."""

    @property
    def by_column(self) -> bool:
        """Whether FP32 scales of parts of a row lie in memory column by column, where kernels write them."""

    def why_not(self, gemm: GemmSpec, shape: tuple[int | None, int, int], device: torch.device) -> str | None:
        """None if this backend takes the GEMM of ``shape`` (m, n, k; m None if unknown), else why not."""

    def quantize(self, x: Tensor, spec: OperandSpec, *, amax: Tensor | None, noise: Noise | None) -> Quantized:
        """As ``precision.quantize.quantize``, bit for bit."""

    def operand(self, q: Quantized) -> tuple[Tensor, Tensor | None]:
        """As ``precision.quantize.operand``, bit for bit."""

    def amax(self, x: Tensor, tile: Tile) -> Tensor:
        """As ``precision.quantize.amax``, bit for bit."""

    def transformed(self, transform: Transform, x: Tensor, *, left: bool) -> Tensor:
        """``transform.left(x)`` or ``transform.right(x)``, bit for bit."""

    def prepare(
        self,
        x: Tensor,
        spec: OperandSpec,
        *,
        amax: Tensor | None,
        noise: Noise | None,
        transform: Transform | None,
        left: bool,
        codes: bool,
        note: Tensor | None = None,
    ) -> Quantized | Prepared:
        """What ``gemm`` reads of ``quantize(transformed(x))``; with ``codes`` that itself.

        ``note`` FP32 [1], for a backend that ``notes``: becomes the maximum of itself and the amax of transformed(x).
        """

    def both(
        self,
        x: Tensor,
        spec: OperandSpec,
        *,
        amax: Tensor | None = None,
        noise: tuple[Noise, Noise] | None = None,
        note: Tensor | None = None,
        values: bool = False,
    ) -> tuple[Quantized, Quantized] | tuple[Prepared, Prepared] | None:
        """``quantize`` of x and of x.mT where one read makes both, each with codes along its rows; None elsewhere.

        ``values``: what ``gemm`` reads of them instead. ``note``: as for ``prepare``.
        """

    def gemm(self, a: Operand, b: Operand, *, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """a [m, k] @ b [n, k].mT + bias [n], accumulated in float32, rounded once to ``dtype``."""

    def note(self, gemm: GemmSpec) -> str:
        """What plan.txt should add about the product, or nothing."""


REFERENCE = Reference()
NATIVE = ScaledMM()
QUANTIZERS: tuple[Reference, ...] = (Cpu(), Triton(), REFERENCE)
"""Those that quantize, for their own emulated products and for native ones."""
ORDER: tuple[Backend, ...] = (NATIVE, *QUANTIZERS)


def require_backend(name: str) -> None:
    """Raises ValueError, with the close matches, unless ``name`` is ``auto`` or that of a backend."""
    names = ["auto", *(backend.name for backend in ORDER)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no backend named {name!r}{hint}; there are: {', '.join(names)}")


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend of one GEMM, and why faster ones were refused."""

    backend: Backend
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.backend.name}{''.join(f' ({reason})' for reason in self.refused)}"


def choose(gemm: GemmSpec, shape: tuple[int | None, int, int], device: torch.device, wanted: str = "auto") -> Choice:
    """The backend for a GEMM. Raises ValueError for a name that no backend has, and where the named one refuses."""
    require_backend(wanted)
    if wanted != "auto":
        backend = next(backend for backend in ORDER if backend.name == wanted)
        if reason := backend.why_not(gemm, shape, device):
            raise ValueError(f"backend {wanted!r} does not take {gemm} of shape {shape}: {reason}")
        return Choice(_settled(backend, gemm, shape, device))
    refused: list[str] = []
    for backend in ORDER:
        reason = backend.why_not(gemm, shape, device)
        if reason is None:
            return Choice(_settled(backend, gemm, shape, device), tuple(refused))
        if reason != "the model is on cpu":  # where a GPU's backends go without saying
            refused.append(f"not {backend.name}: {reason}")
    raise AssertionError("the reference takes everything")


def _settled(backend: Backend, gemm: GemmSpec, shape: tuple[int | None, int, int], device: torch.device) -> Backend:
    if not isinstance(backend, ScaledMM):
        return backend
    quantizer = next(other for other in QUANTIZERS if other.why_not(gemm, shape, device) is None)
    return backend.settled(shape, device, quantizer, fast=gemm.fast_accum)
