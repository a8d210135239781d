"""A SwiGLU whose product goes into its down-projection as codes: h = silu(gate) * up is never written.

Where Triton quantizes for all three linears, one autograd function is the MLP. The kernels that quantize h for fprop
and for wgrad of the down-projection compute it and divide it by the scales of Smooth-SwiGLU; those that quantize the
gradients of gate and up compute both in one read. Products, noise and amaxes are those of the linears. The result is
that of ``precision.swiglu`` in plain torch between the linears, bit for bit.

No GPU has run these kernels yet: they keep their place until their gain is measured on one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from ...backends import Operand
from ...backends.interface import knows_transform
from ...backends.triton.amax import tile_amax
from ...backends.triton.both import quantize_both
from ...backends.triton.device import runs_on
from ...backends.triton.fused import gradient_amaxes, quantize_gradients
from ...backends.triton.quantize import quantize_fused
from ...backends.triton.quantizer import Triton
from ...backends.triton.specs import DTYPES
from ...linear import QuantLinear
from ...operands import Call
from ...packing import Saving, pack_all, unpack_all
from ...quantize import Quantized
from ...scaling import TENSOR, Current, Tile
from ...slots import DGRAD_DY, DGRAD_W, WGRAD_DY, WGRAD_X, Backends, Origin, W, X
from ...spec import LinearSpec, OperandSpec, Source, Transform
from ...swiglu import DOWN, PROJECTIONS, Gradients, Hidden, activation_of, replaced_activation, scales_of, swiglu
from ...transforms import Composed, Hadamard, Rescale
from .scales import ChannelScales, TokenScales

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def fuse_swiglu(*, always: bool) -> Callable[[nn.Module, str], nn.Module]:
    """The ``make`` of a rule for the modules whose down-projections ``smooth`` has made; all else stays as it is.

    ``always``: as in ``FusedSwiGLU``.
    """

    def make(mlp: nn.Module, path: str) -> nn.Module:
        linears = [mlp.get_submodule(name) for name in PROJECTIONS]
        if all(isinstance(linear, QuantLinear) for linear in linears) and _is_smoothed(linears[2]):
            FusedSwiGLU(mlp, path, always=always).put_in()
        return mlp

    return make


class FusedSwiGLU:
    """The forward pass of a module that computes down_proj(silu(gate_proj(x)) * up_proj(x)), and its line of plan.txt.

    ``put_in`` sets it in place of the module's own. All else stays the module's: its children, mode, attributes, hooks
    and copies.

    Args:
        mlp: that module.
        path: in the model.
        always: where the kernels do not serve, compute as they do, in plain torch; else as ``mlp`` does.
    """

    def __init__(self, mlp: nn.Module, path: str, *, always: bool) -> None:
        self.mlp, self.path, self.always = mlp, path, always
        self._replaced = "forward" in vars(mlp)
        self._callees = self._called_within()  # hooks among them are the recipe's
        self._reasons: dict[tuple[tuple[LinearSpec, Backends], ...], str | None] = {}

    def put_in(self) -> None:
        """Have the module compute so, if it says that it is such a SwiGLU, and plan.txt say how, or why not.

        Raises ValueError for ``always`` of a module that does not say so.
        """
        reason = self._why_own()
        if reason is None:
            self.mlp.forward = self.forward
        elif self.always:
            raise ValueError(f"{self.path}: {reason}")
        self.mlp.plan_row = self  # type: ignore[assignment]

    def __str__(self) -> str:
        reason = self._why_own() or self._why_no_kernels(planned=True)
        if reason is None:
            way = "triton, fused with the quantization of h, dgate and dup"
        else:
            way = f"{'plain torch, as kernels would' if self.always else 'as the model has it'} (not fused: {reason})"
        return f"{self.path:44} silu(gate) * up: [{way}]"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        own, kernels = (True, False) if kwargs or len(args) != 1 else self._way(args[0])
        y: Tensor
        if own:
            y = type(self.mlp).forward(self.mlp, *args, **kwargs)
        elif kernels:
            y = self._fused(args[0])
        else:
            gate, up, down = self._linears()
            y = down(swiglu(gate(args[0]), up(args[0])))
        return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _way(self, x: Tensor) -> tuple[bool, bool]:
        """Whether to compute as the module itself does, and if not, whether by the kernels."""
        if self._why_own() is not None:
            return True, False
        linears = self._linears()
        planned = self.always or self._why_no_kernels(planned=True) is None
        if linears[0].context.high_precision or not planned:
            return True, False
        watched = any(linear.observer is not None or linear.plan.unmeasured for linear in linears)
        fits = x.dtype in DTYPES and x.numel() > 0 and runs_on(x.device)
        autocast = torch.is_autocast_enabled(x.device.type)
        return False, fits and not watched and not autocast and self._why_no_kernels() is None

    def _why_own(self) -> str | None:
        """Why only the module's own forward pass is right: it does not say what it computes, or was changed since."""
        kind = type(self.mlp).__name__
        if self._replaced:
            return f"the forward pass of this {kind} was replaced"
        activation = activation_of(self.mlp)
        if activation is None:
            return f"the model does not name its activation: no gated_activation of the forward pass of {kind}"
        if activation != "silu":
            return f"its activation is {activation}"
        if (act := replaced_activation(self.mlp)) is not None:
            return f"its act became a {type(act).__name__}"
        children = self.mlp._modules
        for name in PROJECTIONS:
            if not isinstance(linear := children.get(name), QuantLinear):
                return f"{name} became a {type(linear).__name__}"
        if not _is_smoothed(children[DOWN]):
            return f"{DOWN} is no longer smoothed"
        for name, child in children.items():
            if name not in PROJECTIONS and child is not None and _has_hooks(child):
                return f"hooks of its {name} are to be called"
        return None

    def _why_no_kernels(self, *, planned: bool = False) -> str | None:
        """Why the kernels do not serve in this step, or, if ``planned``, wherever no schedule says otherwise."""
        if not planned and (_has_any_global_hook() or self._called_within() != self._callees):  # type: ignore[no-untyped-call]
            return "hooks of its linears are to be called"
        linears = self._linears()
        uses = tuple(
            (linear.spec, linear.backends_of[0]) if planned else (linear.active, linear.backends) for linear in linears
        )
        if uses not in self._reasons:
            self._reasons[uses] = _why_unfit(*uses, biased=any(linear.bias is not None for linear in linears[:2]))
        return self._reasons[uses]

    def _linears(self) -> tuple[QuantLinear, QuantLinear, QuantLinear]:
        gate, up, down = (self.mlp._modules[name] for name in PROJECTIONS)
        assert isinstance(gate, QuantLinear)
        assert isinstance(up, QuantLinear)
        assert isinstance(down, QuantLinear)
        return gate, up, down

    def _called_within(self) -> list[tuple[int, ...]]:
        """What a call of each projection runs: how many hooks, and whether the forward pass of a quantized linear."""
        return [
            (
                getattr(linear.forward, "__func__", None) is QuantLinear.forward,
                *(len(getattr(linear, hooks)) for hooks in _HOOKS),
            )
            for linear in self._linears()
        ]

    # One opaque step to the compiler, as a quantized linear is.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _fused(self, x: Tensor) -> Tensor:
        gate, up, down = linears = self._linears()
        gate.require_width(x)
        rows = x.reshape(-1, gate.in_features)
        shared = gate.context.shared.operands_of(x)
        calls = gate.call(x, shared), up.call(x, shared), down.call(x, None)
        trained = tuple(torch.is_grad_enabled() and linear.weight.requires_grad for linear in linears)
        y: Tensor = _Fused.apply(rows, gate.weight, up.weight, down.weight, down.bias, calls, trained)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], down.out_features)


def _is_smoothed(down: nn.Module | None) -> bool:
    return isinstance(down, QuantLinear) and isinstance(down.statistics, ChannelScales | TokenScales)


def _has_hooks(child: nn.Module) -> bool:
    return any(getattr(module, hooks) for module in child.modules() for hooks in _HOOKS)


def _why_unfit(
    gate: tuple[LinearSpec, Backends],
    up: tuple[LinearSpec, Backends],
    down: tuple[LinearSpec, Backends],
    *,
    biased: bool,
) -> str | None:
    """Why the kernels do not compute what the three linears do by these specs and backends."""
    for name, (_, backends) in zip(PROJECTIONS, (gate, up, down), strict=True):
        for backend in backends:
            if not isinstance(backend.quantizer, Triton):
                return f"{backend.quantizer.name} quantizes for {name}"
    if gate != up:
        return "gate_proj and up_proj are quantized differently"
    if biased:
        return "a bias of gate_proj or up_proj has a gradient in high precision"
    for (spec, _), names in ((gate, ("dgrad.a", "wgrad.a")), (down, ("fprop.a", "wgrad.b"))):
        for name in names:
            gemm = getattr(spec, name[:5])
            operand: OperandSpec | None = getattr(gemm, name[-1])
            if operand is None:
                return f"{name} is in high precision"
            if operand.source is Source.QUANTIZED:
                return f"{name} is made of codes"
            if operand.amax == Current(step=True):
                return f"{name} is scaled by the amax of a step"
            if (transform := _unscaled(gemm.transform)) is not None and not knows_transform(transform):
                return f"no kernel for {gemm.transform}"
    return None


class _Fused(torch.autograd.Function):
    """down(quantized(silu(gate(x)) * up(x) / d)); x [rows, in_features]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_weight: Tensor,
        up_weight: Tensor,
        down_weight: Tensor,
        down_bias: Tensor | None,
        calls: tuple[Call, Call, Call],
        trained: tuple[bool, bool, bool],
    ) -> Tensor:
        """``trained``: which of the weights are to have gradients, if any are taken."""
        outputs: list[Tensor] = []
        saved: list[Saving] = []  # by wgrad of gate, up and down, each if it is trained
        for call, weight, is_trained in zip(calls[:2], (gate_weight, up_weight), trained[:2], strict=True):
            output, operand, _ = call.forward(x, weight, None, is_trained)
            outputs.append(output)
            saved += [] if operand is None else [operand]
        gate, up = outputs
        statistics = calls[2].linear.statistics
        assert isinstance(statistics, ChannelScales | TokenScales)
        d, amax = _scales_and_amax(statistics, gate, up)
        ctx.along = 0 if isinstance(statistics, TokenScales) else 1
        h, down = Hidden(gate, up, d, ctx.along), calls[2].with_stats(d)
        pair = _hidden_both(down, h) if trained[2] else None
        operand = _hidden(down, X, h, amax) if pair is None else pair[0]
        y = down.product(0, operand, down.weight(W, down_weight), dtype=x.dtype, bias=down_bias)
        if trained[2]:
            saved.append(_hidden(down, WGRAD_X, h, amax) if pair is None else pair[1])
        tensors, ctx.layout = unpack_all(saved)
        ctx.save_for_backward(gate_weight, up_weight, down_weight, gate, up, d, *tensors)
        ctx.calls, ctx.trained = [call.for_backward() for call in calls], trained
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate_weight, up_weight, down_weight, gate, up, d, *tensors = ctx.saved_tensors
        operands = iter(pack_all(tensors, ctx.layout))
        gate_x, up_x, h_t = (next(operands) if trained else None for trained in ctx.trained)
        gate_call, up_call, down = ctx.calls[0], ctx.calls[1], ctx.calls[2].with_stats(d)
        needs_x, needs_gate, needs_up, needs_down, needs_bias = ctx.needs_input_grad[:5]
        dx = dgate_weight = dup_weight = ddown_weight = None

        dy_operand: Operand = dy
        dh = None
        if needs_x or needs_gate or needs_up:
            dy_operand = down.operand(DGRAD_DY, dy)
            # Not ``product``, which would rescale dh: that is done where dh is read.
            w_t, by = down.weight(DGRAD_W, down_weight), down.plan.backends[1].product
            dh = by.gemm(dy_operand, w_t, bias=None, dtype=dy.dtype)
        if needs_down:
            ddown_weight = down.product(2, down.dy_for_wgrad(dy, dy_operand), h_t, dtype=down_weight.dtype)
        dbias = dy.sum(0) if needs_bias else None
        if dh is None:
            return None, None, None, ddown_weight, dbias, None, None

        transform = down.plan.slots[DGRAD_DY].transform
        rescales = _unscaled(transform) is not transform
        gradients = Gradients(dh, gate, up, d if rescales else None, ctx.along)
        calls = gate_call, up_call
        rows = _gradients(calls, DGRAD_DY, gradients) if needs_x else None
        if rows is not None:
            dx_gate, dx_up = (
                call.product(1, codes, call.weight(DGRAD_W, weight), dtype=dy.dtype)
                for call, codes, weight in zip(calls, rows, (gate_weight, up_weight), strict=True)
            )
            dx = dx_gate + dx_up
        if needs_gate or needs_up:
            if rows is not None and gate_call.plan.slots[WGRAD_DY].origin is Origin.TRANSPOSED:
                columns = rows[0].t(), rows[1].t()
            else:
                columns = _gradients(calls, WGRAD_DY, gradients, remember=(needs_gate, needs_up))
            if needs_gate:
                dgate_weight = gate_call.product(
                    2, columns[0], gate_call.saved_operand(gate_x), dtype=gate_weight.dtype
                )
            if needs_up:
                dup_weight = up_call.product(2, columns[1], up_call.saved_operand(up_x), dtype=up_weight.dtype)
        return dx, dgate_weight, dup_weight, ddown_weight, dbias, None, None


def _scales_and_amax(statistics: ChannelScales | TokenScales, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor | None]:
    """d, and the amax of h / d where it follows: that of the channels' over their scales, as division keeps order."""
    if isinstance(statistics, TokenScales):
        return scales_of(tile_amax(up, Tile(1, -1)).flatten(), pow2=statistics.pow2), None
    amaxes = tile_amax(Hidden(gate, up), Tile(-1, 1)).flatten()
    d = scales_of(amaxes, pow2=statistics.pow2)
    return d, (amaxes / d).to(up.dtype).float().amax()


def _hidden(call: Call, slot: int, h: Hidden, amax: Tensor | None) -> Quantized:
    """The slot's codes of h; ``amax``: of h, if known. As ``Call.operand`` would have them of h written out."""
    plan = call.plan.slots[slot]
    spec, hadamard = plan.spec, _unscaled(plan.transform)
    assert spec is not None
    assert isinstance(hadamard, Hadamard | None)
    x = h.mT if plan.transposed else h
    noise = call.noise(plan) if plan.stochastic else None
    of_tensor = spec.scale.levels == 2 or (spec.scale.levels == 1 and spec.tile == TENSOR)
    amax = amax if hadamard is None and of_tensor else None
    if plan.column is not None:
        now = tile_amax(x, TENSOR, hadamard).reshape(()) if amax is None else amax
        amax = call.linear.amaxes.held(plan, x.gate, now)
    return quantize_fused(x, spec, amax=amax, noise=noise, transform=hadamard, by_column=plan.quantizer.by_column)


def _hidden_both(call: Call, h: Hidden) -> tuple[Quantized, Quantized] | None:
    """The codes of h for fprop and for wgrad, where one read makes both."""
    fprop, wgrad = call.plan.slots[X], call.plan.slots[WGRAD_X]
    plain = _unscaled(fprop.transform) is None and _unscaled(wgrad.transform) is None
    if fprop.spec is None or fprop.spec != wgrad.spec or not plain or fprop.spec.tile.outer == fprop.spec.tile.inner:
        return None
    return quantize_both(h, fprop.spec, by_column=fprop.quantizer.by_column)  # type: ignore[return-value]


def _gradients(
    calls: tuple[Call, Call], slot: int, gradients: Gradients, *, remember: tuple[bool, bool] = (True, True)
) -> tuple[Quantized, Quantized]:
    """The slot's codes of the gradients of gate and up, by their calls. As ``Call.operand`` would have them.

    ``remember``: whose amaxes go into the history, as a plain linear's do where it reads its gradient.
    """
    plans = calls[0].plan.slots[slot], calls[1].plan.slots[slot]
    plan = plans[0]
    spec, hadamard = plan.spec, plan.transform
    assert spec is not None
    assert isinstance(hadamard, Hadamard | None)
    source = gradients.mT if plan.transposed and not plan.own_rows else gradients
    noises = amaxes = None
    if plan.stochastic:
        noises = calls[0].noise(plans[0]), calls[1].noise(plans[1])
    if plan.column is not None:
        now = [amax.reshape(()) for amax in gradient_amaxes(source, TENSOR, hadamard)]
        first, second = (
            call.linear.amaxes.held(own, gradients.dh, amax) if remembered else amax
            for call, own, amax, remembered in zip(calls, plans, now, remember, strict=True)
        )
        assert first is not None
        assert second is not None
        amaxes = first, second
    dgate, dup = quantize_gradients(
        source, spec, amaxes=amaxes, noises=noises, transform=hadamard, by_column=plan.quantizer.by_column
    )
    return (dgate.t(), dup.t()) if plan.transposed and plan.own_rows else (dgate, dup)


def _unscaled(transform: Transform | None) -> Transform | None:
    """What a transform does after rescaling."""
    if isinstance(transform, Composed) and isinstance(transform.first, Rescale):
        return transform.second
    return None if isinstance(transform, Rescale) else transform
