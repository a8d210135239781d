"""Outer scales of rows and groups, and those held in a narrow format: against slices of a tensor and FP64 models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from narrowgauge.precision.backends import Cast, choose
from narrowgauge.precision.backends.cpu.quantizer import Cpu
from narrowgauge.precision.backends.scaled_mm import find
from narrowgauge.precision.backends.triton.quantizer import Triton
from narrowgauge.precision.formats import E2M1, E4M3, E5M2, E8M0, INT8, NumberFormat, unpack4
from narrowgauge.precision.packing import pack_all, unpack_all
from narrowgauge.precision.probe import of_operand
from narrowgauge.precision.quantize import Quantized, decode_scales, dequantize, operand, prepare, quantize
from narrowgauge.precision.scaling import ROW, TENSOR, Current, Delayed, FourOverSix, Tile, TwoLevel
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec
from torch import Tensor

GROUP = Tile(1, 128)
NVFP4 = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())
GROUPS = replace(NVFP4, scale=TwoLevel(outer=GROUP))
HELD = replace(NVFP4, scale=TwoLevel(outer=GROUP, outer_format=E4M3))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sample(outer: int, inner: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Groups of very different sizes, with zeros of both signs."""
    x = torch.randn(outer, inner, generator=torch.Generator().manual_seed(outer))
    x *= 2.0 ** torch.linspace(-5, 5, outer)[:, None] * 2.0 ** torch.linspace(-4, 2, inner)
    x[1:2, :130], x[2:3, 5:] = 0.0, -0.0
    return x.to(dtype)


def codes(q: Quantized) -> Tensor:
    return unpack4(q.codes, q.stored_shape[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tile", "outer"),
    [
        (Tile(1, 16), GROUP),
        (Tile(1, 16), Tile(1, 32)),
        (Tile(16, 16), Tile(32, 32)),
        (Tile(2, 16), Tile(4, -1)),
        (Tile(1, 16), Tile(-1, 64)),
        (Tile(1, 5), Tile(3, 25)),
    ],
    ids=lambda tile: str(Tile(*tile)),
)
def test_a_group_with_a_scale_of_its_own_is_a_tensor_of_that_group(tile: Tile, outer: Tile, dtype: torch.dtype) -> None:
    x = sample(37, 300, dtype)
    odd = TwoLevel(outer=outer, block=E5M2, block_max=255.99)
    for rule, views in ((TwoLevel(outer=outer), (x, x.mT.contiguous().mT)), (odd, (torch.stack((x, x), -1)[..., 0],))):
        spec = OperandSpec(format=E2M1, tile=tile, scale=rule)
        for seen in views:
            q, back = quantize(seen, spec), dequantize(quantize(seen, spec))
            assert q.tensor_scale is not None
            assert q.tensor_scale.shape == outer.grid(37, 300)
            tall, wide = outer.extent(37, 300)
            for i in range(0, q.tensor_scale.shape[0], 5):
                for j in range(q.tensor_scale.shape[1]):
                    rows, columns = slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide)
                    own = quantize(x[rows, columns].contiguous(), replace(spec, scale=replace(rule, outer=TENSOR)))
                    assert torch.equal(codes(q)[rows, columns], codes(own))
                    assert torch.equal(q.tensor_scale[i, j], own.tensor_scale)
                    assert torch.equal(back[rows, columns], dequantize(own))


def test_everything_that_reads_scales_knows_groups() -> None:
    x = sample(20, 300)
    q = quantize(x, GROUPS)
    matrix, factor = operand(q)
    assert factor is None
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, dequantize(q))
    assert torch.equal(prepare(x, GROUPS).matrix, matrix)
    scales = decode_scales(q)
    assert scales is not None
    values = E2M1.decode(codes(q))
    torch.testing.assert_close(values * scales.repeat_interleave(16, 1)[:, :300], matrix)
    figures = of_operand(x, q)
    finite = scales[scales.isfinite()]
    assert (float(figures.extremes[1]), -float(figures.extremes[2])) == (float(finite.max()), float(finite.min()))
    assert figures.sums[4] == of_operand(x, quantize(x, replace(GROUPS, amax=Current()))).sums[4]
    (again,) = pack_all(*unpack_all([q]))
    assert isinstance(again, Quantized)
    assert torch.equal(dequantize(again), matrix)
    given = x.abs().reshape(20, 300)
    amaxes = torch.stack([given[:, :128].amax(1), given[:, 128:256].amax(1), given[:, 256:].amax(1)], 1)
    assert torch.equal(quantize(x, GROUPS, amax=amaxes).codes, q.codes)
    with pytest.raises(ValueError, match="takes 60 amaxes, not 1"):
        quantize(x, GROUPS, amax=torch.ones(1))


def test_squares_in_squares_are_transposed() -> None:
    spec = replace(NVFP4, tile=Tile(16, 16), scale=TwoLevel(outer=Tile(32, 32)))
    x = sample(40, 70)
    q, turned = quantize(x, spec), quantize(x.mT, spec)
    assert torch.equal(dequantize(q.t()), dequantize(q).mT)
    assert torch.equal(dequantize(q.t()), dequantize(turned))
    assert torch.equal(operand(q.t())[0], operand(turned)[0])


@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (0, 0), (1, 1), (3, 129)])
@pytest.mark.parametrize("spec", [GROUPS, HELD, replace(NVFP4, scale=TwoLevel(outer=ROW))], ids=str)
def test_odd_shapes(spec: OperandSpec, shape: tuple[int, int]) -> None:
    x = torch.ones(shape)
    q = quantize(x, spec)
    assert isinstance(spec.scale, TwoLevel)
    assert q.tensor_scale is not None
    assert q.tensor_scale.shape == spec.scale.outer.grid(*shape)
    torch.testing.assert_close(dequantize(q), x, rtol=0.07, atol=0)


def test_what_is_not_finite_stays_in_its_group() -> None:
    x = sample(4, 256)
    x[0, 3], x[3, 200] = torch.nan, torch.inf
    back, clean = dequantize(quantize(x, GROUPS)), dequantize(quantize(sample(4, 256), GROUPS))
    assert back[0, :128].isnan().all()
    assert torch.equal(back[0, 128:], clean[0, 128:])
    assert torch.equal(back[1:3], clean[1:3])
    assert torch.equal(back[3, :128], clean[3, :128])
    assert back[3, 200] == 6 * 448  # its group has scale 1, and saturates


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=str)
def test_three_levels_against_fp64(format: NumberFormat, dtype: torch.dtype) -> None:
    x = sample(16, 256, dtype)
    spec = replace(NVFP4, scale=TwoLevel(outer=GROUP, outer_format=format, block_max=390.0))
    q = quantize(x, spec)
    assert q.tensor_scale is not None
    wide, values, back = x.float().double(), E2M1.decode(codes(q)).double(), dequantize(q).double()
    u = float(wide.abs().max()) / (6 * 390) / format.max
    for row in range(16):
        for group in range(2):
            part = slice(128 * group, 128 * group + 128)
            wanted = float(wide[row, part].abs().max()) / (6 * 390) / u
            g = max(float(format.round(torch.tensor(wanted))), 2.0**format.tiny_exponent)
            assert float(q.tensor_scale[row, group]) == pytest.approx(g * u, rel=1e-6)
            for block in range(8 * group, 8 * group + 8):
                inside = slice(16 * block, 16 * block + 16)
                size = (wide[row, inside].abs().max() / 6 / (g * u)).clamp(max=448)
                near = {float(E4M3.round((size * (1 + by)).float())) for by in (-1e-6, 0, 1e-6)}  # both, at a tie
                assert float(E4M3.decode(q.scales[row, block])) in near
                d = float(E4M3.decode(q.scales[row, block]))
                y = wide[row, inside] / (d * g * u) if d else wide[row, inside] * 0
                tie = E2M1.round((y * (1 + 1e-5)).float()) != E2M1.round((y * (1 - 1e-5)).float())
                assert ((values[row, inside] == E2M1.round(y.float())) | tie | (d == 0)).all()
                torch.testing.assert_close(back[row, inside], values[row, inside] * d * g * u, rtol=1e-6, atol=0)
    assert len(set((q.tensor_scale / u).flatten().tolist())) > 8
    torch.testing.assert_close(operand(q)[0], dequantize(q))
    # What three levels cost: little beside FP32 scales of groups.
    free = dequantize(quantize(x, replace(spec, scale=TwoLevel(outer=GROUP, block_max=390.0)))).double()
    relative = [float((each - wide).norm() / wide.norm()) for each in (back, free)]
    assert relative[0] < 1.05 * relative[1]


def test_groups_of_four_over_six_and_of_other_statistics() -> None:
    x = sample(20, 300)
    spec = replace(NVFP4, scale=FourOverSix(outer=GROUP))
    q = quantize(x, spec)
    own = quantize(x[:, 128:256].contiguous()[7:8], replace(spec, scale=FourOverSix()))
    assert torch.equal(codes(q)[7:8, 128:256], codes(own))
    assert str(spec) == "e2m1/1x16/e4m3max256+fp32-1x128-4over6mae"


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (TwoLevel(outer=GROUP), "e4m3+fp32-1x128"),
        (TwoLevel(outer=GROUP, outer_format=E4M3), "e4m3+e4m3-1x128+fp32"),
        (TwoLevel(outer=ROW, outer_format=E5M2, block_max=255.99), "e4m3max255.99+e5m2-row+fp32"),
    ],
    ids=["groups", "three levels", "rows in three levels"],
)
def test_kernels_and_native_products_refuse(rule: TwoLevel, name: str) -> None:
    spec = replace(NVFP4, scale=rule)
    assert str(spec) == f"e2m1/1x16/{name}"
    gemm = GemmSpec(a=spec, b=spec)
    chosen = choose(gemm, (32, 32, 256), torch.device("cpu"))
    assert str(chosen) == f"reference (not cpu: no kernel for scales by {name})"
    assert "fp32 product" in chosen.backend.note(gemm)
    assert isinstance(find(spec, spec, 100), str)
    x = sample(32, 256).bfloat16()
    wanted = quantize(x, spec)
    for quantizer in (Cpu(), Triton()):
        made = quantizer.cast(x, Cast(spec=spec))
        assert isinstance(made, Quantized)
        assert torch.equal(made.codes, wanted.codes)
        assert torch.equal(made.tensor_scale, wanted.tensor_scale)  # type: ignore[arg-type]


def test_what_cannot_be() -> None:
    for make, message in (
        (lambda: TwoLevel(outer_format=E4M3), "the one scale of a tensor is FP32"),
        (lambda: TwoLevel(outer=GROUP, outer_format=E8M0), r"with a mantissa \(e4m3\), not in e8m0"),
        (lambda: TwoLevel(outer=GROUP, outer_format=INT8), "not in int8"),
        (lambda: replace(GROUPS, tile=Tile(1, 24)), "its tiles are parts of a 1x128, not 1x24"),
        (lambda: replace(GROUPS, tile=GROUP), "its tiles are parts of a 1x128, not 1x128"),
        (lambda: replace(GROUPS, tile=Tile(1, -1)), "its tiles are parts of a 1x128, not row"),
        (
            lambda: replace(NVFP4, tile=Tile(16, 16), scale=TwoLevel(outer=Tile(16, 128))),
            "tiles of 16x16 are read in both directions: their outer level is square, not 16x128",
        ),
        (lambda: replace(GROUPS, amax=Delayed()), "one amax per tensor: it cannot scale 1x128s by themselves"),
        (lambda: replace(GROUPS, amax=Current(step=True)), "tiles of 1x128 lie within a sample"),
        (
            lambda: LinearSpec(fprop=GemmSpec(a=replace(NVFP4, scale=TwoLevel(outer=ROW), amax=Current(step=True)))),
            "rows of x are tokens of one rank",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
