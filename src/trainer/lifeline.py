"""A worker ends with its launcher. Imports nothing that takes time: called before torch is imported."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

# Taken at once: an orphan's parent is no longer this process. One whose launcher died before this line, some
# milliseconds after its birth, ends because it finds nobody to meet.
PARENT = os.getppid()
_PR_SET_PDEATHSIG = 1
_LINGER_SECONDS = 60
# Says argv[2] on standard error once process argv[1] has ended: gone, or a zombie whose parent reads our output first.
_LINGER = """
import sys, time
for _ in range(int(sys.argv[3]) * 50):
    try:
        with open(f"/proc/{sys.argv[1]}/stat", "rb") as file:
            if file.read().rpartition(b")")[2].split()[0] in b"ZX":
                break
    except OSError:
        break
    time.sleep(0.02)
sys.stderr.buffer.write(sys.argv[2].encode(errors="replace") + b"\\n")
"""


def launched_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def lost_launcher() -> bool:
    """Whether torchrun, which started this process, has ended. Cheap enough to ask at every step."""
    return launched_by_torchrun() and os.getppid() != PARENT


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM when torchrun dies, however it dies.

    torchrun's workers live in sessions of their own, so nothing else would tell them. SIGTERM ends a process that has
    not begun to train; one that trains writes a checkpoint and leaves.
    """
    if launched_by_torchrun():
        end_with_parent()
        if lost_launcher():  # it died before the kernel knew
            os.kill(os.getpid(), signal.SIGTERM)


def end_with_parent() -> None:
    """Have the kernel, if it is Linux, send this process SIGTERM when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def last_words(line: str, *, at_once: bool = False) -> None:
    """Have ``line`` be the last one on standard error; ``at_once``: also now, as torchrun may wait for other workers.

    After a worker's failure torchrun prints some forty lines of its own. The line goes into them, by the file that
    torchrun reads for it, and a small process says it again once torchrun has ended, unless workers are restarted.
    """
    file, agent = os.environ.get("TORCHELASTIC_ERROR_FILE"), Path(f"/proc/{PARENT}/stat")
    later = False  # whether it is said again
    if launched_by_torchrun() and file and not lost_launcher() and agent.exists():
        message = {"message": line.removeprefix("error: "), "extraInfo": {"timestamp": int(time.time())}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")
        later = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if at_once or not later:
        print(line, file=sys.stderr, flush=True)
    if later:
        command = [sys.executable, "-I", "-S", "-c", _LINGER, str(PARENT), line, str(_LINGER_SECONDS)]
        try:
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        except OSError:
            print(line, file=sys.stderr, flush=True)


def launcher_pid() -> int:
    """The process that ends this run when it is killed: torchrun, or this process itself."""
    return PARENT if launched_by_torchrun() else os.getpid()
