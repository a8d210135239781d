"""Rounding noise as a pure function of (seed, step, module path, slot, global element index): no generator, no state.

The noise of an element does not depend on the rank that computes it, on micro-batches, on the order of layers, or on
whether the code is eager or compiled; a resumed run has the same noise with nothing saved.

The hash (murmur3's 32-bit finalizer), in arithmetic modulo 2^32, ``>>`` logical, ``^`` exclusive or:

    fmix32(h):  h ^= h >> 16;  h *= 0x85EBCA6B;  h ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16
    base        = first 8 bytes of SHA-256(b"narrowgauge rounding noise 1" || seed as 8 bytes || slot as 4 bytes ||
                  path in UTF-8), all integers little-endian: words base0, base1
    key_i       = fmix32(fmix32(base_i ^ step_lo) + step_hi)          step = 2^32 * step_hi + step_lo
    row_hash    = fmix32(fmix32(row_lo ^ key_0) + row_hi)             row = 2^32 * row_hi + row_lo
    element     = fmix32((row_hash + col * 0x9E3779B9) ^ key_1)
    noise       = (element >> 8) * 2^-24                              in [0, 1), exact in FP32

Noise of tiles (``Noise.of_tiles``), for scales that round stochastically, is that of the tile's first element under
other keys: ``fmix32(key_i ^ 0x7363616C)``. A second draw for the same elements (``Noise.again``): 0x61676169 instead.

Here ``uint32`` lives in int32 tensors: torch's additions, products and left shifts wrap modulo 2^32, and right shifts
become logical by a mask. In C and Triton the same is plain uint32 arithmetic.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


def base_key(seed: int, path: str, slot: int, *, device: torch.device | str | None = None) -> Tensor:
    """What does not change over a run: int32 [2].

    Args:
        seed: any integer; taken modulo 2^64.
        path: the module's path in the model, without wrappers.
        slot: which tensor of the module, below 2^32.
    """
    text = b"narrowgauge rounding noise 1" + (seed % 2**64).to_bytes(8, "little") + slot.to_bytes(4, "little")
    digest = hashlib.sha256(text + path.encode()).digest()
    words = [int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4)]
    return torch.tensor(words, dtype=torch.int32, device=device)


def step_key(base: Tensor, step: Tensor | int) -> Tensor:
    """The key of one step: int32 [2].

    Args:
        base: of ``base_key``.
        step: not negative. Under ``torch.compile`` a 0-dim int64 tensor: an integer would compile anew at every step.
    """
    low, high = _words(step, base.device)
    return _fmix32(_fmix32(base ^ low) + high)


_TILES, _AGAIN = 0x7363616C, 0x61676169  # "scal", "agai" in ASCII


class Noise:
    """The noise of one tensor, by its key and the global index of its first row, or by what both are computed from.

    The second way (``Noise.of``) computes nothing: a kernel reads the parts where they lie, on its device.

    Args:
        key: of ``step_key``.
        row_offset: global index of the tensor's first row: what other ranks and micro-batches have before it. May
            exceed 2^32. An integer or a 0-dim int64 tensor.
        rows: int64 [rows], places of the tensor's rows after ``row_offset``, where they do not follow one another, as
            tokens that were routed to an expert. None: 0, 1, 2 ...
        transposed: the tensor that is quantized is the transpose of the one whose rows are counted. So dy.mT, quantized
            along tokens, gets noise by (token, feature) like dy.
    """

    __slots__ = ("base", "first_sample", "rows", "rows_of_a_sample", "step", "transposed")

    def __init__(
        self, *, key: Tensor, row_offset: Tensor | int = 0, rows: Tensor | None = None, transposed: bool = False
    ) -> None:
        self.base, self.first_sample, self.rows, self.transposed = key, row_offset, rows, transposed
        self.step: Tensor | int | None = None
        self.rows_of_a_sample = 1

    @classmethod
    def of(
        cls,
        *,
        base: Tensor,
        step: Tensor | int,
        first_sample: Tensor | int,
        rows_of_a_sample: int,
        rows: Tensor | None = None,
        transposed: bool = False,
    ) -> Noise:
        """The noise whose key is ``step_key(base, step)`` and whose row offset is first_sample * rows_of_a_sample.

        Args:
            base: of ``base_key``.
            step, first_sample: not negative; integers or 0-dim int64 tensors.
            rows_of_a_sample: 0 for what does not depend on the data, as weights.
            rows: as in ``Noise``.
        """
        noise = cls(key=base, row_offset=first_sample, rows=rows, transposed=transposed)
        noise.step, noise.rows_of_a_sample = step, rows_of_a_sample
        return noise

    @property
    def key(self) -> Tensor:
        """int32 [2]."""
        return self.base if self.step is None else step_key(self.base, self.step)

    @property
    def row_offset(self) -> Tensor | int:
        """An integer or a 0-dim int64 tensor."""
        return self.first_sample * self.rows_of_a_sample if self.rows_of_a_sample != 1 else self.first_sample

    def uniform(self, rows: int, cols: int) -> Tensor:
        """FP32 [rows, cols] in [0, 1), for a tensor of this shape (as it is quantized, after any transpose)."""
        return self._uniform(self.key, (rows, cols), (1, 1))

    def of_tiles(self, grid: tuple[int, int], extent: tuple[int, int]) -> Tensor:
        """FP32 [rows, columns] in [0, 1), for a grid of tiles of this extent: by the place of a tile's first element,
        and independent of the elements' own noise."""
        return self._uniform(_fmix32(self.key ^ _TILES), grid, extent)

    def again(self) -> Noise:
        """Other noise for the same elements."""
        key = _fmix32(self.key ^ _AGAIN)
        return Noise(key=key, row_offset=self.row_offset, rows=self.rows, transposed=self.transposed)

    @property
    def places(self) -> Tensor | None:
        """int64 [rows], global indices of rows that do not follow one another; None where they do."""
        return None if self.rows is None else self.rows + self.row_offset

    def _uniform(self, key: Tensor, shape: tuple[int, int], steps: tuple[int, int]) -> Tensor:
        """Noise of every ``steps``-th row and column."""
        (rows, cols), (row_step, col_step) = (shape[::-1], steps[::-1]) if self.transposed else (shape, steps)
        if (places := self.places) is not None:
            places = places[:: max(row_step, 1)]
            low, high = _words(pad(places, (0, rows - len(places))), key.device)  # a matrix without rows is one tile
        else:
            offset, high = _words(self.row_offset, key.device)
            low = torch.arange(0, rows * row_step, row_step, dtype=torch.int32, device=key.device) + offset
            carry = (low ^ _signed(1 << 31)) < (offset ^ _signed(1 << 31))  # as unsigned numbers: the sum wrapped
            high = high + carry.int()
        row_hash = _fmix32(_fmix32(low ^ key[0]) + high)
        col = torch.arange(0, cols * col_step, col_step, dtype=torch.int32, device=key.device) * _signed(0x9E3779B9)
        summed = row_hash[None, :] + col[:, None] if self.transposed else row_hash[:, None] + col
        return ((_fmix32(summed ^ key[1]) >> 8) & 0xFFFFFF).float() * 2.0**-24


class Rows(NamedTuple):
    """Where the rows lie that were routed to an expert, and those of its weight.

    Args:
        ids: int64 [rows], places among all that the micro-batch could route.
        per_sample: places of a sample.
        first_of_weight: rows of the weights of the experts before.
    """

    ids: Tensor
    per_sample: int
    first_of_weight: int


def _signed(word: int) -> int:
    """The int32 with the bits of this uint32."""
    return word - 2**32 if word >= 2**31 else word


def _words(value: Tensor | int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of an int64, each as int32."""
    value = torch.as_tensor(value, dtype=torch.int64, device=device)
    # Brought into int32's range before the conversion, which is not defined outside of it.
    low = ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
    return low.to(torch.int32), (value >> 32).to(torch.int32)


def _fmix32(h: Tensor) -> Tensor:
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * _signed(0x85EBCA6B)
    h = h ^ ((h >> 13) & 0x7FFFF)
    h = h * _signed(0xC2B2AE35)
    return h ^ ((h >> 16) & 0xFFFF)
