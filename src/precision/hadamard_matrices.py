"""Hadamard matrices: K x K of +1 and -1 with H H^T = K I, for orders K that are no powers of two.

Constructed where they are needed, by the first of these that gives the order:

- Paley I (1933): q + 1 for a prime q = 3 mod 4, from the quadratic characters of differences in GF(q);
- Paley II: 2 (q + 1) for q = 1 mod 4, a prime or the square of one;
- Goethals and Seidel (1967): 4 n from four circulants whose power spectra add up to 4 n at every frequency. Orders 92,
  116, 156 and 172, which neither of Paley's reaches. The circulants were found by search over first rows that are
  constant on the orbits of multipliers modulo n: -1 for 23 and 29 (so symmetric, as Williamson's), 16 for 39, -1 and 6
  for 43 (symmetric, too).
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

_CPU = torch.device("cpu")

LARGEST = 1024
"""The largest order that is constructed."""

# n: first rows of four circulants; bit i is set where entry i is -1.
_CIRCULANTS = {
    23: (0x48DB12, 0x1BBDD8, 0x3A815C, 0x161868),
    29: (0x653F298, 0xCD3F2CC, 0x53A1728, 0x1045E882),
    39: (0x19F80CF26C, 0x7C68C7D2CA, 0x6F2BA266BC, 0x514AD7BF7E),
    43: (0x637AC935EC6, 0x871D9B8E10, 0x47A4C0325E2, 0x53502F40ACA),
}


@functools.lru_cache(maxsize=1024)
def factors(width: int) -> tuple[int, int]:
    """Orders K and P of a Kronecker product of Hadamard matrices of this width: P a power of two, K the least order
    constructed here that leaves one. 1 and the width, where that is a power of two itself.

    Raises ValueError for a width that no matrix constructed here serves, with the nearest ones that work.
    """
    found = _factors(width)
    if found is None:
        near = [next(filter(_factors, numbers)) for numbers in (range(width, 0, -1), itertools.count(width))]
        raise ValueError(f"no Hadamard matrix of order {width} is known here: {near[0]} and {near[1]} are the nearest")
    return found


def _factors(width: int) -> tuple[int, int] | None:
    power = width & -width
    odd = width // power
    if odd == 1:
        return 1, width
    order = 4 * odd
    while order <= min(LARGEST, width):
        if _is_known(order):
            return order, width // order
        order *= 2
    return None


@functools.cache
def matrix(order: int, device: torch.device = _CPU) -> Tensor:
    """FP64 [order, order] of +1 and -1. ``order``: 1, or one that ``factors`` gave."""
    with torch.inference_mode(False), _CPU:  # whatever the first caller's modes are: the matrix stays
        if order == 1:
            h = torch.ones(1, 1)
        elif _is_paley(order - 1, 3):
            h = _paley_1(order - 1)
        elif _is_paley(order // 2 - 1, 1):
            h = _paley_2(order // 2 - 1)
        else:
            h = _goethals_seidel(order // 4)
        return h.to(device, torch.float64)


def _is_known(order: int) -> bool:
    return _is_paley(order - 1, 3) or _is_paley(order // 2 - 1, 1) or order in (4 * n for n in _CIRCULANTS)


def _is_paley(q: int, remainder: int) -> bool:
    """Whether q has this remainder modulo 4 and is a prime, or the square of one (which has remainder 1)."""
    return q % 4 == remainder and (_is_prime(q) or _is_prime(_root(q)))


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % p for p in range(2, math.isqrt(q) + 1))


def _root(q: int) -> int:
    """The square root of q, or 0 if that is no integer."""
    root = math.isqrt(q)
    return root if root * root == q else 0


def _paley_1(q: int) -> Tensor:
    """I + S, S skew: a border of +1 above and -1 beside the characters."""
    h = torch.ones(q + 1, q + 1, dtype=torch.int64)
    h[1:, 0] = -1
    h[1:, 1:] = _characters(q) + torch.eye(q, dtype=torch.int64)
    return h


def _paley_2(q: int) -> Tensor:
    """C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]], C the characters with a border of +1 and a diagonal of 0."""
    c = torch.ones(q + 1, q + 1, dtype=torch.int64)
    c[0, 0] = 0
    c[1:, 1:] = _characters(q)
    eye = torch.eye(q + 1, dtype=torch.int64)
    return torch.kron(c, torch.tensor([[1, 1], [1, -1]])) + torch.kron(eye, torch.tensor([[1, -1], [-1, -1]]))


def _characters(q: int) -> Tensor:
    """[q, q], entry (i, j): of element i - j of GF(q): 1 for a square, -1 for none, 0 for zero.

    Elements of GF(p^2) are a + b sqrt(r), r no square modulo p; one is a square where its norm a^2 - r b^2 is one
    modulo p.
    """
    p = _root(q) or q
    of_p = -torch.ones(p, dtype=torch.int64)
    of_p[torch.arange(p) ** 2 % p] = 1
    of_p[0] = 0
    number = torch.arange(p)
    difference = (number[:, None] - number) % p
    if p == q:
        return of_p[difference]
    r = next(i for i in range(p) if of_p[i] < 0)
    a, b = difference[:, None, :, None], difference[None, :, None, :]
    return of_p[(a * a - r * b * b) % p].reshape(q, q)


def _goethals_seidel(n: int) -> Tensor:
    a, b, c, d = (_circulant(row, n) for row in _CIRCULANTS[n])
    rb, rc, rd = (x.flip(1) for x in (b, c, d))  # times the matrix that reverses columns
    rbt, rct, rdt = (x.mT.flip(1) for x in (b, c, d))
    rows = ((a, rb, rc, rd), (-rb, a, rdt, -rct), (-rc, -rdt, a, rbt), (-rd, rct, -rbt, a))
    return torch.cat([torch.cat(row, 1) for row in rows])


def _circulant(row: int, n: int) -> Tensor:
    first = torch.tensor([1 - 2 * (row >> i & 1) for i in range(n)])
    number = torch.arange(n)
    return first[(number - number[:, None]) % n]
