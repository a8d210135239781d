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
import re
import shutil
import warnings
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from trainer.distributed import World, say
from trainer.errors import UserError, one_line
from trainer.files import sha256_of, sync_directory, write_json
from trainer.spikes import COUNT, LEFT_OUT, SPIKE_PREFIX
from trainer.state import POSITION, RECIPE_PREFIX, TrainState, local

FORMAT = 1
_META, _CHECKSUMS = "meta.json", "checksums.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept. A run that ends or is stopped always writes one."""

    every: int = 100  # steps; 0 = only at the end
    keep_last: int = 2
    keep_every: int = 0  # also keep every n-th step for good; 0 = none
    asynchronous: bool = True  # write in the background while training goes on

    def validate(self) -> None:
        """Raises ValueError for counts out of range."""
        for field, least in (("every", 0), ("keep_last", 1), ("keep_every", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"checkpoint.{field}={getattr(self, field)}: must be at least {least}")


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
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)


def examine(path: Path) -> Checkpoint:
    """Compare every file with its checksum and read the description. Raises ValueError saying what is wrong."""
    try:
        checksums = json.loads((path / _CHECKSUMS).read_text())
        for name, (size, digest) in checksums.items():
            file = path / name
            if not file.exists():
                raise ValueError(f"{name} is missing")
            if file.stat().st_size != size:
                raise ValueError(f"{name} has {file.stat().st_size} bytes, not {size}")
            if sha256_of(file) != digest:
                raise ValueError(f"{name} does not match its checksum")
        meta = json.loads((path / _META).read_text())
    except OSError as error:
        raise ValueError(f"{Path(error.filename or path).name}: {error.strerror}") from error
    except (AttributeError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError("its description is damaged") from error
    if meta.get("format") != FORMAT:
        raise ValueError(f"it has format {meta.get('format')}, not {FORMAT}")
    return Checkpoint(path, meta)


def newest(directory: Path, *, tidy: bool = False) -> Checkpoint | None:
    """The newest complete and undamaged checkpoint. Names, on the console, every one it has to pass over.

    With ``tidy``, which only the run that owns the directory may ask for, remains of killed writes and prunings are
    removed, and damaged checkpoints get another name: they must not count among those that are kept.
    """
    if not directory.is_dir():
        return None
    for path in sorted(directory.glob("step-*.incomplete")):
        say(f"checkpoint {path} was never finished: passed over")
        if tidy:
            shutil.rmtree(path, ignore_errors=True)
    if tidy:
        for path in directory.glob("step-*.deleting"):
            shutil.rmtree(path, ignore_errors=True)
    for path in reversed(list_checkpoints(directory)):
        try:
            return examine(path)
        except ValueError as error:
            say(f"checkpoint {path} is damaged ({error}): passed over")
            if tidy:
                aside = path.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
    return None


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
    dcp.load(tensors, checkpoint_id=checkpoint.path, process_group=process_group)
    state.read_counters()
    if other_recipe:
        state.plan.forget()


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The whole tensors of a checkpoint whose names start with ``prefix``, in this process alone."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as meant here
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


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
        self._pending: Future[None] | None = None
        self._pending_step = -1
        self.saved_step: int | None = None  # newest complete one
        self.last_error: str | None = None

    def restore(self, state: TrainState, checkpoint: Checkpoint) -> None:
        """Load ``checkpoint``, which ``newest`` found; one of another recipe without what that recipe remembered."""
        before = checkpoint.meta["recipe"]
        other_recipe = before != self._meta["recipe"]
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
        found = self._world.on_main(lambda: self._find(step))
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
        """The checkpoint of ``step``, or why it is none to go back to."""
        path = self.directory / f"step-{step:08}"
        if step == 0:
            return "there is no checkpoint before it"
        if not path.is_dir():
            return f"{path} was not written"
        try:
            checkpoint = examine(path)
        except ValueError as error:
            return f"checkpoint {path} is damaged ({error})"
        if checkpoint.meta["recipe"] != self._meta["recipe"]:
            return f"checkpoint {path} is of another recipe"
        # Only a run that was stopped there has written it: one left alone must not do otherwise.
        if any(int(value) for value in read_tensors(path, "train.nonfinite_in_a_row").values()):
            return f"checkpoint {path} was written amid non-finite steps"
        return checkpoint

    def save(self, state: TrainState, *, prune: bool = True) -> None:
        """Snapshot the state and write it, in the background if so configured; then remove what need not be kept.

        A write that fails is reported in one line and keeps the checkpoints there are; training goes on.
        """
        self.wait()
        if self.saved_step == state.step:
            return
        if self._world.max(float(not state.is_finite()))[0]:
            self.last_error = f"the state at step {state.step} is not finite: no checkpoint is written over a good one"
            self._report()
            return
        tensors = state.tensors()
        meta = self._meta | {"format": FORMAT, "step": state.step, "tensors": _describe(tensors)}
        size = sum(local(tensor).nbytes for tensor in tensors.values())
        partial = self.directory / f"step-{state.step:08}.incomplete"
        (total,) = self._world.sum(size)
        self.last_error = self._world.on_main(lambda: self._make_room(partial, total))
        if self.last_error is not None:
            self._report()
            return
        # Copied here, so that the next step may change the state while the thread writes.
        snapshot = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self._pending = self._executor.submit(self._write, snapshot, partial, meta, prune)
        self._pending_step = state.step
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until the write under way has ended; afterwards ``saved_step`` and ``last_error`` say how."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        error = pending.exception()
        failed = self._world.on_main(lambda: _reason(error) if error else None)
        if failed is None:
            self.saved_step, self.last_error = self._pending_step, None
        else:
            self.last_error = f"checkpoint at step {self._pending_step} not written in {self.directory}: {failed}"
            self._report()

    def close(self) -> None:
        self._executor.shutdown(wait=True)

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

    def _write(self, tensors: dict[str, Tensor], partial: Path, meta: dict[str, Any], prune: bool) -> None:
        # One thread a rank; DCP keeps the ranks together, and returns on rank 0 once all have written.
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial), process_group=self._world.checkpoint)
            if self._world.is_main:
                self._commit(partial, meta)
                if prune:
                    self._prune()
        except BaseException:
            if self._world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _commit(self, partial: Path, meta: dict[str, Any]) -> None:
        write_json(partial / _META, meta)
        files = sorted(path for path in partial.iterdir() if path.name != _CHECKSUMS)
        write_json(partial / _CHECKSUMS, {path.name: [path.stat().st_size, sha256_of(path)] for path in files})
        sync_directory(partial)
        partial.rename(partial.with_suffix(""))
        sync_directory(self.directory)

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
