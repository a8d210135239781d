"""Text files to token shards: one memory-mappable shard a file, in parallel, resumable, described by a manifest.

A shard is ``NAME.bin`` (little-endian uint16 or uint32 tokens, every document followed by the end-of-text token) and
``NAME.docs.npy`` (int64 [documents, 2]: tokens and UTF-8 bytes up to each document's end). ``manifest.json`` is
written last and holds counts, checksums and the tokenizer's fingerprint. The shards know no sequence length.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..errors import UserError, one_line
from ..files import new_directory, read_json, sha256_of, write_json
from ..machine import available_cores
from .config import DataConfig
from .corpus import SPLITS, BadRows, CorpusFile, RowLimits, grouped, lacks_sample, write_sample
from .remote import remote_path
from .rows import RowPart, row_parts
from .shards import MANIFEST, MANIFEST_VERSION, ShardInfo, shard_info, shards_place, tokenizer_of
from .text_files import is_rows
from .tokenizer import TextTokenizer, holds_vocabulary, load_tokenizer, train_bpe
from .tokenizer_files import is_on_hub

_WORTH_PROCESSES_BYTES = 64 << 20  # compressed; below, starting processes costs more than the threads of one lack
_CHUNK_CHARACTERS = 1 << 20  # text handed to the tokenizer at once

#: What a shard is made of.
TextFile = CorpusFile | RowPart

# Set in a worker by _start_worker: the shared count of compressed bytes read, and the tokenizer.
_progress: Any = None
_tokenizer: TextTokenizer


def prepare(config: DataConfig, workers: int | None = None, splits: Sequence[str] = SPLITS) -> dict[str, Any]:
    """Do what is missing of: sample corpus, tokenizer, token shards of ``splits``. Returns the manifest.

    Shards that stand from an earlier, interrupted call are kept if source and tokenizer are still the same and
    their checksum holds. Raises UserError for input that cannot be used, and where another tokenizer's shards stand,
    which runs go on with; what is finished by then stays.
    """
    if config.stream:
        raise UserError(
            f"data={config.name} trains from the text itself: there is nothing to prepare "
            f"(scripts/train_tokenizer.py data={config.name} trains its tokenizer)"
        )
    try:
        return _prepare(config, workers, splits)
    except OSError as error:  # of a place that is not the shards' or the tokenizer's, which say so themselves
        raise UserError(f"{error.filename or config.path}: {error.strerror or one_line(error)}") from error


def _prepare(config: DataConfig, workers: int | None, splits: Sequence[str]) -> dict[str, Any]:
    path = Path(config.path)
    if is_rows(config.path) and path.is_dir():
        for key, place in (("out", config.home), ("shards", config.shards_dir)):
            if path.resolve() in (Path(place).resolve(), *Path(place).resolve().parents):
                raise UserError(f"data.{key}={place}: lies in data.path={path}, whose files are text")
    if config.name == "sample" and lacks_sample(path):
        print(f"writing the sample corpus to {path}")
        write_sample(path)
    files = _texts(config, splits)
    if remote_path(config.path) and not path.is_dir():
        size = sum(file.size for group in files.values() for file in group)
        number = sum(map(len, files.values()))
        print(f"{number:,} files, {size / 1e9:,.2f} GB, are read from {config.path} (data.max_files takes the first)")
    place = Path(config.tokenizer)
    train_tokenizer(config)
    tokenizer = load_tokenizer(config.tokenizer, config.eot_token)
    own = Path(config.home) / "tokenizer"
    if place == own and not holds_vocabulary(place, config.vocab_size):
        other = f"data.tokenizer={own}-{config.vocab_size}"
        print(f"{place} has {tokenizer.vocab_size} entries, not data.vocab_size={config.vocab_size}; {other} would")
    target = shards_place(config, tokenizer.fingerprint)
    if config.shards is not None and target != Path(config.shards):
        raise UserError(
            f"data.shards={config.shards} holds shards of another tokenizer ({tokenizer_of(Path(config.shards))}), "
            f"with which runs go on: name another place, data.shards={target}"
        )

    everything = [file for split in files.values() for file in split]
    infos = {file: info for file in everything if (info := _standing(file, config, tokenizer, target))}
    todo = [file for file in everything if file not in infos]
    if infos and todo:
        print(f"{len(infos)} of {len(everything)} shards stand already in {target}")
    if todo:
        _require_writable(target, "data.shards")
    infos |= _tokenize_all(todo, config, target, workers)

    manifest = {
        "version": MANIFEST_VERSION,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot},
        "dtype": _dtype(tokenizer),
        "splits": {split: [infos[file] for file in split_files] for split, split_files in files.items()},
    }
    if _read_if_there(target / MANIFEST) != manifest:
        with _writing(str(target / MANIFEST)):
            write_json(target / MANIFEST, manifest)
    if bad := {file: info["bad_rows"] for file, info in infos.items() if info["bad_rows"]}:
        most = max(bad, key=lambda file: bad[file])
        where = f"{len(bad)} of {len(infos)} files, {bad[most]:,} of them in {getattr(most, 'path', most.name)}"
        print(f"{sum(bad.values()):,} bad rows left out, in {where} ({target / MANIFEST} counts them by file)")
    return manifest


def train_tokenizer(config: DataConfig) -> None:
    """Train the corpus's own tokenizer if ``data.tokenizer`` names one in its directory and it is not there yet."""
    target = Path(config.tokenizer)
    own = Path(config.home) in target.parents
    if config.tokenizer == "bytes" or target.exists() or (not own and is_on_hub(config.tokenizer)):
        return
    if not own:
        raise UserError(
            f"data.tokenizer={target}: no such file or directory "
            f"(only a tokenizer inside {config.home} is trained when missing)"
        )
    _require_writable(target.parent, "the directory of data.tokenizer")
    print(f"training a byte-level BPE of {config.vocab_size} entries: {target}")
    files = _texts(config, ["train"])["train"]
    texts = (text for file in files for text in file.texts(bad=BadRows(config.row_limits, heard=True)))
    train_bpe(_first_bytes(texts, config.tokenizer_train_bytes), config.vocab_size, target)


def _texts(config: DataConfig, splits: Sequence[str]) -> Mapping[str, Sequence[TextFile]]:
    """What shards are made of, by split. Raises as ``row_parts`` and ``corpus_files``."""
    if not is_rows(config.path):
        if config.field != DataConfig.field:
            raise UserError(f"data.field={config.field}: {config.path} is in C4's layout, whose field is 'text'")
        return config.files(splits)
    if config.max_files is not None:
        raise UserError(
            f"data.max_files={config.max_files} counts files of C4's layout, which {config.path} is not: "
            "data.train_split='train[:10%]' takes a part"
        )
    return row_parts(config, splits)


def _require_writable(directory: Path, key: str) -> None:
    """Make ``directory`` if it is not there. Raises UserError if nothing can be written in it."""
    with _writing(f"{key}={directory}:"):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass


@contextmanager
def _writing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what} cannot be written: {one_line(error)}; data.out=DIR puts tokenizer and shards elsewhere"
        ) from error


def _read_if_there(file: Path) -> dict[str, Any] | None:
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None


def _first_bytes(texts: Iterator[str], limit: int) -> Iterator[str]:
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if seen >= limit:
            return


def _shard_name(file: TextFile) -> str:
    return f"{file.split}.{file.index:05}-of-{file.count:05}"


def _standing(file: TextFile, config: DataConfig, tokenizer: TextTokenizer, target: Path) -> ShardInfo | None:
    """The finished shard of ``file`` in ``target``, unless source, tokenizer, limits or shard have changed since."""
    name = _shard_name(file)
    try:
        info = shard_info(read_json(target / f"{name}.json"))
        same = (
            (info["file"], info["documents_file"]) == (f"{name}.bin", f"{name}.docs.npy")
            and info["source_identity"] == file.identity()
            and info["tokenizer"] == tokenizer.fingerprint
            and _has_same_rows(info, config.row_limits)
            and info["sha256"] == sha256_of(target / info["file"])
            and info["documents_sha256"] == sha256_of(target / info["documents_file"])
        )
    except (OSError, ValueError):
        return None
    return info if same else None


def _has_same_rows(info: ShardInfo, limits: RowLimits) -> bool:
    longest = info["max_line_bytes"] or limits.max_line_bytes
    if info["bad_rows"]:  # some may have been too long then, and not now
        return info["bad_rows"] <= limits.max_bad_rows and longest == limits.max_line_bytes
    return longest <= limits.max_line_bytes


def _tokenize_all(
    files: Sequence[TextFile], config: DataConfig, target: Path, workers: int | None
) -> dict[TextFile, ShardInfo]:
    """``workers`` processes; None takes one for each core, or none but this one where they would not pay."""
    if not files:
        return {}
    cpus = available_cores()
    total = sum(file.size for file in files)
    processes = min(len(files), workers or (1 if total < _WORTH_PROCESSES_BYTES else cpus))
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc="tokenizing", mininterval=0.2 if sys.stderr.isatty() else 10
    )
    with bar:
        if processes > 1:
            return _tokenize_in_pool(files, config, target, processes, cpus, bar)
        tokenizer = load_tokenizer(config.tokenizer, config.eot_token)
        return {file: _tokenize(file, target, tokenizer, config.row_limits, bar.update) for file in files}


def _tokenize_in_pool(
    files: Sequence[TextFile], config: DataConfig, target: Path, processes: int, cpus: int, bar: Any
) -> dict[TextFile, ShardInfo]:
    # Spawned, not forked: a forked child that inherits OpenMP or tokenizer threads can hang.
    context = multiprocessing.get_context("spawn")
    read = context.Value("q", 0)
    threads = {"RAYON_NUM_THREADS": str(max(1, cpus // processes)), "TOKENIZERS_PARALLELISM": "true"}
    arguments = (read, config.tokenizer, config.eot_token, threads)
    done: dict[TextFile, ShardInfo] = {}
    with ProcessPoolExecutor(processes, context, _start_worker, arguments) as pool:
        jobs = {pool.submit(_tokenize_in_worker, file, target, config.row_limits): file for file in files}
        pending = set(jobs)
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(min(read.value, bar.total) - bar.n)
                for job in finished:
                    done[jobs[job]] = job.result()
            bar.update(bar.total - bar.n)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return done


def _start_worker(read: Any, tokenizer: str, eot_token: str | None, environment: dict[str, str]) -> None:
    global _progress, _tokenizer
    os.environ.update(environment)
    _progress = read
    _tokenizer = load_tokenizer(tokenizer, eot_token)


def _tokenize_in_worker(file: TextFile, target: Path, limits: RowLimits) -> ShardInfo:
    return _tokenize(file, target, _tokenizer, limits, _report)


def _tokenize(
    file: TextFile,
    target: Path,
    tokenizer: TextTokenizer,
    limits: RowLimits,
    on_bytes: Callable[[int], object],
) -> ShardInfo:
    """Tokenize one file. The shard appears under its name only when complete; its ``.json`` comes last.

    Raises UserError for text that cannot be read and a shard that cannot be written.
    """
    name, dtype, bad = _shard_name(file), np.dtype(_dtype(tokenizer)), BadRows(limits)
    digest, ends, tokens, size, empty = hashlib.sha256(), [], 0, 0, 0
    with _writing(f"{target}: the shard {name}"), new_directory(target, f"{name}.json") as partial:
        binary, documents = partial / f"{name}.bin", partial / f"{name}.docs.npy"
        with binary.open("wb") as output:
            for chunk_of_texts in grouped(file.texts(on_bytes, bad), len, _CHUNK_CHARACTERS):
                texts = [text for text in chunk_of_texts if text]
                empty += len(chunk_of_texts) - len(texts)
                encoded = tokenizer.encode_batch(texts)
                for ids in encoded:
                    ids.append(tokenizer.eot)
                chunk = np.fromiter(itertools.chain.from_iterable(encoded), dtype)
                output.write(chunk.tobytes())
                digest.update(chunk.tobytes())
                for text, ids in zip(texts, encoded, strict=True):
                    tokens, size = tokens + len(ids), size + len(text.encode())
                    ends.append((tokens, size))
        np.save(documents, np.array(ends, dtype=np.int64).reshape(-1, 2))
        info: ShardInfo = {
            "file": binary.name,
            "documents_file": documents.name,
            "source": file.name,
            "source_identity": file.identity(),
            "tokenizer": tokenizer.fingerprint,
            "tokens": tokens,
            "documents": len(ends),
            "empty_documents": empty,
            "bad_rows": bad.count,
            "max_line_bytes": limits.max_line_bytes,
            "bytes": size,
            "sha256": digest.hexdigest(),
            "documents_sha256": sha256_of(documents),
        }
        write_json(partial / f"{name}.json", info)
    return info


def _report(count: int) -> None:
    with _progress.get_lock():
        _progress.value += count


def _dtype(tokenizer: TextTokenizer) -> str:
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
