"""Does a killed run end like one left alone? python scripts/verify_resume.py [overrides ...]

[processes=2] [kills=2] [target=all|launcher|worker] [random_seed=0]

Trains the config twice, once left alone and once SIGKILLed at random steps and started again with the same command,
and compares every step's loss, every validation and all final weights and moments, bit for bit.
target is who is killed: all processes, the launcher alone, or one worker. random_seed draws other kill points;
run.dir is where both runs go (default: a temporary directory, removed if they are equal).
"""

import random
import shutil
import tempfile
from pathlib import Path

from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.errors import ExitCode, UserError
from whole_runs import KILL_TARGETS, compare_runs, run_killed, run_to_end


def main(
    overrides: list[str], *, processes: int = 2, kills: int = 2, target: str = "all", random_seed: int = 0
) -> ExitCode:
    if target not in KILL_TARGETS:
        raise UserError(f"target={target}: one of {', '.join(KILL_TARGETS)}")
    config = load_config(overrides)
    named = any(override.startswith("run.dir=") for override in overrides)
    root = Path(config.run.dir) if named else Path(tempfile.mkdtemp(prefix="verify_resume_"))
    overrides = [override for override in overrides if not override.startswith("run.dir=")]
    alone, killed = root / "alone", root / "killed"
    for directory in (alone, killed):
        if directory.exists():
            raise UserError(f"{directory} exists: choose another run.dir")
    run_to_end([*overrides, f"run.dir={alone}"], processes)
    points = sorted(random.Random(random_seed).sample(range(1, config.train.steps), min(kills, config.train.steps - 1)))
    print(f"killing {target} at steps {', '.join(map(str, points))}")
    for point in points:
        run_killed([*overrides, f"run.dir={killed}"], processes, point, target)
    run_to_end([*overrides, f"run.dir={killed}"], processes)
    problems = compare_runs(alone, killed)
    for problem in problems:
        print(f"differs: {problem}")
    if problems:
        print(f"the two runs are in {root}")
        return ExitCode.FAILED
    print(f"equal, bit for bit: {config.train.steps} losses, every validation, all weights and moments")
    if not named:
        shutil.rmtree(root)
    return ExitCode.FINISHED


if __name__ == "__main__":
    script_main(main, __doc__)
