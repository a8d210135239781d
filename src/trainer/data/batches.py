"""Batches from token shards: a pure function of (seed, step), the same at every world size and micro-batch size.

The shards of a split form one stream of tokens; window i of length T+1 starts at token i*T. An epoch visits every
window once, in an order that a keyed permutation of range(N) gives element by element, so nothing is stored and
nothing has to be saved: after a restart the step number alone says what comes next. A mixture deals the samples of a
run to several such streams, again by a permutation.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import reprlib
import resource
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast, get_type_hints

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, one_line
from ..files import read_json
from .corpus import SPLITS, CorpusFile, RowLimits, TextFile, corpus_files
from .remote import MIN_BYTES_PER_SECOND, remote_path
from .rows import SAMPLE_BY, Source, is_rows, row_parts
from .tokenizer import is_on_hub

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
_NPY_HEADER_BYTES = 1 << 14
_OTHER_OPEN_FILES = 256  # to come, beside those that are
_MIXTURE_BLOCK = 10_000  # samples in which every source of a mixture has its exact share


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
    field: str = Source.field  # of a row, the one that holds its text
    subset: str | None = Source.subset  # of a dataset that has several: its config's name
    train_split: str = Source.train_split
    validation_split: str | None = Source.validation_split  # where there is none, or with null, a part of the training
    validation_fraction: float | None = Source.validation_fraction  # split is held out: this part of its documents
    sample_by: str = Source.sample_by  # a document of a .txt file: line, paragraph, or document, the whole file
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

    def shards_of(self, fingerprint: str) -> Path:
        """Where a tokenizer's shards are, by its fingerprint: in ``shards_dir``, or beside others that stand there."""
        directory = Path(self.shards_dir)
        other = made_by(directory) not in (None, fingerprint)
        return directory.with_name(f"{directory.name}-{fingerprint[:8]}") if other else directory

    @property
    def home(self) -> str:
        """Where the corpus keeps its tokenizer and token shards."""
        return home_of(self.path, self.out, self.name)

    @property
    def row_limits(self) -> RowLimits:
        return RowLimits(self.max_line_bytes, self.max_bad_rows)

    def texts(self, splits: Sequence[str] = SPLITS) -> Mapping[str, Sequence[TextFile]]:
        """What shards are made of, by split. Raises as ``row_parts`` and ``corpus_files``."""
        if not is_rows(self.path):
            if self.field != Source.field:
                raise UserError(f"data.field={self.field}: {self.path} is in C4's layout, whose field is 'text'")
            return self.files(splits)
        if self.max_files is not None:
            raise UserError(
                f"data.max_files={self.max_files} counts files of C4's layout, which {self.path} is not: "
                "data.train_split='train[:10%]' takes a part"
            )
        return row_parts(Source(**{part.name: getattr(self, part.name) for part in fields(Source)}), splits)

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
        if self.sample_by not in SAMPLE_BY:
            raise ValueError(f"data.sample_by={self.sample_by}: must be one of {', '.join(SAMPLE_BY)}")
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
            for name, count in zip(weights, apportion(list(weights.values()), _MIXTURE_BLOCK), strict=True):
                if not count:
                    raise ValueError(
                        f"data.sources.{name}.weight={weights[name]}: gives no sample of {_MIXTURE_BLOCK}; the least "
                        f"is {sum(weights.values()) / _MIXTURE_BLOCK:.3g}"
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


def made_by(directory: Path) -> str | None:
    """The fingerprint of the tokenizer whose token shards stand in a directory; None if that cannot be told."""
    try:
        return str(read_json(directory / MANIFEST)["tokenizer"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class ShardInfo(TypedDict):
    """One shard in the manifest."""

    file: str
    documents_file: str
    source: str
    source_identity: str
    tokenizer: str
    tokens: int
    documents: int
    empty_documents: int
    bad_rows: int  # left out
    max_line_bytes: int  # beyond which they were bad; 0: no such limit, as in shards of older versions
    bytes: int
    sha256: str
    documents_sha256: str


_SINCE_VERSION_1 = {"bad_rows": 0, "max_line_bytes": 0}  # no part of the fingerprint: tokens say it all


def shard_info(value: Any) -> ShardInfo:
    """``value`` out of a JSON file, once it is what it has to be. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"a shard is {reprlib.repr(value)}, not an object")
    info = _SINCE_VERSION_1 | value
    for key, kind in get_type_hints(ShardInfo).items():
        if type(info.get(key)) is not kind or (kind is int and info[key] < 0):
            raise ValueError(f"{key} of a shard is {reprlib.repr(info.get(key))}")
    for key in ("file", "documents_file"):
        if info[key] != Path(info[key]).name:
            raise ValueError(f"{key} of a shard is {reprlib.repr(info[key])}, not a name in its directory")
    return cast(ShardInfo, info)


@dataclass(frozen=True)
class Batch:
    """``tokens`` int64 [B, T+1]; ``weights`` float32 [B, T], how much each target counts; global index of sample 0.

    ``positions`` int64 [B, T]: every token's place in its document, where documents are kept apart; else None.
    """

    tokens: Tensor
    weights: Tensor
    first_sample: int
    positions: Tensor | None = None


class DataSource(Protocol):
    """What the loop asks for. ``batch`` is pure in (seed, step, micro, rank, world)."""

    num_micro: int

    def first_sample(self, step: int) -> int: ...

    def batch(self, step: int, micro: int) -> Batch: ...


class DocumentsApart:
    """A source whose batches say where documents begin, so that none sees what stands before it in its window.

    A document goes up to and with its end-of-text token; the first one of a window counts as beginning there.
    """

    def __init__(self, source: DataSource, end_of_text: int) -> None:
        self._source, self._end_of_text = source, end_of_text
        self.num_micro = source.num_micro

    def first_sample(self, step: int) -> int:
        return self._source.first_sample(step)

    def batch(self, step: int, micro: int) -> Batch:
        """The source's batch with its positions."""
        batch = self._source.batch(step, micro)
        return replace(batch, positions=document_positions(batch.tokens[:, :-1], self._end_of_text))


class Ahead:
    """A source whose next step is made in a thread while this one is computed, in pinned memory: a device copies from
    there without anyone waiting.

    The batches are the source's own. One that has a ``position`` reads ahead itself, and is asked for a step when that
    step is wanted: the position stands for what has been consumed.

    Args:
        threaded: make the next step ahead; only for a source whose batches are a function of the step.
        pin: in pinned memory; only where there is a device to copy to.
    """

    def __init__(self, source: DataSource, *, threaded: bool, pin: bool) -> None:
        self._source, self._pin = source, pin
        self.num_micro = source.num_micro
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if threaded else None
        self._next: tuple[int, Future[list[Batch]]] | None = None
        self._step, self._batches = -1, list[Batch]()

    def first_sample(self, step: int) -> int:
        return self._source.first_sample(step)

    def batch(self, step: int, micro: int) -> Batch:
        """The source's batch. What goes wrong in making it is raised when its step is asked for."""
        if self._thread is None:
            return self._made(step, micro)
        if step != self._step:
            made = self._next[1].result() if self._next is not None and self._next[0] == step else self._all(step)
            self._step, self._batches = step, made
            self._next = step + 1, self._thread.submit(self._all, step + 1)
        return self._batches[micro]

    def _all(self, step: int) -> list[Batch]:
        return [self._made(step, micro) for micro in range(self.num_micro)]

    def _made(self, step: int, micro: int) -> Batch:
        batch = self._source.batch(step, micro)
        if not self._pin:
            return batch
        positions = None if batch.positions is None else batch.positions.pin_memory()
        return Batch(batch.tokens.pin_memory(), batch.weights.pin_memory(), batch.first_sample, positions)


def document_positions(tokens_BT: Tensor, end_of_text: int) -> Tensor:
    """The place of every token in its document, int64 [B, T]."""
    places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    begins = torch.zeros_like(tokens_BT, dtype=torch.bool)
    begins[:, 1:] = tokens_BT[:, :-1] == end_of_text
    return places - torch.where(begins, places, 0).cummax(-1).values


class Windows(Protocol):
    """Text as windows of ``seq_len + 1`` tokens."""

    seq_len: int
    num_windows: int

    def window(self, index: int) -> np.ndarray: ...

    def num_bytes(self, num_windows: int) -> float: ...


def _read_manifest(manifest: dict[str, Any]) -> tuple[np.dtype, str, int, dict[str, list[ShardInfo]]]:
    """Type of the tokens, fingerprint and vocabulary of the tokenizer, shards by split. Raises ValueError."""
    tokenizer, splits, dtype = (manifest.get(key) for key in ("tokenizer", "splits", "dtype"))
    if dtype not in ("<u2", "<u4"):
        raise ValueError(f"dtype is {reprlib.repr(dtype)}, not '<u2' or '<u4'")
    if not isinstance(tokenizer, dict) or not isinstance(splits, dict):
        raise ValueError("tokenizer and splits are not objects")
    made_by, vocab_size = tokenizer.get("fingerprint"), tokenizer.get("vocab_size")
    if type(made_by) is not str or type(vocab_size) is not int or vocab_size < 1:
        raise ValueError(
            f"a tokenizer of fingerprint {reprlib.repr(made_by)} and vocab_size {reprlib.repr(vocab_size)}"
        )
    if wrong := [name for name, shards in splits.items() if not isinstance(shards, list)]:
        raise ValueError(f"the split {reprlib.repr(wrong[0])} is not a list")
    return np.dtype(dtype), made_by, vocab_size, {name: [*map(shard_info, splits[name])] for name in splits}


def _fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _allow_open_files(count: int) -> None:
    """Raise the limit of this process, as far as it may: a memory map keeps its file open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/dev/fd")) + count + _OTHER_OPEN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


class TokenShards:
    """The prepared corpus of one directory, opened: what is prepared anew meanwhile has other files.

    Raises UserError if there is none, if a shard is missing or damaged, or if another tokenizer made it.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer_fingerprint: str,
        advice: str = "run python scripts/prepare_data.py with the same data options",
    ) -> None:
        beside = config.shards_of(tokenizer_fingerprint)
        self.directory = beside if (beside / MANIFEST).exists() else Path(config.shards_dir)
        self._again = again = advice
        file = self.directory / MANIFEST
        try:
            manifest = read_json(file)
            if manifest.get("version") != MANIFEST_VERSION:
                version = reprlib.repr(manifest.get("version"))
                raise UserError(f"{self.directory} has version {version}, not {MANIFEST_VERSION}: {again}")
            self.dtype, maker, self.vocab_size, self.splits = _read_manifest(manifest)
        except FileNotFoundError as error:
            raise UserError(f"no token shards in {self.directory}: {again}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({one_line(error)}): {again}") from error
        if maker != tokenizer_fingerprint:
            raise UserError(
                f"data.tokenizer={config.tokenizer} (fingerprint {tokenizer_fingerprint}) did not make the shards in "
                f"{self.directory} (fingerprint {maker}): name the tokenizer that did, or {again}"
            )
        tokens = {
            split: [[shard[key] for key in ("tokens", "sha256", "documents_sha256")] for shard in shards]
            for split, shards in self.splits.items()
        }
        self.fingerprint = _fingerprint([self.dtype.str, manifest["tokenizer"].get("eot"), tokens])
        splits = {
            split: [{key: shard[key] for key in shard if key not in _SINCE_VERSION_1} for shard in shards]
            for split, shards in manifest["splits"].items()
        }
        #: What older checkpoints hold: it changed with the compression of the text, too.
        self.former_fingerprint = _fingerprint(manifest | {"splits": splits})
        every = [shard for shards in self.splits.values() for shard in shards]
        _allow_open_files(2 * len(every))
        self._files: dict[str, os.stat_result] = {}
        self._bytes = {name: self._open(name) for shard in every for name in (shard["file"], shard["documents_file"])}
        for shard in every:
            size, wanted = len(self._bytes[shard["file"]]), shard["tokens"] * self.dtype.itemsize
            if size != wanted:
                raise UserError(f"{self.directory / shard['file']} has {size} bytes, not {wanted}: {again}")
            self.ends(shard)

    def _open(self, name: str) -> np.ndarray:
        """A memory map of the whole file."""
        path = self.directory / name
        try:
            with path.open("rb") as file:
                self._files[name] = found = os.fstat(file.fileno())
                return np.asarray(np.memmap(file, np.uint8, mode="r") if found.st_size else [], "u1")
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: {self._again}") from error
        except (OSError, ValueError) as error:  # the second for a name that can be none
            hint = " (ulimit -n allows more)" if getattr(error, "errno", None) == errno.EMFILE else ""
            raise UserError(f"{path} cannot be opened: {one_line(error)}{hint}") from error

    def tokens(self, shard: ShardInfo) -> np.ndarray:
        """uint16 or uint32 [tokens], as they were opened."""
        return self._bytes[shard["file"]].view(self.dtype)

    def ends(self, shard: ShardInfo) -> np.ndarray:
        """Tokens and UTF-8 bytes up to each document's end, int64 [documents, 2], as they were opened.

        Raises UserError if the file holds something else.
        """
        content, path = self._bytes[shard["documents_file"]], self.directory / shard["documents_file"]
        file = io.BytesIO(content[:_NPY_HEADER_BYTES])
        try:
            version = np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if version != (1, 0) or (shape, fortran, dtype) != ((shard["documents"], 2), False, np.int64):
                raise ValueError(f"{dtype} {list(shape)}, not int64 [{shard['documents']}, 2]")
            ends = content[file.tell() :].view(np.int64).reshape(shape)
            if len(ends) and ends[-1].tolist() != [shard["tokens"], shard["bytes"]]:
                raise ValueError("its last row is not the number of tokens and bytes")
        except Exception as error:  # the header's parser raises what Python's own does
            raise UserError(f"{path} is damaged ({one_line(error)}): {self._again}") from error
        return ends

    def verify(self) -> None:
        """Compare the checksum of everything that was opened. Raises UserError for what is damaged."""
        for shard in (shard for shards in self.splits.values() for shard in shards):
            checksums = {shard["file"]: shard["sha256"], shard["documents_file"]: shard["documents_sha256"]}
            for name, checksum in checksums.items():
                path = self.directory / name
                try:  # read, not by the map: an error of a map ends the process without a word
                    with path.open("rb") as file:
                        same = os.path.samestat(os.fstat(file.fileno()), self._files[name])
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError as error:
                    raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
                if not same:
                    raise UserError(f"{path} was written anew just now: run the same command again")
                if digest != checksum:
                    raise UserError(f"{path} is damaged (checksum differs): run python scripts/prepare_data.py again")


class TokenStream:
    """One split as windows of ``seq_len + 1`` tokens; neighbours share one token, the last few tokens are left out."""

    def __init__(self, shards: TokenShards, split: str, seq_len: int) -> None:
        self.seq_len = seq_len
        self._shards = shards
        self._infos = [info for info in shards.splits.get(split, []) if info["tokens"]]
        self._tokens = [shards.tokens(info) for info in self._infos]
        self._ends = np.cumsum([info["tokens"] for info in self._infos], dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if self._infos else 0
        self.num_windows = max(0, (self.num_tokens - 1) // seq_len)
        if self.num_windows == 0:
            raise UserError(
                f"{shards.directory}: the {split} split has {self.num_tokens} tokens, less than one window of "
                f"data.seq_len + 1 = {seq_len + 1}"
            )

    def window(self, index: int) -> np.ndarray:
        """Window ``index``, int64 [seq_len + 1]."""
        start, stop = index * self.seq_len, (index + 1) * self.seq_len + 1
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[shard]) - self._infos[shard]["tokens"]
            end = min(stop, int(self._ends[shard]))
            parts.append(self._tokens[shard][start - begin : end - begin])
            start, shard = end, shard + 1
        return np.concatenate(parts).astype(np.int64)

    def num_bytes(self, num_windows: int) -> float:
        """UTF-8 bytes of the text that the targets of the first ``num_windows`` windows spell.

        Whole documents are counted exactly, the last, cut one in proportion to its tokens.
        """
        remaining, total = num_windows * self.seq_len + 1, 0.0
        for info in self._infos:
            if remaining >= info["tokens"]:
                remaining, total = remaining - info["tokens"], total + info["bytes"]
                continue
            ends = self._shards.ends(info)
            document = int(np.searchsorted(ends[:, 0], remaining, side="right"))
            tokens_before, bytes_before = ends[document - 1] if document else (0, 0)
            tokens, size = ends[document] - (tokens_before, bytes_before)
            return total + float(bytes_before) + float(size) * (remaining - int(tokens_before)) / float(tokens)
        return total


class TrainingSource(ABC):
    """Training batches. Rank r of W holds samples [r*G/W, (r+1)*G/W) of each step's G, in equal micro-batches."""

    #: What has to be saved beside the step number, alive; None where batches are a function of it.
    position: Tensor | None = None

    def __init__(self, *, seed: int, global_batch: int, micro_batch: int, rank: int, world_size: int) -> None:
        self._seed = seed
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._rank_offset = rank * (global_batch // world_size)
        self.num_micro = global_batch // world_size // micro_batch

    def first_sample(self, step: int) -> int:
        """Global index of this rank's first sample of ``step``."""
        return step * self._global_batch + self._rank_offset

    @abstractmethod
    def batch(self, step: int, micro: int) -> Batch:
        """Micro-batch ``micro`` of ``step`` (both from 0) on this rank."""


class ShuffledSource(TrainingSource):
    """All windows of one stream in each epoch, in another order."""

    def __init__(self, stream: TokenStream, **share: int) -> None:
        super().__init__(**share)
        self._stream = stream

    def batch(self, step: int, micro: int) -> Batch:
        first = self.first_sample(step) + micro * self._micro_batch
        windows = self.sample_windows(first, self._micro_batch)
        return _batch_of([self._stream.window(int(window)) for window in windows], first)

    def sample_windows(self, first: int, count: int) -> np.ndarray:
        """The windows that samples ``first`` .. ``first + count - 1`` of the run read."""
        return _shuffled(np.arange(first, first + count), self._stream.num_windows, str(self._seed))


class Mixture:
    """Several streams, whose windows are drawn by weight. Raises UserError if one cannot be used."""

    def __init__(self, streams: Mapping[str, TokenStream], weights: Sequence[float]) -> None:
        self.names = list(streams)
        self.streams = list(streams.values())
        self.weights = list(weights)
        self.num_tokens = sum(stream.num_tokens for stream in self.streams)


class MixedSource(TrainingSource):
    """A mixture: in every 10,000 samples each source has its exact share, and in each of its epochs every window once.

    Where a source stands in a block, and which window comes next, are functions of (seed, sample).
    """

    def __init__(self, mixture: Mixture, **share: int) -> None:
        super().__init__(**share)
        self._mixture = mixture
        self._counts = np.array(apportion(mixture.weights, _MIXTURE_BLOCK))
        self._ends = np.cumsum(self._counts)

    def batch(self, step: int, micro: int) -> Batch:
        first = self.first_sample(step) + micro * self._micro_batch
        drawn = self.sample_windows(first, self._micro_batch)
        return _batch_of([self._mixture.streams[source].window(int(window)) for source, window in drawn], first)

    def sample_windows(self, first: int, count: int) -> np.ndarray:
        """Source and window of samples ``first`` .. ``first + count - 1`` of the run, int64 [count, 2]."""
        blocks, places = np.divmod(np.arange(first, first + count), _MIXTURE_BLOCK)
        slots = np.empty_like(places)
        for block in np.unique(blocks):
            chosen = blocks == block
            slots[chosen] = permute(places[chosen], _MIXTURE_BLOCK, f"{self._seed}:mixture:{block}")
        sources = np.searchsorted(self._ends, slots, side="right")
        counts = self._counts[sources]
        samples = blocks * counts + slots - (self._ends[sources] - counts)  # in the source's own count
        windows = np.empty_like(samples)
        for source in np.unique(sources):
            chosen, name = sources == source, self._mixture.names[source]
            size = self._mixture.streams[source].num_windows
            windows[chosen] = _shuffled(samples[chosen], size, f"{self._seed}:{name}")
        return np.stack([sources, windows], axis=1)


class MixedWindows:
    """Validation of a mixture: the first windows of every source, in number by weight; fewer than ``num_windows`` if
    one source is too short for its share."""

    def __init__(self, streams: Sequence[Windows], weights: Sequence[float], num_windows: int) -> None:
        total = sum(weights)
        fits = min(int(stream.num_windows * total / weight) for stream, weight in zip(streams, weights, strict=True))
        self._streams = streams
        self._counts = apportion(weights, min(num_windows, fits))
        self._ends = np.cumsum(self._counts)
        self.seq_len = streams[0].seq_len
        self.num_windows = int(self._ends[-1])

    def window(self, index: int) -> np.ndarray:
        """Window ``index``, int64 [seq_len + 1]."""
        source = int(np.searchsorted(self._ends, index, side="right"))
        return self._streams[source].window(index - int(self._ends[source]) + self._counts[source])

    def num_bytes(self, num_windows: int) -> float:
        """Those of the first ``num_windows``, each source's counted as ``TokenStream.num_bytes`` does."""
        starts = self._ends - self._counts
        counts = np.clip(num_windows - starts, 0, self._counts)
        return sum(stream.num_bytes(int(n)) for stream, n in zip(self._streams, counts, strict=True) if n)


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers with sum ``total``, as ``weights`` are, by largest remainder; of equal ones the first gets more."""
    exact = np.array(weights, dtype=np.float64) * (total / sum(weights))
    counts = np.floor(exact + 1e-9).astype(np.int64)  # a share that is whole must not fall below it by rounding
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return [int(count) for count in counts]


def _shuffled(samples: np.ndarray, num_windows: int, key: str) -> np.ndarray:
    """The windows that ``samples`` read of a stream that is gone through over and over, in another order each time."""
    epochs, places = np.divmod(samples, num_windows)
    windows = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        windows[chosen] = permute(places[chosen], num_windows, f"{key}:{epoch}")
    return windows


def _batch_of(windows: Sequence[np.ndarray], first: int) -> Batch:
    tokens = torch.from_numpy(np.stack(windows))
    return Batch(tokens, torch.ones(tokens.shape[0], tokens.shape[1] - 1), first)


class OrderedSource:
    """Validation: windows 0 .. N-1 in order, dealt to ranks in turn; the last batch is padded with weight zero."""

    def __init__(self, stream: Windows, *, num_windows: int, micro_batch: int, rank: int, world_size: int) -> None:
        self._stream = stream
        self._num_windows = num_windows
        self._micro_batch = micro_batch
        self._rank, self._world_size = rank, world_size
        self.num_micro = -(-num_windows // (micro_batch * world_size))

    def first_sample(self, step: int) -> int:
        return self._rank * self._micro_batch

    def batch(self, step: int, micro: int) -> Batch:
        """Micro-batch ``micro`` of the pass on this rank; ``step`` plays no part."""
        first = (micro * self._world_size + self._rank) * self._micro_batch
        wanted = np.arange(first, first + self._micro_batch)
        real = wanted < self._num_windows
        tokens = torch.from_numpy(np.stack([self._stream.window(int(w)) for w in np.where(real, wanted, 0)]))
        weights = torch.from_numpy(real.astype(np.float32))[:, None].expand(-1, self._stream.seq_len)
        return Batch(tokens, weights, first)


def permute(places: np.ndarray, size: int, key: str) -> np.ndarray:
    """A keyed bijection of range(size), elementwise: a 4-round Feistel network, walked until it lands inside.

    Unlike a stored shuffle it costs no memory, which at C4's length would be gigabytes a rank.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    digest = hashlib.sha256(key.encode()).digest()
    keys = np.frombuffer(digest, dtype="<u8")
    result = places.astype(np.uint64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        result[outside] = (left << half) | right
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014): every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
