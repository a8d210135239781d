"""C++ kernels for CPUs: built once by the system's compiler, cached by source, compiler and CPU, called by ctypes.

A source is one library; it includes its parts (``#include "PART"``), which are part of what a library is cached by.

A package of its own because ``models`` and ``precision`` both have such kernels and neither may know the other. Nothing
is built or loaded at import, and torch is not imported: ``begin`` can start the compilers before it is.

What a source wants of the compiler besides the common flags stands in a line of its own, ``// flags: -f...``.

A library is code: it is loaded only where this user alone can have written it, and complete. Behind it stands the
SHA-256 of what comes before, which no loader minds: one file, renamed into place, cannot be at odds with its digest.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import signal
import stat
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

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_ANYTHING = stat.S_IRWXG | stat.S_IRWXO
_DIGEST_BYTES = 32
_TOKEN = os.urandom(8).hex()

_begun: dict[Path, tuple[Thread, Future[int]]] = {}
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
    """Build, while this process goes on, what the cache does not hold; ``library`` waits for it.

    A process that ends before ends the compilers.
    """
    compiler = _compiler()
    if compiler is None:
        return
    for source in sources:
        future: Future[int] = Future()
        thread = Thread(target=_fulfil, args=(future, compiler, source), daemon=True)
        _begun[source] = thread, future
        thread.start()


@functools.cache
def library(source: Path, *structures: type[ctypes.Structure]) -> ctypes.CDLL | None:
    """The loaded kernels of ``source``, or None, where plain torch has to serve.

    None without a compiler, with NARROWGAUGE_NATIVE=0, and where the build fails: that warns once, with the compiler's
    first line. Raises RuntimeError unless every structure CNAME has the size that the library's ``size_of_NAME`` says.
    """
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        begun = _begun.get(source)
        built = begun[1].result() if begun else _built(compiler, source)
        _begun.pop(source, None)  # not before: the end of a process that Ctrl-C stops here waits for the thread
        # What was examined is what is loaded: nobody can put another file there in between. The descriptor stays open,
        # for the loader knows libraries by their names, and another one of this number would be taken for this one.
        kernels = ctypes.CDLL(f"/proc/self/fd/{built}")
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{source.name} was not built, plain torch serves: {output.strip().splitlines()[0]}", stacklevel=2
        )
        return None
    for structure in structures:
        name, here = structure.__name__.removeprefix("C"), ctypes.sizeof(structure)
        if (there := kernels[f"size_of_{name}"]()) != here:
            raise RuntimeError(f"{name} of {source.name} has {there} bytes in C++ and {here} in Python: fields differ")
    return kernels


def _compiler() -> str | None:
    if os.environ.get("NARROWGAUGE_NATIVE") == "0" or platform.system() != "Linux":
        return None
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def _fulfil(future: Future[int], compiler: str, source: Path) -> None:
    try:
        future.set_result(_built(compiler, source))
    except BaseException as error:  # for whoever asks for the kernels
        future.set_exception(error)


def _built(compiler: str, source: Path) -> int:
    """A descriptor of the library, examined."""
    flags = (*_FLAGS, *_own_flags(source))
    target = _cache_directory() / f"{source.stem}-{_fingerprint(compiler, source, flags)}.so"
    if (built := _examined(target)) is not None:
        return built
    with _one_at_a_time(target.with_suffix(".lock")) as alone:
        if (built := _examined(target)) is None:  # another rank may have built it meanwhile
            _sweep(target, alone)
            with tempfile.NamedTemporaryFile(
                dir=target.parent, prefix=f"{target.stem}-", suffix=".incomplete", delete=False
            ) as partial:
                pass
            try:
                _compile([compiler, *flags, "-o", partial.name, str(source)])
                _seal(Path(partial.name))
                os.replace(partial.name, target)  # where locks do not hold, several put the same file there
            finally:
                Path(partial.name).unlink(missing_ok=True)
            built = _examined(target)
    if built is None:
        raise OSError(f"{target} does not read back as it was written")
    return built


def _seal(path: Path) -> None:
    """Put the digest behind what the compiler wrote, and take others' leave to write from it.

    Nothing is flushed to the disk: what a power cut tears does not match its digest, and is built again.
    """
    with path.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        file.write(digest)
        os.fchmod(file.fileno(), stat.S_IRWXU)


def _examined(path: Path) -> int | None:
    """A descriptor of ``path`` if it is a library that this user alone can have written, and complete; else None."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # no link, and no wait for a pipe's end
    except OSError:
        return None
    with open(descriptor, "rb", closefd=False) as file:
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & _OTHERS_WRITE:
            content = file.read()
            if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]:
                return descriptor
        else:
            warnings.warn(f"{path} may be somebody else's work: it is not loaded, but built anew", stacklevel=2)
    os.close(descriptor)
    return None


def _own_flags(source: Path) -> list[str]:
    lines = re.findall(r"^// flags: (.*)", source.read_text(encoding="utf-8"), re.MULTILINE)
    return " ".join(lines).split()


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
    with path.open("w", encoding="utf-8") as file:
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
        encoding="utf-8",
        errors="replace",
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
    shutil.rmtree(_of_this_process(), ignore_errors=True)


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _cache_directory() -> Path:
    """``$XDG_CACHE_HOME/narrowgauge``; where that cannot be written or trusted, a private place below ``$TMPDIR``."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    target = Path(home) / "narrowgauge"
    why = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir(mode=stat.S_IRWXU, exist_ok=True)
        why = _mistrust(target)
        if why is None and os.access(target, os.W_OK):
            return target
    except OSError:  # a read-only home
        pass
    private = next(place for place in (_of_this_user(), _of_this_process()) if _is_private(place))
    if why is not None:
        warnings.warn(f"{why}: kernels are loaded from {private} instead", stacklevel=2)
    return private


def _mistrust(directory: Path) -> str | None:
    """Why a library in ``directory`` may be somebody else's work."""
    if {directory.lstat().st_uid, directory.stat().st_uid} != {os.getuid()}:  # of a link, and of where it leads
        return f"{directory} belongs to another user"
    if directory.stat().st_mode & _OTHERS_WRITE:
        return f"{directory} can be written by other users (chmod go-w)"
    return None


def _of_this_user() -> Path:
    return Path(tempfile.gettempdir()) / f"narrowgauge-{os.getuid()}"


def _of_this_process() -> Path:
    """Nobody knows its name before it is there; removed at the end."""
    return _of_this_user().with_name(f"narrowgauge-{os.getuid()}-{os.getpid()}-{_TOKEN}")


def _is_private(directory: Path) -> bool:
    """Whether ``directory``, which is made where it is not there, is this user's alone."""
    with suppress(FileExistsError):
        directory.mkdir(mode=stat.S_IRWXU)
    found = directory.lstat()
    return found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode) and not found.st_mode & _OTHERS_ANYTHING


def _fingerprint(compiler: str, source: Path, flags: tuple[str, ...]) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line for line in lines if line.startswith(("flags", "Feat")))
    except (OSError, StopIteration):
        cpu = platform.processor()
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout.decode(errors="replace")
    parts = (*(part.read_text(encoding="utf-8") for part in _parts(source)), " ".join(flags), cpu, version)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _parts(source: Path) -> list[Path]:
    """``source``, and the files that it and its parts include by quoted names."""
    parts = [source]
    for part in parts:  # which grows meanwhile
        for name in re.findall(r'^#include "(.+)"', part.read_text(encoding="utf-8"), re.MULTILINE):
            path = (part.parent / name).resolve()
            parts += [] if path in parts else [path]
    return parts


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
