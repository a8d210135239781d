"""Exact rewrites of a GEMM's operand pair (``spec.Transform``)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import Transform

# The sign vector that TransformerEngine uses for every layer and step of its 16-wide transform.
TE_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hadamard:
    """A random Hadamard transform of every ``size`` consecutive values along the contraction, of both operands.

    x' = x R per block, R = diag(signs) H / sqrt(size), H_ij = (-1)^popcount(i & j). R is orthogonal, so it cancels in
    ``a @ b.mT``; outliers are spread over their block. A ragged last block is left as it is, in both operands, so it
    cancels too.

    Order, in FP32 (FP64 for FP64 input): signs; for stride 1, 2, 4 ... size / 2: (u, v) -> (u + v, u - v) for the pairs
    at i and i + stride; times the constant 1 / sqrt(size) rounded to FP32; then rounded to the input's dtype. (A tensor
    core sums in another order: results then differ in the last bit of BF16, rarely.) Non-finite values spread over
    their block.

    Args:
        size: a power of two from 2 to 128.
        signs: ``te``: TransformerEngine's vector (size 16 only); ``none``; or a seed for fixed random signs.
    """

    size: int = 16
    signs: str | int = "te"

    def __post_init__(self) -> None:
        if not (2 <= self.size <= 128 and self.size & (self.size - 1) == 0):
            raise ValueError(f"a Hadamard transform has a size of 2, 4, 8 ... 128, not {self.size}")
        if isinstance(self.signs, str) and self.signs not in ("te", "none"):
            raise ValueError(f"signs are 'te', 'none' or a seed, not {self.signs!r}")
        if self.signs == "te" and self.size != 16:
            raise ValueError(f"the signs 'te' are for size 16, not {self.size}: give a seed, or 'none'")

    def vector(self) -> tuple[int, ...]:
        """The signs, +1 or -1. Those of a seed are the low bits of SHA-256 of its decimal text."""
        if self.signs == "te":
            return TE_SIGNS
        if self.signs == "none":
            return (1,) * self.size
        bits = int.from_bytes(hashlib.sha256(str(self.signs).encode()).digest(), "little")
        return tuple(1 - 2 * (bits >> i & 1) for i in range(self.size))

    def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
        """[m, k] -> [m, k], contiguous, in the dtype of ``a``."""
        return self._apply(a)

    def right(self, b: Tensor, stats: Tensor | None = None) -> Tensor:
        """[n, k] -> [n, k], contiguous, in the dtype of ``b``."""
        return self._apply(b)

    def output(self, y: Tensor, stats: Tensor | None = None) -> Tensor:
        return y

    def __str__(self) -> str:
        return f"hadamard{self.size}" + ("" if self.signs == "te" else f"/{self.signs}")

    def _apply(self, x: Tensor) -> Tensor:
        even = x.shape[-1] // self.size * self.size
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = x[..., :even].to(wide).reshape(*x.shape[:-1], even // self.size, self.size)
        y = y * torch.tensor(self.vector(), dtype=wide, device=x.device)
        stride = 1
        while stride < self.size:
            u, v = y.reshape(*y.shape[:-1], self.size // (2 * stride), 2, stride).unbind(-2)
            y = torch.stack((u + v, u - v), -2).flatten(-3)
            stride *= 2
        y = (y * (1 / math.sqrt(self.size))).flatten(-2).to(x.dtype)
        return torch.cat((y, x[..., even:]), -1)


class Along(NamedTuple):
    """Times (power 1) or divided by (power -1) the statistics, which run along a dimension of a matrix."""

    dim: int
    power: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescale:
    """Factors on rows or columns of a GEMM's operands and of its output, which together cancel.

    The factors are the statistics (FP32, positive), one for each row (dim 0) or column (dim 1). Products are rounded to
    the matrix's own dtype: nothing is lost where the factors are powers of two and the range suffices. Without
    statistics nothing is changed.

    Args:
        name: in plan.txt.
        a, b, y: how the left operand, the right operand and the output are changed; None: not at all.
    """

    name: str
    a: Along | None = None
    b: Along | None = None
    y: Along | None = None

    def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
        return _rescaled(a, self.a, stats)

    def right(self, b: Tensor, stats: Tensor | None = None) -> Tensor:
        return _rescaled(b, self.b, stats)

    def output(self, y: Tensor, stats: Tensor | None = None) -> Tensor:
        return _rescaled(y, self.y, stats)

    def __str__(self) -> str:
        return self.name


def _rescaled(x: Tensor, along: Along | None, stats: Tensor | None) -> Tensor:
    if along is None or stats is None:
        return x
    factor = stats[:, None] if along.dim == 0 else stats
    return (x * factor if along.power > 0 else x / factor).to(x.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """``first``, then ``second``, of what ``first`` gave; undone in reverse order. ``first`` alone reads statistics."""

    first: Transform
    second: Transform

    def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
        return self.second.left(self.first.left(a, stats))

    def right(self, b: Tensor, stats: Tensor | None = None) -> Tensor:
        return self.second.right(self.first.right(b, stats))

    def output(self, y: Tensor, stats: Tensor | None = None) -> Tensor:
        return self.first.output(self.second.output(y), stats)

    def __str__(self) -> str:
        return f"{self.first}, {self.second}"


def drawn(transform: Transform, key: Tensor) -> Transform:
    """PLACEHOLDER"""
    return transform.drawn(key)


def back(transform: Transform, g: Tensor, *, left: bool, stats: Tensor | None = None) -> Tensor:
    return transform.back(g, left=left, stats=stats)
