"""Text of one's own, in the forms that `datasets` reads: every row once, none changed, one line for what is none."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from conftest import make_texts, tiny_overrides, train_here, write_corpus
from narrowgauge.trainer import distributed
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data.config import DataConfig, home_of
from narrowgauge.trainer.data.prepare import prepare
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.tools.evaluation import evaluate_on, open_run
from pyarrow import parquet

TEXTS = [
    *make_texts(40, 1),
    "two\nlines\r\nand \u2028 \x85 others",
    '"quoted", 5',
    "2020-01-01",
    "5",
    "NA",
    "null",
    " x ",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of `datasets`; what has no place of its own is kept under the working directory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def data(path: object, *overrides: str) -> DataConfig:
    return load_config(["data=text", f"data.path='{path}'", "data.tokenizer=bytes", *overrides]).data


def documents(config: DataConfig, split: str = "train") -> list[str]:
    """Of the shards that stand."""
    shards = Path(config.shards_dir)
    found = []
    for info in json.loads((shards / "manifest.json").read_text())["splits"][split]:
        tokens = np.fromfile(shards / info["file"], "<u2")
        ends = np.load(shards / info["documents_file"])[:, 0]
        found += [bytes(part[:-1].tolist()).decode() for part in np.split(tokens, ends)[:-1]]
    return found


def prepared(path: object, *overrides: str, workers: int = 1) -> list[str]:
    config = data(path, *overrides)
    prepare(config, workers)
    return documents(config)


def refusal(path: object, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        prepared(path, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def json_lines(texts: list[Any], field: str = "text") -> bytes:
    return b"".join(json.dumps({field: text, "n": 1}, ensure_ascii=False).encode() + b"\n" for text in texts)


def write_parquet(file: Path, texts: Any, field: str = "text") -> Path:
    parquet.write_table(pa.table({field: texts, "n": list(range(len(texts)))}), file)
    return file


def write_csv(file: Path, texts: list[str], delimiter: str) -> None:
    with file.open("w", newline="", encoding="utf-8") as output:
        writer = csv.writer(output, delimiter=delimiter)
        writer.writerow(["text", "n"])
        writer.writerows([text, 1] for text in texts)


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    "x.parquet": write_parquet,
    "x.jsonl": lambda file, texts: file.write_bytes(json_lines(texts)),
    "lines.json": lambda file, texts: file.write_bytes(json_lines(texts)),
    "x.jsonl.gz": lambda file, texts: file.write_bytes(gzip.compress(json_lines(texts))),
    "x.json.gz": lambda file, texts: file.write_bytes(gzip.compress(json_lines(texts))),
    "array.json": lambda file, texts: file.write_text(json.dumps([{"text": text} for text in texts])),
    "indented.json": lambda file, texts: file.write_text(json.dumps([{"text": text} for text in texts], indent=1)),
    "x.csv": lambda file, texts: write_csv(file, texts, ","),
    "x.tsv": lambda file, texts: write_csv(file, texts, "\t"),
    "odd [1]*.jsonl": lambda file, texts: file.write_bytes(json_lines(texts)),
    "saved": lambda file, texts: datasets.Dataset.from_dict({"text": texts}).save_to_disk(file),
    "saved splits": lambda file, texts: datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": texts})
    ).save_to_disk(file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_text_of_a_file_is_a_document_as_it_is(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, TEXTS)
    assert prepared(tmp_path / name, "data.validation_fraction=0") == TEXTS


def test_a_part_is_held_out_where_there_is_no_validation_split(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_parquet(tmp_path / "x.parquet", texts := make_texts(400, 1))
    for options, every in (([], 20), (["data.validation_fraction=0.01"], 100), (["data.validation_split=null"], 20)):
        config = data(file, *options)
        prepare(config, 1)
        held = texts[every // 2 :: every]
        assert documents(config, "validation") == held
        assert documents(config) == [text for text in texts if text not in held]
        assert f"one of {every} documents is held out, {len(held)} of 400" in capfd.readouterr().out
    assert prepared(write_parquet(tmp_path / "one.parquet", ["alone"])) == ["alone"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_splits_by_name_and_in_part(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "corpus"
    place.mkdir()
    for split, texts in (("train", TEXTS), ("validation", ["v"]), ("test", ["t"])):
        WRITERS[f"x.{kind}"](place / f"{split}-00000.{kind}", texts)
    config = data(place)
    prepare(config, 1)
    assert (documents(config), documents(config, "validation")) == (TEXTS, ["v"])
    config = data(place, "data.train_split='train[:10]'", "data.validation_split=test")
    prepare(config, 1)
    assert (documents(config), documents(config, "validation")) == (TEXTS[:10], ["t"])
    config = data(place, "data.train_split='train[:50%]'", "data.validation_split='train[50%:]'")
    prepare(config, 1)
    assert documents(config) + documents(config, "validation") == TEXTS
    assert "no split 'tset' (data.validation_split) (did you mean 'test'?); there are: train" in refusal(
        place, "data.validation_split=tset"
    )


def test_a_saved_dataset_in_part(tmp_path: Path) -> None:
    WRITERS["saved"](tmp_path / "saved", TEXTS)
    config = data(
        tmp_path / "saved", "data.train_split='train[:10]'", "data.validation_split='train[10:12]+train[-1:]'"
    )
    prepare(config, 1)
    assert (documents(config), documents(config, "validation")) == (TEXTS[:10], [*TEXTS[10:12], TEXTS[-1]])
    assert 'Unknown split "tset"' in refusal(tmp_path / "saved", "data.train_split='tset[:1]'")


def test_directories_and_patterns(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "corpus"
    place.mkdir()
    for number in range(3):
        (place / f"part{number}.jsonl").write_bytes(json_lines(TEXTS[number::3]))
    (place / "notes.txt").write_text("nothing")
    in_order = [text for number in range(3) for text in TEXTS[number::3]]
    assert prepared(place, "data.validation_fraction=0") == in_order
    assert "1 files are of another kind or split and are not read, such as " in capfd.readouterr().out
    assert prepared(f"{place}/*.jsonl", "data.validation_fraction=0") == in_order
    assert "files of several kinds" in refusal(f"{place}/*")
    assert "no file has such a name" in refusal(f"{place}/*.parquet")


def test_a_directory_keeps_its_text_alone(tmp_path: Path) -> None:
    """What is prepared is not read as text the next time."""
    place = tmp_path / "corpus"
    place.mkdir()
    (place / "x.jsonl").write_bytes(json_lines(TEXTS))
    config = load_config(["data=text", f"data.path={place}", "data.vocab_size=300"]).data
    assert prepare(config, 1) == prepare(config, 1)
    assert [file.name for file in place.iterdir()] == ["x.jsonl"]
    assert "whose files are text" in refusal(place, f"data.out={place}/prepared")


@pytest.mark.parametrize(("by", "expected"), [
    ("line", ["one", "two", "three"]), ("paragraph", ["one\ntwo", "three"]), ("document", ["one\ntwo\n\nthree\n"]),
])  # fmt: skip
def test_what_a_document_of_plain_text_is(tmp_path: Path, by: str, expected: list[str]) -> None:
    (tmp_path / "x.txt").write_text("one\ntwo\n\nthree\n")
    assert prepared(tmp_path / "x.txt", f"data.sample_by={by}", "data.validation_fraction=0") == expected


def test_the_field_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", TEXTS, "content")
    assert prepared(file, "data.field=content", "data.validation_fraction=0") == TEXTS
    assert "no field 'contents' (did you mean 'content'?); there are: content, n" in refusal(
        file, "data.field=contents"
    )
    assert "the field 'n' holds int64, not text" in refusal(file, "data.field=n")
    lines = tmp_path / "x.jsonl"
    lines.write_bytes(b"\n" + json_lines(TEXTS, "content"))
    assert prepared(lines, "data.field=content", "data.validation_fraction=0") == TEXTS
    assert "no field 'text'; there are: content, n" in refusal(lines)
    parquet.write_table(pa.table({"of": [{"text": text} for text in TEXTS]}), file)
    assert prepared(file, "data.field=of.text", "data.validation_fraction=0") == TEXTS
    corpus = write_corpus(tmp_path / "c4", {"train": [TEXTS], "validation": [["v"]]})
    assert "is in C4's layout, whose field is 'text'" in refusal(corpus, "data.field=content")


BAD_LINES = json_lines(["a"]) + b'{bad\n{"text": null}\n{"text": 5}\n{"text": "\xff"}\n{"text": "\\ud800"}\n[1]\n{}\n'


def not_unicode() -> pa.Array:
    buffers = pa.array([b"a", b"\xff", None, b"b"]).buffers()
    return pa.Array.from_buffers(pa.string(), 4, buffers)


@pytest.mark.parametrize("kind", ["lines", "column", "text", "array"])
def test_bad_rows_are_left_out_as_far_as_is_allowed(tmp_path: Path, kind: str) -> None:
    file = tmp_path / {"lines": "x.jsonl", "column": "x.parquet", "text": "x.txt", "array": "x.json"}[kind]
    if kind == "lines":
        file.write_bytes(BAD_LINES + json_lines(["b"]))
    elif kind == "column":
        parquet.write_table(pa.table({"text": not_unicode()}), file)
    elif kind == "text":
        file.write_bytes(b"a\n\xff\n\n" + b"x" * 500 + b"\nb\n")
    else:
        file.write_text(json.dumps([{"text": text} for text in ("a", 5, None, "b")]))
    allowed = {"lines": 7, "column": 2, "text": 2, "array": 2}[kind]
    options = ["data.validation_fraction=0", "data.max_line_bytes=100"]
    assert prepared(file, *options, f"data.max_bad_rows={allowed}") == ["a", "b"]
    message = refusal(file, *options)
    assert message.startswith(f"{file}: {'line' if kind == 'lines' else 'row'} 2 ")
    assert message.endswith("(data.max_bad_rows=0 of a file may be left out)")
    assert f"data.max_bad_rows={allowed - 1}" in refusal(file, *options, f"data.max_bad_rows={allowed - 1}")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_large_corpus_is_of_several_shards_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("narrowgauge.trainer.data.rows._PART_BYTES", 2000)
    monkeypatch.setattr("narrowgauge.trainer.data.rows._BATCH_BYTES", 500)
    file = write_parquet(tmp_path / "x.parquet", texts := make_texts(300, 1))
    config = data(file)
    first = prepare(config, workers)
    assert len(first["splits"]["train"]) > 10
    assert documents(config) == [text for number, text in enumerate(texts) if number % 15 != 7]
    if workers > 1:
        return
    shards = Path(config.shards_dir)
    stamps = {one: one.stat().st_mtime_ns for one in shards.glob("*.bin")}
    name = first["splits"]["train"][3]["file"]
    (shards / name).write_bytes(b"")
    texts[0] = texts[0][::-1]  # of the first shard
    write_parquet(file, texts)
    assert prepare(config, workers) != first
    changed = {one.name for one in stamps if one.stat().st_mtime_ns != stamps[one]}
    assert changed == {name, first["splits"]["train"][0]["file"]}


def test_the_same_text_in_another_file_is_the_same_tokens(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", TEXTS)
    (tmp_path / "x.jsonl").write_bytes(json_lines(TEXTS))
    sums = [prepare(data(tmp_path / name), 1)["splits"]["train"][0]["sha256"] for name in ("x.parquet", "x.jsonl")]
    assert sums[0] == sums[1]


def test_what_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"nonsense")
    assert refusal(tmp_path / "x.parquet").startswith(f"data.path={tmp_path}/x.parquet: cannot be read: ")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS))[:-20])
    assert "x.jsonl.gz: damaged, or cannot be read, after line " in refusal(tmp_path / "x.jsonl.gz")
    (tmp_path / "x.csv").write_text('text,n\n"a,1\n')
    assert refusal(tmp_path / "x.csv").startswith(f"data.path={tmp_path}/x.csv: cannot be read: ")
    (tmp_path / "x.json").write_text('[{"text": "a"},')
    assert refusal(tmp_path / "x.json").startswith(f"data.path={tmp_path}/x.json: cannot be read: ")
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    assert "x.pdf is of no kind that is known; text is read from .jsonl" in refusal(tmp_path / "x.pdf")
    assert "no such file" in refusal(tmp_path / "none.parquet")
    assert "no such directory" in refusal(tmp_path / "none")
    program = tmp_path / "program"
    program.mkdir()
    (program / "program.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    (program / "x.jsonl").write_bytes(json_lines(TEXTS))
    assert "a dataset that is a program, which is never run: " in refusal(program)
    assert not (tmp_path / "marker").exists()
    write_parquet(tmp_path / "y.parquet", TEXTS)
    assert "data.max_files=1 counts files of C4's layout" in refusal(tmp_path / "y.parquet", "data.max_files=1")


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file")
    message = refusal(write_parquet(tmp_path / "x.parquet", TEXTS))
    assert message.endswith(f"rows are kept in {cache}, HF_HOME names another place")


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(*arguments: Any, split: str | None = None, **options: Any) -> Any:
        asked.append((*arguments, split, options))
        return {
            "train": datasets.Dataset.from_dict({"content": TEXTS}),
            "validation": datasets.Dataset.from_dict({"content": ["v"]}),
        }

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load)
        config = data("owner/name", "data.field=content", "data.subset=en")
        assert config.shards_dir == "data/owner-name/shards/bytes"
        prepare(config, 1)
    assert (documents(config), documents(config, "validation")) == (TEXTS, ["v"])
    assert asked == [("owner/name", "en", None, {})]
    assert refusal("owner/name").startswith("data.path=owner/name: cannot be read: ")
    # What is here, or looks like it, is not asked for.
    (tmp_path / "here").mkdir()
    assert "no such directory" in refusal("here/name")
    assert "no such directory" in refusal("name")
    assert "no such directory" in refusal("./owner/name")


def test_homes(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(json_lines(TEXTS))
    assert home_of("x.jsonl") == "data/x-jsonl"
    assert home_of("x.jsonl", "out") == "out"
    assert home_of("owner/name") == "data/owner-name"
    assert home_of("owner/name", None, "sample") == "owner/name"
    config = load_config(["data=text", "data.path=x.jsonl", "data.out=out"]).data
    assert (config.tokenizer, config.shards_dir) == ("out/tokenizer", "out/shards/tokenizer")
    config = load_config(["data=sample", "data.out=out"]).data
    assert (config.tokenizer, config.shards_dir) == ("out/tokenizer", "out/shards/tokenizer")
    config = load_config(["data=sample", "data.path=some/where"]).data
    assert (config.tokenizer, config.home) == ("some/where/tokenizer", "some/where")


def test_a_run_a_mixture_and_an_evaluation_take_such_text(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", make_texts(200, 1), "content")
    own = ["data=text", "data.field=content", "data.global_batch_size=8"]
    config = load_config(tiny_overrides(file, tmp_path / "run", *own, "train.steps=2"))
    with pytest.raises(
        UserError, match=r"no token shards in data/.*: run python scripts/prepare_data.py data=text data.path="
    ):
        train_here(config)
    prepare(config.data, 1)
    assert train_here(config) is ExitCode.FINISHED
    (tmp_path / "y.jsonl").write_bytes(json_lines(make_texts(40, 2), "content"))
    result = evaluate_on(open_run(tmp_path / "run"), str(tmp_path / "y.jsonl"), "train", 500, 4)
    assert result.tokens == 512
    distributed.finish()
    sources = f"data.sources={{a: {{path: {file}, field: content}}, b: {{path: {tmp_path / 'z.jsonl'}}}}}"
    (tmp_path / "z.jsonl").write_bytes(json_lines(make_texts(100, 3)))
    config = load_config(
        tiny_overrides(file, tmp_path / "mixed", "data=mix", sources, f"data.out={tmp_path}/out", "train.steps=2")
    )
    for part in config.data.parts().values():
        prepare(part, 1)
    assert train_here(config) is ExitCode.FINISHED
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["a", "b"]


def test_a_stream_is_of_c4s_layout_alone(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", TEXTS)
    config = load_config(["data=c4_stream", f"data.path={file}"]).data
    with pytest.raises(UserError, match=r"not in C4's layout, .*prepare_data.py data=text data.path="):
        config.files()
