"""A layer that is no linear and quantizes tensors of its own: what it saves for backward, operands of products that
have no weight, its output for the linears that read it.

A recipe's module subclasses ``Layer``, names each such tensor and says by which spec it is quantized. It gets what a
linear gets: noise by (seed, step, path, tensor, place in the data), amaxes of earlier steps or of all ranks, high
precision and the schedule, a kernel where there is one, lines of plan.txt, rows of the probe.

    class Norm(Layer):
        def __init__(self, norm):
            super().__init__({"saved.x": ROW})
            self.weight = norm.weight

        def forward(self, x):
            return Function.apply(x, self.weight, self.at(x))

where ``Function.forward`` calls ``at.quantized("saved.x", x)`` and ``at.save``, and its backward pass ``at.saved``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .amax import Amaxes
from .backends import REFERENCE, Cast, Choice, Quantizer, choose
from .context import StepContext
from .module import Observer, Picks, QuantizedModule, Site
from .noise import Noise, base_key
from .packing import Saving, pack_all, unpack_all
from .quantize import Quantized
from .scaling import Current, Delayed
from .slots import LinearPlan, plain
from .spec import GemmSpec, OperandSpec, Source
from .suggest import close


class Named(NamedTuple):
    """One of a layer's tensors.

    Args:
        spec: how it is quantized.
        column: of the amax history, or None.
        quantizer: who makes it.
    """

    spec: OperandSpec
    column: int | None
    quantizer: Quantizer


class Layer(QuantizedModule):
    """Base of a recipe's own layers.

    Args:
        specs: how each tensor is quantized, by its name, which is the probe's: as "saved.x".
        handed_on: those that are given to linears in place of the layer's output (``Pass.hand_on``).

    Buffers, for delayed scaling only: those of ``precision.amax``, with a column for each tensor that wants one.

    To ``torch.compile`` its forward pass is one opaque step.

    Raises ValueError for a spec of codes that are read again, for histories of different kinds, and for codes to hand
    on that a linear could not have made: rounded by noise, or scaled by other amaxes than their own.
    """

    plan: LinearPlan
    """Of no GEMM: readers of amaxes ask a linear for what its plan leaves unmeasured."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "forward" in vars(cls):
            cls.forward = torch.compiler.disable(cls.forward)  # type: ignore[no-untyped-call]

    def __init__(self, specs: Mapping[str, OperandSpec], *, handed_on: Sequence[str] = ()) -> None:
        super().__init__()
        self.handed_on = tuple(handed_on)
        for name in self.handed_on:
            if name not in specs:
                raise ValueError(f"handed on: no tensor named {name!r}{close(name, specs)}: {', '.join(specs)}")
            spec = specs[name]
            if spec.stochastic or spec.amax != Current():
                raise ValueError(
                    f"{name} is handed on by {spec}: linears take codes that they would make themselves, without noise "
                    "and scaled by the amaxes of this tensor"
                )
        for name, spec in specs.items():
            if spec.source is not Source.ORIGINAL:
                raise ValueError(f"{name} is quantized from what it is: its source must be ORIGINAL")
        columns = [name for name, spec in specs.items() if isinstance(spec.amax, Delayed)]
        kinds = {spec.amax for spec in specs.values() if isinstance(spec.amax, Delayed)}
        if len(kinds) > 1:
            raise ValueError(f"a layer keeps one kind of amax history, not {', '.join(sorted(map(str, kinds)))}")
        self.named = {
            name: Named(spec, columns.index(name) if name in columns else None, REFERENCE.quantizer)
            for name, spec in specs.items()
        }
        self.delayed = kinds.pop() if kinds else None
        history, held = (None, None) if self.delayed is None else self.delayed.start(len(columns), "meta")
        self.register_buffer("amax_history", history)
        self.register_buffer("amax_held", held)
        self.path = ""
        self.context = StepContext()
        self.observer: Observer | None = None
        self.base_keys: dict[str, Tensor] = {}
        self.plan = plain((REFERENCE, REFERENCE, REFERENCE))
        self.amaxes = Amaxes(self)
        self.is_plain = False  # in this phase of the schedule
        self._high: tuple[bool, ...] = ()  # of phases
        self._choices: dict[str, Choice] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another layer."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.amaxes = Amaxes(self)

    def at(self, x: Tensor) -> Pass:
        """A forward pass of ``x`` [..., width], whose first dimension is samples, and its backward pass.

        To be called in ``forward``, outside of an autograd function.
        """
        return Pass(self, x)

    # The protocol of ``precision.module``.

    def bind(self, context: StepContext, site: Site) -> None:
        for phase in site.phases:
            other = phase.module
            if other is not None and (type(other) is not type(self) or self._specs(other) != self._specs(self)):
                kind = type(other).__name__
                raise ValueError(f"schedule ({phase.when}): no step can switch {site.path} to another {kind}")
        super().bind(context, site)
        context.hands_on |= bool(self.handed_on)
        self.base_keys = {}
        self._high = tuple(phase.module is None for phase in site.phases)
        wanted = "auto" if site.backend == "scaled_mm" else site.backend  # which only multiplies
        for name, one in self.named.items():
            choice = choose(GemmSpec(a=one.spec), (None, 1, 1), site.device, wanted)
            self._choices[name] = choice
            self.named[name] = one._replace(quantizer=choice.backend.quantizer)

    @staticmethod
    def _specs(layer: QuantizedModule) -> dict[str, OperandSpec]:
        return {name: one.spec for name, one in layer.named.items()} if isinstance(layer, Layer) else {}

    def use(self, picks: Picks) -> None:
        """In high precision in phases that put all three GEMMs of linears there."""
        self.is_plain = all(pick > 0 and self._high[pick - 1] for pick in picks)

    def plan_rows(self) -> tuple[str]:
        lines = [f"{self.path:44} {type(self).__name__}"]
        for name, one in self.named.items():
            handed_on = ", for linears of this spec" if name in self.handed_on else ""
            lines.append(f"    {name}: {one.spec}{handed_on}  [{self._choices[name]}]")
        return ("\n".join(lines),)

    @property
    def goes_by_step(self) -> str:
        return "rounding noise" if any(one.spec.stochastic for one in self.named.values()) else ""

    @property
    def reads_weight(self) -> str:
        return f"{type(self).__name__} reads its weight in high precision"

    @property
    def observed(self) -> tuple[str, ...]:
        return tuple(self.named)

    def observe(self, observer: Observer | None) -> None:
        self.observer = observer

    def reset_state(self, value: float = 0.0) -> None:
        if self.delayed is not None:
            self.amax_history.zero_()
            self.amax_held.fill_(value)
        self.ask_again()

    def ask_again(self) -> None:
        self.amaxes.ask_again()


class Pass:
    """A forward pass of a layer and its backward pass, at one place in the data."""

    def __init__(self, layer: Layer, x: Tensor) -> None:
        context = layer.context
        self.layer, self.first_sample = layer, context.first_sample
        self.narrow = not (layer.is_plain or context.high_precision)
        """Whether the layer is to quantize: not in high precision."""
        self._samples = context.samples or (x.shape[0] if x.dim() else 1)
        watched = layer.training and torch.is_grad_enabled()
        self._observer = layer.observer if watched else None
        self._figures: list[Any] = []
        self._backward = False

    def quantized(self, name: str, x: Tensor) -> Quantized:
        """The codes of the tensor of this name, a matrix [rows, width] of x [..., width], rows in the order of samples.

        Noise goes by the global index of a row. In training a delayed spec records the amax.
        """
        layer, rows = self.layer, x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1])
        one = layer.named[name]
        noise = None
        if one.spec.stochastic:
            each = len(rows) // self._samples if self._samples and len(rows) % self._samples == 0 else 1
            noise = Noise.of(
                base=self._base_key(name),
                step=layer.context.step,
                first_sample=self.first_sample,
                rows_of_a_sample=each,
            )
        if one.column is not None:
            amax = layer.amaxes.held(one, rows)
        else:
            amax = layer.amaxes.of_all_ranks(one, rows) if one.spec.amax == Current(step=True) else None
        q = one.quantizer.cast(rows, Cast(spec=one.spec, amax=amax, noise=noise))
        assert isinstance(q, Quantized), "codes, as they were asked for"
        if self._observer is not None:
            figures = self._observer.operand(layer, name, str(one.spec), rows, q)
            if self._backward:
                self._observer.add([figures])
            else:
                self._figures.append(figures)
        return q

    def _base_key(self, name: str) -> Tensor:
        layer = self.layer
        if name not in layer.base_keys:
            device = self.first_sample.device
            layer.base_keys[name] = base_key(layer.context.seed, f"{layer.path}: {name}", 0, device=device)
        return layer.base_keys[name]

    def hand_on(self, y: Tensor, q: Quantized, *, transposed: bool = False) -> None:
        """Linears that read y, the output, next and by the spec of q take these codes of it, and quantize nothing.

        What they compute is the same: q is what ``quantized`` gave of y, or of y.mT if ``transposed``. A linear with
        another spec, or with a transform, quantizes y itself.

        Raises ValueError for codes of another shape.
        """
        shape = (math.prod(y.shape[:-1]), y.shape[-1])
        if q.shape != (shape[::-1] if transposed else shape):
            raise ValueError(f"{self.layer.path}: codes of {list(q.shape)} are not those of y {list(y.shape)}")
        self.layer.context.shared.hand_on(y, q.spec, transposed, q)

    def save(self, ctx: Any, *tensors: Saving | None) -> None:
        """Save tensors and codes for backward, in ``forward`` of an autograd function."""
        flat, ctx.layouts = unpack_all(tensors)
        ctx.save_for_backward(*flat)
        ctx.at = self

    def saved(self, ctx: Any) -> list[Any]:
        """They, in its ``backward``. The observer counts what forward quantized once, also where it is recomputed."""
        self._backward = True
        if self._observer is not None:
            self._observer.add(self._figures)
            self._figures = []
        return pack_all(ctx.saved_tensors, ctx.layouts)
