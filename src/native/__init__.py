"""C++ kernels for CPUs: built once by the system's compiler, cached by source, compiler and CPU, called by ctypes.

A package of its own because ``models`` and ``precision`` both have such kernels and neither may know the other. Nothing
is built or loaded at import, and torch is not imported: ``begin`` can start the compilers before it is.

What a source wants of the compiler beside the common flags stands in a line of its own, ``// flags: -f...``.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# No fast-math: float32 operations are what they say. libgomp is the one torch has loaded: one pool of threads.
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_FLAGS_OF_A_SOURCE = "// flags: "

# A compiler ends with this process, however that ends: then the pipe at standard input does too, and the process group
# is killed. A signal at the parent's death would reach g++ alone, not the cc1plus that works for it.
_WITH_ITS_PARENT = """
exec 3<&0
{ read -r _ <&3; kill -KILL 0; } >/dev/null 2>&1 &
"$@" </dev/null 3<&-
status=$?
{ kill -KILL $!; wait $!; } >/dev/null 2>&1
exit $status
"""
_STALE_SECONDS = 600  # far longer than any source takes

_begun: dict[Path, tuple[Thread, Future[Path]]] = {}
_compilers: set[subprocess.Popen[str]] = set()
_ending = Event()


def _in_forked_child() -> None:
    _begun.clear()  # threads stay with the parent
    for process in _compilers:
        if process.stdin is not None:
            process.stdin.close()  # a pipe held on to here would hide the parent's end from its compiler
    _compilers.clear()
    if "torch" in sys.modules:  # an OpenMP region would wait for the parent's threads: ours, and torch's
        sys.modules["torch"].set_num_threads(1)


os.register_at_fork(after_in_child=_in_forked_child)


def begin(*sources: Path) -> None:
    """Build, beside what this process does, what the cache does not hold; ``library`` waits for it.

    A process that ends before ends the compilers.
    """
    compiler = _compiler()
    if compiler is None:
        return
    for source in sources:
        future: Future[Path] = Future()
        thread = Thread(target=_fulfil, args=(future, compiler, source), daemon=True)
        _begun[source] = thread, future
        thread.start()


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """The loaded kernels of ``source``, or None, where plain torch has to serve.

    None without a compiler, with NARROWGAUGE_NATIVE=0, and where the build fails: that warns once, with the compiler's
    first line.
    """
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        begun = _begun.get(source)
        built = begun[1].result() if begun else _built(compiler, source)
        _begun.pop(source, None)  # not before: the end of a process that Ctrl-C stops here waits for the thread
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{source.name} was not built, plain torch serves: {output.strip().splitlines()[0]}", stacklevel=2
        )
        return None


def _compiler() -> str | None:
    if os.environ.get("NARROWGAUGE_NATIVE") == "0" or platform.system() != "Linux":
        return None
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def _fulfil(future: Future[Path], compiler: str, source: Path) -> None:
    try:
        future.set_result(_built(compiler, source))
    except BaseException as error:  # for whoever asks for the kernels
        future.set_exception(error)


def _built(compiler: str, source: Path) -> Path:
    flags = (*_FLAGS, *_own_flags(source))
    target = _cache_directory() / f"{source.stem}-{_fingerprint(compiler, source, flags)}.so"
    if target.exists():
        return target
    with _one_at_a_time(target.with_suffix(".lock")) as alone:
        if not target.exists():  # another rank may have built it meanwhile
            _sweep(target, alone)
            with tempfile.NamedTemporaryFile(
                dir=target.parent, prefix=f"{target.stem}-", suffix=".incomplete", delete=False
            ) as partial:
                pass
            try:
                _compile([compiler, *flags, "-o", partial.name, str(source)])
                os.replace(partial.name, target)  # where locks do not hold, several put the same file there
            finally:
                Path(partial.name).unlink(missing_ok=True)
    return target


def _own_flags(source: Path) -> list[str]:
    lines = [line for line in source.read_text().splitlines() if line.startswith(_FLAGS_OF_A_SOURCE)]
    return [flag for line in lines for flag in line.removeprefix(_FLAGS_OF_A_SOURCE).split()]


def _sweep(target: Path, alone: bool) -> None:
    """Removes what killed processes have left: the same target's where nobody else builds it, others' by their age."""
    for path in (*target.parent.glob("*.incomplete"), *target.parent.glob("*.lock")):
        with suppress(OSError):  # another may be sweeping
            same = path.suffix == ".incomplete" and path.name.startswith(target.stem)
            if (alone and same) or time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[bool]:
    """Processes in turn, where the file system has locks (yields whether). One that dies gives its lock back.

    Raises InterruptedError when this process ends before its turn.
    """
    with path.open("w") as file:
        alone = _locked(file)
        try:
            yield alone
        finally:
            path.unlink(missing_ok=True)  # who comes later finds what was built


def _locked(file: IO[str]) -> bool:
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not held on by forked children
            return True
        except BlockingIOError:
            if _ending.is_set():
                raise InterruptedError("the process ends") from None
            time.sleep(0.05)
        except OSError:
            return False


def _compile(command: list[str]) -> None:
    # A process group of its own: Ctrl-C is for the trainer, and g++ ends with all that it has started.
    with subprocess.Popen(
        ["/bin/sh", "-c", _WITH_ITS_PARENT, "sh", *command],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        assert process.stderr is not None
        _compilers.add(process)
        try:
            if _ending.is_set():
                _end(process)
            errors = process.stderr.read()  # communicate() would close the pipe at standard input
            process.wait()
        except BaseException:  # Ctrl-C: what lived on would write again what the caller removes
            _end(process)
            process.wait()
            raise
        finally:
            _compilers.discard(process)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)


@atexit.register
def _end_compilers() -> None:
    """Ends what nobody waits for any more; their threads then tidy up."""
    _ending.set()
    for process in tuple(_compilers):
        _end(process)
    for thread, _ in _begun.values():
        thread.join(timeout=5)


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


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
