"""Where text and tokens lie, and what a batch is: the ``data`` part of a config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from .corpus import SPLITS, CorpusFile, RowLimits, corpus_files
from .mixture import BLOCK, apportion
from .remote import MIN_BYTES_PER_SECOND, remote_path
from .text_files import is_rows
from .tokenizer_files import is_on_hub

_SAMPLE_BY = ("line", "paragraph", "document")
#: The keys that say which part of rows is which text.
ROW_KEYS = ("field", "subset", "train_split", "validation_split", "validation_fraction", "sample_by")


@dataclass(kw_only=True)
class SourceConfig:
    """One corpus of a mixture."""

    path: str
    weight: float = 1.0  # share of the samples, relative to the other weights
    shards: str | None = None
    field: str | None = None  # null: the mixture's; and so on
    subset: str | None = None


@dataclass(kw_only=True)
class DataConfig:
    """Where text and tokens lie, and what a batch is."""

    name: str
    path: str  # C4's layout: a directory, an HTTP address, allenai/c4, hf://datasets/OWNER/NAME; or rows (rows.py)
    tokenizer: str  # a directory, a tokenizer.json, or "bytes"
    eot_token: str | None = None  # end of text; null finds the tokenizer's own
    shards: str | None = None  # token shards; null is a directory in the corpus's home named after the tokenizer
    out: str | None = None  # where tokenizer and shards are kept; null is the corpus's home
    field: str = "text"  # of a row, the one that holds its text
    subset: str | None = None  # of a dataset that has several: its config's name
    train_split: str = "train"
    validation_split: str | None = "validation"  # where there is none, or with null, a part of the training
    validation_fraction: float | None = None  # split is held out: this part of its documents
    sample_by: str = "line"  # a document of a .txt file: line, paragraph, or document, the whole file
    verify: bool = True  # compare the shards' checksums at every start (sizes are always compared)
    max_files: int | None = None  # the first ones of each split; null is all
    attempts: int = 8  # at reading from a server, the waits between them doubling from half a second to a minute
    min_bytes_per_second: int = MIN_BYTES_PER_SECOND  # a server that sends less for half a minute failed; 0: any rate
    max_line_bytes: int = RowLimits.max_line_bytes  # a longer line is a bad row: one in memory costs several times that
    max_bad_rows: int = 0  # of each file, left out and counted: too long, no JSON, no string `text`, invalid Unicode
    stream: bool = False  # train from the text itself, without token shards
    lanes: int = 64  # of a stream, at most: files read at a time over all processes
    shuffle_rows: int = 1024  # of a stream: rows of a file that are shuffled among themselves
    sources: dict[str, SourceConfig] | None = None  # a mixture, instead of the one corpus in `path`
    document_mask: bool = False  # documents of a window do not see one another, positions count from each one's start
    seq_len: int
    global_batch_size: int  # sequences of one optimizer step, over all ranks
    vocab_size: int = 4096  # of the BPE that is trained where `tokenizer` does not exist yet
    tokenizer_train_bytes: int = 100_000_000  # text that BPE sees

    @property
    def shards_dir(self) -> str:
        tokenizer = Path(self.tokenizer)
        name = tokenizer.name if is_on_hub(self.tokenizer) else tokenizer.stem
        return self.shards or str(Path(self.home) / "shards" / name)

    @property
    def home(self) -> str:
        """Where the corpus keeps its tokenizer and token shards."""
        return home_of(self.path, self.out, self.name)

    @property
    def row_limits(self) -> RowLimits:
        return RowLimits(self.max_line_bytes, self.max_bad_rows)

    def files(self, splits: Sequence[str] = SPLITS) -> dict[str, list[CorpusFile]]:
        """The files of a corpus in C4's layout by split. Raises as ``corpus_files``."""
        if is_rows(self.path):
            raise UserError(
                f"data.path={self.path} is not in C4's layout, which data={self.name} reads as it is: prepare it, "
                f"python scripts/prepare_data.py data=text data.path={self.path}"
            )
        return corpus_files(
            self.path,
            splits,
            max_files=self.max_files,
            attempts=self.attempts,
            min_bytes_per_second=self.min_bytes_per_second,
        )

    def parts(self) -> dict[str, DataConfig]:
        """The config of each source by its name; of a config without a mixture, itself.

        Raises UserError for a mixture of nothing.
        """
        if self.sources is None:
            return {self.name: self}
        if not self.sources:
            raise UserError(f"data={self.name} has no sources: data.sources='{{a: {{path: DIR, weight: 2}}, ...}}'")
        return {
            name: replace(
                self,
                name=f"{self.name}.{name}",
                path=source.path,
                shards=source.shards,
                out=str(Path(self.out) / name) if self.out else None,
                field=source.field or self.field,
                subset=source.subset or self.subset,
                sources=None,
            )
            for name, source in sorted(self.sources.items())
        }

    def validate(self) -> None:
        """Raises ValueError for impossible sizes and weights."""
        sizes = ("seq_len", "global_batch_size", "tokenizer_train_bytes", "attempts", "lanes", "shuffle_rows")
        for name in (*sizes, "max_line_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least 1")
        for name in ("min_bytes_per_second", "max_bad_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)}: must not be negative")
        if self.max_files is not None and self.max_files < 1:
            raise ValueError(f"data.max_files={self.max_files}: must be at least 1, or null for all")
        if self.validation_fraction is not None and not 0 <= self.validation_fraction <= 0.5:
            raise ValueError(f"data.validation_fraction={self.validation_fraction}: must be from 0 to 0.5, or null")
        if self.sample_by not in _SAMPLE_BY:
            raise ValueError(f"data.sample_by={self.sample_by}: must be one of {', '.join(_SAMPLE_BY)}")
        if self.vocab_size < 257:
            raise ValueError(f"data.vocab_size={self.vocab_size}: a byte-level BPE has at least 257 entries")
        if self.sources is not None and self.stream:
            raise ValueError(
                "data.sources: a mixture is of token shards; data=c4_stream reads one corpus, in data.path"
            )
        for name, source in (self.sources or {}).items():
            if not 0 < source.weight < float("inf"):
                raise ValueError(f"data.sources.{name}.weight={source.weight}: must be positive")
            if not source.path:
                raise ValueError(f"data.sources.{name}.path is empty")
        if self.sources:
            weights = {name: source.weight for name, source in self.sources.items()}
            for name, count in zip(weights, apportion(list(weights.values()), BLOCK), strict=True):
                if not count:
                    raise ValueError(
                        f"data.sources.{name}.weight={weights[name]}: gives no sample of {BLOCK}; the least "
                        f"is {sum(weights.values()) / BLOCK:.3g}"
                    )


def home_of(path: str, out: str | None = None, name: str = "") -> str:
    """Where a corpus keeps its tokenizer and token shards: in ``out``; in itself, if it is a directory in C4's layout,
    as the corpus ``name`` sample is; or in ``data/``."""
    if out:
        return out
    rows = name != "sample" and is_rows(path)
    if not rows and (remote_path(path) is None or Path(path).is_dir()):
        return path
    place = path.split("://")[-1].removeprefix("datasets/").lower()
    return f"data/{re.sub('[^a-z0-9]+', '-', place).strip('-')}"
