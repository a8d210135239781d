"""What a rule sees that decides after the codes: the matrix, its first scales, and ways to code it anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats import NumberFormat, pack4, unpack4
from .rules import Scales
from .tiles import Tile, scaled, tiled

if TYPE_CHECKING:
    from ..noise import Noise


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Trial:
    """A matrix that is about to be quantized, for ``Finishes.finish``.

    Codes are made by the passes of whoever quantizes, kernels included, and rounded as the operand's spec says: to
    nearest, or by noise that is the same for an element however often it is coded.

    Args:
        matrix: [outer, inner], in the dtype that it came in.
        element, tile, top: of the spec.
        statistic: FP32 [rows, columns], what the scales were made of: amaxes, in general.
        tensor_statistic: as ``ScaleRule.scales`` had it; None for one level.
        scales: what ``ScaleRule.scales`` gave.
        noise: of the elements; its keys serve the scales, too. None where nothing is stochastic.
        code, decode: see ``codes`` and ``values``.
    """

    matrix: Tensor
    element: NumberFormat
    tile: Tile
    top: float
    statistic: Tensor
    tensor_statistic: Tensor | None
    scales: Scales
    noise: Noise | None
    code: Callable[[Tensor, Tensor, Noise | None], Tensor]
    decode: Callable[[Tensor, Tensor | None], Tensor]

    @property
    def x(self) -> Tensor:
        """FP32 [outer, inner]."""
        return self.matrix.float()

    def codes(self, encode: Tensor | None = None, *, again: bool = False) -> Tensor:
        """Codes as ``Quantized.codes`` of x * encode.

        Args:
            encode: FP32 [rows, columns]; None: that of the first scales.
            again: round stochastically by other noise than the first time.
        """
        noise = self.noise.again() if again and self.noise is not None else self.noise
        return self.code(self.matrix, self.scales.encode if encode is None else encode, noise)

    def codes_of(self, y: Tensor) -> Tensor:
        """Codes of y FP32 [outer, inner], which is scaled already."""
        return self.code(y, torch.ones_like(self.scales.encode), self.noise)

    def values(self, codes: Tensor, factors: Tensor | None = None) -> Tensor:
        """Code value * factor of its tile (FP32 [rows, columns]; None for 1): FP32 [outer, inner]."""
        return self.decode(codes, factors)

    def tiles(self, y: Tensor) -> Tensor:
        """y [outer, inner] as [rows, tile outer, columns, tile inner]; what a ragged tile lacks is 0."""
        return tiled(y, self.tile)

    def sums(self, y: Tensor) -> Tensor:
        """Of y over every tile [rows, columns]: along each row of a tile, from its first element on; then of the upper
        half of the rows and the lower half (and the one in the middle added to the first), and again."""
        parts = tiled(y, self.tile)
        total = parts[..., 0]
        for column in range(1, parts.shape[-1]):
            total = total + parts[..., column]
        while (height := total.shape[1]) > 1:
            half, odd = height // 2, total[:, -1:] if height % 2 else None
            total = total[:, :half] + total[:, half : 2 * half]
            if odd is not None:
                total = torch.cat((total[:, :1] + odd, total[:, 1:]), 1)
        return total[:, 0]

    def scaled(self, y: Tensor, factors: Tensor) -> Tensor:
        """y [outer, inner] times the factor of its tile, from [rows, columns] or what broadcasts to that."""
        if factors.dim() == 0:
            return y * factors
        return scaled(y, factors.expand(self.statistic.shape), self.tile)

    def chosen(self, which: Tensor, yes: Tensor, no: Tensor) -> Tensor:
        """The codes ``yes`` where ``which``, bool [rows, columns], is true of their tile, else ``no``."""
        packed, (outer, inner) = self.element.bits == 4, self.matrix.shape
        if packed:
            yes, no = unpack4(yes, inner), unpack4(no, inner)
        tall, wide = self.tile.extent(outer, inner)
        here = which.repeat_interleave(tall, 0)[:outer].repeat_interleave(wide, 1)[:, :inner]
        codes = torch.where(here, yes, no)
        return pack4(codes) if packed else codes

    def uniform(self) -> Tensor:
        """Noise for the scales, FP32 [rows, columns] in [0, 1), by the place of each tile's first element.

        Raises ValueError where there is no noise: a rule that draws it has a ``stochastic`` that is true.
        """
        if self.noise is None:
            raise ValueError("a rule that draws noise for its scales says so (stochastic = True), and is given noise")
        rows, columns = self.statistic.shape
        return self.noise.of_tiles((rows, columns), self.tile.extent(*self.matrix.shape))
