"""GEMMs that sum by the rule of a tensor core, or integers exactly: scales, specs, recipes, native products."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hardware import pretend
from narrowgauge.precision.apply import apply
from narrowgauge.precision.backends import REFERENCE, choose, quantize_by, scaled_mm
from narrowgauge.precision.formats import E2M1, E4M3, E5M2, INT4, INT8, Integer, NumberFormat, unpack4
from narrowgauge.precision.loading import load
from narrowgauge.precision.quantize import dequantize, quantize
from narrowgauge.precision.scaling import ROW, TENSOR, Fp32, PowerOfTwo, ScaleRule, Tile, TwoLevel, Unit
from narrowgauge.precision.spec import GemmSpec, OperandSpec
from narrowgauge.precision.sums import (
    ADA_FP8,
    B200_FP8,
    H100_FP8,
    H100_FP8_PROMOTED,
    V100_FP16,
    Accumulate,
    Sums,
    by_name,
)
from tensor_core import model, modelled, same
from torch import Tensor, nn

CPU = torch.device("cpu")
INT16 = Integer(bits=16)
FP8 = OperandSpec(format=E4M3)


def product(
    gemm: GemmSpec,
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    bias: Tensor | None = None,
) -> Tensor:
    chosen = choose(gemm, (len(a), len(b), a.shape[1]), CPU, backend).backend
    assert gemm.a is not None
    assert gemm.b is not None
    sides = (quantize_by(chosen.quantizer, x, spec) for x, spec in ((a, gemm.a), (b, gemm.b)))
    return chosen.product.gemm(*sides, bias=bias, dtype=dtype)


def codes_and_scales(x: Tensor, spec: OperandSpec) -> tuple[Tensor, Tensor]:
    """Values of the codes, and their scales: FP32 [outer, inner] both, from one tile after another."""
    values, scales = torch.empty_like(x), torch.empty_like(x)
    tall, wide = spec.tile.extent(*x.shape)
    for rows in torch.arange(len(x)).split(tall):
        for cols in torch.arange(x.shape[1]).split(wide):
            place = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)
            q = quantize(x[place], replace(spec, tile=TENSOR))
            values[place] = dequantize(replace(q, scales=torch.ones_like(q.scales), spec=replace(q.spec, scale=Fp32())))
            scales[place] = q.scales
    return values, scales


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_scales_of_tensors_and_rows_multiply_the_sums(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(9, 70, generator=generator), torch.randn(6, 70, generator=generator) * 1e-3
    for tile, scale in ((TENSOR, Fp32()), (Tile(1, -1), Fp32()), (Tile(4, -1), Fp32(pow2=True))):
        specs = OperandSpec(format=E4M3, tile=tile, scale=scale), OperandSpec(format=E5M2, tile=tile, scale=scale)
        (left, rows), (right, columns) = (codes_and_scales(x, s) for x, s in zip((a, b), specs, strict=True))
        sums = modelled(left, right, (-6, -14), H100_FP8)
        if tile == TENSOR:  # one factor, as in sums that follow no rule
            expected = sums * (float(rows[0, 0]) * float(columns[0, 0]))
        else:
            expected = sums * rows[:, :1] * columns[:, 0]
        gemm = GemmSpec(a=specs[0], b=specs[1], accumulate=H100_FP8)
        assert torch.equal(product(gemm, a, b, backend=backend), expected)
        bias = torch.randn(6, generator=generator)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(product(gemm, a, b, dtype, backend, bias), (expected + bias).to(dtype))
        y = choose(gemm, (9, 6, 70), CPU, backend).backend.product.gemm(a, b, bias=bias, dtype=torch.float32)
        assert torch.equal(y, REFERENCE.product.gemm(a, b, bias=bias, dtype=torch.float32))  # in high precision


def test_scales_inside_the_contraction() -> None:
    """FP32 scales multiply the sums of their blocks; powers of two do so, too, or are part of the values."""
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(5, 75, generator=generator), torch.randn(33, 75, generator=generator)
    a, b = a * torch.logspace(-4, 4, 75), b * torch.logspace(3, -1, 75)
    rule = Accumulate(step=16, bits=13, promote_every=32)
    for x_scale, w_tile in ((Fp32(), Tile(32, 32)), (Fp32(pow2=True), Tile(1, 32)), (Fp32(), TENSOR)):
        specs = (
            OperandSpec(format=E4M3, tile=Tile(1, 32), scale=x_scale),
            OperandSpec(format=E4M3, tile=w_tile, scale=Fp32()),
        )
        (left, rows), (right, columns) = (codes_and_scales(x, s) for x, s in zip((a, b), specs, strict=True))
        acc = torch.zeros(5, 33)
        for cols in torch.arange(75).split(32):
            c = modelled(left[:, cols], right[:, cols], (-6, -6), replace(rule, promote_every=None))
            factor = rows[:, cols[:1]] if w_tile == TENSOR else rows[:, cols[:1]] * columns[:, cols[0]]
            acc = acc + c * factor
        acc = acc * columns[0, 0] if w_tile == TENSOR else acc
        assert torch.equal(product(GemmSpec(a=specs[0], b=specs[1], accumulate=rule), a, b), acc)
    for rule in (H100_FP8, B200_FP8):
        mx = OperandSpec(format=E4M3, tile=Tile(1, 16), scale=PowerOfTwo())
        x, w = (dequantize(quantize(operand, mx)) for operand in (a, b))
        y = product(GemmSpec(a=mx, b=mx, accumulate=rule), a, b)
        assert same(y, modelled(x, w, (-126, -126), rule)), "no code is subnormal here"


@pytest.mark.parametrize("rows", [False, True], ids=["tensor", "rows"])
def test_two_levels_of_scales(rows: bool) -> None:
    """The tiles' multiply promoted sums, the others what comes out."""
    generator = torch.Generator().manual_seed(6)
    spec = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel(outer=ROW if rows else TENSOR))
    rule = Accumulate(step=8, bits=9, promote_every=16)
    a, b = torch.randn(5, 40, generator=generator), torch.randn(4, 40, generator=generator)
    (left, s), (right, t) = ((q := quantize(x, spec), E4M3.decode(q.scales)) for x in (a, b))
    acc = torch.zeros(5, 4)
    for block in range(3):
        x, y = (E2M1.decode(unpack4(q.codes, 40))[:, 16 * block : 16 * block + 16] for q in (left, right))
        c = modelled(x, y, (0, 0), replace(rule, promote_every=None))
        acc = acc + c * (s[:, block, None] * t[:, block])
    assert left.tensor_scale is not None
    assert right.tensor_scale is not None
    outer = left.tensor_scale, right.tensor_scale
    expected = acc * outer[0] * outer[1].mT if rows else acc * (float(outer[0]) * float(outer[1]))
    assert torch.equal(product(GemmSpec(a=spec, b=spec, accumulate=rule), a, b), expected)


def test_subnormal_codes_under_powers_of_two_stay_unnormalised() -> None:
    """A code's exponent is not below its format's smallest, whatever multiplies it."""
    mx = OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())
    a, b = torch.zeros(1, 32), torch.ones(1, 32)
    a[0, 0], a[0, 1] = 448.0, 2.0**-9
    b[0, 0] = 0.0
    b[0, 2:] = 2.0**-9
    values = [float(x) for x in a[0]], [float(x) for x in quantize(b, mx).spec.format.round(b * 256)[0]]
    y = product(GemmSpec(a=mx, b=mx, accumulate=Accumulate(step=32, bits=2, least=-1024)), a, b)
    expected = model(*values, (-6, -6), Accumulate(step=32, bits=2, least=-1024)) / 256
    assert float(y) == expected == 0.0
    assert model(*values, (-126, -126), Accumulate(step=32, bits=2, least=-1024)) > 0


def test_square_tiles_are_read_either_way() -> None:
    square = OperandSpec(format=E4M3, tile=Tile(16, 16), scale=Fp32())
    rule = Accumulate(step=8, bits=13, promote_every=16)
    x, dy = torch.randn(40, 23), torch.randn(9, 40)
    chosen = choose(GemmSpec(a=square, b=square, accumulate=rule), (9, 23, 40), CPU).backend
    there, back = quantize(x, square).t(), quantize(x.mT, square)
    a = quantize(dy, square)
    y = [chosen.product.gemm(a, q, bias=None, dtype=torch.float32) for q in (there, back)]
    assert torch.equal(y[0], y[1])


@pytest.mark.parametrize("format", [INT4, INT8, INT16], ids=str)
@pytest.mark.parametrize("k", [40, 4096])
def test_integers_are_summed_exactly(format: NumberFormat, k: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for tile, scale in ((TENSOR, Unit()), (TENSOR, Fp32()), (Tile(1, -1), Fp32())):
        spec = OperandSpec(format=format, tile=tile, scale=scale)
        a, b = (torch.randn(rows, k, generator=generator) * 0.1 * format.max + format.max / 2 for rows in (5, 6))
        a[0], b[0] = format.max, format.max  # 2^26 where K is 4096, in INT8
        (left, rows), (right, columns) = (codes_and_scales(x, spec) for x in (a, b))
        sums = (left.long() @ right.long().mT).float()
        expected = (
            sums * rows[:, :1] * columns[:, 0] if tile != TENSOR else sums * (float(rows[0, 0]) * float(columns[0, 0]))
        )
        gemm = GemmSpec(a=spec, b=spec)
        assert torch.equal(product(gemm, a, b), expected)
        assert torch.equal(product(gemm, a, b, torch.bfloat16), expected.bfloat16())
        bias = torch.arange(6.0)
        assert torch.equal(product(gemm, a, b, bias=bias), expected + bias)
        chosen = choose(gemm, (5, 6, k), CPU).backend
        inexact = k * format.max**2 > 2**24 or tile != TENSOR
        assert ("exact integer sums" in chosen.note(gemm)) == inexact
        if tile == TENSOR and k * format.max**2 <= 2**24:
            q = quantize(a, spec), quantize(b, spec)
            y = REFERENCE.product.gemm(*q, bias=torch.ones(6), dtype=torch.bfloat16)
            assert torch.equal(chosen.product.gemm(*q, bias=torch.ones(6), dtype=torch.bfloat16), y)


def test_sums_of_integers_that_fp32_holds_are_as_before() -> None:
    """Also where a GEMM could have longer ones: every bit, and the bias."""
    spec = OperandSpec(format=INT8)
    a, b = torch.randn(20, 3000).cauchy_(), torch.randn(30, 3000)
    chosen = choose(GemmSpec(a=spec, b=spec), (20, 30, 3000), CPU).backend
    assert "exact" in chosen.note(GemmSpec(a=spec, b=spec))
    q, bias = (quantize(a, spec), quantize(b, spec)), torch.randn(30)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = REFERENCE.product.gemm(*q, bias=bias, dtype=dtype)
        assert torch.equal(chosen.product.gemm(*q, bias=bias, dtype=dtype), expected)


# What can be said.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: Accumulate(step=0, bits=13), "step is 1 to 256, not 0: 1?", id="step"),
        pytest.param(lambda: Accumulate(step=4, bits=31), "bits is 1 to 30, not 31: 30?", id="bits"),
        pytest.param(lambda: Accumulate(step=4, bits=9, least=-2000), "least is -1024 to 127", id="least"),
        pytest.param(lambda: replace(H100_FP8, promote_every=100), "no multiple of the step of 32: 96?", id="interval"),
        pytest.param(lambda: replace(H100_FP8, promote_every=8), "no multiple of the step of 32: 32?", id="short"),
        pytest.param(lambda: by_name("h100_fp9"), "did you mean 'h100_fp8'", id="name"),
        pytest.param(lambda: load("fp8_current", {"accumulate": "hopper"}), "=hopper: fp32, or", id="argument"),
        pytest.param(lambda: GemmSpec(a=FP8, accumulate=H100_FP8), "two quantized operands", id="one operand"),
        pytest.param(lambda: GemmSpec(a=FP8, b=OperandSpec(format=INT8), accumulate=H100_FP8), "exactly", id="integer"),
        pytest.param(lambda: GemmSpec(a=FP8, b=blocks(), accumulate=H100_FP8), "promote_every=128", id="blocks"),
        pytest.param(
            lambda: GemmSpec(a=FP8, b=blocks(64, TwoLevel()), accumulate=H100_FP8_PROMOTED), "=64", id="two levels"
        ),
    ],
)  # fmt: skip
def test_what_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)


def blocks(inner: int = 128, scale: ScaleRule | None = None) -> OperandSpec:
    return OperandSpec(format=E4M3, tile=Tile(1, inner), scale=scale or Fp32())


def test_specs_say_how_they_sum() -> None:
    assert str(GemmSpec(a=FP8, b=FP8)) == str(GemmSpec(a=FP8, b=FP8, accumulate=Sums.AUTO)) == f"{FP8} x {FP8}"
    assert str(GemmSpec(a=FP8, b=FP8, accumulate=Sums.FAST)).endswith(", fast accumulation")
    said = str(GemmSpec(a=FP8, b=FP8, accumulate=H100_FP8_PROMOTED))
    assert said == f"{FP8} x {FP8}, sums of 32 products at 13 bits in fp32 every 128"
    assert "at 23 bits not below 2^-1024" in str(V100_FP16)
    assert by_name("ada_fp8") == ADA_FP8


class OneBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(64, 48, bias=False)})])


@pytest.mark.parametrize("name", ["fp8_current", "fp8_delayed", "fp8_rowwise", "fp8_block"])
def test_recipes_sum_by_a_rule(name: str) -> None:
    """In all three GEMMs, said in the plan; and the digits are another's."""
    outputs = []
    for accumulate in ("fp32", "h100_fp8"):
        torch.manual_seed(0)
        model = OneBlock()
        plan = str(apply(load(name, {"accumulate": accumulate}), model, tokens=32))
        assert plan.count("sums of 32 products at 13 bits") == 3 * (accumulate != "fp32")
        linear = model.blocks[0]["proj"]
        x = torch.randn(32, 64, requires_grad=True)
        y = linear(x)
        y.backward(torch.randn(32, 48))
        outputs.append((y.detach(), x.grad, linear.weight.grad))
    for exact, narrow in zip(*outputs, strict=True):
        error = (narrow - exact).norm() / exact.norm()
        assert 1e-5 < error < 1e-2


def test_codes_that_a_rule_reads_itself_are_no_integers() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Doubled(Fp32):
        def read(self, codes: Tensor, stored: Tensor, element: NumberFormat, tile: Tile) -> Tensor:
            return 2 * element.decode(codes) * stored

    spec = OperandSpec(format=INT8, tile=Tile(1, -1), scale=Doubled())
    a, b = torch.randn(4, 64), torch.randn(3, 64)
    gemm = GemmSpec(a=spec, b=spec)
    y = product(gemm, a, b)
    assert torch.allclose(y, 4 * a @ b.mT, rtol=0.1, atol=2.0)
    assert torch.allclose(y, dequantize(quantize(a, spec)) @ dequantize(quantize(b, spec)).mT, rtol=1e-5, atol=1e-4)


def test_native_sums_stand_for_a_rule_where_they_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    mx = OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())
    fine = blocks()
    cases = [
        (90, FP8, H100_FP8, True),
        (89, FP8, ADA_FP8, True),
        (90, FP8, ADA_FP8, False),
        (90, FP8, H100_FP8_PROMOTED, False),
        (90, fine, H100_FP8_PROMOTED, False),
        (89, FP8, H100_FP8, False),
        (100, FP8, B200_FP8, False),
        (100, mx, B200_FP8, False),
    ]
    gemm = GemmSpec(a=FP8, b=FP8, accumulate=H100_FP8)
    with pretend(monkeypatch, 90):
        assert choose(gemm, (128, 128, 128), CPU).backend.name == "cpu"  # nothing is measured yet
    monkeypatch.setattr(scaled_mm, "MEASURED_SUMS", {89: ADA_FP8, 90: H100_FP8})
    for arch, spec, rule, native in cases:
        gemm = GemmSpec(a=spec, b=spec, accumulate=rule)
        with pretend(monkeypatch, arch) as hardware:
            choice = choose(gemm, (128, 128, 128), CPU)
            product(gemm, torch.randn(128, 128), torch.randn(128, 128))
        assert hardware.fast == [True] * native
        said = f"{choice} {choice.backend.note(gemm)}"
        assert ("the card's own sums" if native else "is not known to give sums of") in said
