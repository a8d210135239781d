"""A tiny corpus, tiny models, and ways to run the trainer inside and outside of this process."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import versions
from narrowgauge.trainer import distributed
from narrowgauge.trainer.config import TrainConfig, load_config
from narrowgauge.trainer.data.prepare import prepare
from narrowgauge.trainer.distributed import World
from narrowgauge.trainer.errors import ExitCode
from narrowgauge.trainer.files import sha256_of
from narrowgauge.trainer.run import run

TINY = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_layers=2",
    "model.num_heads=4",
    "data.tokenizer=bytes",
    "data.seq_len=32",
    "data.global_batch_size=8",
    "train.steps=6",
    "eval.every=0",
    "eval.tokens=500",
    "checkpoint.every=2",
    "log.every=1",
    "sample.tokens=3",
]
TINY_LLAMA = ["model.num_kv_heads=2"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--known-skips", action="store_true", help="any skip that is not for want of hardware is an error")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := versions.fails(item.nodeid):
            item.add_marker(pytest.mark.xfail(reason=str(reason), strict=reason.always))


def _unknown(config: pytest.Config) -> list[str]:
    """Skips that ``versions`` does not know, as ``file: reason``."""
    if not config.getoption("known_skips"):
        return []
    reports = config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    told = [(report.nodeid, report.longrepr[2].removeprefix("Skipped: ")) for report in reports]
    return sorted({f"{node}: {reason}" for node, reason in told if not reason.startswith(versions.HARDWARE)})


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput") and _unknown(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not terminalreporter.config.getoption("known_skips"):
        return
    terminalreporter.section("expected to fail on these versions", "-")
    for node, before in versions.FAILS.items():
        if before.applies():
            terminalreporter.line(f"{node}: {before}")
    if unknown := _unknown(terminalreporter.config):
        terminalreporter.section("skips that tests/versions.py does not name", red=True)
        for line in unknown:
            terminalreporter.line(line)


def write_corpus(path: Path, documents: dict[str, list[list[str]]]) -> Path:
    """Write texts in C4's layout: split -> files -> documents."""
    (path / "en").mkdir(parents=True, exist_ok=True)
    for split, files in documents.items():
        for index, texts in enumerate(files):
            lines = b"".join(json.dumps({"text": t, "timestamp": "", "url": ""}).encode() + b"\n" for t in texts)
            file = path / "en" / f"c4-{split}.{index:05}-of-{len(files):05}.json.gz"
            file.write_bytes(gzip.compress(lines, mtime=0))
    return path


def make_texts(count: int, seed: int) -> list[str]:
    words = "the of a narrow gauge train runs on two rails and carries bits over the hills é 東"
    rng = random.Random(seed)
    return [" ".join(rng.choices(words.split(), k=rng.randint(3, 60))) + "." for _ in range(count)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of bytes: three training files, one validation file. Read-only for tests."""
    path = write_corpus(
        tmp_path_factory.mktemp("corpus"),
        {"train": [make_texts(40, seed) for seed in range(3)], "validation": [make_texts(12, 9)]},
    )
    prepare(load_config([f"data.path={path}", "data.tokenizer=bytes"]).data, workers=1)
    return path


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes a tiny config; overrides come last."""

    def make(*overrides: str, gpt: bool = False) -> TrainConfig:
        return load_config(tiny_overrides(corpus, tmp_path / "run", *overrides, gpt=gpt))

    return make


def tiny_overrides(corpus: Path, run_dir: Path, *overrides: str, gpt: bool = False) -> list[str]:
    model = ["model=gpt2_tiny"] if gpt else ["model=llama_tiny", *TINY_LLAMA]
    return [*model, *TINY, f"data.path={corpus}", f"run.dir={run_dir}", *overrides]


def sign(checkpoint: Path) -> None:
    """Have the checksums of a checkpoint say what its files hold now."""
    files = [file for file in checkpoint.iterdir() if file.name != "checksums.json"]
    checksums = {file.name: [file.stat().st_size, sha256_of(file)] for file in files}
    (checkpoint / "checksums.json").write_text(json.dumps(checksums))


@pytest.fixture
def world() -> Iterator[World]:
    """A process group of this process alone."""
    yield distributed.start(load_config(["parallel.threads=1"]).parallel)
    distributed.finish()


def train_here(config: TrainConfig) -> ExitCode:
    """The whole run, in this process."""
    return run(config)


def launch(
    overrides: Sequence[str], processes: int = 1, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The whole run as a user starts it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "trainer", *overrides]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=os.environ | environment, check=False
    )


def run_many(configs: Sequence[Sequence[str]], processes: int, root: Path, *more: str) -> None:
    """One run after the other, in one group of processes."""
    file = root / f"{processes}.json"
    file.write_text(json.dumps(configs))
    script = [str(Path(__file__).parent / "many.py"), str(file), *more]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command_line = [sys.executable, *(launcher if processes > 1 else []), *script]
    result = subprocess.run(command_line, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
