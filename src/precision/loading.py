"""Where recipes come from: ``precision.recipes``, installed packages, and files of a user.

An installed package names its own in the entry-point group ``narrowgauge.recipes``: name -> module, or module:function.
A user's file is named by its path, which ends in ``.py``. It is Python: to load it is to run it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from . import recipes

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
        return _function(_module(name), name)
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


def _read(name: str) -> bytes:
    path = Path(name).expanduser()
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"recipe file {name}: it is no file")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"recipe file {name}: {error.strerror or error}") from error


_MODULES: dict[str, ModuleType] = {}
"""Files that were run, by content and name: what is loaded twice is the same, as types are compared."""


def _module(name: str) -> ModuleType:
    content = _read(name)
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
