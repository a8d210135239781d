"""Batches of windows: a pure function of (seed, step), the same at every world size and micro-batch size.

Window i of length T+1 starts at token i*T of a stream of tokens. An epoch visits every window once, in an order that a
keyed permutation of range(N) gives element by element, so nothing is stored and nothing has to be saved: after a
restart the step number alone says what comes next.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError


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


class Windows(Protocol):
    """Text as windows of ``seq_len + 1`` tokens."""

    seq_len: int
    num_windows: int

    def window(self, index: int) -> np.ndarray: ...

    def num_bytes(self, num_windows: int) -> float: ...


class TokenStream:
    """Windows of ``seq_len + 1`` tokens; neighbours share one token, the last few tokens are left out.

    Args:
        tokens: in parts, each of any whole type.
        ends: of each part, tokens and UTF-8 bytes up to each document's end, int64 [documents, 2].
        place: what is said of a stream that is too short: for it UserError is raised.
    """

    def __init__(self, tokens: Sequence[np.ndarray], ends: Sequence[np.ndarray], seq_len: int, place: str) -> None:
        self.seq_len = seq_len
        self._parts, self._documents = tokens, ends
        self._ends = np.cumsum([len(part) for part in tokens], dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if len(tokens) else 0
        self.num_windows = max(0, (self.num_tokens - 1) // seq_len)
        if self.num_windows == 0:
            raise UserError(
                f"{place} has {self.num_tokens} tokens, less than one window of data.seq_len + 1 = {seq_len + 1}"
            )

    def window(self, index: int) -> np.ndarray:
        """Window ``index``, int64 [seq_len + 1]."""
        start, stop = index * self.seq_len, (index + 1) * self.seq_len + 1
        pieces = []
        part = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[part]) - len(self._parts[part])
            end = min(stop, int(self._ends[part]))
            pieces.append(self._parts[part][start - begin : end - begin])
            start, part = end, part + 1
        return np.concatenate(pieces).astype(np.int64)

    def num_bytes(self, num_windows: int) -> float:
        """UTF-8 bytes of the text that the targets of the first ``num_windows`` windows spell.

        Whole documents are counted exactly, the last, cut one in proportion to its tokens.
        """
        remaining, total = num_windows * self.seq_len + 1, 0.0
        for part, ends in zip(self._parts, self._documents, strict=True):
            if remaining >= len(part):
                remaining, total = remaining - len(part), total + int(ends[-1, 1])
                continue
            document = int(np.searchsorted(ends[:, 0], remaining, side="right"))
            tokens_before, bytes_before = ends[document - 1] if document else (0, 0)
            tokens, size = ends[document] - (tokens_before, bytes_before)
            return total + float(bytes_before) + float(size) * (remaining - int(tokens_before)) / float(tokens)
        return total


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
            return self._pinned(step, micro)
        if step != self._step:
            batches = self._next[1].result() if self._next is not None and self._next[0] == step else self._all(step)
            self._step, self._batches = step, batches
            self._next = step + 1, self._thread.submit(self._all, step + 1)
        return self._batches[micro]

    def _all(self, step: int) -> list[Batch]:
        return [self._pinned(step, micro) for micro in range(self.num_micro)]

    def _pinned(self, step: int, micro: int) -> Batch:
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


class TrainingSource(ABC):
    """Training batches. Rank r of W holds samples [r*G/W, (r+1)*G/W) of each step's G, in equal micro-batches."""

    #: What has to be saved with the step number, updated in place; None where batches are a function of it.
    position: Tensor | None = None

    def __init__(self, *, seed: int, global_batch: int, micro_batch: int, rank: int, world_size: int) -> None:
        self._seed = seed
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._share = global_batch // world_size  # sequences of a step on this rank
        self._rank_offset = rank * self._share
        self.num_micro = self._share // micro_batch

    def first_sample(self, step: int) -> int:
        """Global index of this rank's first sample of ``step``."""
        return step * self._global_batch + self._rank_offset

    @abstractmethod
    def batch(self, step: int, micro: int) -> Batch:
        """Micro-batch ``micro`` of ``step`` (both from 0) on this rank."""


class ShuffledSource(TrainingSource):
    """All windows of one stream in each epoch, in another order."""

    def __init__(self, stream: Windows, **share: int) -> None:
        super().__init__(**share)
        self._stream = stream

    def batch(self, step: int, micro: int) -> Batch:
        first = self.first_sample(step) + micro * self._micro_batch
        windows = self.sample_windows(first, self._micro_batch)
        return batch_of([self._stream.window(int(window)) for window in windows], first)

    def sample_windows(self, first: int, count: int) -> np.ndarray:
        """The windows that samples ``first`` .. ``first + count - 1`` of the run read."""
        return shuffled(np.arange(first, first + count), self._stream.num_windows, str(self._seed))


def shuffled(samples: np.ndarray, num_windows: int, key: str) -> np.ndarray:
    """The windows that ``samples`` read of a stream that is gone through over and over, in another order each time."""
    epochs, places = np.divmod(samples, num_windows)
    windows = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        windows[chosen] = permute(places[chosen], num_windows, f"{key}:{epoch}")
    return windows


def batch_of(windows: Sequence[np.ndarray], first: int) -> Batch:
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
