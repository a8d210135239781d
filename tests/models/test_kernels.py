"""Every kernel against its plain definition: values and gradients in float64, and BF16 no worse than the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.kernels.attention import QUERY_BLOCK, attention_definition, block_attention
from models.kernels.cross_entropy import chunked_cross_entropy, cross_entropy_definition


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor, *more: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves, *more)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def relative_error(values: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((v.double() - e).norm() / e.norm()) for v, e in zip(values, exact, strict=True)]


@pytest.mark.parametrize("num_positions", [1, 5, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 77])
@pytest.mark.parametrize("head_dim", [1, 8, 33])
def test_attention_in_float64(num_positions: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(num_positions)
    q, k, v, dy = torch.randn(4, 3, num_positions, head_dim, dtype=torch.float64, generator=generator).unbind()
    for ours, exact in zip(
        with_gradients(block_attention, [q, k, v], dy),
        with_gradients(attention_definition, [q, k, v], dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact)


def test_attention_of_strided_heads() -> None:
    """As they come from a projection: [B, T, H, D] seen as [B, H, T, D]."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = torch.randn(4, 2, 150, 3, 8, dtype=torch.float64, generator=generator).transpose(2, 3).unbind()
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    ours, exact = (with_gradients(f, flat, dy.flatten(0, 1)) for f in (block_attention, attention_definition))
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_attention_in_bf16_is_as_near_as_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = torch.randn(4, 4, 300, 32, generator=generator).bfloat16().unbind()
    exact = with_gradients(attention_definition, [x.double() for x in (q, k, v)], dy.double())
    ours = relative_error(with_gradients(block_attention, [q, k, v], dy), exact)
    definition = relative_error(with_gradients(attention_definition, [q, k, v], dy), exact)
    assert all(mine < 1.5 * theirs for mine, theirs in zip(ours, definition, strict=True))


@pytest.mark.parametrize("shape", [(1, 2), (7, 101), (5000, 300), (3, 600_000)])
def test_cross_entropy_in_float64(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(shape, generator=generator)
    targets = torch.randint(shape[1], shape[:1], generator=generator)
    dy = torch.rand(shape[0], generator=generator)
    ours = with_gradients(chunked_cross_entropy, [logits], dy, targets)
    exact = with_gradients(
        lambda x, t: torch.nn.functional.cross_entropy(x, t, reduction="none"), [logits.double()], dy.double(), targets
    )
    assert max(relative_error(ours, exact)) < 1e-6


def test_cross_entropy_in_bf16_is_as_near_as_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(500, 4096, generator=generator)).bfloat16()
    targets = torch.randint(4096, (500,), generator=generator)
    dy = torch.rand(500, generator=generator)
    exact = with_gradients(cross_entropy_definition, [logits], dy, targets)
    ours = with_gradients(chunked_cross_entropy, [logits], dy, targets)
    assert ours[1].dtype == torch.bfloat16
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-2, atol=1e-6)  # one BF16 rounding apart


def test_cross_entropy_at_the_edges() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [-torch.inf, 3.0, 3.0], [torch.nan, 0.0, 0.0], [torch.inf, 0.0, 0.0]])
    targets = torch.tensor([0, 1, 1, 1])
    losses = chunked_cross_entropy(logits, targets)
    torch.testing.assert_close(losses[:3], cross_entropy_definition(logits, targets)[:3], equal_nan=True)
    assert losses[:2].isfinite().all()
    assert not losses[2:].isfinite().any()  # what is not finite must reach the loop's check
