"""Quantization of a matrix and of its transpose by one kernel, in one read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...noise import Noise
from ...quantize import Prepared, Quantized
from ...scaling import TENSOR, Delayed, Tile
from ...spec import OperandSpec, Rounding
from ...swiglu import Hidden
from .amax import BOTH_SIDE, amax_launcher, sources
from .blocks import CANDIDATES, Blocks, BlockSize, blocks, near, tuned
from .device import programs, runs_on
from .launch import Launcher, number, recall, remember, start
from .quantize import NoiseParts, Output, kind_of, noise_parts, scalar
from .specs import DTYPES, lacking, takes_tensor_amax, values_fit


def quantize_both(
    x: Tensor | Hidden,
    spec: OperandSpec,
    *,
    amax: Tensor | None = None,
    noise: tuple[Noise, Noise] | None = None,
    note: Tensor | None = None,
    values: bool = False,
    by_column: bool = False,
) -> tuple[Quantized, Quantized] | tuple[Prepared, Prepared] | None:
    """``quantize_fused`` of x and of its transpose, bit for bit, in one read; None where no kernel does that.

    Args:
        amax: that of the tensor, for one scale of the tensor or for its level; None: found in a read before.
        noise: of x, and of its transpose: alike but for the key and ``transposed``.
        note: as in ``quantize_fused``.
        values: ``prepare_fused`` instead.
        by_column: as in ``Triton``.

    The second of the pair is a matrix of its own, not transposed, also where both have one scale.
    Raises ValueError for an amax that is not the tensor's.
    """
    of, up, d, along = sources(x)
    if not runs_on(of.device):
        return None
    first, second = noise or (None, None)
    parts = noise_parts(first, of.device), noise_parts(second, of.device)
    key = (
        "both",
        values,
        number(spec),
        of.shape,
        of.stride(),
        of.dtype,
        of.device,
        up is None,
        along,
        amax is None,
        parts[0].kind,
        parts[1].kind,
        note is None,
        by_column,
    )
    plan: BothPlan | None = recall(key)
    if plan is None:
        known = both_fit(spec) and of.numel() > 0 and of.dtype in DTYPES and (values_fit(spec) or not values)
        if not known or (noise is not None) != (spec.rounding is Rounding.STOCHASTIC):
            return None
        if amax is None and (isinstance(spec.amax, Delayed) or note is not None):
            return None
        if amax is not None and (not takes_tensor_amax(spec) or amax.numel() != 1):
            raise ValueError(f"{spec} in both directions takes no amax but that of the tensor")
        if noise is not None:
            assert parts[1].kind == (not parts[0].transposed, *parts[0].kind[1:]), "noise of both"
        if not near(of, _cut(of, spec, max(CANDIDATES)), both=True):
            return None

        def planned(size: BlockSize | None) -> BothPlan:
            known = amax is not None
            return BothPlan(of, along, spec, known, parts[0], size, values=values, by_column=by_column)

        kind = kind_of("both", of, spec, None, values)
        plan = remember(key, tuned(kind, of.device, planned, of, up, d, amax, parts, note))
    return plan.run(of, up, d, amax, parts, note)


def both_fit(spec: OperandSpec) -> bool:
    """Whether ``quantize_both`` takes the spec: scales of parts of a row, of rows, or of the tensor."""
    parts = spec.tile.outer == 1 and 16 <= spec.tile.inner <= 128
    rows_or_tensor = spec.scale.levels < 2 and spec.tile in (TENSOR, Tile(1, -1))
    return (parts or rows_or_tensor) and lacking(spec) is None


def _cut(x: Tensor, spec: OperandSpec, size: BlockSize | None) -> Blocks:
    """Squares, which a transpose leaves as they are."""
    elements, warps = size or (0, 0)
    side = max(2 * BOTH_SIDE if elements > BOTH_SIDE * BOTH_SIDE else BOTH_SIDE, spec.tile.inner)
    cut = blocks(spec.tile, *x.shape)
    tall, wide = side if cut.full_r else cut.tall, side if cut.full_c else cut.wide
    return replace(cut, tall=tall, wide=wide, block_r=side, block_c=side, warps=warps)


class BothPlan:
    """The launches of ``quantize_both``, ready but for their tensors; as ``QuantizePlan``."""

    def __init__(
        self,
        x: Tensor,
        along: int,
        spec: OperandSpec,
        amax_given: bool,
        noise: NoiseParts,
        size: BlockSize | None,
        *,
        values: bool,
        by_column: bool = False,
    ) -> None:
        """x and ``along``: of ``sources``; ``noise``: that of x."""
        from .kernels import quantize_both_kernel

        cut, (rows, cols), device = _cut(x, spec, size), x.shape, x.device
        per_tensor, per_row = spec.tile == TENSOR, spec.tile == Tile(1, -1)
        find_tensor = not amax_given and takes_tensor_amax(spec)
        self.tensor_amax = amax_launcher(x, along, TENSOR, parts=True) if find_tensor else None
        self.tile_amaxes = amax_launcher(x, along, spec.tile, columns=True) if per_row else None
        row = Output(spec, (rows, cols), device, values=values, by_column=by_column)
        column = Output(spec, (cols, rows), device, values=values, by_column=by_column)
        self.outputs = row, column
        given = per_row or (per_tensor and spec.scale.levels == 1)
        parts = self.tensor_amax.programs if self.tensor_amax is not None else 1
        self.write = Launcher(
            kernel=quantize_both_kernel,
            programs=programs(cut.programs(rows, cols), cut.num_warps, device),
            numbers=(
                *(rows, cols, *x.stride(), row.codes[1], row.grid[1], column.codes[1], column.grid[1]),
                noise.rows_of_a_sample,
            ),
            constexprs={
                "ALONG": along,
                "TRANSPOSED_NOISE": noise.transposed,
                "Q": row.quantization(x, given=given, parts=parts),
                "B": cut,
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
        noise: tuple[NoiseParts, NoiseParts],
        note: Tensor | None,
    ) -> tuple[Quantized, Quantized] | tuple[Prepared, Prepared]:
        row, column = self.outputs
        of_rows = of_columns = None
        if self.tensor_amax is not None:
            amax = torch.empty(self.tensor_amax.programs, dtype=torch.float32, device=row.device)
            start(self.tensor_amax, x, up, d, amax, None, None)
        elif amax is not None and amax.dtype != torch.float32:
            amax = amax.float()
        if self.tile_amaxes is not None:
            found = torch.zeros(sum(row.shape), dtype=torch.int32, device=row.device)
            of_rows, of_columns = found.split_with_sizes(row.shape)
            start(self.tile_amaxes, x, up, d, of_rows, of_columns, None)
        codes, scales, tensor_scale = row.allocate()
        if row.spec.tile == TENSOR:  # the transpose has the same
            codes_t, scales_t = column.allocate()[0], None
        else:
            codes_t, scales_t = column.allocate()[:2]
        first, second = noise
        start(
            self.write,
            *(x, up, d, codes, scales, codes_t, scales_t, of_rows, of_columns, amax, tensor_scale, note),
            *(first.key, second.key, first.step, first.first),
        )
        # What both have is one tensor, not two views: compiled code takes two for memory of their own.
        tensor_scale = scalar(tensor_scale)
        if row.values and scales_t is None:
            scales = scalar(scales)
        other = scales if scales_t is None else scales_t
        return row.result(codes, scales, tensor_scale), column.result(codes_t, other, tensor_scale)  # type: ignore[return-value]
