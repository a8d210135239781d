"""scripts/same_losses.py: nothing has changed since HEAD, and what has changed is found."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from narrowgauge.trainer.errors import ExitCode, UserError
from whole_runs import check_out

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("same_losses", ROOT / "scripts" / "same_losses.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def history(tmp_path: Path) -> None:
    try:
        check_out(ROOT, "HEAD", tmp_path / "head")
    except UserError as error:
        pytest.skip(f"nothing to compare this checkout with: {error}")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("history")
def test_nothing_has_changed_since_head_but_what_is_planted(
    script: ModuleType,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A change of digits fails here until it is committed: the commit says which, and why."""

    def planted(root: Path, revision: str, place: Path) -> None:
        check_out(root, revision, place)
        file = place / "configs" / "precision" / "fp8_delayed.yaml"
        assert "margin: 0 " in file.read_text()
        file.write_text(file.read_text().replace("margin: 0 ", "margin: 1 "))

    monkeypatch.setattr(script, "check_out", planted)
    data = [f"data.path={corpus}", "data.tokenizer=bytes"]
    assert script.main(["HEAD", *data], short="true", out=str(tmp_path / "out")) is ExitCode.FAILED
    *_, first, second, third, summary = capsys.readouterr().out.splitlines()
    assert first == "| nvfp4, document mask | 1 | same |"
    assert second.startswith("| gpt, fp8_delayed, fp8 states | 1 | train loss at step 2: ")
    assert third == "| mxfp8, accumulation | 2 | same |"
    assert (
        summary
        == f"3 cases against HEAD: 2 same, 1 differ, 0 not compared; the runs that differ are in {tmp_path / 'out'}"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["001-here", "001-revision"]


def test_ends_of_runs_that_are_no_comparison(script: ModuleType, tmp_path: Path) -> None:
    places = [tmp_path / "revision", tmp_path / "here"]
    unknown = (2, "error: unknown key 'a'"), (0, "")
    assert script.judge(unknown, places) == "not compared: error: unknown key 'a'"
    assert script.judge(((0, ""), (1, "ValueError: b")), places) == "exit codes 0 and 1: ValueError: b"
    assert script.judge(((1, "ValueError: c"), (0, "")), places) == "exit codes 1 and 0: ValueError: c"
    assert script.judge(((2, "error: d"), (2, "error: d")), places) == "exit codes 2 and 2: error: d"


def test_every_case_has_a_name_of_its_own(script: ModuleType) -> None:
    cases = [(case.name, case.processes) for case in script.whole()]
    assert len(set(cases)) == len(cases)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ([], {}, "name one revision"),
        (["HEAD", "main"], {}, "name one revision"),
        (["HEAD"], {"short": "yes"}, "short=yes: true or false"),
        (["HEAD"], {"only": "bf61"}, "only=bf61: no case has such a name"),
        (["HEAD"], {"out": str(ROOT)}, "out=.*: not empty"),
        (["HEAD", "data.path=nowhere"], {}, "nowhere/shards/tokenizer is not prepared: python scripts/prepare_data.py"),
    ],
    ids=["no revision", "two revisions", "short", "only", "out", "data"],
)
def test_mistakes_are_one_line(script: ModuleType, arguments: list[str], options: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        script.main(arguments, **options)


def test_a_revision_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(UserError, match="has no git history to take a revision from"):
        check_out(root, "HEAD", tmp_path / "a")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    with pytest.raises(UserError, match="nonesuch: no such revision"):
        check_out(root, "nonesuch", tmp_path / "b")
