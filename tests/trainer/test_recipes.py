"""Every recipe in whole runs: it trains, resumes bit for bit, changes, and a new one needs one file and one yaml."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import launch, run_many, sign, tiny_overrides, train_here
from narrowgauge.models.layers import Init, RMSNorm
from narrowgauge.precision import apply, load, recipes
from narrowgauge.precision.loading import filled, names
from narrowgauge.trainer import distributed
from narrowgauge.trainer.checkpoint import list_checkpoints, read_tensors
from narrowgauge.trainer.config import TrainConfig, groups, load_config, load_run_config
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.metrics import read_metrics, read_rows
from narrowgauge.trainer.own import CONFIG_DIR
from narrowgauge.trainer.reporting.numerics import heat_map, numerics_of, worst_layers
from narrowgauge.trainer.reporting.report import Settings, find_runs
from narrowgauge.trainer.tools.evaluation import evaluate_on, open_run
from test_extend import RECIPES
from torch import Tensor, nn
from whole_runs import compare_runs

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
    ("precision", "gpt"),
    [
        *((name, False) for name in NARROW),
        *(pytest.param(name, True, marks=() if name == "nvfp4" else pytest.mark.long) for name in WITH_BIASES),
    ],
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


def finished_with(tiny: Tiny, file: Path, text: str, *options: str) -> tuple[TrainConfig, str]:
    """A finished run with the recipe file ``text``, resumed at step 4 bit for bit, and its plan.txt."""
    file.write_text(text)
    config = tiny(f"precision.recipe={file}", "checkpoint.keep_last=9", *options)
    assert train_here(config) is ExitCode.FINISHED
    root = Path(config.run.dir)
    shutil.copytree(root, file.with_suffix(".alone"))
    go_back(config, 4)
    assert train_here(config) is ExitCode.FINISHED
    assert compare_runs(file.with_suffix(".alone"), root) == []
    losses = [row["loss"] for row in read_metrics(root / "metrics.jsonl", "train").values()]
    assert losses[-1] < losses[0]
    return config, (root / "plan.txt").read_text()


NORM = '''"""A toy: norms save their input for backward in E4M3, rounded stochastically."""

import torch
from narrowgauge.precision.formats import E4M3
from narrowgauge.precision.module import QuantizedModule
from narrowgauge.precision.noise import Noise, base_key
from narrowgauge.precision.quantize import dequantize, quantize
from narrowgauge.precision.recipe import Recipe, Rule
from narrowgauge.precision.scaling import Fp32, Tile
from narrowgauge.precision.spec import OperandSpec, Rounding
from torch import nn

SAVED = OperandSpec(format=E4M3, tile=Tile(1, -1), scale=Fp32(), rounding=Rounding.STOCHASTIC)


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, norm, noise):
        wide, eps, ctx.observer = x.float(), norm.eps, norm.observer
        inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        saved = x if noise is None else quantize(x, SAVED, noise=noise)
        ctx.saved = saved  # a toy: an honest one has save_for_backward keep the codes
        if norm.observer is not None and noise is not None:
            ctx.figures = norm.observer.operand(norm, "saved.x", str(SAVED), x, saved)
        ctx.save_for_backward(weight, inverse)
        return (wide * inverse * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        weight, inverse = ctx.saved_tensors
        if hasattr(ctx, "figures"):
            ctx.observer.add([ctx.figures])
        x = ctx.saved.float() if isinstance(ctx.saved, torch.Tensor) else dequantize(ctx.saved)
        normed, g = x * inverse, dy.float() * weight
        dx = inverse * (g - normed * (g * normed).mean(-1, keepdim=True))
        return dx.to(dy.dtype), (dy.float() * normed).sum(0).to(weight.dtype), None, None


class NarrowNorm(QuantizedModule):
    observed, observer = ("saved.x",), None

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps, self.plain = norm.weight, norm.eps, False

    def use(self, picks):
        self.plain = all(picks)

    def plan_rows(self):
        return (f"{self.path:44} saved for backward: {SAVED}",)

    def observe(self, observer):
        self.observer = observer

    @property
    def goes_by_step(self):
        return "rounding noise"

    def forward(self, x):
        rows, noise, clock = x.reshape(-1, x.shape[-1]), None, self.context
        if not (self.plain or clock.high_precision):
            noise = Noise.of(
                base=base_key(clock.seed, self.path, 0, device=x.device),
                step=clock.step,
                first_sample=clock.first_sample,
                rows_of_a_sample=clock.rows_per_sample(x, len(rows)),
            )
        return Function.apply(rows, self.weight, self, noise).view(x.shape)


def recipe() -> Recipe:
    rule = Rule(kind=nn.Module, path=r".*layernorm", make=lambda norm, path: NarrowNorm(norm))
    return Recipe(rules=(rule,))
'''


def test_a_layer_of_a_recipes_own_is_treated_as_a_quantized_linear_is(tiny: Tiny, tmp_path: Path) -> None:
    """It gets seed, step, schedule, probe and high precision, its line of plan.txt, and its place in the report."""
    file = tmp_path / "norm.py"
    config, plan_text = finished_with(tiny, file, NORM, "eval.precision=high", "probe.every=3")
    row = "layers.0.post_attention_layernorm            saved for backward: e4m3/row/fp32/sr"
    assert row in plan_text
    assert plan_text.count("saved for backward") == 4
    metrics = Path(config.run.dir) / "metrics.jsonl"
    watched = [row for row in read_rows(metrics, "probe") if row["step"] == 6 and row["slot"] == "saved.x"]
    assert len(watched) == 8  # also those from before it was resumed
    for probe_row in watched:
        assert probe_row["format"] == "e4m3/row/fp32/sr"
        assert 20 < probe_row["sqnr_db"] < 40
        assert probe_row["elements"] == 32 * 8 * 32  # hidden size, samples, tokens
    numerics = numerics_of([("own", Path(config.run.dir))])["own"]
    assert worst_layers({"own": numerics})["rows"][0][3] == "saved.x"
    assert {name for name in heat_map("own", numerics)["data"][0]["y"] if "norm" in name} == set()
    switched = tiny(
        f"precision.recipe={file}", "precision.schedule=[{steps:[0,2]}]", f"run.dir={tmp_path / 'switched'}"
    )
    assert train_here(switched) is ExitCode.FINISHED
    first, second = (read_metrics(Path(c.run.dir) / "metrics.jsonl", "train") for c in (config, switched))
    assert first[1]["loss"] == second[1]["loss"]  # only backward differs
    assert first[1]["grad_norm"] != second[1]["grad_norm"]

    model = nn.Sequential(OrderedDict(a_layernorm=RMSNorm(16, eps=1e-5)))
    plain, x = copy.deepcopy(model[0]), torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    plan = apply(load(str(file)), model, seed=3)

    def gradient(norm: nn.Module, step: int) -> Tensor:
        plan.begin_step(step, 0)
        given = x.clone().requires_grad_()
        norm(given)[:, :8].square().sum().backward()
        assert given.grad is not None
        return given.grad

    norm = model[0]
    exact = gradient(plain, 0)
    assert torch.equal(gradient(norm, 0), gradient(norm, 0))
    assert not torch.equal(gradient(norm, 0), gradient(norm, 1))
    assert (gradient(norm, 0) - exact).norm() > 1e-3 * exact.norm()
    with plan.high_precision():
        assert torch.allclose(gradient(norm, 0), exact, rtol=1e-4, atol=1e-6)
    model(x)
    with torch.no_grad():
        norm.weight.add_(1.0)  # as an optimizer does
    with pytest.raises(RuntimeError, match="rounding noise would stand still"):
        model(x)


GAIN = '''"""A toy: a gain before the head, trained with a term of its own in the loss, and held between two bounds."""

import torch
from narrowgauge.precision.recipe import Dtypes, Recipe, Rule
from torch import nn


class Gain(nn.Module):
    def __init__(self, strength):
        super().__init__()
        self.strength = strength
        self.alpha = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("loss", torch.zeros((), dtype=torch.float64))

    def __str__(self):
        return f"a gain before the head, drawn to 1 by {self.strength}"

    def loss_terms(self, model):
        return self.strength * (self.alpha - 1.0).square()

    def before_update(self, model, gradients):
        gradients["recipe.Gain.alpha"].mul_(2.0)

    def after_update(self, model, parameters):
        parameters["recipe.Gain.alpha"].clamp_(0.5, 1.499)
        self.updates += 1

    def end_step(self, model, step, applied, loss):
        self.loss.copy_(loss)


class Scaled(nn.Module):
    def __init__(self, norm, gain):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        self.gain = (gain,)  # in a tuple: the parameter stays the hook's

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps) * self.gain[0].alpha


def recipe(*, strength: float = 0.5) -> Recipe:
    gain = Gain(strength)
    rule = Rule(kind=nn.Module, path="norm", make=lambda norm, path: Scaled(norm, gain))
    return Recipe(rules=(rule,), hooks=(gain,), dtypes=Dtypes(compute=torch.float32))
'''
GAIN_STATE = {"alpha", "alpha.step", "alpha.exp_avg", "alpha.exp_avg_sq", "updates", "loss"}


PARAMETERS = '''"""A toy: hidden matrices learn and start by their width; norms stand still; biases start at 0.25."""

from narrowgauge.precision.parameters import Parameters, Setting
from narrowgauge.precision.recipe import Dtypes, Recipe


class ByWidth:
    def of(self, name, shape):
        if name.startswith("layers.") and len(shape) == 2:
            return Setting(lr=4 / shape[-1], init=(0.0, 0.5 * shape[-1] ** -0.5))

    def __str__(self):
        return "by width"


def recipe() -> Recipe:
    norms = Parameters(path=".*norm.*weight", setting=Setting(lr=0.0))
    biases = Parameters(path=".*bias", setting=Setting(init=(0.25, 0.0), decay=3.0))
    return Recipe(parameters=(ByWidth(), norms, biases), dtypes=Dtypes())
'''


def test_a_recipe_says_how_single_parameters_learn_and_start(tiny: Tiny, tmp_path: Path) -> None:
    """In a run whose updates are decay alone: what is left of a weight is what its own rate and decay leave."""
    file = tmp_path / "widths.py"
    file.write_text(PARAMETERS)
    options = ("optim.lr=0.5", "optim.weight_decay=0.1", "optim.eps=1e30", "optim.schedule=constant")
    options = (f"precision.recipe={file}", *options, "optim.warmup_steps=0", "train.steps=1")
    config = tiny(*options, gpt=True)
    assert train_here(config) is ExitCode.FINISHED
    (checkpoint,) = list_checkpoints(Path(config.run.dir) / "checkpoints")
    weights = read_tensors(checkpoint, "model.")
    up = weights["model.layers.0.mlp.up_proj.weight"]
    width = up.shape[1]
    start = Init(0.0, 0.5 * width**-0.5).draw(config.seed, "layers.0.mlp.up_proj.weight", up.shape)
    assert torch.allclose(up, start * (1 - 0.5 * 4 / width * 0.1), rtol=1e-6, atol=0)
    assert torch.equal(weights["model.layers.0.mlp.up_proj.bias"], torch.full((len(up),), 0.25 * (1 - 0.5 * 0.3)))
    assert torch.equal(weights["model.norm.weight"], torch.ones(width))
    embedding = weights["model.embed_tokens.weight"]
    start = Init(0.0, config.model.init_std).draw(config.seed, "embed_tokens.weight", embedding.shape)
    assert torch.allclose(embedding, start * (1 - 0.5 * 0.1), rtol=1e-6, atol=0)
    plan_text = (Path(config.run.dir) / "plan.txt").read_text()
    assert (
        "layers.0.self_attn.q_proj.weight and 9 others: learning rate x 0.125, starts as normal(0, 0.0883883)"
        in plan_text
    )
    assert "16 others: decay x 3, starts at 0.25" in plan_text


def gain_of(config: TrainConfig) -> dict[str, Tensor]:
    newest = list_checkpoints(Path(config.run.dir) / "checkpoints")[-1]
    return {name.removeprefix("recipe.Gain."): value for name, value in read_tensors(newest, "recipe.").items()}


def test_a_hook_has_parameters_a_loss_term_and_a_word_before_and_after_the_update(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "gain.py"
    config, plan_text = finished_with(
        tiny, file, GAIN, "train.micro_batch_size=8", "probe.every=3", "eval.precision=high"
    )
    watched = [row["slot"] for row in read_rows(Path(config.run.dir) / "metrics.jsonl", "probe") if row["step"] == 6]
    assert watched.count("fprop.x") == 2 * 15  # also those from before it was resumed
    line = "every step: a gain before the head, drawn to 1 by 0.5; a term of the loss; may change gradients"
    assert f"{line}; may change weights; parameter alpha []\n" in plan_text
    state = gain_of(config)
    assert state.keys() == GAIN_STATE
    assert int(state["updates"]) == int(state["alpha.step"]) == 6
    rows = read_metrics(Path(config.run.dir) / "metrics.jsonl", "train")
    assert float(state["loss"]) == pytest.approx(rows[6]["loss"], rel=1e-12)
    assert 0.5 < float(state["alpha"]) < 1.499
    # The term counts once, however many micro-batches a step has.
    dealt = tiny(f"precision.recipe={file}", "train.micro_batch_size=2", f"run.dir={tmp_path / 'dealt'}")
    assert train_here(dealt) is ExitCode.FINISHED
    others = gain_of(dealt)
    assert all(torch.allclose(state[name].double(), others[name].double(), rtol=1e-4) for name in state)
    # Another recipe leaves it behind.
    alone = tiny("precision=fp32", "train.steps=8", f"run.dir={tmp_path / 'dealt'}", "resume.recipe_change=allow")
    assert train_here(alone) is ExitCode.FINISHED
    assert not gain_of(alone)
    with pytest.raises(UserError, match="the next update would undo what a hook of the recipe does to weights"):
        train_here(tiny(f"precision.recipe={file}", "optim.moments=fp8_lm", f"run.dir={tmp_path / 'masters'}"))


@pytest.mark.long
def test_a_hook_trains_alike_on_two_processes(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    """Its gradient is summed over ranks, counts once in the norm, and its loss term counts once."""
    file = tmp_path / "gain.py"
    file.write_text(GAIN)
    options = (f"precision.recipe={file}", "train.micro_batch_size=2")
    one = tiny(*options)
    assert train_here(one) is ExitCode.FINISHED
    result = launch(tiny_overrides(corpus, tmp_path / "two", *options), processes=2)
    assert result.returncode == 0, result.stderr
    two = tiny(*options, f"run.dir={tmp_path / 'two'}")
    ours, others = gain_of(one), gain_of(two)
    assert all(torch.allclose(ours[name].double(), others[name].double(), rtol=1e-4) for name in ours)
    norms = [
        [row["grad_norm"] for row in read_metrics(Path(config.run.dir) / "metrics.jsonl", "train").values()]
        for config in (one, two)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


SLOTS = '''"""Kind a, six slots: INT8 rows forward, FP8 blocks backward, stochastic gradients, a rotation for wgrad."""

from narrowgauge.precision.formats import E5M2, INT8
from narrowgauge.precision.recipe import Recipe, block_linears
from narrowgauge.precision.scaling import PowerOfTwo, Tile
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding, Source
from narrowgauge.precision.transforms import Hadamard


def recipe(*, block: int = 16) -> Recipe:
    row = OperandSpec(format=INT8, tile=Tile(1, -1))
    dy = OperandSpec(format=E5M2, tile=Tile(1, block), scale=PowerOfTwo(), rounding=Rounding.STOCHASTIC)
    again = OperandSpec(format=INT8, tile=Tile(1, -1), source=Source.QUANTIZED)
    spec = LinearSpec(
        fprop=GemmSpec(a=row, b=row),
        dgrad=GemmSpec(a=dy, b=again),
        wgrad=GemmSpec(a=dy, b=again, transform=Hadamard(signs="step")),
    )
    return Recipe(rules=(block_linears(spec),))
'''


TABLES = '''"""Kind a', formats: weights in NF4 in blocks of 32, activations on a grid of its own, stochastically."""

from dataclasses import dataclass

import torch
from narrowgauge.precision.codebook import Codebook, Ties
from narrowgauge.precision.formats import NumberFormat
from narrowgauge.precision.recipe import Recipe, block_linears
from narrowgauge.precision.scaling import Fp32, Fp32Decode, Tile
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding

NF4 = Codebook(
    name="nf4",
    values=(
        -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ),
    ties=Ties.LOWER,
)


@dataclass(frozen=True)
class Cubes(NumberFormat):
    name: str = "cubes"
    bits: int = 8
    max: float = 125.0**3

    def round(self, x, noise=None):
        root = x.double().clamp(-self.max, self.max).abs().pow(1 / 3)
        low = (root + 1e-9).floor()
        share = (x.double().abs().clamp(max=self.max) - low**3) / ((low + 1) ** 3 - low**3)
        up = share > 0.5 if noise is None else noise < share
        return torch.copysign((low + up.double()) ** 3, x).float()

    def encode(self, values):
        return (values.double().abs().pow(1 / 3).round() + 128 * values.signbit()).to(torch.uint8)

    def decode(self, codes):
        return torch.where(codes > 127, -1.0, 1.0) * (codes & 127).float() ** 3


def recipe(*, block: int = 32) -> Recipe:
    w = OperandSpec(format=NF4, tile=Tile(1, block), scale=Fp32Decode(floor=1e-30))
    x = OperandSpec(format=Cubes(), tile=Tile(1, -1), scale=Fp32(), rounding=Rounding.STOCHASTIC)
    spec = LinearSpec(fprop=GemmSpec(a=x, b=w), dgrad=GemmSpec(b=w))
    return Recipe(rules=(block_linears(spec),))
'''


SCALES = '''"""Kind a'', scales: E2M1 in blocks of 16 under FP32 scales that are made anew from the codes.

Each block is first scaled by its root mean square, so that one outlier does not take the grid from the others; then
its scale becomes the one by which its codes lie closest to x, rounded stochastically to BF16. Gradients keep their
amax, and round stochastically themselves.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from narrowgauge.precision.formats import BF16, E2M1, NumberFormat
from narrowgauge.precision.recipe import Recipe, block_linears
from narrowgauge.precision.scaling import Fp32, Rms, Scales, Tile, Trial
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastSquares:
    """encode as ``Fp32``; decode = BF16.round(sum(x q) / sum(q^2)) over a tile's code values q, unless all are 0."""

    format: ClassVar[NumberFormat | None] = None
    levels: ClassVar[int] = 1
    power_of_two: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True  # its scales need noise, though the codes round to nearest

    def scales(
        self,
        amax: Tensor,  # or what else the spec's statistic makes of a tile
        element: NumberFormat,
        *,
        tensor_amax: Tensor | None = None,
        dtype: torch.dtype,
        top: float = 1.0,
    ) -> Scales:
        return Fp32().scales(amax, element, dtype=dtype, top=top)

    def finish(self, trial: Trial) -> tuple[Scales, Tensor | None]:
        codes = trial.codes()
        q = trial.values(codes)
        along, length = trial.sums(trial.x * q), trial.sums(q * q)
        decode = torch.where(length > 0, along / length, trial.scales.stored)
        return trial.scales._replace(stored=BF16.round(decode, trial.uniform())), codes

    def __str__(self) -> str:
        return "leastsquares"


def recipe() -> Recipe:
    block = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=LeastSquares())
    forward = replace(block, statistic=Rms(), top=0.4)  # the rms becomes 2.4 of 6
    dy = replace(block, scale=Fp32(), rounding=Rounding.STOCHASTIC)
    spec = LinearSpec(
        fprop=GemmSpec(a=forward, b=forward),
        dgrad=GemmSpec(a=dy, b=forward),
        wgrad=GemmSpec(a=dy, b=forward),
    )
    return Recipe(rules=(block_linears(spec, ()),))
'''


PARTS = '''"""Kind b, sums of parts: activations are clamped at a quantile, and what exceeds it has eight; gradients
are a mean and a rest, each in four."""

from dataclasses import dataclass

from narrowgauge.precision.formats import E2M1, E4M3
from narrowgauge.precision.recipe import Recipe, block_linears
from narrowgauge.precision.scaling import Tile
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Part, Rounding, Split, values_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Clamped:
    quantile: float

    def split(self, x):
        place = max(int(self.quantile * x.shape[1]) - 1, 0)
        top = x.abs().sort(dim=1).values[:, place : place + 1]
        inside = x.clamp(-top, top)
        return inside, x - inside

    def __str__(self):
        return f"clamped{self.quantile:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Centred:
    def split(self, x):
        mean = x.mean(0, keepdim=True)
        return mean, x - mean

    def __str__(self):
        return "centred"


def recipe(*, quantile: float = 0.9) -> Recipe:
    row = OperandSpec(format=E2M1, tile=Tile(1, -1))
    random = OperandSpec(format=E2M1, tile=Tile(1, 16), rounding=Rounding.STOCHASTIC)
    wide = OperandSpec(format=E4M3, tile=Tile(1, -1))
    x = Split(by=Clamped(quantile=quantile), parts=(Part("inside", row), Part("outliers", wide)), reused=("inside",))
    dy = Split(by=Centred(), parts=(Part("mean", random), Part("rest", random)))
    spec = LinearSpec(
        fprop=GemmSpec(a=x, b=row), dgrad=GemmSpec(a=dy, b=values_of(row)), wgrad=GemmSpec(a=dy, b=values_of(x))
    )
    return Recipe(rules=(block_linears(spec),))
'''


DERIVATIVE = '''"""Kind b', another derivative than straight-through: bits for x, a curve for w, both rotated."""

from dataclasses import dataclass
from typing import ClassVar

from narrowgauge.precision.estimator import ClipMask
from narrowgauge.precision.formats import E2M1
from narrowgauge.precision.recipe import Recipe, block_linears
from narrowgauge.precision.scaling import Power, PowerOfTwo, Tile
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, values_of
from narrowgauge.precision.transforms import Hadamard


@dataclass(frozen=True, slots=True, kw_only=True)
class Steepness:
    """Steeper the nearer a value is to the next decision of E2M1's rounding, up to ``top``."""

    mask: ClassVar[bool] = False
    top: float = 3.0

    def factor(self, scaled, format):
        rounded = format.round(scaled)
        return (0.5 + 2 * (scaled - rounded).abs()).clamp(max=self.top) * (scaled.abs() <= format.max)

    def __str__(self):
        return f"steepness{self.top:g}"


def recipe(*, top: float = 3.0) -> Recipe:
    block = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=PowerOfTwo(mode=Power.FLOOR))
    spec = LinearSpec(
        fprop=GemmSpec(a=block, b=block, transform=Hadamard()),
        dgrad=GemmSpec(b=values_of(block)),
        wgrad=GemmSpec(b=values_of(block)),
        dx=ClipMask(strict=True),
        dw=Steepness(top=top),
    )
    return Recipe(rules=(block_linears(spec),))
'''

RULE = '''"""Kind c, an update rule: momentum in a codec, over the root of a mean square by column."""

from dataclasses import dataclass

from narrowgauge.precision.formats import INT8
from narrowgauge.precision.recipe import Recipe, block_linears
from narrowgauge.precision.scaling import Tile
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec
from narrowgauge.precision.states.moments import codec
from narrowgauge.precision.states.rules import Extent, State, Sum, UpdateRule


def by_column(shape):
    return Extent((1, *shape[1:]), by_rows=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns(UpdateRule):
    average: float = 0.9
    states = (State(name="mean", codec=codec("e4m3/32/sr")), State(name="square", signed=False, extent=by_column))

    def exchange(self, states, grad, weight, scalars):
        return Sum(grad.square().sum(0, keepdim=True))

    def update(self, states, grad, weight, scalars):
        square = states["square"].lerp(scalars.exchanged / scalars.shape[0], 1 - self.average)
        mean = states["mean"].lerp(grad, 1 - self.average)
        new = weight * (1 - scalars.lr * scalars.decay) - scalars.lr * mean / (square.sqrt() + scalars.eps)
        return {"mean": mean, "square": square}, new


def recipe(*, average: float = 0.9) -> Recipe:
    row = OperandSpec(format=INT8, tile=Tile(1, -1))
    spec = LinearSpec(fprop=GemmSpec(a=row, b=row))
    return Recipe(rules=(block_linears(spec),), update=Columns(average=average))
'''

COMM = '''"""Kind d, communication: gradients reduced in E5M2 blocks, not the embedding's; weights gathered as codes."""

from narrowgauge.precision.comm_spec import Comm, Reduction
from narrowgauge.precision.formats import E4M3, E5M2
from narrowgauge.precision.recipe import Recipe, block_linears
from narrowgauge.precision.scaling import PowerOfTwo, Tile
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding


def recipe(*, block: int = 16) -> Recipe:
    fp8 = OperandSpec(format=E4M3)
    gradient = OperandSpec(format=E5M2, tile=Tile(1, block), scale=PowerOfTwo(), rounding=Rounding.STOCHASTIC)
    return Recipe(
        rules=(block_linears(LinearSpec(fprop=GemmSpec(a=fp8, b=fp8), dgrad=GemmSpec(b=fp8))),),
        comm=Comm(gather=True, reduce=Reduction(spec=gradient, paths=(r"layers\\..*", r"norm\\..*"))),
    )
'''

ON_THE_PAGE = ("formats", "scales", "derivative")  # trained as files of docs/extend.md, too
KINDS = {
    # its text; lines of plan.txt; rows of the probe, and how each is rounded
    "slots": (
        SLOTS,
        ("fprop: int8/row/fp32 x int8/row/fp32  [", "x int8/row/fp32/requantized [hadamard16/step]  ["),
        {"fprop.x": "int8/row/fp32", "dgrad.dy": "e5m2/1x16/e8m0-rceil/sr"},
    ),
    "formats": (
        TABLES,
        (
            "cubes/row/fp32/sr x nf4/1x32/fp32-decode-floor1e-30  [reference (not cpu: no kernel for cubes, a format",
            "not cpu: no kernel for nf4, a table of values",
        ),
        {"fprop.w": "nf4/1x32/fp32-decode-floor1e-30", "fprop.x": "cubes/row/fp32/sr"},
    ),
    "scales": (
        SCALES,
        (
            "fprop: e2m1/1x16/leastsquares/rms/top0.4 x e2m1/1x16/leastsquares/rms/top0.4  [reference",
            "no kernel for scales by leastsquares, a rule of its own: LeastSquares",
        ),
        {"fprop.x": "e2m1/1x16/leastsquares/rms/top0.4", "dgrad.dy": "e2m1/1x16/fp32/sr"},
    ),
    "parts": (
        PARTS,
        (
            "fprop: clamped0.9(inside + outliers) x e2m1/row/fp32  [reference (not cpu: no kernel for a sum of parts",
            "x, inside: e2m1/row/fp32\n            x, outliers: e4m3/row/fp32",
            "dgrad: centred(mean + rest) x e2m1/row/fp32/values  [",
            "wgrad: centred(mean + rest) x clamped0.9(inside)/values  [",
        ),
        {"fprop.x.inside": "e2m1/row/fp32", "wgrad.dy.rest": "e2m1/1x16/fp32/sr", "fprop.y": "bfloat16"},
    ),
    "derivative": (
        DERIVATIVE,
        (
            "fprop: e2m1/1x16/e8m0-floor x e2m1/1x16/e8m0-floor [hadamard16]  [",
            "dgrad: - x e2m1/1x16/e8m0-floor/values, dx * clip-mask-strict  [",
            "wgrad: - x e2m1/1x16/e8m0-floor/values, dw * steepness3  [",
        ),
        {"fprop.w": "e2m1/1x16/e8m0-floor [hadamard16]", "dgrad.w": "e2m1/1x16/e8m0-floor/values"},
    ),
    "rule": (
        RULE,
        (
            "update Columns(average=0.9)\n",
            "moments mean e4m3/32/sr, square fp32 (the recipe's), vectors fp32, updated by [reference (no k",
        ),
        {"fprop.x": "int8/row/fp32"},
    ),
    "comm": (
        COMM,
        (
            "weights of one shard are gathered by nobody: none are sent as codes",
            "rounded: gradients of layers.0.input_layernorm.weight and 18 others as e5m2/1x16/e8m0-rceil/sr, once a "
            "step: one process sends none; embed_tokens.weight in float32",
        ),
        {"fprop.x": "e4m3/tensor/fp32", "dgrad.w": "e4m3/tensor/fp32"},
    ),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.long if kind in ON_THE_PAGE else ()) for kind in KINDS]
)
def test_a_recipe_of_every_kind_is_one_file(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """It trains, resumes bit for bit, stands truthfully in plan.txt, is seen by the probe, and is validated without."""
    text, lines, rows = KINDS[kind]
    file = tmp_path / f"{kind}.py"
    config, plan_text = finished_with(tiny, file, text, "probe.every=3", "eval.precision=high", "eval.every=6")
    for line in lines:
        assert line in plan_text
    root = Path(config.run.dir)
    seen = [row for row in read_rows(root / "metrics.jsonl", "probe") if row["step"] == 6]
    for slot, format in rows.items():
        mine = [row for row in seen if row["slot"] == slot and row["module"].startswith("layers.")]
        assert len(mine) == 28  # with those from before it was resumed
        assert {row["format"] for row in mine} == {format}
        assert all(row["elements"] > 0 for row in mine)
        if slot != "fprop.y":
            assert all(5 < row["sqnr_db"] < 80 and row["saturation_percent"] < 20 for row in mine)
    high = read_metrics(root / "metrics.jsonl", "eval")[6]["loss"]
    try:
        subject = open_run(root, said=(str(file),))
        assert evaluate_on(subject, None, "validation", 500, 8).loss == high
        assert evaluate_on(replace(subject, precision="recipe"), None, "validation", 500, 8).loss != high
    finally:
        distributed.finish()


def test_states_of_a_recipes_own_rule_are_seen_and_kept_by_any_codec(tiny: Tiny, tmp_path: Path) -> None:
    (file := tmp_path / "rule.py").write_text(RULE)
    moments = "optim.moments={square: e5m2, mean: bf16, master: fp16/tensor}"
    options = ("optim.telemetry_every=2", "train.steps=4", "checkpoint.every=2", "optim.lr=1e-2")
    config = tiny(f"precision.recipe={file}", moments, *options)
    assert train_here(config) is ExitCode.FINISHED
    root = Path(config.run.dir)
    said = "moments mean bf16, square e5m2/128, weights fp16/tensor (optim.moments; the recipe has mean e4m3/32/sr, sq"
    assert said in (root / "plan.txt").read_text()
    saved = read_tensors(list_checkpoints(root / "checkpoints")[-1], "optim.layers.0.mlp.up_proj")
    sizes = {name.rpartition(".")[2]: (value.dtype, tuple(value.shape)) for name, value in saved.items()}
    assert sizes == {
        "step": (torch.float32, ()), "mean": (torch.bfloat16, (64, 32)), "square_codes": (torch.uint8, (1, 32)),
        "square_scales": (torch.float32, (1, 1)), "master_codes": (torch.float16, (64, 32)),
        "master_scales": (torch.float32, ()),
    }  # fmt: skip
    rows = read_metrics(root / "metrics.jsonl", "train")
    assert 0.9 < rows[4]["edq_ratio"] < 1.1
    assert rows[4]["update_ratio"] > 0
    with pytest.raises(
        UserError, match=r"no key 'squares' \(did you mean 'square'\?\); there are: mean, square, master"
    ):
        tiny(f"precision.recipe={file}", "optim.moments={squares: fp32}", f"run.dir={tmp_path / 'other'}")
    with pytest.raises(UserError, match="'bf16/sr' is for m and v; name the states: mean, square"):
        tiny(f"precision.recipe={file}", "optim.moments=bf16/sr")


LAYERS = '''"""Kind e, layers that are no linears: norms and the product of a SwiGLU keep codes for backward, and hand
codes on to the linears that read their output."""

import torch
from narrowgauge.precision.formats import E4M3, E5M2
from narrowgauge.precision.hooks import RollAmax
from narrowgauge.precision.layer import Layer
from narrowgauge.precision.packing import values
from narrowgauge.precision.recipe import Keep, Recipe, Rule, block_linears
from narrowgauge.precision.scaling import Delayed, Tile
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding, Source
from torch import nn

GROUPS = OperandSpec(format=E4M3, tile=Tile(1, 16), rounding=Rounding.STOCHASTIC)
LATE = OperandSpec(format=E4M3, amax=Delayed(history=3))
TENSOR = OperandSpec(format=E4M3)


class Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, at):
        inverse = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        at.save(ctx, at.quantized("saved.x", x), weight, inverse)
        return (x.float() * inverse * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        codes, weight, inverse = ctx.at.saved(ctx)
        normed, g = values(codes).view(dy.shape) * inverse, dy.float() * weight
        dx = inverse * (g - normed * (g * normed).mean(-1, keepdim=True))
        return dx.to(dy.dtype), (dy.float() * normed).flatten(0, -2).sum(0).to(weight.dtype), None, None


class Norm(Layer):
    def __init__(self, norm):
        super().__init__({"saved.x": GROUPS, "out": TENSOR}, handed_on=["out"])
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x):
        at = self.at(x)
        if not at.narrow:
            return nn.functional.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
        y = Normed.apply(x, self.weight, self.eps, at)
        at.hand_on(y, at.quantized("out", y))
        return y


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, at):
        at.save(ctx, at.quantized("saved.gate", gate), at.quantized("saved.up", up))
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, dh):
        gate, up = (values(codes).view(dh.shape) for codes in ctx.at.saved(ctx))
        s = gate.sigmoid()
        d_gate, d_up = dh * up * s * (1 + gate * (1 - s)), dh * gate * s
        return d_gate.to(dh.dtype), d_up.to(dh.dtype), None


class SwiGLU(Layer):
    def __init__(self, mlp):
        super().__init__({"saved.gate": GROUPS, "saved.up": LATE, "out": TENSOR}, handed_on=["out"])
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        at = self.at(gate)
        if not at.narrow:
            return self.down_proj(nn.functional.silu(gate) * up)
        h = Product.apply(gate, up, at)
        at.hand_on(h, at.quantized("out", h))
        return self.down_proj(h)


def recipe(*, keep: tuple[Keep, ...] = ()) -> Recipe:
    again = OperandSpec(format=E4M3, source=Source.QUANTIZED)
    dy = OperandSpec(format=E5M2)
    spec = LinearSpec(
        fprop=GemmSpec(a=TENSOR, b=TENSOR),
        dgrad=GemmSpec(a=dy, b=again),
        wgrad=GemmSpec(a=OperandSpec(format=E5M2, source=Source.QUANTIZED), b=again),
    )
    norms = Rule(kind=nn.Module, path=r".*layernorm", make=lambda norm, path: Norm(norm), keep=keep)
    mlps = Rule(kind=nn.Module, path=r".*\\.mlp", make=lambda mlp, path: SwiGLU(mlp))
    return Recipe(rules=(norms, mlps, block_linears(spec)), hooks=(RollAmax(),))
'''


def test_layers_that_are_no_linears_keep_codes_and_hand_them_on(tiny: Tiny, tmp_path: Path) -> None:
    """Several rules, with what they keep; probe, histories and high precision as of linears."""
    file = tmp_path / "layers.py"
    config, plan_text = finished_with(tiny, file, LAYERS, "probe.every=3", "eval.precision=high", "eval.every=6")
    random, out = (
        "e4m3/1x16/fp32/sr  [cpu]",
        "    out: e4m3/tensor/fp32, for linears of this spec  [cpu]\n",
    )
    assert f"layers.1.input_layernorm                     Norm\n    saved.x: {random}\n{out}" in plan_text
    assert f"SwiGLU\n    saved.gate: {random}\n    saved.up: e4m3/tensor/delayed3  [cpu]\n{out}" in plan_text
    root = Path(config.run.dir)
    seen = [row for row in read_rows(root / "metrics.jsonl", "probe") if row["step"] == 6]
    for slot, count in {"saved.x": 8, "saved.gate": 4, "saved.up": 4, "out": 12, "fprop.x": 30}.items():
        mine = [row for row in seen if row["slot"] == slot]
        assert len(mine) == count  # with those from before it was resumed
        assert all(row["elements"] > 0 and (row["sqnr_db"] or 99) > 15 for row in mine)
    # What a layer hands on is what the linear reads.
    made, read = ({(row["module"], row["slot"]): row for row in seen}[which] for which in HANDED_ON)
    assert {**made, "module": "", "slot": ""} == {**read, "module": "", "slot": ""}
    newest = read_tensors(list_checkpoints(root / "checkpoints")[-1], "recipe.")
    assert newest["recipe.layers.1.mlp.amax_history"].shape == (3, 1)
    assert (newest["recipe.layers.1.mlp.amax_held"] > 0).all()
    high = read_metrics(root / "metrics.jsonl", "eval")[6]["loss"]
    try:
        subject = open_run(root, said=(str(file),))
        assert evaluate_on(subject, None, "validation", 500, 8).loss == high
        assert evaluate_on(replace(subject, precision="recipe"), None, "validation", 500, 8).loss != high
        model = subject.state.model
    finally:
        distributed.finish()
    assert type(model.get_submodule("layers.0.input_layernorm")).__name__ == "Norm"
    kept = tiny(
        f"precision.recipe={file}", "precision.args.keep_first=1", f"run.dir={tmp_path / 'kept'}", "train.steps=1"
    )
    assert train_here(kept) is ExitCode.FINISHED
    plan_text = (tmp_path / "kept" / "plan.txt").read_text()
    assert plan_text.count(" Norm\n") == 2
    assert plan_text.count(" SwiGLU\n") == 2


HANDED_ON = [("layers.1.mlp", "out"), ("layers.1.mlp.down_proj", "fprop.x")]


EXPERTS = '''"""Kind f, experts: routed rows rounded by noise, weights scaled by a history of each expert."""

from narrowgauge.precision.formats import E2M1, E4M3
from narrowgauge.precision.hooks import RollAmax
from narrowgauge.precision.recipe import Recipe, block_linears
from narrowgauge.precision.scaling import Delayed, PowerOfTwo, Tile
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding


def recipe() -> Recipe:
    x = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=PowerOfTwo(), rounding=Rounding.STOCHASTIC)
    w = OperandSpec(format=E4M3, amax=Delayed(history=3))
    spec = LinearSpec(fprop=GemmSpec(a=x, b=w), dgrad=GemmSpec(a=x, b=w), wgrad=GemmSpec(a=x, b=x))
    return Recipe(rules=(block_linears(spec),), hooks=(RollAmax(),))
'''
MODEL = RECIPES["models-1"]  # a mixture of experts, balanced over the global batch


def test_a_model_with_experts_is_one_file_and_quantized_by_any_recipe(tiny: Tiny, tmp_path: Path) -> None:
    """Trained, resumed bit for bit, in plan.txt and the probe, validated without; the router in high precision."""
    (tmp_path / "own").mkdir()
    model = tmp_path / "own" / "moe.py"
    model.write_text(MODEL)
    file = tmp_path / "experts.py"
    options = (f"model.arch={model}", "probe.every=3", "eval.precision=high", "eval.every=6")
    config, plan_text = finished_with(tiny, file, EXPERTS, *options)
    line = (
        "layers.1.mlp.up_proj                         4 x 32 -> 64\n    fprop: e2m1/1x16/e8m0-rceil/sr x e4m3/tensor/"
    )
    assert line in plan_text
    assert "layers.*.mlp.router.weight 0.4% (2-D parameter of Router" in plan_text
    root = Path(config.run.dir)
    rows = read_metrics(root / "metrics.jsonl", "train")
    assert all(row["aux.balance"] > 0 for row in rows.values())
    seen = [row for row in read_rows(root / "metrics.jsonl", "probe") if row["step"] == 6]
    of_experts = [row for row in seen if row["module"] == "layers.1.mlp.up_proj" and row["slot"] == "fprop.x"]
    assert [row["elements"] for row in of_experts] == [8 * 32 * 2 * 32] * 2  # tokens, experts each, width; resumed
    newest = read_tensors(list_checkpoints(root / "checkpoints")[-1], "recipe.")
    assert newest["recipe.layers.1.mlp.up_proj.amax_held"].shape == (4,)
    high = read_metrics(root / "metrics.jsonl", "eval")[6]["loss"]
    try:
        subject = open_run(root, said=(str(file), str(model)))
        assert evaluate_on(subject, None, "validation", 500, 8).loss == high
        assert evaluate_on(replace(subject, precision="recipe"), None, "validation", 500, 8).loss != high
    finally:
        distributed.finish()


PARTS_OF_BLOCKS = '''"""A toy: attention reads q, k and v in E4M3, and the hidden activation is squared ReLU in E4M3."""

from narrowgauge.precision.formats import E4M3
from narrowgauge.precision.module import QuantizedModule
from narrowgauge.precision.quantize import dequantize, quantize
from narrowgauge.precision.recipe import Recipe, Rule
from narrowgauge.precision.scaling import Tile
from narrowgauge.precision.spec import OperandSpec
from torch import nn

ROW = OperandSpec(format=E4M3, tile=Tile(1, -1))


def rounded(x):
    rows = x.reshape(-1, x.shape[-1])
    return x + (dequantize(quantize(rows.detach(), ROW)).to(x.dtype).view_as(x) - x).detach()


class Core(QuantizedModule):
    def __init__(self, core):
        super().__init__()
        self.inner = core

    def forward(self, q, k, v, *context):
        if not self.context.high_precision:
            q, k, v = rounded(q), rounded(k), rounded(v)
        return self.inner(q, k, v, *context)

    def plan_rows(self):
        return (f"{self.path:44} q, k, v: {ROW}",)


class Act(QuantizedModule):
    def forward(self, gate, up):
        return rounded(gate.relu().square() * up)


def recipe() -> Recipe:
    return Recipe(rules=(
        Rule(kind=nn.Module, path=r".*self_attn\\.core", make=lambda core, path: Core(core)),
        Rule(kind=nn.Module, path=r".*mlp\\.act", make=lambda act, path: Act()),
    ))
'''


def kinds_in(root: Path, corpus: Path) -> dict[str, list[str]]:
    """The overrides of a run of every kind, each with directories of its own."""
    (root / "recipes").mkdir()
    overrides = {}
    (root / "recipes" / "model").mkdir()
    model = root / "recipes" / "model" / "moe.py"
    model.write_text(MODEL)
    for kind, (text, *_) in (KINDS | OTHERS).items():
        file = root / "recipes" / f"{kind}.py"
        file.write_text(text)
        options = [f"precision.recipe={file}", "train.micro_batch_size=2", "train.steps=4", "sample.tokens=0"]
        options += [f"model.arch={model}"] * (kind == "experts")
        overrides[kind] = tiny_overrides(corpus, root / kind, *options)
    return overrides


OTHERS = {"hook": (GAIN,), "layers": (LAYERS,), "core": (PARTS_OF_BLOCKS,), "experts": (EXPERTS,)}
OF_ONE_RANK = ("slots", "formats", "scales", "parts", "derivative")  # what ranks have of each other is but a linear's


@pytest.mark.long
def test_a_recipe_of_further_kinds_is_resumed_by_two_processes(corpus: Path, tmp_path: Path) -> None:
    resumed_by_two(corpus, tmp_path, OF_ONE_RANK)


def test_a_recipe_of_every_kind_is_resumed_by_two_processes(corpus: Path, tmp_path: Path) -> None:
    """Bit for bit, with weights in parts and two micro-batches a step."""
    resumed_by_two(corpus, tmp_path, [kind for kind in KINDS | OTHERS if kind not in OF_ONE_RANK])
    plan_text = (tmp_path / "comm" / "plan.txt").read_text()
    assert "weights of 14 linears gathered as codes" in plan_text
    assert "as e5m2/1x16/e8m0-rceil/sr, all to all over 2 ranks, summed in rank order in float32" in plan_text


def resumed_by_two(corpus: Path, root: Path, kinds: Iterable[str]) -> None:
    """Train each, go on from the middle, and compare."""
    overrides = {kind: of_kind for kind, of_kind in kinds_in(root, corpus).items() if kind in kinds}
    run_many(list(overrides.values()), 2, root)
    for kind in overrides:
        shutil.copytree(root / kind, root / "whole" / kind)
        go_back(load_config(overrides[kind]), 2)
    run_many(list(overrides.values()), 2, root)
    for kind in overrides:
        assert compare_runs(root / "whole" / kind, root / kind) == [], kind


@pytest.mark.long
@pytest.mark.parametrize(
    ("processes", "way"),
    [(2, "gathered from 2 replicas"), (4, "all to all over 2 ranks, then gathered from 2 replicas")],
)
def test_gradients_in_codes_are_resumed_with_replicas(corpus: Path, tmp_path: Path, processes: int, way: str) -> None:
    """Sharded over one replica's mesh, as their reduction wants it."""
    overrides = [*kinds_in(tmp_path, corpus)["comm"], "parallel=hsdp"]
    run_many([overrides], processes, tmp_path)
    shutil.copytree(tmp_path / "comm", tmp_path / "whole")
    go_back(load_config(overrides), 2)
    run_many([overrides], processes, tmp_path)
    assert compare_runs(tmp_path / "whole", tmp_path / "comm") == []
    assert f"as e5m2/1x16/e8m0-rceil/sr, {way}, summed" in (tmp_path / "comm" / "plan.txt").read_text()


@pytest.mark.long
@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_a_recipe_of_every_kind_survives_a_kill(corpus: Path, tmp_path: Path, kind: str) -> None:
    """Of the launcher and both processes, at whatever step they were."""
    overrides = [*kinds_in(tmp_path, corpus)[kind], "train.steps=40", "checkpoint.keep_last=99"]
    result = launch(overrides, processes=2)
    assert result.returncode == 0, result.stderr
    shutil.copytree(tmp_path / kind, tmp_path / "whole")
    shutil.rmtree(tmp_path / kind)
    kill_at(tmp_path / kind, 11, overrides)
    assert len(list_checkpoints(tmp_path / kind / "checkpoints")) < 20
    result = launch(overrides, processes=2)
    assert result.returncode == 0, result.stderr
    assert "resuming " in result.stdout
    assert compare_runs(tmp_path / "whole", tmp_path / kind) == []


def kill_at(run_dir: Path, step: int, overrides: list[str]) -> None:
    """Start a run on two processes, and kill all of it once it is at ``step``."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trainer"]
    process = subprocess.Popen([sys.executable, *launcher, *overrides], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while max(read_metrics(run_dir / "metrics.jsonl", "train"), default=0) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    there = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in there:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(there, timeout=60)


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
