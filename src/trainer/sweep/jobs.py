"""The jobs of a sweep: each a process tree in its own directory, whose ``done.json`` says what is left to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..command import command
from ..data.config import DataConfig
from ..data.open import require_data
from ..errors import UserError
from ..files import lock, read_json
from ..lifeline import end_with_parent
from ..metrics import read_metrics
from ..trackers import SWEEP

_POLL_SECONDS = 0.2
_SHOW_ROWS = 40


class JobState(Enum):
    """Where a job stands."""

    waiting = "waiting"
    running = "running"
    finished = "finished"
    diverged = "diverged"
    stopped = "stopped"
    failed = "failed"


class SweepStopped(UserError):
    """A signal ended the sweep; the same command goes on."""


@dataclass(kw_only=True)
class Job:
    """One run of a sweep."""

    name: str
    directory: Path
    overrides: list[str]
    steps: int
    flags: list[str] = field(default_factory=list)  # before the overrides
    data: DataConfig | None = None
    state: JobState = JobState.waiting
    step: int = 0
    loss: float | None = None  # the newest there is: of training while it runs, of validation at its end
    reason: str = ""
    skipped: bool = False
    seconds: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _started: float = 0.0
    _done_before: bytes | None = None

    @property
    def arguments(self) -> list[str]:
        return [*self.flags, *self.overrides]

    @property
    def over(self) -> bool:
        return self.state not in (JobState.waiting, JobState.running)

    def take_over(self) -> bool:
        """Take over what an earlier sweep finished here. A diverged run is a result: it is not tried again."""
        done = _done(self.directory)
        status, step = done.get("status"), int(done.get("step", 0))
        if (status == "finished" and step >= self.steps) or status == "diverged":
            self.state, self.step, self.skipped = JobState(status), step, True
            self.reason = str(done.get("reason", ""))
            self.loss = final_loss(self.directory)
        return self.over

    def start(self, argv: Sequence[str]) -> None:
        """Start the job in a session of its own, its output in ``console.log``."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._done_before = _bytes(self.directory / "done.json")
        with (self.directory / "console.log").open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # console.log is a file, whatever the locale
                env=os.environ | {"PYTHONIOENCODING": "utf-8", SWEEP: str(self.directory.parent)},
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the jobs
                preexec_fn=end_with_parent,  # noqa: PLW1509 - no threads here; a job then writes a checkpoint and stops
            )
        self.state, self._started = JobState.running, time.monotonic()

    def poll(self) -> bool:
        """Look at the process and the metrics; True once the job has ended."""
        assert self.process is not None
        self.seconds = time.monotonic() - self._started
        code = self.process.poll()
        if code is None:
            self.step, self.loss = _progress(self.directory) or (self.step, self.loss)
            return False
        done = _done(self.directory) if _bytes(self.directory / "done.json") != self._done_before else {}
        if code == 0:
            done = done or _done(self.directory)
        self.state = JobState(done["status"]) if done.get("status") in JobState.__members__ else JobState.failed
        self.step = int(done.get("step", self.step))
        self.reason = str(done.get("reason") or "") or (_last_error(self.directory, code) if code else "")
        self.loss = final_loss(self.directory) if self.state is JobState.finished else self.loss
        return True


def run_jobs(
    jobs: Sequence[Job],
    *,
    processes: int,
    concurrent: int,
    make_command: Callable[[Sequence[str], int], list[str]] = command,
) -> None:
    """Run what is not done yet, ``concurrent`` jobs at a time, in their order; one that fails does not stop the others.

    The first signal asks the running jobs to write a checkpoint and stop, the second kills them. Raises SweepStopped.
    """
    shown = Display(jobs)
    with _signals() as received, shown:
        for job in jobs:
            if job.take_over():
                shown.say(job, f"{job.state.value} already at step {job.step}")
        require_data_of(job.data for job in jobs if not job.over)
        asked = 0
        while not all(job.over for job in jobs):
            running = [job for job in jobs if job.state is JobState.running]
            for job in running:
                if job.poll():
                    shown.say(job, _ending(job))
            if received and asked != len(received):
                asked = len(received)
                _stop([job for job in running if not job.over], signal.SIGTERM if asked == 1 else signal.SIGKILL)
            running = [job for job in running if not job.over]
            if received and not running:
                break
            if not received and len(running) < concurrent and (job := _next(jobs, shown)) is not None:
                job.start(make_command(job.arguments, processes))
                shown.say(job, f"started, log in {job.directory / 'console.log'}")
                continue
            shown.update()
            time.sleep(_POLL_SECONDS)
    counts = {state: sum(job.state is state for job in jobs) for state in JobState}
    summary = ", ".join(f"{count} {state.value}" for state, count in counts.items() if count)
    if received:
        raise SweepStopped(f"stopped: {summary}; the same command goes on")
    print(f"{len(jobs)} jobs: {summary}", flush=True)


def require_data_of(configs: Iterable[DataConfig | None]) -> None:
    """Raises UserError if the tokenizer or text of any of them is missing."""
    for config in {repr(config): config for config in configs}.values():
        if config is not None:
            require_data(config)


def _next(jobs: Sequence[Job], shown: Display) -> Job | None:
    """The first waiting job whose directory is free: workers of a killed sweep may still be leaving one."""
    for job in jobs:
        if job.state is JobState.waiting and not _in_use(job.directory):
            if job.take_over():  # whoever held it may have finished it
                shown.say(job, f"{job.state.value} meanwhile at step {job.step}")
            else:
                return job
    return None


def _in_use(directory: Path) -> bool:
    path = directory / ".lock"
    if not path.exists():
        return False
    writable = os.access(path, os.W_OK)  # NFS locks for writing only what is open for writing
    with path.open("ab" if writable else "rb") as file:
        return lock(file) is False


def _stop(jobs: Sequence[Job], number: signal.Signals) -> None:
    for job in jobs:
        if job.process is not None and job.process.poll() is None:
            job.process.send_signal(number)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals received so far, while they do not end this process."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, lambda code, _: received.append(code)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _done(directory: Path) -> dict[str, Any]:
    try:
        done = read_json(directory / "done.json")
        return done | {"step": int(done.get("step", 0))}
    except (OSError, ValueError, TypeError, OverflowError):
        return {}


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def final_loss(directory: Path) -> float | None:
    """The last validation loss of a run directory, None if there is none or it is not finite."""
    rows = read_metrics(directory / "metrics.jsonl", "eval")
    return rows[max(rows)].get("loss") if rows else None


def _progress(directory: Path) -> tuple[int, float | None] | None:
    """Step and loss of the last complete train row."""
    file = directory / "metrics.jsonl"
    if not file.exists():
        return None
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 4096))
        lines = stream.read().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            row = json.loads(line)
            if row["kind"] == "train":
                return int(row["step"]), row["loss"]
        except (ValueError, KeyError, TypeError):
            continue
    return None


def _last_error(directory: Path, code: int) -> str:
    log = directory / "console.log"
    for _ in range(20):  # under torchrun the line comes after torchrun has ended
        lines = log.read_text(errors="replace", encoding="utf-8").splitlines()[-200:]
        if errors := [line for line in lines if line.startswith("error:")]:
            return errors[-1].removeprefix("error: ")
        if "torch.distributed" not in "".join(lines):
            break
        time.sleep(0.05)
    return f"exit code {code}, see {log}"


def _ending(job: Job) -> str:
    loss = f", validation loss {job.loss:.4f}" if job.state is JobState.finished and job.loss is not None else ""
    reason = f": {job.reason}" if job.reason and job.state is not JobState.finished else ""
    return f"{job.state.value} at step {job.step}{loss}, {job.seconds:.0f} s{reason}"


class Display:
    """One live table on a terminal, a line for each event elsewhere."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self.update()
            self._live.stop()

    def say(self, job: Job, text: str) -> None:
        if self._live is not None:
            self.update()
        else:
            over = sum(other.over for other in self._jobs)
            print(f"[{over}/{len(self._jobs)}] {job.name}: {text}", file=self._console.file, flush=True)

    def update(self) -> None:
        if self._live is not None:
            self._live.update(self.table(), refresh=True)

    def table(self) -> Table:
        """All jobs; of many, those that run, failed or diverged."""
        table = Table(box=None, pad_edge=False)
        for name in ("job", "state", "step", "loss", "time"):
            table.add_column(name, overflow="fold", justify="left" if name in ("job", "state") else "right")
        quiet = (JobState.finished, JobState.waiting) if len(self._jobs) > _SHOW_ROWS else ()
        for job in self._jobs:
            if job.state not in quiet:
                loss = "" if job.loss is None else f"{job.loss:.4f}"
                state = f"{job.state.value}{' before' if job.skipped else ''}"
                table.add_row(job.name, state, f"{job.step}/{job.steps}", loss, f"{job.seconds:.0f} s")
        over = sum(job.over for job in self._jobs)
        table.caption = f"{over} of {len(self._jobs)} jobs over"
        return table
