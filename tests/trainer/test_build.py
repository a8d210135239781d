"""What ``auto`` comes to, what a GPU is told of, and that compiled blocks are compiled once."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_overrides, train_here
from narrowgauge.models import create
from narrowgauge.precision.apply import apply
from narrowgauge.precision.loading import load
from narrowgauge.trainer import distributed
from narrowgauge.trainer.build import narrow_rows, sequence_bytes
from narrowgauge.trainer.config import load_config, load_run_config
from narrowgauge.trainer.costs import micro_batch_size
from narrowgauge.trainer.distributed import ParallelConfig, World
from narrowgauge.trainer.errors import ExitCode
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_follows_the_device_and_the_number_of_shards() -> None:
    auto = ParallelConfig(name="t")
    assert (auto.compiles(CPU), auto.compiles(CUDA)) == (False, True)
    assert (auto.is_deterministic(CPU), auto.is_deterministic(CUDA)) == (True, False)
    assert (auto.reshards(1), auto.reshards(2)) == (False, True)
    assert not ParallelConfig(name="t", replicate=2).reshards(2)  # two whole copies
    for said in (True, False):
        word = ParallelConfig(name="t", compile=said, deterministic=said, reshard_after_forward=said)
        assert word.compiles(CPU) is word.compiles(CUDA) is word.is_deterministic(CUDA) is said
        assert word.reshards(1) is word.reshards(2) is said


def test_the_words_before_auto_are_still_read(tmp_path: Path) -> None:
    """An old run directory says false where auto stands now, and nothing of determinism."""
    lines = load_config(["parallel.compile=false", "parallel.reshard_after_forward=True"]).to_yaml().splitlines()
    (tmp_path / "config.yaml").write_text("\n".join(line for line in lines if "deterministic" not in line))
    parallel = load_run_config(tmp_path / "config.yaml").parallel
    assert (parallel.compile, parallel.reshard_after_forward, parallel.deterministic) == (False, True, "auto")


def test_a_run_goes_on_whatever_auto_came_to(corpus: Path, tmp_path: Path) -> None:
    said = [f"parallel.{name}=true" for name in ("deterministic", "reshard_after_forward")]
    overrides = tiny_overrides(corpus, tmp_path, "train.steps=1", "sample.tokens=0", "eval.tokens=0")
    assert train_here(load_config([*overrides, *said])) is ExitCode.FINISHED
    auto = [f"parallel.{name}=auto" for name in ("deterministic", "reshard_after_forward")]
    assert train_here(load_config([*overrides, *auto, "train.steps=2"])) is ExitCode.FINISHED
    env = json.loads((tmp_path / "env.json").read_text())
    assert (env["started_at_step"], env["compiled"], env["deterministic"]) == (1, False, True)
    line = "execution on cpu: blocks eager, parameters kept until backward, sums in a fixed order\n"
    assert line in (tmp_path / "plan.txt").read_text()


def test_blocks_are_compiled_once_for_training_and_once_for_validation(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks, sharded, with a last batch of validation that is not full, and a sample."""
    more = ["precision=fp32", "train.steps=2", "sample.tokens=3", "eval.tokens=160", "parallel.compile=true"]
    config = load_config(tiny_overrides(corpus, tmp_path, *more))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    assert train_here(config) is ExitCode.FINISHED
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert "execution on cpu: blocks compiled," in (tmp_path / "plan.txt").read_text()
    torch._dynamo.reset()


@pytest.mark.parametrize("recipe", ["bf16", "mxfp8"])
def test_a_width_that_no_bulk_copy_takes_is_named(recipe: str) -> None:
    def warnings(model: str, vocab_size: int) -> list[str]:
        config = replace(load_config([f"model={model}"]).model, vocab_size=vocab_size, num_layers=2)
        with torch.device("meta"):
            made = create(config)
        apply(load(recipe, {}), made)
        return narrow_rows(made, torch.bfloat16)

    assert warnings("llama3_1b", 128_256) == []
    (line,) = warnings("llama_1b", 32_000)
    assert line.startswith("warning: width 5,461 (layers.0.mlp.gate_proj and others): a row of 10,922 bytes")
    (line,) = warnings("gpt2_124m", 50_257)
    assert line.startswith("warning: width 50,257 (lm_head): a row of 100,514 bytes")


def test_activations_are_counted_as_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(["model=llama3_1b", "data.seq_len=4096", "data.global_batch_size=64"])
    model, parallel = replace(config.model, vocab_size=32_000), config.parallel
    # A CPU's count decides about the order of sums there: it must not change.
    assert model.activation_bytes(4096) / 4096 == 4 * (12 * 2048 + 4 * 8192) * 16 + 12 * 32_000
    assert model.activation_bytes(1024) / 1024 - model.activation_bytes(4096) / 4096 == 4 * 32 * 1024 * 16
    inputs_and_block = 4 * (2048 * 16 + 12 * 2048 + 4 * 8192)
    assert model.activation_bytes(4096, recompute=True) / 4096 == inputs_and_block + 12 * 32_000
    world = World(0, 1, 1, CUDA, None, None)
    monkeypatch.setattr("narrowgauge.trainer.costs._memory_of_process", lambda world: 79.0 * 2**30)

    def size(compiles: object, dtype: torch.dtype) -> int:
        sequence = sequence_bytes(model, replace(parallel, compile=compiles), CUDA, 4096, dtype)
        return micro_batch_size(None, 64, sequence, world)

    assert [size("auto", torch.bfloat16), size("auto", torch.float32), size(False, torch.bfloat16)] == [4, 2, 2]


def test_determinism_on_a_cpu_is_nothing_to_ask_for() -> None:
    distributed.start(load_config(["parallel.threads=1", "parallel.deterministic=true"]).parallel)
    try:
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        distributed.finish()


@pytest.mark.parametrize(("before", "after"), [("", ":4096:8"), (":0:0", ":4096:8"), (":16:8", ":16:8")])
def test_what_determinism_on_cuda_sets(before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before)
    for name in ("deterministic", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    filled = torch.utils.deterministic.fill_uninitialized_memory
    try:
        distributed._fix_order_of_sums()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # it would keep attention as it is
        assert inductor.deterministic
        assert torch.backends.cudnn.deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        inductor.deterministic = False
        torch.utils.deterministic.fill_uninitialized_memory = filled
    assert distributed.os.environ["CUBLAS_WORKSPACE_CONFIG"] == after
