"""What kernels run on: a GPU, Triton's interpreter on the CPU, or a recording, which runs nothing."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: Triton reads this variable once, too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def version() -> tuple[int, int]:
    """Major and minor version of triton, which must be installed."""
    import triton  # type: ignore[import-untyped]

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True, slots=True)
class Launch:
    """What a kernel would be launched with: its arguments by name, tensors for pointers."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int


@dataclass(slots=True)
class Recording:
    """Launches for a GPU of this compute capability, instead of running them."""

    capability: tuple[int, int]
    launches: list[Launch] = field(default_factory=list)


RECORDING: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Record launches instead of running them; tensors may be on the meta device. For ahead-of-time compilation."""
    record = Recording(capability)
    token = RECORDING.set(record)
    try:
        yield record.launches
    finally:
        RECORDING.reset(token)


def runs_on(device: torch.device) -> bool:
    """Whether kernels take tensors of this device: a GPU's, or, interpreted, the CPU's."""
    return RECORDING.get() is not None or device.type == ("cpu" if interpreted() else "cuda")


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability: of the GPU, of what is recorded for, or (0, 0) in the interpreter."""
    record = RECORDING.get()
    if record is not None:
        return record.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


class Hardware(NamedTuple):
    """Which conversion instructions a device has."""

    fp8: bool
    e2m1: bool


def hardware(device: torch.device) -> Hardware:
    """FP8 from Ada on, FP4 from Blackwell on.

    Before triton 3.9 not FP8 on Ada, where it casts to FP16 on the way: values would be rounded twice.
    """
    fp8 = (8, 9) if version() >= (3, 9) else (9, 0)
    return Hardware(fp8=capability(device) >= fp8, e2m1=capability(device) >= (10, 0))


MULTIPROCESSORS = {(8, 9): 142, (9, 0): 132, (10, 0): 148, (12, 0): 188}
"""Of L40S, H100 SXM, B200 and RTX PRO 6000: for launches that are recorded."""


def programs(blocks: int, num_warps: int, device: torch.device) -> int:
    """How many programs share the blocks of a matrix: what fills a GPU, at most, so that each has many of a large one.

    In the interpreter three, so that a program has several.
    """
    if device.type == "cuda" and RECORDING.get() is None:
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        multiprocessors = MULTIPROCESSORS.get(capability(device), 0)
    return min(blocks, multiprocessors * (64 // num_warps) or 3)
