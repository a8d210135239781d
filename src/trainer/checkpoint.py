"""Checkpoints: torch DCP under a temporary name, checksummed, renamed, then pruned; restored at any world size.

checkpoints/step-00000200.incomplete/   being written, or left by a run that was killed
checkpoints/step-00000200/              complete: DCP files, meta.json, checksums.json
checkpoints/step-00000200.deleting/     being pruned
checkpoints/step-00000200.damaged/      passed over at a start, kept for the user to look at
"""

from __future__ import annotations

import errno
import json
import os
import queue
import re
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ..precision.loading import filled
from .distributed import World, say
from .errors import UserError, one_line
from .files import sha256_of, sync_directory, write_json
from .metadata import NAME as METADATA
from .metadata import ForbiddenError, Reader
from .spikes import COUNT, LEFT_OUT, SPIKE_PREFIX
from .state import POSITION, RECIPE_PREFIX, TrainState, local

T = TypeVar("T")
FORMAT = 1
_META, _CHECKSUMS = "meta.json", "checksums.json"
_NAME = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"\.metadata|meta\.json|__\d{1,9}_\d{1,9}\.distcp")  # what a checksum can be of
_HAD = re.compile(r"step-\d{8,}(\.damaged(-\d+)?)?")
_SLOW_SECONDS = 5.0  # that training may wait for a write before that is said


@dataclass(kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept. A run that ends or is stopped always writes one."""

    every: int = 100  # steps; 0 = only at the end
    every_minutes: float = 0.0  # also whenever so much time has gone since the last; 0 = never
    keep_last: int = 2
    keep_every: int = 0  # also keep every n-th step for good; 0 = none
    asynchronous: bool = True  # write in the background while training goes on
    max_failures: int = 3  # writes that fail in a row before the run ends as failed; 0 = never

    def validate(self) -> None:
        """Raises ValueError for counts out of range."""
        least = {"every": 0, "every_minutes": 0, "keep_last": 1, "keep_every": 0, "max_failures": 0}
        for field, smallest in least.items():
            if not getattr(self, field) >= smallest:
                raise ValueError(f"checkpoint.{field}={getattr(self, field)}: must be at least {smallest}")


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


class Together(Protocol):
    """What looking for a checkpoint asks of the ranks: ``World``, or ``Alone``."""

    rank: int
    size: int

    def on_main(self, function: Callable[[], T]) -> T: ...

    def gather_written(self, value: T) -> list[T]: ...


class Alone:
    """A process without a group."""

    rank, size = 0, 1

    def on_main(self, function: Callable[[], T]) -> T:
        return function()

    def gather_written(self, value: T) -> list[T]:
        return [value]


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints under ``directory`` that were finished, oldest first."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)


def had_checkpoints(directory: Path) -> bool:
    """Whether one was ever finished there, be it damaged now."""
    return directory.is_dir() and any(_HAD.fullmatch(path.name) for path in directory.iterdir())


def examine(path: Path, together: Together | None = None) -> Checkpoint:
    """Compare every file with its checksum, each rank its share, and read the description.

    Raises ValueError for damage: a file that is missing, or of a wrong size or content. Raises UserError where that
    cannot be known, as the file cannot be read just now; and for a checkpoint that was made to execute something.
    """
    together = together or Alone()
    described = together.on_main(lambda: _readable(path, lambda: _describe_files(path)))
    if isinstance(described, str):
        raise ValueError(described)
    checksums, meta = described
    # The largest first, each to the rank that has least to do.
    loads, mine = [0] * together.size, []
    for name, (size, digest) in sorted(checksums.items(), key=lambda item: (-item[1][0], item[0])):
        rank = loads.index(min(loads))
        loads[rank] += size
        if rank == together.rank:
            mine.append((name, size, digest))
    found: str | UserError | None
    try:
        found = _readable(path, lambda: next(filter(None, (_damage(path / n, s, d) for n, s, d in mine)), None))
    except UserError as error:
        found = error
    everywhere = together.gather_written(found)  # which waits as long as a disk may take
    for problem in everywhere:
        if isinstance(problem, UserError):
            raise problem
    if (damage := next((problem for problem in everywhere if problem), None)) is not None:
        raise ValueError(damage)
    problem = together.on_main(lambda: _readable(path, lambda: _index_damage(path, meta, checksums.keys())))
    if problem is not None:
        raise ValueError(problem)
    return Checkpoint(path, meta)


def _readable(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except OSError as error:
        file = Path(error.filename).name if error.filename else "a file of it"
        raise UserError(
            f"checkpoint {path}: {file} cannot be read now ({error.strerror or error}); that is no damage, nothing was "
            "changed: mend the cause and run the same command again"
        ) from error


def _describe_files(path: Path) -> tuple[dict[str, tuple[int, str]], dict[str, Any]] | str:
    """The checksums and ``meta.json``; or what is wrong with them."""
    read = {}
    for name in (_CHECKSUMS, _META):
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
    checksums, meta = read[_CHECKSUMS], read[_META]
    for name, entry in checksums.items():
        whole = isinstance(entry, list) and [type(part) for part in entry] == [int, str]
        if not whole or not _FILE.fullmatch(name):
            return f"{_CHECKSUMS} is damaged at {name[:80]!r}"
    if missing := {METADATA, _META} - checksums.keys():
        return f"{_CHECKSUMS} lacks {min(missing)}"
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
            return f"{_META} has no {key}"
    recipe, more = meta["recipe"], {"identity": dict, "recipe_changes": list, "tokenizer": str}
    if not (
        isinstance(recipe.get("name"), str)
        and isinstance(recipe.get("args"), dict)
        and isinstance(recipe.get("schedule", []), list)
        and all(isinstance(meta[key], kind) for key, kind in more.items() if key in meta)
    ):
        return f"{_META} does not say of which run it is"
    if min(meta["step"], meta["world_size"] - 1, meta["micro_batch_size"] - 1) < 0:
        return f"{_META} has numbers that cannot be"
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
    return f"{_CHECKSUMS} lacks {min(unknown)}" if unknown else None


def newest(directory: Path, *, tidy: bool = False, together: Together | None = None) -> Checkpoint | None:
    """The newest complete and undamaged checkpoint. Names, on the console, every one it has to pass over.

    With ``tidy``, which only the run that owns the directory may ask for, remains of killed writes and prunings are
    removed, and damaged checkpoints get another name: they must not count among those that are kept. Raises UserError
    as ``examine`` does. With ``together``, all ranks call it.
    """
    together = together or Alone()
    for path in together.on_main(lambda: _candidates(directory, tidy)):
        try:
            return examine(path, together)
        except ValueError as error:
            reason = str(error)
        together.on_main(lambda path=path, reason=reason: _pass_over(path, reason, tidy))
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
        raise UserError(f"{directory} cannot be read now ({error.strerror or error}): nothing was changed") from error


def _pass_over(path: Path, reason: str, tidy: bool) -> None:
    say(f"checkpoint {path} is damaged ({reason}): passed over")
    if tidy:
        number = 0
        while (aside := path.with_suffix(f".damaged{f'-{number}' if number else ''}")).exists():
            number += 1
        try:
            path.rename(aside)
        except OSError as error:
            raise UserError(f"{path} cannot be renamed ({error.strerror or error}): nothing was changed") from error


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
        tensors = {name: value for name, value in tensors.items() if name not in apart}
        there = {name: value for name, value in there.items() if name not in apart}
    if other_recipe:
        tensors, there = (
            {name: value for name, value in both.items() if not name.startswith(RECIPE_PREFIX)}
            for both in (tensors, there)
        )
    here = _describe(tensors)
    # What is known of spikes hangs on train.spike, which may change within a run: what fits is read.
    known = {name for name in here.keys() | there.keys() if name.startswith(SPIKE_PREFIX)}
    passed_over = {*without, *(name for name in known if there.get(name) != here.get(name))}
    tensors, there = (
        {name: value for name, value in both.items() if name not in passed_over} for both in (tensors, there)
    )
    _require_same_tensors(checkpoint.path, there, _describe(tensors))
    _load(Reader(checkpoint.path, checkpoint.meta["tensors"]), tensors, process_group=process_group)
    state.read_counters()
    if other_recipe:
        state.plan.forget()


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The whole tensors of a checkpoint whose names start with ``prefix``, in this process alone.

    Raises UserError for one that cannot be read.
    """
    try:
        reader = Reader(path, json.loads((path / _META).read_bytes())["tensors"])
        metadata = reader.read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ForbiddenError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {_reason(error)}") from error
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
        raise UserError(f"checkpoint {reader.directory} cannot be read: {_reason(error)}") from error


def _describe(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
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


def _same_recipe(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """An argument that a recipe did not have yet when a checkpoint was written is at its default there."""
    alike = one["name"] == other["name"] and one.get("schedule") == other.get("schedule")
    return alike and filled(one["name"], one["args"]) == filled(other["name"], other["args"])


class Checkpointer:
    """Writes checkpoints of one run, one at a time. Every method is called on all ranks."""

    def __init__(
        self,
        config: CheckpointConfig,
        directory: Path,
        world: World,
        meta: Mapping[str, Any],
        *,
        keep_scheduled: bool = False,  # the newest of those that were due, whatever was written after it
    ) -> None:
        self.directory = directory
        self._keep_scheduled = keep_scheduled
        self._config = config
        self._world = world
        self._meta = dict(meta)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[str | None] | None = None
        self._pending_step = -1
        self._began = time.monotonic()  # of the last write, or of this run
        self._told_sync = False
        self.written: queue.SimpleQueue[tuple[int, float, float]] = queue.SimpleQueue()  # step, bytes, seconds; rank 0
        self.saved_step: int | None = None  # newest complete one
        self.last_error: str | None = None
        self.failures = 0  # in a row

    @property
    def overdue(self) -> bool:
        """Whether ``checkpoint.every_minutes`` have gone; rank 0's clock is the one that counts."""
        minutes = self._config.every_minutes
        return minutes > 0 and time.monotonic() - self._began >= 60 * minutes

    @property
    def given_up(self) -> bool:
        """Whether ``checkpoint.max_failures`` writes in a row have failed."""
        return 0 < self._config.max_failures <= self.failures

    def restore(self, state: TrainState, checkpoint: Checkpoint) -> None:
        """Load ``checkpoint``, which ``newest`` found; one of another recipe without what that recipe remembered."""
        before = checkpoint.meta["recipe"]
        other_recipe = not _same_recipe(before, self._meta["recipe"])
        self._world.on_all(lambda: load_into(checkpoint, state, self._world.checkpoint, other_recipe=other_recipe))
        self._meta["recipe_changes"] = checkpoint.meta.get("recipe_changes", [])
        if other_recipe:
            self._meta["recipe_changes"] = [*self._meta["recipe_changes"], {"step": state.step, "before": before}]
        self.saved_step = state.step

    def roll_back(self, state: TrainState, step: int) -> str | None:
        """Put ``state`` back to the checkpoint of ``step`` and remove the later ones; or why not, with nothing changed.

        A text stream, which goes forward only, stays where it stands, as do the counts of spikes and of data left out.
        """
        self.wait()
        found = self._find(step)
        if isinstance(found, str):
            return found
        if state.spikes is not None:
            state.spikes.forget()
        kept = (POSITION, COUNT, LEFT_OUT)
        self._world.on_all(lambda: load_into(found, state, self._world.checkpoint, without=kept))
        # The newest first: those of a path that is left remain a whole path, which leads here again.
        self._world.on_main(
            lambda: _remove(path for path in reversed(list_checkpoints(self.directory)) if _step_of(path) > step)
        )
        self.saved_step = step
        return None

    def _find(self, step: int) -> Checkpoint | str:
        """The checkpoint of ``step``, or why it is none to go back to; on all ranks alike."""
        path = self.directory / f"step-{step:08}"
        if step == 0:
            return "there is no checkpoint before it"
        if not self._world.on_main(path.is_dir):
            return f"{path} was not written"
        try:
            checkpoint = examine(path, self._world)
        except ValueError as error:
            return f"checkpoint {path} is damaged ({error})"
        if not _same_recipe(checkpoint.meta["recipe"], self._meta["recipe"]):
            return f"checkpoint {path} is of another recipe"
        # Only a run that was stopped there has written it: one left alone must not do otherwise.
        skipped = self._world.on_main(lambda: read_tensors(path, "train.nonfinite_in_a_row"))
        if any(int(value) for value in skipped.values()):
            return f"checkpoint {path} was written amid non-finite steps"
        return checkpoint

    def save(self, state: TrainState, *, prune: bool = True) -> None:
        """Snapshot the state and write it, in the background if so configured; then remove what need not be kept.

        A write that fails is reported in one line and keeps the checkpoints there are; training goes on.
        """
        self.wait()
        self._began = time.monotonic()
        if self.saved_step == state.step:
            return
        if self._world.max(float(not state.is_finite()))[0]:
            self.last_error = f"the state at step {state.step} is not finite: no checkpoint is written over a good one"
            self._report()
            return
        tensors = state.tensors()
        meta = self._meta | {"format": FORMAT, "step": state.step, "tensors": _describe(tensors)}
        (size,) = self._world.sum(sum(local(tensor).nbytes for tensor in tensors.values()))
        partial = self.directory / f"step-{state.step:08}.incomplete"
        # Copied here, so that the next step may change the state while the thread writes.
        snapshot = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self._pending = self._executor.submit(self._write, snapshot, partial, meta, size, prune)
        self._pending_step = state.step
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until the write under way has ended; afterwards ``saved_step`` and ``last_error`` say how."""
        if self._pending is None:
            return
        self._world.watch.at(f"waiting for the checkpoint of step {self._pending_step}")
        pending, self._pending = self._pending, None
        started = time.monotonic()
        # Ranks agree in the thread, which waits longer than a step may: here all have the same answer, at one time.
        failed = pending.result()
        waited = time.monotonic() - started
        if failed is None:
            self.saved_step, self.last_error, self.failures = self._pending_step, None, 0
        else:
            self.last_error, self.failures = failed, self.failures + 1
            self._report()
        if waited >= _SLOW_SECONDS and self._world.is_main:
            say(
                f"warning: training waited {waited:.0f} s for the checkpoint of step {self._pending_step}, which took "
                f"{time.monotonic() - self._began:.0f} s to write: a slow disk, or too small a checkpoint.every"
            )

    def close(self, *, wait: bool = True) -> None:
        """``wait`` False: where a write can wait for ever, for a rank that is gone."""
        self._executor.shutdown(wait=wait, cancel_futures=not wait)

    def _report(self) -> None:
        if self._world.is_main:
            kept = "none yet" if self.saved_step is None else f"step {self.saved_step}"
            say(f"warning: {self.last_error}; newest complete checkpoint: {kept}")

    def _make_room(self, partial: Path, size: float) -> str | None:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            free = shutil.disk_usage(partial).free
            if free < size:
                shutil.rmtree(partial, ignore_errors=True)
                return (
                    f"no room for a checkpoint in {self.directory}: it needs {size / 1e6:.1f} MB, "
                    f"{free / 1e6:.1f} MB are free"
                )
        except OSError as error:
            return f"no checkpoint can be written in {self.directory}: {error.strerror or error}"
        return None

    def _write(
        self, tensors: dict[str, Tensor], partial: Path, meta: dict[str, Any], size: float, prune: bool
    ) -> str | None:
        """In one thread a rank; what went wrong, the same on all ranks."""
        problem = self._world.gather_written(self._make_room(partial, size) if self._world.is_main else None)[0]
        if problem is not None:
            return problem
        written: dict[str, tuple[int, str]] | str
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial), process_group=self._world.checkpoint)
            # Each rank its own files: one alone would read all that the others have written.
            own = sorted(partial.glob(f"__{self._world.rank}_*"))
            written = {path.name: (path.stat().st_size, sha256_of(path)) for path in own}
        except BaseException as error:
            written = _reason(error)
        everywhere = self._world.gather_written(written)
        problem = next((problem for problem in everywhere if isinstance(problem, str)), None)
        if self._world.is_main:
            try:
                if problem is None:
                    self._commit(partial, meta, [each for each in everywhere if isinstance(each, dict)])
            except BaseException as error:
                problem = _reason(error)
            if problem is not None:
                shutil.rmtree(partial, ignore_errors=True)
            else:
                self.written.put((int(meta["step"]), size, time.monotonic() - self._began))
            if problem is None and prune:
                try:
                    self._prune()
                except OSError as error:
                    say(f"warning: {self.directory}: old checkpoints cannot be removed: {error.strerror or error}")
        problem = self._world.gather_written(problem)[0]
        step = int(meta["step"])
        return problem and f"checkpoint at step {step} not written in {self.directory}: {problem}"

    def _commit(self, partial: Path, meta: dict[str, Any], written: list[dict[str, tuple[int, str]]]) -> None:
        write_json(partial / _META, meta)
        own = {name: ((partial / name).stat().st_size, sha256_of(partial / name)) for name in (METADATA, _META)}
        write_json(partial / _CHECKSUMS, {name: entry for each in [*written, own] for name, entry in each.items()})
        self._sync(partial)
        partial.rename(partial.with_suffix(""))
        self._sync(self.directory)

    def _sync(self, directory: Path) -> None:
        if not sync_directory(directory) and not self._told_sync:
            self._told_sync = True
            say(f"{directory}: its file system cannot flush directories; a power cut may cost the newest checkpoint")

    def _prune(self) -> None:
        every, there = self._config.keep_every, list_checkpoints(self.directory)
        due = [path for path in there if self._config.every and _step_of(path) % self._config.every == 0]
        kept = due[-1:] if self._keep_scheduled else []
        _remove(
            path
            for path in there[: -self._config.keep_last]
            if path not in kept and (not every or _step_of(path) % every)
        )


def _remove(checkpoints: Iterable[Path]) -> None:
    for path in checkpoints:
        # Renamed first: what bears a checkpoint's name is whole, also if this is killed half-way.
        going = path.rename(path.with_suffix(".deleting"))
        shutil.rmtree(going, ignore_errors=True)


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def _reason(error: BaseException) -> str:
    """The operating system's word for a failed write, from inside DCP's wrapper."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"{_reason(cause)}" + (f" (rank {rank})" if rank else "")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    # torch's zip writer reports a full disk as a RuntimeError that has lost the errno.
    if isinstance(error, RuntimeError) and "unexpected pos" in str(error):
        return f"{os.strerror(errno.ENOSPC)} (or a limit on file size)"
    return one_line(error)
