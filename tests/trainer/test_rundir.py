"""A run directory is all that a run is: its config and its tokenizer come with it, wherever it lies."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import train_tokenizer as train_tokenizer_script
from conftest import make_texts, tiny_overrides, train_here, write_corpus
from narrowgauge.trainer import distributed
from narrowgauge.trainer.config import TrainConfig, differences, load_config, load_run_config
from narrowgauge.trainer.data.prepare import prepare
from narrowgauge.trainer.data.tokenizer import load_tokenizer, train_bpe
from narrowgauge.trainer.entry import main
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.metrics import read_metrics
from narrowgauge.trainer.rundir import RunDirectory
from narrowgauge.trainer.tools.evaluation import evaluate_on, open_run
from narrowgauge.trainer.tools.export import export_run
from narrowgauge.trainer.tools.generate import SampleConfig, generate
from narrowgauge.trainer.tools.restore import restore_run

Tiny = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with a tokenizer of its own. Read-only for tests."""
    path = write_corpus(
        tmp_path_factory.mktemp("bpe"), {"train": [make_texts(60, 1)], "validation": [make_texts(20, 2)]}
    )
    prepare(load_config([f"data.path={path}", "data.vocab_size=300"]).data, workers=1)
    return path


@pytest.fixture
def bpe(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "corpus")


def tiny_bpe(corpus: Path, run_dir: Path, *overrides: str) -> TrainConfig:
    own = ("data.tokenizer=${data.path}/tokenizer", "train.steps=4", *overrides)
    return load_config(tiny_overrides(corpus, run_dir, *own))


def refusal(config: TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        train_here(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl", "train").values()]


def test_a_run_directory_can_be_moved_and_outlives_its_tokenizer(bpe: Path, tmp_path: Path) -> None:
    run_dir, copy = tmp_path / "run", tmp_path / "elsewhere" / "copy"
    assert train_here(tiny_bpe(bpe, run_dir, "train.steps=2")) is ExitCode.FINISHED
    for file in (bpe / "tokenizer").iterdir():
        assert (run_dir / "tokenizer" / file.name).read_bytes() == file.read_bytes()
    shutil.copytree(run_dir, copy)
    assert train_here(load_config([f"run.dir={run_dir}", "train.steps=4"])) is ExitCode.FINISHED
    expected = losses(run_dir)
    shutil.rmtree(run_dir)
    train_bpe(["quite another text"], 270, bpe / "tokenizer", progress=False)
    for gone in (False, True):
        if gone:
            shutil.rmtree(bpe / "tokenizer")
        run = restore_run(copy)
        assert generate(run.state.model, run.tokenizer, SampleConfig(tokens=3), context=8, device=run.world.device)
        distributed.finish()
        row = read_metrics(copy / "metrics.jsonl", "eval")[2]
        result = evaluate_on(open_run(copy), None, "validation", 500, 8)
        distributed.finish()
        assert result.loss == row["loss"]
        assert export_run(copy, tmp_path / f"hf {gone}") == 2
    assert train_here(load_config([f"run.dir={copy}", "train.steps=4"])) is ExitCode.FINISHED
    assert losses(copy) == expected
    assert not run_dir.exists()
    assert load_run_config(copy / "config.yaml").data.tokenizer == str(bpe / "tokenizer")  # as it was said


def test_a_run_from_before_takes_a_copy_when_it_goes_on(bpe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_here(tiny_bpe(bpe, run_dir))
    shutil.rmtree(run_dir / "tokenizer")
    assert restore_run(run_dir).tokenizer.vocab_size == 300
    distributed.finish()
    assert train_here(load_config([f"run.dir={run_dir}", "train.steps=5"])) is ExitCode.FINISHED
    assert (run_dir / "tokenizer" / "tokenizer.json").is_file()


def test_bytes_need_no_copy(tiny: Tiny) -> None:
    config = tiny("train.steps=1")
    train_here(config)
    assert not (Path(config.run.dir) / "tokenizer").exists()


def test_shards_of_another_tokenizer_end_a_resume_with_what_to_do(bpe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_here(tiny_bpe(bpe, run_dir))
    shutil.rmtree(bpe / "tokenizer")
    shutil.rmtree(bpe / "shards")
    train_bpe(["quite another text"], 270, bpe / "tokenizer", progress=False)
    prepare(tiny_bpe(bpe, tmp_path / "other").data, workers=1)
    longer = [f"run.dir={run_dir}", "train.steps=5"]
    told = refusal(load_config(longer))
    assert f"data.tokenizer={run_dir}/tokenizer (fingerprint " in told
    assert "did not make the shards in" in told
    advice = shlex.split(told.partition("run python scripts/prepare_data.py ")[2])
    prepare(load_config(advice).data, workers=1)
    assert train_here(load_config(longer)) is ExitCode.FINISHED


def test_another_tokenizer_by_name_is_refused(bpe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_here(tiny_bpe(bpe, run_dir))
    train_bpe(["quite another text"], 270, tmp_path / "other", progress=False)
    named = load_config([f"run.dir={run_dir}", "train.steps=5", f"data.tokenizer={tmp_path / 'other'}"])
    assert f"and data.tokenizer={tmp_path / 'other'} has " in refusal(named)
    shutil.copytree(bpe / "tokenizer", tmp_path / "same" / "tokenizer")
    same = load_config([f"run.dir={run_dir}", "train.steps=5", f"data.tokenizer={tmp_path / 'same' / 'tokenizer'}"])
    assert train_here(same) is ExitCode.FINISHED


def test_a_copy_is_whole_and_of_the_tokenizer_alone(bpe: Path, tmp_path: Path) -> None:
    (bpe / "tokenizer" / "model.safetensors").write_bytes(b"weights")
    named = load_config([f"data.path={bpe}", f"data.tokenizer={bpe / 'tokenizer'}"]).data
    file = replace(named, tokenizer=str(bpe / "tokenizer" / "tokenizer.json"))
    tokenizer = load_tokenizer(named.tokenizer)
    gone = replace(named, tokenizer=str(tmp_path / "gone"))
    for name, data in {"directory": named, "file": file, "gone": gone}.items():
        directory = RunDirectory(tmp_path / name)
        directory.path.mkdir()
        (directory.path / "tokenizer.incomplete").mkdir()  # of a start that was killed
        directory.keep_tokenizer(data, tokenizer)
        assert [path.name for path in directory.path.iterdir()] == ["tokenizer"]
        assert {path.name for path in directory.tokenizer.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
        assert load_tokenizer(directory.data_of(data).tokenizer).fingerprint == tokenizer.fingerprint
    train_bpe(["quite another text"], 270, tmp_path / "other", progress=False)
    directory.keep_tokenizer(replace(named, tokenizer=str(tmp_path / "other")), load_tokenizer(str(tmp_path / "other")))
    assert load_tokenizer(str(directory.tokenizer)).vocab_size == 270
    assert load_tokenizer(str(directory.path / "earlier-1" / "tokenizer")).vocab_size == 300


def test_a_run_keeps_where_its_shards_are(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    directory = RunDirectory(tmp_path)
    one = load_config([f"data.path={bpe}", f"data.tokenizer={bpe / 'tokenizer-8192'}"]).data
    assert directory.data_of(one).shards_dir == one.shards_dir == str(bpe / "shards" / "tokenizer-8192")
    mixed = load_config(["data=mix", "data.sources={a:{path:x},b:{path:y,shards:s}}", "data.tokenizer=x/t"]).data
    kept = directory.data_of(mixed)
    assert kept.tokenizer == str(tmp_path / "tokenizer")
    assert [part.shards_dir for part in kept.parts().values()] == ["x/shards/t", "s"]


def test_the_path_alone_brings_the_runs_config(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny("precision=fp8_delayed", "precision.args.history=4", "optim.lr=1e-3", "train.steps=2", gpt=True)
    train_here(config)
    alone = [f"run.dir={config.run.dir}"]
    assert load_config(alone) == config
    assert load_config([*alone, "model=gpt2_tiny", "precision=fp8_delayed", "data=sample"]) == config
    assert train_here(load_config(alone)) is ExitCode.FINISHED
    assert "is finished: step 2" in capsys.readouterr().out
    longer = load_config([*alone, "train.steps=3", "optim.lr=2e-3"])
    assert differences(config, longer) == {"train.steps": (2, 3), "optim.lr": (1e-3, 2e-3)}
    assert train_here(longer) is ExitCode.FINISHED
    assert "going on with another config: optim.lr=0.002 (was 0.001), train.steps=3 (was 2)" in capsys.readouterr().out


def test_the_same_command_goes_on_whatever_its_prefixes(tiny: Tiny) -> None:
    args = ("~precision.args.margin", "+precision.args.margin=1", "~precision.args.history")
    words = ("precision=fp8_delayed", *args, "++optim.lr=1e-3")
    config = tiny(*words, "train.steps=1")
    train_here(config)
    assert tiny(*words, "train.steps=1") == config
    with pytest.raises(UserError, match=r"~precision\.args\.histroy: .*no argument 'histroy' \(did you mean 'history'"):
        tiny("precision=fp8_delayed", "~precision.args.histroy", f"run.dir={config.run.dir}-other")


def test_what_differs_from_the_run_is_named_in_one_line(tiny: Tiny) -> None:
    config = tiny("precision=fp8_delayed", "precision.args.history=4", "train.steps=2")
    train_here(config)
    alone = [f"run.dir={config.run.dir}"]
    told = refusal(load_config([*alone, "seed=7", "data.seq_len=16", "train.steps=9", "precision=bf16"]))
    for words in (
        "data.seq_len=32, not 16",
        "precision.recipe=fp8_delayed, not bf16",
        "seed=0, not 7",
        "history=4, not",
    ):
        assert words in told
    assert "train.steps" not in told
    assert "{}" not in told
    assert told.endswith(": choose another run.dir, or run.resume=never to move it aside")
    told = refusal(load_config([*alone, "precision=bf16"]))
    assert "resume.recipe_change=allow to go on under this recipe" in told
    with pytest.raises(UserError, match=r"unknown key 'model.hiden_size'"):
        load_config([*alone, "model.hiden_size=3"])
    with pytest.raises(UserError, match=r"optim.lr: Value 'x'"):
        load_config([*alone, "optim.lr=x"])
    allowed = [*alone, "train.steps=3", "precision=bf16", "resume.recipe_change=allow"]
    assert train_here(load_config(allowed)) is ExitCode.FINISHED
    # An allowance is of one start: it does not come with the run.
    assert "precision.recipe=bf16, not fp32" in refusal(load_config([*alone, "train.steps=4", "precision=fp32"]))


def test_a_new_start_and_an_empty_directory_know_no_earlier_config(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("train.steps=2", "optim.lr=1e-3")
    train_here(config)
    anew = load_config([f"run.dir={config.run.dir}", "run.resume=never"])
    assert replace(anew, run=load_config([]).run) == load_config([])
    assert load_config([f"run.dir={tmp_path / 'none'}"]).optim.lr == load_config([]).optim.lr


def test_what_follows_from_a_key_of_the_run_follows_still(tmp_path: Path, tiny: Tiny) -> None:
    config = tiny("train.steps=1")
    train_here(config)
    file = Path(config.run.dir) / "config.yaml"
    said = replace(config, data=replace(config.data, path="a/b", tokenizer="a/b/tokenizer"))
    file.write_text(said.to_yaml(), encoding="utf-8")
    assert load_config([f"run.dir={config.run.dir}", "data.path=c"]).data.tokenizer == "c/tokenizer"
    file.write_text(replace(said, data=replace(said.data, tokenizer="elsewhere")).to_yaml(), encoding="utf-8")
    assert load_config([f"run.dir={config.run.dir}", "data.path=c"]).data.tokenizer == "elsewhere"


def test_cfg_shows_what_would_be_used(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("train.steps=1")
    train_here(config)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["trainer", "--cfg", "job", f"run.dir={config.run.dir}", "train.steps=1e3"])
    assert main() == ExitCode.FINISHED
    assert capsys.readouterr().out == replace(config, train=replace(config.train, steps=1000)).to_yaml()


@pytest.mark.parametrize("kind", ["file", "empty config", "config that is a directory"])
def test_run_directories_that_are_none(kind: str, tiny: Tiny) -> None:
    config = tiny("train.steps=1")
    path = Path(config.run.dir)
    if kind == "file":
        path.write_text("mine")
        assert "cannot be written" in refusal(config)
        assert path.read_text() == "mine"
        return
    train_here(config)
    (path / "config.yaml").unlink()
    if kind == "empty config":
        (path / "config.yaml").touch()
        with pytest.raises(UserError, match=r"config.yaml cannot be read: no key: value in it"):
            load_config([f"run.dir={path}"])
        return
    (path / "config.yaml").mkdir()
    assert "config.yaml" in refusal(load_config([*tiny_overrides(Path(config.data.path), path), "train.steps=2"]))


class TestTrainedTokenizers:
    def script(self, path: Path, *overrides: str) -> None:
        train_tokenizer_script.main(["data=c4", f"data.path={path}", *overrides])

    def test_one_that_stands_is_never_replaced(self, bpe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = {file.name: file.read_bytes() for file in (bpe / "tokenizer").iterdir()}
        self.script(bpe, "data.vocab_size=300")
        assert "stands already and is kept" in capsys.readouterr().out
        self.script(bpe, "data.vocab_size=310")
        assert load_tokenizer(str(bpe / "tokenizer-310")).vocab_size == 310
        with pytest.raises(UserError) as caught:
            self.script(bpe, "data.vocab_size=310", f"data.tokenizer={bpe / 'tokenizer'}")
        assert "a tokenizer of 300 entries stands there" in str(caught.value)
        assert str(caught.value).endswith(f"data.tokenizer={bpe}/tokenizer-310-2")
        assert {file.name: file.read_bytes() for file in (bpe / "tokenizer").iterdir()} == before

    def test_another_vocabulary_is_another_place_for_all_who_name_it(self, bpe: Path) -> None:
        before = (bpe / "shards" / "tokenizer" / "manifest.json").read_bytes()
        named = [f"data.path={bpe}", "data.vocab_size=310"]
        assert prepare(load_config(named).data, workers=1)["tokenizer"]["vocab_size"] == 310
        data = load_config(named).data
        assert (data.tokenizer, data.shards_dir) == (f"{bpe}/tokenizer-310", f"{bpe}/shards/tokenizer-310")
        assert (bpe / "shards" / "tokenizer" / "manifest.json").read_bytes() == before
        for words in ([], ["data.vocab_size=300"]):
            assert load_config([f"data.path={bpe}", *words]).data.tokenizer == f"{bpe}/tokenizer"

    def test_a_text_too_short_for_its_vocabulary_is_found_again(self, tmp_path: Path) -> None:
        path = write_corpus(tmp_path / "short", {"train": [["a b"]], "validation": [["a"]]})
        named = [f"data.path={path}", "data.vocab_size=900"]
        assert prepare(load_config(named).data, workers=1)["tokenizer"]["vocab_size"] < 900
        assert load_config(named).data.tokenizer == f"{path}/tokenizer"
        assert json.loads((path / "tokenizer" / "tokenizer_config.json").read_text())["asked_vocab_size"] == 900
