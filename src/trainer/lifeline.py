"""A worker ends with its launcher. Imports nothing that takes time: called before torch is imported."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# Taken at once: an orphan's parent is no longer this process. One whose launcher died before this line, some
# milliseconds after its birth, ends because it finds nobody to meet.
PARENT = os.getppid()
_PR_SET_PDEATHSIG = 1


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
