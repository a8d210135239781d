"""Limits of containers and processes, and what is said when memory ran out."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import torch
from narrowgauge.trainer import machine
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.costs import micro_batch_size
from narrowgauge.trainer.distributed import World
from narrowgauge.trainer.machine import available_cores, memory_of_process, out_of_memory_line, threads_of_process

GB = 10**9
NOTHING = {  # as kernels say that there is no limit
    "memory/memory.limit_in_bytes": "9223372036854771712",
    "cpu/cpu.cfs_quota_us": "-1",
    "cpu/cpu.cfs_period_us": "100000",
}


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 GB and 16 cores."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Mock(total=64 * GB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def make_root(root: Path, groups: str, mounts: list[str], files: dict[str, str]) -> Path:
    """A root directory whose process is in ``groups``; ``files``: below /sys/fs/cgroup."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(groups)
    lines = [f"{number} 20 0:{number} {line}\n" for number, line in enumerate(mounts, 30)]
    (root / "proc" / "self" / "mountinfo").write_text("20 1 254:0 / / rw - ext4 /dev/vda rw\n" + "".join(lines))
    for name, text in files.items():
        file = root / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


V2 = ["/ /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw"]
V1 = [
    "/ /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
    "/ /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct",
]
OF_DOCKER = [line.replace("/ /sys", "/docker/ab /sys", 1) for line in V1]


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "memory", "cores"),
    [
        pytest.param("0::/a/b\n", V2, {"a/b/memory.max": "max", "a/b/cpu.max": "max 100000"}, 64, 16, id="none"),
        pytest.param("4:memory:/\n2:cpu,cpuacct:/\n", V1, NOTHING, 64, 16, id="none-in-version-1"),
        pytest.param("0::/a/b\n", V2, {"a/b/memory.max": f"{8 * GB}", "a/b/cpu.max": "250000 100000"}, 8, 2, id="own"),
        pytest.param(
            "0::/a/b\n",
            V2,
            {"a/memory.max": f"{4 * GB}", "a/b/memory.max": f"{8 * GB}", "a/cpu.max": "300000 100000"},
            4,
            3,
            id="of-the-group-above",
        ),
        pytest.param("0::/a\n", V2, {"a/memory.max": "max", "a/memory.high": f"{6 * GB}"}, 6, 16, id="high"),
        pytest.param("0::/\n", V2, {"memory.max": f"{2 * GB}", "cpu.max": "50000 100000"}, 2, 1, id="less-than-a-core"),
        pytest.param("0::/../../x\n", V2, {"memory.max": f"{2 * GB}"}, 2, 16, id="outside-of-its-namespace"),
        pytest.param("0::/a\n", V2, {"a/memory.max": f"{99 * GB}", "a/cpu.max": "9900000 100000"}, 64, 16, id="above"),
        pytest.param(
            "4:memory:/a\n2:cpu,cpuacct:/a\n",
            V1,
            NOTHING
            | {"memory/a/memory.limit_in_bytes": f"{8 * GB}"}
            | {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"},
            8,
            4,
            id="version-1",
        ),
        pytest.param(
            "4:memory:/docker/ab\n2:cpu,cpuacct:/docker/ab\n",
            OF_DOCKER,
            {"memory/memory.limit_in_bytes": f"{3 * GB}", "cpu/cpu.cfs_quota_us": "150000"}
            | {"cpu/cpu.cfs_period_us": "50000"},
            3,
            3,
            id="mounted-in-a-container",
        ),
        pytest.param(
            "4:memory:/\n0::/a\n",
            [*V1, "/ /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"],
            NOTHING | {"unified/a/memory.max": f"{5 * GB}"},
            5,
            16,
            id="both-versions",
        ),
        pytest.param(
            "0::/\n",
            [V2[0].replace("/sys/fs/cgroup", "/sys/fs/cgroup/a\\040b")],
            {"a b/memory.max": "1000000000"},
            1,
            16,
            id="a-space-in-the-path",
        ),
    ],
)
def test_the_smallest_limit_counts(
    groups: str, mounts: list[str], files: dict[str, str], memory: int, cores: int, tmp_path: Path
) -> None:
    root = make_root(tmp_path, groups, mounts, files)
    assert memory_of_process(1, root) == memory * GB
    assert memory_of_process(3, root) == memory * GB / 3
    assert available_cores(root) == cores


def test_nothing_changes_without_limits(tmp_path: Path) -> None:
    assert (memory_of_process(3, tmp_path), available_cores(tmp_path)) == (64 * GB / 3, 16)


def test_a_limit_of_each_process_is_not_shared_out() -> None:
    """A real one, in a process of its own: less what is mapped already, and not divided."""
    code = """
import psutil, resource
from unittest.mock import Mock
from narrowgauge.trainer.machine import memory_of_process
psutil.virtual_memory = lambda: Mock(total=64 * 10**9)
for limit, name in ((resource.RLIMIT_AS, "vms"), (resource.RLIMIT_DATA, "data")):
    resource.setrlimit(limit, (getattr(psutil.Process().memory_info(), name) + 3 * 10**9, resource.RLIM_INFINITY))
    print(memory_of_process(1), memory_of_process(2))
    resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert [float(word) for word in told.stdout.split()] == pytest.approx([3 * GB] * 4, rel=0.05)


def test_a_limit_decides_about_the_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(["model=llama_tiny", "data.seq_len=512", "data.global_batch_size=128"])
    model = replace(config.model, vocab_size=4096)
    world = World(0, 1, 1, torch.device("cpu"), None, None)

    def chosen() -> int:
        return micro_batch_size(None, 128, model.activation_bytes(512), world)

    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    before = chosen()
    root = make_root(tmp_path, "0::/\n", V2, {"memory.max": f"{GB}"})
    monkeypatch.setattr("narrowgauge.trainer.costs.memory_of_process", lambda local: memory_of_process(local, root))
    assert 1 <= chosen() < before == 64


@pytest.mark.parametrize(
    ("told", "torchruns_parent", "threads"),
    [
        pytest.param("", None, 8, id="none"),
        pytest.param("3", None, 3, id="a-number"),
        pytest.param("1", None, 1, id="one"),
        pytest.param("5,2", None, 5, id="levels"),
        pytest.param("many", None, 8, id="no-number"),
        pytest.param("0", None, 8, id="zero"),
        pytest.param("1", b"A=1\0B=2", 8, id="torchrun-set-it"),
        pytest.param("1", b"A=1\0OMP_NUM_THREADS=1", 1, id="set-before-torchrun"),
        pytest.param("6", b"A=1", 6, id="more-than-torchrun-sets"),
    ],
)
def test_a_users_number_of_threads_counts(
    told: str, torchruns_parent: bytes | None, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_GIVEN_THREADS", told)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchruns_parent is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        environ = tmp_path / f"proc/{machine.PARENT}/environ"
        environ.parent.mkdir(parents=True)
        environ.write_bytes(torchruns_parent)
    assert threads_of_process(2, tmp_path) == threads


@pytest.mark.parametrize(
    ("chosen", "policy"),
    [
        pytest.param({}, "PASSIVE", id="default"),
        pytest.param({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", id="the-users"),
        pytest.param({"GOMP_SPINCOUNT": "1000"}, None, id="in-another-way"),
    ],
)
def test_threads_wait_without_spinning(chosen: dict[str, str], policy: str | None) -> None:
    """Asked of OpenMP itself, which prints what it read when torch loads it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    code = """
import ctypes, importlib.util, os, pathlib
from narrowgauge import trainer
libraries = pathlib.Path(importlib.util.find_spec("torch").origin).parent / "lib"
for library in libraries.glob("libgomp*"):
    ctypes.CDLL(str(library))  # as torch does
print(os.environ.get("OMP_WAIT_POLICY"))
"""
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=env | chosen | {"OMP_DISPLAY_ENV": "TRUE"},
    )
    assert told.stdout.strip() == str(policy)
    assert policy is None or f"OMP_WAIT_POLICY = '{policy}'" in told.stderr


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1 GiB is free."


def caused(cause: Exception) -> RuntimeError:
    error = RuntimeError("backend 'inductor' raised")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        pytest.param(MemoryError(), "memory ran out; set", id="python"),
        pytest.param(
            RuntimeError(f"{ALLOCATOR}allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"),
            "memory ran out: 4.29 GB more were needed at once; set",
            id="torch",
        ),
        pytest.param(RuntimeError(f"{ALLOCATOR}allocate 4096 bytes."), "4,096 bytes more were needed", id="little"),
        pytest.param(torch.OutOfMemoryError(CUDA), "the GPU's memory ran out: 2.5 GiB more were needed", id="gpu"),
        pytest.param(RuntimeError("std::bad_alloc"), "memory ran out; set", id="bad-alloc"),
        pytest.param(OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out; set", id="system"),
        pytest.param(caused(MemoryError()), "memory ran out; set", id="compiler"),
    ],
)
def test_what_ran_out_is_told_in_one_line(error: Exception, words: str) -> None:
    line = out_of_memory_line(error, 8)
    assert line is not None
    assert words in line
    assert line.endswith("train.micro_batch_size than 8")
    assert "\n" not in line
    assert "1 already" in (out_of_memory_line(error, 1) or "")
    assert (out_of_memory_line(error) or "").endswith("train.micro_batch_size")


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(RuntimeError("shapes cannot be multiplied"), id="shapes"),
        pytest.param(ValueError("out of memory"), id="a-word"),
        pytest.param(OSError(errno.ENOSPC, "No space left on device"), id="disk"),
    ],
)
def test_other_errors_are_not_for_want_of_memory(error: Exception) -> None:
    assert out_of_memory_line(error) is None


def test_a_real_allocation_that_fails_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert "needed at once" in (out_of_memory_line(caught.value) or "")
