"""Opening what a run reads: its tokenizer, its token shards or its text, and the sources of batches made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..distributed import World, say
from ..errors import UserError
from ..own import CONFIG_DIR, setting, shell
from .batches import (
    DataSource,
    DocumentsApart,
    OrderedSource,
    ShuffledSource,
    TokenStream,
    TrainingSource,
    Windows,
)
from .config import DataConfig
from .corpus import CorpusFile
from .mixture import MixedSource, MixedWindows, Mixture
from .remote import remote_path
from .shards import TokenShards, fingerprint_of, shards_place
from .stream import StreamSource, TextStream, read_head
from .text_files import is_rows
from .tokenizer import TextTokenizer, load_tokenizer
from .tokenizer_files import is_on_hub

# What a run does with its data, which preparing them does not ask for.
_NOT_PREPARED = {"name", "verify", "document_mask", "seq_len", "global_batch_size", "stream", "lanes", "shuffle_rows"}


@dataclass(frozen=True)
class Data:
    """The opened corpus, or corpora."""

    tokenizer: TextTokenizer
    training: TokenStream | Mixture | TextStream
    validation: Windows | None  # None if `eval.tokens` is 0
    fingerprint: str  # of all that the order and the content of batches follow from, beside the seed
    place: str


def open_data(config: DataConfig, eval_tokens: int, world: World) -> Data:
    """Tokenizer and text, or token shards; ``eval_tokens``: as of ``EvalConfig``.

    Raises UserError, on all ranks alike, if they are missing, damaged or do not fit.
    """
    if config.stream:
        return _open_stream(config, eval_tokens, world)
    return world.on_all(lambda: _open_prepared(config, eval_tokens, verify=config.verify and world.is_main))


def _open_prepared(config: DataConfig, eval_tokens: int, *, verify: bool) -> Data:
    tokenizer = _open_tokenizer(config)
    shards = _open_shards(config, tokenizer)
    if verify:
        for part in shards.values():
            part.verify()
    streams = {name: part.stream("train", config.seq_len) for name, part in shards.items()}
    validation = _windows(shards, config, "validation", eval_tokens) if eval_tokens else None
    place = ", ".join(str(part.directory) for part in shards.values())
    if config.sources is None:
        ((name, part),) = shards.items()
        return Data(tokenizer, streams[name], validation, part.fingerprint, place)
    weights = [config.sources[name].weight for name in streams]
    fingerprint = fingerprint_of([[[name, part.fingerprint] for name, part in shards.items()], weights])
    return Data(tokenizer, Mixture(streams, weights), validation, fingerprint, place)


def _open_stream(config: DataConfig, eval_tokens: int, world: World) -> Data:
    def read() -> tuple[Any, ...]:
        # By one process, for all: the same view of a directory that may change, and one request instead of many.
        tokenizer = _open_tokenizer(config)
        files = config.files()
        validation = None
        if eval_tokens:
            validation = _text_windows(files["validation"], config, tokenizer, "validation", eval_tokens)
        train = files["train"]
        return train, [[file.index, file.text_identity()] for file in train], validation

    files, identities, validation = world.on_main(read)
    tokenizer = world.on_all(lambda: _open_tokenizer(config))
    training = TextStream(files, tokenizer, config.seq_len, config.lanes, config.shuffle_rows, config.row_limits)
    if world.is_main and (line := training.sharing(config.global_batch_size, world.size)) is not None:
        say(f"warning: {line}")
    return Data(tokenizer, training, validation, fingerprint_of([identities, tokenizer.fingerprint]), config.path)


def open_windows(config: DataConfig, tokenizer: TextTokenizer, split: str, tokens: int) -> Windows:
    """The windows of a split, of which the first ``tokens`` tokens (0 = all) are wanted; a mixture's by weight.

    Raises UserError for text or shards that cannot be used.
    """
    if config.stream:
        return _text_windows(config.files([split])[split], config, tokenizer, split, tokens)
    return _windows(_open_shards(config, tokenizer), config, split, tokens)


def require_data(config: DataConfig) -> None:
    """Raises UserError if the tokenizer, the token shards or the streamed files are not there or do not fit.

    Cheap: reads no checksums, asks no server of text; a tokenizer of the hub is fetched.
    """
    tokenizer = _open_tokenizer(config)
    if not config.stream:
        _open_shards(config, tokenizer)
    elif remote_path(config.path) is None:
        config.files()


def training_source(
    data: TokenStream | Mixture | TextStream, world: World, *, seed: int, global_batch: int, micro_batch: int
) -> TrainingSource:
    """This rank's training batches, without the places of documents."""
    share = {"seed": seed, "global_batch": global_batch, "micro_batch": micro_batch}
    share |= {"rank": world.rank, "world_size": world.size}
    if isinstance(data, TextStream):
        return StreamSource(data, together=lambda read: world.add_up(world.on_all(read)), **share)
    return MixedSource(data, **share) if isinstance(data, Mixture) else ShuffledSource(data, **share)


def validation_source(
    windows: Windows, eval_tokens: int, config: DataConfig, tokenizer: TextTokenizer, world: World, micro_batch: int
) -> tuple[DataSource, float]:
    """The pass over the first ``eval_tokens`` tokens (0 = all), in whole windows, and the UTF-8 bytes that its targets
    spell."""
    wanted = -(-eval_tokens // windows.seq_len) or windows.num_windows
    number = min(windows.num_windows, wanted)
    source = OrderedSource(windows, num_windows=number, micro_batch=micro_batch, rank=world.rank, world_size=world.size)
    return separate_documents(source, config, tokenizer), windows.num_bytes(number)


def separate_documents(source: DataSource, config: DataConfig, tokenizer: TextTokenizer) -> DataSource:
    """``source``, with the places of documents in its batches if ``data.document_mask`` asks for them."""
    return DocumentsApart(source, tokenizer.eot) if config.document_mask else source


def _windows(shards: Mapping[str, TokenShards], config: DataConfig, split: str, tokens: int) -> Windows:
    streams = {name: part.stream(split, config.seq_len) for name, part in shards.items()}
    if config.sources is None:
        return next(iter(streams.values()))
    weights = [config.sources[name].weight for name in streams]
    most = -(-(tokens or sum(stream.num_tokens for stream in streams.values())) // config.seq_len)
    return MixedWindows(list(streams.values()), weights, most)


def _text_windows(
    files: Sequence[CorpusFile], config: DataConfig, tokenizer: TextTokenizer, split: str, tokens: int
) -> TokenStream:
    wanted = -(-tokens // config.seq_len) * config.seq_len + 1 if tokens else None
    head, ends = read_head(files, tokenizer, wanted, config.row_limits)
    return TokenStream([head], [ends], config.seq_len, f"data.path={config.path}: the {split} split")


def _open_tokenizer(config: DataConfig) -> TextTokenizer:
    place = Path(config.tokenizer)
    own = any(Path(part.home) in place.parents for part in config.parts().values())  # trained there, not fetched
    if config.tokenizer != "bytes" and not place.exists() and (own or not is_on_hub(config.tokenizer)):
        raise UserError(f"data.tokenizer={config.tokenizer}: no such file or directory; {_preparing(config)}")
    return load_tokenizer(config.tokenizer, config.eot_token)


def _open_shards(config: DataConfig, tokenizer: TextTokenizer) -> dict[str, TokenShards]:
    """By the name of the source."""
    shards, advice = {}, _preparing(_with_shards_of(config, tokenizer.fingerprint))
    for name, part in config.parts().items():
        if not (
            Path(part.path).is_dir() or Path(part.shards_dir).is_dir() or remote_path(part.path) or is_rows(part.path)
        ):
            key = "data.path" if config.sources is None else f"data.sources.{name}.path"
            raise UserError(f"{key}={part.path}: no such directory; {_preparing(config)}")
        shards[name] = TokenShards(part, tokenizer.fingerprint, advice)
    return shards


def _with_shards_of(config: DataConfig, fingerprint: str) -> DataConfig:
    """With the shards of that tokenizer where preparing may write them: not over others, which runs go on with."""
    places = {name: (part.shards_dir, str(shards_place(part, fingerprint))) for name, part in config.parts().items()}
    moved = {name: target for name, (standing, target) in places.items() if target != standing}
    if config.sources is None:
        return replace(config, shards=next(iter(moved.values()), config.shards))
    sources = {name: replace(one, shards=moved.get(name, one.shards)) for name, one in config.sources.items()}
    return replace(config, sources=sources)


def _preparing(config: DataConfig) -> str:
    """The command that makes what is missing: with the options in which this config differs from its yaml."""
    name = config.name
    if not (CONFIG_DIR / "data" / f"{name}.yaml").is_file():  # a user's: what says all of it is one of ours
        name = "mix" if config.sources else "c4_stream" if config.stream else "text" if is_rows(config.path) else "c4"
    raw = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "data" / f"{name}.yaml"))
    assert isinstance(raw, dict)
    plain = {key: value for key, value in raw.items() if "${" not in str(value)}  # the others follow from these
    leading = {key: getattr(config, key) for key in plain if key in ("path", "out", "vocab_size")}
    tree = OmegaConf.create({"data": raw | leading})
    known = OmegaConf.to_container(tree.data, resolve=True) | plain
    defaults = {part.name: part.default for part in fields(config) if part.default is not MISSING}
    arguments = [f"data={name}"]
    for part in fields(config):
        value = getattr(config, part.name)
        if part.name == "sources" and value:
            value = {name: {k: v for k, v in asdict(one).items() if v is not None} for name, one in value.items()}
        if part.name not in _NOT_PREPARED and value != known.get(part.name, defaults.get(part.name)):
            arguments.append(setting(f"data.{part.name}", value))
    script = "train_tokenizer" if config.stream else "prepare_data"
    return f"run python scripts/{script}.py {shell(arguments)}"
