"""The quantized linear: one autograd function (``planned.py``) over six operand slots (``slots.py``).

Forward saves for backward what the plan says of x (``LinearPlan.saved``): as a rule the codes and scales that wgrad
reads, computed in the forward pass. It saves nothing of the weight but the parameter itself, which FSDP gathers anew
and dgrad quantizes. A slot without a spec stays in high precision, and a linear whose spec is empty is ``F.linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import traced
from .amax import Amaxes
from .backends import Quantizer
from .blocks import Experts
from .grouped import QuantGroupedLinear
from .operands import Call
from .packing import AnyOperand, Saving, pack_all, unpack_all
from .planned import Multiply, Planned
from .quantize import Quantized
from .slots import LinearPlan, Saved, W, X, plain
from .spec import LinearSpec, OperandSpec


class QuantLinear(Planned):
    """A linear with quantized operands. Parameters are named and shaped as in ``nn.Linear``.

    ``statistics``, if a module that rewrites linears sets it, computes from x [rows, in_features] what the spec's
    transforms read, in every forward pass: FP32, detached, saved for backward. Else as ``Planned``.
    """

    def __init__(self, linear: nn.Linear | QuantLinear, path: str, spec: LinearSpec) -> None:
        super().__init__(linear, path, spec)
        self.token = traced.register(self)

    def start_amaxes(self) -> None:
        self.amaxes = Amaxes(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.token = traced.register(self)
        for plan in self._plans.values():
            self.join(plan)

    def join(self, plan: LinearPlan) -> None:
        traced.join(self, plan.kind, plan.kind_of_inputs)

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
    def is_plain_linear(self) -> bool:
        return self.plan.empty

    def ask_again(self) -> None:
        self.amaxes.ask_again()

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.spec}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of ``x``.

        Raises ValueError for another number of features, where it quantizes; what ``F.linear`` raises elsewhere.
        """
        if self.unquantized(x):
            return F.linear(x, self.weight, self.bias)
        plan, high = self.plan, self.context.high_precision
        self.require_width(x)
        if torch.compiler.is_compiling() and not high and self._traceable(x):
            inputs = plan.kind_of_inputs if plan.shares_inputs else None
            return traced.linear(x, self.weight, self.bias, self.token, plan.kind, inputs)
        y: Tensor = self._quantized(x, plain(plan.backends) if high else plan)
        return y

    def _traceable(self, x: Tensor) -> bool:
        """Whether what this call computes follows from its tensors, its token and its plan."""
        usual = self.plan.traceable and self.observer is None and self.gathered is None and self.statistics is None
        # An operator is also run to see what it gives: not by all ranks at once, as a collective has to be.
        usual = usual and not (self.plan.all_ranks and self.amaxes.meets_ranks())
        return usual and not self.context.hands_on and not torch.is_autocast_enabled(x.device.type)

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
            y: Tensor = Multiply.apply(x, weight, bias, self, plan, rows_per_sample, shared, differentiated)  # type: ignore[no-untyped-call]
            return y
        # As it treats a plain linear; inside, what is in float32 has its reason.
        dtype = torch.get_autocast_dtype(kind)
        shared = shared if x.dtype == dtype else None
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            y = Multiply.apply(x, weight, bias, self, plan, rows_per_sample, shared, differentiated)  # type: ignore[no-untyped-call]
        return y

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


def quantized(spec: LinearSpec) -> Callable[[nn.Module, str], Planned]:
    """The ``make`` of a rule that gives every linear, and the linears of every expert, this spec."""

    def make(module: nn.Module, path: str) -> Planned:
        if isinstance(module, Experts):
            return QuantGroupedLinear(module, path, spec)
        assert isinstance(module, nn.Linear)
        return QuantLinear(module, path, spec)

    return make


_LAYOUTS: dict[Hashable, Any] = {}
"""How the lists of tensors that operators give are read: by what, for which kind of linear and shape."""
