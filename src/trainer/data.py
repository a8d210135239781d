"""Batches from token shards: a pure function of (seed, step), the same at every world size and micro-batch size.

The shards of a split form one stream of tokens; window i of length T+1 starts at token i*T. An epoch visits every
window once, in an order that a keyed permutation of range(N) gives element by element, so nothing is stored and
nothing has to be saved: after a restart the step number alone says what comes next.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.files import sha256_of

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(kw_only=True)
class DataConfig:
    """Where text and tokens lie, and what a batch is."""

    name: str
    path: str  # a corpus in C4's layout
    tokenizer: str  # a directory, a tokenizer.json, or "bytes"
    eot_token: str | None = None  # end of text; null finds the tokenizer's own
    shards: str | None = None  # token shards; null is a directory in `path` named after the tokenizer
    verify: bool = True  # compare the shards' checksums at every start (sizes are always compared)
    seq_len: int
    global_batch_size: int  # sequences of one optimizer step, over all ranks
    vocab_size: int = 4096  # of the BPE that is trained where `tokenizer` does not exist yet
    tokenizer_train_bytes: int = 100_000_000  # text that BPE sees

    @property
    def shards_dir(self) -> str:
        return self.shards or str(Path(self.path) / "shards" / Path(self.tokenizer).stem)

    def validate(self) -> None:
        """Raises ValueError for impossible sizes."""
        for field in ("seq_len", "global_batch_size", "tokenizer_train_bytes"):
            if getattr(self, field) < 1:
                raise ValueError(f"data.{field}={getattr(self, field)}: must be at least 1")
        if self.vocab_size < 257:
            raise ValueError(f"data.vocab_size={self.vocab_size}: a byte-level BPE has at least 257 entries")


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


class ShuffledSource:
    """Training batches. Rank r of W holds samples [r*G/W, (r+1)*G/W) of each step's G, in equal micro-batches."""

    def __init__(
        self, stream: TokenStream, *, seed: int, global_batch: int, micro_batch: int, rank: int, world_size: int
    ) -> None:
        self._stream = stream
        self._seed = seed
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._rank_offset = rank * (global_batch // world_size)
        self.num_micro = global_batch // world_size // micro_batch

    def first_sample(self, step: int) -> int:
        """Global index of this rank's first sample of ``step``."""
        return step * self._global_batch + self._rank_offset

    def batch(self, step: int, micro: int) -> Batch:
        """Micro-batch ``micro`` of ``step`` (both from 0) on this rank."""
        first = self.first_sample(step) + micro * self._micro_batch
        windows = self.sample_windows(first, self._micro_batch)
        tokens = torch.from_numpy(np.stack([self._stream.window(int(window)) for window in windows]))
        return Batch(tokens, torch.ones(tokens.shape[0], tokens.shape[1] - 1), first)

    def sample_windows(self, first: int, count: int) -> np.ndarray:
        """The windows that samples ``first`` .. ``first + count - 1`` of the run read."""
        epochs, places = np.divmod(np.arange(first, first + count), self._stream.num_windows)
        windows = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = permute(places[chosen], self._stream.num_windows, f"{self._seed}:{epoch}")
        return windows


class OrderedSource:
    """Validation: windows 0 .. N-1 in order, dealt to ranks in turn; the last batch is padded with weight zero."""

    def __init__(self, stream: TokenStream, *, num_windows: int, micro_batch: int, rank: int, world_size: int) -> None:
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
