"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write under another name, flush to the disk, then rename."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """As ``write_text``."""
    partial = path.with_name(f"{path.name}.incomplete")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def sync_directory(path: Path) -> bool:
    """Make renames inside ``path`` survive a power cut. False where the file system (CIFS, some FUSE) has no such."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def new_directory(target: Path, last: str) -> Iterator[Path]:
    """A directory to write into that becomes ``target``; where that exists, its files do, that named ``last`` as the
    last one. What fails leaves ``target`` as it was."""
    exists = target.is_dir()
    name = f"{target.name}.{os.getpid()}.incomplete"
    partial = target / name if exists else target.with_name(name)
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed and had the same number
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if exists:
            for file in sorted(partial.iterdir(), key=lambda file: file.name == last):
                file.replace(target / file.name)
        else:
            partial.replace(target)
        sync_directory(target if exists else target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def lock(file: IO[Any], *, shared: bool = False) -> bool | None:
    """Take an flock without waiting: True if it is held now, False if another holds it, None if there are no locks."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return False if error.errno == errno.EWOULDBLOCK else None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ValueError, one line, if it holds anything else; OSError as reading does."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not a JSON object")
    return value
