"""The quantized linear: one autograd function over six operand slots (``slots.py``).

Forward saves for backward what the plan says of x (``LinearPlan.saved``): as a rule the codes and scales that wgrad
reads, computed in the forward pass. It saves nothing of the weight but the parameter itself, which FSDP gathers anew
and dgrad quantizes. A slot without a spec stays in high precision, and a linear whose spec is empty is ``F.linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import traced
from .amax import Amaxes
from .assign import assign_backends
from .backends import REFERENCE, Quantizer
from .context import StepContext
from .module import Observer, QuantizedModule, Site
from .operands import Call
from .packing import AnyOperand, Gathered, Saving, pack, pack_all, unpack, unpack_all
from .quantize import Quantized
from .scaling import Delayed
from .slots import (
    OUTPUTS,
    SLOTS,
    Backends,
    LinearPlan,
    Saved,
    W,
    X,
    columns_of,
    gemms,
    is_stochastic,
    operands,
    plain,
    resolve,
)
from .spec import GEMMS, LinearSpec, OperandSpec, Source, Split, Transform, draws


class QuantLinear(QuantizedModule):
    """A linear with quantized operands. Parameters are named and shaped as in ``nn.Linear``.

    ``specs`` are its own and those of a schedule; ``use`` picks one for each GEMM. The amax history has the columns of
    all of them, and every column is written at every training step, whether the spec in use reads it or not.
    ``statistics``, if a module that rewrites linears sets it, computes from x [rows, in_features] what the spec's
    transforms read, in every forward pass: FP32, detached, saved for backward.

    Buffers, for delayed scaling only: those of ``precision.amax``.

    Raises ValueError for a spec whose delayed operands want histories of different kinds.
    """

    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear | QuantLinear, path: str, spec: LinearSpec) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.path = path
        self.statistics: Callable[[Tensor], Tensor] | None = None
        self.context = StepContext()
        self.observer: Observer | None = None
        self.gathered: Gathered | None = None  # while the weight is one of codes
        self.base_keys: dict[int, Tensor] = {}  # of rounding noise, by slot
        self.drawn: dict[int, tuple[Tensor, Transform]] = {}  # of a step, by GEMM
        self.token = traced.register(self)
        self.set_specs((spec,))

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
        history, held = (None, None) if self.delayed is None else self.delayed.start(len(self.columns), "meta")
        self.register_buffer("amax_history", history)
        self.register_buffer("amax_held", held)
        self.amaxes = Amaxes(self)
        self._plans: dict[tuple[int, int, int], LinearPlan] = {}
        self.use((0, 0, 0))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another linear."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.token = traced.register(self)
        self.amaxes = Amaxes(self)
        for plan in self._plans.values():
            traced.join(self, plan.kind, plan.kind_of_inputs)

    # The protocol of ``precision.module``.

    def bind(self, context: StepContext, site: Site) -> None:
        self.context = context
        phases = []
        for phase in site.phases:
            if phase.module is not None and not isinstance(phase.module, QuantLinear):
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
    def reads_weight(self) -> OperandSpec | str:
        spec = self.plan_of((0, 0, 0)).weight_once
        for other in self.specs[1:]:
            # Histories want every step's amax of the weight itself, and phases in high precision alone are watched for.
            if not isinstance(spec, str) and (self.delayed is not None or other != LinearSpec()):
                return "under its schedule, weights cannot be gathered as codes"
        return spec

    @property
    def sends_weight(self) -> OperandSpec | None:
        if self.context.high_precision or self.observer is not None:
            return None
        spec = self.plan.weight_once
        return None if isinstance(spec, str) else spec

    @property
    def weight_quantizer(self) -> Quantizer:
        return self.backends[0].quantizer

    def weight_amax(self, shard: Tensor, amax: Tensor) -> Tensor:
        held = self.amaxes.held(self.plan.slots[W], shard, now=amax)
        return amax if held is None else held

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

    @property
    def is_plain_linear(self) -> bool:
        return self.plan.empty

    def observe(self, observer: Observer | None) -> None:
        self.observer = observer

    def ask_again(self) -> None:
        self.amaxes.ask_again()

    def use(self, picks: tuple[int, int, int]) -> None:
        """From now on compute fprop, dgrad and wgrad by these of ``specs``."""
        self.plan = self.plan_of(picks)

    def plan_of(self, picks: tuple[int, int, int]) -> LinearPlan:
        """The plan of these of ``specs``; (0, 0, 0) for its own."""
        if picks not in self._plans:
            fprop, dgrad, wgrad = (self.backends_of[pick][gemm] for gemm, pick in enumerate(picks))
            shape = self.in_features, self.out_features, self.bias is not None
            plan = self._plans[picks] = resolve(self.specs, picks, (fprop, dgrad, wgrad), self.columns, shape)
            traced.join(self, plan.kind, plan.kind_of_inputs)
        return self._plans[picks]

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.spec}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of ``x``.

        Raises ValueError for another number of features, where it quantizes; what ``F.linear`` raises elsewhere.
        """
        plan, high = self.plan, self.context.high_precision
        unquantized = high or (plan.empty and not (self.training and plan.unmeasured))
        # torch multiplies FP16 on a CPU in a scalar loop: the reference does it in float32.
        if unquantized and not (x.dtype == torch.float16 and x.device.type == "cpu"):
            return F.linear(x, self.weight, self.bias)
        self.require_width(x)
        if torch.compiler.is_compiling() and not high and self._traceable(x):
            inputs = plan.kind_of_inputs if plan.shares_inputs else None
            return traced.linear(x, self.weight, self.bias, self.token, plan.kind, inputs)
        y: Tensor = self._quantized(x, plain(plan.backends) if high else plan)
        return y

    def require_width(self, x: Tensor) -> None:
        """Raises ValueError unless x is [..., in_features]."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{self.path} takes {self.in_features} features; its input has shape {tuple(x.shape)}")

    def _traceable(self, x: Tensor) -> bool:
        """Whether what this call computes follows from its tensors, its token and its plan."""
        usual = self.plan.traceable and self.observer is None and self.gathered is None and self.statistics is None
        # An operator is also run to see what it gives: not by all ranks at once, as a collective has to be.
        usual = usual and not (self.plan.all_ranks and self.amaxes.meets_ranks())
        return usual and not torch.is_autocast_enabled(x.device.type)

    # Where it is not traced (``precision.traced``) it is one opaque step: what a compiler would fuse it would round
    # otherwise.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _quantized(self, x: Tensor, plan: LinearPlan) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        rows_per_sample = self.context.rows_per_sample(x, x.numel() // self.in_features)
        # Inside a Function every input that may have a gradient seems to want one, also where none is being taken.
        differentiated = torch.is_grad_enabled() and weight.requires_grad
        shared = self.context.shared.operands_of(x)
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            y: Tensor = _Linear.apply(x, weight, bias, self, plan, rows_per_sample, shared, differentiated)  # type: ignore[no-untyped-call]
            return y
        # As it treats a plain linear; inside, what is in float32 has its reason.
        dtype = torch.get_autocast_dtype(kind)
        shared = shared if x.dtype == dtype else None
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            y = _Linear.apply(x, weight, bias, self, plan, rows_per_sample, shared, differentiated)  # type: ignore[no-untyped-call]
        return y

    def reset_state(self, value: float = 0.0) -> None:
        """Forget every amax. ``value``: what is held instead, 0 for a scale of 1, or ``UNKNOWN``."""
        if self.delayed is not None:
            self.amax_history.zero_()
            self.amax_held.fill_(value)
        self.amaxes.ask_again()

    # What ``precision.traced`` calls. Lists of tensors are flat; how they are read is known by shape (``_LAYOUTS``).

    def computes_by(self, kind: int, device: torch.device) -> bool:
        """Whether this kind is what it computes by now, on such a device."""
        held = self.amax_held
        there = self.weight.device.type == device.type and not (held is not None and held.is_meta)
        return there and kind in (self.plan.kind, self.plan.kind_of_inputs)

    def traced_inputs(self, x: Tensor, differentiated: bool) -> list[Tensor]:
        """Operands of x [..., in_features] that depend on nothing but x and the kind."""
        rows = x.reshape(-1, self.in_features)
        call = self.call(x, {})
        if differentiated:
            call.share_pair(rows)
        a = call.operand(X, rows, codes=differentiated and self.plan.saves_fprop_codes)
        if differentiated:
            call.saved(rows, a)
        assert call.shared is not None
        tensors, layouts = unpack_all(list(call.shared.values()))
        _LAYOUTS["shared", self.plan.kind_of_inputs, tuple(x.shape), differentiated] = tuple(call.shared), layouts
        return tensors

    def traced_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, given: list[Tensor], differentiated: bool
    ) -> tuple[list[Tensor], tuple[int, ...] | None]:
        """[y, what is saved for backward], and which of ``given`` are saved instead; if neither, x itself is."""
        rows, shared = x.reshape(-1, self.in_features), {}
        if given:
            keys, layouts = _LAYOUTS["shared", self.plan.kind_of_inputs, tuple(x.shape), differentiated]
            shared = dict(zip(keys, pack_all(given, layouts), strict=True))
        y, saved, _ = self.call(x, shared).forward(rows, weight, bias, differentiated)
        outputs = [y.view(*x.shape[:-1], self.out_features)]
        if not isinstance(saved, Quantized):
            return outputs, None
        tensors, _LAYOUTS["saved", self.plan.kind, tuple(x.shape[:-1])] = unpack_all([saved])
        places = {id(tensor): place for place, tensor in enumerate(given)}
        which = tuple(places[id(tensor)] for tensor in tensors if id(tensor) in places)
        if which:
            assert len(which) == len(tensors), "what is saved is computed in one place"
            return outputs, which
        return [*outputs, *tensors], None

    def traced_backward(
        self, dy: Tensor, weight: Tensor, pieces: list[Tensor], needed: tuple[bool, bool, bool]
    ) -> list[Tensor | None]:
        """dx, dw and dbias [..., features], those that are needed."""
        rows = dy.reshape(-1, self.out_features)
        saved: Saving = pieces[0] if pieces else rows
        if needed[1] and self.plan.saved is Saved.INPUT:
            saved = pieces[0].reshape(-1, self.in_features)
        elif needed[1]:
            (saved,) = pack_all(pieces, _LAYOUTS["saved", self.plan.kind, tuple(dy.shape[:-1])])
        dx, dw = self.call(dy, None).backward(rows, weight, saved, needed[:2], None)
        dx = None if dx is None else dx.view(*dy.shape[:-1], self.in_features)
        return [dx, dw, rows.sum(0) if needed[2] else None]

    def call(self, x: Tensor, shared: dict[Hashable, AnyOperand] | None, stats: Tensor | None = None) -> Call:
        """A pass by the plan in use. ``x``: the input or the gradient of the output, with the dimensions they share."""
        rows, context = x.numel() // x.shape[-1] if x.shape[-1] else 0, self.context
        return Call(self, self.plan, context.first_sample, context.rows_per_sample(x, rows), shared, stats)


def quantized(spec: LinearSpec) -> Callable[[nn.Module, str], QuantLinear]:
    """The ``make`` of a rule that gives every linear this spec."""

    def make(module: nn.Module, path: str) -> QuantLinear:
        assert isinstance(module, nn.Linear)
        return QuantLinear(module, path, spec)

    return make


_LAYOUTS: dict[Hashable, Any] = {}
"""How the lists of tensors that operators give are read: by what, for which kind of linear and shape."""

_reshaped = torch.ops.aten._unsafe_view.default


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class _Linear(torch.autograd.Function):
    """x [..., in_features] to y [..., out_features]. Views are taken inside: outside each would be a node more."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        linear: QuantLinear,
        plan: LinearPlan,
        rows_per_sample: int,
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
