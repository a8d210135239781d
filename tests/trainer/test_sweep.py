"""Sweeps: what they expand to, how runs are named, what is skipped, tried again and stopped. Jobs are shell scripts."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import tiny_overrides
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from narrowgauge.trainer import machine
from narrowgauge.trainer.checkpoint import list_checkpoints
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data.open import require_data
from narrowgauge.trainer.entry import main
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.own import NOWHERE, setting
from narrowgauge.trainer.reporting.report import Settings, write_report
from narrowgauge.trainer.sweep import launch
from narrowgauge.trainer.sweep.grid import expand, expand_named, job_name
from narrowgauge.trainer.sweep.jobs import Display, Job, JobState, SweepStopped, run_jobs
from narrowgauge.trainer.sweep.launch import sweep
from omegaconf import OmegaConf

TIMES = ("tokens_per_second", "seconds")  # columns that no restart leaves alone
END = """mkdir -p '{dir}'; echo run >> '{dir}/attempts'
echo '{{"kind": "eval", "step": 5, "loss": 3.5}}' > '{dir}/metrics.jsonl'
echo '{{"status": "{status}", "step": 5, "reason": "why"}}' > '{dir}/done.json'; exit {code}"""


def shell(**endings: str) -> Callable[[Sequence[str], int], list[str]]:
    """Commands whose end is the one given for the job's first override, ``finished`` where none is."""

    def make(overrides: Sequence[str], processes: int) -> list[str]:
        directory = next(text for text in overrides if text.startswith("run.dir=")).removeprefix("run.dir=").strip("'")
        status = endings.get(overrides[0].partition("=")[2], "finished")
        if status.startswith("sh:"):
            return ["sh", "-c", status.removeprefix("sh:").format(dir=directory)]
        return ["sh", "-c", END.format(dir=directory, status=status, code=int(status != "finished"))]

    return make


def jobs_in(root: Path, *names: str, steps: int = 5) -> list[Job]:
    return [
        Job(name=f"name={n}", directory=root / n, overrides=[f"name={n}", f"run.dir='{root / n}'"], steps=steps)
        for n in names
    ]


def attempts(root: Path, name: str) -> int:
    return len((root / name / "attempts").read_text().splitlines())


def test_expansion_is_hydras_own_grammar() -> None:
    jobs = expand(["precision=bf16,fp8_delayed", "seed=range(0,3)", "optim.lr=1e-3,3e-3", "train.steps=5"])
    assert len(jobs) == 12
    assert jobs[0] == ["precision=bf16", "seed=0", "optim.lr=0.001", "train.steps=5"]
    assert len({job_name(job) for job in jobs}) == 12


def test_runs_are_named_by_their_overrides_in_any_order() -> None:
    name = "optim.lr=0.001,precision=bf16,seed=0"
    assert job_name(["seed=0", "precision=bf16", "optim.lr=0.001"]) == name
    assert job_name(["optim.lr=0.001", "seed=0", "hydra.sweep.dir=x", "precision=bf16"]) == name
    assert job_name(["seed=0", "train.steps=5"], exclude=["train.steps"]) == "seed=0"
    assert job_name([]) == "defaults"
    slashed, dashed = job_name(["data.path=/a/b"]), job_name(["data.path=-a-b"])
    assert slashed.startswith("data.path=-a-b-")
    assert slashed != dashed == "data.path=-a-b"
    long = [job_name(["precision=bf16", f"sample.prompt={'x' * 300}{end}"]) for end in "ab"]
    assert long[0] != long[1]
    assert all(name.startswith("precision=bf16-") and len(name) < 200 for name in long)


def test_the_command_line_overrules_a_named_grid() -> None:
    assert {"example", "first_sweep"} <= set(NOWHERE.choices("sweep"))
    told = expand_named(["sweep=example", "seed=7", "train.steps=3"])
    assert "seed=7" in told
    assert "train.steps=3" in told
    assert not any(text in told for text in ("seed=0,1", "train.steps=100"))
    assert "hydra.sweep.dir=multirun/example" in told
    excluded = next(text for text in told if "exclude_keys" in text)
    assert "model" in excluded
    assert "train.steps" not in excluded  # it tells these runs from the grid's


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep=exampel"], "did you mean 'example'"),
        (["precision=bf16,fp8_delayd"], "did you mean 'fp8_delayed'"),
        (["optim.lrr=1,2"], "did you mean 'optim.lr'"),
        (["optim.lr=1e-3,-1"], "optim.lr"),
        (["seed=0,1", "run.dir=x"], "hydra.sweep.dir"),
        (["seed=0,1", "hydra.launcher.proceses=2"], "did you mean 'processes'"),
        (["seed=0,1", "hydra.launcher.jobs=0"], "at least 1"),
        (["seed=0,1", "hydra/launcher=narowgauge"], "narrowgauge"),
        (["sweep=example", "sweep=first_sweep"], "one grid at a time"),
        (["seed"], "write key=value"),
        (["hydra/sweeper=lr_search", "hydra.launcher.dry_run=true"], "no list to print"),
        (["optim.lr=interval(1e-4,1e-2)"], "INTERVAL_SWEEP"),
        (["optim.lr=interval(-1,1e-2)", "hydra/sweeper=optuna"], "optim.lr"),
        (["seed=0,1", "hydra/launcher=submitit_local", "hydra.launcher.dry_run=true"], "have a dry run"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        sweep(arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_several_values_without_multirun_are_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for arguments in (["seed=0,1"], ["sweep=example"]):
        monkeypatch.setattr("sys.argv", ["trainer", *arguments])
        assert main() == ExitCode.BAD_INPUT
        assert "python -m narrowgauge --multirun" in capsys.readouterr().err


def test_under_torchrun_the_right_command_is_told(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("narrowgauge.trainer.entry.launched_by_torchrun", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("sys.argv", ["trainer", "--multirun", "seed=0,1"])
    assert main() == ExitCode.BAD_INPUT
    assert "python -m narrowgauge --multirun hydra.launcher.processes=4 seed=0,1" in capsys.readouterr().err


def test_hydra_finds_the_launcher_and_hands_it_the_jobs(tmp_path: Path, capsys, monkeypatch) -> None:
    assert "NarrowgaugeLauncher" in {plugin.__name__ for plugin in Plugins.instance().discover(Launcher)}
    monkeypatch.chdir(tmp_path)
    told = ["precision.args.history=4,8", "precision=fp8_delayed", "hydra.launcher.processes=2"]
    assert sweep([*told, "hydra.launcher.dry_run=true"]) == ExitCode.FINISHED
    lines = [line for line in capsys.readouterr().out.splitlines() if "-m narrowgauge" in line]
    assert len(lines) == 2
    assert "torch.distributed.run --standalone --nproc-per-node 2 -m narrowgauge" in lines[0]
    assert "run.dir='multirun/sweep/precision.args.history=4'" in lines[0]


def test_jobs_at_once_share_the_cores_unless_told_otherwise(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "available_cores", lambda root: 12)
    monkeypatch.setattr(machine, "_GIVEN_THREADS", "")
    for jobs, told, wanted in (("3", [], "2"), ("100", [], "1"), ("3", ["parallel.threads=5"], "5"), ("1", [], None)):
        sweep(
            [
                "seed=0,1",
                "hydra.launcher.processes=2",
                f"hydra.launcher.jobs={jobs}",
                "hydra.launcher.dry_run=true",
                *told,
            ]
        )
        lines = [line for line in capsys.readouterr().out.splitlines() if "-m narrowgauge" in line]
        assert [line.count(" parallel.threads=") for line in lines] == [int(wanted is not None)] * 2
        assert wanted is None or all(f"parallel.threads={wanted}" in line.split() for line in lines)


def test_finished_and_diverged_runs_are_skipped_and_failed_ones_tried_again(tmp_path: Path, capsys) -> None:
    command = shell(b="failed", c="diverged")
    first = jobs_in(tmp_path, "a", "b", "c", "d")
    run_jobs(first, processes=1, concurrent=2, make_command=command)
    assert [job.state.value for job in first] == ["finished", "failed", "diverged", "finished"]
    assert (first[0].loss, first[1].reason) == (3.5, "why")
    second = jobs_in(tmp_path, "a", "b", "c", "d")
    run_jobs(second, processes=1, concurrent=2, make_command=shell())
    assert [job.state.value for job in second] == ["finished", "finished", "diverged", "finished"]
    assert [attempts(tmp_path, name) for name in "abcd"] == [1, 2, 1, 1]
    assert "name=b: failed at step 5" in capsys.readouterr().out


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(tmp_path: Path) -> None:
    run_jobs(jobs_in(tmp_path, "a"), processes=1, concurrent=1, make_command=shell())
    run_jobs(jobs_in(tmp_path, "a", steps=9), processes=1, concurrent=1, make_command=shell())
    assert attempts(tmp_path, "a") == 2


def test_a_job_that_says_nothing_has_failed_whatever_an_earlier_one_left(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "done.json").write_text(json.dumps({"status": "stopped", "step": 2, "reason": "a signal"}))
    jobs = jobs_in(tmp_path, "a")
    run_jobs(jobs, processes=1, concurrent=1, make_command=shell(a="sh:echo error: no such corpus >&2; exit 2"))
    assert (jobs[0].state, jobs[0].reason) == (JobState.failed, "no such corpus")


def test_a_directory_in_use_is_waited_for(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path, "a", "b")
    (tmp_path / "a").mkdir()
    lock = (tmp_path / "a" / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_SH)
    threading.Timer(1.0, lock.close).start()
    start = time.monotonic()
    run_jobs(jobs, processes=1, concurrent=2, make_command=shell())
    assert time.monotonic() - start >= 1.0
    assert [job.state for job in jobs] == [JobState.finished, JobState.finished]


def test_a_signal_stops_the_jobs_and_the_same_command_goes_on(tmp_path: Path) -> None:
    stopped = END.replace("{status}", "stopped").replace("{code}", "1")
    waiting = f"sh:trap : TERM; touch '{{dir}}/up'; sleep 60 & wait; kill $!; {stopped}"
    jobs = jobs_in(tmp_path, "a", "b")

    def ask() -> None:
        while not (tmp_path / "a" / "up").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    with pytest.raises(SweepStopped, match="1 waiting, 1 stopped; the same command goes on"):
        run_jobs(jobs, processes=1, concurrent=1, make_command=shell(a=waiting))
    again = jobs_in(tmp_path, "a", "b")
    run_jobs(again, processes=1, concurrent=1, make_command=shell())
    assert [job.state for job in again] == [JobState.finished, JobState.finished]
    assert attempts(tmp_path, "a") == 2


def grid(root: Path, *overrides: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The configs of a dry run's jobs, as the shell and the trainer read their lines."""
    capsys.readouterr()
    told = [*overrides, setting("hydra.sweep.dir", str(root)), "hydra.launcher.dry_run=true"]
    assert sweep(told) == ExitCode.FINISHED
    lines = [line for line in capsys.readouterr().out.splitlines() if "-m narrowgauge" in line]
    return [load_config(shlex.split(line)[3:]).flat() for line in lines]


def begin(values: dict[str, Any], *, directory: str | None = None) -> None:
    """Leave what a run of this config leaves, under another name if that is given."""
    place = Path(values["run.dir"]) if directory is None else Path(values["run.dir"]).parent / directory
    place.mkdir(parents=True)
    config = load_config([setting(key, value) for key, value in values.items() if key.startswith(KEYS)])
    (place / "config.yaml").write_text(config.to_yaml())
    (place / "metrics.jsonl").touch()


KEYS = ("seed", "optim.lr", "train.steps", "precision.name", "precision.recipe")


def names(jobs: list[dict[str, Any]]) -> list[str]:
    return [Path(job["run.dir"]).name for job in jobs]


def test_runs_are_named_by_what_varies_alone(tmp_path: Path, capsys) -> None:
    fixed = ["train.steps=50", "sample.prompt='a, b'", "model=llama_tiny"]
    assert names(grid(tmp_path, "seed=0,1", *fixed, capsys=capsys)) == ["seed=0", "seed=1"]
    assert names(grid(tmp_path, "seed=3", *fixed, capsys=capsys)) == ["defaults"]


def test_a_run_is_found_again_when_another_key_begins_to_vary(tmp_path: Path, capsys) -> None:
    first = grid(tmp_path, "optim.lr=1e-3,3e-3", "seed=0", capsys=capsys)
    for job in first:
        begin(job)
    second = grid(tmp_path, "optim.lr=1e-3,3e-3", "seed=0,1", capsys=capsys)
    assert names(second) == ["optim.lr=0.001", "optim.lr=0.001,seed=1", "optim.lr=0.003", "optim.lr=0.003,seed=1"]
    assert names(grid(tmp_path, "optim.lr=1e-3", "seed=0", "log.every=3", capsys=capsys)) == ["optim.lr=0.001"]


def test_a_run_is_found_under_the_name_that_an_earlier_sweep_gave_it(tmp_path: Path, capsys) -> None:
    (job,) = grid(tmp_path, "seed=0", "train.steps=50", capsys=capsys)
    begin(job, directory="seed=0,train.steps=50")
    assert names(grid(tmp_path, "seed=0,1", "train.steps=50", capsys=capsys)) == ["seed=0,train.steps=50", "seed=1"]


@pytest.mark.parametrize("changed", ["train.steps=70", "optim.lr=0.5"], ids=["length", "rate"])
def test_no_run_goes_on_where_another_configs_lies(changed: str, tmp_path: Path, capsys) -> None:
    for job in grid(tmp_path, "seed=0,1", "train.steps=50", capsys=capsys):
        begin(job)
    told = ["seed=0,1", "train.steps=50", changed] if "lr" in changed else ["seed=0,1", changed]
    other = grid(tmp_path, *told, capsys=capsys)
    assert [name[:7] for name in names(other)] == ["seed=0-", "seed=1-"]
    begin(other[0])
    assert names(grid(tmp_path, *told, capsys=capsys)) == names(other)
    assert names(grid(tmp_path, "seed=0,1", "train.steps=50", capsys=capsys)) == ["seed=0", "seed=1"]


ODD = ["it's", "a=b,c", "$HOME (x)", "back\\", 'é "q" `x`', "[a] {b}"]


@pytest.mark.parametrize("text", ODD, ids=["apostrophe", "comma", "dollar", "backslash", "quotes", "brackets"])
def test_a_dry_runs_lines_are_what_a_shell_and_the_trainer_read_back(text: str, tmp_path: Path, capsys) -> None:
    jobs = grid(tmp_path / text, "seed=0,1", setting("sample.prompt", text), capsys=capsys)
    assert [job["run.dir"] for job in jobs] == [str(tmp_path / text / f"seed={seed}") for seed in (0, 1)]
    assert [job["sample.prompt"] for job in jobs] == [text, text]


@pytest.mark.parametrize("launcher", ["narrowgauge", "submitit_local"])
def test_missing_data_are_one_line_before_the_first_job(launcher: str, corpus: Path, tmp_path: Path) -> None:
    root, missing = tmp_path / "grid", tmp_path / "none"
    told = ["data.tokenizer=bytes", f"data.path={corpus},{missing}", "seed=0,1", f"hydra/launcher={launcher}"]
    with pytest.raises(UserError) as error:
        sweep([*told, f"hydra.sweep.dir={root}"])
    assert str(error.value).startswith(f"data.path={missing}: no such directory; run python scripts/prepare_data.py ")
    assert "\n" not in str(error.value)
    assert not root.exists()


@pytest.mark.parametrize(
    ("told", "advice"),
    [
        (["data.path=no/where", "data.vocab_size=512"], "data=sample data.path=no/where data.vocab_size=512"),
        (["data.tokenizer=/no/where", "data.seq_len=64"], "data=sample data.tokenizer=/no/where"),
        (["data=c4_stream", "data.path=it's"], "data=c4_stream \"data.path='it\\'s'\""),
        (
            ["data=mix", "data.tokenizer=bytes", "data.sources={a:{path:no/where}}"],
            'data=mix data.tokenizer=bytes "data.sources={a:{path:no/where,weight:1.0}}"',
        ),
    ],
    ids=["corpus", "tokenizer", "stream", "mixture"],
)
def test_the_advice_is_about_the_users_own_data(told: list[str], advice: str) -> None:
    with pytest.raises(UserError) as error:
        require_data(load_config(told).data)
    line = str(error.value).partition("run python scripts/")[2]
    script, *said = shlex.split(line)
    assert said == shlex.split(advice) or load_config(said).data.path == "it's"
    assert script == ("train_tokenizer.py" if "c4_stream" in told[0] else "prepare_data.py")


def test_the_table_has_every_job(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path, "a", "b")
    assert Display(jobs).table().row_count == 2
    many = jobs_in(tmp_path, *map(str, range(100)))
    many[3].state = JobState.failed
    assert Display(many).table().row_count == 1


def hold_in_the_middle(sweep_process: psutil.Process, root: Path) -> list[psutil.Process]:
    """Freeze each of two jobs once it has a checkpoint, and give both back."""
    held: dict[Path, psutil.Process] = {}
    deadline = time.monotonic() + 200
    while len(held) < 2:
        assert time.monotonic() < deadline, [path.read_text() for path in root.glob("*/console.log")]
        assert sweep_process.status() != psutil.STATUS_ZOMBIE, "the sweep ended by itself"
        for checkpoints in root.glob("*/checkpoints"):
            run = checkpoints.parent
            if run not in held and list_checkpoints(checkpoints):
                held[run] = next(job for job in sweep_process.children() if f"run.dir='{run}'" in job.cmdline())
                held[run].suspend()
        time.sleep(0.01)
    assert not any((run / "done.json").exists() for run in held)
    return list(held.values())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.long
def test_a_sweep_killed_in_the_middle_of_two_jobs_ends_as_one_left_alone(corpus: Path, tmp_path: Path) -> None:
    own = [text for text in tiny_overrides(corpus, tmp_path) if not text.startswith("run.dir=")]
    grid = ["precision=bf16,exmy_e8m3", "hydra.launcher.jobs=2", "sample.tokens=0", "checkpoint.asynchronous=false"]
    # Many steps after the first checkpoint, so that no job ends before it is held.
    command = [*own, *grid, "train.steps=48", "eval.every=16", "checkpoint.every=6"]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert sweep([*command, f"hydra.sweep.dir={alone}"]) == ExitCode.FINISHED
    names = sorted(path.name for path in alone.iterdir() if path.is_dir())
    assert names == ["precision=bf16", "precision=exmy_e8m3"]

    start = [sys.executable, "-m", "narrowgauge", "--multirun", *command, f"hydra.sweep.dir={killed}"]
    with subprocess.Popen(start, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        jobs = hold_in_the_middle(psutil.Process(process.pid), killed)
        for victim in (psutil.Process(process.pid), *jobs):
            victim.kill()
    assert sweep([*command, f"hydra.sweep.dir={killed}"]) == ExitCode.FINISHED
    for name in names:
        assert "resuming" in (killed / name / "console.log").read_text()

    told = []
    for root in (alone, killed):
        summary = json.loads(json.dumps(write_report([root], root, Settings())))
        del summary["times"]
        with (root / "summary.csv").open() as file:
            rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
        told.append((summary, rows))
    assert told[0] == told[1]
    assert all(run["state"] == "finished" and run["final_loss"] for run in told[0][0]["runs"].values())


def test_slurm_gets_one_task_a_run(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "precision=bf16,mxfp8", "seed=0,1,2"]
    assert sweep([*told, "hydra.launcher.timeout_min=90", "hydra.launcher.dry_run=true"]) == ExitCode.FINISHED
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    options = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {"array=0-5%6", "partition=gpu", "time=90", "nodes=1", "ntasks-per-node=1", "gpus-per-node=8"} <= options
    assert "-m submitit.core._submit" in script
    assert script.count("# task") == 6
    assert (
        "# task 5: python -m narrowgauge precision=mxfp8 seed=2 run.dir='multirun/sweep/precision=mxfp8,seed=2'"
        in script
    )
    assert not list(tmp_path.iterdir())


def test_a_search_asks_for_runs_one_after_another_and_skips_what_is_done(tmp_path: Path, monkeypatch) -> None:
    asked: list[float] = []

    def pretend(jobs: list[Job], **_: object) -> None:
        for job in jobs:
            lr = float(next(text for text in job.overrides if text.startswith("optim.lr=")).partition("=")[2])
            asked.append(lr)
            job.state, job.loss = JobState.finished, abs(math.log10(lr) + 2)  # best at 1e-2

    monkeypatch.setattr(launch, "run_jobs", pretend)
    (tmp_path / "search").mkdir()
    told = ["hydra/sweeper=lr_search", "hydra.sweeper.n_trials=4", f"hydra.sweep.dir={tmp_path / 'search'}"]
    for _ in range(2):
        assert sweep([*told, "precision=mxfp8"]) == ExitCode.FINISHED
    assert asked[:4] == asked[4:]  # the same rates again: a restart finds its runs
    assert all(1e-4 <= lr <= 1e-1 for lr in asked)
    best = OmegaConf.load(tmp_path / "search" / "optimization_results.yaml")
    assert best.best_params["optim.lr"] == min(asked, key=lambda lr: abs(math.log10(lr) + 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hydra/launcher=submitit_slurm"], "pip install hydra-submitit-launcher"),
        (["hydra/sweeper=optuna"], "pip install hydra-optuna-sweeper"),
    ],
)
def test_what_is_not_installed_is_named(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=words):
        sweep([*arguments, "seed=0,1"])
