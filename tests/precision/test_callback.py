"""Recipes under the Trainer of `transformers`: what the callback tells the plan, and what is saved."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowgauge.precision import apply, load
from narrowgauge.precision.integrations.transformers import PrecisionCallback
from narrowgauge.precision.linear import QuantLinear
from narrowgauge.precision.plan import Plan
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

README = Path(__file__).parents[2] / "README.md"
DATA = [{"input_ids": (row := (torch.arange(16) + start) % 64), "labels": row} for start in range(64)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))


class Heard(PrecisionCallback):
    """Notes, before every step's end, the plan's step and a copy of what it remembers."""

    def __init__(self, plan: Plan, **more: Any) -> None:
        super().__init__(plan, **more)
        self.steps: list[int] = []
        self.samples: list[int] = []
        self.states: list[dict[str, Tensor]] = []

    def _note(self) -> None:
        self.samples.append(int(self._plan.context.first_sample))

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        super().on_step_begin(*arguments, **more)
        self.steps.append(int(self._plan.context.step))
        self._note()

    def on_substep_end(self, *arguments: Any, **more: Any) -> None:
        super().on_substep_end(*arguments, **more)
        self._note()

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        super().on_step_end(*arguments, **more)
        self.states.append({name: tensor.clone() for name, tensor in self._plan.buffers().items()})


def train(
    recipe: str,
    out: Path,
    steps: int = 4,
    resume: Path | None = None,
    told: Path | None = None,
    recipe_args: dict[str, Any] | None = None,
    **more: Any,
) -> tuple[Trainer, Heard]:
    model = llama()
    callback = Heard(apply(load(recipe, recipe_args or {}), model), resume_from=told)
    options = {"learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=4, report_to="none", **options | more
    )
    trainer = Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:8], callbacks=[callback])
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer, callback


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_accumulation_is_refused_where_a_step_has_to_be_one_micro_batch(tmp_path: Path) -> None:
    callback = PrecisionCallback(apply(load("fp8_current", {"amax": "step"}), llama()))
    one, two = (
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, gradient_accumulation_steps=steps) for steps in (1, 2)
    )
    callback.on_train_begin(one, TrainerState(), TrainerControl())
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2 must be 1"):
        callback.on_train_begin(two, TrainerState(), TrainerControl())


def test_delayed_scaling_rolls_and_goes_on(tmp_path: Path) -> None:
    """Accumulation, evaluation on the way, saving, and a resume bit for bit; what is saved is a plain model."""
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer, heard = train("fp8_delayed", tmp_path / "a", **options)
    model = trainer.model
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    assert type(model.lm_head) is nn.Linear
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    assert heard.steps == [0, 1, 2, 3]
    assert heard.samples == list(range(0, 32, 4))
    history = [state["model.layers.0.mlp.up_proj.amax_history"] for state in heard.states]
    assert [int((one.amax(1) > 0).sum()) for one in history] == [1, 2, 3, 4]
    assert all(one[0].tolist() == [0.0] * 3 for one in history)  # evaluation came between and left nothing
    held = [state["model.layers.0.mlp.up_proj.amax_held"] for state in heard.states]
    assert all(torch.equal(one, past.amax(0)) for one, past in zip(held, history, strict=True))

    plain, info = LlamaForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-4", output_loading_info=True)
    assert not any(info.values())
    assert not any(isinstance(module, QuantLinear) for module in plain.modules())
    assert all(torch.equal(*pair) for pair in zip(plain.parameters(), model.parameters(), strict=True))

    again, rest = train("fp8_delayed", tmp_path / "a", resume=tmp_path / "a" / "checkpoint-2", **options)
    assert rest.steps == [2, 3]
    assert same(again.model, model)
    (tmp_path / "a" / "checkpoint-2").rename(tmp_path / "moved")
    moved, _ = train("fp8_delayed", tmp_path / "b", resume=tmp_path / "moved", told=tmp_path / "moved", **options)
    assert same(moved.model, model)
    other = PrecisionCallback(apply(load("fp8_delayed", {"history": 4}), llama()), tmp_path / "moved")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"precision_state.safetensors is of another recipe or model: model.layers.0"):
        other.on_train_begin(arguments, TrainerState(global_step=2), TrainerControl())


def test_without_its_file_a_recipe_measures_anew(tmp_path: Path) -> None:
    plan = apply(load("fp8_delayed", {}), llama())
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    PrecisionCallback(plan).on_train_begin(arguments, TrainerState(global_step=2), TrainerControl())
    assert {float(value.max()) for name, value in plan.state_tensors().items() if name.endswith("held")} == {-1.0}


def test_stochastic_noise_goes_by_the_step(tmp_path: Path) -> None:
    """NVFP4 in BF16 autocast: the loss falls, a resume has the noise it would have had, and steps have their own."""
    trainer, _ = train("nvfp4", tmp_path, bf16=True)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    again, rest = train("nvfp4", tmp_path, resume=tmp_path / "checkpoint-2", bf16=True)
    assert rest.steps == [2, 3]
    assert same(again.model, trainer.model)
    assert not list(tmp_path.glob("*/precision_state.safetensors"))  # it remembers nothing

    model = llama()
    callback = PrecisionCallback(plan := apply(load("nvfp4", {}), model))
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True)
    batch = torch.stack([row["input_ids"] for row in DATA[:4]])
    gradients = []
    for step in (0, 1, 0):
        callback.on_step_begin(arguments, TrainerState(global_step=step, max_steps=9), TrainerControl())
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
        plan.end_step()
    assert torch.equal(gradients[0], gradients[2])
    assert not torch.equal(gradients[0], gradients[1])


def test_a_trainer_that_tells_no_steps_is_stopped(tmp_path: Path) -> None:
    model = llama()
    apply("nvfp4", model)
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=3, use_cpu=True, report_to="none")
    with pytest.raises(RuntimeError, match=r"rounding noise and the schedule would stand still.*PrecisionCallback"):
        Trainer(model, arguments, train_dataset=DATA).train()


def test_samples_are_dealt_to_ranks_in_turn(tmp_path: Path) -> None:
    """Two ranks with batches of 2 number samples as one rank with batches of 4 does."""

    class Of(TrainingArguments):
        world_size = property(lambda self: 2)  # type: ignore[assignment]
        process_index = property(lambda self: rank)  # type: ignore[assignment]

    plan = apply(load("mxfp4", {}), llama())
    first = {}
    for rank in range(2):
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
        arguments = Of(output_dir=str(tmp_path), use_cpu=True, **options)
        callback, told = PrecisionCallback(plan), []
        for step in range(2):
            state = TrainerState(global_step=step)
            callback.on_step_begin(arguments, state, TrainerControl())
            told.append(int(plan.context.first_sample))
            for _ in range(2):
                callback.on_substep_end(arguments, state, TrainerControl())
                told.append(int(plan.context.first_sample))
        first[rank] = told
    assert first == {0: [0, 4, 8, 12, 16, 20], 1: [2, 6, 10, 14, 18, 22]}


def test_gpt2_of_transformers_is_refused_with_its_reason() -> None:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    with pytest.raises(ValueError, match=r"matches no Linear.*8 Conv1D with transposed weights") as caught:
        apply(load("mxfp8", {}), GPT2LMHeadModel(GPT2Config(**shape)))
    assert "\n" not in str(caught.value)


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "Callback" in code]
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(example, space)
    found = [row["loss"] for row in space["trainer"].state.log_history if "loss" in row]
    assert found[-1] < found[0]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes saw under torchrun: the Trainer wraps the model in DDP."""
    out = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(Path(__file__).with_name("callback_ranks.py")), str(out)]
    ran = subprocess.run([*launcher, *script], check=False, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return out


@pytest.mark.parametrize("name", ["shared", "own", "resumed", "noise"])
def test_two_processes_train_one_model(ranks: Path, name: str) -> None:
    for rank in (0, 1):
        seen = json.loads((ranks / f"{rank}.json").read_text())[name]
        assert "failed" not in seen, seen["failed"]
        assert seen["wrapped"]
        assert seen["steps"] == ([2, 3] if name == "resumed" else [0, 1, 2, 3])
        assert seen["samples"] == [4 * micro + 4 * rank for micro in range(8 if name == "resumed" else 0, 16, 2)]
        if rank == 0:  # who logs
            assert name == "resumed" or seen["losses"][-1] < seen["losses"][0] - 0.5
    one, other = (load_file(ranks / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(one[key], other[key]) for key in one if key.startswith("weight."))


def test_two_processes_share_their_amaxes_or_not(ranks: Path) -> None:
    """DDP sends rank 0's buffers to all before a step: what a rank remembers for itself must survive that."""
    name = "model.layers.0.mlp.up_proj.amax_history"
    one, other = (load_file(ranks / f"shared-{rank}.safetensors") for rank in (0, 1))
    histories = [key for key in one if "amax" in key]
    assert len(histories) == 4 * 14 * 2
    assert all(torch.equal(one[key], other[key]) for key in histories)
    assert [int((one[f"{step}.{name}"].amax(1) > 0).sum()) for step in range(4)] == [1, 2, 3, 4]

    one, other = (load_file(ranks / f"own-{rank}.safetensors") for rank in (0, 1))
    for step in range(4):
        mine, theirs = one[f"{step}.{name}"], other[f"{step}.{name}"]
        filled = mine.amax(1) > 0
        assert int(filled.sum()) == step + 1
        assert bool((mine != theirs)[filled].any(1).all())  # in every step that either remembers


def test_two_processes_resume_with_amaxes_of_their_own(ranks: Path) -> None:
    for rank in (0, 1):
        whole, rest = (load_file(ranks / f"{run}-{rank}.safetensors") for run in ("own", "resumed"))
        assert all(torch.equal(rest[key], whole[key]) for key in rest if key.startswith("weight."))
        assert all(torch.equal(rest[f"1.{key[2:]}"], whole[key]) for key in whole if key.startswith("3."))


def test_two_processes_have_noise_of_their_own(ranks: Path) -> None:
    first, second = (load_file(ranks / f"gradients-{rank}.safetensors") for rank in (0, 1))
    for mine in (first, second):
        assert torch.equal(mine["0"], mine["2"])
        assert not torch.equal(mine["0"], mine["1"])
    assert not torch.equal(first["0"], second["0"])
