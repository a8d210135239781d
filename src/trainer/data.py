"""Batches from token shards: a pure function of (seed, step), the same at every world size and micro-batch size.

The shards of a split form one stream of tokens; window i of length T+1 starts at token i*T. An epoch visits every
window once, in an order that a keyed permutation of range(N) gives element by element, so nothing is stored and
nothing has to be saved: after a restart the step number alone says what comes next. A mixture deals the samples of a
run to several such streams, again by a permutation.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.files import sha256_of
from trainer.remote import remote_path

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
_MIXTURE_BLOCK = 10_000  # samples in which every source of a mixture has its exact share


@dataclass(kw_only=True)
class SourceConfig:
    """One corpus of a mixture."""

    path: str
    weight: float = 1.0  # share of the samples, relative to the other weights
    shards: str | None = None


@dataclass(kw_only=True)
class DataConfig:
    """Where text and tokens lie, and what a batch is."""

    name: str
    path: str  # a corpus in C4's layout: a directory, an HTTP address, allenai/c4 or hf://datasets/OWNER/NAME
    tokenizer: str  # a directory, a tokenizer.json, or "bytes"
    eot_token: str | None = None  # end of text; null finds the tokenizer's own
    shards: str | None = None  # token shards; null is a directory in the corpus's home named after the tokenizer
    verify: bool = True  # compare the shards' checksums at every start (sizes are always compared)
    max_files: int | None = None  # the first ones of each split; null is all
    attempts: int = 8  # at reading from a server, the waits between them doubling from half a second to a minute
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
        return self.shards or str(Path(home_of(self.path)) / "shards" / Path(self.tokenizer).stem)

    def parts(self) -> dict[str, DataConfig]:
        """The config of each source by its name; of a config without a mixture, itself.

        Raises UserError for a mixture of nothing.
        """
        if self.sources is None:
            return {self.name: self}
        if not self.sources:
            raise UserError(f"data={self.name} has no sources: data.sources='{{a: {{path: DIR, weight: 2}}, ...}}'")
        return {
            name: replace(self, name=name, path=source.path, shards=source.shards, sources=None)
            for name, source in sorted(self.sources.items())
        }

    def validate(self) -> None:
        """Raises ValueError for impossible sizes and weights."""
        for name in ("seq_len", "global_batch_size", "tokenizer_train_bytes", "attempts", "lanes", "shuffle_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least 1")
        if self.max_files is not None and self.max_files < 1:
            raise ValueError(f"data.max_files={self.max_files}: must be at least 1, or null for all")
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


def home_of(path: str) -> str:
    """Where a corpus keeps its tokenizer and token shards: in itself, or in ``data/`` if it lies on a server."""
    if remote_path(path) is None or Path(path).is_dir():
        return path
    place = path.split("://")[-1].removeprefix("datasets/").lower()
    return f"data/{re.sub('[^a-z0-9]+', '-', place).strip('-')}"


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
    bytes: int
    sha256: str
    documents_sha256: str


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


class TokenShards:
    """The prepared corpus of one directory.

    Raises UserError if there is none, if a shard is missing or damaged, or if another tokenizer made it.
    """

    def __init__(self, config: DataConfig, tokenizer_fingerprint: str) -> None:
        self.directory = Path(config.shards_dir)
        again = "run python scripts/prepare_data.py with the same data options"
        try:
            manifest = json.loads((self.directory / MANIFEST).read_text())
        except FileNotFoundError as error:
            raise UserError(f"no token shards in {self.directory}: {again}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{self.directory / MANIFEST} cannot be read ({error}): {again}") from error
        if manifest.get("version") != MANIFEST_VERSION:
            raise UserError(f"{self.directory} has version {manifest.get('version')}, not {MANIFEST_VERSION}: {again}")
        made_by = manifest["tokenizer"]["fingerprint"]
        if made_by != tokenizer_fingerprint:
            raise UserError(
                f"data.tokenizer={config.tokenizer} (fingerprint {tokenizer_fingerprint}) did not make the shards in "
                f"{self.directory} (fingerprint {made_by}): {again}, or name the tokenizer that did"
            )
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.splits: dict[str, list[ShardInfo]] = manifest["splits"]
        self.dtype = np.dtype(manifest["dtype"])
        self.fingerprint = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
        for shard in (shard for shards in self.splits.values() for shard in shards):
            file = self.directory / shard["file"]
            size = file.stat().st_size if file.exists() else -1
            if size != shard["tokens"] * self.dtype.itemsize:
                state = "is missing" if size < 0 else f"has {size} bytes, not {shard['tokens'] * self.dtype.itemsize}"
                raise UserError(f"{file} {state}: {again}")
            if not (self.directory / shard["documents_file"]).exists():
                raise UserError(f"{self.directory / shard['documents_file']} is missing: {again}")

    def verify(self) -> None:
        """Compare every shard's checksum. Raises UserError for a damaged one."""
        for shard in (shard for shards in self.splits.values() for shard in shards):
            checksums = {shard["file"]: shard["sha256"], shard["documents_file"]: shard["documents_sha256"]}
            for name, checksum in checksums.items():
                if sha256_of(self.directory / name) != checksum:
                    raise UserError(
                        f"{self.directory / name} is damaged (checksum differs): "
                        "run python scripts/prepare_data.py again"
                    )


class TokenStream:
    """One split as windows of ``seq_len + 1`` tokens; neighbours share one token, the last few tokens are left out."""

    def __init__(self, shards: TokenShards, split: str, seq_len: int) -> None:
        self.seq_len = seq_len
        self._infos = [info for info in shards.splits[split] if info["tokens"]]
        self._directory = shards.directory
        self._dtype = shards.dtype
        self._maps: dict[int, Any] = {}
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
            parts.append(self._map(shard)[start - begin : end - begin])
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
            ends = np.load(self._directory / info["documents_file"], mmap_mode="r")
            document = int(np.searchsorted(ends[:, 0], remaining, side="right"))
            tokens_before, bytes_before = ends[document - 1] if document else (0, 0)
            tokens, size = ends[document] - (tokens_before, bytes_before)
            return total + float(bytes_before) + float(size) * (remaining - int(tokens_before)) / float(tokens)
        return total

    def _map(self, shard: int) -> Any:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._directory / self._infos[shard]["file"], self._dtype, mode="r")
        return self._maps[shard]


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
