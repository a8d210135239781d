"""Checkpoints are written: torch DCP under a temporary name, checksummed, renamed, then pruned."""

from __future__ import annotations

import queue
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from ..precision.loading import filled
from .checkpoint import (
    CHECKSUMS,
    FORMAT,
    META,
    Checkpoint,
    describe,
    examine,
    failure_of,
    list_checkpoints,
    load_into,
    read_tensors,
    step_of,
)
from .distributed import World, say
from .errors import reason_of, require_at_least
from .files import sha256_of, sync_directory, write_json
from .metadata import NAME as METADATA
from .spikes import COUNT, LEFT_OUT
from .state import POSITION, TrainState, local

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
        require_at_least("checkpoint", self, every=0, every_minutes=0, keep_last=1, keep_every=0, max_failures=0)


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
        self.config = config
        self._world = world
        self._meta = dict(meta)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[str | None] | None = None
        self._pending_step = -1
        self._began = time.monotonic()  # of the last write, or of this run
        self._warned_of_sync = False
        self.written: queue.SimpleQueue[tuple[int, float, float]] = queue.SimpleQueue()  # step, bytes, seconds; rank 0
        self.saved_step: int | None = None  # newest complete one
        self.last_error: str | None = None
        self.failures = 0  # in a row

    @property
    def overdue(self) -> bool:
        """Whether ``checkpoint.every_minutes`` have gone; rank 0's clock is the one that counts."""
        minutes = self.config.every_minutes
        return minutes > 0 and time.monotonic() - self._began >= 60 * minutes

    @property
    def given_up(self) -> bool:
        """Whether ``checkpoint.max_failures`` writes in a row have failed."""
        return 0 < self.config.max_failures <= self.failures

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
        unchanged = (POSITION, COUNT, LEFT_OUT)
        self._world.on_all(lambda: load_into(found, state, self._world.checkpoint, without=unchanged))
        # The newest first: those of a path that is left remain a complete path, which leads here again.
        self._world.on_main(
            lambda: _remove(path for path in reversed(list_checkpoints(self.directory)) if step_of(path) > step)
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
        meta = self._meta | {"format": FORMAT, "step": state.step, "tensors": describe(tensors)}
        (size,) = self._world.sum(sum(local(tensor).nbytes for tensor in tensors.values()))
        partial = self.directory / f"step-{state.step:08}.incomplete"
        # Copied here, so that the next step may change the state while the thread writes.
        snapshot = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self._pending = self._executor.submit(self._write, snapshot, partial, meta, size, prune)
        self._pending_step = state.step
        if not self.config.asynchronous:
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
            complete = "none yet" if self.saved_step is None else f"step {self.saved_step}"
            say(f"warning: {self.last_error}; newest complete checkpoint: {complete}")

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
            return f"no checkpoint can be written in {self.directory}: {reason_of(error)}"
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
            written = failure_of(error)
        everywhere = self._world.gather_written(written)
        problem = next((problem for problem in everywhere if isinstance(problem, str)), None)
        if self._world.is_main:
            try:
                if problem is None:
                    self._commit(partial, meta, [each for each in everywhere if isinstance(each, dict)])
            except BaseException as error:
                problem = failure_of(error)
            if problem is not None:
                shutil.rmtree(partial, ignore_errors=True)
            else:
                self.written.put((int(meta["step"]), size, time.monotonic() - self._began))
            if problem is None and prune:
                try:
                    self._prune()
                except OSError as error:
                    say(f"warning: {self.directory}: old checkpoints cannot be removed: {reason_of(error)}")
        problem = self._world.gather_written(problem)[0]
        step = int(meta["step"])
        return problem and f"checkpoint at step {step} not written in {self.directory}: {problem}"

    def _commit(self, partial: Path, meta: dict[str, Any], written: list[dict[str, tuple[int, str]]]) -> None:
        write_json(partial / META, meta)
        own = {name: ((partial / name).stat().st_size, sha256_of(partial / name)) for name in (METADATA, META)}
        write_json(partial / CHECKSUMS, {name: entry for each in [*written, own] for name, entry in each.items()})
        self._sync(partial)
        partial.rename(partial.with_suffix(""))
        self._sync(self.directory)

    def _sync(self, directory: Path) -> None:
        if not sync_directory(directory) and not self._warned_of_sync:
            self._warned_of_sync = True
            say(f"{directory}: its file system cannot flush directories; a power cut may cost the newest checkpoint")

    def _prune(self) -> None:
        every, there = self.config.keep_every, list_checkpoints(self.directory)
        due = [path for path in there if self.config.every and step_of(path) % self.config.every == 0]
        scheduled = due[-1:] if self._keep_scheduled else []
        _remove(
            path
            for path in there[: -self.config.keep_last]
            if path not in scheduled and (not every or step_of(path) % every)
        )


def _remove(checkpoints: Iterable[Path]) -> None:
    for path in checkpoints:
        # Renamed first: what bears a checkpoint's name is complete, also if this is killed half-way.
        going = path.rename(path.with_suffix(".deleting"))
        shutil.rmtree(going, ignore_errors=True)
