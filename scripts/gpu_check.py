"""Confirm or refute every claim about GPUs on this machine, in some minutes:

python scripts/gpu_check.py [WORD ...] [limit=60] [out=FILE]     # of the checks, those whose name has one of the words

Prints one table, last. Exit code 1 if a claim fails. Checks run in a process beside this one: a check that takes longer
than ``limit`` seconds, or takes the process or the device with it, fails, and the next goes on in a new one. ``out``
holds all rows as JSON after every check. Without a GPU, Triton kernels run in the interpreter on small shapes, and the
rest says "not on this machine".
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

START_SECONDS = 180.0  # of a process, until its first check
GIVEN_UP = "left out: no time"
Row = dict[str, str]


class Worker:
    """The process that runs checks, and the events it writes, a JSON object a line."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        self._rest = b""

    def event(self, seconds: float) -> dict[str, Any] | None:
        """The next event; None if the process has ended. Raises TimeoutError if neither comes in time."""
        assert self._process.stdout is not None
        until = time.monotonic() + seconds
        while True:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                if line.startswith(b'{"gpu_check"'):
                    event: dict[str, Any] = json.loads(line)["gpu_check"]
                    return event
                continue
            if not select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            if not more:
                return None
            self._rest += more

    def end(self, grace: float = 0.0) -> int:
        """The exit code; kills what still runs after ``grace`` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


def command_of(words: Sequence[str], first: int) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), f"worker={first}", *words]


def results(words: Sequence[str], *, limit: float, until: float = float("inf")) -> Iterator[Row]:
    """A row a check as soon as it is known: ``check``, ``claim``, ``result`` (ok, FAIL or -), ``measured``, ``on``.

    At ``until``, of ``time.time()``, the checks that are left are given up: "-". Raises RuntimeError if none begins.
    """
    names: list[tuple[str, str]] = []
    first, machine = 0, ""
    while not names or first < len(names):
        worker, running = Worker(command_of(words, first)), None
        begun = first
        try:
            while True:
                wait = (START_SECONDS if running is None else limit, until - time.time())
                event = worker.event(max(0.0, min(wait)))
                if event is None:
                    break
                if "names" in event:
                    names, machine = event["names"], event["on"]
                    if not names:
                        return
                elif "begins" in event:
                    running = event["begins"]
                else:
                    yield _row(names[event["ends"]], event["result"], event["measured"], machine)
                    running, first = None, event["ends"] + 1
            code = worker.end(grace=10)
            if running is not None:
                yield _row(names[running], "FAIL", f"the process ended with code {code}", machine)
                first = running + 1
            elif first == begun and first < max(1, len(names)):
                raise RuntimeError(f"the process that checks ended with code {code} before its first check")
        except TimeoutError:
            worker.end()
            if time.time() >= until:
                yield from (_row(name, "-", GIVEN_UP, machine) for name in names[first:])
                return
            if running is None:
                raise RuntimeError(f"no check began within {START_SECONDS:.0f} s") from None
            yield _row(names[running], "FAIL", f"no end after {limit:g} s", machine)
            first = running + 1
        finally:
            worker.end()


def _row(name: tuple[str, str], result: str, measured: str, machine: str) -> Row:
    return {"check": name[0], "claim": name[1], "result": result, "measured": measured, "on": machine}


def work(words: Sequence[str], first: int) -> int:
    """The checks from ``first`` on, in this process. 3 if the device is of no use any more."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
    import checks

    def tell(event: dict[str, Any]) -> None:
        print(json.dumps({"gpu_check": event}), flush=True)

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    arch = f"sm_{checks.ARCH}" if checks.ARCH is not None else "no architecture of the table"
    chosen = [c for c in checks.CHECKS if not words or any(word.lower() in c.name.lower() for word in words)]
    machine = f"{gpu}, {arch}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    tell({"names": [(check.name, check.claim) for check in chosen], "on": machine})
    for number, check in list(enumerate(chosen))[first:]:
        tell({"begins": number})
        try:
            outcome = check.run()
        except Exception as error:  # a refusal of hardware or library is a result, too
            traceback.print_exc(limit=-3)
            lines = str(error).splitlines() or [""]
            outcome = checks.Outcome(False, f"{type(error).__name__}: {lines[0][:120]}")
        measured = f"{outcome.measured}{'; ' if outcome.time else ''}{outcome.time}"
        tell({"ends": number, "result": {True: "ok", False: "FAIL", None: "-"}[outcome.ok], "measured": measured})
        if outcome.ok is False and not _alive():
            return 3
    return 0


def _alive() -> bool:
    """Whether the device still answers: after an illegal access every later call of the process fails."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'check':48} {'claim':28} {'result':6} measured"]
    lines += [f"{r['check']:48} {r['claim']:28} {r['result']:6} {r['measured'][:110]}" for r in rows]
    failed = sum(row["result"] == "FAIL" for row in rows)
    return "\n".join([*lines, f"\n{failed} claims fail" if failed else "\nno claim fails"])


def main(arguments: list[str]) -> int:
    own = dict(argument.partition("=")[::2] for argument in arguments if "=" in argument)
    words = [argument for argument in arguments if "=" not in argument]
    if unknown := own.keys() - {"limit", "out", "worker"}:
        print(f"error: unknown argument {min(unknown)!r}; limit=SECONDS, out=FILE", file=sys.stderr)
        return 2
    if "worker" in own:
        return work(words, int(own["worker"]))
    rows: list[Row] = []
    for row in results(words, limit=float(own.get("limit", 60))):
        rows.append(row)
        print(f"{row['check']}: {row['result']}", file=sys.stderr, flush=True)
        if "out" in own:
            Path(own["out"]).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(f"\n{rows[0]['on'] if rows else 'no check has one of these words'}\n\n{table(rows)}")
    return int(any(row["result"] == "FAIL" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
