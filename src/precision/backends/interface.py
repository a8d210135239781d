"""What a backend is: who quantizes (``Quantizer``, one per machine) and who multiplies (``Product``).

Kernels take exactly the number formats, scale rules and transforms that they know. A subclass or a look-alike, which a
recipe may bring along, means what its own methods say: kernels refuse it (``unknown``), plain torch computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from ..codebook import Codebook
from ..formats import NumberFormat
from ..noise import Noise
from ..quantize import Passes, Prepared, Quantized, knows_format
from ..scaling import (
    AMAX,
    ROW,
    TENSOR,
    FourOverSix,
    Fp32,
    Fp32Decode,
    PowerOfTwo,
    ScaleRule,
    TwoLevel,
    Unit,
    outer_of,
)
from ..spec import GemmSpec, OperandSpec, SlotSpec, Split, Transform
from ..transforms import Composed, Hadamard, Outer, Rescale

Operand = Quantized | Prepared | Tensor
"""One side of a GEMM: codes and scales, or the values that they stand for, or a matrix left in high precision."""

Shape = tuple[int | None, int, int]
"""m, n and k of a GEMM; m None where it is not known."""


@dataclass(slots=True, kw_only=True)  # not frozen: one is made for every operand of every step
class Cast:
    """How one matrix becomes an operand.

    Args:
        spec: of the operand.
        amax: what the scale is made from, as in ``precision.quantize.quantize``; None: the matrix's own.
        noise: for stochastic rounding; for ``cast_both`` that of the matrix and that of its transpose.
        transform: applied before rounding.
        left: the side of the product, for the transform.
        codes: whether codes are needed; else the values that a product reads suffice.
        note: FP32 [1], for a quantizer that ``notes``: becomes the maximum of itself and the transformed matrix's amax.
    """

    spec: OperandSpec
    amax: Tensor | None = None
    noise: Noise | tuple[Noise, Noise] | None = None
    transform: Transform | None = None
    left: bool = True
    codes: bool = True
    note: Tensor | None = None


class Quantizer(Passes, Protocol):
    """The passes over memory of one machine, and what they are put together to. All of it is the reference's bits."""

    @property
    def name(self) -> str:
        """In plan.txt."""

    @property
    def notes(self) -> bool:
        """Whether ``cast`` and ``cast_both`` note amaxes in the pass that quantizes."""

    @property
    def takes_rows(self) -> bool:
        """Whether kernels have the noise of rows that do not follow one another (``Noise.rows``)."""

    @property
    def by_column(self) -> bool:
        """Whether FP32 scales of parts of a row lie in memory column by column, where kernels write them."""

    def why_not(self, gemm: GemmSpec, device: torch.device) -> str | None:
        """None if there are kernels for both operands of the GEMM on this device, else what is missing."""

    def transformed(self, transform: Transform, x: Tensor, *, left: bool) -> Tensor:
        """``transform.left(x)`` or ``transform.right(x)``."""

    def cast(self, x: Tensor, cast: Cast) -> Quantized | Prepared:
        """The operand made of x [outer, inner]. Raises ValueError as ``precision.quantize.quantize``."""

    def cast_both(self, x: Tensor, cast: Cast) -> tuple[Quantized, Quantized] | tuple[Prepared, Prepared] | None:
        """The operands made of x and of x.mT where one read makes both, each along its own rows; None elsewhere."""

    def operand(self, q: Quantized) -> tuple[Tensor, Tensor | None]:
        """The matrix and the output factor of an emulated GEMM, as ``precision.quantize.operand``."""


class Product(Protocol):
    """Who multiplies."""

    @property
    def name(self) -> str:
        """In plan.txt and in ``precision.backend``."""

    @property
    def identity(self) -> tuple[str, ...]:
        """What the result depends on beside the operands; nothing that differs by process."""

    @property
    def reads_rows(self) -> bool:
        """Whether ``gemm`` reads codes along the contraction: it needs codes, and would copy those of a transpose."""

    def why_not(self, gemm: GemmSpec, shape: Shape, device: torch.device) -> str | None:
        """None if the product takes the GEMM, else why not."""

    def for_gemm(self, gemm: GemmSpec, shape: Shape, device: torch.device, quantizer: Quantizer) -> Product:
        """The product for one GEMM that it takes, whose operands this quantizer makes."""

    def gemm(self, a: Operand, b: Operand, *, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """a [m, k] @ b [n, k].mT + bias [n], accumulated in float32, rounded once to ``dtype``."""

    def note(self, gemm: GemmSpec) -> str:
        """What plan.txt should add about the product, or nothing."""


@dataclass(frozen=True, slots=True)
class Backend:
    """The choice for a GEMM."""

    quantizer: Quantizer
    product: Product

    def __deepcopy__(self, memo: object) -> Backend:
        """A copy of a model has the same backends: nothing of them changes."""
        return self

    @property
    def name(self) -> str:
        return self.product.name

    @property
    def identity(self) -> tuple[str, ...]:
        """What is computed depends on: who quantizes and for whom first, and nothing that differs by process."""
        return f"{self.quantizer.name} for {self.product.name}", *self.product.identity

    def note(self, gemm: GemmSpec) -> str:
        """What plan.txt should add about the GEMM, or nothing."""
        return ", ".join(filter(None, [self.product.note(gemm), *_own_transforms(gemm.transform)]))


def quantize_by(
    quantizer: Quantizer, x: Tensor, spec: OperandSpec, *, amax: Tensor | None = None, noise: Noise | None = None
) -> Quantized:
    """``precision.quantize.quantize`` by the kernels of a machine."""
    q = quantizer.cast(x, Cast(spec=spec, amax=amax, noise=noise))
    assert isinstance(q, Quantized)
    return q


def knows_rule(rule: ScaleRule) -> bool:
    """Whether a scale rule is exactly one of ``precision.scaling``, with codes of a known format."""
    known = type(rule) in (Unit, Fp32, Fp32Decode, PowerOfTwo, TwoLevel, FourOverSix)
    return known and (rule.format is None or knows_format(rule.format))


def knows_transform(transform: Transform | None) -> TypeGuard[Hadamard]:
    """Whether kernels apply the transform: one of blocks, rounded, whose signs are the same at every step."""
    return type(transform) is Hadamard and not (transform.whole or transform.draws) and transform.rounded


def unknown(*specs: SlotSpec | None) -> str | None:
    """Why kernels refuse the operands, if they do: a sum of parts; a format or a scale rule of a type of its own."""
    for spec in specs:
        if isinstance(spec, Split):
            return f"no kernel for a sum of parts, as {spec}"
        if spec is not None and not knows_format(spec.format):
            return f"no kernel for {_kind(spec.format)}"
        if spec is not None and spec.scale.format is not None and not knows_format(spec.scale.format):
            return f"no kernel for scales by {spec.scale}, in {_kind(spec.scale.format)}"
        if spec is not None and not knows_rule(spec.scale):
            return f"no kernel for scales by {spec.scale}, a rule of its own: {type(spec.scale).__name__}"
        if spec is not None and (reason := mapped_otherwise(spec)):
            return reason
    return None


def mapped_otherwise(spec: OperandSpec) -> str | None:
    """Why kernels refuse what an operand's scales are made of, map to, or extend over; None for what they know."""
    if spec.statistic != AMAX:
        return f"no kernel for scales of the {spec.statistic} of a tile"
    if spec.top != 1:
        return f"no kernel for scales with a top of {spec.top:g}"
    rule = spec.scale
    if outer_of(rule) not in (TENSOR, ROW) or (type(rule) is TwoLevel and rule.outer_format is not None):
        return f"no kernel for scales by {rule}"
    return None


def _kind(format: NumberFormat) -> str:
    if type(format) is Codebook:
        return f"{format}, a table of values"
    return f"{format}, a format of its own: {type(format).__name__}"


def _own_transforms(transform: Transform | None) -> list[str]:
    """A remark for each transform that no kernel computes."""
    if type(transform) is Composed:
        return [*_own_transforms(transform.first), *_own_transforms(transform.second)]
    if transform is None or type(transform) is Rescale or knows_transform(transform):
        return []
    if type(transform) is Outer:
        why = "no kernel along an outer dimension"
    elif type(transform) is not Hadamard:
        why = f"no kernel for a transform of its own, {type(transform).__name__}"
    elif transform.whole:
        why = "no kernel for the whole width"
    elif not transform.rounded:
        why = "no kernel leaves it unrounded"
    else:
        return [f"signs of {transform} in plain torch: no kernel draws them"]
    return [f"{transform} in plain torch: {why}"]
