"""The trainer as it is on a GPU, on a CPU: torchrun tests/deferred.py OVERRIDES."""

from __future__ import annotations

import runpy
from dataclasses import replace

from narrowgauge.trainer import distributed
from narrowgauge.trainer.distributed import ParallelConfig, World

_start = distributed.start


def start(config: ParallelConfig) -> World:
    """Decide on the device, read a step later."""
    return replace(_start(config), deferred=True)


if __name__ == "__main__":
    distributed.start = start
    runpy.run_module("narrowgauge", run_name="__main__")
