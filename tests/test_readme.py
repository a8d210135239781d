"""The README's commands: each is one that there is; and all of them, in its order, leave every earlier run usable."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import make_texts, write_corpus
from mirror import serving
from narrowgauge.trainer.checkpoint import newest
from narrowgauge.trainer.config import load_config

ROOT = Path(__file__).parents[1]
PROGRAMS = ("make", "python", "torchrun", "lm_eval")
# What is not run here as it stands, and why.
ELSEWHERE = {
    "make train": "its own job is most of an hour of this test; its commands are run, smaller",
    "make test": "this is it",
    "lm_eval": "a package that is not among the tests'",
    "python scripts/gpu_": "needs a GPU; tests/gpu",
    "python scripts/attack.py": "works on runs of its own; tests/trainer/test_attack.py",
    "python scripts/bench_": "writes no run; a test of its own",
    "torchrun --nproc-per-node 2 scripts/bench_": "writes no run",
    "python scripts/prepare_data.py data=text data.path=OWNER/NAME": "needs the hub; tests/trainer/test_rows.py",
    "python scripts/check_export.py": "makes an environment",
    "python -m trainer --multirun hydra/launcher=slurm hydra.launcher.partition=gpu sweep=first_sweep": "needs Slurm",
}
SMALL = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_layers=2",
    "model.num_heads=2",
    "data.seq_len=64",
    "data.global_batch_size=8",
    "train.steps=4",
    "eval.every=0",
    "eval.tokens=500",
    "eval.sharpness=0",
    "checkpoint.every=2",
    "sample.tokens=2",
    "parallel.threads=1",
]
MAKE_TRAIN = [
    "python scripts/prepare_data.py data=sample",
    "torchrun --standalone --nproc-per-node 2 -m trainer run.dir=runs/sample",
]


def commands() -> list[str]:
    """In order: the lines of its blocks, and what stands in its sentences, without comments and prompts."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = []
    for block, inline in re.findall(r"```\n(.*?)```|`([^`]+)`", re.sub(r"```\w+\n.*?```", "", text, flags=re.S), re.S):
        for line in block.splitlines() or [inline.replace("\n", " ")]:
            command = re.sub(r"\s+#\s.*", "", line.removeprefix("$ ")).strip()
            whole = " " in command if block else re.search(r"=|scripts/", command)
            if command.split(" ")[0] in PROGRAMS and whole:
                found.append(command)
    return found


def reason_elsewhere(command: str) -> str | None:
    if "dry_run=true" in command:
        return None
    return next((reason for start, reason in ELSEWHERE.items() if command.startswith(start)), None)


def overrides_of(command: str) -> list[str]:
    return [word for word in shlex.split(command)[1:] if "=" in word and not word.startswith("-")]


def is_training(command: str) -> bool:
    return "-m trainer" in command or "verify_resume" in command


def smaller(command: str) -> str:
    """What it trains takes seconds; what it names stays."""
    if not is_training(command) or "dry_run=true" in command or "--cfg" in command or "--help" in command:
        return command
    small = [*SMALL, *([] if "model=gpt" in command else ["model.num_kv_heads=2"])]
    return f"{command} {shlex.join(small)}"


def test_what_the_commands_name_is_there() -> None:
    every = commands()
    assert len(every) > 40
    assert [start for start in ELSEWHERE if not any(command.startswith(start) for command in every)] == []
    for command in every:
        for word in shlex.split(command):
            assert not word.startswith("scripts/") or (ROOT / word).exists(), command
        own = "--config-dir" in command or "config.yaml" in command  # of which there are none here
        if "-m trainer" in command and "--multirun" not in command and "optim.lrr" not in command and not own:
            load_config(overrides_of(command))


class Place:
    """A clean directory with the tracked files, in which commands are run as a user types them."""

    def __init__(self, path: Path, server: str) -> None:
        self.path, self.server = path, server
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
        for name in filter(None, names.split("\0")):
            if (ROOT / name).exists():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, path / name)
        self.env = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(path / "src"),
            "HF_ENDPOINT": server,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(path / "hf-home"),
            "WANDB_MODE": "offline",
        }

    def run(self, command: str) -> str:
        command = command.replace("http://host:8000/c4", self.server).replace("/data/c4", str(self.path / "mirror"))
        done = subprocess.run(
            ["bash", "-c", command],
            check=False,
            cwd=self.path,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=900,
        )
        expected = 2 if "optim.lrr" in command else 0
        assert done.returncode == expected, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def runs(self) -> Iterator[Path]:
        """Those that hold a checkpoint."""
        for file in sorted(self.path.rglob("config.yaml")):
            if any((file.parent / "checkpoints").glob("step-*")):
                yield file.parent


def text_of(place: Place, run: Path) -> str:
    """What it writes; the check of all it holds beside its data."""
    return place.run(f"python scripts/generate.py run.dir={shlex.quote(str(run))} prompt='The people' tokens=4")


def write_own(root: Path) -> None:
    """What a user has by the names in the README."""
    texts = make_texts(200, 4)
    pyarrow.parquet.write_table(pyarrow.table({"content": texts}), root / "my.parquet")
    (root / "corpus").mkdir()
    for number in range(2):
        lines = "".join(f"{json.dumps({'text': text})}\n" for text in texts[number::2])
        (root / "corpus" / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (root / "my_configs" / "model").mkdir(parents=True)
    shutil.copyfile(root / "configs/model/llama_15m.yaml", root / "my_configs/model/my_model.yaml")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_command_in_order_leaves_every_earlier_run_usable(tmp_path: Path) -> None:
    mirror = write_corpus(
        tmp_path / "c4", {"train": [make_texts(200, 1), make_texts(200, 2)], "validation": [make_texts(60, 3)]}
    )
    wrote: dict[Path, str] = {}
    with serving(mirror) as server:
        place = Place(tmp_path / "checkout", server.address)
        shutil.copytree(mirror, place.path / "mirror")
        write_own(place.path)
        for command in commands():
            if command == "make train":
                for each in MAKE_TRAIN:
                    place.run(smaller(each))
            elif reason_elsewhere(command) is None:
                place.run(smaller(command))
            touches_text = "prepare_data" in command or "train_tokenizer" in command
            for run in place.runs():
                if run not in wrote or touches_text:
                    text = text_of(place, run)
                    assert wrote.setdefault(run, text) == text, f"{run} after {command}"
    assert len(wrote) > 30
    last = {run.parent: run for run in wrote}  # of a sweep one
    for number, run in enumerate(run for run in wrote if run.parent.name == "runs" or run in last.values()):
        whole = newest(run / "checkpoints")
        assert whole is not None
        quoted = shlex.quote(str(run))
        place.run(f"python scripts/export_hf.py run.dir={quoted} out=exports/{number}")
        place.run(f"python -m trainer 'run.dir=\"{run}\"' train.steps={whole.meta['step'] + 1}")
        assert json.loads((run / "done.json").read_text(encoding="utf-8"))["step"] == whole.meta["step"] + 1
