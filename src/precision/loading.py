"""Where recipes come from, and ``load``: ``precision.recipes``, installed packages, and files of a user.

An installed package names its own in the entry-point group ``narrowgauge.recipes``: name -> module, or module:function.
A user's file is named by its path, which ends in ``.py``. It is Python: to load it is to run it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import math
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from . import recipes
from .recipe import NO_ARGUMENTS, Keep, Phase, Recipe, keep
from .schedule import parse_span
from .spec import GEMMS
from .suggest import close

ENTRY_POINTS = "narrowgauge.recipes"


def names() -> list[str]:
    """The recipes of this package: the modules of ``precision.recipes``."""
    return sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))


def available() -> list[str]:
    """All recipes that are known by name: of this package, and of installed ones."""
    return sorted({*names(), *(point.name for point in _points())})


def is_file(name: str) -> bool:
    """Whether the name of a recipe is that of a user's file."""
    return name.endswith(".py")


def make_of(name: str) -> Callable[..., Any] | None:
    """The function that makes the recipe; None for an unknown name.

    Raises ValueError for a file that cannot be read or run or has no such function, with file and line.
    """
    if is_file(name):
        return _function(module_of(name), name)
    if name in names():
        return _function(importlib.import_module(f"{recipes.__name__}.{name}"), name)
    for point in _points():
        if point.name == name:
            found = guarded(f"recipe {name!r} of {point.value}", point.load)
            return _function(found, name) if isinstance(found, ModuleType) else found
    return None


def guarded(where: str, call: Callable[[], Any]) -> Any:
    """What ``call``, somebody's own code, gives. Its errors are ValueErrors of one line, with the line that raised.

    ``where``: the file it is in, or other words for it.
    """
    try:
        return call()
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == where]
        text = str(error)
        if isinstance(error, SyntaxError):
            lines, text = [error.lineno] if error.filename == where else lines, error.msg
        place = f"{where}:{lines[-1]}" if lines else where
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{place}: {kind}{' '.join(text.split())}") from error


def sha256(name: str) -> str:
    """Of the content of a recipe's file. Raises ValueError for one that cannot be read."""
    return hashlib.sha256(_read(name)).hexdigest()


def files_in(value: Any) -> Iterator[str]:
    """The recipe files that a recipe's name or arguments, or the phases of a schedule, name."""
    if isinstance(value, str) and is_file(value):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from files_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):  # of phases; regexes of paths are no names
        for item in value:
            yield from files_in(item) if isinstance(item, Mapping) else ()


def content_of(name: str) -> str:
    """A name for what a recipe's file holds, wherever it lies. Raises ValueError as ``sha256`` does."""
    return f"sha256:{sha256(name)}.py"


def renamed(value: Any, name: Callable[[str], str]) -> Any:
    """``value`` with every file of ``files_in`` named as ``name`` says."""
    if isinstance(value, str) and is_file(value):
        return name(value)
    if isinstance(value, Mapping):
        return {key: renamed(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [renamed(item, name) if isinstance(item, Mapping) else item for item in value]
    return value


def _points() -> list[importlib.metadata.EntryPoint]:
    return sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda point: point.name)


def _read(name: str, what: str = "recipe") -> bytes:
    path = Path(name).expanduser()
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{what} file {name}: it is no file")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{what} file {name}: {error.strerror or error}") from error


_MODULES: dict[str, ModuleType] = {}
"""Files that were run, by content and name: what is loaded twice is the same, as types are compared."""


def module_of(name: str, what: str = "recipe") -> ModuleType:
    """A user's file, run once. Raises ValueError, with file and line, for one that cannot be read or run."""
    content = _read(name, what)
    path = str(Path(name).expanduser())
    digest = hashlib.sha256(content + path.encode()).hexdigest()[:16]
    if digest not in _MODULES:
        module = ModuleType(f"narrowgauge_recipe_{digest}")
        module.__file__ = path
        sys.modules[module.__name__] = module  # where dataclasses and annotations look
        try:
            guarded(path, lambda: exec(compile(content, path, "exec", dont_inherit=True), module.__dict__))
        except ValueError:
            del sys.modules[module.__name__]
            raise
        _MODULES[digest] = module
    return _MODULES[digest]


def _function(module: ModuleType, name: str) -> Callable[..., Any]:
    make = getattr(module, "recipe", None)
    if not callable(make):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        where = name if is_file(name) else f"recipe {name!r} ({module.__name__})"
        raise ValueError(f"{where}: it has no function recipe(...) -> Recipe; it has: {', '.join(there) or 'none'}")
    found: Callable[..., Any] = make
    return found


def load(name: str, args: Mapping[str, Any] = NO_ARGUMENTS, schedule: Sequence[Any] = ()) -> Recipe:
    """The recipe of this name with these arguments; its signature is the schema.

    ``name``: one of ``available``, or the path of a file, which ends in ``.py`` and has a function ``recipe``: it is
    run.
    ``schedule``: phases in addition to the recipe's own, as ``scheduled`` reads them.
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
      counts, and it must compute in the same dtypes; what it remembers is held throughout the run.

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
    call = f"{name}({', '.join(f'{key}={value}' for key, value in args.items())})" if args else str(name)
    return replace(phase, rules=other.rules, name=call), other


_ENDS = ("first", "last")


@dataclass(frozen=True, slots=True)
class _Signature:
    """A recipe's arguments as users spell them: a ``tuple[Keep, ...]`` called x is x_first, x_last and x_paths.

    By name: the types, and the defaults of those that have one. ``selectors``: by parameter.
    """

    make: Callable[..., Any]
    hints: dict[str, Any]
    defaults: dict[str, Any]
    selectors: dict[str, tuple[Keep, ...]]

    @classmethod
    def of(cls, make: Callable[..., Any]) -> _Signature:
        """Raises what evaluating the annotations raises."""
        annotations = get_type_hints(getattr(make, "func", make))
        found = cls(make, {}, {}, {})
        for name, parameter in inspect.signature(make).parameters.items():
            default = parameter.default
            if annotations.get(name) == tuple[Keep, ...]:
                found.selectors[name] = default = () if default is parameter.empty else default
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
        for name, default in self.selectors.items():
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
