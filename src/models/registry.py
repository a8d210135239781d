"""Which models there are: the directory is the registry. A file with a config derived from ``DecoderConfig`` is one."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from types import ModuleType

from .config import DecoderConfig


@functools.cache
def architectures() -> dict[str, type[DecoderConfig]]:
    """``model.arch`` -> the config that describes it: of every file of this folder that defines a model."""
    path = sys.modules[__package__].__path__
    names = sorted(module.name for module in pkgutil.iter_modules(path) if not module.ispkg)
    modules = {name: importlib.import_module(f"{__package__}.{name}") for name in names}
    return {name: config for name, module in modules.items() if (config := config_in(module)) is not None}


def config_in(module: ModuleType) -> type[DecoderConfig] | None:
    """The public class derived from ``DecoderConfig`` that a file defines; None for none.

    Raises ValueError for several.
    """
    found = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, DecoderConfig) and not name.startswith("_")
        if value.__module__ == module.__name__ and value is not DecoderConfig
    ]
    if len(found) > 1:
        names = " and ".join(one.__name__ for one in found)
        raise ValueError(f"{names} are derived from DecoderConfig: one file is one model, others begin with _")
    return found[0] if found else None
