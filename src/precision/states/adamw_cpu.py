"""AdamW over codecs in C++ (``backends/cpu/adamw.cpp``): the bits of the reference."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ... import native
from ..backends.cpu import library as cpu
from ..formats import ExMy
from .codecs import Codec, Dynamic, Expanded, Kahan, Plain, Scaled, dynamic_map, expanded_maps, expansion_limits
from .reference import Encoded, Update

SOURCE = Path(cpu.__file__).with_name("adamw.cpp")
_ROOT_MODE = 0x140102  # as in adamw.cpp
_KINDS: dict[type, int] = {Plain: 0, Kahan: 2, Scaled: 3, Dynamic: 4, Expanded: 5}


class CCodec(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "block", "stochastic")),
        ("floor", ctypes.c_float),
        ("format", cpu.CFormat),
        *((name, ctypes.c_void_p) for name in ("values", "middles", "limits")),
    ]


class CEncoded(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "extra")),
        *((name, ctypes.c_uint32) for name in ("key0", "key1")),
        ("amax", ctypes.c_float),
    ]


class CUpdate(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "cols")),
        ("row_offset", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("grad", "weight")),
        *((name, ctypes.c_int32) for name in ("grad_bf16", "weight_bf16", "decays", "torch_root")),
        *((name, ctypes.c_float) for name in ("decay", "lerp", "beta2", "square", "correction", "eps", "step")),
        ("codecs", CCodec * 3),
        ("states", CEncoded * 3),
    ]


class Times(Protocol):
    """The scalars of an update that hang on its number."""

    @property
    def lr(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def t(self) -> float: ...


def step_size(u: Times) -> float:
    return float(u.lr / (1 - u.betas[0] ** u.t))


def correction(u: Times) -> float:
    """What sqrt(v) is divided by."""
    return float((1 - u.betas[1] ** u.t) ** 0.5)


def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None. Raises RuntimeError if the structures above are not those of C++."""
    return native.library(SOURCE, CCodec, CEncoded, CUpdate)


class CpuAdam:
    """One pass of C++ over every tensor, all of them in one call (two where one scale serves a tensor)."""

    name = "cpu"

    def why_not(self, device: torch.device, codecs: Collection[Codec] = (), beta1: float = 0.9) -> str | None:
        if device.type != "cpu":
            return f"the parameters are on {device.type}"
        if library() is None:
            return "no C++ compiler"
        if lacking := [str(codec) for codec in codecs if not _serves(codec)]:
            return f"no kernel for {' or '.join(lacking)}"
        return None if _root() is not None else "torch's square roots are neither IEEE's nor those of MKL's vmsSqrt"

    def amaxes(self, updates: Sequence[Update]) -> Tensor:
        updates = _opened(updates)
        result = torch.zeros(len(updates), 3, dtype=torch.float32, device="cpu")
        _kernels().adam_amaxes(_array(updates, None), native.size(len(updates)), native.pointer(result), _root())
        return result

    def update(self, updates: Sequence[Update], amaxes: Tensor | None) -> None:
        if updates[0].gate is not None and not bool(updates[0].gate[1]):
            return
        updates = _opened(updates)
        _kernels().adam_update(_array(updates, amaxes), native.size(len(updates)), _root())


def _opened(updates: Sequence[Update]) -> Sequence[Update]:
    """With gradients multiplied here: C++ does not, and on a CPU nothing waits for that."""
    if updates[0].gate is None:
        return updates
    return [replace(u, grad=u.gradient.to(u.grad.dtype), gate=None) for u in updates]


@functools.cache
def _root() -> ctypes.c_void_p | None:
    """Who takes square roots in C++: null for IEEE's own, or the function of MKL that torch calls; None for neither.

    Found by trying: MKL's differ from the correctly rounded ones in a fifth of all numbers.
    """
    bits = torch.arange(0, 0x7F800000, 65_521, dtype=torch.int32)  # over all exponents, subnormals included
    x = bits.view(torch.float32)
    roots = x.sqrt()
    if torch.equal(x.double().sqrt().float(), roots):
        return ctypes.c_void_p(None)
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).vmsSqrt
    except (OSError, AttributeError):
        return None
    out = torch.empty_like(x)
    function(ctypes.c_int32(len(x)), native.pointer(x), native.pointer(out), ctypes.c_int64(_ROOT_MODE))
    return ctypes.cast(function, ctypes.c_void_p) if torch.equal(out, roots) else None


def _kernels() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    return loaded


def _serves(codec: Codec) -> bool:
    """Whether C++ computes this codec. What only looks like one may encode by rules of its own."""
    if isinstance(codec, Scaled):
        usual = type(codec.format) is ExMy and codec.format.exponent_bits > 1 and codec.format.mantissa_bits > 0
        return usual and type(codec) in _KINDS
    return type(codec) in _KINDS


def _array(updates: Sequence[Update], amaxes: Tensor | None) -> ctypes.Array[CUpdate]:
    array = (CUpdate * len(updates))()
    rows_of_amaxes = amaxes.tolist() if amaxes is not None else [(0.0, 0.0, 0.0)] * len(updates)
    codecs: dict[int, CCodec] = {}
    for target, u, amaxes_of_states in zip(array, updates, rows_of_amaxes, strict=True):
        # A vector is one row: what rounds by rows has its own shape.
        rows, cols = u.grad.shape
        if cols == 1 and all(isinstance(state.codec, (Plain, Kahan)) and state.key is None for state in u.states):
            rows, cols = 1, rows
        target.rows, target.cols, target.row_offset = rows, cols, u.row_offset
        target.grad, target.grad_bf16 = _pointer(u.grad, u.grad.shape), u.grad.dtype == torch.bfloat16
        assert u.grad.dtype in (torch.float32, torch.bfloat16)
        if u.weight is not None:
            assert u.weight.dtype in (torch.float32, torch.bfloat16)
            target.weight, target.weight_bf16 = _pointer(u.weight, u.grad.shape), u.weight.dtype == torch.bfloat16
        beta1, beta2 = u.betas
        target.decays, target.decay = u.decay != 0, 1 - u.lr * u.decay
        target.torch_root = u.plain
        target.lerp, target.beta2, target.square = 1 - beta1, beta2, 1 - beta2
        target.correction, target.eps, target.step = correction(u), u.eps, -step_size(u)
        target_codecs, target_states = target.codecs, target.states
        for which, (state, amax) in enumerate(zip(u.states, amaxes_of_states, strict=True)):
            if id(state.codec) not in codecs:
                codecs[id(state.codec)] = _codec(state.codec)
            target_codecs[which] = codecs[id(state.codec)]
            _fill(target_states[which], state, u.grad.shape, amax)
    return array


def _fill(target: CEncoded, state: Encoded, shape: torch.Size, amax: float) -> None:
    for name, (extent, dtype) in state.codec.layout(*shape).items():
        part = state.parts[name]
        assert part.dtype == dtype
        field = {"": "codes", "residual": "extra", "powers": "extra"}.get(name, name)
        setattr(target, field, _pointer(part, extent))
    target.amax = amax
    if state.key is not None:
        target.key0, target.key1 = (word & 0xFFFFFFFF for word in state.key.tolist())


def _pointer(tensor: Tensor, shape: Sequence[int]) -> int:
    """Of a contiguous tensor of just this shape: C++ sees nothing else of it."""
    assert tensor.shape == tuple(shape), (tensor.shape, shape)
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.data_ptr()


def _codec(codec: Codec) -> CCodec:
    if isinstance(codec, Plain):
        return CCodec(kind=int(codec.dtype == torch.bfloat16), stochastic=codec.stochastic)
    result = CCodec(kind=_KINDS[type(codec)], stochastic=codec.stochastic)
    if isinstance(codec, Scaled):
        result.block, result.floor, result.format = codec.block or 0, codec.floor, cpu.c_format(codec.format)
    if isinstance(codec, Dynamic):
        result.block = codec.block
        result.values, result.middles = (table.data_ptr() for table in dynamic_map(codec.signed))
    if isinstance(codec, Expanded):
        result.block = codec.block
        result.values, result.middles = (table.data_ptr() for table in expanded_maps())
        result.limits = expansion_limits().data_ptr()
    return result
