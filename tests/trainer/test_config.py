"""Every yaml composes; every mistake is one line with the nearest valid name."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from conftest import launch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Quote, QuotedString
from narrowgauge.trainer.cli import run_dir_of, script_main
from narrowgauge.trainer.config import differences, groups, load_config, load_run_config, parse, read_yaml
from narrowgauge.trainer.data.config import SourceConfig
from narrowgauge.trainer.entry import main
from narrowgauge.trainer.environ import unquoted
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.own import CONFIG_DIR
from omegaconf import OmegaConf

CHOICES = [f"{group}={name}" for group, names in groups().items() for name in names]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_yaml_composes_and_bears_its_own_name(choice: str) -> None:
    group, name = choice.split("=")
    config = load_config([choice, "data.seq_len=64"])
    assert getattr(config, group).name == name
    assert yaml.safe_load((CONFIG_DIR / group / f"{name}.yaml").read_text())["name"] == name


def complaint(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr' (did you mean 'optim.lr'"),
        ("lr=1", "unknown key 'lr' (did you mean 'optim.lr'"),
        ("model.rope_scaling={factor: 8}", "model.rope_scaling: is null, which no mapping replaces here"),
        ("+optim.lrr=1", "unknown key 'optim.lrr'"),
        ("trian.steps=1", "unknown key 'trian.steps' (did you mean 'train.steps'"),
        ("data.batch_size=1", "unknown key 'data.batch_size' (did you mean 'data.global_batch_size'"),
        ("model.rope_tetha=1", "did you mean 'model.rope_theta'"),
        ("hydra.rn.dir=x", "unknown key 'hydra.rn.dir' (did you mean 'hydra.run.dir'"),
        ("model=llama_tinny", "model=llama_tinny: no such model config (did you mean 'llama_tiny'"),
        ("precision=bf61", "precision=bf61: no such precision config (did you mean 'bf16'"),
        ("precision=fp8", "(did you mean 'fp8_block' or 'fp8_current' or 'fp8_delayed' or 'fp8_full'"),
        ("precision=rowwise", "(did you mean 'fp8_rowwise' or 'fp8_rowwise_gw_hp'?); there are: "),
        ("data=c5", "there are: c4, c4_stream, mix, sample"),
        ("nonsense", "'nonsense' is not an override; write key=value"),
        ("optim.lr=abc", "optim.lr: Value 'abc' of type 'str' could not be converted to Float"),
        ("train.steps=1.5", "train.steps: Value '1.5'"),
        ("optim.schedule=cosin", "optim.schedule: Invalid value 'cosin', expected one of"),
        ("run.resume=maybe", "run.resume: Invalid value 'maybe', expected one of [auto, never, must]"),
        ("optim.lr=0", "optim.lr=0.0: must be positive"),
        ("optim.lr=nan", "optim.lr=nan: must be positive"),
        ("optim.beta2=1", "optim.beta2=1.0"),
        ("optim.eps=-1", "optim.eps=-1.0"),
        ("optim.clip_norm=-1", "optim.clip_norm=-1.0"),
        ("optim.weight_decay=-1", "optim.weight_decay=-1.0"),
        ("optim.warmup_steps=-1", "optim.warmup_steps=-1"),
        ("optim.warmup_max_fraction=2", "optim.warmup_max_fraction=2.0"),
        ("optim.min_lr_ratio=-1", "optim.min_lr_ratio=-1.0"),
        ("optim.decay_fraction=2", "optim.decay_fraction=2.0"),
        ("train.steps=0", "train.steps=0: must be at least 1"),
        ("train.max_nonfinite_in_a_row=0", "train.max_nonfinite_in_a_row=0"),
        ("train.spike=rolback", "train.spike: Invalid value 'rolback', expected one of [off, skip, rollback]"),
        ("train.spike_window=1", "train.spike_window=1: must be at least 2"),
        ("train.spike_deviations=0", "train.spike_deviations=0.0: must be positive and finite"),
        ("train.spike_deviations=nan", "train.spike_deviations=nan: must be positive and finite"),
        ("train.spike_limit=0", "train.spike_limit=0: must be at least 1"),
        ("train.micro_batch_size=0", "train.micro_batch_size=0: must be 'auto' or a whole number"),
        ("train.micro_batch_size=big", "train.micro_batch_size=big: must be 'auto' or a whole number"),
        ("eval.every=-1", "eval.every=-1"),
        ("eval.tokens=-1", "eval.tokens=-1"),
        ("checkpoint.every=-1", "checkpoint.every=-1"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last=0"),
        ("checkpoint.max_failures=-1", "checkpoint.max_failures=-1"),
        ("checkpoint.every_minutes=-1", "checkpoint.every_minutes=-1"),
        ("checkpoint.every_minutes=nan", "checkpoint.every_minutes=nan"),
        ("train.stop_after=1h", "train.stop_after=1h: '1h' is not HH:MM:SS"),
        ("train.stop_after=01:75:00", "train.stop_after=01:75:00"),
        ("checkpoint.keep_every=-1", "checkpoint.keep_every=-1"),
        ("data.seq_len=0", "data.seq_len=0"),
        ("data.global_batch_size=0", "data.global_batch_size=0"),
        ("data.vocab_size=100", "data.vocab_size=100"),
        ("data.tokenizer_train_bytes=0", "data.tokenizer_train_bytes=0"),
        ("data.max_files=0", "data.max_files=0: must be at least 1, or null for all"),
        ("data.attempts=0", "data.attempts=0"),
        ("data.lanes=0", "data.lanes=0"),
        ("data.max_line_bytes=0", "data.max_line_bytes=0: must be at least 1"),
        ("data.max_bad_rows=-1", "data.max_bad_rows=-1: must not be negative"),
        ("data.min_bytes_per_second=-1", "data.min_bytes_per_second=-1: must not be negative"),
        ("data.shuffle_rows=0", "data.shuffle_rows=0"),
        ("data.sources={a:{path:x}}", "data.sources: data=sample reads one corpus, data.path; data=mix reads several"),
        ("parallel.replicate=0", "parallel.replicate=0"),
        ("parallel.threads=0", "parallel.threads=0"),
        ("parallel.compile=maybe", "parallel.compile=maybe: must be auto, true or false"),
        ("parallel.deterministic=1", "parallel.deterministic=1: must be auto, true or false"),
        ("parallel.reshard_after_forward=null", "parallel.reshard_after_forward=None: must be auto, true or false"),
        ("parallel.timeout_seconds=0", "parallel.timeout_seconds=0"),
        ("parallel.start_timeout_seconds=0", "parallel.start_timeout_seconds=0"),
        ("log.every=0", "log.every=0"),
        ("log.trackers=[wand]", "log.trackers: no tracker named 'wand'"),
        ("log.wandb_mode=on", "log.wandb_mode"),
        ("sample.tokens=-1", "sample.tokens=-1"),
        ("sample.temperature=-1", "sample.temperature=-1.0"),
        ("sample.top_k=-1", "sample.top_k=-1"),
        ("model.num_heads=7", "model.num_heads=7 does not divide model.hidden_size=256"),
        ("precision.recipe=bf61", "no recipe named 'bf61' (did you mean 'bf16'"),
        ("+precision.args.margin=1", "recipe 'bf16' has no argument 'margin'"),
        ("precision.args.margin=1", "recipe 'bf16' has no argument 'margin'"),
        ("model.init_std=-1", "model.init_std=-1.0"),
        ("model.head_dim=-2", "model.head_dim=-2"),
        ("model.rope_theta=0", "model.rope_theta=0.0"),
        ("model.norm_eps=0", "model.norm_eps=0.0"),
        ("model.arch=gpt", "model.arch=gpt: llama_tiny is a llama"),
        ("sample.seed=99999999999999999999999", "sample.seed="),
        ("hydra/launcher=bogus", "hydra/launcher: Hydra's own groups are not used here"),
        ("seed=-1", "seed=-1"),
        ("run.dir=''", "run.dir is empty"),
    ],
)
def test_every_mistake_is_one_line(override: str, words: str) -> None:
    assert words in complaint(override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.sources={a:{path:x,weight:0}}", "data.sources.a.weight=0.0: must be positive"),
        ("data.sources={a:{path:x,weight:-1}}", "data.sources.a.weight=-1.0: must be positive"),
        ("data.sources={a:{path:x,weight:nan}}", "data.sources.a.weight=nan: must be positive"),
        ("data.sources={a:{path:x},b:{path:y,weight:1e-6}}", "data.sources.b.weight=1e-06: gives no sample of 10000"),
        ("data.sources={a:{path:x,wieght:2}}", "data.sources.a.wieght: Key 'wieght' not in 'SourceConfig'"),
        ("data.sources={a:{weight:2}}", "data.sources.a.path: Structured config of type `SourceConfig` has missing"),
        ("data.sources={a:{path:''}}", "data.sources.a.path is empty"),
        ("data.sources.a.wieght=2", "unknown key 'data.sources.a.wieght' (did you mean 'weight'?); a source has path"),
        ("data.sources={a:x}", "data.sources.a: Invalid type assigned"),
        ("data.stream=true", "data.sources: a mixture is of token shards; data=c4_stream reads one corpus"),
    ],
)
def test_every_mistake_in_a_mixture_is_one_line(override: str, words: str) -> None:
    assert words in complaint("data=mix", override)


def test_a_rollback_needs_checkpoints() -> None:
    words = "train.spike=rollback goes back to a scheduled checkpoint, and checkpoint.every=0 writes none"
    assert words in complaint("train.spike=rollback", "checkpoint.every=0")
    load_config(["train.spike=skip", "checkpoint.every=0"])


def test_sources_can_be_written_at_once_or_one_by_one() -> None:
    whole = load_config(["data=mix", "data.sources={a:{path:x},b:{path:/y/z,weight:2,shards:s}}"])
    keys = [f"data.sources.{key}" for key in ("a.path=x", "b.path=/y/z", "b.weight=2", "b.shards=s")]
    assert load_config(["data=mix", *keys]) == whole
    parts = whole.data.parts()
    assert {name: (part.path, part.shards_dir) for name, part in parts.items()} == {
        "a": ("x", "x/shards/tokenizer"),
        "b": ("/y/z", "s"),
    }


def test_values_are_kept_in_their_types() -> None:
    config = load_config(["optim.lr=1e-4", "train.micro_batch_size=4", "seed=3", "log.trackers=[wandb,tensorboard]"])
    assert (config.optim.lr, config.train.micro_batch_size, config.seed) == (1e-4, 4, 3)
    assert config.log.trackers == ["wandb", "tensorboard"]


def test_the_run_directory_reads_its_config_back(tmp_path: Path) -> None:
    config = load_config(["model=gpt2_tiny", "optim.lr=1e-4", "optim.schedule=wsd"])
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_run_config(file) == config
    assert differences(config, replace(config, seed=5)) == {"seed": (0, 5)}


def test_a_config_that_cannot_be_read_back(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        load_run_config(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("model: {arch: rnn}\n")
    with pytest.raises(UserError, match="cannot be read"):
        load_run_config(tmp_path / "config.yaml")


def test_the_command_line_says_it_once_on_every_rank() -> None:
    result = launch(["optim.lrr=1"], processes=2)
    assert result.returncode == 1  # torchrun's word for every failure
    assert result.stderr.count("error: unknown key 'optim.lrr' (did you mean 'optim.lr'") == 1
    assert result.stderr.splitlines()[-1].startswith("error: unknown key 'optim.lrr'")
    alone = launch(["optim.lrr=1"])
    assert alone.returncode == 2
    assert alone.stderr.count("\n") == 1


def test_help_and_cfg_show_and_run_nothing(tmp_path: Path) -> None:
    for flags, *words in (
        (["--help", "precision=nvfp4"], "torchrun --nproc-per-node", "bf16_forward: last part of the run"),
        (["--cfg", "job", "seed=7"], "seed: 7"),
    ):
        command = [sys.executable, "-m", "narrowgauge", *flags]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ)
        assert all(word in result.stdout for word in words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--config-name=mine"], ["--multirun", "sweep=nothing"]])
def test_flags_that_are_not_used_are_refused(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer", *flags])
    assert main() == ExitCode.BAD_INPUT


TEXTS = (
    "", " ", "  x ", "x\n", "\n", "\t", "a\r\nb", "\x85", "a\x85b", "\u2028x\u2029", "\ufeff", "\x00",
    "\x1b", "é 東 😀", "null", "~", "true", "yes", "off", "n", "1e3", "1_000", "2026_11_26", "2026-11-26",
    "0x1F", "0o17", "1:30", "1.5", "nan", ".inf", "+1", "-", "- a", "?", "? a", ":", "a: b", "a:", "#x",
    "a #b", "=", "a=b", "!tag", "&a", "*a", "%x", "@x", "`x", "|", ">", "<<", "---", "...", "[a", "{a: b}",
    "'", '"', "it's", 'a\'b"c', "'a", '"a', "a\\", "\\", "\\\\", "\\'", '\\"', "$", "Hello, world", "a,b",
    "f(x)", "choice(a,b)", "a=1,b=(2)", "/x/optim.lr=1e-3,seed=0",
)  # fmt: skip
LETTERS = " \n\t\r\\'\"${}[]():#,=-?!&*|>%@`~a1e_.\u2028\x85é😀x"


def texts() -> list[str]:
    """Those that YAML or Hydra would read as something else, and some by chance."""
    rng = random.Random(0)
    return [*TEXTS, *("".join(rng.choices(LETTERS, k=rng.randint(1, 12))) for _ in range(300))]


def test_every_text_of_many_is_read_back_as_it_was(tmp_path: Path) -> None:
    config = load_config([])
    config = replace(config, log=replace(config.log, trackers=texts()))
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    tree = OmegaConf.to_object(read_yaml(tmp_path / "config.yaml"))
    assert isinstance(tree, dict)
    assert tree["log"]["trackers"] == texts()


def test_a_key_of_text_holds_the_text_that_was_typed() -> None:
    for text in texts():
        if "${" in text:
            continue
        quoted = [QuotedString(text, quote).with_quotes() for quote in Quote]
        assert [unquoted(one) for one in quoted] == [text, text]
        for several in (True, False):
            assert [parse([f"run.dir={one}"], several=several)[0].value() for one in quoted] == [text, text]
        if unquoted(text) == text:
            assert parse([f"sample.prompt={text}"], several=False)[0].value() == text
            assert run_dir_of([f"run.dir={text or 'x'}"]) == Path(text or "x")


@pytest.mark.parametrize(
    "text",
    ["2026_11_26", "1e3", "a=1,b=(2)", "Hello, world", "it's", "[a]", "nulls"],
    ids=["date", "number", "sweep", "sentence", "apostrophe", "list", "word"],
)
def test_the_trainer_and_the_scripts_read_one_path(text: str) -> None:
    keys = [f"{key}={text}" for key in ("run.dir", "data.path", "data.tokenizer", "data.shards", "sample.prompt")]
    config = load_config([*keys, "log.project=007", "data=mix", f"data.sources.a.path={text}"])
    assert config.run.dir == str(run_dir_of([keys[0]])) == text
    assert (config.data.path, config.data.tokenizer, config.data.shards, config.sample.prompt) == (text,) * 4
    assert (config.log.project, config.data.parts()["a"].path) == ("007", text)


def test_text_in_a_mapping_is_text_too() -> None:
    source = "{a:{path:2026_1,weight:2_0,shards:null},b: {path: 1e3 ,shards: x}}"
    parts = load_config(["data=mix", f"data.sources={source}", "sample={prompt: 0x1F, tokens: 1_0}"])
    assert parts.data.sources == {
        "a": SourceConfig(path="2026_1", weight=20.0),
        "b": SourceConfig(path="1e3", shards="x"),
    }
    assert (parts.sample.prompt, parts.sample.tokens) == ("0x1F", 10)
    assert load_config(["sample={prompt: 'x, prompt: 1, y'}"]).sample.prompt == "x, prompt: 1, y"


def test_text_may_still_name_another_key_or_nothing() -> None:
    config = load_config(
        ["seed=3", "run.dir=runs/${seed}", "data.shards=null", "sample.prompt=cost \\${x}", "data.eot_token='null'"]
    )
    assert (config.run.dir, config.data.shards) == ("runs/3", None)
    assert (config.sample.prompt, config.data.eot_token) == ("cost ${x}", "null")
    assert "\\${...} for itself" in complaint("sample.prompt=cost ${x}")
    assert "sample.prompt=???: " in complaint("sample.prompt=???")


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("data.path=2026_1,2_0,x", ["2026_1", "2_0", "x"]),
        ("data.path=2026_1", ["2026_1"]),
        ("data.path='a, b',c", ["a, b", "c"]),
        ("data.path=null,true", ["null", "true"]),
    ],
    ids=["several", "one", "quoted", "words"],
)
def test_the_values_of_a_sweep_are_text_too(given: str, values: list[str]) -> None:
    (override,) = parse([given])
    lines = [job[0] for batch in BasicSweeper.split_arguments([override], None) for job in batch]
    assert [load_config([line]).data.path for line in lines] == values


def test_text_that_is_no_value_among_several_runs_is_shown_quoted() -> None:
    with pytest.raises(UserError) as caught:
        parse(["sample.prompt=Hello, (it's)"])
    assert "; among several runs such text is quoted: " in str(caught.value)
    shown = str(caught.value).partition("is quoted: ")[2].rpartition(" (extraneous")[0]
    (line,) = shlex.split(shown)
    assert parse([line])[0].value() == "Hello, (it's)"


def test_numbers_and_lists_as_people_write_them() -> None:
    config = load_config(["train.steps=1e3", "data.max_files=2.0", "log.trackers=wandb"])
    assert (config.train.steps, config.data.max_files, config.log.trackers) == (1000, 2, ["wandb"])
    assert type(config.train.steps) is int
    assert load_config(["log.trackers=wandb,tensorboard"]).log.trackers == ["wandb", "tensorboard"]
    assert "train.steps: Value '1.5'" in complaint("train.steps=15e-1")
    assert "train.steps: Value 'inf'" in complaint("train.steps=inf")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lr", "1e-3"], "'--lr' is no option: write optim.lr=1e-3"),
        (["--lr=1e-3"], "'--lr' is no option: write optim.lr=1e-3"),
        (["--global-batch-size", "8", "seed=1"], "write data.global_batch_size=8"),
        (["seed=1", "--learning_rate", "1"], "write optim.lr=1"),
        (["--train.steps"], "write train.steps=VALUE"),
        (["--model", "gpt2_tiny"], "write model=gpt2_tiny"),
        (["--nonsense", "seed=1"], "'--nonsense' is no option: write key=value"),
        (["-x"], "'-x' is no option: write key=value"),
    ],
    ids=["apart", "together", "dashes", "of another trainer", "no value", "group", "unknown", "short"],
)
def test_options_of_other_trainers_are_shown_as_keys(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer", *arguments])
    assert main() == ExitCode.BAD_INPUT
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_a_path_that_cannot_be_ends_a_script_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", f"out={'x' * 5000}"])
    with pytest.raises(SystemExit) as caught:
        script_main(lambda overrides, *, out="": print(Path(out).stat()), None)
    assert caught.value.code == ExitCode.FAILED
    told = capsys.readouterr().err
    assert told.startswith("error: [Errno 36] File name too long")
    assert told.count("\n") == 1


def test_options_are_shown_as_a_scripts_arguments_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--top-k", "3"])
    with pytest.raises(SystemExit):
        script_main(lambda overrides, *, top_k=1: None, None)
    assert capsys.readouterr().err == "error: '--top-k' is no option: write top_k=3\n"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("cost ${x}", id="interpolation"),
        pytest.param("${oc.env:HOME}", id="resolver"),
        pytest.param("${", id="no-interpolation"),
        pytest.param("\\${x} \\\\${x} $${x} \\", id="backslashes"),
        pytest.param("1e3", id="number"),
        pytest.param(" a: 'b' #c\n- é 東 ", id="yaml"),
    ],
)
def test_every_text_is_read_back_as_it_was(text: str, tmp_path: Path) -> None:
    config = load_config([])
    config = replace(config, sample=replace(config.sample, prompt=text), log=replace(config.log, trackers=[text]))
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    tree = OmegaConf.to_object(read_yaml(tmp_path / "config.yaml"))
    assert isinstance(tree, dict)
    assert (tree["sample"]["prompt"], tree["log"]["trackers"]) == (text, [text])
    assert config.flat()["sample.prompt"] == text


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrstuvwxyz"))
FOREIGN = [
    pytest.param("sample: {prompt: '${oc.env:SECRET}'}", "line 1: '${oc.env:SECRET}' is an interpolation", id="env"),
    pytest.param("a: 1\nb: x ${a}\n", "line 2: '${a}' is an interpolation", id="another-key"),
    pytest.param("a: [{b: '\\\\${home:x}'}]", "is an interpolation", id="behind-two-backslashes"),
    pytest.param("a: {b: ['${']}", "is an interpolation", id="not-closed"),
    pytest.param("a: '${nothing:${oc.env:SECRET}}'", "is an interpolation", id="nested"),
    pytest.param("model: {_target_: os.getcwd}", "it has a key _target_", id="target"),
    pytest.param("model: [{_target_: os.getcwd}]", "it has a key _target_", id="target-in-a-list"),
    pytest.param(BOMB, "line 1: an anchor or alias", id="bomb"),
    pytest.param("a: &a [*a]", "line 1: an anchor or alias", id="circle"),
    pytest.param("a: " + "[" * 100_000, "line 1: nested more than 20 deep", id="deep-list"),
    pytest.param("a: " + "{b: " * 1000, "line 1: nested more than 20 deep", id="deep-mapping"),
    pytest.param("a: !!python/object/apply:os.getcwd []", "a tag, 'tag:yaml.org,2002:python/ob", id="python"),
    pytest.param("a: x\na: y", "duplicate key", id="twice"),
    pytest.param("[1, 2]", "no key: value in it", id="list"),
    pytest.param("3", "no key: value in it", id="number"),
    pytest.param("null", "no key: value in it", id="null"),
    pytest.param("", "no key: value in it", id="empty"),
    pytest.param("a: [", "cannot be read", id="not-yaml"),
    pytest.param("a: b\n---\na: c", "a single document", id="two-documents"),
    pytest.param('a: "\\ud800"', "line 1", id="surrogate"),
    pytest.param("a: '" + "x" * (1 << 20) + "'", "more than 1,048,576 bytes", id="long"),
]


@pytest.mark.parametrize(("text", "words"), FOREIGN)
def test_what_the_trainer_never_writes_is_refused_in_one_line(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_run_config(file)
    assert str(caught.value).startswith(f"{file} cannot be read: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "swordfish" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("  arch: llama\n", "  arch: [llama]\n", id="list-of-architectures"),
        pytest.param("  arch: llama\n", "  arch: null\n", id="no-architecture"),
        pytest.param("seed: 0\n", "seed: {a: 1}\n", id="seed"),
        pytest.param("  args: {}\n", "  args: [1]\n", id="arguments"),
        pytest.param("  schedule: []\n", "  schedule: [3]\n", id="schedule"),
        pytest.param("  args: {}\n", "  args: {1: 2}\n", id="argument-without-a-name"),
        pytest.param("  micro_batch_size: auto\n", "  micro_batch_size: {}\n", id="any"),
        pytest.param("  lr: 0.003\n", "  lr: -1\n", id="out-of-range"),
    ],
)
def test_a_config_of_other_types_is_refused_by_its_file(old: str, new: str, tmp_path: Path) -> None:
    file, text = tmp_path / "config.yaml", load_config([]).to_yaml()
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_run_config(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_utf8_are_refused_in_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"a: caf\xe9\n")
    with pytest.raises(UserError, match=r"config.yaml cannot be read: 'utf-8' codec"):
        load_run_config(tmp_path / "config.yaml")
