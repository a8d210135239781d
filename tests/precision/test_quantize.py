"""Quantization against torchao's MX and NVFP4 casts, a scalar transcription of NVFP4, and loops over tiles."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from narrowgauge.precision.formats import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E4M3_240,
    E5M2,
    FP16,
    INT4,
    INT8,
    NumberFormat,
    exmy,
    unpack4,
)
from narrowgauge.precision.noise import Noise, base_key, step_key
from narrowgauge.precision.quantize import Quantized, amax, dequantize, operand, quantize
from narrowgauge.precision.scaling import MX_POWERS, Delayed, Fp32, Fp32Decode, Power, PowerOfTwo, Tile, TwoLevel, Unit
from narrowgauge.precision.spec import OperandSpec, Rounding
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

FLT_MAX = np.float32(torch.finfo(torch.float32).max)
NVFP4 = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())
MXFP8 = OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())
TENSOR8 = OperandSpec(format=E4M3)
SPECS = [
    TENSOR8,
    OperandSpec(format=E5M2, scale=Fp32(pow2=True, margin=1)),
    OperandSpec(format=E4M3_240, tile=Tile(1, -1)),
    OperandSpec(format=E4M3, tile=Tile(1, 128), scale=Fp32(pow2=True, input_max=True)),
    OperandSpec(format=E4M3, tile=Tile(16, 16), scale=Fp32Decode()),
    OperandSpec(format=INT8, tile=Tile(-1, 1)),
    OperandSpec(format=INT4, tile=Tile(4, 8), scale=Fp32(eps=1e-6)),
    MXFP8,
    OperandSpec(format=E2M1, tile=Tile(1, 32), scale=PowerOfTwo(mode=Power.FLOOR)),
    OperandSpec(format=E3M2, tile=Tile(1, 32), scale=PowerOfTwo(mode=Power.EVEN)),
    OperandSpec(format=E2M3, tile=Tile(8, 8), scale=PowerOfTwo(mode=Power.CEIL)),
    NVFP4,
    replace(NVFP4, tile=Tile(16, 16)),
    OperandSpec(format=E4M3, tile=Tile(1, 16), scale=TwoLevel(block=E5M2)),
    OperandSpec(format=exmy(5, 7), scale=Unit()),
    OperandSpec(format=BF16, scale=Unit()),
    OperandSpec(format=FP16),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(37, 50), (16, 64), (1, 1), (3, 129), (130, 5), (0, 7), (7, 0), (0, 0)]


def noise(**kwargs: object) -> Noise:
    return Noise(key=step_key(base_key(5, "m", 0), 1), **kwargs)  # type: ignore[arg-type]


def sample(outer: int, inner: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows and columns of very different sizes, with zeros, ties and both ends of the dtype's range."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(outer, inner, generator=gen) * 2.0 ** torch.randint(-9, 9, (outer, 1), generator=gen)
    x = torch.where(torch.rand(outer, inner, generator=gen) < 0.1, x.sign() * x.abs().log2().ceil().exp2(), x)
    x[torch.rand(outer, inner, generator=gen) < 0.05] = 0.0
    if outer > 8:
        x[1], x[2], x[3] = 0.0, -0.0, x[3] * 1e-6
        x[4, ::3] = torch.finfo(torch.float16).tiny / 8
    return x.to(dtype)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Bit for bit; NaN equals NaN."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def assert_same(a: Quantized, b: Quantized) -> None:
    assert a.shape == b.shape
    for name in ("codes", "scales", "tensor_scale"):
        assert same(getattr(a, name), getattr(b, name)), name


def element_codes(q: Quantized) -> Tensor:
    return unpack4(q.codes, q.shape[1]) if q.spec.format.bits == 4 else q.codes


def tiles(spec: OperandSpec, outer: int, inner: int) -> list[tuple[int, int, slice, slice]]:
    tall, wide = (
        (extent if extent > 0 else max(size, 1)) for extent, size in zip(spec.tile, (outer, inner), strict=True)
    )
    rows, columns = (max(1, outer) if spec.tile.outer < 0 else outer), (max(1, inner) if spec.tile.inner < 0 else inner)
    grid = itertools.product(range(0, rows, tall), range(0, columns, wide))
    return [(r // tall, c // wide, slice(r, r + tall), slice(c, c + wide)) for r, c in grid]


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, torch.float32) for shape in SHAPES), *((SHAPES[0], dtype) for dtype in DTYPES[1:])]
)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_matches_a_loop_over_tiles(
    spec: OperandSpec, stochastic: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = sample(*shape, dtype)
    source = None
    if stochastic:
        spec, source = replace(spec, rounding=Rounding.STOCHASTIC), noise(transposed=True)
    q = quantize(x, spec, noise=source)
    got, back = element_codes(q), dequantize(q)
    assert q.shape == shape == back.shape == got.shape
    assert q.scales.shape == spec.tile.grid(*shape)
    tensor_amax = x.float().abs().max() if x.numel() else torch.tensor(0.0)
    uniform = source.uniform(*shape) if source is not None else None
    for row, column, r, c in tiles(spec, *shape):
        piece = x[r, c].float()
        top = piece.abs().max() if piece.numel() else torch.tensor(0.0)
        made = spec.scale.scales(top.reshape(1, 1), spec.format, tensor_amax=tensor_amax, dtype=dtype)
        assert same(q.scales[row, column], made.stored[0, 0])
        assert same(q.tensor_scale, made.tensor)
        values = spec.format.round(piece * made.encode, uniform[r, c] if uniform is not None else None)
        decode = spec.scale.format.decode(made.stored) if spec.scale.format is not None else made.stored
        assert torch.equal(back[r, c], values * decode * (1.0 if made.tensor is None else made.tensor))
        if spec.format.bits <= 8:
            assert torch.equal(got[r, c], spec.format.encode(values))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_views_and_padding(spec: OperandSpec) -> None:
    x = sample(40, 72)
    assert_same(quantize(x.mT, spec), quantize(x.mT.contiguous(), spec))
    assert_same(quantize(x[::2, 3:60:2], spec), quantize(x[::2, 3:60:2].contiguous(), spec))
    assert torch.equal(amax(x.mT, spec.tile), amax(x.mT.contiguous(), spec.tile))
    # A ragged tile is a tile filled with zeros.
    padded = torch.nn.functional.pad(x, (0, 128 - 72, 0, 128 - 40))
    assert torch.equal(dequantize(quantize(padded, spec))[:40, :72], dequantize(quantize(x, spec)))
    # FP32 inside, whatever the input, but for the rule that saturates at the input's range.
    assert_same(quantize(x.bfloat16(), spec), quantize(x.bfloat16().float(), spec))
    assert_same(quantize(x.double(), spec), quantize(x, spec))
    assert not quantize(x.requires_grad_(), spec).scales.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MX_POWERS)
@pytest.mark.parametrize(
    ("fmt", "theirs"),
    [
        (E4M3, torch.float8_e4m3fn),
        (E5M2, torch.float8_e5m2),
        (E2M1, torch.float4_e2m1fn_x2),
        (E3M2, DTYPE_FP6_E3M2),
        (E2M3, DTYPE_FP6_E2M3),
    ],
    ids=str,
)
def test_mx_matches_torchao(fmt: NumberFormat, theirs: torch.dtype | str, mode: Power, dtype: torch.dtype) -> None:
    """Codes and scales bit for bit.

    torchao differs where a scale would be 2^-127, code 0, for amax below about 2^-118: it divides by 2^-126 (by 1 in
    RCEIL) and yet stores code 0. Elements are compared above that. And its RCEIL takes ceil(log2(amax / max)) in FP32,
    which one unit above 2^37 is 37: row 101. Scale 255 means NaN in both.
    """
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(600, 64, generator=gen) * 2.0 ** torch.randint(-100, 100, (600, 1), generator=gen)
    x[:100] = x[:100].sign() * x[:100].abs().log2().round().exp2()
    top = torch.tensor(fmt.max * 2.0**-3)
    x[100:103, ::32] = torch.stack((top, top.nextafter(top * 2), top.nextafter(top * 0)))[:, None] * 2.0**40
    x[103:106] = 0.0
    x[106, 5], x[107, 7] = torch.inf, -torch.inf
    x[108, 3] = torch.nan
    x[109] = 1e-42
    x = x.to(dtype)
    want_scales, want_codes = to_mx(x, theirs, 32, ScaleCalculationMode[mode.name])
    q = quantize(x, OperandSpec(format=fmt, tile=Tile(1, 32), scale=PowerOfTwo(mode=mode)))
    want_scales = want_scales.view(torch.uint8).clone()
    if mode is Power.RCEIL and dtype == torch.float32:
        assert (q.scales[101] == want_scales[101] + 1).all()
        q.scales[101] = want_scales[101] = 0
    assert torch.equal(q.scales, want_scales)
    assert (q.scales[103:106] == 0).all()
    mine = element_codes(q)
    codes = want_codes.view(torch.uint8)
    codes = unpack4(codes, 64) if fmt.bits == 4 else codes
    comparable = ((q.scales != 0) & (q.scales != 255)).repeat_interleave(32, 1)
    assert comparable.float().mean() > 0.98
    assert torch.equal(mine[comparable], codes[comparable])


def nvfp4_by_hand(x: Tensor, tile: Tile, given: float | None) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """NVFP4 scalar by scalar: codes [outer, inner], E4M3 scale codes of tiles, tensor scale."""
    f = np.float32
    table = [f(v) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
    data = x.float().numpy()
    big = f(np.abs(data).max()) if given is None else f(given)
    with np.errstate(all="ignore"):
        s = min(f(2688) / big, FLT_MAX)
        s = f(1) if big == 0 or s == 0 else s
        c = f(s * (f(1) / f(6)))
        rows, columns = tile.grid(*data.shape)
        codes, scales = np.zeros(data.shape, np.uint8), np.zeros((rows, columns), np.uint8)
        for i, j in itertools.product(range(rows), range(columns)):
            r, k = slice(i * tile.outer, (i + 1) * tile.outer), slice(j * tile.inner, (j + 1) * tile.inner)
            block = np.array(min(f(f(np.abs(data[r, k]).max()) * c), f(448)), np.float32).astype(
                ml_dtypes.float8_e4m3fn
            )
            scales[i, j] = block.view(np.uint8)
            e = min(f(1) / f(f(block) * f(f(1) / s)), FLT_MAX)
            for at in itertools.product(range(*r.indices(len(data))), range(*k.indices(data.shape[1]))):
                y = f(data[at] * e)
                size = min(abs(y), f(6))
                distance = [abs(float(size) - float(v)) for v in table]
                near = [n for n in range(8) if distance[n] == min(distance)]
                code = near[0] if len(near) == 1 else next(n for n in near if n % 2 == 0)
                codes[at] = code | (8 if math.copysign(1.0, y) < 0 else 0)
        tensor = f(1) / s if big == 0 or s == FLT_MAX or (s == 1 and big != 2688) else big / f(2688)
    return codes, scales, tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [Tile(1, 16), Tile(16, 16)], ids=str)
@pytest.mark.parametrize(
    ("scale", "given"), [(1.0, None), (1e-35, None), (1e-41, None), (3e4, None), (0.0, None), (1.0, 3.0), (1.0, 1e4)]
)
def test_nvfp4_matches_a_scalar_transcription(
    tile: Tile, dtype: torch.dtype, scale: float, given: float | None
) -> None:
    gen = torch.Generator().manual_seed(2)
    x = torch.randn(18, 37, generator=gen) * 2.0 ** torch.randint(-12, 1, (18, 1), generator=gen)
    x[3], x[4, :16] = 0.0, 1e-5
    x = (x.to(dtype).double() * scale).to(dtype)
    spec = replace(NVFP4, tile=tile)
    q = quantize(x, spec, amax=None if given is None else torch.tensor(given))
    codes, scales, tensor = nvfp4_by_hand(x, tile, given)
    assert np.array_equal(q.scales.numpy(), scales)
    assert np.array_equal(element_codes(q).numpy(), codes)
    assert q.tensor_scale is not None
    assert q.tensor_scale.item() == tensor


def test_nvfp4_matches_torchao_where_definitions_agree() -> None:
    """torchao's inference cast keeps tile scales at 2^-6 or more and divides by 6 and by the tensor's scale one after
    the other. With a tensor amax of 2688 (scales of 1) and tiles above the clamp only the factor 1/6 differs."""
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(3)) * 30
    x[0, 0] = 2688.0
    scales, packed = nvfp4_quantize(x, per_tensor_scale=torch.tensor(1.0))
    q = quantize(x, NVFP4)
    assert torch.equal(q.scales, scales.view(torch.uint8))
    assert torch.equal(q.codes, packed)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_error_is_within_half_a_step(spec: OperandSpec) -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(4))
    error = (dequantize(quantize(x, spec)) - x).norm() / x.norm()
    # A uniform grid of an amax of 4 sigma, or a relative step of 2^-m: a generous bound that a wrong scale breaks.
    bound = {INT8: 0.02, INT4: 0.2}.get(spec.format, 0.6 * 2.0**-spec.format.mantissa_bits)
    assert error < bound
    assert error > bound / 50 or spec.format.bits > 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_operand_is_exact(spec: OperandSpec, dtype: torch.dtype) -> None:
    q = quantize(sample(37, 50, dtype), spec)
    matrix, factor = operand(q)
    bits = spec.format.significant_bits + (spec.scale.block.significant_bits if isinstance(spec.scale, TwoLevel) else 0)
    narrow = bits <= 8 and (spec.scale.power_of_two or spec.scale.levels == 2 or spec.tile == (-1, -1))
    assert matrix.dtype == (torch.bfloat16 if narrow else torch.float32)
    value = matrix.float() if factor is None else matrix.float() * factor
    assert torch.equal(value, dequantize(q))
    assert torch.equal(value.signbit(), dequantize(q).signbit())
    assert factor is None or (factor.dtype == torch.float32 and factor.shape == ())
    if spec.scale.levels and narrow:
        assert ((matrix == 0) | (matrix.abs() >= 2.0**-126)).all()


def test_operand_flushes_only_what_is_far_below() -> None:
    x = torch.zeros(5, 32)
    x[0], x[1], x[2], x[3] = 448 * 2.0**60, 448 * 2.0**-57, 448 * 2.0**-58, -448 * 2.0**-58
    q = quantize(x, MXFP8)
    assert q.scales[:4, 0].tolist() == [187, 70, 69, 69]
    matrix, factor = operand(q)
    assert factor == 2.0**60
    assert matrix[:, 0].tolist() == [448.0, 448 * 2.0**-117, 0.0, -0.0, 0.0]
    assert matrix[3].signbit().all()
    # Small tensors are centred too: nothing is near BF16's subnormals.
    tiny = quantize(torch.full((1, 32), 448 * 2.0**-127), MXFP8)
    assert tiny.scales.item() == 0
    matrix, factor = operand(tiny)
    assert (matrix[0, 0].item(), factor) == (224.0, 2.0**-126)


@pytest.mark.parametrize("tile", [Tile(-1, -1), Tile(16, 16)], ids=str)
@pytest.mark.parametrize("fmt", [E4M3, E2M1, INT4], ids=str)
def test_transpose(fmt: NumberFormat, tile: Tile) -> None:
    x = sample(37, 51)
    spec = OperandSpec(format=fmt, tile=tile)
    q = quantize(x, spec)
    other = quantize(x.mT, spec)
    assert q.t().shape == other.shape
    assert torch.equal(dequantize(q.t()), dequantize(other))
    for mine, theirs in zip(operand(q.t()), operand(other), strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    assert q.t().codes is q.codes  # a view
    assert_same(q.t().t(), q)
    assert torch.equal(dequantize(q.t()), dequantize(q).mT)


@pytest.mark.parametrize("tile", [Tile(1, 16), Tile(1, -1), Tile(16, 8)], ids=str)
def test_transpose_is_refused_for_one_dimensional_tiles(tile: Tile) -> None:
    with pytest.raises(ValueError, match="cannot be transposed"):
        quantize(sample(16, 16), OperandSpec(format=E4M3, tile=tile)).t()


@pytest.mark.parametrize("spec", [TENSOR8, replace(TENSOR8, scale=Fp32(margin=2)), NVFP4], ids=str)
def test_given_amax(spec: OperandSpec) -> None:
    x = sample(20, 40)
    assert_same(quantize(x, spec, amax=x.abs().max()), quantize(x, spec))
    delayed = replace(spec, amax=Delayed())
    assert_same(quantize(x, delayed, amax=x.abs().max()), quantize(x, spec))
    small = quantize(x, delayed, amax=x.abs().max() / 8)
    assert dequantize(small).abs().max() < x.abs().max()  # saturated
    if spec.scale.levels == 1:  # nothing seen yet: scale 1
        assert quantize(x, replace(TENSOR8, amax=Delayed()), amax=torch.zeros(1)).scales.item() == 1.0


def test_amax() -> None:
    x = torch.tensor([[1.0, -5.0, 2.0], [0.0, 3.0, torch.nan]])
    assert same(amax(x, Tile(-1, -1)), torch.tensor([[torch.nan]]))
    assert same(amax(x, Tile(1, 2)), torch.tensor([[5.0, 2.0], [3.0, torch.nan]]))
    assert amax(x[:0], Tile(-1, -1)).tolist() == [[0.0]]
    assert amax(x[:, :0], Tile(1, -1)).tolist() == [[0.0], [0.0]]
    assert amax(x[:, :0], Tile(1, 16)).shape == (2, 0)
    assert amax(torch.full((1, 1), -torch.inf), Tile(1, 16)).item() == torch.inf


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_nonfinite_input(spec: OperandSpec, dtype: torch.dtype, value: float) -> None:
    """One bad element: what it may touch, and that a NaN is never lost."""
    x = torch.full((32, 256), 2.0, dtype=dtype)
    x[5, 40] = value
    back = dequantize(quantize(x, spec))
    if math.isnan(value) or isinstance(spec.scale, Fp32Decode):
        assert back[5, 40].isnan()
    else:  # saturated; E8M0's largest scales then take it beyond FP32 again
        assert back[5, 40].isfinite() or isinstance(spec.scale, PowerOfTwo)
        assert back[5, 40] * value > 0
        assert back[5, 40].abs() >= 4.0
    whole = (spec.tile == (-1, -1) or isinstance(spec.scale, TwoLevel)) and spec.scale.levels
    if not whole:
        untouched = torch.ones(32, 256, dtype=torch.bool)
        for _, _, r, c in tiles(spec, 32, 256):
            if r.start <= 5 < r.stop and c.start <= 40 < c.stop:
                untouched[r, c] = False
        untouched[5, 40] = False
        assert torch.allclose(back[untouched], torch.tensor(2.0), rtol=0.07)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_extremes_of_the_dtype(spec: OperandSpec, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for value in (info.max, -info.max, info.tiny, info.smallest_normal / 4, 0.0):
        x = torch.full((2, 32), value, dtype=dtype)
        back = dequantize(quantize(x, spec))
        assert not back.isnan().any()
        # (E5M2's FP16-sized range without a scale, and a margin, may clip; nothing may flip sign.)
        assert (back.double() * x.double() >= 0).all()
        assert value != 0.0 or (back == 0).all()
        if abs(value) == info.max and spec.scale.levels and not isinstance(spec.scale, PowerOfTwo):
            back = back.clamp(-info.max, info.max)  # rounded up, the largest numbers leave FP32
            assert torch.allclose(back.abs().double(), x.abs().double(), rtol=0.07)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.format.bits <= 8], ids=str)
def test_stochastic_rounding_is_unbiased(spec: OperandSpec) -> None:
    spec = replace(spec, rounding=Rounding.STOCHASTIC)
    row = torch.linspace(-0.99, 1.0, 16) ** 3
    if spec.tile == (-1, 1):
        spec = replace(spec, tile=Tile(-1, -1))  # one value per tile would be its amax: on the grid
    x = row.repeat(8000, 1)
    size = amax(x, spec.tile).max()
    # Scales that round down (FLOOR, EVEN and NVFP4's tile scales) may clip the largest values: leave those out.
    drawn = dequantize(quantize(x, spec, noise=noise())).double()
    inside = row.abs() < 0.7 * size
    deviation = (drawn.mean(0) - row.double()).abs()
    bound = 4.2 * drawn.std(0) / 8000**0.5 + 1e-6 * size
    assert (deviation <= bound)[inside].all()
    assert (drawn.std(0) > 0)[inside].sum() > 6


def test_noise_follows_global_rows() -> None:
    spec = replace(MXFP8, rounding=Rounding.STOCHASTIC)
    x = sample(24, 64)
    whole = quantize(x, spec, noise=noise(row_offset=100))
    parts = [quantize(x[i : i + 8], spec, noise=noise(row_offset=100 + i)) for i in (0, 8, 16)]
    assert torch.equal(torch.cat([p.codes for p in parts]), whole.codes)


def test_compiled_code_gives_the_same_bits() -> None:
    """Ragged in both directions: what Inductor got wrong when scaled tiles were sliced."""
    spec = OperandSpec(format=E5M2, tile=Tile(1, 32), scale=PowerOfTwo(), rounding=Rounding.STOCHASTIC)
    base = base_key(5, "m", 0)

    def run(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        q = quantize(x, spec, noise=Noise(key=step_key(base, step), transposed=True))
        return q.codes, q.scales

    x = sample(40, 200)
    compiled = torch.compile(run, fullgraph=True)
    first, second = torch.tensor(1), torch.tensor(2)
    outcomes = [compiled(x, first)]
    with torch.compiler.set_stance("fail_on_recompile"):
        outcomes.append(compiled(x, second))
    for step, outcome in zip((first, second), outcomes, strict=True):
        for got, want in zip(outcome, run(x, step), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("x", "spec", "kwargs", "match"),
    [
        (torch.ones(3), TENSOR8, {}, "float matrix"),
        (torch.ones(3, 3, dtype=torch.int32), TENSOR8, {}, "float matrix"),
        (torch.ones(3, 3), replace(TENSOR8, amax=Delayed()), {}, "scales by an earlier amax"),
        (torch.ones(3, 3), TENSOR8, {"amax": torch.ones(3)}, "takes 1 amaxes, not 3"),
        (torch.ones(3, 3), NVFP4, {"amax": torch.ones(3, 1)}, "takes 1 amaxes, not 3"),
        (torch.ones(3, 3), replace(TENSOR8, rounding=Rounding.STOCHASTIC), {}, "it needs noise"),
        (torch.ones(3, 3), TENSOR8, {"noise": noise()}, "nearest: no noise"),
        (torch.ones(3, 3), OperandSpec(format=BF16, scale=Unit()), {"amax": torch.ones(1)}, "takes 0 amaxes"),
    ],
)
def test_refusals(x: Tensor, spec: OperandSpec, kwargs: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        quantize(x, spec, **kwargs)  # type: ignore[arg-type]
