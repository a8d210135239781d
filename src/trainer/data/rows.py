"""Text in any form that `datasets` reads: files of rows, a directory of them, a saved dataset, a name on the hub.

The library keeps rows in Arrow files (HF_HOME), which are mapped into memory, never read as a whole. Lines of JSON and
of text are taken from it as they are and read here, so that a damaged one is a bad row, as in C4's layout, and none is
taken for a number or a date.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...precision.suggest import close
from ..errors import UserError, one_line
from .config import DataConfig
from .corpus import DEFAULT_LIMITS, SPLITS, BadRow, BadRows, Line, RowLimits, text_of
from .text_files import KINDS, dataset_of_lines, is_lines, is_pattern, is_saved, kind_of, text_files
from .tokenizer_files import is_on_hub, quiet

_PART_BYTES = 256 << 20  # of text in a shard
_BATCH_BYTES, _BATCH_ROWS = 16 << 20, 1000  # of rows that are in memory at a time
_CANNOT_WRITE = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


@dataclass(frozen=True)
class RowPart:
    """Some rows of one split: what a shard is made of.

    ``kind``: what a cell holds: ``text``, ``plain`` text of a file, a ``line`` of JSON, or ``json``, one value of it.
    """

    name: str
    split: str
    index: int
    count: int
    rows: range
    every: int  # of so many rows one is validation, and no part of this; 0: of none
    kind: str
    column: str
    field: str
    size: int  # bytes of text, or nearly
    batch: int  # rows that are in memory at a time
    dataset: Any = field(compare=False, repr=False)

    def texts(
        self, on_bytes: Callable[[int], object] = lambda count: None, bad: BadRows | None = None
    ) -> Iterator[str]:
        """The texts, in order. Raises UserError as ``CorpusFile.texts`` does."""
        bad, done = bad or BadRows(DEFAULT_LIMITS), 0
        for number, (row, cell) in enumerate(self._cells(), 1):
            try:
                if self.kind != "line" or (cell and not cell.isspace()):
                    yield self._text(row + 1, cell, bad.limits)
            except BadRow as error:
                bad.leave_out(error)
            if number % self.batch == 0:
                now = min(self.size, self.size * number // len(self.rows))
                on_bytes(now - done)
                done = now
        on_bytes(self.size - done)
        bad.sum_up(self.name)

    def identity(self) -> str:
        """Changes with the text, at the cost of reading it."""
        digest = hashlib.sha256()
        for _, cell in self._cells():
            digest.update(struct.pack("<q", -1 if cell is None else len(cell)) + (cell or b""))
        return f"{self.kind}:{self.field}:{digest.hexdigest()}"

    def _text(self, row: int, cell: bytes | None, limits: RowLimits) -> str:
        unit = "line" if self.kind == "line" else "row"
        if cell is not None and len(cell) > limits.max_line_bytes:
            raise BadRow(f"{self.name}: {unit} {row} is longer than data.max_line_bytes={limits.max_line_bytes}")
        if self.kind == "line":
            return text_of(Line(row, cell or b"", len(cell or b"")), self.name, limits, self.field)
        if cell is None:
            raise BadRow(f"{self.name}: row {row} has no text in {self.field!r}: it is null")
        try:
            text = cell.decode()
            if self.kind == "json" and not isinstance(text := json.loads(text), str):
                raise BadRow(f"{self.name}: row {row} has no text in {self.field!r}: {one_line(ValueError(text))[:60]}")
            text.encode()
        except UnicodeError as error:
            raise BadRow(f"{self.name}: row {row} is not valid Unicode: {one_line(error)}") from error
        return text

    def _cells(self) -> Iterator[tuple[int, bytes | None]]:
        """Rows and what stands there, as bytes."""
        import pyarrow as pa

        arrow = self.dataset.select_columns([self.column]).with_format("arrow")
        for start in range(0, len(self.rows), self.batch):
            rows: Sequence[int] = self.rows[start : start + self.batch]
            if self.every:
                rows = [row for row in rows if not _is_held_out(row, self.every)]
            dense = isinstance(rows, range) and rows.step == 1
            try:
                column = arrow[rows.start : rows.stop if dense else 0] if dense else arrow[list(rows)] if rows else None
                cells = column[self.column].cast(pa.large_binary()).to_pylist() if column is not None else []
            except (pa.ArrowException, OSError) as error:
                raise UserError(
                    f"{self.name}: cannot be read at row {self.rows[start] + 1:,}: {one_line(error)}"
                ) from error
            yield from zip(rows, cells, strict=True)


def _is_held_out(row: int, every: int) -> bool:
    return row % every == every // 2


def row_parts(source: DataConfig, splits: Sequence[str] = SPLITS) -> dict[str, list[RowPart]]:
    """The parts of each of ``splits``. Where there is no validation split, some rows of the training split are it.

    Raises UserError for what is not there, cannot be read, has no such field, or is a program.
    """
    everything, kind = _opened(source)
    names = list(everything)

    def of(name: str, key: str) -> Any:
        if "[" in name or "+" in name:
            return _asked(source, lambda: _part(everything, name))
        if name not in names:
            raise UserError(
                f"data.path={source.path}: no split {name!r} (data.{key}){close(name, names)}; there are: "
                f"{', '.join(names)}"
            )
        return everything[name]

    training, wanted = source.train_split, source.validation_split
    # The default name need not be there; one that somebody wrote has to.
    given = wanted is not None and (wanted in names or wanted != DataConfig.validation_split)
    parts = {}
    for split in splits:
        if split == "validation" and given:
            rows, every, dataset = None, 0, of(str(wanted), "validation_split")
        else:
            dataset = of(training, "train_split")
            every = 0 if given else _every(dataset.num_rows, source.validation_fraction)
            rows = None
            if split == "validation":
                rows = range(every // 2, dataset.num_rows, every) if every else range(0)
                _say_held_out(source, rows, every, dataset.num_rows)
                every = 0
        parts[split] = _parts(dataset, split, rows, every, kind, source)
    return parts


def _every(num_rows: int, fraction: float | None) -> int:
    """One of so many rows is validation: at least one of all, and none of a single one."""
    if num_rows < 2 or fraction == 0:
        return 0
    return min(max(2, round(1 / fraction)) if fraction else min(200, max(10, num_rows // 20)), num_rows)


def _say_held_out(source: DataConfig, rows: range, every: int, total: int) -> None:
    fraction = "null" if source.validation_fraction is None else f"{source.validation_fraction:g}"
    held = f"one of {every:,} documents is held out, {len(rows):,} of {total:,}" if rows else "none is held out"
    print(f"{source.path} has no validation split: {held} (data.validation_fraction={fraction})", flush=True)


def _parts(dataset: Any, split: str, rows: range | None, every: int, kind: str, source: DataConfig) -> list[RowPart]:
    import pyarrow as pa
    from pyarrow import compute

    column = source.field if kind == "text" else "text"
    if column not in dataset.column_names and "." in column:  # of a struct
        dataset = dataset.flatten()
    if column not in dataset.column_names:
        raise _no_field(source, dataset.column_names)
    type_ = dataset.data.schema.field(column).type
    if "Json" in type(dataset.features[column]).__name__:
        kind = "json"
    elif str(type_) not in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view"):
        raise UserError(f"data.path={source.path}: the field {source.field!r} holds {type_}, not text (data.field)")
    if kind == "line":
        _require_field(dataset, source)
    table = dataset.data
    chunks = [chunk.cast(pa.large_binary()) for chunk in table.column(column).chunks]
    total = sum(compute.sum(compute.binary_length(chunk)).as_py() or 0 for chunk in chunks)
    mean = total / max(1, table.num_rows)
    rows = range(dataset.num_rows) if rows is None else rows
    count = max(1, -(-int(mean * len(rows)) // _PART_BYTES))
    batch = int(min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(1.0, mean))))
    borders = [len(rows) * index // count for index in range(count + 1)]
    shares = [rows[first:last] for first, last in pairwise(borders)]
    return [
        RowPart(
            *(source.path, split, index, count, share, every, kind, column, source.field, int(mean * len(share))),
            batch=batch,
            dataset=dataset,
        )
        for index, share in enumerate(shares)
    ]


def _require_field(dataset: Any, source: DataConfig) -> None:
    """Raises UserError if the first line of JSON that is an object lacks the field."""
    for text in dataset[:_BATCH_ROWS]["text"]:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            if source.field not in row:
                raise _no_field(source, list(row))
            return


def _no_field(source: DataConfig, names: Sequence[str]) -> UserError:
    shown = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    near = close(source.field, names)
    return UserError(f"data.path={source.path}: no field {source.field!r}{near}; there are: {shown} (data.field)")


def _part(splits: Mapping[str, Any], spec: str) -> Any:
    """Rows of one or more splits, as `datasets` writes them: ``train[:10%]+test``."""
    import datasets

    wanted = datasets.ReadInstruction.from_spec(spec).to_absolute({name: len(rows) for name, rows in splits.items()})
    return datasets.concatenate_datasets([splits[one.splitname].select(range(one.from_, one.to)) for one in wanted])


def _opened(source: DataConfig) -> tuple[Mapping[str, Any], str]:
    """All splits by name, and the kind of their cells."""
    import datasets  # two seconds, which only such text waits for
    import pandas

    path, place = source.path, Path(source.path)

    def loaded(*arguments: Any, **options: Any) -> Mapping[str, Any]:
        splits = _asked(source, lambda: datasets.load_dataset(*arguments, **options))
        return {str(name): rows for name, rows in splits.items()}

    if place.is_dir() and is_saved(place):
        saved = _asked(source, lambda: datasets.load_from_disk(path))
        return saved if isinstance(saved, dict) else {"train": saved}, "text"
    if place.is_dir():
        builder = _asked(source, lambda: datasets.load_dataset_builder(path, source.subset))
        files = {str(split): list(map(str, files)) for split, files in (builder.config.data_files or {}).items()}
        _say_unread(place, files)
        kinds = {kind_of(Path(file)) for group in files.values() for file in group}
        if kinds not in ({"json"}, {"text"}, {"csv"}):
            return loaded(path, source.subset), "text"
    elif place.exists() or is_pattern(path):
        found = sorted(glob.glob(path, recursive=True)) if is_pattern(path) else [path]
        if not found:
            raise UserError(f"data.path={path}: no file has such a name")
        files = {"train": found}
        kinds = {kind_of(Path(file)) for file in found}
        if None in kinds or len(kinds) > 1:
            strange = [file for file in found if kind_of(Path(file)) is None]
            wrong = f"{strange[0]} is of no kind that is known" if strange else "files of several kinds"
            raise UserError(
                f"data.path={path}: {wrong}; text is read from {', '.join(KINDS)}, compressed or not, from a "
                "directory of them, or from the hub"
            )
    elif kind_of(place) is not None or not is_on_hub(path):
        raise UserError(f"data.path={path}: no such file")
    else:
        print(f"asking the hub for the dataset {path}", flush=True)
        return loaded(path, source.subset), "text"
    (kind,) = kinds
    if kind == "text" or (kind == "json" and all(is_lines(Path(file)) for group in files.values() for file in group)):
        by = "line" if kind == "json" else source.sample_by
        lines = _asked(source, lambda: {name: dataset_of_lines(name, group, by) for name, group in files.items()})
        return lines, "line" if kind == "json" else "plain"
    options: dict[str, Any] = {}
    if kind == "csv":  # what looks like a number, or like nothing, is text all the same
        tabs = all(".tsv" in Path(file).name.lower() for group in files.values() for file in group)
        options = {"sep": "\t" if tabs else ",", "usecols": [source.field], "converters": {source.field: str}}
        options |= {"keep_default_na": False, "na_filter": False}
        first = next(file for group in files.values() for file in group)
        names = _asked(source, lambda: list(pandas.read_csv(first, sep=options["sep"], nrows=0).columns))
        if source.field not in names:
            raise _no_field(source, names)
    escaped = {split: [glob.escape(os.path.abspath(file)) for file in group] for split, group in files.items()}
    return loaded(kind, data_files=escaped, **options), "text"


def _say_unread(directory: Path, files: Mapping[str, Sequence[str]]) -> None:
    read = {os.path.realpath(file) for group in files.values() for file in group}
    if read and (rest := [file for file in text_files(directory) if os.path.realpath(file) not in read]):
        print(f"{directory}: {len(rest):,} files are of another kind or split and are not read, such as {rest[0]}")


def _asked(source: DataConfig, function: Callable[[], Any]) -> Any:
    """What `datasets` gives. Raises UserError, one line, for whatever it raises."""
    import datasets
    from huggingface_hub.utils import logging

    datasets.utils.logging.set_verbosity_error()
    try:
        with quiet(logging):
            return function()
    except Exception as error:  # of Arrow, pandas, HTTP libraries and its own
        if (ours := next((cause for cause in _causes(error) if isinstance(cause, UserError)), None)) is not None:
            raise ours from error
        raise UserError(f"data.path={source.path}: {_reason(error, datasets.config.HF_DATASETS_CACHE)}") from error


def _causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    return causes


def _reason(error: BaseException, cache: object) -> str:
    causes = _causes(error)
    words = one_line(error)
    if "scripts are no longer supported" in words:
        return f"a dataset that is a program, which is never run: {words}"
    if blocked := next((one for one in causes if isinstance(one, OSError) and one.errno in _CANNOT_WRITE), None):
        return f"{one_line(blocked)}; rows are kept in {cache}, HF_HOME names another place"
    if "zstd" in words.lower() or any("zstandard" in str(one).lower() for one in causes):
        words += " (pip install zstandard)"
    if len(causes) > 1 and type(error).__name__ == "DatasetGenerationError":
        words = one_line(causes[1])
    return f"cannot be read: {words[:500]}"
