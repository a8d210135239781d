"""Loss, perplexity and bits per byte of a run, or of a `transformers` directory, on any corpus in C4's layout."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from .. import distributed
from ..build import build_state, pretrained_config
from ..config import load_config
from ..data.config import ROW_KEYS, DataConfig
from ..data.open import open_windows, validation_source
from ..data.prepare import prepare
from ..data.text_files import is_rows
from ..data.tokenizer import load_tokenizer
from ..distributed import World, say
from ..errors import UserError
from ..loop import EvalPrecision, validate
from ..pretrained import DOCUMENT_MASK, PretrainedDirectory
from ..state import TrainState
from ..stop import StopRequest
from .restore import restore_run

LONGEST = 4096  # tokens of a window, if nobody names its length


@dataclass(frozen=True)
class Evaluation:
    """``loss`` in nats a token; ``bits_per_byte`` over the UTF-8 bytes of the text; ``seq_len`` of the windows."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    seq_len: int


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and the data options it was trained with."""

    world: World
    state: TrainState
    data: DataConfig
    precision: EvalPrecision


def open_run(run_dir: Path, seq_len: int | None = None, said: Sequence[str] = ()) -> Subject:
    """The newest checkpoint of a run, at the length it was trained at if ``seq_len`` names no other.

    ``said``: as in ``restore_run``.
    """
    run = restore_run(run_dir, said)
    data = run.config.data
    length = _length(seq_len, data.seq_len, run.state.model.config.position_limit, str(run_dir))
    return Subject(run.world, run.state, replace(data, seq_len=length), run.config.eval.precision)


def open_pretrained(directory: str, precision: str, seq_len: int | None = None) -> Subject:
    """A `transformers` directory with its own tokenizer, at the length it names if ``seq_len`` names no other.

    Raises UserError if model and tokenizer do not fit to each other, or to the length.
    """
    pretrained = PretrainedDirectory(directory)
    model = pretrained_config(pretrained)
    if (tokens := load_tokenizer(directory).vocab_size) > (model.vocab_size or tokens):
        raise UserError(f"{directory}: the tokenizer has {tokens} tokens, the model {model.vocab_size}")
    length = _length(seq_len, pretrained.trained_length, model.position_limit, directory)
    config = load_config([f"precision={precision}"])
    world = distributed.start(config.parallel)
    precision = config.values.precision
    state = build_state(model, precision, config.parallel, config.optim, world, seed=0, pretrained=directory)
    apart = pretrained.config.get(DOCUMENT_MASK) is True
    data = replace(config.data, tokenizer=directory, seq_len=length, eot_token=None, document_mask=apart)
    return Subject(world, state, data, EvalPrecision.recipe)


def _length(wanted: int | None, trained: int | None, limit: int | None, place: str) -> int:
    """Of the windows, in tokens. Says so if it is not the one trained at; raises UserError for more than positions."""
    if wanted is None:
        if trained is None or trained <= LONGEST:
            return trained or LONGEST
        say(f"windows of {LONGEST:,} tokens, not of the {trained:,} that {place} names: seq_len=... chooses another")
        return LONGEST
    if limit is not None and wanted > limit:
        raise UserError(f"seq_len={wanted} is beyond the {limit} learned positions of {place}")
    if trained is not None and wanted > trained:
        say(f"warning: seq_len={wanted} is longer than the {trained} tokens that {place} was trained at")
    return wanted


def evaluate_on(subject: Subject, path: str | None, split: str, tokens: int, micro_batch: int) -> Evaluation:
    """One pass over the first ``tokens`` tokens (0 = all) of ``split``.

    With ``path`` None, over the text or shards the subject was trained with; otherwise the corpus there is tokenized
    into a temporary directory first. Raises UserError for a corpus that cannot be used.
    """
    data = subject.data
    with tempfile.TemporaryDirectory(prefix="evaluate_") as scratch, StopRequest() as stop:
        if path is not None:
            if path != data.path:  # parts of the other are none of this one; rows may have their text in the same field
                rows = {part.name: part.default for part in fields(DataConfig) if part.name in ROW_KEYS}
                data = replace(data, path=path, **rows | ({"field": data.field} if is_rows(path) else {}))
            data = replace(data, name="c4", shards=scratch, out=None, sources=None, stream=False, max_files=None)
            prepare(data, splits=(split,))
        tokenizer = load_tokenizer(data.tokenizer, data.eot_token)
        windows = open_windows(data, tokenizer, split, tokens)
        source, size = validation_source(windows, tokens, data, tokenizer, subject.world, micro_batch)
        result = validate(subject.state, source, subject.world, stop, subject.precision)
    if isinstance(result, int):
        raise UserError(f"stopped by {stop.describe(result)}")
    loss = result[0] / result[1]
    return Evaluation(loss, math.exp(min(loss, 700.0)), result[0] / math.log(2) / size, int(result[1]), data.seq_len)
