"""Checkpoints on disk: found, compared with their checksums, and read at any world size.

checkpoints/step-00000200.incomplete/   being written, or left by a run that was killed
checkpoints/step-00000200/              complete: DCP files, meta.json, checksums.json
checkpoints/step-00000200.deleting/     being pruned
checkpoints/step-00000200.damaged/      passed over at a start, kept for the user to look at
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from .distributed import ALONE, World, say
from .errors import UserError, one_line, reason_of
from .files import sha256_of
from .metadata import NAME as METADATA
from .metadata import ForbiddenError, Reader
from .spikes import LEFT_OUT, SPIKE_PREFIX
from .state import RECIPE_PREFIX, TrainState

T = TypeVar("T")
FORMAT = 1
META, CHECKSUMS = "meta.json", "checksums.json"
_NAME = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"\.metadata|meta\.json|__\d{1,9}_\d{1,9}\.distcp")  # what a checksum can be of
_HAD = re.compile(r"step-\d{8,}(\.damaged(-\d+)?)?")


class RecipeChange(Enum):
    """Whether a run may go on under another precision recipe."""

    allow = "allow"
    forbid = "forbid"


@dataclass(kw_only=True)
class ResumeConfig:
    """What a run that goes on may change."""

    recipe_change: RecipeChange = RecipeChange.forbid


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk and its ``meta.json``."""

    path: Path
    meta: dict[str, Any]


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints under ``directory`` that were finished, oldest first."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def had_checkpoints(directory: Path) -> bool:
    """Whether one was ever finished there, be it damaged now."""
    return directory.is_dir() and any(_HAD.fullmatch(path.name) for path in directory.iterdir())


def examine(path: Path, world: World = ALONE) -> Checkpoint:
    """Compare every file with its checksum, each rank its share, and read the description.

    Raises ValueError for damage: a file that is missing, or of a wrong size or content. Raises UserError where that
    cannot be known, as the file cannot be read just now; and for a checkpoint that was made to execute something.
    """
    described = world.on_main(lambda: _readable(path, lambda: _describe_files(path)))
    if isinstance(described, str):
        raise ValueError(described)
    checksums, meta = described
    # The largest first, each to the rank that has least to do.
    loads, mine = [0] * world.size, []
    for name, (size, digest) in sorted(checksums.items(), key=lambda item: (-item[1][0], item[0])):
        rank = loads.index(min(loads))
        loads[rank] += size
        if rank == world.rank:
            mine.append((name, size, digest))
    found: str | UserError | None
    try:
        found = _readable(path, lambda: next(filter(None, (_damage(path / n, s, d) for n, s, d in mine)), None))
    except UserError as error:
        found = error
    everywhere = world.gather_written(found)  # which waits as long as a disk may take
    for problem in everywhere:
        if isinstance(problem, UserError):
            raise problem
    damage = next((problem for problem in everywhere if problem), None)
    damage = damage or world.on_main(lambda: _readable(path, lambda: _index_damage(path, meta, checksums.keys())))
    if damage is not None:
        raise ValueError(damage)
    return Checkpoint(path, meta)


def _readable(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except OSError as error:
        file = Path(error.filename).name if error.filename else "a file of it"
        raise UserError(
            f"checkpoint {path}: {file} cannot be read now ({reason_of(error)}); that is no damage, nothing was "
            "changed: mend the cause and run the same command again"
        ) from error


def _describe_files(path: Path) -> tuple[dict[str, tuple[int, str]], dict[str, Any]] | str:
    """The checksums and ``meta.json``; or what is wrong with them."""
    read = {}
    for name in (CHECKSUMS, META):
        try:
            if not stat.S_ISREG((path / name).stat().st_mode):
                return f"{name} is no file"
            read[name] = json.loads((path / name).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        except (ValueError, RecursionError):
            return f"{name} is no JSON"
        if not isinstance(read[name], dict):
            return f"{name} is no JSON object"
    checksums, meta = read[CHECKSUMS], read[META]
    for name, entry in checksums.items():
        valid = isinstance(entry, list) and [type(part) for part in entry] == [int, str]
        if not valid or not _FILE.fullmatch(name):
            return f"{CHECKSUMS} is damaged at {name[:80]!r}"
    if missing := {METADATA, META} - checksums.keys():
        return f"{CHECKSUMS} lacks {min(missing)}"
    return {name: (size, digest) for name, (size, digest) in checksums.items()}, meta


def _damage(file: Path, size: int, digest: str) -> str | None:
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            return f"{file.name} is no file"
        if found.st_size != size:
            return f"{file.name} has {found.st_size} bytes, not {size}"
        return None if sha256_of(file) == digest else f"{file.name} does not match its checksum"
    except (FileNotFoundError, NotADirectoryError):
        return f"{file.name} is missing"


def _index_damage(path: Path, meta: dict[str, Any], checked: Collection[str]) -> str | None:
    if meta.get("format") != FORMAT:
        return f"it has format {meta.get('format')}, not {FORMAT}"
    kinds = {"recipe": dict, "tensors": dict, "data": str, "step": int, "world_size": int, "micro_batch_size": int}
    for key, kind in kinds.items():
        if type(meta.get(key)) is not kind:
            return f"{META} has no {key}"
    recipe, more = meta["recipe"], {"identity": dict, "recipe_changes": list, "tokenizer": str}
    if not (
        isinstance(recipe.get("name"), str)
        and isinstance(recipe.get("args"), dict)
        and isinstance(recipe.get("schedule", []), list)
        and all(isinstance(meta[key], kind) for key, kind in more.items() if key in meta)
    ):
        return f"{META} does not say of which run it is"
    if min(meta["step"], meta["world_size"] - 1, meta["micro_batch_size"] - 1) < 0:
        return f"{META} has numbers that cannot be"
    try:
        used = Reader(path, meta["tensors"]).read_metadata().storage_data.values()
    except ValueError as error:
        return str(error)
    except ForbiddenError as error:
        raise UserError(
            f"checkpoint {path} is refused: {error}, so somebody has changed its {METADATA}; nothing of it was "
            "executed; remove it to use the one before"
        ) from error
    unknown = {info.relative_path for info in used} - set(checked)
    return f"{CHECKSUMS} lacks {min(unknown)}" if unknown else None


def newest(directory: Path, *, tidy: bool = False, world: World = ALONE) -> Checkpoint | None:
    """The newest complete and undamaged checkpoint. Names, on the console, every one it has to pass over.

    With ``tidy``, which only the run that owns the directory may ask for, remains of killed writes and prunings are
    removed, and damaged checkpoints get another name: they must not count among those of keep_last. Raises UserError
    as ``examine`` does. With ``world``, all ranks call it.
    """
    for path in world.on_main(lambda: _candidates(directory, tidy)):
        try:
            return examine(path, world)
        except ValueError as error:
            reason = str(error)
        world.on_main(lambda path=path, reason=reason: _pass_over(path, reason, tidy))
    return None


def _candidates(directory: Path, tidy: bool) -> list[Path]:
    """What to look at, newest first."""
    try:
        if not directory.is_dir():
            return []
        for path in sorted(directory.glob("step-*.incomplete")):
            say(f"checkpoint {path} was never finished: passed over")
            if tidy:
                shutil.rmtree(path, ignore_errors=True)
        if tidy:
            for path in directory.glob("step-*.deleting"):
                shutil.rmtree(path, ignore_errors=True)
        return list_checkpoints(directory)[::-1]
    except OSError as error:
        raise UserError(f"{directory} cannot be read now ({reason_of(error)}): nothing was changed") from error


def _pass_over(path: Path, reason: str, tidy: bool) -> None:
    say(f"checkpoint {path} is damaged ({reason}): passed over")
    if tidy:
        number = 0
        while (aside := path.with_suffix(f".damaged{f'-{number}' if number else ''}")).exists():
            number += 1
        try:
            path.rename(aside)
        except OSError as error:
            raise UserError(f"{path} cannot be renamed ({reason_of(error)}): nothing was changed") from error


def load_into(
    checkpoint: Checkpoint,
    state: TrainState,
    process_group: Any,
    *,
    other_recipe: bool = False,
    of_ranks: bool = False,
    without: Collection[str] = (),
) -> None:
    """Read the checkpoint into the state's own tensors, whatever world size wrote it.

    With ``other_recipe``, what the recipe of the checkpoint remembered is left out, and what this one remembers is
    unknown. With ``of_ranks``, what several ranks remembered each for itself becomes their maximum. Tensors named in
    ``without`` stay as they are.
    Raises UserError if the checkpoint holds other tensors.
    """
    there = checkpoint.meta["tensors"]
    if LEFT_OUT in there and state.left_out is None:  # whatever this run does about spikes, data left out stays so
        state.left_out = torch.zeros((), dtype=torch.int64)
    tensors = state.tensors()
    apart = [name for name, value in tensors.items() if _is_of_ranks(name, there.get(name), value)]
    if apart and not of_ranks:
        ranks = there[apart[0]][1]
        raise UserError(
            f"checkpoint {checkpoint.path} holds amax histories of {ranks} processes, each its own: go on with {ranks} "
            "processes, or train with precision.args.reduce_amax=true"
        )
    if apart:
        saved = read_tensors(checkpoint.path, RECIPE_PREFIX)
        for name in apart:
            tensors[name].copy_(saved[name].amax(0))
    here = describe(tensors)
    passed_over = {*without, *apart}
    for name in here.keys() | there.keys():
        # What is known of spikes hangs on train.spike, which may change within a run: what fits is read.
        unfit = name.startswith(SPIKE_PREFIX) and there.get(name) != here.get(name)
        if unfit or (other_recipe and name.startswith(RECIPE_PREFIX)):
            passed_over.add(name)
    tensors, there = ({name: one for name, one in of.items() if name not in passed_over} for of in (tensors, there))
    _require_same_tensors(checkpoint.path, there, describe(tensors))
    _load(Reader(checkpoint.path, checkpoint.meta["tensors"]), tensors, process_group=process_group)
    state.read_counters()
    if other_recipe:
        state.plan.forget()


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The unsharded tensors of a checkpoint whose names start with ``prefix``, in this process alone.

    Raises UserError for one that cannot be read.
    """
    try:
        reader = Reader(path, json.loads((path / META).read_bytes())["tensors"])
        metadata = reader.read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ForbiddenError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {failure_of(error)}") from error
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as meant here
        _load(reader, tensors, no_dist=True)
    return tensors


def _load(reader: Reader, tensors: dict[str, Tensor], **how: Any) -> None:
    try:
        dcp.load(tensors, storage_reader=reader, **how)
    except (CheckpointException, OSError, RuntimeError, ValueError, ForbiddenError) as error:
        raise UserError(f"checkpoint {reader.directory} cannot be read: {failure_of(error)}") from error


def describe(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    return {name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in tensors.items()}


def _is_of_ranks(name: str, there: list[Any] | None, here: Tensor) -> bool:
    """Whether a recipe's tensor is saved once for every rank, and here is one rank, or another number of them."""
    if not name.startswith(RECIPE_PREFIX) or there is None or there[1:] == list(here.shape):
        return False
    return there[2:] == list(here.shape) or (isinstance(here, DTensor) and there[2:] == list(here.shape[1:]))


def _require_same_tensors(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    if there == here:
        return
    name = next(name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name))
    raise UserError(
        f"checkpoint {path} is of another model or recipe: {name} is {there.get(name, 'absent')} there and "
        f"{here.get(name, 'absent')} here; use the same model and precision, or another run.dir"
    )


def step_of(path: Path) -> int:
    return int(path.name[5:])


def failure_of(error: BaseException) -> str:
    """The operating system's word for a failed write, from inside DCP's wrapper."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return failure_of(cause) + (f" (rank {rank})" if rank else "")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    # torch's zip writer reports a full disk as a RuntimeError that has lost the errno.
    if isinstance(error, RuntimeError) and "unexpected pos" in str(error):
        return f"{os.strerror(errno.ENOSPC)} (or a limit on file size)"
    return one_line(error)
