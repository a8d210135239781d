"""Do runs end right whatever is done to them? python scripts/attack.py

[parts=damage,servers,disks,kills] [kills=5] [configs=20] [random_seed=0] [budget=3600] [out=DIR] [sample=0]

Attacks small runs and prints one table: how many attacks of each kind, how many ended right, seconds. out/attack.json
holds every attack and its end. Exit code 0 only if all of them ended right; those that did not are listed one a line,
with the directory that was kept. What ``budget`` seconds did not reach is listed, and is not right.

kills      20 configurations (recipes, states, kinds of data, one process and several), each killed ``kills`` times at
           random moments (at the start, in a step, in a checkpoint) by every signal and target, restarts of torchrun
           among them, then run to the end: every digit is that of the run left alone
damage     every file of a checkpoint and of a run directory damaged or forged in every way: the digits of the run left
           alone from a checkpoint that is whole, or one line; no code of a file is run, nothing is lost
servers    text from web servers that misbehave: the same text as on disk, or one line, in bounded time
disks      system calls that fail, always or once: the same digits, or one line and then the same digits

configs is a number (the first ones) or parts of names, separated by ";". random_seed draws other kills, moments and
samples. sample: so many attacks of each part but kills, spread over it; 0 is all. out: a new directory (default: a
temporary one, removed where all is right).
"""

import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from attack_suite import attacks, damage, disks, servers
from attack_suite import kills as killing
from attack_suite.scene import Scene
from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.rundir import revision

PARTS = ("damage", "servers", "disks", "kills")  # the short ones first


def main(
    overrides: list[str],
    *,
    parts: str = ",".join(PARTS),
    kills: int = 5,
    configs: str = "20",
    random_seed: int = 0,
    budget: float = 3600.0,
    out: str = "",
    sample: int = 0,
) -> ExitCode:
    if overrides:
        raise UserError(f"unknown argument {overrides[0]!r}; --help shows the ones there are")
    begun = time.monotonic()
    wanted = parts.split(",")
    if unknown := [part for part in wanted if part not in PARTS]:
        raise UserError(f"parts={unknown[0]}: of {', '.join(PARTS)}")
    if kills < 1 or kills > 20 or sample < 0:
        raise UserError(f"kills={kills}, sample={sample}: 1 to 20 kills, and a sample of at least 0")
    folder = Path(out) if out else Path(tempfile.mkdtemp(prefix="attack_"))
    if out and folder.exists() and any(folder.iterdir()):
        raise UserError(f"out={out} is not empty: choose another directory")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # as many in every process: it is part of a sum's order
    scene = Scene(folder.resolve(), random_seed)
    planned = plan(scene, wanted, kills, configs, sample)
    about = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": shlex.join(sys.argv),
        "revision": revision(),
        "torch": str(torch.__version__),
        "cores": os.cpu_count(),
        "random_seed": random_seed,
    }
    scene.prepare()
    file = folder / "attack.json"
    results = attacks.carry_out(planned, begun + budget, lambda done: attacks.write_results(file, about, done))
    wrong = [result for result in results if result.problems]
    for result in wrong:
        print(attacks.line_of(result))
    print(attacks.table(results))
    if wrong:
        print(f"{len(wrong)} attacks did not end right, or were not reached; all are in {file}")
        return ExitCode.FAILED
    if not out:
        shutil.rmtree(folder)
    return ExitCode.FINISHED


def plan(scene: Scene, wanted: list[str], number: int, configs: str, sample: int) -> list[attacks.Attack]:
    """The attacks of the parts that are wanted; of each but the kills, ``sample`` and what these need."""
    planned = []
    for part in dict.fromkeys(wanted):
        if part == "kills":
            planned += killing.plan(scene, number, configs)
            continue
        of_part = {"damage": damage, "servers": servers, "disks": disks}[part].plan(scene)
        needed = [attack for attack in of_part if attack.group == attacks.NEEDED]
        others = [attack for attack in of_part if attack.group != attacks.NEEDED]
        planned += [*needed, *attacks.spread(others, sample)]
    return planned


if __name__ == "__main__":
    script_main(main, __doc__)
