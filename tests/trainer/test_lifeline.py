"""What a worker of torchrun says last is the last line on standard error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LINE = "error: it's a = (b), é"
WORKER = f"from narrowgauge.trainer.lifeline import last_words; last_words({LINE!r})"
AGENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
print("the launcher's own lines", file=sys.stderr)
"""


def said(command: list[str], **environment: str) -> list[str]:
    variables = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
    variables |= {"PYTHONIOENCODING": "utf-8"} | environment
    result = subprocess.run(
        [sys.executable, "-c", *command], stderr=subprocess.PIPE, env=variables, encoding="utf-8", check=True
    )
    return result.stderr.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_the_line_comes_after_the_launchers_and_into_its_file(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_ERROR_FILE": str(file)}
    assert said([AGENT, WORKER], **torchrun) == ["the launcher's own lines", LINE]
    assert json.loads(file.read_text())["message"]["message"] == LINE.removeprefix("error: ")


def test_without_torchrun_or_before_a_restart_it_is_said_at_once(tmp_path: Path) -> None:
    assert said([AGENT, WORKER]) == [LINE, "the launcher's own lines"]
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    told = said([AGENT, WORKER], **torchrun, TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_MAX_RESTARTS="1")
    assert told == [LINE, "the launcher's own lines"]
