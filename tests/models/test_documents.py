"""Attention by blocks of keys: torch's own tables of blocks, the definition's values, one compiled graph a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from definitions import attention_definition
from narrowgauge.models import GPT, GPTConfig, Llama, LlamaConfig, layers
from narrowgauge.models.kernels import attention, documents, pointwise
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

ROWS = {
    "one document": [[300]],
    "blocks filled": [[128, 128], [256]],
    "ragged": [[1, 130, 3, 66], [199, 1]],
    "shorter than a block": [[20, 13]],
    "single tokens": [[1] * 140],
}


def positions_of(rows: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plain definitions instead of CPU kernels, torch's attention, and blocks of keys, whatever the device."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # on a CPU it refuses gradients, and makes them
    for module in (attention, pointwise):
        monkeypatch.setattr(module, "native_serves", lambda *_: False)
    monkeypatch.setattr(layers, "BLOCK_ATTENTION_MAX_POSITIONS", 0)
    monkeypatch.setattr(layers, "key_blocks", blocks_anywhere)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def blocks_anywhere(starts_BT: Tensor) -> documents.KeyBlocks:
    return documents.key_blocks(starts_BT)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("cut", [0, 7], ids=["whole", "from within a document"])
def test_blocks_are_those_that_torch_finds_in_the_whole_mask(name: str, cut: int) -> None:
    positions_BT = positions_of(ROWS[name])[:, cut:]
    batch, num_positions = positions_BT.shape
    starts_BT = attention.starts_of(positions_BT).clamp(min=0)
    ours = documents.key_blocks(starts_BT)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts_BT[row, query])

    theirs = flex.create_block_mask(visible, batch, None, num_positions, num_positions, device="cpu")
    for field in documents.KeyBlocks._fields[1:]:
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("v_width", [16, 24])
def test_values_and_gradients_are_the_definitions(v_width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    starts_BT = attention.starts_of(positions_of(ROWS["ragged"]))
    batch, num_positions = starts_BT.shape
    q, k, v, dy = (
        torch.randn(batch, heads, num_positions, width, dtype=torch.float64, generator=generator).requires_grad_()
        for heads, width in ((4, 16), (2, 16), (2, v_width), (4, v_width))
    )
    y = documents.document_attention(q, k, v, documents.key_blocks(starts_BT))
    wide = (x.repeat_interleave(2, dim=1) for x in (k, v))
    starts_NT = starts_BT.repeat_interleave(4, dim=0)
    exact = attention_definition(*(x.flatten(0, 1) for x in (q, *wide)), starts_NT).view_as(y)
    for ours, theirs in zip(
        (y, *torch.autograd.grad(y, (q, k, v), dy)), (exact, *torch.autograd.grad(exact, (q, k, v), dy)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


class _Watch(TorchDispatchMode):
    """Every operation's name, and the size of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def test_blocks_are_made_without_a_whole_mask_and_without_a_read() -> None:
    positions_BT = torch.arange(4096).remainder(777)[None]
    with _Watch() as watch:
        documents.key_blocks(attention.starts_of(positions_BT))
    assert watch.largest < 4096 * 4096 / 100
    assert not [name for name in watch.names if "local_scalar" in name or "nonzero" in name or "item" in name]


SHAPE = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "num_heads": 4}


def make_llama() -> nn.Module:
    return Llama(LlamaConfig(name="t", num_kv_heads=2, **SHAPE))  # type: ignore[arg-type]


def make_gpt() -> nn.Module:
    return GPT(GPTConfig(name="t", **SHAPE))  # type: ignore[arg-type]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("make", "recompute", "apart"),
    [
        pytest.param(make_llama, False, False, id="llama"),
        pytest.param(make_llama, True, True, id="llama, recomputed, documents apart"),
        pytest.param(make_gpt, False, True, id="gpt, documents apart"),
    ],
)
def test_all_blocks_are_one_graph(make: Callable[[], nn.Module], recompute: bool, apart: bool) -> None:
    """And a second one for validation; new documents compile nothing anew."""
    model: Any = make().bfloat16()
    for block in model.layers:
        block.recompute = recompute
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
    for length in (13, 17, 5):
        tokens_BT = torch.randint(50, (2, 40))
        positions_BT = torch.arange(40).remainder(length).expand(2, 40) if apart else None
        model(tokens_BT, tokens_BT, positions_BT).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():
        model(tokens_BT, tokens_BT, positions_BT)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("make", [make_llama, make_gpt])
def test_a_document_in_a_row_is_as_if_alone(make: Callable[[], nn.Module]) -> None:
    model = make()
    first, second = torch.randint(50, (2, 1, 13), generator=torch.Generator().manual_seed(0))
    together = model(torch.cat((first, second), 1), positions_BT=torch.arange(13).repeat(2)[None])
    torch.testing.assert_close(together, torch.cat((model(first), model(second)), 1))
