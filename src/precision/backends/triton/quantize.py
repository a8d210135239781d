"""Quantization of a matrix by kernels: one read and one write, after a read for amaxes that span blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ...noise import Noise
from ...quantize import TORCH, Prepared, Quantized, check, quantize
from ...scaling import TENSOR
from ...spec import OperandSpec
from ...swiglu import Hidden
from ...transforms import Hadamard
from .amax import amax_launcher, computed, signs_of, sources
from .blocks import BlockSize, blocks_of, near, tuned
from .device import hardware, programs, runs_on
from .launch import Launcher, number, recall, remember, start
from .specs import (
    DTYPES,
    ROUNDINGS,
    Quantization,
    grid_of,
    lacking,
    one_factor,
    rule_of,
    takes_tensor_amax,
    values_fit,
)


def quantize_fused(
    x: Tensor | Hidden,
    spec: OperandSpec,
    *,
    amax: Tensor | None = None,
    noise: Noise | None = None,
    transform: Hadamard | None = None,
    note: Tensor | None = None,
    by_column: bool = False,
) -> Quantized:
    """As ``precision.quantize.quantize`` of ``transform.left(x)``, bit for bit, without writing that.

    Args:
        note: FP32 of one element: becomes the amax of what is quantized if that is larger (NaN is largest). For one
            scale of the tensor, or a tensor level, made of an ``amax`` that is given.
        by_column: as in ``Triton``.

    Raises ValueError as ``quantize``, and for a note where the amax is not given.
    """
    result = _by_kernels(x, spec, amax, noise, transform, note, values=False, by_column=by_column)
    if result is not None:
        assert isinstance(result, Quantized)
        return result
    y = computed(x, transform)
    if note is not None:
        note.copy_(torch.maximum(note, TORCH.amax(y, TENSOR).reshape(note.shape)))
    return quantize(y, spec, amax=amax, noise=noise)


def prepare_fused(
    x: Tensor | Hidden,
    spec: OperandSpec,
    *,
    amax: Tensor | None = None,
    noise: Noise | None = None,
    transform: Hadamard | None = None,
    note: Tensor | None = None,
) -> Prepared | None:
    """What ``Triton.operand`` gives of ``quantize_fused``, without codes; None where BF16 does not hold it."""
    result = _by_kernels(x, spec, amax, noise, transform, note, values=True, by_column=False)
    assert not isinstance(result, Quantized)
    return result


def _by_kernels(
    x: Tensor | Hidden,
    spec: OperandSpec,
    amax: Tensor | None,
    noise: Noise | None,
    transform: Hadamard | None,
    note: Tensor | None,
    *,
    values: bool,
    by_column: bool,
) -> Quantized | Prepared | None:
    """Codes or values; None where no kernel makes them."""
    of, up, d, along = sources(x)
    if not runs_on(of.device):
        check(of, spec, amax, noise)
        return None
    if amax is not None and (amax.dtype != torch.float32 or not amax.is_contiguous()):
        amax = amax.float().contiguous()
    parts = noise_parts(noise, of.device)
    key = (
        values,
        number(spec),
        of.shape,
        of.stride(),
        of.dtype,
        of.device,
        up is None,
        along,
        None if transform is None else number(transform),
        None if amax is None else amax.numel(),
        parts.kind,
        note is None,
        by_column,
    )
    plan: QuantizePlan | None = recall(key)
    if plan is None:
        check(of, spec, amax, noise)
        if note is not None and (amax is None or not takes_tensor_amax(spec)):
            raise ValueError(f"{spec}: an amax is noted where that of the tensor is given")
        if values and not values_fit(spec):
            return None
        if of.numel() == 0 or lacking(spec) or not near(of, blocks_of(of, spec.tile, transform)):
            return None
        if of.dtype not in DTYPES:  # where a transform of FP64 would be one in FP64: the caller's concern
            assert isinstance(x, Tensor)
            return _by_kernels(x.float(), spec, amax, noise, transform, note, values=values, by_column=by_column)

        def planned(size: BlockSize | None) -> QuantizePlan:
            known = amax is not None
            return QuantizePlan(of, along, spec, known, parts, transform, size, values=values, by_column=by_column)

        kind = kind_of("one", of, spec, transform, values)
        plan = remember(key, tuned(kind, of.device, planned, of, up, d, amax, parts, note))
    return plan.run(of, up, d, amax, parts, note)


def kind_of(what: str, x: Tensor, spec: OperandSpec, transform: Hadamard | None, values: bool) -> tuple[object, ...]:
    """What launches are measured together: those that differ in the matrix's size and in what costs little."""
    layout = "rows" if x.stride(1) == 1 else "columns"
    size = transform.size if transform is not None else 0
    return what, layout, spec.format, spec.tile, spec.scale, spec.rounding.value, f"hadamard{size}", x.dtype, values


class NoiseParts:
    """Noise as a kernel reads it: its tensors lie on the device.

    Args:
        key: int32 [2], of ``step_key``; with ``step`` (int64, 0-dim), of ``base_key``. None: no noise.
        first: int64, 0-dim: rows are counted from first * rows_of_a_sample; None: from 0.

    ``kind`` is what a kernel is compiled for.
    """

    def __init__(
        self, key: Tensor | None, step: Tensor | None, first: Tensor | None, rows_of_a_sample: int, transposed: bool
    ) -> None:
        self.key, self.step, self.first = key, step, first
        self.rows_of_a_sample, self.transposed = rows_of_a_sample, transposed
        self.kind = transposed, key is None, step is None, first is None, rows_of_a_sample


NO_NOISE = NoiseParts(None, None, None, 1, transposed=False)


def noise_parts(noise: Noise | None, device: torch.device) -> NoiseParts:
    """The noise for kernels of this device: nothing is computed or copied where its parts are there."""
    if noise is None:
        return NO_NOISE
    key, step, first, rows_of_a_sample = noise.base, noise.step, noise.first_sample, noise.rows_of_a_sample
    if step is not None and (isinstance(step, int) or step.device != device):
        key, step = noise.key, None
    if key.device != device:
        key = key.to(device)
    if rows_of_a_sample == 0 or (isinstance(first, int) and first == 0):
        return NoiseParts(key, step, None, 1, noise.transposed)
    if isinstance(first, int):
        first, rows_of_a_sample = torch.full((), first * rows_of_a_sample, dtype=torch.int64, device=device), 1
    elif first.device != device:
        first = first.to(device)
    return NoiseParts(key, step, first, rows_of_a_sample, noise.transposed)


class Output:
    """What a kernel writes of a matrix: codes [outer, bytes] or BF16 values, scales, the tensor's scale.

    ``by_column``: as in ``Triton``; of no consequence to other scales.
    """

    def __init__(
        self, spec: OperandSpec, shape: tuple[int, int], device: torch.device, *, values: bool, by_column: bool
    ) -> None:
        self.spec, self.shape, self.device, self.values = spec, shape, device, values
        rows, cols = shape
        self.codes = rows, (cols + 1) // 2 if spec.format.bits == 4 and not values else cols
        self.grid = spec.tile.grid(rows, cols)
        self.scale_dtype = torch.float32 if spec.scale.format is None else torch.uint8
        self.two_level = spec.scale.levels == 2
        self.one_factor = spec.scale.levels == 1 and one_factor(spec)
        of_parts = spec.tile.outer == 1 and spec.tile.inner > 0
        self.by_column = by_column and of_parts and spec.scale.format is None

    def quantization(self, x: Tensor, *, given: bool, parts: int = 1) -> Quantization:
        """How a kernel makes it of x."""
        return Quantization(
            element=grid_of(self.spec.format),
            rule=rule_of(self.spec, x.dtype),
            rounding=ROUNDINGS[self.spec.rounding],
            given=given,
            parts=parts,
            values=0 if not self.values else 1 if one_factor(self.spec) else 2,
            by_column=self.by_column,
            hardware=hardware(x.device).fp8,
            e2m1_hardware=hardware(x.device).e2m1,
        )

    def allocate(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Codes or values, the scales that are stored, the scale of the tensor of a rule with two levels."""
        device = self.device
        tensor_scale = torch.empty(1, dtype=torch.float32, device=device) if self.two_level else None
        if self.values:
            scale = torch.empty(1, dtype=torch.float32, device=device) if self.one_factor else None
            return torch.empty(self.codes, dtype=torch.bfloat16, device=device), scale, tensor_scale
        codes = torch.empty(self.codes, dtype=torch.uint8, device=device)
        if self.by_column:
            return codes, torch.empty(self.grid[::-1], dtype=self.scale_dtype, device=device).mT, tensor_scale
        return codes, torch.empty(self.grid, dtype=self.scale_dtype, device=device), tensor_scale

    def result(self, codes: Tensor, scales: Tensor | None, tensor_scale: Tensor | None) -> Quantized | Prepared:
        """Of tensors as ``allocate`` gives them, written."""
        if self.values:
            factor = scales if tensor_scale is None else tensor_scale
            return Prepared(matrix=codes, factor=scalar(factor))
        assert scales is not None
        tensor_scale = scalar(tensor_scale)
        return Quantized(codes=codes, scales=scales, tensor_scale=tensor_scale, shape=self.shape, spec=self.spec)


def scalar(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dim() == 0 else x.view(())


class QuantizePlan:
    """The launches of ``quantize_fused``, ready but for their tensors.

    ``tensor_amax`` finds that of the tensor, in a part for each of its programs, and ``tile_amax`` those of tiles, if
    passes of their own do. ``of_tensor``: whether an amax that is given is the tensor's.
    """

    def __init__(
        self,
        x: Tensor,
        along: int,
        spec: OperandSpec,
        amax_given: bool,
        noise: NoiseParts,
        transform: Hadamard | None,
        size: BlockSize | None,
        *,
        values: bool,
        by_column: bool = False,
    ) -> None:
        """x and ``along``: of ``sources``."""
        from .kernels import quantize_kernel

        cut, levels, device = blocks_of(x, spec.tile, transform, size), spec.scale.levels, x.device
        per_tensor = spec.tile == TENSOR
        # Finding the tensor's is a pass of its own, unless it is given or lies in one block.
        find_tensor = levels > 0 and not amax_given and (levels == 2 or (per_tensor and not cut.fused))
        find_tiles = not per_tensor and not cut.fused and (levels == 2 or (levels == 1 and not amax_given))
        self.of_tensor, self.signs = takes_tensor_amax(spec), signs_of(transform, device)
        self.tensor_amax = amax_launcher(x, along, TENSOR, transform, parts=True) if find_tensor else None
        self.tile_amax = amax_launcher(x, along, spec.tile, transform) if find_tiles else None
        self.output = Output(spec, (x.shape[0], x.shape[1]), device, values=values, by_column=by_column)
        given = find_tiles or (levels == 1 and (find_tensor or amax_given))
        parts = self.tensor_amax.programs if self.tensor_amax is not None else 1
        self.write = Launcher(
            kernel=quantize_kernel,
            programs=programs(cut.programs(*x.shape), cut.num_warps, device),
            numbers=(*x.shape, *x.stride(), self.output.codes[1], *self.output.grid, noise.rows_of_a_sample),
            constexprs={
                "ALONG": along,
                "TRANSPOSED_NOISE": noise.transposed,
                "Q": self.output.quantization(x, given=given, parts=parts),
                "B": cut,
                "HADAMARD": transform.size if transform is not None else 0,
            },
            num_warps=cut.num_warps,
            device=x.get_device(),
        )

    def run(
        self,
        x: Tensor,
        up: Tensor | None,
        d: Tensor | None,
        amax: Tensor | None,
        noise: NoiseParts,
        note: Tensor | None,
    ) -> Quantized | Prepared:
        output, signs = self.output, self.signs
        of_tiles = None if self.of_tensor else amax
        of_tensor = amax if self.of_tensor else None
        if self.tensor_amax is not None:
            of_tensor = torch.empty(self.tensor_amax.programs, dtype=torch.float32, device=output.device)
            start(self.tensor_amax, x, up, d, of_tensor, None, signs)
        if self.tile_amax is not None:
            of_tiles = torch.zeros(output.grid, dtype=torch.int32, device=output.device)
            start(self.tile_amax, x, up, d, of_tiles, None, signs)
        codes, scales, tensor_scale = output.allocate()
        start(
            self.write,
            *(x, up, d, codes, scales, of_tiles, of_tensor, tensor_scale, note, signs),
            *(noise.key, noise.step, noise.first),
        )
        return output.result(codes, scales, tensor_scale)
