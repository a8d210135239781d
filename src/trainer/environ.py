"""What a process is started with: the variables of a launcher, a console, arguments. Looked at before anything else."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Mapping

from .errors import UserError

_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # any of them says that there is a launcher
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = (*_RANKS, "LOCAL_WORLD_SIZE", "MASTER_PORT")


def check_environment(variables: Mapping[str, str] = os.environ) -> None:
    """Raises UserError if a launcher's variables are there in part, or say what cannot be."""
    given = {name: variables[name] for name in _NUMBERS if name in variables}
    shown = ", ".join(f"{name}={value}" for name, value in given.items() if value.isprintable())
    ways = "unset them, or start with torchrun, which sets them all"
    launched = any(name in given for name in _RANKS)
    if launched and (missing := [name for name in _NEEDED if variables.get(name, "") == "" and name not in given]):
        raise UserError(f"the environment has {shown}, but no {', no '.join(missing)}: {ways}")
    for name, value in given.items():
        if (launched or name == "LOCAL_WORLD_SIZE") and re.fullmatch(r"\d{1,9}", value, re.ASCII) is None:
            raise UserError(f"the environment has {name}={value!a}, which is no whole number: {ways}")
    least = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
    most: dict[str, int] = {}
    if launched:
        size = int(given["WORLD_SIZE"])
        local = int(given.get("LOCAL_WORLD_SIZE", size))
        most = {"RANK": size - 1, "LOCAL_WORLD_SIZE": size, "LOCAL_RANK": local - 1, "MASTER_PORT": 65535}
    for name, value in given.items():
        number = int(value) if launched or name == "LOCAL_WORLD_SIZE" else 1
        if not least.get(name, 0) <= number <= most.get(name, number):
            raise UserError(f"the environment has {shown}, where {name}={number} cannot be: {ways}")


def forgive_console() -> None:
    """Have standard output and standard error replace what they cannot show: a locale may lack most characters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def require_text(argument: str) -> None:
    """Raises UserError for an argument with bytes that are no text in the encoding of the locale."""
    if not is_text(argument):
        shown = argument.encode(errors="surrogateescape" if _is_escaped(argument) else "backslashreplace")
        key = argument.partition("=")[0]
        where = f"{key}: " if is_text(key) else ""
        raise UserError(f"{where}{shown!r} is not {sys.getfilesystemencoding()}: write it in the locale's encoding")


def is_text(text: str) -> bool:
    """Whether a file of UTF-8 can hold ``text``."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unquoted(text: str) -> str:
    """``text`` without the quotes that it begins and ends with, if it does, as in Hydra's grammar."""
    if (found := re.fullmatch(r"""(['"])((?:\\.|(?!\1)[^\\])*)\1""", text, re.DOTALL)) is None:
        return text
    quote, content = found.groups()
    return re.sub(rf"(\\*)({quote}|$)", lambda run: run[1][: len(run[1]) // 2] + run[2], content)


def printable(text: str) -> str:
    """``text`` with what moves a cursor, breaks a line or cannot be written as its escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _is_escaped(text: str) -> bool:
    return all(not "\ud800" <= char <= "\udfff" or "\udc80" <= char <= "\udcff" for char in text)
