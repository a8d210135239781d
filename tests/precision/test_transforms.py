"""Transforms against the matrices that they stand for, and against loops in their defined order."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from narrowgauge.precision import hadamard_matrices
from narrowgauge.precision.apply import apply
from narrowgauge.precision.backends import Cast
from narrowgauge.precision.backends.choose import QUANTIZERS
from narrowgauge.precision.backends.interface import knows_transform
from narrowgauge.precision.formats import E2M1, E4M3
from narrowgauge.precision.linear import quantized
from narrowgauge.precision.noise import Noise, base_key, step_key
from narrowgauge.precision.quantize import Quantized, dequantize, quantize
from narrowgauge.precision.recipe import Recipe, Rule
from narrowgauge.precision.scaling import PowerOfTwo, Tile, TwoLevel
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Transform
from narrowgauge.precision.transforms import (
    TE_SIGNS,
    Along,
    Composed,
    Hadamard,
    Outer,
    Rescale,
    Signs,
    back,
    check_shape,
    drawn,
    draws,
)
from scipy.linalg import hadamard as sylvester
from torch import Tensor, nn

SIZES = [2, 4, 8, 16, 32, 64, 128]
#: Widths of whole rows: powers of two, Paley I (12, 44), Paley II of primes (36, 76) and of their squares (52, 100),
#: the searched orders (92, 116, 156, 172), and multiples by powers of two.
WIDTHS = [1, 2, 16, 256, 12, 48, 44, 36, 76, 52, 100, 200, 92, 116, 156, 172, 344]
KEY = step_key(base_key(3, "layers.0.up_proj", 4), 11)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whole_matrix(width: int, signs: Tensor) -> Tensor:
    """diag(signs) (H_K x H_P) / sqrt(width) in FP64."""
    order, power = hadamard_matrices.factors(width)
    h = np.kron(hadamard_matrices.matrix(order).numpy(), sylvester(power))
    return signs.double()[:, None] * torch.from_numpy(h).double() / math.sqrt(width)


def matrix(transform: Hadamard) -> Tensor:
    """diag(signs) H / sqrt(size) in FP64."""
    n = transform.size
    h = [[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    return torch.tensor(transform.vector(), dtype=torch.float64)[:, None] * torch.tensor(h).double() / math.sqrt(n)


def in_order(transform: Hadamard, block: np.ndarray) -> np.ndarray:
    """One block in FP32, by the defined order of operations."""
    y = [np.float32(s) * v for s, v in zip(transform.vector(), block.astype(np.float32), strict=True)]
    stride = 1
    while stride < transform.size:
        for i in range(transform.size):
            if not i & stride:
                y[i], y[i + stride] = y[i] + y[i + stride], y[i] - y[i + stride]
        stride *= 2
    return np.array([v * np.float32(1 / math.sqrt(transform.size)) for v in y])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("signs", ["none", 0, 12345])
def test_is_the_matrix_and_cancels(size: int, signs: str | int) -> None:
    transform = Hadamard(size=size, signs=signs)
    gen = torch.Generator().manual_seed(size)
    a, b = (torch.randn(rows, 3 * size, dtype=torch.float64, generator=gen) for rows in (5, 7))
    rotation = matrix(transform)
    assert torch.allclose(rotation @ rotation.mT, torch.eye(size).double(), atol=1e-14)
    want = (a.reshape(-1, size) @ rotation).reshape_as(a)
    assert torch.allclose(transform.left(a), want, rtol=0, atol=1e-13)
    product = transform.output(transform.left(a) @ transform.right(b).mT)
    assert torch.allclose(product, a @ b.mT, rtol=0, atol=1e-12)


def test_te_signs() -> None:
    assert Hadamard().vector() == TE_SIGNS
    assert sum(1 << i for i, s in enumerate(TE_SIGNS) if s < 0) == 0b1101_0111_1110_1000
    one = torch.zeros(1, 16)
    one[0, 3] = 4.0  # row 3 of H with the sign of element 3
    assert Hadamard().left(one).tolist() == [[-((-1.0) ** (3 & j).bit_count()) for j in range(16)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_order_and_rounding(size: int, dtype: torch.dtype) -> None:
    transform = Hadamard(size=size, signs=7)
    x = (torch.randn(3, size, generator=torch.Generator().manual_seed(1)) * 5).to(dtype)
    got = transform.left(x)
    want = np.stack([in_order(transform, row.float().numpy()) for row in x])
    assert want.dtype == np.float32
    assert got.dtype == dtype
    assert torch.equal(got, torch.from_numpy(want).to(dtype))


def test_sums_in_fp32() -> None:
    x = torch.tensor([[256.0] + [1.0] * 15], dtype=torch.bfloat16)  # BF16 sums would lose the ones
    assert Hadamard(signs="none").left(x)[0, 0] == torch.tensor(271 / 4).bfloat16()


@pytest.mark.parametrize("size", [2, 16, 128])
def test_ragged_block_is_left_alone(size: int) -> None:
    transform = Hadamard(size=size, signs=3)
    gen = torch.Generator().manual_seed(2)
    a, b = (torch.randn(4, 2 * size + size // 2, dtype=torch.float64, generator=gen) for _ in range(2))
    left = transform.left(a)
    assert torch.equal(left[:, 2 * size :], a[:, 2 * size :])
    assert not torch.equal(left[:, : 2 * size], a[:, : 2 * size])
    assert torch.allclose(left @ transform.right(b).mT, a @ b.mT, rtol=0, atol=1e-12)


def test_views_and_empty_shapes() -> None:
    x = torch.randn(48, 33)
    assert torch.equal(Hadamard().left(x.mT), Hadamard().left(x.mT.contiguous()))
    for shape in ((0, 32), (3, 0), (3, 5)):
        assert torch.equal(Hadamard().left(torch.ones(shape)), torch.ones(shape))


def test_spreads_an_outlier() -> None:
    x = torch.zeros(1, 16)
    x[0, 5] = 100.0
    assert Hadamard().left(x).abs().max() == 25.0


def test_nonfinite_values_stay_in_their_block() -> None:
    x = torch.ones(2, 48)
    x[0, 20] = torch.nan
    bad = Hadamard().left(x).isnan()
    assert bad[0, 16:32].all()
    assert bad.sum() == 16


def test_seeds() -> None:
    vectors = {Hadamard(size=128, signs=seed).vector() for seed in range(20)}
    assert len(vectors) == 20
    assert all(-50 < sum(v) < 50 for v in vectors)
    assert str(Hadamard(size=32, signs=4)) == "hadamard32/4"


@pytest.mark.parametrize(
    ("size", "signs", "match"),
    [
        (3, 0, "size"),
        (1, 0, "size"),
        (256, 0, "size"),
        (-2, 0, "size"),
        (32, "te", "for size 16"),
        (-1, "te", "for size 16, not the whole width"),
        (16, "random", "'te', 'none', 'step' or"),
    ],
)
def test_refusals(size: int, signs: str | int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Hadamard(size=size, signs=signs)


# Hadamard matrices of other orders, and transforms of whole rows.


def test_matrices_are_hadamard() -> None:
    orders = {hadamard_matrices.factors(4 * odd * 64)[0] for odd in (*range(1, 63, 2), 75) if odd not in (47, 59)}
    orders -= {1}
    for order in orders:
        h = hadamard_matrices.matrix(order)
        assert h.shape == (order, order)
        assert bool((h.abs() == 1).all())
        assert torch.equal(h @ h.mT, order * torch.eye(order).double())
    assert orders == {4 * odd for odd in (*range(3, 63, 2), 75) if odd not in (47, 59)}


def test_widths_of_halo_and_of_models() -> None:
    for order in (12, 20, 28, 36, 40, 44, 52, 60, 100, 108, 140, 156, 172):  # those of HALO's code
        assert math.prod(hadamard_matrices.factors(order * 8)) == order * 8
    of_models = {4096: 1, 768: 12, 11008: 172, 13824: 108, 14336: 28, 18944: 148, 5632: 44, 896: 28, 1376: 172}
    assert {width: hadamard_matrices.factors(width)[0] for width in of_models} == of_models
    assert hadamard_matrices.factors(47 * 64) == (752, 4)


@pytest.mark.parametrize(("width", "near"), [(94, "92 and 96"), (3, "2 and 4"), (47 * 8, "368 and 380")])
def test_a_width_that_no_matrix_serves(width: int, near: str) -> None:
    transform = Hadamard(size=-1, signs="none")
    with pytest.raises(ValueError, match=f"order {width} is known here: {near} are the nearest"):
        transform.left(torch.ones(2, width))
    with pytest.raises(ValueError, match=near):
        check_shape(Composed(first=Rescale(name="by row"), second=transform), (8, 8, width))
    with pytest.raises(ValueError, match=near):
        check_shape(Outer(b=transform), (8, width, 8))
    check_shape(Outer(a=transform), (8, width, width))
    check_shape(transform, (width, width, None))


@pytest.mark.parametrize("signs", ["none", 5, "step"])
@pytest.mark.parametrize("width", WIDTHS)
def test_whole_rows(width: int, signs: str | int) -> None:
    said = Hadamard(size=-1, signs=signs)
    transform = drawn(said, KEY)
    a, b = randn(5, width), randn(7, width, seed=1)
    vector = torch.tensor(said.vector(width)) if signs != "step" else Signs(key=KEY).vector(width)
    rotation = whole_matrix(width, vector)
    assert torch.allclose(rotation @ rotation.mT, torch.eye(width).double(), rtol=0, atol=1e-13)
    assert torch.allclose(transform.left(a), a @ rotation, rtol=0, atol=1e-13)
    assert torch.allclose(transform.left(a) @ transform.right(b).mT, a @ b.mT, rtol=0, atol=1e-11)
    for left in (True, False):
        assert torch.allclose(back(transform, a, left=left), a @ rotation.mT, rtol=0, atol=1e-13)
    assert torch.allclose(back(transform, transform.left(a), left=True), a, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 16, 24, 80])
def test_order_and_rounding_of_whole_rows(width: int, dtype: torch.dtype) -> None:
    transform = Hadamard(size=-1, signs=7)
    order, power = hadamard_matrices.factors(width)
    x = (randn(3, width) * torch.tensor([[1.0], [1e-6], [1e3]])).to(dtype)  # FP16: subnormal ones, too
    h, wanted = hadamard_matrices.matrix(order), []
    for row in x.float().numpy():
        y = (row * np.array(transform.vector(width), np.float32)).reshape(order, power)
        stride = 1
        while stride < power:
            for i in range(power):
                if not i & stride:
                    y[:, i], y[:, i + stride] = y[:, i] + y[:, i + stride], y[:, i] - y[:, i + stride]
            stride *= 2
        if order > 1:
            sums = [
                [math.fsum(float(h[i, j]) * float(y[i, p]) for i in range(order)) for p in range(power)]
                for j in range(order)
            ]
            y = np.array(sums).astype(np.float32)
        wanted.append(y.reshape(-1) * np.float32(1 / math.sqrt(width)))
    want = np.stack(wanted)
    assert want.dtype == np.float32
    got = transform.left(x)
    assert got.dtype == dtype
    assert torch.equal(got, torch.from_numpy(want).to(dtype))
    assert torch.equal(transform.left(x[1:2]), got[1:2])  # a row depends on no other
    assert torch.equal(transform.left(x.mT.contiguous().mT), got)


def test_whole_rows_that_are_not_finite_or_empty() -> None:
    transform = Hadamard(size=-1, signs="none")
    x = torch.ones(4, 48)
    x[0, 20], x[1, 3] = torch.nan, torch.inf
    x[3] = 0
    y = transform.left(x)
    assert bool(y[0].isnan().all())
    assert not bool(y[1].isfinite().any())
    assert bool(y[2:].isfinite().all())
    assert not bool(y[3].any())
    for shape in ((0, 48), (3, 0)):
        assert transform.left(torch.ones(shape)).shape == shape


def test_a_block_is_a_row_of_its_width() -> None:
    x = randn(3, 64).bfloat16()
    for signs in ("none", 9):
        assert torch.equal(Hadamard(size=64, signs=signs).left(x), Hadamard(size=-1, signs=signs).left(x))
    vector = Hadamard(size=-1, signs=1).vector(1376)
    assert -150 < sum(vector) < 150
    assert vector[:256] != vector[256:512]
    with pytest.raises(ValueError, match="hadamard-full/1 has signs for rows of a width only"):
        Hadamard(size=-1, signs=1).vector()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [32, -1])
def test_unrounded(size: int, dtype: torch.dtype) -> None:
    transform, x = Hadamard(size=size, signs=2, rounded=False), randn(3, 48 if size == -1 else 100).to(dtype)
    y = transform.left(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, Hadamard(size=size, signs=2).left(x.float()))
    assert torch.equal(y.to(dtype), Hadamard(size=size, signs=2).left(x))
    assert transform.back(x, left=True).dtype == dtype
    assert drawn(Hadamard(size=size, signs="step", rounded=False), KEY).left(x).dtype == torch.float32
    spec = OperandSpec(format=E4M3)
    for quantizer in QUANTIZERS:
        made = quantizer.cast(x, Cast(spec=spec, transform=transform))
        assert isinstance(made, Quantized)
        assert torch.equal(made.codes, quantize(y, spec).codes)


# Signs of a step.


def test_signs_of_a_step() -> None:
    transform = Hadamard(size=16, signs="step")
    assert draws(transform)
    for apply_to in (transform.left, transform.right, lambda x: back(transform, x, left=True)):
        with pytest.raises(ValueError, match="hadamard16/step is drawn anew at every step: apply what drawn"):
            apply_to(torch.ones(2, 16))
    of_step = drawn(transform, KEY)
    assert not draws(of_step)
    uniform = Noise(key=KEY).uniform(1, 16)[0]
    signs = torch.tensor([-1.0 if u >= 0.5 else 1.0 for u in uniform.tolist()])
    x = randn(5, 40)
    rotation = whole_matrix(16, signs)
    for start in (0, 16):
        assert torch.allclose(of_step.left(x)[:, start : start + 16], x[:, start : start + 16] @ rotation, atol=1e-14)
    assert torch.equal(of_step.left(x)[:, 32:], x[:, 32:])
    assert torch.allclose(back(of_step, of_step.left(x), left=True), x, rtol=0, atol=1e-14)


def test_signs_depend_on_seed_step_and_path_alone() -> None:
    def signs(seed: int, path: str, step: int) -> tuple[float, ...]:
        return tuple(Signs(key=step_key(base_key(seed, path, 4), step)).vector(64).tolist())

    same = [signs(1, "a", 2) for _ in range(2)]
    others = [signs(2, "a", 2), signs(1, "b", 2), signs(1, "a", 3)]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 4
    # All that a rank has are rows of its own.
    x, transform = randn(8, 64).bfloat16(), drawn(Hadamard(size=32, signs="step"), KEY)
    assert torch.equal(torch.cat([transform.left(x[:3]), transform.left(x[3:])]), transform.left(x))
    vectors = torch.stack([Signs(key=step_key(base_key(0, "a", 4), step)).vector(64) for step in range(400)])
    assert vectors.mean(0).abs().max() < 0.2
    assert (vectors.mT @ vectors / 400 - torch.eye(64)).abs().max() < 0.25  # no two signs go together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_kernels_do_what_comes_after_the_signs(size: int, dtype: torch.dtype, columns: bool) -> None:
    transform = drawn(Hadamard(size=size, signs="step"), KEY)
    x = randn(200, 48).to(dtype)
    x = x.mT if columns else x.mT.contiguous()
    want = transform.left(x)
    spec = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())
    for quantizer in QUANTIZERS:
        assert torch.equal(quantizer.transformed(transform, x, left=True), want)
        made = quantizer.cast(x, Cast(spec=spec, transform=transform))
        assert isinstance(made, Quantized)
        assert torch.equal(made.codes, quantize(want, spec).codes)
        assert torch.equal(made.scales, quantize(want, spec).scales)


def test_kernels_know_blocks_with_signs_that_stay() -> None:
    known = [Hadamard(), Hadamard(size=64, signs=1), Hadamard(size=2, signs="none")]
    refused = [Hadamard(signs="step"), Hadamard(size=-1, signs="none"), Hadamard(rounded=False), Outer(a=Hadamard())]
    assert all(map(knows_transform, known))
    assert not any(map(knows_transform, [*refused, None, Composed(first=Hadamard(), second=Hadamard())]))


# The way back, of every kind; and along the outer dimensions.

STATS = torch.tensor([0.5, 2.0, 4.0, 1.0, 8.0])
BY_ROW = Rescale(name="by row", a=Along(0, 1), y=Along(0, -1))
BY_COLUMN = Rescale(name="by column", a=Along(1, -1), b=Along(1, 1))
KINDS: dict[str, tuple[Transform, Tensor | None]] = {
    "te": (Hadamard(), None),
    "a seed": (Hadamard(size=8, signs=3), None),
    "ragged": (Hadamard(size=32, signs="none"), None),
    "whole": (Hadamard(size=-1, signs=4), None),
    "step": (Hadamard(size=8, signs="step"), None),
    "whole, step": (Hadamard(size=-1, signs="step"), None),
    "unrounded": (Hadamard(size=16, signs="step", rounded=False), None),
    "rescaled": (BY_ROW, STATS),
    "rescaled columns": (BY_COLUMN, torch.linspace(0.5, 2, 52).double()),
    "without statistics": (BY_ROW, None),
    "rescaled and whole": (Composed(first=BY_ROW, second=Hadamard(size=-1, signs="step")), STATS),
    "two that are drawn": (Composed(first=Hadamard(size=4, signs="step"), second=Hadamard(signs="step")), None),
    "rows of a": (Outer(a=Hadamard(size=4, signs="step")), None),
    "all rows of b": (Outer(b=Hadamard(size=-1, signs="none")), None),
    "rows of both": (Outer(a=Hadamard(size=2, signs=1), b=Hadamard(size=-1, signs="step")), None),
    "all three": (
        Composed(first=Outer(a=Hadamard(size=4, signs=1), b=Hadamard(signs="none")), second=Hadamard()),
        None,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_cancels_and_knows_its_way_back(kind: str) -> None:
    said, stats = KINDS[kind]
    transform = drawn(said, KEY)
    assert not draws(transform)
    a, b = randn(5, 52).requires_grad_(), randn(12, 52, seed=1).requires_grad_()
    y = transform.output(transform.left(a, stats) @ transform.right(b, stats).mT, stats)
    assert torch.allclose(y, a @ b.mT, rtol=0, atol=1e-12)
    sides: list[tuple[Tensor, Callable[[Tensor, Tensor | None], Tensor]]] = [(a, transform.left), (b, transform.right)]
    for operand, forward in sides:
        made = forward(operand, stats)
        gradient = randn(*operand.shape, seed=2)
        (want,) = torch.autograd.grad(made, operand, gradient) if made is not operand else (gradient,)
        got = back(transform, gradient, left=operand is a, stats=stats)
        assert torch.allclose(got, want, rtol=0, atol=1e-13)
        if kind != "without statistics" and not (isinstance(said, Outer) and made is operand):
            assert not torch.allclose(made, operand) or isinstance(said, Rescale)
        with torch.no_grad():  # where sums are written in place
            assert torch.equal(forward(operand, stats), made)


def test_two_that_are_drawn_have_signs_of_their_own() -> None:
    both = drawn(Composed(first=Hadamard(size=64, signs="step"), second=Hadamard(size=64, signs="step")), KEY)
    assert isinstance(both, Composed)
    first, second = (part.first for part in (both.first, both.second) if isinstance(part, Composed))
    assert isinstance(first, Signs)
    assert isinstance(second, Signs)
    assert not torch.equal(first.vector(64), second.vector(64))
    assert torch.equal(first.key, KEY)


def test_outer_rows_are_rotated_and_the_output_is_rotated_back() -> None:
    m, n, k = 12, 40, 9
    transform = Outer(a=Hadamard(size=-1, signs=1), b=Hadamard(size=16, signs=2))
    a, b = randn(m, k), randn(n, k, seed=1)
    of_m = whole_matrix(m, torch.tensor(Hadamard(size=-1, signs=1).vector(m)))
    of_n = torch.block_diag(*[matrix(Hadamard(size=16, signs=2))] * 2, torch.eye(8).double())  # a ragged block stays
    assert torch.allclose(transform.left(a), of_m.mT @ a, rtol=0, atol=1e-13)
    assert torch.allclose(transform.right(b), of_n.mT @ b, rtol=0, atol=1e-13)
    y = randn(m, n, seed=2)
    assert torch.allclose(transform.output(y), of_m @ y @ of_n.mT, rtol=0, atol=1e-13)
    assert transform.output(y.bfloat16()).dtype == torch.bfloat16


def test_halo_level_1_reuses_the_codes_of_the_rotated_weight() -> None:
    """One scale for the tensor: w.mT with rotated rows has the codes of the rotated w, transposed."""
    spec, whole = OperandSpec(format=E4M3), Hadamard(size=-1, signs="none")
    w, x, dy = randn(24, 48).float(), randn(20, 48, seed=1).float(), randn(20, 24, seed=2).float()
    dgrad, wgrad, level_2 = Outer(b=whole), Outer(b=whole), Outer(a=whole, b=whole)
    assert torch.equal(quantize(dgrad.right(w.mT), spec).codes, quantize(whole.right(w), spec).codes.mT)
    assert torch.equal(quantize(wgrad.right(x.mT), spec).codes, quantize(whole.left(x), spec).codes.mT)
    # dx and dw as HALO writes them, with explicit matrices.
    h = whole_matrix(48, torch.ones(48))
    of_tokens = whole_matrix(20, torch.ones(20))
    wh = dequantize(quantize(whole.right(w), spec)).double()
    xh = dequantize(quantize(whole.left(x), spec)).double()
    g = dequantize(quantize(dy, spec)).double()
    g_t = dequantize(quantize(level_2.left(dy), spec)).double()
    for transform, a, b, want in (
        (dgrad, g, wh.mT, g @ wh @ h.mT),
        (level_2, g_t, wh.mT, of_tokens @ (g_t @ wh) @ h.mT),
        (wgrad, g.mT, xh.mT, g.mT @ xh @ h.mT),
    ):
        assert torch.allclose(transform.output(a @ b.mT), want, rtol=0, atol=1e-12)
    assert (of_tokens @ (g_t @ wh) @ h.mT - dy.double() @ w.double()).norm() < 0.06 * (dy.double() @ w.double()).norm()


@pytest.mark.parametrize("rounded", [True, False])
def test_a_linear_of_halo_level_2(rounded: bool) -> None:
    operand, whole = OperandSpec(format=E4M3), Hadamard(size=-1, signs="none", rounded=rounded)
    gemms = [
        GemmSpec(a=operand, b=operand, transform=transform)
        for transform in (whole, Outer(a=whole, b=whole), Outer(b=whole))
    ]
    spec = LinearSpec(fprop=gemms[0], dgrad=gemms[1], wgrad=gemms[2])
    plain, model = nn.Linear(96, 48), nn.Sequential(nn.Linear(96, 48))
    model[0].load_state_dict({name: tensor.bfloat16().float() for name, tensor in plain.state_dict().items()})
    plain.load_state_dict(model[0].state_dict())
    plan = apply(Recipe(rules=(Rule(kind=nn.Linear, path=".*", make=quantized(spec)),)), model.bfloat16(), tokens=40)
    plan.begin_step(0, 0)
    x, dy = randn(40, 96).bfloat16(), randn(40, 48, seed=1).bfloat16()
    x[:, 3] *= 50  # an outlier channel
    ours, theirs = x.clone().requires_grad_(), x.float().requires_grad_()
    y, want = model(ours), plain(theirs)
    y.backward(dy)
    want.backward(dy.float())
    assert ours.grad is not None
    assert theirs.grad is not None
    pairs = ((y, want), (ours.grad, theirs.grad), (model[0].weight.grad, plain.weight.grad))
    errors = [float(((mine - exact).norm() / exact.norm()).detach()) for mine, exact in pairs]
    assert all(0.01 < error < 0.06 for error in errors), errors


def test_refusals_of_outer() -> None:
    with pytest.raises(ValueError, match="name one"):
        Outer()
    for part in (BY_ROW, Outer(a=Hadamard()), Composed(first=BY_ROW, second=Hadamard())):
        with pytest.raises(ValueError, match=re.escape(f"{part} is no rotation")):
            Outer(a=Hadamard(), b=part)


class LookAlike:
    """All that a transform of a recipe file must have."""

    def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
        return a * 2

    right = left

    def output(self, y: Tensor, stats: Tensor | None = None) -> Tensor:
        return y / 4

    def __str__(self) -> str:
        return "doubled"


class Inheriting(Transform):
    def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
        return a * 2

    right = left

    def output(self, y: Tensor, stats: Tensor | None = None) -> Tensor:
        return y / 4

    def __str__(self) -> str:
        return "doubled"


@pytest.mark.parametrize("kind", [LookAlike, Inheriting])
def test_a_recipes_transform_may_leave_out_what_it_has_not(kind: type[Transform]) -> None:
    own = kind()
    both = Composed(first=own, second=Hadamard(size=16, signs="step"))
    assert not draws(own)
    assert draws(both)
    assert drawn(own, KEY) is own
    a, b = randn(3, 32), randn(4, 32, seed=1)
    of_step = drawn(both, KEY)
    assert torch.allclose(of_step.output(of_step.left(a) @ of_step.right(b).mT), a @ b.mT, rtol=0, atol=1e-12)
    for transform in (own, both):
        with pytest.raises(ValueError, match="doubled names no way back: it has no method back"):
            back(drawn(transform, KEY), a, left=True)
    assert not draws(None)


class OwnSigns(Hadamard):
    """A subclass of a recipe file with signs of its own."""

    def vector(self) -> tuple[int, ...]:  # type: ignore[override]
        return (1, -1, -1, -1)


def test_a_subclass_may_have_signs_of_its_own() -> None:
    x = randn(3, 8)
    rotation = torch.block_diag(*[whole_matrix(4, torch.tensor([1, -1, -1, -1]))] * 2)
    assert torch.allclose(OwnSigns(size=4, signs="none").left(x), x @ rotation, rtol=0, atol=1e-14)


def test_modes_of_the_first_caller_do_not_stay() -> None:
    hadamard_matrices.matrix.cache_clear()
    transform, x = Hadamard(size=-1, signs=1), randn(3, 24)
    with torch.inference_mode(), torch.device("meta"):
        transform.left(x)
    want = transform.left(x)
    (gradient,) = torch.autograd.grad(transform.left(x.requires_grad_()), x, want)
    assert torch.allclose(gradient, x, rtol=0, atol=1e-14)


# What plan.txt says.


def plan_of(transform: Transform, tokens: int | None, features: tuple[int, int] = (96, 64)) -> list[str]:
    """The lines of fprop, dgrad and wgrad, of which dgrad and wgrad have the transform."""
    operand = OperandSpec(format=E2M1, tile=Tile(1, 32), scale=PowerOfTwo())
    gemm = GemmSpec(a=operand, b=operand, transform=transform)
    spec = LinearSpec(fprop=GemmSpec(a=operand, b=operand), dgrad=gemm, wgrad=gemm)
    recipe = Recipe(rules=(Rule(kind=nn.Linear, path=".*", make=quantized(spec)),))
    plan = apply(recipe, nn.Sequential(nn.Linear(*features)), tokens=tokens, backend="auto")
    lines = [line.strip() for line in str(plan).splitlines()]
    return [next(line for line in lines if line.startswith(name)) for name in ("fprop: ", "dgrad: ", "wgrad: ")]


def test_the_plan_says_what_no_kernel_computes() -> None:
    said = {
        Hadamard(size=32, signs="step"): "signs of hadamard32/step in plain torch: no kernel draws them",
        Hadamard(size=-1, signs="none"): "hadamard-full/none in plain torch: no kernel for the whole width",
        Hadamard(
            size=32, signs=1, rounded=False
        ): "hadamard32/1/unrounded in plain torch: no kernel leaves it unrounded",
        Outer(a=Hadamard(size=-1, signs="step"), b=Hadamard()): "hadamard-full/step along the rows of a, hadamard16 "
        "along the rows of b in plain torch: no kernel along an outer dimension",
    }
    for transform, remark in said.items():
        fprop, *others = plan_of(transform, 64)
        assert "plain torch" not in fprop
        for line in others:
            assert f"[{transform}]" in line
            assert line.count(remark) == 1
    assert not any("plain torch" in line for line in plan_of(Hadamard(size=32, signs=1), 64))


def test_the_plan_says_where_a_transform_mixes_tokens() -> None:
    note = "a transform of all tokens of a micro-batch: another has other scales"
    whole = Hadamard(size=-1, signs="none")
    for tokens in (64, None):
        assert [note in line for line in plan_of(whole, tokens)] == [False, False, True]  # along tokens in wgrad
        assert [note in line for line in plan_of(Outer(a=whole), tokens)] == [False, True, False]  # dy's rows
        assert not any(note in line for line in plan_of(Outer(b=whole), tokens))
    cut = "a micro-batch of 96 tokens cuts blocks of 64"
    assert [cut in line for line in plan_of(Outer(a=Hadamard(size=64, signs=0)), 96)] == [False, True, False]
    assert [cut in line for line in plan_of(Hadamard(size=64, signs="step"), 96)] == [False, False, True]


def test_a_plan_refuses_widths_that_no_matrix_serves() -> None:
    whole = Hadamard(size=-1, signs="none")
    wanted = {
        (whole, 94): "0, wgrad: hadamard-full/none: no Hadamard matrix of order 94 is known here: 92 and 96 are",
        (Outer(a=whole), 94): "0, dgrad: hadamard-full/none along the rows of a: no Hadamard matrix of order 94",
    }
    for (transform, tokens), message in wanted.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            plan_of(transform, tokens)
    with pytest.raises(ValueError, match=re.escape("0, dgrad: hadamard-full/none: no Hadamard matrix of order 94")):
        plan_of(whole, 64, (96, 94))
