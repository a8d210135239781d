"""Whole runs in this process: the run directory, resuming, refusing, stopping, diverging."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sign, tiny_overrides, train_here
from narrowgauge.trainer import costs
from narrowgauge.trainer import run as run_module
from narrowgauge.trainer.checkpoint import list_checkpoints, read_tensors
from narrowgauge.trainer.config import TrainConfig, load_config
from narrowgauge.trainer.data.batches import Batch, ShuffledSource
from narrowgauge.trainer.errors import ExitCode, RunFailed, UserError
from narrowgauge.trainer.metrics import read_metrics
from narrowgauge.trainer.stop import seconds_of
from whole_runs import compare_runs

Tiny = Callable[..., TrainConfig]


def losses(config: TrainConfig) -> dict[int, float]:
    return {step: row["loss"] for step, row in read_metrics(Path(config.run.dir) / "metrics.jsonl", "train").items()}


def done(config: TrainConfig) -> dict[str, Any]:
    return json.loads((Path(config.run.dir) / "done.json").read_text())


class Tampered:
    """A data source that does something at a step (from 0) before it gives the batch."""

    def __init__(self, source: ShuffledSource, act: Callable[[int, Batch], Batch]) -> None:
        self._source = source
        self._act = act
        self.num_micro = source.num_micro
        self.position = source.position
        self.first_sample = source.first_sample

    def batch(self, step: int, micro: int) -> Batch:
        return self._act(step, self._source.batch(step, micro))


def tamper(monkeypatch: pytest.MonkeyPatch, act: Callable[[int, Batch], Batch]) -> None:
    real = run_module.training_source
    monkeypatch.setattr(run_module, "training_source", lambda *a, **k: Tampered(real(*a, **k), act))


def raise_signal_at(monkeypatch: pytest.MonkeyPatch, at: int, number: int) -> None:
    due = [at]  # once: a step may have several micro-batches

    def act(step: int, batch: Batch) -> Batch:
        if step in due:
            due.remove(step)
            os.kill(os.getpid(), number)
        return batch

    tamper(monkeypatch, act)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    def act(step: int, batch: Batch) -> Batch:
        return replace(batch, weights=batch.weights * torch.nan) if step in steps else batch

    tamper(monkeypatch, act)


@pytest.mark.parametrize("gpt", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_leaves_what_the_contract_names(tiny: Tiny, gpt: bool, precision: str) -> None:
    config = tiny(f"precision={precision}", "eval.every=3", gpt=gpt)
    assert train_here(config) is ExitCode.FINISHED
    root = Path(config.run.dir)
    assert {"config.yaml", "plan.txt", "env.json", "metrics.jsonl", "checkpoints", "done.json", "loss.png"} <= {
        path.name for path in root.iterdir()
    }
    assert done(config) == {"status": "finished", "step": 6, "reason": "all 6 steps done"}
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in train] == [256 * step for step in range(1, 7)]
    assert set(train[0]) >= {"loss", "lr", "grad_norm", "tokens_per_second", "time"}
    assert train[-1]["loss"] < train[0]["loss"]
    evals = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in evals] == [3, 6]
    assert set(evals[0]) >= {"loss", "perplexity", "bits_per_byte"}
    assert (root / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "q_proj" in (root / "plan.txt").read_text()
    env = json.loads((root / "env.json").read_text())
    assert env["packages"]["torch"] == torch.__version__
    assert env["state_bytes"]["weights"] == 4 * env["parameters"]
    assert 0 <= env["state_bytes"]["optimizer"] - 8 * env["parameters"] < 1000  # two moments, and counters
    assert len(env["data"]) == 16


@pytest.mark.parametrize("gpt", [False, True])
def test_three_and_three_steps_are_six(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt: bool) -> None:
    alone = tiny("eval.every=2", f"run.dir={tmp_path / 'alone'}", gpt=gpt)
    assert train_here(alone) is ExitCode.FINISHED
    config = tiny("eval.every=2", gpt=gpt)
    with monkeypatch.context() as patch:
        raise_signal_at(patch, 2, signal.SIGTERM)
        assert train_here(config) is ExitCode.STOPPED
    assert done(config) == {"status": "stopped", "step": 3, "reason": "stopped by SIGTERM"}
    assert train_here(config) is ExitCode.FINISHED
    assert compare_runs(Path(alone.run.dir), Path(config.run.dir)) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_partial_sums_of_products_are_not_narrow(dtype: str, request: pytest.FixtureRequest) -> None:
    matmul, name = torch.backends.cuda.matmul, f"allow_{dtype}_reduced_precision_reduction"
    setattr(matmul, name, True)
    request.getfixturevalue("world")
    assert getattr(matmul, name) is False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 5])
def test_signals_finish_the_step_and_checkpoint(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, at: int
) -> None:
    config = tiny()
    raise_signal_at(monkeypatch, at, number)
    assert train_here(config) is ExitCode.STOPPED
    assert done(config)["step"] == at + 1
    assert done(config)["reason"] == f"stopped by {number.name}"
    assert list_checkpoints(Path(config.run.dir) / "checkpoints")[-1].name == f"step-{at + 1:08}"
    assert signal.getsignal(number) is not None


def test_a_stop_at_a_step_with_validation_makes_up_for_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = tiny("eval.every=2", f"run.dir={tmp_path / 'alone'}")
    train_here(alone)
    config = tiny("eval.every=2")
    with monkeypatch.context() as patch:
        raise_signal_at(patch, 3, signal.SIGTERM)  # the fourth step, after which a validation is due
        assert train_here(config) is ExitCode.STOPPED
    assert max(read_metrics(Path(config.run.dir) / "metrics.jsonl", "eval")) == 2
    train_here(config)
    assert compare_runs(Path(alone.run.dir), Path(config.run.dir)) == []


def test_a_finished_run_says_so(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny()
    train_here(config)
    before = (Path(config.run.dir) / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert train_here(config) is ExitCode.FINISHED
    assert "is finished: step 6" in capsys.readouterr().out
    assert (Path(config.run.dir) / "metrics.jsonl").read_bytes() == before
    longer = tiny("train.steps=8")
    assert train_here(longer) is ExitCode.FINISHED
    assert max(losses(longer)) == 8
    assert done(longer)["step"] == 8


def test_resume_never_moves_the_old_run_aside(tiny: Tiny) -> None:
    config = tiny()
    train_here(config)
    old = losses(config)
    other = tiny("run.resume=never", "seed=5")
    assert train_here(other) is ExitCode.FINISHED
    assert losses(other)[1] != old[1]
    moved = Path(config.run.dir) / "earlier-1"
    assert {step: row["loss"] for step, row in read_metrics(moved / "metrics.jsonl", "train").items()} == old
    assert list_checkpoints(moved / "checkpoints")


def refusal(config: TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        train_here(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_resume_must_needs_a_checkpoint(tiny: Tiny) -> None:
    assert "holds no usable checkpoint" in refusal(tiny("run.resume=must"))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "seed=0, not 1"),
        ("model.hidden_size=64", "model.hidden_size=32, not 64"),
        ("data.seq_len=16", "data.seq_len=32, not 16"),
        ("data.global_batch_size=4", "data.global_batch_size=8, not 4"),
        ("precision=fp32", "precision.recipe=bf16, not fp32"),
    ],
)
def test_a_run_directory_of_another_run_is_refused(tiny: Tiny, override: str, key: str) -> None:
    config = tiny()
    train_here(config)
    before = (Path(config.run.dir) / "config.yaml").read_text()
    assert f"holds a run with {key}: choose another run.dir" in refusal(tiny(override))
    assert (Path(config.run.dir) / "config.yaml").read_text() == before
    assert done(config)["status"] == "finished"


def test_a_checkpoint_of_another_model_is_refused(tiny: Tiny) -> None:
    config = tiny()
    train_here(config)
    root = Path(config.run.dir)
    for file in ("config.yaml", "metrics.jsonl", "done.json"):
        (root / file).unlink()
    assert "is of a run with model.hidden_size=32, not 64" in refusal(tiny("model.hidden_size=64"))
    # What no tensor's shape shows is known too.
    assert "is of a run with model.rope_theta=10000.0, not 5000.0" in refusal(tiny("model.rope_theta=5000"))
    assert "is of a run with seed=0, not 1" in refusal(tiny("seed=1"))


def test_other_tokens_than_the_checkpoints_are_refused(tiny: Tiny) -> None:
    config = tiny()
    train_here(config)
    meta = next((Path(config.run.dir) / "checkpoints").glob("*6/meta.json"))
    text = json.loads(meta.read_text())
    meta.write_text(json.dumps(text | {"data": "0" * 16}))
    sign(meta.parent)
    assert "was trained on other tokens" in refusal(tiny("train.steps=9"))


def test_another_tokenizer_than_the_runs_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    from narrowgauge.trainer.tools.export import export_run
    from narrowgauge.trainer.tools.restore import restore_run

    config = tiny()
    train_here(config)
    for meta in (Path(config.run.dir) / "checkpoints").glob("*/meta.json"):
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"tokenizer": "another"}))
        sign(meta.parent)
    for use in (lambda: restore_run(Path(config.run.dir)), lambda: export_run(Path(config.run.dir), tmp_path / "hf")):
        with pytest.raises(UserError, match="was trained with the tokenizer of fingerprint another"):
            use()


def test_changes_that_are_allowed_are_said(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    train_here(tiny())
    train_here(tiny("train.steps=7", "optim.lr=1e-4"))
    assert "going on with another config: optim.lr=0.0001 (was 0.003), train.steps=7 (was 6)" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tiny(f"run.dir={tmp_path / 'alone'}")
    train_here(alone)
    config = tiny()
    with monkeypatch.context() as patch:
        raise_signal_at(patch, 3, signal.SIGTERM)
        train_here(config)
    newest = Path(config.run.dir) / "checkpoints" / "step-00000004"
    data = newest / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-100])
    with (Path(config.run.dir) / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "st')
    train_here(config)
    out = capsys.readouterr().out
    assert f"checkpoint {newest} is damaged" in out
    assert "at step 2 of 6" in out
    assert compare_runs(Path(alone.run.dir), Path(config.run.dir)) == []


def test_a_run_whose_checkpoints_are_all_damaged_stops(tiny: Tiny) -> None:
    config = tiny()
    train_here(config)
    directory = Path(config.run.dir) / "checkpoints"
    for path in list_checkpoints(directory):
        (path / "__0_0.distcp").write_bytes(b"")
    longer = tiny("train.steps=8")
    for _ in range(2):  # the second time they bear another name
        assert "has checkpoints, and none is whole: mend one, or run.resume=never" in refusal(longer)
    assert {path.suffix for path in directory.iterdir()} == {".damaged"}
    assert train_here(tiny("train.steps=8", "run.resume=never")) is ExitCode.FINISHED
    assert len(list((Path(config.run.dir) / "earlier-1" / "checkpoints").iterdir())) == 2


def test_a_read_error_that_passes_costs_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    train_here(config)
    before = {path.name for path in (Path(config.run.dir) / "checkpoints").iterdir()}

    def fail(file: Path) -> str:
        raise OSError(errno.ESTALE, "Stale file handle", str(file))

    with monkeypatch.context() as patch:
        patch.setattr("narrowgauge.trainer.checkpoint.sha256_of", fail)
        assert "cannot be read now (Stale file handle)" in refusal(tiny("train.steps=8"))
    assert {path.name for path in (Path(config.run.dir) / "checkpoints").iterdir()} == before
    assert train_here(tiny("train.steps=8")) is ExitCode.FINISHED


@pytest.mark.parametrize("number", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks(
    tiny: Tiny, number: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(getattr(errno, number), "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    config = tiny("eval.tokens=0", "sample.tokens=0", "train.steps=2")
    assert train_here(config) is ExitCode.FINISHED
    assert capsys.readouterr().out.count("its file system has no locks") == 1
    # Another run of this host is noticed all the same, by its name.
    holder = {"host": socket.gethostname(), "pid": os.getppid(), "launcher": os.getppid()}
    (Path(config.run.dir) / ".lock").write_text(json.dumps(holder))
    assert f"is in use by process {os.getppid()} on {socket.gethostname()}" in refusal(tiny("train.steps=8"))
    (Path(config.run.dir) / ".lock").write_text(json.dumps(holder | {"launcher_began": 1.0, "began": 1.0}))  # long gone
    assert train_here(tiny("eval.tokens=0", "sample.tokens=0", "train.steps=3")) is ExitCode.FINISHED


def test_a_run_ends_before_its_time_is_up(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("train.stop_after=00:00:01", "train.steps=100000", "checkpoint.every=0")
    assert train_here(config) is ExitCode.STOPPED
    assert done(config)["status"] == "stopped"
    assert done(config)["reason"] == "stopped by train.stop_after=00:00:01"
    assert list_checkpoints(Path(config.run.dir) / "checkpoints")[-1].name == f"step-{done(config)['step']:08}"


@pytest.mark.parametrize(("text", "seconds"), [("01:30:00", 5400), ("2:05", 125), ("90", 90), ("100:00:00", 360_000)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


def test_checkpoints_by_the_clock_are_ordinary_ones(tiny: Tiny) -> None:
    config = tiny("checkpoint.every=0", "checkpoint.every_minutes=1e-9", "checkpoint.keep_last=9")
    assert train_here(config) is ExitCode.FINISHED
    assert [int(path.name[5:]) for path in list_checkpoints(Path(config.run.dir) / "checkpoints")] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_that_keep_failing_end_the_run(tiny: Tiny) -> None:
    config = tiny("checkpoint.every=1", "checkpoint.max_failures=2", "checkpoint.asynchronous=false")
    Path(config.run.dir).mkdir()
    (Path(config.run.dir) / "checkpoints").write_text("in the way")
    assert train_here(config) is ExitCode.FAILED
    assert done(config)["step"] == 2
    assert "2 checkpoints in a row failed: no checkpoint can be written" in done(config)["reason"]


def test_a_step_that_is_not_finite_is_skipped_and_named(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny()
    poison(monkeypatch, {2, 3})
    assert train_here(config) is ExitCode.FINISHED
    rows = read_metrics(Path(config.run.dir) / "metrics.jsonl", "train")
    assert [rows[step]["loss"] is None for step in range(1, 7)] == [False, False, True, True, False, False]
    assert rows[3]["samples"] == [16, 23]
    assert "step 3 skipped on all ranks" in capsys.readouterr().out
    tensors = read_tensors(Path(config.run.dir) / "checkpoints" / "step-00000006")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert float(tensors["optim.norm.weight.step"]) == 4.0  # two updates were not done


def test_too_many_in_a_row_end_the_run_as_diverged(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("train.max_nonfinite_in_a_row=2", "train.steps=20")
    poison(monkeypatch, set(range(5, 99)))
    assert train_here(config) is ExitCode.DIVERGED
    assert done(config)["status"] == "diverged"
    assert done(config)["step"] == 7
    tensors = read_tensors(list_checkpoints(Path(config.run.dir) / "checkpoints")[-1])
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert "diverged at step 7" in capsys.readouterr().out


def test_skipped_steps_replace_no_checkpoint(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("train.max_nonfinite_in_a_row=6", "train.steps=20", "checkpoint.every=1")
    poison(monkeypatch, set(range(4, 99)))
    assert train_here(config) is ExitCode.DIVERGED
    kept = [path.name for path in list_checkpoints(Path(config.run.dir) / "checkpoints")]
    assert kept == ["step-00000003", "step-00000004"]


def test_a_run_that_ends_in_skipped_steps_has_not_finished(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    poison(monkeypatch, {4, 5})
    assert train_here(config) is ExitCode.DIVERGED
    assert done(config)["status"] == "diverged"
    assert "ends with 2 skipped steps" in done(config)["reason"]


def test_memory_that_runs_out_is_one_line(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()

    def act(step: int, batch: Batch) -> Batch:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)\nframe #0"
        )

    tamper(monkeypatch, act)
    with pytest.raises(RunFailed) as caught:
        train_here(config)
    assert str(caught.value) == (
        "memory ran out: 4.29 GB more were needed at once; set a smaller train.micro_batch_size than 4"
    )
    assert done(config) == {"status": "failed", "step": 0, "reason": str(caught.value)}


def test_other_processes_keep_the_micro_batch_of_a_checkpoint(tiny: Tiny) -> None:
    config = tiny()
    train_here(config)
    for path in list_checkpoints(Path(config.run.dir) / "checkpoints"):
        meta = json.loads((path / "meta.json").read_text())
        (path / "meta.json").write_text(json.dumps(meta | {"world_size": 4, "micro_batch_size": 2}))
        sign(path)
    train_here(tiny("train.steps=8"))
    meta = list_checkpoints(Path(config.run.dir) / "checkpoints")[-1] / "meta.json"
    assert json.loads(meta.read_text())["micro_batch_size"] == 2


def test_an_error_in_the_middle_is_recorded(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()

    def act(step: int, batch: Batch) -> Batch:
        if step == 3:
            raise OSError(5, "Input/output error")
        return batch

    with monkeypatch.context() as patch:
        tamper(patch, act)
        with pytest.raises(OSError, match="Input/output error"):
            train_here(config)
    assert done(config) == {"status": "failed", "step": 3, "reason": "OSError: [Errno 5] Input/output error"}
    assert train_here(config) is ExitCode.FINISHED


def test_a_checkpoint_directory_that_cannot_be_written(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny()
    Path(config.run.dir).mkdir()
    (Path(config.run.dir) / "checkpoints").write_text("in the way")
    assert train_here(config) is ExitCode.FAILED
    out = capsys.readouterr().out
    assert "warning: no checkpoint can be written" in out
    assert done(config)["status"] == "failed"
    assert max(losses(config)) == 6  # training went on, and its rows are there
    (Path(config.run.dir) / "checkpoints").unlink()
    assert train_here(config) is ExitCode.FINISHED


def test_accumulation_is_one_batch_to_the_order_of_sums(tiny: Tiny, tmp_path: Path) -> None:
    curves = []
    for size in (8, 4, 1):
        config = tiny("precision=fp32", f"train.micro_batch_size={size}", f"run.dir={tmp_path / str(size)}")
        train_here(config)
        curves.append(list(losses(config).values()))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_recompute_and_resharding_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    curves = []
    for index, override in enumerate(
        ("seed=0", "parallel.activation_checkpointing=true", "parallel.reshard_after_forward=true", "eval.every=1")
    ):
        config = tiny(override, f"run.dir={tmp_path / str(index)}")
        train_here(config)
        curves.append(losses(config))
    assert all(curve == curves[0] for curve in curves)


def test_a_tied_and_an_untied_head_both_train(tiny: Tiny, tmp_path: Path) -> None:
    for tied in (True, False):
        config = tiny(f"model.tie_embeddings={tied}", f"run.dir={tmp_path / str(tied)}")
        assert train_here(config) is ExitCode.FINISHED
        names = read_tensors(Path(config.run.dir) / "checkpoints" / "step-00000006", "model.")
        assert ("model.lm_head.weight" in names) is not tied


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.global_batch_size=7", "train.micro_batch_size=2"], "does not divide the 7 sequences of a process"),
        (["model.vocab_size=100"], "model.vocab_size=100 is less than the tokenizer's 257"),
        (["parallel.replicate=2"], "parallel.replicate=2 does not divide the 1 processes"),
        (["data.seq_len=100000"], "less than one window"),
        (["data.tokenizer=nowhere"], "data.tokenizer=nowhere: no such file or directory"),
    ],
)
def test_what_only_the_data_or_the_processes_can_tell(tiny: Tiny, overrides: list[str], words: str) -> None:
    assert words in refusal(tiny(*overrides))


def test_positions_beyond_a_gpt_are_refused(tiny: Tiny) -> None:
    assert "beyond model.max_seq_len=16" in refusal(tiny("model.max_seq_len=16", gpt=True))


def test_missing_and_empty_data_directories(tmp_path: Path, corpus: Path) -> None:
    missing = load_config(tiny_overrides(tmp_path / "none", tmp_path / "run"))
    assert "no such directory; run python scripts/prepare_data.py data=sample" in refusal(missing)
    (tmp_path / "empty").mkdir()
    empty = load_config(tiny_overrides(tmp_path / "empty", tmp_path / "run"))
    assert "no token shards in" in refusal(empty)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_tokenizer_than_the_shards(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    from narrowgauge.trainer.data.tokenizer import train_bpe

    train_bpe(["a b c"], 257, tmp_path / "bpe", progress=False)
    config = tiny(f"data.tokenizer={tmp_path / 'bpe'}", f"data.shards={corpus / 'shards' / 'bytes'}")
    assert "did not make the shards" in refusal(config)


def test_a_run_directory_that_cannot_be_made(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(tiny(f"run.dir={tmp_path / 'file' / 'run'}"))


def test_the_micro_batch_follows_memory_and_never_the_mood(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    train_here(config)
    checkpoints = list_checkpoints(Path(config.run.dir) / "checkpoints")
    assert json.loads((checkpoints[-1] / "meta.json").read_text())["micro_batch_size"] == 4
    monkeypatch.setattr(costs, "_memory_of_process", lambda world: 0.0)
    train_here(tiny("train.steps=8"))  # less memory now: the order of sums stays as it was
    meta = list_checkpoints(Path(config.run.dir) / "checkpoints")[-1] / "meta.json"
    assert json.loads(meta.read_text())["micro_batch_size"] == 4
    train_here(tiny("run.resume=never"))
    meta = list_checkpoints(Path(config.run.dir) / "checkpoints")[-1] / "meta.json"
    assert json.loads(meta.read_text())["micro_batch_size"] == 1
