"""Configs of the user's own: groups beside ours, experiments, whole files; settings and command lines read back."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.entry import _require_own_directory, main
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.own import CONFIG_DIR, setting, shell, split
from narrowgauge.trainer.sweep.launch import sweep

MODEL = "defaults: [llama_tiny, _self_]\nname: mine\nnum_layers: 3\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a directory of own configs, ``my``."""
    monkeypatch.chdir(tmp_path)
    write("my/model/mine.yaml", MODEL)
    write("my/precision/rowwise.yaml", "defaults: [fp8_rowwise, _self_]\nname: rowwise\nargs: {keep_last: 1}\n")
    write("my/experiment/both.yaml", "defaults: [override /model: mine]\ntrain: {steps: 7}\n")
    write("my/sweep/grid.yaml", "fixed: [train.steps=4]\ngrid: ['seed=0,1']\n")
    return tmp_path


def write(path: str, text: str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
    return Path(path)


def complaint(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("place")
def test_groups_of_ones_own_are_found_beside_ours() -> None:
    config = load_config(["--config-dir=my", "model=mine", "precision=rowwise", "optim.lr=1e-2"])
    assert (config.model.name, config.model.num_layers, config.model.hidden_size) == ("mine", 3, 256)
    assert (config.precision.recipe, config.precision.args["keep_last"], config.optim.lr) == ("fp8_rowwise", 1, 1e-2)
    assert load_config(["--config-dir", "my", "model=gpt2_tiny"]).model.name == "gpt2_tiny"


@pytest.mark.usefixtures("place")
def test_ones_own_file_comes_before_ours_of_the_same_name() -> None:
    write("my/optim/adamw.yaml", (CONFIG_DIR / "optim" / "adamw.yaml").read_text().replace("lr: 3e-3", "lr: 5e-3"))
    assert load_config(["--config-dir=my"]).optim.lr == 5e-3
    assert load_config([]).optim.lr == 3e-3


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("written", ["experiment=both", "+experiment=both"], ids=["plain", "added"])
def test_an_experiment_sets_any_keys_and_the_command_line_overrules_it(written: str) -> None:
    config = load_config(["--config-dir=my", written, "seed=3"])
    assert (config.model.name, config.train.steps, config.seed) == ("mine", 7, 3)
    assert load_config(["--config-dir=my", written, "train.steps=8"]).train.steps == 8


def test_the_experiment_that_comes_along_composes() -> None:
    for name in sorted(file.stem for file in (CONFIG_DIR / "experiment").glob("*.yaml")):
        assert load_config([f"+experiment={name}"]) != load_config([])


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    "flags",
    [["whole.yaml"], ["--config-name=whole.yaml"], ["--config", "whole"], ["-cn", "whole"], ["--config-name=./whole"]],
    ids=["file", "name", "two-words", "short", "without-its-ending"],
)
def test_a_whole_file_by_its_path(flags: list[str]) -> None:
    write("whole.yaml", "model: gpt2_tiny\ntrain: {steps: 9}\noptim: {lr: 0.5}\n")
    config = load_config([*flags, "optim.lr=0.25"])
    assert (config.model.name, config.train.steps, config.optim.lr) == ("gpt2_tiny", 9, 0.25)


@pytest.mark.usefixtures("place")
def test_a_copy_of_the_entry_config_and_a_file_with_defaults() -> None:
    text = (CONFIG_DIR / "train.yaml").read_text()
    write("copy.yaml", text.replace("steps: 600", "steps: 11"))
    assert load_config(["copy.yaml"]).train.steps == 11
    write("over.yaml", "defaults: [model: mine, precision: nvfp4]\nseed: 4\n")
    config = load_config(["--config-dir=my", "over.yaml"])
    assert (config.model.name, config.precision.name, config.seed) == ("mine", "nvfp4", 4)


@pytest.mark.usefixtures("place")
def test_a_runs_own_config_starts_another_run() -> None:
    told = ["model=gpt2_tiny", "precision=nvfp4", "train.steps=5", "run.dir=runs/a", "sample.prompt=cost \\${x}"]
    first = load_config(told)
    write("runs/a/config.yaml", first.to_yaml())
    assert load_config(["runs/a/config.yaml"]) == first
    second = load_config(["runs/a/config.yaml", "run.dir=runs/b", "precision=mxfp8", "model=llama_tiny", "seed=1"])
    assert (second.model.arch, second.precision.recipe, second.run.dir) == ("llama", "mxfp8", "runs/b")
    assert (second.train.steps, second.sample.prompt, second.seed) == (5, "cost ${x}", 1)
    assert second.precision == load_config(["precision=mxfp8"]).precision


@pytest.mark.usefixtures("place")
def test_a_runs_own_config_does_not_end_in_its_directory_unasked(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    write("runs/a/config.yaml", load_config(["run.dir=runs/a"]).to_yaml())
    write("runs/a/metrics.jsonl", "")
    monkeypatch.setattr(sys, "argv", ["trainer", "runs/a/config.yaml"])
    assert main() == ExitCode.BAD_INPUT
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "runs/a/config.yaml has run.dir=runs/a, which holds a run: run.dir=... says where" in told


@pytest.mark.usefixtures("place")
def test_the_same_command_with_ones_own_file_goes_on() -> None:
    write("runs/a/metrics.jsonl", "")
    _require_own_directory(split([str(write("mine.yaml", "run: {dir: runs/a}\n"))])[0], [], "runs/a")
    _require_own_directory(split([str(write("runs/a/config.yaml", "seed: 1\n"))])[0], ["run.dir=runs/a"], "runs/a")


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("path", "text", "arguments", "words"),
    [
        ("my/model/bad.yaml", MODEL + "hiden_size: 3\n", ["model=bad"], "my/model/bad.yaml: unknown key 'hiden_size'"),
        ("my/model/bad.yaml", MODEL + "hiden_size: 3\n", ["model=bad"], "did you mean 'hidden_size'"),
        ("my/experiment/bad.yaml", "trian: {steps: 3}\n", ["+experiment=bad"], "unknown key 'trian.steps' (did you"),
        ("my/precision/bad.yaml", "name: bad\nrecipy: x\n", ["precision=bad"], "unknown key 'recipy' (did you"),
        ("bad.yaml", "train: {stepz: 3}\n", ["bad.yaml"], "bad.yaml: unknown key 'train.stepz' (did you"),
        ("bad.yaml", "a: [", ["bad.yaml"], "bad.yaml cannot be read"),
        ("bad.yaml", "[1]", ["bad.yaml"], "bad.yaml cannot be read: no key: value in it"),
        ("bad.yaml", "defaults: 3\n", ["bad.yaml"], "bad.yaml: defaults must be a list"),
        ("bad.yaml", "optim: {_target_: os.getcwd}\n", ["bad.yaml"], "bad.yaml cannot be read: it has a key _target_"),
        ("my/model/bad.yaml", MODEL + "init_from: {_target_: os.getcwd}\n", ["model=bad"], "it has a key _target_"),
        ("my/experiment/bad.yaml", "log: {trackers: [{_target_: x}]}\n", ["experiment=bad"], "it has a key _target_"),
    ],
    ids=[
        "model", "nearest", "experiment", "precision", "file", "no-yaml", "no-mapping", "defaults", "target-in-a-file",
        "target-in-a-model", "target-in-an-experiment",
    ],
)  # fmt: skip
def test_a_mistake_in_ones_own_file_is_one_line_with_its_path(
    path: str, text: str, arguments: list[str], words: str
) -> None:
    write(path, text)
    assert words in complaint("--config-dir=my", *arguments)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config-dir=nowhere"], "--config-dir=nowhere: no such directory"),
        (["--config-dir"], "--config-dir needs a path"),
        (["nothing.yaml"], "nothing.yaml: no such file"),
        (["--config-dir=my", "--config-name=nothing"], "nothing: no such file, and my has no nothing.yaml"),
        (["--config-dir=my", "model=mien"], "model=mien: no such model config (did you mean 'mine'"),
        (["--config-dir=my", "experiment=boht"], "experiment=boht: no such experiment config (did you mean 'both'"),
    ],
    ids=["directory", "no-directory", "file", "name", "choice", "experiment"],
)
def test_what_is_not_there_is_named(arguments: list[str], words: str) -> None:
    assert words in complaint(*arguments)


@pytest.mark.usefixtures("place")
def test_a_sweep_hands_the_flags_to_its_jobs(capsys) -> None:
    grid = ["model=mine,gpt2_tiny", "+experiment=both", "hydra.launcher.dry_run=true"]
    assert sweep(["--config-dir=my", *grid]) == ExitCode.FINISHED
    assert sweep(["--config-dir=my", "sweep=grid", "hydra.launcher.dry_run=true"]) == ExitCode.FINISHED
    lines = [shlex.split(line)[3:] for line in capsys.readouterr().out.splitlines() if "-m narrowgauge" in line]
    configs = [load_config(line) for line in lines]
    assert [(one.model.name, one.train.steps, one.seed) for one in configs] == [
        ("mine", 7, 0), ("gpt2_tiny", 7, 0), ("llama_tiny", 4, 0), ("llama_tiny", 4, 1),
    ]  # fmt: skip
    assert [one.run.dir for one in configs[::2]] == ["multirun/sweep/model=mine", "multirun/grid/seed=0"]


@pytest.mark.usefixtures("place")
def test_no_launcher_of_the_users_is_executed() -> None:
    write("my/hydra/launcher/mine.yaml", "_target_: os.system\n")
    with pytest.raises(UserError, match="it has a key _target_"):
        sweep(["--config-dir=my", "hydra/launcher=mine", "seed=0,1"])
    with pytest.raises(UserError, match="never executes"):
        sweep(["hydra.launcher._target_=os.system", "seed=0,1"])


def test_flags_stand_anywhere(tmp_path: Path) -> None:
    write(str(tmp_path / "a.yaml"), "seed: 1\n")
    place, rest = split(["x=1", f"--config-dir={tmp_path}", "y=2", "-cn", "a", "--multirun"])
    assert (place.directory, place.file, rest) == (tmp_path, tmp_path / "a.yaml", ["x=1", "y=2", "--multirun"])
    assert split(place.flags)[0] == place


ODD = [
    pytest.param("it's", id="apostrophe"),
    pytest.param("a=b,c", id="equals-and-comma"),
    pytest.param("$HOME ${x} \\${y} \\\\${z}", id="dollar"),
    pytest.param("back\\", id="backslash-at-the-end"),
    pytest.param("\\' \\\\' \"q\" `x` !", id="quotes"),
    pytest.param("(x) [a] {b:c} #d ~e", id="brackets"),
    pytest.param(" é 東 ", id="unicode-and-spaces"),
    pytest.param("null", id="null"),
    pytest.param("2026_11_26", id="number"),
]


@pytest.mark.parametrize("text", ODD)
def test_every_text_is_a_setting_that_is_read_back(text: str) -> None:
    told = [setting("run.dir", text), setting("sample.prompt", text)]
    for arguments in (told, shlex.split(shell(told))):
        config = load_config(arguments)
        assert (config.run.dir, config.sample.prompt) == (text, text)


def test_other_values_are_settings_too() -> None:
    sources = {"a": {"path": "it's", "weight": 2.0}, "b": {"path": "x"}}
    config = load_config(["data=mix", setting("data.sources", sources), setting("log.trackers", ["wandb"])])
    assert {name: (one.path, one.weight) for name, one in config.data.sources.items()} == {
        "a": ("it's", 2.0), "b": ("x", 1.0),
    }  # fmt: skip
    assert config.log.trackers == ["wandb"]
    assert load_config([setting("eval.sharpness", 0), setting("probe.layers", None)]).probe.layers is None


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("path", "text"),
    [
        pytest.param("cb.yaml", "hydra: {searchpath: ['file:///elsewhere']}\n", id="search-path"),
        pytest.param("cb.yaml", "hydra: {callbacks: {x: {a: 1}}}\n", id="callbacks"),
        pytest.param("cb.yaml", "hydra: {job_logging: {handlers: {x: {'()': os.getcwd}}}}\n", id="logging"),
        pytest.param("cb.yaml", "# @package hydra\nsearchpath: ['file:///elsewhere']\n", id="package"),
        pytest.param("my/model/cb.yaml", "# @package hydra.callbacks\nx: {a: 1}\n", id="package-of-a-group"),
        pytest.param("my/hydra/callbacks/cb.yaml", "x: {a: 1}\n", id="group"),
    ],
)
def test_no_config_finds_or_executes_code(path: str, text: str) -> None:
    write(path, text)
    by_file = {"cb.yaml": ["cb.yaml"], "my/model/cb.yaml": ["--config-dir=my", "model=cb"]}
    arguments = by_file.get(path, ["--config-dir=my", "hydra/callbacks=cb"])
    assert "hydra" in complaint(*arguments).lower()
    with pytest.raises(UserError):
        sweep([*arguments, "seed=0,1", "data.tokenizer=bytes", "hydra.launcher.dry_run=true"])


@pytest.mark.usefixtures("place")
def test_a_search_path_is_no_override() -> None:
    assert "--config-dir" in complaint("hydra.searchpath=[file:///elsewhere]")
    with pytest.raises(UserError, match="--config-dir"):
        sweep(["hydra.searchpath=[file:///elsewhere]", "seed=0,1"])


@pytest.mark.usefixtures("place")
def test_a_grid_runs_no_recipe_file_that_the_command_line_does_not_name() -> None:
    file = write("mine.py", "open('ran', 'w').close()\nfrom precision.recipes.mxfp8 import recipe\n").resolve()
    write("my/sweep/evil.yaml", f"grid: ['precision.recipe={file}', 'seed=0,1']\n")
    with pytest.raises(UserError, match=rf"recipe file {file} \(sha256 .*only if"):
        sweep(["--config-dir=my", "sweep=evil", "hydra.launcher.dry_run=true"])
    assert not Path("ran").exists()
    write("my/sweep/evil.yaml", "grid: 3\n")
    with pytest.raises(UserError, match="fixed and grid are lists"):
        sweep(["--config-dir=my", "sweep=evil"])


@pytest.mark.usefixtures("place")
def test_a_source_takes_all_its_keys_from_a_users_yaml() -> None:
    source = "{path: x.jsonl, weight: 1, field: content, subset: en}"
    write("my/data/mine.yaml", f"defaults: [mix, _self_]\nsources: {{a: {source}}}\n")
    sources = load_config(["--config-dir=my", "data=mine"]).data.sources
    assert sources is not None
    assert (sources["a"].field, sources["a"].subset) == ("content", "en")
