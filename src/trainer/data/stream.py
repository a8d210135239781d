"""Batches straight from the text files, in an order that is a function of the seed, with a position that is saved.

The stream is a fixed number of lanes, which follows from the batch and the number of files, not from the processes. In
every epoch the files are dealt to the lanes in a keyed order; a lane reads its files one after the other, the rows of
each shuffled inside blocks, and gives the same share of every batch. Where a lane stands is five whole numbers,
whatever was tokenized ahead: epoch, file (counted within the lane), row (counted in shuffled order), token of that
row's document, and windows given so far.

Against token shards: nothing to prepare, but a row is tokenized anew in every epoch, only rows near each other in a
file are shuffled, a sample and its neighbour in the lane come from one file, and going on means to read each lane's
file up to where it stood.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .batches import Batch, TrainingSource, permute
from .corpus import DEFAULT_LIMITS, BadRow, BadRows, CorpusFile, Line, RowLimits, grouped, read_lines, text_of
from .tokenizer import TextTokenizer

_BLOCK_BYTES = 32 << 20  # a block of rows ends here even if it has fewer rows: it is kept in memory
_AHEAD_CHARACTERS = 1 << 16  # text handed to the tokenizer at once
POSITION_FIELDS = 5


@dataclass(frozen=True)
class TextStream:
    """What the lanes read."""

    files: Sequence[CorpusFile]
    tokenizer: TextTokenizer
    seq_len: int
    max_lanes: int
    shuffle_rows: int
    limits: RowLimits = DEFAULT_LIMITS

    def num_lanes(self, global_batch: int) -> int:
        """The largest divisor of the batch that neither the files nor ``data.lanes`` forbid."""
        most = min(len(self.files), self.max_lanes)
        return max(lanes for lanes in range(1, global_batch + 1) if global_batch % lanes == 0 and lanes <= most)

    def sharing(self, global_batch: int, world_size: int) -> str | None:
        """One line if several processes have to read the same lane, which is work done twice; None otherwise."""
        lanes = self.num_lanes(global_batch)
        if lanes % world_size == 0:
            return None
        near = min((n for n in range(1, lanes + 1) if lanes % n == 0), key=lambda n: (abs(n - world_size), n))
        fitting = [n for n in range(world_size, global_batch + 1, world_size) if global_batch % n == 0]
        if within := [n for n in fitting if n <= lanes]:
            other = f"data.lanes={within[-1]}"
        else:
            other = f"{fitting[0]} files" + (f" and data.lanes={fitting[0]}" if self.max_lanes < fitting[0] else "")
        return (
            f"{world_size} processes share {lanes} lane{'s' * (lanes > 1)} (files read at a time), so some text is "
            f"read and tokenized by several of them; {near} process{'es' * (near > 1)} or {other} would avoid that"
        )


@dataclass
class _Document:
    """A tokenized document and where it lies."""

    epoch: int
    place: int
    row: int
    tokens: np.ndarray
    offset: int  # tokens of it that are used


class Lane:
    """One endless sequence of tokens. Starts, or goes on, at ``position``; raises UserError where text is bad.

    ``heard``: whether this lane says which rows it leaves out, in the first epoch.
    """

    def __init__(
        self,
        stream: TextStream,
        seed: int,
        lane: int,
        num_lanes: int,
        position: Sequence[int],
        *,
        heard: bool = False,
    ) -> None:
        self._stream = stream
        self._heard = heard
        self._seed = seed
        self._lane, self._num_lanes = lane, num_lanes
        *start, self._windows = position
        self._documents = self._read(*start)
        self._document: _Document | None = None

    def windows(self, count: int) -> np.ndarray:
        """The next ``count`` windows, int64 [count, seq_len + 1]; neighbours share one token."""
        length = self._stream.seq_len
        tokens = self._take(count * length)
        self._windows += count
        return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length].astype(np.int64)

    @property
    def position(self) -> tuple[int, ...]:
        """Where the next window starts; only after ``windows``."""
        document = self._current()
        return document.epoch, document.place, document.row, document.offset, self._windows

    def _take(self, count: int) -> np.ndarray:
        """The next ``count + 1`` tokens, of which the last stays."""
        parts = []
        while count:
            document = self._current()
            parts.append(document.tokens[document.offset : document.offset + count])
            document.offset += len(parts[-1])
            count -= len(parts[-1])
        document = self._current()
        return np.concatenate([*parts, document.tokens[document.offset : document.offset + 1]])

    def _current(self) -> _Document:
        """The document that the next token is of."""
        if self._document is None or self._document.offset == len(self._document.tokens):
            self._document = next(self._documents)
        return self._document

    def _read(self, epoch: int, place: int, row: int, offset: int) -> Iterator[_Document]:
        files = self._stream.files
        while True:
            complete, found = place == row == 0, False
            order = permute(np.arange(len(files)), len(files), f"{self._seed}:files:{epoch}")[
                self._lane :: self._num_lanes
            ]
            for number in range(place, len(order)):
                for at, tokens in self._read_file(files[order[number]], epoch, row):
                    found = True
                    yield _Document(epoch, number, at, tokens, offset)
                    offset = 0
                row = 0
            if complete and not found:
                names = ", ".join(str(files[index].path) for index in order[:2])
                raise UserError(
                    f"no text in {len(order)} files that are read in turn: {names}{' ...' * (len(order) > 2)}"
                )
            epoch, place = epoch + 1, 0

    def _read_file(self, file: CorpusFile, epoch: int, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """Rows from ``first`` on in shuffled order, and the tokens of each that has text.

        A bad row keeps its place, so that positions do not depend on how many are allowed. Those before ``first`` are
        looked at again where some are, for they count.
        """
        limits, tokenizer = self._stream.limits, self._stream.tokenizer
        bad = BadRows(limits)

        def texts(block: Sequence[Line], number: int, start: int) -> Iterator[tuple[int, str]]:
            order = permute(np.arange(len(block)), len(block), f"{self._seed}:{epoch}:{file.index}:{number}")
            for place in range(0 if limits.max_bad_rows else start, len(block)):
                bad.heard = self._heard and epoch == 0 and place >= start
                try:
                    text = text_of(block[order[place]], file.path, limits)
                except BadRow as error:
                    bad.leave_out(error)
                    continue
                if text and place >= start:
                    yield place, text

        lines = read_lines(file.path, limits=limits)
        before = 0
        # The size of a line is also that of one that is too long, so that the limit changes no block.
        for number, block in enumerate(grouped(lines, lambda line: line.size, _BLOCK_BYTES, self._stream.shuffle_rows)):
            rows = texts(block, number, max(0, first - before))
            for group in grouped(rows, lambda row: len(row[1]), _AHEAD_CHARACTERS):
                encoded = tokenizer.encode_batch([text for _, text in group])
                for (place, _), ids in zip(group, encoded, strict=True):
                    yield before + place, _with_end(ids, tokenizer)
            before += len(block)
        bad.sum_up(file.path)


def _with_end(ids: list[int], tokenizer: TextTokenizer) -> np.ndarray:
    # Not [*ids, eot]: a list of a long document's tokens is many times its text, and one is enough.
    return np.fromiter(itertools.chain(ids, (tokenizer.eot,)), np.int32, len(ids) + 1)


class StreamSource(TrainingSource):
    """Sample s of a step is window s mod G/L of lane s div G/L, in turn, so that a rank needs few lanes.

    ``batch`` goes forward only: the first step asked for is the one that ``position`` stands at. The next step is read
    in a thread while this one is computed. ``together`` runs a function on all ranks, raises the first UserError on all
    of them, and adds up the tensors they return.
    """

    position: Tensor  # int64 [lanes, 5], of all lanes, as after the last batch

    def __init__(
        self,
        stream: TextStream,
        *,
        together: Callable[[Callable[[], Tensor]], Tensor] = lambda function: function(),
        **share: int,
    ) -> None:
        super().__init__(**share)
        self._stream = stream
        self._together = together
        self._num_lanes = stream.num_lanes(self._global_batch)
        self._lane_share = self._global_batch // self._num_lanes
        first, last = self._rank_offset, self._rank_offset + self._share - 1
        self.lane_numbers = range(first // self._lane_share, last // self._lane_share + 1)
        self._lanes: dict[int, Lane] = {}
        self._step = -1
        self._tokens = np.empty(0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._next: Future[tuple[np.ndarray, Tensor]] | None = None
        self.position = torch.zeros(self._num_lanes, POSITION_FIELDS, dtype=torch.int64)

    def batch(self, step: int, micro: int) -> Batch:
        """As in ``TrainingSource``. Raises UserError, on all ranks alike, if the text cannot be read on one."""
        if step != self._step:
            self._advance(step)
        first = micro * self._micro_batch
        tokens = torch.from_numpy(self._tokens[first : first + self._micro_batch])
        return Batch(tokens, torch.ones(tokens.shape[0], tokens.shape[1] - 1), self.first_sample(step) + first)

    def _advance(self, step: int) -> None:
        if self._next is None:
            stands_at = int(self.position[0, -1]) // self._lane_share
            assert step == stands_at, f"the stream stands at step {stands_at}, not {step}"
            positions = self.position.tolist()
            self._next = self._thread.submit(self._open_and_read, positions)
        else:
            assert step == self._step + 1, f"the stream gives step {self._step + 1} next, not {step}"

        def finished() -> Tensor:
            assert self._next is not None
            self._tokens, position = self._next.result()
            return position

        self.position.copy_(self._together(finished))
        self._step = step
        self._next = self._thread.submit(self._read)

    def _open_and_read(self, positions: list[list[int]]) -> tuple[np.ndarray, Tensor]:
        for lane in self.lane_numbers:
            self._lanes[lane] = Lane(
                self._stream, self._seed, lane, self._num_lanes, positions[lane], heard=self._begins(lane)
            )
        return self._read()

    def _begins(self, lane: int) -> bool:
        """Whether the lane's first sample of a step is here, which is so on one rank."""
        return self._rank_offset <= lane * self._lane_share

    def _read(self) -> tuple[np.ndarray, Tensor]:
        """This rank's share of the next step, and the positions after it of the lanes whose first sample is here."""
        windows = np.concatenate([self._lanes[lane].windows(self._lane_share) for lane in self.lane_numbers])
        skipped = self._rank_offset - self.lane_numbers[0] * self._lane_share
        position = torch.zeros_like(self.position)
        for lane in self.lane_numbers:
            if self._begins(lane):
                position[lane] = torch.tensor(self._lanes[lane].position)
        return windows[skipped : skipped + self._share], position


def read_head(
    files: Sequence[CorpusFile], tokenizer: TextTokenizer, num_tokens: int | None, limits: RowLimits = DEFAULT_LIMITS
) -> tuple[np.ndarray, np.ndarray]:
    """Whole documents until there are ``num_tokens`` tokens (None: all).

    Gives the tokens, int32, and the tokens and UTF-8 bytes up to each document's end, int64 [documents, 2].
    """
    parts, ends, tokens, size = [], [], 0, 0
    for text in (text for file in files for text in file.texts(bad=BadRows(limits, heard=True))):
        if not text:
            continue
        if num_tokens is not None and tokens >= num_tokens:
            break
        parts.append(_with_end(tokenizer.encode_batch([text])[0], tokenizer))
        tokens, size = tokens + len(parts[-1]), size + len(text.encode())
        ends.append((tokens, size))
    return np.concatenate(parts or [np.empty(0, np.int32)]), np.array(ends, dtype=np.int64).reshape(-1, 2)
