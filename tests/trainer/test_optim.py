"""Schedules as functions of the step; which parameters decay; how whole runs keep their states."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import sign, train_here
from narrowgauge.precision.apply import apply
from narrowgauge.precision.loading import load
from narrowgauge.precision.states.moments import CHOICES
from narrowgauge.trainer.checkpoint import list_checkpoints, read_tensors
from narrowgauge.trainer.config import TrainConfig
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.metrics import read_metrics
from narrowgauge.trainer.optim import OptimConfig, Schedule, build_optimizer, learning_rate
from narrowgauge.trainer.tools.export import export_run
from test_recipes import go_back
from torch import nn
from whole_runs import compare_runs

Tiny = Callable[..., TrainConfig]


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
    plan = apply(load("fp32"), model)
    config = OptimConfig(name="adamw", lr=1e-3, weight_decay=0.3)
    optimizer = build_optimizer(config, plan, seed=0, backend="auto")
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.3, "1.weight": 0.3, "1.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0,
    }  # fmt: skip


LIKE_OTHERS = ("bf16", "dynamic8", "fp8_fishman", "fp8_tensor", "pure_bf16")


@pytest.mark.parametrize(
    "moments",
    [
        *(
            pytest.param(name, marks=pytest.mark.long if name in LIKE_OTHERS else ())
            for name in sorted(set(CHOICES) - {"fp32"})
        ),
        "{m: expanded/16, v: dynamic, master: bf16/kahan}",
    ],
)
def test_runs_with_narrow_states_train_and_resume_bit_for_bit(tiny: Tiny, tmp_path: Path, moments: str) -> None:
    options = ("checkpoint.every=3", "checkpoint.keep_last=9", "train.steps=5", "optim.telemetry_every=2")
    config = tiny(f"optim.moments={moments}", *options)
    assert train_here(config) is ExitCode.FINISHED
    shutil.copytree(config.run.dir, tmp_path / "alone")
    go_back(config, 3)
    assert train_here(config) is ExitCode.FINISHED
    assert compare_runs(tmp_path / "alone", Path(config.run.dir)) == []
    rows = read_metrics(tmp_path / "alone" / "metrics.jsonl", "train")
    assert rows[5]["loss"] < rows[1]["loss"]
    measured = ["edq", "edq_ratio", "lost_updates", "update_ratio"]
    assert [sorted(rows[step].keys() & set(measured)) for step in (1, 2, 3, 4)] == [[], measured, [], measured]
    assert 0.5 < rows[4]["edq_ratio"] < 1.5
    assert 0 <= rows[4]["lost_updates"] < 1
    plan = (tmp_path / "alone" / "plan.txt").read_text()
    assert "(optim.moments; the recipe has m fp32, v fp32)" in plan
    if moments == "fp8":
        assert "moments m e4m3/128, v e5m2/128 (" in plan
        saved = read_tensors(list_checkpoints(tmp_path / "alone" / "checkpoints")[-1], "optim.layers.0.mlp.up_proj")
        sizes = {name.rpartition(".")[2]: (value.dtype, tuple(value.shape)) for name, value in saved.items()}
        assert sizes["exp_avg_codes"] == (torch.uint8, (64, 32))
        assert sizes["exp_avg_sq_scales"] == (torch.float32, (64, 1))
    if moments == "pure_bf16_sr":
        assert export_run(tmp_path / "alone", tmp_path / "hf") == 5
        assert "parameters bfloat16" in plan


def test_states_of_a_run_do_not_change(tiny: Tiny) -> None:
    """The same choice under another name may; another choice may not, whatever recipe says so."""
    train_here(tiny("optim.moments=fp8", "train.steps=2"))
    same = tiny("optim.moments={m: e4m3, v: e5m2, block: 128}", "train.steps=3")
    assert train_here(same) is ExitCode.FINISHED
    for other in ("optim.moments=fp32", "optim.moments=null", "optim.moments=fp8_tensor"):
        with pytest.raises(
            UserError, match=r"with optim\.moments=m e4m3/128, v e5m2/128, not m .*: states are not"
        ) as caught:
            train_here(tiny(other, "train.steps=4", "resume.recipe_change=allow"))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"optim\.moments: no moments named 'fp88' \(did you mean 'fp8'"):
        tiny("optim.moments=fp88")


SAID = {
    "lion": ("update Lion()", "moments m fp32 (the recipe's), vectors fp32, updated by [reference (no kernel for l"),
    "muon": (
        "update Muon(momentum=0.95, nesterov=True, iterations=4, ",
        "moments muon: m int8/2048; adamw: m dynamic/256, v fp32 (optim.moments; the recipe has muon: m fp32; ",
        "updated by muon [reference (no kernel for muon)], adamw [",
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", list(SAID))
def test_a_rule_by_name_trains_and_resumes_bit_for_bit(tiny: Tiny, tmp_path: Path, rule: str) -> None:
    options = ["checkpoint.every=3", "checkpoint.keep_last=9", "train.steps=6", "optim.telemetry_every=3"]
    if rule == "muon":
        options += ["optim.moments={m: int8/2048, adamw: {m: dynamic}}", "optim.update_args.iterations=4"]
    config = tiny(f"optim={rule}", *options)
    assert train_here(config) is ExitCode.FINISHED
    shutil.copytree(config.run.dir, tmp_path / "alone")
    go_back(config, 3)
    assert train_here(config) is ExitCode.FINISHED
    assert compare_runs(tmp_path / "alone", Path(config.run.dir)) == []
    rows = read_metrics(tmp_path / "alone" / "metrics.jsonl", "train")
    assert rows[6]["loss"] < rows[1]["loss"]
    assert rows[6]["edq_ratio"] == pytest.approx(1, abs=1e-3)
    plan = (tmp_path / "alone" / "plan.txt").read_text()
    assert [line for line in SAID[rule] if line not in plan] == []
    newest = list_checkpoints(tmp_path / "alone" / "checkpoints")[-1]
    keys = [
        {name.rpartition(".")[2] for name in read_tensors(newest, f"optim.{place}.weight")}
        for place in ("layers.1.mlp.up_proj", "embed_tokens")
    ]
    if rule == "lion":
        assert keys == [{"step", "exp_avg"}] * 2
    else:
        adamw = {"step", "exp_avg_codes", "exp_avg_scales", "exp_avg_sq"}
        assert keys == [{"step", "exp_avg_codes", "exp_avg_scales"}, adamw]
    with pytest.raises(UserError, match=r"optim\.update=.*, not AdamW\(\): states are not converted") as caught:
        train_here(tiny("optim=adamw", "train.steps=8", "resume.recipe_change=allow"))
    assert "\n" not in str(caught.value)


def test_a_run_from_before_rules_had_names_goes_on_with_its_own(tiny: Tiny) -> None:
    train_here(first := tiny("train.steps=2"))
    (checkpoint,) = list_checkpoints(Path(first.run.dir) / "checkpoints")
    meta = json.loads((checkpoint / "meta.json").read_text())
    assert meta["identity"].pop("optim.update") == "AdamW()"
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    sign(checkpoint)
    file = Path(first.run.dir) / "config.yaml"
    file.write_text(re.sub(r"^  update(_args)?: .*\n", "", file.read_text(), flags=re.M))
    assert "update" not in file.read_text()
    with pytest.raises(UserError, match=r"optim\.update=AdamW\(\), not Lion\(\)"):
        train_here(tiny("optim=lion", "train.steps=3"))
    assert train_here(tiny("optim.update=adamw", "train.steps=3")) is ExitCode.FINISHED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["optim.update=lyon"],
            r"optim\.update: no rule named 'lyon' \(did you mean 'lion'\?\); there are: adamw, lion,",
        ),
        (["optim=muon", "optim.update_args={momentun: 0.9}"], r"no setting 'momentun' \(did you mean 'momentum'\?\)"),
        (["optim.update_args={momentum: 0.9}"], "settings of a rule, and optim.update names none"),
        (["optim=lion", "optim.moments={v: fp32}"], r"optim\.moments: no key 'v'; there are: m, master, block"),
    ],
)
def test_a_rule_that_cannot_be_is_one_line(tiny: Tiny, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tiny(*options)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_bytes_a_parameter_of_all_that_is_alive_before_an_update() -> None:
    """On two processes, in the trainer: FP8 moments take at most 2.1 of FP32's 8, and none of them hides elsewhere."""
    script = Path(__file__).parents[1] / "state_bytes.py"
    names = ["fp32", "fp8", "fp8_tensor", "fp8_fishman", "pure_bf16_kahan"]
    result = subprocess.run(
        [sys.executable, str(script), ",".join(names)], capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    sizes = {row.pop("moments"): row for row in map(json.loads, result.stdout.splitlines())}
    states = {name: sizes[name]["m"] + sizes[name]["v"] + sizes[name]["scales"] for name in names}
    assert states["fp32"] == pytest.approx(8)
    assert states["fp8"] <= 2.1
    assert states["fp8_tensor"] <= 2.01
    assert sizes["fp32"]["weights"] == pytest.approx(4)
    assert sizes["fp32"]["grads"] == pytest.approx(4, rel=0.02)
    assert sizes["fp8_fishman"]["master"] == pytest.approx(2, rel=0.01)
    assert sizes["fp8_fishman"]["weights"] == sizes["pure_bf16_kahan"]["master"] == pytest.approx(2)
    for name in names:
        assert sizes[name]["others"] < sizes["fp32"]["others"] + 0.05, name
