"""``python -m narrowgauge --multirun``: many runs, each a process tree in a directory named by its overrides.

Hydra's sweeper expands the overrides, its launcher plugin ``hydra_plugins.narrowgauge`` comes back here. A sweep has
no state but the run directories: a job's own ``done.json`` says whether there is anything left to do.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...precision.loading import sha256
from ..command import command
from ..config import entry_config, for_compose, parse, said_files
from ..errors import ExitCode, UserError, one_line
from ..machine import threads_of_process
from ..own import hydra_at, shell, split
from .grid import (
    LAUNCHER,
    PLUGINS,
    LauncherConfig,
    check,
    chosen,
    expand,
    expand_named,
    is_hydra,
    is_interval,
    make_jobs,
    without_hydra,
)
from .jobs import Job, JobState, SweepStopped, require_data_of, run_jobs

try:
    from submitit.slurm.slurm import SlurmExecutor
except ImportError:
    SlurmExecutor = None


class JobsFailed(UserError):
    """Some jobs of a sweep failed; the others went on."""


def sweep(arguments: Sequence[str]) -> ExitCode:
    """Every combination of the overrides' values as one job each; the same command goes on where it was stopped.

    Raises UserError, one line, for an unknown key, value, group or grid, before anything starts.
    """
    place, rest = split(arguments)
    overrides = expand_named(rest, place)
    parsed = parse(overrides)
    own = [override for override in parsed if not is_hydra(override)]
    said = said_files(parse([text for text in rest if not text.startswith("sweep=")]))
    if unsaid := sorted(said_files(parsed) - said):
        raise UserError(
            f"the grid names the recipe file {unsaid[0]} (sha256 {sha256(unsaid[0])}): it is Python, and runs only if "
            f"the command line says precision.recipe={unsaid[0]}"
        )
    configs = check(parsed, own, place)
    dry = next((o for o in parsed if o.key_or_group == "hydra.launcher.dry_run"), None)
    if dry is not None and dry.value() and chosen(parsed, "hydra/sweeper") in PLUGINS["hydra/sweeper"]:
        raise UserError(f"{dry.input_line}: a search chooses its runs as it goes, so there is no list to print")
    if dry is not None and chosen(parsed, "hydra/launcher") != LAUNCHER:
        parsed.remove(dry)  # such launchers do not know it
    try:
        with hydra_at(place) as hydra:
            name, lines = entry_config(place, own), for_compose(parsed)
            shown = dry is not None and dry.value()
            if not any(map(is_interval, parsed)) and not chosen(parsed, "hydra/sweeper"):
                config = hydra.compose_config(name, lines, run_mode=RunMode.MULTIRUN)
                if chosen(parsed, "hydra/launcher") != LAUNCHER:
                    jobs = make_jobs(config, [without_hydra(job) for job in expand(overrides)], place.flags)
                    if shown:
                        _print_slurm(config, jobs)
                        return ExitCode.FINISHED
                    require_data_of(job.data for job in jobs if not job.take_over())
                elif not shown and not any(Path(config.hydra.sweep.dir).glob("*/done.json")):
                    require_data_of(config.data for config in configs)  # before Hydra makes a directory
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
    """The jobs, and the script that submitit's launcher would hand to sbatch for the array of them, without a cluster.

    Raises UserError for another launcher than submitit's for Slurm.
    """
    launcher = config.hydra.launcher
    if SlurmExecutor is None or not str(launcher.get("_target_", "")).endswith(".SlurmLauncher"):
        raise UserError("hydra.launcher.dry_run: only hydra/launcher=narrowgauge and =submitit_slurm have a dry run")

    class Anywhere(SlurmExecutor):
        """Wants no srun, for it submits nothing."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    executor = Anywhere(folder=launcher.submitit_folder, max_num_timeout=launcher.max_num_timeout)
    others = {"_target_", "submitit_folder", "max_num_timeout"}
    tree = OmegaConf.to_container(launcher, resolve=True)
    options = {key: value for key, value in tree.items() if key not in others and value is not None}
    executor.update_parameters(**executor._convert_parameters(options))
    if len(jobs) > 1:
        executor.parameters["map_count"] = len(jobs)
    print(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))
    for index, job in enumerate(jobs):
        print(f"# task {index}: {shell(['python', '-m', 'narrowgauge', *job.arguments])}")


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
        run_jobs(jobs, processes=options.processes, concurrent=options.jobs)
    return [_returned(job, jobs) for job in jobs]


def _share_cores(jobs: Sequence[Job], options: LauncherConfig) -> None:
    """Give jobs that run at once their share of the cores each: threads that outnumber cores wait for one another."""
    threads = threads_of_process(options.jobs * options.processes)
    for job in jobs:
        if not any(override.startswith("parallel.threads=") for override in job.overrides):
            job.overrides.append(f"parallel.threads={threads}")


def _returned(job: Job, jobs: Sequence[Job]) -> JobReturn:
    result = JobReturn(overrides=job.overrides, working_dir=str(job.directory), status=JobStatus.COMPLETED)
    if job.state is JobState.failed:
        failed = [other.name for other in jobs if other.state is JobState.failed]
        result.status = JobStatus.FAILED
        result.return_value = JobsFailed(
            f"{len(failed)} of {len(jobs)} jobs failed ({job.name}: {job.reason}); the same command tries them again"
        )
    else:
        result.return_value = job.loss if job.state is JobState.finished and job.loss is not None else math.inf
    return result


def run_task(config: DictConfig, flags: Sequence[str] = ()) -> float:
    """One job under a launcher other than ours (Hydra's basic one, joblib, submitit): on all GPUs there are."""
    overrides = list(HydraConfig.get().overrides.task)
    tree = OmegaConf.create({"hydra": HydraConfig.get()})
    jobs = make_jobs(tree, [overrides], flags)
    run_jobs(jobs, processes=max(1, torch.cuda.device_count()), concurrent=1)
    returned: float = _returned(jobs[0], jobs).return_value
    return returned
