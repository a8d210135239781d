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


# As torchrun ends when it is killed: its main thread, which started the worker, before its others.
ENDING_LAUNCHER = """
import ctypes, platform, subprocess, sys, threading
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
worker.stdout.readline()  # it is ready
threading.Thread(target=lambda: print(worker.communicate()[0], end="", flush=True)).start()
exit_of_a_thread = {"x86_64": 60, "aarch64": 93}[platform.machine()]
ctypes.CDLL(None).syscall(exit_of_a_thread, 0)
"""
STOPPED = """
import time
from narrowgauge.trainer.lifeline import end_with_launcher, lost_launcher
from narrowgauge.trainer.stop import StopRequest
with StopRequest() as stop:
    end_with_launcher()
    print("ready", flush=True)
    deadline = time.monotonic() + 30
    while not stop._code and time.monotonic() < deadline:
        time.sleep(0.01)
    print(lost_launcher(), stop.describe(stop.code), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells nobody elsewhere")
def test_a_launcher_that_ends_is_no_sigterm() -> None:
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
    command = [sys.executable, "-c", ENDING_LAUNCHER, STOPPED]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "False the launcher is gone\n", result.stderr
