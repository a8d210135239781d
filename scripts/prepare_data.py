"""Text to token shards: python scripts/prepare_data.py data=sample [data.path=...] [data.tokenizer=...] [workers=N]

Writes the sample corpus and trains its tokenizer if they are missing, then tokenizes every file in parallel.
data=c4 reads the hub, a mirror in a directory or on a web server (data.path); data=text a file of rows, a directory of
such files or a dataset of the hub (data.path, data.field); data=mix prepares each of its sources. data.out=DIR keeps
tokenizer and shards elsewhere.
Interrupted, the same command goes on; shards that stand are checked and kept.
"""

from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data.prepare import prepare
from narrowgauge.trainer.data.shards import shards_place


def main(overrides: list[str], *, workers: int = 0) -> None:
    config = load_config(overrides)
    for part in config.data.parts().values():
        manifest = prepare(part, workers or None)
        for split, shards in manifest["splits"].items():
            tokens, documents, size = (sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes"))
            counts = f"{documents:>12,} documents  {size:>15,} bytes  {tokens:>15,} tokens"
            print(f"{split:10} {counts}  {len(shards)} shards")
        print(f"token shards in {shards_place(part, manifest['tokenizer']['fingerprint'])}")


if __name__ == "__main__":
    script_main(main, __doc__)
