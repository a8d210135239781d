"""AdamW over codecs in Triton, on GPUs or interpreted."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..backends.triton.device import installed, runs_on
from ..backends.triton.fused import StateMatrix, Step, adamw, adamw_amaxes
from ..formats import ExMy
from ..spec import OperandSpec
from .codecs import Codec, Plain, Scaled
from .reference import REFERENCE, Encoded, Update


class TritonAdam:
    """A Triton kernel for each parameter (two where one scale serves a tensor), on GPUs or interpreted.

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
        lacking = [str(codec) for codec in codecs if not _serves(codec)]
        return f"no kernel for {' or '.join(lacking)}" if lacking else None

    def amaxes(self, updates: Sequence[Update]) -> Tensor:
        result = torch.zeros(len(updates), 3, dtype=torch.float32, device=updates[0].grad.device)
        for row, u in zip(result, updates, strict=True):
            if u.per_tensor and u.grad.numel():
                m, v, w = map(_state, u.states)
                row.copy_(adamw_amaxes(u.grad, m, v, w, _step(u), gate=u.gate))
        return result

    def update(self, updates: Sequence[Update], amaxes: Tensor | None) -> None:
        for index, u in enumerate(updates):
            top = amaxes[index] if amaxes is not None else None
            if not u.grad.numel() or (u.plain and u.grad.device.type == "cpu"):
                REFERENCE.update([u], top[None] if top is not None else None)
                continue
            for x in (u.grad, u.weight):
                assert x is None or x.dtype in (torch.float32, torch.bfloat16)
            m, v, w = map(_state, u.states)
            offset = _row_offset(u.row_offset, u.grad.device)
            adamw(u.grad, m, v, w, _step(u), weight=u.weight, amaxes=top, row_offset=offset, gate=u.gate)


@functools.cache
def _row_offset(row: int, device: torch.device) -> Tensor:
    """On the device, once: a copy at every update would be waited for."""
    return torch.tensor(row, dtype=torch.int64, device=device)


def _serves(codec: Codec) -> bool:
    if type(codec) is Scaled and type(codec.format) is ExMy:
        block = codec.block or 2
        if codec.format.exponent_bits < 2 or codec.format.mantissa_bits < 1:
            return False
        return codec.format.bits <= 8 and 1 < block <= 1024 and block & (block - 1) == 0
    return type(codec) is Plain


def _state(encoded: Encoded) -> StateMatrix:
    """The codec's parts as the kernel knows them."""
    codec, device = encoded.codec, next(iter(encoded.parts.values())).device
    key = encoded.key.to(device) if encoded.key is not None else None
    if isinstance(codec, Scaled):
        return StateMatrix(values=encoded.parts["codes"], scales=encoded.parts["scales"], spec=_spec(codec), key=key)
    assert isinstance(codec, Plain)
    return StateMatrix(values=encoded.parts[""], rounding=codec.rounding, key=key)


@functools.cache
def _spec(codec: Scaled) -> OperandSpec:
    return codec.spec


def _step(u: Update) -> Step:
    return Step(lr=u.lr, betas=u.betas, eps=u.eps, decay=u.decay, t=u.t)
