"""Native products: quantized operands multiplied as they are, by ``torch.nn.functional.scaled_mm`` on tensor cores.

Codes and scales come from whichever backend quantizes on that device, so they are the reference's bit for bit; only the
order and the width of the sums differ. The claim, to be confirmed by ``scripts/gpu_check.py`` on each architecture: a
signal-to-noise ratio of at least ``SQNR_DB`` against the reference's product of the same codes.

``PRODUCTS`` is what torch 2.11 to 2.13, built for CUDA 12.9 or later, is documented to take: its own checks of shapes,
strides and dtypes (``torch/_meta_registrations.py``), its dispatch by architecture and formats (``ScaledBlas.cpp``),
its tests' shapes. **None of it has run on a GPU here.** Of every call:

* a is row-major [m, k], b column-major [k, n]: both are stored with the contraction last (TN, the one layout that all
  four architectures take), so the codes of a transposed square tile are copied once.
* dimensions are padded to the product's multiples with code 0, on both sides alike: a zero adds nothing to a sum.
* scales are those of decoding. Tensor: FP32 [1]. Row: FP32 [m, 1] and [1, n]. 1x128: FP32 [rows, k / 128] and 128x128:
  FP32 [k / 128 rounded up to 4, rows / 128], both column-major. 1x32 and 1x16: codes in the 128x4 swizzle.
* larger tiles are repeated where the hardware wants smaller ones (32x32 for 1x32, 16x16 for 1x16, 1x128 for 1x32 if the
  scales are powers of two), and codes of a format whose values E4M3 or E5M2 holds are translated: both are exact.

Sums of FP8 are not in FP32 on Ada and Hopper. A step of their tensor cores takes 16 or 32 products and the sum so far
(on Ada, at least), cuts each to 13 fraction bits below the largest, and adds them exactly: that is a "fast" sum
(``Sums.FAST``). Others are added up in FP32 between intervals of 128 products or so, and keep 13 bits inside
each. At K = 4096 a model of the hardware that is exact to the bit gives other BF16 outputs than emulation for 25%
(fast), 6% (promoted every 128) and 0% (B200, which keeps 25 bits). ``SQNR_DB`` is claimed for sums that are not fast
alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_mm

from ..formats import E2M1, E4M3, E5M2, NumberFormat
from ..quantize import Quantized
from ..scaling import TENSOR, FourOverSix, TwoLevel
from ..spec import GemmSpec, OperandSpec, Source, specs_of
from ..sums import Accumulate, Sums
from .interface import Operand, Quantizer, Shape, unknown
from .reference import scaled_product
from .scaled_mm_operands import Granularity, Side, granularity, round_up, row_scales

SQNR_DB = 40.0
"""Of a native product against the reference's product of the same codes: claimed, not yet measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeProduct:
    """A row of the table: one kind of product, and what it takes.

    Args:
        name: in plan.txt.
        scales: over what they extend.
        pairs: formats of a and b.
        architectures: compute capabilities, 90 for 9.0.
        multiples: of m, n and k; what is less is padded.
        outputs: dtypes that it rounds its sums to.
        bias: whether it adds one itself (to outputs of 16 bits).
        fast: whether sums of less than FP32 can be asked for; torch refuses them otherwise.
        hint: what to do where an architecture lacks it.
    """

    name: str
    scales: Granularity
    pairs: frozenset[tuple[NumberFormat, NumberFormat]]
    architectures: tuple[int, ...] = (89, 90, 100, 120)
    multiples: tuple[int, int, int] = (1, 16, 16)
    outputs: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    bias: bool = False
    fast: bool = False
    hint: str = ""


FAST_BY_DEFAULT = (89, 90)
"""Architectures whose FP8 products are much slower without fast sums, so that others train with them in fprop."""
MEASURED_SUMS: dict[int, Accumulate] = {}
"""Rules that fast FP8 products of an architecture were found to follow in every bit, whole products included
(``gpu_run.py stages=sums``): none yet, so that a GEMM that asks for a rule is emulated."""
ARCHITECTURES = {89: "Ada", 90: "Hopper", 100: "Blackwell, data centre", 120: "Blackwell, GeForce and RTX PRO"}
_E4M3 = (E4M3, E4M3)
_FP8 = frozenset({_E4M3, (E5M2, E4M3), (E4M3, E5M2)})  # E5M2 times E5M2 is in no hardware

PRODUCTS: tuple[NativeProduct, ...] = (
    NativeProduct(
        name="tensor-wise FP8",
        scales=Granularity.TENSOR,
        pairs=_FP8,
        bias=True,
        fast=True,
    ),
    NativeProduct(
        name="row-wise FP8",
        scales=Granularity.ROW,
        pairs=frozenset({_E4M3, (E5M2, E4M3)}),
        outputs=(torch.bfloat16,),
        bias=True,
        fast=True,
    ),
    NativeProduct(
        name="tensor-wise FP8, rows scaled afterwards",
        scales=Granularity.ROW_AFTERWARDS,
        pairs=_FP8,
        fast=True,
    ),
    NativeProduct(
        name="block-wise FP8",
        scales=Granularity.BLOCK,
        pairs=frozenset({_E4M3}),
        architectures=(90,),
        multiples=(128, 128, 128),
        hint="; on sm_100 and sm_120 such scales must be powers of two (pow2=true), to be multiplied as MXFP8",
    ),
    NativeProduct(
        name="MXFP8",
        scales=Granularity.MX,
        pairs=frozenset({_E4M3}),
        architectures=(100, 120),
        multiples=(1, 16, 32),
    ),
    NativeProduct(
        name="NVFP4",
        scales=Granularity.NV,
        pairs=frozenset({(E2M1, E2M1)}),
        architectures=(100, 120),
        multiples=(1, 16, 32),
    ),
)


def architecture(device: torch.device) -> int | None:
    """The compute capability of an NVIDIA GPU, that of its family where the table goes by families; else None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major if 10 * major in ARCHITECTURES else 10 * major + minor


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledMM:
    """Native products of codes.

    Args:
        detect: the architecture of a device.
        shape: of the GEMM, where it is known.
        device: of the model, where it is known.
        fast: whether sums may be fast, where there are such.
        codes_by: who quantizes, for plan.txt.
    """

    detect: Callable[[torch.device], int | None] = architecture
    shape: Shape | None = None
    device: torch.device | None = None
    fast: bool = False
    codes_by: str = ""

    name: ClassVar[str] = "scaled_mm"
    reads_rows: ClassVar[bool] = True

    @property
    def identity(self) -> tuple[str, ...]:
        return str(self.device), str(self.shape), str(self.fast)

    def for_gemm(self, gemm: GemmSpec, shape: Shape, device: torch.device, quantizer: Quantizer) -> ScaledMM:
        own = isinstance(gemm.accumulate, Accumulate) or gemm.accumulate is Sums.FAST
        fast = own or (gemm.accumulate is Sums.AUTO and self.detect(device) in FAST_BY_DEFAULT)
        return replace(self, shape=shape, device=device, fast=fast, codes_by=quantizer.name)

    def why_not(self, gemm: GemmSpec, shape: Shape, device: torch.device) -> str | None:
        arch = self.detect(device)
        if arch is None:
            return "no table of its products" if device.type == "cuda" else f"the model is on {device.type}"
        if gemm.a is None or gemm.b is None:
            return "an operand is not quantized"
        if reason := unknown(gemm.a, gemm.b):
            return reason
        for spec in specs_of(gemm.a, gemm.b):
            if spec.source is Source.VALUES and spec.tile.outer != spec.tile.inner:
                return f"no native product reads codes in tiles of {spec.tile} across them"
        found = find(*specs_of(gemm.a, gemm.b), arch)
        if isinstance(found, str):
            return found
        if isinstance(gemm.accumulate, Accumulate) and not (found.fast and MEASURED_SUMS.get(arch) == gemm.accumulate):
            return f"{found.name} of sm_{arch} is not known to give {gemm.accumulate}"
        return None

    def gemm(self, a: Operand, b: Operand, *, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """a [m, k] @ b [n, k].mT + bias [n] in ``dtype``.

        Raises ValueError for a dtype that no product of these operands comes out in.
        """
        if not isinstance(a, Quantized) or not isinstance(b, Quantized):  # a step that the recipe leaves alone
            assert isinstance(a, Tensor)
            assert isinstance(b, Tensor)
            return scaled_product(a, b, (), bias, dtype)
        # Specs by identity: to hash and to compare them takes longer than to launch a product.
        codes = a.codes
        key = id(a.spec), id(b.spec), a.shape, b.shape, dtype, self.fast, codes.get_device(), self.detect
        known = _CALLS.get(key)
        if known is None:
            arch = self.detect(codes.device)
            assert arch is not None, "chosen for a device that it does not know"
            product = find(a.spec, b.spec, arch, dtype)
            if isinstance(product, str):
                raise ValueError(f"{a.spec} x {b.spec}: {product}")
            if len(_CALLS) >= MAX_CALLS:
                _CALLS.clear()
            known = _CALLS[key] = Multiplication(product, a, b, dtype=dtype, fast=self.fast)
        return known.of(a, b, bias)

    def note(self, gemm: GemmSpec) -> str:
        """Which product it is, who quantizes, what is padded and translated, and where no sum is fast."""
        if gemm.a is None or gemm.b is None or self.shape is None or self.device is None:
            return ""
        arch = self.detect(self.device)
        product = find(*specs_of(gemm.a, gemm.b), arch) if arch is not None else ""
        if isinstance(product, str):
            return product
        parts = [f"{product.name} of sm_{arch}, codes by {self.codes_by}"]
        for name, size, multiple in zip("mnk", self.shape, product.multiples, strict=True):
            if size is not None and size > 0 and size % multiple:
                parts.append(f"{name} {size} padded to {round_up(size, multiple)}")
        carriers = {spec.format: _carrier(spec.format, product) for spec in specs_of(gemm.a, gemm.b)}
        translated = [f"{format} as {carrier}" for format, carrier in carriers.items() if carrier != format]
        slow = [f"{product.name} has no fast sums"] if gemm.accumulate is Sums.FAST and not product.fast else []
        fast = ["fast sums"] if gemm.accumulate is Sums.AUTO and self.fast and product.fast else []
        if isinstance(gemm.accumulate, Accumulate):
            fast = ["the card's own sums"]
        return ", ".join([*parts, *translated, *slow, *fast])


@functools.cache
def find(a: OperandSpec, b: OperandSpec, arch: int, dtype: torch.dtype | None = None) -> NativeProduct | str:
    """The first product of the table for these operands on this architecture, into ``dtype``; or why there is none."""
    if reason := unknown(a, b):
        return reason
    fitting = [product for product in PRODUCTS if _scales_fit(a, b, product.scales)]
    if not fitting:
        return f"no native product has scales of {a.tile} ({a.scale}) by {b.tile} ({b.scale})"
    here = [product for product in fitting if arch in product.architectures]
    if not here:
        names = " or ".join(product.name for product in fitting)
        return f"sm_{arch} has no {names} product{fitting[0].hint if arch >= 100 else ''}"
    paired = [p for p in here if (_carrier(a.format, p), _carrier(b.format, p)) in p.pairs]
    if not paired:
        return f"no {here[0].name} product of {a.format} and {b.format} on sm_{arch}"
    for product in paired:
        if dtype is None or dtype in product.outputs:
            return product
    return f"no {paired[0].name} product on sm_{arch} comes out in {str(dtype).removeprefix('torch.')}"


def _scales_fit(a: OperandSpec, b: OperandSpec, scales: Granularity) -> bool:
    kinds = {granularity(a), granularity(b)}
    if scales is Granularity.TENSOR:
        return kinds == {Granularity.TENSOR}
    if scales in (Granularity.ROW, Granularity.ROW_AFTERWARDS):  # a tensor's scale is that of each of its rows
        return Granularity.ROW in kinds and kinds <= {Granularity.ROW, Granularity.TENSOR}
    if scales is Granularity.BLOCK:
        plain = all(spec.scale.levels == 1 and spec.scale.format is None for spec in (a, b))
        return plain and {a.tile, b.tile} in ({(1, 128)}, {(1, 128), (128, 128)})
    if scales is Granularity.MX:
        return all(
            spec.scale.levels == 1 and spec.scale.power_of_two and spec.tile.inner > 0 and spec.tile.inner % 32 == 0
            for spec in (a, b)
        )
    return all(
        isinstance(spec.scale, TwoLevel | FourOverSix)
        and spec.scale.outer == TENSOR  # else a factor for each row of the output: no product has it
        and spec.scale.block == E4M3
        and spec.tile.inner > 0
        and spec.tile.inner % 16 == 0
        for spec in (a, b)
    )


def _carrier(format: NumberFormat, product: NativeProduct) -> NumberFormat | None:
    """The format of hardware that holds every value of ``format``; None if there is none."""
    choices = (E2M1,) if product.scales is Granularity.NV else (E4M3, E5M2)
    if format in choices:
        return format
    for carrier in choices:
        narrower = format.significant_bits <= carrier.significant_bits and format.max <= carrier.max
        if not format.scales_only and narrower and format.tiny_exponent >= carrier.tiny_exponent:
            return carrier
    return None


class Multiplication:
    """A product of operands of the specs and shapes of a and b: all that is known before there are codes.

    ``dtype``: of the output. ``fast``: with fast sums, if the product has them.
    """

    def __init__(self, product: NativeProduct, a: Quantized, b: Quantized, *, dtype: torch.dtype, fast: bool) -> None:
        self.product, self.dtype, self.fast = product, dtype, fast and product.fast
        self.specs = a.spec, b.spec  # held because their identity is what a product is found by
        self.sizes = a.shape[0], b.shape[0], a.shape[1]
        m, n, k = (round_up(size, by) for size, by in zip(self.sizes, product.multiples, strict=True))
        self.padded = m, n
        left, right = _carrier(a.spec.format, product), _carrier(b.spec.format, product)
        assert left is not None, "operands that the product was found for"
        assert right is not None, "operands that the product was found for"
        self.left = Side(product.scales, a.spec, left, a.shape, m, k)
        self.right = Side(product.scales, b.spec, right, b.shape, n, k)

    def of(self, a: Quantized, b: Quantized, bias: Tensor | None) -> Tensor:
        """y [m, n]; ``bias`` [n] in any dtype."""
        m, n, k = self.sizes
        product, dtype, left, right = self.product, self.dtype, self.left, self.right
        if 0 in (m, n, k):
            y = torch.zeros(m, n, dtype=dtype, device=a.codes.device)
            return y if bias is None else y + bias.to(dtype)
        afterwards = product.scales is Granularity.ROW_AFTERWARDS
        fused = bias is not None and product.bias and dtype != torch.float32
        wide = afterwards or (bias is not None and not fused)
        right_scales = right.scales(b)
        added = bias.to(dtype) if fused and bias is not None else None
        y = scaled_mm(
            left.codes(a),
            right.codes(b).t(),
            left.scales(a),
            left.recipes,
            [right_scales[0].mT] if product.scales is Granularity.ROW else right_scales,
            right.recipes,
            swizzle_a=left.swizzles,
            swizzle_b=right.swizzles,
            bias=added if added is None or self.padded[1] == n else pad(added, (0, self.padded[1] - n)),
            output_dtype=torch.float32 if wide else dtype,
            use_fast_accum=self.fast,
        )
        if self.padded != (m, n):
            y = y[:m, :n]
        if afterwards:
            y = y * row_scales(a, m) * row_scales(b, n).mT
        if bias is not None and not fused:
            y = y + bias
        if y.dtype != dtype:
            y = y.to(dtype)
        return y if y.is_contiguous() else y.contiguous()


_CALLS: dict[Hashable, Multiplication] = {}
"""Products of all linears, by the identity of their specs among others."""
MAX_CALLS = 4096
