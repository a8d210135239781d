"""What a process is started with, good and bad: a launcher's variables, consoles, arguments."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_overrides
from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.entry import main
from narrowgauge.trainer.environ import check_environment, forgive_console
from narrowgauge.trainer.errors import ExitCode, UserError

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
WHOLE |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"MASTER_ADDR": "x", "MASTER_PORT": "1"}, id="an-address-alone"),
        pytest.param({"LOCAL_WORLD_SIZE": "4"}, id="a-share-of-the-cores"),
        pytest.param(WHOLE, id="torchrun"),
        pytest.param({name: WHOLE[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}, id="least"),
    ],
)
def test_an_environment_that_can_be(variables: dict[str, str]) -> None:
    check_environment(variables)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        pytest.param({"RANK": "0"}, "has RANK=0, but no WORLD_SIZE, no MASTER_ADDR, no MASTER_PORT", id="rank"),
        pytest.param({"WORLD_SIZE": "0"}, "has WORLD_SIZE=0, but no RANK,", id="world-size"),
        pytest.param({"LOCAL_RANK": "3"}, "has LOCAL_RANK=3, but no RANK, no WORLD_SIZE,", id="local-rank"),
        pytest.param({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE='x', which is no whole number", id="share"),
        pytest.param({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 cannot be", id="no-share"),
        pytest.param(WHOLE | {"RANK": "x"}, "RANK='x', which is no whole number", id="a-word"),
        pytest.param(WHOLE | {"RANK": ""}, "RANK='', which is no whole number", id="empty"),
        pytest.param(WHOLE | {"RANK": "-1"}, "RANK='-1', which is no whole number", id="negative"),
        pytest.param(WHOLE | {"RANK": "²"}, r"RANK='\xb2', which is no whole number", id="superscript"),
        pytest.param(WHOLE | {"RANK": "9" * 5000}, "which is no whole number", id="long"),
        pytest.param(WHOLE | {"RANK": "4"}, "where RANK=4 cannot be", id="rank-too-large"),
        pytest.param(WHOLE | {"WORLD_SIZE": "0"}, "where RANK=1 cannot be", id="no-world"),
        pytest.param(WHOLE | {"LOCAL_RANK": "2"}, "where LOCAL_RANK=2 cannot be", id="local-rank-too-large"),
        pytest.param(WHOLE | {"LOCAL_WORLD_SIZE": "5"}, "where LOCAL_WORLD_SIZE=5 cannot be", id="more-than-all"),
        pytest.param(WHOLE | {"MASTER_PORT": "65536"}, "where MASTER_PORT=65536 cannot be", id="port"),
    ],
)
def test_an_environment_that_cannot_be_is_one_line(variables: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_environment(variables)
    assert words in str(caught.value)
    assert str(caught.value).endswith("unset them, or start with torchrun, which sets them all")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", ["trainer", "script"])
@pytest.mark.parametrize("rank", ["0", "3", "x"])
def test_a_rank_left_behind_ends_both_entries(
    entry: str, rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["trainer", "train.steps=1"])
    if entry == "trainer":
        assert main() == ExitCode.BAD_INPUT
    else:
        with pytest.raises(SystemExit) as caught:
            script_main(lambda overrides: None, None)
        assert caught.value.code == ExitCode.BAD_INPUT
    told = capsys.readouterr().err
    assert f"error: the environment has RANK={rank}" in told
    assert told.count("\n") == 1


BAD = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("key", ["sample.prompt", "run.dir", "log.project"])
def test_bytes_that_are_no_text_are_refused_by_key(key: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config([f'{key}="{BAD}"'])
    assert str(caught.value).startswith(f"{key}: ")
    assert r"caf\xe9" in str(caught.value)
    str(caught.value).encode()  # can be shown


@pytest.mark.parametrize("argument", ["prompt", "other", "key"])
def test_bytes_that_are_no_text_end_a_script(
    argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(overrides: list[str], *, prompt: str = "") -> None:
        raise AssertionError("not refused")

    monkeypatch.setattr(sys, "argv", ["script", BAD if argument == "key" else f"{argument}={BAD}"])
    with pytest.raises(SystemExit) as caught:
        script_main(script, None)
    assert caught.value.code == ExitCode.BAD_INPUT
    told = capsys.readouterr().err
    assert told.startswith("error: b'caf" if argument == "key" else f"error: {argument}: b'")
    assert told.count("\n") == 1


def test_a_lone_surrogate_of_no_byte_is_refused_too() -> None:
    with pytest.raises(UserError, match=r"sample.prompt: .*ud800.* is not"):
        load_config(["sample.prompt=a\ud800"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_console_replaces_what_it_cannot_show(encoding: str, errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors))
    forgive_console()
    print("é 東 \udce9")
    sys.stdout.flush()
    assert written.getvalue().decode(encoding) == {"ascii": "? ? ?\n", "latin-1": "é ? ?\n"}.get(encoding, "é 東 ?\n")


def test_a_console_of_another_kind_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # pythonw, or a closed descriptor
    forgive_console()


@pytest.mark.parametrize("place", ["src", "scripts"])
def test_no_file_is_of_the_locale(place: str) -> None:
    """Text is read and written as UTF-8, which every call has to say."""
    found = [
        f"{file}:{call.lineno}"
        for file in sorted((Path(__file__).parents[2] / place).rglob("*.py"))
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and _opens_text(call) and "encoding" not in [word.arg for word in call.keywords]
    ]
    assert found == []


def _opens_text(call: ast.Call) -> bool:
    of = call.func.value if isinstance(call.func, ast.Attribute) else None
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
    if name in ("read_text", "write_text"):
        return of is not None  # trainer.files.write_text says it itself
    if name != "open" or (isinstance(of, ast.Name) and of.id in ("os", "tarfile", "gzip")):
        return False
    modes = [*call.args[of is None :], *(word.value for word in call.keywords if word.arg == "mode")]
    if not modes:
        return not call.keywords
    return isinstance(modes[0], ast.Constant) and re.fullmatch("[rwaxt+]+", str(modes[0].value)) is not None


@pytest.mark.slow
def test_a_run_ends_well_on_a_console_that_lacks_most_characters(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny_overrides(corpus, tmp_path / "run", "train.steps=1", "sample.tokens=30", "sample.temperature=9")
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    result = subprocess.run(
        [sys.executable, "-m", "narrowgauge", *overrides],
        capture_output=True,
        env=environment,
        check=False,
        timeout=240,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.isascii()
    assert b"run directory " in result.stdout
    assert (tmp_path / "run" / "sample.txt").read_text(encoding="utf-8").startswith("The")
