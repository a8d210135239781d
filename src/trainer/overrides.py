"""The command line: Hydra's grammar, but that text is what was typed, and a mistake is one line with the way out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from functools import cache
from itertools import zip_longest
from typing import Any, get_args, get_type_hints

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from .data.config import SourceConfig
from .environ import require_text, unquoted
from .errors import UserError, one_line
from .model import MODEL_SCHEMAS, OWN_SCHEMAS
from .own import CONFIG_DIR, EXPERIMENT
from .schema import TrainConfig

SOURCES = "data.sources"
_NAMED = tuple(MODEL_SCHEMAS.values())
_FLAGS = {"learning_rate": "optim.lr", "batch_size": "data.global_batch_size", "max_steps": "train.steps"}
_FLAGS |= {"output_dir": "run.dir", "resume": "run.dir"}  # what other trainers call them


def groups() -> dict[str, list[str]]:
    """Config groups and the choices of each."""
    return {
        directory.name: sorted(file.stem for file in directory.glob("*.yaml"))
        for directory in sorted(CONFIG_DIR.iterdir())
        if directory.is_dir() and directory.name not in ("sweep", EXPERIMENT)  # grids of trainer.sweep; of any keys
    }


def parse(overrides: Sequence[str], *, several: bool = True) -> list[Override]:
    """Overrides in Hydra's grammar, but that the value of a key of text is the text that was typed.

    ``several``: a comma or a function separates the values of several runs. Raises UserError for what is no override.
    """
    parsed = []
    for text in overrides:
        require_text(text)
        if text.startswith("-"):
            raise UserError(flag_hint(text))
        try:
            parsed.append(_parse_one(_as_typed(text, several)))
        except HydraException as error:
            key, separator, value = text.partition("=")
            hint = "" if separator else "; write key=value"
            if separator and isinstance(_kind(key), _Text):
                line = f"{key}={QuotedString(value, Quote.double).with_quotes()}"
                hint = f"; among several runs such text is quoted: {shlex.quote(line)}"
            raise UserError(f"{text!r} is not an override{hint} ({one_line(error).split(' See https')[0]})") from error
    return parsed


def _parse_one(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def _as_typed(text: str, several: bool) -> str:
    """An override such that Hydra's grammar gives the value that its key's type wants.

    Text stays as it was typed, without quotes round all of it; a whole number may be written as 1e3, a list of one or
    more names without brackets.
    """
    key, separator, value = text.partition("=")
    kind = _kind(key) if separator else None
    if value.startswith("{") and not isinstance(kind, _Text):
        return f"{key}={_mapping_as_typed(key.lstrip('+'), value)}"
    if kind == list[str] and not value.startswith("[") and not (several and "," in value):
        return f"{key}=[{value}]"
    if kind is int and re.fullmatch(r"[+-]?[\d_]*\.?[\d_]*([eE][+-]?\d+)?", value):
        found = _parse_one(text).value()
        return f"{key}={int(found)}" if isinstance(found, float) and found.is_integer() else text
    if not isinstance(kind, _Text) or (kind.optional and value == "null"):
        return text
    if several:
        return _several_as_typed(key, value)
    text = unquoted(value)
    if text == "???":
        raise UserError(f"{key}=???: this is how a config marks what is missing; write another text")
    return f"{key}={_quoted(text)}"


def _mapping_as_typed(key: str, value: str) -> str:
    """Texts in a mapping without any quotes: those that Hydra would read as something else are quoted."""
    of = SourceConfig if key.startswith(SOURCES) else TrainConfig
    leaves = {name: kind for name, kind in kinds(of).items() if of is SourceConfig or name.startswith(f"{key}.")}
    names = [name.rpartition(".")[2] for name, kind in leaves.items() if isinstance(kind, _Text)]
    if not names or "'" in value or '"' in value:
        return value

    def quoted(found: re.Match[str]) -> str:
        same = found[2] == "null" or isinstance(_parse_one(f"{key}={found[2]}").value(), str)
        return found[0] if same else f"{found[1]}{_quoted(found[2])}"

    return re.sub(rf"(\b(?:{'|'.join(names)})\s*:\s*)([\w.+-]+)(?=\s*[,}}])", quoted, value)


def _several_as_typed(key: str, value: str) -> str:
    override = _parse_one(f"{key}={value}")
    if not override.is_sweep_override():
        return f"{key}={value if isinstance(override.value(), str) else _quoted(value)}"
    if re.search(r"""['"()\[\]{}\\$]""", value):
        return f"{key}={value}"
    parts = [part.strip() for part in value.split(",")]
    return f"{key}={','.join(p if isinstance(_parse_one(f'{key}={p}').value(), str) else _quoted(p) for p in parts)}"


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


@dataclass(frozen=True)
class _Text:
    """The type of a key whose value is text, or null."""

    optional: bool = False


def _kind(key: str) -> Any:
    """What ``key`` holds: ``_Text``, int, list[str], another type; None for a key that there is not."""
    key = key.lstrip("+")
    if key.startswith(f"{SOURCES}."):
        return kinds(SourceConfig).get(key.rpartition(".")[2])
    return kinds(TrainConfig).get(key)


def kinds(schema: type) -> dict[str, Any]:
    """The types of the leaves of a dataclass by dotted keys, without ``| None``."""
    return _kinds(schema, (*MODEL_SCHEMAS.values(), *OWN_SCHEMAS.values()))


@cache
def _kinds(schema: type, models: tuple[type, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {"hydra.sweep.dir": _Text()} if schema is TrainConfig else {}
    for name, hint in get_type_hints(schema).items():
        optional = type(None) in get_args(hint)
        kind = next(one for one in get_args(hint) if one is not type(None)) if optional else hint
        parts = models if (schema, name) == (TrainConfig, "model") else [kind]
        for part in parts:
            if is_dataclass(part):
                found |= {f"{name}.{key}": value for key, value in _kinds(part, models).items()}
            else:
                found[name] = _Text(optional) if part is str else part
    return found


def check_flags(arguments: Sequence[str]) -> None:
    """Raises UserError for an option that Hydra does not have."""
    options = [option for action in get_args_parser()._actions for option in action.option_strings]
    for text, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name = text.partition("=")[0]
        known = any(one.startswith(name) for one in options) if name.startswith("--") else name[:2] in options
        if name.startswith("-") and not known and len(name) > 1:
            raise UserError(flag_hint(text, None if "=" in following or following.startswith("-") else following))


def flag_hint(text: str, value: str | None = None) -> str:
    """What to write instead of ``--lr 1e-3`` or ``--lr=1e-3``."""
    name, _, own = text.lstrip("-").partition("=")
    name = name.replace("-", "_")
    keys = sorted(kinds(TrainConfig))
    last = {key: key.rpartition(".")[2] for key in keys}
    meant = _FLAGS.get(name) or name
    near = [meant] if meant in groups() else [key for key in keys if meant in (key, last[key])]
    near = near or [key for key in keys if last[key].endswith(meant)]
    near = near or get_close_matches(meant, keys, 1) or [key for key in keys if get_close_matches(meant, [last[key]])]
    shown = own or value or "VALUE"
    ways = f"write {' or '.join(f'{key}={shown}' for key in near[:3])}" if near else "write key=value"
    return f"{text.partition('=')[0]!r} is no option: {ways}"


def is_hydra(override: Override) -> bool:
    return override.key_or_group.split(".")[0].split("/")[0] == "hydra"


def for_compose(overrides: Iterable[Override]) -> list[str]:
    """The overrides for Hydra, which takes away only what is there: an argument that no yaml names is added first."""
    lines = []
    for override in overrides:
        if re.fullmatch(r"~precision\.args\.[^=]+", override.input_line or ""):
            lines.append(f"++{override.key_or_group}=0")
        lines.append(compose_line(override))
    return lines


def compose_line(override: Override) -> str:
    """One override for Hydra."""
    line = override.input_line or ""
    if line.startswith(f"{SOURCES}."):  # OmegaConf makes no new source from a dotted key, but merges one
        path, _, value = line.partition("=")
        names = path.removeprefix(f"{SOURCES}.").split(".")
        line = f"{SOURCES}={''.join(f'{{{name}:' for name in names)}{value}{'}' * len(names)}"
    # A recipe's signature and a rule's fields are schemas: the yaml need not name all of them; sources have any names.
    if override.key_or_group == EXPERIMENT:  # no part of the config: it is added, whether or not that is said
        return f"+{line.lstrip('+')}"
    opened = ("precision.args.", "precision.args=", "optim.update_args.", "optim.update_args=", SOURCES)
    # A model's own file is the schema of its keys (``config.with_model``), which no schema that Hydra knows has.
    own = override.key_or_group.startswith("model.") and override.key_or_group not in _kinds(TrainConfig, _NAMED)
    return f"++{line.lstrip('+')}" if own or line.lstrip("+").startswith(opened) else line
