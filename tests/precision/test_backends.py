"""Every backend against the reference: codes, scales, operands and transforms, bit for bit."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from narrowgauge.precision.apply import apply
from narrowgauge.precision.backends import ORDER, QUANTIZERS, REFERENCE, Cast, Quantizer, choose, quantize_by
from narrowgauge.precision.backends.cpu.library import SOURCE
from narrowgauge.precision.backends.cpu.quantizer import Cpu
from narrowgauge.precision.formats import E2M1, E2M3, E3M2, E4M3, E4M3_240, E5M2, INT8, NumberFormat, exmy
from narrowgauge.precision.loading import load
from narrowgauge.precision.noise import Noise, base_key, step_key
from narrowgauge.precision.quantize import Prepared, Quantized, amax, operand, quantize
from narrowgauge.precision.scaling import MX_POWERS, TENSOR, Fp32, PowerOfTwo, Tile, TwoLevel, Unit
from narrowgauge.precision.spec import GemmSpec, OperandSpec, Rounding
from narrowgauge.precision.transforms import Hadamard
from torch import Tensor, nn

from narrowgauge import native

SPEC = OperandSpec(format=E4M3)
CPU = torch.device("cpu")
OTHERS = [
    pytest.param(
        backend,
        id=backend.name,
        marks=pytest.mark.skipif(
            backend.why_not(GemmSpec(a=SPEC, b=SPEC), CPU) is not None,
            reason=str(backend.why_not(GemmSpec(a=SPEC, b=SPEC), CPU)),
        ),
    )
    for backend in QUANTIZERS  # native products have their codes from these
    if backend is not REFERENCE.quantizer
]
FORMATS = (
    E4M3, E5M2, E2M1, E4M3_240, E3M2, E2M3, exmy(4, 1), exmy(5, 2, ieee=False), exmy(1, 2, ieee=False)
)  # fmt: skip
USUAL = [
    fmt if fmt in (E4M3, E5M2, E2M1, exmy(1, 2, ieee=False)) else pytest.param(fmt, marks=pytest.mark.long)
    for fmt in FORMATS
]
FEW_BITS = [exmy(1, m, ieee=False) for m in (1, 3, 4, 5, 6)]
TILES = (
    TENSOR,
    Tile(1, -1),
    Tile(1, 16),
    Tile(1, 32),
    Tile(1, 128),
    Tile(16, 16),
    Tile(32, 32),
    Tile(128, 128),
    Tile(3, 5),
)
SCALES = (Fp32(), Fp32(pow2=True, input_max=True), TwoLevel(), *(PowerOfTwo(mode=mode) for mode in MX_POWERS))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(64, 48), (33, 50), (1, 1), (5, 16), (130, 65), (17, 1030), (0, 8), (8, 0)]


def matrices(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Iterator[Tensor]:
    """Twelve decades, zeros of both signs, subnormals, huge values, NaN, infinity; strided and transposed views."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(8 * torch.randn(shape, generator=generator))
    yield x.to(dtype)
    zeros = x.clone()
    zeros.view(-1)[::5], zeros.view(-1)[::7] = -0.0, 0.0
    yield zeros.to(dtype)
    yield torch.zeros(shape, dtype=dtype)
    yield from ((x * size).to(dtype) for size in (1e-38, 1e-44, 1e35))
    yield x.mT.contiguous().to(dtype).mT
    yield torch.stack((x, x), -1).to(dtype)[..., 0]
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken.view(-1)[-1:] = bad
        yield broken.to(dtype)


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    nan = [x.isnan() if x.is_floating_point() else torch.zeros_like(x, dtype=torch.bool) for x in (a, b)]
    signs = [x.signbit() & ~n if x.is_floating_point() else n for x, n in zip((a, b), nan, strict=True)]
    values = [x.masked_fill(n, 0) for x, n in zip((a, b), nan, strict=True)]
    return a.dtype == b.dtype and all(torch.equal(*pair) for pair in (nan, signs, values))


def same_codes(a: Quantized, b: Quantized) -> bool:
    return equal(a.codes, b.codes) and equal(a.scales, b.scales) and equal(a.tensor_scale, b.tensor_scale)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("fmt", USUAL, ids=str)
def test_codes_scales_and_operands(backend: Quantizer, fmt: object) -> None:
    rng = random.Random(str(fmt))
    for number, (tile, scale, rounding) in enumerate(itertools.product(TILES, SCALES, Rounding)):
        if tile == TENSOR and isinstance(scale, TwoLevel):
            continue
        spec = OperandSpec(format=fmt, tile=tile, scale=scale, rounding=rounding)  # type: ignore[arg-type]
        noise = None
        if rounding is Rounding.STOCHASTIC:
            offset = rng.choice([0, 5, 2**32 - 3, 2**40])
            key = step_key(base_key(1, "layers.0", 2), number)
            noise = Noise(key=key, row_offset=offset, transposed=rng.random() < 0.5)
        choices = list(matrices(rng.choice(SHAPES), rng.choice(DTYPES), number))
        for x in (choices[0], *rng.sample(choices[1:], 4)):  # hundreds of specs: each kind meets many
            ours, theirs = quantize_by(backend, x, spec, noise=noise), quantize(x, spec, noise=noise)
            assert same_codes(ours, theirs), (str(spec), x.dtype, x.shape, x.stride())
            views = [(ours, theirs)]
            if tile.outer == tile.inner:
                views.append((ours.t(), theirs.t()))
            for mine, reference in views:
                assert all(map(equal, backend.operand(mine), operand(reference))), (str(spec), x.shape)
            assert equal(backend.amax(x, tile), amax(x, tile)), (tile, x.dtype, x.shape)


def ties(fmt: NumberFormat) -> Tensor:
    """[rows, 64]: values of the format, what lies half-way, the neighbours of both, and what is beyond."""
    grid = fmt.decode(torch.arange(1 << fmt.bits, dtype=torch.int32).to(torch.uint8)).unique()
    x = torch.cat(
        (grid, (grid[1:] + grid[:-1]) / 2, 1.5 * grid, torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0]))
    )
    inf = torch.tensor(torch.inf)
    x = torch.cat((x, x.nextafter(inf), x.nextafter(-inf)))
    return torch.nn.functional.pad(x, (0, -len(x) % 64)).reshape(-1, 64)


def assert_every_tie(backend: Quantizer, fmt: NumberFormat) -> None:
    """Of every dtype, and of every code."""
    for dtype, rounding in itertools.product(DTYPES, list(Rounding)):
        x = ties(fmt).to(dtype)
        noise = None
        if rounding is Rounding.STOCHASTIC:
            noise = Noise(key=step_key(base_key(1, "layers.0", 2), fmt.bits), row_offset=3, transposed=False)
        spec = OperandSpec(format=fmt, scale=Unit(), rounding=rounding)
        ours, theirs = (quantize_by(b, x, spec, noise=noise) for b in (backend, REFERENCE.quantizer))
        assert same_codes(ours, theirs), (str(spec), dtype)
        assert all(map(equal, backend.operand(ours), operand(theirs))), (str(spec), dtype)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("fmt", [*FORMATS, *FEW_BITS], ids=str)
def test_every_tie(backend: Quantizer, fmt: NumberFormat) -> None:
    assert_every_tie(backend, fmt)


WIDE_SHAPES = [(256, 48), (160, 33), (130, 16), (48, 256), (17, 300), (1, 40), (40, 1), (600, 20)]


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1, exmy(1, 2, ieee=False)], ids=str)
@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC], ids=str)
def test_what_gemms_read(backend: Quantizer, fmt: NumberFormat, rounding: Rounding) -> None:
    """Read along rows and columns, transformed on the way or not, kept as codes or not: always the reference's bits."""
    rng = random.Random(f"{fmt} {rounding}")
    transforms = (None, Hadamard(), Hadamard(size=32, signs=3))
    for number, (tile, scale) in enumerate(itertools.product(TILES[:-1], SCALES[:4])):
        transform = rng.choice(transforms)
        if tile == TENSOR and isinstance(scale, TwoLevel):
            continue
        spec = OperandSpec(format=fmt, tile=tile, scale=scale, rounding=rounding)
        noise = None
        if rounding is Rounding.STOCHASTIC:
            key = step_key(base_key(1, "layers.0", 2), number)
            noise = Noise(key=key, row_offset=rng.choice([0, 2**32 - 3]), transposed=rng.random() < 0.5)
        choices = list(matrices(rng.choice(WIDE_SHAPES), rng.choice(DTYPES[:2]), number))
        for x in (choices[0], *rng.sample(choices[1:], 2)):
            for seen in (x, x.mT):
                cast = Cast(spec=spec, noise=noise, transform=transform)
                mine, theirs = (b.cast(seen, cast) for b in (backend, REFERENCE.quantizer))
                assert isinstance(mine, Quantized)
                assert isinstance(theirs, Quantized)
                assert same_codes(mine, theirs), (str(spec), str(transform), seen.dtype, seen.shape, seen.stride())
                made = backend.cast(seen, replace(cast, codes=False))
                assert isinstance(made, Prepared)
                matrix, factor = operand(theirs)
                assert equal(made.matrix, matrix), (str(spec), str(transform), seen.dtype, seen.shape, seen.stride())
                assert made.matrix.stride() == matrix.stride() or 1 in matrix.shape
                assert equal(made.factor, factor)


@pytest.mark.parametrize("backend", OTHERS)
def test_an_amax_from_elsewhere(backend: Quantizer) -> None:
    """Of an earlier step, for a tensor that has outgrown it, shrunk, or broken since."""
    rng = random.Random(3)
    rules = (Fp32(), Fp32(margin=2, eps=1e-3), TwoLevel())
    for number, (fmt, rule, rounding) in enumerate(itertools.product((E4M3, E5M2, E2M1), rules, list(Rounding)[:2])):
        tile = rng.choice([Tile(1, 16), Tile(16, 16)]) if isinstance(rule, TwoLevel) else TENSOR
        spec = OperandSpec(format=fmt, tile=tile, scale=rule, rounding=rounding)
        key = step_key(base_key(1, "layers.0", 2), number)
        noise = Noise(key=key, row_offset=5, transposed=False) if rounding is Rounding.STOCHASTIC else None
        for x in matrices(rng.choice(WIDE_SHAPES), rng.choice(DTYPES[:2]), number):
            value = rng.choice([0.0, 1e-40, 0.3, 1e5, 1e38, torch.inf, torch.nan])
            given, transform = torch.tensor([value]), rng.choice([None, Hadamard()])
            cast = Cast(spec=spec, amax=given, noise=noise, transform=transform, left=False)
            theirs, mine = (b.cast(x, cast) for b in (REFERENCE.quantizer, backend))
            made = backend.cast(x, replace(cast, codes=False))
            assert isinstance(theirs, Quantized)
            assert isinstance(mine, Quantized)
            assert isinstance(made, Prepared)
            assert same_codes(mine, theirs), (str(spec), value, x.dtype, x.shape)
            assert all(map(equal, (made.matrix, made.factor), operand(theirs))), (str(spec), value, x.dtype)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_torchs_default_dtype_changes_nothing(default: torch.dtype) -> None:
    x = torch.randn(64, 48).bfloat16()
    specs = [OperandSpec(format=E4M3), OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())]
    specs += [OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())]
    expected = [quantize(x, spec) for spec in specs]
    operands = [operand(q) for q in expected]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for backend in (REFERENCE, choose(GemmSpec(a=SPEC, b=SPEC), (None, 8, 8), CPU).backend):
            for spec, q, read in zip(specs, expected, operands, strict=True):
                made = quantize_by(backend.quantizer, x, spec)
                assert same_codes(made, q), (backend.name, str(spec))
                assert all(map(equal, backend.quantizer.operand(made), read)), (backend.name, str(spec))
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("recipe", ["mxfp8", "nvfp4", "fp8_current"])
def test_gradients_that_are_not_finite_reach_the_loop(recipe: str) -> None:
    """Which skips the step: nothing is raised on the way, however large the factors of a product."""
    args = {"keep_last": 0, "bf16_forward": 0} if recipe == "nvfp4" else {}
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(32, 64, bias=False)})])})
    plan = apply(load(recipe, args), model.bfloat16())
    plan.begin_step(1, 0)
    for value in (torch.inf, 1e38):
        x = (torch.randn(2, 16, 32) * 1000).bfloat16().requires_grad_()
        y = model.get_submodule("layers.0.up_proj")(x)
        dy = torch.randn_like(y)
        dy[0, 0, 0] = value
        y.backward(dy)
        assert x.grad is not None
        assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "spec",
    [SPEC, OperandSpec(format=E2M1), OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())],
    ids=["fp8", "fp4", "nvfp4"],
)
def test_scales_of_a_tensor_multiply_sums_and_never_terms(spec: OperandSpec, dtype: torch.dtype) -> None:
    """Terms that cancel give 0 whatever the scales are; where sums are exact, so is all but the last rounding."""
    for seed, backend in itertools.product(range(8), (REFERENCE, choose(GemmSpec(a=spec), (64, 64, 2), CPU).backend)):
        generator = torch.Generator().manual_seed(seed)
        x, w = (torch.randn(64, 1, generator=generator) for _ in range(2))
        a, b = (quantize_by(backend.quantizer, torch.cat(pair, 1).to(dtype), spec) for pair in ((x, x), (w, -w)))
        assert float(backend.product.gemm(a, b, bias=None, dtype=dtype).abs().max()) == 0.0
        if spec.format != E2M1 or spec.tile != TENSOR:
            continue
        x, w = (torch.randn(size, 96, generator=generator).to(dtype) for size in (33, 70))
        a, b = (quantize_by(backend.quantizer, each, spec) for each in (x, w))
        (left, left_factor), (right, right_factor) = map(backend.quantizer.operand, (a, b))
        assert left_factor is not None
        assert right_factor is not None
        alpha = (left_factor.double() * right_factor.double()).float()
        expected = (left.double() @ right.double().mT).float() * alpha
        assert torch.equal(backend.product.gemm(a, b, bias=None, dtype=dtype), expected.to(dtype))
        bias = torch.randn(70, generator=generator).to(dtype)
        y = backend.product.gemm(a, b, bias=bias, dtype=dtype)
        torch.testing.assert_close(y, (expected + bias.float()).to(dtype))


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("size", [2, 16, 32, 128])
def test_transforms(backend: Quantizer, size: int) -> None:
    transform = Hadamard(size=size, signs=3)
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        for x in matrices(shape, dtype, size):
            assert equal(backend.transformed(transform, x, left=True), transform.left(x)), (shape, dtype, x.stride())


def test_wrong_shapes_are_refused_before_a_kernel_reads_them() -> None:
    x, tile = torch.randn(32, 48).bfloat16(), Tile(1, 16)
    spec = OperandSpec(format=E4M3, tile=tile, scale=PowerOfTwo())
    cpu, scales = Cpu(), torch.ones(32, 3)
    cpu.rounded(x, scales, scales, spec, None, torch.bfloat16)
    for wrong in (scales[1:], scales.double(), scales.mT, scales[:, :1], torch.ones(33, 3)):
        with pytest.raises(ValueError, match=r"tiles of 1x16 of \[32, 48\] have float32 \[32, 3\], not "):
            cpu.encode(x, wrong, spec, None)
        with pytest.raises(ValueError, match="tiles of 1x16"):
            cpu.rounded(x, scales, wrong, spec, None, torch.bfloat16)
    q = quantize_by(cpu, x, spec)
    for codes in (q.codes[:, :-1], q.codes[1:], q.codes.float()):
        with pytest.raises(ValueError, match=r"codes of e4m3 of \[32, 48\] are uint8 \[32, 48\], not "):
            cpu.values(replace(q, codes=codes), None, torch.bfloat16)
    with pytest.raises(ValueError, match="tiles of 1x16"):
        cpu.values(q, scales[1:], torch.bfloat16)
    with pytest.raises(ValueError, match="kernels read contiguous tensors"):
        cpu.values(replace(q, codes=q.codes.mT.contiguous().mT), None, torch.bfloat16)


FORKS = """
import multiprocessing, torch
from narrowgauge.precision.backends import QUANTIZERS, quantize_by
from narrowgauge.precision.backends.reference import Emulated
from narrowgauge.precision.scaling import TwoLevel, Tile
from narrowgauge.precision.formats import E2M1
from narrowgauge.precision.spec import OperandSpec

def work():
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    spec = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())
    q = [quantize_by(QUANTIZERS[0], t, spec) for t in (x, x.mT)]
    y = Emulated(QUANTIZERS[0]).gemm(q[0], q[0], bias=None, dtype=x.dtype)
    return int(q[0].codes.sum()), int(q[1].codes.sum()), float(y[0, 0])

if __name__ == "__main__":
    torch.set_num_threads(2)
    expected = work()
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.apply_async(work).get(60) == expected, method
    print("same")
"""


def test_forked_and_spawned_workers_give_the_same_bits(tmp_path: Path) -> None:
    """After the parent has used its threads, which a forked child does not have."""
    script = tmp_path / "forks.py"
    script.write_text(FORKS)
    ran = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True, timeout=200)
    assert ran.stdout.strip() == "same", ran.stderr


def test_kernels_stay_inside_their_buffers(tmp_path: Path) -> None:
    """Odd shapes under AddressSanitizer."""
    compiler = native.shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    driver, program = Path(__file__).with_name("fuzz_kernels.cpp"), tmp_path / "fuzz"
    flags = ["-O1", "-g", "-std=c++17", "-march=native", "-ffp-contract=off", "-fsanitize=address", "-w"]
    subprocess.run([compiler, *flags, "-include", SOURCE, "-o", program, driver], check=True, timeout=250)
    ran = subprocess.run([program], check=False, capture_output=True, text=True, timeout=100)
    assert ran.stdout == "clean\n", ran.stderr[:3000]


def test_a_backend_that_refuses_says_why() -> None:
    integers = GemmSpec(a=OperandSpec(format=INT8))
    assert str(choose(integers, (None, 8, 8), CPU)).startswith("reference (not cpu: ")
    with pytest.raises(ValueError, match=r"backend 'cpu' does not take .*(no kernel for int8|no C)"):
        choose(integers, (None, 8, 8), CPU, "cpu")
    with pytest.raises(ValueError, match=r"no backend named 'triton_dot' \(did you mean 'triton'\?\)"):
        choose(integers, (None, 8, 8), CPU, "triton_dot")
    assert "meta" in str(choose(GemmSpec(a=SPEC), (None, 8, 8), torch.device("meta")))


def test_without_a_compiler_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowgauge.precision.backends.cpu.quantizer.library", lambda: None)
    assert str(choose(GemmSpec(a=SPEC), (None, 8, 8), CPU)).startswith("reference (not cpu: no C++ compiler)")


def test_truncation_is_left_to_the_reference() -> None:
    spec = OperandSpec(format=E5M2, scale=Unit(), rounding=Rounding.TRUNCATE)
    gemm = GemmSpec(a=spec, b=spec)
    for backend in ORDER:
        reason = backend.product.why_not(gemm, (64, 64, 64), CPU)
        assert (reason is None) == (backend is REFERENCE)
        x = torch.randn(33, 50)
        assert torch.equal(quantize_by(backend.quantizer, x, spec).codes, quantize(x, spec).codes)
