"""A SwiGLU whose product goes into its down-projection as codes: h = silu(gate) * up is never written.

Where Triton quantizes for all three linears, one autograd function is the MLP: h, divided by the scales of
Smooth-SwiGLU, is computed inside the kernels that quantize it for fprop and for wgrad of the down-projection, and the
gradients of gate and up inside those that quantize them, both in one read. All else is the linears' own: the same
calls, noise and amaxes. The result is that of ``precision.swiglu`` in plain torch between the linears, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from torch.nn.modules.module import _has_any_global_hook

from .backends import Backend, Operand
from .backends.interface import knows_transform
from .backends.triton.amax import tile_amax
from .backends.triton.both import quantize_both
from .backends.triton.device import runs_on
from .backends.triton.fused import gradient_amaxes, quantize_gradients
from .backends.triton.quantize import quantize_fused
from .backends.triton.quantizer import Triton
from .backends.triton.specs import DTYPES
from .linear import QuantLinear
from .operands import Call
from .packing import pack, unpack
from .quantize import Quantized
from .scaling import TENSOR, Current, Tile
from .slots import DGRAD_DY, DGRAD_W, WGRAD_DY, WGRAD_X, Origin, W, X
from .spec import LinearSpec, OperandSpec, Source, Transform
from .swiglu import Gradients, Hidden
from .transforms import Composed, Hadamard, Rescale

Backends = tuple[Backend, Backend, Backend]


@dataclass(frozen=True, slots=True)
class Smoothing:
    """What h is divided by: ``scales`` of the amaxes of rows of up (``along`` 0), or of columns of h (1)."""

    along: int
    scales: Callable[[Tensor], Tensor]

    def of(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor | None]:
        """d, and the amax of h / d if it follows: that of the channels' over their scales, as division keeps order."""
        if self.along == 0:
            return self.scales(tile_amax(up, Tile(1, -1)).flatten()), None
        amaxes = tile_amax(Hidden(gate, up), Tile(-1, 1)).flatten()
        d = self.scales(amaxes)
        return d, (amaxes / d).to(up.dtype).float().amax()


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_ANY_MODULE = frozenset(vars(nn.Module())) | {"forward", "plan_row"}


class FusedSwiGLU:
    """The forward pass of a module that computes down_proj(silu(gate_proj(x)) * up_proj(x)).

    ``put_in`` sets it in place of the module's own. All else stays the module's: its children, mode, attributes, hooks
    and copies.

    Args:
        mlp: that module.
        path: in the model.
        smoothing: that of its down-projection.
        always: where the kernels do not serve, compute as they do, in plain torch; else as ``mlp`` does.

    Raises ValueError for ``always`` of a module that is no such SwiGLU.
    """

    def __init__(self, mlp: nn.Module, path: str, smoothing: Smoothing, *, always: bool) -> None:
        self.mlp, self.path, self.smoothing, self.always = mlp, path, smoothing, always
        self._own: Callable[..., Tensor] = mlp.forward
        self._other = why_no_swiglu(mlp)
        self._known = _attributes(mlp)
        self._hooks = self._hooks_of_projections()  # the recipe's
        self._reasons: dict[tuple[tuple[LinearSpec, Backends], ...], str | None] = {}
        if always and self._other is not None:
            raise ValueError(f"{path}: {self._other}")

    def put_in(self) -> None:
        """Have the module compute so, if it is such a SwiGLU, and plan.txt tell how, or why not."""
        self.mlp.plan_row = SwiGLURow(self)  # type: ignore[assignment]
        if self._other is None:
            self.mlp.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        own, kernels = (True, False) if kwargs or len(args) != 1 else self._way(args[0])
        y: Tensor
        if own:
            y = self._own(*args, **kwargs)
        elif kernels:
            y = self._fused(args[0])
        else:
            gate, up, down = self._linears()
            y = down(_swiglu(gate(args[0]), up(args[0])))
        return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _way(self, x: Tensor) -> tuple[bool, bool]:
        """Whether to compute as the module itself does, and if not, whether by the kernels."""
        if self._changed() is not None:
            return True, False
        linears = self._linears()
        planned = self.always or self._why_not(planned=True) is None
        if linears[0].context.high_precision or not planned:
            return True, False
        watched = any(linear.observer is not None or linear.plan.unmeasured for linear in linears)
        fits = x.dtype in DTYPES and x.numel() > 0 and runs_on(x.device)
        autocast = torch.is_autocast_enabled(x.device.type)
        return False, fits and not watched and not autocast and self._why_not() is None

    def why_not(self, *, planned: bool = False) -> str | None:
        """Why the kernels do not serve in this step, or, if ``planned``, wherever no schedule says otherwise."""
        return self._changed() or self._why_not(planned=planned)

    def _why_not(self, *, planned: bool = False) -> str | None:
        """The same of a module that has not changed."""
        if not planned and (_has_any_global_hook() or self._hooks_of_projections() != self._hooks):  # type: ignore[no-untyped-call]
            return "hooks of its linears are to be called"
        key = tuple(
            (linear.spec, linear.backends_of[0]) if planned else (linear.active, linear.backends)
            for linear in self._linears()
        )
        if key not in self._reasons:
            self._reasons[key] = self._reason(*key)
        return self._reasons[key]

    def _linears(self) -> tuple[QuantLinear, QuantLinear, QuantLinear]:
        """Of a module that has not changed."""
        gate, up, down = (self.mlp.get_submodule(name) for name in PROJECTIONS)
        assert isinstance(gate, QuantLinear)
        assert isinstance(up, QuantLinear)
        assert isinstance(down, QuantLinear)
        return gate, up, down

    def _hooks_of_projections(self) -> list[int]:
        modules = [self.mlp._modules.get(name) for name in PROJECTIONS]
        return [len(getattr(module, hooks)) for module in modules if module is not None for hooks in _HOOKS]

    def _changed(self) -> str | None:
        """Why only the module's own forward pass can be right: it is no such SwiGLU, or was changed since."""
        if self._other is not None:
            return self._other
        for name in PROJECTIONS:
            if not isinstance(linear := self.mlp._modules.get(name), QuantLinear):
                return f"{name} became a {type(linear).__name__}"
        down = self.mlp._modules[PROJECTIONS[2]]
        if isinstance(down, QuantLinear) and down.statistics is None:
            return f"{PROJECTIONS[2]} is no longer smoothed"
        if (owned := _owned(self.mlp)) is not None:
            return owned
        now = _attributes(self.mlp)
        for (path, name), value in self._known.items():
            if now.get((path, name), _MISSING) is not value:
                return f"its {'.'.join(filter(None, (path, name)))} was changed"
        return None

    def _reason(
        self, gate: tuple[LinearSpec, Backends], up: tuple[LinearSpec, Backends], down: tuple[LinearSpec, Backends]
    ) -> str | None:
        for name, (_, backends) in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            for backend in backends:
                if not isinstance(backend.quantizer, Triton):
                    return f"{backend.quantizer.name} quantizes for {name}"
        if gate != up:
            return "gate_proj and up_proj are quantized differently"
        if any(linear.bias is not None for linear in self._linears()[:2]):
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
                if (beside := _beside(gemm.transform)) is not None and not knows_transform(beside):
                    return f"no kernel for {gemm.transform}"
        return None

    # One opaque step to the compiler, as a quantized linear is.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _fused(self, x: Tensor) -> Tensor:
        gate, up, down = linears = self._linears()
        gate.require_width(x)
        rows = x.reshape(-1, gate.in_features)
        differentiated = tuple(torch.is_grad_enabled() and linear.weight.requires_grad for linear in linears)
        shared = gate.context.shared.operands_of(x)
        calls = gate.call(x, shared), up.call(x, shared), replace(gate.call(x, None), linear=down, plan=down.plan)
        weights = (gate.weight, up.weight, down.weight)
        y: Tensor = _Fused.apply(rows, *weights, down.bias, calls, self.smoothing, differentiated)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], down.out_features)


@dataclass(frozen=True, slots=True)
class SwiGLURow:
    """The line of plan.txt for a SwiGLU."""

    swiglu: FusedSwiGLU

    @property
    def path(self) -> str:
        return self.swiglu.path

    def __str__(self) -> str:
        reason, always = self.swiglu.why_not(planned=True), self.swiglu.always
        if reason is None:
            told = "[triton, fused with the quantization of h, dgate and dup]"
        else:
            told = f"[{'plain torch, as kernels would' if always else 'as the model has it'} (not fused: {reason})]"
        return f"{self.path:44} silu(gate) * up: {told}"


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
        smoothing: Smoothing,
        differentiated: tuple[bool, bool, bool],
    ) -> Tensor:
        """``differentiated``: which of the weights are to have gradients, if any are taken."""
        outputs: list[Tensor] = []
        kept: list[Operand | None] = []
        for call, weight, trained in zip(calls[:2], (gate_weight, up_weight), differentiated[:2], strict=True):
            if trained:
                call.share_pair(x)
            a = call.operand(X, x, codes=trained and call.plan.saves_fprop_codes)
            outputs.append(call.product(0, a, call.weight(W, weight), dtype=x.dtype))
            kept.append(call.saved(x, a) if trained else None)
        gate, up = outputs
        d, top = smoothing.of(gate, up)
        h, down = Hidden(gate, up, d, smoothing.along), calls[2].with_stats(d)
        pair = _both(down, h) if differentiated[2] else None
        a = _hidden(down, X, h, top) if pair is None else pair[0]
        y = down.product(0, a, down.weight(W, down_weight), dtype=x.dtype, bias=down_bias)
        h_t = None if not differentiated[2] else _hidden(down, WGRAD_X, h, top) if pair is None else pair[1]
        kept.append(h_t)
        tensors, ctx.kept = zip(*map(unpack, kept), strict=True)
        ctx.save_for_backward(
            gate_weight, up_weight, down_weight, gate, up, d, *(part for of in tensors for part in of)
        )
        ctx.calls, ctx.along, ctx.has_bias = (
            [call.for_backward() for call in calls],
            smoothing.along,
            down_bias is not None,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate_weight, up_weight, down_weight, gate, up, d, *rest = ctx.saved_tensors
        parts = iter(rest)
        gate_x, up_x, h_t = (pack(parts, layout) for layout in ctx.kept)
        gate_call, up_call, down = ctx.calls[0], ctx.calls[1], ctx.calls[2].with_stats(d)
        needed = dict(zip(("x", "gate", "up", "down", "bias"), ctx.needs_input_grad[:5], strict=True))
        dx = None
        weights: dict[str, Tensor | None] = {"gate": None, "up": None, "down": None}

        dy_made: Operand = dy
        divides = _rescale(down.plan.slots[DGRAD_DY].transform) is not None  # which is then done where dh is read
        dh = None
        if needed["x"] or needed["gate"] or needed["up"]:
            dy_made = down.operand(DGRAD_DY, dy)
            dh = down.plan.backends[1].product.gemm(
                dy_made, down.weight(DGRAD_W, down_weight), bias=None, dtype=dy.dtype
            )
        if needed["down"]:
            weights["down"] = down.product(2, down.dy_for_wgrad(dy, dy_made), h_t, dtype=down_weight.dtype)
        dbias = dy.sum(0) if ctx.has_bias and needed["bias"] else None
        if dh is None:
            return None, None, None, weights["down"], dbias, None, None, None

        gradients = Gradients(dh, gate, up, d if divides else None, ctx.along)
        calls = gate_call, up_call
        made = _gradients(calls, DGRAD_DY, gradients) if needed["x"] else None
        if made is not None:
            dx_gate, dx_up = (
                call.product(1, codes, call.weight(DGRAD_W, weight), dtype=dy.dtype)
                for call, codes, weight in zip(calls, made, (gate_weight, up_weight), strict=True)
            )
            dx = dx_gate + dx_up
        if needed["gate"] or needed["up"]:
            if made is not None and gate_call.plan.slots[WGRAD_DY].origin is Origin.TRANSPOSED:
                columns = made[0].t(), made[1].t()
            else:
                columns = _gradients(calls, WGRAD_DY, gradients, noted=(needed["gate"], needed["up"]))
            for name, call, codes, x, weight in zip(
                ("gate", "up"), calls, columns, (gate_x, up_x), (gate_weight, up_weight), strict=True
            ):
                if needed[name]:
                    weights[name] = call.product(2, codes, call.saved_operand(x), dtype=weight.dtype)
        return dx, weights["gate"], weights["up"], weights["down"], dbias, None, None, None


def _hidden(call: Call, slot: int, h: Hidden, top: Tensor | None) -> Quantized:
    """The slot's codes of h; ``top``: its amax, if known. As ``Call.operand`` would have them of h written out."""
    plan = call.plan.slots[slot]
    spec = plan.spec
    assert spec is not None
    hadamard = _beside(plan.transform)
    assert isinstance(hadamard, Hadamard | None)
    x = h.mT if plan.transposed else h
    noise = call.noise(plan) if plan.stochastic else None
    of_tensor = spec.scale.levels == 2 or (spec.scale.levels == 1 and spec.tile == TENSOR)
    amax = top if hadamard is None and of_tensor else None
    if plan.column is not None:
        now = tile_amax(x, TENSOR, hadamard).reshape(()) if amax is None else amax
        amax = call.linear.amaxes.held(plan, x.gate, now)
    by_column = plan.quantizer.by_column
    return quantize_fused(x, spec, amax=amax, noise=noise, transform=hadamard, by_column=by_column)


def _both(call: Call, h: Hidden) -> tuple[Quantized, Quantized] | None:
    """The codes of h for fprop and for wgrad, where one read makes both."""
    fprop, wgrad = call.plan.spec.fprop, call.plan.spec.wgrad
    plain = _beside(fprop.transform) is None and _beside(wgrad.transform) is None
    if fprop.a is None or fprop.a != wgrad.b or not plain or fprop.a.tile.outer == fprop.a.tile.inner:
        return None
    return quantize_both(h, fprop.a, by_column=call.plan.slots[X].quantizer.by_column)  # type: ignore[return-value]


def _gradients(
    calls: tuple[Call, Call], slot: int, gradients: Gradients, *, noted: tuple[bool, bool] = (True, True)
) -> tuple[Quantized, Quantized]:
    """The slot's codes of the gradients of gate and up, by their calls. As ``Call.operand`` would have them.

    ``noted``: whose amaxes are remembered, as they are of what a plain linear reads.
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
        tops = gradient_amaxes(source, TENSOR, hadamard)
        held = [
            call.linear.amaxes.held(own, gradients.dh, top.reshape(())) if note else top.reshape(())
            for call, own, top, note in zip(calls, plans, tops, noted, strict=True)
        ]
        assert held[0] is not None
        assert held[1] is not None
        amaxes = held[0], held[1]
    first_made, second_made = quantize_gradients(
        source,
        spec,
        amaxes=amaxes,
        noises=noises,
        transform=hadamard,
        by_column=plan.quantizer.by_column,
    )
    return (first_made.t(), second_made.t()) if plan.transposed and plan.own_rows else (first_made, second_made)


def _rescale(transform: Transform | None) -> Rescale | None:
    """The rescaling in front of a transform, or as such."""
    first = transform.first if isinstance(transform, Composed) else transform
    return first if isinstance(first, Rescale) else None


def _beside(transform: Transform | None) -> Transform | None:
    """What a transform does beside rescaling."""
    if _rescale(transform) is None:
        return transform
    return transform.second if isinstance(transform, Composed) else None


class _Plain(torch.autograd.Function):
    """silu(gate) * up as ``precision.swiglu`` defines it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return Hidden(gate, up).computed()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        return Gradients(dh, *ctx.saved_tensors).computed()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    h: Tensor = _Plain.apply(gate, up)  # type: ignore[no-untyped-call]
    return h


_MISSING = object()


def _others(mlp: nn.Module) -> dict[str, nn.Module]:
    """The module itself and all in it but its projections, by path."""
    return {path: module for path, module in mlp.named_modules() if path.partition(".")[0] not in PROJECTIONS}


def _attributes(mlp: nn.Module) -> dict[tuple[str, str], object]:
    """What the result may depend on beside the projections: other modules, and what they keep, by path and name."""
    found: dict[tuple[str, str], object] = {}
    for path, module in _others(mlp).items():
        found[path, ""] = module
        found |= {(path, name): value for name, value in vars(module).items() if name not in _OF_ANY_MODULE}
    return found


def _owned(mlp: nn.Module) -> str | None:
    """What nobody would see to if the projections alone were computed."""
    for path, module in _others(mlp).items():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                return f"{type(mlp).__name__} has a {'.'.join(filter(None, (path, name)))} of its own"
        if path and any(getattr(module, hooks) for hooks in _HOOKS):
            return f"hooks of its {path} are to be called"
    return None


class _Stub(nn.Module):
    """In place of a projection: gives what it is told, and notes what it is given."""

    def __init__(self, told: Tensor | None) -> None:
        super().__init__()
        self.told = told
        self.given: list[Tensor] = []
        self.copies: list[Tensor] = []  # of then

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x)
        self.copies.append(x.clone())
        return x.clone() if self.told is None else self.told.clone()


def why_no_swiglu(mlp: nn.Module) -> str | None:
    """Why a module with these three projections is not known to put silu(gate) * up between them, and nothing else.

    It must have no parameters or buffers beside theirs, and its forward pass is asked, on the CPU, in both modes,
    twice: gate and up get the very input and the output is the very one of down.
    """
    if "forward" in vars(mlp):
        return f"the forward pass of this {type(mlp).__name__} was replaced"
    if (owned := _owned(mlp)) is not None:
        return owned
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            alike = all(_answers(mlp, training, shape) for training in (True, False) for shape in ((7, 7), (49,)))
    except Exception:  # whatever it needs is not there
        alike = False
    return None if alike else f"{type(mlp).__name__} does not compute down_proj(silu(gate_proj(x)) * up_proj(x))"


def _answers(mlp: nn.Module, training: bool, shape: tuple[int, ...]) -> bool:
    """Whether the forward pass is that of a SwiGLU for gates and ups from 1e-6 to 1e4 and of both signs."""
    sizes = torch.logspace(-6, 4, 24, dtype=torch.float32, device="cpu")
    values = torch.cat([-sizes, torch.zeros(1, device="cpu", dtype=torch.float32), sizes])
    gate, up = (x.reshape(*shape, 49) for x in torch.meshgrid(values, values, indexing="ij"))
    x = torch.ones(*shape, 8, dtype=torch.float32, device="cpu") * 0.5
    stubs = _Stub(gate), _Stub(up), _Stub(None)
    asked = copy.copy(mlp)
    rest = {name: module for name, module in mlp._modules.items() if name not in PROJECTIONS}
    asked._modules = copy.deepcopy(rest) | dict(zip(PROJECTIONS, stubs, strict=True))
    asked.train(training)
    before = dict(vars(asked))
    outputs: list[Tensor] = []
    stubs[2].register_forward_hook(lambda module, inputs, y: outputs.append(y))
    with torch.set_grad_enabled(training):
        y = type(mlp).forward(asked, x)
    of_gate, of_up, of_down = (stub.given for stub in stubs)
    if not len(of_gate) == len(of_up) == len(of_down) == 1:
        return False
    same = of_gate[0] is x and of_up[0] is x and y is outputs[0]
    h = stubs[2].copies[0]
    untouched = bool((x == 0.5).all()) and torch.equal(y, h)
    silent = vars(asked).keys() == before.keys() and all(vars(asked)[name] is before[name] for name in before)
    right = h.shape == gate.shape and torch.allclose(h, silu(gate) * up, rtol=1e-5, atol=1e-20)
    return same and untouched and silent and right
