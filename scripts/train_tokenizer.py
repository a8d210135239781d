"""Train the corpus's byte-level BPE: python scripts/train_tokenizer.py data=sample

[data.vocab_size=4096] [data.tokenizer=DIRECTORY]

It goes into the corpus's `tokenizer`, or where one for another vocabulary stands there, into `tokenizer-VOCABULARY`.
One that stands is never replaced: runs were trained with it.
"""

from itertools import chain, count
from pathlib import Path

from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data.corpus import write_sample
from narrowgauge.trainer.data.prepare import train_tokenizer
from narrowgauge.trainer.data.tokenizer import holds_vocabulary, load_tokenizer
from narrowgauge.trainer.errors import UserError


def main(overrides: list[str]) -> None:
    config = load_config(overrides).data
    if config.sources is not None:
        raise UserError(f"data={config.name}: train the tokenizer on one source, as in data=c4 data.path=DIR")
    if config.name == "sample" and not (Path(config.path) / "en").is_dir():
        write_sample(Path(config.path))
    place = Path(config.tokenizer)
    stands = place.exists()
    if not stands:
        train_tokenizer(config)
    tokenizer = load_tokenizer(config.tokenizer, config.eot_token)
    if stands and not holds_vocabulary(place, config.vocab_size):
        name = f"{config.home}/tokenizer-{config.vocab_size}"
        names = chain([name], (f"{name}-{number}" for number in count(2)))
        free = next(one for one in names if not Path(one).exists())
        raise UserError(
            f"data.tokenizer={place}: a tokenizer of {tokenizer.vocab_size:,} entries stands there and is never "
            f"replaced; one of {config.vocab_size:,} needs another place: data.tokenizer={free}"
        )
    if stands:
        print(f"{place} stands already and is kept; data.tokenizer=DIRECTORY trains another")
    print(f"{config.tokenizer}: {tokenizer.vocab_size:,} entries, fingerprint {tokenizer.fingerprint}")


if __name__ == "__main__":
    script_main(main, __doc__)
