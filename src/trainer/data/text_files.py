"""Files of text that are read here, not by `datasets`: lines of JSON and plain text, compressed or not."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from .corpus import RowLimits, is_c4
from .remote import remote_path
from .tokenizer_files import is_on_hub

KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **{".parquet": "parquet", ".txt": "text", ".arrow": "arrow"},
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zstd", ".lz4", ".zip")
_LINES_VERSION = 1  # of what `datasets` keeps of them


def kind_of(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def is_rows(path: str) -> bool:
    """Whether ``path`` is for `datasets`: a file, a pattern, a name on the hub, or a directory of text that is not in
    C4's layout."""
    if remote_path(path) is not None:
        return False
    place = Path(path)
    if place.is_dir():
        return not is_c4(place) and (is_saved(place) or next(text_files(place), None) is not None)
    return place.exists() or is_pattern(path) or ("/" in path and is_on_hub(path)) or kind_of(place) is not None


def is_pattern(path: str) -> bool:
    return glob.has_magic(path) and not Path(path).exists()


def is_saved(directory: Path) -> bool:
    """By ``save_to_disk``."""
    return (directory / "dataset_dict.json").exists() or all(
        (directory / name).exists() for name in ("state.json", "dataset_info.json")
    )


def text_files(directory: Path) -> Iterator[Path]:
    """Without what stands hidden, and without tokenizers and shards."""
    for root, directories, files in os.walk(directory):
        directories[:] = sorted(name for name in directories if not name.startswith(".") and name != "shards")
        if "tokenizer.json" in files or "manifest.json" in files:
            directories.clear()
            continue
        yield from (Path(root, name) for name in sorted(files) if name[0] != "." and kind_of(Path(name)) is not None)


def is_lines(file: Path) -> bool:
    """Whether a file of JSON has an object on each line, by its first one; all of JSON in one otherwise."""
    if ".json" not in file.suffixes:
        return True
    try:
        with _open(file) as lines:
            while (line := lines.readline(RowLimits.max_line_bytes)).isspace():
                pass
        return re.match(rb"\s*(\[|\{\s*$)", line.removeprefix(codecs.BOM_UTF8)) is None
    except (OSError, EOFError) as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from error


def dataset_of_lines(split: str, files: Sequence[str], by: str) -> Any:
    """A dataset of what stands in ``files``, bytes, kept until one of them changes."""
    import datasets

    stats = [os.stat(file) for file in files]
    arguments = {
        "files": tuple(os.path.abspath(file) for file in files),
        "by": by,
        "known_by": (_LINES_VERSION, *((stat.st_size, stat.st_mtime_ns) for stat in stats)),
    }
    features = datasets.Features({"text": datasets.Value("large_binary")})
    return datasets.Dataset.from_generator(_read_lines, features=features, gen_kwargs=arguments, split=split)


def _read_lines(files: Sequence[str], by: str, known_by: Any) -> Iterator[dict[str, bytes]]:
    for file in files:
        number = 0
        try:
            with _open(Path(file)) as lines:
                if by == "document":
                    yield {"text": lines.read().removeprefix(codecs.BOM_UTF8)}
                    continue
                paragraph: list[bytes] = []
                for number, line in enumerate(lines, 1):
                    text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rstrip(b"\r\n")
                    if by == "line":
                        yield {"text": text}
                    elif text.strip():
                        paragraph.append(text)
                    elif paragraph:
                        yield {"text": b"\n".join(paragraph)}
                        paragraph = []
                if paragraph:
                    yield {"text": b"\n".join(paragraph)}
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"{file}: damaged, or cannot be read, after line {number:,}: {one_line(error)}") from error


def _open(file: Path) -> Any:
    if file.suffix in (".zst", ".zstd"):
        if find_spec("zstandard") is None:
            raise UserError(f"{file} needs the package zstandard: pip install zstandard")
        import zstandard  # an optional dependency

        return zstandard.open(file, "rb")
    if (opened := {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(file.suffix)) is not None:
        return opened(file)
    if file.suffix in _COMPRESSED:
        raise UserError(f"{file}: lines are read from files as they are, .gz, .bz2, .xz or .zst")
    return file.open("rb")
