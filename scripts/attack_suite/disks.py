"""File systems that fail: locks, flushes, writes, opening, renaming, reading; always, or once.

A run with two checkpoints goes on under the fault, as its own command. It ends with every digit of the run left alone,
or with one line, and then the same command without the fault comes to these digits. No checkpoint that is whole is
lost, renamed or passed over.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from narrowgauge.trainer.errors import UserError
from whole_runs import compare_runs, run_to_end

from attack_suite.attacks import NEEDED, Attack, Ended
from attack_suite.kills import Start
from attack_suite.scene import Scene

BEFORE, STEPS = 4, 8
NEWEST = f"step-{BEFORE:08}"
_LIMIT_SECONDS = 90.0
_SETTINGS = ("checkpoint.every=2", "checkpoint.keep_last=9", "eval.every=0", "model.num_layers=1")


@dataclass(frozen=True)
class Fault:
    """A system call that fails with ``number``; ``goes_on``: the run has to end by itself in spite of it."""

    call: str
    number: int
    path: str
    once: bool = True
    after: int = 0
    goes_on: bool = False
    processes: int = 1

    @property
    def name(self) -> str:
        often = "once" if self.once else "always"
        after = f", after {self.after:,}" if self.after else ""
        on = f", {self.processes} processes" if self.processes > 1 else ""
        return f"{errno.errorcode[self.number]} {often} for {self.path or 'all files'}{after}{on}"

    def environment(self, library: Path, token: Path) -> dict[str, str]:
        """Variables that make it happen."""
        values = {
            "LD_PRELOAD": str(library),
            "FAULT_CALL": self.call,
            "FAULT_ERRNO": str(self.number),
            "FAULT_PATH": self.path,
            "FAULT_AFTER": str(self.after),
        }
        return values | ({"FAULT_ONCE": str(token)} if self.once else {})


def faults() -> Iterator[Fault]:
    """Every one that is tried."""
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        yield Fault("flock", number, "/.lock", once=False, goes_on=True)
    yield Fault("flock", errno.ENOSYS, "/.lock", once=False, goes_on=True, processes=2)
    yield Fault("flock", errno.EINTR, "/.lock")
    for number in (errno.EINVAL, errno.ENOTSUP):
        yield Fault("fsync_directory", number, "", once=False, goes_on=True)
    yield Fault("fsync_directory", errno.EINVAL, "", once=False, goes_on=True, processes=2)
    yield Fault("fsync_directory", errno.EIO, "/checkpoints", goes_on=True)
    yield Fault("fsync", errno.EIO, "/checkpoints/", goes_on=True)
    yield Fault("fsync", errno.EIO, "/config.yaml")
    yield Fault("fsync", errno.EIO, "/checkpoints/", once=False)
    for path in ("/checkpoints/", ".distcp", "/meta.json", "/checksums.json"):
        yield Fault("write", errno.ENOSPC, path, after=100, goes_on=True)
    yield Fault("write", errno.ENOSPC, "/checkpoints/", after=100_000, goes_on=True)
    yield Fault("write", errno.ENOSPC, "/checkpoints/", after=100_000, once=False)
    yield Fault("write", errno.ENOSPC, "/checkpoints/", after=100_000, goes_on=True, processes=2)
    yield Fault("write", errno.ENOSPC, "/metrics.jsonl", goes_on=True)
    yield Fault("write", errno.ENOSPC, "/metrics.jsonl", once=False)
    yield Fault("write", errno.EDQUOT, "/run/", once=False)
    for number in (errno.EMFILE, errno.EACCES, errno.ESTALE):
        yield Fault("open", number, f"/{NEWEST}/")
        yield Fault("open_write", number, "/checkpoints/", goes_on=True)
    yield Fault("open", errno.EACCES, f"/{NEWEST}/", once=False)
    yield Fault("open_write", errno.EROFS, "/run/", once=False)
    yield Fault("rename", errno.EIO, "/checkpoints/", goes_on=True)
    yield Fault("rename", errno.EIO, "/config.yaml")
    yield Fault("rename", errno.EIO, "/done.json")
    for number in (errno.EIO, errno.ESTALE):
        for name in (".metadata", "meta.json", "checksums.json", "__0_0.distcp"):
            yield Fault("read", number, f"/{NEWEST}/{name}")
        yield Fault("read", number, f"/{NEWEST}/", after=6)  # while it is loaded, not while it is examined
        yield Fault("read", number, f"/{NEWEST}/", after=9)
    yield Fault("read", errno.EIO, f"/{NEWEST}/__1_0.distcp", processes=2)
    yield Fault("read", errno.EIO, f"/{NEWEST}/", once=False)
    yield Fault("read", errno.EIO, "/text/shards")


class Disk:
    """The library of faults, a run of two checkpoints for each number of processes, and where it ends by itself."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.place = scene.folder / "disks"
        self.library = self.place / "faults.so"

    def build(self) -> Ended:
        """Compile. Raises UserError without a C compiler."""
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise UserError("parts=disks needs a C compiler: cc, gcc or clang")
        self.place.mkdir(parents=True, exist_ok=True)
        source = Path(__file__).with_name("faults.c")
        words = [compiler, "-shared", "-fPIC", "-O1", "-o", str(self.library), str(source), "-ldl"]
        made = subprocess.run(words, capture_output=True, text=True, check=False)
        return Ended([] if made.returncode == 0 else [f"faults.c: {' '.join(made.stderr.split())[:300]}"])

    def overrides(self, run_dir: Path, steps: int) -> list[str]:
        return self._scene.overrides(run_dir, *_SETTINGS, f"train.steps={steps}")

    def base(self, processes: int) -> Path:
        return self.place / f"base_{processes}"

    def prepare(self, processes: int) -> Ended:
        """The run that is attacked, and the same run at its end."""
        base, end = self.base(processes) / "run", self.base(processes) / "end"
        run_to_end(self.overrides(base, BEFORE), processes)
        shutil.copytree(base, end)
        run_to_end(self.overrides(end, STEPS), processes)
        return Ended()

    def attempt(self, fault: Fault, number: int) -> Ended:
        """Go on under the fault, then, if need be, without it."""
        folder = self.place / f"attack_{number}"
        run_dir = folder / "run"
        shutil.copytree(self.base(fault.processes) / "run", run_dir)
        before = _digests(run_dir / "checkpoints")
        overrides = self.overrides(run_dir, STEPS)
        env = fault.environment(self.library, folder / "happened")
        code, told = _start(overrides, fault.processes, folder, "with_fault", env)
        problems, note = [], "went on"
        # torchrun prints one of its own for a worker that failed.
        if told.count("Traceback (most recent call last)") > told.count("errors.ChildFailedError:"):
            problems.append("a traceback")
        if fault.once and not (folder / "happened").exists():
            problems.append("the fault never came up")
        if code:
            note = "one line, then went on"
            lines = [line for line in told.splitlines() if line.startswith("error:") or "failed at step" in line]
            if not lines:
                problems.append(f"exit code {code} without a line that says why")
            if fault.goes_on:
                problems.append(f"exit code {code}: {' '.join(lines)[:300]}")
        problems += self._lost(before, run_dir)
        if code:
            code, told = _start(overrides, fault.processes, folder, "afterwards", {})
            if code:
                problems.append(f"the same command afterwards: exit code {code}")
            problems += self._lost(before, run_dir)
        if not code:
            differing = compare_runs(self.base(fault.processes) / "end", run_dir)
            # Rows that could not be written are lost with the process; what it computed is not.
            if fault.path in ("/metrics.jsonl", "/run/") and not fault.once:
                differing = [line for line in differing if " rows: " not in line]
            problems += differing[:2]
        if problems:
            return Ended(problems, note, place=str(folder))
        shutil.rmtree(folder)
        return Ended([], note)

    def _lost(self, before: dict[str, str], run_dir: Path) -> list[str]:
        after = _digests(run_dir / "checkpoints")
        return [f"{name} was lost or renamed" for name, digest in before.items() if after.get(name) != digest][:1]


def _start(overrides: list[str], processes: int, folder: Path, name: str, env: dict[str, str]) -> tuple[int, str]:
    """A start from end to end: its exit code and its output. Raises UserError if it hangs."""
    start = Start(overrides, processes, folder / "run", name, env=env)
    start.wait(lambda: False, _LIMIT_SECONDS)
    left = start.left_over(10.0)
    return start.process.wait(), "\n".join([start.log.read_text(errors="replace", encoding="utf-8"), *left])


def _digests(checkpoints: Path) -> dict[str, str]:
    files = [file for file in sorted(checkpoints.glob("step-*/*")) if file.is_file()]
    return {str(file.relative_to(checkpoints)): sha256(file.read_bytes()).hexdigest() for file in files}


def plan(scene: Scene) -> list[Attack]:
    """The library, the runs, and every fault."""
    disk = Disk(scene)

    def attack(group: str, name: str, run: object) -> Attack:
        return Attack("disks", group, name, run)  # type: ignore[arg-type]

    attacks = [attack(NEEDED, "faults.c", disk.build)]
    for processes in (1, 2):
        name = f"{processes} process{'es' * (processes > 1)}"
        attacks.append(attack(NEEDED, name, lambda processes=processes: disk.prepare(processes)))
    for number, fault in enumerate(faults()):
        attacks.append(attack(fault.call, fault.name, lambda fault=fault, number=number: disk.attempt(fault, number)))
    return attacks
