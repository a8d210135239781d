"""A model that is a user's own file: losses and counts beside the loss, whatever the cut of the batch; its parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_many, tiny_overrides, train_here
from narrowgauge.models.layers import CausalAttention, GatedSiLU
from narrowgauge.trainer import distributed
from narrowgauge.trainer.build import build_state, resolve_model
from narrowgauge.trainer.checkpoint import list_checkpoints, read_tensors
from narrowgauge.trainer.config import TrainConfig, load_config, load_run_config
from narrowgauge.trainer.data.batches import Batch
from narrowgauge.trainer.distributed import ParallelConfig, World
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.metrics import read_metrics
from narrowgauge.trainer.state import local
from narrowgauge.trainer.step import update_from
from narrowgauge.trainer.tools.export import export_run
from narrowgauge.trainer.tools.restore import restore_run
from test_extend import RECIPES
from test_recipes import PARTS_OF_BLOCKS, go_back
from torch import Tensor
from whole_runs import compare_runs

Tiny = Callable[..., TrainConfig]
MOE = RECIPES["models-1"]
QUICK = ("sample.tokens=0", "eval.tokens=64", "eval.sharpness=0", "parallel.threads=1", "model.bias_rate=0.05")
FP32 = ("precision=fp32", "train.steps=3", "checkpoint.every=3", "data.document_mask=true", *QUICK)


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    file = tmp_path / "own" / "my_moe.py"
    file.parent.mkdir()
    file.write_text(MOE)
    return file


def rows_of(root: Path) -> list[dict[str, Any]]:
    return list(read_metrics(root / "metrics.jsonl", "train").values())


def state_of(root: Path) -> dict[str, Tensor]:
    return read_tensors(list_checkpoints(root / "checkpoints")[-1])


def test_a_model_is_one_file(tiny: Tiny, moe: Path, tmp_path: Path) -> None:
    config = tiny(f"model.arch={moe}", "model.num_experts=5", "checkpoint.keep_last=9", *QUICK)
    assert (config.model.name, config.model.num_experts, config.model.hidden_size) == ("my_moe", 5, 32)
    assert config.model.tie_embeddings  # as the chosen yaml says
    assert train_here(config) is ExitCode.FINISHED
    root = Path(config.run.dir)
    assert (root / "model.py").read_text() == MOE
    shutil.copytree(root, tmp_path / "alone")
    go_back(config, 4)
    assert train_here(config) is ExitCode.FINISHED
    assert compare_runs(tmp_path / "alone", root) == []
    rows = rows_of(root)
    assert rows[-1]["loss"] < rows[0]["loss"] < 6
    assert all(0.015 < row["aux.balance"] < 0.03 for row in rows)  # two layers, near 0.01 each
    bias = state_of(root)["model.layers.1.mlp.router.bias"]
    assert bias.dtype == torch.float32
    assert 0 < bias.abs().max() < 0.31
    steps = bias / 0.05  # of six updates by a sign
    torch.testing.assert_close(steps, steps.round(), atol=1e-5, rtol=0)

    moved = moe.rename(tmp_path / "elsewhere.py")
    with pytest.raises(UserError, match=r"my_moe\.py"):
        load_run_config(root / "config.yaml", {str(moe)})
    with pytest.raises(
        UserError, match=r"a model file \(sha256 [0-9a-f]{64}\), .*; its copy is .*model\.arch=.*model\.py"
    ):
        restore_run(root)
    assert restore_run(root, [str(moved)]).config.model.num_experts == 5
    distributed.finish()
    with pytest.raises(UserError, match=r"model\.arch=.*: its file says no conversion to transformers"):
        export_run(root, tmp_path / "hf", said=[str(moved)])
    longer = (f"model.arch={moved}", "model.name=my_moe", "model.num_experts=5", "train.steps=7", *QUICK)
    assert train_here(tiny(*longer)) is ExitCode.FINISHED
    moved.write_text(MOE + "# another\n")
    with pytest.raises(UserError, match=r"another model\.arch, the model file has changed: sha256"):
        train_here(tiny(*longer[:-1], "train.steps=8", *QUICK))


MISTAKES = {
    "an unknown key": (
        ["model.num_expert=4"],
        r"unknown key 'model.num_expert' \(did you mean 'model.num_experts' or",
    ),
    "a key of another model": (["model.rope_thet=4"], r"did you mean 'model.rope_theta'"),
    "a wrong type": (["model.num_experts=many"], r"model.num_experts: Value 'many'"),
    "what it refuses itself": (["model.top_k=9"], r"model.top_k=9: must be from 1 to model.num_experts=4"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(tiny: Tiny, moe: Path, mistake: str) -> None:
    keys, words = MISTAKES[mistake]
    with pytest.raises(UserError, match=words) as error:
        tiny(f"model.arch={moe}", *keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "it has no class derived from narrowgauge.models.DecoderConfig"),
        ("x = y\n", r"own\.py:1: NameError"),
        (
            MOE + "class Other(MoeConfig): ...\n",
            "MoeConfig and Other are derived from DecoderConfig: one file is one model",
        ),
    ],
)
def test_a_file_that_is_no_model_is_one_line(tiny: Tiny, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(UserError, match=words):
        tiny(f"model.arch={tmp_path / 'own.py'}")
    with pytest.raises(UserError, match=r"model\.arch=lama: llama_tiny is a llama"):
        tiny("model.arch=lama")


def test_a_yaml_of_the_users_names_the_file_and_the_command_line_does_too(
    corpus: Path, moe: Path, tmp_path: Path
) -> None:
    sizes = "hidden_size: 32\nintermediate_size: 64\nnum_layers: 2\nnum_heads: 4\nnum_kv_heads: 2\n"
    (tmp_path / "configs" / "model").mkdir(parents=True)
    yaml = tmp_path / "configs" / "model" / "small.yaml"
    yaml.write_text(f"name: small\narch: {moe}\nnum_experts: 6\n{sizes}")
    chosen = [f"--config-dir={tmp_path / 'configs'}", "model=small", f"data.path={corpus}", "data.tokenizer=bytes"]
    with pytest.raises(UserError, match=r"model\.arch names a file, .*my_moe\.py, which is Python"):
        load_config(chosen)
    config = load_config([*chosen, f"model.arch={moe}", "model.top_k=3"])
    assert (config.model.name, config.model.num_experts, config.model.top_k) == ("small", 6, 3)


def close(one: Path, other: Path, tolerance: float = 2e-6) -> None:
    """Both runs agree up to the order of sums in FP32; counts, and what is made of them, exactly."""
    for first, second in zip(rows_of(one), rows_of(other), strict=True):
        for key in ("loss", "grad_norm", *(key for key in first if key.startswith("aux."))):
            assert first[key] == pytest.approx(second[key], rel=tolerance), key
    before, after = state_of(one), state_of(other)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith("router.bias"):
            assert torch.equal(tensor, after[name])
        elif name.startswith("model."):
            torch.testing.assert_close(tensor, after[name], atol=1e-4, rtol=1e-4)


class Thirds:
    """Six samples in three micro-batches, some of whose targets do not count."""

    num_micro = 3
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(257, (6, 33), generator=generator)
    weights = (torch.rand(6, 32, generator=generator) > 0.3).float()

    def first_sample(self, step: int) -> int:
        return 0

    def batch(self, step: int, micro: int) -> Batch:
        part = slice(2 * micro, 2 * micro + 2)
        return Batch(self.tokens[part], self.weights[part], 2 * micro)


def test_auxiliary_losses_weigh_what_losses_weigh(tiny: Tiny, moe: Path, world: World) -> None:
    """Against one pass over the whole batch, and one formula."""
    config = tiny(f"model.arch={moe}", "model.balance=2", *FP32)
    model_config = resolve_model(config.model, 257, 32)
    precision = config.values.precision
    state = build_state(model_config, precision, config.parallel, config.optim, world, seed=0)
    exact: Any = model_config.build()
    exact.load_state_dict({name: local(tensor).detach() for name, tensor in state.model.state_dict().items()})
    batch = Thirds()
    x_BT, y_BT = batch.tokens[:, :-1], batch.tokens[:, 1:]
    counts = exact(x_BT, counting=True)
    assert [int(count.sum()) for count in counts.values()] == [6 * 32 * 2] * 2
    losses_BT, aux, _ = exact(x_BT, y_BT, counts=counts)

    def mean(values_BT: Tensor) -> Tensor:
        return (values_BT * batch.weights).sum() / batch.weights.sum()

    (mean(losses_BT) + mean(aux["balance"])).backward()
    norm = torch.stack([parameter.grad.norm() for parameter in exact.parameters()]).norm()
    result = update_from(state, batch, world, config.optim, 0, 3)
    assert result.loss == pytest.approx(float(mean(losses_BT.detach())), rel=1e-6)
    assert result.aux == {"balance": pytest.approx(float(mean(aux["balance"].detach())), rel=1e-6)}
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for number, count in enumerate(counts.values()):
        wanted = 0.05 * (count.float().mean() - count.float()).sign()
        assert torch.equal(state.model.layers[number].mlp.router.bias, wanted)


def test_however_the_batch_is_cut(tiny: Tiny, moe: Path, tmp_path: Path) -> None:
    """Losses, balance over the global batch, and biases, also where blocks are computed again in backward."""
    roots = []
    for name, options in {
        "whole": ["train.micro_batch_size=8"],
        "pairs": ["train.micro_batch_size=2"],
        "again": ["train.micro_batch_size=2", "parallel.activation_checkpointing=true"],
    }.items():
        config = tiny(f"model.arch={moe}", *FP32, *options, f"run.dir={tmp_path / name}")
        assert train_here(config) is ExitCode.FINISHED
        roots.append(Path(config.run.dir))
    close(roots[0], roots[1])
    assert compare_runs(roots[1], roots[2]) == []


@pytest.mark.long
def test_by_several_processes(corpus: Path, moe: Path, tmp_path: Path) -> None:
    for processes in (1, 2, 4):
        overrides = tiny_overrides(corpus, tmp_path / str(processes), *FP32, "train.micro_batch_size=1")
        run_many([[*overrides, f"model.arch={moe}"]], processes, tmp_path)
    close(tmp_path / "1", tmp_path / "2")
    close(tmp_path / "1", tmp_path / "4")


def test_decided_on_the_device_as_on_the_host(
    tiny: Tiny, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are read a step later; a step that is not applied, for its loss is not finite, leaves biases alone."""
    start = distributed.start

    def deferred(config: ParallelConfig) -> World:
        return replace(start(config), deferred=True)

    moe.write_text(MOE.replace(
        "        aux = {}\n",
        "        aux = {}\n"
        "        self.passes = getattr(self, 'passes', 0) + self.training\n"
        "        if self.passes == 8:  # of four a step: the last of the second\n"
        "            y_NC = y_NC * float('nan')\n",
    ))  # fmt: skip
    roots = []
    for name in ("host", "device"):
        options = ("optim.clip_norm=0", "train.micro_batch_size=4", "checkpoint.every=1", "checkpoint.keep_last=9")
        config = tiny(f"model.arch={moe}", *FP32, *options, f"run.dir={tmp_path / name}")
        if name == "device":
            monkeypatch.setattr(distributed, "start", deferred)
        assert train_here(config) is ExitCode.FINISHED
        roots.append(Path(config.run.dir))
    assert ["skipped" in row for row in rows_of(roots[0])] == [False, True, False]
    for first, second in zip(rows_of(roots[0]), rows_of(roots[1]), strict=True):
        assert {key: first.get(key) for key in ("loss", "aux.balance")} == {
            key: second.get(key) for key in ("loss", "aux.balance")
        }
    for root in roots:
        states = [read_tensors(path, "model.") for path in list_checkpoints(root / "checkpoints")]
        first, third = (state["model.layers.0.mlp.router.bias"] for state in states)  # the second is not sound
        assert (third - first).abs().max() == pytest.approx(0.05)  # one update
    assert all(torch.equal(tensor, state_of(roots[1])[name]) for name, tensor in state_of(roots[0]).items())


def test_buffers_of_a_model_are_the_models_under_whatever_recipe(tiny: Tiny, moe: Path) -> None:
    """A change of recipe leaves behind what the recipe remembered, and nothing that the model did."""
    options = (f"model.arch={moe}", *QUICK, "checkpoint.every=2", "optim.schedule=constant")
    first = tiny(*options, "precision=fp8_delayed", "train.steps=3")
    assert train_here(first) is ExitCode.FINISHED
    root = Path(first.run.dir)
    before = state_of(root)
    change = ("precision=fp32", "train.steps=4", "resume.recipe_change=allow", "model.bias_rate=0.0")
    with pytest.raises(UserError, match=r"model\.bias_rate=0\.05, not 0\.0"):
        train_here(tiny(*options, *change))
    moe_bias = "model.layers.1.mlp.router.bias"
    assert train_here(tiny(*options, *change[:-1])) is ExitCode.FINISHED
    after = state_of(root)
    assert not any(name.startswith("recipe.") for name in after)
    assert before[moe_bias].abs().min() > 0.01
    torch.testing.assert_close((after[moe_bias] - before[moe_bias]).abs(), torch.full((4,), 0.05), atol=1e-6, rtol=0)


@pytest.mark.parametrize("roll", [pytest.param("step", marks=pytest.mark.long), "micro"])
def test_a_pass_that_counts_leaves_no_trace(tiny: Tiny, moe: Path, tmp_path: Path, roll: str) -> None:
    """Histories of amaxes, rounding noise and the probe are those of a run without it."""
    options = (
        "precision=fp8_delayed",
        f"precision.args.roll={roll}",
        "probe.every=2",
        "train.steps=2",
        "model.num_layers=1",
        "model.balance=0",
        "model.bias_rate=0",
    )
    roots = []
    for name in ("counted", "plain"):
        if name == "plain":
            moe.write_text(MOE.replace("counts_first = True", "counts_first = False"))
        config = tiny(f"model.arch={moe}", *QUICK, *options, f"run.dir={tmp_path / name}")
        assert train_here(config) is ExitCode.FINISHED
        roots.append(Path(config.run.dir))
    assert all(torch.equal(tensor, state_of(roots[1])[name]) for name, tensor in state_of(roots[0]).items())
    for kind in ("train", "probe"):
        found = [
            [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines() if f'"{kind}"' in line]
            for root in roots
        ]
        times = ("time", "tokens_per_second", "aux.balance")
        first, second = ([{k: v for k, v in row.items() if k not in times} for row in rows] for rows in found)
        assert first == second != []


MTP = '''"""Predicts the token after the next, too, by a block of its own (arXiv 2412.19437)."""

from dataclasses import dataclass
import torch
from torch import nn
from narrowgauge.models.layers import Block, Losses, RMSNorm, places_of, token_losses
from narrowgauge.models.llama import Llama, LlamaConfig


@dataclass(kw_only=True)
class MtpConfig(LlamaConfig):
    strength: float = 0.3

    def build(self):
        return Mtp(self)


class Mtp(Llama):
    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        norm = lambda: RMSNorm(width, eps=config.norm_eps)
        self.h_norm, self.next_norm, self.mtp_norm = norm(), norm(), norm()
        self.merge_proj = nn.Linear(2 * width, width, bias=False)
        self.mtp = Block(norm, self.make_attention(0), self.make_mlp(0))

    def forward(self, tokens_BT, targets_BT=None, positions_BT=None, **given):
        x_BTC, rope = self.embed(tokens_BT, positions_BT)
        places = places_of(positions_BT, tokens_BT)
        x_BTC, _ = self.run_blocks(x_BTC, rope, places)
        logits_BTV = self.lm_head(self.norm(x_BTC))
        if targets_BT is None:
            return logits_BTV
        following = torch.cat((self.h_norm(x_BTC), self.next_norm(self.embed_tokens(targets_BT))), -1)
        y_BTC = self.mtp(self.merge_proj(following), rope, places)
        after_BT = targets_BT.roll(-1, 1)
        losses_BT = token_losses(self.lm_head(self.mtp_norm(y_BTC)), after_BT)
        last = torch.arange(losses_BT.shape[1], device=losses_BT.device) < losses_BT.shape[1] - 1
        return Losses(token_losses(logits_BTV, targets_BT), {"mtp": self.config.strength * losses_BT * last}, {})
'''


def test_further_losses_without_counts(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "mtp.py"
    file.write_text(MTP)
    roots = []
    for size in (8, 2):
        options = (f"train.micro_batch_size={size}", "train.steps=3", "precision=fp32", *QUICK[:-1])
        config = tiny(f"model.arch={file}", *options, f"run.dir={tmp_path / str(size)}")
        assert train_here(config) is ExitCode.FINISHED
        roots.append(Path(config.run.dir))
    close(*roots)
    rows = rows_of(roots[0])
    assert rows[-1]["aux.mtp"] < rows[0]["aux.mtp"] < 0.3 * 6
    evaluation = read_metrics(roots[0] / "metrics.jsonl", "eval")[3]
    assert abs(evaluation["loss"] - rows[-1]["loss"]) < 0.3  # without the auxiliary one


def test_a_rule_replaces_the_core_of_attention_and_the_activation(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "parts.py"
    file.write_text(PARTS_OF_BLOCKS)
    losses = []
    for precision in (f"precision.recipe={file}", "precision=bf16"):
        config = tiny(precision, *QUICK[:-1], f"run.dir={tmp_path / precision[-4:]}", "data.document_mask=true")
        assert train_here(config) is ExitCode.FINISHED
        losses.append([row["loss"] for row in rows_of(Path(config.run.dir))])
    assert losses[0][-1] < losses[0][0]
    assert losses[0] != losses[1]
    plan = (tmp_path / "s.py" / "plan.txt").read_text()
    assert "layers.1.self_attn.core                      q, k, v: e4m3/row/fp32\n" in plan
    assert "layers.0.mlp.act" in plan
    assert not list(CausalAttention().parameters())
    assert not list(GatedSiLU().parameters())
