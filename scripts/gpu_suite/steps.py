"""Training steps of a Llama at a size that says something of a GPU, timed without a read of the loss in between."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from narrowgauge.models import LlamaConfig, create
from narrowgauge.trainer import build
from narrowgauge.trainer.config import groups, load_config
from narrowgauge.trainer.data.batches import Batch
from narrowgauge.trainer.distributed import World
from narrowgauge.trainer.errors import UserError
from narrowgauge.trainer.state import TrainState, local
from narrowgauge.trainer.step import update_from
from torch import nn

PEAK_FLOPS = 989e12  # BF16, dense, of an H100 SXM by its data sheet
VOCABULARY = 32_000
OPTIM = ["optim.lr=3e-4", "optim.warmup_steps=0", "optim.schedule=constant"]
ROUNDS, STEPS = 2, 4  # timed blocks, steps of each
Row = dict[str, Any]


def cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if cuda() else "cpu")


def synchronize() -> None:
    if cuda():
        torch.cuda.synchronize()


def known(override: str) -> bool:
    """Whether the config has the key and takes the value."""
    try:
        load_config([override])
    except UserError:
        return False
    return True


def compiled(yes: bool = True) -> list[str]:
    """Blocks under torch.compile on a GPU; never on a CPU, where it takes longer than all else and says nothing."""
    return [f"parallel.compile={'true' if yes and cuda() else 'false'}"]


#: Config of that size, if the tree has it, and the same shape where it has not; sequences of 4,096 a step.
_WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_layers": 4, "num_heads": 32, "num_kv_heads": 8}
_DEEP = {"hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8}
_TOY = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
SIZES: dict[str, tuple[str, dict[str, int], int]] = {
    "1b": ("llama3_1b", _DEEP, 4),
    "8b": ("llama3_8b_4blocks", _WIDE, 2),
}


def shape_of(size: str) -> tuple[LlamaConfig, int, int]:
    """Model, sequences a step and positions of a size; toys on a CPU, the same for all sizes."""
    if not cuda():
        return LlamaConfig(name="toy", vocab_size=256, **_TOY), 2, 64
    name, fields, batch = SIZES[size]
    if name in groups()["model"]:
        model = load_config([f"model={name}"]).model
        return replace(model, vocab_size=VOCABULARY, tie_embeddings=False), batch, 4096
    return LlamaConfig(name=size, vocab_size=VOCABULARY, rope_theta=500_000.0, **fields), batch, 4096


class RandomTokens:
    """One batch of random tokens, the same at every step: the loss must fall."""

    num_micro = 1

    def __init__(self, sequences: int, positions: int, vocabulary: int) -> None:
        tokens = torch.randint(vocabulary, (sequences, positions + 1), generator=torch.Generator().manual_seed(0))
        self._batch = Batch(tokens, torch.ones(sequences, positions), 0)

    def first_sample(self, step: int) -> int:
        return step * len(self._batch.tokens)

    def batch(self, step: int, micro: int) -> Batch:
        return replace(self._batch, first_sample=self.first_sample(step))


def flops(model: LlamaConfig, tokens: int, positions: int) -> float:
    """Of a step: 6 for every weight of blocks and head and token, and causal attention, half of whose scores exist.

    The embedding, a look-up, counts nothing.
    """
    c, kv = model.hidden_size, model.num_kv_heads * model.head_size
    q = model.num_heads * model.head_size
    block = 2 * c * q + 2 * c * kv + 3 * c * model.intermediate_size
    weights = model.num_layers * block + c * (model.vocab_size or 0)
    return float(tokens * (6 * weights + 6 * model.num_layers * positions * q))


def build_here(
    model: LlamaConfig,
    overrides: Sequence[str],
    world: World,
    tokens: int,
    convert: Callable[[nn.Module], object] | None,
) -> TrainState:
    """A state whose parameters are drawn on the device: a CPU draws 10^9 of them for longer than a stage lasts.

    ``convert`` changes the model on the meta device, before it is compiled and sharded.
    """

    @torch.no_grad()
    def drawn(built: Any, seed: int, plan: Any) -> None:
        torch.manual_seed(seed)
        for name, parameter in built.named_parameters():
            init = built.init_of(name)
            local(parameter).normal_(init.mean, init.std) if init.std else local(parameter).fill_(init.mean)

    def created(config: Any) -> Any:
        built = create(config)
        if convert is not None:
            convert(built)
        return built

    config = load_config(list(overrides))
    with patch.object(build, "initialize", drawn), patch.object(build, "create", created):
        precision = config.values.precision
        return build.build_state(model, precision, config.parallel, config.optim, world, seed=0, tokens=tokens)


def measured(
    what: str,
    size: str,
    world: World,
    overrides: Sequence[str],
    *,
    convert: Callable[[nn.Module], object] | None = None,
    change: dict[str, Any] | None = None,
    divide: int = 1,
) -> Row:
    """Tokens/s, ms, MFU, peak GiB, native GEMMs and losses of some steps after three that compile.

    ``ms`` is the mean over steps between two synchronizations, ``+-%`` how far two such blocks differ,
    ``host/whole ms`` when the host had launched a step and when the device had done it. ``change`` gives fields of the
    model other values; ``divide`` is what the batch is divided by.
    """
    forget()
    begun = time.perf_counter()
    model, sequences, positions = shape_of(size)
    model, sequences = replace(model, **(change or {})), max(1, sequences // divide)
    tokens = sequences * positions
    words = [*OPTIM, *overrides]
    optim = load_config(words).optim
    state = build_here(model, words, world, tokens, convert)
    source = RandomTokens(sequences, positions, model.vocab_size or 0)
    step = 0

    def some(count: int) -> list[Any]:
        nonlocal step
        step += count
        return [update_from(state, source, world, optim, number, 1000) for number in range(step - count, step)]

    results = some(3 if cuda() else 1)
    synchronize()
    ready = time.perf_counter() - begun
    seconds = []
    for _ in range(ROUNDS if cuda() else 1):
        begun = time.perf_counter()
        results += some(STEPS if cuda() else 2)
        synchronize()
        seconds.append((time.perf_counter() - begun) / (STEPS if cuda() else 2))
    begun = time.perf_counter()
    results += some(1)
    host = time.perf_counter() - begun
    synchronize()
    whole = time.perf_counter() - begun
    mean = sum(seconds) / len(seconds)
    linears = [line for line in str(state.plan).splitlines() if line.endswith("]")]  # a product and who makes it
    row: Row = {
        "what": what,
        "tok/s": round(tokens / mean),
        "ms": 1e3 * mean,
        "+-%": round(100 * (max(seconds) - min(seconds)) / mean, 1),
        "MFU%": round(100 * flops(model, tokens, positions) / mean / PEAK_FLOPS, 1),
        "GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda() else 0.0,
        "host/whole ms": f"{1e3 * host:.0f}/{1e3 * whole:.0f}",
        "native": f"{sum('[scaled_mm' in line for line in linears)}/{len(linears)}",
        "loss": f"{float(results[0].loss):.3f}>{float(results[-1].loss):.3f}",
        "ready s": round(ready),
    }
    skipped = sum(not bool(result.applied) for result in results)
    return row | ({"skipped": skipped} if skipped else {}) | ({"batch": sequences} if divide > 1 else {})


def forget() -> None:
    """What the last model left: graphs, of which torch keeps eight for one function, and memory."""
    torch.compiler.reset()
    gc.collect()
    if cuda():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def within_memory(what: str, row: Callable[[int], Row]) -> Row:
    """``row(1)``, ``row(2)`` or ``row(4)``, which divide the batch, as memory allows; an error as a row."""
    said: Row = {}
    for divide in (1, 2, 4):
        try:
            return row(divide)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            said = {"what": what, "error": one_line(error)}
            if not isinstance(error, torch.OutOfMemoryError):
                break
    return said


def one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:110]}"
