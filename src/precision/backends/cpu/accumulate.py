"""Sums by the rules of tensor cores in C++: the bits of ``precision.sums.sum_terms``."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from .... import native
from ...sums import Accumulate, Terms, sum_terms

SOURCE = Path(__file__).with_name("accumulate.cpp")
MAX_BITS = 25  # so that an int32 holds a group of terms below 2^(bits + 2)
_TOO_WIDE = 0xFFF  # bits of a significand that would make a product inexact in FP32


class CSums(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("step", "bits", "significant", "least")] + [
        ("promote_every", ctypes.c_int64)
    ]


def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None. Raises RuntimeError if the structure above is not that of C++."""
    return native.library(SOURCE, CSums)


class CompiledSums:
    """As ``precision.sums.Summing``, of significands of 12 bits; plain torch sums wider ones."""

    def why_not(self, rule: Accumulate) -> str | None:
        if rule.bits > MAX_BITS:
            return f"no kernel for terms of more than {MAX_BITS} bits"
        return None if library() is not None else "no C++ compiler"

    def sum(self, a: Terms, b: Terms, rule: Accumulate, acc: Tensor) -> Tensor:
        sides = a.significands, b.significands
        if acc.device.type != "cpu" or any((x.view(torch.int32) & _TOO_WIDE).any() for x in sides):
            return sum_terms(a, b, rule, acc)
        (m, k), n = a.significands.shape, len(b.significands)
        if 0 in (m, n, k):
            return acc
        # Named: they must outlive the call.
        parts = [part for t in (a, b) for part in (t.significands, t.exponents.int(), t.factors)]
        tensors = [None if part is None else part.contiguous() for part in parts]
        sums = CSums(rule.step, rule.bits, rule.significant, rule.least, rule.promote_every or 0)
        acc = acc.contiguous()
        _function()(*map(native.pointer, [*tensors, acc]), *map(native.size, (m, n, k)), ctypes.byref(sums))
        return acc


@functools.cache
def _function() -> ctypes._NamedFuncPointer:
    loaded = library()
    assert loaded is not None
    return loaded.sum_terms
