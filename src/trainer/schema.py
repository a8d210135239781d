"""The config as dataclasses: what Hydra checks yamls and overrides against, and the values that it is parsed to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from functools import cached_property
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from omegaconf._utils import get_omega_conf_dumper

from .checkpoint import ResumeConfig
from .checkpointer import CheckpointConfig
from .console import LogConfig
from .data.config import DataConfig, home_of
from .data.tokenizer import tokenizer_place
from .distributed import ParallelConfig
from .errors import UserError, as_user_error
from .loop import EvalConfig, LoopConfig, ProbeConfig
from .model import MODEL_SCHEMAS
from .optim import OptimConfig
from .recipe import Precision, PrecisionConfig
from .rundir import RunConfig
from .spikes import SpikeAction
from .tools.generate import SampleConfig


@dataclass(frozen=True, kw_only=True)
class Values:
    """What a config is parsed to, where it is not the values itself."""

    precision: Precision
    micro_batch: int | None  # sequences; None: as many as fit


@dataclass(kw_only=True)
class TrainConfig:
    """The complete config: one field a part, each described where the code that reads it is."""

    model: Any = MISSING  # what model.schema_of(arch) gives
    data: DataConfig = MISSING
    precision: PrecisionConfig = MISSING
    optim: OptimConfig = MISSING
    parallel: ParallelConfig = MISSING
    seed: int = 0
    run: RunConfig = MISSING
    train: LoopConfig = MISSING
    eval: EvalConfig = field(default_factory=EvalConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    log: LogConfig = field(default_factory=LogConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    @cached_property
    def values(self) -> Values:
        """What the texts and lists of the config stand for, parsed once. Runs recipe files; raises UserError."""
        with as_user_error("", ValueError):
            optim = self.optim
            precision = self.precision.parse(
                optim.moments, self.train.steps, update=optim.update, update_args=optim.update_args
            )
        size = self.train.micro_batch_size
        return Values(precision=precision, micro_batch=None if size == "auto" else size)

    def __getstate__(self) -> dict[str, Any]:
        """Without ``values``, which hold functions: whoever unpickles a config parses it."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def validate(self, *, recipe: bool = True) -> None:
        """Raises UserError for the first part that is not valid. Changes nothing. ``recipe``: run recipe files."""
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: must be from 0 to 2^63 - 1")
        for part in fields(self):
            if (check := getattr(getattr(self, part.name), "validate", None)) is not None:
                with as_user_error("", ValueError):
                    check()
        if recipe:
            _ = self.values
        if self.train.spike is SpikeAction.rollback and self.checkpoint.every == 0:
            raise UserError(
                "train.spike=rollback goes back to a scheduled checkpoint, and checkpoint.every=0 writes none: set "
                "checkpoint.every, or take train.spike=skip"
            )

    def flat(self) -> dict[str, Any]:
        """Every value by its dotted key, as plain numbers, strings, lists and None."""
        return dict(flatten(self.nested()))

    def nested(self) -> dict[str, Any]:
        """Every value in its part, as plain numbers, strings, lists and None."""
        tree: dict[str, Any] = plain(asdict(self))
        return tree

    def to_yaml(self) -> str:
        """The config as YAML, which ``load_run_config`` reads back: no string in it is an interpolation."""
        tree = plain(asdict(self), escaped=True)
        return yaml.dump(tree, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def plain(value: Any, *, escaped: bool = False) -> Any:
    """Enums by name; ``escaped``: strings such that OmegaConf reads back what they are now."""
    if isinstance(value, Mapping):
        return {key: plain(item, escaped=escaped) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, escaped=escaped) for item in value]
    if isinstance(value, Enum):
        return value.name
    if escaped and isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


class _Dumper(get_omega_conf_dumper()):  # type: ignore[misc]
    """OmegaConf's, but what breaks lines (U+0085, which YAML reads as a space) is written as an escape."""

    def represent_text(self, text: str) -> Any:
        node = self.str_representer(self, text)
        return node if text.isprintable() else self.represent_scalar(node.tag, text, style='"')


_Dumper.add_representer(str, _Dumper.represent_text)


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by their dotted keys."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def register_schemas() -> None:
    """Tell Hydra the dataclasses, so that every yaml and every override is checked against them."""
    OmegaConf.register_new_resolver("home", home_of, replace=True)  # ${home:PATH}, of a corpus
    # ${tokenizer:HOME,VOCABULARY,DEFAULT}: not cached, for another vocabulary is another place
    OmegaConf.register_new_resolver("tokenizer", tokenizer_place, replace=True)
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    for arch, schema in MODEL_SCHEMAS.items():
        store.store(group="model", name=f"{arch}_schema", node=schema)
    store.store(group="model", name="own_schema", node={})  # of a user's file: known once that is run


register_schemas()
