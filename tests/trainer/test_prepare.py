"""Text to shards: exact, resumable, and clear about text it cannot use."""

from __future__ import annotations

import ast
import errno
import gzip
import io
import json
import re
import resource
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import make_texts, write_corpus
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data.batches import permute
from narrowgauge.trainer.data.config import DataConfig
from narrowgauge.trainer.data.corpus import BadRows, RowLimits, corpus_files, write_sample
from narrowgauge.trainer.data.open import open_windows
from narrowgauge.trainer.data.prepare import prepare
from narrowgauge.trainer.data.shards import TokenShards
from narrowgauge.trainer.data.stream import StreamSource, TextStream
from narrowgauge.trainer.data.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    load_tokenizer,
    save_for_transformers,
    train_bpe,
)
from narrowgauge.trainer.errors import UserError
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import import_protobuf

ROOT = Path(__file__).parents[2]


def data(path: Path, *overrides: str) -> DataConfig:
    return load_config([f"data.path={path}", *overrides]).data


def small(path: Path) -> Path:
    return write_corpus(path, {"train": [make_texts(30, 1), make_texts(30, 2)], "validation": [make_texts(9, 3)]})


def test_shards_hold_every_document_and_its_end(tmp_path: Path) -> None:
    texts = [["héllo\n", "", "東京 <|endoftext|> x"], ["two"]]
    corpus = write_corpus(tmp_path, {"train": texts, "validation": [["v"]]})
    manifest = prepare(data(corpus, "data.vocab_size=300"))
    tokenizer = load_tokenizer(str(corpus / "tokenizer"))
    first, second = manifest["splits"]["train"]
    assert (first["documents"], first["empty_documents"], second["documents"]) == (2, 1, 1)
    tokens = np.fromfile(corpus / "shards" / "tokenizer" / first["file"], "<u2").tolist()
    # A document that spells the end of text does not end there.
    assert tokens.count(tokenizer.eot) == 2
    ends = np.load(corpus / "shards" / "tokenizer" / first["documents_file"])
    assert ends[:, 1].tolist() == [len(texts[0][0].encode()), len((texts[0][0] + texts[0][2]).encode())]
    assert tokenizer.decode(tokens[: ends[0, 0] - 1]) == texts[0][0]
    assert tokens[ends[0, 0] - 1] == tokens[ends[1, 0] - 1] == tokenizer.eot


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, workers: int) -> None:
    corpus = small(tmp_path)
    manifest = prepare(data(corpus, "data.tokenizer=bytes"), workers)
    expected = [token for text in make_texts(30, 1) + make_texts(30, 2) for token in [*text.encode(), 256]]
    files = [corpus / "shards" / "bytes" / info["file"] for info in manifest["splits"]["train"]]
    assert np.concatenate([np.fromfile(file, "<u2") for file in files]).tolist() == expected


def test_preparing_again_keeps_what_stands_and_mends_what_does_not(tmp_path: Path) -> None:
    config = data(small(tmp_path), "data.tokenizer=bytes")
    first = prepare(config, 1)
    directory = Path(config.shards_dir)
    stamps = {file: file.stat().st_mtime_ns for file in directory.glob("*.bin")}
    damaged = directory / "train.00001-of-00002.bin"
    damaged.write_bytes(b"xx")
    (directory / "manifest.json").unlink()
    (directory / "validation.00000-of-00001.json").unlink()  # as if killed between the shard and its description
    assert prepare(config, 1) == first
    kept = directory / "train.00000-of-00002.bin"
    assert kept.stat().st_mtime_ns == stamps[kept]
    assert damaged.stat().st_size > 2


def test_a_changed_text_is_tokenized_again_and_another_tokenizers_shards_stay(tmp_path: Path) -> None:
    corpus = small(tmp_path)
    config = data(corpus, f"data.shards={tmp_path / 's'}", "data.tokenizer=bytes")
    before = prepare(config, 1)
    small_change = {"train": [make_texts(30, 1), make_texts(30, 4)], "validation": [make_texts(9, 3)]}
    write_corpus(corpus, small_change)
    after = prepare(config, 1)
    changed = [a != b for a, b in zip(before["splits"]["train"], after["splits"]["train"], strict=True)]
    assert changed == [False, True]
    with pytest.raises(UserError, match=r"holds shards of another tokenizer \(bytes\).*data.shards="):
        prepare(data(corpus, f"data.shards={tmp_path / 's'}", "data.vocab_size=300"), 1)
    assert json.loads((tmp_path / "s" / "manifest.json").read_text()) == after


def test_shards_of_a_tokenizer_that_has_the_same_name_stand_beside(tmp_path: Path) -> None:
    """As those of a mixture, whose tokenizer is another corpus's."""
    corpus, other = small(tmp_path), small(tmp_path / "other")
    own, foreign = (
        data(corpus, f"data.tokenizer={place}/tokenizer", f"data.vocab_size={size}")
        for place, size in ((corpus, 300), (other, 280))
    )
    prepare(data(other, f"data.tokenizer={other}/tokenizer", "data.vocab_size=280"), 1)
    manifests = [prepare(config, 1) for config in (own, foreign)]
    fingerprints = [manifest["tokenizer"]["fingerprint"] for manifest in manifests]
    assert fingerprints[0] != fingerprints[1]
    for config, fingerprint, manifest in zip((own, foreign), fingerprints, manifests, strict=True):
        shards = TokenShards(config, fingerprint)
        assert json.loads((shards.directory / "manifest.json").read_text()) == manifest
        assert prepare(config, 1) == manifest


def first_file(corpus: Path) -> Path:
    return corpus / "en" / "c4-train.00000-of-00002.json.gz"


GOOD = json.dumps({"text": "fine"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(gzip.compress(GOOD * 1000)[:-20], "damaged or truncated gzip after line", id="cut"),
        pytest.param(b"not gzip at all", "damaged or truncated gzip after line 0", id="not gzip"),
        pytest.param(gzip.compress(GOOD + b"{nonsense\n"), "line 2 is not JSON", id="not JSON"),
        pytest.param(gzip.compress(GOOD + b'{"url": "x"}\n'), "line 2 has no string field 'text'", id="no text"),
        pytest.param(gzip.compress(GOOD + b'{"text": 3}\n'), "line 2 has no string field 'text'", id="a number"),
        pytest.param(gzip.compress(GOOD + b"[1]\n"), "line 2 has no string field 'text'", id="a list"),
        pytest.param(gzip.compress(GOOD + b'{"text": "\xff"}\n'), "line 2 is not valid UTF-8", id="not UTF-8"),
        pytest.param(gzip.compress(GOOD + b'{"text": "\\ud800"}\n'), "line 2 is not valid UTF-8", id="half a pair"),
    ],
    ids=["cut short", "plain text", "no JSON", "no text", "a number", "a list", "other bytes", "half a surrogate"],
)
def test_text_that_cannot_be_read_is_named_by_file_and_line(tmp_path: Path, content: bytes, words: str) -> None:
    corpus = small(tmp_path)
    first_file(corpus).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(corpus_files(corpus)["train"][0].texts())
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(first_file(corpus)))
    assert "\n" not in str(caught.value)


def test_no_bytes_at_all_are_a_damaged_file_and_no_rows_a_whole_one(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        corpus = small(tmp_path / split)
        file = next((corpus / "en").glob(f"c4-{split}.00000-*"))
        file.write_bytes(b"")
        with pytest.raises(UserError, match="damaged or truncated gzip after line 0: the file has 0 bytes"):
            prepare(data(corpus, "data.tokenizer=bytes"), 1)
        file.write_bytes(gzip.compress(b""))
        assert prepare(data(corpus, "data.tokenizer=bytes"), 1)["splits"][split][0]["documents"] == 0


def test_lines_of_white_space_are_no_rows_and_are_counted_as_lines(tmp_path: Path) -> None:
    corpus = small(tmp_path)
    first_file(corpus).write_bytes(gzip.compress(b"\n" + GOOD + b" \t\r\n\n" + GOOD + b"\n  "))
    assert list(corpus_files(corpus)["train"][0].texts()) == ["fine", "fine"]
    (info, _) = prepare(data(corpus, "data.vocab_size=300"), 1)["splits"]["train"]  # trains a tokenizer on it as well
    assert (info["documents"], info["empty_documents"], info["bad_rows"]) == (2, 0, 0)
    first_file(corpus).write_bytes(gzip.compress(b"\n\n" + GOOD + b"\n{nonsense"))
    with pytest.raises(UserError, match="line 5 is not JSON"):
        list(corpus_files(corpus)["train"][0].texts())


LONG = json.dumps({"text": "x" * 500}).encode() + b"\n"
BAD_LINES = [
    b"{nonsense\n",
    b"[" * 100_000 + b"\n",
    b'{"url": "x"}\n',
    b'{"text": ["fine"]}\n',
    b'{"text": "\xff"}\n',
    b'{"text": "\\ud800"}\n',
    b'{"text": "fine", "number": ' + b"1" * 5000 + b"}\n",
    b"null\n",
]


def test_as_many_bad_rows_as_are_allowed_are_left_out_and_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = small(tmp_path)
    first_file(corpus).write_bytes(gzip.compress(GOOD + b"".join(BAD_LINES) + b"\n" + GOOD))
    few = data(corpus, "data.tokenizer=bytes", f"data.max_bad_rows={len(BAD_LINES) - 1}")
    with pytest.raises(UserError) as caught:
        prepare(few, 1)
    allowed = f"the file has {len(BAD_LINES) - 1} such rows before it, data.max_bad_rows={len(BAD_LINES) - 1} of a file"
    assert str(caught.value).startswith(f"{first_file(corpus)}: line 9 has no string field 'text' ({allowed}")
    enough = data(corpus, "data.tokenizer=bytes", f"data.max_bad_rows={len(BAD_LINES)}")
    manifest = prepare(enough, 1)
    (first, second) = manifest["splits"]["train"]
    assert [(info["documents"], info["empty_documents"], info["bad_rows"]) for info in (first, second)] == [
        (2, 0, len(BAD_LINES)),
        (30, 0, 0),
    ]
    assert f"{len(BAD_LINES)} bad rows left out, in 1 of 3 files" in capfd.readouterr().out
    assert prepare(enough, 1) == manifest
    assert prepare(data(corpus, "data.tokenizer=bytes", "data.max_bad_rows=99"), 1) == manifest
    with pytest.raises(UserError, match=r"line 2 is not JSON: .* .data.max_bad_rows=0 of a file may be left out"):
        prepare(data(corpus, "data.tokenizer=bytes"), 1)  # what stands has left out more than is allowed now


def test_a_line_that_is_too_long_is_a_bad_row_and_a_shorter_limit_makes_other_shards(tmp_path: Path) -> None:
    corpus = small(tmp_path)
    first_file(corpus).write_bytes(gzip.compress(GOOD + LONG + GOOD))
    size = len(LONG) - 1  # without the line's end

    def documents(*overrides: str) -> int:
        return prepare(data(corpus, "data.tokenizer=bytes", *overrides), 1)["splits"]["train"][0]["documents"]

    assert documents() == documents(f"data.max_line_bytes={size}") == 3
    shorter = f"data.max_line_bytes={size - 1}"
    with pytest.raises(UserError, match=f"line 2 is longer than data.max_line_bytes={size - 1} "):
        documents(shorter)
    assert documents(shorter, "data.max_bad_rows=1") == 2
    assert documents("data.max_bad_rows=1") == 3
    first_file(corpus).write_bytes(gzip.compress(LONG.rstrip()))  # the last one has no end of its own
    assert documents(f"data.max_line_bytes={size}") == 1
    assert documents(shorter, "data.max_bad_rows=1") == 0


def test_a_line_without_an_end_is_never_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    readline = gzip.GzipFile.readline

    def noting(file: gzip.GzipFile, size: int = -1) -> bytes:
        asked.append(size)
        return readline(file, size)

    monkeypatch.setattr(gzip.GzipFile, "readline", noting)
    monkeypatch.setattr("narrowgauge.trainer.data.corpus._PIECE_BYTES", 1000)
    corpus = small(tmp_path)
    first_file(corpus).write_bytes(gzip.compress(b'{"text": "' + b"x" * 100_000 + b'"}\n' + GOOD))
    bad = BadRows(RowLimits(max_line_bytes=900, max_bad_rows=1))
    assert list(corpus_files(corpus)["train"][0].texts(bad=bad)) == ["fine"]
    assert len(asked) > 100
    assert max(asked) == 1000
    assert min(asked) > 0
    asked.clear()
    with pytest.raises(UserError, match=r"line 1 is longer than data.max_line_bytes=900"):
        list(corpus_files(corpus)["train"][0].texts(bad=BadRows(RowLimits(max_line_bytes=900))))
    assert len(asked) == 1  # where none may be left out, the rest is not even read


def test_one_bad_file_loses_nothing_of_the_others(tmp_path: Path) -> None:
    corpus = small(tmp_path)
    good = first_file(corpus).read_bytes()
    bad = corpus / "en" / "c4-train.00001-of-00002.json.gz"
    saved = bad.read_bytes()
    bad.write_bytes(good[:-9])
    config = data(corpus, "data.tokenizer=bytes")
    with pytest.raises(UserError, match="damaged or truncated"):
        prepare(config, 1)
    directory = Path(config.shards_dir)
    stamp = (directory / "train.00000-of-00002.bin").stat().st_mtime_ns
    assert not list(directory.glob("*.incomplete"))
    bad.write_bytes(saved)
    prepare(config, 1)
    assert (directory / "train.00000-of-00002.bin").stat().st_mtime_ns == stamp


def test_directories_that_are_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        corpus_files(tmp_path / "none")
    with pytest.raises(UserError, match=r"no train file named like c4-train\.00000-of-00001\.json\.gz"):
        corpus_files(tmp_path)
    corpus = small(tmp_path / "hole")
    first_file(corpus).unlink()
    with pytest.raises(UserError, match=r"train has 1 of 2 files; missing c4-train\.00000-of-00002"):
        corpus_files(corpus)


def test_the_script_says_so_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "data=c4", f"data.path={tmp_path / 'none'}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: data.path={tmp_path / 'none'}: no such directory")


def test_the_sample_corpus(tmp_path: Path) -> None:
    write_sample(tmp_path)
    files = corpus_files(tmp_path)
    texts = {split: [t for file in group for t in file.texts()] for split, group in files.items()}
    assert {split: len(group) for split, group in files.items()} == {"train": 8, "validation": 1}
    assert not set(texts["train"]) & set(texts["validation"])
    size = {split: sum(len(text.encode()) for text in group) for split, group in texts.items()}
    assert size["train"] > 11_000_000
    assert 0.03 < size["validation"] / size["train"] < 0.1
    with gzip.open(files["train"][0].path) as file:
        assert set(json.loads(file.readline())) == {"text", "timestamp", "url"}
    before = {file.path: file.path.read_bytes() for file in files["train"]}
    write_sample(tmp_path)
    assert before == {path: path.read_bytes() for path in before}


PIECES = [
    *[("<unk>", 2, 0.0), ("<s>", 3, 0.0), ("</s>", 3, 0.0), ("<sep>", 4, 0.0), ("▁ab", 1, -1.0), ("ab", 1, -2.0)],
    *[("▁", 1, -3.0), ("a", 1, -4.0), ("b", 1, -5.0)],
]


def sentencepiece_model(kind: str) -> bytes:
    """A model with these pieces, and 256 of bytes after the sixth, without the package that trains them."""
    proto = import_protobuf().ModelProto()
    byte_pieces = [(f"<0x{byte:02X}>", 6, 0.0) for byte in range(256)]
    for piece, type_, score in [*PIECES[:6], *byte_pieces, *PIECES[6:]]:
        proto.pieces.add(piece=piece, type=type_, score=score)
    proto.trainer_spec.model_type = {"unigram": 1, "bpe": 2}[kind]
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.unk_id = 0
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


class TestTokenizers:
    @pytest.fixture
    def bpe(self, tmp_path: Path) -> Path:
        train_bpe(make_texts(200, 0), 300, tmp_path / "bpe", progress=False)
        return tmp_path / "bpe"

    @pytest.mark.parametrize(
        "text",
        ["", "plain", " two  spaces\n\n", "é 東京 🚂", END_OF_TEXT, "\x00\x7f"],
        ids=["empty", "plain", "spaces", "beyond ASCII", "end of text", "control characters"],
    )
    def test_text_comes_back(self, bpe: Path, text: str) -> None:
        for tokenizer in (ByteTokenizer(), load_tokenizer(str(bpe))):
            tokens = tokenizer.encode_batch([text])[0]
            assert tokenizer.decode(tokens) == text
            assert tokenizer.eot not in tokens
            assert all(0 <= token < tokenizer.vocab_size for token in tokens)

    def test_a_directory_and_its_json_are_one_tokenizer(self, bpe: Path) -> None:
        by_directory, by_file = load_tokenizer(str(bpe)), load_tokenizer(str(bpe / "tokenizer.json"))
        assert by_directory.fingerprint == by_file.fingerprint
        assert by_directory.vocab_size == 300

    def test_transformers_reads_what_we_train(self, bpe: Path) -> None:
        theirs = transformers.AutoTokenizer.from_pretrained(bpe)
        text = "the narrow gauge é 東"
        assert theirs(text)["input_ids"] == load_tokenizer(str(bpe)).encode_batch([text])[0]
        assert theirs.eos_token == END_OF_TEXT

    def test_a_long_text_is_cut_where_its_tokens_stay_the_same(
        self, bpe: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = (
            "  two  spaces\n\nand 東京 é don't a\u3000b\tc " + " ".join(make_texts(40, 7)) + END_OF_TEXT + " the hill"
        )
        whole = load_tokenizer(str(bpe)).encode_batch([text, "short", ""])
        for length in (1, 2, 7, 100):
            monkeypatch.setattr("narrowgauge.trainer.data.tokenizer._LONG_CHARACTERS", length)
            assert load_tokenizer(str(bpe)).encode_batch([text, "short", ""]) == whole

    @pytest.mark.parametrize(("kind", "size"), [("bytes", 50_000_000), ("bpe", 2_500_000)])
    def test_a_document_of_50_megabytes(self, tmp_path: Path, bpe: Path, kind: str, size: int) -> None:
        long = ((" ".join(make_texts(300, 5)) + "\n") * 1600).encode()[:size].decode(errors="ignore")
        corpus = write_corpus(tmp_path / "c", {"train": [[]], "validation": [["v"]]})
        lines = b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in ("a", long, "b"))
        (corpus / "en" / "c4-train.00000-of-00001.json.gz").write_bytes(gzip.compress(lines, 1))
        tokenizer = load_tokenizer("bytes" if kind == "bytes" else str(bpe))
        config = data(corpus, f"data.tokenizer={kind if kind == 'bytes' else bpe}")
        (info,) = prepare(config, 1)["splits"]["train"]
        tokens = np.fromfile(Path(config.shards_dir) / info["file"], "<u2")
        ends = np.flatnonzero(tokens == tokenizer.eot)
        assert len(ends) == 3
        part = tokens[ends[0] + 1 : ends[1]]
        assert len(part) == len(long.encode()) if kind == "bytes" else tokenizer.decode(part.tolist()) == long
        of = TextStream(corpus_files(corpus)["train"], tokenizer, len(part) // 3, 1, 1024)
        source = StreamSource(of, seed=0, global_batch=1, micro_batch=1, rank=0, world_size=1)
        given = source.batch(0, 0).tokens[0].numpy()
        place = permute(np.arange(3), 3, "0:0:0:0").tolist().index(1)  # of the long row
        before = 2 * place  # each of the others is one letter and its end
        assert np.array_equal(given[before:], part[: len(given) - before])

    def test_another_end_of_text_is_another_fingerprint(self, bpe: Path) -> None:
        assert load_tokenizer(str(bpe), "a").fingerprint != load_tokenizer(str(bpe)).fingerprint

    def test_tokenizers_that_cannot_be_used(self, bpe: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such file or directory"):
            load_tokenizer(str(tmp_path / "none"))
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match="not a tokenizer that can be read"):
            load_tokenizer(str(tmp_path / "tokenizer.json"))
        with pytest.raises(UserError, match="no end-of-text token '<none>'"):
            load_tokenizer(str(bpe), "<none>")

    @pytest.mark.parametrize("config", ["tokenizer_config.json", "config.json"])
    def test_a_tokenizer_that_is_a_program_is_refused_and_never_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
    ) -> None:
        directory, marker = tmp_path / "program", tmp_path / "marker"
        directory.mkdir()
        reference = {"AutoTokenizer": ["own.Own", None], "AutoConfig": "own.Own"}
        (directory / config).write_text(json.dumps({"auto_map": reference, "tokenizer_class": "Own"}))
        (directory / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
        monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 9))
        with pytest.raises(UserError, match=f"Python of its own .auto_map in {config}., which is never run") as caught:
            load_tokenizer(str(directory))
        assert "\n" not in str(caught.value)
        assert sys.stdin.tell() == 0  # nothing was asked
        assert not marker.exists()
        # With a tokenizer.json beside it there is nothing to run.
        train_bpe(["a b c"], 257, tmp_path / "bpe", progress=False)
        (tmp_path / "bpe" / "tokenizer.json").rename(directory / "tokenizer.json")
        assert load_tokenizer(str(directory)).vocab_size == 257
        assert not marker.exists()

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("tokenizer_config.json", b'{"tokenizer_class": "ByT5Tokenizer"}'),
            ("tokenizer_config.json", b'{"tokenizer_class": ["a"]}'),
            ("tokenizer.model", b"\0nonsense"),
            ("vocab.pkl", b"cos\nsystem\n"),
            ("tekken.json", b"{}"),
            ("README.md", b""),
        ],
        ids=["no fast one", "a class that is a list", "sentencepiece", "pickle", "tekken", "nothing"],
    )
    def test_other_tokenizers_are_one_line(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes
    ) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not a tokenizer that can be read") as caught:
            load_tokenizer(str(tmp_path))
        assert "\n" not in str(caught.value)
        assert capfd.readouterr() == ("", "")

    NOT_OBJECTS = {
        "list": b"[]",
        "number": b"7",
        "null": b"null",
        "not JSON": b"{",
        "other bytes": b"\xff",
        "deep": b"[" * 100_000,
        "deep inside": b'{"eos_token": ' + b"[" * 100_000,
    }

    @pytest.mark.parametrize("kind", NOT_OBJECTS)
    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    def test_settings_that_are_none_are_one_line(self, bpe: Path, name: str, kind: str) -> None:
        (bpe / name).write_bytes(self.NOT_OBJECTS[kind])
        words = "not a tokenizer that can be read" if name == "tokenizer.json" else f"{bpe / name} cannot be read: "
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            load_tokenizer(str(bpe))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "token",
        [["a"], 3, {"content": 5}, {"content": ["a"]}, None],
        ids=["list", "number", "number inside", "list inside", "null"],
    )
    def test_an_end_of_text_that_is_no_text_is_looked_for_elsewhere(self, bpe: Path, token: object) -> None:
        (bpe / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        assert load_tokenizer(str(bpe)).eot == 0

    def test_a_vocabulary_that_lacks_the_text_is_one_line(self, tmp_path: Path) -> None:
        model = {"type": "WordLevel", "vocab": {"a": 0, END_OF_TEXT: 1}, "unk_token": "?"}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
        with pytest.raises(UserError, match=r"data.tokenizer cannot tokenize the text: "):
            load_tokenizer(str(tmp_path)).encode_batch(["b"])

    def test_dropout_is_switched_off_and_said_once(self, bpe: Path, capfd: pytest.CaptureFixture[str]) -> None:
        plain = load_tokenizer(str(bpe))
        tree = json.loads((bpe / "tokenizer.json").read_text())
        tree["model"]["dropout"] = 0.5
        (bpe / "tokenizer.json").write_text(json.dumps(tree))
        texts = make_texts(30, 3)
        for _ in range(2):
            assert load_tokenizer(str(bpe)).encode_batch(texts) == plain.encode_batch(texts)
        assert load_tokenizer(str(bpe)).fingerprint == plain.fingerprint
        assert capfd.readouterr().err.count("dropout=0.5, which is switched off") == 1
        save_for_transformers(str(bpe), None, bpe.parent / "saved")
        assert json.loads((bpe.parent / "saved" / "tokenizer.json").read_text())["model"]["dropout"] is None

    @pytest.mark.parametrize("name", [".", "vocab.json", "merges.txt"])
    @pytest.mark.parametrize("configured", [False, True], ids=["files alone", "configured"])
    def test_a_vocabulary_and_its_merges(self, bpe: Path, tmp_path: Path, name: str, configured: bool) -> None:
        whole, pair = load_tokenizer(str(bpe)), tmp_path / "pair"
        pair.mkdir()
        Tokenizer.from_file(str(bpe / "tokenizer.json")).model.save(str(pair))
        text = ["the narrow gauge é 東  \n\n don't " + END_OF_TEXT, ""]
        # The oracle needs to be told the class; what is read here does not.
        theirs = shutil.copytree(pair, tmp_path / "theirs")
        (theirs / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
        oracle = transformers.AutoTokenizer.from_pretrained(theirs)
        tokenizer = load_tokenizer(str((theirs if configured else pair) / name))
        assert tokenizer.encode_batch(text) == whole.encode_batch(text)
        assert tokenizer.encode_batch(text[:1])[0][:-1] != oracle(text[0], add_special_tokens=False)["input_ids"]
        text[0] = text[0].removesuffix(END_OF_TEXT)
        assert tokenizer.encode_batch(text) == oracle(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.eot == whole.eot == oracle.eos_token_id

    def test_a_tokenizer_of_the_hub(self, bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As its library has kept it: nothing is asked of the hub."""
        revision = "0123456789abcdef0123456789abcdef01234567"
        kept = tmp_path / "hub" / "models--owner--name-1.5b"
        shutil.copytree(bpe, kept / "snapshots" / revision)
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text(revision)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)
        for name in ("owner/name-1.5b", f"owner/name-1.5b@{revision}"):
            assert load_tokenizer(name).fingerprint == load_tokenizer(str(bpe)).fingerprint
        config = data(small(tmp_path / "c"), "data.tokenizer=owner/name-1.5b")
        assert prepare(config, 1)["tokenizer"]["vocab_size"] == 300
        assert (tmp_path / "c" / "shards" / "name-1.5b" / "manifest.json").is_file()
        assert open_windows(config, load_tokenizer(config.tokenizer), "validation", 0).num_windows > 0
        with pytest.raises(
            UserError, match="no such file or directory here, and not to be had from the hub: "
        ) as caught:
            load_tokenizer("owner/another")
        assert "\n" not in str(caught.value)
        # What is here comes first, and what looks like a place here is none of the hub.
        train_bpe(["a b"], 257, Path("owner/name-1.5b"), progress=False)
        assert load_tokenizer("owner/name-1.5b").vocab_size == 257
        for name in ("owner/another", "./name", "../name", "a/b/c", "name/tokenizer.json", "owner/x.model", "/name"):
            with pytest.raises(UserError, match=r"no such file or directory .scripts/train_tokenizer.py makes one"):
                load_tokenizer(name)

    @pytest.mark.parametrize("kind", ["unigram", "bpe"])
    @pytest.mark.parametrize("named", ["file", "directory"])
    def test_a_sentencepiece_model(self, tmp_path: Path, kind: str, named: str) -> None:
        directory = tmp_path / "spm"
        directory.mkdir()
        file = directory / "tokenizer.model"
        file.write_bytes(sentencepiece_model(kind))
        tokenizer = load_tokenizer(str(file if named == "file" else directory))
        assert tokenizer.vocab_size == 256 + len(PIECES)
        assert tokenizer.eot == 2

        def pieces(text: str) -> list[str]:
            return [name_of(token) for token in tokenizer.encode_batch([text])[0]]

        def name_of(token: int) -> str:
            return PIECES[token][0] if token < 6 else f"<{token - 6}>" if token < 262 else PIECES[token - 256][0]

        assert pieces("abab b") == ["▁ab", "ab", "▁", "b"]
        assert pieces("") == []
        assert pieces("b<sep>é") == ["▁", "b", "<sep>", "<195>", "<169>"]
        assert tokenizer.decode(tokenizer.encode_batch(["abab  bé\n"])[0]) == "abab  bé\n"

    @pytest.mark.parametrize("kind", ["unigram", "bpe"])
    def test_sentencepiece_itself_gives_the_same_tokens(self, tmp_path: Path, kind: str) -> None:
        spm = pytest.importorskip("sentencepiece")
        file = tmp_path / "x.model"
        file.write_bytes(sentencepiece_model(kind))
        tokenizer = load_tokenizer(str(file))
        oracle = spm.SentencePieceProcessor(model_file=str(file))
        for text in ["abab b", "", " ab", "b  a ", "b<sep>ab<sep><sep> a", "<sep>ab", "東\tab\n\n", "ab" * 50]:
            assert tokenizer.encode_batch([text])[0] == oracle.encode(text)

    def test_a_sentencepiece_model_with_a_class_is_read_as_transformers_reads_it(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe"))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        if find_spec("sentencepiece") is None:
            with pytest.raises(UserError, match=r"not a tokenizer that can be read: .*.pip install sentencepiece"):
                load_tokenizer(str(tmp_path))
            return
        oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
        texts = ["abab b", " ab", "b  a ", "東\tab\n\n"]
        assert load_tokenizer(str(tmp_path)).encode_batch(texts) == oracle(texts, add_special_tokens=False)["input_ids"]

    def test_ranks_of_tiktoken_are_one_line(self, tmp_path: Path) -> None:
        for name in ("tokenizer.model", "x.tiktoken"):
            (tmp_path / name).write_bytes(b"IQ== 0\nIg== 1\n")
            with pytest.raises(UserError, match=r"tiktoken's ranks.* name the tokenizer.json of the same model"):
                load_tokenizer(str(tmp_path / name))

    def test_a_disk_that_is_full_while_it_is_written_leaves_none(self, tmp_path: Path) -> None:
        corpus = small(tmp_path)
        config = data(corpus, "data.vocab_size=400")
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))  # to every file, as a disk would to all
        try:
            with pytest.raises(UserError, match="tokenizer: the tokenizer cannot be written: ") as caught:
                prepare(config, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert "\n" not in str(caught.value)
        assert [file.name for file in corpus.iterdir()] == ["en"]
        assert prepare(config, 1)["tokenizer"]["vocab_size"] > 257

    def test_half_a_tokenizer_and_a_strange_one_stay_as_they_are(self, bpe: Path, tmp_path: Path) -> None:
        half = (bpe / "tokenizer.json").read_bytes()[:2000]
        (bpe / "tokenizer.json").write_bytes(half)
        corpus = small(tmp_path / "c")
        with pytest.raises(UserError, match="not a tokenizer that can be read"):
            prepare(data(corpus, f"data.tokenizer={bpe}"), 1)
        strange = corpus / "tokenizer"
        strange.mkdir()
        (strange / "tokenizer.json").write_text('{"version": "9"}')
        with pytest.raises(UserError, match="not a tokenizer that can be read"):
            prepare(data(corpus), 1)
        (strange / "tokenizer.json").rename(strange / "vocab.json")
        with pytest.raises(UserError, match="not a tokenizer that can be read"):
            prepare(data(corpus), 1)
        assert (bpe / "tokenizer.json").read_bytes() == half
        assert (strange / "vocab.json").read_text() == '{"version": "9"}'

    def test_one_that_is_trained_again_is_replaced_when_whole(self, bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = {file.name: file.read_bytes() for file in bpe.iterdir()}
        (bpe / "notes.txt").write_text("mine")

        def fail(self: object, directory: Path) -> None:
            (directory / "tokenizer.json").write_text("{")
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
            with pytest.raises(UserError, match="cannot be written: "):
                train_bpe(["other text"], 260, bpe, progress=False)
        (bpe / "notes.txt").unlink()
        assert {file.name: file.read_bytes() for file in bpe.iterdir()} == before
        train_bpe(["other text"], 260, bpe, progress=False)
        assert load_tokenizer(str(bpe)).vocab_size == 260
        assert {file.name for file in bpe.iterdir()} == set(before)

    def test_only_the_corpus_own_tokenizer_is_trained_when_missing(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="only a tokenizer inside"):
            prepare(data(small(tmp_path / "c"), f"data.tokenizer={tmp_path / 'elsewhere'}"), 1)


def test_a_disk_that_is_full_while_a_shard_is_written_is_one_line(tmp_path: Path) -> None:
    config = data(small(tmp_path), "data.tokenizer=bytes")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))
    try:
        with pytest.raises(UserError, match=r"the shard train.00000-of-00002 cannot be written: ") as caught:
            prepare(config, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(caught.value)
    assert not list(Path(config.shards_dir).iterdir())
    assert prepare(config, 1)["splits"]["train"][0]["documents"] == 30


@pytest.mark.parametrize("what", ["shards", "tokenizer", "manifest"])
def test_a_corpus_that_cannot_be_written_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    corpus = small(tmp_path / "c")
    config = data(corpus, "data.vocab_size=300" if what == "tokenizer" else "data.tokenizer=bytes")
    if what == "manifest":

        def full(path: Path, value: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr("narrowgauge.trainer.data.prepare.write_json", full)
    else:

        def read_only(*arguments: object, dir: Path, **options: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system", str(dir))

        monkeypatch.setattr("narrowgauge.trainer.data.prepare.tempfile.TemporaryFile", read_only)
    with pytest.raises(UserError, match=r"cannot be written: .*; data.out=DIR puts tokenizer and shards elsewhere"):
        prepare(config, 1)
    monkeypatch.undo()
    elsewhere = data(corpus, *(["data.vocab_size=300"] if what == "tokenizer" else ["data.tokenizer=bytes"]))
    before = sorted(corpus.rglob("*"))
    elsewhere = load_config(
        [f"data.path={corpus}", f"data.out={tmp_path / 'out'}", f"data.tokenizer={elsewhere.tokenizer}"]
        if what != "tokenizer"
        else [f"data.path={corpus}", f"data.out={tmp_path / 'out'}", "data.vocab_size=300"]
    ).data
    assert prepare(elsewhere, 1)["splits"]["train"][0]["documents"] == 30
    assert sorted(corpus.rglob("*")) == before
    assert (Path(elsewhere.shards_dir) / "manifest.json").is_relative_to(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").exists() == (what == "tokenizer")


def test_a_file_where_the_shards_should_be_is_one_line(tmp_path: Path) -> None:
    corpus = small(tmp_path / "c")
    (corpus / "shards").write_text("mine")
    with pytest.raises(UserError, match=r"^data.shards=.*: cannot be written: .*; data.out=DIR puts"):
        prepare(data(corpus, "data.tokenizer=bytes"), 1)
    assert (corpus / "shards").read_text() == "mine"


def test_a_finished_corpus_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data(small(tmp_path), "data.vocab_size=300")
    manifest = prepare(config, 1)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("narrowgauge.trainer.data.prepare.tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("narrowgauge.trainer.data.prepare.write_json", refuse)
    assert prepare(config, 1) == manifest


def test_nothing_asks_whether_it_may_run_what_it_loads() -> None:
    """`transformers` asks on standard input where `trust_remote_code` is left out, and then runs what it found."""
    calls = []
    for file in [*ROOT.glob("src/**/*.py"), *ROOT.glob("scripts/**/*.py")]:
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                calls.append((file.name, given.get("trust_remote_code")))
    assert calls
    assert [name for name, value in calls if value != "False"] == []
