"""A recipe is a frozen value; ``apply`` puts it into a model and gives back the plan of what was done.

recipe = load("mxfp8", {"keep_last": 1})
plan = apply(recipe, model)
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType, UnionType
from typing import Any, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from .backends import require_backend as require_backend
from .blocks import Block, Blocks, find_blocks
from .coverage import OUTSIDE, Coverage, CoverageWarning, covered
from .linear import UNKNOWN, Clock, QuantLinear, assign_backends, is_random, require_steps
from .loading import available as available
from .loading import guarded, is_file, make_of
from .loading import names as names
from .loss_scale import LossScaler
from .scaling import Current
from .schedule import Span, parse_span
from .spec import GEMMS, LinearSpec
from .states.codecs import STANDARD, Moments
from .states.updates import AdamW, UpdateRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Dtypes:
    """What parameters are kept in, computed in, and what gradients are summed in over ranks."""

    param: torch.dtype = torch.float32
    compute: torch.dtype = torch.bfloat16
    reduce: torch.dtype = torch.float32


class Where(Enum):
    """Modules that a rule finds by the structure of the model."""

    BLOCKS = "the blocks"


BLOCK_LINEARS = Where.BLOCKS
"""The linears of the blocks that ``precision.blocks`` finds, not the head; or those that ``apply`` is told by path."""

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

    ``path``: a regex, or ``BLOCK_LINEARS``. ``keep``: the modules among them that stay as they are. ``siblings``: names
    of children that the module's parent must have, or the rule passes it by; ``children``: of those that it must have
    itself. ``optional``: it may match nothing.
    """

    kind: type[nn.Module]
    path: str | Where
    make: Callable[..., nn.Module]
    keep: tuple[Keep, ...] = ()
    siblings: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    optional: bool = False


class Hook(Protocol):
    """What a recipe does once per optimizer step, on all ranks alike."""

    def begin_step(self, model: nn.Module, step: int, total_steps: int | None) -> None: ...

    def end_step(self, model: nn.Module, step: int, applied: Tensor) -> None:
        """``applied``: bool scalar on the model's device; to read it is to wait for the device."""


@runtime_checkable
class MicroHook(Protocol):
    """A hook that does something before every micro-batch, too."""

    def begin_micro(self, model: nn.Module) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the run in which some GEMMs of the quantized linears are computed otherwise.

    Args:
        span: which part.
        gemms: of fprop, dgrad and wgrad.
        rules: those of another recipe, whose specs hold there; none for high precision.
        name: of that recipe.
    """

    span: Span
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
        return f"{self.span}: {', '.join(self.gemms)} in {self.name}"


def require_apart(schedule: Sequence[Phase], total_steps: int | None) -> None:
    """Raises ValueError if two phases want the same GEMM at the same step, or one lies after a run of known length."""
    for number, later in enumerate(schedule):
        for earlier in schedule[:number]:
            both = [gemm for gemm in later.gemms if gemm in earlier.gemms]
            if both and later.span.meets(earlier.span, total_steps):
                raise ValueError(f"schedule: two phases switch {both[0]} at one step: ({earlier}) and ({later})")
        if total_steps is not None and not later.span.of_run and later.span.start >= total_steps:
            raise ValueError(f"schedule: ({later}) begins after the run's {total_steps} steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that a paper may change about precision. The trainer reads these fields and never the recipe's name.

    ``one_micro_batch``: scales are of the tensors of a whole step, which must be one micro-batch on every rank.

    Raises ValueError for a schedule whose phases meet.
    """

    rules: tuple[Rule, ...] = ()
    dtypes: Dtypes = Dtypes()
    moments: Moments = STANDARD
    update: UpdateRule = field(default_factory=AdamW)
    loss_scale: LossScaler | None = None
    schedule: tuple[Phase, ...] = ()
    hooks: tuple[Hook, ...] = ()
    one_micro_batch: bool = False

    def __post_init__(self) -> None:
        require_apart(self.schedule, None)

    @property
    def param_dtype(self) -> torch.dtype:
        """Of the model's parameters: ``dtypes.param``, unless ``moments.master`` says where weights are kept."""
        return self.moments.param_dtype(self.dtypes.param, self.dtypes.compute)


@runtime_checkable
class Remembers(Protocol):
    """A module with state beside its parameters."""

    def reset_state(self) -> None: ...


class PlanRow(Protocol):
    """One line of ``plan.txt``."""

    def __str__(self) -> str: ...


@dataclass(frozen=True, slots=True)
class NativeLinear:
    """A linear left to torch, in the recipe's compute dtype."""

    path: str
    shape: tuple[int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        out_features, in_features = self.shape
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.path:44} {in_features:>6} -> {out_features:<6}  fprop, dgrad, wgrad: {dtype} (torch)"


@dataclass
class Plan:
    """What ``apply`` did to a model, and the recipe's door for the training loop."""

    recipe: Recipe
    model: nn.Module
    rows: Sequence[PlanRow]
    update_note: str = ""  # how optimizer states are kept and updated, once that is known
    coverage: Coverage = field(default_factory=Coverage)
    notes: Sequence[str] = ()  # what a user may want to know of how the recipe's arguments were taken
    clock: Clock = field(default_factory=Clock)
    _step: int = field(default=0, init=False)
    _scale: Tensor = field(init=False)
    _clean_steps: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._scale, self._clean_steps = (self.recipe.loss_scale or LossScaler()).start()

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by before backward, and gradients are to be divided by; None without scaling."""
        return None if self.recipe.loss_scale is None else float(self._scale)

    @property
    def can_back_off(self) -> bool:
        """Whether the loss scale can still go down: an overflow is then its business, and no sign of divergence."""
        scaler = self.recipe.loss_scale
        return scaler is not None and bool(self._scale > torch.tensor(scaler.floor, dtype=torch.float32))

    def begin_step(self, step: int, sample_offset: int, total_steps: int | None = None) -> None:
        """Before the first micro-batch of ``step``; ``sample_offset`` is its first sample on this rank, globally."""
        self._step = step
        self.clock.set(step, sample_offset, None)
        self.clock.begin()
        if self.recipe.schedule:
            picks = [0, 0, 0]
            for number, phase in enumerate(self.recipe.schedule, 1):
                if step in phase.span.steps(total_steps):
                    picks = [number if gemm in phase.gemms else pick for gemm, pick in zip(GEMMS, picks, strict=True)]
            for module in self.model.modules():
                if isinstance(module, QuantLinear):
                    module.use((picks[0], picks[1], picks[2]))
        for hook in self.recipe.hooks:
            hook.begin_step(self.model, step, total_steps)

    def begin_micro(self, sample_offset: int, samples: int | None = None) -> None:
        """Before every micro-batch of ``samples`` samples: rounding noise goes by the global index of a sample."""
        self.clock.set(self._step, sample_offset, samples)
        self.clock.begin()
        for hook in self.recipe.hooks:
            if isinstance(hook, MicroHook):
                hook.begin_micro(self.model)

    def end_step(self, *, applied: bool | Tensor = True, overflow: bool | Tensor = False) -> None:
        """After the last backward pass.

        ``applied``: whether its gradients are used, or the step is skipped. ``overflow``: it is skipped because its
        gradients, though not its loss, are not finite. (A step without a finite loss says nothing about the scale.)
        Both may be bool scalars on the model's device, which are read only where the loss is scaled.
        """
        scaler = self.recipe.loss_scale
        if scaler is not None and (applied or overflow):
            scale, clean_steps = scaler.update(self._scale, self._clean_steps, bool(overflow))
            self._scale.copy_(scale)
            self._clean_steps.copy_(clean_steps)
        if self.recipe.hooks:
            if not isinstance(applied, Tensor):
                device = next((parameter.device for parameter in self.model.parameters()), None)
                applied = torch.full((), applied, dtype=torch.bool, device=device)  # filled there, not copied
            for hook in self.recipe.hooks:
                hook.end_step(self.model, self._step, applied)

    def resume(self, steps_done: int, total_steps: int | None) -> None:
        """Stand where the last of ``steps_done`` steps left the recipe: what is evaluated next is computed alike."""
        self.begin_step(max(0, steps_done - 1), 0, total_steps)

    def state_tensors(self) -> dict[str, Tensor]:
        """What the recipe remembers from step to step, by name: the model's persistent buffers, alive; the loss scale.

        Buffers that every rank keeps for itself appear as one tensor with a first dimension of ranks.
        """
        for linear in self.model.modules():  # who asks for them may write them
            if isinstance(linear, QuantLinear):
                linear.ask_again()
        buffers = self.buffers()
        scaling = {"loss_scale": self._scale, "loss_scale_clean_steps": self._clean_steps}
        if self._ranks is not None:
            ranks = self._ranks
            buffers = {name: DTensor.from_local(buffer[None], ranks, [Shard(0)]) for name, buffer in buffers.items()}
        return buffers | (scaling if self.recipe.loss_scale is not None else {})

    def buffers(self) -> dict[str, Tensor]:
        """The model's persistent buffers by name, alive: of ``state_tensors`` what this rank holds."""
        saved = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in saved}

    @functools.cached_property
    def _ranks(self) -> DeviceMesh | None:
        """All ranks, if what they remember differs."""
        differs = any(getattr(hook, "differs_by_rank", False) for hook in self.recipe.hooks)
        if not differs or not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        device = next(self.model.parameters()).device.type
        return init_device_mesh(device, (dist.get_world_size(),))

    def reset_state(self) -> None:
        """Set every remembered tensor to its start; after ``to_empty`` they hold garbage."""
        for module in self.model.modules():
            if isinstance(module, Remembers):
                module.reset_state()
        self._start_scaling()

    def forget(self) -> None:
        """Declare what is remembered unknown, as after loading weights alone: the next step measures for itself."""
        for linear in self.model.modules():
            if isinstance(linear, QuantLinear):
                linear.reset_state(UNKNOWN)
        self._start_scaling()

    def _start_scaling(self) -> None:
        if self.recipe.loss_scale is not None:
            for tensor, start in zip((self._scale, self._clean_steps), self.recipe.loss_scale.start(), strict=True):
                tensor.copy_(start)

    @contextmanager
    def high_precision(self) -> Iterator[None]:
        """Run without the recipe's quantization of matrix products."""
        before, self.clock.high_precision = self.clock.high_precision, True
        try:
            yield
        finally:
            self.clock.high_precision = before

    def __str__(self) -> str:
        dtypes = self.recipe.dtypes
        names = {key: str(getattr(dtypes, key)).removeprefix("torch.") for key in ("param", "compute", "reduce")}
        names["param"] = str(self.recipe.param_dtype).removeprefix("torch.")
        head = "parameters {param}, compute {compute}, gradient reduction {reduce}".format(**names)
        update = [f"update {self.recipe.update}", f"moments {self.update_note or self.recipe.moments}"]
        scaler = [str(self.recipe.loss_scale)] if self.recipe.loss_scale is not None else []
        phases = [f"schedule: {phase}" for phase in self.recipe.schedule]
        hooks = [f"every step: {hook}" for hook in self.recipe.hooks]
        lines = [head, *update, *scaler, *phases, *hooks, *map(str, self.rows), *self.notes, str(self.coverage)]
        return "\n".join(lines) + "\n"


def load(name: str, args: Mapping[str, Any] = NO_ARGUMENTS, schedule: Sequence[Any] = ()) -> Recipe:
    """The recipe of this name with these arguments; its signature is the schema.

    ``name``: one of ``available``, or the path of a file, which ends in ``.py`` and has a function ``recipe``: it is
    run.
    ``schedule``: phases beside the recipe's own, as ``scheduled`` reads them.
    Raises ValueError for an unknown recipe or argument (with the close matches), for a missing one, and for a schedule
    that cannot be.
    """
    return scheduled(_load(name, args), schedule)


def scheduled(recipe: Recipe, entries: Sequence[Any]) -> Recipe:
    """``recipe`` with these phases, each a mapping:

    * steps: [start, end], whole steps from 0 with the end not included, or parts of the run up to 1; an end of null is
      the run's.
    * gemms: of fprop, dgrad, wgrad; all, if left out.
    * recipe, args: another recipe, whose specs hold there. High precision, if left out. Only what it says of GEMMs
      counts, and it must compute in the same dtypes; what it remembers is kept throughout the run.

    Raises ValueError naming the entry and what is wrong with it.
    """
    phases, hooks, one_micro_batch = list(recipe.schedule), list(recipe.hooks), recipe.one_micro_batch
    for number, entry in enumerate(entries):
        try:
            phase, other = _phase(recipe, entry)
            one_micro_batch = one_micro_batch or other.one_micro_batch
            for hook in other.hooks:
                if hook not in hooks and any(type(other) is type(hook) for other in hooks):
                    raise ValueError(f"recipe={phase.name}: it wants another '{hook}' than the run's recipe")
                hooks += [hook] if hook not in hooks else []
        except ValueError as error:
            raise ValueError(f"precision.schedule[{number}]: {error}") from error
        phases.append(phase)
    try:
        return replace(recipe, schedule=tuple(phases), hooks=tuple(hooks), one_micro_batch=one_micro_batch)
    except ValueError as error:
        raise ValueError(f"precision.{error}") from error


def _phase(recipe: Recipe, entry: Any) -> tuple[Phase, Recipe]:
    """The phase, and the recipe that it takes its rules from: an empty one for high precision."""
    keys = ("steps", "gemms", "recipe", "args")
    if not isinstance(entry, Mapping):
        raise ValueError(f"{entry!r} is no phase; write {{steps: [0.8, 1.0], gemms: [fprop]}}")
    for key in entry:
        if key not in keys:
            raise ValueError(f"unknown key {key!r}{close(str(key), keys)}; a phase has {', '.join(keys)}")
    if "steps" not in entry:
        raise ValueError("a phase needs steps: [start, end]")
    gemms = entry.get("gemms", list(GEMMS))
    if not isinstance(gemms, (list, tuple)):
        raise ValueError(f"gemms={gemms!r}: a list of {', '.join(GEMMS)}")
    phase = Phase(span=parse_span(entry["steps"]), gemms=tuple(gemms))
    name, args = entry.get("recipe"), entry.get("args", {})
    if name is None:
        if args:
            raise ValueError("args are those of a recipe, which is missing")
        return phase, Recipe()
    if not isinstance(args, Mapping):
        raise ValueError(f"args={args!r}: a mapping of the recipe's arguments")
    other = _load(str(name), args)
    for what in ("dtypes", "loss_scale"):
        if getattr(other, what) != getattr(recipe, what):
            raise ValueError(f"recipe={name}: its {what} are not the run's, which hold from first step to last")
    if other.schedule:
        raise ValueError(f"recipe={name} has a schedule of its own ({other.schedule[0]}): switch that off in args")
    told = f"{name}({', '.join(f'{key}={value}' for key, value in args.items())})" if args else str(name)
    return replace(phase, rules=other.rules, name=told), other


_ENDS = ("first", "last")


@dataclass(frozen=True, slots=True)
class _Signature:
    """A recipe's arguments as users spell them: a ``tuple[Keep, ...]`` called x is x_first, x_last and x_paths.

    By name: the types, and the defaults of those that have one. ``keeps``: by parameter.
    """

    make: Callable[..., Any]
    hints: dict[str, Any]
    defaults: dict[str, Any]
    keeps: dict[str, tuple[Keep, ...]]

    @classmethod
    def of(cls, make: Callable[..., Any]) -> _Signature:
        """Raises what evaluating the annotations raises."""
        annotations = get_type_hints(getattr(make, "func", make))
        found = cls(make, {}, {}, {})
        for name, parameter in inspect.signature(make).parameters.items():
            default = parameter.default
            if annotations.get(name) == tuple[Keep, ...]:
                found.keeps[name] = default = () if default is parameter.empty else default
                ends = {f"{name}_{end}": max((getattr(part, end) for part in default), default=0) for end in _ENDS}
                found.hints.update(dict.fromkeys(ends, float) | {f"{name}_paths": Sequence[str]})
                found.defaults.update(ends)
                found.defaults[f"{name}_paths"] = [part.path for part in default if part.path is not None]
            else:
                found.hints[name] = annotations.get(name, Any)
                if default is not parameter.empty:
                    found.defaults[name] = default
        return found

    def call(self, args: Mapping[str, Any]) -> Any:
        """The recipe. Raises ValueError for what selects no modules, and what the recipe raises."""
        given = dict(args)
        for name, default in self.keeps.items():
            parts = {part: given.pop(f"{name}_{part}", self.defaults[f"{name}_{part}"]) for part in (*_ENDS, "paths")}
            given[name] = (*keep(**parts), *(part for part in default if part.kind is not None))
        return self.make(**given)


def filled(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """``args`` of the recipe with that name, and its own for what they leave out; as they are if there is none such."""
    if name not in names():
        return dict(args)
    make = make_of(name)
    assert make is not None
    values = _Signature.of(make).defaults | dict(args)
    kinds = ((tuple, list), (Mapping, dict))  # of a default, and of what a yaml holds
    return {key: next((to(value) for of, to in kinds if isinstance(value, of)), value) for key, value in values.items()}


def _load(name: str, args: Mapping[str, Any]) -> Recipe:
    make = make_of(name)
    if make is None:
        hint = "; a recipe of your own is named by its file, path/to/NAME.py" if "/" in name else ""
        known = available()
        raise ValueError(f"no recipe named {name!r}{close(name, known)}; there are: {', '.join(known)}{hint}")
    code = getattr(make, "__code__", None)
    where = code.co_filename if is_file(name) and code is not None else f"recipe {name!r}"
    parameters = inspect.signature(make).parameters
    loose = [key for key, p in parameters.items() if p.kind not in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if loose:
        line = f":{code.co_firstlineno}" if is_file(name) and code is not None else ""
        raise ValueError(f"{where}{line}: its signature is the schema of its arguments: {loose[0]!r} names none")
    signature = guarded(where, lambda: _Signature.of(make))
    hints = signature.hints
    for key in args:
        if key not in hints:
            allowed = ", ".join(hints) or "none"
            raise ValueError(f"recipe {name!r} has no argument {key!r}{close(key, hints)}; it takes: {allowed}")
    missing = [key for key in hints if key not in signature.defaults and key not in args]
    if missing:
        raise ValueError(f"recipe {name!r} needs {', '.join(missing)}")
    for key, value in args.items():
        if not _is_of(value, hints[key]):
            wanted = getattr(hints[key], "__name__", None) or str(hints[key])
            if wanted == "Sequence":
                wanted = str(hints[key]).rpartition("abc.")[2]
            raise ValueError(f"recipe {name!r}: {key}={value!r} is no {wanted}")
    if name not in names():
        recipe = guarded(where, lambda: signature.call(args))
    else:
        try:
            recipe = signature.call(args)
        except ValueError as error:
            given = ", ".join(f"{key}={value}" for key, value in args.items())
            raise ValueError(f"recipe {name!r} ({given}): {error}") from error
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{where}: its function gives a {type(recipe).__name__}, no Recipe")
    return recipe


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value from a yaml is of the type that a recipe's signature names: no bool for a number, no text."""
    if get_origin(hint) in (Union, UnionType):
        return any(_is_of(value, part) for part in get_args(hint))
    if get_origin(hint) in (list, tuple, Sequence):
        kinds = [kind for kind in get_args(hint) if kind is not ...]
        return isinstance(value, (list, tuple)) and (len(kinds) != 1 or all(_is_of(item, kinds[0]) for item in value))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or (isinstance(value, hint) if isinstance(hint, type) else True)


def close(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=3)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def apply(
    recipe: Recipe | str,
    model: nn.Module,
    *,
    args: Mapping[str, Any] = NO_ARGUMENTS,
    paths: str | Sequence[str] = (),
    tokens: int | None = None,
    device: torch.device | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> Plan:
    """Replace modules of ``model`` in place as the recipe's rules say. Works on any tree of ``nn.Linear``.

    Args:
        recipe: what ``load`` gave, or a name, which is loaded with ``args``.
        paths: regex, or several, full match: the linears to quantize, in place of those of the blocks that
            ``precision.blocks`` finds.
        tokens: rows of every activation matrix in one micro-batch, for backends that care about shapes.
        device: where the model will run; the model itself may be on the meta device.
        backend: ``auto``, or the one backend to use.
        seed: of rounding noise.

    Raises ValueError when a rule, or a selector of what it keeps, matches no module: a recipe that silently does
    nothing is worse than none. Also for a model that is quantized already, and for a backend that is none or refuses.
    Warns (``CoverageWarning``) where much of the model is not quantized that nobody chose to leave.
    """
    if isinstance(recipe, str):
        recipe = load(recipe, args)
    elif args:
        raise ValueError("args are those of a recipe given by name; one that is loaded has its own")
    device = device or next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    scene = _Scene.of(model, [paths] if isinstance(paths, str) else list(paths))
    if scene.paths and not any(rule.path is Where.BLOCKS for rule in recipe.rules):
        raise ValueError(
            f"paths={scene.paths}: this recipe chooses no linears of blocks, so there is nothing to choose"
        )
    with _whole_or_not(model):
        plan = _put_in(recipe, scene, tokens, device, backend, seed)
        if plan.coverage.surprises:  # which may be an error by the user's wish
            warnings.warn(str(plan.coverage), CoverageWarning, stacklevel=2)
    _leave_fast_paths(model)
    if why := _by_step(recipe, model):
        require_steps(model, plan.clock, why)
    return plan


def _put_in(recipe: Recipe, scene: _Scene, tokens: int | None, device: torch.device, backend: str, seed: int) -> Plan:
    model = scene.model
    others = [_specs(phase, scene) for phase in recipe.schedule]
    for rule in recipe.rules:
        for path, module in scene.chosen(rule):
            parent, _, child = path.rpartition(".")
            siblings = (model.get_submodule(f"{parent}.{name}" if parent else name) for name in rule.siblings)
            made = rule.make(module, path, *siblings)
            for other in scene.places(module):  # the same linear at several places stays one
                parent, _, child = other.rpartition(".")
                setattr(model.get_submodule(parent), child, made)
    for path in dict.fromkeys(path for specs in others for path in specs):
        linear = model.get_submodule(path)
        if type(linear) is nn.Linear:  # in high precision but for a phase
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantLinear(linear, path, LinearSpec()))
    if recipe.schedule and not any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError(f"the schedule ({recipe.schedule[0]}) switches nothing: no linear is quantized")
    clock = Clock(seed=seed, device=None if device.type == "meta" else device)
    rows: list[PlanRow] = []
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            module.clock = clock
            phases = [
                (str(phase.span), phase.gemms, specs.get(path, LinearSpec()))
                for phase, specs in zip(recipe.schedule, others, strict=True)
            ]
            rows.append(assign_backends(module, tokens, device, backend, phases))
        elif type(module) is nn.Linear:
            shape = (module.out_features, module.in_features)
            rows.append(NativeLinear(path, shape, recipe.dtypes.compute))
        elif (row := getattr(module, "plan_row", None)) is not None:
            rows.append(row)
    coverage = replace(covered(model, scene.kept, scene.reasons), scheduled=bool(recipe.schedule))
    plan = Plan(recipe, model, rows, coverage=coverage, notes=tuple(dict.fromkeys(scene.notes)), clock=clock)
    if device.type != "meta" and not any(parameter.is_meta for parameter in model.parameters()):
        for name, buffer in plan.buffers().items():
            if buffer.is_meta:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, torch.empty_like(buffer, device=device))
        plan.reset_state()
    return plan


@contextmanager
def _whole_or_not(model: nn.Module) -> Iterator[None]:
    """Have the modules of ``model`` be what they were, if an error ends what is done within."""
    own = ("forward", "plan_row")  # what a rule may put on a module that stays
    before = [
        (module, dict(module._modules), {name: vars(module)[name] for name in own if name in vars(module)})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, children, attributes in before:
            module._modules.clear()
            module._modules.update(children)
            for name in own:
                vars(module).pop(name, None)
            vars(module).update(attributes)
        raise


def _leave_fast_paths(model: nn.Module) -> None:
    """Have torch's own transformer layers call their linears in evaluation, too, where they would read weights."""
    for module in model.modules():
        if not any(isinstance(inner, QuantLinear) for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_nothing)  # with a hook there is no fast path
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _nothing(module: nn.Module, inputs: Any) -> None:
    pass


def _by_step(recipe: Recipe, model: nn.Module) -> str:
    """What of a recipe in a model goes by the step, in words; nothing if nothing does."""
    specs = {spec for module in model.modules() if isinstance(module, QuantLinear) for spec in module.specs}
    operands = [
        operand for spec in specs for gemm in (spec.fprop, spec.dgrad, spec.wgrad) for operand in (gemm.a, gemm.b)
    ]
    random = any(operand is not None and is_random(operand) for operand in operands)
    parts = ["rounding noise"] * random + ["the schedule"] * bool(recipe.schedule)
    return " and ".join([*parts, *(f"what a step does ({hook})" for hook in recipe.hooks)])


def _specs(phase: Phase, scene: _Scene) -> dict[str, LinearSpec]:
    """What the rules of a phase would make of the linears of a model that is still plain."""
    specs: dict[str, LinearSpec] = {}
    for rule in phase.rules:
        for path, module in scene.chosen(rule):
            made = rule.make(module, path)
            if not isinstance(made, QuantLinear):
                raise ValueError(
                    f"schedule: {phase.name} makes a {type(made).__name__} of {path}: no step can switch that"
                )
            specs.setdefault(path, made.spec)
    return specs


@dataclass(frozen=True, slots=True)
class _Scene:
    """A model that rules are applied to, and what they left alone.

    By path: ``kept``, which selector wants a linear in high precision; ``reasons``, why another is not quantized.
    ``notes``: lines of the plan.
    """

    model: nn.Module
    blocks: Blocks
    paths: list[str]  # regexes of the linears to choose, in place of those of the blocks
    unreached: frozenset[str]  # linears whose weights are read by another module, which does not call them
    reasons: dict[str, str]
    kept: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, paths: list[str]) -> _Scene:
        """Raises ValueError for a model that is quantized already or is a single linear, and for a pattern of
        ``paths`` that is none or matches no linear."""
        if isinstance(model, nn.Linear):
            raise ValueError(
                "the model is itself a Linear, which has no place to be replaced in: wrap it, as nn.Sequential(linear)"
            )
        linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        before = next((path for path, module in model.named_modules() if isinstance(module, QuantLinear)), None)
        if before is not None:
            raise ValueError(
                f"the model is quantized already ({before or 'it'} is a QuantLinear): a recipe goes into a plain model"
            )
        computed = next((path for path, linear in linears.items() if not isinstance(linear.weight, nn.Parameter)), None)
        if computed is not None:
            raise ValueError(f"{computed}: its weight is computed, as by a parametrization: no recipe takes it over")
        for pattern in paths:
            try:
                found = any(re.fullmatch(pattern, path) for path in linears)
            except re.error as error:
                raise ValueError(f"paths={pattern!r}: not a regular expression: {error}") from error
            if not found:
                raise ValueError(f"paths={pattern!r} matches no Linear{close(pattern, linears)}; {_there(linears)}")
        unreached = {
            f"{path}.out_proj" if path else "out_proj"
            for path, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
        }
        reasons = dict.fromkeys(unreached, "read, not called, by nn.MultiheadAttention")
        return cls(model, find_blocks(model), paths, frozenset(unreached), reasons)

    def places(self, module: nn.Module) -> list[str]:
        """All paths of a module, of which the model may hold one object several times."""
        return [path for path, other in self.model.named_modules(remove_duplicate=False) if other is module]

    def chosen(self, rule: Rule) -> list[tuple[str, nn.Module]]:
        """What ``rule`` replaces. Raises ValueError if it, or a part of what it keeps, matches nothing."""
        of_kind = [
            (path, module)
            for path, module in self.model.named_modules()
            if isinstance(module, rule.kind) and path not in self.unreached
        ]
        matched = [
            (path, module)
            for path, module in of_kind
            if self._matches(rule, path) and self._has_siblings(rule, path) and _has_all(rule.children, module)
        ]
        if rule.optional and not matched:
            return []
        kinds = sorted(path for path, _ in of_kind)
        # By name: `transformers` is not imported for an error. Its GPT-2 keeps weights the other way round.
        other = sum(type(module).__name__ == "Conv1D" for module in self.model.modules())
        in_blocks = rule.path is Where.BLOCKS
        if not matched or (in_blocks and not self.paths and other and not self.blocks.stacks):
            beside = f" beside {' and '.join(rule.siblings)}" if rule.siblings else ""
            hint = f"; {other} Conv1D with transposed weights, as in GPT-2 of `transformers`, are not converted"
            near = "" if isinstance(rule.path, Where) else close(rule.path, kinds)
            raise ValueError(
                f"the rule {'for the blocks' if in_blocks else repr(rule.path)} matches no {rule.kind.__name__}{beside}"
                f"{near}; {_there(kinds)}" + (hint if other else "")
            )
        if in_blocks and not self.paths and len(self.blocks.stacks) != 1:
            self.notes.append(str(self.blocks))
        self._settle_kept(rule, matched, of_kind)
        chosen = []
        for path, module in matched:
            keeps = [selector for selector in rule.keep if selector.matches(path, module, self.blocks.of(path))]
            if keeps:
                self.kept.setdefault(path, str(keeps[0]))
            else:
                chosen.append((path, module))
        if not chosen:
            raise ValueError(
                f"all {len(matched)} linears in {self.blocks.total} blocks are to be kept in high precision "
                f"({'; '.join(map(str, rule.keep))}): nothing is left for the recipe"
            )
        if in_blocks:
            outside = "not named by paths" if self.paths else OUTSIDE
            for path, _ in of_kind:
                self.reasons.setdefault(path, outside)
        return chosen

    def _settle_kept(
        self, rule: Rule, matched: list[tuple[str, nn.Module]], of_kind: list[tuple[str, nn.Module]]
    ) -> None:
        for selector in rule.keep:
            if any(selector.matches(path, module, self.blocks.of(path)) for path, module in matched):
                continue
            already = [path for path, module in self.model.named_modules() if selector.names(path, module)]
            linears = [path for path in already if isinstance(self.model.get_submodule(path), nn.Linear | rule.kind)]
            if linears:
                self.notes.append(f"to keep in high precision: {selector}: {linears[0]} is in high precision already")
                continue
            kinds = sorted(path for path, _ in of_kind)
            near = close(selector.path, kinds) if selector.path is not None else ""
            raise ValueError(
                f"to keep in high precision: {selector} matches no {rule.kind.__name__}{near}; {_there(kinds)}"
            )

    def _matches(self, rule: Rule, path: str) -> bool:
        if not isinstance(rule.path, Where):
            return re.fullmatch(rule.path, path) is not None
        if self.paths:
            return any(re.fullmatch(pattern, path) for pattern in self.paths)
        return self.blocks.of(path) is not None

    def _has_siblings(self, rule: Rule, path: str) -> bool:
        return _has_all(rule.siblings, self.model.get_submodule(path.rpartition(".")[0]))


def _there(paths: Iterable[str]) -> str:
    found = sorted(paths)
    return f"there are {len(found)}, the first: {', '.join(found[:3]) or 'none'}"


def _has_all(names: Iterable[str], module: nn.Module) -> bool:
    there = dict(module.named_children())
    return all(name in there for name in names)


_T = TypeVar("_T")


def one_of(name: str, value: str, choices: Mapping[str, _T]) -> _T:
    """The choice called ``value``. Raises ValueError naming the argument and the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value}: one of {', '.join(choices)}{close(str(value), choices)}")
    return choices[value]


def current(amax: str) -> Current:
    """What the argument ``amax`` of a recipe says: micro or step. Raises ValueError for another word."""
    return one_of("amax", amax, {"micro": Current(), "step": Current(step=True)})


def fast_sums(value: bool | str) -> bool | None:
    """``GemmSpec.fast_accum`` of a recipe's argument: true, false or auto. Raises ValueError for another word."""
    return value if isinstance(value, bool) else one_of("fast_accum", value, {"auto": None})
