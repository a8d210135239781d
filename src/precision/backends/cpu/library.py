"""The compiled kernels of ``quantize.cpp``, and the structures that they share with Python, field by field."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from .... import native
from ...formats import ExMy, NumberFormat
from ...noise import Noise

SOURCE = Path(__file__).with_name("quantize.cpp")


class CFormat(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("bits", "mantissa_bits", "min_exponent", "max_exponent", "nan", "inf")),
        ("max", ctypes.c_float),
    ]


class CNoise(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("on", "transposed")),
        *((name, ctypes.c_uint32) for name in ("key0", "key1")),
        ("row_offset", ctypes.c_uint64),
        ("rows", ctypes.c_void_p),
    ]


class CButterflies(ctypes.Structure):
    _fields_ = [("size", ctypes.c_int32), ("factor", ctypes.c_float), ("signs", ctypes.c_void_p)]


class CRule(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "pow2", "nan_decodes")),
        *((name, ctypes.c_float) for name in ("eps", "top", "limit", "inverse_max")),
        ("tiny_exponent", ctypes.c_int32),
        ("block", CFormat),
    ]


class CSource(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "tall", "wide")),
        *((name, ctypes.c_int32) for name in ("dtype", "columns")),
        ("butterflies", CButterflies),
    ]


def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None. Raises RuntimeError if the structures above are not those of C++."""
    return native.library(SOURCE, CFormat, CNoise, CButterflies, CRule, CSource)


def kernels() -> ctypes.CDLL:
    """The kernels, once ``library()`` is known to be there."""
    loaded = library()
    assert loaded is not None
    return loaded


@functools.cache
def c_format(format: NumberFormat) -> CFormat:
    """Of a float: kernels know no other."""
    assert isinstance(format, ExMy)
    nan = -1 if format.nan is None else format.nan
    exponents = (format.min_exponent, format.max_exponent)
    return CFormat(format.bits, format.mantissa_bits, *exponents, nan, int(format.inf), format.max)


def c_noise(noise: Noise | None) -> CNoise:
    """``noise``, whose ``rows`` must outlive it; rounding to nearest for None."""
    if noise is None:
        return CNoise()
    key0, key1 = (int(word) & 0xFFFFFFFF for word in noise.key.tolist())
    rows = None if noise.rows is None else native.pointer(noise.rows)
    return CNoise(1, int(noise.transposed), key0, key1, int(noise.row_offset) & 0xFFFFFFFFFFFFFFFF, rows)
