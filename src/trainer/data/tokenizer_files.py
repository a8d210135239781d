"""Anybody's tokenizer, read: of `tokenizers`, `transformers`, SentencePiece, GPT-2's two files, or the hub."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..errors import UserError, one_line
from ..files import read_json

END_OF_TEXT = "<|endoftext|>"
_CONFIGS = ("tokenizer_config.json", "config.json")
_MERGES = ("vocab.json", "merges.txt")
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
_OF_A_HUB_REPOSITORY = [
    *("tokenizer*", "*.model", "vocab.*", "merges.txt", "*.tiktoken"),
    *("special_tokens_map.json", "added_tokens.json", "config.json"),
]
_HUB_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+(?:@(?P<revision>[\w./-]+))?")
_FILE_SUFFIXES = (".json", ".model", ".txt", ".tiktoken", ".jsonl", ".vocab", ".bin")
_MODULES = {"protobuf": "google.protobuf"}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # kinds of SentencePiece's pieces
_KNOWN_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")


def read_tokenizer(name: str, eot_token: str | None) -> tuple[Tokenizer, str]:
    """The tokenizer ``name``, as of ``load_tokenizer``, and its end-of-text token. Raises UserError."""
    path = _from_hub(name) if is_on_hub(name) else Path(name)
    if not path.exists():
        raise UserError(f"data.tokenizer={name}: no such file or directory (scripts/train_tokenizer.py makes one)")
    try:
        tokenizer = _read(path)
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare Exception, OSError, ValueError, ImportError ...
        raise UserError(
            f"data.tokenizer={name}: not a tokenizer that can be read: {one_line(error)}{_missing(error, path)}"
        ) from error
    if getattr(tokenizer.model, "dropout", None):
        _say_once(f"data.tokenizer={name}: its BPE has dropout={tokenizer.model.dropout:.3g}, which is switched off")
        tokenizer.model.dropout = None  # the same text is the same tokens
    known = tokenizer.get_vocab(with_added_tokens=True)
    directory = path if path.is_dir() else path.parent
    candidates = [eot_token] if eot_token else [*_configured_end_token(directory), *_KNOWN_END_TOKENS]
    for token in candidates:
        if token in known:
            return tokenizer, token
    raise UserError(
        f"data.tokenizer={name} has no end-of-text token {' or '.join(map(repr, candidates))}: "
        "name one of its tokens with data.eot_token"
    )


def is_on_hub(name: str) -> bool:
    """Whether ``name`` can only be a repository of the hub: it is no place here and does not look like one."""
    return (
        _HUB_NAME.fullmatch(name) is not None
        and not name.startswith((".", "data/", "runs/"))
        and not name.lower().endswith(_FILE_SUFFIXES)
        and not Path(name).exists()
        and (Path(name).parent == Path() or not Path(name).parent.exists())
    )


def byte_level(model: models.BPE) -> Tokenizer:
    """GPT-2's way from text to pieces and back (Radford et al. 2019) around ``model``."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_hub(name: str) -> Path:
    """The directory in which the hub's library keeps the tokenizer's files. Raises UserError."""
    from huggingface_hub import snapshot_download  # slow to import, and only the hub needs it
    from huggingface_hub.utils import logging

    repository, _, revision = name.partition("@")
    try:
        with quiet(logging):
            return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_OF_A_HUB_REPOSITORY))
    except Exception as error:  # of HTTP libraries, of the hub's own, of a disk that is full
        raise UserError(
            f"data.tokenizer={name}: no such file or directory here, and not to be had from the hub: {one_line(error)}"
        ) from error


@contextmanager
def quiet(logging: Any) -> Iterator[None]:
    """Without lines of a library, whose ``logging`` it is: what is wrong is said in the error."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _read(path: Path) -> Tokenizer:
    """A file or a directory. Raises UserError, and what the libraries raise."""
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            return Tokenizer.from_file(str(path / "tokenizer.json"))
        if not any(read_settings(path / name) for name in _CONFIGS):  # nothing that says a class of `transformers`
            for name in _SENTENCEPIECE:
                if (path / name).exists():
                    return _of_sentencepiece(path / name)
            if all((path / name).exists() for name in _MERGES):
                return _of_merges(path)
        return _converted(path)
    if path.name in _MERGES and all((path.parent / name).exists() for name in _MERGES):
        return _of_merges(path.parent)
    if path.suffix in (".model", ".tiktoken"):
        return _of_sentencepiece(path)
    return Tokenizer.from_file(str(path))


def _of_merges(directory: Path) -> Tokenizer:
    """GPT-2's two files, as its tokenizer reads them."""
    vocab, merges = models.BPE.read_file(*(str(directory / name) for name in _MERGES))
    tokenizer = byte_level(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens([token for token in _KNOWN_END_TOKENS if token in vocab])
    return tokenizer


def _of_sentencepiece(file: Path) -> Tokenizer:
    """A SentencePiece model (Kudo and Richardson 2018), Unigram or BPE, with the normalization that it states.

    Raises ValueError for tiktoken's ranks, which state none, and for a model of words or characters.
    """
    # Its schema is that of the package `sentencepiece`, or one that `transformers` carries: the package is not needed.
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    if _is_ranks(file):
        raise ValueError(
            "a file of tiktoken's ranks, which says neither how text is split nor which special tokens there are: name "
            "the tokenizer.json of the same model, or the model on the hub"
        )
    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:
        raise ValueError(f"{file.name} is not a SentencePiece model: {one_line(error)}") from error
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if not proto.pieces:
        raise ValueError(f"{file.name} is not a SentencePiece model: it has no pieces")
    if trainer.model_type == 1:
        scored = [(piece.piece, piece.score) for piece in proto.pieces]
        model = models.Unigram(scored, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == 2:
        vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
        scores = [(piece.piece, piece.score) for piece in proto.pieces if piece.type == _NORMAL]
        model = models.BPE(
            vocab=vocab,
            merges=generate_merges(vocab, scores),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            ignore_merges=any(piece.type == _USER_DEFINED for piece in proto.pieces),  # which no merge makes
        )
    else:
        raise ValueError(f"{file.name} is a SentencePiece model of words or characters, not BPE or Unigram")
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if rules.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    # Not as added tokens, between which text would be normalized piece by piece, each with a prefix of its own.
    if symbols := [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]:
        pattern = "|".join(map(re.escape, sorted(symbols, key=len, reverse=True)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    controls = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in controls])
    return tokenizer


def _converted(directory: Path) -> Tokenizer:
    """By `transformers`, without running what the directory holds. Raises UserError for one that would have to."""
    for name in _CONFIGS:
        if "auto_map" in read_settings(directory / name):
            raise UserError(
                f"data.tokenizer={directory} has no tokenizer.json but Python of its own (auto_map in {name}), which "
                "is never run: name a tokenizer.json, or a directory that `save_pretrained` of a fast tokenizer wrote"
            )
    from transformers import AutoTokenizer  # only for what `tokenizers` cannot read by itself
    from transformers.utils import logging

    with quiet(logging):  # trust_remote_code explicitly: left out, it asks on standard input
        wrapped = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    if not isinstance(tokenizer := getattr(wrapped, "backend_tokenizer", None), Tokenizer):
        raise ValueError(f"{type(wrapped).__name__} is not one of the `tokenizers` library")
    return tokenizer


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON object, or none if there is no such file. Raises UserError for anything else."""
    try:
        return read_json(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error


def _configured_end_token(directory: Path) -> list[str]:
    token = read_settings(directory / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return [token] if token and isinstance(token, str) else []


def _missing(error: BaseException, path: Path) -> str:
    """What to install, if that is what is wrong. `transformers` names tiktoken for want of SentencePiece, too."""
    wanted = {name for name in ("sentencepiece", "tiktoken", "protobuf") if name in str(error).lower()}
    if "tiktoken" in wanted and any((path / name).exists() and not _is_ranks(path / name) for name in _SENTENCEPIECE):
        wanted = {"sentencepiece", "protobuf"}
    names = [name for name in sorted(wanted) if find_spec(_MODULES.get(name, name)) is None]
    return f" (pip install {' '.join(names)})" if names else ""


def _is_ranks(file: Path) -> bool:
    """Whether ``file`` is one of tiktoken's: a line for each token, in base64."""
    with file.open("rb") as content:
        return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content.read(4096)) is not None


@cache
def _say_once(line: str) -> None:
    """On standard error, by the first process of a run alone."""
    if os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None:
        print(line, file=sys.stderr, flush=True)
