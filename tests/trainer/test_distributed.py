"""Laws of several processes: the same data, weights and losses at every world size; kills lose nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from conftest import launch, run_many, tiny_overrides, train_here
from narrowgauge.trainer import distributed
from narrowgauge.trainer.checkpoint import list_checkpoints, read_tensors
from narrowgauge.trainer.command import command
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.entry import main
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.metrics import read_metrics, read_rows
from narrowgauge.trainer.tools.restore import restore_run
from whole_runs import compare_runs, run_killed, run_to_end

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl", "train").values()]


def evals(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl", "eval").values()]


def tensors(run_dir: Path, step: int, prefix: str = "") -> dict[str, torch.Tensor]:
    return read_tensors(run_dir / "checkpoints" / f"step-{step:08}", prefix)


# All that a process has of a batch at once: scales of tensors are of the whole step.
STEP = ("train.steps=1", "checkpoint.every=1", "eval.tokens=0", "sample.tokens=0", "precision.args.amax=step")
STEPS = {
    "step-fp8": [*STEP, "precision=fp8_current", "parallel.activation_checkpointing=true"],
    "step-nvfp4": [*STEP, "precision=nvfp4", "precision.args.keep_last=0", "precision.args.bf16_forward=0"],
}

# A vocabulary of 257 does not divide into two shards.
TRAIN = ("precision=fp32", "train.steps=8", "checkpoint.every=1", "checkpoint.keep_last=8", "eval.every=4")
# A rate too small to move a float32 weight: what is saved is what was drawn.
STILL = ("train.steps=1", "optim.lr=1e-30", "optim.weight_decay=0", "eval.tokens=0", "sample.tokens=0")
KILLED = ("train.steps=32", "checkpoint.every=3", "eval.every=7", "train.micro_batch_size=2")


# Numbers that jump, and a learning rate that does not depend on where a run ends.
SPIKES = (
    *("precision=fp32", "optim.lr=0.02", "optim.schedule=constant", "optim.warmup_steps=0", "eval.tokens=0"),
    *("train.spike=rollback", "train.spike_window=5", "train.spike_deviations=2", "checkpoint.every=3"),
    *("checkpoint.keep_last=1", "sample.tokens=0"),
)

# Equal micro-batches, whose blocks of 32 tokens lie within a sample: each rank quantizes what one process would.
NARROW = ("train.steps=4", "train.micro_batch_size=2", "checkpoint.every=1", "checkpoint.keep_last=9", "eval.tokens=0")
RECIPES = {
    "delayed": ["precision=fp8_delayed"],
    "rolled": ["precision=fp8_delayed", "precision.args.roll=micro"],  # twice a step
    "mxfp4": ["precision=mxfp4"],
    "nvfp4": ["precision=nvfp4", "parallel=hsdp"],
    "fp16": ["precision=fp16", "precision.args.init_scale=1.0e11", "precision.args.backoff=0.001"],
    "full": ["precision=fp8_full", "parallel.activation_checkpointing=true"],
    "apart": ["precision=fp8_delayed", "precision.args.reduce_amax=false"],  # every rank has histories of its own
}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories named by what is in them and by the number of processes."""
    root = tmp_path_factory.mktemp("runs")

    def overrides(name: str, *more: str, gpt: bool = False) -> list[str]:
        return tiny_overrides(corpus, root / name, *more, gpt=gpt)

    jobs = {
        1: [
            overrides("llama-1", *TRAIN),
            overrides("gpt-1", *TRAIN, gpt=True),
            overrides("still-1", *STILL),
            overrides("spikes-1", *SPIKES, "train.steps=15"),
            *(overrides(f"{name}-1", *NARROW, *RECIPES[name]) for name in ("delayed", "mxfp4", "fp16")),
            *(overrides(f"{name}-1", *more) for name, more in STEPS.items()),
        ],
        2: [
            overrides("llama-2", *TRAIN),
            overrides("gpt-2", *TRAIN, gpt=True),
            overrides("replicated-2", *TRAIN, "parallel=hsdp"),
            overrides("still-2", *STILL),
            overrides("alone-2", *KILLED),
            overrides("spikes-2", *SPIKES, "train.steps=15"),
            *(overrides("spikes-in-parts-2", *SPIKES, f"train.steps={steps}") for steps in (10, 13, 15)),
            *(overrides(f"{name}-2", *NARROW, *RECIPES[name]) for name in RECIPES),
            *(overrides(f"{name}-2", *more) for name, more in STEPS.items()),
        ],
        4: [overrides("hsdp-4", *TRAIN, "parallel=hsdp"), overrides("still-4", *STILL, "parallel=hsdp")],
    }
    for processes, configs in jobs.items():
        run_many(configs, processes, root)
    return root


@pytest.mark.parametrize(
    ("one", "other"),
    [("llama-1", "llama-2"), ("gpt-1", "gpt-2"), ("llama-1", "replicated-2"), ("llama-1", "hsdp-4")],
)
def test_every_world_size_trains_alike(runs: Path, one: str, other: str) -> None:
    assert losses(runs / other) == pytest.approx(losses(runs / one), rel=0, abs=1e-5)
    assert evals(runs / other) == pytest.approx(evals(runs / one), rel=0, abs=1e-5)
    first, second = tensors(runs / one, 1), tensors(runs / other, 1)
    for name, tensor in first.items():
        # exp_avg is 0.1 of the gradient: this is where a wrong sum over ranks shows, which Adam itself hides.
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", list(STEPS))
def test_scales_of_the_whole_step_are_those_of_any_number_of_processes(runs: Path, name: str) -> None:
    one, two = (list(read_metrics(runs / f"{name}-{n}" / "metrics.jsonl", "train").values()) for n in (1, 2))
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=2e-3)  # halves are summed in BF16


def test_two_processes_scale_the_loss_and_skip_alike(runs: Path) -> None:
    one, two = (list(read_metrics(runs / f"fp16-{n}" / "metrics.jsonl", "train").values()) for n in (1, 2))
    for key in ("loss_scale", "skipped"):
        assert [row.get(key) for row in one] == [row.get(key) for row in two]
    assert 1 <= sum("skipped" in row for row in one) < len(one)
    assert losses(runs / "fp16-2") == pytest.approx(losses(runs / "fp16-1"), rel=0, abs=2e-3)


def test_two_processes_find_the_spikes_of_one_and_go_back_alike(runs: Path) -> None:
    one, two, parts = (
        [(row["step"], row["back_to"], row["samples"]) for row in read_rows(runs / name / "metrics.jsonl", "spike")]
        for name in ("spikes-1", "spikes-2", "spikes-in-parts-2")
    )
    assert one == two == parts == [(11, 9, [72, 87]), (12, 9, [88, 111])]
    assert losses(runs / "spikes-2") == pytest.approx(losses(runs / "spikes-1"), rel=0, abs=2e-3)
    assert compare_runs(runs / "spikes-2", runs / "spikes-in-parts-2") == []


def test_two_processes_see_the_amaxes_and_the_noise_of_one(runs: Path) -> None:
    """Delayed scaling: the same histories after a step. MXFP4: gradients equal but for the order of sums."""
    one, two = (tensors(runs / f"delayed-{processes}", 1, "recipe.") for processes in (1, 2))
    assert len(one) == 28
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0.02, atol=0)  # dy follows a BF16 forward pass
        if name.startswith("recipe.layers.0.self_attn.q_proj"):
            assert torch.equal(two[name][..., :2], tensor[..., :2])  # x and w of the first linear are the same bits
    both = tensors(runs / "apart-2", 1, "recipe.")
    for name, tensor in one.items():
        assert both[name].shape == (2, *tensor.shape)
        torch.testing.assert_close(both[name].amax(0), two[name], rtol=0, atol=0)
    assert not all(torch.equal(*tensor) for tensor in both.values())
    assert losses(runs / "mxfp4-2") == pytest.approx(losses(runs / "mxfp4-1"), rel=0, abs=2e-3)
    one, two = (tensors(runs / f"mxfp4-{processes}", 1, "optim.") for processes in (1, 2))
    for name, tensor in one.items():
        if name.endswith("exp_avg"):
            assert float((two[name] - tensor).norm()) <= 0.02 * float(tensor.norm()), name


def test_histories_of_two_ranks_open_on_one_and_do_not_go_on_there(runs: Path, corpus: Path, tmp_path: Path) -> None:
    saved = tensors(runs / "apart-2", 4, "recipe.")
    try:
        opened = restore_run(runs / "apart-2").state.plan.state_tensors()
        for name, value in opened.items():
            assert torch.equal(value, saved[f"recipe.{name}"].amax(0))
    finally:
        distributed.finish()
    shutil.copytree(runs / "apart-2", tmp_path / "run")
    with pytest.raises(UserError, match=r"amax histories of 2 processes, each its own: go on with 2 processes"):
        train_here(load_config(tiny_overrides(corpus, tmp_path / "run", *NARROW, *RECIPES["apart"], "train.steps=6")))


def test_narrow_runs_of_two_processes_resume_bit_for_bit(runs: Path, corpus: Path, tmp_path: Path) -> None:
    """FSDP, and HSDP for NVFP4."""
    for name in RECIPES:
        shutil.copytree(runs / f"{name}-2", tmp_path / name)
        (tmp_path / name / "done.json").unlink()
        for path in list_checkpoints(tmp_path / name / "checkpoints")[2:]:
            shutil.rmtree(path)
    run_many([tiny_overrides(corpus, tmp_path / name, *NARROW, *RECIPES[name]) for name in RECIPES], 2, tmp_path)
    for name in RECIPES:
        assert json.loads((tmp_path / name / "env.json").read_text())["started_at_step"] == 2
        assert compare_runs(runs / f"{name}-2", tmp_path / name) == []


def test_initial_weights_are_the_same_at_every_world_size(runs: Path) -> None:
    saved = [tensors(runs / f"still-{processes}", 1, "model.") for processes in (1, 2, 4)]
    for other in saved[1:]:
        assert all(torch.equal(other[name], saved[0][name]) for name in saved[0])


def cut(run_dir: Path, copied: Path, step: int) -> Path:
    """A run as if it had been stopped after this step."""
    shutil.copytree(run_dir, copied)
    (copied / "done.json").unlink()
    for path in list_checkpoints(copied / "checkpoints")[step:]:
        shutil.rmtree(path)
    return copied


def test_a_run_goes_on_from_what_one_process_saved_and_from_what_two_did(
    runs: Path, corpus: Path, tmp_path: Path
) -> None:
    """One keeps whole parameters where two shard them; 1 -> 2 -> 1 gives what one gives."""
    two = cut(runs / "llama-1", tmp_path / "two", 4)
    run_to_end(tiny_overrides(corpus, two, *TRAIN), 2)
    assert json.loads((two / "env.json").read_text())["started_at_step"] == 4
    one = cut(two, tmp_path / "one", 6)
    assert train_here(load_config(tiny_overrides(corpus, one, *TRAIN))) is ExitCode.FINISHED
    assert json.loads((one / "env.json").read_text())["started_at_step"] == 6
    for run_dir in (two, one):
        assert losses(run_dir) == pytest.approx(losses(runs / "llama-1"), rel=0, abs=1e-5)


@pytest.mark.long
def test_a_run_killed_in_every_way_ends_like_one_left_alone(runs: Path, corpus: Path, tmp_path: Path) -> None:
    """Of two processes; ``test_verify_resume_as_a_user_calls_it`` kills one."""
    overrides = tiny_overrides(corpus, tmp_path / "killed", *KILLED)
    for target, step in (("all", 11), ("launcher", 20), ("worker", 29)):
        run_killed(overrides, 2, step, target)
    run_to_end(overrides, 2)
    assert json.loads((tmp_path / "killed" / "env.json").read_text())["started_at_step"] >= 24
    assert compare_runs(runs / "alone-2", tmp_path / "killed") == []


def start(overrides: list[str], processes: int, *launcher: str) -> subprocess.Popen[str]:
    argv = command(overrides, processes)
    if launcher:
        argv[3:3] = launcher
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def workers(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The trainers it has started, by rank."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "narrowgauge" in process.cmdline() and "RANK" in (environment := process.environ()):
                found[int(environment["RANK"])] = process
    return found


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while max(read_metrics(run_dir / "metrics.jsonl", "train"), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_orphans_checkpoint_and_leave(corpus: Path, tmp_path: Path) -> None:
    process = start(tiny_overrides(corpus, tmp_path / "run", "train.steps=100000", "checkpoint.every=0"), 2)
    wait_for_step(tmp_path / "run", 5, process)
    there = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    gone, alive = psutil.wait_procs(there, timeout=30)
    assert not alive
    assert len(gone) >= 2
    done = json.loads((tmp_path / "run" / "done.json").read_text())
    assert (done["status"], done["reason"]) == ("stopped", "stopped by the launcher is gone")
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{done['step']:08}"


def test_ranks_that_are_killed_come_back_by_themselves(runs: Path, corpus: Path, tmp_path: Path) -> None:
    overrides = tiny_overrides(corpus, tmp_path / "run", *KILLED)
    process = start(overrides, 2, "--max-restarts", "3")
    for step, victim in ((8, 1), (18, 0)):
        wait_for_step(tmp_path / "run", step, process)
        there = workers(process)
        there[victim].kill()
        psutil.wait_procs(there.values(), timeout=60)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0, out
    assert out.count("resuming ") == 2  # at the first restart, each time
    assert "Traceback" not in out
    assert compare_runs(runs / "alone-2", tmp_path / "run") == []


def test_workers_end_with_their_launcher_from_their_first_moment(corpus: Path, tmp_path: Path) -> None:
    process = start(tiny_overrides(corpus, tmp_path / "run", "train.steps=100000"), 2)
    deadline = time.monotonic() + 60
    while len(there := workers(process)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)  # far from a process group
    process.kill()
    process.wait()
    assert not psutil.wait_procs(there.values(), timeout=30)[1]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.long
def test_a_rank_that_stands_still_is_named(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny_overrides(corpus, tmp_path / "run", "train.steps=100000", "parallel.timeout_seconds=3")
    process = start(overrides, 2)
    wait_for_step(tmp_path / "run", 3, process)
    other = workers(process)[1]
    time.sleep(3)  # for a beat that tells of a step
    other.suspend()
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith("error:"))
    other.kill()  # else torchrun waits for it
    process.communicate(timeout=60)
    assert line.startswith("error: rank 0 waited in vain for another rank in: step ")
    assert ": rank 1 gives no sign of life, last heard of in: step " in line
    recorded = tmp_path / "run" / "flight_recorder_rank_0.json"
    assert str(recorded) in line
    assert json.loads(recorded.read_text())["entries"][-1]["profiling_name"].startswith("gloo:")


@pytest.mark.long
def test_a_slow_disk_is_no_rank_that_stands_still(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny_overrides(corpus, tmp_path / "run", *STILL, "parallel.timeout_seconds=3")
    run_many([overrides, [*overrides, "train.steps=2", "checkpoint.every=0"]], 2, tmp_path, "4")
    assert json.loads((tmp_path / "run" / "env.json").read_text())["started_at_step"] == 1


@pytest.fixture
def hosts() -> Iterator[list[tuple[list[str], str]]]:
    """Two hosts: how a command is run there, and the address."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"ng{os.getpid()}{side}" for side in "ab"]
    links = [f"{name[-10:]}v" for name in names]

    def ip(*arguments: str) -> int:
        return subprocess.run(["ip", *arguments], check=False, capture_output=True).returncode

    failed = sum(ip("netns", "add", name) for name in names)
    failed += ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
    for name, link, address in zip(names, links, ("10.251.77.1", "10.251.77.2"), strict=True):
        failed += ip("link", "set", link, "netns", name)
        failed += ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
        failed += ip("-n", name, "link", "set", link, "up") + ip("-n", name, "link", "set", "lo", "up")
    if failed:
        pytest.skip("network namespaces need root and the command ip")
    yield [(["ip", "netns", "exec", name], f"10.251.77.{number}") for number, name in enumerate(names, 1)]
    for name in names:
        ip("netns", "del", name)


@pytest.mark.long
def test_two_hosts_come_back_too(runs: Path, corpus: Path, tmp_path: Path, hosts: list[tuple[list[str], str]]) -> None:
    overrides = tiny_overrides(corpus, tmp_path / "run", *KILLED)
    processes = []
    for index, (there, address) in enumerate(hosts):
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0][1]}:29400", "--rdzv-id", "hosts"]
        meet += ["--rdzv-conf", f"is_host={index == 0}", "--local-addr", address, "--max-restarts", "3"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meet]
        processes.append(
            subprocess.Popen(
                [*there, *launcher, "-m", "narrowgauge", *overrides],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    for step, host in ((8, 1), (24, 0)):
        wait_for_step(tmp_path / "run", step, processes[0])
        victims = list(workers(processes[host]).values())
        assert len(victims) == 1
        victims[0].kill()
        psutil.wait_procs(victims, timeout=60)
        resumed = tmp_path / "run" / "metrics.jsonl"
        size = resumed.stat().st_size
        while resumed.stat().st_size == size:  # until it is back
            assert processes[0].poll() is None
            time.sleep(0.05)
    out = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(out)
    assert "".join(out).count("resuming ") == 2
    assert compare_runs(runs / "alone-2", tmp_path / "run") == []


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_second_run_in_the_same_directory_is_refused(
    corpus: Path, tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = tiny_overrides(corpus, tmp_path / "run", "train.steps=100000", "checkpoint.every=0")
    process = start(overrides, processes)
    wait_for_step(tmp_path / "run", 3, process)
    if processes == 1:
        monkeypatch.setattr(sys, "argv", ["trainer", *overrides])
        assert main() == 2
        told = capsys.readouterr().err
    else:
        second = launch(overrides, processes, timeout=60)
        assert second.returncode == 1
        told = second.stderr
    errors = [line for line in told.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert f"run.dir={tmp_path / 'run'} is in use by process" in errors[0]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == (75 if processes == 1 else 1)
    assert json.loads((tmp_path / "run" / "done.json").read_text())["status"] == "stopped"


@pytest.mark.long
def test_verify_resume_as_a_user_calls_it(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny_overrides(corpus, tmp_path / "v", "train.steps=30")
    arguments = [str(ROOT / "scripts" / "verify_resume.py"), *overrides, "processes=1", "kills=1", "random_seed=3"]
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal, bit for bit: 30 losses" in result.stdout


def test_a_difference_is_found(runs: Path, tmp_path: Path) -> None:
    problems = compare_runs(runs / "llama-1", runs / "gpt-1")
    assert any("train loss at step 1" in problem for problem in problems)
    assert any(problem == "final model.embed_tokens.weight" for problem in problems)
    assert any(problem.startswith("names of the final tensors: model.") for problem in problems)


def test_generate_from_a_run(runs: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "generate.py")]

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*script, *arguments], capture_output=True, text=True, check=False)

    results = [call(f"run.dir={runs / 'llama-2'}", "prompt=two rails", "tokens=5") for _ in range(2)]
    assert results[0].returncode == 0, results[0].stderr
    assert results[0].stdout.startswith("two rails")
    assert results[0].stdout == results[1].stdout
    wrong = call(f"run.dir={runs / 'none'}")
    assert wrong.returncode == 2
    assert wrong.stderr == f"error: {runs / 'none'} is not a run directory: it has no config.yaml\n"


def test_compiled_blocks_change_the_loss_by_rounding_only(corpus: Path, tmp_path: Path) -> None:
    for compiled in (False, True):
        name = str(compiled)
        config = load_config(
            tiny_overrides(
                corpus, tmp_path / name, "precision=fp32", "model.num_layers=1", f"parallel.compile={compiled}",
                "eval.tokens=0", "sample.tokens=0",
            )
        )  # fmt: skip
        assert train_here(config) is ExitCode.FINISHED
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-5)
