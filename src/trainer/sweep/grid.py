"""From a sweep's arguments to its jobs: overrides with several values, named grids, the directory of each job."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ...precision.suggest import close
from ..config import TrainConfig, load_config, load_run_config, parse
from ..errors import UserError, one_line
from ..own import NOWHERE, Place, setting
from .jobs import Job

LAUNCHER = "narrowgauge"
_SUBMITIT, _OPTUNA = "hydra_plugins.hydra_submitit_launcher", "hydra_plugins.hydra_optuna_sweeper"
# What needs a package of its own, and which: the configs in configs/hydra/ build on it.
PLUGINS = {
    "hydra/launcher": {"submitit_slurm": _SUBMITIT, "submitit_local": _SUBMITIT, "slurm": _SUBMITIT},
    "hydra/sweeper": {"optuna": _OPTUNA, "lr_search": _OPTUNA},
}
_LONGEST_NAME = 120  # bytes; file systems take 255, people fewer
_TELLING = r"(precision|seed|optim|model=|data=)"
# Changes of these leave a run's result as it is, but for the last bits.
_NO_RESULT = re.compile(
    r"(run|log|parallel|checkpoint|resume|sample)\.|train\.(stop_after|micro_batch_size)$|"
    r"data\.(verify|attempts|min_bytes_per_second)$"
)


@dataclass
class LauncherConfig:
    """``hydra.launcher.*`` of a sweep."""

    _target_: str = "hydra_plugins.narrowgauge.launcher.NarrowgaugeLauncher"
    processes: int = 1  # of each job; more than one is a torchrun
    jobs: int = 1  # at a time
    dry_run: bool = False  # print the commands instead


def chosen(parsed: Sequence[Override], group: str) -> str:
    return str(next((o.value() for o in parsed if o.key_or_group == group), ""))


def expand_named(arguments: Sequence[str], place: Place = NOWHERE) -> list[str]:
    """The arguments with ``sweep=NAME`` replaced by the overrides of that grid, and Hydra's part filled in.

    The grid's file has two lists in Hydra's grammar: ``fixed``, the same for all jobs and no part of their names, and
    ``grid``. What the command line says about a key takes the place of what the grid says, and is part of names; other
    keys are part of names if they have several values.
    """
    given = [text for text in arguments if not text.startswith("sweep=")]
    names = [text.removeprefix("sweep=") for text in arguments if text.startswith("sweep=")]
    overrides = parse(given)
    keys = {override.key_or_group for override in overrides}
    result: list[str] = []
    grid: list[Override] = []
    if len(names) > 1:
        raise UserError(f"sweep={names[0]} and sweep={names[1]}: one grid at a time")
    for name in names:
        file = place.find("sweep", name)
        if file is None:
            known = place.choices("sweep")
            raise UserError(f"sweep={name}: no such grid{close(name, known)}; there are: {', '.join(known)}")
        fixed, varied = (parse(texts) for texts in _read_grid(file))
        grid = [*fixed, *varied]
        overrides = [*overrides, *fixed]
        result = [override.input_line or "" for override in grid if override.key_or_group not in keys]
    ours = {override.key_or_group for override in grid}
    constant = [o for o in overrides if not (is_hydra(o) or o.is_sweep_override())]
    unnamed = [o.key_or_group for o in constant if o.key_or_group not in keys & ours]
    result += given
    present = {override.key_or_group for override in parse(result)}
    defaults = {
        "hydra/launcher": LAUNCHER,
        "hydra.sweep.dir": f"multirun/{names[0] if names else 'sweep'}",
        "hydra.sweep.subdir": "${hydra.job.override_dirname}",
        "hydra.job.config.override_dirname.exclude_keys": f"[{','.join(unnamed)}]",
    }
    return [*result, *(f"{key}={value}" for key, value in defaults.items() if key not in present)]


def _read_grid(file: Path) -> tuple[list[str], list[str]]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file))
        assert isinstance(tree, dict)
        if unknown := sorted(str(key) for key in tree.keys() - {"fixed", "grid"}):
            raise UserError(f"{file}: unknown key {unknown[0]!r}{close(unknown[0], ['fixed', 'grid'])}")
        fixed, grid = (tree.get(key) or [] for key in ("fixed", "grid"))
        if not (isinstance(fixed, list) and isinstance(grid, list)):
            raise UserError(f"{file}: fixed and grid are lists of key=value")
        return [str(text) for text in fixed], [str(text) for text in grid]
    except (OSError, AssertionError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error


def check(parsed: Sequence[Override], own: Sequence[Override], place: Place) -> list[TrainConfig]:
    """The configs of every value of every key once, with the first values of the others."""
    for override in parsed:
        if override.key_or_group.startswith("hydra.searchpath"):
            raise UserError(f"{override.key_or_group}: --config-dir=DIR is where configs of your own are")
        if "_target_" in override.key_or_group.split(".") or (
            is_hydra(override) and "_target_" in str(override.value())
        ):
            raise UserError(f"{override.key_or_group}: a config names things, it never executes them")
    for override in own:
        if override.key_or_group in ("run.dir", "run.resume"):
            key = override.key_or_group
            raise UserError(f"{key}: a sweep names its runs itself; hydra.sweep.dir says where they go")
    for group, plugins in PLUGINS.items():
        choice = chosen(parsed, group)
        if choice in plugins and importlib.util.find_spec(plugins[choice]) is None:
            package = plugins[choice].rpartition(".")[2].replace("_", "-")
            raise UserError(f"{group}={choice}: pip install {package} (or 'narrowgauge[sweep]')")
    for override in parsed:
        if override.key_or_group.startswith("hydra.launcher."):
            _check_launcher(override, parsed)
    hydra_keys = [
        override.input_line or ""
        for override in parsed
        if is_hydra(override) and not re.match(r"hydra[./](launcher|sweeper)\b", override.key_or_group)
    ]
    values = {o.key_or_group: [text.lstrip("+") for text in _choices(o)] for o in own}
    configs = [load_config([*place.flags, *(choices[0] for choices in values.values()), *hydra_keys])]
    for key, choices in values.items():
        others = [choices[0] for other, choices in values.items() if other != key]
        for choice in choices[1:]:
            configs += [load_config([*place.flags, *others, choice])]
    return configs


def _check_launcher(override: Override, parsed: Sequence[Override]) -> None:
    launcher = chosen(parsed, "hydra/launcher")
    name = override.key_or_group.removeprefix("hydra.launcher.")
    known = [part.name for part in fields(LauncherConfig) if part.name != "_target_"]
    if launcher == LAUNCHER and name not in known:
        raise UserError(f"unknown key {override.key_or_group!r}{close(name, known)}; there are: {', '.join(known)}")
    value = override.value()
    if launcher == LAUNCHER and name in ("processes", "jobs") and (not isinstance(value, int) or value < 1):
        raise UserError(f"{override.input_line}: must be a whole number, at least 1")


def _choices(override: Override) -> list[str]:
    if is_interval(override):  # for sweepers that search
        value = override.value()
        return [f"{override.key_or_group}={end}" for end in (value.start, value.end)]
    choices = [job[0] for batch in BasicSweeper.split_arguments([override], None) for job in batch]
    if not choices:
        raise UserError(f"{override.input_line}: no values")
    return choices


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job, as Hydra's basic sweeper makes them."""
    return [list(job) for batch in BasicSweeper.split_arguments(parse(overrides), None) for job in batch]


def is_interval(override: Override) -> bool:
    return isinstance(override.value(), IntervalSweep)


def is_hydra(override: Override) -> bool:
    return re.match(r"hydra[./]", override.key_or_group) is not None


def job_name(overrides: Iterable[str], exclude: Iterable[str] = ()) -> str:
    """A directory name from overrides, whatever their order: ``optim.lr=1e-3,precision=bf16,seed=0``.

    What file systems take badly becomes ``-``. A name that is too long keeps what sweeps are mostly about. Where that
    loses something, a hash of all overrides follows.
    """
    own = sorted(without_hydra(overrides))
    parts = [text for text in own if text.partition("=")[0] not in set(exclude)]
    full = ",".join(parts)
    telling = parts if len(full) <= _LONGEST_NAME else [text for text in parts if re.match(_TELLING, text)]
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "-", ",".join(telling))[:_LONGEST_NAME]
    if name != full:
        name = f"{name}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"
    return name or "defaults"


def without_hydra(overrides: Iterable[str]) -> list[str]:
    """Without Hydra's."""
    return [text.lstrip("+") for text in overrides if not text.startswith(("hydra.", "hydra/"))]


def make_jobs(config: DictConfig, batch: Sequence[Sequence[str]], flags: Sequence[str] = ()) -> list[Job]:
    """Jobs under ``hydra.sweep.dir``, one for each list of overrides; ``flags`` as ``trainer.own.split`` takes them.

    A job goes where a run of its config lies already, whatever it is called: an earlier command may have varied other
    keys. No job goes where another config's run lies. Raises UserError for a config that is not valid.
    """
    root = Path(config.hydra.sweep.dir)
    exclude = set(config.hydra.job.config.override_dirname.exclude_keys)
    own = {job_name(overrides, exclude): without_hydra(overrides) for overrides in batch}
    varied = {text.partition("=")[0] for texts in own.values() for text in texts} - exclude
    configs = {name: load_config([*flags, *texts], keys_are_known=True) for name, texts in own.items()}
    there = {path.parent.name: _identity(known, varied) for path, known in _runs_in(root)}
    places = {name: name for name, one in configs.items() if there.get(name) == _identity(one, varied)}
    for name, one in configs.items():
        identity = _identity(one, varied)
        same = [other for other in there if there[other] == identity and other not in places.values()]
        if name in places:
            continue
        places[name] = same[0] if same else name
        if not same and name in there:
            before, now = json.loads(there[name]), json.loads(identity)
            key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
            places[name] = f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
            values = f"{key}={before.get(key)}, not {now.get(key)}"
            print(f"{name} holds a run with {values}: this one goes to {places[name]}", file=sys.stderr, flush=True)
    return [
        Job(
            name=places[name],
            directory=root / places[name],
            overrides=[*texts, setting("run.dir", str(root / places[name]))],
            steps=configs[name].train.steps,
            flags=list(flags),
            data=configs[name].data,
        )
        for name, texts in own.items()
    ]


def _runs_in(root: Path) -> Iterator[tuple[Path, TrainConfig]]:
    for file in sorted(root.glob("*/config.yaml")):
        try:
            yield file, load_run_config(file, None)  # a recipe file that it names is not run
        except UserError:  # its own run says so
            continue


def _identity(config: TrainConfig, varied: set[str]) -> str:
    """What tells a run's result from another's, as JSON: all keys but those that change none and are not ``varied``."""
    parts = {
        key: value
        for key, value in sorted(config.flat().items())
        if not _NO_RESULT.match(key) or any(key == one or key.startswith(f"{one}.") for one in varied)
    }
    return json.dumps(parts, default=str)
