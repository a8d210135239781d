"""The quantized linears of many experts: each is a linear of its own rows and its own part of the weight, by one spec.

Scales, transforms, sums of parts, derivatives and amax histories are an expert's own, and every expert computes, one
without rows too: all ranks then meet in the same collectives. The device runs one product after another.

Rounding noise of x and dy goes by the place of a row among all that the micro-batch could route (``Routing.ids_R``), so
that it follows a token to whichever expert, rank or micro-batch reads it; that of the weight by expert and row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .amax import Amaxes
from .blocks import Experts
from .context import StepContext
from .module import Observer
from .noise import Rows
from .planned import Multiply, Planned
from .scaling import Delayed
from .slots import LinearPlan, plain
from .spec import LinearSpec, Transform

if TYPE_CHECKING:
    from .linear import QuantLinear

Multiplier: TypeAlias = "QuantLinear | Expert"
"""Who multiplies rows with a weight."""


class Routing(Protocol):
    """Which expert reads which rows of a micro-batch; a model's own type of these fields."""

    @property
    def rows(self) -> list[int]:
        """How many rows every expert has; rows lie in the order of experts."""

    @property
    def ids_R(self) -> Tensor:
        """int64 [rows], the place of every row among all that could be routed: below ``total``, no two alike, ascending
        over samples."""

    @property
    def total(self) -> int:
        """Number of places, a multiple of the number of samples."""


class QuantGroupedLinear(Planned):
    """The linears of many experts with quantized operands. The parameter is named and shaped as in the plain module.

    Every expert has the amax columns of ``Planned``, those of an expert side by side.
    """

    experts: list[Expert]

    def __init__(self, of: Experts | QuantGroupedLinear, path: str, spec: LinearSpec) -> None:
        super().__init__(of, path, spec)

    def start_amaxes(self) -> None:
        self.experts = [Expert(self, number) for number in range(self.num_experts)]

    @property
    def reads_weight(self) -> str:
        return "the weight of experts is quantized part by part, once it is gathered"

    @property
    def is_plain_linear(self) -> bool:
        return self.plan.empty

    def ask_again(self) -> None:
        for expert in self.experts:
            expert.amaxes.ask_again()

    def extra_repr(self) -> str:
        return f"{self.num_experts} x {self.in_features} -> {self.out_features}, {self.spec}"

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """[rows, in_features] -> [rows, out_features], in the dtype of ``x``.

        Raises ValueError for x of another shape, where it quantizes.
        """
        if self.unquantized(x):
            rows = torch.split(x, routing.rows)
            return torch.cat([F.linear(x_e, w) for x_e, w in zip(rows, self.weight.unbind(), strict=True)])
        self.require_width(x)
        if x.dim() != 2 or len(routing.ids_R) != len(x):
            raise ValueError(
                f"{self.path} takes rows with a place each: its input has shape {tuple(x.shape)}, with "
                f"{len(routing.ids_R)} places"
            )
        plan = plain(self.plan.backends) if self.context.high_precision else self.plan
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            y: Tensor = self._quantized(x, self.weight, routing, plan)
            return y
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            y = self._quantized(x.to(dtype), self.weight.to(dtype), routing, plan)
        return y

    # One opaque step to a compiler, which would round otherwise what it fused.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _quantized(self, x: Tensor, weight: Tensor, routing: Routing, plan: LinearPlan) -> Tensor:
        counts = routing.rows
        ids = torch.split(routing.ids_R.to(torch.int64), counts)
        per_sample = self.context.rows_per_sample(x, routing.total)
        differentiated = torch.is_grad_enabled() and self.weight.requires_grad
        # Of experts that read the same rows, as gate and up do.
        shared = self.context.shared.operands_of(x)
        y, first = [], 0
        for expert, x_e, w, ids_e in zip(self.experts, torch.split(x, counts), weight.unbind(), ids, strict=True):
            rows = Rows(ids_e, per_sample, expert.number * self.out_features)
            of_rows = None if shared is None else shared.setdefault(("rows", expert.number, first, len(x_e)), {})
            y.append(Multiply.apply(x_e, w, None, expert, plan, rows, of_rows, differentiated))  # type: ignore[no-untyped-call]
            first += len(x_e)
        return torch.cat(y)


class Expert:
    """An expert, as a linear is read by those who compute operands (``operands.Call``) and amaxes."""

    statistics: ClassVar[None] = None
    gathered: ClassVar[None] = None

    def __init__(self, owner: QuantGroupedLinear, number: int) -> None:
        self.owner, self.number = owner, number
        self._own: dict[str, Any] = {}
        self._of: tuple[Tensor | None, Tensor | None] = (None, None)
        self.amaxes = Amaxes(self)

    @property
    def _buffers(self) -> dict[str, Any]:
        """Its columns of the owner's buffers."""
        owner = self.owner
        both = owner.amax_history, owner.amax_held
        if both[0] is not self._of[0] or both[1] is not self._of[1]:
            size = len(owner.columns)
            first = self.number * size
            views = (None if buffer is None else buffer[..., first : first + size] for buffer in both)
            self._own, self._of = dict(zip(("amax_history", "amax_held"), views, strict=True)), both
        return self._own

    @property
    def amax_history(self) -> Tensor:
        history: Tensor = self._buffers["amax_history"]
        return history

    @property
    def amax_held(self) -> Tensor:
        held: Tensor = self._buffers["amax_held"]
        return held

    @property
    def plan(self) -> LinearPlan:
        return self.owner.plan

    @property
    def context(self) -> StepContext:
        return self.owner.context

    @property
    def observer(self) -> Observer | None:
        return self.owner.observer

    @property
    def training(self) -> bool:
        return self.owner.training

    @property
    def delayed(self) -> Delayed | None:
        return self.owner.delayed

    @property
    def path(self) -> str:
        return self.owner.path

    @property
    def out_features(self) -> int:
        return self.owner.out_features

    @property
    def weight(self) -> Tensor:
        return self.owner.weight

    @property
    def base_keys(self) -> dict[int, Tensor]:
        return self.owner.base_keys

    @property
    def drawn(self) -> dict[int, tuple[Tensor, Transform]]:
        return self.owner.drawn
