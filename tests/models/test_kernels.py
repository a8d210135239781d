"""Every kernel against its plain definition: values and gradients in float64, and BF16 no worse than the definition."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from definitions import attention_definition, cross_entropy_definition
from narrowgauge.models.kernels import compiled, cross_entropy, pointwise
from narrowgauge.models.kernels.attention import (
    QUERY_BLOCK,
    Rope,
    block_attention,
    native_attention,
    rotate,
    starts_of,
)
from narrowgauge.models.kernels.cross_entropy import (
    chunked_cross_entropy,
    native_cross_entropy,
    overwriting_cross_entropy,
)
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from narrowgauge import native

needs_compiler = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler on this machine")
needs_avx512_bf16 = pytest.mark.skipif(not compiled.has_attention(), reason="no compiler, or a CPU without AVX512_BF16")


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


def documents(batch: int, num_positions: int, seed: int = 0) -> Tensor:
    """Positions in documents of random lengths, [B, T]; the first row is one document."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(batch, num_positions, generator=generator) < 0.05
    first[0] = False
    places = torch.arange(num_positions).expand(batch, -1)
    return places - torch.where(first, places, 0).cummax(-1).values


@pytest.mark.parametrize("num_positions", [1, 5, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 77])
def test_attention_within_documents_in_float64(num_positions: int) -> None:
    generator = torch.Generator().manual_seed(num_positions)
    q, k, v, dy = torch.randn(4, 3, num_positions, 8, dtype=torch.float64, generator=generator).unbind()
    starts = starts_of(documents(3, num_positions))
    for ours, exact in zip(
        with_gradients(block_attention, [q, k, v], dy, starts),
        with_gradients(attention_definition, [q, k, v], dy, starts),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact)


def attention_of_heads(
    q: Tensor, k: Tensor, v: Tensor, rope: Rope | None, positions: Tensor | None, exact: bool = False
) -> Tensor:
    """The definition over [B, T, H, D] with rotation and groups; rotation rounds to BF16 unless ``exact``."""
    if rope is not None:
        q, k = rotate(q, rope, positions), rotate(k, rope, positions)
    groups, heads = q.shape[2] // k.shape[2], q.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    starts = None if positions is None else starts_of(positions).repeat_interleave(heads, dim=0)
    y = attention_definition(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), starts)
    return y.unflatten(0, (-1, heads)).transpose(1, 2)


@needs_avx512_bf16
@pytest.mark.parametrize("head_dim", [2, 16, 24, 32, 64, 80, 128])
@pytest.mark.parametrize(("num_positions", "masked"), [(1, False), (31, True), (32, False), (75, True), (300, True)])
def test_native_attention_is_as_near_float64_as_its_definition(head_dim: int, num_positions: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(head_dim * num_positions)
    q, dy = torch.randn(2, 2, num_positions, 4, head_dim, generator=generator).bfloat16().unbind()
    k, v = torch.randn(2, 2, num_positions, 2, head_dim, generator=generator).bfloat16().unbind()
    angles = torch.outer(torch.arange(float(num_positions)), 100 ** -torch.linspace(0, 1, head_dim // 2))
    rope = Rope(angles.cos(), angles.sin())
    positions = documents(2, num_positions) if masked else None
    starts = starts_of(documents(2, num_positions)) if masked else None
    ours = with_gradients(native_attention, [q, k, v], dy, rope, positions, starts)
    wide = [x.double() for x in (q, k, v)]
    exact = with_gradients(attention_of_heads, wide, dy.double(), Rope(*(x.double() for x in rope)), positions)
    definition = with_gradients(attention_of_heads, [q, k, v], dy, rope, positions)
    for mine, theirs, true in zip(ours, definition, exact, strict=True):
        # Measured against the size of the gradient's terms: a single key's dq and dk are exactly zero.
        scale = float(true.norm()) + 0.01 * float(true.numel()) ** 0.5
        assert float((mine.double() - true).norm()) < 1.5 * float((theirs.double() - true).norm()) + 2e-3 * scale


@needs_avx512_bf16
def test_native_attention_keeps_documents_apart() -> None:
    """Exactly: what one document holds changes no bit of another."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 96, 2, 32, generator=generator).bfloat16().unbind()
    positions = torch.cat((torch.arange(40), torch.arange(56)))[None]
    before = native_attention(q, k, v, None, None, starts_of(positions))
    for x in (q, k, v):
        x[:, :40] = torch.randn(40, 2, 32, generator=generator) * 1e4
    after = native_attention(q, k, v, None, None, starts_of(positions))
    assert torch.equal(before[:, 40:], after[:, 40:])
    assert not torch.equal(before[:, :40], after[:, :40])


@needs_avx512_bf16
def test_native_attention_takes_positions_as_the_definition_does() -> None:
    """Of a window that begins inside a document, of any integer dtype, one row for all; negative ones are refused."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 40, 2, 16, generator=generator).bfloat16().unbind()
    later = torch.cat((torch.arange(100, 115), torch.arange(25)))[None]
    angles = torch.outer(torch.arange(200.0, dtype=torch.float64), torch.ones(8, dtype=torch.float64))
    rope = Rope(angles.cos(), angles.sin())
    starts = starts_of(later).clamp(min=0)
    ours = native_attention(q, k, v, rope, later.int(), starts)
    theirs = attention_of_heads(*(x.double() for x in (q, k, v)), rope, later.expand(2, -1))
    torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=0.03)
    assert torch.equal(ours, native_attention(q, k, v, rope, later.expand(2, -1), starts))
    with pytest.raises(ValueError, match="negative"):
        native_attention(q, k, v, rope, later - 30)


@needs_avx512_bf16
def test_native_attention_passes_nan_scores_on() -> None:
    q, k, v = torch.randn(3, 1, 40, 1, 16).bfloat16().unbind()
    k[:, 7] = torch.nan
    y = native_attention(q, k, v)
    assert y[:, :7].isfinite().all()
    assert y[:, 7:].isnan().all()


@needs_avx512_bf16
def test_native_kernels_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = torch.randn(4, 3, 70, 4, 32, generator=generator).bfloat16().unbind()
    x, dx = torch.randn(2, 500, 48, generator=generator).bfloat16().unbind()
    weight = torch.rand(48, generator=generator).bfloat16()

    def both() -> list[Tensor]:
        first = with_gradients(native_attention, [q, k, v], dy)
        return first + with_gradients(pointwise.native_rms_norm, [x, weight], dx, 1e-5)

    threads = torch.get_num_threads()
    many = both()
    torch.set_num_threads(1)
    try:
        one = both()
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, many, one))


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (200, 33), (2, 65, 256)])
def test_native_pointwise_kernels_round_once(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, dy = (3 * torch.randn(3, *shape, generator=generator)).bfloat16().unbind()
    weight = torch.rand(shape[-1], generator=generator).bfloat16()
    cases: list[tuple[Any, Any, list[Tensor], list[Any]]] = [
        (pointwise.native_swiglu, pointwise.swiglu_definition, [a, b], []),
        (pointwise.native_rms_norm, pointwise.rms_norm_definition, [a, weight], [1e-5]),
    ]
    for ours, definition, inputs, more in cases:
        mine = with_gradients(ours, inputs, dy, *more)
        exact = with_gradients(definition, [x.double() for x in inputs], dy.double(), *more)
        for value, true in zip(mine, exact, strict=True):
            torch.testing.assert_close(value.double(), true, rtol=2**-8, atol=1e-6 * (1 + float(true.abs().max())))


@needs_compiler
def test_native_swiglu_at_the_edges() -> None:
    gate = torch.tensor([-1e30, -100.0, -0.0, 0.0, 100.0, 1e30, torch.inf, torch.nan]).bfloat16()
    y = pointwise.native_swiglu(gate, torch.ones_like(gate))
    torch.testing.assert_close(y, pointwise.swiglu_definition(gate, torch.ones_like(gate)), equal_nan=True)


def test_without_a_compiler_plain_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    native.library.cache_clear()
    compiled.has_attention.cache_clear()
    try:
        assert compiled.library() is None
        assert not compiled.has_attention()
        x = torch.randn(3, 8).bfloat16()
        assert not pointwise.native_serves(x)
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
        compiled.has_attention.cache_clear()


def test_a_failed_build_warns_once_and_plain_torch_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "kernels.cpp"
    broken.write_text("this is not C++")
    monkeypatch.setattr(compiled, "SOURCE", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        if native.shutil.which("g++"):
            with pytest.warns(UserWarning, match="was not built, plain torch serves"):
                assert compiled.library() is None
        assert list((tmp_path / "narrowgauge").glob("*")) == []
    finally:
        native.library.cache_clear()


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


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 2), (7, 101), (500, 4096)])
def test_native_cross_entropy_is_exact_inside(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(shape, generator=generator)).bfloat16()
    targets = torch.randint(shape[1], shape[:1], generator=generator)
    dy = torch.rand(shape[0], generator=generator)
    ours = with_gradients(native_cross_entropy, [logits], dy, targets)
    exact = with_gradients(cross_entropy_definition, [logits.double()], dy, targets)
    torch.testing.assert_close(ours[0], exact[0].float(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=2**-8, atol=1e-7)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2), (7, 101), (500, 333)])
def test_overwriting_cross_entropy(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, over chunks the last of which is shorter, where some targets count for nothing."""
    monkeypatch.setattr(cross_entropy, "_GPU_CHUNK_ELEMENTS", 10_000)
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(shape, generator=generator)).to(dtype)
    targets = torch.randint(shape[1], shape[:1], generator=generator)
    dy = torch.rand(shape[0], generator=generator)
    dy[1::3] = 0
    leaf = logits.clone().requires_grad_()
    losses = overwriting_cross_entropy(leaf * 1, targets)
    (gradient,) = torch.autograd.grad(losses, leaf, dy)
    exact = with_gradients(cross_entropy_definition, [logits.double()], dy, targets)
    torch.testing.assert_close(losses.detach(), exact[0].float(), rtol=2e-6, atol=4e-6)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient.double(), exact[1], rtol=tolerance, atol=1e-6)
    assert gradient[1::3].count_nonzero() == 0


def test_overwriting_cross_entropy_as_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU takes it; with a shorter last chunk it is compiled for at most two shapes."""
    monkeypatch.setattr(cross_entropy, "_GPU_CHUNK_ELEMENTS", 4096)
    torch._dynamo.reset()
    logits = torch.randn(100, 257, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(100)
    plain = with_gradients(lambda x, t: overwriting_cross_entropy(x * 1, t), [logits], torch.ones(100), targets)
    traced = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(cross_entropy, "_on", lambda _, function: traced(function))
    counters.clear()
    ours = with_gradients(lambda x, t: overwriting_cross_entropy(x * 1, t), [logits], torch.ones(100), targets)
    assert all(map(torch.equal, ours, plain))
    assert counters["stats"]["unique_graphs"] <= 4  # two shapes, forward and backward


def test_overwriting_cross_entropy_cannot_be_differentiated_twice() -> None:
    losses = overwriting_cross_entropy(torch.randn(3, 5, requires_grad=True) * 1, torch.tensor([0, 1, 2])).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the first backward overwrote the logits"):
        losses.backward()


def test_the_head_fits_into_a_gpu() -> None:
    """The head of 16,384 tokens over a vocabulary of 128,256, forward and backward, in tensors without memory."""
    with FakeTensorMode(), Memory() as memory:
        x_NC = torch.empty(16_384, 2048, dtype=torch.bfloat16, requires_grad=True)
        weight_VC = torch.empty(128_256, 2048, dtype=torch.bfloat16, requires_grad=True)
        logits_NV = torch.nn.functional.linear(x_NC, weight_VC)
        (overwriting_cross_entropy(logits_NV, torch.empty(16_384, dtype=torch.int64)) * 2).sum().backward()
    assert x_NC.grad is not None
    assert memory.peak < 8 * 2**30
    assert memory.largest[torch.float32] <= cross_entropy._GPU_CHUNK_ELEMENTS


class Memory(TorchDispatchMode):
    """The most bytes alive at once of what is made under it, and the most elements of a tensor, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.alive = 0
        self.largest: dict[torch.dtype, int] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                self.largest[tensor.dtype] = max(self.largest.get(tensor.dtype, 0), tensor.numel())
        return result

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


COMPUTE = [
    pytest.param(chunked_cross_entropy, torch.float32),
    pytest.param(overwriting_cross_entropy, torch.float32),
    pytest.param(overwriting_cross_entropy, torch.bfloat16),
    pytest.param(native_cross_entropy, torch.bfloat16, marks=needs_compiler),
]


@needs_compiler
def test_native_cross_entropy_refuses_a_target_outside() -> None:
    for target in (-1, 3):
        with pytest.raises(IndexError, match="outside the vocabulary of 3"):
            native_cross_entropy(torch.zeros(1, 3, dtype=torch.bfloat16), torch.tensor([target]))


@pytest.mark.parametrize(("compute", "dtype"), COMPUTE)
def test_cross_entropy_at_the_edges(compute: Callable[..., Tensor], dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [-torch.inf, 3.0, 3.0], [torch.nan, 0.0, 0.0], [torch.inf, 0.0, 0.0]])
    logits = logits.to(dtype)
    targets = torch.tensor([0, 1, 1, 1])
    losses = compute(logits, targets)
    torch.testing.assert_close(losses[:3], cross_entropy_definition(logits, targets)[:3], equal_nan=True)
    assert losses[:2].isfinite().all()
    assert not losses[2:].isfinite().any()  # what is not finite must reach the loop's check
