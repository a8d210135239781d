"""Tokenizers: a byte-level BPE trained here, any `tokenizers` or `transformers` tokenizer by path, or plain bytes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.errors import UserError, one_line
from trainer.files import read_json, sync_directory

END_OF_TEXT = "<|endoftext|>"
# A longer text costs the library a hundred times its size in memory, so it is cut where no token can lie across.
_LONG_CHARACTERS = 1 << 20
_BORDER = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
_INCOMPLETE = ".incomplete"
DAMAGED = ".damaged"
_ASKED = "asked_vocab_size"  # in tokenizer_config.json
_SAVED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_KNOWN_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")


class TextTokenizer(Protocol):
    """Text to token ids and back. ``eot`` is put after every document."""

    vocab_size: int
    eot: int
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes as tokens 0..255, end of text as 256."""

    vocab_size = 257
    eot = 256
    fingerprint = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < self.eot).decode(errors="replace")


class FastTokenizer:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, tokenizer: Tokenizer, eot_token: str) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A document that spells out a special token must not become one.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._may_cut = _cuts_before_words(tokenizer)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eot = tokenizer.token_to_id(eot_token)
        self.fingerprint = hashlib.sha256(f"{tokenizer.to_str()}\n{eot_token}".encode()).hexdigest()[:16]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._may_cut and any(len(text) > _LONG_CHARACTERS for text in texts):
            return [[token for piece in _pieces(text) for token in self._encode([piece])[0]] for text in texts]
        return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # bare, as of a vocabulary without the token for what it lacks
            raise UserError(f"data.tokenizer cannot tokenize the text: {one_line(error)}") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def files(self) -> dict[str, str]:
        """What a directory has to hold for ``load_tokenizer`` to find the same tokenizer in it, by name."""
        settings = json.dumps({"eos_token": self._tokenizer.id_to_token(self.eot)})
        return {"tokenizer.json": self._tokenizer.to_str(), "tokenizer_config.json": settings}


def _cuts_before_words(tokenizer: Tokenizer) -> bool:
    """Whether GPT-2's pattern splits the text first: then a space between two letters always begins a new piece."""
    first = tokenizer.pre_tokenizer
    return (
        isinstance(first, pre_tokenizers.ByteLevel)
        and not first.add_prefix_space
        and first.use_regex
        and tokenizer.normalizer is None
        and all(token.special for token in tokenizer.get_added_tokens_decoder().values())
    )


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while (border := _BORDER.search(text, start + _LONG_CHARACTERS)) is not None:
        yield text[start : border.start()]
        start = border.start()
    yield text[start:]


def load_tokenizer(name: str, eot_token: str | None = None) -> TextTokenizer:
    """``bytes``, a `tokenizer.json`, or a directory that `tokenizers` or `transformers` wrote.

    Raises UserError if there is nothing of the kind, or if it has no end-of-text token and none is named.
    """
    return ByteTokenizer() if name == "bytes" else FastTokenizer(*_load_fast(name, eot_token))


def save_for_transformers(name: str, eot_token: str | None, directory: Path) -> None:
    """Write the tokenizer ``name`` so that ``AutoTokenizer`` gives the same tokens. Raises as ``load_tokenizer``."""
    if name == "bytes":
        tokenizer, eot_token = _bytes_as_bpe(), END_OF_TEXT
    else:
        tokenizer, eot_token = _load_fast(name, eot_token)
    _save(tokenizer, eot_token, directory)


def _bytes_as_bpe() -> Tokenizer:
    """``ByteTokenizer`` as a byte-level BPE without merges."""
    # GPT-2's names for bytes: the printable ones are themselves, the others follow from U+0100 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    names = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={name: byte for byte, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _load_fast(name: str, eot_token: str | None) -> tuple[Tokenizer, str]:
    path = Path(name)
    if not path.exists():
        raise UserError(f"data.tokenizer={name}: no such file or directory (scripts/train_tokenizer.py makes one)")
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.exists() else _converted(path)
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare Exception, OSError, ValueError, ImportError ...
        raise UserError(f"data.tokenizer={name}: not a tokenizer that can be read: {one_line(error)}") from error
    known = tokenizer.get_vocab(with_added_tokens=True)
    candidates = [eot_token] if eot_token else [*_configured_end_token(file.parent), *_KNOWN_END_TOKENS]
    for token in candidates:
        if token in known:
            return tokenizer, token
    raise UserError(
        f"data.tokenizer={name} has no end-of-text token {' or '.join(map(repr, candidates))}: "
        "name one of its tokens with data.eot_token"
    )


def _converted(directory: Path) -> Tokenizer:
    """By `transformers`, without running what the directory holds. Raises UserError for one that would have to."""
    for name in ("tokenizer_config.json", "config.json"):
        if "auto_map" in _settings(directory / name):
            raise UserError(
                f"data.tokenizer={directory} has no tokenizer.json but Python of its own (auto_map in {name}), which "
                "is never run: name a tokenizer.json, or a directory that `save_pretrained` of a fast tokenizer wrote"
            )
    from transformers import AutoTokenizer  # only for what `tokenizers` cannot read by itself
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what is wrong is said in the error
    try:
        # Explicitly: left out, it asks on standard input.
        theirs = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    finally:
        logging.set_verbosity(verbosity)
    if not isinstance(tokenizer := getattr(theirs, "backend_tokenizer", None), Tokenizer):
        raise ValueError(f"{type(theirs).__name__} is not one of the `tokenizers` library")
    return tokenizer


def _settings(file: Path) -> dict[str, Any]:
    """A JSON object, or none if there is no such file. Raises UserError for anything else."""
    try:
        return read_json(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error


def _configured_end_token(directory: Path) -> list[str]:
    token = _settings(directory / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return [token] if token and isinstance(token, str) else []


def tokenizer_place(home: str, vocab_size: int, default: int) -> str:
    """Where a corpus that lives in ``home`` has its tokenizer of ``vocab_size`` entries.

    That is ``tokenizer``, unless one for another vocabulary stands there. For the vocabulary that nobody has to name,
    ``default``, it is the one that stands there.
    """
    place, named = Path(home) / "tokenizer", Path(home) / f"tokenizer-{vocab_size}"
    if vocab_size == default or not place.exists() or is_broken(place):
        return str(place)
    return str(place if not named.exists() and holds_vocabulary(place, vocab_size) else named)


def holds_vocabulary(directory: Path, vocab_size: int) -> bool:
    """Whether the tokenizer has ``vocab_size`` entries, or was trained for so many from a text that gave fewer."""
    try:
        asked = _settings(directory / "tokenizer_config.json").get(_ASKED)
        return asked == vocab_size or load_tokenizer(str(directory)).vocab_size == vocab_size
    except UserError:
        return False


def is_broken(directory: Path) -> bool:
    """Whether ``directory`` holds what an interrupted ``train_bpe`` of an older version left: half a tokenizer or none.

    What is JSON is somebody's tokenizer, even if it cannot be used here.
    """
    file = directory / "tokenizer.json"
    try:
        if file.is_file():
            json.loads(file.read_bytes())
            return False
        return directory.is_dir() and all(
            one.name in _SAVED or one.name.endswith((_INCOMPLETE, DAMAGED)) for one in directory.iterdir()
        )
    except RecursionError:
        return False
    except ValueError:
        return True


def train_bpe(texts: Iterable[str], vocab_size: int, directory: Path, *, progress: bool = True) -> None:
    """Train a byte-level BPE of ``vocab_size`` entries (Radford et al. 2019) and write it for `transformers`.

    It replaces what stands in ``directory``, and notes there which size was asked for: a short text gives less. Raises
    UserError if it cannot be written.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: the tokenizer cannot be written: {one_line(error)}") from error
    _save(tokenizer, END_OF_TEXT, directory, **{_ASKED: vocab_size})


def _save(tokenizer: Tokenizer, eot_token: str, directory: Path, **settings: Any) -> None:
    """Whole or not there; in a directory that there is, ``tokenizer.json`` comes last. Raises UserError."""
    from transformers import PreTrainedTokenizerFast  # a second that only those wait who write a tokenizer

    stands = directory.is_dir()
    name = f"{directory.name}.{os.getpid()}{_INCOMPLETE}"
    partial = directory / name if stands else directory.with_name(name)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eot_token,
        bos_token=eot_token,
        clean_up_tokenization_spaces=False,
        **settings,
    )
    try:
        fast.save_pretrained(partial)
        for file in partial.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if not stands:
            partial.replace(directory)
        else:
            for file in sorted(partial.iterdir(), key=lambda file: file.name == "tokenizer.json"):
                file.replace(directory / file.name)
        sync_directory(directory if stands else directory.parent)
    except Exception as error:  # the libraries raise bare Exception as well as OSError
        raise UserError(f"{directory}: the tokenizer cannot be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
