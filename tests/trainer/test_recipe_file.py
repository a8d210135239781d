"""A user's own recipe file: a recipe in every respect, which runs only where the command line names it."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import train_here
from narrowgauge.precision import available, load
from narrowgauge.precision.recipe import Keep
from narrowgauge.trainer import distributed
from narrowgauge.trainer.checkpoint import list_checkpoints
from narrowgauge.trainer.cli import recipe_files_of, run_dir_of
from narrowgauge.trainer.config import TrainConfig, load_run_config
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.tools.evaluation import open_run
from narrowgauge.trainer.tools.export import export_run
from narrowgauge.trainer.tools.restore import restore_run
from whole_runs import compare_runs

Tiny = Callable[..., TrainConfig]

MINE = """
from torch import nn
from pathlib import Path
from narrowgauge.precision.formats import exmy
from narrowgauge.precision.linear import quantized
from narrowgauge.precision.recipe import BLOCK_LINEARS, Recipe, Rule
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding

Path(__file__).with_suffix(".ran").touch()

def recipe(*, mantissa: int = 4, random: bool = True) -> Recipe:
    operand = OperandSpec(format=exmy(3, mantissa), rounding=Rounding.STOCHASTIC if random else Rounding.NEAREST)
    gemm = GemmSpec(a=operand, b=operand)
    spec = LinearSpec(fprop=gemm, dgrad=gemm, wgrad=gemm)
    return Recipe(rules=(Rule(kind=nn.Linear, path=BLOCK_LINEARS, make=quantized(spec)),))
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "own" / "my_recipe.py"
    file.parent.mkdir()
    file.write_text(MINE)
    return file


def ran(file: Path) -> bool:
    """Whether the file was run since this was last asked."""
    trace = file.with_suffix(".ran")
    found = trace.exists()
    trace.unlink(missing_ok=True)
    for name in [name for name in sys.modules if name.startswith("narrowgauge_recipe_")]:
        del sys.modules[name]
    from narrowgauge.precision import loading as registry

    registry._MODULES.clear()
    return found


def test_it_is_a_recipe_in_every_respect(tiny: Tiny, mine: Path, tmp_path: Path) -> None:
    options = (f"precision.recipe={mine}", "precision.args.mantissa=3", "probe.every=2", "checkpoint.keep_last=9")
    config = tiny(*options, "precision.schedule=[{steps:[0,2],gemms:[fprop]}]", "train.steps=4")
    assert config.precision.name == "my_recipe"
    assert train_here(config) is ExitCode.FINISHED
    root = Path(config.run.dir)
    plan = (root / "plan.txt").read_text()
    assert "e3m3_ieee/tensor" in plan
    assert "schedule: steps 0 to 1: fprop in high precision" in plan
    assert plan.splitlines()[-1].startswith("quantized: ")
    assert (root / "recipe.py").read_text() == MINE
    assert '"format": "e3m3_ieee/' in (root / "metrics.jsonl").read_text()
    shutil.copytree(root, tmp_path / "alone")
    for path in list_checkpoints(root / "checkpoints")[-1:]:
        shutil.rmtree(path)
    (root / "done.json").unlink()
    assert train_here(config) is ExitCode.FINISHED
    assert compare_runs(tmp_path / "alone", root) == []


def test_its_content_counts_not_its_place(tiny: Tiny, mine: Path, tmp_path: Path) -> None:
    config = tiny(f"precision.recipe={mine}", "train.steps=2")
    train_here(config)
    moved = tmp_path / "elsewhere.py"
    mine.rename(moved)
    longer = ("train.steps=4", "precision.name=my_recipe")
    assert train_here(tiny(f"precision.recipe={moved}", *longer)) is ExitCode.FINISHED
    moved.write_text(MINE + "# another\n")
    again = (f"precision.recipe={moved}", "train.steps=6", "precision.name=my_recipe")
    with pytest.raises(
        UserError, match=r"another precision\.recipe, the recipe file has changed: .*resume\.recipe_change=allow"
    ):
        train_here(tiny(*again))
    assert train_here(tiny(*again, "resume.recipe_change=allow")) is ExitCode.FINISHED
    root = Path(config.run.dir)
    assert (root / "recipe.py").read_text() == MINE + "# another\n"
    (before,) = root.glob("recipe-*.py")
    assert before.read_text() == MINE


def test_it_runs_only_where_the_command_line_names_it(tiny: Tiny, mine: Path, tmp_path: Path) -> None:
    config = tiny(f"precision.recipe={mine}", "train.steps=2")
    train_here(config)
    root = Path(config.run.dir)
    refused = r"which is Python and runs only if the command line names it.*recipe\.py"
    ran(mine)
    with pytest.raises(UserError, match=rf"names the recipe file {mine} \(sha256 [0-9a-f]{{64}}\): it is Python"):
        load_run_config(root / "config.yaml")
    for use in (restore_run, open_run):
        with pytest.raises(UserError, match=refused):
            use(root)
        distributed.finish()
    with pytest.raises(UserError, match=refused):
        export_run(root, tmp_path / "folded", folded=True)
    export_run(root, tmp_path / "hf")  # weights alone
    with pytest.raises(UserError, match=r"my_recipe.py \(sha256 .*: it is Python, and runs only if"):
        train_here(tiny("train.steps=2"))
    assert not ran(mine)
    arguments = [f"run.dir={root}", f"precision.recipe={root / 'recipe.py'}"]
    try:
        run = restore_run(run_dir_of(arguments), recipe_files_of(arguments))
        assert run.config.precision.recipe == str(root / "recipe.py")
    finally:
        distributed.finish()


def test_wherever_a_config_names_it(tiny: Tiny, mine: Path, tmp_path: Path) -> None:
    """As base of another recipe, and in a schedule; a yaml of a group is no command line."""
    inside = (f"precision.args.base={mine}", f"precision.schedule=[{{steps:[0,1],recipe:{mine}}}]")
    for key, name in zip(inside, ("args", "schedule"), strict=True):
        config = tiny("precision=smooth_swiglu" if name == "args" else "precision=mxfp8", key)
        assert ran(mine)
        file = tmp_path / "config.yaml"
        file.write_text(config.to_yaml())
        with pytest.raises(UserError, match=rf"precision\.{name} names the recipe file .*names it in precision.{name}"):
            load_run_config(file)
        assert not ran(mine)
        assert load_run_config(file, {str(mine)}) == config
        assert load_run_config(file, None) == config


KEEPING = """
from collections.abc import Sequence
from torch import nn
from narrowgauge.precision.formats import E4M3
from narrowgauge.precision.linear import quantized
from narrowgauge.precision.recipe import BLOCK_LINEARS, Keep, Recipe, Rule, keep
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec

GEMM = GemmSpec(a=OperandSpec(format=E4M3), b=OperandSpec(format=E4M3))
MAKE = quantized(LinearSpec(fprop=GEMM, dgrad=GEMM, wgrad=GEMM))
"""
THREE = """
def recipe(*, keep_first: float = 0, keep_last: float = 1, keep_paths: Sequence[str] = ()) -> Recipe:
    kept = keep(first=keep_first, last=keep_last, paths=keep_paths)
    return Recipe(rules=(Rule(kind=nn.Linear, path=BLOCK_LINEARS, make=MAKE, keep=kept),))
"""
ONE = """
def recipe(*, keep: tuple[Keep, ...] = (Keep(last=1), Keep(kind=nn.Bilinear))) -> Recipe:
    return Recipe(rules=(Rule(kind=nn.Linear, path=BLOCK_LINEARS, make=MAKE, keep=keep[:-1]),))
"""


@pytest.mark.parametrize("text", [THREE, ONE], ids=["three arguments", "one"])
def test_what_stays_in_high_precision_is_one_argument_or_three(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keeping.py"
    file.write_text(KEEPING + text)

    def kept(**args: object) -> tuple[Keep, ...]:
        (rule,) = load(str(file), args).rules
        return rule.keep

    assert kept() == (Keep(last=1),)
    assert kept(keep_last=0, keep_first=0.5) == (Keep(first=0.5),)
    assert kept(keep_paths=["a", "b"]) == (Keep(last=1), Keep(path="a"), Keep(path="b"))
    with pytest.raises(ValueError, match=r"no argument 'keep_frist' .*; it takes: keep_first, keep_last, keep_paths$"):
        kept(keep_frist=1)
    with pytest.raises(ValueError, match=r"keep_last=1\.5: a number of blocks"):
        kept(keep_last=1.5)
    with pytest.raises(ValueError, match=r"keep_paths='a' is no Sequence\[str\]"):
        kept(keep_paths="a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def recipe(:", r"mine\.py:1: SyntaxError"),
        ("import nothing_of_the_kind", r"mine\.py:1: ModuleNotFoundError: No module named"),
        ("x = 1\n\n1 / 0", r"mine\.py:3: ZeroDivisionError"),
        ("x = 1", r"mine\.py: it has no function recipe"),
        ("def recipe():\n    return 3", r"mine\.py: its function gives a int, no Recipe"),
        ("def recipe():\n    return [][1]", r"mine\.py:2: IndexError"),
        ("def recipe(**more):\n    pass", r"mine\.py:1: its signature is the schema.*'more'"),
        ("def recipe(*, a: Unknown = 1):\n    pass", r"mine\.py:1: NameError"),
        ("def recipe(*, other: int = 1):\n    pass", r"has no argument 'margin'; it takes: other"),
        ("raise SystemExit(3)", r"mine\.py:1: SystemExit: 3"),
        (None, r"recipe file .*mine\.py: No such file"),
    ],
    ids=[
        *("syntax", "import", "raises", "none", "no_recipe", "call", "loose", "hint", "argument", "exit", "missing"),
    ],
)
def test_its_errors_are_one_line(tiny: Tiny, tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    extra = ["precision.args.margin=1"] if "other" in (text or "") else []
    with pytest.raises(UserError, match=message) as caught:
        tiny(f"precision.recipe={file}", *extra)
    assert "\n" not in str(caught.value)


def test_installed_packages_bring_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_a_package.py").write_text(MINE)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    points = "theirs = of_a_package\ntheirs_too = of_a_package:recipe\nbroken = not_there_at_all\n"
    (info / "entry_points.txt").write_text(f"[narrowgauge.recipes]\n{points}")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert {"theirs", "theirs_too", "mxfp8"} <= set(available())
    assert load("theirs", {"mantissa": 2}).rules
    assert load("theirs_too").rules
    with pytest.raises(ValueError, match=r"recipe 'broken' of not_there_at_all: ModuleNotFoundError"):
        load("broken")
    with pytest.raises(ValueError, match=r"no recipe named 'thiers' \(did you mean 'theirs'"):
        load("thiers")
