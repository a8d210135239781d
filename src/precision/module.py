"""The protocol of a module that computes with quantized tensors.

``apply`` binds every ``QuantizedModule`` of a model to the step context that the plan sets. The plan switches it by the
schedule, resets its state and prints its lines; coverage counts its matrix products. ``QuantLinear`` is one. A module
of a recipe's own, which a rule puts in, subclasses it too and defines what differs from the defaults: those are for a
module without state, without matrix products and without a probe.

What a forward pass reads is ``self.context``: seed, step, place in the data, and ``high_precision``, where nothing is
to be quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .backends import REFERENCE, Quantizer
from .packing import Gathered
from .scaling import Delayed
from .spec import OperandSpec

if TYPE_CHECKING:
    from .backends import Operand
    from .context import StepContext

Picks = tuple[int, int, int]
"""For fprop, dgrad and wgrad: 0 for a module's own way, or the number of a phase, from 1."""


class PlanRow(Protocol):
    """One line of ``plan.txt``."""

    def __str__(self) -> str: ...


@dataclass(frozen=True, slots=True)
class ModulePhase:
    """A phase of the schedule at one module.

    Args:
        when: in words.
        gemms: of fprop, dgrad and wgrad, those that the phase switches.
        module: what the phase's recipe makes of the module; None for high precision.
    """

    when: str
    gemms: tuple[str, ...]
    module: QuantizedModule | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a module computes: its path, its device (a model may still be on meta), tokens of a micro-batch, where
    known, the wanted backend, and the phases of the schedule.
    """

    path: str
    device: torch.device
    tokens: int | None = None
    backend: str = "auto"
    phases: tuple[ModulePhase, ...] = ()


class Observer(Protocol):
    """Watches a training step and changes nothing (``precision.probe``).

    What ``operand`` and ``output`` give counts once it is added. A module adds in backward, which runs once also where
    the forward pass is computed again. Both raise KeyError for a row that the module's ``observed`` lacks.
    """

    def operand(self, module: nn.Module, row: str, format: str, given: Tensor, used: Operand) -> Any:
        """Figures of a tensor before and after rounding; ``format``: in words, as in plan.txt."""

    def output(self, module: nn.Module, row: str, a: Tensor, b: Tensor, y: Tensor, bias: Tensor | None) -> Any:
        """Figures of y, against the product a @ b.mT + bias of its operands as they were."""

    def add(self, figures: list[Any]) -> None:
        """Count what ``operand`` and ``output`` gave."""


class QuantizedModule(nn.Module):
    """Base of the modules that a recipe quantizes. All that is here may be overridden."""

    path: str
    context: StepContext
    delayed: Delayed | None = None
    """The rule of its amax histories, if it has them. ``RollAmax`` then moves ``amax_history`` and ``amax_held``."""
    amax_history: Tensor
    amax_held: Tensor
    amax_before: tuple[Tensor, Tensor] | None = None
    """History and held amaxes from before the step, while the step may be undone."""
    gathered: Gathered | None = None
    """While ``weight`` holds the unscaled values of gathered codes: their scales."""

    def bind(self, context: StepContext, site: Site) -> None:
        """Take the step context of the model, and the place in it.

        Raises ValueError where ``use`` cannot do what a phase wants, or the wanted backend refuses.
        """
        self.context, self.path = context, site.path
        if site.phases and type(self).use is QuantizedModule.use:
            raise ValueError(f"schedule ({site.phases[0].when}): no step can switch {site.path}: {type(self).__name__}")

    def use(self, picks: Picks) -> None:
        """From now on compute fprop, dgrad and wgrad as these phases say."""

    def plan_rows(self) -> Sequence[PlanRow]:
        """Its lines of plan.txt, once it is bound."""
        return (f"{self.path:44} {self}",)

    def coverage(self) -> tuple[tuple[str, int, bool], ...] | None:
        """Its matrix products with weights, outside the phases of a schedule: the name, the elements of the weight, and
        whether both operands are quantized. None for a module whose products are all in high precision by no choice of
        its own.
        """
        return ()

    @property
    def goes_by_step(self) -> str:
        """What of it is a function of the step, in words, as "rounding noise"; "" where nothing is."""
        return ""

    @property
    def reads_weight(self) -> OperandSpec | str:
        """The one quantization of ``weight`` that is all it reads, so that a gather over ranks may send the codes; or
        why there is none. A module that says one reads ``gathered`` wherever it reads the weight."""
        return f"{type(self).__name__} does not say how it reads its weight"

    @property
    def sends_weight(self) -> OperandSpec | None:
        """By what ``weight`` is quantized before it is gathered for the next pass; None to gather it as it is."""
        spec = self.reads_weight
        return None if self.context.high_precision or isinstance(spec, str) else spec

    @property
    def weight_quantizer(self) -> Quantizer:
        """Who quantizes a weight that is gathered as codes."""
        return REFERENCE.quantizer

    def weight_amax(self, shard: Tensor, amax: Tensor) -> Tensor:
        """What the scale of a weight is computed from, given the amax of the whole weight; FP32 scalar."""
        return amax

    @property
    def observed(self) -> tuple[str, ...]:
        """The tensors that it lets an observer measure, as "saved.x": the probe's rows of it."""
        return ()

    @property
    def is_plain_linear(self) -> bool:
        """Whether it now computes what ``nn.Linear``, or the plain linears of experts, do: the probe then measures it
        from outside."""
        return False

    def observe(self, observer: Observer | None) -> None:
        """Have ``observer`` look on at training steps; None for nobody."""

    def reset_state(self, value: float = 0.0) -> None:
        """Set its buffers to their start. ``value``: of an amax that is held, ``UNKNOWN`` to measure a step anew."""

    def ask_again(self) -> None:
        """Its buffers may have been written from outside: forget what the host knows of them."""


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantizedModule]]:
    """Those of a model, in order, with their paths."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, QuantizedModule))
