"""What a quantized linear and quantized experts have in common: specs, the plan of a step, amax histories; and the
autograd function by which rows are multiplied with a weight."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .assign import assign_backends
from .backends import REFERENCE
from .context import StepContext
from .module import Observer, QuantizedModule, Site
from .noise import Rows
from .operands import Call
from .packing import AnyOperand, Gathered, pack, unpack
from .scaling import Delayed
from .slots import (
    OUTPUTS,
    SLOTS,
    Backends,
    LinearPlan,
    columns_of,
    gemms,
    is_stochastic,
    operands,
    resolve,
)
from .spec import GEMMS, LinearSpec, Source, Split, Transform, draws

if TYPE_CHECKING:
    from .grouped import Multiplier


class Planned(QuantizedModule):
    """A module with a weight, whose matrix products are computed by the plan of a ``LinearSpec``.

    ``specs`` are its own and those of a schedule; ``use`` picks one for each GEMM. The amax history has the columns of
    all of them, and every column is written at every training step, whether the spec in use reads it or not.

    Buffers, for delayed scaling only: those of ``precision.amax``.

    Raises ValueError for a spec whose delayed operands want histories of different kinds.
    """

    num_experts: int
    """Each with rows, a part of the weight and amaxes of its own; 0 for a linear."""
    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None
    statistics: Callable[[Tensor], Tensor] | None

    def __init__(self, of: Any, path: str, spec: LinearSpec) -> None:
        super().__init__()
        self.num_experts = getattr(of, "num_experts", 0)
        self.in_features, self.out_features = of.in_features, of.out_features
        self.weight, self.bias = of.weight, getattr(of, "bias", None)
        self.path = path
        self.statistics = None
        self.context = StepContext()
        self.observer: Observer | None = None
        self.gathered: Gathered | None = None  # while the weight is one of codes
        self.base_keys: dict[int, Tensor] = {}  # of rounding noise, by slot
        self.drawn: dict[int, tuple[Tensor, Transform]] = {}  # of a step, by GEMM
        self.set_specs((spec,))

    @property
    def owner(self) -> nn.Module:
        """The module of the model, where a part of it multiplies."""
        return self

    def start_amaxes(self) -> None:
        """Have readers of the amax buffers, which are new."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another module."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.start_amaxes()

    @property
    def spec(self) -> LinearSpec:
        """Its own, which holds wherever no schedule says otherwise."""
        return self.specs[0]

    @property
    def active(self) -> LinearSpec:
        """The spec of this step."""
        return self.plan.spec

    @property
    def backends(self) -> Backends:
        """Of the GEMMs of this step."""
        return self.plan.backends

    def set_specs(self, specs: Sequence[LinearSpec], backends: Sequence[Backends] = ()) -> None:
        """Give it these specs, its own first, with the backends of their GEMMs (default: the reference)."""
        self.specs = tuple(specs)
        self.backends_of = tuple(backends) or ((REFERENCE, REFERENCE, REFERENCE),) * len(self.specs)
        self.columns = list(dict.fromkeys(column for spec in specs for column in columns_of(spec).values()))
        kinds = {column.delayed for column in self.columns}
        if len(kinds) > 1:
            raise ValueError(
                f"{self.path}: one linear keeps one kind of amax history, not {', '.join(sorted(map(str, kinds)))}"
            )
        self.delayed: Delayed | None = kinds.pop() if kinds else None
        number = len(self.columns) * (self.num_experts or 1)
        history, held = (None, None) if self.delayed is None else self.delayed.start(number, "meta")
        self.register_buffer("amax_history", history)
        self.register_buffer("amax_held", held)
        self.start_amaxes()
        self._plans: dict[tuple[int, int, int], LinearPlan] = {}
        self.use((0, 0, 0))

    # The protocol of ``precision.module``.

    def bind(self, context: StepContext, site: Site) -> None:
        self.context = context
        phases = []
        for phase in site.phases:
            if phase.module is not None and not isinstance(phase.module, type(self)):
                kind = type(phase.module).__name__
                raise ValueError(f"schedule ({phase.when}): no step can switch {self.path} to a {kind}")
            phases.append((phase.when, phase.gemms, LinearSpec() if phase.module is None else phase.module.spec))
        self._row = assign_backends(self, site, phases)
        for number, phase in enumerate(site.phases, 1):  # what cannot be is said before the first step
            fprop, dgrad, wgrad = (number if gemm in phase.gemms else 0 for gemm in GEMMS)
            try:
                self.plan_of((fprop, dgrad, wgrad))
            except ValueError as error:
                raise ValueError(f"schedule ({phase.when}): {self.path}: {error}") from error

    def plan_rows(self) -> tuple[str]:
        return (self._row,)

    def coverage(self) -> tuple[tuple[str, int, bool], ...] | None:
        if self.spec == LinearSpec():
            return None
        named = zip(GEMMS, gemms(self.spec), strict=True)
        return tuple((name, self.weight.numel(), gemm.a is not None and gemm.b is not None) for name, gemm in named)

    @property
    def goes_by_step(self) -> str:
        random = any(is_stochastic(operand) for spec in self.specs for operand in operands(spec))
        drawn = any(draws(gemm.transform) for spec in self.specs for gemm in gemms(spec))
        return "rounding noise" if random else "a random transform" if drawn else ""

    @property
    def observed(self) -> tuple[str, ...]:
        parts = {
            f"{SLOTS[slot]}.{part.name}": None
            for spec in self.specs
            for slot, operand in enumerate(operands(spec))
            if isinstance(operand, Split) and operand.source is not Source.VALUES
            for part in operand.parts
        }
        return (*SLOTS, *parts, *OUTPUTS)

    def observe(self, observer: Observer | None) -> None:
        self.observer = observer

    def use(self, picks: tuple[int, int, int]) -> None:
        """From now on compute fprop, dgrad and wgrad by these of ``specs``."""
        self.plan = self.plan_of(picks)

    def plan_of(self, picks: tuple[int, int, int]) -> LinearPlan:
        """The plan of these of ``specs``; (0, 0, 0) for its own."""
        if picks not in self._plans:
            fprop, dgrad, wgrad = (self.backends_of[pick][gemm] for gemm, pick in enumerate(picks))
            shape = self.in_features, self.out_features, self.bias is not None
            plan = self._plans[picks] = resolve(self.specs, picks, (fprop, dgrad, wgrad), self.columns, shape)
            self.join(plan)
        return self._plans[picks]

    def join(self, plan: LinearPlan) -> None:
        """It may compute by this plan from now on."""

    def unquantized(self, x: Tensor) -> bool:
        """Whether this pass of x computes plainly."""
        plan, high = self.plan, self.context.high_precision
        plainly = high or (plan.empty and not (self.training and plan.unmeasured))
        # torch multiplies FP16 on a CPU in a scalar loop: the reference does it in float32.
        return plainly and not (x.dtype == torch.float16 and x.device.type == "cpu")

    def require_width(self, x: Tensor) -> None:
        """Raises ValueError unless x is [..., in_features]."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{self.path} takes {self.in_features} features; its input has shape {tuple(x.shape)}")

    def reset_state(self, value: float = 0.0) -> None:
        """Forget every amax. ``value``: what is held instead, 0 for a scale of 1, or ``UNKNOWN``."""
        if self.delayed is not None:
            self.amax_history.zero_()
            self.amax_held.fill_(value)
        self.ask_again()


_reshaped = torch.ops.aten._unsafe_view.default


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class Multiply(torch.autograd.Function):
    """x [..., in_features] to y [..., out_features]. Views are taken inside: outside each would be a node more."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        linear: Multiplier,
        plan: LinearPlan,
        rows_per_sample: int | Rows,
        shared: dict[Hashable, AnyOperand] | None,
        differentiated: bool,
    ) -> Tensor:
        rows = _rows(x)
        stats = linear.statistics(rows) if linear.statistics is not None else None
        observer = linear.observer
        if observer is not None and not (differentiated and linear.training and not plan.empty):
            observer = None  # one that computes plainly is measured from outside
        call = Call(linear, plan, linear.context.first_sample, rows_per_sample, shared, stats, observer)
        y, saved, ctx.figures = call.forward(rows, weight, bias, differentiated, ctx.needs_input_grad[0])
        parts, ctx.layout = unpack(x if saved is rows else saved)
        ctx.save_for_backward(weight, stats, *parts, *((x,) if observer is not None else ()))
        ctx.call, ctx.has_bias, ctx.shape = call.for_backward(), bias is not None, x.shape
        # Not as a view: what a Function returns as one cannot be written to.
        return y if x.dim() == 2 and not y._is_view() else _reshaped(y, [*x.shape[:-1], linear.out_features])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # No decorator: it would enter a mode that holds already, but where gradients are to have a graph.
        return _differentiated_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, stats, *pieces = ctx.saved_tensors
    rows = _rows(dy)
    saved: Any = pack(iter(pieces), ctx.layout)
    if isinstance(saved, Tensor):  # None where the weight has no gradient
        saved = _rows(saved)
    needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    call: Call = ctx.call.with_stats(stats)
    watched = (ctx.figures, _rows(pieces[-1])) if call.observer is not None else None
    dx, dw = call.backward(rows, weight, saved, needed, watched)
    dx = dx if dx is None or len(ctx.shape) == 2 else dx.view(ctx.shape)
    dbias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
    return dx, dw, dbias, None, None, None, None, None


_differentiated_once = once_differentiable(_backward)
