"""Runs that are killed at random moments, by every signal and target, and end like the same run left alone."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from narrowgauge.trainer.command import command
from narrowgauge.trainer.errors import UserError
from whole_runs import compare_runs, newest_step

from attack_suite.attacks import Attack, Ended
from attack_suite.scene import Scene

STEPS = 40
MARK = "ATTACK_RUN"  # in the environment of all that a start starts
_START_SECONDS = 150.0
_END_SECONDS = 300.0
_BACK_SECONDS = 90.0  # torchrun has this long to bring its workers back
_LEAVE_SECONDS = 60.0  # a worker has this long to follow its launcher
_POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Configuration:
    """A run that is attacked."""

    name: str
    overrides: tuple[str, ...]
    processes: int = 1
    gpt: bool = False
    mixture: bool = False


_SYNC, _EACH = "checkpoint.asynchronous=false", "checkpoint.every=1"
_STREAM = ("data=c4_stream", "data.shuffle_rows=8")
CONFIGURATIONS = (
    Configuration("bf16, 2 processes, a checkpoint each step", ("precision=bf16", _EACH), 2),
    Configuration("fp8_delayed", ("precision=fp8_delayed", "precision.args.history=4")),
    Configuration("hsdp, fp8_delayed, 2 processes", ("parallel=hsdp", "precision=fp8_delayed", _SYNC), 2),
    Configuration("gpt, fp8_current", ("precision=fp8_current",), gpt=True),
    Configuration("fp8_block, 2 processes", ("precision=fp8_block", "precision.args.block=32"), 2),
    Configuration("text stream, mxfp8", (*_STREAM, "precision=mxfp8", _EACH)),
    Configuration("text stream, bf16, 2 processes", _STREAM, 2),
    Configuration("mxfp4, a synchronous checkpoint each step", ("precision=mxfp4", _EACH, _SYNC)),
    Configuration("nvfp4, 2 processes", ("precision=nvfp4", "precision.args.keep_last=0"), 2),
    Configuration("document mask, nvfp4", ("precision=nvfp4", "data.document_mask=true", _SYNC)),
    Configuration("mixture, fp8_rowwise, 2 processes", ("precision=fp8_rowwise",), 2, mixture=True),
    Configuration("smooth_swiglu", ("precision=smooth_swiglu",)),
    Configuration("fp8_full, 2 processes", ("precision=fp8_full", _EACH), 2),
    Configuration("gpt, fp16", ("precision=fp16", "precision.args.interval=5"), gpt=True),
    Configuration("fp8 states, 2 processes", ("optim.moments=fp8",), 2),
    Configuration("dynamic8 states, mixture", ("optim.moments=dynamic8",), mixture=True),
    Configuration("coat states, 2 processes", ("optim.moments=coat", _SYNC), 2),
    Configuration("pure_bf16_kahan states", ("optim.moments=pure_bf16_kahan", _EACH)),
    Configuration("gpt, document mask, mxfp8, 2 processes", ("precision=mxfp8", "data.document_mask=true"), 2, True),
    Configuration("fp32, validation on the way", ("precision=fp32", "eval.every=4")),
)


@dataclass(frozen=True)
class Kill:
    """``number`` to ``target``, at ``moment``; ``share`` in [0, 1) of its span, ``at_once``: the next start waits not.

    Moments: "start", anywhere between the start and the first step; "step", in a step; "write", in a checkpoint.
    With ``restart`` torchrun has to bring the run back by itself.
    """

    number: signal.Signals
    target: str
    moment: str
    restart: bool = False
    share: float = 0.5
    at_once: bool = False

    @property
    def kind(self) -> str:
        return f"{self.number.name} of {self.target}" + (", restart in place" if self.restart else "")


_KILL, _TERM, _HUP, _INT = signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT
_MOMENTS = ("step", "start", "write")
_ONE = [(number, "the process", False) for number in (_KILL, _TERM, _HUP, _INT)]
_SEVERAL = [
    *((_KILL, target, False) for target in ("all", "launcher", "a worker", "rank 0")),
    *((number, target, False) for number in (_TERM, _HUP, _INT) for target in ("launcher", "a worker")),
    *((_KILL, target, True) for target in ("a worker", "rank 0", "all workers")),
]


def deal(seed: int, kills: int) -> dict[str, list[Kill]]:
    """Kills for every configuration, so that all kinds and moments come up before one comes twice."""
    rng = random.Random(seed)
    decks = {}
    for processes, kinds in ((1, _ONE), (2, _SEVERAL)):
        # Every kind within a few configurations, each time at another moment.
        rounds = [[(*kind, _MOMENTS[(at + turn) % 3]) for at, kind in enumerate(kinds)] for turn in range(3)]
        for cards in rounds:
            rng.shuffle(cards)
        decks[processes] = itertools.cycle(itertools.chain(*rounds))
    dealt = {}
    for configuration in CONFIGURATIONS:
        cards = [next(decks[configuration.processes]) for _ in range(kills)]
        dealt[configuration.name] = [
            Kill(number, target, moment, restart, rng.random(), rng.random() < 0.5)
            for number, target, restart, moment in cards
        ]
    return dealt


def choose(wanted: str) -> list[Configuration]:
    """The first so many configurations, or those named, by a part of the name. Raises UserError if there are none."""
    if wanted.isdigit() and 0 < int(wanted) <= len(CONFIGURATIONS):
        return list(CONFIGURATIONS[: int(wanted)])
    chosen = [one for one in CONFIGURATIONS if any(word and word in one.name for word in wanted.split(";"))]
    if not chosen or wanted.isdigit():
        names = "; ".join(one.name for one in CONFIGURATIONS)
        raise UserError(f"configs={wanted}: a number up to {len(CONFIGURATIONS)}, or parts of the names: {names}")
    return chosen


def plan(scene: Scene, kills: int, wanted: str) -> list[Attack]:
    """The attacks on every configuration: left alone, killed ``kills`` times, run to its end and compared."""
    dealt = deal(scene.seed, kills)
    attacks = []
    for configuration in choose(wanted):
        attacks += attacks_on(scene, configuration, dealt[configuration.name], STEPS)
    return attacks


def attacks_on(scene: Scene, configuration: Configuration, kills: Sequence[Kill], steps: int) -> list[Attack]:
    """Those on one configuration, in their order. They share a run directory, and each goes on where the last ended."""
    victim = Victim(scene, configuration, steps)
    rng = random.Random(f"{scene.seed}:{configuration.name}")
    points = sorted(rng.sample(range(1, max(2, int(0.75 * steps))), len(kills)))

    def attack(name: str, run: Callable[[], Ended], kind: str = "") -> Attack:
        return Attack("kills", configuration.name, name, run, kind)

    attacks = [attack("left alone", victim.alone)]
    for kill, point in zip(kills, points, strict=True):
        name = f"{kill.kind}, {kill.moment}" + (f" {point}" if kill.moment != "start" else "")
        attacks.append(attack(name, lambda kill=kill, point=point: victim.killed(kill, point), kill.kind))
    return [*attacks, attack("every digit at the end", victim.end)]


class Start:
    """One start of a run's command, and all processes that came of it."""

    def __init__(
        self,
        overrides: Sequence[str],
        processes: int,
        run_dir: Path,
        name: str,
        *,
        max_restarts: int = 0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.run_dir, self.name = run_dir, name
        self.metrics = run_dir / "metrics.jsonl"
        self.before = self.metrics.read_bytes().rfind(b"\n") + 1 if self.metrics.exists() else 0
        self.log = run_dir.parent / f"{name}.log"
        self.mark = f"{os.getpid()}:{run_dir}:{name}"
        self.begun = time.monotonic()
        with self.log.open("w", encoding="utf-8") as file:
            self.process = psutil.Popen(
                command(overrides, processes, max_restarts=max_restarts),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | (env or {}) | {MARK: self.mark},
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def step(self) -> int:
        """The newest step that this start has logged."""
        return newest_step(self.metrics, self.before)

    def writes(self) -> bool:
        """Whether a checkpoint is being written; remains of earlier writes are gone once there is a step."""
        return any((self.run_dir / "checkpoints").glob("step-*.incomplete")) and self.step() > 0

    def workers(self) -> dict[int, psutil.Process]:
        """torchrun's workers by rank."""
        found = {}
        with suppress(psutil.Error):
            for child in self.process.children():
                with suppress(psutil.Error, OSError):
                    if (rank := child.environ().get("RANK")) is not None:
                        found[int(rank)] = child
        return found

    def restarts(self) -> set[int]:
        """How often torchrun had restarted its workers when it started those there are."""
        counts = set()
        for worker in self.workers().values():
            with suppress(psutil.Error, OSError):
                counts.add(int(worker.environ().get("TORCHELASTIC_RESTART_COUNT", "0")))
        return counts

    def alive(self) -> list[psutil.Process]:
        """All processes of this start, wherever they are now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def wait(self, condition: Callable[[], bool], limit: float) -> bool:
        """Whether ``condition`` came true before the run ended. Raises UserError after ``limit`` seconds."""
        until = time.monotonic() + limit
        while not condition():
            if self.code is not None:
                return False
            if time.monotonic() > until:
                self.end()
                raise UserError(f"{self.name} stood still for {limit:.0f} s: {self.last_line()}")
            time.sleep(_POLL_SECONDS)
        return True

    def send(self, number: signal.Signals, target: str) -> None:
        """Send a signal to the processes that ``target`` names."""
        workers = self.workers()
        one = {rank: process for rank, process in workers.items() if rank == max(workers)}
        everybody = [self.process]
        with suppress(psutil.NoSuchProcess):
            everybody += self.process.children(recursive=True)
        victims = {
            "the process": [self.process],
            "launcher": [self.process],
            "all": everybody,
            "a worker": list(one.values()),
            "rank 0": [process for rank, process in workers.items() if rank == 0],
            "all workers": list(workers.values()),
        }[target]
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(number)

    def left_over(self, limit: float = _LEAVE_SECONDS) -> list[str]:
        """Processes of this start that outlive it by ``limit`` seconds, which are then ended."""
        until = time.monotonic() + limit
        while (left := self.alive()) and time.monotonic() < until:
            time.sleep(0.1)
        if left:
            self.end()
            return [f"{self.name}: {len(left)} processes left {limit:.0f} s after their launcher's end"]
        return []

    def end(self) -> None:
        """Kill all of it."""
        for process in self.alive():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def last_line(self) -> str:
        lines = [
            line.strip() for line in self.log.read_text(errors="replace", encoding="utf-8").splitlines() if line.strip()
        ]
        told = [line for line in lines if line.startswith("error:")] or lines[-1:]
        return told[-1] if told else "no output"


class Victim:
    """A configuration's two run directories, one left alone and one that is killed."""

    def __init__(self, scene: Scene, configuration: Configuration, steps: int) -> None:
        self.configuration = configuration
        self.folder = scene.folder / "".join(c if c.isalnum() else "_" for c in configuration.name)
        self._overrides = [f"train.steps={steps}", "checkpoint.every=5", "eval.every=0", *configuration.overrides]
        if configuration.mixture:
            one, other = scene.corpora
            sources = f"{{one: {{path: {one}, weight: 3}}, other: {{path: {other}, weight: 1}}}}"
            self._overrides = ["data=mix", *self._overrides, f"data.sources={sources}"]
        self._scene = scene
        self._first_step_seconds = 5.0
        self._starts = 0
        self._orphans: Start | None = None
        self._wrong = False

    def _start(self, name: str, max_restarts: int = 0) -> Start:
        self._starts += 1
        run_dir = self.folder / name
        overrides = self._scene.overrides(run_dir, *self._overrides, gpt=self.configuration.gpt)
        label = name if name == "alone" else f"start_{self._starts}"
        return Start(overrides, self.configuration.processes, run_dir, label, max_restarts=max_restarts)

    def _ended(self, problems: list[str], note: str = "", missed: bool = False) -> Ended:
        self._wrong |= bool(problems)
        return Ended(problems, note, missed, str(self.folder) if problems else "")

    def alone(self) -> Ended:
        """The run that nobody disturbs."""
        self.folder.mkdir(parents=True)
        start = self._start("alone")
        start.wait(lambda: start.step() > 0, _START_SECONDS)
        self._first_step_seconds = time.monotonic() - start.begun
        start.wait(lambda: start.code is not None, _END_SECONDS)
        return self._ended([] if start.code == 0 else [f"exit code {start.code}: {start.last_line()}"])

    def killed(self, kill: Kill, point: int) -> Ended:
        """Start, or go on, and be killed."""
        run_dir = self.folder / "killed"
        start = self._start("killed", max_restarts=3 if kill.restart else 0)
        problems = []
        if self._orphans is not None:
            problems += self._orphans.left_over()
            self._orphans = None
        if not self._wait_for(start, kill, point):
            if start.code == 0:
                return self._ended(problems, "it had ended", missed=True)
            return self._ended([*problems, f"ended before the kill, exit code {start.code}: {start.last_line()}"])
        training = kill.moment != "start"
        killed_at = start.step()
        start.send(kill.number, kill.target)
        note = ""
        if kill.restart:
            problems += self._came_back(start, killed_at)
            start.send(signal.SIGKILL, "all")
        elif kill.number is not signal.SIGKILL or kill.target in ("a worker", "rank 0"):
            try:
                start.wait(lambda: False, _LEAVE_SECONDS + 30)  # torchrun gives its workers 30 s to end
            except UserError as error:
                problems.append(str(error))
        with suppress(psutil.TimeoutExpired):
            start.process.wait(_LEAVE_SECONDS)
        if kill.at_once and kill.target in ("all", "launcher") and not problems:
            self._orphans = start  # the next start has to cope with them
        else:
            problems += start.left_over()
        if training and kill.number is not signal.SIGKILL:
            problems += self._stopped(start)
        problems += [f"{path.name} though nothing but a kill happened" for path in run_dir.glob("**/*.damaged")]
        return self._ended(problems, note)

    def _wait_for(self, start: Start, kill: Kill, point: int) -> bool:
        """Whether the moment came before the run ended."""
        if kill.moment == "start":
            while time.monotonic() - start.begun < kill.share * self._first_step_seconds:
                time.sleep(_POLL_SECONDS)
            if kill.target in ("a worker", "rank 0", "all workers"):  # there has to be one
                return start.wait(lambda: len(start.workers()) == self.configuration.processes, _START_SECONDS)
            return start.code is None
        if not start.wait(lambda: start.step() >= point, _START_SECONDS):
            return False
        if kill.moment == "write" and not start.wait(start.writes, _START_SECONDS):
            return False
        time.sleep(kill.share * 0.03)  # about a step of these runs, and about a write
        return start.code is None

    def _came_back(self, start: Start, killed_at: int) -> list[str]:
        """What kept torchrun from bringing its workers back at the first restart."""
        try:
            ended = not start.wait(lambda: 1 in start.restarts() and start.step() > killed_at, _BACK_SECONDS)
        except UserError:
            return [f"no step within {_BACK_SECONDS:.0f} s of the restart: {start.last_line()}"]
        if ended and start.code != 0:
            return [f"not brought back, exit code {start.code}: {start.last_line()}"]
        return [] if max(start.restarts(), default=1) <= 1 else ["brought back at a later restart than the first"]

    def _stopped(self, start: Start) -> list[str]:
        """A signal that asks a run in training to stop leaves a checkpoint and says so."""
        done = start.run_dir / "done.json"
        status = done.read_text(encoding="utf-8") if done.exists() else "no done.json"
        if '"stopped"' in status or '"finished"' in status:
            return []
        return [f"not stopped in order: exit code {start.code}, {' '.join(status.split())}: {start.last_line()}"]

    def end(self) -> Ended:
        """The same command to its end, and every digit beside the run left alone."""
        if not (self.folder / "alone" / "done.json").exists():
            return self._ended(["no run to compare with"])
        start = self._start("killed")
        problems = self._orphans.left_over() if self._orphans is not None else []
        start.wait(lambda: False, _END_SECONDS)
        if start.code:
            return self._ended([*problems, f"exit code {start.code}: {start.last_line()}"])
        differing = compare_runs(self.folder / "alone", self.folder / "killed")
        problems += [*differing[:3], f"{len(differing)} figures differ"] if differing else []
        if not problems and not self._wrong:
            shutil.rmtree(self.folder)
        return self._ended(problems, "every digit" if not differing else "")
