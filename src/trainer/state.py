"""Everything that changes while training; nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..precision.plan import Plan
from .spikes import LEFT_OUT, SpikeWatch

RECIPE_PREFIX = "recipe."
"""Of the names of what the precision recipe remembers."""
POSITION = "data.position"


@dataclass
class TrainState:
    """Model, optimizer, what the recipe remembers, and two counters; of spikes, what a run that looks for them knows.

    Data order, learning rate and noise are functions of (seed, step): they have no state. Only a text stream has a
    position, and only a rollback leaves data out.
    """

    model: Any  # a ``models.Decoder``
    optimizer: Optimizer
    plan: Plan
    num_replicas: int = 1  # copies of every shard (HSDP)
    step: int = 0  # steps done
    nonfinite_in_a_row: int = 0
    position: Tensor | None = None  # of the data, where it is no function of the step; the source updates it
    spikes: SpikeWatch | None = None
    left_out: Tensor | None = None  # int64 scalar: steps of data left out; None, which is none, where it is not saved
    unread: Callable[[], object] | None = None  # reads the numbers of the last step, where nothing has waited for them
    _counters: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def settle(self) -> None:
        """Wait until it is known whether the last step was applied: only then is its update counted, or not."""
        unread, self.unread = self.unread, None
        if unread is not None:
            unread()

    def data_step(self, step: int) -> int:
        """Whose batch, in the order of the data, ``step`` (both from 0) trains on."""
        return step if self.left_out is None else step + int(self.left_out)

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name: the model's, and those of the recipe's hooks."""
        return self.plan.parameters()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, alive: what a checkpoint saves, and loads into in place."""
        self.settle()
        result: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            result[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                result[f"optim.{name}.{key}"] = value
        result |= {f"model.{name}": buffer for name, buffer in self.plan.model_buffers().items()}
        for name, parameter in self.plan.hook_parameters().items():
            for key, value in self.optimizer.state[parameter].items():
                result[f"{RECIPE_PREFIX}{name}.{key}"] = value
        if self.position is not None:
            result[POSITION] = self.position
        if self.spikes is not None:
            result |= self.spikes.tensors()
        if self.left_out is not None:
            result[LEFT_OUT] = self.left_out
        result |= {f"{RECIPE_PREFIX}{name}": value for name, value in self.plan.state_tensors().items()}
        self._counters = {
            "train.step": torch.tensor(self.step),
            "train.nonfinite_in_a_row": torch.tensor(self.nonfinite_in_a_row),
        }
        return result | self._counters

    def read_counters(self) -> None:
        """After a load into ``tensors()``."""
        self.step = int(self._counters["train.step"])
        self.nonfinite_in_a_row = int(self._counters["train.nonfinite_in_a_row"])

    def num_bytes(self) -> dict[str, int]:
        """Of weights, optimizer state and what the recipe remembers, over all processes that share one copy."""
        parts = {"model": "weights", "optim": "optimizer", RECIPE_PREFIX.rstrip("."): "recipe"}
        sizes = dict.fromkeys(parts.values(), 0)
        for name, tensor in self.tensors().items():
            if (part := parts.get(name.partition(".")[0])) is not None:
                sizes[part] += tensor.numel() * tensor.element_size()
        return sizes

    def is_finite(self) -> bool:
        """Whether this rank's part holds no infinity and no NaN."""
        return all(
            bool(local(value).isfinite().all()) for value in self.tensors().values() if value.is_floating_point()
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode, and parameters sharded again afterwards.

    A forward pass without a backward pass leaves FSDP's root gathered: ``named_parameters`` would then give the
    gathered copies, in the compute dtype, instead of the parameters.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        model.train(training)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
