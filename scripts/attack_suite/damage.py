"""Files of a run that are damaged, or forged, in every way: a checkpoint that is whole, or one line.

A run with two checkpoints goes on after one file was changed. It must end with every digit of the run left alone, from
the newest checkpoint that is whole, which it names; or be refused in one line. Never is code run that a file holds,
never does the other checkpoint change, and what was damaged is kept. *Forged* files have checksums that hold: their
figures cannot be told from true ones, but the rest is asked of them too.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import errno
import io
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from narrowgauge.trainer.command import command
from narrowgauge.trainer.config import TrainConfig, load_config
from narrowgauge.trainer.errors import ExitCode, UserError, one_line
from narrowgauge.trainer.run import run
from whole_runs import compare_runs, run_to_end

from attack_suite.attacks import NEEDED, Attack, Child, Ended
from attack_suite.damage_kinds import CHECKSUMS, META, METADATA, NEWEST, OLDER, STEPS, Damage, kinds, marker_of
from attack_suite.scene import Scene

_LIMIT_SECONDS = 90.0
_SETTINGS = (
    *("checkpoint.every=1", "checkpoint.keep_last=9", "checkpoint.asynchronous=false", "eval.every=0"),
    "model.num_layers=1",
)


def prepare(scene: Scene, processes: int) -> None:
    """The run that is damaged, of two checkpoints, and what comes of going on from each of them."""
    place = scene.folder / "damage"
    overrides = _overrides(scene, place / "base", STEPS - 1)
    if processes > 1:
        run_to_end(overrides, processes)
    else:
        _quietly(overrides)
    for name in (OLDER, NEWEST):
        shutil.copytree(place / "base", place / name)
    shutil.rmtree(place / OLDER / "checkpoints" / NEWEST)
    for name in (OLDER, NEWEST):
        code, told = _quietly(_overrides(scene, place / name, STEPS))
        if code:
            raise UserError(f"the run that is to be damaged does not go on by itself: {told}")


def _overrides(scene: Scene, run_dir: Path, steps: int, more: Sequence[str] = ()) -> list[str]:
    return scene.overrides(run_dir, *_SETTINGS, f"train.steps={steps}", *more)


@lru_cache
def _config(overrides: tuple[str, ...]) -> TrainConfig:
    return load_config(overrides)


def _quietly(overrides: Sequence[str]) -> tuple[int, str]:
    """A run in this process: its exit code and what it said, a refusal's line last. Other errors come through."""
    output = io.StringIO()
    *rest, run_dir = overrides
    config = copy.deepcopy(_config((*rest, "run.dir=x")))  # composing one takes longer than the run
    config.run.dir = run_dir.removeprefix("run.dir=")
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = int(run(config))
    except UserError as error:
        return int(ExitCode.BAD_INPUT), f"{output.getvalue()}error: {error}"
    return code, output.getvalue()


def attempt(scene: Scene, processes: int, group: str, name: str) -> Ended:
    """Damage a copy of the run as ``name`` says, go on, and judge."""
    damage = next(one for one in kinds(processes) if (one.group, one.name) == (group, name))
    run_dir = _copy(scene)
    damage.change(run_dir)
    before = _digests(run_dir / "checkpoints")
    problems, note = [], ""
    try:
        code, told = _quietly(_overrides(scene, run_dir, damage.steps, damage.more))
    except BaseException as error:  # as a traceback would show it
        problems.append(f"{type(error).__name__}: {one_line(error)[:200]}")
        code, told = -1, ""
    if code >= 0:
        more, note = _judge(damage, scene, run_dir, code, told)
        problems += more
    if marker_of(run_dir).exists():
        problems.append("CODE OF A FILE WAS RUN")
    problems += _lost(before, _digests(run_dir / "checkpoints"))
    if problems:
        return Ended(problems, note, place=str(run_dir.parent))
    shutil.rmtree(run_dir.parent)
    return Ended([], note)


def _copy(scene: Scene) -> Path:
    place = scene.folder / "damage"
    number = 1
    while (folder := place / f"attack_{number}").exists():
        number += 1
    shutil.copytree(place / "base", folder / "run")
    return folder / "run"


def _judge(damage: Damage, scene: Scene, run_dir: Path, code: int, told: str) -> tuple[list[str], str]:
    """What is wrong with how a start ended, and which of the right ends it was."""
    lines = told.strip().splitlines()
    if code == ExitCode.BAD_INPUT:
        error = told[told.rfind("error: ") :]
        problems = ["more than one line: " + one_line(UserError(error))[:200]] if "\n" in error.strip() else []
        if damage.both and "run.resume=never" not in error:
            problems.append(f"run.resume=never is not named: {error[:200]}")
        return problems, "refused"
    if code:
        return [f"exit code {code}: {lines[-1] if lines else 'no output'}"], ""
    if damage.both:
        return ["started anew though it had checkpoints"], ""
    place = scene.folder / "damage"
    if damage.steps < STEPS:
        differing = compare_runs(place / "base", run_dir, after=damage.steps)
        return differing[:2], "nothing to do"
    started = json.loads((run_dir / "env.json").read_text(encoding="utf-8"))["started_at_step"]
    if started not in (1, 2):
        return [f"started at step {started} though it had checkpoints"], ""
    of_newest = NEWEST not in told
    problems = []
    if of_newest and damage.strict:
        problems.append("what cannot be trusted was used")
    elif of_newest and started == 1:
        problems += [] if damage.forged else ["the checkpoint that was passed over is not named"]
    if not (of_newest and damage.forged):
        problems += compare_runs(place / (NEWEST if started == 2 else OLDER), run_dir, after=started)[:2]
    return problems, "went on" if of_newest else "older checkpoint"


def _digests(checkpoints: Path) -> dict[str, dict[str, str]]:
    """Of every checkpoint there is, under whatever name: what its files hold."""
    found = {}
    for path in sorted(checkpoints.glob("step-*")) if checkpoints.is_dir() else []:
        found[path.name] = {
            file.name: f"to {file.readlink()}"
            if file.is_symlink()
            else sha256(file.read_bytes()).hexdigest()
            if file.is_file()
            else "directory"
            for file in sorted(path.iterdir())
        }
    return found


def _lost(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """Checkpoints whose files are not there any more, under their own name or as damaged."""
    return [f"{name} is lost or changed" for name, files in before.items() if files not in after.values()]


_ERRORS = (errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENFILE, errno.EINTR, errno.ETIMEDOUT)


def passing(scene: Scene, number: int, name: str) -> Ended:
    """Opening a file of the newest checkpoint fails at one start, which renames nothing; the next one goes on."""
    run_dir = _copy(scene)
    before = _digests(run_dir / "checkpoints")
    overrides = _overrides(scene, run_dir, STEPS)
    whole = io.open

    def failing(file: Any, *arguments: Any, **options: Any) -> Any:
        mode = arguments[0] if arguments else options.get("mode", "r")
        if f"{NEWEST}/{name}" in str(file) and "r" in mode:
            raise OSError(number, os.strerror(number), str(file))
        return whole(file, *arguments, **options)

    io.open = builtins.open = failing
    try:
        code, told = _quietly(overrides)
    except BaseException as error:
        code, told = -1, f"{type(error).__name__}: {one_line(error)[:200]}"
    finally:
        io.open = builtins.open = whole
    problems, note = [], "refused"
    if code == -1:
        problems.append(told)
    elif code != ExitCode.BAD_INPUT:
        problems.append(f"exit code {code}, though {name} of the newest checkpoint could not be read")
    elif "\n" in told[told.rfind("error: ") :].strip():
        problems.append("more than one line")
    if _digests(run_dir / "checkpoints") != before:
        problems.append("checkpoints were renamed or written though nothing is damaged")
    code, told = _quietly(overrides)
    if code:
        problems.append(f"the next start ended with exit code {code}")
    else:
        problems += compare_runs(scene.folder / "damage" / NEWEST, run_dir, after=2)[:2]
    if problems:
        return Ended(problems, place=str(run_dir.parent))
    shutil.rmtree(run_dir.parent)
    return Ended([], f"{note}, then went on")


def started(scene: Scene, processes: int, group: str, name: str) -> Ended:
    """The same attack on a start of its own, as a user makes it, by its exit code and its output."""
    damage = next(one for one in kinds(processes) if (one.group, one.name) == (group, name))
    run_dir = _copy(scene)
    damage.change(run_dir)
    before = _digests(run_dir / "checkpoints")
    words = command(_overrides(scene, run_dir, damage.steps, damage.more), 1)
    result = subprocess.run(words, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)
    told = result.stdout + result.stderr
    problems = ["a traceback"] if "Traceback (most recent call last)" in told else []
    more, note = _judge(damage, scene, run_dir, result.returncode, told)
    problems += [*more, *_lost(before, _digests(run_dir / "checkpoints"))]
    if marker_of(run_dir).exists():
        problems.append("CODE OF A FILE WAS RUN")
    if problems:
        (run_dir.parent / "output.txt").write_text(told, encoding="utf-8")
        return Ended(problems, note, place=str(run_dir.parent))
    shutil.rmtree(run_dir.parent)
    return Ended([], note)


def plan(scene: Scene, processes: int = 2, starts: int = 6) -> list[Attack]:
    """The run, every kind of damage in one process of its own, errors that pass, and a few starts as users make them.

    With one process nothing but this process is needed for the run.
    """
    child = Child(scene.folder / "damage.log")

    def inside(group: str, name: str, function: Callable[..., Ended], *arguments: Any) -> Attack:
        return Attack("damage", group, name, lambda: child.call(function, scene, *arguments, limit=_LIMIT_SECONDS))

    def base() -> Ended:
        prepare(scene, processes)
        return Ended()

    everything = list(kinds(processes))
    attacks = [Attack("damage", NEEDED, "two checkpoints", base)]
    attacks += [inside(one.group, one.name, attempt, processes, one.group, one.name) for one in everything]
    for number in _ERRORS:
        for name in (METADATA, META, CHECKSUMS, "__0_0.distcp"):
            attacks.append(inside(f"passing {errno.errorcode[number]}", name, passing, number, name))
    for one in random.Random(scene.seed).sample(everything, starts):
        told = f"{one.group.removeprefix('checkpoint: ')}: {one.name}"
        attacks.append(
            Attack(
                "damage",
                "starts by command",
                told,
                lambda one=one: started(scene, processes, one.group, one.name),
            )
        )
    return attacks
