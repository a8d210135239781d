"""The Triton kernels in Triton's interpreter against the reference, bit for bit: run by ``test_triton`` in a process of
its own, since TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import test_updates
import torch
import transformers
from hardware import pretend
from narrowgauge.models.llama import Llama, LlamaConfig
from narrowgauge.precision.apply import apply
from narrowgauge.precision.backends import (
    REFERENCE,
    Cast,
    Quantizer,
    choose,
    quantize_by,
    scaled_mm,
    scaled_mm_operands,
)
from narrowgauge.precision.backends.scaled_mm_operands import Granularity, swizzle
from narrowgauge.precision.backends.triton.amax import tile_amax
from narrowgauge.precision.backends.triton.blocks import CANDIDATES, BlockSize
from narrowgauge.precision.backends.triton.both import BothPlan, quantize_both
from narrowgauge.precision.backends.triton.device import recording, version
from narrowgauge.precision.backends.triton.fused import (
    StateMatrix,
    Step,
    adamw,
    adamw_amaxes,
    gradient_amaxes,
    quantize_gradients,
)
from narrowgauge.precision.backends.triton.quantize import NO_NOISE, QuantizePlan, quantize_fused
from narrowgauge.precision.backends.triton.quantizer import EmulatedOnGpu, Triton, hadamard, scaled_output, swizzled
from narrowgauge.precision.formats import BF16, E2M1, E4M3, E5M2, INT4, INT8, Integer, NumberFormat
from narrowgauge.precision.loading import load
from narrowgauge.precision.noise import Noise, base_key, step_key
from narrowgauge.precision.probe import Probe
from narrowgauge.precision.quantize import Prepared, Quantized, amax, dequantize, operand, quantize
from narrowgauge.precision.scaling import ROW, TENSOR, Delayed, Fp32, Fp32Decode, PowerOfTwo, Tile, TwoLevel, Unit
from narrowgauge.precision.spec import GemmSpec, OperandSpec, Rounding
from narrowgauge.precision.states.adamw import AdamW
from narrowgauge.precision.states.choose import choose_update
from narrowgauge.precision.swiglu import Gradients, Hidden
from narrowgauge.precision.transforms import Hadamard, drawn
from test_backends import (
    DTYPES,
    FEW_BITS,
    FORMATS,
    SCALES,
    SHAPES,
    USUAL,
    assert_every_tie,
    equal,
    matrices,
    same_codes,
)
from test_updates import CPU, make, params_of, set_grads, state_of
from test_updates import same as same_states
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter


def read_bounds_by_item() -> None:
    """Triton before 3.9 reads the bounds of a loop by ``int``, which numpy 2.5 refuses of an array of one element."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if version() < (3, 9):
    read_bounds_by_item()

INTEGERS = [Integer(bits=bits) for bits in range(2, 9)]
BACKEND, FOR_PRODUCTS = Triton(), Triton(by_column=True)
TILES = (
    TENSOR,
    Tile(1, -1),
    Tile(-1, 1),
    *(Tile(1, wide) for wide in (16, 32, 128)),
    *(Tile(side, side) for side in (16, 32, 128)),
)
RULES = (*SCALES, Fp32(margin=1, eps=1e-12), Fp32Decode(), Fp32Decode(ceil_pow2=True), TwoLevel(block=E5M2), Unit())
NVFP4 = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())
MXFP8 = OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())


def noise(number: int = 0, *, row_offset: int = 0, transposed: bool = False) -> Noise:
    return Noise(key=step_key(base_key(1, "layers.0", 2), number), row_offset=row_offset, transposed=transposed)


def assert_same(spec: OperandSpec, x: Tensor, source: Noise | None) -> None:
    ours, theirs = quantize_by(BACKEND, x, spec, noise=source), quantize(x, spec, noise=source)
    assert same_codes(ours, theirs), (str(spec), x.dtype, x.shape, x.stride())
    assert same_operand(BACKEND.operand(ours), theirs), (str(spec), x.dtype, x.shape)
    prepared = BACKEND.cast(x, Cast(spec=spec, noise=source, codes=False))
    if isinstance(prepared, Prepared):
        assert same_operand((prepared.matrix, prepared.factor), theirs), (str(spec), x.dtype, x.shape, x.stride())
        assert prepared.matrix.is_contiguous()
    else:
        assert x.numel() == 0 or operand(theirs)[0].dtype == torch.float32, str(spec)


def same_operand(ours: tuple[Tensor, Tensor | None], q: Quantized) -> bool:
    """That of the reference; powers of two per tile are applied where the reference takes them relative to one."""
    theirs = operand(q)
    of_tiles = q.spec.scale.levels == 1 and (q.spec.tile != TENSOR or q.spec.scale.format is not None)
    if of_tiles and theirs[1] is not None:
        return ours[1] is None and equal(ours[0], dequantize(q, torch.bfloat16))
    return all(map(equal, ours, theirs))


LONG = pytest.mark.long
TWO_DTYPES = [d if d != torch.float16 else pytest.param(d, marks=LONG) for d in DTYPES]


@pytest.mark.parametrize("format", [*FORMATS, *FEW_BITS, *INTEGERS], ids=str)
def test_every_tie(format: NumberFormat) -> None:
    assert_every_tie(BACKEND, format)


@pytest.mark.parametrize("format", [*USUAL, INT8, *(pytest.param(f, marks=LONG) for f in (INT4, INTEGERS[0]))], ids=str)
def test_codes_scales_and_operands(format: NumberFormat) -> None:
    """A sample of all combinations, another one for each format."""
    rng = random.Random(str(format))
    number = 0
    for tile, rule in itertools.product(TILES, RULES):
        if (rule.levels == 0) != (tile == TENSOR and rng.random() < 0.2) or (rule.levels == 2 and tile == TENSOR):
            continue
        if rng.random() < 0.8:
            continue
        number += 1
        rounding = rng.choice(list(Rounding))
        spec = OperandSpec(format=format, tile=tile, scale=rule, rounding=rounding)
        source = None
        if rounding is Rounding.STOCHASTIC:
            offset = rng.choice([0, 5, 2**32 - 3, 2**40])
            source = noise(number, row_offset=offset, transposed=rng.random() < 0.5)
        samples = list(matrices(rng.choice(SHAPES), rng.choice(DTYPES), number))
        assert_same(spec, samples[number % len(samples)], source)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [OperandSpec(format=E4M3), MXFP8, NVFP4, replace(NVFP4, tile=Tile(16, 16))], ids=str)
def test_edge_values(spec: OperandSpec, dtype: torch.dtype) -> None:
    for x in matrices((33, 50), dtype, 3):
        assert_same(spec, x, None)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_amax(tile: Tile) -> None:
    for number, dtype in enumerate(DTYPES):
        for x in list(matrices((130, 65), dtype, number))[number::3]:
            assert equal(BACKEND.amax(x, tile), amax(x, tile)), (dtype, x.stride())


def test_an_amax_from_elsewhere() -> None:
    x = torch.randn(40, 70)
    for spec in (OperandSpec(format=E4M3, amax=Delayed()), MXFP8, NVFP4, replace(MXFP8, tile=Tile(1, -1))):
        count = 1 if spec.scale.levels == 2 else spec.tile.grid(40, 70)[0] * spec.tile.grid(40, 70)[1]
        given = torch.rand(count) * 4
        ours, theirs = quantize_by(BACKEND, x, spec, amax=given), quantize(x, spec, amax=given)
        assert same_codes(ours, theirs), spec
    with pytest.raises(ValueError, match="scales by an earlier amax"):
        quantize_by(BACKEND, x, OperandSpec(format=E4M3, amax=Delayed()))


@pytest.mark.parametrize("size", [2, 16, 128])
def test_hadamard(size: int) -> None:
    transform = Hadamard(size=size, signs=3)
    for number, shape in enumerate(SHAPES):
        dtype = DTYPES[(number + size) % 3]
        x = list(matrices(shape, dtype, size))[number % 11]
        assert equal(BACKEND.transformed(transform, x, left=True), transform.left(x)), (shape, dtype, x.stride())


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hadamard_in_front_of_the_column_pass(dtype: torch.dtype, stochastic: bool) -> None:
    """What wgrad reads of a tensor in NVFP4 and MXFP4: the transformed matrix is never written."""
    mxfp4 = OperandSpec(format=E2M1, tile=Tile(1, 32), scale=PowerOfTwo())
    rounding = Rounding.STOCHASTIC if stochastic else Rounding.NEAREST
    for number, (base, size) in enumerate([(NVFP4, 16), (NVFP4, 64), (mxfp4, 32)]):
        transform, spec = Hadamard(size=size, signs="te" if size == 16 else 0), replace(base, rounding=rounding)
        source = noise(row_offset=7, transposed=True) if stochastic else None
        for x in list(matrices((100, 33), dtype, number))[number::5]:
            ours = quantize_fused(x.mT, spec, noise=source, transform=transform)
            theirs = quantize(transform.left(x.mT), spec, noise=source)
            assert same_codes(ours, theirs), (str(spec), x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signs_of_a_step_in_front_of_the_transform(dtype: torch.dtype) -> None:
    key = step_key(base_key(1, "layers.0", 4), 5)
    for number, (spec, size) in enumerate([(NVFP4, 16), (MXFP8, 32), (NVFP4, -1)]):
        transform = drawn(Hadamard(size=size, signs="step"), key)
        for x in list(matrices((64, 33), dtype, number))[number::5]:
            want = transform.left(x.mT)
            assert equal(BACKEND.transformed(transform, x.mT, left=True), want)
            ours = BACKEND.cast(x.mT, Cast(spec=spec, transform=transform))
            assert isinstance(ours, Quantized)
            assert same_codes(ours, quantize(want, spec)), (str(spec), size, dtype)


@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
def test_rows_and_columns_in_one_read(dtype: torch.dtype) -> None:
    """Both directions of x, and of silu(gate) * up, as two reads have them."""
    fp8 = OperandSpec(format=E4M3, tile=Tile(1, 128), scale=Fp32(pow2=True, input_max=True))
    mxfp4 = OperandSpec(format=E2M1, tile=Tile(1, 32), scale=PowerOfTwo(), rounding=Rounding.TRUNCATE)
    for number, (spec, shape) in enumerate(
        [(MXFP8, (130, 65)), (fp8, (33, 130)), (mxfp4, (70, 35)), (replace(MXFP8, tile=Tile(1, 16)), (17, 40))]
    ):
        samples = list(matrices(shape, dtype, number))
        for x in (*samples[number::4], samples[6].mT):
            pair = quantize_both(x, spec)
            assert pair is not None
            for ours, of in zip(pair, (x, x.mT), strict=True):
                assert same_codes(ours, quantize(of, spec)), (str(spec), x.stride())
        hidden = Hidden(samples[0], samples[1], torch.rand(shape[0]) + 0.5, 0)
        pair = quantize_both(hidden, spec)
        assert pair is not None
        for ours, h in zip(pair, (hidden, hidden.mT), strict=True):
            assert same_codes(ours, quantize(h.computed(), spec)), str(spec)
    random = replace(MXFP8, rounding=Rounding.STOCHASTIC)
    delayed = OperandSpec(format=E4M3, amax=Delayed())
    for spec in (random, delayed, replace(MXFP8, tile=Tile(32, 32)), replace(NVFP4, tile=Tile(16, 16))):
        assert quantize_both(torch.ones(40, 40), spec) is None


def test_scales_of_parts_lie_by_column_if_told() -> None:
    """The same codes and scales; other scales lie as they do."""
    block = OperandSpec(format=E4M3, tile=Tile(1, 128), scale=Fp32())
    for spec, told in ((block, True), (replace(block, tile=Tile(1, -1)), False), (MXFP8, False)):
        for shape in ((130, 300), (33, 128)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
            pair = quantize_both(x, spec, by_column=True)
            assert pair is not None
            for ours, of in zip((*pair, quantize_fused(x, spec, by_column=True)), (x, x.mT, x), strict=True):
                assert isinstance(ours, Quantized)
                theirs = quantize(of, spec)
                assert same_codes(ours, theirs), str(spec)
                assert equal(BACKEND.operand(ours)[0], BACKEND.operand(theirs)[0]), str(spec)
                assert ours.scales.stride() == ((1, len(of)) if told else (ours.scales.shape[1], 1)), str(spec)


def same(ours: Quantized | Prepared, q: Quantized) -> bool:
    """Codes, or values, as the reference has them."""
    if isinstance(ours, Quantized):
        return same_codes(ours, q) and not ours.transposed
    return same_operand((ours.matrix, ours.factor), q) and ours.matrix.is_contiguous()


@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
def test_one_scale_rows_and_two_levels_in_both_directions(dtype: torch.dtype) -> None:
    """Codes and values of x and of its transpose from one read; amaxes of their own, or the tensor's given; noise."""
    e4m3, mxfp4 = OperandSpec(format=E4M3), replace(MXFP8, format=E2M1)
    cases = [
        (e4m3, None),
        (replace(e4m3, rounding=Rounding.STOCHASTIC), None),
        (replace(e4m3, format=E5M2, amax=Delayed()), 3.0),
        (OperandSpec(format=E4M3, scale=Unit()), None),
        (replace(e4m3, scale=PowerOfTwo()), 3.0),
        (replace(e4m3, tile=Tile(1, -1), scale=Fp32(pow2=True)), None),
        (replace(e4m3, tile=Tile(1, -1)), None),
        (NVFP4, None),
        (replace(NVFP4, rounding=Rounding.STOCHASTIC), 3.0),
        (replace(mxfp4, rounding=Rounding.STOCHASTIC), None),
        (MXFP8, None),
    ]
    for number, (spec, given) in enumerate(cases):
        x = list(matrices(((130, 65), (33, 150), (64, 64))[number % 3], dtype, number))[(0, 4, 6, 8)[number % 4]]
        amax = None if given is None else torch.tensor([given])
        noises = None
        if spec.rounding is Rounding.STOCHASTIC:
            noises = noise(1, row_offset=2**32 - 3), noise(2, row_offset=2**32 - 3, transposed=True)
        theirs = [
            quantize(of, spec, amax=amax, noise=source)
            for of, source in zip((x, x.mT), noises or (None, None), strict=True)
        ]
        for values in (False, True):
            pair = quantize_both(x, spec, amax=amax, noise=noises, values=values)
            if pair is None:
                assert values
                assert all(operand(q)[0].dtype == torch.float32 for q in theirs), str(spec)
                continue
            assert all(map(same, pair, theirs)), (str(spec), values, x.stride())
    with pytest.raises(ValueError, match="takes no amax but that of the tensor"):
        quantize_both(torch.ones(4, 4), MXFP8, amax=torch.ones(1))


def test_an_amax_is_noted_where_another_one_scales() -> None:
    """As delayed scaling wants it: the largest of what was there and the tensor's, NaN above all."""
    for number, (spec, shape) in enumerate(
        [(OperandSpec(format=E4M3, amax=Delayed()), (130, 70)), (NVFP4, (70, 70)), (NVFP4, (1, 3))]
    ):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        top, given = float(x.abs().max()), torch.tensor([2.0])
        for before, value, after in ((0.0, None, top), (99.0, None, 99.0), (1.0, torch.nan, torch.nan)):
            x[0, 1] = x[0, 1] if value is None else value
            theirs = quantize(x, spec, amax=given)
            other = quantize(x.mT, spec, amax=given)
            for both, codes in ((False, True), (False, False), (True, True), (True, False)):
                note = torch.tensor([before])
                made: tuple[Quantized | Prepared, ...] | None
                if both:
                    made = BACKEND.cast_both(x, Cast(spec=spec, amax=given, note=note, codes=codes))
                else:
                    made = (BACKEND.cast(x, Cast(spec=spec, amax=given, note=note, codes=codes)),)
                assert made is not None
                assert all(map(same, made, (theirs, other)))
                assert equal(note, torch.tensor([after])), (before, value, both, codes)
    for spec in (MXFP8, OperandSpec(format=E4M3)):
        with pytest.raises(ValueError, match="an amax is noted where"):
            quantize_fused(x, spec, note=torch.zeros(1))


@pytest.mark.parametrize("size", [CANDIDATES[0], *(pytest.param(c, marks=LONG) for c in CANDIDATES[1:])], ids=str)
def test_blocks_change_no_bits(size: BlockSize) -> None:
    row = replace(MXFP8, tile=Tile(1, -1))
    for spec, transform in ((MXFP8, None), (NVFP4, Hadamard()), (OperandSpec(format=E4M3), None), (row, None)):
        x = torch.randn(70, 150, generator=torch.Generator().manual_seed(size.elements))
        for of in (x, x.mT):
            plan = QuantizePlan(of, -1, spec, False, NO_NOISE, transform, size, values=False)
            y = of if transform is None else transform.left(of)
            made = plan.run(of, None, None, None, NO_NOISE, None)
            assert same(made, quantize(y, spec)), (str(spec), of.stride())
        both = BothPlan(x, -1, spec, False, NO_NOISE, size, values=False)
        theirs = [quantize(of, spec) for of in (x, x.mT)]
        assert all(map(same, both.run(x, None, None, None, (NO_NOISE, NO_NOISE), None), theirs)), str(spec)


@pytest.mark.parametrize("transposed", [False, True])
def test_kernels_make_noise_of_its_parts(transposed: bool) -> None:
    spec, x = replace(NVFP4, rounding=Rounding.STOCHASTIC), torch.randn(40, 70)
    for step, first, rows_of_a_sample in ((2**33 + 5, 2**31, 6), (0, 0, 1), (7, 2**40, 0)):
        source = Noise.of(
            base=base_key(3, "layers.1", 4),
            step=torch.tensor(step),
            first_sample=torch.tensor(first),
            rows_of_a_sample=rows_of_a_sample,
            transposed=transposed,
        )
        assert same_codes(quantize_fused(x, spec, noise=source), quantize(x, spec, noise=source))


def test_values_down_to_the_least_that_bf16_holds() -> None:
    """Powers of two are applied as they are, where the reference takes them relative to the largest: same products."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(24, 64, generator=generator) * 2.0 ** torch.randint(-20, 20, (24, 1)) for _ in range(2))
    cast = Cast(spec=MXFP8, codes=False)
    sides = [BACKEND.cast(x, cast) for x in (a, b)]
    exact = [quantize(x, MXFP8) for x in (a, b)]
    for dtype in (torch.float32, torch.bfloat16):
        ours = EmulatedOnGpu(BACKEND).gemm(*sides, bias=None, dtype=dtype)
        assert equal(ours, REFERENCE.product.gemm(*exact, bias=None, dtype=dtype))
    tiny = torch.full((1, 32), 2.0**-120)
    tiny[0, 0], tiny[0, 1] = 2.0**-131, 2.0**-140
    made = BACKEND.cast(tiny, cast)
    assert isinstance(made, Prepared)
    assert equal(made.matrix, dequantize(quantize(tiny, MXFP8), torch.bfloat16))


@pytest.mark.parametrize("spec", [OperandSpec(format=E4M3), MXFP8, NVFP4], ids=str)
def test_rows_of_the_benchmarked_shape(spec: OperandSpec) -> None:
    """32 of the 8192 x 704 activations, along their rows; and 32 of their columns, along the tokens."""
    x = (torch.randn(8192, 704, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    given = amax(x, TENSOR) if spec.tile == TENSOR or spec.scale.levels == 2 else None
    for part in (x[:32], x.mT[:16, :1024]):
        ours, theirs = quantize_by(BACKEND, part, spec, amax=given), quantize(part, spec, amax=given)
        assert same_codes(ours, theirs)
        assert equal(tile_amax(part, spec.tile), amax(part, spec.tile))


def test_the_output_of_a_product_is_rounded_once() -> None:
    """y * a * b + bias in FP32, in this order; odd sizes and values that are not finite included."""
    generator = torch.Generator().manual_seed(5)
    y = torch.randn(37, 129, generator=generator) * 10.0 ** torch.randint(-30, 30, (37, 1), generator=generator)
    y[0, :4] = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    factors = torch.tensor(1 / 3), torch.tensor(0.7)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for used in (factors, factors[:1]):
            for bias in (None, torch.randn(129, generator=generator).bfloat16()):
                expected = y
                for factor in used:
                    expected = expected * factor
                expected = (expected if bias is None else expected + bias).to(dtype)
                assert torch.equal(scaled_output(y, used, bias, dtype).nan_to_num(7.0), expected.nan_to_num(7.0))


def test_swizzled_scales() -> None:
    scales = torch.randint(0, 256, (200, 9), dtype=torch.uint8)
    padded = torch.nn.functional.pad(scales, (0, 3, 0, 56))
    assert torch.equal(swizzled(scales), padded.view(2, 4, 32, 3, 4).permute(0, 3, 2, 1, 4).flatten())
    for rows, cols in ((1, 1), (128, 4), (130, 9), (0, 4)):
        scales = torch.randint(0, 256, (cols, rows), dtype=torch.uint8).mT
        assert torch.equal(swizzled(scales), swizzle(scales))


@pytest.mark.parametrize("spec", [MXFP8, NVFP4], ids=str)
def test_native_products_have_their_scales_from_the_kernel(spec: OperandSpec) -> None:
    q = quantize_by(BACKEND, torch.randn(130, 144), spec)
    kind = Granularity.MX if spec is MXFP8 else Granularity.NV
    side = scaled_mm_operands.Side(kind, spec, spec.format, (130, 144), 130, 160)
    plain = swizzle(scaled_mm_operands._per_vector(q, q.scales, 130, 160, spec.tile.inner))
    assert torch.equal(side.scales(q)[0].view(torch.uint8), plain)
    with recording((10, 0)) as launches:
        side.scales(q)
    assert [launch.kernel.fn.__name__ for launch in launches] == ["swizzle_kernel"]


def test_chosen_by_name_and_refused_with_reasons() -> None:
    gemm, cpu = GemmSpec(a=MXFP8, b=MXFP8), torch.device("cpu")
    assert str(choose(gemm, (64, 64, 64), cpu, "triton")) == "triton"
    for spec, reason in (
        (replace(MXFP8, tile=Tile(3, 5)), "no kernel for tiles of 3x5"),
        (replace(MXFP8, tile=Tile(256, 256)), "no kernel for tiles of 256x256"),
        (replace(NVFP4, scale=TwoLevel(outer=ROW)), "no kernel for scales by e4m3.fp32row"),
    ):
        with pytest.raises(ValueError, match=reason):
            choose(GemmSpec(a=spec), (64, 64, 64), cpu, "triton")
    assert BACKEND.why_not(gemm, torch.device("meta")) == "the model is on meta"
    assert equal(hadamard(torch.ones(2, 16), Hadamard()), Hadamard().left(torch.ones(2, 16)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48, bias=False), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.up(x).relu())
        return y


def one_step(recipe: str, backend: str, **arguments: Any) -> tuple[str, list[Tensor]]:
    """plan.txt, and the losses and gradients of a step and the loss after it, of a model of two blocks."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])}).to(torch.bfloat16)
    plan = apply(load(recipe, arguments), model, backend=backend)
    x = torch.randn(2, 24, 32).bfloat16()
    seen = []
    for step in range(2):
        plan.begin_step(step, 0, 2)
        h = x
        for block in model["layers"]:
            h = block(h)
        loss = h.float().square().mean()
        seen.append(loss.detach())
        if step == 0:
            loss.backward()
            plan.end_step()
            for parameter in model.parameters():
                assert parameter.grad is not None
                seen.append(parameter.grad)
                parameter.data -= 0.1 * parameter.grad
    return str(plan), seen


@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [
        ("fp8_delayed", {}),
        ("fp8_block", {"block": 16}),
        ("mxfp8", {}),
        ("nvfp4", {"keep_last": 0, "bf16_forward": 0}),
    ],
)
def test_a_model_trains_with_it_and_the_plan_says_so(recipe: str, arguments: dict[str, Any]) -> None:
    plan, ours = one_step(recipe, "triton", **arguments)
    _, theirs = one_step(recipe, "reference", **arguments)
    assert plan.count("[triton]") == 3 * 4
    assert all(map(equal, ours, theirs))


def test_adamw_over_narrow_states() -> None:
    """Against plain torch. Square roots are IEEE's, which those of torch on a CPU with MKL are not."""
    rows, cols, number = 21, 90, 0
    e4m3 = OperandSpec(format=E4M3, tile=Tile(1, 32), scale=Fp32Decode(floor=1e-30))
    whole = replace(e4m3, format=E5M2, tile=TENSOR)
    generator = torch.Generator().manual_seed(0)
    kinds: list[OperandSpec | torch.dtype] = [torch.float32, torch.bfloat16, e4m3, whole]
    for first, second in [(2, 2), (3, 2), (0, 3), (1, 0)]:
        for stochastic in (False, True):
            number += 1
            specs = [kinds[first], kinds[second], (torch.float32, torch.bfloat16, whole)[number % 3]]
            values = [torch.randn(rows, cols, generator=generator) for _ in range(4)]
            values[1] = values[1].square()
            values[1][0, :5] = torch.tensor([0.0, 1e-30, 1e-44, 1e30, 0.0])
            grad = values[3].to(DTYPES[number % 2])
            grad[2, :3] = torch.tensor([0.0, -0.0, 1e-20])
            rounding = Rounding.STOCHASTIC if stochastic else Rounding.NEAREST
            states = [
                made(value, spec, rounding, slot)
                for slot, (value, spec) in enumerate(zip(values[:3], specs, strict=True))
            ]
            before = [decoded(state) for state in states]
            weight = torch.zeros(rows, cols, dtype=DTYPES[number % 2]) if states[2].spec is not None else None
            step = Step(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, decay=0.1 * (number % 2), t=number)
            expected = updated(grad.float(), before, step)
            tops = adamw_amaxes(grad, *states, step)
            for top, state, value in zip(tops, states, expected, strict=True):
                assert float(top) == (float(value.abs().max()) if state.per_tensor else 0.0)
            adamw(grad, *states, step, weight=weight, amaxes=tops, row_offset=3)
            for slot, (state, value) in enumerate(zip(states, expected, strict=True)):
                anew = made(value, specs[slot], rounding, slot, row_offset=3)
                assert equal(state.values, anew.values), (number, slot)
                assert equal(state.scales, anew.scales)
            if weight is not None:
                assert equal(weight, decoded(states[2]).to(weight.dtype))
    with pytest.raises(ValueError, match="no kernel for states"):
        StateMatrix(values=grad, spec=replace(e4m3, tile=Tile(1, 48))).storage()


UPDATED: list[tuple[object, torch.dtype]] = [
    ("fp32", torch.bfloat16),
    ("fp8", torch.float32),
    ("fp8_tensor", torch.bfloat16),
    ("pure_bf16_sr", torch.bfloat16),
    ("e5m2/tensor/sr", torch.float32),
    ({"m": "e4m3/64/sr", "v": "bf16/sr", "master": "e4m3/tensor/sr"}, torch.float32),
    ({"m": "bf16", "v": "e5m2/128", "master": "e3m4/32"}, torch.bfloat16),
]


@pytest.mark.parametrize(("variant", "dtype"), UPDATED, ids=str)
def test_updates_are_those_of_plain_torch(variant: object, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uneven rows, a vector, a rank without rows; gradients that overflow, that are multiplied, that are left out."""
    monkeypatch.setattr(test_updates, "SHAPES", [(5, 150), (3,), (0, 9)])
    both = [make(variant, dtype, backend) for backend in ("triton", "reference")]
    assert [str(optimizer.choices[0]) for optimizer in both] == ["triton", "reference"]
    nan = torch.nan
    for step, (bad, gate) in enumerate([(None, None), (3e38, None), (None, [0.37, 1.0]), (nan, [nan, 0.0])]):
        for optimizer in both:
            set_grads(params_of(optimizer), step, bad)
            optimizer.step(gate=None if gate is None else torch.tensor(gate))
        assert same_states(*map(state_of, both)) == [], step


def test_updates_that_the_kernel_lacks() -> None:
    for variant, lacking in (
        ("dynamic8", "dynamic/256"),
        ("coat", "expanded/128"),
        ("pure_bf16_kahan", "bf16/kahan"),
        ("fp16/64", "fp16/64"),
        ("e4m3/100", "e4m3/100"),
    ):
        assert f"(not triton: no kernel for {lacking}" in str(make(variant, backend="triton").choices[0])
    assert "beta1=0.5" in str(make("fp8", backend="triton", betas=(0.5, 0.9)).choices[0])
    assert str(choose_update(AdamW(), torch.device("meta"))) == "reference"
    asked = choose_update(AdamW(), torch.device("meta"), "triton")
    assert str(asked) == "reference (not triton: the parameters are on meta)"
    assert "triton" not in str(choose_update(AdamW(), CPU))


def made(
    value: Tensor, spec: OperandSpec | torch.dtype, rounding: Rounding, slot: int, row_offset: int = 0
) -> StateMatrix:
    """A state that holds ``value``."""
    source = noise(slot, row_offset=row_offset) if rounding is Rounding.STOCHASTIC else None
    key = source.key if source is not None else None
    if isinstance(spec, OperandSpec):
        spec = replace(spec, rounding=rounding)
        q = quantize(value, spec, noise=source)
        return StateMatrix(values=q.codes, scales=q.scales, spec=spec, key=key)
    if spec == torch.float32:
        return StateMatrix(values=value.clone())
    rounded = BF16.round(value, source.uniform(*value.shape) if source is not None else None)
    return StateMatrix(values=rounded.to(spec), rounding=rounding, key=key)


def decoded(state: StateMatrix) -> Tensor:
    if state.spec is None:
        return state.values.float()
    assert state.scales is not None
    rows, cols = state.values.shape
    return dequantize(
        Quantized(codes=state.values, scales=state.scales, tensor_scale=None, shape=(rows, cols), spec=state.spec)
    )


def updated(grad: Tensor, before: list[Tensor], step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW as the kernel's docstring has it; a fused multiply-add by way of float64, which here rounds alike."""
    m, v, w = before
    s = {name: torch.tensor(value) for name, value in step.scalars().items()}
    m = (s["lerp"].double() * (grad - m).double() + m.double()).float()
    v = ((s["square"] * grad).double() * grad.double() + (v * s["beta2"]).double()).float()
    root = v.double().sqrt().float() / s["correction"] + s["eps"]
    return m, v, w * s["decay"] + (s["step"] * m) / root


@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=() if d == torch.bfloat16 else pytest.mark.long) for d in DTYPES], ids=str
)
def test_swiglu_in_front_of_a_cast(dtype: torch.dtype) -> None:
    """h / d and the gradients of gate and up, in both directions, as if they had been written: NaN and all."""
    generator = torch.Generator().manual_seed(1)
    gate, up, dh = ((torch.randn(21, 70, generator=generator) * 3).to(dtype) for _ in range(3))
    up[3], gate[:, 5], gate[1, 1], up[:, 7], gate[2, 2], dh[4, 4] = 0.0, -200.0, 95.0, 100.0, -89.5, 1e-40
    gate[6, 6], up[7, 8], gate[9, 9], dh[10, 10] = torch.nan, torch.nan, torch.inf, torch.inf
    tokens, channels = (tile_amax(Hidden(gate, up), tile).flatten() for tile in (Tile(1, -1), Tile(-1, 1)))
    h = Hidden(gate, up).computed()
    assert equal(tokens, amax(h, Tile(1, -1)).flatten())
    assert equal(channels, amax(h, Tile(-1, 1)).flatten())
    delayed = OperandSpec(format=E4M3, amax=Delayed())
    cases: list[tuple[OperandSpec, Hadamard | None]] = [
        (replace(MXFP8, rounding=Rounding.STOCHASTIC), None),
        (replace(NVFP4, rounding=Rounding.STOCHASTIC), Hadamard()),
        (NVFP4, None),
        (replace(MXFP8, tile=Tile(1, -1)), None),
        (OperandSpec(format=E5M2), None),
        (delayed, None),
    ]
    for number, (spec, transform) in enumerate(cases):
        along = (number + DTYPES.index(dtype)) % 2
        amaxes = (tokens, channels)[along]
        d = amaxes.where((amaxes > 0) & (amaxes < torch.inf), 1.0)
        hidden = Hidden(gate, up, d, along)
        gradients = Gradients(dh, gate, up, d if number % 3 else None, along)
        for transposed in (False, True):
            random = spec.rounding is Rounding.STOCHASTIC
            sources = [noise(slot, row_offset=9, transposed=transposed) if random else None for slot in (5, 6)]
            given = torch.tensor(3.0) if spec is delayed else None
            x, dx = (hidden.mT, gradients.mT) if transposed else (hidden, gradients)
            ours = [quantize_fused(x, spec, amax=given, noise=sources[0], transform=transform)]
            pair = None if given is None else (given, given / 2)
            noises = None if not random else (sources[0], sources[1])
            ours += quantize_gradients(dx, spec, amaxes=pair, noises=noises, transform=transform)  # type: ignore[arg-type]
            plain = [x.computed(), *dx.computed()]
            plain = plain if transform is None else [transform.left(y) for y in plain]
            tops = [given, *(pair or (None, None))]
            for one, y, top, source in zip(ours, plain, tops, (sources[0], *sources), strict=True):
                theirs = quantize(y, spec, amax=top, noise=source)
                assert same_codes(one, theirs), (str(spec), along, transposed)
            for one, y in zip(gradient_amaxes(dx, spec.tile, transform), plain[1:], strict=True):
                assert equal(one, amax(y, spec.tile))


class MLP(nn.Module):
    gated_activation = "silu"

    def __init__(self, *, bias: bool, width: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def llama(kind: str, dtype: torch.dtype) -> nn.Module:
    """A block of ours, one of `transformers`, or an MLP with a bias."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    if kind == "ours":
        config = LlamaConfig(name="one", vocab_size=64, num_layers=1, num_heads=2, num_kv_heads=1, **sizes)
        return Llama(config).to(dtype)
    if kind == "transformers":
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 64}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).to(dtype)
    layers = nn.ModuleList([nn.ModuleDict({"mlp": MLP(bias=True)})])
    return nn.ModuleDict({"embed": nn.Embedding(64, 32), "layers": layers}).to(dtype)


def trained(kind: str, dtype: torch.dtype, backend: str, args: dict[str, Any]) -> tuple[str, list[Tensor]]:
    """plan.txt; logits, all gradients and all that is remembered, of two steps."""
    model = llama(kind, dtype)
    plan = apply(load("smooth_swiglu", args), model, backend=backend)
    seen = []
    for step in range(2):
        plan.begin_step(step, 2 * step, 2)
        tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(step))
        if kind == "mlp":
            y = model["layers"][0]["mlp"](model["embed"](tokens))  # type: ignore[index,operator]
        else:
            y = model(tokens) if kind == "ours" else model(tokens).logits
        seen.append(y.detach())
        (y.float() * torch.linspace(-1, 1, y.shape[-1])).square().mean().backward()
        plan.end_step()
        for parameter in model.parameters():
            assert parameter.grad is not None
            seen.append(parameter.grad.clone())
            parameter.data -= 0.5 * parameter.grad
            parameter.grad = None
    return str(plan), [*seen, *(tensor.clone() for tensor in plan.state_tensors().values())]


FUSED: list[tuple[str, str, str, dict[str, Any], torch.dtype]] = [
    ("ours", "fp8_delayed", "channel", {}, torch.bfloat16),
    ("transformers", "fp8_current", "channel", {}, torch.float32),
    ("mlp", "fp8_delayed", "token", {}, torch.float32),
    ("mlp", "mxfp8", "channel", {}, torch.float32),
    ("mlp", "nvfp4", "token", {"keep_last": 0, "bf16_forward": 0}, torch.float32),
    ("mlp", "fp8_rowwise", "channel", {}, torch.bfloat16),
    ("mlp", "fp8_block", "token", {"block": 16}, torch.bfloat16),
    ("mlp", "mxfp4", "channel", {"keep_last": 0}, torch.float16),
]


@pytest.mark.parametrize(
    ("kind", "base", "form", "more", "dtype"),
    [pytest.param(*case, marks=pytest.mark.long if case in FUSED[1:3] + FUSED[5:] else ()) for case in FUSED],
    ids=str,
)
def test_smooth_swiglu_is_fused(kind: str, base: str, form: str, more: dict[str, Any], dtype: torch.dtype) -> None:
    """Bit for bit what plain torch computes between plain linears; and near to the model's own SwiGLU."""
    args = {"base": base, "base_args": more, "form": form}
    plan, ours = trained(kind, dtype, "triton", args)
    plain, theirs = trained(kind, dtype, "reference", args | {"fuse": "always"})
    assert plan.count("silu(gate) * up: [triton, fused with the quantization of h, dgate and dup]") == 1
    assert plain.count("silu(gate) * up: [plain torch, as kernels would (not fused: reference quantizes") == 1
    assert len(ours) == len(theirs)
    assert all(map(equal, ours, theirs))
    _, own = trained(kind, dtype, "reference", args)
    assert (ours[0] - own[0]).norm() <= (1e-6 if dtype == torch.float32 else 0.05) * own[0].norm()


@pytest.mark.long
def test_a_fused_mlp_writes_scales_as_native_products_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of h, dgate and dup in blocks are copied by nobody; outputs and gradients are those of the reference."""
    blocks = scaled_mm_operands._block_scales

    def run(quantizers: tuple[Quantizer, ...], copied: set[bool]) -> list[Tensor]:
        torch.manual_seed(0)
        mlp = MLP(bias=False, width=256, hidden=256)
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": mlp})])}).bfloat16()

        def noting(q: Quantized, *sizes: int) -> Tensor:
            copied.add(q.spec.tile.outer == 1)
            return blocks(q, *sizes)

        with monkeypatch.context() as patch, pretend(patch, 90, quantizers):
            patch.setattr(scaled_mm_operands, "_block_scales", noting)
            args = {"base": "fp8_block", "form": "token", "fuse": "always"}
            plan = apply(load("smooth_swiglu", args), model, tokens=256)
            assert str(plan).count("block-wise FP8 of sm_90") == 9
            assert ("[triton, fused" in str(plan)) == (quantizers == (FOR_PRODUCTS,))
            plan.begin_step(0, 0, 1)
            x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
            y = mlp(x)
            y.backward(torch.sin(100 * y.detach()))
        return [y.detach(), x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    copied: tuple[set[bool], set[bool]] = set(), set()
    ours, theirs = run((FOR_PRODUCTS,), copied[0]), run((REFERENCE.quantizer,), copied[1])
    assert all(map(torch.equal, ours, theirs))
    assert copied == ({False}, {False, True})


def test_a_fused_mlp_keeps_the_laws_of_its_linears() -> None:
    """Recompute, copies, probes, autocast, phases of a schedule, evaluation: as in plain torch, bit for bit."""
    phase = [{"steps": [1, 2], "gemms": ["fprop"]}]
    results: dict[str, list[list[Tensor]]] = {"triton": [], "reference": []}
    for backend, (way, schedule) in itertools.product(
        results, [("", ()), ("recompute", ()), ("probe", ()), ("autocast", ()), ("", phase)]
    ):
        model = llama("mlp", torch.float32 if way == "autocast" else torch.bfloat16)
        plan = apply(load("smooth_swiglu", {"fuse": "always"}, schedule), model, backend=backend)
        mlp = model["layers"][0]["mlp"]  # type: ignore[index]
        probe = Probe(plan, every=1)
        out = []
        for step in range(2):
            plan.begin_step(step, 0, 2)
            x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(step)).to(mlp.up_proj.weight.dtype)
            x.requires_grad_()
            with probe.watching() if way == "probe" else nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
                    y = checkpoint(mlp, x, use_reentrant=False) if way == "recompute" else mlp(x)
                y.float().square().mean().backward()
            plan.end_step()
            out += [y.detach(), x.grad, *(parameter.grad.clone() for parameter in mlp.parameters())]
        results[backend].append([*out, *(tensor.clone() for tensor in plan.state_tensors().values())])
        mlp.eval()
        before = [tensor.clone() for tensor in plan.state_tensors().values()]
        with torch.no_grad():
            results[backend][-1].append(mlp(x))
            other = copy.deepcopy(mlp)
            assert torch.equal(other(x), mlp(x))
            assert other.forward.__self__.mlp is other is not mlp
            with plan.high_precision():
                plain = mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
                assert torch.equal(mlp(x), plain)
        assert all(map(torch.equal, before, plan.state_tensors().values()))
    ours, theirs = results.values()
    for one, other in zip(ours, theirs, strict=True):
        assert all(map(equal, one, other))
    for number in (1, 2):  # neither recompute nor who looks on changes anything
        assert all(map(equal, ours[0][:-1], ours[number][:-1]))
    assert not all(map(equal, ours[0], ours[4]))


def test_what_is_not_fused_says_why() -> None:
    """And leaves the model's own SwiGLU where it was."""
    for more, reason in (
        ({"base": "fp8_rowwise", "base_args": {"wgrad_high_precision": True}}, "wgrad.a is in high precision"),
        ({"base_args": {"keep_paths": [".*gate_proj"]}}, None),
        ({"fuse": "never"}, None),
    ):
        plan, ours = trained("mlp", torch.bfloat16, "triton", more)
        _, theirs = trained("mlp", torch.bfloat16, "reference", more | {"fuse": "never"})
        assert (f"[as the model has it (not fused: {reason})]" in plan) == (reason is not None)
        assert ("silu(gate) * up" in plan) == (reason is not None)
        assert all(map(equal, ours, theirs))
    gelu = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": Gelu(bias=False)})])})
    unnamed = "the model does not name its activation: no gated_activation of the forward pass of Gelu"
    assert f"(not fused: {unnamed})" in str(apply(load("smooth_swiglu", {}), gelu, backend="triton"))
    other = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": Gelu(bias=False)})])})
    with pytest.raises(ValueError, match=rf"layers\.0\.mlp: {unnamed}"):
        apply(load("smooth_swiglu", {"fuse": "always"}), other)


class Gelu(MLP):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(torch.nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x))
        return y


def test_siblings_share_what_delayed_scaling_makes_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told the same amaxes, also after one has read something else; what is remembered is the reference's."""
    read: list[int] = []
    both, one = Triton.cast_both, Triton.cast
    monkeypatch.setattr(Triton, "cast_both", lambda self, x, cast: read.append(len(x)) or both(self, x, cast))
    monkeypatch.setattr(Triton, "cast", lambda self, x, cast: read.append(len(x)) or one(self, x, cast))

    def run(backend: str) -> list[Tensor]:
        torch.manual_seed(0)
        layers = nn.ModuleList([nn.ModuleList(nn.Linear(32, out, bias=False) for out in (48, 16))])
        model = nn.ModuleDict({"layers": layers}).bfloat16()
        plan = apply(load("fp8_delayed", {"history": 3}), model, tokens=24, backend=backend)
        results, made = [], []
        for step, other in enumerate((False, False, True, False, False)):
            plan.begin_step(step, 0, 9)
            generator = torch.Generator().manual_seed(step)
            x, z = (torch.randn(24, 32, generator=generator).bfloat16() * 2**step for _ in range(2))
            x.requires_grad_()
            first, second = layers[0]
            read.clear()
            y = torch.cat((first(x), second(z if other else x)), 1)
            made.append(read.count(24))
            y.sum().backward()
            results += [y.detach(), x.grad, first.weight.grad.clone(), second.weight.grad.clone()]
            plan.end_step()
            results += [buffer.clone() for buffer in model.buffers()]
        if backend == "triton":
            assert made[1] < made[2]
            assert made[1] == made[0]
        return results

    assert all(map(torch.equal, run("triton"), run("reference")))


@pytest.mark.parametrize(
    "name", ["fp8_current", "fp8_delayed", pytest.param("fp8_rowwise", marks=pytest.mark.long), "fp8_block"]
)
def test_native_linears_read_what_kernels_make(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Outputs and gradients of native products are those of the reference's codes, in the layout that hardware takes;
    nothing is padded that needs none, and no codes or scales are transposed afterwards."""

    def run(quantizers: tuple[Quantizer, ...], out: int, rows: int, columns: int) -> list[Tensor]:
        torch.manual_seed(0)
        linear = nn.Linear(columns, out, bias=rows % 16 == 0)
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(linear)])}).bfloat16()
        with monkeypatch.context() as patch, pretend(patch, 90, quantizers):
            plan = apply(load(name, {}), model, tokens=rows)
            assert "scaled_mm" in str(plan)
            results: list[Tensor] = []
            for step in range(2):
                plan.begin_step(step, 0, 9)
                x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(step)).bfloat16()
                x.requires_grad_()
                y = model["layers"][0](x)  # type: ignore[index,operator]
                y += 1  # also where rows were padded
                y.backward(torch.sin(100 * y.detach()))
                results += [y.detach(), x.grad]
                plan.end_step()
            return [*results, *(p.grad for p in model.parameters()), *model.buffers()]  # type: ignore[list-item]

    blocks = scaled_mm_operands._block_scales

    def of_squares(q: Quantized, *sizes: int) -> Tensor:
        assert q.spec.tile.outer > 1, "others lie as they are wanted"
        return blocks(q, *sizes)

    # In squares of 128, four abreast, where nothing is to be filled up.
    whole = (512, 256, 512) if name == "fp8_block" else (128, 128, 256)
    for shape in ((72, 33, 50), (128, 33, 128), whole):  # of the second, rows alone are padded, if anything
        with monkeypatch.context() as patch:
            if shape == whole:
                for module, copying in itertools.product((scaled_mm, scaled_mm_operands), ("pad", "row_scales")):
                    patch.setattr(module, copying, None)
                patch.setattr(scaled_mm_operands, "_row_major", None)
                patch.setattr(scaled_mm_operands, "_block_scales", of_squares)
            ours = run((FOR_PRODUCTS,), *shape)
        assert all(map(torch.equal, ours, run((REFERENCE.quantizer,), *shape)))
