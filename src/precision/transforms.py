"""Exact rewrites of a GEMM's operand pair (``spec.Transform``)."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from . import hadamard_matrices
from .noise import Noise, step_key
from .spec import Transform, changes, draws, is_orthogonal, rewrites_output

# The sign vector that TransformerEngine uses for every layer and step of its 16-wide transform.
TE_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def drawn(transform: Transform, key: Tensor) -> Transform:
    """The transform of the step that ``key`` (int32 [2], of ``noise.step_key``) is of: itself, unless it is drawn."""
    return transform.drawn(key) if draws(transform) else transform


def back(transform: Transform, g: Tensor, *, left: bool, stats: Tensor | None = None) -> Tensor:
    """The gradient with respect to an operand, from ``g``, that with respect to the transformed operand.

    Raises ValueError for a transform without a method ``back``.
    """
    if not hasattr(transform, "back"):
        raise ValueError(f"{transform} names no way back: it has no method back(g, left, stats)")
    return transform.back(g, left=left, stats=stats)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hadamard:
    """A random Hadamard transform along the contraction, of both operands: of every ``size`` consecutive values, or of
    a whole row.

    x' = x R per block, R = diag(signs) H / sqrt(size). R is orthogonal, so it cancels in ``a @ b.mT``; outliers are
    spread over their block. A ragged last block is left as it is, in both operands, so it cancels too.

    H_ij = (-1)^popcount(i & j) for a power of two. A row of K * P values, P a power of two, has the Kronecker product
    of H_K and H_P, for the orders K of ``hadamard_matrices``; the widths of most models are such. With signs ``none``
    that is the transform of HALO (arXiv:2501.02625), up to the choice of H_K.

    Order, in FP32 (FP64 for FP64 input): signs; for stride 1, 2, 4 ... size / 2 (P / 2): (u, v) -> (u + v, u - v) for
    the pairs at i and i + stride; sums by H_K in FP64, rounded to FP32; times the constant 1 / sqrt(size) rounded to
    FP32; then rounded to the input's dtype. (A tensor core sums in another order: results then differ in the last bit
    of BF16, rarely.) ``back``, x' R^T, has the signs last. Non-finite values spread over their block.

    Args:
        size: a power of two from 2 to 128, or -1 for the whole width.
        signs: ``te``: TransformerEngine's vector (size 16 only); ``none``; a seed for fixed random signs; or ``step``:
            drawn anew at every step, the same for all blocks, micro-batches and sides of a GEMM.
        rounded: False leaves the values of transformed operands in FP32, so that they are rounded by quantization
            alone, as in Quartet and Quartet II.

    Raises ValueError for other sizes and signs; applied, for a width that no matrix serves, and before signs that
    change are ``drawn``.
    """

    orthogonal: ClassVar[bool] = True

    size: int = 16
    signs: str | int = "te"
    rounded: bool = True

    def __post_init__(self) -> None:
        if self.size != -1 and not (2 <= self.size <= 128 and self.size & (self.size - 1) == 0):
            raise ValueError(
                f"a Hadamard transform has a size of 2, 4, 8 ... 128, or -1 for the whole width, not {self.size}"
            )
        if isinstance(self.signs, str) and self.signs not in ("te", "none", "step"):
            raise ValueError(f"signs are 'te', 'none', 'step' or a seed, not {self.signs!r}")
        if self.signs == "te" and self.size != 16:
            size = "the whole width" if self.size == -1 else self.size
            raise ValueError(f"the signs 'te' are for size 16, not {size}: give a seed, or 'none'")

    @property
    def whole(self) -> bool:
        """Whether it is of a whole row."""
        return self.size == -1

    @property
    def draws(self) -> bool:
        return self.signs == "step"

    def drawn(self, key: Tensor) -> Transform:
        """Sign flips, which are exact, then a transform without signs, for which there are kernels."""
        if not self.draws:
            return self
        return Composed(first=Signs(key=key, size=self.size), second=replace(self, signs="none"))

    def vector(self, width: int | None = None) -> tuple[int, ...]:
        """The signs, +1 or -1, of a block, or of a row of ``width`` values. Those of a seed are the low bits of SHA-256
        of its decimal text; for more than 256 values, of SHAKE-256."""
        size = width if self.whole else self.size
        if size is None:
            raise ValueError(f"{self} has signs for rows of a width only")
        if self.signs == "te":
            return TE_SIGNS
        if self.signs == "none":
            return (1,) * size
        if self.signs == "step":
            raise ValueError(f"{self} is drawn anew at every step: apply what drawn(key) gives")
        return _of_seed(str(self.signs), size)

    def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
        """[m, k] -> [m, k], contiguous, in the dtype of ``a`` if it is to be rounded."""
        return self._apply(a)

    def right(self, b: Tensor, stats: Tensor | None = None) -> Tensor:
        """[n, k] -> [n, k], contiguous, in the dtype of ``b`` if it is to be rounded."""
        return self._apply(b)

    def output(self, y: Tensor, stats: Tensor | None = None) -> Tensor:
        return y

    def back(self, g: Tensor, *, left: bool, stats: Tensor | None = None) -> Tensor:
        """g R^T, in the dtype of ``g``: of ``left`` and ``right`` the inverse, too."""
        return self._apply(g, back=True)

    def __str__(self) -> str:
        size = "-full" if self.whole else self.size
        signs = "" if self.signs == "te" else f"/{self.signs}"
        return f"hadamard{size}{signs}" + ("" if self.rounded else "/unrounded")

    def _apply(self, x: Tensor, *, back: bool = False) -> Tensor:
        size = x.shape[-1] if self.whole else self.size
        if size == 0:
            return x
        order, power = hadamard_matrices.factors(size) if self.whole else (1, size)
        even = x.shape[-1] // size * size
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = x[..., :even].to(wide).reshape(*x.shape[:-1], even // size, size)
        signs = None
        if not self.whole:
            signs = torch.tensor(self.vector(), dtype=wide, device=x.device)
        elif self.signs != "none":
            signs = torch.tensor(self.vector(size), dtype=wide, device=x.device)
        if signs is not None and not back:
            y = y * signs
        y = _butterflies(y.reshape(*y.shape[:-1], order, power))
        if order > 1:
            h = hadamard_matrices.matrix(order, x.device)
            # In FP64: tensor cores round FP32 factors to TF32 where a program allows that, and the order of sums
            # depends on the shape.
            y = ((h if back else h.mT) @ y.double()).to(wide)
        y = y.flatten(-2) * (1 / math.sqrt(size))
        if signs is not None and back:
            y = y * signs
        y = y.flatten(-2).to(x.dtype if self.rounded or back else wide)
        return y if even == x.shape[-1] else torch.cat((y, x[..., even:]), -1)


def _butterflies(y: Tensor) -> Tensor:
    """The last dimension, of a power of two, times H_ij = (-1)^popcount(i & j)."""
    size, stride = y.shape[-1], 1
    while stride < size:
        pairs = (*y.shape[:-1], size // (2 * stride), 2, stride)
        u, v = y.reshape(pairs).unbind(-2)
        if y.requires_grad:  # what is written in place has no derivative
            y = torch.stack((u + v, u - v), -2).flatten(-3)
        else:
            y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
            sums, differences = y.view(pairs).unbind(-2)
            torch.add(u, v, out=sums)
            torch.sub(u, v, out=differences)
        stride *= 2
    return y


@functools.lru_cache(maxsize=256)
def _of_seed(text: str, size: int) -> tuple[int, ...]:
    if size <= 256:
        bits = hashlib.sha256(text.encode()).digest()
    else:
        bits = hashlib.shake_256(text.encode()).digest(-(-size // 8))
    return tuple(1 - 2 * (bits[i >> 3] >> (i & 7) & 1) for i in range(size))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Signs:
    """Flips signs along the contraction, of both operands: value i of every block of ``size`` (-1: of a row) alike.

    A ragged last block is left as it is. Exact, and its own inverse. The signs are those of numbers of
    ``noise.Noise(key)``, row 0: -1 from one half on.

    Args:
        key: int32 [2], on the device of the operands.
    """

    orthogonal: ClassVar[bool] = True

    key: Tensor
    size: int = -1
    _vectors: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)  # both operands have one width

    draws: ClassVar[bool] = False

    def vector(self, width: int) -> Tensor:
        """FP32 [width] of +1 and -1."""
        if width not in self._vectors:
            self._vectors[width] = self._computed(width)
        return self._vectors[width]

    def _computed(self, width: int) -> Tensor:
        size = width if self.size == -1 else self.size
        signs = 1 - 2 * (Noise(key=self.key).uniform(1, size)[0] >= 0.5).float()
        if size == width:
            return signs
        return torch.cat((signs.repeat(width // size), signs.new_ones(width % size)))

    def drawn(self, key: Tensor) -> Transform:
        return self

    def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
        return self._apply(a)

    def right(self, b: Tensor, stats: Tensor | None = None) -> Tensor:
        return self._apply(b)

    def output(self, y: Tensor, stats: Tensor | None = None) -> Tensor:
        return y

    def back(self, g: Tensor, *, left: bool, stats: Tensor | None = None) -> Tensor:
        return self._apply(g)

    def __str__(self) -> str:
        return "signs"

    def _apply(self, x: Tensor) -> Tensor:
        return x * self.vector(x.shape[-1]).to(x.dtype)


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

    draws: ClassVar[bool] = False
    orthogonal: ClassVar[bool] = False

    @property
    def rewrites_output(self) -> bool:
        return self.y is not None

    def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
        return _rescaled(a, self.a, stats)

    def right(self, b: Tensor, stats: Tensor | None = None) -> Tensor:
        return _rescaled(b, self.b, stats)

    def output(self, y: Tensor, stats: Tensor | None = None) -> Tensor:
        return _rescaled(y, self.y, stats)

    def back(self, g: Tensor, *, left: bool, stats: Tensor | None = None) -> Tensor:
        """The same factors as forward: a diagonal is its own transpose."""
        return _rescaled(g, self.a if left else self.b, stats)

    def drawn(self, key: Tensor) -> Transform:
        return self

    def __str__(self) -> str:
        return self.name


def _rescaled(x: Tensor, along: Along | None, stats: Tensor | None) -> Tensor:
    if along is None or stats is None:
        return x
    factor = stats[:, None] if along.dim == 0 else stats
    return (x * factor if along.power > 0 else x / factor).to(x.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """``first``, then ``second``, of what ``first`` gave; undone in reverse order. ``first`` alone reads statistics.

    Where both are drawn, they are by keys of their own.
    """

    first: Transform
    second: Transform

    def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
        return self.second.left(self.first.left(a, stats))

    def right(self, b: Tensor, stats: Tensor | None = None) -> Tensor:
        return self.second.right(self.first.right(b, stats))

    def output(self, y: Tensor, stats: Tensor | None = None) -> Tensor:
        return self.first.output(self.second.output(y), stats)

    def back(self, g: Tensor, *, left: bool, stats: Tensor | None = None) -> Tensor:
        return back(self.first, back(self.second, g, left=left), left=left, stats=stats)

    def changes(self, left: bool) -> bool:
        return changes(self.first, left=left) or changes(self.second, left=left)

    @property
    def rewrites_output(self) -> bool:
        return rewrites_output(self.first) or rewrites_output(self.second)

    @property
    def orthogonal(self) -> bool:
        return is_orthogonal(self.first) and is_orthogonal(self.second)

    @property
    def draws(self) -> bool:
        return draws(self.first) or draws(self.second)

    def drawn(self, key: Tensor) -> Transform:
        return Composed(first=drawn(self.first, key), second=drawn(self.second, _other(key)))

    def __str__(self) -> str:
        return f"{self.first}, {self.second}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """Rotations along the outer dimensions, undone in the output: y' = (R_a^T a) (R_b^T b)^T, y = R_a y' R_b^T.

    So HALO (arXiv:2501.02625) rotates dy along tokens, and what meets it along the features that the output is to have.

    Args:
        a, b: transforms, as along the contraction, of the columns of the left and of the right operand; or None.
            Orthogonal: ``back`` is the inverse of ``left`` and ``right``. Without statistics.

    Raises ValueError without either, and for a ``Rescale`` or another ``Outer``.
    """

    rewrites_output: ClassVar[bool] = True

    a: Transform | None = None
    b: Transform | None = None

    def __post_init__(self) -> None:
        if self.a is None and self.b is None:
            raise ValueError("a transform of the outer dimensions is of the rows of a, of b, or of both: name one")
        for part in (self.a, self.b):
            if not _rotates(part):
                raise ValueError(f"{part} is no rotation: along an outer dimension there is nothing that undoes it")

    def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
        """[m, k] -> [m, k], a transposed view."""
        return a if self.a is None else self.a.left(a.mT).mT

    def right(self, b: Tensor, stats: Tensor | None = None) -> Tensor:
        """[n, k] -> [n, k], a transposed view."""
        return b if self.b is None else self.b.right(b.mT).mT

    def output(self, y: Tensor, stats: Tensor | None = None) -> Tensor:
        y = y if self.a is None else back(self.a, y.mT, left=True).mT
        return y if self.b is None else back(self.b, y, left=False)

    def back(self, g: Tensor, *, left: bool, stats: Tensor | None = None) -> Tensor:
        part = self.a if left else self.b
        return g if part is None else back(part, g.mT, left=left).mT

    def changes(self, left: bool) -> bool:
        return (self.a if left else self.b) is not None

    @property
    def draws(self) -> bool:
        return draws(self.a) or draws(self.b)

    def drawn(self, key: Tensor) -> Transform:
        a = None if self.a is None else drawn(self.a, key)
        return Outer(a=a, b=None if self.b is None else drawn(self.b, _other(key)))

    def __str__(self) -> str:
        parts = (("a", self.a), ("b", self.b))
        return ", ".join(f"{part} along the rows of {name}" for name, part in parts if part is not None)


def _rotates(transform: Transform | None) -> bool:
    if isinstance(transform, Composed):
        return _rotates(transform.first) and _rotates(transform.second)
    return not isinstance(transform, Rescale | Outer)


def _other(key: Tensor) -> Tensor:
    """A key of its own for the second of two transforms."""
    return step_key(key, 1)


class Rotation(NamedTuple):
    """A Hadamard transform in a GEMM, and the extent that it runs along: m, n or k."""

    extent: str
    hadamard: Hadamard


def rotations(transform: Transform | None) -> list[Rotation]:
    """The Hadamard transforms that a transform is made of."""
    if isinstance(transform, Composed):
        return [*rotations(transform.first), *rotations(transform.second)]
    if isinstance(transform, Outer):
        rows = (("m", transform.a), ("n", transform.b))
        return [Rotation(extent, inner.hadamard) for extent, part in rows for inner in rotations(part)]
    return [Rotation("k", transform)] if isinstance(transform, Hadamard) else []


def check_shape(transform: Transform | None, shape: tuple[int | None, int | None, int | None]) -> None:
    """Raises ValueError where a transform of a whole width meets one that no Hadamard matrix serves.

    Args:
        shape: m, n and k of the GEMM; None or -1 where one is not known.
    """
    extents = dict(zip("mnk", shape, strict=True))
    for extent, hadamard in rotations(transform):
        width = extents[extent]
        if hadamard.whole and width is not None and width > 0:
            hadamard_matrices.factors(width)
