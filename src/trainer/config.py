"""Hydra composes, OmegaConf checks types, the dataclasses validate. Every error is one line with the close matches."""

from __future__ import annotations

import io
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from precision.recipe import close
from precision.registry import files_in, is_file
from trainer.build import MODEL_SCHEMAS, PrecisionConfig
from trainer.checkpoint import CheckpointConfig, ResumeConfig
from trainer.data import DataConfig, SourceConfig, home_of
from trainer.distributed import ParallelConfig
from trainer.environ import is_text, require_text
from trainer.errors import UserError, one_line
from trainer.generate import SampleConfig
from trainer.loop import EvalConfig, LoopConfig, ProbeConfig
from trainer.metrics import LogConfig
from trainer.optim import OptimConfig
from trainer.rundir import RunConfig
from trainer.spikes import SpikeAction

_SOURCES = "data.sources"
_MOST_BYTES, _MOST_DEPTH = 1 << 20, 20  # of a config.yaml; those that are written have some 4,000 and 5
_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*(\$\{.*)", re.DOTALL)  # an even number of backslashes escapes nothing
CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


@dataclass(kw_only=True)
class TrainConfig:
    """The whole config: one field a part, each described beside the code that reads it."""

    model: Any = MISSING  # one of trainer.build.MODEL_SCHEMAS
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

    def validate(self, *, recipe: bool = True) -> None:
        """Raises UserError for the first part that is not valid. Changes nothing. ``recipe``: run recipe files."""
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: must be from 0 to 2^63 - 1")
        for part in fields(self):
            value = getattr(self, part.name)
            if part.name == "precision" and not recipe:
                continue
            if hasattr(value, "validate"):
                try:
                    value.validate()
                except ValueError as error:
                    raise UserError(one_line(error)) from error
        try:
            if recipe:
                self.precision.validate_schedule(self.train.steps)
        except ValueError as error:
            raise UserError(f"precision.{one_line(error)}") from error

        if self.train.spike is SpikeAction.rollback and self.checkpoint.every == 0:
            raise UserError(
                "train.spike=rollback goes back to a scheduled checkpoint, and checkpoint.every=0 writes none: set "
                "checkpoint.every, or take train.spike=skip"
            )

    def flat(self) -> dict[str, Any]:
        """Every value by its dotted key, as plain numbers, strings, lists and None."""
        return dict(flatten(_plain(asdict(self))))

    def to_yaml(self) -> str:
        """The config as YAML, which ``load_run_config`` reads back: no string in it is an interpolation."""
        return OmegaConf.to_yaml(OmegaConf.create(_plain(asdict(self), escaped=True)))


def _plain(value: Any, *, escaped: bool = False) -> Any:
    """Enums by name; ``escaped``: strings such that OmegaConf reads back what they are now."""
    if isinstance(value, Mapping):
        return {key: _plain(item, escaped=escaped) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, escaped=escaped) for item in value]
    if isinstance(value, Enum):
        return value.name
    if escaped and isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def register_schemas() -> None:
    """Tell Hydra the dataclasses, so that every yaml and every override is checked against them."""
    OmegaConf.register_new_resolver("home", home_of, replace=True)  # ${home:PATH}, of a corpus
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    for arch, schema in MODEL_SCHEMAS.items():
        store.store(group="model", name=f"{arch}_schema", node=schema)


register_schemas()


def groups() -> dict[str, list[str]]:
    """Config groups and the choices of each."""
    return {
        directory.name: sorted(file.stem for file in directory.glob("*.yaml"))
        for directory in sorted(CONFIG_DIR.iterdir())
        if directory.is_dir() and directory.name != "sweep"  # grids of trainer.sweep, which Hydra never sees
    }


def load_config(overrides: Sequence[str]) -> TrainConfig:
    """Compose ``configs/train.yaml`` with Hydra overrides, and validate.

    Raises UserError, one line: an unknown key, group or value (with the closest valid names), a wrong type, or a
    value out of range.
    """
    parsed = parse(overrides)
    _check_choices(parsed)
    chosen = [override.input_line or "" for override in parsed if override.key_or_group in groups()]
    base = _compose(chosen)
    _check_keys(parsed, base)
    said = said_files(parsed)
    overrides = [_for_compose(override) for override in parsed if not _is_hydra(override)]
    return to_config(_compose([*overrides, *_name_of_file(parsed)]), said)


def said_files(overrides: Sequence[Override]) -> set[str]:
    """The recipe files that the command line names."""
    values = [override.value() for override in overrides if override.key_or_group.startswith("precision.")]
    return {str(file) for value in values for file in files_in([{"": value}])}


def _name_of_file(overrides: Sequence[Override]) -> list[str]:
    """What else follows from a recipe file: a name, if none is given, which the run directory may be called by."""
    values = {override.key_or_group: override.value() for override in overrides}
    recipe = values.get("precision.recipe")
    if not isinstance(recipe, str) or not is_file(recipe) or "precision.name" in values:
        return []
    return [f"precision.name={re.sub(r'[^A-Za-z0-9_-]', '_', Path(recipe).stem)}"]


def load_run_config(file: Path, said: Collection[str] | None = frozenset()) -> TrainConfig:
    """The ``config.yaml`` of a run directory. Raises UserError if there is none or it cannot be read.

    ``said``: the recipe files that may be run, for the command line names them; None to run none and only read.
    """
    try:
        tree = read_yaml(file)
        schema = MODEL_SCHEMAS[tree.model.arch]
        tree.model = OmegaConf.merge(OmegaConf.structured(schema), tree.model)
        return to_config(OmegaConf.merge(OmegaConf.structured(TrainConfig), tree), said)
    except FileNotFoundError as error:
        raise UserError(f"{file.parent} is not a run directory: it has no {file.name}") from error
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OmegaConfBaseException) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error


def read_yaml(file: Path) -> DictConfig:
    """A ``config.yaml``, which may be anybody's: values as they stand there, of which nothing is looked up or built.

    Raises OSError if it cannot be read, ValueError for what the trainer never writes: interpolations (``${oc.env:X}``
    would put this machine's secrets into a report), ``_target_``, aliases, values nested without end.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("no file")
    if found.st_size > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES:,} bytes")
    text = file.read_text(encoding="utf-8")
    try:
        _require_plain(text)
        tree = OmegaConf.load(io.StringIO(text))
        assert isinstance(tree, DictConfig)
        if "_target_" in _keys(OmegaConf.to_container(tree)):
            raise ValueError("it has a key _target_, which the trainer never writes: a config executes nothing")
        return tree
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(one_line(error)) from error


def _require_plain(text: str) -> None:
    depth = nodes = 0
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # before anything is made of it
        line = f"line {event.start_mark.line + 1}"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_DEPTH:
            raise ValueError(f"{line}: nested more than {_MOST_DEPTH} deep")
        if isinstance(event, yaml.NodeEvent):
            nodes += 1
            if nodes == 1 and not isinstance(event, yaml.MappingStartEvent):
                break
            if event.anchor is not None:
                raise ValueError(f"{line}: an anchor or alias, which the trainer never writes")
            if getattr(event, "tag", None) is not None:
                raise ValueError(f"{line}: a tag, {event.tag[:60]!r}, which the trainer never writes")
        if isinstance(event, yaml.ScalarEvent):
            if found := _INTERPOLATION.search(event.value):
                shown = one_line(ValueError(found[1]))[:60]
                raise ValueError(f"{line}: {shown!r} is an interpolation, which the trainer never writes")
            if not is_text(event.value):
                raise ValueError(f"{line}: {event.value[:60]!a} is no text")
    if nodes < 2:
        raise ValueError("no key: value in it")


def _keys(tree: Any) -> Iterator[Any]:
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _keys(item)
    if isinstance(tree, dict):
        yield from tree


def to_config(tree: Any, said: Collection[str] | None = frozenset()) -> TrainConfig:
    """A composed tree as dataclasses, validated. ``said``: as in ``load_run_config``."""
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise UserError(_type_error(error)) from error
    assert isinstance(config, TrainConfig)
    if not isinstance(config.model, tuple(MODEL_SCHEMAS.values())):
        raise UserError("model: the chosen config lacks the defaults entry that names its schema")
    if said is not None:
        try:
            config.precision.require_said(said)
        except ValueError as error:
            raise UserError(one_line(error)) from error
    config.validate(recipe=said is not None or not config.precision.files())
    return config


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with the old and the new value."""
    before, after = old.flat(), new.flat()
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def parse(overrides: Sequence[str]) -> list[Override]:
    """Overrides in Hydra's grammar. Raises UserError for what is none."""
    parsed = []
    for text in overrides:
        require_text(text)
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except HydraException as error:
            hint = "" if "=" in text else "; write key=value"
            raise UserError(f"{text!r} is not an override{hint} ({one_line(error).split(' See https')[0]})") from error
    return parsed


def _is_hydra(override: Override) -> bool:
    return override.key_or_group.split(".")[0].split("/")[0] == "hydra"


def _for_compose(override: Override) -> str:
    line = override.input_line or ""
    if line.startswith(f"{_SOURCES}."):  # OmegaConf makes no new source from a dotted key, but merges one
        path, _, value = line.partition("=")
        names = path.removeprefix(f"{_SOURCES}.").split(".")
        line = f"{_SOURCES}={''.join(f'{{{name}:' for name in names)}{value}{'}' * len(names)}"
    # The recipe's signature is the schema of its arguments, so the yaml need not name them all; sources have any names.
    return f"++{line}" if line.startswith(("precision.args.", _SOURCES)) else line


def _check_choices(overrides: Sequence[Override]) -> None:
    known = groups()
    for override in overrides:
        group = override.key_or_group
        if group in known and override.value() not in known[group]:
            value = override.value()
            raise UserError(
                f"{group}={value}: no such {group} config{close(str(value), known[group])}; "
                f"there are: {', '.join(known[group])}"
            )


def _check_keys(overrides: Sequence[Override], base: DictConfig) -> None:
    tree = OmegaConf.to_container(base, resolve=False)
    known = {key for key, _ in flatten(tree)}
    known |= {".".join(key.split(".")[:depth]) for key in known for depth in range(1, key.count(".") + 1)}
    hydra_known = {f"hydra.{key}" for key, _ in flatten(OmegaConf.to_container(OmegaConf.structured(HydraConf)))}
    for override in overrides:
        key = override.key_or_group
        if key in groups() or key.startswith("precision.args."):
            continue
        if key == "sweep":
            raise UserError(f"{override.input_line}: a named grid is of many runs: python -m trainer --multirun")
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: several values are several runs: python -m trainer --multirun")
        if key == _SOURCES or key.startswith(f"{_SOURCES}."):
            _check_source(key, base)
        elif _is_hydra(override):
            if "/" in key:
                raise UserError(f"{key}: Hydra's own groups are not used here; drop this override")
            if not any(key == k or key.startswith(f"{k}.") for k in hydra_known):
                raise UserError(f"unknown key {key!r}{close(key, hydra_known)}")
        elif key not in known:
            near = close(key, known) or close(key.split(".")[-1], {k.split(".")[-1] for k in known})
            raise UserError(f"unknown key {key!r}{near}; python -m trainer --cfg job shows all")


def _check_source(key: str, base: DictConfig) -> None:
    if base.data.sources is None:
        raise UserError(f"{key}: data={base.data.name} reads one corpus, data.path; data=mix reads several")
    known = [part.name for part in fields(SourceConfig)]
    _, *parts = key.removeprefix(_SOURCES).split(".")  # NAME, NAME.FIELD, or nothing
    if len(parts) > 2 or (len(parts) == 2 and parts[1] not in known):
        raise UserError(f"unknown key {key!r}{close(parts[1], known)}; a source has {', '.join(known)}")


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by their dotted keys."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _compose(overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return compose("train", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise UserError(_type_error(cause)) from error


def _type_error(error: BaseException) -> str:
    key = getattr(error, "full_key", None)
    message = (getattr(error, "msg", None) or str(error)).splitlines()[0]
    return f"{key}: {message}" if key and key not in message else message
