"""What data costs: python scripts/bench_data.py [path=data/sample] [tokenizer=data/sample/tokenizer] [rounds=5]

Interleaved: preparing a corpus (read, tokenize, write, checksum) against `tokenizers` alone on the same texts, already
in memory, with the same threads; and the time of one batch of 16 sequences of 512 tokens from the shards.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data.batches import ShuffledSource
from narrowgauge.trainer.data.corpus import corpus_files
from narrowgauge.trainer.data.prepare import prepare
from narrowgauge.trainer.data.shards import TokenShards
from narrowgauge.trainer.data.tokenizer import load_tokenizer
from narrowgauge.trainer.errors import UserError


def main(
    overrides: list[str], *, path: str = "data/sample", tokenizer: str = "data/sample/tokenizer", rounds: int = 5
) -> None:
    if overrides:
        raise UserError(f"unknown argument {overrides[0]!r}; --help shows the ones there are")
    data = replace(load_config(["data=c4"]).data, path=path, tokenizer=tokenizer)
    texts = [text for group in corpus_files(Path(path)).values() for file in group for text in file.texts()]
    size = sum(len(text.encode()) for text in texts)
    loaded = load_tokenizer(tokenizer)
    alone, prepared = [], []
    with tempfile.TemporaryDirectory(prefix="bench_data_") as scratch:
        for number in range(rounds):
            started = time.perf_counter()
            for start in range(0, len(texts), 500):
                loaded.encode_batch(texts[start : start + 500])
            alone.append(time.perf_counter() - started)
            target = replace(data, shards=f"{scratch}/{number}")
            started = time.perf_counter()
            prepare(target)
            prepared.append(time.perf_counter() - started)
        source = ShuffledSource(
            TokenShards(target, loaded.fingerprint).stream("train", 512),
            seed=0, global_batch=16, micro_batch=16, rank=0, world_size=1,
        )  # fmt: skip
        batches = []
        for step in range(200):
            started = time.perf_counter()
            source.batch(step, 0)
            batches.append(time.perf_counter() - started)
    rates = [size / statistics.median(times) / 1e6 for times in (alone, prepared)]
    print(f"tokenizers alone  {rates[0]:6.2f} MB/s")
    print(f"prepare           {rates[1]:6.2f} MB/s, {rates[1] / rates[0]:.2f} of that")
    print(f"a batch           {1e3 * statistics.median(batches):.2f} ms for {16 * 512:,} tokens")


if __name__ == "__main__":
    script_main(main, __doc__)
