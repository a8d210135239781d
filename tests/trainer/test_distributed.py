"""Laws of several processes: the same data, weights and losses at every world size; kills lose nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import launch, tiny_overrides

from trainer.checkpoint import list_checkpoints, read_tensors
from trainer.metrics import read_metrics
from trainer.verify import command, compare_runs, run_killed, run_to_end

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl", "train").values()]


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return read_tensors(run_dir / "checkpoints" / f"step-{step:08}")


def finish(overrides: list[str], processes: int) -> None:
    result = launch(overrides, processes)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("gpt", [False, True])
def test_one_and_two_processes_train_alike_and_share_checkpoints(corpus: Path, tmp_path: Path, gpt: bool) -> None:
    def overrides(name: str, *more: str) -> list[str]:
        # A vocabulary of 257 does not divide into two shards.
        common = ("precision=fp32", "train.steps=20", "checkpoint.every=1", "checkpoint.keep_last=20", "eval.every=5")
        return tiny_overrides(corpus, tmp_path / name, *common, *more, gpt=gpt)

    finish(overrides("one"), 1)
    finish(overrides("two"), 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    evals = [
        [row["loss"] for row in read_metrics(tmp_path / n / "metrics.jsonl", "eval").values()] for n in ("one", "two")
    ]
    assert evals[1] == pytest.approx(evals[0], abs=1e-5)
    first = [tensors(tmp_path / name, 1) for name in ("one", "two")]
    for name, tensor in first[0].items():
        torch.testing.assert_close(first[1][name], tensor, rtol=1e-4, atol=1e-6)

    # What two processes saved at step 7, one process goes on from.
    for path in list_checkpoints(tmp_path / "two" / "checkpoints")[7:]:
        path.rename(path.with_suffix(".gone"))
    expected = losses(tmp_path / "one")
    (tmp_path / "two" / "done.json").unlink()
    finish(overrides("two"), 1)
    assert json.loads((tmp_path / "two" / "env.json").read_text())["started_at_step"] == 7
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=1e-5)


def test_initial_weights_are_the_same_at_every_world_size(corpus: Path, tmp_path: Path) -> None:
    saved = []
    for processes, mesh in ((1, "fsdp"), (2, "fsdp"), (2, "hsdp"), (4, "hsdp")):
        name = f"{mesh}{processes}"
        # A rate too small to move a float32 weight: what is saved is what was drawn.
        still = ("train.steps=1", "optim.lr=1e-30", "optim.weight_decay=0", "eval.tokens=0", "sample.tokens=0")
        finish(tiny_overrides(corpus, tmp_path / name, f"parallel={mesh}", *still), processes)
        saved.append(read_tensors(tmp_path / name / "checkpoints" / "step-00000001", "model."))
    for other in saved[1:]:
        assert all(torch.equal(other[name], saved[0][name]) for name in saved[0])


def test_hsdp_trains_like_fsdp(corpus: Path, tmp_path: Path) -> None:
    for mesh, processes in (("fsdp", 1), ("hsdp", 4)):
        finish(tiny_overrides(corpus, tmp_path / mesh, "precision=fp32", f"parallel={mesh}"), processes)
    assert losses(tmp_path / "hsdp") == pytest.approx(losses(tmp_path / "fsdp"), abs=1e-5)


@pytest.mark.parametrize(
    ("processes", "target", "gpt"), [(1, "all", False), (2, "all", True), (2, "launcher", False), (2, "worker", False)]
)
def test_a_killed_run_ends_like_one_left_alone(
    corpus: Path, tmp_path: Path, processes: int, target: str, gpt: bool
) -> None:
    def overrides(name: str) -> list[str]:
        return tiny_overrides(
            corpus, tmp_path / name, "train.steps=40", "checkpoint.every=3", "eval.every=7", "train.micro_batch_size=2",
            gpt=gpt,
        )  # fmt: skip

    run_to_end(overrides("alone"), processes)
    for step in (8, 23):
        run_killed(overrides("killed"), processes, step, target)
    run_to_end(overrides("killed"), processes)
    assert compare_runs(tmp_path / "alone", tmp_path / "killed") == []


def start(overrides: list[str], processes: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(overrides, processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while max(read_metrics(run_dir / "metrics.jsonl", "train"), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_orphans_checkpoint_and_leave(corpus: Path, tmp_path: Path) -> None:
    process = start(tiny_overrides(corpus, tmp_path / "run", "train.steps=100000", "checkpoint.every=0"), 2)
    wait_for_step(tmp_path / "run", 5, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert len(gone) >= 2
    done = json.loads((tmp_path / "run" / "done.json").read_text())
    assert (done["status"], done["reason"]) == ("stopped", "stopped by the launcher is gone")
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{done['step']:08}"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_run_in_the_same_directory_is_refused(corpus: Path, tmp_path: Path, processes: int) -> None:
    overrides = tiny_overrides(corpus, tmp_path / "run", "train.steps=100000", "checkpoint.every=0")
    process = start(overrides, processes)
    wait_for_step(tmp_path / "run", 3, process)
    second = launch(overrides, processes, timeout=60)
    assert second.returncode == (2 if processes == 1 else 1)
    errors = [line for line in second.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert f"run.dir={tmp_path / 'run'} is in use by process" in errors[0]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == (75 if processes == 1 else 1)
    assert json.loads((tmp_path / "run" / "done.json").read_text())["status"] == "stopped"


def test_verify_resume_as_a_user_calls_it(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny_overrides(corpus, tmp_path / "v", "train.steps=30")
    arguments = [str(ROOT / "scripts" / "verify_resume.py"), *overrides, "processes=1", "kills=1", "random_seed=3"]
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal, bit for bit: 30 losses" in result.stdout


def test_generate_from_a_run(corpus: Path, tmp_path: Path) -> None:
    finish(tiny_overrides(corpus, tmp_path / "run"), 1)
    script = [sys.executable, str(ROOT / "scripts" / "generate.py")]

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*script, *arguments], capture_output=True, text=True, check=False, env=os.environ)

    results = [call(f"run.dir={tmp_path / 'run'}", "prompt=two rails", "tokens=5") for _ in range(2)]
    assert results[0].returncode == 0, results[0].stderr
    assert results[0].stdout.startswith("two rails")
    assert results[0].stdout == results[1].stdout
    wrong = call(f"run.dir={tmp_path / 'none'}")
    assert wrong.returncode == 2
    assert wrong.stderr == f"error: {tmp_path / 'none'} is not a run directory: it has no config.yaml\n"


def test_compiled_blocks_change_the_loss_by_rounding_only(corpus: Path, tmp_path: Path) -> None:
    for compiled in (False, True):
        finish(tiny_overrides(corpus, tmp_path / str(compiled), "precision=fp32", f"parallel.compile={compiled}"), 1)
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-5)
