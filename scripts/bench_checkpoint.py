"""What a checkpoint costs a training step: python scripts/bench_checkpoint.py [rounds=9]

The shape of bench_train.py. A round is four steps: one plain, one after an asynchronous save began, and the two that
run while it is still being written. Prints medians: what ``save`` itself blocks, and how much the steps beside the
write take longer, both as shares of a plain step.
"""

import statistics
import tempfile
import time
from pathlib import Path

from bench_train import our_training
from narrowgauge.trainer import distributed
from narrowgauge.trainer.checkpointer import CheckpointConfig, Checkpointer
from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.errors import UserError


def main(overrides: list[str], *, rounds: int = 9) -> None:
    if overrides:
        raise UserError(f"unknown argument {overrides[0]!r}; --help shows the ones there are")
    step, state, world = our_training()
    plain, blocked, beside = [], [], []

    def timed(number: int) -> float:
        started = time.perf_counter()
        step(number)
        state.step += 1
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_") as scratch:
        checkpointer = Checkpointer(CheckpointConfig(keep_last=1), Path(scratch), world, {})
        for number in range(2):
            timed(number)
        for number in range(rounds):
            plain.append(timed(number))
            started = time.perf_counter()
            checkpointer.save(state)
            blocked.append(time.perf_counter() - started)
            beside.append(sum(timed(number) for _ in range(3)))
            checkpointer.wait()
        checkpointer.close()
    usual, stall, more = (statistics.median(values) for values in (plain, blocked, beside))
    print(f"a plain step {usual:.3f} s; {rounds} rounds, medians")
    print(f"save blocks {stall * 1e3:.0f} ms: {stall / usual:.1%} of a step")
    print(f"the three steps beside the write take {more / (3 * usual) - 1:+.1%}: {more - 3 * usual:+.3f} s in all")
    distributed.finish()


if __name__ == "__main__":
    script_main(main, __doc__)
