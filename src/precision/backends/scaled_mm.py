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
(``GemmSpec.fast_accum``). Others are added up in FP32 between intervals of 128 products or so, and keep 13 bits inside
each. At K = 4096 a model of the hardware that is exact to the bit gives other BF16 outputs than emulation for 25%
(fast), 6% (promoted every 128) and 0% (B200, which keeps 25 bits). ``SQNR_DB`` is claimed for sums that are not fast
alone.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType, pad, scaled_mm

from ..formats import E2M1, E4M3, E5M2, E8M0, NumberFormat, pack4, unpack4
from ..noise import Noise
from ..quantize import Prepared, Quantized
from ..scaling import TENSOR, Tile, TwoLevel
from ..spec import GemmSpec, OperandSpec, Transform
from .reference import Reference
from .triton.device import installed, runs_on
from .triton.quantizer import FOR_PRODUCTS, Triton, swizzled

SQNR_DB = 40.0
"""Of a native product against the reference's product of the same codes: claimed, not yet measured."""

ROWS, TILE_K = 128, 4  # of the swizzled blocks of scales


class Scales(enum.Enum):
    """What a product's scales extend over."""

    TENSOR = "tensor"
    ROW = "row"
    ROW_AFTERWARDS = "row afterwards"  # the product has no scales: its FP32 output is multiplied by them
    BLOCK = "1x128 or 128x128"
    MX = "1x32"
    NV = "1x16 and tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A row of the table: one kind of product, and what it takes.

    Args:
        name: in plan.txt.
        scales: over what they extend.
        pairs: formats of a and b.
        architectures: compute capabilities, 90 for 9.0.
        multiples: of m, n and k; what is less is padded.
        outputs: dtypes that it rounds its sums to.
        bias: whether it adds one itself (to outputs of 16 bits).
        fast: whether sums of less than FP32 can be asked for.
        hint: what to do where an architecture lacks it.
    """

    name: str
    scales: Scales
    pairs: frozenset[tuple[NumberFormat, NumberFormat]]
    architectures: tuple[int, ...]
    multiples: tuple[int, int, int]
    outputs: tuple[torch.dtype, ...]
    bias: bool
    fast: bool
    hint: str = ""


FAST_BY_DEFAULT = (89, 90)
"""Architectures whose FP8 products are much slower without fast sums, so that others train with them in fprop."""
ARCHITECTURES = {89: "Ada", 90: "Hopper", 100: "Blackwell, data centre", 120: "Blackwell, GeForce and RTX PRO"}
_ALL = (torch.bfloat16, torch.float16, torch.float32)
_E4M3 = (E4M3, E4M3)
_FP8 = frozenset({_E4M3, (E5M2, E4M3), (E4M3, E5M2)})  # E5M2 times E5M2 is in no hardware

PRODUCTS: tuple[Product, ...] = (
    Product(
        name="tensor-wise FP8",
        scales=Scales.TENSOR,
        pairs=_FP8,
        architectures=(89, 90, 100, 120),
        multiples=(1, 16, 16),
        outputs=_ALL,
        bias=True,
        fast=True,
    ),
    Product(
        name="row-wise FP8",
        scales=Scales.ROW,
        pairs=frozenset({_E4M3, (E5M2, E4M3)}),
        architectures=(89, 90, 100, 120),
        multiples=(1, 16, 16),
        outputs=(torch.bfloat16,),
        bias=True,
        fast=True,
    ),
    Product(
        name="tensor-wise FP8, rows scaled afterwards",
        scales=Scales.ROW_AFTERWARDS,
        pairs=_FP8,
        architectures=(89, 90, 100, 120),
        multiples=(1, 16, 16),
        outputs=_ALL,
        bias=False,
        fast=True,
    ),
    Product(
        name="block-wise FP8",
        scales=Scales.BLOCK,
        pairs=frozenset({_E4M3}),
        architectures=(90,),
        multiples=(128, 128, 128),
        outputs=_ALL,
        bias=False,
        fast=False,  # torch refuses them
        hint="; on sm_100 and sm_120 such scales must be powers of two (pow2=true), to be multiplied as MXFP8",
    ),
    Product(
        name="MXFP8",
        scales=Scales.MX,
        pairs=frozenset({_E4M3}),
        architectures=(100, 120),
        multiples=(1, 16, 32),
        outputs=_ALL,
        bias=False,
        fast=False,
    ),
    Product(
        name="NVFP4",
        scales=Scales.NV,
        pairs=frozenset({(E2M1, E2M1)}),
        architectures=(100, 120),
        multiples=(1, 16, 32),
        outputs=_ALL,
        bias=False,
        fast=False,
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
    """Native products of what ``quantizer`` makes.

    Args:
        quantizer: of the model's device.
        detect: the architecture of a device.
        shape: m, n, k of the GEMM, where it is known.
        device: of the model, where it is known.
        fast: whether sums may be fast, where there are such.
    """

    quantizer: Reference = field(default_factory=Reference)
    detect: Callable[[torch.device], int | None] = architecture
    shape: tuple[int | None, int, int] | None = None
    device: torch.device | None = None
    fast: bool = False

    @property
    def name(self) -> str:
        return "scaled_mm"

    @property
    def identity(self) -> tuple[str, ...]:
        return f"{self.quantizer.name} for {self.name}", str(self.device), str(self.shape), str(self.fast)

    @property
    def notes(self) -> bool:
        return self.quantizer.notes

    @property
    def reads_rows(self) -> bool:
        return True

    @property
    def by_column(self) -> bool:
        return self.quantizer.by_column

    def settled(
        self,
        shape: tuple[int | None, int, int],
        device: torch.device,
        quantizer: Reference,
        *,
        fast: bool | None = False,
    ) -> ScaledMM:
        """For one GEMM, with the backend that quantizes there. ``fast``: as ``GemmSpec.fast_accum``."""
        if fast is None:
            fast = self.detect(device) in FAST_BY_DEFAULT
        if isinstance(quantizer, Triton):
            quantizer = FOR_PRODUCTS
        return replace(self, shape=shape, device=device, quantizer=quantizer, fast=fast)

    def why_not(self, gemm: GemmSpec, shape: tuple[int | None, int, int], device: torch.device) -> str | None:
        arch = self.detect(device)
        if arch is None:
            return "no table of its products" if device.type == "cuda" else f"the model is on {device.type}"
        if gemm.a is None or gemm.b is None:
            return "an operand is not quantized"
        found = find(gemm.a, gemm.b, arch)
        return found if isinstance(found, str) else None

    def quantize(self, x: Tensor, spec: OperandSpec, *, amax: Tensor | None, noise: Noise | None) -> Quantized:
        return self.quantizer.quantize(x, spec, amax=amax, noise=noise)

    def operand(self, q: Quantized) -> tuple[Tensor, Tensor | None]:
        return self.quantizer.operand(q)

    def amax(self, x: Tensor, tile: Tile) -> Tensor:
        return self.quantizer.amax(x, tile)

    def transformed(self, transform: Transform, x: Tensor, *, left: bool) -> Tensor:
        return self.quantizer.transformed(transform, x, left=left)

    def prepare(
        self,
        x: Tensor,
        spec: OperandSpec,
        *,
        amax: Tensor | None,
        noise: Noise | None,
        transform: Transform | None,
        left: bool,
        codes: bool,
        note: Tensor | None = None,
    ) -> Quantized | Prepared:
        # A native product reads codes.
        return self.quantizer.prepare(
            x, spec, amax=amax, noise=noise, transform=transform, left=left, codes=True, note=note
        )

    def both(
        self,
        x: Tensor,
        spec: OperandSpec,
        *,
        amax: Tensor | None = None,
        noise: tuple[Noise, Noise] | None = None,
        note: Tensor | None = None,
        values: bool = False,
    ) -> tuple[Quantized, Quantized] | tuple[Prepared, Prepared] | None:
        return self.quantizer.both(x, spec, amax=amax, noise=noise, note=note)

    def gemm(
        self,
        a: Quantized | Prepared | Tensor,
        b: Quantized | Prepared | Tensor,
        *,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """a [m, k] @ b [n, k].mT + bias [n] in ``dtype``.

        Raises ValueError for a dtype that no product of these operands comes out in.
        """
        if not isinstance(a, Quantized) or not isinstance(b, Quantized):  # a step that the recipe leaves alone
            return self.quantizer.gemm(a, b, bias=bias, dtype=dtype)
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
            known = _CALLS[key] = multiplication(product, a, b, dtype=dtype, fast=self.fast)
        return known.of(a, b, bias)

    def note(self, gemm: GemmSpec) -> str:
        """Which product it is, who quantizes, what is padded and translated, and where no sum is fast."""
        if gemm.a is None or gemm.b is None or self.shape is None or self.device is None:
            return ""
        arch = self.detect(self.device)
        product = find(gemm.a, gemm.b, arch) if arch is not None else ""
        if isinstance(product, str):
            return product
        parts = [f"{product.name} of sm_{arch}, codes by {self.quantizer.name}"]
        for name, size, multiple in zip("mnk", self.shape, product.multiples, strict=True):
            if size is not None and size > 0 and size % multiple:
                parts.append(f"{name} {size} padded to {_up(size, multiple)}")
        carriers = {spec.format: _carrier(spec.format, product) for spec in (gemm.a, gemm.b)}
        translated = [f"{format} as {carrier}" for format, carrier in carriers.items() if carrier != format]
        slow = [f"{product.name} has no fast sums"] if gemm.fast_accum and not product.fast else []
        fast = ["fast sums"] if gemm.fast_accum is None and self.fast and product.fast else []
        return ", ".join([*parts, *translated, *slow, *fast])


@functools.cache
def find(a: OperandSpec, b: OperandSpec, arch: int, dtype: torch.dtype | None = None) -> Product | str:
    """The first product of the table for these operands on this architecture, into ``dtype``; or why there is none."""
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


def _scales_fit(a: OperandSpec, b: OperandSpec, scales: Scales) -> bool:
    kinds = {_granularity(a), _granularity(b)}
    if scales is Scales.TENSOR:
        return kinds == {Scales.TENSOR}
    if scales in (Scales.ROW, Scales.ROW_AFTERWARDS):  # a tensor's scale is that of each of its rows
        return Scales.ROW in kinds and kinds <= {Scales.ROW, Scales.TENSOR}
    if scales is Scales.BLOCK:
        plain = all(spec.scale.levels == 1 and spec.scale.format is None for spec in (a, b))
        return plain and {a.tile, b.tile} in ({(1, 128)}, {(1, 128), (128, 128)})
    if scales is Scales.MX:
        return all(
            spec.scale.levels == 1 and spec.scale.power_of_two and spec.tile.inner > 0 and spec.tile.inner % 32 == 0
            for spec in (a, b)
        )
    return all(
        isinstance(spec.scale, TwoLevel)
        and not spec.scale.rows  # a factor for each row of the output: no product has it
        and spec.scale.block == E4M3
        and spec.tile.inner > 0
        and spec.tile.inner % 16 == 0
        for spec in (a, b)
    )


def _granularity(spec: OperandSpec) -> Scales | None:
    if spec.scale.levels == 0 or (spec.scale.levels == 1 and spec.tile == TENSOR):
        return Scales.TENSOR
    return Scales.ROW if spec.scale.levels == 1 and spec.tile == Tile(1, -1) else None


def _carrier(format: NumberFormat, product: Product) -> NumberFormat | None:
    """The format of hardware that holds every value of ``format``; None if there is none."""
    choices = (E2M1,) if product.scales is Scales.NV else (E4M3, E5M2)
    if format in choices:
        return format
    for carrier in choices:
        narrower = format.significant_bits <= carrier.significant_bits and format.max <= carrier.max
        if not format.scales_only and narrower and format.tiny_exponent >= carrier.tiny_exponent:
            return carrier
    return None


def multiply(
    product: Product, a: Quantized, b: Quantized, *, bias: Tensor | None, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """a [m, k] @ b [n, k].mT + bias [n] by this product; rounded once to ``dtype``, but for a bias in hardware.

    ``fast``: with fast sums, if it has them.
    """
    return multiplication(product, a, b, dtype=dtype, fast=fast).of(a, b, bias)


def multiplication(product: Product, a: Quantized, b: Quantized, *, dtype: torch.dtype, fast: bool) -> Multiplication:
    """``multiply`` of operands such as these."""
    sizes = a.shape[0], b.shape[0], a.shape[1]
    m, n, k = (_up(size, by) for size, by in zip(sizes, product.multiples, strict=True))
    return Multiplication(
        product=product,
        specs=(a.spec, b.spec),
        sizes=sizes,
        padded=(m, n),
        dtype=dtype,
        fast=fast and product.fast,
        left=_Side(product, a.spec, a.shape, m, k),
        right=_Side(product, b.spec, b.shape, n, k),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiplication:
    """A product of operands of two specs and shapes: all that can be known before their codes are there.

    Args:
        specs: of the operands; kept, as they are known by their identity.
        sizes: m, n, k.
        padded: m and n as they are computed.
        dtype: of the output.
        fast: whether sums are fast.
        left, right: how the operands are read.
    """

    product: Product
    specs: tuple[OperandSpec, OperandSpec]
    sizes: tuple[int, int, int]
    padded: tuple[int, int]
    dtype: torch.dtype
    fast: bool
    left: _Side
    right: _Side

    def of(self, a: Quantized, b: Quantized, bias: Tensor | None) -> Tensor:
        """y [m, n]; ``bias`` [n] in any dtype."""
        m, n, k = self.sizes
        product, dtype, left, right = self.product, self.dtype, self.left, self.right
        if 0 in (m, n, k):
            y = torch.zeros(m, n, dtype=dtype, device=a.codes.device)
            return y if bias is None else y + bias.to(dtype)
        afterwards = product.scales is Scales.ROW_AFTERWARDS
        fused = bias is not None and product.bias and dtype != torch.float32
        wide = afterwards or (bias is not None and not fused)
        right_scales = right.scales(b)
        added = bias.to(dtype) if fused and bias is not None else None
        y = scaled_mm(
            left.codes(a),
            right.codes(b).t(),
            left.scales(a),
            left.recipes,
            [right_scales[0].mT] if product.scales is Scales.ROW else right_scales,
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
            y = y * _row_scales(a, m) * _row_scales(b, n).mT
        if bias is not None and not fused:
            y = y + bias
        if y.dtype != dtype:
            y = y.to(dtype)
        return y if y.is_contiguous() else y.contiguous()


_CALLS: dict[Hashable, Multiplication] = {}
"""Products of all linears; each holds the specs that it is known by."""
MAX_CALLS = 4096


class _Side:
    """How an operand of one spec and shape is read: codes [rows, k] (or [rows, k / 2] of E2M1), row-major."""

    def __init__(self, product: Product, spec: OperandSpec, shape: tuple[int, int], rows: int, k: int) -> None:
        self.product, self.rows, self.k = product, rows, k
        kind, fitting = product.scales, shape == (rows, k)
        # What lies in memory as the hardware reads it.
        self.codes_dtype = spec.format.dtype if fitting and spec.format.dtype in _NATIVE and min(shape) > 1 else None
        plain = spec.scale.format is None
        self.scales_shape: tuple[int, ...] | None = None
        if plain and kind is Scales.TENSOR:
            self.scales_shape = (1,)
        elif plain and kind is Scales.ROW and fitting and _granularity(spec) is Scales.ROW:
            self.scales_shape = (rows, 1)
        self.column_scales = (rows, k // 128) if plain and fitting and spec.tile.outer == 1 else None
        flat, swizzled = SwizzleType.NO_SWIZZLE, SwizzleType.SWIZZLE_32_4_4
        self.recipes, self.swizzles = {
            Scales.TENSOR: ([ScalingType.TensorWise], [flat]),
            Scales.ROW_AFTERWARDS: ([ScalingType.TensorWise], [flat]),
            Scales.ROW: ([ScalingType.RowWise], [flat]),
            Scales.BLOCK: (
                [ScalingType.BlockWise1x128 if spec.tile.outer == 1 else ScalingType.BlockWise128x128],
                [flat],
            ),
            Scales.MX: ([ScalingType.BlockWise1x32], [swizzled]),
            Scales.NV: ([ScalingType.BlockWise1x16, ScalingType.TensorWise], [swizzled, flat]),
        }[kind]

    def codes(self, q: Quantized) -> Tensor:
        if self.codes_dtype is not None and not q.transposed and q.codes.is_contiguous():
            return q.codes.view(self.codes_dtype)
        return _codes(q, self.product, self.rows, self.k)

    def scales(self, q: Quantized) -> list[Tensor]:
        scales, shape, rows, k = q.scales, self.scales_shape, self.rows, self.k
        if shape is not None and not q.transposed and scales.is_contiguous():
            return [scales if scales.shape == shape else scales.view(shape)]
        match self.product.scales:
            case Scales.TENSOR:
                return [_decode_scales(q).reshape(1)]
            case Scales.ROW_AFTERWARDS:
                return [_one(scales.device)]
            case Scales.ROW:
                return [_row_scales(q, rows)]
            case Scales.BLOCK:
                columns = scales.mT if q.transposed else scales
                if self.column_scales == columns.shape and columns.stride() == (1, len(columns)):
                    return [columns]
                return [_block_scales(q, rows, k)]
            case Scales.MX:
                exponents = scales if q.spec.scale.format == E8M0 else E8M0.encode(scales)
                return [_in_order(_per_vector(q, exponents, rows, k, 32)).view(torch.float8_e8m0fnu)]
            case Scales.NV:
                assert q.tensor_scale is not None
                vectors = _in_order(_per_vector(q, scales, rows, k, 16)).view(torch.float8_e4m3fn)
                return [vectors, q.tensor_scale.reshape(1)]


def _codes(q: Quantized, product: Product, rows: int, k: int) -> Tensor:
    """The codes as the hardware reads them, row-major [rows, k], padded with code 0: the value 0 in every format."""
    element = q.spec.format
    carrier = element if element.dtype in _NATIVE else _carrier(element, product)
    assert carrier is not None
    assert carrier.dtype is not None
    inner, packed = q.shape[1], carrier.bits == 4
    if packed and not q.transposed and inner % 2 == 0:
        return _row_major(_padded(q.codes, rows, k // 2)).view(carrier.dtype)
    codes = unpack4(q.codes, q.stored_shape[1]) if element.bits == 4 else q.codes
    if carrier != element:
        codes = _translation(element, carrier, codes.device)[codes.int()]
    codes = _padded(codes.mT if q.transposed else codes, rows, k)
    return _row_major(pack4(codes) if packed else codes).view(carrier.dtype)


_NATIVE = (torch.float8_e4m3fn, torch.float8_e5m2)


def _padded(x: Tensor, rows: int, columns: int, value: float = 0) -> Tensor:
    """x, filled up to [rows, columns]; itself where nothing is missing, as ``pad`` would copy it."""
    missing = rows - x.shape[0], columns - x.shape[1]
    return x if missing == (0, 0) else pad(x, (0, missing[1], 0, missing[0]), value=value)


def _row_major(x: Tensor) -> Tensor:
    """Contiguous, with the strides of a matrix of rows also where there is but one: they are looked at."""
    x = x.contiguous()
    return x if min(x.shape) > 1 else x.view(-1).view(x.shape)


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones(1, dtype=torch.float32, device=device)


@functools.cache
def _translation(element: NumberFormat, carrier: NumberFormat, device: torch.device) -> Tensor:
    """The carrier's code of every code of ``element``."""
    return carrier.encode(element.decode(torch.arange(2**element.bits, device=device)))


def _decode_scales(q: Quantized) -> Tensor:
    """FP32 decode scales of one level [rows, columns] of the grid; 1 without scales."""
    format = q.spec.scale.format
    scales = q.scales if format is None else format.decode(q.scales)
    return scales.mT if q.transposed else scales


def _row_scales(q: Quantized, rows: int) -> Tensor:
    """FP32 [rows, 1]: of every row of the operand, and 1 of padding."""
    return _padded(_decode_scales(q).expand(q.shape[0], 1), rows, 1, value=1.0).contiguous()


def _block_scales(q: Quantized, rows: int, k: int) -> Tensor:
    """FP32, column-major: [rows, k / 128], or [k / 128 rounded up to 4, rows / 128]; 1 for padding."""
    scales = _decode_scales(q)
    columns = k // 128
    if q.spec.tile.outer == 1:
        scales = _padded(scales, rows, columns, value=1.0)
        return scales.mT.contiguous().mT
    squares = -(-rows // 128)
    columns = _up(columns, 4)
    scales = _padded(scales, squares, columns, value=1.0)
    return scales.contiguous().mT


def _per_vector(q: Quantized, scales: Tensor, rows: int, k: int, size: int) -> Tensor:
    """Scale codes (uint8) of every ``size`` elements of every row, [rows, k / size]; code 0 for padding."""
    (outer, inner), scales = q.shape, scales.mT if q.transposed else scales
    tall, wide = q.spec.tile.extent(outer, inner)
    if tall > 1:
        scales = scales.repeat_interleave(tall, 0)[:outer]
    if wide > size:
        scales = scales.repeat_interleave(wide // size, 1)[:, : -(-inner // size)]
    return _padded(scales, rows, k // size)


def swizzle(scales: Tensor) -> Tensor:
    """Scale codes [rows, columns] in blocks of 128 x 4: the layout ``SWIZZLE_32_4_4``, flat.

    Of a block, the four columns of row r lie at (r % 32) * 16 + (r // 32) * 4; blocks follow each other along a row of
    blocks. Rows and columns are filled up with code 0.
    """
    rows, columns = scales.shape
    tall, wide = _up(rows, ROWS), _up(columns, TILE_K)
    scales = pad(scales, (0, wide - columns, 0, tall - rows))
    return scales.view(tall // ROWS, 4, 32, wide // TILE_K, TILE_K).permute(0, 3, 2, 1, 4).reshape(-1)


def _in_order(scales: Tensor) -> Tensor:
    """``swizzle(scales)``; by a kernel where there is one."""
    return swizzled(scales) if runs_on(scales.device) and installed() else swizzle(scales)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
