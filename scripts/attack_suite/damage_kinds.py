"""Every way in which a file of a run is damaged or forged, as changes to a run directory."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

STEPS = 3  # of the attacked start; the run had a checkpoint at each of two
OLDER, NEWEST = "step-00000001", "step-00000002"
METADATA, META, CHECKSUMS = ".metadata", "meta.json", "checksums.json"
_RUN_FILES = ("config.yaml", "metrics.jsonl", "done.json", "env.json", "plan.txt", ".lock")
Change = Callable[[Path], object]


@dataclass(frozen=True)
class Damage:
    """A change to a run directory, and what may come of it.

    ``forged``: another result is no fault. ``strict``: the newest checkpoint must not be read, whatever it gives.
    ``both``: no checkpoint is left, which a run has to say.
    """

    group: str
    name: str
    change: Change
    forged: bool = False
    strict: bool = False
    both: bool = False
    steps: int = STEPS
    more: tuple[str, ...] = ()


def _replace(data: bytes) -> Change:
    return lambda file: file.write_bytes(data)


def _edit(function: Callable[[bytes], bytes]) -> Change:
    return lambda file: file.write_bytes(function(file.read_bytes()))


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def _zeros(data: bytes) -> bytes:
    middle, count = len(data) // 2, min(64, len(data) // 4)
    return data[:middle] + bytes(count) + data[middle + count :]


def _directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _link_to(target: str) -> Change:
    def change(file: Path) -> None:
        file.unlink()
        file.symlink_to(target)

    return change


_BYTES: dict[str, Change] = {
    "empty": _replace(b""),
    "cut by a byte": _edit(lambda data: data[:-1]),
    "cut in half": _edit(lambda data: data[: len(data) // 2]),
    "a bit flipped at the start": _edit(lambda data: _flip(data, 0)),
    "a bit flipped in the middle": _edit(lambda data: _flip(data, len(data) // 2)),
    "a bit flipped at the end": _edit(lambda data: _flip(data, len(data) - 2)),
    "a byte appended": _edit(lambda data: data + b"0"),
    "zeros in the middle": _edit(_zeros),
}
_PLACES: dict[str, Change] = {
    "removed": Path.unlink,
    "a directory": _directory,
    "a link to nothing": _link_to("nowhere"),
    "a link to itself": lambda file: _link_to(file.name)(file),
}
_TEXTS: dict[str, Change] = {
    "a list": _replace(b"[1, 2]\n"),
    "a number": _replace(b"7\n"),
    "null": _replace(b"null\n"),
    "a string": _replace(b'"text"\n'),
    "an empty object": _replace(b"{}\n"),
    "nested 100,000 deep": _replace(b"[" * 100_000 + b"]" * 100_000 + b"\n"),
    "not UTF-8": _replace(b'{"step": "\xff\xfe"}\n'),
    "not a number": _replace(b'{"step": NaN}\n'),
}


def _swap(run_dir: Path, name: str) -> None:
    shutil.copy(run_dir / "checkpoints" / OLDER / name, run_dir / "checkpoints" / NEWEST / name)


def reseal(checkpoint: Path) -> None:
    """Write checksums that hold for what is there now."""
    files = sorted(file for file in checkpoint.iterdir() if file.name != CHECKSUMS and file.is_file())
    sums = {file.name: [file.stat().st_size, sha256(file.read_bytes()).hexdigest()] for file in files}
    (checkpoint / CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")


def kinds(processes: int) -> Iterator[Damage]:
    """Every change to the newest checkpoint of as many processes, to both, and to the run directory."""
    tensors = [f"__{rank}_0.distcp" for rank in range(processes)]
    for name in (METADATA, META, CHECKSUMS, *tensors):
        texts = _TEXTS if name.endswith(".json") else {}
        for way, change in (_BYTES | _PLACES | texts).items():
            yield Damage(f"checkpoint: {way}", name, _of_newest(name, change))
        yield Damage("checkpoint: the older one's file", name, lambda run_dir, name=name: _swap(run_dir, name))
        if name != CHECKSUMS:
            for way, change in (_BYTES | texts).items():
                yield Damage("checkpoint: forged", f"{name} {way}", _of_newest(name, change, seal=True), forged=True)
            yield Damage("checkpoint: forged", f"{name} of the older one", _sealed_swap(name), forged=True)
    yield from _of_checksums(tensors[-1])
    yield from _of_meta()
    yield from _of_metadata(tensors[-1])
    for way in ("removed", "empty", "cut in half", "a bit flipped in the middle"):
        for name in (METADATA, META, CHECKSUMS, tensors[0]):
            yield Damage("both checkpoints", f"{name} {way}", _of_both(name, (_BYTES | _PLACES)[way]), both=True)
    for name in _RUN_FILES:
        for way, change in (_BYTES | _PLACES | _TEXTS).items():
            for steps in (STEPS, STEPS - 1) if name == "done.json" else (STEPS,):
                over = f", {steps} steps" if name == "done.json" else ""
                yield Damage(f"run directory: {way}", f"{name}{over}", _of_run(name, change), steps=steps)
    for way in ("a list", "a number", "null"):
        line = {"a list": b"[1]\n", "a number": b"7\n", "null": b"null\n"}[way]
        change = _edit(lambda data, line=line: data + line)
        yield Damage("run directory: a line", f"metrics.jsonl {way}", _of_run("metrics.jsonl", change))
    rows = {"no step": b'{"kind": "eval"}\n', "a step of text": b'{"kind": "eval", "step": "x"}\n'}
    for way, line in rows.items():
        change = _edit(lambda data, line=line: data + line)
        yield Damage("run directory: a line", f"metrics.jsonl {way}", _of_run("metrics.jsonl", change))


def _of_newest(name: str, change: Change, *, seal: bool = False) -> Change:
    def apply(run_dir: Path) -> None:
        change(run_dir / "checkpoints" / NEWEST / name)
        if seal:
            reseal(run_dir / "checkpoints" / NEWEST)

    return apply


def _sealed_swap(name: str) -> Change:
    def apply(run_dir: Path) -> None:
        _swap(run_dir, name)
        reseal(run_dir / "checkpoints" / NEWEST)

    return apply


def _both(run_dir: Path) -> list[Path]:
    return [run_dir / "checkpoints" / step for step in (OLDER, NEWEST)]


def _of_both(name: str, change: Change) -> Change:
    return lambda run_dir: [change(checkpoint / name) for checkpoint in _both(run_dir)]


def _of_run(name: str, change: Change) -> Change:
    return lambda run_dir: change(run_dir / name)


def _json(name: str, function: Callable[[dict[str, Any]], object], *, seal: bool) -> Change:
    def change(file: Path) -> None:
        value = json.loads(file.read_text(encoding="utf-8"))
        function(value)
        file.write_text(json.dumps(value), encoding="utf-8")

    return _of_newest(name, change, seal=seal)


def _of_checksums(tensors: str) -> Iterator[Damage]:
    """Checksums that say other things than sizes and digests, or say nothing about a damaged file."""
    nonsense: dict[str, Callable[[dict[str, Any]], object]] = {
        "a size of text": lambda sums: sums.update({META: ["7", "x"]}),
        "a size below zero": lambda sums: sums.update({META: [-1, sums[META][1]]}),
        "three values": lambda sums: sums.update({META: [1, "x", 3]}),
        "a value for an entry": lambda sums: sums.update({META: None}),
        "a digest that is a number": lambda sums: sums.update({META: [sums[META][0], 7]}),
        "a name with a zero": lambda sums: sums.update({"a\0b": [1, "x"]}),
        "a name of 5,000 letters": lambda sums: sums.update({"a" * 5000: [1, "x"]}),
        "a name outside": lambda sums: sums.update({f"../{OLDER}/x": [1, "x"]}),
        "the directory": lambda sums: sums.update({".": [4096, "x"]}),
    }
    for name, function in nonsense.items():
        yield Damage("checkpoint: checksums of another kind", name, _json(CHECKSUMS, function, seal=False))

    def unnamed(name: str) -> Change:
        def apply(run_dir: Path) -> None:
            checkpoint = run_dir / "checkpoints" / NEWEST
            sums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
            del sums[name]
            (checkpoint / CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")
            # In the numbers of the first tensor, behind the archive's own headers.
            _edit(lambda data: _flip(data, 700 if name == tensors else len(data) // 2))(checkpoint / name)

        return apply

    for name in (tensors, METADATA, META):
        yield Damage("checkpoint: a file without a checksum", name, unnamed(name), strict=True)


def _of_meta() -> Iterator[Damage]:
    """A description whose checksum holds and which says impossible things."""
    fields = ("recipe", "identity", "data", "tokenizer", "world_size", "micro_batch_size", "format", "step", "tensors")
    for field in fields:
        yield _described(f"without {field}", lambda meta, field=field: meta.pop(field))
        for word, value in {"null": None, "a list": [1], "text": "x", "below zero": -1, "an object": {}}.items():
            yield _described(f"{field} is {word}", lambda meta, field=field, value=value: meta.update({field: value}))
    tensor = "model.embed_tokens.weight"
    for word, value in {"no shape": [], "null": None, "huge": ["float32", 1 << 60], "text": ["float32", "x"]}.items():
        yield _described(f"a tensor of {word}", lambda meta, value=value: meta["tensors"].update({tensor: value}))
    yield _described("a tensor is missing", lambda meta: meta["tensors"].pop(tensor))
    one = {"world_size": 1, "micro_batch_size": 10**9}
    automatic = ("train.micro_batch_size=auto",)
    yield _described("a huge micro-batch", lambda meta: meta.update(one), automatic)
    for word, value in {"zero": 0, "text": "x", "null": None}.items():
        more = {"world_size": 1, "micro_batch_size": value}
        yield _described(f"a micro-batch of {word}", lambda meta, more=more: meta.update(more), automatic)
    yield _described("recipe changes of text", lambda meta: meta.update({"recipe_changes": "x"}))


def _described(name: str, function: Callable[[dict[str, Any]], object], more: tuple[str, ...] = ()) -> Damage:
    return Damage("checkpoint: forged description", name, _json(META, function, seal=True), forged=True, more=more)


def marker_of(run_dir: Path) -> Path:
    """The directory that exists if code of a file was run."""
    return run_dir.parent / "ran"


def _calling(module: str, name: str, *arguments: str) -> bytes:
    """Opcodes of a pickle that calls a function, and forgets what it gave."""
    words = b"".join(b"V" + argument.encode("raw_unicode_escape") + b"\n" for argument in arguments)
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + words + b"tR0"


def _payloads(marker: Path) -> dict[str, bytes]:
    """Calls that make ``marker``, by several ways into the interpreter."""
    code = f"__import__('os').makedirs({str(marker)!r}, exist_ok=True)"
    return {
        "os.mkdir": _calling("os", "mkdir", str(marker)),
        "posix.system": _calling("posix", "system", f"mkdir -p {marker}"),
        "eval": _calling("builtins", "eval", code),
        "exec": _calling("builtins", "exec", code),
        "shutil.copytree": _calling("shutil", "copytree", str(marker.parent / "run"), str(marker)),
        "timeit": _calling("timeit", "timeit", code),
        "torch's own": _calling("torch.utils.collect_env", "run", f"mkdir -p {marker}"),
    }


def _of_metadata(tensors: str) -> Iterator[Damage]:
    for name in _payloads(Path("x")):

        def prefix(run_dir: Path, name: str = name) -> None:
            file = run_dir / "checkpoints" / NEWEST / METADATA
            start = b"\x80\x04"
            file.write_bytes(start + _payloads(marker_of(run_dir))[name] + file.read_bytes()[2:])
            reseal(file.parent)

        yield Damage("checkpoint: a pickle that calls", f"{METADATA} {name}", prefix, forged=True)

        def item(run_dir: Path, name: str = name) -> None:
            archive = _archive(_payloads(marker_of(run_dir))[name])
            _place(run_dir, tensors, archive, bytes_entry=False)

        yield Damage("checkpoint: a pickle that calls", f"a tensor's archive {name}", item, forged=True)

        def entry(run_dir: Path, name: str = name) -> None:
            _place(run_dir, tensors, _archive(_payloads(marker_of(run_dir))[name]), bytes_entry=True)

        yield Damage("checkpoint: a pickle that calls", f"an entry of bytes {name}", entry, forged=True)

        def plain(run_dir: Path, name: str = name) -> None:
            payload = b"\x80\x02" + _payloads(marker_of(run_dir))[name] + b"N."
            _place(run_dir, tensors, payload, bytes_entry=True)

        yield Damage("checkpoint: a pickle that calls", f"bytes that are a pickle {name}", plain, forged=True)
    for name, function in _storage(tensors).items():
        yield Damage("checkpoint: forged places", name, _pickled(function), forged=True, strict="outside" in name)


def _archive(payload: bytes) -> bytes:
    """What ``torch.save`` writes, with a pickle of our own inside."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    whole, changed = zipfile.ZipFile(buffer), io.BytesIO()
    with zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as file:
        for entry in whole.namelist():
            data = b"\x80\x02" + payload + b"N." if entry.endswith("data.pkl") else whole.read(entry)
            file.writestr(entry, data)
    return changed.getvalue()


def _pickled(function: Callable[[Any], object]) -> Change:
    def apply(run_dir: Path) -> None:
        file = run_dir / "checkpoints" / NEWEST / METADATA
        metadata = pickle.loads(file.read_bytes())  # of a run of our own, made a moment ago
        changed = function(metadata)
        file.write_bytes(pickle.dumps(changed if changed is not None else metadata))
        reseal(file.parent)

    return apply


def _place(run_dir: Path, tensors: str, data: bytes, *, bytes_entry: bool) -> None:
    """Append ``data`` to a file of tensors and let a tensor's entry point at it."""
    file = run_dir / "checkpoints" / NEWEST / tensors
    size = file.stat().st_size
    with file.open("ab") as out:
        out.write(data)

    def change(metadata: Any) -> None:
        name = sorted(metadata.state_dict_metadata)[0]
        for index, info in list(metadata.storage_data.items()):
            if index.fqn == name:
                info.relative_path, info.offset, info.length = tensors, size, len(data)
                if bytes_entry:
                    metadata.storage_data[type(index)(name)] = info
        if bytes_entry:
            metadata.state_dict_metadata[name] = BytesStorageMetadata()

    _pickled(change)(run_dir)


def _storage(tensors: str) -> dict[str, Callable[[Any], object]]:
    """Metadata that names other classes, places and sizes than there are."""

    def every(field: str, value: Any) -> Callable[[Any], None]:
        def change(metadata: Any) -> None:
            for info in metadata.storage_data.values():
                setattr(info, field, value)

        return change

    def older(prefix: str) -> Callable[[Any], None]:
        def change(metadata: Any) -> None:
            for info in metadata.storage_data.values():
                info.relative_path = f"{prefix}{info.relative_path}"

        return change

    def first(metadata: Any) -> Any:
        return next(value for value in metadata.state_dict_metadata.values() if hasattr(value, "size"))

    def chunk(field: str, value: Any) -> Callable[[Any], None]:
        return lambda metadata: setattr(first(metadata).chunks[0], field, torch.Size(value))

    return {
        "outside, the older one": older(f"../{OLDER}/"),
        "outside, through itself": older(f"./../{NEWEST}/../{OLDER}/"),
        "outside, a device": every("relative_path", "../../../../../../../../dev/zero"),
        "outside, an absolute path": every("relative_path", "/etc/passwd"),
        "a file that is missing": every("relative_path", "__9_9.distcp"),
        "the directory": every("relative_path", "."),
        "a path that is a number": every("relative_path", 7),
        "another file of the checkpoint": every("relative_path", META),
        "an offset below zero": every("offset", -5),
        "an offset beyond the end": every("offset", 1 << 50),
        "an offset of text": every("offset", "x"),
        "no length": every("length", 0),
        "a huge length": every("length", 1 << 60),
        "a transform": every("transform_descriptors", ["zstd"]),
        "no places": lambda metadata: metadata.storage_data.clear(),
        "no tensors": lambda metadata: metadata.state_dict_metadata.clear(),
        "places null": lambda metadata: setattr(metadata, "storage_data", None),
        "tensors null": lambda metadata: setattr(metadata, "state_dict_metadata", None),
        "tensors a list": lambda metadata: setattr(metadata, "state_dict_metadata", [1]),
        "a list": lambda metadata: [metadata],
        "null in a list": lambda metadata: [None],
        "text": lambda metadata: "metadata",
        "a huge tensor": lambda metadata: setattr(first(metadata), "size", torch.Size([1 << 40])),
        "a size below zero": lambda metadata: setattr(first(metadata), "size", (-1, 4)),
        "a size of text": lambda metadata: setattr(first(metadata), "size", "x"),
        "no properties": lambda metadata: setattr(first(metadata), "properties", None),
        "another dtype": lambda metadata: setattr(first(metadata).properties, "dtype", torch.int8),
        "no chunks": lambda metadata: first(metadata).chunks.clear(),
        "a chunk twice": lambda metadata: first(metadata).chunks.append(first(metadata).chunks[0]),
        "a chunk beyond the tensor": chunk("offsets", [1 << 30, 0]),
        "a chunk below zero": chunk("offsets", [-3, 0]),
        "a chunk of other sizes": chunk("sizes", [3, 5]),
        "a chunk of other dimensions": chunk("sizes", [3]),
    }
