"""The Hadamard transform against the matrix it stands for, and against loops in its defined order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from narrowgauge.precision.transforms import TE_SIGNS, Hadamard
from torch import Tensor

SIZES = [2, 4, 8, 16, 32, 64, 128]


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
    [(3, 0, "size"), (1, 0, "size"), (256, 0, "size"), (32, "te", "for size 16"), (16, "random", "'te', 'none' or")],
)
def test_refusals(size: int, signs: str | int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Hadamard(size=size, signs=signs)
