"""The compiled CPU kernels of this folder: built once by the system's compiler, cached by source hash and CPU.

``library()`` is None where there is no compiler, where the build fails, or where NARROWGAUGE_NATIVE=0 forbids it; the
plain-torch definitions then serve. Nothing is built or loaded at import.
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

from torch import Tensor

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None. A failed build warns once, with the compiler's first line."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None or os.environ.get("NARROWGAUGE_NATIVE") == "0" or platform.system() != "Linux":
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{SOURCE.name} was not built, plain torch serves: {output.strip().splitlines()[0]}", stacklevel=2
        )
        return None


def loaded() -> ctypes.CDLL:
    """The kernels, once ``library()`` is known to be there."""
    kernels = library()
    assert kernels is not None
    return kernels


@functools.cache
def has_attention() -> bool:
    """Whether the kernels are there and this CPU multiplies BF16 pairs (AVX512_BF16)."""
    kernels = library()
    return kernels is not None and bool(kernels.has_attention())


def _built(compiler: str) -> Path:
    target = _cache_directory() / f"models-{_fingerprint(compiler)}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".incomplete", delete=False) as partial:
            pass
        try:
            command = [compiler, *_FLAGS, "-o", partial.name, str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(partial.name, target)  # ranks that build at once put the same file there
        finally:
            Path(partial.name).unlink(missing_ok=True)
    return target


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        target = Path(base) / "narrowgauge"
        target.mkdir(parents=True, exist_ok=True)
        return target
    except OSError:  # a read-only home
        return Path(tempfile.gettempdir()) / f"narrowgauge-{os.getuid()}"


def _fingerprint(compiler: str) -> str:
    try:
        cpu = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat"))
        )
    except (OSError, StopIteration):
        cpu = platform.processor()
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    parts = (SOURCE.read_text(), " ".join(_FLAGS), cpu, version)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a contiguous tensor's data lies; null for None."""
    if tensor is None:
        return ctypes.c_void_p(None)
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr())


def size(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def real(value: float) -> ctypes.c_float:
    return ctypes.c_float(value)
