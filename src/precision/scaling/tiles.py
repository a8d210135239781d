"""Tiles of a matrix [outer, inner]: what shares a scale, and how factors of tiles meet elements."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Tile(NamedTuple):
    """How far one scale extends over a matrix [outer, inner] whose contraction is last; -1 is the full extent.

    ``(-1, -1)`` is the tensor, ``(1, -1)`` a row, ``(1, 16)`` a block, ``(128, 128)`` a square.
    """

    outer: int
    inner: int

    def __str__(self) -> str:
        names = {(-1, -1): "tensor", (1, -1): "row", (-1, 1): "column"}
        outer, inner = (str(n) if n > 0 else "*" for n in self)
        return names.get((self.outer, self.inner), f"{outer}x{inner}")

    def grid(self, outer: int, inner: int) -> tuple[int, int]:
        """How many tiles cover a matrix of this shape: the last ones may be ragged, a full extent is one tile."""
        tall, wide = self.extent(outer, inner)
        return (
            1 if self.outer < 0 else -(-outer // tall),
            1 if self.inner < 0 else -(-inner // wide),
        )

    def extent(self, outer: int, inner: int) -> tuple[int, int]:
        """The size of a tile of a matrix of this shape, at least 1 x 1."""
        return (
            max(outer, 1) if self.outer < 0 else self.outer,
            max(inner, 1) if self.inner < 0 else self.inner,
        )

    def of_grid(self, tile: Tile) -> Tile:
        """This tile counted in tiles of ``tile``, whose multiple it is in both directions."""
        return Tile(*(-1 if n < 0 else n // part for n, part in zip(self, tile, strict=True)))


TENSOR, ROW = Tile(-1, -1), Tile(1, -1)


def tiled(x: Tensor, tile: Tile) -> Tensor:
    """x [outer, inner] -> [rows, tile outer, columns, tile inner], ragged tiles filled with zeros."""
    outer, inner = x.shape
    rows, columns = tile.grid(outer, inner)
    tall, wide = tile.extent(outer, inner)
    if (rows * tall, columns * wide) != (outer, inner):
        x = pad(x, (0, columns * wide - inner, 0, rows * tall - outer))
    return x.reshape(rows, tall, columns, wide)


def scaled(x: Tensor, scales: Tensor, tile: Tile) -> Tensor:
    """x [outer, inner] times the scale of its tile, from scales [rows, columns]."""
    outer, inner = x.shape
    rows, columns = scales.shape
    if rows * columns == 1:
        return x * scales.reshape(())
    tall, wide = tile.extent(outer, inner)
    if (rows * tall, columns * wide) == (outer, inner):
        return (x.reshape(rows, tall, columns, wide) * scales[:, None, :, None]).reshape(outer, inner)
    # Ragged: by index, since Inductor (torch 2.13, CPU) drops the ragged tile of what is scaled in tiles and then
    # sliced: it splits the loop at the tile's size as if that divided it. It would see through a floor division, too.
    row = torch.arange(outer, device=x.device).div(tall, rounding_mode="trunc")
    column = torch.arange(inner, device=x.device).div(wide, rounding_mode="trunc")
    return x * scales[row[:, None], column]


def spread(of_groups: Tensor, group: Tile, grid: tuple[int, int]) -> Tensor:
    """Values of groups of tiles, for every tile of a grid [rows, columns]: a full extent stays one, and broadcasts.

    Args:
        of_groups: a scalar, or one for each group.
        group: how many tiles it extends over.
    """
    for dim, (size, number) in enumerate(zip(group, grid, strict=True)):
        if of_groups.dim() and size > 1:
            of_groups = of_groups.repeat_interleave(size, dim).narrow(dim, 0, number)
    return of_groups
