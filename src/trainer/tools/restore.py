"""A trained run, opened again in one process, to generate from or to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import distributed
from ..build import build_state, resolve_model
from ..checkpoint import load_into, newest
from ..config import TrainConfig, load_run_config
from ..data.tokenizer import TextTokenizer, load_tokenizer
from ..distributed import World
from ..errors import UserError, one_line
from ..rundir import RunDirectory, require_tokenizer
from ..state import POSITION, TrainState


@dataclass(frozen=True)
class Run:
    """The state of a run directory's newest checkpoint."""

    config: TrainConfig
    world: World
    state: TrainState
    tokenizer: TextTokenizer
    context: int  # the longest prefix it was trained on


def open_config(directory: RunDirectory) -> TrainConfig:
    """The config of a run, with the tokenizer that the run keeps; a recipe file that it names is not run.

    Raises as ``load_run_config``.
    """
    config = load_run_config(directory.config, None)
    config.data = directory.data_of(config.data)
    return config


def restore_run(run_dir: Path, said: Sequence[str] = ()) -> Run:
    """Open ``run_dir``; ``said``: the recipe files that the command line names, which alone may run.

    Raises UserError if it is no run directory or holds no usable checkpoint, or for a recipe file that is not said.
    """
    directory = RunDirectory(run_dir)
    config = open_config(directory)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eot_token)
    checkpoint = newest(directory.checkpoints)
    if checkpoint is None:
        raise UserError(f"{directory.checkpoints} holds no usable checkpoint")
    require_tokenizer(checkpoint, tokenizer)
    # The recipe the weights were trained under: config.yaml may name the next one already (resume.recipe_change).
    try:
        config.precision.restore(checkpoint.meta["recipe"], said)
    except ValueError as error:
        copies = [str(path) for path in sorted(run_dir.glob("recipe*.py"))]
        kept = f"; its copy is {' and '.join(copies)}: precision.recipe={copies[0]}" if copies else ""
        raise UserError(f"{checkpoint.path} was trained with {one_line(error)}{kept}") from error
    config.parallel.replicate = 1
    world = distributed.start(config.parallel)
    model = resolve_model(config.model, tokenizer.vocab_size, config.data.seq_len)
    state = build_state(model, config.precision, config.parallel, config.optim, world, seed=config.seed)
    if (position := checkpoint.meta["tensors"].get(POSITION)) is not None:  # of a stream that is not opened here
        state.position = torch.zeros(position[1:], dtype=torch.int64)
    state.plan.reset_state()
    # What a recipe remembers of many ranks does not fit into one process: their largest amaxes do.
    load_into(checkpoint, state, world.checkpoint, of_ranks=True)
    state.plan.resume(state.step, config.train.steps)
    return Run(config, world, state, tokenizer, config.data.seq_len)
