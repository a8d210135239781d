"""Whether a config goes on with the run that ``run.dir`` holds, and from which of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..precision.loading import content_of, is_file, renamed
from ..precision.states.rules import described
from .checkpoint import Checkpoint, RecipeChange, had_checkpoints, newest
from .config import TrainConfig, differences, load_run_config
from .data.config import DataConfig
from .data.tokenizer import load_tokenizer
from .distributed import World, say
from .errors import UserError
from .loop import Status
from .rundir import Resume, RunDirectory

# Compared by the values that they are parsed to: they may stand for the recipe's own.
_MOMENTS, _UPDATE = "optim.moments", "optim.update"
# A run that goes on must not change these: its loss curve would be of two different runs.
_FIXED = ("model", "precision.recipe", "precision.args", "precision.schedule", "seed")
_OF_FILES = ("precision.", "model.arch")  # may name files
_FIXED += tuple(
    f"data.{name}" for name in ("seq_len", "global_batch_size", "document_mask", "stream", "lanes", "shuffle_rows")
)


def find_checkpoint(config: TrainConfig, world: World, directory: RunDirectory) -> Checkpoint | Status | None:
    """What to go on from, on all ranks; ``Status.finished`` where there is nothing left to do.

    Raises UserError if ``run.dir`` holds a run of another config, or ``run.resume`` forbids what it would come to.
    """
    world.on_main(lambda: _prepare(config, directory))
    if config.run.resume is Resume.never:
        return None
    checkpoint = newest(directory.checkpoints, tidy=True, world=world)
    return world.on_main(lambda: _judge(config, directory, checkpoint))


def _prepare(config: TrainConfig, directory: RunDirectory) -> None:
    """On rank 0: move aside what is not wanted, or refuse what is of another run."""
    if config.run.resume is Resume.never:
        if directory.has_run():
            directory.move_aside()
        return
    if directory.config.exists() and directory.has_run():
        changed = differences(load_run_config(directory.config, None), config)
        # Of recipe files the checkpoint says what they held; they may lie at another place now.
        fixed = {key: change for key, change in changed.items() if _is_fixed(key) and not _only_files_moved(*change)}
        _require_no_change(fixed, config, f"run.dir={directory.path} holds a run")
        if changed.keys() & {"data.tokenizer", "data.eot_token"}:
            _require_own_tokenizer(config.data, directory)
        shown = [f"{key}={new} (was {old})" for key, (old, new) in changed.items() if not key.startswith("run.")]
        if shown:
            say(f"going on with another config: {', '.join(shown)}")


def _judge(config: TrainConfig, directory: RunDirectory, checkpoint: Checkpoint | None) -> Checkpoint | Status | None:
    """On rank 0: whether to go on from ``checkpoint``, or to start where there is none."""
    if checkpoint is None:
        if config.run.resume is Resume.must:
            raise UserError(f"run.resume=must: {directory.checkpoints} holds no usable checkpoint")
        if had_checkpoints(directory.checkpoints):
            raise UserError(
                f"{directory.checkpoints} has checkpoints, and none is whole: mend one, or run.resume=never moves them "
                "aside and starts at step 0"
            )
        if directory.has_run():
            say(f"{directory.path} holds no usable checkpoint: starting at step 0")
        return None
    before = checkpoint.meta.get("identity", {})
    own = {_UPDATE: described(config.values.precision.own_update)}  # of a run from before there was the key
    both = {key: (before.get(key, own.get(key, value)), value) for key, value in identity(config).items()}
    _require_no_change(
        {key: (old, new) for key, (old, new) in both.items() if old != new},
        config,
        f"checkpoint {checkpoint.path} is of a run",
    )
    finished = directory.finished_step()
    if finished is not None and checkpoint.meta["step"] >= config.train.steps:
        say(f"{directory.path} is finished: step {finished}. Nothing to do; raise train.steps to go on")
        return Status.finished
    return checkpoint


def identity(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint says about the run it is of, besides the shapes of its tensors; recipe files by content."""
    fixed = {
        key: renamed(value, content_of) if key.startswith(_OF_FILES) else value
        for key, value in config.flat().items()
        if _is_fixed(key)
    }
    recipe = config.values.precision.recipe
    return fixed | {_MOMENTS: recipe.moments.text(recipe.update), _UPDATE: described(recipe.update)}


def _is_fixed(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _FIXED)


def _only_files_moved(old: Any, new: Any) -> bool:
    """Whether nothing but paths of recipe files differs."""
    return bool(renamed(old, lambda file: "") == renamed(new, lambda file: ""))


def _require_no_change(changed: Mapping[str, tuple[Any, Any]], config: TrainConfig, where: str) -> None:
    """Raises UserError that gives each key with what it was and what it cannot become, and the ways out."""
    if config.resume.recipe_change is RecipeChange.allow:
        changed = {key: change for key, change in changed.items() if not key.startswith("precision.")}
    if not changed:
        return
    keys = sorted(changed, key=lambda key: (key != "precision.recipe", key))
    if "precision.recipe" in changed:  # arguments of the other recipe follow from it
        keys = [key for key in keys if not (key.startswith("precision.args.") and changed[key][0] is None)]
    ways = ["choose another run.dir", "or run.resume=never to move it aside"]
    if all(key.startswith("precision.") for key in keys):
        ways.insert(1, "resume.recipe_change=allow to go on under this recipe")
    if states := [key for key in (_UPDATE, _MOMENTS) if key in keys]:
        ways.insert(0, f"states are not converted: keep {' and '.join(states)}")
    text = "; ".join(_difference(key, *changed[key]) for key in keys)
    raise UserError(f"{where} with {text}: {', '.join(ways)}")


def _difference(key: str, old: Any, new: Any) -> str:
    if all(isinstance(one, str) and is_file(one) for one in (old, new)):
        held = f"{str(old).removesuffix('.py')}, not {str(new).removesuffix('.py')}"
        what = "model" if key == "model.arch" else "recipe"
        return f"another {key}, the {what} file has changed: {held}"
    return f"{key}={old}, not {new}"


def _require_own_tokenizer(data: DataConfig, directory: RunDirectory) -> None:
    """Raises UserError if ``data.tokenizer`` is another than the run's own copy; one that is gone is not missed."""
    try:
        own, named = (load_tokenizer(one.tokenizer, one.eot_token) for one in (directory.data_of(data), data))
    except UserError:
        return
    if own.fingerprint != named.fingerprint:
        raise UserError(
            f"run.dir={directory.path} holds a run with the tokenizer of fingerprint {own.fingerprint}, and "
            f"data.tokenizer={data.tokenizer} has {named.fingerprint}: leave data.tokenizer and data.eot_token as they "
            "were, choose another run.dir, or run.resume=never to move it aside"
        )
