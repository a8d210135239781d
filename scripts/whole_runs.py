"""Running, killing and comparing whole runs: the bitwise-resume promise as something anybody can check."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from narrowgauge.trainer.checkpoint import newest, read_tensors
from narrowgauge.trainer.command import command
from narrowgauge.trainer.errors import UserError
from narrowgauge.trainer.metrics import read_metrics

KILL_TARGETS = ("all", "launcher", "worker")
_START_SECONDS = 600.0


def run_to_end(overrides: Sequence[str], processes: int) -> None:
    """Run to the last step. Raises UserError with the run's last lines if it fails."""
    result = subprocess.run(command(overrides, processes), capture_output=True, text=True, check=False)
    if result.returncode:
        lines = (result.stdout + result.stderr).strip().splitlines()
        errors = [line for line in lines if line.startswith("error:")] or lines[-5:]
        raise UserError(f"the run failed with exit code {result.returncode}: {' | '.join(errors)}")


def run_killed(overrides: Sequence[str], processes: int, step: int, target: str) -> None:
    """Run until ``metrics.jsonl`` shows ``step``, then SIGKILL all processes, the launcher alone, or one worker.

    Returns at once, while orphans may still live: the next start has to cope. Raises UserError if the run ends or
    hangs before that step.
    """
    run_dir = Path(next(text for text in overrides if text.startswith("run.dir=")).removeprefix("run.dir="))
    metrics = run_dir / "metrics.jsonl"
    before = metrics.read_bytes().rfind(b"\n") + 1 if metrics.exists() else 0  # what an earlier attempt wrote
    process = subprocess.Popen(
        command(overrides, processes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + _START_SECONDS
    while newest_step(metrics, before) < step:
        if process.poll() is not None:
            raise UserError(f"the run ended with exit code {process.returncode} before step {step}")
        if time.monotonic() > deadline:
            process.kill()
            raise UserError(f"the run did not reach step {step} within {_START_SECONDS:.0f} s")
        time.sleep(0.02)
    launcher = psutil.Process(process.pid)
    workers = launcher.children(recursive=True)
    victims = {"all": [launcher, *workers], "launcher": [launcher], "worker": workers[-1:] or [launcher]}[target]
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def newest_step(metrics: Path, start: int = 0) -> int:
    """The highest train step in ``metrics`` after byte ``start``, 0 if there is none."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(start)
        lines = file.read().split(b"\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)


def compare_runs(first: Path, second: Path, *, after: int = -1) -> list[str]:
    """What differs between two run directories: losses and gradient norms by step, validations, final tensors.

    ``after``: rows of steps up to this one are not compared.
    """
    problems = []
    for kind, keys in (("train", ("loss", "grad_norm", "lr", "tokens")), ("eval", ("loss", "bits_per_byte"))):
        rows = [
            {step: row for step, row in read_metrics(path / "metrics.jsonl", kind).items() if step > after}
            for path in (first, second)
        ]
        if rows[0].keys() != rows[1].keys():
            problems.append(f"{kind} rows: steps {_span(rows[0])} and {_span(rows[1])}")
        for step in sorted(rows[0].keys() & rows[1].keys()):
            for key in keys:
                one, other = rows[0][step][key], rows[1][step][key]
                if one != other:
                    problems.append(f"{kind} {key} at step {step}: {one!r} and {other!r}")
    checkpoints = [newest(path / "checkpoints") for path in (first, second)]
    if checkpoints[0] is None or checkpoints[1] is None:
        return [*problems, "a run without a checkpoint"]
    tensors = [read_tensors(checkpoint.path) for checkpoint in checkpoints if checkpoint is not None]
    if tensors[0].keys() != tensors[1].keys():
        apart = sorted(tensors[0].keys() ^ tensors[1].keys())
        problems.append(f"names of the final tensors: {apart[0]} is in one alone, of {len(apart)}")
    for name in sorted(tensors[0].keys() & tensors[1].keys()):
        # As bytes: NaN differs from itself, and -0.0 equals 0.0.
        one, other = (tensor[name].contiguous().flatten().view(torch.uint8) for tensor in tensors)
        if not torch.equal(one, other):
            problems.append(f"final {name}")
    return problems


def check_out(root: Path, revision: str, place: Path) -> None:
    """Write the files of a revision of the checkout ``root`` to the new directory ``place``.

    Raises UserError where there is no such revision, or no history at all.
    """
    git = ["git", "-C", str(root)]
    top = shutil.which("git") and subprocess.run(
        [*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=False
    )
    if not top or top.returncode or Path(top.stdout.strip()).resolve() != root.resolve():  # or another's, further up
        raise UserError(f"{root} has no git history to take a revision from")
    place.mkdir(parents=True)
    archive = place / "revision.tar"  # a worktree of git's would stay registered if this process were killed
    made = subprocess.run([*git, "archive", "-o", str(archive), revision], capture_output=True, text=True, check=False)
    if made.returncode:
        raise UserError(f"{revision}: no such revision ({made.stderr.strip().splitlines()[-1]})")
    with tarfile.open(archive) as files:
        files.extractall(place, filter="data")
    archive.unlink()


def _span(rows: dict[int, object]) -> str:
    return f"{min(rows)}..{max(rows)} ({len(rows)})" if rows else "none"
