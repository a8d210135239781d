"""``metrics.jsonl`` at full precision: written row by row, and read by kind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .distributed import say


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, flushed as written.

    A last line that a killed run left torn is cut off. Rows that cannot be written (a full disk) are kept and tried
    again with the next one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[bytes] = []
        self._warned = False
        self._file = path.open("ab", buffering=0)
        self._length = _repair(path)
        self._file.truncate(self._length)

    def write(self, *rows: dict[str, Any]) -> None:
        for row in rows:
            clean = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in row.items()
            }
            self._pending.append(json.dumps(clean, allow_nan=False).encode() + b"\n")
        self.flush()

    def flush(self) -> bool:
        """Write what is waiting; False if it still waits."""
        try:
            if self._pending and self._path.stat().st_size != self._length:
                self._file.truncate(self._length)  # what an earlier failure left torn
            while self._pending:
                line = self._pending[0]
                written = self._file.write(line)
                if written != len(line):
                    raise OSError(28, "No space left on device")
                self._length += len(line)
                self._pending.pop(0)
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._length)  # no torn line in the middle
            if not self._warned:
                say(f"warning: {self._path} cannot be written ({error.strerror}); rows are kept and tried again")
            self._warned = True
            return False
        return True

    def close(self) -> None:
        if not self.flush():
            say(f"error: {len(self._pending)} rows of {self._path} are lost")
        self._file.close()


def _repair(path: Path) -> int:
    """The length of ``path`` up to its last complete JSON line."""
    data = path.read_bytes()
    length = data.rfind(b"\n") + 1
    while length:
        start = data.rfind(b"\n", 0, length - 1) + 1
        try:
            json.loads(data[start:length])
            return length
        except (ValueError, RecursionError):
            length = start
    return 0


def read_metrics(path: Path, kind: str) -> dict[int, dict[str, Any]]:
    """The rows of one kind by step; of a step that was done twice the last counts, lines that are not JSON do not."""
    return dict(sorted({row["step"]: row for row in read_rows(path, kind)}.items()))


def read_rows(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """All rows of one kind, as they stand; for kinds with several rows a step."""
    return (row for row in _rows(path) if row["kind"] == kind)


def evaluated_step(path: Path) -> int:
    """The newest validation of the path that the run is on, -1 if there is none: those before a rollback are not."""
    newest = -1
    for row in _rows(path):
        if row["kind"] == "eval":
            newest = max(newest, row["step"])
        elif row["kind"] == "spike" and isinstance(row.get("back_to"), int):
            newest = min(newest, row["back_to"])
    return newest


def corrupt_lines(path: Path) -> list[int]:
    """The numbers, from 1, of the lines that ``read_metrics`` passes over: what is no row, a torn last one too."""
    return [number for number, row in _numbered(path) if row is None]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    return (row for _, row in _numbered(path) if row is not None)


def _numbered(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) and _is_complete(row) else None


def _is_complete(row: dict[str, Any]) -> bool:
    return type(row.get("step")) is int and 0 <= row["step"] < 2**63 and isinstance(row.get("kind"), str)


def number(value: Any) -> float | None:
    """``value`` as float, None if it is no finite number."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None
