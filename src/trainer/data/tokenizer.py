"""Tokenizers: plain bytes, a byte-level BPE trained here, or anybody's: of `tokenizers`, `transformers`, SentencePiece
or the hub."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ..errors import UserError, one_line
from ..files import read_json, sync_directory, write_json

END_OF_TEXT = "<|endoftext|>"
# A longer text costs the library a hundred times its size in memory, so it is cut where no token can lie across.
_LONG_CHARACTERS = 1 << 20
_BORDER = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
_INCOMPLETE = ".incomplete"
DAMAGED = ".damaged"
_ASKED = "asked_vocab_size"  # in tokenizer_config.json
_SAVED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
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
    """``bytes``, a tokenizer's file or directory, or its name on the hub.

    A file is a ``tokenizer.json``, a SentencePiece ``.model``, or ``vocab.json`` or ``merges.txt`` with the other
    beside it; a directory holds one of these or what `transformers` wrote. What is here comes before the hub, whose
    files its library keeps (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE count).

    Raises UserError if there is nothing of the kind, or if it has no end-of-text token and none is named.
    """
    return ByteTokenizer() if name == "bytes" else FastTokenizer(*_load_fast(name, eot_token))


def is_on_hub(name: str) -> bool:
    """Whether ``name`` can only be a repository of the hub: it is no place here and does not look like one."""
    return (
        _HUB_NAME.fullmatch(name) is not None
        and not name.startswith((".", "data/", "runs/"))
        and not name.lower().endswith(_FILE_SUFFIXES)
        and not Path(name).exists()
        and (Path(name).parent == Path() or not Path(name).parent.exists())
    )


def save_for_transformers(name: str, eot_token: str | None, directory: Path, max_length: int | None = None) -> None:
    """Write the tokenizer ``name`` so that ``AutoTokenizer`` gives the tokens that training used.

    No token is put before or after a text, none is made of a text that spells it, and texts are neither cut nor padded.
    The end of text is also the first token, as between documents in training. ``max_length``: of a training sample, in
    tokens. Raises as ``load_tokenizer``, and UserError if it cannot be written.
    """
    if name == "bytes":
        tokenizer, eot_token = _bytes_as_bpe(), END_OF_TEXT
    else:
        tokenizer, eot_token = _load_fast(name, eot_token)
        tree = json.loads(FastTokenizer(tokenizer, eot_token)._tokenizer.to_str())
        tree["post_processor"] = _without_special_tokens(tree["post_processor"])
        tokenizer = Tokenizer.from_str(json.dumps(tree))
    _save(tokenizer, eot_token, directory, **({} if max_length is None else {"model_max_length": max_length}))


def _without_special_tokens(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor of ``tokenizer.json`` without what adds tokens; None if nothing is left of it."""
    match processor:
        case {"type": "Sequence", "processors": parts}:
            kept = [part for part in map(_without_special_tokens, parts) if part]
            return processor | {"processors": kept} if kept else None
        case {"type": "TemplateProcessing", "single": single, "pair": pair}:
            single, pair = ([piece for piece in side if "SpecialToken" not in piece] for side in (single, pair))
            return processor | {"single": single, "pair": pair, "special_tokens": {}}
        case {"type": "RobertaProcessing", "trim_offsets": trims, "add_prefix_space": prefix}:
            return {"type": "ByteLevel", "trim_offsets": trims, "add_prefix_space": prefix, "use_regex": True}
        case {"type": "ByteLevel"}:
            return processor
    return None


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


_said: set[str] = set()


def _say_once(line: str) -> None:
    """On standard error, by the first process of a run alone."""
    if line not in _said and os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None:
        print(line, file=sys.stderr, flush=True)
    _said.add(line)


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


def _from_hub(name: str) -> Path:
    """The directory in which the hub's library keeps the tokenizer's files. Raises UserError."""
    from huggingface_hub import snapshot_download  # slow to import, and only the hub needs it
    from huggingface_hub.utils import logging

    repository, _, revision = name.partition("@")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_OF_A_HUB_REPOSITORY))
    except Exception as error:  # of HTTP libraries, of the hub's own, of a disk that is full
        raise UserError(
            f"data.tokenizer={name}: no such file or directory here, and not to be had from the hub: {one_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _read(path: Path) -> Tokenizer:
    """A file or a directory. Raises UserError, and what the libraries raise."""
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            return Tokenizer.from_file(str(path / "tokenizer.json"))
        if not any(_settings(path / name) for name in _CONFIGS):  # nothing that says a class of `transformers`
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
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
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


def _save(tokenizer: Tokenizer, eot_token: str, directory: Path, **own: Any) -> None:
    """Whole or not there; in a directory that there is, ``tokenizer.json`` comes last. Raises UserError."""
    from transformers import PreTrainedTokenizerFast  # a second that only those wait who write a tokenizer

    stands = directory.is_dir()
    name = f"{directory.name}.{os.getpid()}{_INCOMPLETE}"
    partial = directory / name if stands else directory.with_name(name)
    settings = own | {"eos_token": eot_token, "bos_token": eot_token, "clean_up_tokenization_spaces": False}
    settings |= {"model_input_names": ["input_ids", "attention_mask"]}  # what a causal model takes
    if (first := tokenizer.pre_tokenizer) and "add_prefix_space" in (state := json.loads(first.__getstate__())):
        settings["add_prefix_space"] = state["add_prefix_space"]  # releases before 5 take it from here
    settings |= {"split_special_tokens": True}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    try:
        fast.save_pretrained(partial)
        # The class by the name that releases before 5 know too.
        write_json(partial / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | settings)
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
