"""The compiled kernels of this folder (``cpu_kernels.cpp``); the plain-torch definitions serve where they are not."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from ... import native

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")


def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None."""
    return native.library(SOURCE)


def loaded() -> ctypes.CDLL:
    """The kernels, once ``library()`` is known to be there."""
    kernels = library()
    assert kernels is not None
    return kernels


@functools.cache
def has_attention() -> bool:
    """Whether the kernels are there and this CPU multiplies BF16 pairs (AVX512_BF16)."""
    kernels = library()
    return kernels is not None and bool(kernels.has_attention())
