"""Loss, perplexity and bits per byte of a run, or of a `transformers` directory, on any corpus in C4's layout."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer import distributed
from trainer.build import build_state, documents_end, open_windows, pretrained_config, validation_source
from trainer.config import load_config
from trainer.data import DataConfig
from trainer.distributed import StopRequest, World
from trainer.errors import UserError
from trainer.loop import EvalConfig, EvalPrecision, validate
from trainer.prepare import prepare
from trainer.pretrained import PretrainedDirectory
from trainer.restore import restore_run
from trainer.state import TrainState
from trainer.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Evaluation:
    """``loss`` in nats a token; ``bits_per_byte`` over the UTF-8 bytes of the text."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and the data options it was trained with."""

    world: World
    state: TrainState
    data: DataConfig
    precision: EvalPrecision


def open_run(run_dir: Path, said: Sequence[str] = ()) -> Subject:
    """The newest checkpoint of a run; ``said``: as in ``restore_run``."""
    run = restore_run(run_dir, said)
    return Subject(run.world, run.state, run.config.data, run.config.eval.precision)


def open_pretrained(directory: str, precision: str, seq_len: int) -> Subject:
    """A `transformers` directory with its own tokenizer."""
    pretrained = PretrainedDirectory(directory)
    model = pretrained_config(pretrained)
    config = load_config([f"precision={precision}"])
    world = distributed.start(config.parallel)
    state = build_state(model, config.precision, config.parallel, config.optim, world, seed=0, pretrained=directory)
    limit = model.position_limit or seq_len
    data = replace(config.data, tokenizer=directory, seq_len=min(seq_len, limit), eot_token=None)
    return Subject(world, state, data, EvalPrecision.recipe)


def evaluate_on(subject: Subject, path: str | None, split: str, tokens: int, micro_batch: int) -> Evaluation:
    """One pass over the first ``tokens`` tokens (0 = all) of ``split``.

    With ``path`` None, over the text or shards the subject was trained with; otherwise the corpus there is tokenized
    into a temporary directory first. Raises UserError for a corpus that cannot be used.
    """
    data = subject.data
    with tempfile.TemporaryDirectory(prefix="evaluate_") as scratch, StopRequest() as stop:
        if path is not None:
            data = replace(data, name="c4", path=path, shards=scratch, sources=None, stream=False, max_files=None)
            prepare(data, splits=(split,))
        tokenizer = load_tokenizer(data.tokenizer, data.eot_token)
        windows = open_windows(data, tokenizer, split, tokens)
        wanted = EvalConfig(tokens=tokens or windows.num_windows * data.seq_len)
        source, size = validation_source(
            windows, wanted, subject.world, micro_batch, documents_end=documents_end(data, tokenizer)
        )
        assert source is not None
        result = validate(subject.state, source, subject.world, stop, subject.precision)
    if isinstance(result, int):
        raise UserError(f"stopped by {stop.describe(result)}")
    loss = result[0] / result[1]
    return Evaluation(loss, math.exp(min(loss, 700.0)), result[0] / math.log(2) / size, int(result[1]))
