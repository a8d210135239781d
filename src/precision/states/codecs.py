"""How optimizer states and master weights are stored: codecs, each a frozen value with pure ``encode`` and ``decode``.

A codec takes the FP32 matrix x [rows, cols] (this rank's rows of a parameter's state) to a few plain tensors, its
parts, and back. Blocks are runs of a row and never cross rows (the last of a row may be shorter), so every part but a
per-tensor scale has the rows of x and shards with them: a checkpoint loads at any number of ranks exactly.

=========================  =============================================================  ========================
codec                      parts                                                          bytes an element
=========================  =============================================================  ========================
``Plain`` FP32, BF16       the values                                                     4, 2
``Kahan``                  BF16 values, and what their rounding lost, in BF16             4
``Scaled``                 codes (uint8, or FP16), FP32 scales of a block or the tensor   1 (2) + 4 / block
``Dynamic``                codes (uint8), FP32 amax of a block                            1 + 4 / block
``Expanded``               codes (uint8), FP32 amax and a uint8 exponent of a block       1 + 5 / block
=========================  =============================================================  ========================

Non-finite values: an infinity or a NaN makes everything that shares its scale NaN on the way back, and the stored
scale is not finite: whoever looks at the float parts alone (a checkpoint does) finds out. ``Plain`` and ``Kahan`` keep
them as they are, element by element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..formats import BF16 as BF16_FORMAT
from ..formats import E4M3, ExMy, Integer, NumberFormat
from ..noise import Noise
from ..quantize import Quantized, dequantize, quantize
from ..quantize import amax as amax_of
from ..scaling import TENSOR, Fp32Decode, Tile
from ..spec import OperandSpec, Rounding

Parts = dict[str, Tensor]
"""The stored tensors by name; the name of plain values is empty."""

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each part; a per-tensor scale has no dimension, every other part has x's rows."""


class Codec(Protocol):
    """A way to store a matrix.

    Attributes:
        per_tensor: all of the matrix, on all ranks, shares one scale: ``encode`` wants its amax.
        stochastic: ``encode`` wants noise.
    """

    @property
    def per_tensor(self) -> bool: ...

    @property
    def stochastic(self) -> bool: ...

    def layout(self, rows: int, cols: int) -> Layout:
        """What is stored of a matrix [rows, cols]."""

    def encode(self, x: Tensor, *, amax: Tensor | None = None, noise: Noise | None = None) -> Parts:
        """The parts of x FP32 [rows, cols]; ``amax`` FP32 scalar over all ranks, that of ``x`` if None."""

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """FP32 [rows, cols]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """FP32 as it is, or rounded to BF16: to nearest (error 2^-8 of the value), or stochastically (2^-7, unbiased)."""

    dtype: torch.dtype = torch.float32
    rounding: Rounding = Rounding.NEAREST
    per_tensor: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"plain states are float32 or bfloat16, not {self.dtype}; FP16 needs a scale: fp16/tensor")
        if self.stochastic and self.dtype is torch.float32:
            raise ValueError("fp32/sr: there is nothing to round")

    @property
    def stochastic(self) -> bool:
        return self.rounding is Rounding.STOCHASTIC

    def layout(self, rows: int, cols: int) -> Layout:
        return {"": ((rows, cols), self.dtype)}

    def encode(self, x: Tensor, *, amax: Tensor | None = None, noise: Noise | None = None) -> Parts:
        if not self.stochastic:
            return {"": x.to(self.dtype)}
        assert noise is not None
        rounded = BF16_FORMAT.round(x, noise.uniform(*x.shape))
        return {"": torch.where(x.isfinite(), rounded, x).to(self.dtype)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts[""].float()

    def __str__(self) -> str:
        return ("fp32" if self.dtype is torch.float32 else "bf16") + ("/sr" if self.stochastic else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kahan:
    """BF16 weights with compensation: what rounding lost is stored in BF16 and added before the next update.

    Both are added in FP32. Optimizers that do this in BF16 also round the sum of residual and update.
    """

    per_tensor: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False

    def layout(self, rows: int, cols: int) -> Layout:
        return {"": ((rows, cols), torch.bfloat16), "residual": ((rows, cols), torch.bfloat16)}

    def encode(self, x: Tensor, *, amax: Tensor | None = None, noise: Noise | None = None) -> Parts:
        high = x.to(torch.bfloat16)
        rest = x - high.float()
        return {"": high, "residual": torch.where(high.isfinite(), rest, 0.0).to(torch.bfloat16)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts[""].float() + parts["residual"].float()

    def __str__(self) -> str:
        return "bf16/kahan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """Codes of a float of 5 to 8 bits, INT8 (evenly spaced) or FP16, under an FP32 scale of the tensor or of a block of
    a row.

    decode scale = max(amax, floor) / format.max (``precision.scaling.Fp32Decode``), so the largest element becomes the
    largest code. Error, to nearest: half a unit of the format's last mantissa bit, and where the format is subnormal
    half of its smallest value times the scale.

    Args:
        format: of the codes.
        block: elements of a row that share a scale; None for one scale of the tensor.
        rounding: nearest or stochastic.
    """

    format: NumberFormat
    block: int | None = 128
    rounding: Rounding = Rounding.NEAREST

    def __post_init__(self) -> None:
        f = self.format
        wide = isinstance(f, ExMy) and f.min_exponent <= -126
        whole = isinstance(f, Integer)
        narrow = 5 <= f.bits <= 8 and not (wide or f.scales_only or (whole and f.bits < 8))
        if not narrow and f.dtype is not torch.float16:
            raise ValueError(f"{f}: scaled states are floats of 5 to 8 bits, int8, or fp16")
        if self.rounding is Rounding.TRUNCATE:
            raise ValueError(f"{f}: states are rounded to nearest or stochastically")
        _check_block(self.block)

    @property
    def per_tensor(self) -> bool:
        return self.block is None

    @property
    def stochastic(self) -> bool:
        return self.rounding is Rounding.STOCHASTIC

    @property
    def floor(self) -> float:
        """Amaxes below are taken for this, so that no scale and no reciprocal of one leaves FP32's normal range."""
        return max(1e-30, self.format.max * 2.0**-120)

    @property
    def spec(self) -> OperandSpec:
        """The same in terms of ``precision.quantize``."""
        tile = TENSOR if self.block is None else Tile(1, self.block)
        return OperandSpec(format=self.format, tile=tile, scale=Fp32Decode(floor=self.floor), rounding=self.rounding)

    def layout(self, rows: int, cols: int) -> Layout:
        dtype = torch.uint8 if self.format.bits <= 8 else torch.float16
        scales = () if self.block is None else (rows, -(-cols // self.block))
        return {"codes": ((rows, cols), dtype), "scales": (scales, torch.float32)}

    def encode(self, x: Tensor, *, amax: Tensor | None = None, noise: Noise | None = None) -> Parts:
        q = quantize(x, self.spec, amax=amax if self.per_tensor else None, noise=noise)
        return {"codes": q.codes, "scales": q.scales.reshape(()) if self.per_tensor else q.scales}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes, scales = parts["codes"], parts["scales"]
        rows, cols = codes.shape
        scales = scales.reshape(1, 1) if self.per_tensor else scales
        return dequantize(Quantized(codes=codes, scales=scales, tensor_scale=None, shape=(rows, cols), spec=self.spec))

    def __str__(self) -> str:
        return f"{self.format}/{self.block or 'tensor'}{'/sr' if self.stochastic else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """Block-wise 8-bit dynamic tree quantization (arXiv 2110.02861; the default map of bitsandbytes' 8-bit optimizers).

    A block is divided by its amax; what is left is the nearest of 256 values: in each of seven decades, 10^-k to
    10^-(k+1) for k = 6 .. 0, the midpoints of 2^(6-k) equal parts with either sign (of 2^(7-k), all positive, where
    ``signed`` is false, as for second moments); zero; one. Values half-way go to the lower neighbour. The paper has
    blocks of 2048; 256 is what is used since. Theirs run over the flat tensor.

    Error: half the gap between neighbours, at most 0.0071 of the block's amax.
    """

    block: int = 256
    signed: bool = True
    per_tensor: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_block(self.block)

    def layout(self, rows: int, cols: int) -> Layout:
        scales = ((rows, -(-cols // self.block)), torch.float32)
        return {"codes": ((rows, cols), torch.uint8), "scales": scales}

    def encode(self, x: Tensor, *, amax: Tensor | None = None, noise: Noise | None = None) -> Parts:
        top = amax_of(x, Tile(1, self.block))
        _, middles = dynamic_map(self.signed)
        codes = torch.bucketize(_shares(x, top, self.block), middles.to(x.device))
        return {"codes": codes.to(torch.uint8), "scales": top}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        values, _ = dynamic_map(self.signed)
        shares = values.to(parts["codes"].device)[parts["codes"].int()]
        return shares * _spread(parts["scales"], shares.shape[1], self.block)

    def __str__(self) -> str:
        return f"dynamic/{self.block}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expanded:
    """COAT's range-expanded E4M3 (arXiv 2410.19313): a block is bent by a power until it fills the format's range.

    With M the block's amax and mn its least magnitude that is not zero: k = the largest multiple of 1/16, at most 16,
    for which (M / mn)^k is within 448^2 / 2 (the released code's range, not all of E4M3's 448 * 512). A value is stored
    as the sign and the E4M3 code nearest to (|x| / M)^k * 448, half-way cases to the lower code; it comes back as
    M * (code / 448)^(1/k), from tables over k.

    Not as the authors' code, which stores c = sqrt(M * mn), k and a scale in FP32 (or scales in BF16) and groups 128
    flat elements: its k has no bound, and exceeds 16 in every block with M / mn below (448^2 / 2)^(1/16) = 2.05 (it is
    infinite where all magnitudes are equal). Here k stays 16 there, which a byte holds and a table serves: such a block
    keeps an error of at most 1.5% that theirs goes on reducing. Above 2.05 k is theirs, but for the rounding of
    logarithms at its steps.

    Error: the least values of a block fall on E4M3's subnormals, so (1 + 0.25)^(1/k) - 1 of the value.
    """

    block: int = 128
    per_tensor: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_block(self.block)

    def layout(self, rows: int, cols: int) -> Layout:
        blocks = (rows, -(-cols // self.block))
        return {
            "codes": ((rows, cols), torch.uint8), "scales": (blocks, torch.float32), "powers": (blocks, torch.uint8),
        }  # fmt: skip

    def powers(self, x: Tensor, top: Tensor) -> Tensor:
        """16 k - 1 of every block, int64 [rows, blocks], from 0 to 255."""
        magnitude = torch.where(x == 0, math.inf, x.abs())
        padded = torch.nn.functional.pad(magnitude, (0, top.shape[1] * self.block - x.shape[1]), value=math.inf)
        least = padded.reshape(*top.shape, self.block).amin(-1)
        ratio = torch.where(top > 0, top / least, 1.0)
        return 255 - torch.bucketize(ratio, expansion_limits().to(x.device)).clamp(max=255)

    def encode(self, x: Tensor, *, amax: Tensor | None = None, noise: Noise | None = None) -> Parts:
        top = amax_of(x, Tile(1, self.block))
        powers = self.powers(x, top)
        share = _shares(x, top, self.block)
        _, middles = expanded_maps()
        codes = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
        bent = _spread(powers, x.shape[1], self.block)
        for power in sorted(set(powers.flatten().tolist())):
            here = bent == power
            codes[here] = torch.bucketize(share[here].abs(), middles[power].to(x.device)).clamp(max=126)
        codes |= (share < 0).long() << 7
        return {"codes": codes.to(torch.uint8), "scales": top, "powers": powers.to(torch.uint8)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        values, _ = expanded_maps()
        codes = parts["codes"].int()
        power = _spread(parts["powers"].int(), codes.shape[1], self.block)
        shares = values.to(codes.device).flatten()[power * 128 + (codes & 127)]
        top = _spread(parts["scales"], codes.shape[1], self.block)
        return torch.where(codes > 127, -shares, shares) * top

    def __str__(self) -> str:
        return f"expanded/{self.block}"


FP32: Codec = Plain()
BF16: Codec = Plain(dtype=torch.bfloat16)


@functools.cache
def dynamic_map(signed: bool) -> tuple[Tensor, Tensor]:
    """The 256 values of ``Dynamic``, ascending FP32, and the 255 middles between them."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, (1 if signed else 2) * 2**decade + 1, dtype=torch.float32)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += middles + [-value for value in middles] * signed
    table = torch.tensor(sorted(values), dtype=torch.float32)
    return table, ((table[:-1].double() + table[1:].double()) / 2).float()


@functools.cache
def expanded_maps() -> tuple[Tensor, Tensor]:
    """For k = 1/16 .. 16: the shares (code / 448)^(1/k) of ``Expanded`` [256, 128], the last of no use, and middles."""
    codes = E4M3.decode(torch.arange(127, dtype=torch.uint8)).double() / E4M3.max
    middles = (codes[:-1] + codes[1:]) / 2
    inverse = 16.0 / torch.arange(1, 257, dtype=torch.float64)[:, None]
    values = torch.nn.functional.pad(codes**inverse, (0, 1), value=1.0)
    return values.float(), torch.nn.functional.pad(middles**inverse, (0, 2), value=math.inf).float()


@functools.cache
def expansion_limits() -> Tensor:
    """The largest M / mn for k = 16 down to 1/16: FP32 [256], ascending."""
    log2 = math.log2(E4M3.max * E4M3.max / 2)
    exponents = 16.0 * log2 / torch.arange(256, 0, -1, dtype=torch.float64)
    return (2.0**exponents).float()


def _check_block(block: int | None) -> None:
    if block is not None and not 1 <= block <= 4096:
        raise ValueError(f"a block of a state has 1 to 4096 elements, not {block}")


def _spread(of_blocks: Tensor, cols: int, block: int) -> Tensor:
    """Values of blocks [rows, blocks] for every element [rows, cols]."""
    return of_blocks.repeat_interleave(block, 1)[:, :cols]


def _shares(x: Tensor, top: Tensor, block: int) -> Tensor:
    """x divided by the amax of its block; 0 in a block of zeros, and for what is NaN."""
    top = _spread(top, x.shape[1], block)
    return torch.where(top > 0, x / top, 0.0).nan_to_num(0.0)
