"""A config is parsed once, and its values travel."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import train_here
from narrowgauge.precision.schedule import Span
from narrowgauge.precision.states.moments import STANDARD
from narrowgauge.trainer import recipe as recipe_module
from narrowgauge.trainer.config import TrainConfig, load_config
from narrowgauge.trainer.errors import ExitCode


def test_a_run_parses_its_recipe_and_its_moments_once(
    tiny: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(recipe_module, name)
        return lambda *arguments: (parsed.append(name), real(*arguments))[1]

    for name in ("load", "chosen"):
        monkeypatch.setattr(recipe_module, name, counted(name))
    config = tiny("precision=mxfp8", "optim.moments=fp8", "train.steps=1", "eval.tokens=0", "sample.tokens=0")
    assert train_here(config) is ExitCode.FINISHED
    assert parsed == ["load", "chosen"]


def test_values_are_typed() -> None:
    config = load_config(["precision=nvfp4", "optim.moments=bf16", "precision.schedule=[{steps: [0, 5]}]"])
    precision = config.values.precision
    assert [phase.span for phase in precision.recipe.schedule][-1] == Span(start=0, end=5)
    assert (str(precision.recipe.moments), precision.own_moments) == ("m bf16, v bf16", STANDARD)
    assert config.values.micro_batch is None
    assert load_config(["train.micro_batch_size=2"]).values.micro_batch == 2


def test_a_changed_config_has_its_own_values() -> None:
    config = load_config(["optim.moments=bf16"])
    changed = replace(config, optim=replace(config.optim, moments=None))
    assert changed.values.precision.recipe.moments == STANDARD != config.values.precision.recipe.moments


def test_what_other_ranks_get_is_the_config_without_its_values() -> None:
    config = load_config(["precision=smooth_swiglu"])
    received = pickle.loads(pickle.dumps(config))
    assert received == config
    assert "values" in vars(config)
    assert "values" not in vars(received)
    assert received.values.precision.own_moments == config.values.precision.own_moments
