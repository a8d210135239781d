"""Native products without a GPU: every recorded call against the documented contract of ``scaled_mm``.

``hardware.Hardware`` stands in for an architecture.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hardware import B128, MX, NV, S128, Hardware, R, T, pretend, sqnr
from narrowgauge.precision.apply import apply
from narrowgauge.precision.backends import choose, quantize_by, scaled_mm
from narrowgauge.precision.backends.scaled_mm import (
    ARCHITECTURES,
    PRODUCTS,
    SQNR_DB,
    Multiplication,
    NativeProduct,
    ScaledMM,
    find,
)
from narrowgauge.precision.backends.scaled_mm_operands import Granularity, swizzle
from narrowgauge.precision.formats import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E4M3_240,
    E5M2,
    INT4,
    INT8,
    Integer,
    NumberFormat,
    exmy,
)
from narrowgauge.precision.linear import QuantLinear
from narrowgauge.precision.loading import load
from narrowgauge.precision.quantize import Quantized, dequantize, quantize
from narrowgauge.precision.scaling import TENSOR, Fp32, Fp32Decode, PowerOfTwo, Tile, TwoLevel, Unit
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec
from narrowgauge.precision.sums import Sums
from torch import Tensor, nn
from torch.nn.functional import ScalingType, SwizzleType

CPU = torch.device("cpu")
TENSORWISE, ROWWISE, BLOCKWISE, MXFP8, NVFP4 = ((T,), (T,)), ((R,), (R,)), "block", ((MX,), (MX,)), ((NV, T), (NV, T))
HALF = ((B128,), (S128,))
FINE = ((B128,), (B128,))
#: recipe and arguments -> architecture -> what fprop, dgrad and wgrad are multiplied as; None: emulated.
EVERYWHERE = dict.fromkeys(ARCHITECTURES, (TENSORWISE,) * 3)
BLACKWELL = (100, 120)
EXPECTED: list[tuple[str, dict[str, Any], dict[int, tuple[Any, Any, Any]]]] = [
    ("fp8_current", {}, EVERYWHERE),
    ("fp8_current", {"format": "e4m3", "pow2": True}, EVERYWHERE),
    ("fp8_delayed", {}, EVERYWHERE),
    ("fp8_rowwise", {}, dict.fromkeys(ARCHITECTURES, (ROWWISE,) * 3)),
    ("fp8_rowwise", {"wgrad_high_precision": True}, dict.fromkeys(ARCHITECTURES, (ROWWISE, ROWWISE, None))),
    ("fp8_block", {}, {90: (HALF, HALF, FINE)} | dict.fromkeys(BLACKWELL, (MXFP8,) * 3)),
    ("fp8_block", {"pow2": False}, {90: (HALF, HALF, FINE)}),
    ("fp8_block", {"block": 64}, dict.fromkeys(BLACKWELL, (MXFP8,) * 3)),
    ("fp8_block", {"format": "hybrid"}, {90: (HALF, None, None)} | dict.fromkeys(BLACKWELL, (MXFP8, None, None))),
    ("mxfp8", {}, dict.fromkeys(BLACKWELL, (MXFP8,) * 3)),
    ("mxfp8", {"weights_2d": True, "format": "hybrid"}, dict.fromkeys(BLACKWELL, (MXFP8, None, None))),
    ("mxfp4", {"keep_last": 0}, dict.fromkeys(BLACKWELL, (MXFP8,) * 3)),
    ("nvfp4", {"keep_last": 0, "bf16_forward": 0}, dict.fromkeys(BLACKWELL, (NVFP4,) * 3)),
    ("nvfp4", {"keep_last": 0, "weights_2d": False, "hadamard": 0}, dict.fromkeys(BLACKWELL, (NVFP4,) * 3)),
    ("exmy", {"exponent_bits": 4, "mantissa_bits": 1}, EVERYWHERE),
    ("exmy", {}, {}),
]  # fmt: skip


def multiply(product: NativeProduct, a: Quantized, b: Quantized, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return Multiplication(product, a, b, dtype=dtype, fast=False).of(a, b, bias)


class OneBlock(nn.Module):
    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(in_features, out_features, bias=bias)})])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0]["proj"](x)  # type: ignore[index]


def step(model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and dw."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(dy)
    linear = model.layers[0]["proj"]  # type: ignore[index,union-attr]
    assert x.grad is not None
    return [y.detach(), x.grad, linear.weight.grad]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("name", "args", "expected"), EXPECTED, ids=[f"{name}-{args}" for name, args, _ in EXPECTED])
def test_every_gemm_of_every_recipe(
    monkeypatch: pytest.MonkeyPatch, name: str, args: dict[str, Any], expected: dict[int, Any], arch: int
) -> None:
    """The expected kind of call with a sound contract, and the product of the reference but for the order of sums."""
    torch.manual_seed(0)
    for (tokens, k, n), dtype, bias in [
        ((33, 50, 72), torch.bfloat16, True),
        ((256, 384, 128), torch.bfloat16, False),
        ((64, 48, 32), torch.float32, True),
    ]:
        plain = OneBlock(k, n, bias).to(dtype)
        recipe = load(name, args)
        reference = copy.deepcopy(plain)
        apply(recipe, reference, tokens=tokens, backend="reference")
        with pretend(monkeypatch, arch) as hardware:
            apply(recipe, plain, tokens=tokens)
            x, dy = torch.randn(tokens, k).to(dtype), torch.randn(tokens, n).to(dtype)
            ours = step(plain, x, dy)
        wanted = expected.get(arch, (None, None, None))
        if dtype == torch.float32:  # row-wise kernels give BF16 alone
            wanted = tuple(TENSORWISE if kind == ROWWISE else kind for kind in wanted)
        assert [call[:2] for call in hardware.calls] == [kind for kind in wanted if kind is not None]
        for mine, theirs in zip(ours, step(reference, x, dy), strict=True):
            assert mine.dtype == theirs.dtype == dtype
            assert mine.is_contiguous()
            assert sqnr(mine, theirs) > (48 if dtype == torch.bfloat16 else 110)  # dB: one rounding to BF16 apart


def test_every_row_of_the_table_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that no recipe reaches on an architecture would be a claim that nothing here holds it to."""
    specs = {
        Granularity.TENSOR: [OperandSpec(format=E4M3), OperandSpec(format=E5M2)],
        Granularity.ROW: [OperandSpec(format=E4M3, tile=Tile(1, -1)), OperandSpec(format=E5M2, tile=Tile(1, -1))],
        Granularity.ROW_AFTERWARDS: [OperandSpec(format=E4M3, tile=Tile(1, -1)), OperandSpec(format=E5M2)],
        Granularity.BLOCK: [OperandSpec(format=E4M3, tile=Tile(outer, 128)) for outer in (1, 128)],
        Granularity.MX: [OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())],
        Granularity.NV: [OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())],
    }
    formats = {E4M3, E5M2, E2M1}
    for product in PRODUCTS:
        assert {format for pair in product.pairs for format in pair} <= formats
        pairs = [(a, b) for a in specs[product.scales] for b in specs[product.scales]]
        for arch in product.architectures:
            hardware = Hardware(arch)
            monkeypatch.setattr(scaled_mm, "scaled_mm", hardware)
            for a, b in pairs:
                if (a.format, b.format) not in product.pairs or a.tile == b.tile == Tile(128, 128):
                    continue
                qa, qb = (quantize(torch.randn(rows, 130), spec) for rows, spec in ((9, a), (5, b)))
                exact = dequantize(qa).double() @ dequantize(qb).double().mT
                # The contract differs by architecture in what there is, not in dtypes: all of these on one is enough.
                for dtype in product.outputs if arch == product.architectures[0] else (torch.bfloat16,):
                    bias = torch.randn(5).to(dtype)
                    y = multiply(product, qa, qb, bias=bias, dtype=dtype)
                    decibels = 110 if dtype == torch.float32 else 40
                    assert sqnr(y, exact + bias.double()) > decibels, (product.name, arch, dtype)
                assert sqnr(multiply(product, qa, qb, bias=None, dtype=torch.bfloat16), exact) > 40
            assert hardware.calls


FORMATS: tuple[NumberFormat, ...] = (
    E2M1, E2M3, E3M2, E4M3_240, INT4, exmy(2, 1), exmy(3, 3), exmy(4, 1), exmy(5, 1),
    exmy(1, 2, ieee=False), exmy(2, 0, ieee=False), exmy(3, 0, ieee=False), Integer(bits=2), Integer(bits=3),
)  # fmt: skip


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_translated_codes_mean_the_same(monkeypatch: pytest.MonkeyPatch, fmt: NumberFormat) -> None:
    """Every code of a format that E4M3 or E5M2 holds, NaN included; transposed too."""
    hardware = Hardware(100)
    monkeypatch.setattr(scaled_mm, "scaled_mm", hardware)
    spec = OperandSpec(format=fmt, tile=TENSOR, scale=Unit())
    every = fmt.decode(torch.arange(2**fmt.bits, dtype=torch.uint8)).nan_to_num(posinf=0.0, neginf=0.0)
    x = torch.diag(every)
    quantized = quantize(x, spec)
    product = find(spec, OperandSpec(format=E4M3), 100)
    assert not isinstance(product, str)
    identity = quantize(torch.eye(len(every)), OperandSpec(format=E4M3, scale=Unit()))
    for q in (quantized, quantized.t()):
        y = multiply(product, q, identity, bias=None, dtype=torch.float32)
        assert torch.equal(torch.diagonal(y), torch.diagonal(dequantize(quantized)))


@pytest.mark.parametrize("inner", [64, 33])
@pytest.mark.parametrize("fmt", [E2M1, exmy(2, 0, ieee=False), Integer(bits=2), Integer(bits=3)], ids=str)
def test_codes_of_fewer_bits_in_nvfp4(monkeypatch: pytest.MonkeyPatch, fmt: NumberFormat, inner: int) -> None:
    """E2M1 holds their values; theirs lie one in a byte, and mean something else."""
    monkeypatch.setattr(scaled_mm, "scaled_mm", Hardware(100))
    spec = OperandSpec(format=fmt, tile=Tile(16, 16), scale=TwoLevel())
    product = find(spec, spec, 100)
    assert not isinstance(product, str)
    a, b = quantize(torch.randn(16, inner), spec), quantize(torch.randn(inner, 16), spec).t()
    for left, right in ((a, b), (b, a)):
        y = multiply(product, left, right, bias=None, dtype=torch.float32)
        assert sqnr(y, dequantize(left).double() @ dequantize(right).double().mT) > 110


def test_formats_that_fit_nowhere_are_refused() -> None:
    for fmt in (INT8, exmy(5, 3), exmy(6, 1)):
        spec = OperandSpec(format=fmt)
        assert find(spec, spec, 100) == f"no tensor-wise FP8 product of {fmt} and {fmt} on sm_100"


E5M2_TENSOR = OperandSpec(format=E5M2)


@pytest.mark.parametrize(
    ("a", "b", "arch", "reason"),
    [
        (E5M2_TENSOR, E5M2_TENSOR, 90, "no tensor-wise FP8 product of e5m2 and e5m2 on sm_90"),
        (OperandSpec(format=E4M3), OperandSpec(format=E4M3), 80, "sm_80 has no tensor-wise FP8 product"),
        (
            OperandSpec(format=E4M3, tile=Tile(1, 128)),
            OperandSpec(format=E4M3, tile=Tile(128, 128)),
            100,
            "sm_100 has no block-wise FP8 product; on sm_100 and sm_120 such scales must be powers of two (pow2=true), "
            "to be multiplied as MXFP8",
        ),
        (
            OperandSpec(format=E4M3, tile=Tile(128, 128)),
            OperandSpec(format=E4M3, tile=Tile(128, 128)),
            90,
            "no native product has scales of 128x128 (fp32) by 128x128 (fp32)",
        ),
        (
            OperandSpec(format=E4M3, tile=Tile(1, 16), scale=PowerOfTwo()),
            OperandSpec(format=E4M3, tile=Tile(1, 16), scale=PowerOfTwo()),
            100,
            "no native product has scales of 1x16 (e8m0-rceil) by 1x16 (e8m0-rceil)",
        ),
        (
            OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel()),
            OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel()),
            90,
            "sm_90 has no NVFP4 product",
        ),
        (
            OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel(block=E5M2)),
            OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel()),
            100,
            "no native product has scales of 1x16 (e5m2+fp32) by 1x16 (e4m3+fp32)",
        ),
        (
            OperandSpec(format=E2M3, tile=Tile(1, 16), scale=TwoLevel()),
            OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel()),
            100,
            "no NVFP4 product of e2m3 and e2m1 on sm_100",
        ),
        (
            OperandSpec(format=E5M2, tile=Tile(1, 32), scale=PowerOfTwo()),
            OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo()),
            120,
            "no MXFP8 product of e5m2 and e4m3 on sm_120",
        ),
    ],
)  # fmt: skip
def test_reasons(a: OperandSpec, b: OperandSpec, arch: int, reason: str) -> None:
    backend = ScaledMM(detect=lambda device: arch)
    assert backend.why_not(GemmSpec(a=a, b=b), (64, 64, 64), CPU) == reason


def test_reasons_of_the_place() -> None:
    spec = OperandSpec(format=E4M3)
    gemm = GemmSpec(a=spec, b=spec)
    assert ScaledMM().why_not(gemm, (None, 8, 8), CPU) == "the model is on cpu"
    assert ScaledMM().why_not(gemm, (None, 8, 8), torch.device("meta")) == "the model is on meta"
    gpu = torch.device("cuda")
    assert ScaledMM(detect=lambda device: None).why_not(gemm, (None, 8, 8), gpu) == "no table of its products"
    assert (
        ScaledMM(detect=lambda device: 90).why_not(GemmSpec(a=spec), (None, 8, 8), gpu) == "an operand is not quantized"
    )
    with pytest.raises(ValueError, match=r"backend 'scaled_mm' does not take .*: the model is on cpu"):
        choose(gemm, (None, 8, 8), CPU, "scaled_mm")


def test_plan_says_what_is_native_and_why_the_rest_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend(monkeypatch, 90):
        plan = str(apply(load("fp8_current", {}), OneBlock(50, 72, bias=False), tokens=33))
        assert "[scaled_mm, tensor-wise FP8 of sm_90, codes by " in plan
        assert "n 72 padded to 80, k 50 padded to 64, fast sums]" in plan
        assert "n 50 padded to 64, k 33 padded to 48]" in plan
        plan = str(apply(load("mxfp8", {}), OneBlock(64, 64, bias=False), tokens=64))
        assert plan.count("(not scaled_mm: sm_90 has no MXFP8 product)") == 3
    with pretend(monkeypatch, 100):
        plan = str(apply(load("mxfp4", {"keep_last": 0}), OneBlock(64, 64, bias=False), tokens=64))
        assert plan.count("MXFP8 of sm_100, codes by ") == plan.count("e2m1 as e4m3]") == 3
    assert "scaled_mm" not in str(apply(load("mxfp8", {}), OneBlock(64, 64, bias=False), tokens=64))


@pytest.mark.parametrize(
    ("name", "args", "fast"),
    [
        ("fp8_current", {"fast_accum": True}, [True, False, False]),
        ("fp8_delayed", {"fast_accum": True}, [True, False, False]),
        ("fp8_rowwise", {"fast_accum": True}, [True, False, False]),
        ("fp8_current", {}, [True, False, False]),  # by the backend, on Hopper
        ("fp8_current", {"fast_accum": False}, [False] * 3),
        ("fp8_block", {}, [False] * 3),
    ],
)
def test_fast_sums_in_fprop_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, args: dict[str, Any], fast: list[bool]
) -> None:
    """What reaches the call, what the plan says of it, and that emulation computes as it did."""
    recipe, x, dy = load(name, args), torch.randn(32, 48), torch.randn(32, 64)
    model = OneBlock(48, 64, bias=False)
    emulated, plain = copy.deepcopy(model), copy.deepcopy(model)
    with pretend(monkeypatch, 90) as hardware:
        plan = str(apply(recipe, model, tokens=32))
        step(model, x, dy)
    assert hardware.fast == fast
    asked = args.get("fast_accum") is True
    word = ", fast accumulation" if asked else ", fast sums]"
    assert [word in line for line in plan.splitlines() if "prop: " in line or "grad: " in line] == fast
    said = str(apply(recipe, emulated, tokens=32, backend="reference"))
    assert said.count("emulated: sums in fp32, none fast") == sum(fast) * asked
    apply(load(name, args | {"fast_accum": False} if args else {}), plain, tokens=32, backend="reference")
    assert all(map(torch.equal, step(emulated, x, dy), step(plain, x, dy)))


def test_fast_sums_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product without them is not asked for any, and the plan says that it has none."""
    block = OperandSpec(format=E4M3, tile=Tile(1, 128), scale=Fp32(input_max=True))
    mx = OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())
    for arch, spec, name in ((90, block, "block-wise FP8"), (100, mx, "MXFP8")):
        gemm = GemmSpec(a=spec, b=spec, accumulate=Sums.FAST)
        with pretend(monkeypatch, arch) as hardware:
            chosen = choose(gemm, (32, 128, 128), CPU).backend
            a, b = (quantize_by(chosen.quantizer, torch.randn(rows, 128), spec) for rows in (32, 128))
            chosen.product.gemm(a, b, bias=None, dtype=torch.bfloat16)
        assert hardware.fast == [False]
        assert f"{name} has no fast sums" in chosen.note(gemm)
    with pytest.raises(ValueError, match="fast accumulation is that of a product of two quantized operands"):
        GemmSpec(a=mx, accumulate=Sums.FAST)


@pytest.mark.parametrize("arch", [90, 100])
def test_families_of_architectures(monkeypatch: pytest.MonkeyPatch, arch: int) -> None:
    for capability, expected in (
        ((8, 9), 89),
        ((8, 0), 80),
        ((9, 0), 90),
        ((10, 3), 100),
        ((12, 1), 120),
        ((11, 0), 110),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert scaled_mm.architecture(torch.device("cuda")) == expected
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert scaled_mm.architecture(torch.device("cuda")) is None
    assert scaled_mm.architecture(CPU) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_cpu_multiplies_what_it_takes_alike(dtype: torch.dtype) -> None:
    """torch's own ``scaled_mm``, as it is on a CPU: tensor-wise and row-wise FP8."""
    native = ScaledMM(detect=lambda device: 90)
    rows = Tile(1, -1)
    for a, b in (
        (OperandSpec(format=E4M3), OperandSpec(format=E4M3)),
        (OperandSpec(format=E5M2), OperandSpec(format=E4M3)),
        (OperandSpec(format=E4M3, scale=Unit()), OperandSpec(format=E5M2, scale=Fp32(pow2=True))),
        (OperandSpec(format=E4M3, tile=rows), OperandSpec(format=E4M3, tile=rows)),
        (OperandSpec(format=E5M2, tile=rows), OperandSpec(format=E4M3, scale=Fp32Decode())),
        (OperandSpec(format=E4M3, scale=PowerOfTwo()), OperandSpec(format=E4M3, tile=rows)),
    ):
        qa, qb = (quantize(torch.randn(*shape), spec) for shape, spec in (((7, 37), a), ((21, 37), b)))
        for bias in (None, torch.randn(21).to(dtype)):
            y = native.gemm(qa, qb, bias=bias, dtype=dtype)
            exact = dequantize(qa).double() @ dequantize(qb).double().mT
            assert y.shape == (7, 21)
            assert sqnr(y, exact if bias is None else exact + bias.double()) > (
                100 if dtype == torch.float32 else SQNR_DB
            )


@pytest.mark.parametrize(
    "spec",
    [
        OperandSpec(format=E4M3),
        OperandSpec(format=E4M3, tile=Tile(1, -1)),
        OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo()),
        OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel()),
        OperandSpec(format=E2M1, tile=Tile(16, 16), scale=TwoLevel()),
        OperandSpec(format=E2M1, tile=Tile(32, 32), scale=PowerOfTwo()),
    ],
    ids=str,
)
def test_zeros_subnormals_and_what_is_not_finite(monkeypatch: pytest.MonkeyPatch, spec: OperandSpec) -> None:
    """NaN comes out where the reference has it, and padding brings in none; empty matrices multiply."""
    torch.manual_seed(0)  # sums that cancel would need another tolerance
    monkeypatch.setattr(scaled_mm, "scaled_mm", Hardware(100))
    native = ScaledMM(detect=lambda device: 100)
    for shape in ((5, 70), (1, 16), (0, 16), (4, 0)):
        b = quantize(torch.randn(9, shape[1]), spec)
        for size in (1.0, 0.0, 1e-40, torch.nan, torch.inf):
            x = torch.randn(shape)
            x.view(-1)[-3:] *= size
            a = quantize(x, spec)
            left = [a] + ([quantize(x.mT, spec).t()] if spec.tile.outer == spec.tile.inner else [])
            for q in left:
                y = native.gemm(q, b, bias=None, dtype=torch.float32)
                exact = dequantize(q).double() @ dequantize(b).double().mT
                if size == torch.inf and isinstance(
                    spec.scale, PowerOfTwo
                ):  # beyond FP32: how far is hardware's affair
                    y, exact = y[:-1], exact[:-1]
                assert torch.equal(y.isnan(), exact.isnan())
                torch.testing.assert_close(y.double().nan_to_num(), exact.nan_to_num(), rtol=1e-5, atol=1e-5)


def test_a_gemm_left_alone_for_a_while_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVFP4 switches fprop to high precision: its operands are then no codes."""
    with pretend(monkeypatch, 100) as hardware:
        model = OneBlock(64, 32, bias=False)
        apply(load("nvfp4", {"keep_last": 0}), model)
        linear = model.layers[0]["proj"]  # type: ignore[index]
        assert isinstance(linear, QuantLinear)
        linear.set_specs((linear.spec, LinearSpec()), (linear.backends, linear.backends))
        linear.use((1, 0, 0))
        x = torch.randn(32, 64)
        y, *_ = step(model, x, torch.randn(32, 32))
        torch.testing.assert_close(y, x @ linear.weight.mT)
        assert len(hardware.calls) == 2


def test_swizzle_is_torchs() -> None:
    """Against the layout of torchao, whose kernels read it on GPUs."""
    from torchao.prototype.mx_formats.utils import to_blocked

    for rows, columns in ((128, 4), (1, 1), (130, 9), (384, 16)):
        scales = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
        assert torch.equal(swizzle(scales), to_blocked(scales, use_triton_kernel=False).flatten())


def test_a_wrong_call_is_caught() -> None:
    """The stand-in refuses what hardware would: tests that lean on it can fail."""
    a, b = torch.zeros(16, 32, dtype=torch.float8_e4m3fn), torch.zeros(16, 32, dtype=torch.float8_e4m3fn).t()
    flat, swizzled = [SwizzleType.NO_SWIZZLE], [SwizzleType.SWIZZLE_32_4_4]

    def call(
        arch: int = 90,
        a: Tensor = a,
        b: Tensor = b,
        scales: Tensor | None = None,
        recipe: ScalingType = T,
        swizzle: list[SwizzleType] = flat,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        fast: bool = False,
    ) -> None:
        s = [torch.ones(1) if scales is None else scales]
        more: dict[str, Any] = {"swizzle_a": swizzle, "swizzle_b": swizzle, "bias": bias}
        Hardware(arch)(a, b, s, [recipe], s, [recipe], **more, output_dtype=dtype, use_fast_accum=fast)

    call()
    call(fast=True)
    block = torch.zeros(512, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    call(arch=100, recipe=MX, scales=block, swizzle=swizzled)
    wrong: list[dict[str, Any]] = [
        {"arch": 80},
        {"b": b.contiguous()},
        {"a": a[:, :24].contiguous(), "b": b.t()[:, :24].contiguous().t()},
        {"a": a.view(torch.float8_e5m2), "b": b.view(torch.float8_e5m2)},
        {"recipe": MX, "scales": block, "swizzle": swizzled},
        {"arch": 100, "recipe": MX, "scales": block[:64], "swizzle": swizzled},
        {"arch": 100, "recipe": MX, "scales": block},
        {"bias": torch.zeros(16), "dtype": torch.float32},
        {"arch": 100, "recipe": MX, "scales": block, "swizzle": swizzled, "fast": True},
    ]
    for arguments in wrong:
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            call(**arguments)
