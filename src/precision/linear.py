"""The quantized linear: one autograd function over six operand slots.

fprop  y  = x  @ w.mT        slots 0 (x) and 1 (w)
dgrad  dx = dy @ w           slots 2 (dy) and 3 (w.mT)
wgrad  dw = dy.mT @ x        slots 4 (dy.mT) and 5 (x.mT)

Forward keeps for backward what wgrad will read of x: codes and scales, made in the forward pass. It keeps nothing of
the weight but the parameter itself, which FSDP gathers anew; dgrad quantizes that. A slot without a spec stays as it
is, and a linear whose spec is empty is ``F.linear``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from precision.backends import REFERENCE, Backend, Choice, Operand, choose
from precision.noise import Noise, base_key, step_key
from precision.quantize import Quantized, dequantize
from precision.scaling import TENSOR, Delayed, Unit
from precision.spec import GEMMS, GemmSpec, LinearSpec, OperandSpec, Rounding, Source, Transform, assembled
from precision.transforms import Composed

X, W, DGRAD_DY, DGRAD_W, WGRAD_DY, WGRAD_X = range(6)
TRANSPOSED = (DGRAD_W, WGRAD_DY, WGRAD_X)
_TENSORS = {X: "x", W: "w", DGRAD_DY: "dy", DGRAD_W: "w", WGRAD_DY: "dy", WGRAD_X: "x"}
UNKNOWN = -1.0
"""A held amax that is not known: this step scales by the tensor's own."""


class Recent:
    """What was last made of one input: sibling linears (q, k, v; gate, up) read the same tensor and share its codes.

    Known by the tensor object and its version, so that neither another tensor at the same place nor one that was
    written to is taken for it.
    """

    def __init__(self) -> None:
        self._seen: Callable[[], Tensor | None] = lambda: None
        self._version = -1
        self._made: dict[Hashable, Operand] = {}

    def of(self, x: Tensor) -> dict[Hashable, Operand] | None:
        """The codes of ``x`` by how they were made, to be added to; None for a tensor that keeps no count of writes."""
        if x.is_inference():
            return None
        if self._seen() is not x or self._version != x._version:
            self._seen, self._version, self._made = weakref.ref(x), x._version, {}
        return self._made


@dataclass(eq=False)
class Clock:
    """Where training stands: shared by every quantized linear of a model, set by ``Plan``.

    Tensors, so that compiled code need not be compiled anew at every step.
    """

    seed: int = 0
    step: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    first_sample: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    high_precision: bool = False
    samples: int | None = None  # of the micro-batch
    recent: Recent = field(default_factory=Recent)

    def set(self, step: int, first_sample: int, samples: int | None) -> None:
        self.step.fill_(step)
        self.first_sample.fill_(first_sample)
        self.samples = samples

    def rows_of_a_sample(self, x: Tensor, rows: int) -> int:
        """How many rows a sample takes in an input of ``rows`` rows: what the global index of a row is counted in.

        Where the number of samples is not known, the first dimension of an input of three or more is taken for it; the
        rows of a plain matrix are then samples.
        """
        samples = self.samples or (x.shape[0] if x.dim() > 2 else rows)
        return rows // samples if samples and rows % samples == 0 else 1


class Column(NamedTuple):
    """One remembered amax: of which tensor, and through which transform it is seen."""

    tensor: str
    transform: str
    delayed: Delayed


def _slots(spec: LinearSpec) -> dict[int, tuple[OperandSpec, GemmSpec]]:
    """The quantized slots with their GEMMs."""
    gemms = (spec.fprop, spec.dgrad, spec.wgrad)
    operands = [(operand, gemm) for gemm in gemms for operand in (gemm.a, gemm.b)]
    return {slot: (operand, gemm) for slot, (operand, gemm) in enumerate(operands) if operand is not None}


def _columns(spec: LinearSpec) -> dict[int, Column]:
    """The remembered amax of every slot with delayed scaling; slots that see the same tensor alike share one."""
    return {
        slot: Column(_TENSORS[slot], str(gemm.transform or ""), operand.amax)
        for slot, (operand, gemm) in _slots(spec).items()
        if isinstance(operand.amax, Delayed)
    }


class Observer(Protocol):
    """Looks on at the GEMMs of a training step, and changes nothing (``precision.probe``)."""

    def measure(
        self,
        module: QuantLinear,
        gemm: int,
        spec: GemmSpec,
        given: tuple[Tensor, Tensor],
        used: tuple[Operand, Operand],
        y: Tensor,
        bias: Tensor | None,
        stats: Tensor | None,
    ) -> Any:
        """What there is to note of GEMM 0, 1 or 2: its operands before and after transform and rounding, its output.

        ``stats``: what its transform reads.
        """

    def add(self, noted: Any) -> None:
        """Count what ``measure`` gave."""


@dataclass(frozen=True, slots=True)
class Mode:
    """What a linear computes at a step: its spec, by whom, and which remembered amaxes it does not measure itself."""

    spec: LinearSpec
    backends: tuple[Backend, Backend, Backend]
    column_of: dict[int, int]  # of slots
    unseen: tuple[tuple[int, int, Transform | None], ...]  # column, a slot that sees its tensor, through what


class Gathered(NamedTuple):
    """How to read a weight that holds the values of its codes, unscaled (``precision.all_gather``).

    ``scales`` and ``tensor_scale`` are those of the whole weight, as in ``Quantized``.
    """

    scales: Tensor
    tensor_scale: Tensor | None


class QuantLinear(nn.Module):
    """A linear with quantized operands. Parameters are named and shaped as in ``nn.Linear``.

    ``specs`` are its own and those of a schedule; ``use`` picks one for each GEMM. What is remembered is what any of
    them wants, and every amax of it is noted at every training step, whether the spec in use quantizes by it or not: a
    GEMM that comes back from high precision finds the history it would have had.
    ``statistics``, if a module that rewrites linears sets it, makes of x [rows, in_features] what the spec's transforms
    read, in every forward pass: FP32, detached, kept for backward.

    Buffers, for delayed scaling only: ``amax_history`` FP32 [length, columns] and ``amax_held`` FP32 [columns], as
    ``precision.scaling.Delayed`` describes them. They are written in training mode alone, never in evaluation, and
    only slot 0 of the history inside a step: activation recompute and micro-batches change nothing.

    Raises ValueError for a spec whose delayed operands want histories of different kinds.
    """

    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None
    amax_history: Tensor
    amax_held: Tensor

    def __init__(self, linear: nn.Linear | QuantLinear, path: str, spec: LinearSpec) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.path = path
        self.statistics: Callable[[Tensor], Tensor] | None = None
        self.clock = Clock()
        self.observer: Observer | None = None
        self.gathered: Gathered | None = None  # while the weight is one of codes
        self._base_keys: dict[int, Tensor] = {}
        self.schedule((spec,))

    @property
    def spec(self) -> LinearSpec:
        """Its own, which holds wherever no schedule says otherwise."""
        return self.specs[0]

    @property
    def active(self) -> LinearSpec:
        """What this step uses."""
        return self.mode.spec

    @property
    def backends(self) -> tuple[Backend, Backend, Backend]:
        """Of the GEMMs of this step."""
        return self.mode.backends

    def schedule(self, specs: Sequence[LinearSpec], backends: Sequence[tuple[Backend, Backend, Backend]] = ()) -> None:
        """Give it these specs, its own first, with the backends of their GEMMs (the reference's if not told)."""
        self.specs = tuple(specs)
        self.backends_of = tuple(backends) or ((REFERENCE, REFERENCE, REFERENCE),) * len(self.specs)
        self.columns = list(dict.fromkeys(column for spec in specs for column in _columns(spec).values()))
        kinds = {column.delayed for column in self.columns}
        if len(kinds) > 1:
            raise ValueError(
                f"{self.path}: one linear keeps one kind of amax history, not {', '.join(sorted(map(str, kinds)))}"
            )
        self.delayed = kinds.pop() if kinds else None
        history, held = (None, None) if self.delayed is None else self.delayed.start(len(self.columns), "meta")
        self.register_buffer("amax_history", history)
        self.register_buffer("amax_held", held)
        self._modes: dict[tuple[int, int, int], Mode] = {}
        self.use((0, 0, 0))

    def use(self, picks: tuple[int, int, int]) -> None:
        """From now on compute fprop, dgrad and wgrad by these of ``specs``."""
        if picks not in self._modes:
            self._modes[picks] = self._mode(picks)
        self.mode = self._modes[picks]

    def _mode(self, picks: tuple[int, int, int]) -> Mode:
        spec = assembled(self.specs, picks)
        columns = _columns(spec)
        seen = set(columns.values())
        unseen: dict[int, tuple[int, Transform | None]] = {}
        for other in self.specs:
            gemms = _slots(other)
            for slot, column in _columns(other).items():
                if column not in seen:
                    unseen.setdefault(self.columns.index(column), (slot, gemms[slot][1].transform))
        return Mode(
            spec=spec,
            backends=tuple(self.backends_of[pick][gemm] for gemm, pick in enumerate(picks)),  # type: ignore[arg-type]
            column_of={slot: self.columns.index(column) for slot, column in columns.items()},
            unseen=tuple((column, slot, transform) for column, (slot, transform) in unseen.items()),
        )

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.spec}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of ``x``."""
        plain = self.clock.high_precision or (self.active == LinearSpec() and not (self.training and self.mode.unseen))
        # torch multiplies FP16 on a CPU in a scalar loop: the reference does it in float32.
        if plain and not (x.dtype == torch.float16 and x.device.type == "cpu"):
            return F.linear(x, self.weight, self.bias)
        y: Tensor = self._quantized(x, LinearSpec() if self.clock.high_precision else self.active)
        return y

    # Quantization is one opaque step to the compiler: what it would fuse it would also round otherwise.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _quantized(self, x: Tensor, spec: LinearSpec) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        rows_of_a_sample = self.clock.rows_of_a_sample(x, len(rows))
        # Inside a Function every input that may have a gradient seems to want one, also where none is being taken.
        differentiated = torch.is_grad_enabled() and self.weight.requires_grad
        made = self.clock.recent.of(x)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        if autocast:  # as it treats a plain linear; inside, what is in float32 has its reason
            dtype = torch.get_autocast_dtype(kind)
            made = made if x.dtype == dtype else None
            rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(kind, enabled=False) if autocast else nullcontext():
            y: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
                rows, weight, bias, self, spec, rows_of_a_sample, made, differentiated
            )
        return y.view(*x.shape[:-1], self.out_features)

    def reset_state(self, value: float = 0.0) -> None:
        """Forget every amax. ``value``: what is held instead, 0 for a scale of 1, or ``UNKNOWN``."""
        if self.delayed is not None:
            self.amax_history.zero_()
            self.amax_held.fill_(value)

    def noise(self, slot: int, first_row: Tensor, *, transposed: bool) -> Noise:
        if slot not in self._base_keys:
            self._base_keys[slot] = base_key(self.clock.seed, self.path, slot, device=self.weight.device)
        key = step_key(self._base_keys[slot], self.clock.step)
        return Noise(key=key, row_offset=first_row, transposed=transposed)

    def transformed(self, gemm: int, transform: Transform, x: Tensor, stats: Tensor | None, *, left: bool) -> Tensor:
        """The operand of GEMM 0, 1 or 2 that is quantized in place of x."""
        if stats is None:
            return self.backends[gemm].transformed(transform, x, left=left)
        if isinstance(transform, Composed):  # what reads no statistics is the backend's
            x = self.transformed(gemm, transform.first, x, stats, left=left)
            return self.transformed(gemm, transform.second, x, None, left=left)
        return transform.left(x, stats) if left else transform.right(x, stats)

    def amax_for(self, slot: int, x: Tensor, now: Tensor | None = None) -> Tensor | None:
        """The amax that scales this slot's tensor: None for its own. Notes the new one (``now``) in training."""
        if slot not in self.mode.column_of:
            return None
        column = self.mode.column_of[slot]
        now = self.backends[slot // 2].amax(x, TENSOR).reshape(()) if now is None else now
        held = self.amax_held[column]
        if self.training:
            # maximum passes a NaN on: the rule then keeps what it held.
            self.amax_history[0, column] = torch.maximum(self.amax_history[0, column], now)
        return torch.where(held == UNKNOWN, now, held)

    def note_unseen(self, stats: Tensor | None, **tensors: Tensor) -> None:
        """Note, in training, the amaxes of x and w, or of dy, that the spec in use does not measure."""
        if not self.training:
            return
        for column, slot, transform in self.mode.unseen:
            if _TENSORS[slot] not in tensors:
                continue
            x = tensors[_TENSORS[slot]]
            if transform is not None:
                x = x.mT if slot in TRANSPOSED else x
                x = transform.left(x, stats) if slot % 2 == 0 else transform.right(x, stats)
            now = self.mode.backends[slot // 2].amax(x.detach(), TENSOR).reshape(())
            self.amax_history[0, column] = torch.maximum(self.amax_history[0, column], now)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        module: QuantLinear,
        spec: LinearSpec,
        rows_of_a_sample: int,
        made: dict[Hashable, Operand] | None,
        differentiated: bool,
    ) -> Tensor:
        stats = module.statistics(x) if module.statistics is not None else None
        # One that computes plainly is measured from outside.
        observer = module.observer if differentiated and module.training and spec != LinearSpec() else None
        call = Call(module, spec, module.clock.first_sample * rows_of_a_sample, made, stats, observer)
        module.note_unseen(stats, x=x, w=weight)
        if differentiated:
            call.make_both(x)
        a = call.operand(X, x, codes=differentiated and keeps_first(spec))
        w = call.weight(W, weight)
        y = call.product(0, a, w, dtype=x.dtype, bias=bias)
        seen: tuple[Tensor, ...] = ()
        if observer is not None:
            # Counted in backward, which runs once also where the forward pass is computed again; it measures by x.
            ctx.noted = observer.measure(module, 0, call.spec.fprop, (x, weight), (a, w), y, bias, stats)
            seen = (x,)
        kept = kept_of(call, x, a) if differentiated else None
        if isinstance(kept, Quantized):
            ctx.save_for_backward(weight, stats, kept.codes, kept.scales, kept.tensor_scale, *seen)
            ctx.kept = kept.shape, kept.spec, kept.transposed
        else:
            ctx.save_for_backward(weight, stats, kept, *seen)
            ctx.kept = None
        ctx.call, ctx.has_bias = call.without_input(), bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, stats, *pieces = ctx.saved_tensors
        call: Call = ctx.call.with_stats(stats)
        spec = call.spec
        dx = dw = dbias = None
        dy_made: Operand = dy
        call.module.note_unseen(stats, dy=dy)
        both = call.both(DGRAD_DY, WGRAD_DY, dy) if all(ctx.needs_input_grad[:2]) else None
        if ctx.needs_input_grad[0]:
            dy_made = both[0] if both is not None else call.operand(DGRAD_DY, dy, codes=_reuses(spec.wgrad.a))
            if _reuses(spec.dgrad.b):
                w_t = call.reused(DGRAD_W, call.weight(W, weight, codes=True))
            else:
                w_t = call.weight(DGRAD_W, weight)
            dx = call.product(1, dy_made, w_t, dtype=dy.dtype)
            if call.observer is not None:
                call.observer.add(
                    call.observer.measure(call.module, 1, spec.dgrad, (dy, weight.mT), (dy_made, w_t), dx, None, stats)
                )
        if ctx.needs_input_grad[1]:
            if ctx.kept is None:
                x_t = call.operand(WGRAD_X, pieces[0].mT)
            else:
                shape, kept_spec, transposed = ctx.kept
                kept = Quantized(
                    codes=pieces[0],
                    scales=pieces[1],
                    tensor_scale=pieces[2],
                    shape=shape,
                    spec=kept_spec,
                    transposed=transposed,
                )
                x_t = kept.t() if transposes(spec.fprop, spec.fprop.a, spec.wgrad, spec.wgrad.b) else kept
            if both is not None:
                dy_t: Operand = both[1]
            elif not isinstance(dy_made, Tensor) and transposes(spec.dgrad, spec.dgrad.a, spec.wgrad, spec.wgrad.a):
                dy_t = dy_made.t()
            elif isinstance(dy_made, Quantized) and _reuses(spec.wgrad.a):
                dy_t = call.reused(WGRAD_DY, dy_made)
            else:
                dy_t = call.operand(WGRAD_DY, dy.mT)
            dw = call.product(2, dy_t, x_t, dtype=weight.dtype)
            if call.observer is not None:
                call.observer.add(ctx.noted)
                given = dy.mT, pieces[-1].mT
                call.observer.add(
                    call.observer.measure(call.module, 2, spec.wgrad, given, (dy_t, x_t), dw, None, stats)
                )
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dw, dbias, None, None, None, None, None


@dataclass(frozen=True, slots=True)
class Call:
    """One forward pass of a linear and its backward pass: they use one spec and one place in the data."""

    module: QuantLinear
    spec: LinearSpec
    first_row: Tensor
    made: dict[Hashable, Operand] | None  # of x, in the forward pass
    stats: Tensor | None  # what transforms read
    observer: Observer | None

    def with_stats(self, stats: Tensor | None) -> Call:
        return replace(self, stats=stats)

    def without_input(self) -> Call:
        """What backward keeps of it: what it reads alone."""
        return replace(self, made=None, stats=None)

    def gemm(self, slot: int) -> GemmSpec:
        return (self.spec.fprop, self.spec.dgrad, self.spec.wgrad)[slot // 2]

    def operand(self, slot: int, x: Tensor, *, codes: bool = False) -> Operand:
        """What the slot's GEMM reads of ``x``, transformed and quantized as the spec says; as ``codes`` if told to."""
        gemm = self.gemm(slot)
        spec = gemm.a if slot % 2 == 0 else gemm.b
        codes = codes or self.observer is not None  # which looks at them
        if self.made is None or spec is None or slot not in (X, WGRAD_X) or is_random(spec):
            return self._operand(slot, x, codes)
        key = self._key(slot, x, gemm, spec)
        if key is None:
            return self._operand(slot, x, codes)
        if (key, codes) not in self.made:
            self.made[key, codes] = self._operand(slot, x, codes)
        return self.made[key, codes]

    def both(self, slot: int, other: int, x: Tensor) -> tuple[Quantized, Quantized] | None:
        """The operands of ``slot`` from x and of ``other`` from x.mT, where the backend makes both in one read."""
        gemms = self.gemm(slot), self.gemm(other)
        spec = gemms[0].a
        alike = spec is not None and spec == (gemms[1].a if other % 2 == 0 else gemms[1].b)
        plain = gemms[0].transform is None and gemms[1].transform is None and self.observer is None
        if spec is None or not alike or not plain or spec.tile.outer == spec.tile.inner or is_random(spec):
            return None
        return self.module.backends[slot // 2].both(x, spec)

    def make_both(self, x: Tensor) -> None:
        """Have the codes of x for fprop and for wgrad ready, if one read makes both."""
        spec = self.spec.fprop.a
        if self.made is None or spec is None or isinstance(spec.amax, Delayed):
            return
        keys = (self._key(X, x, self.spec.fprop, spec), False), (self._key(WGRAD_X, x, self.spec.wgrad, spec), True)
        if keys[0] not in self.made and (pair := self.both(X, WGRAD_X, x)) is not None:
            self.made.update(zip(keys, pair, strict=True))

    def weight(self, slot: int, weight: Tensor, *, codes: bool = False) -> Operand:
        """The slot's operand from the weight: W or DGRAD_W."""
        gathered = self.module.gathered
        if gathered is None:
            return self.operand(slot, weight if slot == W else weight.mT, codes=codes)
        spec = self.spec.fprop.b
        assert spec is not None
        # Values of codes have the codes back when they are rounded without a scale.
        values = OperandSpec(format=spec.format, scale=Unit())
        made = Quantized(
            codes=self.module.backends[slot // 2].quantize(weight, values, amax=None, noise=None).codes,
            scales=gathered.scales,
            tensor_scale=gathered.tensor_scale,
            shape=(weight.shape[0], weight.shape[1]),
            spec=spec,
        )
        return made if slot == W else made.t()

    def _key(self, slot: int, x: Tensor, gemm: GemmSpec, spec: OperandSpec) -> Hashable | None:
        """What the codes of a slot depend on beside x; None where that is not to be had without waiting for a device.

        An amax of earlier steps is part of it, and noted, as it would be in making the codes.
        """
        held = None
        if gemm.transform is not None and self.stats is not None:
            return None
        if isinstance(spec.amax, Delayed):
            if x.device.type != "cpu" or gemm.transform is not None:
                return None
            amax = self.module.amax_for(slot, x)
            held = None if amax is None else float(amax)
        return slot, spec, gemm.transform, self.module.backends[slot // 2].name, held

    def _operand(self, slot: int, x: Tensor, codes: bool) -> Operand:
        gemm = self.gemm(slot)
        spec = gemm.a if slot % 2 == 0 else gemm.b
        backend, left, transform = self.module.backends[slot // 2], slot % 2 == 0, gemm.transform
        # An amax that is noted is that of the transformed tensor; else the backend may do both in one pass.
        apart = spec is None or isinstance(spec.amax, Delayed) or self.stats is not None
        if transform is not None and apart:
            x, transform = self.module.transformed(slot // 2, transform, x, self.stats, left=left), None
        if spec is None:
            return x
        noise = None
        transposed = slot in TRANSPOSED
        square = spec.tile.outer == spec.tile.inner and gemm.transform is None and not is_random(spec)
        if transposed and square:
            x = x.mT  # the same codes, read along the tensor's own rows
        if is_random(spec):
            first_row = torch.zeros_like(self.first_row) if _TENSORS[slot] == "w" else self.first_row
            noise = self.module.noise(slot, first_row, transposed=transposed)
        amax = self.module.amax_for(slot, x)
        made = backend.prepare(x, spec, amax=amax, noise=noise, transform=transform, left=left, codes=codes)
        return made.t() if transposed and square else made

    def reused(self, slot: int, made: Operand, *, codes: bool = False) -> Operand:
        """The slot's operand from what an earlier GEMM made of the transposed tensor."""
        assert isinstance(made, Quantized)
        return self.operand(slot, dequantize(made).mT, codes=codes)

    def product(self, gemm: int, a: Operand, b: Operand, *, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        transform = self.gemm(2 * gemm).transform
        backend = self.module.backends[gemm]
        if transform is None:
            return backend.gemm(a, b, bias=bias, dtype=dtype)
        y = transform.output(backend.gemm(a, b, bias=None, dtype=dtype), self.stats)
        return y if bias is None else y + bias


def kept_of(call: Call, x: Tensor, a: Operand) -> Operand:
    """What backward keeps of x."""
    spec = call.spec
    if spec.wgrad.b is None:
        return x
    if transposes(spec.fprop, spec.fprop.a, spec.wgrad, spec.wgrad.b):
        return a
    if _reuses(spec.wgrad.b):
        return call.reused(WGRAD_X, a, codes=True)
    return call.operand(WGRAD_X, x.mT, codes=True)


def keeps_first(spec: LinearSpec) -> bool:
    """Whether what backward keeps of x comes from the codes that fprop reads."""
    return transposes(spec.fprop, spec.fprop.a, spec.wgrad, spec.wgrad.b) or _reuses(spec.wgrad.b)


def is_random(spec: OperandSpec) -> bool:
    return spec.rounding is Rounding.STOCHASTIC


def _reuses(spec: OperandSpec | None) -> bool:
    return spec is not None and spec.source is Source.QUANTIZED


def transposes(first_gemm: GemmSpec, first: OperandSpec | None, gemm: GemmSpec, spec: OperandSpec | None) -> bool:
    """Whether a slot's codes are those of ``first``, an earlier slot of the same tensor, transposed.

    So it is for tiles that are square, specs that are alike and tensors that no transform has changed; rounded
    stochastically, only if the spec says to reuse: else each slot has noise of its own.
    """
    if first is None or spec is None or first_gemm.transform is not None or gemm.transform is not None:
        return False
    alike = replace(spec, source=Source.ORIGINAL) == first and spec.tile.outer == spec.tile.inner
    return alike and (not is_random(spec) or spec.source is Source.QUANTIZED)


def quantized_once(spec: LinearSpec) -> bool:
    """Whether all that is read of the weight is one quantization of it, which depends on the weight alone."""
    w = spec.fprop.b
    if w is None or is_random(w) or spec.fprop.transform is not None:
        return False
    return _reuses(spec.dgrad.b) or transposes(spec.fprop, w, spec.dgrad, spec.dgrad.b)


Choices = tuple[Choice, Choice, Choice]


@dataclass(frozen=True, slots=True)
class LinearRow:
    """The lines of plan.txt for a linear: one per GEMM, and one more per GEMM that a schedule switches.

    ``phases``: when, which GEMMs, with what.
    """

    path: str
    shape: tuple[int, int]
    spec: LinearSpec
    choices: Choices
    phases: tuple[tuple[str, tuple[str, ...], LinearSpec, Choices], ...] = ()

    def __str__(self) -> str:
        out_features, in_features = self.shape
        lines = [f"{self.path:44} {in_features:>6} -> {out_features:<6}"]
        for name, choice in zip(GEMMS, self.choices, strict=True):
            lines.append(f"    {name}: {_told(getattr(self.spec, name), choice)}")
            for when, gemms, spec, choices in self.phases:
                if name in gemms:
                    lines.append(f"        {when}: {_told(getattr(spec, name), choices[GEMMS.index(name)])}")
        return "\n".join(lines)


def _told(gemm: GemmSpec, choice: Choice) -> str:
    if gemm == GemmSpec():
        return "high precision (torch)"
    note = choice.backend.note(gemm)
    return f"{gemm}  [{choice}{', ' + note if note else ''}]"


def quantized(spec: LinearSpec) -> Callable[[nn.Module, str], QuantLinear]:
    """The ``make`` of a rule that gives every linear this spec."""

    def make(module: nn.Module, path: str) -> QuantLinear:
        assert isinstance(module, nn.Linear)
        return QuantLinear(module, path, spec)

    return make


def assign_backends(
    linear: QuantLinear,
    tokens: int | None,
    device: torch.device,
    wanted: str,
    phases: Sequence[tuple[str, tuple[str, ...], LinearSpec]] = (),
) -> LinearRow:
    """Choose a backend for each GEMM, and give the linear the specs of ``phases`` (when, which GEMMs, what).

    Raises ValueError if ``wanted`` is none or refuses.
    """
    n, k, spec = linear.out_features, linear.in_features, linear.spec
    shapes: tuple[tuple[int | None, int, int], ...] = ((tokens, n, k), (tokens, k, n), (n, k, tokens or -1))

    def chosen(spec: LinearSpec) -> Choices:
        gemms = (spec.fprop, spec.dgrad, spec.wgrad)
        fprop, dgrad, wgrad = (choose(gemm, shape, device, wanted) for gemm, shape in zip(gemms, shapes, strict=True))
        return fprop, dgrad, wgrad

    choices = [chosen(each) for each in (spec, *(phase[2] for phase in phases))]
    backends = [(fprop.backend, dgrad.backend, wgrad.backend) for fprop, dgrad, wgrad in choices]
    linear.schedule((spec, *(phase[2] for phase in phases)), backends)
    told = tuple((*phase, choice) for phase, choice in zip(phases, choices[1:], strict=True))
    return LinearRow(linear.path, (n, k), spec, choices[0], told)
