"""The quantized linear: one autograd function over six operand slots.

fprop  y  = x  @ w.mT        slots 0 (x) and 1 (w)
dgrad  dx = dy @ w           slots 2 (dy) and 3 (w.mT)
wgrad  dw = dy.mT @ x        slots 4 (dy.mT) and 5 (x.mT)

Forward keeps for backward what wgrad will read of x: codes and scales, made in the forward pass. It keeps nothing of
the weight but the parameter itself, which FSDP gathers anew; dgrad quantizes that. A slot without a spec stays as it
is, and a linear whose spec is empty is ``F.linear``.
"""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import traced
from .backends import REFERENCE, Backend, Choice, Operand, choose
from .module import PlanRow, QuantizedModule, Site
from .noise import Noise, base_key
from .quantize import Prepared, Quantized, dequantize
from .scaling import TENSOR, Current, Delayed, Tile, TwoLevel, Unit
from .spec import GEMMS, GemmSpec, LinearSpec, OperandSpec, Rounding, Source, Transform, assembled
from .transforms import Composed, Hadamard

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

    Tensors on the model's device, where kernels read them, new ones at every ``set``: what has taken them keeps its
    place in the data, nothing is compiled anew at every step, and no step waits for a copy.
    """

    seed: int = 0
    device: torch.device | None = None  # the CPU, if not told
    high_precision: bool = False
    samples: int | None = None  # of the micro-batch
    recent: Recent = field(default_factory=Recent)
    begun: bool = field(default=False, init=False)  # ever, by whoever trains
    _trained: tuple[weakref.ref[Tensor], int] | None = field(default=None, init=False)
    step: Tensor = field(init=False)
    first_sample: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.set(0, 0, None)

    def set(self, step: int, first_sample: int, samples: int | None) -> None:
        # On a GPU a kernel writes them; a tensor made of a number would be a copy that the host waits for.
        self.step, self.first_sample = (
            torch.full((), value, dtype=torch.int64, device=self.device or "cpu") for value in (step, first_sample)
        )
        self.samples = samples

    def begin(self) -> None:
        """What comes now is of the step, and the place in the data, that was set."""
        self.begun, self._trained = True, None

    def require_step(self, model: nn.Module, why: str) -> None:
        """Note a training forward pass of ``model``.

        Raises RuntimeError for the second one without a step, and for one after an optimizer has written to the
        weights since the last.
        """
        weight = next((parameter for parameter in model.parameters() if parameter.requires_grad), None)
        if weight is None:
            return
        if self._trained is not None:
            same, version = self._trained[0]() is weight, self._trained[1]
            if not self.begun or (same and weight._version != version):
                raise RuntimeError(
                    f"a training forward pass {'of a new step ' if self.begun else ''}that no step was begun for: "
                    f"{why} would stand still; call plan.begin_step(step, first_sample) before each step and "
                    "plan.end_step() after it, or give PrecisionCallback(plan) to the Trainer of transformers; in a "
                    "step of several updates, call plan.begin_micro(first_sample) before each further pass"
                )
        self._trained = weakref.ref(weight), weight._version

    def note_update(self, optimizer: Optimizer) -> None:
        """That of an optimizer, which may write to weights without a trace in their versions, as fused ones do."""
        weight = None if self._trained is None else self._trained[0]()
        if weight is not None and any(one is weight for group in optimizer.param_groups for one in group["params"]):
            self._trained = weakref.ref(weight), -1

    def rows_of_a_sample(self, x: Tensor, rows: int) -> int:
        """How many rows a sample takes in an input of ``rows`` rows: what the global index of a row is counted in.

        Where the number of samples is not known, the first dimension of an input of three or more is taken for it; the
        rows of a plain matrix are then samples.
        """
        samples = self.samples or (x.shape[0] if x.dim() > 2 else rows)
        return rows // samples if samples and rows % samples == 0 else 1


_WATCHED: weakref.WeakSet[Clock] = weakref.WeakSet()
"""The clocks of models whose training passes belong to steps."""


def require_steps(model: nn.Module, clock: Clock, why: str) -> None:
    """From now on training passes of ``model`` belong to a step of ``clock``; ``why``: what goes by the step."""
    _watch_optimizers()
    _WATCHED.add(clock)
    model.register_forward_pre_hook(RequireStep(clock, why))


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_note_update)


def _note_update(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        for clock in _WATCHED:
            clock.note_update(optimizer)


@dataclass(frozen=True, slots=True, eq=False)
class RequireStep:
    """A forward pre-hook of a whole model: training passes belong to a step. ``why``: what goes by the step."""

    clock: Clock
    why: str

    def __call__(self, model: nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling() and model.training and torch.is_grad_enabled():
            self.clock.require_step(model, self.why)


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


class Slot(NamedTuple):
    """One of the six operands of a linear, as a spec has it."""

    gemm: GemmSpec
    spec: OperandSpec | None
    left: bool  # of its product
    transposed: bool  # made of the transpose of what the linear reads
    random: bool
    delayed: bool
    of_step: bool  # scaled by the amax of all ranks
    square: bool  # the codes of a transpose are the transposed codes
    key: int  # equal where equal tensors are made into equal codes, but for amaxes and statistics


class Resolved(NamedTuple):
    """What a spec comes to with its backends."""

    slots: tuple[Slot, ...]
    x_transposes: bool  # wgrad reads the codes of x that fprop reads, transposed
    dy_transposes: bool  # and those of dy that dgrad reads
    keeps_first: bool  # what backward keeps of x comes from the codes that fprop reads


@dataclass(frozen=True, slots=True)
class Mode:
    """What a linear computes at a step: its spec, by whom, and which remembered amaxes it does not measure itself."""

    spec: LinearSpec
    backends: tuple[Backend, Backend, Backend]
    resolved: Resolved
    column_of: dict[int, int]  # of slots
    unseen: tuple[tuple[int, int, Transform | None], ...]  # column, a slot that sees its tensor, through what
    kind: int  # equal where linears differ in what they remember and in noise alone
    kind_of_inputs: int  # equal where the same is made of one x
    empty: bool  # nothing is quantized
    of_step: bool  # some scale is made of all ranks' tensors
    shares: bool  # all that is made of x is the same for every linear of this kind that reads it


_KEYS: dict[Hashable, int] = {}
"""What is interned: comparing numbers is all that a step does of it."""


def _number(key: Hashable) -> int:
    return _KEYS.setdefault(key, len(_KEYS))


def _stable(*parts: object) -> int:
    """A number that means the same in every process: compiled graphs hold it, and are found on disk by what they hold.

    ``parts`` are told apart by their representation; one with an address in it is found by nobody.
    """
    digest = hashlib.sha256(repr((_sources(), *parts)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


@functools.cache
def _sources() -> str:
    """What an operator gives follows from this code, too."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _resolved(spec: LinearSpec, backends: Sequence[Backend]) -> Resolved:
    slots = []
    for number in range(6):
        gemm = (spec.fprop, spec.dgrad, spec.wgrad)[number // 2]
        operand = gemm.a if number % 2 == 0 else gemm.b
        random = operand is not None and is_random(operand)
        tile = operand.tile if operand is not None else TENSOR
        slots.append(
            Slot(
                gemm=gemm,
                spec=operand,
                left=number % 2 == 0,
                transposed=number in TRANSPOSED,
                random=random,
                delayed=operand is not None and isinstance(operand.amax, Delayed),
                of_step=operand is not None and operand.amax == Current(step=True),
                square=tile.outer == tile.inner and gemm.transform is None and not random,
                key=_number((number, operand, gemm.transform, backends[number // 2].name)),
            )
        )
    return Resolved(
        slots=tuple(slots),
        x_transposes=transposes(spec.fprop, spec.fprop.a, spec.wgrad, spec.wgrad.b),
        dy_transposes=transposes(spec.dgrad, spec.dgrad.a, spec.wgrad, spec.wgrad.a),
        keeps_first=keeps_first(spec),
    )


class Gathered(NamedTuple):
    """How to read a weight that holds the values of its codes, unscaled (``precision.comm``).

    ``scales`` and ``tensor_scale`` are those of the whole weight, as in ``Quantized``.
    """

    scales: Tensor
    tensor_scale: Tensor | None


class QuantLinear(QuantizedModule):
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
        self.token = traced.register(self)
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
        self.ask_again()
        self.use((0, 0, 0))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another linear."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.token = traced.register(self)
        self.ask_again()
        for mode in self._modes.values():
            traced.join(self, mode.kind, mode.kind_of_inputs)

    # The protocol of ``precision.module``.

    def bind(self, context: Clock, site: Site) -> None:
        self.clock = context
        phases = []
        for phase in site.phases:
            if phase.module is not None and not isinstance(phase.module, QuantLinear):
                kind = type(phase.module).__name__
                raise ValueError(f"schedule ({phase.when}): no step can switch {self.path} to a {kind}")
            phases.append((phase.when, phase.gemms, LinearSpec() if phase.module is None else phase.module.spec))
        self._row = assign_backends(self, site.tokens, site.device, site.backend, phases)

    def plan_rows(self) -> tuple[PlanRow]:
        return (self._row,)

    def coverage(self) -> tuple[tuple[str, int, bool], ...] | None:
        if self.spec == LinearSpec():
            return None
        gemms = zip(GEMMS, (self.spec.fprop, self.spec.dgrad, self.spec.wgrad), strict=True)
        return tuple((name, self.weight.numel(), gemm.a is not None and gemm.b is not None) for name, gemm in gemms)

    @property
    def goes_by_step(self) -> str:
        operands = (operand for spec in self.specs for operand, _ in _slots(spec).values())
        return "rounding noise" if any(map(is_random, operands)) else ""

    @property
    def reads_weight(self) -> OperandSpec | None:
        return self.spec.fprop.b if quantized_once(self.spec) else None

    def observe(self, observer: Observer | None) -> None:
        self.observer = observer

    def use(self, picks: tuple[int, int, int]) -> None:
        """From now on compute fprop, dgrad and wgrad by these of ``specs``."""
        if picks not in self._modes:
            self._modes[picks] = self._mode(picks)
            traced.join(self, self._modes[picks].kind, self._modes[picks].kind_of_inputs)
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
        backends = tuple(self.backends_of[pick][gemm] for gemm, pick in enumerate(picks))
        resolved = _resolved(spec, backends)
        slots = resolved.slots
        unseen_columns = tuple((column, slot, transform) for column, (slot, transform) in unseen.items())
        by = [backend.identity for backend in backends]
        shape = self.in_features, self.out_features, self.bias is not None
        inputs = [(slot, slots[slot].spec, slots[slot].gemm.transform, by[slot // 2][0]) for slot in (X, WGRAD_X)]
        return Mode(
            spec=spec,
            backends=backends,  # type: ignore[arg-type]
            resolved=resolved,
            column_of={slot: self.columns.index(column) for slot, column in columns.items()},
            unseen=unseen_columns,
            kind=_stable(spec, by, unseen_columns, shape),
            kind_of_inputs=_stable("inputs", inputs, resolved[1:], self.in_features),
            empty=all(slot.spec is None for slot in slots),
            of_step=any(slot.of_step for slot in slots),
            shares=slots[X].spec is not None
            and not unseen_columns
            and not any(slots[slot].random or slots[slot].delayed for slot in (X, WGRAD_X)),
        )

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.spec}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of ``x``.

        Raises ValueError for another number of features, where it quantizes; what ``F.linear`` raises elsewhere.
        """
        high = self.clock.high_precision
        plain = high or (self.mode.empty and not (self.training and self.mode.unseen))
        # torch multiplies FP16 on a CPU in a scalar loop: the reference does it in float32.
        if plain and not (x.dtype == torch.float16 and x.device.type == "cpu"):
            return F.linear(x, self.weight, self.bias)
        self.require_width(x)
        if torch.compiler.is_compiling() and not high and self._traceable(x):
            mode = self.mode
            inputs = mode.kind_of_inputs if mode.shares else None
            return traced.linear(x, self.weight, self.bias, self.token, mode.kind, inputs)
        y: Tensor = self._quantized(x, LinearSpec() if high else self.active)
        return y

    def require_width(self, x: Tensor) -> None:
        """Raises ValueError unless x is [..., in_features]."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{self.path} takes {self.in_features} features; its input has shape {tuple(x.shape)}")

    def _traceable(self, x: Tensor) -> bool:
        """Whether what this call computes follows from its tensors, its token and its mode."""
        usual = self.observer is None and self.gathered is None and self.statistics is None
        # An operator is also run to see what it gives: not by all ranks at once, as a collective has to be.
        usual = usual and not (self.mode.of_step and self._meets_ranks())
        return usual and not torch.is_autocast_enabled(x.device.type)

    # Where it is not traced (``precision.traced``) it is one opaque step: what a compiler would fuse it would round
    # otherwise.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _quantized(self, x: Tensor, spec: LinearSpec) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        rows_of_a_sample = self.clock.rows_of_a_sample(x, x.numel() // self.in_features)
        # Inside a Function every input that may have a gradient seems to want one, also where none is being taken.
        differentiated = torch.is_grad_enabled() and weight.requires_grad
        made = self.clock.recent.of(x)
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            y: Tensor = _Linear.apply(x, weight, bias, self, spec, rows_of_a_sample, made, differentiated)  # type: ignore[no-untyped-call]
            return y
        # As it treats a plain linear; inside, what is in float32 has its reason.
        dtype = torch.get_autocast_dtype(kind)
        made = made if x.dtype == dtype else None
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            y = _Linear.apply(x, weight, bias, self, spec, rows_of_a_sample, made, differentiated)  # type: ignore[no-untyped-call]
        return y

    def reset_state(self, value: float = 0.0) -> None:
        """Forget every amax. ``value``: what is held instead, 0 for a scale of 1, or ``UNKNOWN``."""
        if self.delayed is not None:
            self.amax_history.zero_()
            self.amax_held.fill_(value)
        self.ask_again()

    def ask_again(self) -> None:
        """What is remembered may be written from outside: trust nothing that the host was told of it."""
        self._maybe_unknown = self.delayed is not None
        self._followed: dict[int, tuple[QuantLinear, int, int]] = {}
        self._places: tuple[Tensor, Tensor, tuple[tuple[Tensor, Tensor], ...]] | None = None
        self.noted: dict[int, int] = {}  # how often each column's tensor was measured

    # What ``precision.traced`` calls.

    def computes_by(self, kind: int, device: torch.device) -> bool:
        mode, held = self.mode, self.amax_held
        there = self.weight.device.type == device.type and not (held is not None and held.is_meta)
        return there and kind in (mode.kind, mode.kind_of_inputs)

    def traced_inputs(self, x: Tensor, differentiated: bool) -> list[Tensor]:
        rows = x.reshape(-1, self.in_features)
        call = self._call(x, {})
        if differentiated:
            call.make_both(rows)
        a = call.operand(X, rows, codes=differentiated and call.resolved.keeps_first)
        if differentiated:
            kept_of(call, rows, a)
        assert call.made is not None
        tensors, layout = _flat(list(call.made.values()))
        _LAYOUTS["made", self.mode.kind_of_inputs, tuple(x.shape), differentiated] = tuple(call.made), layout
        return tensors

    def traced_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, made: list[Tensor], differentiated: bool
    ) -> tuple[list[Tensor], tuple[int, ...] | None]:
        rows, given = x.reshape(-1, self.in_features), {}
        if made:
            names, layout = _LAYOUTS["made", self.mode.kind_of_inputs, tuple(x.shape), differentiated]
            given = dict(zip(names, _unflat(made, layout), strict=True))
        y, kept, _ = forward_pass(self._call(x, given), rows, weight, bias, differentiated)
        outputs = [y.view(*x.shape[:-1], self.out_features)]
        if not isinstance(kept, Quantized):
            return outputs, None
        tensors, _LAYOUTS["kept", self.mode.kind, tuple(x.shape[:-1])] = _flat([kept])
        places = {id(tensor): place for place, tensor in enumerate(made)}
        which = tuple(places[id(tensor)] for tensor in tensors if id(tensor) in places)
        if which:
            assert len(which) == len(tensors), "what is kept is made in one place"
            return outputs, which
        return [*outputs, *tensors], None

    def traced_backward(
        self, dy: Tensor, weight: Tensor, kept: list[Tensor], needed: tuple[bool, bool, bool]
    ) -> list[Tensor | None]:
        rows = dy.reshape(-1, self.out_features)
        operand: Operand = kept[0] if kept else rows
        if needed[1] and self.mode.resolved.slots[WGRAD_X].spec is None:
            operand = kept[0].reshape(-1, self.in_features)
        elif needed[1]:
            (operand,) = _unflat(kept, _LAYOUTS["kept", self.mode.kind, tuple(dy.shape[:-1])])
        dx, dw = backward_pass(self._call(dy, None), rows, weight, operand, needed[:2], None)
        dx = None if dx is None else dx.view(*dy.shape[:-1], self.in_features)
        return [dx, dw, rows.sum(0) if needed[2] else None]

    def _call(self, x: Tensor, made: dict[Hashable, Operand] | None) -> Call:
        """``x``: the input or the gradient of the output, with the dimensions that they share."""
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        clock = self.clock
        return Call.of(self, self.active, clock.first_sample, clock.rows_of_a_sample(x, rows), made)

    def noise(self, slot: int, call: Call) -> Noise:
        """Of the slot's tensor where ``call`` stands in the data; that of a weight is the same everywhere."""
        if slot not in self._base_keys:
            self._base_keys[slot] = base_key(self.clock.seed, self.path, slot, device=self.weight.device)
        return Noise.of(
            base=self._base_keys[slot],
            step=self.clock.step,
            first_sample=call.first_sample,
            rows_of_a_sample=0 if _TENSORS[slot] == "w" else call.rows_of_a_sample,
            transposed=slot in TRANSPOSED,
        )

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

    def amax_and_note(self, slot: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The amax that scales this slot's tensor, None for its own; and where its new one is noted meanwhile, if it
        is to be: FP32 [1] each, for backends that do that in quantizing (``Backend.notes``)."""
        column = self.mode.column_of.get(slot)
        if column is None:
            return None, None
        self.noted[column] = self.noted.get(column, 0) + 1
        if not self.mode.backends[slot // 2].notes or self._unknown():
            return self.amax_for(slot, x), None
        places, history, held = self._places, self._buffers["amax_history"], self._buffers["amax_held"]
        if places is None or places[0] is not history or places[1] is not held:
            both = (tensor.view(-1, 1).unbind() for tensor in (self.amax_held, self.amax_history[0]))
            places = self._places = self.amax_history, self.amax_held, tuple(zip(*both, strict=True))
        scaling, note = places[2][column]
        return scaling, note if self.training else None

    def _unknown(self) -> bool:
        """Whether a held amax may be unknown. Asks the device until it is not."""
        if self._maybe_unknown:
            self._maybe_unknown = bool((self.amax_held == UNKNOWN).any())
        return self._maybe_unknown

    def follows(self, first: QuantLinear, slot: int) -> bool:
        """Whether what this linear remembers of the slot's tensor is what ``first`` does, which has noted this very x.

        If so, it takes over what was noted. Two histories that agree once, and are told the same from then on, agree
        for good: the device is asked when the two meet, and again where one of them was told more.
        """
        column, other = self.mode.column_of.get(slot), first.mode.column_of.get(slot)
        if column is None or other is None or self.delayed != first.delayed:
            return False
        met, times, own = self._followed.get(column), first.noted.get(other, 0), self.noted.get(column, 0)
        if met is None or met[0] is not first or times - met[1] not in (0, 1) or met[2] != own:
            same = torch.equal(self.amax_held[column], first.amax_held[other])
            if not same or not torch.equal(self.amax_history[1:, column], first.amax_history[1:, other]):
                return False
        if self.training and (met is None or met[1] != times):
            torch.maximum(self.amax_history[0, column], first.amax_history[0, other], out=self.amax_history[0, column])
        self._followed[column] = first, times, own
        return True

    def _meets_ranks(self) -> bool:
        return self.training and dist.is_initialized() and dist.get_world_size() > 1

    def amax_of_step(self, slot: int, x: Tensor, spec: OperandSpec) -> Tensor | None:
        """The amax that scales this slot's tensor on all ranks; None for its own, where no other rank is asked."""
        if not self._meets_ranks():
            return None
        rows = spec.tile.outer != -1 and (
            spec.scale.levels == 1 or (isinstance(spec.scale, TwoLevel) and spec.scale.rows)
        )
        amax = self.backends[slot // 2].amax(x, Tile(1, -1) if rows else TENSOR).flatten()
        # A maximum over ranks may lose a NaN.
        nan = amax.isnan()
        both = torch.stack((torch.where(nan, 0.0, amax), nan.float()))
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return torch.where(both[1] > 0, torch.nan, both[0])

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
        module: QuantLinear,
        spec: LinearSpec,
        rows_of_a_sample: int,
        made: dict[Hashable, Operand] | None,
        differentiated: bool,
    ) -> Tensor:
        rows = _rows(x)
        stats = module.statistics(rows) if module.statistics is not None else None
        observer = module.observer
        if observer is not None and not (differentiated and module.training and spec != LinearSpec()):
            observer = None  # one that computes plainly is measured from outside
        call = Call.of(module, spec, module.clock.first_sample, rows_of_a_sample, made, stats, observer)
        y, kept, ctx.noted = forward_pass(call, rows, weight, bias, differentiated)
        seen = (x,) if observer is not None else ()
        if isinstance(kept, Quantized):
            ctx.save_for_backward(weight, stats, kept.codes, kept.scales, kept.tensor_scale, *seen)
            ctx.kept = kept.shape, kept.spec, kept.transposed
        else:
            ctx.save_for_backward(weight, stats, x if kept is rows else kept, *seen)
            ctx.kept = None
        ctx.call, ctx.has_bias, ctx.shape = call.without_input(), bias is not None, x.shape
        # Not as a view: what a Function returns as one cannot be written to.
        return y if x.dim() == 2 and not y._is_view() else _reshaped(y, [*x.shape[:-1], module.out_features])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # No decorator: it would enter a mode that holds already, but where gradients are to have a graph.
        return _differentiated_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, stats, *pieces = ctx.saved_tensors
    rows = _rows(dy)
    kept: Any = pieces[0]  # None where the weight has no gradient
    if ctx.kept is not None:
        shape, spec, transposed = ctx.kept
        codes, scales, tensor_scale = pieces[:3]
        kept = Quantized(
            codes=codes, scales=scales, tensor_scale=tensor_scale, shape=shape, spec=spec, transposed=transposed
        )
    elif kept is not None:
        kept = _rows(kept)
    needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    call: Call = ctx.call.with_stats(stats)
    seen = (ctx.noted, _rows(pieces[-1])) if call.observer is not None else None
    dx, dw = backward_pass(call, rows, weight, kept, needed, seen)
    dx = dx if dx is None or len(ctx.shape) == 2 else dx.view(ctx.shape)
    dbias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
    return dx, dw, dbias, None, None, None, None, None


_differentiated_once = once_differentiable(_backward)


def forward_pass(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, differentiated: bool
) -> tuple[Tensor, Operand | None, Any]:
    """y of x [rows, in_features]; what backward keeps of x, if it will be; what an observer noted of fprop."""
    module, spec = call.module, call.spec
    module.note_unseen(call.stats, x=x, w=weight)
    if differentiated:
        call.make_both(x)
    a = call.operand(X, x, codes=differentiated and call.resolved.keeps_first)
    w = call.weight(W, weight)
    y = call.product(0, a, w, dtype=x.dtype, bias=bias)
    noted = None
    if call.observer is not None:
        # Counted in backward, which runs once also where the forward pass is computed again; it measures by x.
        noted = call.observer.measure(module, 0, spec.fprop, (x, weight), (a, w), y, bias, call.stats)
    return y, kept_of(call, x, a) if differentiated else None, noted


def backward_pass(
    call: Call, dy: Tensor, weight: Tensor, kept: Operand, needed: tuple[bool, bool], seen: tuple[Any, Tensor] | None
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dw, where they are needed, from dy [rows, out_features] and what was kept of x.

    ``seen``: what the observer noted of fprop, and x, if one looks on.
    """
    spec, stats = call.spec, call.stats
    dx = dw = None
    dy_made: Operand = dy
    call.module.note_unseen(stats, dy=dy)
    both = call.both(DGRAD_DY, WGRAD_DY, dy, codes=False) if all(needed) else None
    if needed[0]:
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
    if needed[1]:
        x_t = call.kept_columns(kept)
        if both is not None:
            dy_t: Operand = both[1]
        elif not isinstance(dy_made, Tensor) and call.resolved.dy_transposes:
            dy_t = dy_made.t()
        elif isinstance(dy_made, Quantized) and _reuses(spec.wgrad.a):
            dy_t = call.reused(WGRAD_DY, dy_made)
        else:
            dy_t = call.operand(WGRAD_DY, dy.mT)
        dw = call.product(2, dy_t, x_t, dtype=weight.dtype)
        if call.observer is not None and seen is not None:
            call.observer.add(seen[0])
            given = dy.mT, seen[1].mT
            call.observer.add(call.observer.measure(call.module, 2, spec.wgrad, given, (dy_t, x_t), dw, None, stats))
    return dx, dw


@dataclass(slots=True)  # a frozen one takes several times as long to make
class Call:
    """One forward pass of a linear and its backward pass: they use one spec and one place in the data."""

    module: QuantLinear
    spec: LinearSpec
    resolved: Resolved
    first_sample: Tensor
    rows_of_a_sample: int
    made: dict[Hashable, Operand] | None  # of x, in the forward pass
    stats: Tensor | None  # what transforms read
    observer: Observer | None

    @classmethod
    def of(
        cls,
        module: QuantLinear,
        spec: LinearSpec,
        first_sample: Tensor,
        rows_of_a_sample: int,
        made: dict[Hashable, Operand] | None,
        stats: Tensor | None = None,
        observer: Observer | None = None,
    ) -> Call:
        mode = module.mode
        resolved = mode.resolved if spec is mode.spec else _resolved(spec, mode.backends)
        return cls(module, spec, resolved, first_sample, rows_of_a_sample, made, stats, observer)

    def with_stats(self, stats: Tensor | None) -> Call:
        return self if stats is self.stats else replace(self, stats=stats)

    def without_input(self) -> Call:
        """What backward keeps of it: what it reads alone."""
        place = self.first_sample, self.rows_of_a_sample
        return Call(self.module, self.spec, self.resolved, *place, None, None, self.observer)

    def gemm(self, slot: int) -> GemmSpec:
        return (self.spec.fprop, self.spec.dgrad, self.spec.wgrad)[slot // 2]

    def operand(self, slot: int, x: Tensor, *, codes: bool = False) -> Operand:
        """What the slot's GEMM reads of ``x``, transformed and quantized as the spec says; as ``codes`` if told to."""
        it = self.resolved.slots[slot]
        codes = codes or self.observer is not None  # which looks at them
        if self.made is None or it.spec is None or slot not in (X, WGRAD_X) or it.random:
            return self._operand(slot, x, codes)
        key = self._key(slot, x)
        if key is None:
            return self._operand(slot, x, codes)
        if (key, codes) not in self.made:
            self.made[key, codes] = self._operand(slot, x, codes)
        return self.made[key, codes]

    def both(
        self, slot: int, other: int, x: Tensor, *, codes: bool = True
    ) -> tuple[Quantized, Quantized] | tuple[Prepared, Prepared] | None:
        """The operands of ``slot`` from x and of ``other`` from x.mT, where the backend makes both in one read."""
        it, its = self.resolved.slots[slot], self.resolved.slots[other]
        spec, backends = it.spec, self.module.backends
        if spec is None or its.spec is None or self.observer is not None:
            return None
        if it.gemm.transform is not None or its.gemm.transform is not None:
            return None
        # Codes of a square tile are reused by transposing them: they are those of the original.
        if spec != its.spec and not (it.square and spec == replace(its.spec, source=Source.ORIGINAL)):
            return None
        if it.square and not (backends[slot // 2].reads_rows and backends[other // 2].reads_rows):
            return None  # one is the other, transposed
        if it.delayed and not backends[slot // 2].notes:
            return None
        if it.of_step and spec.tile != TENSOR and spec.scale.levels == 1:
            return None  # rows of the one are not rows of the other
        noise = (self.module.noise(slot, self), self.module.noise(other, self)) if it.random else None
        amax, note = self.module.amax_and_note(slot, x) if it.delayed else (None, None)
        amax = self.module.amax_of_step(slot, x, spec) if it.of_step else amax
        return backends[slot // 2].both(x, spec, amax=amax, noise=noise, note=note, values=not codes)

    def make_both(self, x: Tensor) -> None:
        """Have the codes of x for fprop and for wgrad ready, if one read makes both."""
        it = self.resolved.slots[X]
        if self.made is None or it.spec is None or it.random or (it.delayed and not self.module.backends[0].notes):
            return
        keys = (self._key(X, x), self.resolved.keeps_first), (self._key(WGRAD_X, x), True)
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

    def _key(self, slot: int, x: Tensor) -> Hashable | None:
        """What the codes of a slot depend on beside x; None where that is not to be had without waiting for a device.

        An amax of earlier steps is part of it, and noted, as it would be in making the codes.
        """
        it = self.resolved.slots[slot]
        if it.gemm.transform is not None and self.stats is not None:
            return None
        if not it.delayed:
            return it.key
        if it.gemm.transform is not None:
            return None
        if self.module.backends[slot // 2].notes:
            return it.key, self._leader(slot, it)
        if x.device.type != "cpu":
            return None
        amax = self.module.amax_for(slot, x)
        return it.key, None if amax is None else float(amax)

    def _leader(self, slot: int, it: Slot) -> int:
        """Whose remembered amax scales x for this linear: that of a sibling that read x before, if the two agree."""
        assert self.made is not None
        first = self.made.setdefault(("leader", it.key), self.module)  # type: ignore[arg-type]
        assert isinstance(first, QuantLinear)
        return id(first if first is self.module or self.module.follows(first, slot) else self.module)

    def _operand(self, slot: int, x: Tensor, codes: bool) -> Operand:
        it = self.resolved.slots[slot]
        spec, transform = it.spec, it.gemm.transform
        backend = self.module.backends[slot // 2]
        # An amax that is noted, or of all ranks, is that of the transformed tensor; else one pass may do both.
        apart = spec is None or (it.delayed and not backend.notes) or it.of_step or self.stats is not None
        if transform is not None and apart:
            x, transform = self.module.transformed(slot // 2, transform, x, self.stats, left=it.left), None
        if spec is None:
            return x
        # The same codes, read along the tensor's own rows; but products that read rows would copy them.
        turned = it.transposed and it.square and not backend.reads_rows
        if turned:
            x = x.mT
        noise = self.module.noise(slot, self) if it.random else None
        amax, note = self.module.amax_and_note(slot, x) if it.delayed else (None, None)
        amax = self.module.amax_of_step(slot, x, spec) if it.of_step else amax
        made = backend.prepare(
            x, spec, amax=amax, noise=noise, transform=transform, left=it.left, codes=codes, note=note
        )
        return made.t() if turned else made

    def columns_made(self, x: Tensor) -> Operand | None:
        """The codes of x.mT for wgrad, if one read made them with those of x."""
        if self.made is None or not self.module.backends[0].reads_rows:
            return None
        return self.made.get((self._key(WGRAD_X, x), True))

    def kept_columns(self, kept: Operand) -> Operand:
        """What wgrad reads of x, from what was kept of it."""
        return self.operand(WGRAD_X, kept.mT) if isinstance(kept, Tensor) else kept

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
    if call.resolved.x_transposes:
        columns = call.columns_made(x)
        assert isinstance(a, Quantized), "made as codes, as keeps_first says"
        return a.t() if columns is None else columns
    if _reuses(spec.wgrad.b):
        return call.reused(WGRAD_X, a, codes=True)
    return call.operand(WGRAD_X, x.mT, codes=True)


def keeps_first(spec: LinearSpec) -> bool:
    """Whether what backward keeps of x comes from the codes that fprop reads."""
    return transposes(spec.fprop, spec.fprop.a, spec.wgrad, spec.wgrad.b) or _reuses(spec.wgrad.b)


_LAYOUTS: dict[Hashable, Any] = {}
"""How lists of tensors are read that operators have made: by what, for which kind of linear and shape."""


def _flat(operands: Sequence[Operand]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Operands as tensors, and how to have them back. A tensor that several share is there once."""
    tensors: list[Tensor] = []
    places: dict[int, int] = {}
    layout: list[Any] = []
    for operand in operands:
        parts: tuple[Tensor | None, ...]
        if isinstance(operand, Quantized):
            parts = operand.codes, operand.scales, operand.tensor_scale
            rest: Any = Quantized, operand.shape, operand.spec, operand.transposed
        elif isinstance(operand, Prepared):
            parts, rest = (operand.matrix, operand.factor), (Prepared,)
        else:
            parts, rest = (operand,), (Tensor,)
        for part in parts:
            if part is not None and id(part) not in places:
                places[id(part)] = len(tensors)
                tensors.append(part)
        layout.append((rest, tuple(None if part is None else places[id(part)] for part in parts)))
    return tensors, tuple(layout)


def _unflat(tensors: Sequence[Tensor], layout: tuple[Any, ...]) -> list[Operand]:
    operands: list[Operand] = []
    for (kind, *rest), places in layout:
        parts = [None if place is None else tensors[place] for place in places]
        if kind is Quantized:
            (codes, scales, tensor_scale), (shape, spec, transposed) = parts, rest
            assert codes is not None
            assert scales is not None
            operands.append(
                Quantized(
                    codes=codes, scales=scales, tensor_scale=tensor_scale, shape=shape, spec=spec, transposed=transposed
                )
            )
            continue
        assert parts[0] is not None
        operands.append(parts[0] if kind is Tensor else Prepared(matrix=parts[0], factor=parts[1]))
    return operands


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

    ``phases``: when, which GEMMs, with what. ``tokens``: of a micro-batch, where known.
    """

    path: str
    shape: tuple[int, int]
    spec: LinearSpec
    choices: Choices
    phases: tuple[tuple[str, tuple[str, ...], LinearSpec, Choices], ...] = ()
    tokens: int | None = None

    def __str__(self) -> str:
        out_features, in_features = self.shape
        lines = [f"{self.path:44} {in_features:>6} -> {out_features:<6}"]
        for name, choice in zip(GEMMS, self.choices, strict=True):
            lines.append(f"    {name}: {_told(self.spec, name, choice, self.tokens)}")
            for when, gemms, spec, choices in self.phases:
                if name in gemms:
                    lines.append(f"        {when}: {_told(spec, name, choices[GEMMS.index(name)], self.tokens)}")
        return "\n".join(lines)


def _told(spec: LinearSpec, name: str, choice: Choice, tokens: int | None) -> str:
    gemm: GemmSpec = getattr(spec, name)
    if gemm == GemmSpec():
        return "high precision (torch)"
    cut = [block for block in _along_tokens(gemm, wgrad=name == "wgrad") if tokens is not None and tokens % block]
    notes = [choice.backend.note(gemm)]
    notes += [f"a micro-batch of {tokens} tokens cuts blocks of {max(cut)}: another has other scales"] if cut else []
    return f"{gemm}  [{', '.join([str(choice), *filter(None, notes)])}]"


def _along_tokens(gemm: GemmSpec, *, wgrad: bool) -> list[int]:
    """How many tokens a tile of x or dy holds, or a block of a transform; not those that hold all there are."""
    if not wgrad:
        return [gemm.a.tile.outer] if gemm.a is not None and gemm.a.tile.outer > 0 else []
    sizes = [operand.tile.inner for operand in (gemm.a, gemm.b) if operand is not None and operand.tile.inner > 0]
    transform = gemm.transform.second if isinstance(gemm.transform, Composed) else gemm.transform
    return [*sizes, transform.size] if isinstance(transform, Hadamard) else sizes


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
    return LinearRow(linear.path, (n, k), spec, choices[0], told, tokens)
