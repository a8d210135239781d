"""What a recipe says of communication: weights gathered as codes, gradients reduced as codes. Data only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .operand_spec import OperandSpec
from .quantize import Quantized
from .scaling import AMAX, TENSOR, Current, outer_of


class Headroom(Protocol):
    """A factor on gradients before they are rounded, which follows the codes that came of them.

    As the automatic scaling of FP8-LM (arXiv 2310.18313): below 1 it leaves room at the top of the format, above 1 it
    saturates. What it remembers belongs into buffers of a hook of the recipe, which may be the same object: there it is
    saved, and there, in ``before_update``, counts are summed over ranks. Its text stands in plan.txt.
    """

    def factor(self, name: str) -> Tensor | float:
        """That of the parameter ``name`` at this step: FP32 scalar, the same on all ranks. A power of two is exact."""

    def reduced(self, name: str, codes: Sequence[Quantized], total: Tensor) -> None:
        """After a reduction, of which a step of HSDP has two, with this rank's rows of a parameter (all there is of a
        vector); called where it has any.

        Args:
            name: of the parameter.
            codes: those of every rank, in the order of the sum; [rows, columns] each.
            total: their sum, FP32 [rows, columns], not yet divided by the factor.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """Gradients as codes: every rank rounds its own, sends the codes, and sums what it gets in rank order in FP32.

    A gradient is read as a matrix [rows, columns] whose columns are the parameter's last dimension; one of a single
    dimension is a row. Scales are of the whole local gradient, of its rows, or of blocks within a row.

    Args:
        spec: how a gradient is rounded; a format of at most 8 bits, rounding to nearest, stochastic or truncating.
        paths: regexes, full match, of the names of parameters that are reduced so; () for the matrices of the blocks.
            The others are reduced in ``dtypes.reduce``.
        shared_scale: whether the scale of a tensor is made of the largest amax of all ranks (the least scale, as FP8-LM
            has it), not of each rank's own.
        headroom: a factor on what is rounded, if any.

    Raises ValueError for what cannot be: wider formats, tiles over several rows, amaxes of earlier steps, a shared
    scale or a factor without a scale per tensor, and for what is no regular expression.
    """

    spec: OperandSpec
    paths: tuple[str, ...] = ()
    shared_scale: bool = False
    headroom: Headroom | None = None

    def __post_init__(self) -> None:
        spec, tile = self.spec, self.spec.tile
        if spec.format.bits > 8:
            raise ValueError(f"gradients are reduced as codes of at most 8 bits: {spec.format} has {spec.format.bits}")
        if tile != TENSOR and tile.outer != 1:
            raise ValueError(
                f"{spec}: tiles of {tile} lie over rows, which ranks hold apart: a scale per tensor, per row "
                "(Tile(1, -1)) or per block of a row (Tile(1, n))"
            )
        outer = outer_of(spec.scale) if spec.scale.levels == 2 else TENSOR
        if outer != TENSOR and outer.outer != 1:
            raise ValueError(f"{spec}: outer scales of {outer} lie over rows, which ranks hold apart")
        if spec.amax != Current():
            raise ValueError(
                f"{spec}: gradients are scaled by their own amax, for all ranks by shared_scale=True: leave amax out"
            )
        if self.shared_scale and not (self.per_tensor and spec.statistic == AMAX):
            raise ValueError(f"shared_scale=True: {spec} has no scale of a tensor by its amax that ranks could share")
        if self.headroom is not None and not (tile == TENSOR and spec.scale.levels == 1 and spec.statistic == AMAX):
            raise ValueError(f"headroom: {spec} has not one scale per tensor, of its amax, that leaves or takes room")
        for path in self.paths:
            try:
                re.compile(path)
            except re.error as error:
                raise ValueError(f"paths={path!r}: not a regular expression: {error}") from error

    @property
    def per_tensor(self) -> bool:
        """Whether a scale depends on the whole tensor."""
        levels = self.spec.scale.levels
        return self.spec.tile == TENSOR if levels == 1 else levels == 2 and outer_of(self.spec.scale) == TENSOR

    def __str__(self) -> str:
        shared = ", one scale for all ranks" if self.shared_scale else ""
        return f"{self.spec}{shared}{f', times {self.headroom}' if self.headroom is not None else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comm:
    """What ranks send each other.

    Args:
        gather: whether weights are gathered as the codes that GEMMs read, as by ``parallel.fp8_all_gather``.
        reduce: how gradients are reduced; None: in ``dtypes.reduce``.
    """

    gather: bool = False
    reduce: Reduction | None = None

    @property
    def notes(self) -> list[str]:
        """Lines of plan.txt where nobody has done it yet, as under another trainer."""
        lines = (
            ["weights gathered as codes: left to the trainer, by precision.comm.gather_codes"] if self.gather else []
        )
        if self.reduce is not None:
            lines.append(f"gradients reduced as {self.reduce}: left to the trainer, by precision.comm.reduce_codes")
        return lines


NO_COMM = Comm()
"""Weights are gathered in ``dtypes.compute``, gradients reduced in ``dtypes.reduce``."""
