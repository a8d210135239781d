"""The worst logits in the box are found in closed form; a search finds none worse."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import train_here
from narrowgauge.trainer.config import TrainConfig
from narrowgauge.trainer.metrics import read_metrics
from narrowgauge.trainer.sharpness import EPSILON, worst_losses
from scipy.optimize import minimize


def logits(seed: int, size: int = 6) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("epsilon", [EPSILON, 0.3])
def test_no_corner_of_the_box_is_worse(seed: int, epsilon: float) -> None:
    y, target = logits(seed).double(), seed % 6
    reach = epsilon * (y.abs() + 1)
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    brute = F.cross_entropy(y + corners * reach, torch.full((64,), target), reduction="none").max()
    loss, worst = worst_losses(y[None], torch.tensor([target]), epsilon)
    assert torch.equal(loss, F.cross_entropy(y[None], torch.tensor([target]), reduction="none"))
    assert float(worst) == pytest.approx(float(brute), rel=1e-14)


def test_a_search_inside_the_box_ends_in_the_same_place() -> None:
    y, target, epsilon = logits(9).double().numpy(), 2, 0.05
    reach = epsilon * (np.abs(y) + 1)

    def negative(d: np.ndarray) -> float:
        return float(y[target] + d[target] - np.logaddexp.reduce(y + d))

    found = minimize(negative, np.zeros(6), method="L-BFGS-B", bounds=list(zip(-reach, reach, strict=True)))
    _, worst = worst_losses(torch.from_numpy(y)[None], torch.tensor([target]), epsilon)
    assert float(worst) == pytest.approx(-found.fun, rel=1e-9)


def test_every_validation_has_it_whatever_the_micro_batch(tiny: Callable[..., TrainConfig], tmp_path: Path) -> None:
    values = []
    for size in (1, 4):
        config = tiny(
            *("precision=fp32", f"train.micro_batch_size={size}", f"run.dir={tmp_path}/{size}"),
            *("eval.every=3", "eval.sharpness=5", "train.steps=3"),
        )
        train_here(config)
        (row,) = read_metrics(Path(config.run.dir) / "metrics.jsonl", "eval").values()
        values.append(row["sharpness"])
    assert values[0] > 0
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_none_where_it_is_off(tiny: Callable[..., TrainConfig]) -> None:
    config = tiny("eval.sharpness=0", "train.steps=1")
    train_here(config)
    (row,) = read_metrics(Path(config.run.dir) / "metrics.jsonl", "eval").values()
    assert "sharpness" not in row
