"""AdamW over codecs: decode, update in FP32, encode. ``reference`` is the definition; ``cpu`` gives the same bits, and
so does ``triton`` in Triton's interpreter.

For one parameter, with the step's scalars computed in float64 and rounded once to FP32, every operation in FP32:

    w = w * (1 - lr * weight_decay)                    where there is decay
    m = lerp(m, g, 1 - beta1)                          one fused multiply-add
    v = fma((1 - beta2) * g, g, v * beta2)
    w = w + (-lr / (1 - beta1^t)) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

as ``torch.optim.AdamW(foreach=False, fused=False)`` does; bit for bit where all three are plain FP32. Elsewhere square
roots are rounded correctly, as torch's on a CPU are not (MKL's are slow beside that, too). m, v and w are what their
codecs stand for; the new w comes from the new moments before they are rounded.

A scale that serves a whole tensor needs the amax of the new values, on all ranks, before the first of them is encoded.
So there are two passes, and the second computes the values again: no FP32 copy of anything is kept in between. (The
reference, in plain torch, has FP32 copies of one tensor at a time.)
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ... import native
from ..noise import Noise
from ..spec import OperandSpec
from ..states.codecs import (
    FP32,
    Codec,
    Dynamic,
    Expanded,
    Kahan,
    Parts,
    Plain,
    Scaled,
    dynamic_map,
    expanded_maps,
    expansion_limits,
)
from .cpu import quantizer as cpu
from .triton.device import installed, runs_on
from .triton.fused import State, Step, adamw, adamw_amaxes


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Kept:
    """One matrix as its codec keeps it: ``parts`` are changed in place. ``key``: int32 [2], of its rounding noise."""

    codec: Codec
    parts: Parts
    key: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Update:
    """One parameter's update on this rank.

    Args:
        grad: [rows, cols], FP32 or BF16, contiguous.
        m, v, w: the moments and the weights.
        weight: the parameter [rows, cols], if ``w`` is kept beside it; else None: it is ``w``'s plain part.
        row_offset: index of the first row in the whole parameter.
        lr, betas, eps, decay: as in torch; ``decay`` is the coefficient.
        t: number of this update, from 1.
        gate: FP32 [2]: what the gradient is multiplied by, and 1, or 0 for an update that is left out; None: 1 and 1.
    """

    grad: Tensor
    m: Kept
    v: Kept
    w: Kept
    weight: Tensor | None
    row_offset: int
    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float
    t: float
    gate: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        """FP32, multiplied, and rounded to its own dtype, as in place."""
        if self.gate is None:
            return self.grad.float()
        return (self.grad.float() * self.gate[0]).to(self.grad.dtype).float()

    @property
    def kept(self) -> tuple[Kept, Kept, Kept]:
        return self.m, self.v, self.w

    @property
    def step_size(self) -> float:
        return float(self.lr / (1 - self.betas[0] ** self.t))

    @property
    def correction(self) -> float:
        """What sqrt(v) is divided by."""
        return float((1 - self.betas[1] ** self.t) ** 0.5)

    @property
    def plain(self) -> bool:
        """Whether nothing of it is narrow: then even the square roots are torch's."""
        return self.weight is None and all(kept.codec == FP32 for kept in self.kept)

    @property
    def whole(self) -> bool:
        """Whether one of its scales wants an amax over all ranks."""
        return any(kept.codec.whole for kept in self.kept)


class AdamBackend(Protocol):
    name: str

    def why_not(self, device: torch.device, codecs: Collection[Codec] = (), beta1: float = 0.9) -> str | None:
        """None if this backend can update parameters on ``device`` that are kept, as are their moments, by these
        codecs, with this least beta1; else why not.
        """

    def amaxes(self, updates: Sequence[Update]) -> Tensor:
        """FP32 [updates, 3]: amax of the new m, v and w of this rank where one scale serves the tensor, else 0."""

    def update(self, updates: Sequence[Update], amaxes: Tensor | None) -> None:
        """All updates, in place. ``amaxes`` [updates, 3]: over all ranks; None if no scale wants one."""


def new_values(u: Update) -> tuple[Tensor, Tensor, Tensor]:
    """The new m, v and w: FP32 [rows, cols], before they are encoded."""
    grad = u.gradient
    m, v, w = (kept.codec.decode(kept.parts) for kept in u.kept)
    if u.decay != 0:
        w = w * (1 - u.lr * u.decay)
    m = m.lerp(grad, 1 - u.betas[0])
    v = v.mul(u.betas[1]).addcmul_(grad, grad, value=1 - u.betas[1])
    root = v.sqrt() if u.plain else v.double().sqrt().float()
    denominator = (root / u.correction).add_(u.eps)
    return m, v, w.addcdiv(m, denominator, value=-u.step_size)


class ReferenceAdam:
    """Plain torch on any device, parameter by parameter."""

    name = "reference"

    def why_not(self, device: torch.device, codecs: Collection[Codec] = (), beta1: float = 0.9) -> str | None:
        return None

    def amaxes(self, updates: Sequence[Update]) -> Tensor:
        result = torch.zeros(len(updates), 3, dtype=torch.float32, device=updates[0].grad.device)
        for row, u in zip(result, updates, strict=True):
            if u.whole:
                for place, (kept, value) in enumerate(zip(u.kept, new_values(u), strict=True)):
                    if kept.codec.whole and value.numel():
                        row[place] = value.abs().amax()
        return result

    def update(self, updates: Sequence[Update], amaxes: Tensor | None) -> None:
        for index, u in enumerate(updates):
            values = new_values(u)
            for place, (kept, value) in enumerate(zip(u.kept, values, strict=True)):
                noise = Noise(key=kept.key, row_offset=u.row_offset) if kept.key is not None else None
                amax = amaxes[index, place] if amaxes is not None and kept.codec.whole else None
                for name, part in kept.codec.encode(value, amax=amax, noise=noise).items():
                    stays = kept.parts[name]
                    stays.copy_(part if u.gate is None else torch.where(u.gate[1] != 0, part, stays))
            if u.weight is not None:
                u.weight.copy_(u.w.codec.decode(u.w.parts))


class CpuAdam:
    """One pass of C++ over every tensor, all of them in one call (two where a scale serves a whole tensor)."""

    name = "cpu"

    def why_not(self, device: torch.device, codecs: Collection[Codec] = (), beta1: float = 0.9) -> str | None:
        if device.type != "cpu":
            return f"the parameters are on {device.type}"
        if cpu.library() is None:
            return "no C++ compiler"
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


_ROOT_MODE = 0x140102  # as in cpu_kernels.cpp

REFERENCE: AdamBackend = ReferenceAdam()


class TritonAdam:
    """A Triton kernel for each parameter (two where a scale serves a whole tensor), on GPUs or interpreted.

    What the kernel does not do alike goes to the reference: matrices without elements, and on a CPU all-FP32 updates,
    since their square roots are torch's there.
    """

    name = "triton"

    def why_not(self, device: torch.device, codecs: Collection[Codec] = (), beta1: float = 0.9) -> str | None:
        if not runs_on(device):
            return f"the parameters are on {device.type}"
        if not installed():
            return "triton is not installed"
        if not 0.5 < beta1 < 1:
            return f"no kernel for beta1={beta1:g}: torch interpolates otherwise up to 0.5"
        lacking = [str(codec) for codec in codecs if not _in_triton(codec)]
        return f"no kernel for {' or '.join(lacking)}" if lacking else None

    def amaxes(self, updates: Sequence[Update]) -> Tensor:
        result = torch.zeros(len(updates), 3, dtype=torch.float32, device=updates[0].grad.device)
        for row, u in zip(result, updates, strict=True):
            if u.whole and u.grad.numel():
                m, v, w = map(_state, u.kept)
                row.copy_(adamw_amaxes(u.grad, m, v, w, _step(u), gate=u.gate))
        return result

    def update(self, updates: Sequence[Update], amaxes: Tensor | None) -> None:
        for index, u in enumerate(updates):
            tops = amaxes[index] if amaxes is not None else None
            if not u.grad.numel() or (u.plain and u.grad.device.type == "cpu"):
                REFERENCE.update([u], tops[None] if tops is not None else None)
                continue
            for x in (u.grad, u.weight):
                assert x is None or x.dtype in (torch.float32, torch.bfloat16)
            m, v, w = map(_state, u.kept)
            offset = _row_offset(u.row_offset, u.grad.device)
            adamw(u.grad, m, v, w, _step(u), weight=u.weight, amaxes=tops, row_offset=offset, gate=u.gate)


@functools.cache
def _row_offset(row: int, device: torch.device) -> Tensor:
    """On the device, once: a copy at every update would be waited for."""
    return torch.tensor(row, dtype=torch.int64, device=device)


def _in_triton(codec: Codec) -> bool:
    if isinstance(codec, Scaled):
        block = codec.block or 2
        return codec.format.bits <= 8 and 1 < block <= 1024 and block & (block - 1) == 0
    return isinstance(codec, Plain)


def _state(kept: Kept) -> State:
    """The codec's parts as the kernel knows them."""
    codec, device = kept.codec, next(iter(kept.parts.values())).device
    key = kept.key.to(device) if kept.key is not None else None
    if isinstance(codec, Scaled):
        return State(values=kept.parts["codes"], scales=kept.parts["scales"], spec=_spec(codec), key=key)
    assert isinstance(codec, Plain)
    return State(values=kept.parts[""], rounding=codec.rounding, key=key)


@functools.cache
def _spec(codec: Scaled) -> OperandSpec:
    return codec.spec


def _step(u: Update) -> Step:
    return Step(lr=u.lr, betas=u.betas, eps=u.eps, decay=u.decay, t=u.t)


ORDER: tuple[AdamBackend, ...] = (CpuAdam(), TritonAdam(), REFERENCE)


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend of updates, and why those before it refused."""

    backend: AdamBackend
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.backend.name}{''.join(f' ({reason})' for reason in self.refused)}"


def choose(device: torch.device, wanted: str = "auto", *, codecs: Collection[Codec] = (), beta1: float = 0.9) -> Choice:
    """The backend of updates on ``device``: the one of that name if it can, else the first that can.

    A name that only matrix products know means nothing here.
    """
    reasons = {backend.name: backend.why_not(device, codecs, beta1) for backend in ORDER}
    if wanted in reasons and reasons[wanted] is None:
        return Choice(next(backend for backend in ORDER if backend.name == wanted))
    first = next(index for index, backend in enumerate(ORDER) if reasons[backend.name] is None)
    asked = {wanted, *(backend.name for backend in ORDER[:first])}
    refused = {name: reason for name, reason in reasons.items() if name in asked and reason is not None}
    obvious = f"the parameters are on {device.type}"  # unless it was asked for by name
    said = [f"not {name}: {reason}" for name, reason in refused.items() if name == wanted or reason != obvious]
    return Choice(ORDER[first], tuple(said))


class _Codec(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "block", "stochastic")),
        ("floor", ctypes.c_float),
        ("format", cpu.Format),
        *((name, ctypes.c_void_p) for name in ("values", "middles", "limits")),
    ]


class _Kept(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "extra")),
        *((name, ctypes.c_uint32) for name in ("key0", "key1")),
        ("amax", ctypes.c_float),
    ]


class _Update(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "cols")),
        ("row_offset", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("grad", "weight")),
        *((name, ctypes.c_int32) for name in ("grad_bf16", "weight_bf16", "decays", "torch_root")),
        *((name, ctypes.c_float) for name in ("decay", "lerp", "beta2", "square", "correction", "eps", "step")),
        *((name, _Codec) for name in ("m", "v", "w")),
        *((name, _Kept) for name in ("m_kept", "v_kept", "w_kept")),
    ]


def _kernels() -> ctypes.CDLL:
    kernels = cpu.library()
    assert kernels is not None
    return kernels


def _array(updates: Sequence[Update], amaxes: Tensor | None) -> ctypes.Array[_Update]:
    array = (_Update * len(updates))()
    tops = amaxes.tolist() if amaxes is not None else [(0.0, 0.0, 0.0)] * len(updates)
    codecs: dict[int, _Codec] = {}
    for target, u, top in zip(array, updates, tops, strict=True):
        # A vector is one row: what rounds by rows keeps its own shape.
        rows, cols = u.grad.shape
        if cols == 1 and all(isinstance(kept.codec, (Plain, Kahan)) and kept.key is None for kept in u.kept):
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
        target.correction, target.eps, target.step = u.correction, u.eps, -u.step_size
        for name, kept, amax in zip(("m", "v", "w"), u.kept, top, strict=True):
            if id(kept.codec) not in codecs:
                codecs[id(kept.codec)] = _codec(kept.codec)
            setattr(target, name, codecs[id(kept.codec)])
            _fill(getattr(target, f"{name}_kept"), kept, u.grad.shape, amax)
    return array


def _fill(target: _Kept, kept: Kept, shape: torch.Size, amax: float) -> None:
    for name, (extent, dtype) in kept.codec.layout(*shape).items():
        part = kept.parts[name]
        assert part.dtype == dtype
        field = {"": "codes", "residual": "extra", "powers": "extra"}.get(name, name)
        setattr(target, field, _pointer(part, extent))
    target.amax = amax
    if kept.key is not None:
        target.key0, target.key1 = (word & 0xFFFFFFFF for word in kept.key.tolist())


def _pointer(tensor: Tensor, shape: Sequence[int]) -> int:
    """Of a contiguous tensor of just this shape: C++ sees nothing else of it."""
    assert tensor.shape == tuple(shape), (tensor.shape, shape)
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.data_ptr()


_KINDS = {Kahan: 2, Scaled: 3, Dynamic: 4, Expanded: 5}


def _codec(codec: Codec) -> _Codec:
    if isinstance(codec, Plain):
        return _Codec(kind=int(codec.dtype == torch.bfloat16), stochastic=codec.stochastic)
    result = _Codec(kind=_KINDS[type(codec)], stochastic=codec.stochastic)
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
