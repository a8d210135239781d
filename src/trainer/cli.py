"""What every script shares: key=value arguments of its own besides Hydra overrides, --help, errors in one line."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .environ import check_environment, forgive_console, require_text, unquoted
from .errors import ExitCode, UserError, one_line

_FILES = ("precision.recipe", "model.arch")


def script_main(main: Callable[..., Any], doc: str | None) -> None:
    """Run ``main(overrides, **own)`` and exit.

    The keyword-only parameters of ``main`` are the script's own ``key=value`` arguments, typed by their defaults;
    everything else goes to ``overrides``.
    """
    forgive_console()
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print((doc or "").strip())
        sys.exit(ExitCode.FINISHED)
    try:
        check_environment()
        for argument in arguments:
            require_text(argument)
        own, overrides = _split(main, arguments)
        code = main(overrides, **own)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(ExitCode.BAD_INPUT)
    except OSError as error:  # of a path that cannot be, or a disk
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(ExitCode.FAILED)
    sys.exit(code or ExitCode.FINISHED)


def _split(main: Callable[..., Any], arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    parameters = {p.name: p.default for p in inspect.signature(main).parameters.values() if p.kind is p.KEYWORD_ONLY}
    own: dict[str, Any] = {}
    overrides = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="VALUE"):
        key, separator, value = argument.partition("=")
        name = key.lstrip("-").replace("-", "_")
        if key.startswith("--") and (name in parameters or name == "run.dir"):
            raise UserError(f"{key!r} is no option: write {name}={value or following}")
        if key not in parameters or not separator:
            overrides.append(argument)
            continue
        kind = type(parameters[key])
        try:
            own[key] = kind(value)
        except ValueError as error:
            raise UserError(f"{argument}: {key} must be a {kind.__name__}") from error
    return own, overrides


def recipe_files_of(arguments: list[str]) -> list[str]:
    """The values of ``precision.recipe=...`` and ``model.arch=...``: the files of the run, which may then be run."""
    values = [value for key, _, value in (argument.partition("=") for argument in arguments) if key in _FILES]
    return [unquoted(value) for value in values]


def run_dir_of(arguments: list[str]) -> Path:
    """The value of ``run.dir=...``, the one argument besides the script's own and those that name files of the run.

    It is read as the trainer reads it.

    Raises UserError if it is missing or if there is another.
    """
    values = dict(argument.partition("=")[::2] for argument in arguments)
    if unknown := sorted(values.keys() - {"run.dir", *_FILES}):
        raise UserError(f"unknown argument {unknown[0]!r}; --help shows the ones there are")
    if not (directory := unquoted(values.get("run.dir", ""))):
        raise UserError("run.dir=... is missing: the directory of a run")
    return Path(directory)
