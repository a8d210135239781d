"""What an attack is, what became of it, and one table of all."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from narrowgauge.trainer.files import write_text
from tqdm import tqdm

T = TypeVar("T")
NOT_REACHED = "not reached: the budget was spent"
NEEDED = "the run itself"  # the group of what other attacks of a part build on


@dataclass(frozen=True)
class Attack:
    """``run()`` gives what went wrong, a line each, and a note; nothing wrong is an attack that ended right.

    Attacks of one ``group`` share a line of the table, those of one ``kind`` another.
    """

    part: str
    group: str
    name: str
    run: Callable[[], Ended]
    kind: str = ""


@dataclass(frozen=True)
class Ended:
    """How an attack ended. One that came too late, ``missed``, is neither right nor wrong."""

    problems: Sequence[str] = ()
    note: str = ""
    missed: bool = False
    place: str = ""  # what was kept to look at


@dataclass(frozen=True)
class Result:
    """An attack that was planned, and its end."""

    part: str
    group: str
    name: str
    kind: str
    seconds: float
    problems: list[str] = field(default_factory=list)
    note: str = ""
    missed: bool = False
    place: str = ""

    @property
    def right(self) -> bool:
        return not self.problems and not self.missed


def carry_out(attacks: Sequence[Attack], until: float, keep: Callable[[list[Result]], object]) -> list[Result]:
    """Every attack in turn, up to ``until`` of the monotonic clock; ``keep`` is handed all results after each.

    An attack that raises has ended wrong, and so has one that was not reached.
    """
    results: list[Result] = []
    every = 0.5 if sys.stderr.isatty() else 30.0
    for attack in (bar := tqdm(attacks, unit="attack", mininterval=every, dynamic_ncols=True)):
        begun = time.monotonic()
        if begun > until:
            ended = Ended([NOT_REACHED])
        else:
            try:
                ended = attack.run()
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                ended = Ended([f"{type(error).__name__} at {where}: {' '.join(str(error).split())}"])
        seconds = time.monotonic() - begun
        results.append(
            Result(attack.part, attack.group, attack.name, attack.kind, seconds, *_values(ended))  # in their order
        )
        if not results[-1].right and begun <= until:
            bar.write(line_of(results[-1]), file=sys.stderr)
        keep(results)
    return results


def _values(ended: Ended) -> tuple[list[str], str, bool, str]:
    return list(ended.problems), ended.note, ended.missed, ended.place


def line_of(result: Result) -> str:
    """One line about an attack that did not end right."""
    what = "; ".join(result.problems) or f"missed: {result.note}"
    return f"{result.part}: {result.group}: {result.name}: {what}" + (f" [{result.place}]" if result.place else "")


def table(results: Sequence[Result]) -> str:
    """A line for each group, then for each kind, then the sum."""
    rows = [("part", "configuration or kind", "attacks", "right", "seconds", "note")]
    for key in ("group", "kind"):
        for part in dict.fromkeys(result.part for result in results):
            of_part = [result for result in results if result.part == part and getattr(result, key)]
            groups = dict.fromkeys(getattr(result, key) for result in of_part)
            rows += [_row(part, name, [one for one in of_part if getattr(one, key) == name]) for name in groups]
    rows.append(_row("all", "", results))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row in rows:
        cells = [row[at].ljust(width) if at < 2 else row[at].rjust(width) for at, width in enumerate(widths)]
        lines.append("  ".join([*cells, row[5]]).rstrip())
    return "\n".join(lines)


def _row(part: str, name: str, results: Sequence[Result]) -> tuple[str, ...]:
    done = [result for result in results if not result.missed]
    right = sum(result.right for result in done)
    notes: dict[str, int] = {}
    for result in results:
        note = "missed" if result.missed else "not reached" if NOT_REACHED in result.problems else result.note
        if note:
            notes[note] = notes.get(note, 0) + 1
    told = ", ".join(f"{count} {note}" for note, count in sorted(notes.items(), key=lambda item: (-item[1], item[0])))
    seconds = sum(result.seconds for result in results)
    note = ("WRONG; " * (right < len(done)) + (told if name else "")).removesuffix("; ")
    return part, name, str(len(done)), str(right), f"{seconds:.0f}", note


def write_results(file: Path, about: dict[str, Any], results: Sequence[Result]) -> None:
    """All that is known so far, replaced in one go."""
    rows = [asdict(result) | {"right": result.right} for result in results]
    write_text(file, json.dumps(about | {"attacks": rows}, indent=1) + "\n")


class Child:
    """A process that calls functions one at a time: one that hangs, or takes the process with it, costs that call."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: Any = None
        self._pipe: Any = None

    def call(self, function: Callable[..., Ended], *arguments: Any, limit: float) -> Ended:
        """What ``function(*arguments)``, of a module, returns; what ended the process, or that ``limit`` s passed."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, there = context.Pipe()
            self._process = context.Process(target=_serve, args=(there, self._log), daemon=True)
            self._process.start()
            there.close()
            self._pipe.poll(120)  # it says when it can begin: imports are not part of a call
            self._pipe.recv()
        try:
            self._pipe.send((function, arguments))
            if not self._pipe.poll(limit):
                self.close()
                return Ended([f"hung for {limit:.0f} s"])
            ended: Ended = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            self.close()
            return Ended([f"the process died with exit code {code}"])
        return ended

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: Any, log: Path) -> None:
    sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")
    pipe.send(None)
    while True:
        function, arguments = pipe.recv()
        try:
            ended = function(*arguments)
        except BaseException as error:
            traceback.print_exc()
            ended = Ended([f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"])
        pipe.send(ended)


def spread(things: Sequence[T], count: int) -> list[T]:
    """``count`` of them, spread over the whole list; all, if that is 0 or more than there are."""
    if not 0 < count < len(things):
        return list(things)
    return [things[at * len(things) // count] for at in range(count)]
