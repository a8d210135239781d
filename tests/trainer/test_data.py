"""Batches as a pure function of (seed, step), whatever the world size and the micro-batch size."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_texts, tiny_overrides, train_here, write_corpus
from narrowgauge.trainer.config import TrainConfig, load_config
from narrowgauge.trainer.data.batches import OrderedSource, ShuffledSource, TokenStream, document_positions, permute
from narrowgauge.trainer.data.mixture import MixedSource, MixedWindows, Mixture, apportion
from narrowgauge.trainer.data.prepare import prepare
from narrowgauge.trainer.data.shards import TokenShards
from narrowgauge.trainer.data.tokenizer import train_bpe
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.metrics import read_metrics
from whole_runs import compare_runs


def stream(corpus: Path, seq_len: int = 32, split: str = "train") -> TokenStream:
    config = load_config([f"data.path={corpus}", "data.tokenizer=bytes"]).data
    return TokenShards(config, "bytes").stream(split, seq_len)


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
        shards.stream("train", config.data.seq_len)

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


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "content",
    [b"[]", b"7", b"null", b'"text"', b"", b"\xff", DEEP, b'{"version": ' + DEEP, b"{}"],
    ids=["list", "number", "null", "string", "empty", "other bytes", "deep list", "deep inside", "no version"],
)
def test_manifests_that_are_none(own: Callable[..., TrainConfig], content: bytes) -> None:
    config = own()
    (Path(config.data.shards_dir) / "manifest.json").write_bytes(content)
    message = refused(config)
    assert "manifest.json cannot be read (" in message or "has version None, not 1" in message
    assert "prepare_data.py" in message


WRONG: dict[str, tuple[list[str | int], object]] = {
    "no dtype": (["dtype"], None),
    "other dtype": (["dtype"], "object"),
    "tokenizer is a list": (["tokenizer"], [1]),
    "fingerprint is a number": (["tokenizer", "fingerprint"], 3),
    "vocabulary is text": (["tokenizer", "vocab_size"], "257"),
    "vocabulary of nothing": (["tokenizer", "vocab_size"], 0),
    "splits is a list": (["splits"], []),
    "a split is an object": (["splits", "train"], {"a": 1}),
    "a shard is a number": (["splits", "train", 0], 5),
    "tokens are text": (["splits", "train", 0, "tokens"], "10"),
    "tokens are negative": (["splits", "train", 0, "tokens"], -1),
    "tokens are a fraction": (["splits", "train", 0, "tokens"], 1.5),
    "documents are true": (["splits", "train", 0, "documents"], True),
    "no checksum": (["splits", "train", 0, "sha256"], None),
    "a path": (["splits", "train", 0, "file"], "../bytes/train.00000-of-00001.bin"),
    "an absolute path": (["splits", "train", 0, "documents_file"], "/etc/passwd"),
    "no name": (["splits", "train", 0, "file"], ""),
    "a zero byte": (["splits", "train", 0, "file"], "a\0b"),
}


@pytest.mark.parametrize("name", WRONG)
def test_manifests_of_wrong_types(own: Callable[..., TrainConfig], name: str) -> None:
    config, (keys, value) = own(), WRONG[name]
    file = Path(config.data.shards_dir) / "manifest.json"
    manifest = inner = json.loads(file.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(manifest))
    message = refused(config)
    assert "cannot be read" in message or "cannot be opened" in message
    assert str(file.parent) in message


def npy(array: object, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)  # type: ignore[arg-type]
    return file.getvalue()


class Marker:
    """Loading its pickle makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "kind",
    ["empty", "garbage", "cut", "header only", "floats", "one column", "fewer rows", "by columns", "pickled", "pickle"],
)
def test_tables_of_documents_that_are_none(own: Callable[..., TrainConfig], tmp_path: Path, kind: str) -> None:
    config = own()
    file = Path(config.data.shards_dir) / "train.00000-of-00001.docs.npy"
    good = np.load(file)
    marker = tmp_path / "marker"
    file.write_bytes(
        {
            "empty": lambda: b"",
            "garbage": lambda: b"nonsense" * 100,
            "cut": lambda: file.read_bytes()[:-8],
            "header only": lambda: file.read_bytes()[:60],
            "floats": lambda: npy(good.astype(float)),
            "one column": lambda: npy(good[:, 0]),
            "fewer rows": lambda: npy(good[:-1]),
            "by columns": lambda: npy(np.asfortranarray(good)),
            "pickled": lambda: npy(np.array([[Marker(marker)] * 2] * len(good), dtype=object), allow_pickle=True),
            "pickle": lambda: pickle.dumps(Marker(marker)),
        }[kind]()
    )
    with pytest.raises(UserError) as caught:  # without a look at checksums
        TokenShards(config.data, "bytes")
    assert f"{file} is damaged" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    prepare(config.data, workers=1)
    assert np.array_equal(np.load(file), good)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"7", b"null", b"", b"\xff", DEEP, b"{}", b'{"file": ["x"]}'],
    ids=["list", "number", "null", "empty", "other bytes", "deep", "no keys", "wrong type"],
)
def test_a_description_of_a_shard_that_is_none_is_made_again(own: Callable[..., TrainConfig], content: bytes) -> None:
    data = own().data
    before = prepare(data, workers=1)
    (Path(data.shards_dir) / "train.00000-of-00001.json").write_bytes(content)
    assert prepare(data, workers=1) == before


def test_shards_prepared_anew_leave_what_is_open_as_it_was(tmp_path: Path) -> None:
    corpus = tmp_path / "c"
    for seed in (1, 2):
        texts = {"train": [make_texts(9, seed), make_texts(9, seed + 5)], "validation": [make_texts(5, seed + 8)]}
        write_corpus(corpus, texts)
        config = load_config([f"data.path={corpus}", "data.tokenizer=bytes"]).data
        manifest = prepare(config, workers=1)
        if seed == 1:
            shards = TokenShards(config, "bytes")
            streams = [shards.stream(split, 32) for split in ("train", "validation")]
            before = [[one.window(index) for index in range(one.num_windows)] for one in streams]
            sizes = [[one.num_bytes(count) for count in range(one.num_windows + 1)] for one in streams]
            first = manifest
    assert manifest["splits"]["train"][0]["sha256"] != first["splits"]["train"][0]["sha256"]
    assert [[one.window(index).tolist() for index in range(one.num_windows)] for one in streams] == [
        [window.tolist() for window in windows] for windows in before
    ]
    assert [[one.num_bytes(count) for count in range(one.num_windows + 1)] for one in streams] == sizes
    with pytest.raises(UserError, match="was written anew just now: run the same command again"):
        shards.verify()
    assert not np.array_equal(stream(corpus).window(0), before[0][0])


def test_what_was_left_out_is_no_part_of_the_fingerprint(own: Callable[..., TrainConfig]) -> None:
    """So that shards of a version that did not count it are those of this one."""
    data = own().data
    file = Path(data.shards_dir) / "manifest.json"
    before = TokenShards(data, "bytes").fingerprint
    manifest = json.loads(file.read_text())
    for shard in (shard for shards in manifest["splits"].values() for shard in shards):
        del shard["bad_rows"], shard["max_line_bytes"]
    file.write_text(json.dumps(manifest))
    assert TokenShards(data, "bytes").fingerprint == before


def test_the_fingerprint_is_of_the_tokens_alone(own: Callable[..., TrainConfig]) -> None:
    data = own().data
    before = TokenShards(data, "bytes")
    for file in (Path(data.path) / "en").iterdir():
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()), 1, mtime=1))
    prepare(data, workers=1)
    after = TokenShards(data, "bytes")
    assert after.fingerprint == before.fingerprint
    file = next((Path(data.path) / "en").glob("c4-train*"))
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()).replace(b"the", b"teh", 1)))
    prepare(data, workers=1)
    assert TokenShards(data, "bytes").fingerprint != before.fingerprint


def test_a_run_goes_on_over_tokens_prepared_again(own: Callable[..., TrainConfig]) -> None:
    config = own("train.steps=2")
    train_here(config)
    for file in (Path(config.data.path) / "en").iterdir():
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()), 1, mtime=1))
    prepare(config.data, workers=1)
    assert train_here(own("train.steps=4")) is ExitCode.FINISHED


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, {"train": [["ab"]] * 40, "validation": [["xyz"]]})
    prepare(load_config([f"data.path={corpus}", "data.tokenizer=bytes"]).data, workers=1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, limits[1]))
        assert stream(corpus, 119).window(0).tolist() == [97, 98, 256] * 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_corpus_shorter_than_a_window(own: Callable[..., TrainConfig]) -> None:
    assert "less than one window of data.seq_len + 1 = 100001" in refused(own("data.seq_len=100000"))


# Mixtures


def mixture(tmp_path: Path, seq_len: int = 32) -> Mixture:
    streams = {}
    for index, name in enumerate(("one", "two", "three")):
        texts = {"train": [make_texts(40 * (index + 1), index)], "validation": [make_texts(9, 10 + index)]}
        path = write_corpus(tmp_path / name, texts)
        config = load_config([f"data.path={path}", "data.tokenizer=bytes"]).data
        if not Path(config.shards_dir).exists():
            prepare(config, workers=1)
        streams[name] = stream(path, seq_len)
    return Mixture(streams, [5.0, 3.0, 2.0])


def mixed(of: Mixture, rank: int = 0, world: int = 1, micro: int = 8, seed: int = 0) -> MixedSource:
    return MixedSource(of, seed=seed, global_batch=8, micro_batch=micro, rank=rank, world_size=world)


@pytest.mark.parametrize(
    ("weights", "total", "counts"),
    [
        ([1, 1, 1], 10_000, [3334, 3333, 3333]),
        ([5, 3, 2], 10_000, [5000, 3000, 2000]),
        ([0.1, 0.2, 0.7], 10, [1, 2, 7]),
        ([1], 7, [7]),
        ([3, 1], 2, [2, 0]),
        ([1, 2], 0, [0, 0]),
    ],
)
def test_shares_are_whole_and_add_up(weights: list[float], total: int, counts: list[int]) -> None:
    assert apportion(weights, total) == counts


def test_a_mixture_gives_every_source_its_share_and_every_window_in_turn(tmp_path: Path) -> None:
    of = mixture(tmp_path)
    drawn = mixed(of).sample_windows(0, 20_000)
    for block in (drawn[:10_000], drawn[10_000:]):
        assert np.bincount(block[:, 0]).tolist() == [5000, 3000, 2000]
    assert abs(np.mean(drawn[:500, 0] == 0) - 0.5) < 0.1  # not one source after the other
    for source, windows in enumerate(of.streams):
        read, times = drawn[drawn[:, 0] == source, 1], {0: 10_000, 1: 6_000, 2: 4_000}[source]
        assert len(read) == times
        # Over two blocks each window is read as often as any other, give or take one.
        counts = np.bincount(read, minlength=windows.num_windows)
        assert counts.max() - counts.min() <= 1
    assert not np.array_equal(drawn, mixed(of, seed=1).sample_windows(0, 20_000))


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (2, 2), (4, 1), (8, 1)])
def test_a_mixtures_step_is_the_same_however_it_is_dealt(tmp_path: Path, world: int, micro: int) -> None:
    of = mixture(tmp_path)
    whole = mixed(of).batch(1249, 0)  # the last step of a block
    shares = [mixed(of, rank, world, micro) for rank in range(world)]
    parts = [share.batch(1249, index).tokens for share in shares for index in range(share.num_micro)]
    assert torch.equal(torch.cat(parts), whole.tokens)


def test_validation_of_a_mixture_is_dealt_by_weight(tmp_path: Path) -> None:
    of = mixture(tmp_path)
    windows = MixedWindows(of.streams, of.weights, 20)
    expected = [(0, i) for i in range(10)] + [(1, i) for i in range(6)] + [(2, i) for i in range(4)]
    assert windows.num_windows == 20
    for index, (source, window) in enumerate(expected):
        assert np.array_equal(windows.window(index), of.streams[source].window(window))
    parts = [one.num_bytes(count) for one, count in zip(of.streams, (10, 6, 4), strict=True)]
    assert windows.num_bytes(20) == sum(parts)
    assert windows.num_bytes(13) == parts[0] + of.streams[1].num_bytes(3)
    everything = MixedWindows(of.streams, of.weights, 10**9)  # as many as the shortest for its weight allows
    assert everything.num_windows == of.streams[0].num_windows * 2


@pytest.fixture
def mix(tmp_path: Path) -> Callable[..., TrainConfig]:
    mixture(tmp_path)

    def make(*overrides: str) -> TrainConfig:
        sources = [f"data.sources.{name}.path={tmp_path / name}" for name in ("one", "two")]
        path = tmp_path  # not read
        return load_config(tiny_overrides(path, tmp_path / "run", "data=mix", *sources, *overrides))

    return make


def test_a_run_over_a_mixture_goes_on_exactly(
    mix: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_run import raise_signal_at

    train_here(mix(f"run.dir={tmp_path / 'alone'}"))
    with monkeypatch.context() as patch:
        raise_signal_at(patch, 2, 15)
        assert train_here(mix()) is ExitCode.STOPPED
    for weight in ("data.sources.one.weight=2", f"data.sources.three.path={tmp_path / 'three'}"):
        with pytest.raises(UserError, match="was trained on other tokens than"):
            train_here(mix(weight))
    assert train_here(mix()) is ExitCode.FINISHED
    assert compare_runs(tmp_path / "alone", tmp_path / "run") == []


def test_mixtures_that_cannot_be_opened(mix: Callable[..., TrainConfig], tmp_path: Path) -> None:
    def complaint(config: TrainConfig) -> str:
        with pytest.raises(UserError) as caught:
            train_here(config)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "data.sources.x.path=nowhere: no such directory" in complaint(mix("data.sources.x.path=nowhere"))
    assert "no token shards in" in complaint(mix(f"data.sources.two.shards={tmp_path / 'none'}"))
    train_bpe(["a b c"], 257, tmp_path / "bpe", progress=False)
    shards = f"data.sources.two.shards={tmp_path / 'two' / 'shards' / 'bytes'}"
    other = mix(f"data.tokenizer={tmp_path / 'bpe'}", f"data.sources.one.shards={tmp_path}/one/shards/bytes", shards)
    assert "did not make the shards in" in complaint(other)
    none = load_config(tiny_overrides(tmp_path, tmp_path / "run", "data=mix"))
    assert "data=mix has no sources: data.sources='{a: {path: DIR, weight: 2}, ...}'" in complaint(none)


def test_positions_count_from_the_start_of_each_document() -> None:
    tokens = torch.tensor([[5, 9, 7, 9, 9, 4, 3], [1, 2, 3, 4, 5, 6, 7], [9, 1, 9, 2, 9, 3, 9]])
    expected = [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 1, 0, 1]]
    assert document_positions(tokens, 9).tolist() == expected


def test_documents_are_kept_apart_if_asked(tiny: Callable[..., TrainConfig]) -> None:
    """The same tokens; other losses; a run does not change its mind."""
    losses = {}
    for mask in ("false", "true"):
        config = tiny(f"data.document_mask={mask}", f"run.dir={tiny().run.dir}-{mask}")
        assert train_here(config) is ExitCode.FINISHED
        rows = read_metrics(Path(config.run.dir) / "metrics.jsonl", "train")
        losses[mask] = [row["loss"] for row in rows.values()]
    assert losses["true"] != losses["false"]
    assert losses["true"] == pytest.approx(losses["false"], abs=0.5)
    with pytest.raises(UserError, match=r"data\.document_mask=True, not False"):
        train_here(tiny("data.document_mask=false", f"run.dir={tiny().run.dir}-true"))
