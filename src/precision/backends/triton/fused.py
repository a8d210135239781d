"""Triton kernels that compute what they quantize: AdamW over narrow states, the gradients of a SwiGLU.

They are compiled and launched as those of ``quantize``, and run in Triton's interpreter as those do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...noise import Noise
from ...quantize import TORCH, Quantized, quantize
from ...scaling import TENSOR, Fp32Decode, Tile
from ...spec import OperandSpec, Rounding
from ...swiglu import Gradients
from ...transforms import Hadamard
from .amax import signs_of
from .blocks import Blocks, blocks_of
from .device import hardware, runs_on
from .launch import launch
from .quantize import Output, noise_parts
from .specs import ROUNDINGS, Grid, ScaleConstants, format_fits, grid_of, lacking, rule_of


@dataclass(frozen=True, slots=True)
class Storage:
    """How a state is stored, as constants of a kernel: FP32 (kind 0), BF16 (1), or codes under FP32 scales (2).

    ``block``: elements of a row under one scale, a power of two; 0: one scale for the tensor.
    """

    kind: int
    rounding: int = 0
    block: int = 0
    grid: Grid | None = None
    rule: ScaleConstants | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StateMatrix:
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
    def per_tensor(self) -> bool:
        """Whether one scale serves the tensor: its new amax must be known before it is written."""
        return self.spec is not None and self.spec.tile == TENSOR

    def read_scales(self) -> Tensor | None:
        """Where the old scales are read while new ones are written."""
        return self.scales.clone() if self.scales is not None and self.per_tensor else self.scales

    def storage(self) -> Storage:
        """Raises ValueError for what the kernel does not store."""
        if self.spec is None:
            assert self.values.dtype in (torch.float32, torch.bfloat16)
        return _storage(self.spec, self.values.dtype == torch.bfloat16, self.rounding)


@functools.cache
def _storage(spec: OperandSpec | None, narrow: bool, rounding: Rounding) -> Storage:
    if spec is None:
        return Storage(kind=int(narrow), rounding=ROUNDINGS[rounding])
    block = 0 if spec.tile == TENSOR else spec.tile.inner
    fits = block == 0 or (spec.tile == Tile(1, block) and 1 < block <= 1024 and block & (block - 1) == 0)
    if type(spec.scale) is not Fp32Decode or not fits or not format_fits(spec.format) or spec.format.bits == 4:
        raise ValueError(f"no kernel for states stored as {spec}")
    rule = rule_of(spec, torch.float32)
    return Storage(2, ROUNDINGS[spec.rounding], block, grid_of(spec.format), rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The scalars of AdamW's update number ``t`` (from 1), computed in float64 and rounded once to FP32."""

    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float
    t: float

    @functools.lru_cache(maxsize=8)  # noqa: B019 - groups of parameters share them, and a step holds numbers alone
    def scalars(self) -> dict[str, float]:
        """Raises ValueError for a beta1 at which torch interpolates otherwise than the kernel."""
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


def adamw_amaxes(
    grad: Tensor, m: StateMatrix, v: StateMatrix, w: StateMatrix, step: Step, *, gate: Tensor | None = None
) -> Tensor:
    """FP32 [3]: the amaxes of the new m, v and w on this rank where one scale serves the tensor, else 0."""
    amaxes = torch.zeros(3, dtype=torch.int32, device=grad.device)
    adamw(grad, m, v, w, step, amaxes=amaxes, gate=gate, amax_only=True)
    return amaxes.view(torch.float32)


def adamw(
    grad: Tensor,
    m: StateMatrix,
    v: StateMatrix,
    w: StateMatrix,
    step: Step,
    *,
    weight: Tensor | None = None,
    amaxes: Tensor | None = None,
    row_offset: Tensor | int = 0,
    gate: Tensor | None = None,
    amax_only: bool = False,
) -> None:
    """One update of a parameter [rows, cols], in place, in one read and one write of everything.

    Args:
        grad: FP32 or BF16, contiguous.
        weight: the parameter, where ``w`` is a copy of it that is stored otherwise; else None.
        amaxes: of ``adamw_amaxes``, over all ranks; needed where one scale serves a tensor.
        row_offset: index of the first row in the whole parameter, for rounding noise.
        gate: FP32 [2]: what multiplies the gradient, and 1, or 0 for an update that is left out; None: 1 and 1.
        amax_only: only ``amaxes`` are written.
    """
    from .fused_kernels import adamw_kernel

    assert amaxes is not None or not any(s.per_tensor for s in (m, v, w)), "a scale of the tensor needs its amax"
    rows, cols = grad.shape
    if grad.numel() == 0:
        return
    matrices = [grad, m.values, v.values, w.values, *([weight] if weight is not None else [])]
    assert all(x.shape == (rows, cols) and x.is_contiguous() for x in matrices)
    storages = {"M": m.storage(), "V": v.storage(), "W": w.storage()}
    block_c = max(64, *(storage.block for storage in storages.values()))
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
        gate,
        rows,
        cols,
        **step.scalars(),
        **storages,
        AMAX_ONLY=amax_only,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        HARDWARE=hardware(grad.device).fp8,
        num_warps=4,
    )


def _raw(x: Tensor | None) -> Tensor | None:
    """BF16 as its bits."""
    return x.view(torch.int16) if x is not None and x.dtype == torch.bfloat16 else x


def gradient_amaxes(gradients: Gradients, tile: Tile, transform: Hadamard | None = None) -> tuple[Tensor, Tensor]:
    """Of dgate and of dup, after ``transform``: as ``precision.quantize.amax``, bit for bit."""
    from .fused_kernels import swiglu_backward_amax_kernel

    dh = gradients.dh
    if dh.numel() == 0 or not runs_on(dh.device):
        dgate, dup = (x if transform is None else transform.left(x) for x in gradients.computed())
        return TORCH.amax(dgate, tile), TORCH.amax(dup, tile)
    cut, grid = _cut(gradients, tile, transform), tile.grid(*dh.shape)
    amaxes = torch.zeros(2, *grid, dtype=torch.int32, device=dh.device)
    launch(
        swiglu_backward_amax_kernel,
        cut.programs(*dh.shape),
        *(dh, gradients.gate, gradients.up, gradients.d, signs_of(transform, dh.device)),
        *(amaxes[0], amaxes[1], *dh.shape, *dh.stride(), *grid),
        ALONG=gradients.along if gradients.d is not None else -1,
        HADAMARD=transform.size if transform is not None else 0,
        HARDWARE=hardware(dh.device).fp8,
        B=cut,
        num_warps=2 * cut.num_warps,
    )
    dgate, dup = amaxes.view(torch.float32)
    return dgate, dup


def quantize_gradients(
    gradients: Gradients,
    spec: OperandSpec,
    *,
    amaxes: tuple[Tensor, Tensor] | None = None,
    noises: tuple[Noise, Noise] | None = None,
    transform: Hadamard | None = None,
    by_column: bool = False,
) -> tuple[Quantized, Quantized]:
    """dgate and dup, quantized as ``precision.quantize.quantize`` does after ``transform``, bit for bit, in one read.

    ``amaxes`` and ``noises`` are of the two; noises differ in the key alone. ``by_column``: as in ``Triton``.
    """
    from .fused_kernels import swiglu_backward_kernel

    dh = gradients.dh
    if dh.numel() == 0 or not runs_on(dh.device) or lacking(spec):
        plain = [x if transform is None else transform.left(x) for x in gradients.computed()]
        tops, random = amaxes or (None, None), noises or (None, None)
        first, second = (
            quantize(x, spec, amax=amax, noise=noise) for x, amax, noise in zip(plain, tops, random, strict=True)
        )
        return first, second
    cut, levels = _cut(gradients, spec.tile, transform), spec.scale.levels
    given: tuple[Tensor, Tensor] | tuple[None, None] = amaxes or (None, None)
    tops = (None, None)
    if levels == 2:
        tops = amaxes or gradient_amaxes(gradients, TENSOR, transform)
        given = (None, None) if cut.fused else gradient_amaxes(gradients, spec.tile, transform)
    elif levels and amaxes is None and not cut.fused:
        given = gradient_amaxes(gradients, spec.tile, transform)
    output = Output(spec, (dh.shape[0], dh.shape[1]), dh.device, values=False, by_column=by_column)
    tensors = [output.allocate() for _ in range(2)]
    parts = [noise_parts(noise, dh.device) for noise in noises or (None, None)]
    pointers: list[Tensor | None] = []
    for (codes, scales, tensor_scale), tiles, tensor, part in zip(tensors, given, tops, parts, strict=True):
        of_tiles, of_tensor = (None, tiles) if spec.tile == TENSOR else (tiles, tensor)
        known = [None if amax is None else amax.float().contiguous() for amax in (of_tiles, of_tensor)]
        pointers += [codes, scales, *known, tensor_scale, part.key]
    shared = parts[0]
    launch(
        swiglu_backward_kernel,
        cut.programs(*dh.shape),
        *(dh, gradients.gate, gradients.up, gradients.d, signs_of(transform, dh.device)),
        *pointers,
        *(shared.step, shared.first),
        *(*dh.shape, *dh.stride(), output.codes[1], *output.grid, shared.rows_of_a_sample),
        ALONG=gradients.along if gradients.d is not None else -1,
        TRANSPOSED_NOISE=shared.transposed,
        Q=output.quantization(dh, given=given[0] is not None),
        B=cut,
        HADAMARD=transform.size if transform is not None else 0,
        num_warps=2 * cut.num_warps,
    )
    dgate, dup = (output.result(*written) for written in tensors)
    assert isinstance(dgate, Quantized)
    assert isinstance(dup, Quantized)
    return dgate, dup


def _cut(gradients: Gradients, tile: Tile, transform: Hadamard | None) -> Blocks:
    dh = gradients.dh
    assert dh.stride() == gradients.gate.stride() == gradients.up.stride(), "laid out alike"
    return blocks_of(dh, tile, transform)
