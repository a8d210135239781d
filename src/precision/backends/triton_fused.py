"""Fused Triton kernels beside the quantization of operands: AdamW over narrow states, and Smooth-SwiGLU.

They are compiled and launched as in ``precision.backends.triton``, and run in Triton's interpreter as those do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from precision.backends.triton import ROUNDINGS, Output, blocks, hardware, launch, output, rule_of
from precision.noise import Noise
from precision.quantize import Quantized
from precision.scaling import TENSOR, Fp32Decode, Tile
from precision.spec import OperandSpec, Rounding

if TYPE_CHECKING:
    from precision.backends import triton_fused_kernels


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class State:
    """An optimizer's state of one parameter: FP32 or BF16 [rows, cols], or codes (uint8) under FP32 scales.

    Args:
        values: contiguous, changed in place.
        scales: FP32 [rows, ceil(cols / block)], or of one element for the whole tensor; None for plain values.
        spec: of codes: a tile of (1, block) or the tensor, and scales by ``Fp32Decode``.
        rounding: of plain BF16.
        key: int32 [2], of rounding noise.
    """

    values: Tensor
    scales: Tensor | None = None
    spec: OperandSpec | None = None
    rounding: Rounding = Rounding.NEAREST
    key: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether one scale serves the tensor: its new amax must be known before it is written."""
        return self.spec is not None and self.spec.tile == TENSOR

    def read_scales(self) -> Tensor | None:
        """Where the old scales are read while new ones are written."""
        return self.scales.clone() if self.scales is not None and self.whole else self.scales

    def kept(self) -> triton_fused_kernels.Kept:
        """Raises ValueError for what the kernel does not keep."""
        from precision.backends.triton_fused_kernels import Kept
        from precision.backends.triton_kernels import grid_of

        if self.spec is None:
            assert self.values.dtype in (torch.float32, torch.bfloat16)
            return Kept(kind=int(self.values.dtype == torch.bfloat16), rounding=ROUNDINGS[self.rounding])
        tile, block = self.spec.tile, self.spec.tile.inner
        power = tile == Tile(1, block) and 1 < block <= 1024 and block & (block - 1) == 0
        if not isinstance(self.spec.scale, Fp32Decode) or not (self.whole or power) or self.spec.format.bits == 4:
            raise ValueError(f"no kernel for states kept as {self.spec}")
        rule = rule_of(self.spec, torch.float32)
        rounding = ROUNDINGS[self.spec.rounding]
        return Kept(2, rounding, 0 if self.whole else block, grid_of(self.spec.format), rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The scalars of AdamW's update number ``t`` (from 1), computed in float64 and rounded once to FP32."""

    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float
    t: float

    def scalars(self) -> dict[str, float]:
        beta1, beta2 = self.betas
        if not 0.5 < beta1 < 1:
            raise ValueError(f"beta1 is above 0.5 and below 1, not {beta1}: torch interpolates otherwise below")
        exact = {
            "lerp": 1 - beta1,
            "beta2": beta2,
            "square": 1 - beta2,
            "correction": (1 - beta2**self.t) ** 0.5,
            "eps": self.eps,
            "step": -self.lr / (1 - beta1**self.t),
            "decay": 1 - self.lr * self.decay,
        }
        return {name: float(torch.tensor(value, dtype=torch.float32)) for name, value in exact.items()}


def adamw_amaxes(grad: Tensor, m: State, v: State, w: State, step: Step) -> Tensor:
    """FP32 [3]: the amaxes of the new m, v and w on this rank where one scale serves the tensor, else 0."""
    tops = torch.zeros(3, dtype=torch.int32, device=grad.device)
    _adamw(grad, m, v, w, None, step, tops, 0, amax_only=True)
    return tops.view(torch.float32)


def adamw(
    grad: Tensor,
    m: State,
    v: State,
    w: State,
    step: Step,
    *,
    weight: Tensor | None = None,
    amaxes: Tensor | None = None,
    row_offset: Tensor | int = 0,
) -> None:
    """One update of a parameter [rows, cols], in place, in one read and one write of everything.

    Args:
        grad: FP32 or BF16, contiguous.
        weight: the parameter, where ``w`` is kept beside it; else None.
        amaxes: of ``adamw_amaxes``, over all ranks; needed where one scale serves a tensor.
        row_offset: index of the first row in the whole parameter, for rounding noise.
    """
    assert amaxes is not None or not any(state.whole for state in (m, v, w)), "a scale of the tensor wants its amax"
    _adamw(grad, m, v, w, weight, step, amaxes, row_offset, amax_only=False)


def _adamw(
    grad: Tensor,
    m: State,
    v: State,
    w: State,
    weight: Tensor | None,
    step: Step,
    amaxes: Tensor | None,
    row_offset: Tensor | int,
    *,
    amax_only: bool,
) -> None:
    from precision.backends.triton_fused_kernels import adamw_kernel

    rows, cols = grad.shape
    if grad.numel() == 0:
        return
    matrices = [grad, m.values, v.values, w.values, *([weight] if weight is not None else [])]
    assert all(x.shape == (rows, cols) and x.is_contiguous() for x in matrices)
    kept = {"M": m.kept(), "V": v.kept(), "W": w.kept()}
    block_c = max(64, *(constants.block for constants in kept.values()))
    block_r = max(1, 2048 // block_c)
    states = [part for state in (m, v, w) for part in (_raw(state.values), state.read_scales(), state.scales)]
    keys = [state.key for state in (m, v, w)]
    offset = None
    if any(key is not None for key in keys):
        offset = torch.as_tensor(row_offset, dtype=torch.int64, device=grad.device).reshape(1)
    launch(
        adamw_kernel,
        -(-rows // block_r) * -(-cols // block_c),
        grad,
        *states,
        _raw(weight),
        amaxes,
        *keys,
        offset,
        rows,
        cols,
        **step.scalars(),
        **kept,
        AMAX_ONLY=amax_only,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        HARDWARE=hardware(grad.device)["HARDWARE"],
        num_warps=4,
    )


def _raw(x: Tensor | None) -> Tensor | None:
    """BF16 as its bits."""
    return x.view(torch.int16) if x is not None and x.dtype == torch.bfloat16 else x


def swiglu_amax(gate: Tensor, up: Tensor, *, along: int) -> Tensor:
    """What Smooth-SwiGLU scales by. ``along`` 0: amax of |up| of each token, FP32 [tokens]; 1: of |silu(gate) up| of
    each channel, FP32 [channels]. gate, up: [tokens, channels], contiguous.
    """
    from precision.backends.triton_fused_kernels import swiglu_amax_kernel

    rows, cols = up.shape
    cut = blocks(TENSOR, rows, cols)
    out = torch.zeros(up.shape[along], dtype=torch.int32, device=up.device)
    constexprs = {"ALONG": along, "BLOCK_R": cut.block_r, "BLOCK_C": cut.block_c}
    on = {"HARDWARE": hardware(up.device)["HARDWARE"]}
    source = (None if along == 0 else gate.contiguous(), up.contiguous())
    programs = cut.programs(rows, cols)
    launch(swiglu_amax_kernel, programs, *source, out, rows, cols, **constexprs, **on, num_warps=cut.num_warps)
    return out.view(torch.float32)


def swiglu(
    gate: Tensor,
    up: Tensor,
    spec: OperandSpec,
    *,
    smooth: Tensor | None = None,
    along: int = 1,
    amax: Tensor | None = None,
    noise: Noise | None = None,
) -> Quantized:
    """silu(gate) * up / d, quantized: [tokens, channels], without being written in between.

    Args:
        smooth: d, FP32: of each token (``along`` 0) or channel (1); None: 1.
        amax: of the result, of earlier steps or of the tensor level; needed where a tile is more than a block of the
            kernel, and in two levels.
    """
    from precision.backends.triton_fused_kernels import swiglu_kernel

    made = output(spec, up.shape, up.device, up.dtype, amax=amax, noise=noise)
    launch(
        swiglu_kernel,
        made.cut.programs(*up.shape),
        *(gate.contiguous(), up.contiguous(), smooth),
        *made.pointers,
        *made.sizes,
        ALONG=along if smooth is not None else -1,
        **made.constexprs,
        num_warps=made.cut.num_warps,
    )
    return made.quantized


def swiglu_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    spec: OperandSpec,
    *,
    smooth: Tensor | None = None,
    along: int = 0,
    amaxes: tuple[Tensor, Tensor] | None = None,
    noises: tuple[Noise, Noise] | None = None,
) -> tuple[Quantized, Quantized]:
    """The gradients of gate and up for a gradient dh / d of silu(gate) * up, quantized: [tokens, channels] each.

    ``spec`` has one level of scales; ``amaxes`` and ``noises`` are those of the two results.
    """
    from precision.backends.triton_fused_kernels import swiglu_backward_kernel

    assert spec.scale.levels < 2, "one level of scales"
    made: list[Output] = [
        output(
            spec,
            dh.shape,
            dh.device,
            dh.dtype,
            amax=None if amaxes is None else amaxes[which],
            noise=None if noises is None else noises[which],
        )
        for which in range(2)
    ]
    first, second = made
    launch(
        swiglu_backward_kernel,
        first.cut.programs(*dh.shape),
        *(dh.contiguous(), gate.contiguous(), up.contiguous(), smooth),
        *(first.codes, first.scales, second.codes, second.scales, first.given, second.given),
        *(first.key, second.key, first.row_offset),
        *first.sizes,
        ALONG=along if smooth is not None else -1,
        **first.constexprs,
        num_warps=2 * first.cut.num_warps,
    )
    return first.quantized, second.quantized
