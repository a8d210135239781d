"""The user's own configs: a directory of groups next to ours, and a complete file in place of ``configs/train.yaml``.

They travel as flags among the overrides, so that whoever hands arguments on hands these on too.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..precision.suggest import close
from .errors import UserError, one_line

_HERE = Path(__file__).resolve().parent
#: In a checkout next to ``src``, in an installed package within it.
CONFIG_DIR = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parents[1] / "configs"
EXPERIMENT = "experiment"
SCHEME = "own"
_FLAGS = {
    "--config-dir": "directory", "-cd": "directory",
    "--config-name": "file", "-cn": "file", "--config": "file",
}  # fmt: skip
ENTRY = "own_entry"
_MOST_BYTES = 1 << 20  # of a yaml; the config.yaml of a run has some 4,000
_NO_TEXT = ("null", "true", "false", "nan", "inf")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where configs come from besides ``configs/``."""

    directory: Path | None = None  # of groups, searched before ours
    file: Path | None = None  # the entry config

    @property
    def directories(self) -> list[Path]:
        """What is searched for a group's files, in this order."""
        return [CONFIG_DIR] if self.directory is None else [self.directory, CONFIG_DIR]

    @property
    def flags(self) -> list[str]:
        """As arguments."""
        paths = {"--config-dir": self.directory, "--config-name": self.file}
        return [f"{flag}={path}" for flag, path in paths.items() if path is not None]

    def choices(self, group: str) -> list[str]:
        """The names of the yamls of a group."""
        return sorted({file.stem for place in self.directories for file in (place / group).glob("*.yaml")})

    def find(self, group: str, name: str) -> Path | None:
        """The yaml of a choice."""
        files = (place / group / f"{name}.yaml" for place in self.directories)
        return next((file for file in files if file.is_file()), None)


NOWHERE = Place()


def split(arguments: Sequence[str]) -> tuple[Place, list[str]]:
    """The flags among the arguments, and the rest: ``--config-dir=DIR``, ``--config-name=FILE``, or ``FILE.yaml``.

    Raises UserError for a directory or file that is not there, or more than one of them.
    """
    found: dict[str, list[str]] = {"directory": [], "file": []}
    rest = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, separator, value = argument.partition("=")
        if flag in _FLAGS:
            value = value if separator else next(remaining, "")
            if not value:
                raise UserError(f"{flag} needs a path: {flag}=PATH")
            found[_FLAGS[flag]].append(value)
        elif "=" not in argument and argument.endswith((".yaml", ".yml")):
            found["file"].append(argument)
        else:
            rest.append(argument)
    for paths in found.values():
        if len(paths) > 1:
            raise UserError(f"{paths[0]} and {paths[1]}: one at a time")
    directory = Path(found["directory"][0]) if found["directory"] else None
    if directory is not None and not directory.is_dir():
        raise UserError(f"--config-dir={directory}: no such directory")
    file = _find_entry(found["file"][0], directory) if found["file"] else None
    return Place(directory=directory, file=file), rest


def _find_entry(name: str, directory: Path | None) -> Path | None:
    if name == "train" and (directory is None or not (directory / "train.yaml").is_file()):
        return None
    places = [Path(), *([] if directory is None else [directory])]
    for place in places:
        for file in (place / name, place / f"{name}.yaml"):
            if file.is_file():
                return file
    known = [file.stem for file in directory.glob("*.yaml")] if directory is not None else []
    where = f", and {directory} has no {name}.yaml{close(name, known)}" if directory is not None else ""
    raise UserError(f"{name}: no such file{where}; --config-name takes the path of a yaml")


@contextmanager
def hydra_at(place: Place) -> Iterator[Hydra]:
    """Hydra, with the user's directory in its search path before ours."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        if place.directory is not None:
            GlobalHydra.instance().clear()
            path = create_config_search_path(str(CONFIG_DIR))
            path.prepend("own", f"{SCHEME}://{place.directory.resolve()}", anchor="main")
            Hydra.create_main_hydra2("app", path)
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        yield hydra


def entry(place: Place, chosen: Sequence[str], groups: Sequence[str]) -> str:
    """The name of the entry config for Hydra. ``chosen``: the groups that the command line chooses.

    A file without a defaults list, such as the ``config.yaml`` of a run, says values: it is laid over
    ``configs/train.yaml``, but for the groups that the command line chooses.
    """
    if place.file is None:
        return "train"
    tree: dict[str, Any] = OmegaConf.to_container(read_own(place.file), resolve=False)  # type: ignore[assignment]
    defaults = tree.pop("defaults", None)
    if defaults is not None and not isinstance(defaults, list):
        raise UserError(f"{place.file}: defaults must be a list")
    if defaults is None:
        tree = {key: value for key, value in tree.items() if key not in chosen}
    if not any(item in ("train", "train_schema") for item in defaults or []):
        defaults = ["train", *(_overriding(item, groups) for item in defaults or [])]
        for group in groups:
            if isinstance(tree.get(group), str):  # a choice
                defaults.append({f"override /{group}": tree.pop(group)})
        model = tree.get("model")
        if isinstance(model, dict) and isinstance(model.get("arch"), str):
            arch = "own" if model["arch"].endswith(".py") else model["arch"]
            defaults.insert(1, {"override /model": f"{arch}_schema"})
    if "_self_" not in defaults:
        defaults.append("_self_")
    ConfigStore.instance().store(name=ENTRY, node={"defaults": defaults, **tree})
    return ENTRY


def _overriding(item: Any, groups: Sequence[str]) -> Any:
    if isinstance(item, dict):
        return {f"override /{key}" if key in groups else key: value for key, value in item.items()}
    return item


def text_of(file: Path) -> str:
    """What a yaml holds, which may be anybody's. Raises OSError, and ValueError for what is no file or beyond size."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("no file")
    if found.st_size > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES:,} bytes")
    return file.read_text(encoding="utf-8")


def read_own(file: Path) -> DictConfig:
    """A yaml of the user's. Raises UserError if it cannot be read, or would have something executed."""
    try:
        tree = OmegaConf.load(io.StringIO(text_of(file)))
        if not isinstance(tree, DictConfig):
            raise ValueError("no key: value in it")
        if "_target_" in keys_of(OmegaConf.to_container(tree, resolve=False)):
            raise ValueError("it has a key _target_: a config names things, it never executes them")
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    return tree


def setting(key: str, value: Any) -> str:
    """``key=value`` such that Hydra's grammar and OmegaConf read ``value`` back as it is."""
    return f"{key}={_written(value)}"


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_written(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z/][\w./-]*", value, re.ASCII) and value.lower() not in _NO_TEXT:
            return value
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # no interpolation
        return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text) + "'"
    return str(value) if isinstance(value, float) else json.dumps(value)  # null, true, false


def shell(arguments: Sequence[str]) -> str:
    """A line that a POSIX shell takes apart into ``arguments``, or into what the trainer reads alike."""
    return " ".join(map(_shell_quoted, arguments))


def _shell_quoted(text: str) -> str:
    if re.fullmatch(r"run\.dir='[\w./=,+-]*'", text, re.ASCII):  # a text is what was typed: one pair of quotes will do
        return text
    plain = shlex.quote(text)
    return f'"{text}"' if plain != text and not re.search(r'[$`"\\!]', text) else plain


def keys_of(tree: Any) -> Iterator[Any]:
    """All keys in nested mappings and lists."""
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from keys_of(item)
    if isinstance(tree, dict):
        yield from tree
