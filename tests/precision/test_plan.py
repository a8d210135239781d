"""Hooks of a recipe, as a training loop calls them through the plan."""

from __future__ import annotations

import pytest
import torch
from narrowgauge.precision import Plan, Recipe, apply, load
from narrowgauge.precision.integrations.transformers import PrecisionCallback
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments


class Term(nn.Module):
    """Has all that a hook can have."""

    def __init__(self, parameter: Tensor | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0)) if parameter is None else parameter
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)

    def loss_terms(self, model: nn.Module) -> Tensor:
        return 3.0 * self.scale

    def before_update(self, model: nn.Module, gradients: dict[str, Tensor]) -> None:
        gradients["scale"].mul_(2.0)

    def after_update(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        parameters["scale"].clamp_(max=1.0)

    def end_step(self, model: nn.Module, step: int, applied: Tensor, *, loss: Tensor | None) -> None:
        self.seen.copy_(torch.tensor(-1.0) if loss is None else loss)


class Half:
    """No module: gives its tensors by name, and adds to the loss."""

    def __init__(self) -> None:
        self.own = {"half": nn.Parameter(torch.tensor(0.5))}

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.own

    def loss_terms(self, model: nn.Module) -> Tensor:
        return self.own["half"]

    def __str__(self) -> str:
        return "half"


def plan_of(*hooks: object) -> Plan:
    return apply(Recipe(hooks=hooks), nn.Sequential(nn.Linear(2, 2)))


def test_a_loop_gets_what_hooks_have() -> None:
    plan = plan_of(term := Term(), Half())
    assert plan.state_tensors().keys() == {"Term.scale", "Term.seen", "Half.half"}
    assert plan.hook_parameters() == {"Term.scale": term.scale, "Half.half": plan.recipe.hooks[1].own["half"]}
    plan.loss_terms().backward()
    assert term.scale.grad is not None
    plan.before_update({"scale": term.scale.grad})
    assert float(term.scale.grad) == 6.0
    plan.after_update({"scale": term.scale})
    assert float(term.scale.detach()) == 1.0
    assert plan.wants_loss
    plan.end_step(loss=torch.tensor(4.0))
    assert float(plan.state_tensors()["Term.seen"]) == 4.0
    plan.end_step()
    assert float(plan.state_tensors()["Term.seen"]) == -1.0
    text = str(plan)
    assert (
        "every step: Term(); a term of the loss; may change gradients; may change weights; parameter scale []\n" in text
    )
    assert "every step: half; a term of the loss; parameter half []\n" in text


def test_a_plan_without_such_hooks_wants_nothing() -> None:
    for plan in (plan_of(), apply(load("fp8_delayed"), nn.Sequential(nn.Linear(2, 2)))):
        assert not any(map(plan.wants, ("loss_terms", "before_update", "after_update")))
        assert not plan.wants_loss
        assert plan.hook_parameters() == {}


def test_tensors_of_hooks_have_one_owner_and_one_name() -> None:
    with pytest.raises(ValueError, match="several hooks called Term have tensors"):
        plan_of(Term(), Term())
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Term\.scale of a hook is 0\.weight of the model, too"):
        apply(Recipe(hooks=(Term(model[0].weight),)), model)


def test_the_trainer_of_transformers_refuses_what_it_has_no_place_for(tmp_path: object) -> None:
    callback = PrecisionCallback(plan_of(Half()))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"no place for what the recipe's hooks have: loss_terms, Half\.half"):
        callback.on_train_begin(arguments, TrainerState(), TrainerControl())


class PerParameter(nn.Module):
    """A count for every matrix of the model."""

    def prepare(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                self.register_buffer(name.replace(".", "_"), torch.zeros(parameter.shape[0]))


def test_a_hook_has_tensors_by_the_models_own() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3))
    plan = apply(Recipe(hooks=(PerParameter(),)), model, device=torch.device("cpu"))
    ((name, counts),) = plan.state_tensors().items()
    assert name == "PerParameter.0_weight"
    assert torch.equal(counts, torch.zeros(3))
