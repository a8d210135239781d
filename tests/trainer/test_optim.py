"""Schedules as functions of the step; which parameters decay."""

from __future__ import annotations

from itertools import pairwise

import pytest
from torch import nn

from precision.updates import AdamW
from trainer.optim import OptimConfig, Schedule, build_optimizer, learning_rate


def rates(total: int = 100, **changes: object) -> list[float]:
    config = OptimConfig(name="adamw", **({"lr": 1.0, "warmup_steps": 10} | changes))  # type: ignore[arg-type]
    return [learning_rate(config, step, total) for step in range(total)]


@pytest.mark.parametrize("schedule", Schedule)
def test_every_schedule_warms_up_and_never_exceeds_the_rate(schedule: Schedule) -> None:
    values = rates(schedule=schedule)
    assert values[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert values[10] == 1.0
    assert max(values) == 1.0
    assert all(a >= b for a, b in pairwise(values[10:]))


def test_where_schedules_end() -> None:
    assert rates(schedule=Schedule.constant)[-1] == 1.0
    for schedule in (Schedule.linear, Schedule.cosine, Schedule.wsd):
        assert 0.1 <= rates(schedule=schedule, total=1000)[-1] < 0.11


def test_wsd_is_stable_and_then_linear() -> None:
    values = rates(schedule=Schedule.wsd, decay_fraction=0.2, min_lr_ratio=0.0)
    assert set(values[10:81]) == {1.0}
    assert values[90] == pytest.approx(0.5)


def test_cosine_passes_its_middle() -> None:
    assert rates(total=110, schedule=Schedule.cosine, min_lr_ratio=0.0)[60] == pytest.approx(0.5)


def test_a_short_run_is_not_all_warm_up() -> None:
    assert rates(total=20, warmup_steps=100)[2] == 1.0
    assert rates(total=1)[0] == 1.0


def test_decay_falls_on_matrices_alone() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=1e-3, weight_decay=0.3), model, AdamW())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.3, "1.weight": 0.3, "1.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0,
    }  # fmt: skip
