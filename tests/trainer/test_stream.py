"""Batches straight from text: the same at every world size, resumed exactly, and stopped on all ranks alike."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import launch, make_texts, tiny_overrides, train_here, write_corpus
from mirror import serving
from narrowgauge.trainer import distributed
from narrowgauge.trainer.checkpoint import list_checkpoints, read_tensors
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data import remote
from narrowgauge.trainer.data.batches import TokenStream
from narrowgauge.trainer.data.corpus import CorpusFile, RowLimits, corpus_files
from narrowgauge.trainer.data.stream import StreamSource, TextStream, read_head
from narrowgauge.trainer.data.tokenizer import ByteTokenizer, TextTokenizer, load_tokenizer, train_bpe
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.tools.evaluation import evaluate_on, open_run
from torch import Tensor
from whole_runs import compare_runs

FILES = 5
STRICT = RowLimits()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training files, in one of which some documents are empty."""
    files = [make_texts(30, seed) for seed in range(FILES)]
    files[2][5] = files[2][29] = ""
    return write_corpus(tmp_path_factory.mktemp("texts"), {"train": files, "validation": [make_texts(12, 9)]})


def stream(
    path: Path, *, tokenizer: TextTokenizer | None = None, lanes: int = 64, rows: int = 8, limits: RowLimits = STRICT
) -> TextStream:
    return TextStream(corpus_files(path)["train"], tokenizer or ByteTokenizer(), 32, lanes, rows, limits)


def source(
    of: TextStream, rank: int = 0, world: int = 1, micro: int = 1, seed: int = 0, batch: int = 12
) -> StreamSource:
    return StreamSource(of, seed=seed, global_batch=batch, micro_batch=micro, rank=rank, world_size=world)


def step_of(one: StreamSource, step: int) -> Tensor:
    return torch.cat([one.batch(step, micro).tokens for micro in range(one.num_micro)])


def steps_of(one: StreamSource, first: int, last: int) -> Tensor:
    return torch.stack([step_of(one, step) for step in range(first, last)])


@pytest.mark.parametrize(("batch", "files", "cap", "expected"), [
    (12, 5, 64, 4), (12, 12, 64, 12), (12, 5, 3, 3), (7, 5, 64, 1), (256, 1024, 64, 64), (1, 3, 64, 1),
])  # fmt: skip
def test_lanes_follow_from_the_batch_and_the_files(batch: int, files: int, cap: int, expected: int) -> None:
    assert TextStream([None] * files, ByteTokenizer(), 32, cap, 8).num_lanes(batch) == expected  # type: ignore[list-item]


@pytest.mark.parametrize("lanes", [64, 3, 1])
@pytest.mark.parametrize(("world", "micro"), [(1, 12), (2, 3), (3, 2), (4, 1), (12, 1)])
def test_batches_are_the_same_however_they_are_dealt(texts: Path, lanes: int, world: int, micro: int) -> None:
    of = stream(texts, lanes=lanes)
    whole = steps_of(source(of), 0, 5)
    ranks = [source(of, rank, world, micro) for rank in range(world)]
    assert torch.equal(torch.cat([steps_of(one, 0, 5) for one in ranks], dim=1), whole)
    assert [one.batch(4, 0).first_sample for one in ranks] == [48 + rank * 12 // world for rank in range(world)]
    # Each lane's position is given by one rank, so that their sum is that of one process.
    assert torch.equal(sum(one.position for one in ranks), positions_after(of, 5))


def positions_after(of: TextStream, steps: int) -> Tensor:
    one = source(of)
    steps_of(one, 0, steps)
    return one.position.clone()


def test_ranks_that_divide_the_lanes_open_no_others_files(texts: Path) -> None:
    of = stream(texts)
    assert [list(source(of, rank, 2).lane_numbers) for rank in range(2)] == [[0, 1], [2, 3]]
    assert of.sharing(12, 2) is of.sharing(12, 4) is None
    assert [list(source(of, rank, 3).lane_numbers) for rank in range(3)] == [[0, 1], [1, 2], [2, 3]]
    assert "3 processes share 4 lanes" in str(of.sharing(12, 3))
    assert "2 processes or data.lanes=3 would avoid that" in str(of.sharing(12, 3))
    assert stream(texts, lanes=3).sharing(12, 3) is None
    assert "4 processes or 12 files would avoid that" in str(of.sharing(12, 12))
    assert "3 processes or 4 files and data.lanes=4 would" in str(stream(texts, lanes=3).sharing(12, 4))


def test_an_epoch_reads_every_document_once(texts: Path) -> None:
    of = stream(texts, lanes=1)
    documents = [text for file in of.files for text in file.texts() if text]
    total = sum(len(text.encode()) + 1 for text in documents)
    one = source(of, batch=1)
    steps = total // 32
    tokens = [*steps_of(one, 0, steps)[:, 0, :-1].flatten().tolist()]
    *whole, last = bytes_split(tokens)
    assert one.position[0, 0] == 0  # still the first epoch
    assert len(whole) == len(set(whole)) or len(documents) > len(set(documents))
    missing = list(documents)
    for text in whole:
        missing.remove(text)
    assert sum(len(text.encode()) + 1 for text in missing) - len(last.encode()) == total - steps * 32
    order = [documents.index(text) for text in whole]
    assert order != sorted(order)
    steps_of(one, steps, steps + 3)
    assert one.position[0].tolist()[0] == 1


def bytes_split(tokens: list[int]) -> list[str]:
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == 256:
            parts.append([])
        else:
            parts[-1].append(token)
    return [bytes(part).decode(errors="ignore") for part in parts]


def test_neighbouring_windows_share_one_token(texts: Path) -> None:
    tokens = steps_of(source(stream(texts, lanes=1), batch=3), 0, 4).flatten(0, 1)
    assert torch.equal(tokens[:-1, -1], tokens[1:, 0])


def test_order_depends_on_seed_epoch_and_block(texts: Path) -> None:
    of = stream(texts)
    assert not torch.equal(steps_of(source(of), 0, 2), steps_of(source(of, seed=1), 0, 2))
    assert not torch.equal(steps_of(source(of), 0, 2), steps_of(source(stream(texts, rows=30)), 0, 2))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("stop", [1, 7, 40])
def test_going_on_gives_the_batches_of_a_run_left_alone(texts: Path, tmp_path: Path, kind: str, stop: int) -> None:
    if kind == "bpe":
        train_bpe(make_texts(100, 0), 300, tmp_path / "bpe", progress=False)
    of = stream(texts, tokenizer=ByteTokenizer() if kind == "bytes" else load_tokenizer(str(tmp_path / "bpe")))
    alone = steps_of(source(of), 0, stop + 6)
    saved = positions_after(of, stop)
    for world in (1, 3, 4):
        ranks = [source(of, rank, world) for rank in range(world)]
        for one in ranks:
            one.position.copy_(saved)
        assert torch.equal(torch.cat([steps_of(one, stop, stop + 6) for one in ranks], dim=1), alone[stop:])


def test_a_step_can_be_asked_for_twice_and_none_left_out(texts: Path) -> None:
    one = source(stream(texts))
    assert torch.equal(step_of(one, 0), step_of(one, 0))
    with pytest.raises(AssertionError, match="gives step 1 next, not 5"):
        step_of(one, 5)
    with pytest.raises(AssertionError, match="stands at step 0, not 3"):
        step_of(source(stream(texts)), 3)


def test_validation_is_the_beginning_with_its_bytes(texts: Path) -> None:
    files = corpus_files(texts)["validation"]
    tokens, ends = read_head(files, ByteTokenizer(), 200)
    everything, all_ends = read_head(files, ByteTokenizer(), None)
    windows = TokenStream([tokens], [ends], 32, "t")
    assert np.array_equal(tokens, everything[: len(tokens)])
    assert 200 <= len(tokens) < len(everything)
    assert np.array_equal(windows.window(3), everything[96:129])
    for count in (1, 4, windows.num_windows):
        assert abs(windows.num_bytes(count) - int((tokens[: count * 32 + 1] < 256).sum())) <= 1.0
    assert TokenStream([everything], [all_ends], len(everything) - 1, "t").num_bytes(1) == (everything < 256).sum()


BAD = [
    pytest.param(gzip.compress(b'{"text": "fine"}\n' * 9)[:-20], "damaged or truncated gzip after line", id="cut"),
    pytest.param(gzip.compress(b'{"text": "fine"}\n{nonsense\n'), "line 2 is not JSON", id="not JSON"),
    pytest.param(gzip.compress(b'{"text": "fine"}\n{"text": "\xff"}\n'), "line 2 is not valid UTF-8", id="not UTF-8"),
    pytest.param(gzip.compress(b'{"text": ""}\n'), "no text in 1 files that are read in turn", id="an empty text"),
    pytest.param(gzip.compress(b""), "no text in 1 files that are read in turn", id="nothing"),
    pytest.param(b"", "damaged or truncated gzip after line 0: the file has 0 bytes", id="no bytes"),
]


@pytest.mark.parametrize(
    ("content", "words"), BAD, ids=["cut short", "no JSON", "other bytes", "empty text", "empty", "no bytes"]
)
def test_text_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = write_corpus(tmp_path, {"train": [["a"]], "validation": [["b"]]})
    file = corpus_files(path)["train"][0].path
    assert isinstance(file, Path)
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        steps_of(source(stream(path)), 0, 2)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_document_larger_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowgauge.trainer.data.stream._BLOCK_BYTES", 1000)
    long = " ".join(make_texts(30, 5))
    path = write_corpus(tmp_path, {"train": [["a", long, "b", *make_texts(20, 1)]], "validation": [["b"]]})
    train_bpe(make_texts(100, 0), 300, tmp_path / "bpe", progress=False)
    tokenizer = load_tokenizer(str(tmp_path / "bpe"))
    of = stream(path, tokenizer=tokenizer)
    alone = steps_of(source(of, batch=2), 0, 60)
    ids = tokenizer.encode_batch([long])[0]
    given = alone[:, :, :-1].flatten().tolist()
    assert str(ids)[1:-1] in str(given)  # whole, and as tokenized at once
    one = source(of, batch=2)
    one.position.copy_(positions_after_batch(of, 20, 2))
    assert torch.equal(steps_of(one, 20, 60), alone[20:])


def positions_after_batch(of: TextStream, steps: int, batch: int) -> Tensor:
    one = source(of, batch=batch)
    steps_of(one, 0, steps)
    return one.position.clone()


def rewrite(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Change the lines of every training file."""
    for file in (path / "en").glob("c4-train*"):
        lines = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
        file.write_bytes(gzip.compress(b"".join(change(lines))))


def test_lines_of_white_space_change_no_batch(texts: Path, tmp_path: Path) -> None:
    path = write_corpus(tmp_path, {"train": [make_texts(30, seed) for seed in range(3)], "validation": [["v"]]})
    plain = steps_of(source(stream(path)), 0, 20)
    rewrite(path, lambda lines: [b"\n", *[part for line in lines for part in (line, b" \t\r\n")], b"\n", b"  "])
    assert torch.equal(steps_of(source(stream(path)), 0, 20), plain)


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """Three files of 30 rows, of which the same four are bad: two kinds, one of them too long for 2,000 bytes."""
    path = write_corpus(tmp_path / "s", {"train": [make_texts(30, seed) for seed in range(3)], "validation": [["v"]]})

    def spoil(lines: list[bytes]) -> list[bytes]:
        for place in (2, 11, 25):
            lines[place] = b"{nonsense\n"
        lines[17] = json.dumps({"text": "x" * 3000}).encode() + b"\n"
        return lines

    rewrite(path, spoil)
    return path


LENIENT = RowLimits(max_line_bytes=2000, max_bad_rows=4)


def test_bad_rows_are_left_out_alike_at_every_number_of_processes_and_on_resume(spoiled: Path) -> None:
    of = stream(spoiled, limits=LENIENT)
    alone = steps_of(source(of), 0, 30)
    assert not (alone == ord("x")).flatten(0, 1).all(-1).any()
    for stop in (1, 9, 20):
        saved = positions_after(of, stop)
        for world in (1, 4):
            ranks = [source(of, rank, world) for rank in range(world)]
            for one in ranks:
                one.position.copy_(saved)
            assert torch.equal(torch.cat([steps_of(one, stop, 30) for one in ranks], dim=1), alone[stop:])


def test_a_higher_limit_goes_on_where_a_lower_one_stopped(spoiled: Path) -> None:
    alone = steps_of(source(stream(spoiled, limits=LENIENT)), 0, 30)
    strict = source(stream(spoiled, limits=RowLimits(max_line_bytes=2000, max_bad_rows=2)))
    steps, position = 0, strict.position.clone()
    with pytest.raises(UserError) as caught:  # noqa: PT012
        while True:
            step_of(strict, steps)
            steps, position = steps + 1, strict.position.clone()
    assert "the file has 2 such rows before it, data.max_bad_rows=2 of a file may be left out" in str(caught.value)
    assert 0 < steps < 30
    again = source(stream(spoiled, limits=LENIENT))
    again.position.copy_(position)
    assert torch.equal(steps_of(again, steps, 30), alone[steps:])
    # Rows that the first part has read count in the second one too.
    lower = source(stream(spoiled, limits=RowLimits(max_line_bytes=2000, max_bad_rows=1)))
    lower.position.copy_(position)
    with pytest.raises(UserError, match=r"data.max_bad_rows=1 of a file may be left out"):
        step_of(lower, steps)


@pytest.mark.parametrize("world", [1, 4])
def test_what_is_left_out_is_said_once_a_file(spoiled: Path, capfd: pytest.CaptureFixture[str], world: int) -> None:
    of = stream(spoiled, limits=LENIENT, lanes=2)
    for rank in range(world):
        one = source(of, rank, world)
        steps_of(one, 0, 60)
        assert int(one.position[:, 0].max()) >= 1 or rank  # into the second epoch
    lines = capfd.readouterr().err.splitlines()
    for file in of.files:
        mine = [line for line in lines if str(file.path) in line]
        assert len(mine) == 2
        assert "left out, as up to data.max_bad_rows=4 rows of a file are" in mine[0]
        assert mine[1] == f"{file.path}: 4 bad rows left out of the whole file"
    assert len(lines) == 2 * len(of.files)


def test_validation_leaves_bad_rows_out(spoiled: Path) -> None:
    files = corpus_files(spoiled)["train"]
    with pytest.raises(UserError, match="line 3 is not JSON"):
        read_head(files, ByteTokenizer(), None)
    _, ends = read_head(files, ByteTokenizer(), None, LENIENT)
    assert len(ends) == 3 * 26


# Whole runs


def streamed(path: object, run_dir: Path, *overrides: str) -> list[str]:
    return tiny_overrides(path, run_dir, "data=c4_stream", "data.attempts=2", *overrides)  # type: ignore[arg-type]


def run_of(path: object, run_dir: Path, *overrides: str) -> Callable[[], ExitCode]:
    return lambda: train_here(load_config(streamed(path, run_dir, *overrides)))


def test_three_and_three_steps_are_six(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_run import poison, raise_signal_at

    with monkeypatch.context() as patch:
        poison(patch, {1})  # a step that is skipped advances the stream
        assert run_of(texts, tmp_path / "alone")() is ExitCode.FINISHED
        raise_signal_at(patch, 2, 15)
        assert run_of(texts, tmp_path / "run")() is ExitCode.STOPPED
    tensors = read_tensors(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert tensors["data.position"].shape == (4, 5)
    assert tensors["data.position"][:, -1].tolist() == [6] * 4
    assert run_of(texts, tmp_path / "run")() is ExitCode.FINISHED
    assert compare_runs(tmp_path / "alone", tmp_path / "run") == []


def test_a_run_says_what_it_reads_and_is_opened_again(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(texts, tmp_path / "run")()
    assert "streamed from 5 files (0.00 GB) in 4 lanes" in capsys.readouterr().out
    row = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    try:
        result = evaluate_on(open_run(tmp_path / "run"), None, "validation", 500, 4)
    finally:
        distributed.finish()
    assert (result.loss, result.bits_per_byte) == pytest.approx((row["loss"], row["bits_per_byte"]))


def test_validation_is_that_of_prepared_shards(corpus: Path, tmp_path: Path) -> None:
    values = []
    for name in ("sample", "c4_stream"):
        config = load_config(tiny_overrides(corpus, tmp_path / name, f"data={name}", "train.steps=1", "optim.lr=1e-30"))
        train_here(config)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        values.append([(row["loss"], row["bits_per_byte"], row["tokens"]) for row in rows if row["kind"] == "eval"])
    assert values[0] == values[1] != []


def refusal(run: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_is_not_gone_on_with_over_other_text(texts: Path, tmp_path: Path) -> None:
    run_of(texts, tmp_path / "run")()
    again = (texts, tmp_path / "run", "train.steps=9")
    assert "was trained on other tokens" in refusal(run_of(*again, "data.max_files=4"))
    assert "with data.lanes=64, not 2" in refusal(run_of(*again, "data.lanes=2"))
    assert "with data.shuffle_rows=1024, not 7" in refusal(run_of(*again, "data.shuffle_rows=7"))
    assert run_of(*again)() is ExitCode.FINISHED


def compressed_again(path: Path, level: int = 1) -> None:
    for file in (path / "en").iterdir():
        before = file.read_bytes()
        file.write_bytes(gzip.compress(gzip.decompress(before), level, mtime=1))
        assert file.read_bytes() != before


@pytest.mark.parametrize("level", [0, 1], ids=["not at all", "another level"])
def test_a_run_goes_on_over_the_same_text_compressed_again(texts: Path, tmp_path: Path, level: int) -> None:
    shutil.copytree(texts, tmp_path / "texts")
    run_of(tmp_path / "texts", tmp_path / "run")()
    compressed_again(tmp_path / "texts", level)
    assert run_of(tmp_path / "texts", tmp_path / "run", "train.steps=9")() is ExitCode.FINISHED
    file = tmp_path / "texts" / "en" / f"c4-train.00000-of-{FILES:05}.json.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()).replace(b"the", b"teh", 1)))
    assert "was trained on other tokens" in refusal(run_of(tmp_path / "texts", tmp_path / "run", "train.steps=12"))


def test_text_of_several_gzip_members_is_known_by_its_file(tmp_path: Path) -> None:
    def identity(*members: bytes, level: int = 9) -> str:
        tmp_path.joinpath("file").write_bytes(b"".join(gzip.compress(member, level, mtime=0) for member in members))
        return CorpusFile(tmp_path / "file", "train", 0, 1).text_identity()

    rows = [json.dumps({"text": text}).encode() + b"\n" for text in make_texts(3000, 1)]
    long = b"".join(rows)
    assert identity(long) == identity(long, level=0) == identity(long, level=1)
    assert len({identity(*parts) for parts in ([long], [long, rows[0]], [rows[1], rows[0]], [rows[2], rows[0]])}) == 4
    assert identity(rows[0], long) != identity(rows[0], long, level=1)  # not known to be the same


def test_streams_that_cannot_start(texts: Path, tmp_path: Path) -> None:
    short = run_of(texts, tmp_path / "run", "data.seq_len=9999")
    assert "validation split has" in refusal(short)
    assert "less than one window of data.seq_len + 1 = 10000" in refusal(short)
    message = refusal(run_of(texts, tmp_path / "run", f"data.tokenizer={texts}/tokenizer"))
    assert f"run python scripts/train_tokenizer.py data=c4_stream data.path={texts}" in message
    assert "no such directory" in refusal(run_of(tmp_path / "none", tmp_path / "run"))


def test_a_server_that_dies_stops_the_run_and_a_restart_goes_on(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.001)
    with serving(texts) as mirror:
        assert run_of(mirror.address, tmp_path / "run", "data.shuffle_rows=4", "train.steps=6")() is ExitCode.FINISHED
        run = run_of(mirror.address, tmp_path / "run", "data.shuffle_rows=4", "train.steps=40")
        mirror.always = 503
        message = refusal(run)
        assert "HTTP Error 503" in message
        assert "gave up after 2 attempts" in message
        assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000006"
        mirror.always = None
        assert run_of(mirror.address, tmp_path / "run", "data.shuffle_rows=4", "train.steps=8")() is ExitCode.FINISHED
    assert read_tensors(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])["data.position"][0, -1] == 16


@pytest.mark.slow
def test_a_bad_line_on_one_rank_stops_both_with_one_message(tmp_path: Path) -> None:
    files = [make_texts(400, seed) for seed in range(2)]
    path = write_corpus(tmp_path / "c", {"train": files, "validation": [make_texts(12, 9)]})
    bad = path / "en" / "c4-train.00001-of-00002.json.gz"
    lines = gzip.decompress(bad.read_bytes()).splitlines(keepends=True)
    lines[40] = b"{nonsense\n"
    bad.write_bytes(gzip.compress(b"".join(lines)))
    result = launch(
        streamed(path, tmp_path / "run", "train.steps=200", "data.shuffle_rows=8", "checkpoint.every=3"), processes=2
    )
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {bad}: line 41 is not JSON: {errors[0].split('JSON: ')[1]}"]
    done = json.loads((tmp_path / "run" / "done.json").read_text())
    assert done["status"] == "failed"
    assert "line 41 is not JSON" in done["reason"]
    assert list_checkpoints(tmp_path / "run" / "checkpoints")
