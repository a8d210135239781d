"""A recipe is a frozen value: all that a paper may change about precision.

``loading`` finds one by name, ``apply`` puts it into a model, and the ``Plan`` that comes of it is the door for a
training loop. Here is also what recipe files write: selectors, rules and checks of their arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .blocks import LINEARS, Block
from .comm_spec import NO_COMM, Comm
from .linear import quantized
from .loss_scale import LossScaler
from .parameters import ForParameters
from .scaling import Current
from .schedule import Span
from .spec import GEMMS, LinearSpec
from .states.adamw import AdamW
from .states.driver import OptimizerBuilder
from .states.moments import STANDARD, Moments
from .states.rules import UpdateRule
from .suggest import close
from .sums import Accumulate, Sums
from .sums import by_name as rule_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Dtypes:
    """What parameters are stored in, computed in, and what gradients are summed in over ranks."""

    param: torch.dtype = torch.float32
    compute: torch.dtype = torch.bfloat16
    reduce: torch.dtype = torch.float32


class Where(Enum):
    """Modules that a rule finds by the structure of the model."""

    BLOCKS = "the blocks"


BLOCK_LINEARS = Where.BLOCKS
"""The linears of the blocks that ``precision.blocks`` finds, not the head; or those that ``apply`` is given by path."""

NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Modules that stay in high precision: the union of what the fields select.

    Args:
        path: regex, full match.
        kind: a module type.
        first: blocks from the start of every stack of them: a whole number, or a fraction of them, rounded up.
        last: blocks from its end.
    """

    path: str | None = None
    kind: type[nn.Module] | None = None
    first: float = 0
    last: float = 0

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (value >= 1 and value != int(value)):
                raise ValueError(f"keep_{name}={value}: a number of blocks, or a fraction of them below 1")
        if self.path is not None:
            try:
                re.compile(self.path)
            except re.error as error:
                raise ValueError(f"keep_paths={self.path!r}: not a regular expression: {error}") from error

    def matches(self, path: str, module: nn.Module, block: Block | None) -> bool:
        """Whether the module, which is in ``block``, is among them."""
        inside = block is not None and (
            block.index < _count(self.first, block.total) or block.index >= block.total - _count(self.last, block.total)
        )
        return inside or self.names(path, module)

    def names(self, path: str, module: nn.Module) -> bool:
        """Whether it is meant by its path or its kind."""
        named = self.path is not None and re.fullmatch(self.path, path) is not None
        return named or (self.kind is not None and isinstance(module, self.kind))

    def __str__(self) -> str:
        parts = [f"path {self.path!r}" if self.path is not None else "", self.kind.__name__ if self.kind else ""]
        parts += [f"{name} {value:g} of the blocks" for name in ("first", "last") if (value := getattr(self, name))]
        return ", ".join(filter(None, parts)) or "nothing"


def keep(
    *, first: float = 0, last: float = 0, paths: Iterable[str] = (), kinds: Iterable[type[nn.Module]] = ()
) -> tuple[Keep, ...]:
    """Selectors for a recipe's arguments: one each, so that one that matches nothing is found out."""
    ends = [Keep(first=first)] * bool(first) + [Keep(last=last)] * bool(last)
    return (*ends, *(Keep(path=path) for path in paths), *(Keep(kind=kind) for kind in kinds))


def _count(wanted: float, num_blocks: int) -> int:
    return math.ceil(wanted * num_blocks) if wanted < 1 else int(wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Replaces every module of type ``kind`` whose path matches ``path`` in full by ``make(module, path, *siblings)``.

    ``kind``: or one of several: ``precision.blocks.LINEARS`` are linears, and those of experts. ``path``: a regex, or
    ``BLOCK_LINEARS``. ``keep``: the modules among them that stay as they are. ``siblings``: names of children that the
    module's parent must have, or the rule passes it by; ``children``: of those that it must have itself. ``optional``:
    it may match nothing.
    """

    kind: type[nn.Module] | tuple[type[nn.Module], ...]
    path: str | Where
    make: Callable[..., nn.Module]
    keep: tuple[Keep, ...] = ()
    siblings: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    optional: bool = False

    @property
    def kinds(self) -> tuple[type[nn.Module], ...]:
        return self.kind if isinstance(self.kind, tuple) else (self.kind,)


def block_linears(spec: LinearSpec, keep: tuple[Keep, ...] = ()) -> Rule:
    """The rule that gives the linears of the blocks, also of experts, this spec, but for those to keep."""
    return Rule(kind=LINEARS, path=BLOCK_LINEARS, make=quantized(spec), keep=keep)


class Hook(Protocol):
    """What a recipe does at steps, on all ranks alike. A hook has those of these methods that it needs.

    It may also be an ``nn.Module``, or have methods ``parameters`` and ``buffers`` that give tensors by name. Every
    rank has all of them, and starts them alike. Parameters are trained by the recipe's update rule, without weight
    decay, on gradients summed over ranks. Both are in checkpoints, as ``recipe.CLASS.NAME``. None may be a parameter of
    the model, too. A recipe with such a hook is of one model.
    """

    def prepare(self, model: nn.Module) -> None:
        """Once, when the recipe is put into a model, whose parameters have their full shapes and may be on the meta
        device: to make tensors of one's own by them. A model of ours has its ``config``."""

    def begin_step(self, model: nn.Module, step: int, total_steps: int | None) -> None: ...

    def begin_micro(self, model: nn.Module) -> None:
        """Before every micro-batch; not before a pass that only counts for a model, and is made again."""

    def loss_terms(self, model: nn.Module) -> Tensor:
        """A scalar that is added to the loss of every micro-batch, after its forward pass, for backward alone.

        It counts by the weight of the micro-batch in the global batch: so a term of the hook's own parameters counts
        once a step, and one of activations as their mean, whatever the number of ranks and micro-batches. Of a sharded
        model it can read what modules computed in ``forward``; outside, a rank has but its part of the parameters.
        """

    def before_update(self, model: nn.Module, gradients: Mapping[str, Tensor]) -> None:
        """Between the last backward pass and the gradient's norm, so that clipping and the check for what is not finite
        see what is applied. ``gradients``: by parameter, this rank's part, unscaled; changed in place.
        """

    def after_update(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """After an update that was applied. ``parameters``: by name, this rank's part; changed in place."""

    def end_step(self, model: nn.Module, step: int, applied: Tensor) -> None:
        """``applied``: bool scalar on the model's device; to read it is to wait for the device. A hook with a further
        argument ``loss`` also gets that of the global batch, in nats a token: FP64 scalar there; None if nobody knows.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the run in which some GEMMs of the quantized linears are computed otherwise.

    Args:
        span: which part; None: no step begins it, but a hook may have modules ``use`` it, in its ``begin_step``.
        gemms: of fprop, dgrad and wgrad.
        rules: those of another recipe, whose specs hold there; none for high precision.
        name: of that recipe.
    """

    span: Span | None
    gemms: tuple[str, ...] = GEMMS
    rules: tuple[Rule, ...] = ()
    name: str = "high precision"

    def __post_init__(self) -> None:
        unknown = [gemm for gemm in self.gemms if gemm not in GEMMS]
        if unknown:
            raise ValueError(f"gemms: no GEMM named {unknown[0]!r}{close(str(unknown[0]), GEMMS)}: {', '.join(GEMMS)}")
        if not self.gemms or len(set(self.gemms)) < len(self.gemms):
            raise ValueError(f"gemms={list(self.gemms)}: each at most once, and at least one of {', '.join(GEMMS)}")

    def __str__(self) -> str:
        return f"{self.when}: {', '.join(self.gemms)} in {self.name}"

    @property
    def when(self) -> str:
        return "when a hook says so" if self.span is None else str(self.span)


def require_apart(schedule: Sequence[Phase], total_steps: int | None) -> None:
    """Raises ValueError if two phases want the same GEMM at the same step, or one lies after a run of known length."""
    for number, later in enumerate(schedule):
        for earlier in schedule[:number]:
            both = [gemm for gemm in later.gemms if gemm in earlier.gemms]
            spans = later.span, earlier.span
            if both and spans[0] is not None and spans[1] is not None and spans[0].meets(spans[1], total_steps):
                raise ValueError(f"schedule: two phases switch {both[0]} at one step: ({earlier}) and ({later})")
        span = later.span
        if total_steps is not None and span is not None and not span.of_run and span.start >= total_steps:
            raise ValueError(f"schedule: ({later}) begins after the run's {total_steps} steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that a paper may change about precision. The trainer reads these fields and never the recipe's name.

    ``parameters``: learning rate, decay and initial values of single parameters, where not the model's; a later part
    wins. ``one_micro_batch``: scales are of the tensors of a full step, which must be one micro-batch on every rank.
    ``comm``: weights gathered and gradients reduced as codes.

    Raises ValueError for a schedule whose phases meet.
    """

    rules: tuple[Rule, ...] = ()
    dtypes: Dtypes = Dtypes()
    moments: Moments = STANDARD
    update: UpdateRule | OptimizerBuilder = field(default_factory=AdamW)
    loss_scale: LossScaler | None = None
    schedule: tuple[Phase, ...] = ()
    hooks: tuple[Any, ...] = ()  # each a Hook, of which it may leave out what it does not need
    parameters: tuple[ForParameters, ...] = ()
    one_micro_batch: bool = False
    comm: Comm = NO_COMM

    def __post_init__(self) -> None:
        require_apart(self.schedule, None)

    @property
    def param_dtype(self) -> torch.dtype:
        """Of the model's parameters: ``dtypes.param``, unless ``moments.master`` says where weights are stored."""
        return self.moments.param_dtype(self.dtypes.param, self.dtypes.compute)


_T = TypeVar("_T")


def one_of(name: str, value: str, choices: Mapping[str, _T]) -> _T:
    """The choice called ``value``. Raises ValueError naming the argument and the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value}: one of {', '.join(choices)}{close(str(value), choices)}")
    return choices[value]


def current(amax: str) -> Current:
    """What the argument ``amax`` of a recipe says: micro or step. Raises ValueError for another word."""
    return one_of("amax", amax, {"micro": Current(), "step": Current(step=True)})


def fast_sums(value: bool | str) -> Sums:
    """What a recipe's argument ``fast_accum`` says: true, false or auto. Raises ValueError for another word."""
    if isinstance(value, bool):
        return Sums.FAST if value else Sums.FP32
    return one_of("fast_accum", value, {"auto": Sums.AUTO})


def sums(accumulate: str, otherwise: Sums = Sums.FP32) -> Accumulate | Sums:
    """What a recipe's argument ``accumulate`` says: a rule of ``precision.sums.RULES``, or fp32 for ``otherwise``.

    Raises ValueError for another word.
    """
    return otherwise if accumulate == "fp32" else rule_of(accumulate)
