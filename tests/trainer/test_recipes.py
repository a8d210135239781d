"""Every recipe in whole runs: it trains, resumes bit for bit, changes, and a new one needs one file and one yaml."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import sign, train_here
from narrowgauge.precision import recipes
from narrowgauge.precision.recipe import filled, names
from narrowgauge.trainer import distributed
from narrowgauge.trainer.checkpoint import list_checkpoints, read_tensors
from narrowgauge.trainer.config import TrainConfig, groups, load_run_config
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.metrics import read_metrics
from narrowgauge.trainer.own import CONFIG_DIR
from narrowgauge.trainer.reporting.report import Settings, find_runs
from narrowgauge.trainer.tools.evaluation import evaluate_on, open_run
from narrowgauge.trainer.tools.verify import compare_runs

Tiny = Callable[..., TrainConfig]
ROOT = Path(__file__).parents[2]


def go_back(config: TrainConfig, step: int) -> None:
    """Leave of a finished run what it had at ``step``."""
    root = Path(config.run.dir)
    for path in list_checkpoints(root / "checkpoints"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (root / "done.json").unlink()


# fp32 and bf16 run in the rest of the suite; the rungs of the ladder differ in two numbers.
NARROW = [name for name in groups()["precision"] if name not in ("fp32", "bf16") and not name.startswith("exmy_")]
WITH_BIASES = ["fp8_delayed", "fp8_current", "mxfp8", "mxfp4", "nvfp4"]


@pytest.mark.parametrize(
    ("precision", "gpt"), [*((name, False) for name in NARROW), *((name, True) for name in WITH_BIASES)]
)
def test_every_recipe_trains_and_resumes_bit_for_bit(tiny: Tiny, tmp_path: Path, precision: str, gpt: bool) -> None:
    options = (f"precision={precision}", "checkpoint.every=3", "checkpoint.keep_last=9", "train.steps=5")
    config = tiny(*options, gpt=gpt)
    assert train_here(config) is ExitCode.FINISHED
    shutil.copytree(config.run.dir, tmp_path / "alone")
    go_back(config, 3)
    assert train_here(config) is ExitCode.FINISHED
    assert compare_runs(tmp_path / "alone", Path(config.run.dir)) == []
    losses = [row["loss"] for row in read_metrics(tmp_path / "alone" / "metrics.jsonl", "train").values()]
    assert losses[-1] < losses[0]


def test_every_recipe_has_a_yaml_which_says_what_differs_from_its_signature(tiny: Tiny) -> None:
    for file in (CONFIG_DIR / "precision").glob("*.yaml"):
        tree = yaml.safe_load(file.read_text())
        assert tree["name"] == file.stem
        assert tree.keys() <= {"name", "recipe", "args"}
        defaults, args = filled(tree["recipe"], {}), tree.get("args", {})
        assert args.keys() <= defaults.keys(), file
        assert [key for key, value in args.items() if value == defaults[key]] == [], file
        config = tiny(f"precision={file.stem}")
        assert config.precision.args == defaults | args  # what a run directory says
        assert yaml.safe_load(config.to_yaml())["precision"]["args"] == config.precision.args
    assert set(names()) <= set(groups()["precision"])


def test_a_run_from_before_goes_on(tiny: Tiny) -> None:
    """Its config.yaml has every argument, or lacks those that came later."""
    options = ("precision=mxfp4", "precision.args.keep_last=1", "train.steps=2")
    train_here(first := tiny(*options))
    file = Path(first.run.dir) / "config.yaml"
    args = yaml.safe_load(file.read_text())["precision"]["args"]
    assert [args[f"keep_{part}"] for part in ("first", "last", "paths")] == [0, 1, []]
    assert load_run_config(file) == first
    file.write_text(file.read_text().replace("    keep_first: 0\n", ""))
    assert load_run_config(file) == first
    assert train_here(tiny(*options[:2], "train.steps=4")) is ExitCode.FINISHED


def test_amax_history_is_plain_tensors_in_the_checkpoint(tiny: Tiny) -> None:
    config = tiny("precision=fp8_delayed", "precision.args.history=4", "train.steps=2")
    train_here(config)
    tensors = read_tensors(list_checkpoints(Path(config.run.dir) / "checkpoints")[-1], "recipe.")
    history = tensors["recipe.layers.0.mlp.up_proj.amax_history"]
    assert history.shape == (4, 3)
    assert history[0].tolist() == [0.0] * 3  # rolled
    assert (history[-2:] > 0).all()
    assert (tensors["recipe.layers.0.mlp.up_proj.amax_held"] == history.amax(0)).all()


def test_a_run_goes_on_under_another_recipe_only_if_allowed(tiny: Tiny) -> None:
    first = tiny("precision=bf16", "train.steps=4", "checkpoint.every=2")
    train_here(first)
    other = ("precision=fp8_delayed", "train.steps=6", "checkpoint.every=2")
    with pytest.raises(UserError, match=r"precision\.recipe=bf16, not fp8_delayed: .*resume\.recipe_change=allow"):
        train_here(tiny(*other))
    assert train_here(tiny(*other, "resume.recipe_change=allow")) is ExitCode.FINISHED
    newest = list_checkpoints(Path(first.run.dir) / "checkpoints")[-1]
    tensors = read_tensors(newest, "recipe.")
    assert len(tensors) == 28
    held = [value for name, value in tensors.items() if name.endswith("amax_held")]
    assert all((value > 0).all() for value in held)  # none is unknown any more
    # Opened while config.yaml names the next recipe already, it is still what its weights were trained under.
    file = Path(first.run.dir) / "config.yaml"
    before = file.read_text()
    file.write_text(tiny("precision=mxfp8", "train.steps=6").to_yaml())
    try:
        opened = open_run(Path(first.run.dir)).state
        assert set(opened.plan.state_tensors()) == {name.removeprefix("recipe.") for name in tensors}
    finally:
        distributed.finish()
        file.write_text(before)
    # Back again, and what the recipe had learned is left behind.
    assert train_here(tiny("precision=bf16", "train.steps=8", "resume.recipe_change=allow")) is ExitCode.FINISHED
    assert not read_tensors(list_checkpoints(Path(first.run.dir) / "checkpoints")[-1], "recipe.")


def test_a_run_goes_on_where_its_recipe_has_learned_an_argument_since(tiny: Tiny) -> None:
    """At its default: what the recipe remembers is kept, and no change of recipe is noted."""
    options = ("precision=fp8_delayed", "checkpoint.every=2")
    train_here(whole := tiny(*options, "train.steps=4", f"run.dir={tiny().run.dir}-whole"))
    train_here(first := tiny(*options, "train.steps=4"))
    shutil.rmtree(Path(first.run.dir) / "checkpoints" / "step-00000004")
    (Path(first.run.dir) / "done.json").unlink()
    (checkpoint,) = list_checkpoints(Path(first.run.dir) / "checkpoints")
    meta = json.loads((checkpoint / "meta.json").read_text())
    assert meta["recipe"]["args"].pop("roll") == meta["identity"].pop("precision.args.roll") == "step"
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    sign(checkpoint)
    assert train_here(first) is ExitCode.FINISHED
    newest = list_checkpoints(Path(first.run.dir) / "checkpoints")[-1]
    assert json.loads((newest / "meta.json").read_text())["recipe_changes"] == []
    assert compare_runs(Path(whole.run.dir), Path(first.run.dir)) == []


def test_validation_in_high_precision(tiny: Tiny) -> None:
    """The weights are the same; only what validation computes in differs."""
    losses = {}
    for precision in ("recipe", "high"):
        config = tiny("precision=mxfp4", f"eval.precision={precision}", f"run.dir={tiny().run.dir}-{precision}")
        train_here(config)
        root = Path(config.run.dir)
        losses[precision] = [
            [row["loss"] for row in read_metrics(root / "metrics.jsonl", kind).values()] for kind in ("train", "eval")
        ]
    assert losses["recipe"][0] == losses["high"][0]
    assert losses["recipe"][1] != losses["high"][1]


def test_overflows_that_loss_scaling_catches_are_no_divergence(tiny: Tiny, tmp_path: Path) -> None:
    """More of them in a row than a run may skip; the scale they leave is resumed with, bit for bit."""
    options = ("precision=fp16", "precision.args.init_scale=2.0e17", "precision.args.backoff=0.001")
    options = (*options, "precision.args.interval=2", "train.max_nonfinite_in_a_row=1", "checkpoint.every=1")
    config = tiny(*options, "checkpoint.keep_last=9")
    assert train_here(config) is ExitCode.FINISHED
    root = Path(config.run.dir)
    rows = list(read_metrics(root / "metrics.jsonl", "train").values())
    skipped = [row for row in rows if "skipped" in row]
    assert 2 <= len(skipped) < len(rows)
    assert skipped == rows[: len(skipped)]
    assert skipped[0]["skipped"] == "gradient overflow at loss scale 2e+17"
    assert all(row["loss"] is not None and row["grad_norm"] is None for row in skipped)
    scales = [row["loss_scale"] for row in rows]
    assert all(later < earlier for earlier, later in itertools.pairwise(scales[: len(skipped) + 1]))
    assert [run.state for run in find_runs([root], Settings())] == ["finished"]  # by the rule of a sweep's report
    for step in (1, 4):
        shutil.copytree(root, tmp_path / f"alone{step}")
        go_back(config, step)
        assert train_here(config) is ExitCode.FINISHED
        assert compare_runs(tmp_path / f"alone{step}", root) == []
    assert "loss scale from 2e+17" in (root / "plan.txt").read_text()


def test_overflows_at_the_floor_are_a_divergence(tiny: Tiny) -> None:
    scale = ("precision.args.init_scale=1.0e30", "precision.args.min_scale=1.0e30")
    config = tiny("precision=fp16", *scale, "train.max_nonfinite_in_a_row=3")
    assert train_here(config) is ExitCode.DIVERGED


def test_a_schedule_from_the_command_line_resumes_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    phases = "[{steps:[0,2],recipe:mxfp8},{steps:[3,5],gemms:[fprop,wgrad]},{steps:[0.9,1.0],gemms:[dgrad]}]"
    options = (f"precision.schedule={phases}", "precision=fp8_delayed", "precision.args.history=4")
    config = tiny(*options, "checkpoint.every=1", "checkpoint.keep_last=9", "eval.every=4", "train.micro_batch_size=4")
    assert train_here(config) is ExitCode.FINISHED
    root = Path(config.run.dir)
    assert "schedule: steps 3 to 4: fprop, wgrad in high precision" in (root / "plan.txt").read_text()
    evals = read_metrics(root / "metrics.jsonl", "eval")
    for step in (4,):
        shutil.copytree(root, tmp_path / f"alone{step}")
        go_back(config, step)
        assert train_here(config) is ExitCode.FINISHED
        assert compare_runs(tmp_path / f"alone{step}", root) == []
    go_back(config, 4)  # evaluated as step 3 left it: under the second phase
    try:
        assert evaluate_on(open_run(root), None, "validation", 500, 4).loss == evals[4]["loss"]
    finally:
        distributed.finish()
    with pytest.raises(UserError, match=r"holds a run with precision\.schedule=.*resume\.recipe_change=allow"):
        train_here(tiny(*options[1:], "precision.schedule=[]"))
    again = ("precision.schedule=[]", "resume.recipe_change=allow")
    assert train_here(tiny(*options[1:], *again)) is ExitCode.FINISHED


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("[{steps:[0,3],gems:[fprop]}]", r"precision\.schedule\[0\]: unknown key 'gems' \(did you mean 'gemms'\?\)"),
        ("[{steps:[0,3]},{steps:[0.3,0.6]}]", r"precision\.schedule: two phases switch fprop at one step"),
        ("[{steps:[9,12]}]", r"precision\.schedule: \(steps 9 to 11.* begins after the run's 6 steps"),
    ],
)
def test_a_schedule_that_cannot_be_is_one_line(tiny: Tiny, schedule: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        tiny("precision=mxfp8", f"precision.schedule={schedule}")
    assert "\n" not in str(error.value)


TOY = '''"""A toy: its own format, its own transform, its own update rule."""

from dataclasses import dataclass

import torch
from torch import nn

from narrowgauge.precision.formats import exmy
from narrowgauge.precision.linear import quantized
from narrowgauge.precision.recipe import BLOCK_LINEARS, Recipe, Rule
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Reversed:
    """Contraction in reverse order: it cancels."""

    def left(self, a, stats=None):
        return a.flip(-1)

    def right(self, b, stats=None):
        return b.flip(-1)

    def output(self, y, stats=None):
        return y

    def __str__(self):
        return "reversed"


class SignSGD(torch.optim.Optimizer):
    def __init__(self, groups, lr):
        super().__init__(list(groups), {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign() * group["lr"])


@dataclass(frozen=True, slots=True, kw_only=True)
class SignRule:
    def build(self, groups, *, lr, betas, eps, **others):
        return SignSGD(groups, lr)


def recipe(*, mantissa: int = 4) -> Recipe:
    operand = OperandSpec(format=exmy(3, mantissa))
    gemm = GemmSpec(a=operand, b=operand, transform=Reversed())
    spec = LinearSpec(fprop=gemm, dgrad=gemm, wgrad=gemm)
    return Recipe(rules=(Rule(kind=nn.Linear, path=BLOCK_LINEARS, make=quantized(spec)),), update=SignRule())
'''


def test_a_new_recipe_is_one_file(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "more"
    package.mkdir()
    (package / "toy.py").write_text(TOY)
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(package)])
    config = tiny("precision.name=toy", "precision.recipe=toy", "+precision.args.mantissa=3", "optim.lr=1e-3")
    assert train_here(config) is ExitCode.FINISHED
    root = Path(config.run.dir)
    losses = [row["loss"] for row in read_metrics(root / "metrics.jsonl", "train").values()]
    assert losses[-1] < losses[0] - 0.1
    assert "e3m3_ieee/tensor" in (root / "plan.txt").read_text()
    assert "[reversed]" in (root / "plan.txt").read_text()
    with pytest.raises(UserError, match=r"recipe 'toy' has no argument 'mantisa' \(did you mean 'mantissa'\?\)"):
        tiny("precision.recipe=toy", "precision.args.mantisa=3")


def test_evaluating_a_run_gives_what_the_run_gave(tiny: Tiny) -> None:
    """Also after the forward GEMMs went back to BF16: that is a matter of the step, not of the weights."""
    config = tiny("precision=nvfp4", "precision.args.bf16_forward=0.5", "train.micro_batch_size=4")
    train_here(config)
    rows = read_metrics(Path(config.run.dir) / "metrics.jsonl", "eval")
    try:
        subject = open_run(Path(config.run.dir))
        ours = evaluate_on(subject, None, "validation", 500, 4)
        subject.state.plan.begin_step(0, 0, 6)
        first_half = evaluate_on(subject, None, "validation", 500, 4)
    finally:
        distributed.finish()
    assert ours.loss == rows[max(rows)]["loss"]
    assert first_half.loss != ours.loss
