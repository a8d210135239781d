"""The command line of a run, as a sweep starts it."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def command(
    overrides: Sequence[str], processes: int, *, max_restarts: int = 0, module: str = "narrowgauge"
) -> list[str]:
    """The command line of a run: plain Python for one process, torchrun for more, or where it is to restart workers."""
    if processes == 1 and not max_restarts:
        return [sys.executable, "-m", module, *overrides]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher += ["--max-restarts", str(max_restarts)] if max_restarts else []
    return [*launcher, "-m", module, *overrides]
