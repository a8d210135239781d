"""A trained run, opened again in one process, to generate from or to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import distributed
from ..build import build_state, resolve_model
from ..checkpoint import Checkpoint, load_into, newest
from ..config import TrainConfig, load_run_config, restored_model
from ..data.tokenizer import TextTokenizer, load_tokenizer
from ..distributed import World
from ..errors import UserError, one_line
from ..model import UnreadConfig
from ..rundir import RunDirectory, require_tokenizer
from ..state import POSITION, TrainState


@dataclass(frozen=True)
class Run:
    """The state of a run directory's newest checkpoint."""

    config: TrainConfig
    world: World
    state: TrainState
    tokenizer: TextTokenizer


def open_checkpoint(run_dir: Path) -> tuple[TrainConfig, Checkpoint, TextTokenizer]:
    """The config of a run, of which no file is run, its newest checkpoint, and the tokenizer stored with it.

    Raises UserError if it is no run directory, or holds no usable checkpoint or another tokenizer.
    """
    directory = RunDirectory(run_dir)
    config = load_run_config(directory.config, None)
    config = replace(config, data=directory.data_of(config.data))
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eot_token)
    checkpoint = newest(directory.checkpoints)
    if checkpoint is None:
        raise UserError(f"{directory.checkpoints} holds no usable checkpoint")
    require_tokenizer(checkpoint, tokenizer)
    return config, checkpoint, tokenizer


def restore_run(run_dir: Path, said: Sequence[str] = ()) -> Run:
    """Open ``run_dir``; ``said``: the files of recipe and model that the command line names, which alone may run.

    Raises UserError if it is no run directory or holds no usable checkpoint, or for a file that is not said.
    """
    config, checkpoint, tokenizer = open_checkpoint(run_dir)
    # The recipe the weights were trained under: config.yaml may name the next one already (resume.recipe_change).
    try:
        config = restored_model(config, checkpoint.meta.get("identity", {}), said)
        precision = config.precision.restored(checkpoint.meta["recipe"], said)
        config = replace(config, precision=precision, parallel=replace(config.parallel, replicate=1))
        _ = config.values
    except (ValueError, UserError) as error:
        unread = isinstance(config.model, UnreadConfig)
        name, key = ("model", "model.arch") if unread else ("recipe", "precision.recipe")
        copies = [str(path) for path in sorted(run_dir.glob(f"{name}*.py"))]
        hint = f"; its copy is {' and '.join(copies)}: {key}={copies[0]}" if copies else ""
        raise UserError(f"{checkpoint.path} was trained with {one_line(error)}{hint}") from error
    world = distributed.start(config.parallel)
    model = resolve_model(config.model, tokenizer.vocab_size, config.data.seq_len)
    state = build_state(model, config.values.precision, config.parallel, config.optim, world, seed=config.seed)
    if (position := checkpoint.meta["tensors"].get(POSITION)) is not None:  # of a stream that is not opened here
        state.position = torch.zeros(position[1:], dtype=torch.int64)
    state.plan.reset_state()
    # What a recipe remembers of many ranks does not fit into one process: their largest amaxes do.
    load_into(checkpoint, state, world.checkpoint, of_ranks=True)
    state.plan.resume(state.step, config.train.steps)
    return Run(config, world, state, tokenizer)
