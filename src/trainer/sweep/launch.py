"""``python -m narrowgauge --multirun``: many runs, each a process tree in a directory named by its overrides.

Hydra's sweeper expands the overrides, its launcher plugin ``hydra_plugins.narrowgauge`` comes back here. A sweep keeps
no state beside the run directories: a job's own ``done.json`` says whether there is anything left to do.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.live import Live
from rich.table import Table
from yaml import YAMLError

from ...precision.loading import sha256
from ...precision.recipe import close
from ..build import require_data
from ..config import (
    TrainConfig,
    entry_config,
    for_compose,
    load_config,
    load_run_config,
    parse,
    said_files,
)
from ..data.batches import DataConfig
from ..errors import ExitCode, UserError, one_line
from ..files import lock, read_json
from ..lifeline import end_with_parent
from ..machine import threads_of_process
from ..metrics import SWEEP, read_metrics
from ..own import NOWHERE, Place, hydra_at, setting, shell, split
from ..tools.verify import command
from .slurm import sbatch_script

LAUNCHER = "narrowgauge"
_SUBMITIT, _OPTUNA = "hydra_plugins.hydra_submitit_launcher", "hydra_plugins.hydra_optuna_sweeper"
# What needs a package of its own, and which: the configs in configs/hydra/ build on it.
PLUGINS = {
    "hydra/launcher": {"submitit_slurm": _SUBMITIT, "submitit_local": _SUBMITIT, "slurm": _SUBMITIT},
    "hydra/sweeper": {"optuna": _OPTUNA, "lr_search": _OPTUNA},
}
_LONGEST_NAME = 120  # bytes; file systems take 255, people fewer
_TELLING = r"(precision|seed|optim|model=|data=)"
# Changes of these leave a run's result as it is, but for the last bits.
_NO_RESULT = re.compile(
    r"(run|log|parallel|checkpoint|resume|sample)\.|train\.(stop_after|micro_batch_size)$|"
    r"data\.(verify|attempts|min_bytes_per_second)$"
)
_POLL_SECONDS = 0.2
_SHOW_ROWS = 40


@dataclass
class LauncherConfig:
    """``hydra.launcher.*`` of a sweep."""

    _target_: str = "hydra_plugins.narrowgauge.launcher.NarrowgaugeLauncher"
    processes: int = 1  # of each job; more than one is a torchrun
    jobs: int = 1  # at a time
    dry_run: bool = False  # print the commands instead


class State(Enum):
    """Where a job stands."""

    waiting = "waiting"
    running = "running"
    finished = "finished"
    diverged = "diverged"
    stopped = "stopped"
    failed = "failed"


class JobsFailed(UserError):
    """Some jobs of a sweep failed; the others went on."""


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
    state: State = State.waiting
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
        return self.state not in (State.waiting, State.running)

    def settle(self) -> bool:
        """Take over what an earlier sweep finished here. A diverged run is a result: it is not tried again."""
        done = _done(self.directory)
        status, step = done.get("status"), int(done.get("step", 0))
        if (status == "finished" and step >= self.steps) or status == "diverged":
            self.state, self.step, self.skipped = State(status), step, True
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
        self.state, self._started = State.running, time.monotonic()

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
        self.state = State(done["status"]) if done.get("status") in State.__members__ else State.failed
        self.step = int(done.get("step", self.step))
        self.reason = str(done.get("reason") or "") or (_last_error(self.directory, code) if code else "")
        self.loss = final_loss(self.directory) if self.state is State.finished else self.loss
        return True


def sweep(arguments: Sequence[str]) -> ExitCode:
    """Every combination of the overrides' values as one job each; the same command goes on where it was stopped.

    Raises UserError, one line, for an unknown key, value, group or grid, before anything starts.
    """
    place, told = split(arguments)
    overrides = expand_named(told, place)
    parsed = parse(overrides)
    own = [override for override in parsed if not _is_hydra(override)]
    said = said_files(parse([text for text in told if not text.startswith("sweep=")]))
    if unsaid := sorted(said_files(parsed) - said):
        raise UserError(
            f"the grid names the recipe file {unsaid[0]} (sha256 {sha256(unsaid[0])}): it is Python, and runs only if "
            f"the command line says precision.recipe={unsaid[0]}"
        )
    configs = _check(parsed, own, place)
    dry = next((o for o in parsed if o.key_or_group == "hydra.launcher.dry_run"), None)
    if dry is not None and dry.value() and _chosen(parsed, "hydra/sweeper") in PLUGINS["hydra/sweeper"]:
        raise UserError(f"{dry.input_line}: a search chooses its runs as it goes, so there is no list to print")
    if dry is not None and _chosen(parsed, "hydra/launcher") != LAUNCHER:
        parsed.remove(dry)  # such launchers do not know it
    try:
        with hydra_at(place) as hydra:
            name, lines = entry_config(place, own), [for_compose(override) for override in parsed]
            shown = dry is not None and dry.value()
            if not any(map(_is_interval, parsed)) and not _chosen(parsed, "hydra/sweeper"):
                config = hydra.compose_config(name, lines, run_mode=RunMode.MULTIRUN)
                if _chosen(parsed, "hydra/launcher") != LAUNCHER:
                    jobs = make_jobs(config, [_own(job) for job in expand(overrides)], place.flags)
                    if shown:
                        _print_slurm(config, jobs)
                        return ExitCode.FINISHED
                    _require_data(job.data for job in jobs if not job.settle())
                elif not shown and not any(Path(config.hydra.sweep.dir).glob("*/done.json")):
                    _require_data(config.data for config in configs)  # before Hydra makes a directory
        with hydra_at(place) as hydra:
            hydra.multirun(name, partial(run_task, flags=place.flags), lines)
    except JobsFailed as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return ExitCode.FAILED
    except SweepStopped as error:
        print(error, file=sys.stderr, flush=True)
        return ExitCode.STOPPED
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from error
    except RuntimeError as error:  # Hydra's, bare
        if "Invalid plugin" not in str(error):
            raise
        raise UserError(one_line(error)) from error
    return ExitCode.FINISHED


def _print_slurm(config: DictConfig, jobs: Sequence[Job]) -> None:
    """The jobs, and the script that submitit's launcher would hand to sbatch for them."""
    options = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(options, dict)
    print(sbatch_script({str(key): value for key, value in options.items()}, len(jobs)))
    for index, job in enumerate(jobs):
        print(f"# task {index}: {shell(['python', '-m', 'narrowgauge', *job.arguments])}")


def _chosen(parsed: Sequence[Override], group: str) -> str:
    return str(next((o.value() for o in parsed if o.key_or_group == group), ""))


def named_grids(place: Place = NOWHERE) -> list[str]:
    """The names of ``configs/sweep/*.yaml``, and of the user's own."""
    return place.choices("sweep")


def expand_named(arguments: Sequence[str], place: Place = NOWHERE) -> list[str]:
    """The arguments with ``sweep=NAME`` replaced by the overrides of that grid, and Hydra's part filled in.

    The grid's file has two lists in Hydra's grammar: ``fixed``, the same for all jobs and no part of their names, and
    ``grid``. What the command line says about a key takes the place of what the grid says, and is part of names; other
    keys are part of names if they have several values.
    """
    given = [text for text in arguments if not text.startswith("sweep=")]
    names = [text.removeprefix("sweep=") for text in arguments if text.startswith("sweep=")]
    told = parse(given)
    keys = {override.key_or_group for override in told}
    result: list[str] = []
    grid: list[Override] = []
    if len(names) > 1:
        raise UserError(f"sweep={names[0]} and sweep={names[1]}: one grid at a time")
    for name in names:
        file = place.find("sweep", name)
        if file is None:
            known = named_grids(place)
            raise UserError(f"sweep={name}: no such grid{close(name, known)}; there are: {', '.join(known)}")
        fixed, varied = (parse(texts) for texts in _read_grid(file))
        grid = [*fixed, *varied]
        told = [*told, *fixed]
        result = [override.input_line or "" for override in grid if override.key_or_group not in keys]
    ours = {override.key_or_group for override in grid}
    constant = [o for o in told if not (_is_hydra(o) or o.is_sweep_override())]
    unnamed = [o.key_or_group for o in constant if o.key_or_group not in keys & ours]
    result += given
    present = {override.key_or_group for override in parse(result)}
    defaults = {
        "hydra/launcher": LAUNCHER,
        "hydra.sweep.dir": f"multirun/{names[0] if names else 'sweep'}",
        "hydra.sweep.subdir": "${hydra.job.override_dirname}",
        "hydra.job.config.override_dirname.exclude_keys": f"[{','.join(unnamed)}]",
    }
    return [*result, *(f"{key}={value}" for key, value in defaults.items() if key not in present)]


def _read_grid(file: Path) -> tuple[list[str], list[str]]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file))
        assert isinstance(tree, dict)
        if unknown := sorted(str(key) for key in tree.keys() - {"fixed", "grid"}):
            raise UserError(f"{file}: unknown key {unknown[0]!r}{close(unknown[0], ['fixed', 'grid'])}")
        fixed, grid = (tree.get(key) or [] for key in ("fixed", "grid"))
        if not (isinstance(fixed, list) and isinstance(grid, list)):
            raise UserError(f"{file}: fixed and grid are lists of key=value")
        return [str(text) for text in fixed], [str(text) for text in grid]
    except (OSError, AssertionError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error


def _check(parsed: Sequence[Override], own: Sequence[Override], place: Place) -> list[TrainConfig]:
    """The configs of every value of every key once, beside the first values of the others."""
    for override in parsed:
        if override.key_or_group.startswith("hydra.searchpath"):
            raise UserError(f"{override.key_or_group}: --config-dir=DIR is where configs of your own are")
        if "_target_" in override.key_or_group.split(".") or (
            _is_hydra(override) and "_target_" in str(override.value())
        ):
            raise UserError(f"{override.key_or_group}: a config names things, it never executes them")
    for override in own:
        if override.key_or_group in ("run.dir", "run.resume"):
            raise UserError(
                f"{override.key_or_group}: a sweep names its runs itself; hydra.sweep.dir says where they go"
            )
    for group, plugins in PLUGINS.items():
        chosen = _chosen(parsed, group)
        if chosen in plugins and importlib.util.find_spec(plugins[chosen]) is None:
            package = plugins[chosen].rpartition(".")[2].replace("_", "-")
            raise UserError(f"{group}={chosen}: pip install {package} (or 'narrowgauge[sweep]')")
    for override in parsed:
        if override.key_or_group.startswith("hydra.launcher."):
            _check_launcher(override, parsed)
    hydra_keys = [
        override.input_line or ""
        for override in parsed
        if _is_hydra(override) and not re.match(r"hydra[./](launcher|sweeper)\b", override.key_or_group)
    ]
    values = {o.key_or_group: [text.lstrip("+") for text in _choices(o)] for o in own}
    configs = [load_config([*place.flags, *(choices[0] for choices in values.values()), *hydra_keys])]
    for key, choices in values.items():
        others = [theirs[0] for other, theirs in values.items() if other != key]
        for choice in choices[1:]:
            configs += [load_config([*place.flags, *others, choice])]
    return configs


def _check_launcher(override: Override, parsed: Sequence[Override]) -> None:
    launcher = _chosen(parsed, "hydra/launcher")
    name = override.key_or_group.removeprefix("hydra.launcher.")
    known = [part.name for part in fields(LauncherConfig) if part.name != "_target_"]
    if launcher == LAUNCHER and name not in known:
        raise UserError(f"unknown key {override.key_or_group!r}{close(name, known)}; there are: {', '.join(known)}")
    value = override.value()
    if launcher == LAUNCHER and name in ("processes", "jobs") and (not isinstance(value, int) or value < 1):
        raise UserError(f"{override.input_line}: must be a whole number, at least 1")


def _choices(override: Override) -> list[str]:
    if _is_interval(override):  # for sweepers that search
        value = override.value()
        return [f"{override.key_or_group}={end}" for end in (value.start, value.end)]
    batches = BasicSweeper.split_arguments([override], None)
    if not batches or not batches[0]:
        raise UserError(f"{override.input_line}: no values")
    return [job[0] for job in batches[0]]


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job, as Hydra's basic sweeper makes them."""
    return [list(job) for batch in BasicSweeper.split_arguments(parse(overrides), None) for job in batch]


def _is_interval(override: Override) -> bool:
    return isinstance(override.value(), IntervalSweep)


def _is_hydra(override: Override) -> bool:
    return re.match(r"hydra[./]", override.key_or_group) is not None


def job_name(overrides: Iterable[str], exclude: Iterable[str] = ()) -> str:
    """A directory name from overrides, whatever their order: ``optim.lr=1e-3,precision=bf16,seed=0``.

    What file systems take badly becomes ``-``. A name that is too long keeps what sweeps are mostly about. Where that
    loses something, a hash of all overrides follows.
    """
    own = sorted(_own(overrides))
    parts = [text for text in own if text.partition("=")[0] not in set(exclude)]
    full = ",".join(parts)
    kept = parts if len(full) <= _LONGEST_NAME else [text for text in parts if re.match(_TELLING, text)]
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "-", ",".join(kept))[:_LONGEST_NAME]
    if name != full:
        name = f"{name}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"
    return name or "defaults"


def _own(overrides: Iterable[str]) -> list[str]:
    """Without Hydra's."""
    return [text.lstrip("+") for text in overrides if not text.startswith(("hydra.", "hydra/"))]


def make_jobs(config: DictConfig, batch: Sequence[Sequence[str]], flags: Sequence[str] = ()) -> list[Job]:
    """Jobs under ``hydra.sweep.dir``, one for each list of overrides; ``flags`` as ``trainer.own.split`` takes them.

    A job goes where a run of its config lies already, whatever it is called: an earlier command may have varied other
    keys. No job goes where another config's run lies. Raises UserError for a config that is not valid.
    """
    root = Path(config.hydra.sweep.dir)
    exclude = set(config.hydra.job.config.override_dirname.exclude_keys)
    own = {job_name(overrides, exclude): _own(overrides) for overrides in batch}
    varied = {text.partition("=")[0] for texts in own.values() for text in texts} - exclude
    configs = {name: load_config([*flags, *texts], keys_are_known=True) for name, texts in own.items()}
    there = {path.parent.name: _identity(known, varied) for path, known in _runs_in(root)}
    places = {name: name for name, one in configs.items() if there.get(name) == _identity(one, varied)}
    for name, one in configs.items():
        identity = _identity(one, varied)
        same = [other for other in there if there[other] == identity and other not in places.values()]
        if name in places:
            continue
        places[name] = same[0] if same else name
        if not same and name in there:
            before, now = json.loads(there[name]), json.loads(identity)
            key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
            places[name] = f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
            say = (
                f"{name} holds a run with {key}={before.get(key)}, not {now.get(key)}: this one goes to {places[name]}"
            )
            print(say, file=sys.stderr, flush=True)
    return [
        Job(
            name=places[name],
            directory=root / places[name],
            overrides=[*texts, setting("run.dir", str(root / places[name]))],
            steps=configs[name].train.steps,
            flags=list(flags),
            data=configs[name].data,
        )
        for name, texts in own.items()
    ]


def _runs_in(root: Path) -> Iterator[tuple[Path, TrainConfig]]:
    for file in sorted(root.glob("*/config.yaml")):
        try:
            yield file, load_run_config(file, None)  # a recipe file that it names is not run
        except UserError:  # its own run says so
            continue


def _identity(config: TrainConfig, varied: set[str]) -> str:
    """What tells a run's result from another's, as JSON: all keys but those that change none and are not ``varied``."""
    parts = {
        key: value
        for key, value in sorted(config.flat().items())
        if not _NO_RESULT.match(key) or any(key == one or key.startswith(f"{one}.") for one in varied)
    }
    return json.dumps(parts, default=str)


def _require_data(configs: Iterable[DataConfig | None]) -> None:
    """Raises UserError if the tokenizer or text of any of them is missing."""
    for config in {repr(config): config for config in configs}.values():
        if config is not None:
            require_data(config)


def launch(
    config: DictConfig, batch: Sequence[Sequence[str]], options: LauncherConfig, flags: Sequence[str] = ()
) -> list[JobReturn]:
    """What Hydra's launcher is asked for: run every job, and say how each ended.

    A job's value, for sweepers that search, is its final validation loss, infinite if it diverged. Raises SweepStopped,
    and UserError before the first job if data are missing.
    """
    jobs = make_jobs(config, batch, flags)
    if options.jobs > 1:
        _share_cores(jobs, options)
    if options.dry_run:
        for job in jobs:
            print(shell(command(job.arguments, options.processes)))
    else:
        run_jobs(jobs, processes=options.processes, at_once=options.jobs)
    return [_returned(job, jobs) for job in jobs]


def _share_cores(jobs: Sequence[Job], options: LauncherConfig) -> None:
    """Give jobs that run at once their share of the cores each: threads that outnumber cores wait for one another."""
    threads = threads_of_process(options.jobs * options.processes)
    for job in jobs:
        if not any(override.startswith("parallel.threads=") for override in job.overrides):
            job.overrides.append(f"parallel.threads={threads}")


def _returned(job: Job, jobs: Sequence[Job]) -> JobReturn:
    result = JobReturn(overrides=job.overrides, working_dir=str(job.directory), status=JobStatus.COMPLETED)
    if job.state is State.failed:
        failed = [other.name for other in jobs if other.state is State.failed]
        result.status = JobStatus.FAILED
        result.return_value = JobsFailed(
            f"{len(failed)} of {len(jobs)} jobs failed ({job.name}: {job.reason}); the same command tries them again"
        )
    else:
        result.return_value = job.loss if job.state is State.finished and job.loss is not None else math.inf
    return result


def run_task(config: DictConfig, flags: Sequence[str] = ()) -> float:
    """One job under a launcher other than ours (Hydra's basic one, joblib, submitit): on all GPUs there are."""
    overrides = list(HydraConfig.get().overrides.task)
    tree = OmegaConf.create({"hydra": HydraConfig.get()})
    jobs = make_jobs(tree, [overrides], flags)
    run_jobs(jobs, processes=max(1, torch.cuda.device_count()), at_once=1)
    returned: float = _returned(jobs[0], jobs).return_value
    return returned


def run_jobs(
    jobs: Sequence[Job],
    *,
    processes: int,
    at_once: int,
    make_command: Callable[[Sequence[str], int], list[str]] = command,
) -> None:
    """Run what is not done yet, ``at_once`` jobs at a time, in their order; one that fails does not stop the others.

    The first signal asks the running jobs to write a checkpoint and stop, the second kills them. Raises SweepStopped.
    """
    shown = _Display(jobs)
    with _signals() as received, shown:
        for job in jobs:
            if job.settle():
                shown.say(job, f"{job.state.value} already at step {job.step}")
        _require_data(job.data for job in jobs if not job.over)
        asked = 0
        while not all(job.over for job in jobs):
            running = [job for job in jobs if job.state is State.running]
            for job in running:
                if job.poll():
                    shown.say(job, _ending(job))
            if received and asked != len(received):
                asked = len(received)
                _stop([job for job in running if not job.over], signal.SIGTERM if asked == 1 else signal.SIGKILL)
            running = [job for job in running if not job.over]
            if received and not running:
                break
            if not received and len(running) < at_once and (job := _next(jobs, shown)) is not None:
                job.start(make_command(job.arguments, processes))
                shown.say(job, f"started, log in {job.directory / 'console.log'}")
                continue
            shown.update()
            time.sleep(_POLL_SECONDS)
    counts = {state: sum(job.state is state for job in jobs) for state in State}
    told = ", ".join(f"{count} {state.value}" for state, count in counts.items() if count)
    if received:
        raise SweepStopped(f"stopped: {told}; the same command goes on")
    print(f"{len(jobs)} jobs: {told}", flush=True)


def _next(jobs: Sequence[Job], shown: _Display) -> Job | None:
    """The first waiting job whose directory is free: workers of a killed sweep may still be leaving one."""
    for job in jobs:
        if job.state is State.waiting and not _in_use(job.directory):
            if job.settle():  # whoever held it may have finished it
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
    """Step and loss of the last whole train row."""
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
    loss = f", validation loss {job.loss:.4f}" if job.state is State.finished and job.loss is not None else ""
    reason = f": {job.reason}" if job.reason and job.state is not State.finished else ""
    return f"{job.state.value} at step {job.step}{loss}, {job.seconds:.0f} s{reason}"


class _Display:
    """One live table on a terminal, a line for each event elsewhere."""

    def __init__(self, jobs: Sequence[Job], stream: IO[str] | None = None) -> None:
        self._jobs = jobs
        self._console = Console(file=stream)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> _Display:
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
        quiet = (State.finished, State.waiting) if len(self._jobs) > _SHOW_ROWS else ()
        for job in self._jobs:
            if job.state not in quiet:
                loss = "" if job.loss is None else f"{job.loss:.4f}"
                state = f"{job.state.value}{' before' if job.skipped else ''}"
                table.add_row(job.name, state, f"{job.step}/{job.steps}", loss, f"{job.seconds:.0f} s")
        over = sum(job.over for job in self._jobs)
        table.caption = f"{over} of {len(self._jobs)} jobs over"
        return table
