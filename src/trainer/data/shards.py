"""Prepared token shards, memory-mapped and compared with their manifest, which says whose tokens they hold."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import reprlib
import resource
from pathlib import Path
from typing import Any, TypedDict, cast, get_type_hints

import numpy as np

from ..errors import UserError, one_line
from ..files import read_json
from .batches import TokenStream
from .config import DataConfig

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
SINCE_VERSION_1 = {"bad_rows": 0, "max_line_bytes": 0}  # no part of the fingerprint: tokens say it all
_NPY_HEADER_BYTES = 1 << 14
_OTHER_OPEN_FILES = 256  # to come, in addition to those that are


class ShardInfo(TypedDict):
    """One shard in the manifest."""

    file: str
    documents_file: str
    source: str
    source_identity: str
    tokenizer: str
    tokens: int
    documents: int
    empty_documents: int
    bad_rows: int  # left out
    max_line_bytes: int  # beyond which they were bad; 0: no such limit, as in shards of older versions
    bytes: int
    sha256: str
    documents_sha256: str


def fingerprint_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def shard_info(value: Any) -> ShardInfo:
    """``value`` out of a JSON file, once it is what it has to be. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"a shard is {reprlib.repr(value)}, not an object")
    info = SINCE_VERSION_1 | value
    for key, kind in get_type_hints(ShardInfo).items():
        if type(info.get(key)) is not kind or (kind is int and info[key] < 0):
            raise ValueError(f"{key} of a shard is {reprlib.repr(info.get(key))}")
    for key in ("file", "documents_file"):
        if info[key] != Path(info[key]).name:
            raise ValueError(f"{key} of a shard is {reprlib.repr(info[key])}, not a name in its directory")
    return cast(ShardInfo, info)


def read_manifest(manifest: dict[str, Any]) -> tuple[np.dtype, str, int, dict[str, list[ShardInfo]]]:
    """Type of the tokens, fingerprint and vocabulary of the tokenizer, shards by split. Raises ValueError."""
    tokenizer, splits, dtype = (manifest.get(key) for key in ("tokenizer", "splits", "dtype"))
    if dtype not in ("<u2", "<u4"):
        raise ValueError(f"dtype is {reprlib.repr(dtype)}, not '<u2' or '<u4'")
    if not isinstance(tokenizer, dict) or not isinstance(splits, dict):
        raise ValueError("tokenizer and splits are not objects")
    fingerprint, vocab_size = tokenizer.get("fingerprint"), tokenizer.get("vocab_size")
    if type(fingerprint) is not str or type(vocab_size) is not int or vocab_size < 1:
        raise ValueError(
            f"a tokenizer of fingerprint {reprlib.repr(fingerprint)} and vocab_size {reprlib.repr(vocab_size)}"
        )
    if wrong := [name for name, shards in splits.items() if not isinstance(shards, list)]:
        raise ValueError(f"the split {reprlib.repr(wrong[0])} is not a list")
    return np.dtype(dtype), fingerprint, vocab_size, {name: [*map(shard_info, splits[name])] for name in splits}


def tokenizer_of(directory: Path) -> str | None:
    """The fingerprint of the tokenizer whose token shards stand in a directory; None if that cannot be told."""
    try:
        return str(read_json(directory / MANIFEST)["tokenizer"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def shards_place(config: DataConfig, tokenizer: str) -> Path:
    """Where a tokenizer's shards are, by its fingerprint: in ``shards_dir``, or next to others that stand there."""
    directory = Path(config.shards_dir)
    other = tokenizer_of(directory) not in (None, tokenizer)
    return directory.with_name(f"{directory.name}-{tokenizer[:8]}") if other else directory


def _allow_open_files(count: int) -> None:
    """Raise the limit of this process, as far as it may: a memory map keeps its file open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/dev/fd")) + count + _OTHER_OPEN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


class TokenShards:
    """The prepared corpus of one directory, opened: what is prepared anew meanwhile has other files.

    Raises UserError if there is none, if a shard is missing or damaged, or if another tokenizer made it.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer_fingerprint: str,
        advice: str = "run python scripts/prepare_data.py with the same data options",
    ) -> None:
        own = shards_place(config, tokenizer_fingerprint)
        self.directory = own if (own / MANIFEST).exists() else Path(config.shards_dir)
        self._again = again = advice
        file = self.directory / MANIFEST
        try:
            manifest = read_json(file)
            if manifest.get("version") != MANIFEST_VERSION:
                version = reprlib.repr(manifest.get("version"))
                raise UserError(f"{self.directory} has version {version}, not {MANIFEST_VERSION}: {again}")
            self.dtype, maker, self.vocab_size, self.splits = read_manifest(manifest)
        except FileNotFoundError as error:
            raise UserError(f"no token shards in {self.directory}: {again}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({one_line(error)}): {again}") from error
        if maker != tokenizer_fingerprint:
            raise UserError(
                f"data.tokenizer={config.tokenizer} (fingerprint {tokenizer_fingerprint}) did not make the shards in "
                f"{self.directory} (fingerprint {maker}): name the tokenizer that did, or {again}"
            )
        tokens = {
            split: [[shard[key] for key in ("tokens", "sha256", "documents_sha256")] for shard in shards]
            for split, shards in self.splits.items()
        }
        self.fingerprint = fingerprint_of([self.dtype.str, manifest["tokenizer"].get("eot"), tokens])
        every = [shard for shards in self.splits.values() for shard in shards]
        _allow_open_files(2 * len(every))
        self._files: dict[str, os.stat_result] = {}
        self._bytes = {name: self._open(name) for shard in every for name in (shard["file"], shard["documents_file"])}
        for shard in every:
            size, wanted = len(self._bytes[shard["file"]]), shard["tokens"] * self.dtype.itemsize
            if size != wanted:
                raise UserError(f"{self.directory / shard['file']} has {size} bytes, not {wanted}: {again}")
            self.ends(shard)

    def _open(self, name: str) -> np.ndarray:
        """A memory map of the whole file."""
        path = self.directory / name
        try:
            with path.open("rb") as file:
                self._files[name] = found = os.fstat(file.fileno())
                return np.asarray(np.memmap(file, np.uint8, mode="r") if found.st_size else [], "u1")
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: {self._again}") from error
        except (OSError, ValueError) as error:  # the second for a name that can be none
            hint = " (ulimit -n allows more)" if getattr(error, "errno", None) == errno.EMFILE else ""
            raise UserError(f"{path} cannot be opened: {one_line(error)}{hint}") from error

    def stream(self, split: str, seq_len: int) -> TokenStream:
        """The windows of a split. Raises UserError if it has less than one."""
        infos = [info for info in self.splits.get(split, []) if info["tokens"]]
        ends = [self.ends(info) for info in infos]
        return TokenStream([*map(self.tokens, infos)], ends, seq_len, f"{self.directory}: the {split} split")

    def tokens(self, shard: ShardInfo) -> np.ndarray:
        """uint16 or uint32 [tokens], as they were opened."""
        return self._bytes[shard["file"]].view(self.dtype)

    def ends(self, shard: ShardInfo) -> np.ndarray:
        """Tokens and UTF-8 bytes up to each document's end, int64 [documents, 2], as they were opened.

        Raises UserError if the file holds something else.
        """
        content, path = self._bytes[shard["documents_file"]], self.directory / shard["documents_file"]
        file = io.BytesIO(content[:_NPY_HEADER_BYTES])
        try:
            version = np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if version != (1, 0) or (shape, fortran, dtype) != ((shard["documents"], 2), False, np.int64):
                raise ValueError(f"{dtype} {list(shape)}, not int64 [{shard['documents']}, 2]")
            ends = content[file.tell() :].view(np.int64).reshape(shape)
            if len(ends) and ends[-1].tolist() != [shard["tokens"], shard["bytes"]]:
                raise ValueError("its last row is not the number of tokens and bytes")
        except Exception as error:  # the header's parser raises what Python's own does
            raise UserError(f"{path} is damaged ({one_line(error)}): {self._again}") from error
        return ends

    def verify(self) -> None:
        """Compare the checksum of everything that was opened. Raises UserError for what is damaged."""
        for shard in (shard for shards in self.splits.values() for shard in shards):
            checksums = {shard["file"]: shard["sha256"], shard["documents_file"]: shard["documents_sha256"]}
            for name, checksum in checksums.items():
                path = self.directory / name
                try:  # read, not by the map: an error of a map ends the process without a word
                    with path.open("rb") as file:
                        same = os.path.samestat(os.fstat(file.fileno()), self._files[name])
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError as error:
                    raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
                if not same:
                    raise UserError(f"{path} was written anew just now: run the same command again")
                if digest != checksum:
                    raise UserError(f"{path} is damaged (checksum differs): run python scripts/prepare_data.py again")
