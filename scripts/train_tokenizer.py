"""Train the corpus's byte-level BPE: python scripts/train_tokenizer.py data=sample

[data.vocab_size=4096] [data.tokenizer=DIRECTORY]

Replaces a tokenizer that stands there; its old token shards then no longer fit and training says so.
"""

from pathlib import Path

from trainer.cli import script_main
from trainer.config import load_config
from trainer.corpus import write_sample
from trainer.errors import UserError
from trainer.prepare import train_tokenizer
from trainer.tokenizer import load_tokenizer


def main(overrides: list[str]) -> None:
    config = load_config(overrides).data
    if config.sources is not None:
        raise UserError(f"data={config.name}: train the tokenizer on one source, as in data=c4 data.path=DIR")
    if config.name == "sample" and not (Path(config.path) / "en").is_dir():
        write_sample(Path(config.path))
    train_tokenizer(config, again=True)
    tokenizer = load_tokenizer(config.tokenizer, config.eot_token)
    print(f"{config.tokenizer}: {tokenizer.vocab_size:,} entries, fingerprint {tokenizer.fingerprint}")


if __name__ == "__main__":
    script_main(main, __doc__)
