"""Text to tokens and back: plain bytes, a byte-level BPE trained here, or anybody's tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ..errors import UserError, one_line
from ..files import new_directory, write_json
from .tokenizer_files import END_OF_TEXT, byte_level, read_settings, read_tokenizer

# A longer text costs the library a hundred times its size in memory, so it is cut where no token can lie across.
_LONG_CHARACTERS = 1 << 20
_BORDER = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
_ASKED = "asked_vocab_size"  # in tokenizer_config.json


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


#: Text to token ids and back. ``eot`` is put after every document.
TextTokenizer = ByteTokenizer | FastTokenizer


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
    return ByteTokenizer() if name == "bytes" else FastTokenizer(*read_tokenizer(name, eot_token))


def tokenizer_place(home: str, vocab_size: int, default: int) -> str:
    """Where a corpus that lives in ``home`` has its tokenizer of ``vocab_size`` entries.

    That is ``tokenizer``, unless one for another vocabulary stands there. For the vocabulary that nobody has to name,
    ``default``, it is the one that stands there.
    """
    place, named = Path(home) / "tokenizer", Path(home) / f"tokenizer-{vocab_size}"
    if vocab_size == default or not place.exists():
        return str(place)
    return str(place if not named.exists() and holds_vocabulary(place, vocab_size) else named)


def holds_vocabulary(directory: Path, vocab_size: int) -> bool:
    """Whether the tokenizer has ``vocab_size`` entries, or was trained for so many from a text that gave fewer."""
    try:
        asked = read_settings(directory / "tokenizer_config.json").get(_ASKED)
        return asked == vocab_size or load_tokenizer(str(directory)).vocab_size == vocab_size
    except UserError:
        return False


def train_bpe(texts: Iterable[str], vocab_size: int, directory: Path, *, progress: bool = True) -> None:
    """Train a byte-level BPE of ``vocab_size`` entries (Radford et al. 2019) and write it for `transformers`.

    It replaces what stands in ``directory``, and notes there which size was asked for: a short text gives less. Raises
    UserError if it cannot be written.
    """
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _save(tokenizer, END_OF_TEXT, directory, **{_ASKED: vocab_size})


def save_for_transformers(name: str, eot_token: str | None, directory: Path, max_length: int | None = None) -> None:
    """Write the tokenizer ``name`` so that ``AutoTokenizer`` gives the tokens that training used.

    No token is put before or after a text, none is made of a text that spells it, and texts are neither cut nor padded.
    The end of text is also the first token, as between documents in training. ``max_length``: of a training sample, in
    tokens. Raises as ``load_tokenizer``, and UserError if it cannot be written.
    """
    if name == "bytes":
        tokenizer, eot_token = _bytes_as_bpe(), END_OF_TEXT
    else:
        tokenizer, eot_token = read_tokenizer(name, eot_token)
        tree = json.loads(FastTokenizer(tokenizer, eot_token)._tokenizer.to_str())
        tree["post_processor"] = _without_special_tokens(tree["post_processor"])
        tokenizer = Tokenizer.from_str(json.dumps(tree))
    _save(tokenizer, eot_token, directory, **({} if max_length is None else {"model_max_length": max_length}))


def _without_special_tokens(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor of ``tokenizer.json`` without what adds tokens; None if nothing is left of it."""
    match processor:
        case {"type": "Sequence", "processors": parts}:
            rest = [part for part in map(_without_special_tokens, parts) if part]
            return processor | {"processors": rest} if rest else None
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
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # slow to import, as in `_save`

    tokenizer = byte_level(models.BPE(vocab={name: byte for byte, name in bytes_to_unicode().items()}, merges=[]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _save(tokenizer: Tokenizer, eot_token: str, directory: Path, **own: Any) -> None:
    """Whole or not there; in a directory that there is, ``tokenizer.json`` comes last. Raises UserError."""
    from transformers import PreTrainedTokenizerFast  # a second that only those wait who write a tokenizer

    settings = own | {"eos_token": eot_token, "bos_token": eot_token, "clean_up_tokenization_spaces": False}
    settings |= {"model_input_names": ["input_ids", "attention_mask"]}  # what a causal model takes
    if (first := tokenizer.pre_tokenizer) and "add_prefix_space" in (state := json.loads(first.__getstate__())):
        settings["add_prefix_space"] = state["add_prefix_space"]  # releases before 5 take it from here
    settings |= {"split_special_tokens": True}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    try:
        with new_directory(directory, "tokenizer.json") as partial:
            fast.save_pretrained(partial)
            # The class by the name that releases before 5 know too.
            write_json(partial / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | settings)
    except Exception as error:  # the libraries raise bare Exception as well as OSError
        raise UserError(f"{directory}: the tokenizer cannot be written: {one_line(error)}") from error
