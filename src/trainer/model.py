"""The ``model`` part of a config: which schema it has, and which file of a user may run for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import field, fields, make_dataclass
from typing import Any

from ..models import DecoderConfig, architectures, config_in
from ..precision.loading import content_of, is_file, module_of, sha256
from ..precision.suggest import close

ModelConfig = DecoderConfig
#: ``model.arch`` -> the schema of the ``model`` group: the models of this package.
MODEL_SCHEMAS: dict[str, type[ModelConfig]] = architectures()
#: Those of users' files that were run.
OWN_SCHEMAS: dict[str, type[ModelConfig]] = {}


def schema_of(arch: str) -> type[ModelConfig]:
    """The schema of ``model.arch``: a name, or the path of a user's file, which ends in ``.py`` and is run.

    Raises ValueError for an unknown name, a file that cannot be run, and one that defines no model.
    """
    if not is_file(arch):
        if arch not in MODEL_SCHEMAS:
            known = ", ".join(MODEL_SCHEMAS)
            raise ValueError(f"model.arch={arch}: no such model{close(arch, MODEL_SCHEMAS)}; there are: {known}")
        return MODEL_SCHEMAS[arch]
    found = config_in(module_of(arch, "model"))
    if found is None:
        raise ValueError(f"{arch}: it has no class derived from narrowgauge.models.DecoderConfig, so it is no model")
    OWN_SCHEMAS[arch] = found
    return found


class UnreadConfig(ModelConfig):
    """Values of a model whose file is not run: to be read, not to be built."""


def unread_schema(keys: Iterable[str]) -> type[UnreadConfig]:
    """A schema of any values that has these keys, too."""
    common = {field.name for field in fields(ModelConfig)}
    own = [(str(key), Any, field(default=None)) for key in keys if key not in common]
    return make_dataclass("Unread", own, bases=(UnreadConfig,), kw_only=True)


def model_files(config: ModelConfig) -> list[str]:
    """The user's file of the model, if it is in one."""
    return [config.arch] if is_file(config.arch) else []


def said_file(arch: str, content: str | None, said: Iterable[str]) -> str:
    """``arch``, or, for a file, that of ``said`` which holds what it held: ``content``, as ``content_of`` says it.

    Raises ValueError if there is none.
    """
    if not is_file(arch):
        return arch
    there = {content_of(file): file for file in said if is_file(file)}
    if content not in there:
        held = str(content).removesuffix(".py").replace(":", " ")
        raise ValueError(f"a model file ({held}), which is Python and runs only if the command line names it")
    return there[content]


def require_said(arch: str, said: Collection[str]) -> None:
    """Raises ValueError for a model file that the command line, which says ``said``, does not name."""
    if is_file(arch) and arch not in said:
        raise ValueError(
            f"model.arch names the model file {arch} (sha256 {sha256(arch)}): it is Python, and runs only if the "
            f"command line says model.arch={arch}"
        )
