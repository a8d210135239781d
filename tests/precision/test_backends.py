"""Every backend against the reference: codes, scales, operands and transforms, bit for bit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from precision.backends import ORDER, REFERENCE, Backend, choose
from precision.formats import E2M1, E2M3, E3M2, E4M3, E4M3_240, E5M2, INT8, exmy
from precision.noise import Noise, base_key, step_key
from precision.quantize import Quantized
from precision.scaling import TENSOR, Fp32, Power, PowerOfTwo, Tile, TwoLevel, Unit
from precision.spec import GemmSpec, OperandSpec, Rounding
from precision.transforms import Hadamard

SPEC = OperandSpec(format=E4M3)
CPU = torch.device("cpu")
OTHERS = [
    pytest.param(
        backend,
        id=backend.name,
        marks=pytest.mark.skipif(
            backend.why_not(GemmSpec(a=SPEC, b=SPEC), (64, 64, 64), CPU) is not None,
            reason=str(backend.why_not(GemmSpec(a=SPEC, b=SPEC), (64, 64, 64), CPU)),
        ),
    )
    for backend in ORDER
    if backend is not REFERENCE
]
FORMATS = (E4M3, E5M2, E2M1, E4M3_240, E3M2, E2M3, exmy(4, 1), exmy(5, 2, ieee=False))
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
SCALES = (Fp32(), Fp32(pow2=True, input_max=True), TwoLevel(), *(PowerOfTwo(mode=mode) for mode in Power))
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
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_scales_and_operands(backend: Backend, fmt: object) -> None:
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
        for x in matrices(rng.choice(SHAPES), rng.choice(DTYPES), number):
            ours = backend.quantize(x, spec, amax=None, noise=noise)
            theirs = REFERENCE.quantize(x, spec, amax=None, noise=noise)
            assert same_codes(ours, theirs), (str(spec), x.dtype, x.shape, x.stride())
            views = [(ours, theirs)]
            if tile.outer == tile.inner:
                views.append((ours.t(), theirs.t()))
            for mine, reference in views:
                assert all(map(equal, backend.operand(mine), REFERENCE.operand(reference))), (str(spec), x.shape)
            assert equal(backend.amax(x, tile), REFERENCE.amax(x, tile)), (tile, x.dtype, x.shape)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("size", [2, 16, 32, 128])
def test_transforms(backend: Backend, size: int) -> None:
    transform = Hadamard(size=size, signs=3)
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        for x in matrices(shape, dtype, size):
            assert equal(backend.transformed(transform, x, left=True), transform.left(x)), (shape, dtype, x.stride())


def test_a_backend_that_refuses_says_why() -> None:
    integers = GemmSpec(a=OperandSpec(format=INT8))
    assert str(choose(integers, (None, 8, 8), CPU)).startswith("reference (not cpu: ")
    with pytest.raises(ValueError, match=r"backend 'cpu' does not take .*(no kernel for int8|no C)"):
        choose(integers, (None, 8, 8), CPU, "cpu")
    assert "meta" in str(choose(GemmSpec(a=SPEC), (None, 8, 8), torch.device("meta")))


def test_without_a_compiler_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precision.backends.cpu.library", lambda: None)
    assert str(choose(GemmSpec(a=SPEC), (None, 8, 8), CPU)).startswith("reference (not cpu: no C++ compiler)")


def test_truncation_is_left_to_the_reference() -> None:
    spec = OperandSpec(format=E5M2, scale=Unit(), rounding=Rounding.TRUNCATE)
    gemm = GemmSpec(a=spec, b=spec)
    for backend in ORDER:
        reason = backend.why_not(gemm, (64, 64, 64), CPU)
        assert (reason is None) == (backend is REFERENCE)
        x = torch.randn(33, 50)
        assert torch.equal(
            backend.quantize(x, spec, amax=None, noise=None).codes,
            REFERENCE.quantize(x, spec, amax=None, noise=None).codes,
        )
