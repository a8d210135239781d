"""C++ kernels for CPUs: built once by the system's compiler, cached by source, compiler and CPU, called by ctypes.

A package of its own because ``models`` and ``precision`` both have such kernels and neither may know the other. Nothing
is built or loaded at import.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

# A forked child has none of its parent's threads, and an OpenMP region would wait for them: ours, and torch's.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

# No fast-math: float32 operations are what they say. libgomp is the one torch has loaded: one pool of threads.
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


@functools.cache
def library(source: Path, *flags: str) -> ctypes.CDLL | None:
    """The loaded kernels of ``source``, or None, where plain torch has to serve.

    None without a compiler, with NARROWGAUGE_NATIVE=0, and where the build fails: that warns once, with the compiler's
    first line.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None or os.environ.get("NARROWGAUGE_NATIVE") == "0" or platform.system() != "Linux":
        return None
    try:
        return ctypes.CDLL(str(_built(compiler, source, (*_FLAGS, *flags))))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{source.name} was not built, plain torch serves: {output.strip().splitlines()[0]}", stacklevel=2
        )
        return None


def _built(compiler: str, source: Path, flags: tuple[str, ...]) -> Path:
    target = _cache_directory() / f"{source.stem}-{_fingerprint(compiler, source, flags)}.so"
    if not target.exists():
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".incomplete", delete=False) as partial:
            pass
        try:
            command = [compiler, *flags, "-o", partial.name, str(source)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(partial.name, target)  # ranks that build at once put the same file there
        finally:
            Path(partial.name).unlink(missing_ok=True)
    return target


def _cache_directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    target = Path(home) / "narrowgauge"
    try:
        target.mkdir(parents=True, exist_ok=True)
        if os.access(target, os.W_OK):
            return target
    except OSError:  # a read-only home
        pass
    target = Path(tempfile.gettempdir()) / f"narrowgauge-{os.getuid()}"
    target.mkdir(mode=0o700, exist_ok=True)
    if target.stat().st_uid != os.getuid():
        raise OSError(f"{target} belongs to somebody else: what is loaded from there cannot be trusted")
    return target


def _fingerprint(compiler: str, source: Path, flags: tuple[str, ...]) -> str:
    try:
        cpu = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat"))
        )
    except (OSError, StopIteration):
        cpu = platform.processor()
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    parts = (source.read_text(), " ".join(flags), cpu, version)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a contiguous tensor's data lies; null for None. Raises ValueError for any other tensor."""
    if tensor is None:
        return ctypes.c_void_p(None)
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"kernels read contiguous tensors on the CPU, not strides {tensor.stride()} on {tensor.device}"
        )
    return ctypes.c_void_p(tensor.data_ptr())


def size(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def real(value: float) -> ctypes.c_float:
    return ctypes.c_float(value)
