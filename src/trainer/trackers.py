"""Experiment trackers, fed during training: whatever one of them does, training goes on."""

from __future__ import annotations

import os
import queue
import threading
from pathlib import Path
from typing import Any

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from .console import LogConfig
from .distributed import say
from .errors import one_line

SWEEP = "NARROWGAUGE_SWEEP"  # the environment of a sweep's jobs has it
_X_AXIS = "trainer/step"


class Trackers:
    """Experiment trackers of `accelerate`, fed from a thread of their own: whatever they do, training goes on.

    ``values``: the full config, as nested mappings of plain values.
    """

    _GIVE_UP_SECONDS = 20.0
    _NO_CURVES = ("step", "time")  # the one is the x axis, the other every tracker's own

    def __init__(self, config: LogConfig, directory: Path, values: dict[str, Any]) -> None:
        self._queue: queue.SimpleQueue[tuple[dict[str, Any], int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if config.trackers:
            arguments = (config, directory, values)
            self._thread = threading.Thread(target=self._run, args=arguments, name="trackers", daemon=True)
            self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        if self._thread is not None:
            kind = row["kind"]
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            values = {f"{kind}/{key}": value for key, value in numbers.items() if key not in self._NO_CURVES}
            self._queue.put((values, row["step"]))

    def close(self) -> None:
        """Let the trackers finish, but do not wait for ever."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(self._GIVE_UP_SECONDS)
            if self._thread.is_alive():
                say(f"warning: a tracker did not finish within {self._GIVE_UP_SECONDS:.0f} s and is left behind")

    def _run(self, config: LogConfig, directory: Path, values: dict[str, Any]) -> None:
        trackers = {}
        for name in config.trackers:
            try:
                trackers[name] = _start_tracker(name, config, directory, values)
            except BaseException as error:
                say(f"warning: tracker {name} cannot start ({one_line(error)}); training goes on without it")
        while (item := self._queue.get()) is not None:
            for name in list(trackers):
                try:
                    row, step = item
                    if name == "wandb":  # it drops a step that goes back, as after a resume: it gets its own counter
                        trackers[name].log(row | {_X_AXIS: step}, step=None)
                    else:
                        trackers[name].log(row, step=step)
                except BaseException as error:
                    say(f"warning: tracker {name} failed ({one_line(error)}); training goes on without it")
                    del trackers[name]
        for name, tracker in trackers.items():
            try:
                tracker.finish()
            except BaseException as error:
                say(f"warning: tracker {name} did not finish: {one_line(error)}")


def _start_tracker(name: str, config: LogConfig, directory: Path, values: dict[str, Any]) -> Any:
    if name not in {str(tracker) for tracker in get_available_trackers()}:
        raise RuntimeError(f"the package {name} is not installed")
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker = kind("tensorboard", logging_dir=directory)
    elif name == "wandb":
        tracker = kind(
            config.project,
            dir=directory,
            id=_wandb_id(directory),
            name=directory.resolve().name,
            group=sweep_of(directory),
            tags=_tags(values),
            mode=config.wandb_mode,
            resume="allow",
            settings={"silent": True},
        )
    else:
        tracker = kind(config.project, name=directory.resolve().name, group=sweep_of(directory), resume="allow")
    tracker.start()
    if name == "wandb":
        tracker.run.define_metric(_X_AXIS, hidden=True)
        tracker.run.define_metric("*", step_metric=_X_AXIS)
    if name == "tensorboard":
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        tracker.writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))  # as Markdown's code
        tracker.writer.flush()
    else:
        tracker.store_init_configuration(values)
    return tracker


def sweep_of(directory: Path) -> str | None:
    """The name of the sweep whose run this is, None if it is of none."""
    parent = directory.resolve().parent
    return parent.name if SWEEP in os.environ or (parent / "multirun.yaml").is_file() else None


def _tags(values: dict[str, Any]) -> list[str]:
    """Recipe and model."""
    parts = (("precision", "recipe"), ("precision", "name"), ("model", "name"))
    found = [values[group].get(key) for group, key in parts if isinstance(values.get(group), dict)]
    return list(dict.fromkeys(str(tag)[:64] for tag in found if tag))  # W&B takes no longer ones


def _wandb_id(directory: Path) -> str:
    """One W&B run for one run directory, over all its restarts."""
    file = directory / "wandb_id.txt"
    if not file.exists():
        file.write_text(os.urandom(6).hex(), encoding="utf-8")
    return file.read_text(encoding="utf-8")
