"""A profile of a step as rows: kinds of kernels, and the kernels with the most time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from gpu_suite.results import UNPROVED
from gpu_suite.steps import (
    Row,
    cuda,
)

#: Kinds of kernels by their names, the first that matches.
KINDS = {
    "attention": r"flash|fmha|attention|sdpa",
    "quantization": r"quantize|amax_kernel|swiglu_backward|hadamard|swizzle|values_kernel|rounded|transpose_kernel",
    "products": r"gemm|nvjet|xmma|cutlass|cublas|sm90_|splitK",
    "optimizer": r"multi_tensor|adam",
    "collectives": r"nccl",
    "inductor": r"^triton_",
    "copies": r"memcpy|memset|copy|cat_",
}


def kind_of(kernel: str) -> str:
    """Of a kernel of the device, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def profile_rows(what: str, averages: Any) -> Iterator[Row]:
    """``averages`` of a profile: of kernels on the device where there is one, of torch's operations where not."""
    there = torch.autograd.DeviceType.CUDA if cuda() else torch.autograd.DeviceType.CPU
    name = "self_device_time_total" if cuda() else "self_cpu_time_total"
    events = [
        (event.key, getattr(event, name), event.count)
        for event in averages
        # FSDP and optimizers annotate spans, which hold kernels that are counted themselves.
        if event.device_type == there and not getattr(event, "is_user_annotation", False)
    ]
    events = sorted((event for event in events if event[1] > 0), key=lambda event: -event[1])
    total = sum(us for _, us, _ in events)
    if not total:  # counters of the device may be out of a virtual machine's reach
        yield {"what": f"{what}: a step", "error": "the profiler saw nothing on the device"}
        return
    kinds: dict[str, float] = {}
    for key, us, _ in events:
        kinds[kind_of(key)] = kinds.get(kind_of(key), 0.0) + us
    shares = {kind: f"{100 * us / total:.0f}%" for kind, us in sorted(kinds.items(), key=lambda item: -item[1])}
    said = {} if cuda() else {"": f"operations of the CPU; kernels {UNPROVED}"}
    count = sum(number for *_, number in events)
    yield {"what": f"{what}: a step", "ms": total / 1e3, "kernels": count, **shares, **said}
    for key, us, number in events[: 8 if cuda() else 3]:
        yield {"what": f"  {key[:34]}", "%": round(100 * us / total, 1), "ms": us / 1e3, "n": number}
