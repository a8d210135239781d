"""Is a training step slower than it was? python scripts/bench_revisions.py REV [recipes=bf16,nvfp4] [rounds=9]

The step of ``bench_precision.py parts=step``, of REV, checked out into a temporary directory, and of this checkout as
it stands: two processes that take turns, a step each. Median over rounds, and its ratio and the minimum's, new to old.
Whole processes one after the other would measure what else the machine does. A round takes some 4 s on two idle cores.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.errors import UserError
from whole_runs import check_out

ROOT = Path(__file__).resolve().parents[1]
# Runs in the scripts folder of either tree, on what both have; a line read is a step to take.
WORKER = """
import sys, time
import bench_precision
from bench_precision import distributed, load_config
config = load_config([f"precision={sys.argv[1]}"])
way = bench_precision._step_way(config, distributed.start(config.parallel))
way()
print("ready", flush=True)
for _ in sys.stdin:
    begun = time.perf_counter()
    way()
    print(time.perf_counter() - begun, flush=True)
"""


def main(overrides: list[str], *, recipes: str = "bf16,fp8_delayed,nvfp4", rounds: int = 9) -> None:
    if len(overrides) != 1 or "=" in overrides[0]:
        raise UserError("name one revision to compare with: python scripts/bench_revisions.py REV")
    if rounds < 1:
        raise UserError(f"rounds={rounds}: at least 1")
    with tempfile.TemporaryDirectory(prefix="bench_revisions_") as temporary:
        old = Path(temporary) / "revision"
        check_out(ROOT, overrides[0], old)
        print("| recipe | old ms, median | new | new / old, median | minimum |\n|---|---|---|---|---|")
        for recipe in recipes.split(","):
            before, now = in_turn((old, ROOT), recipe, rounds)
            ratios = f"{median(now) / median(before):.3f} | {min(now) / min(before):.3f}"
            print(f"| {recipe} | {1e3 * median(before):.0f} | {1e3 * median(now):.0f} | {ratios} |", flush=True)


def in_turn(trees: tuple[Path, Path], recipe: str, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a step, of both trees in turn. Raises UserError where a tree does not know the recipe."""
    workers = [_worker(tree, recipe) for tree in trees]
    try:
        for tree, worker in zip(trees, workers, strict=True):
            if _line(worker) != "ready":
                raise UserError(f"{tree}: no step of precision={recipe}")
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for worker, seconds in zip(workers, times, strict=True):
                assert worker.stdin is not None
                print(file=worker.stdin, flush=True)
                seconds.append(float(_line(worker)))
        return times
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def _worker(tree: Path, recipe: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join(str(tree / part) for part in ("src", "scripts"))
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, recipe],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tree,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _line(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


if __name__ == "__main__":
    script_main(main, __doc__)
