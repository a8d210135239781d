"""Whole runs of the trainer, in processes of their own: killed and resumed, under torchrun, on a CPU and on a GPU."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from narrowgauge.models import LlamaConfig
from narrowgauge.trainer import distributed
from narrowgauge.trainer.build import build_state
from narrowgauge.trainer.checkpoint import newest
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data.prepare import prepare
from narrowgauge.trainer.metrics import read_metrics
from narrowgauge.trainer.step import update_from
from whole_runs import compare_runs, run_killed, run_to_end

from gpu_suite.bundle import EXTRAS, ROOT
from gpu_suite.steps import RandomTokens, Row

SHORT = ["eval.every=0", "eval.tokens=2000", "sample.tokens=0", "log.every=1"]
TOY = ["model.hidden_size=64", "model.intermediate_size=128", "model.num_layers=2", "model.num_heads=4"]
TOY += ["model.num_kv_heads=2", "data.seq_len=64", "data.global_batch_size=4"]


def corpus_overrides(folder: Path) -> list[str]:
    """Real text if the bundle or this checkout has it; else a small corpus, written to ``folder``."""
    for sample in (ROOT / EXTRAS / "data" / "sample", ROOT / "data" / "sample"):
        if (sample / "shards").is_dir() and (sample / "tokenizer").is_dir():
            return [f"data.path={sample}"]
    corpus = folder / "corpus"
    words = [f"data.path={corpus}", "data.tokenizer=bytes"]
    if not corpus.is_dir():
        (corpus / "en").mkdir(parents=True)
        text = "A narrow gauge train runs on two rails and carries bits over the hills. "
        for split in ("train", "validation"):
            rows = [{"text": text * (3 + number % 7), "timestamp": "", "url": ""} for number in range(90)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (corpus / "en" / f"c4-{split}.00000-of-00001.json.gz").write_bytes(gzip.compress(lines.encode()))
        prepare(load_config(words).data, workers=1)
    return words


def _size() -> list[str]:
    if not torch.cuda.is_available():
        return TOY
    return ["model=llama_60m", "data.seq_len=512", "data.global_batch_size=8"]


def resumed(folder: Path, overrides: Sequence[str]) -> list[str]:
    """What differs between a run left alone and one killed at its fifth step of eight and started again.

    Both at once, if there is a GPU: it has room for both, and time is what is short.
    """
    shutil.rmtree(folder, ignore_errors=True)
    words = [*_size(), *SHORT, "train.steps=8", "checkpoint.every=3", *overrides]
    alone, killed = ([*words, f"run.dir={folder / name}"] for name in ("alone", "killed"))
    failed: list[BaseException] = []

    def beside() -> None:
        try:
            run_to_end(alone, 1)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=beside)
    thread.start()
    if not torch.cuda.is_available():
        thread.join()
    run_killed(killed, 1, 5, "all")
    run_to_end(killed, 1)
    thread.join()
    if failed:
        raise failed[0]
    return compare_runs(folder / "alone", folder / "killed")


def torchrun_twice(folder: Path, overrides: Sequence[str], *, seconds: float) -> Row:
    """Four steps under torchrun with one rank, then the same command with eight, which goes on from the checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += ["--nproc-per-node=1", "-m", "narrowgauge", *_size(), *SHORT, *overrides, f"run.dir={folder}"]
    command += ["precision=fp8_current", "checkpoint.every=2", "parallel.compile=false"]
    row: Row = {}
    text = ""
    until = time.monotonic() + seconds
    for name, steps in (("start s", 4), ("resume s", 8)):
        begun = time.monotonic()
        try:
            result = subprocess.run(
                [*command, f"train.steps={steps}"],
                capture_output=True,
                text=True,
                timeout=max(1.0, until - begun),
                env=os.environ | {"NCCL_DEBUG": "VERSION"},
                check=False,
                cwd=ROOT,
            )
        except subprocess.TimeoutExpired as error:
            print(error.stdout, error.stderr, sep="\n", flush=True)
            return row | {"error": f"no end after {error.timeout:.0f} s: {steps} steps"}
        text += result.stdout + result.stderr
        print(result.stdout, result.stderr, sep="\n", flush=True)
        if result.returncode:
            lines = [line for line in text.splitlines() if "rror" in line]
            return row | {"error": f"exit code {result.returncode} after {steps} steps: {(lines or [''])[-1][:100]}"}
        row[name] = round(time.monotonic() - begun, 1)
    rows = read_metrics(folder / "metrics.jsonl", "train")
    checkpoint = newest(folder / "checkpoints")
    row |= {"steps": len(rows), "loss": f"{rows[1]['loss']:.3f}>{rows[8]['loss']:.3f}"}
    row["checkpoint"] = checkpoint.path.name if checkpoint is not None else "none"
    version = re.search(r"NCCL version ([\d.]+)", text)
    return row | ({"nccl": version.group(1)} if version else {})


def parity_losses(
    folder: Path, *recipes: str, seconds: float
) -> dict[str, tuple[list[float] | None, list[float] | None]]:
    """Ten losses by recipe, of a process that sees no GPU and, where there is one, of one that does.

    None where it failed or took longer than ``seconds``.
    """
    places = {"cpu": {"CUDA_VISIBLE_DEVICES": ""}} | ({"cuda": {}} if torch.cuda.is_available() else {})
    running = {}
    for where, hidden in places.items():
        out = folder / f"losses_{where}.jsonl"
        out.unlink(missing_ok=True)
        command = [sys.executable, "-m", "gpu_suite.runs", str(out), *recipes]
        running[where] = (out, subprocess.Popen(command, env=os.environ | hidden, cwd=ROOT))
    until = time.monotonic() + seconds
    found: dict[str, dict[str, list[float]]] = {}
    for where, (out, process) in running.items():
        try:
            process.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        found[where] = dict(json.loads(line) for line in lines)
    return {recipe: (found["cpu"].get(recipe), found.get("cuda", {}).get(recipe)) for recipe in recipes}


def ten_losses(recipe: str, world: distributed.World) -> list[float]:
    """Of a small Llama from the trainer's own initialization, eager."""
    model = LlamaConfig(
        name="toy", vocab_size=256, hidden_size=128, intermediate_size=384, num_layers=2, num_heads=4, num_kv_heads=4
    )
    config = load_config([f"precision={recipe}", "parallel.compile=false"])
    state = build_state(model, config.values.precision, config.parallel, config.optim, world, seed=1, tokens=4 * 64)
    source = RandomTokens(4, 64, 256)
    results = [update_from(state, source, world, config.optim, step, 10) for step in range(10)]
    return [float(result.loss) for result in results]


def main(out: Path, recipes: list[str]) -> None:
    """Write ``[recipe, losses]`` a line; a recipe that fails has none, and says why in the log."""
    world = distributed.start(load_config([]).parallel)
    with out.open("w", encoding="utf-8") as file:
        for recipe in recipes:
            try:
                line = json.dumps([recipe, ten_losses(recipe, world)])
            except Exception as error:
                print(f"{recipe}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            file.write(line + "\n")
            file.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
