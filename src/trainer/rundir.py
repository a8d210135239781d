"""The run directory, which is the API: ``config.yaml, plan.txt, env.json, metrics.jsonl, checkpoints/, done.json``.

With ``tokenizer/``, a copy, it holds all that a run is, wherever it is moved; token shards stay where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import psutil
import torch

from .checkpoint import Checkpoint, had_checkpoints
from .data.config import DataConfig
from .data.tokenizer import FastTokenizer, TextTokenizer, load_tokenizer
from .distributed import World, say
from .errors import UserError, as_user_error, reason_of
from .files import lock, new_directory, read_json, sha256_of, write_bytes, write_json, write_text
from .lifeline import launcher_pid
from .stop import StopRequest

_SAY_AGAIN_SECONDS = 60.0
# What a tokenizer's directory may hold next to a model; the second line is read only where there is no tokenizer.json.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_OTHER_TOKENIZER_FILES = ("config.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")


class Resume(Enum):
    """What to do with what ``run.dir`` holds."""

    auto = "auto"  # go on where it stands, or start
    never = "never"  # start anew; what is there is moved aside
    must = "must"  # go on, or fail


@dataclass(kw_only=True)
class RunConfig:
    dir: str
    resume: Resume = Resume.auto

    def validate(self) -> None:
        """Raises ValueError for an empty path."""
        if not self.dir:
            raise ValueError("run.dir is empty: name a directory")


class RunDirectory:
    """Paths of one run, and the lock that keeps a second run out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.plan = path / "plan.txt"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tokenizer = path / "tokenizer"
        self.done = path / "done.json"
        self._lock: IO[str] | None = None

    def lock(self, world: World, stop: StopRequest) -> None:
        """Take the directory for this run; every rank holds a share, so it is free once the last one has ended.

        Waits, however long, for workers that lost their launcher to end. Raises UserError if another run is alive in
        it, or if this one is asked to stop while it waits.
        """

        def exclusively() -> int:
            with self._writing():
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = (self.path / ".lock").open("a+", encoding="utf-8")
            self._wait_for_lock(self._lock, stop)
            self._lock.seek(0)
            self._lock.truncate()
            pid, launcher = os.getpid(), launcher_pid()
            holder = {"host": socket.gethostname(), "pid": pid, "launcher": launcher}
            json.dump(holder | {"began": _began(pid), "launcher_began": _began(launcher)}, self._lock)
            self._lock.flush()
            self._share()
            return pid

        def shared() -> None:
            if not world.is_main:
                self._lock = (self.path / ".lock").open("a+", encoding="utf-8")
                self._require_shared(main)
                self._share()

        main = world.on_main(exclusively)
        world.on_all(shared)  # nobody goes on before everybody holds a share

    def _writing(self) -> AbstractContextManager[None]:
        return as_user_error(f"run.dir={self.path} cannot be written: ", OSError)

    def _share(self) -> None:
        assert self._lock is not None
        while lock(self._lock, shared=True) is False:  # a sweep may be asking whether it is free
            time.sleep(0.05)

    def _require_shared(self, main: int) -> None:
        """Raises UserError if this rank sees another directory than rank 0, whose process is ``main``."""
        assert self._lock is not None
        for _ in range(100):  # file systems of several hosts may show the past for some seconds
            holder = self._holder(self._lock, wait=False)
            if holder is not None and holder["pid"] == main:
                return
            time.sleep(0.1)
        raise UserError(
            f"run.dir={self.path} on {socket.gethostname()} is not the directory that rank 0 writes to: "
            "all hosts must see one"
        )

    def _wait_for_lock(self, file: IO[str], stop: StopRequest) -> None:
        said_at = -_SAY_AGAIN_SECONDS
        while (taken := lock(file)) is not True:
            holder = self._holder(file, wait=taken is False)
            if taken is None:
                if said_at < 0:
                    say(f"{self.path}: its file system has no locks; another host's run in it would not be noticed")
                    said_at = time.monotonic() - _SAY_AGAIN_SECONDS
                if holder is None or holder["host"] != socket.gethostname() or not (holder["alive"] or holder["lives"]):
                    return
            if holder is None or holder["alive"]:
                who = "another run" if holder is None else f"process {holder['pid']} on {holder['host']}"
                raise UserError(
                    f"run.dir={self.path} is in use by {who}: wait for it to end, or choose another run.dir"
                )
            if stop.code:
                raise UserError(f"stopped by {stop.describe(stop.code)} while waiting for {self.path}")
            if time.monotonic() - said_at >= _SAY_AGAIN_SECONDS:
                say(f"waiting for process {holder['pid']}, of a run whose launcher was killed, to leave {self.path}")
                said_at = time.monotonic()
            time.sleep(0.2)

    def _holder(self, file: IO[str], *, wait: bool) -> dict[str, Any] | None:
        """Who wrote itself into the lock; None if that cannot be read. ``wait``: it may be writing just now."""
        for _ in range(20 if wait else 1):
            try:
                file.seek(0)
                holder: dict[str, Any] = json.loads(file.read())
                here = holder["host"] == socket.gethostname()
                # An attempt of the launcher that started this process, too, is on its way out.
                ours = here and holder["launcher"] == launcher_pid()
                alive = not here or (not ours and _is_running(holder["launcher"], holder.get("launcher_began")))
                lives = holder["pid"] != os.getpid() and _is_running(holder["pid"], holder.get("began"))
                return holder | {"alive": alive, "lives": lives}
            except (ValueError, KeyError, TypeError, RecursionError):
                if wait:
                    time.sleep(0.1)
        return None

    def unlock(self) -> None:
        if self._lock is not None:
            with suppress(OSError):  # a full disk refuses what was written last
                self._lock.close()
            self._lock = None

    def has_run(self) -> bool:
        """Whether an earlier run left anything to lose."""
        return self.metrics.exists() or self.done.exists() or had_checkpoints(self.checkpoints)

    def move_aside(self) -> None:
        """Put an earlier run's files into a numbered directory next to the new ones."""
        target = self._new_place()
        # Checkpoints first and the config last: killed in between, the rest is still known as the old run's.
        rank = {"checkpoints": 0, "config.yaml": 2}
        for path in sorted(self.path.iterdir(), key=lambda path: rank.get(path.name, 1)):
            if path.name != ".lock" and not path.name.startswith("earlier-"):
                shutil.move(path, target / path.name)
        say(f"run.resume=never: what {self.path} held is now in {target}")

    def _new_place(self) -> Path:
        number = 1
        while (target := self.path / f"earlier-{number}").exists():
            number += 1
        target.mkdir()
        return target

    def data_of(self, data: DataConfig) -> DataConfig:
        """``data`` with the run's own copy of the tokenizer, if there is one; token shards are where they were."""
        if data.tokenizer == "bytes" or not self.tokenizer.is_dir():
            return data
        sources = data.sources
        if sources is not None:
            parts = data.parts()
            sources = {name: replace(source, shards=parts[name].shards_dir) for name, source in sources.items()}
        shards = data.shards if data.stream else data.shards_dir
        return replace(data, tokenizer=str(self.tokenizer), shards=shards, sources=sources)

    def keep_tokenizer(self, data: DataConfig, tokenizer: TextTokenizer) -> None:
        """Copy ``data.tokenizer``, which was read as ``tokenizer``: complete or not there, without a model next to it.

        Raises UserError if it cannot be written.
        """
        name = Path(data.tokenizer)
        if not isinstance(tokenizer, FastTokenizer) or name == self.tokenizer:
            return

        def same(directory: Path) -> bool:
            try:
                return load_tokenizer(str(directory), data.eot_token).fingerprint == tokenizer.fingerprint
            except UserError:
                return False

        with self._writing():
            if self.tokenizer.exists():  # of a start that came to no checkpoint
                if same(self.tokenizer):
                    return
                self.tokenizer.rename(self._new_place() / "tokenizer")
            for old in self.path.glob("tokenizer*.incomplete"):  # of a start that was killed
                shutil.rmtree(old)
            with new_directory(self.tokenizer, last="tokenizer.json") as partial:
                for file, copy in _tokenizer_files(name).items():
                    shutil.copyfile(file, partial / copy)
                if not same(partial):  # it is changed just now, or no directory at all
                    for file in partial.iterdir():
                        file.unlink()
                    for copy, text in tokenizer.files().items():
                        (partial / copy).write_text(text, encoding="utf-8")
                    if not same(partial):
                        raise UserError(
                            f"data.tokenizer={data.tokenizer} cannot be written such that it reads back alike"
                        )

    def keep_files(self, name: str, files: Sequence[str]) -> None:
        """Copy a user's files, for the record, as ``NAME.py``, ``NAME-1.py`` and so on; copies that differ stay."""
        with self._writing():
            for number, file in enumerate(files):
                target = self.path / (f"{name}-{number}.py" if number else f"{name}.py")
                content = Path(file).expanduser().read_bytes()
                if target.exists() and (before := sha256_of(target)) != hashlib.sha256(content).hexdigest():
                    target.rename(target.with_name(f"{target.stem}-{before[:12]}.py"))
                write_bytes(target, content)

    def finished_step(self) -> int | None:
        """The last step of a run that finished here, or None."""
        with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            done = read_json(self.done)
            return int(done["step"]) if done["status"] == "finished" else None
        return None

    def ending(self) -> str | None:
        """How the run ended, in one line; None if it does not say."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            done = read_json(self.done)
            return f"{done['status']} at step {done['step']}: {done['reason']} ({self.path})"
        return None

    def write_start(self, config_yaml: str, plan: str, env: dict[str, Any]) -> None:
        """What this attempt is; an earlier attempt's ``done.json`` no longer holds."""
        with self._writing():
            self.done.unlink(missing_ok=True)
            write_text(self.config, config_yaml)
            write_text(self.plan, plan)
            write_json(self.path / "env.json", env)

    def write_done(self, status: str, step: int, reason: str) -> None:
        """``status`` is finished, stopped, diverged or failed."""
        try:
            write_json(self.done, {"status": status, "step": step, "reason": reason})
        except OSError as error:
            say(f"warning: {self.done} cannot be written: {reason_of(error)}")


def require_tokenizer(checkpoint: Checkpoint, tokenizer: TextTokenizer) -> None:
    """Raises UserError if the run was trained with another tokenizer: its tokens would be other words."""
    if (before := checkpoint.meta.get("tokenizer")) != tokenizer.fingerprint:
        raise UserError(
            f"{checkpoint.path} was trained with the tokenizer of fingerprint {before}; "
            f"data.tokenizer holds {tokenizer.fingerprint} now: name the directory that holds the run's"
        )


def _tokenizer_files(place: Path) -> dict[Path, str]:
    """The files that ``place`` is read from, and their names in a directory of a tokenizer."""
    if place.is_file() and place.suffix == ".json":
        others = {place.with_name(name): name for name in _TOKENIZER_FILES[1:]}
        return {place: _TOKENIZER_FILES[0]} | {file: name for file, name in others.items() if file.is_file()}
    names = _TOKENIZER_FILES if (place / _TOKENIZER_FILES[0]).exists() else _TOKENIZER_FILES + _OTHER_TOKENIZER_FILES
    files = [file for file in (place.iterdir() if place.is_dir() else ()) if file.is_file()]
    return {file: file.name for file in files if file.name in names or file.suffix == ".model"}


def _is_running(pid: int, began: float | None) -> bool:
    """Whether there is such a process, and, if ``began`` is known, whether it is the one that had this number then."""
    try:
        process = psutil.Process(pid)
        same = began is None or abs(process.create_time() - began) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError):
        return False


def _began(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def environment(world: World, restored_step: int) -> dict[str, Any]:
    """What ``env.json`` says: versions, machine, processes, command line, the code's revision."""
    packages = ("transformers", "tokenizers", "datasets", "accelerate", "triton", "numpy", "hydra-core")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "revision": revision(),
        "python": platform.python_version(),
        # torch names its build itself ("+cu130"), which the name of its package may lack
        "packages": {"torch": str(torch.__version__)} | {name: _version(name) for name in packages},
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": str(world.device) if world.device.type == "cpu" else torch.cuda.get_device_name(world.device),
        "world_size": world.size,
        "threads": torch.get_num_threads(),
        "started_at_step": restored_step,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def revision() -> str | None:
    """Of this checkout, as git describes it; None without git or history."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
