"""Several corpora by weight. The samples of a run are dealt to their streams by a permutation, again without state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .batches import Batch, TokenStream, TrainingSource, Windows, batch_of, permute, shuffled

BLOCK = 10_000  # samples in which every source of a mixture has its exact share


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
        self._counts = np.array(apportion(mixture.weights, BLOCK))
        self._ends = np.cumsum(self._counts)

    def batch(self, step: int, micro: int) -> Batch:
        first = self.first_sample(step) + micro * self._micro_batch
        drawn = self.sample_windows(first, self._micro_batch)
        return batch_of([self._mixture.streams[source].window(int(window)) for source, window in drawn], first)

    def sample_windows(self, first: int, count: int) -> np.ndarray:
        """Source and window of samples ``first`` .. ``first + count - 1`` of the run, int64 [count, 2]."""
        blocks, places = np.divmod(np.arange(first, first + count), BLOCK)
        slots = np.empty_like(places)
        for block in np.unique(blocks):
            chosen = blocks == block
            slots[chosen] = permute(places[chosen], BLOCK, f"{self._seed}:mixture:{block}")
        sources = np.searchsorted(self._ends, slots, side="right")
        counts = self._counts[sources]
        samples = blocks * counts + slots - (self._ends[sources] - counts)  # in the source's own count
        windows = np.empty_like(samples)
        for source in np.unique(sources):
            chosen, name = sources == source, self._mixture.names[source]
            size = self._mixture.streams[source].num_windows
            windows[chosen] = shuffled(samples[chosen], size, f"{self._seed}:{name}")
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
