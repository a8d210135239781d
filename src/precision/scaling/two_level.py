"""A scale per tile in a narrow format under an FP32 scale of something larger: NVFP4 and its kin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..formats import E4M3, ExMy, NumberFormat
from .rules import FP32_MAX, Scales
from .tiles import TENSOR, Tile


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoLevel:
    """A scale per tile in a narrow format, and an FP32 scale for the tensor that centres them in its range (NVFP4).

    In FP32, with A the amax of the tensor, a that of a tile, m = max * top the value that a tile is mapped to, and
    M = m * ``block_max`` (448 if None; 256 as in 4/6; 255.99 in Quartet II):

    1. S = min(M / A, FLT_MAX); S = 1 where A is 0 or S is 0
    2. c = S * (1 / m), the reciprocal rounded once; d = block.round(min(a * c, block.max)): no lower clamp, so tiles
       that are zero or underflow store a literal 0
    3. encode = min(1 / (d * (1 / S)), FLT_MAX)
    4. decode = d * T with T = A / M; T = 1 / S where S was set to 1 or to FLT_MAX

    With another statistic than amax, a is that of a tile, and A the largest a.

    Any tile but the tensor itself may carry such scales; native kernels take 1x16 and 16x16 of E2M1 only.

    ``outer``: A, S and T are of each such tile of the quantized matrix instead of the tensor, a multiple of the scaled
    tile: ``ROW`` (TransformerEngine's row-scaled activations: tokens in fprop, channels in wgrad), or a group along the
    contraction, such as 1x128 (TetraJet-v2).

    ``outer_format``: the scales T of all outer tiles are held in this format under one FP32 scale U of the tensor, so
    there are three levels. With B the largest A:

    5. U = (B / M) / outer_format.max; U = 1 where B is 0 or infinite or U is 0
    6. T = U * g, with g = outer_format.round(min((A / M) / U, outer_format.max)), at least its smallest positive value
    7. S = min(1 / T, FLT_MAX), from which the tiles go on as above: where g was rounded down, the largest tiles of its
       group saturate at block.max, by no more than that rounding (a smaller ``block_max`` leaves room)
    """

    levels: ClassVar[int] = 2
    power_of_two: ClassVar[bool] = False

    block: NumberFormat = E4M3
    block_max: float | None = None
    outer: Tile = TENSOR
    outer_format: NumberFormat | None = None

    def __post_init__(self) -> None:
        check_blocks(self.block, self.block_max)
        held = self.outer_format
        if held is None:
            return
        if not isinstance(held, ExMy):
            raise ValueError(f"outer scales are held in a floating-point format with a mantissa (e4m3), not in {held}")
        if self.outer == TENSOR:
            raise ValueError("the one scale of a tensor is FP32: outer_format is for an outer tile of parts of it")

    @property
    def format(self) -> NumberFormat | None:
        return self.block

    def scales(
        self,
        amax: Tensor,
        element: NumberFormat,
        *,
        tensor_amax: Tensor | None = None,
        dtype: torch.dtype,
        top: float = 1.0,
    ) -> Scales:
        assert tensor_amax is not None, "two levels of scales need the tensor's amax"
        s, tensor = self.outer_level(tensor_amax, element, top)
        c = s * (1.0 / torch.full_like(s, element.max * top))
        return of_block(self.block, amax * c, s, tensor)

    def top(self, element: NumberFormat) -> float:
        """What the amax of the tensor is mapped to, by a ``top`` of 1."""
        return element.max * (self.block_max or self.block.max)

    def outer_level(self, tensor_amax: Tensor, element: NumberFormat, top: float = 1.0) -> tuple[Tensor, Tensor]:
        """S and T, in the shape of ``tensor_amax``."""
        most = element.max * top * (self.block_max or self.block.max)
        if self.outer_format is None:
            return tensor_level(tensor_amax, most)
        held = self.outer_format
        wanted = tensor_amax / torch.full_like(tensor_amax, most)
        largest = wanted.max() if wanted.numel() else wanted.new_zeros(())
        u = largest / torch.full_like(largest, held.max)
        u = torch.where((u == 0) | u.isinf(), 1.0, u)
        tensor = u * held.round((wanted / u).clamp(max=held.max)).clamp(min=2.0**held.tiny_exponent)
        return (1.0 / tensor).clamp(max=FP32_MAX), tensor

    def __str__(self) -> str:
        above = {TENSOR: "fp32", (1, -1): "fp32row"}.get(self.outer, f"fp32-{self.outer}")
        if self.outer_format is not None:
            above = f"{self.outer_format}-{self.outer}+fp32"
        return f"{self.block}{named_max(self.block_max)}+{above}"


def check_blocks(block: NumberFormat, block_max: float | None) -> None:
    """Raises ValueError for a format that cannot hold the scales of blocks, and for a largest scale beyond it."""
    if block.bits > 8 or block.nan is None or block.scales_only:
        raise ValueError(f"block scales are floating-point codes of at most 8 bits with a NaN, not {block}")
    if block_max is not None and not 0 < block_max <= block.max:
        raise ValueError(f"block_max is at most the {block.max:g} of {block}, not {block_max:g}")


def named_max(block_max: float | None) -> str:
    """As in plan.txt."""
    return f"max{block_max:g}" if block_max is not None else ""


def of_block(block: NumberFormat, wanted: Tensor, s: Tensor, tensor: Tensor) -> Scales:
    """The scales of tiles that ``block`` is to hold, under S and T of the outer level."""
    d = block.round(wanted.clamp(max=block.max))
    encode = (1.0 / (d * (1.0 / s))).clamp(max=FP32_MAX)
    return Scales(encode, block.encode(d), tensor)


def tensor_level(tensor_amax: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """S and T of what has this amax, which is mapped to ``most``."""
    top = torch.full_like(tensor_amax, most)
    s = (top / tensor_amax).clamp(max=FP32_MAX)
    s = torch.where((tensor_amax == 0) | (s == 0), 1.0, s)
    exact = (tensor_amax > 0) & (tensor_amax < math.inf) & (s < FP32_MAX)
    return s, torch.where(exact | s.isnan(), tensor_amax / top, 1.0 / s)
