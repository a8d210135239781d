"""The index of a DCP checkpoint, which torch writes as a pickle, read without executing anything.

A pickle is a program: it may call whatever it can name, and set attributes of it. Here it can name what an index of
plain tensors is made of, and sets attributes of what it has made alone.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import filesystem as files
from torch.distributed.checkpoint import metadata as kinds
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

NAME = ".metadata"
_METADATA = ("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties")
_CLASSES: dict[tuple[str, str], Any] = {
    **{(kinds.__name__, name): getattr(kinds, name) for name in (*_METADATA, "StorageMeta", "_MEM_FORMAT_ENCODING")},
    (files.__name__, "_StorageInfo"): files._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
    # Of where it was written, which is not asked: the second as Python 3.13 calls it.
    ("pathlib", "PosixPath"): lambda *parts: "",
    ("pathlib._local", "PosixPath"): lambda *parts: "",
}
# Made anew by each load; a member of an enumeration is this process's own.
_STATEFUL = frozenset(kind for kind in _CLASSES.values() if isinstance(kind, type) and is_dataclass(kind))


class ForbiddenError(Exception):
    """The index names what no index of ours holds: somebody has made it to execute something."""


class _Unpickler(pickle._Unpickler):
    """The one written in Python: the other cannot be kept from setting attributes of a class it has named."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        raise ForbiddenError(f"it names {module}.{name}")

    def load_build(self) -> None:
        if type(self.stack[-2]) not in _STATEFUL:
            raise ForbiddenError(f"it sets attributes of {self.stack[-2]!r:.60}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


class Reader(FileSystemReader):
    """Reads the tensors that ``described`` (name -> dtype, *shape) tells of, and nothing else.

    ``read_metadata`` raises ValueError for an index that cannot be read or is of other tensors, and ForbiddenError.
    """

    def __init__(self, path: Path, described: Mapping[str, Any]) -> None:
        super().__init__(path)
        self.directory = path
        self._described = described

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (self.directory / NAME).open("rb") as file:
            try:
                metadata = _Unpickler(file).load()
                _require(metadata, Metadata)
                _require_plain(metadata, self._described)
            except (OSError, ForbiddenError):
                raise
            except Exception as error:  # unpickling garbage raises nearly anything
                raise ValueError(f"{NAME} cannot be read: {type(error).__name__}") from error
        metadata.storage_meta = kinds.StorageMeta(load_id=self.load_id)
        metadata.planner_data = None
        return metadata  # type: ignore[no-any-return]


def _require_plain(metadata: Any, described: Mapping[str, Any]) -> None:
    """Raises ValueError if it is not of these tensors, each whole numbers and plain values, in files of this place."""
    there = {}
    for name, entry in metadata.state_dict_metadata.items():
        _require(entry, TensorStorageMetadata)
        for chunk in entry.chunks:
            _require(chunk, kinds.ChunkStorageMetadata)
        there[name] = [str(entry.properties.dtype).removeprefix("torch."), *entry.size]
    if there != described:
        raise ValueError("other tensors")
    for index, info in metadata.storage_data.items():
        _require(index, kinds.MetadataIndex)
        _require(info, files._StorageInfo)
        if info.transform_descriptors:
            raise ForbiddenError(f"it has tensors decoded by {info.transform_descriptors}")
        if Path(info.relative_path).name != info.relative_path:
            raise ForbiddenError(f"it reads {info.relative_path}, outside of the checkpoint")


def _require(value: Any, kind: type) -> None:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} for a {kind.__name__}")
