"""Where training stands: the step context that every quantized module of a model shares, set by ``Plan``.

Rounding noise, schedules and histories are functions of the step, so a training pass without one is an error.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class SharedInput:
    """Operands of the newest input: sibling linears (q, k, v; gate, up) read one tensor and share its codes.

    The tensor is known by its object and its version, so that neither another tensor at the same place nor one that was
    written to is taken for it. A layer that quantized its output hands the codes on to those that read it.
    """

    def __init__(self) -> None:
        self._input: Callable[[], Tensor | None] = lambda: None
        self._version = -1
        self._operands: dict[Hashable, Any] = {}

    def operands_of(self, x: Tensor) -> dict[Hashable, Any] | None:
        """The operands of ``x`` by how they were computed, to be added to; None for a tensor that counts no writes."""
        if x.is_inference():
            return None
        if self._input() is not x or self._version != x._version:
            self._input, self._version, self._operands = weakref.ref(x), x._version, {}
        return self._operands

    def hand_on(self, x: Tensor, spec: Hashable, transposed: bool, operand: Any) -> None:
        """Whoever quantizes x, or x.mT, next by this spec, without noise and by its own amaxes, takes this operand."""
        operands = self.operands_of(x)
        if operands is not None:
            operands.setdefault("handed on", []).append((spec, transposed, operand))

    @staticmethod
    def handed_on(operands: Mapping[Hashable, Any], spec: Hashable, transposed: bool) -> Any:
        """What was handed on for this among the operands of x, or None."""
        offers = operands.get("handed on", ())
        return next((q for said, turned, q in offers if turned == transposed and said == spec), None)


@dataclass(eq=False)
class StepContext:
    """Seed, step and place in the data.

    The step and the first sample are tensors on the model's device, where kernels read them, and new ones at every
    ``set``: a forward pass holds those it started with for its backward pass, nothing is compiled anew at every step,
    and no step waits for a copy.

    Args:
        seed: of rounding noise.
        device: of the model; None for the CPU.
        high_precision: whether matrix products run without quantization, as in some evaluations.
        samples: of the micro-batch, where known.
        shared: operands that sibling linears share.
        hands_on: some layer gives linears codes in place of its output: none of them is then traced.
    """

    seed: int = 0
    device: torch.device | None = None
    high_precision: bool = False
    samples: int | None = None
    shared: SharedInput = field(default_factory=SharedInput)
    hands_on: bool = False
    step: Tensor = field(init=False)
    first_sample: Tensor = field(init=False)
    _begun: bool = field(default=False, init=False)  # whether any step ever was
    _trained: tuple[weakref.ref[Tensor], int] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.set(0, 0, None)

    def set(self, step: int, first_sample: int, samples: int | None) -> None:
        # On a GPU a kernel writes them; a tensor built from a number would be a copy that the host waits for.
        self.step, self.first_sample = (
            torch.full((), value, dtype=torch.int64, device=self.device or "cpu") for value in (step, first_sample)
        )
        self.samples = samples

    def begin(self) -> None:
        """The next training pass belongs to the step, and the place in the data, that was set."""
        self._begun, self._trained = True, None

    def require_step(self, model: nn.Module, why: str) -> None:
        """Record a training forward pass of ``model``.

        Raises RuntimeError for the second one without a step, and for one after an optimizer has written to the
        weights since the last.
        """
        weight = next((parameter for parameter in model.parameters() if parameter.requires_grad), None)
        if weight is None:
            return
        if self._trained is not None:
            same, version = self._trained[0]() is weight, self._trained[1]
            if not self._begun or (same and weight._version != version):
                raise RuntimeError(
                    f"a training forward pass {'of a new step ' if self._begun else ''}that no step was begun for: "
                    f"{why} would stand still; call plan.begin_step(step, first_sample) before each step and "
                    "plan.end_step() after it, or give PrecisionCallback(plan) to the Trainer of transformers; in a "
                    "step of several updates, call plan.begin_micro(first_sample) before each further pass"
                )
        self._trained = weakref.ref(weight), weight._version

    def record_update(self, optimizer: Optimizer) -> None:
        """Record a step of an optimizer, which may write to weights and not to their versions, as fused ones do."""
        weight = None if self._trained is None else self._trained[0]()
        if weight is not None and any(one is weight for group in optimizer.param_groups for one in group["params"]):
            self._trained = weakref.ref(weight), -1

    def rows_per_sample(self, x: Tensor, rows: int) -> int:
        """Rows of one sample in an input of ``rows`` rows: the unit of a row's global index.

        Where the number of samples is not known, the first dimension of an input of three or more is taken for it; the
        rows of a plain matrix are then samples.
        """
        samples = self.samples or (x.shape[0] if x.dim() > 2 else rows)
        return rows // samples if samples and rows % samples == 0 else 1


_WATCHED: weakref.WeakSet[StepContext] = weakref.WeakSet()
"""Contexts of models whose training passes belong to steps."""


def require_steps(model: nn.Module, context: StepContext, why: str) -> None:
    """From now on training passes of ``model`` belong to a step of ``context``; ``why``: what depends on the step."""
    _watch_optimizers()
    _WATCHED.add(context)
    model.register_forward_pre_hook(functools.partial(_require_step, context, why))  # which a copy of the model copies


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_record_update)


def _record_update(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        for context in _WATCHED:
            context.record_update(optimizer)


def _require_step(context: StepContext, why: str, model: nn.Module, inputs: Any) -> None:
    """A forward pre-hook of a complete model: training passes belong to a step."""
    if not torch.compiler.is_compiling() and model.training and torch.is_grad_enabled():
        context.require_step(model, why)
