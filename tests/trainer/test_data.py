"""Batches as a pure function of (seed, step), whatever the world size and the micro-batch size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_texts, tiny_overrides, write_corpus

from trainer.config import TrainConfig, load_config
from trainer.data import OrderedSource, ShuffledSource, TokenShards, TokenStream, permute
from trainer.errors import UserError
from trainer.prepare import prepare


def stream(corpus: Path, seq_len: int = 32, split: str = "train") -> TokenStream:
    config = load_config([f"data.path={corpus}", "data.tokenizer=bytes"]).data
    return TokenStream(TokenShards(config, "bytes"), split, seq_len)


def all_tokens(corpus: Path, split: str = "train") -> np.ndarray:
    files = sorted((corpus / "shards" / "bytes").glob(f"{split}*.bin"))
    return np.concatenate([np.fromfile(file, "<u2") for file in files]).astype(np.int64)


def source(corpus: Path, *, rank: int = 0, world: int = 1, micro: int = 4, seed: int = 0) -> ShuffledSource:
    return ShuffledSource(stream(corpus), seed=seed, global_batch=8, micro_batch=micro, rank=rank, world_size=world)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1000, 65537])
def test_permute_is_a_bijection(size: int) -> None:
    places = np.arange(size)
    permuted = permute(places, size, "7:0")
    assert np.array_equal(np.sort(permuted), places)
    assert np.array_equal(permute(places[size // 2 :], size, "7:0"), permuted[size // 2 :])  # element by element


def test_permute_mixes_and_depends_on_its_key() -> None:
    places = np.arange(10_000)
    first, second = permute(places, 10_000, "0:0"), permute(places, 10_000, "0:1")
    assert np.mean(first == second) < 0.001
    for permuted in (first, second):
        assert abs(np.corrcoef(places, permuted)[0, 1]) < 0.05
        assert abs(np.corrcoef(permuted[:-1], permuted[1:])[0, 1]) < 0.05


def test_permute_reaches_c4_sizes_without_storing_anything() -> None:
    size = 200_000_000_000
    permuted = permute(np.arange(1000), size, "0:0")
    assert len(np.unique(permuted)) == 1000
    assert 0 <= permuted.min() <= permuted.max() < size
    assert permuted.max() > size // 2


@pytest.mark.parametrize("seq_len", [1, 5, 32, 333])
def test_windows_are_slices_of_the_whole_stream(corpus: Path, seq_len: int) -> None:
    tokens, windows = all_tokens(corpus), stream(corpus, seq_len)
    assert windows.num_windows == (len(tokens) - 1) // seq_len
    for index in {0, 1, windows.num_windows // 3, windows.num_windows // 2, windows.num_windows - 1}:
        expected = tokens[index * seq_len : (index + 1) * seq_len + 1]
        assert np.array_equal(windows.window(index), expected)


def test_a_window_may_span_many_shards(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, {"train": [["ab"], ["c"], [], ["de"], ["f"]], "validation": [["xyz"]]})
    prepare(load_config([f"data.path={corpus}", "data.tokenizer=bytes"]).data, workers=1)
    window = stream(corpus, 9).window(0)
    assert window.tolist() == [97, 98, 256, 99, 256, 100, 101, 256, 102, 256]


def test_an_epoch_visits_every_window_once(corpus: Path) -> None:
    one = source(corpus)
    count = stream(corpus).num_windows
    epochs = [one.sample_windows(epoch * count, count) for epoch in range(3)]
    for windows in epochs:
        assert np.array_equal(np.sort(windows), np.arange(count))
    assert not np.array_equal(epochs[0], epochs[1])
    across = one.sample_windows(count - 3, 6)  # a batch may lie in two epochs
    assert np.array_equal(across, np.concatenate([epochs[0][-3:], epochs[1][:3]]))


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 2), (1, 8), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_a_step_is_the_same_batch_however_it_is_dealt(corpus: Path, world: int, micro: int) -> None:
    whole = source(corpus, micro=8).batch(5, 0)
    parts, firsts = [], []
    for rank in range(world):
        share = source(corpus, rank=rank, world=world, micro=micro)
        assert share.num_micro == 8 // world // micro
        for index in range(share.num_micro):
            batch = share.batch(5, index)
            parts.append(batch.tokens)
            firsts.append(batch.first_sample)
    assert torch.equal(torch.cat(parts), whole.tokens)
    assert firsts == list(range(40, 48, micro))
    assert whole.tokens.shape == (8, 33)
    assert whole.tokens.dtype == torch.int64


def test_batches_depend_on_seed_and_step(corpus: Path) -> None:
    first = source(corpus).batch(0, 0).tokens
    assert torch.equal(first, source(corpus).batch(0, 0).tokens)
    assert not torch.equal(first, source(corpus).batch(1, 0).tokens)
    assert not torch.equal(first, source(corpus, seed=1).batch(0, 0).tokens)


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 3), (3, 2), (4, 16)])
def test_validation_covers_the_same_tokens_once_at_every_world_size(corpus: Path, world: int, micro: int) -> None:
    windows = stream(corpus, 16, "validation")
    sources = [
        OrderedSource(windows, num_windows=11, micro_batch=micro, rank=rank, world_size=world) for rank in range(world)
    ]
    assert len({one.num_micro for one in sources}) == 1  # no rank waits for another
    seen = []
    for one in sources:
        for index in range(one.num_micro):
            batch = one.batch(0, index)
            assert batch.tokens.shape == (micro, 17)
            seen += [row.tolist() for row, weight in zip(batch.tokens, batch.weights[:, 0], strict=True) if weight]
    assert sorted(seen) == sorted(windows.window(index).tolist() for index in range(11))


def test_bytes_of_validation_are_those_of_its_documents(corpus: Path) -> None:
    windows = stream(corpus, 16, "validation")
    tokens = all_tokens(corpus, "validation")
    for count in (1, 4, windows.num_windows):
        covered = tokens[: count * 16 + 1]
        exact = int((covered < 256).sum())  # every token but the end of text is one byte
        assert abs(windows.num_bytes(count) - exact) <= 1.0


def test_one_set_of_shards_serves_every_length(corpus: Path) -> None:
    assert np.array_equal(stream(corpus, 8).window(3), stream(corpus, 4).window(6).tolist()[:4] + stream(corpus, 4)
                          .window(7).tolist())  # fmt: skip


def refused(config: TrainConfig, fingerprint: str = "bytes") -> str:
    def opened() -> None:
        shards = TokenShards(config.data, fingerprint)
        shards.verify()
        TokenStream(shards, "train", config.data.seq_len)

    with pytest.raises(UserError) as caught:
        opened()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., TrainConfig]:
    """A prepared corpus that a test may damage."""
    corpus = write_corpus(tmp_path / "c", {"train": [make_texts(5, 1)], "validation": [make_texts(2, 2)]})
    prepare(load_config([f"data.path={corpus}", "data.tokenizer=bytes"]).data, workers=1)
    return lambda *overrides: load_config(tiny_overrides(corpus, tmp_path / "run", *overrides))


def test_shards_that_are_not_there(own: Callable[..., TrainConfig], tmp_path: Path) -> None:
    assert "no token shards in" in refused(own(f"data.shards={tmp_path / 'none'}"))
    assert "prepare_data.py" in refused(own(f"data.shards={tmp_path / 'none'}"))


def test_shards_of_another_tokenizer(own: Callable[..., TrainConfig]) -> None:
    assert "did not make the shards" in refused(own(), "0123456789abcdef")


def test_shards_that_are_damaged(own: Callable[..., TrainConfig]) -> None:
    config = own()
    directory = Path(config.data.shards_dir)
    shard = directory / "train.00000-of-00001.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])
    assert f"has {len(good) - 2} bytes, not {len(good)}" in refused(config)
    shard.write_bytes(b"\0\0" + good[2:])
    assert "is damaged" in refused(config)
    shard.write_bytes(good)
    documents = directory / "train.00000-of-00001.docs.npy"
    table = documents.read_bytes()
    documents.write_bytes(table[:-1] + b"\1")
    assert "docs.npy is damaged" in refused(config)
    documents.unlink()
    assert "docs.npy is missing" in refused(config)
    shard.unlink()
    assert "is missing" in refused(config)
    (directory / "manifest.json").write_text("{")
    assert "cannot be read" in refused(config)
    (directory / "manifest.json").write_text(json.dumps({"version": 99}))
    assert "has version 99" in refused(config)


def test_a_corpus_shorter_than_a_window(own: Callable[..., TrainConfig]) -> None:
    assert "less than one window of data.seq_len + 1 = 100001" in refused(own("data.seq_len=100000"))
