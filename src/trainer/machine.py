"""What a process may use of the machine: cores and memory, by the smallest of all limits; and when that was too little.

A cgroup's limits (of a container, or of a job in a queue) hold for all processes in it together, an rlimit for each.
"""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from .errors import one_line
from .lifeline import PARENT, launched_by_torchrun

_THREADS = "OMP_NUM_THREADS"
_GIVEN_THREADS = os.environ.get(_THREADS, "")  # before this process sets it for those that it starts
_ROOT = Path("/")
_MESSAGES = (  # of torch's allocators, and of C++
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "Cannot allocate memory",
)
_SIZE = re.compile(r"(?:you tried to allocate|[Tt]ried to allocate) ([\d.]+) ?(bytes|[KMG]i?B)?")


def available_cores(root: Path = _ROOT) -> int:
    """Cores that this process may run on and has the time of, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(share) for share in _cpu_shares(root))]))


def threads_of_process(local_processes: int, root: Path = _ROOT) -> int:
    """CPU threads for one of ``local_processes`` alike: what OMP_NUM_THREADS says, if a user set it; else its share."""
    outermost = _GIVEN_THREADS.split(",")[0].strip()  # a number for every level of nesting
    if re.fullmatch(r"0*[1-9]\d{0,5}", outermost, re.ASCII) and not _is_torchruns(outermost, root):
        return int(outermost)
    return max(1, available_cores(root) // local_processes)


def _is_torchruns(threads: str, root: Path) -> bool:
    """Whether torchrun set OMP_NUM_THREADS=1, as for workers of a user who set none: that idles all cores but one each.

    What a process was started with stands in /proc, whatever it set for its children.
    """
    if threads != "1" or not launched_by_torchrun():
        return False
    try:
        return not any(
            entry.startswith(f"{_THREADS}=".encode())
            for entry in (root / f"proc/{PARENT}/environ").read_bytes().split(b"\0")
        )
    except OSError:
        return True


def memory_of_process(local_processes: int, root: Path = _ROOT) -> float:
    """Bytes for one of ``local_processes`` alike: what it is given, not what is free just now.

    Of its address space, what is not mapped yet: torch's libraries take gigabytes of it, and no memory.
    """
    shared = min([psutil.virtual_memory().total, *_memory_limits(root)])
    return float(max(0, min([shared / local_processes, *_own_limits()])))


def out_of_memory_line(error: BaseException, micro_batch_size: int | None = None) -> str | None:
    """What to do about ``error``, in one line, if it says that memory ran out; else None.

    ``micro_batch_size``: the one in use, in sequences.
    """
    if error.__cause__ is not None and (line := out_of_memory_line(error.__cause__, micro_batch_size)) is not None:
        return line  # torch.compile wraps what it met
    text = one_line(error)
    short = isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not short and not (isinstance(error, RuntimeError) and any(words in text for words in _MESSAGES)):
        return None
    where = "the GPU's memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
    found = _SIZE.search(text)
    wanted = f": {_size(float(found[1]), found[2])} more were needed at once" if found else ""
    if micro_batch_size == 1:
        return f"{where} ran out{wanted}; train.micro_batch_size is 1 already: more processes, or a smaller model"
    now = "" if micro_batch_size is None else f" than {micro_batch_size}"
    return f"{where} ran out{wanted}; set a smaller train.micro_batch_size{now}"


def _size(size: float, unit: str | None) -> str:
    if unit not in (None, "bytes"):
        return f"{size:g} {unit}"
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size:,.0f} bytes"


def _own_limits() -> Iterator[float]:
    used = psutil.Process().memory_info()
    for limit, taken in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, getattr(used, "data", 0))):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield soft - taken


def _memory_limits(root: Path) -> Iterator[float]:
    for group in _groups("memory", root):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            if (words := _words(group / name)) is not None:  # "max", or about 2^63, where there is none
                yield float(words[0]) if words[0].isdigit() else float("inf")


def _cpu_shares(root: Path) -> Iterator[float]:
    """Seconds of CPU time a second."""
    for group in _groups("cpu", root):
        words = _words(group / "cpu.max") or [
            *(_words(group / "cpu.cfs_quota_us") or ["max"]),
            *(_words(group / "cpu.cfs_period_us") or []),
        ]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):  # "max", or -1, for none
            yield int(words[0]) / int(words[1])


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The directories of this process's group and of all above it, in both versions' hierarchies."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):  # 0::/a/b, or 4:cpu,cpuacct:/a/b
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        name = "" if kind == "cgroup2" else controller
        if name not in paths or kind not in ("cgroup", "cgroup2") or (name and name not in options.split(",")):
            continue
        top, point = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), word) for word in mount.split(" ")[3:5])
        here = root / point.lstrip("/")
        inside = Path(os.path.normpath(paths[name]))
        if inside.is_relative_to(top):  # else the path is of another namespace: what is mounted is all there is to see
            inside = inside.relative_to(top)
            yield from (here / each for each in (inside, *inside.parents))
        else:
            yield here


def _words(file: Path) -> list[str] | None:
    return words[0].split() if (words := _lines(file)) and words[0].split() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
