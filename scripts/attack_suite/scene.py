"""What is attacked: a small text of our own, and runs of seconds over it."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data.prepare import prepare

#: One thread: the number of threads is part of a sum's order.
TINY = (
    *("model.hidden_size=32", "model.intermediate_size=64", "model.num_layers=2", "model.num_heads=4"),
    *("data.seq_len=32", "data.global_batch_size=8", "train.micro_batch_size=4", "parallel.threads=1"),
    *("eval.tokens=256", "eval.sharpness=0", "sample.tokens=0", "log.every=1"),
)
LLAMA = ("model=llama_tiny", "model.num_kv_heads=2")
GPT = ("model=gpt2_tiny",)
_WORDS = ("the", "of", "a", "narrow", "gauge", "train", "runs", "on", "two", "rails", "carries", "bits", "é", "東")


@dataclass(frozen=True)
class Scene:
    """Where an attack finds its text and may write, and what its random choices come from."""

    folder: Path
    seed: int = 0

    @property
    def corpora(self) -> tuple[Path, Path]:
        return self.folder / "text", self.folder / "more_text"

    def prepare(self) -> None:
        """Two corpora in C4's layout with token shards of bytes."""
        for number, path in enumerate(self.corpora):
            write_corpus(path, number)
            prepare(load_config([f"data.path={path}", "data.tokenizer=bytes"]).data, workers=1)

    def overrides(self, run_dir: Path, *more: str, gpt: bool = False) -> list[str]:
        """A run of this scene as its command line says it."""
        data = [f"data.path={self.corpora[0]}", "data.tokenizer=bytes"]
        return [*(GPT if gpt else LLAMA), *TINY, *data, *more, f"run.dir={run_dir}"]


def write_corpus(path: Path, seed: int) -> None:
    """Four training files and one for validation, always the same for a seed."""
    (path / "en").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for split, files, documents in (("train", 4, 40), ("validation", 1, 12)):
        for index in range(files):
            texts = [" ".join(rng.choices(_WORDS, k=rng.randint(3, 60))) + "." for _ in range(documents)]
            lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
            file = path / "en" / f"c4-{split}.{index:05}-of-{files:05}.json.gz"
            file.write_bytes(gzip.compress(lines, mtime=0))
