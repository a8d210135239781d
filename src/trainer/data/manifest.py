"""The manifest of prepared token shards: which there are, by split, and which tokenizer made them."""

from __future__ import annotations

import hashlib
import json
import reprlib
from pathlib import Path
from typing import Any, TypedDict, cast, get_type_hints

import numpy as np

from ..files import read_json

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
SINCE_VERSION_1 = {"bad_rows": 0, "max_line_bytes": 0}  # no part of the fingerprint: tokens say it all


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
