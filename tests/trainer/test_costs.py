"""What the size in a model's name means, what a token costs, and what a device can do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import train_here
from narrowgauge.models import create
from narrowgauge.precision.apply import apply
from narrowgauge.precision.loading import load
from narrowgauge.trainer.config import TrainConfig, groups, load_config
from narrowgauge.trainer.costs import (
    NAMED_SIZES,
    flops_per_token,
    micro_batch_size,
    peak_flops,
    peak_memory,
    short,
    size_in_name,
)
from narrowgauge.trainer.distributed import World
from narrowgauge.trainer.errors import UserError
from narrowgauge.trainer.own import CONFIG_DIR


def model_of(*overrides: str) -> torch.nn.Module:
    config = load_config([*overrides, "data.seq_len=256"]).model
    with torch.device("meta"):
        return create(config)


@pytest.mark.parametrize("name", sorted(NAMED_SIZES))
def test_a_size_in_a_name_is_of_a_vocabulary(name: str) -> None:
    vocabulary, size = NAMED_SIZES[name]
    assert f"with a vocabulary of {vocabulary:,}" in (CONFIG_DIR / "model" / f"{name}.yaml").read_text()
    assert size_in_name(model_of(f"model={name}", f"model.vocab_size={vocabulary}")) is None
    told = size_in_name(model_of(f"model={name}", "model.vocab_size=4096"))
    assert told == f"{short(size)} with the vocabulary of {vocabulary:,} that its name means"


def test_every_name_with_a_size_is_known() -> None:
    assert sorted(NAMED_SIZES) == sorted(name for name in groups()["model"] if re.search(r"_\d+[mb]", name))


@pytest.mark.parametrize(
    "overrides",
    [("model=llama_15m", "model.num_layers=3"), ("model=llama_tiny",)],
    ids=["another shape", "a name without a size"],
)
def test_nothing_is_said_where_the_vocabulary_is_not_all(overrides: tuple[str, ...]) -> None:
    assert size_in_name(model_of(*overrides, "model.vocab_size=4096")) is None


def test_a_run_says_what_its_name_means(
    tiny: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("train.steps=1", "eval.tokens=0", "sample.tokens=0", "checkpoint.every=0")
    with torch.device("meta"):
        size = sum(each.numel() for each in create(replace(config.model, vocab_size=1000)).parameters())
    monkeypatch.setitem(NAMED_SIZES, "llama_tiny", (1000, size))
    train_here(config)
    means = rf"\({short(size)} with the vocabulary of 1,000 that its name means\)"
    assert re.match(rf"llama_tiny: [\d,]+ parameters {means}, vocabulary 257; ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("count", "told"), [(999, "999"), (15_191_712, "15.2M"), (1_339_082_752, "1.34B"), (999_900, "1.00M")]
)
def test_counts_are_told_in_three_digits(count: int, told: str) -> None:
    assert short(count) == told


def test_a_token_costs_six_a_weight_and_attention() -> None:
    llama = model_of("model=llama_15m", "model.vocab_size=1000")
    block = 4 * 288 * 288 + 3 * 288 * 768
    assert flops_per_token(llama, 256) == 6 * (6 * block + 288 * 1000) + 12 * 6 * 288 * 256
    gpt = model_of("model=gpt2_124m", "model.vocab_size=1000")
    assert flops_per_token(gpt, 256) == 6 * (12 * 12 * 768 * 768 + 768 * 1000) + 12 * 12 * 768 * 256


def test_a_recipe_changes_no_count() -> None:
    plain, narrow = (model_of("model=llama_tiny", "model.vocab_size=1000") for _ in range(2))
    apply(load("mxfp8", {}), narrow)
    assert flops_per_token(narrow, 256) == flops_per_token(plain, 256)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
        ("NVIDIA A1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_its_name_or_not(name: str, teraflops: float | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else pytest.approx(1e12 * teraflops))


def test_memory_is_what_was_resident_at_most() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(1 << 26)
    assert peak_memory(torch.device("cpu")) >= before > held.numel() / 2


def test_a_step_that_has_to_be_one_micro_batch_is() -> None:
    def size(wanted: int | None, processes: int) -> int:
        world = World(0, processes, processes, torch.device("cpu"), None, None)
        return micro_batch_size(wanted, 64, 1e9, world, one=True)

    assert [size(None, 1), size(None, 2), size(32, 2)] == [64, 32, 32]
    with pytest.raises(UserError, match=r"micro_batch_size=8: precision.args.amax=step .*: take 32 .*or amax=micro"):
        size(8, 2)
