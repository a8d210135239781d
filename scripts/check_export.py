"""Are exports what training was? python scripts/check_export.py [transformers=5.23] [venv=.venv-transformers-VERSION]

[out=DIRECTORY to keep the runs and exports in]

Trains tiny models of every kind, exports them, and has a release of `transformers` load them: the one that is here, or
VERSION (4.57, or any from 5.17 on) in an environment of its own, made once above this one, whose torch it shares
(150 MB). Compared are the tokens of the validation text, the loss over the trainer's own windows, and the likeliest
text.
"""

import gzip
import io
import json
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from narrowgauge.trainer import distributed
from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data.open import open_windows
from narrowgauge.trainer.data.prepare import prepare
from narrowgauge.trainer.data.tokenizer import END_OF_TEXT, load_tokenizer, train_bpe
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.run import run
from narrowgauge.trainer.tools.evaluation import evaluate_on, open_run
from narrowgauge.trainer.tools.export import export_run
from narrowgauge.trainer.tools.generate import SampleConfig, generate
from tokenizers import Tokenizer, pre_tokenizers, processors

LIMIT, OF_FLOAT32 = 1e-3, 1e-5  # nats a token
PROMPT, ADDED = "the gauge", 12
FIRST = "<|first|>"

TINY = [
    *("model.hidden_size=32", "model.intermediate_size=64", "model.num_layers=2", "model.num_heads=4"),
    "model.init_std=0.3",  # so that positions count from the first step on
    *("data.seq_len=32", "data.global_batch_size=8", "train.steps=12", "optim.lr=1e-2"),
    *("eval.every=0", "eval.tokens=0", "eval.sharpness=0", "checkpoint.every=0", "sample.tokens=0"),
    "parallel.threads=1",
]
LLAMA = ["model=llama_tiny", *TINY, "model.num_kv_heads=2"]
GPT = ["model=gpt2_tiny", *TINY, "model.max_seq_len=48"]
STRETCHED = ["model=llama3_1b", *LLAMA[1:], "model.head_dim=8", "model.rope_scaling.original_max_seq_len=16"]
#: Name -> tokenizer and overrides. In float32, but for one: the others differ by rounding alone.
CASES: dict[str, tuple[str, list[str]]] = {
    "llama, tied, bytes": ("bytes", [*LLAMA, "precision=fp32", "model.tie_embeddings=true"]),
    "llama, untied, BPE": ("bpe", [*LLAMA, "precision=fp32", "model.tie_embeddings=false"]),
    "llama, bf16": ("bpe", [*LLAMA, "precision=bf16", "model.init_std=0.02"]),
    "llama, stretched positions": ("bytes", [*STRETCHED, "precision=fp32"]),
    "llama, a tokenizer with a first token": ("first", [*LLAMA, "precision=fp32"]),
    "gpt2, tied, bytes": ("bytes", [*GPT, "precision=fp32", "model.tie_embeddings=true"]),
    "gpt2, untied, BPE": ("bpe", [*GPT, "precision=fp32", "model.tie_embeddings=false"]),
}


def make_texts(number: int, seed: int) -> list[str]:
    words = (
        f"the of a narrow gauge train runs on two rails and carries bits over hills é 東 {END_OF_TEXT} {FIRST}".split()
    )
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(3, 60))) + ".\n" for _ in range(number)]


def write_corpus(path: Path) -> list[str]:
    """A corpus in C4's layout; returns the texts of its validation split."""
    (path / "en").mkdir(parents=True)
    for split, texts in (("train", make_texts(80, 0)), ("validation", make_texts(12, 1))):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (path / "en" / f"c4-{split}.00000-of-00001.json.gz").write_bytes(gzip.compress(rows.encode()))
    return texts


def make_tokenizers(place: Path) -> dict[str, str]:
    """Bytes, a BPE, and one that puts a first token before every text, as Llama 3's does, and a space."""
    train_bpe(make_texts(40, 0), 300, place / "bpe", progress=False)
    first = Tokenizer.from_file(str(place / "bpe" / "tokenizer.json"))
    first.add_special_tokens([FIRST])
    first.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    number = first.token_to_id(FIRST)
    first.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing(single=f"{FIRST} $A", special_tokens=[(FIRST, number)])]
    )
    (place / "first").mkdir()
    first.save(str(place / "first" / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": FIRST, "add_bos_token": True}
    (place / "first" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return {"bytes": "bytes", "bpe": str(place / "bpe"), "first": str(place / "first")}


def make(place: Path) -> dict[str, dict[str, Any]]:
    """Train and export every case; what is to be seen in the exports, by the trainer's own measure."""
    texts, expected = write_corpus(place / "corpus"), {}
    tokenizers = make_tokenizers(place)
    for name, (tokenizer, overrides) in CASES.items():
        own = place / re.sub(r"\W+", "_", name)
        data = [f"data.path={place / 'corpus'}", f"data.tokenizer={tokenizers[tokenizer]}", f"data.shards={own}/shards"]
        config = load_config([*overrides, *data, f"run.dir={own}/run"])
        prepare(config.data, workers=1)
        run(config)
        export_run(own / "run", own / "hf")
        try:
            subject = open_run(own / "run")
            loss = evaluate_on(subject, None, "validation", 0, 8).loss
            windows = open_windows(config.data, load_tokenizer(config.data.tokenizer), "validation", 0)
            sample = SampleConfig(prompt=PROMPT, tokens=ADDED, temperature=0)
            text = generate(
                subject.state.model,
                load_tokenizer(config.data.tokenizer),
                sample,
                context=config.data.seq_len,
                device=subject.world.device,
            )
        finally:
            distributed.finish()
        expected[name] = {
            "directory": str(own / "hf"),
            "texts": texts,
            "windows": [windows.window(index).tolist() for index in range(windows.num_windows)],
            "prompt": PROMPT,
            "added": ADDED,
            "loss": loss,
            "text": text,
        }
    return expected


def environment(version: str, venv: Path) -> Path:
    """A Python with this release of `transformers` above the packages of this one. Raises UserError."""
    python = venv / "bin" / "python"
    wanted = [python, "-c", "from importlib.metadata import version; print(version('transformers'))"]
    try:
        if not python.exists():
            if venv.exists():
                raise UserError(f"venv={venv} is there and is no environment")
            print(f"making {venv}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
            here = sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)})
            Path(here, "below.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-warn-conflicts"]
            subprocess.run([*pip, f"transformers=={version}.*"], check=True)
        found = subprocess.run(wanted, check=True, capture_output=True, text=True).stdout.strip()
    except subprocess.CalledProcessError as error:
        raise UserError(f"venv={venv} cannot be made, or not be used; remove it and try again: {error}") from error
    if not found.startswith(f"{version}."):
        raise UserError(f"venv={venv} has transformers {found}: choose another venv")
    return python


def check(expected: dict[str, dict[str, Any]], python: Path, place: Path) -> tuple[list[str], list[str]]:
    """A table of what ``python`` finds, by row, and what is wrong with it."""
    file = place / "expected.json"
    file.write_text(json.dumps(expected), encoding="utf-8")
    command = [python, Path(__file__).with_name("load_export.py"), file]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    found = {row.pop("name"): row for row in map(json.loads, done.stdout.splitlines())}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return [], [f"transformers cannot load {next((name for name in CASES if name not in found), 'them')}: {last}"]
    table = [
        "| export | transformers | loss of the trainer | loss of the export | difference |",
        "|---|---|---|---|---|",
    ]
    wrong = []
    for name, row in found.items():
        own = expected[name]
        gap = abs(row["loss"] - own["loss"])
        table.append(f"| {name} | {row['transformers']} | {own['loss']:.6f} | {row['loss']:.6f} | {gap:.1e} |")
        if not row["same_tokens"]:
            wrong.append(f"{name}: other tokens than training used")
        exact = "precision=fp32" in CASES[name][1]
        if not gap <= (OF_FLOAT32 if exact else LIMIT):
            wrong.append(f"{name}: the losses are {gap:.1e} nats a token apart")
        if exact and row["text"] != own["text"]:
            wrong.append(f"{name}: goes on with {row['text']!r}, not with {own['text']!r}")
    return table, wrong


def main(overrides: list[str], *, transformers: str = "", venv: str = "", out: str = "") -> ExitCode:
    if overrides:
        raise UserError(f"unknown argument {overrides[0]!r}; --help shows the ones there are")
    if transformers and not re.fullmatch(r"4\.57|5\.\d+", transformers):
        raise UserError(f"transformers={transformers}: 4.57, or 5.17 or a later release")
    python = Path(sys.executable)
    if transformers:
        python = environment(transformers, Path(venv or f".venv-transformers-{transformers}"))
    if out and Path(out).exists():
        raise UserError(f"out={out} exists: choose another directory")
    with nullcontext(out) if out else tempfile.TemporaryDirectory(prefix="check_export_") as place:
        Path(place).mkdir(parents=True, exist_ok=True)
        with redirect_stdout(io.StringIO()):
            expected = make(Path(place))
        table, wrong = check(expected, python, Path(place))
    print("\n".join([*table, *(f"differs: {line}" for line in wrong)]))
    return ExitCode.FAILED if wrong else ExitCode.FINISHED


if __name__ == "__main__":
    script_main(main, __doc__)
