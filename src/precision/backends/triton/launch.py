"""Launches: prepared once for all calls of one kind, and started with as little host time as may be."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .device import RECORDING, Launch, version

MAX_PLANS = 4096
_PLANS: dict[Hashable, Any] = {}
_NUMBERS: dict[int, tuple[Hashable, int]] = {}
_EQUAL: dict[Hashable, int] = {}


def recall(key: Hashable) -> Any:
    """The plan that ``remember`` was given for a key, or None: always while recording, which is for another device."""
    return _PLANS.get(key) if RECORDING.get() is None else None


def remember(key: Hashable, plan: Any) -> Any:
    """Gives ``plan`` back."""
    if RECORDING.get() is None:
        if len(_PLANS) >= MAX_PLANS:
            _PLANS.clear()
        _PLANS[key] = plan
    return plan


def number(value: Hashable) -> int:
    """One small integer for all values that are equal: a spec's own hash takes longer than a launch.

    Values are known by their place in memory, which nothing else takes while they are referenced here.
    """
    known = _NUMBERS.get(id(value))
    if known is not None:
        return known[1]
    if len(_NUMBERS) >= MAX_PLANS:
        _NUMBERS.clear()
    result = _EQUAL.setdefault(value, len(_EQUAL))
    _NUMBERS[id(value)] = value, result
    return result


class _Compiled(NamedTuple):
    """What is launched, without triton's own way of finding it."""

    run: Any
    function: Any
    metadata: Any
    missing: int  # tensors that are None
    rest: tuple[Any, ...]  # what follows the tensors


@dataclass(slots=True, eq=False, kw_only=True)
class Launcher:
    """A kernel's launch but for its tensors, which ``start`` gives: always of the same dtypes, the same ones None.

    Args:
        numbers: the arguments after the tensors, in order.
        constexprs: the others, by name.
        device: of the tensors, as ``Tensor.get_device`` has it.
    """

    kernel: Any
    programs: int
    numbers: tuple[int, ...]
    constexprs: dict[str, Any]
    num_warps: int
    device: int
    direct: bool = field(init=False)  # whether compiled kernels may be launched without triton
    compiled: dict[tuple[int, int], _Compiled] = field(default_factory=dict)  # by device and alignment

    def __post_init__(self) -> None:
        self.direct = _direct(self.kernel)


def start(launcher: Launcher, *tensors: Tensor | None) -> None:
    """Launch on the current stream.

    Triton binds some 30 arguments anew at each launch, which takes tens of microseconds. What it compiles depends on
    dtypes, on constants, and on which pointers and integers are multiples of 16 or 1: of a ``Launcher`` all is fixed
    but the pointers. So a compiled kernel is remembered for every set of pointers that are multiples of 16; kernels
    with hooks, and versions of triton whose launchers are not known to take the same arguments, are launched by triton.
    """
    direct = launcher.direct and RECORDING.get() is None
    odd = 0
    if direct:
        runtime, active = _runtime()
        device, expected = active.get_current_device(), launcher.device
        pointers: list[int | None] = []
        ends = 0
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
            else:
                pointer = tensor.data_ptr()
                ends |= pointer
                pointers.append(pointer)
                direct &= tensor.get_device() == expected  # where one lies elsewhere, Triton says so
        if ends & 15:
            odd = sum(1 << place for place, pointer in enumerate(pointers) if (pointer or 0) & 15)
        compiled = launcher.compiled.get((device, odd)) if direct else None
        if (
            compiled is not None
            and pointers.count(None) == compiled.missing
            and not runtime.launch_enter_hook.calls
            and not runtime.launch_exit_hook.calls
        ):
            compiled.run(
                launcher.programs,
                *(1, 1, active.get_current_stream(device), compiled.function, compiled.metadata, None, None, None),
                *pointers,
                *compiled.rest,
            )
            return
    kernel = launch(
        launcher.kernel,
        launcher.programs,
        *tensors,
        *launcher.numbers,
        **launcher.constexprs,
        num_warps=launcher.num_warps,
    )
    if direct and compiled is None:
        names = launcher.kernel.arg_names[len(tensors) + len(launcher.numbers) :]
        launcher.compiled[device, odd] = _Compiled(
            run=kernel.run,
            function=kernel.function,
            metadata=kernel.packed_metadata,
            missing=tensors.count(None),
            rest=(*launcher.numbers, *(launcher.constexprs[name] for name in names)),
        )


@functools.cache
def _runtime() -> tuple[Any, Any]:
    """Triton's settings at run time, and its driver."""
    import triton  # type: ignore[import-untyped]
    from triton.runtime import driver  # type: ignore[import-untyped]

    return triton.knobs.runtime, driver.active


@functools.cache
def _direct(kernel: Any) -> bool:
    """Whether this triton's compiled kernels are run as ``start`` runs them."""
    from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]

    return isinstance(kernel, JITFunction) and (3, 6) <= version() <= (3, 9) and not kernel.pre_run_hooks


def launch(kernel: Any, programs: int, *args: Any, num_warps: int, **kwargs: Any) -> Any:
    """No product and sum may become one FMA: it would round once."""
    if (record := RECORDING.get()) is not None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        record.launches.append(Launch(kernel, programs, arguments, num_warps))
        return None
    return kernel[(programs,)](*args, **kwargs, num_warps=num_warps, enable_fp_fusion=False)
