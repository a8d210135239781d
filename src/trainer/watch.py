"""What every process is doing, so that a run that stands still says which rank it waits for.

Each process writes a heartbeat into the store of the process group from a thread of its own: what it is doing, and how
often that changed. A process that is stopped, or whose machine is gone, no longer beats; one that hangs beats on.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch.distributed as dist

from .lifeline import launched_by_torchrun, lost_launcher

_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 5 * _BEAT_SECONDS  # without a beat
_SAY_SECONDS = 60.0  # without progress before rank 0 says so; doubled after every time
_ENDED = 1


@dataclass(frozen=True)
class Beat:
    """One rank's newest heartbeat, and when, on this process's clock, it was first seen."""

    number: int
    progress: int
    section: str
    waits: bool
    seen: float


class Watch:
    """The sections of this process's work, and a thread that writes them into ``store``; None for a process alone."""

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None) -> None:
        self._rank, self._size, self._store = rank, size, store
        self._state = ("starting", False)  # section, and whether this process is waiting for other ranks
        self._progress = 0
        self._beats = 0
        self._training = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        if self._store is not None:
            self._beat()
        if self._store is not None or launched_by_torchrun():
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def at(self, section: str) -> None:
        """This process begins ``section``."""
        self._state = (section, False)
        self._progress += 1

    @property
    def section(self) -> str:
        return self._state[0]

    def training(self) -> None:
        """From now on a lost launcher must not end this process at once: there is something to save."""
        self._training = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While this process waits for others."""
        before = self._state
        self._state = (before[0], True)
        try:
            yield
        finally:
            self._state = before
            self._progress += 1

    def accuse(self) -> str:
        """Which ranks stand still, and in which section, found out within a few beats. Empty if nothing is known."""
        found: list[str] = []

        def ask() -> None:
            with suppress(RuntimeError, ValueError):  # the store went with the launcher or with rank 0
                first = self._read({})
                time.sleep(_SILENT_SECONDS)
                found.append(_describe(self._read(first), self._rank, time.monotonic()))

        if self._store is not None:
            thread = threading.Thread(target=ask, daemon=True)  # left behind if the store's machine is gone
            thread.start()
            thread.join(3 * _SILENT_SECONDS)
        return found[0] if found else ""

    def _run(self) -> None:
        seen: dict[int, Beat] = {}
        moved, wait = time.monotonic(), _SAY_SECONDS
        while not self._end.wait(_BEAT_SECONDS):
            if lost_launcher() and not self._training:
                os._exit(_ENDED)  # the main thread may be inside a library that no signal reaches
            if self._store is None:
                continue
            try:
                self._beat()
                if self._rank:
                    continue
                before, seen = seen, self._read(seen)
            except (RuntimeError, ValueError):
                continue
            if any(rank not in before or beat.progress != before[rank].progress for rank, beat in seen.items()):
                # Not at each of the steps that take as long.
                moved, wait = time.monotonic(), max(_SAY_SECONDS, 2 * (time.monotonic() - moved))
            elif time.monotonic() - moved >= wait:
                stood = time.monotonic() - moved
                with suppress(OSError, ValueError):  # the terminal may be gone
                    print(f"no progress for {stood:.0f} s: {_describe(seen, 0, time.monotonic())}", flush=True)
                wait *= 2

    def _beat(self) -> None:
        assert self._store is not None
        self._beats += 1
        with self._lock:
            self._store.set(f"beat/{self._rank}", json.dumps([self._beats, self._progress, *self._state]))

    def _read(self, before: Mapping[int, Beat]) -> dict[int, Beat]:
        assert self._store is not None
        keys = [f"beat/{rank}" for rank in range(self._size)]
        with self._lock:
            if not self._store.check(keys):  # some have only just started
                return dict(before)
            texts = self._store.multi_get(keys)
        now, beats = time.monotonic(), {}
        for rank, text in enumerate(texts):
            number, progress, section, waits = json.loads(text)
            old = before.get(rank)
            seen = now if old is None or old.number != number else old.seen
            beats[rank] = Beat(number, progress, section, waits, seen)
        return beats


def _describe(beats: Mapping[int, Beat], reader: int, now: float) -> str:
    """Silent ranks; else those that wait for nobody; else what all do."""
    silent = {rank: beat for rank, beat in beats.items() if rank != reader and now - beat.seen >= _SILENT_SECONDS * 0.9}
    if silent:
        return "; ".join(
            f"rank {rank} gives no sign of life, last heard of in: {beat.section}" for rank, beat in silent.items()
        )
    working: dict[str, list[int]] = {}
    for rank, beat in beats.items():
        if not beat.waits:
            working.setdefault(beat.section, []).append(rank)
    if not working:
        return "all ranks wait for one another"
    return "; ".join(f"{_ranks(ranks)} in: {section}" for section, ranks in sorted(working.items()))


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown} {'are' if len(ranks) > 1 else 'is'}"
