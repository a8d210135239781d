"""Hydra composes, OmegaConf checks types, the dataclasses validate. Every error is one line with the close matches."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from ..precision.loading import files_in, is_file
from ..precision.recipe import close, filled
from .build import MODEL_SCHEMAS, PrecisionConfig
from .checkpoint import ResumeConfig
from .checkpointer import CheckpointConfig
from .console import LogConfig
from .data.batches import DataConfig, SourceConfig, home_of
from .data.tokenizer import tokenizer_place
from .distributed import ParallelConfig
from .environ import is_text, require_text, unquoted
from .errors import UserError, one_line
from .loop import EvalConfig, LoopConfig, ProbeConfig
from .optim import OptimConfig
from .own import CONFIG_DIR, ENTRY, EXPERIMENT, Place, entry, hydra_at, keys_of, read_own, split, text_of
from .rundir import Resume, RunConfig, RunDirectory
from .spikes import SpikeAction
from .tools.generate import SampleConfig

_SOURCES = "data.sources"
_OPEN = re.compile(  # of any names
    rf"precision\.args\.|data\.sources\.[^.]+(\.({'|'.join(part.name for part in fields(SourceConfig))}))?$"
)
_EXECUTES = re.compile(r"hydra\.(searchpath|callbacks|hydra_logging|job_logging)\b")
_FLAGS = {"learning_rate": "optim.lr", "batch_size": "data.global_batch_size", "max_steps": "train.steps"}
_FLAGS |= {"output_dir": "run.dir", "resume": "run.dir"}  # what other trainers call them
_MOST_DEPTH = 20  # of a config.yaml; those that are written have some 5
_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*(\$\{.*)", re.DOTALL)  # an even number of backslashes escapes nothing


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
        return dict(flatten(self.nested()))

    def nested(self) -> dict[str, Any]:
        """Every value in its part, as plain numbers, strings, lists and None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def to_yaml(self) -> str:
        """The config as YAML, which ``load_run_config`` reads back: no string in it is an interpolation."""
        plain = _plain(asdict(self), escaped=True)
        return yaml.dump(plain, Dumper=_dumper(), default_flow_style=False, allow_unicode=True, sort_keys=False)


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


@cache
def _dumper() -> Any:
    class Dumper(get_omega_conf_dumper()):  # type: ignore[misc]
        """OmegaConf's, but what breaks lines (U+0085, which YAML reads as a space) is written as an escape."""

    def represent(dumper: Any, text: str) -> Any:
        plain = get_omega_conf_dumper().str_representer(dumper, text)
        return plain if text.isprintable() else dumper.represent_scalar(plain.tag, text, style='"')

    Dumper.add_representer(str, represent)
    return Dumper


def register_schemas() -> None:
    """Tell Hydra the dataclasses, so that every yaml and every override is checked against them."""
    OmegaConf.register_new_resolver("home", home_of, replace=True)  # ${home:PATH}, of a corpus
    # ${tokenizer:HOME,VOCABULARY,DEFAULT}: not kept, for another vocabulary is another place
    OmegaConf.register_new_resolver("tokenizer", tokenizer_place, replace=True)
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
        if directory.is_dir() and directory.name not in ("sweep", EXPERIMENT)  # grids of trainer.sweep; of any keys
    }


def load_config(overrides: Sequence[str], *, keys_are_known: bool = False) -> TrainConfig:
    """Compose ``configs/train.yaml``, or what ``trainer.own``'s flags name, with Hydra overrides, and validate.

    Where ``run.dir`` names a run that is to go on, what it was trained with takes the place of ``configs``: the path
    alone is enough, and a choice that is the run's own adds nothing.

    Raises UserError, one line: an unknown key, group or value (with the closest valid names), a wrong type, or a
    value out of range.
    """
    place, rest = split(overrides)
    parsed = parse(rest, several=False)
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: several values are several runs: python -m narrowgauge --multirun")
    name, said = entry_config(place, parsed), said_files(parsed)
    choices = {o.key_or_group: o for o in parsed if o.key_or_group in (*groups(), EXPERIMENT)}
    # A whole file, or an experiment, says what it says: a run in run.dir must agree.
    earlier = None if place.file is not None or EXPERIMENT in choices else _earlier_run(parsed)
    if earlier is None:
        if not keys_are_known:
            _check_keys(parsed, _compose(place, name, for_compose(list(choices.values()))))
        lines = for_compose([override for override in parsed if not _is_hydra(override)])
        config = to_config(_compose(place, name, [*lines, *name_of_file(parsed)]), said)
        arguments = filled(config.precision.recipe, {})
        for key in (o.key_or_group for o in parsed if o.is_delete() and o.key_or_group.startswith("precision.args.")):
            own = key.removeprefix("precision.args.").split(".")[0]
            if arguments and own not in arguments:
                raise UserError(f"~{key}: {config.precision.recipe} has no argument {own!r}{close(own, arguments)}")
        return config
    try:
        tree = _run_tree(earlier, choices, place)
        _check_keys(parsed, tree)
        keys = [o for o in parsed if not _is_hydra(o) and o.key_or_group not in choices]
        # What the run's first command added or took away is as it wants it already.
        keys = [o for o in keys if not o.is_delete() or OmegaConf.select(tree, o.key_or_group) is not None]
        lines = [re.sub(r"^\+(?!\+)", "++", _for_compose(override)) for override in keys]
        lines += name_of_file(parsed, tree.precision.recipe)
        ConfigLoaderImpl._apply_overrides_to_config(parse(lines), tree)
    except (HydraException, OmegaConfBaseException, AttributeError) as error:
        raise UserError(_composition_error(error)) from error
    return to_config(tree, said)


def said_files(overrides: Sequence[Override]) -> set[str]:
    """The recipe files that the command line names."""
    values = [override.value() for override in overrides if override.key_or_group.startswith("precision.")]
    return {str(file) for value in values for file in files_in([{"": value}])}


def name_of_file(overrides: Sequence[Override], before: str | None = None) -> list[str]:
    """What else follows from a recipe file that is not the one ``before``: a name, if none is given, for the run."""
    values = {override.key_or_group: override.value() for override in overrides}
    recipe = values.get("precision.recipe")
    if not isinstance(recipe, str) or not is_file(recipe) or recipe == before or "precision.name" in values:
        return []
    return [f"precision.name={re.sub(r'[^A-Za-z0-9_-]', '_', Path(recipe).stem)}"]


def entry_config(place: Place, parsed: Sequence[Override]) -> str:
    """The name of the entry config for Hydra. Raises UserError for a choice that is none, or a file that is not one."""
    _check_choices(place, parsed)
    if place.file is not None:
        check_own(place.file, "")
    return entry(place, [override.key_or_group for override in parsed], list(groups()))


def check_own(file: Path, group: str) -> str | None:
    """The package that a yaml of the user's names for itself, None if it names none.

    Raises UserError, one line with file and key, for a key that nothing reads, or a file that ``read_own`` refuses.
    """
    tree = read_own(file)
    header = re.search(r"^#\s*@package\s+(\S+)", file.read_text(encoding="utf-8")[:512], re.MULTILINE)
    package = header[1] if header else None
    if package not in (None, "_global_", "_group_", group, group.replace("/", ".")):
        raise UserError(f"{file}: its package is {package!r}: one of a group's name or _global_")
    if group.split("/")[0] == "hydra":
        if group not in ("hydra/launcher", "hydra/sweeper") or package == "_global_":
            raise UserError(f"{file}: of Hydra's own groups, launcher and sweeper are yours")
        return package
    prefix = f"{group}." if group not in ("", EXPERIMENT) and package != "_global_" else ""
    known = {key.rsplit(".", up)[0] for key in _kinds(TrainConfig) for up in range(key.count(".") + 1)}
    for key, value in flatten(OmegaConf.to_container(tree, resolve=False)):
        whole = f"{prefix}{key}"
        chosen = not prefix and key in groups() and isinstance(value, str)
        if _EXECUTES.match(key):
            raise UserError(f"{file}: {key} is not a config's to set: it finds or executes code")
        if not (key.startswith(("defaults", "hydra.")) or whole in known or _OPEN.match(whole) or chosen):
            near = close(whole, known).replace(f"'{prefix}", "'") or _alike_at_the_end(key, known)
            raise UserError(f"{file}: unknown key {key!r}{near}")
    return package


def _earlier_run(overrides: Sequence[Override]) -> RunDirectory | None:
    """The directory that ``run.dir`` names, if a run in it is to go on."""
    values = {override.key_or_group: override.value() for override in overrides}
    directory, resume = values.get("run.dir"), values.get("run.resume")
    if not directory or not isinstance(directory, str) or "${" in directory or resume == Resume.never.name:
        return None
    earlier = RunDirectory(Path(directory))
    try:
        return earlier if earlier.config.is_file() and earlier.has_run() else None
    except OSError as error:
        raise UserError(f"run.dir={directory} cannot be read: {error.strerror or error}") from error


def _run_tree(earlier: RunDirectory, choices: Mapping[str, Override], place: Place) -> DictConfig:
    """What the run's ``config.yaml`` says, but for the groups of which another choice is made, and for how to go on.

    What followed from another key follows from it still: a tokenizer from the corpus's path.
    """
    tree, _ = _read_run(earlier.config, None)
    names = {group: str(tree[group].get("name")) for group in groups() if group in tree}
    lines = [override.input_line or "" for override in choices.values()]
    same = [f"{group}={name}" for group, name in names.items() if group not in choices and name in place.choices(group)]
    composed = _compose(place, "train", [*lines, *same])
    with open_dict(tree):
        tree.run, tree.resume = composed.run, composed.resume
        for group in choices:
            if composed[group].name != names.get(group):
                tree[group] = composed[group]
    for key, text in flatten(OmegaConf.to_container(composed, resolve=False)):
        if isinstance(text, str) and "${" in text and not key.startswith("run."):
            before = OmegaConf.select(tree, key)
            OmegaConf.update(tree, key, text)
            if OmegaConf.select(tree, key) != before:
                OmegaConf.update(tree, key, _plain(before, escaped=True))
    OmegaConf.set_struct(tree, True)
    return tree


def load_run_config(file: Path, said: Collection[str] | None = frozenset()) -> TrainConfig:
    """The ``config.yaml`` of a run directory. Raises UserError if there is none or it cannot be read.

    ``said``: the recipe files that may be run, for the command line names them; None to run none and only read.
    """
    return _read_run(file, said)[1]


def _read_run(file: Path, said: Collection[str] | None = frozenset()) -> tuple[DictConfig, TrainConfig]:
    try:
        tree = read_yaml(file)
        schema = MODEL_SCHEMAS[tree.model.arch]
        tree.model = OmegaConf.merge(OmegaConf.structured(schema), tree.model)
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), tree)
        assert isinstance(merged, DictConfig)
        return merged, to_config(merged, said)
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
    text = text_of(file)
    try:
        _require_plain(text)
        tree = OmegaConf.load(io.StringIO(text))
        assert isinstance(tree, DictConfig)
        if "_target_" in keys_of(OmegaConf.to_container(tree)):
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


def to_config(tree: Any, said: Collection[str] | None = frozenset()) -> TrainConfig:
    """A composed tree as dataclasses, valid, with every argument of the recipe. ``said``: as in ``load_run_config``."""
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
    config.precision.args = filled(config.precision.recipe, config.precision.args)
    return config


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with the old and the new value; None for a key that one of them does not have."""
    before, after = ({key: value for key, value in config.flat().items() if value != {}} for config in (old, new))
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def parse(overrides: Sequence[str], *, several: bool = True) -> list[Override]:
    """Overrides in Hydra's grammar, but that the value of a key of text is the text that was typed.

    ``several``: a comma or a function separates the values of several runs. Raises UserError for what is no override.
    """
    parsed = []
    for text in overrides:
        require_text(text)
        if text.startswith("-"):
            raise UserError(flag_hint(text))
        try:
            parsed.append(_parse_one(_as_typed(text, several)))
        except HydraException as error:
            key, separator, value = text.partition("=")
            hint = "" if separator else "; write key=value"
            if separator and isinstance(_kind(key), _Text):
                line = f"{key}={QuotedString(value, Quote.double).with_quotes()}"
                hint = f"; among several runs such text is quoted: {shlex.quote(line)}"
            raise UserError(f"{text!r} is not an override{hint} ({one_line(error).split(' See https')[0]})") from error
    return parsed


def _parse_one(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def _as_typed(text: str, several: bool) -> str:
    """An override such that Hydra's grammar gives the value that its key's type wants.

    Text stays as it was typed, without quotes round all of it; a whole number may be written as 1e3, a list of one or
    more names without brackets.
    """
    key, separator, value = text.partition("=")
    kind = _kind(key) if separator else None
    if value.startswith("{") and not isinstance(kind, _Text):
        return f"{key}={_mapping_as_typed(key.lstrip('+'), value)}"
    if kind == list[str] and not value.startswith("[") and not (several and "," in value):
        return f"{key}=[{value}]"
    if kind is int and re.fullmatch(r"[+-]?[\d_]*\.?[\d_]*([eE][+-]?\d+)?", value):
        found = _parse_one(text).value()
        return f"{key}={int(found)}" if isinstance(found, float) and found.is_integer() else text
    if not isinstance(kind, _Text) or (kind.optional and value == "null"):
        return text
    if several:
        return _several_as_typed(key, value)
    text = value if (content := unquoted(value)) is None else content
    if text == "???":
        raise UserError(f"{key}=???: this is how a config marks what is missing; write another text")
    return f"{key}={_quoted(text)}"


def _mapping_as_typed(key: str, value: str) -> str:
    """Texts in a mapping without any quotes: those that Hydra would read as something else are quoted."""
    of = SourceConfig if key.startswith(_SOURCES) else TrainConfig
    leaves = {name: kind for name, kind in _kinds(of).items() if of is SourceConfig or name.startswith(f"{key}.")}
    names = [name.rpartition(".")[2] for name, kind in leaves.items() if isinstance(kind, _Text)]
    if not names or "'" in value or '"' in value:
        return value

    def quoted(found: re.Match[str]) -> str:
        same = found[2] == "null" or isinstance(_parse_one(f"{key}={found[2]}").value(), str)
        return found[0] if same else f"{found[1]}{_quoted(found[2])}"

    return re.sub(rf"(\b(?:{'|'.join(names)})\s*:\s*)([\w.+-]+)(?=\s*[,}}])", quoted, value)


def _several_as_typed(key: str, value: str) -> str:
    override = _parse_one(f"{key}={value}")
    if not override.is_sweep_override():
        return f"{key}={value if isinstance(override.value(), str) else _quoted(value)}"
    if re.search(r"""['"()\[\]{}\\$]""", value):
        return f"{key}={value}"
    parts = [part.strip() for part in value.split(",")]
    return f"{key}={','.join(p if isinstance(_parse_one(f'{key}={p}').value(), str) else _quoted(p) for p in parts)}"


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


@dataclass(frozen=True)
class _Text:
    """The type of a key whose value is text, or null."""

    optional: bool = False


def _kind(key: str) -> Any:
    """What ``key`` holds: ``_Text``, int, list[str], another type; None for a key that there is not."""
    key = key.lstrip("+")
    if key.startswith(f"{_SOURCES}."):
        return _kinds(SourceConfig).get(key.rpartition(".")[2])
    return _kinds(TrainConfig).get(key)


@cache
def _kinds(schema: type) -> dict[str, Any]:
    """The types of the leaves of a dataclass by dotted keys, without ``| None``."""
    found: dict[str, Any] = {"hydra.sweep.dir": _Text()} if schema is TrainConfig else {}
    for name, hint in get_type_hints(schema).items():
        optional = type(None) in get_args(hint)
        kind = next(one for one in get_args(hint) if one is not type(None)) if optional else hint
        parts = MODEL_SCHEMAS.values() if (schema, name) == (TrainConfig, "model") else [kind]
        for part in parts:
            if is_dataclass(part):
                found |= {f"{name}.{key}": value for key, value in _kinds(part).items()}
            else:
                found[name] = _Text(optional) if part is str else part
    return found


def check_flags(arguments: Sequence[str]) -> None:
    """Raises UserError for an option that Hydra does not have."""
    options = [option for action in get_args_parser()._actions for option in action.option_strings]
    for text, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name = text.partition("=")[0]
        known = any(one.startswith(name) for one in options) if name.startswith("--") else name[:2] in options
        if name.startswith("-") and not known and len(name) > 1:
            raise UserError(flag_hint(text, None if "=" in following or following.startswith("-") else following))


def flag_hint(text: str, value: str | None = None) -> str:
    """What to write instead of ``--lr 1e-3`` or ``--lr=1e-3``."""
    name, _, own = text.lstrip("-").partition("=")
    name = name.replace("-", "_")
    keys = sorted(_kinds(TrainConfig))
    last = {key: key.rpartition(".")[2] for key in keys}
    meant = _FLAGS.get(name) or name
    near = [meant] if meant in groups() else [key for key in keys if meant in (key, last[key])]
    near = near or [key for key in keys if last[key].endswith(meant)]
    near = near or get_close_matches(meant, keys, 1) or [key for key in keys if get_close_matches(meant, [last[key]])]
    shown = own or value or "VALUE"
    ways = f"write {' or '.join(f'{key}={shown}' for key in near[:3])}" if near else "write key=value"
    return f"{text.partition('=')[0]!r} is no option: {ways}"


def _is_hydra(override: Override) -> bool:
    return override.key_or_group.split(".")[0].split("/")[0] == "hydra"


def for_compose(overrides: Iterable[Override]) -> list[str]:
    """The overrides for Hydra, which takes away only what is there: an argument that no yaml names is added first."""
    lines = []
    for override in overrides:
        if re.fullmatch(r"~precision\.args\.[^=]+", override.input_line or ""):
            lines.append(f"++{override.key_or_group}=0")
        lines.append(_for_compose(override))
    return lines


def _for_compose(override: Override) -> str:
    line = override.input_line or ""
    if line.startswith(f"{_SOURCES}."):  # OmegaConf makes no new source from a dotted key, but merges one
        path, _, value = line.partition("=")
        names = path.removeprefix(f"{_SOURCES}.").split(".")
        line = f"{_SOURCES}={''.join(f'{{{name}:' for name in names)}{value}{'}' * len(names)}"
    # The recipe's signature is the schema of its arguments, so the yaml need not name them all; sources have any names.
    if override.key_or_group == EXPERIMENT:  # no part of the config: it is added, whether or not that is said
        return f"+{line.lstrip('+')}"
    return f"++{line}" if line.startswith(("precision.args.", _SOURCES)) else line


def _check_choices(place: Place, overrides: Sequence[Override]) -> None:
    known = {group: place.choices(group) for group in (*groups(), EXPERIMENT)}
    for override in overrides:
        group = override.key_or_group
        if group in known and not override.is_sweep_override() and override.value() not in known[group]:
            value = str(override.value())
            family = [name for name in known[group] if value and name.startswith(value)]
            family = family or [name for name in known[group] if value and value in name]
            near = f" (did you mean {' or '.join(map(repr, family))}?)" if family else close(value, known[group])
            raise UserError(f"{group}={value}: no such {group} config{near}; there are: {', '.join(known[group])}")


def _check_keys(overrides: Sequence[Override], base: DictConfig) -> None:
    tree = OmegaConf.to_container(base, resolve=False)
    known = {key for key, _ in flatten(tree)}
    known |= {".".join(key.split(".")[:depth]) for key in known for depth in range(1, key.count(".") + 1)}
    hydra_known = {f"hydra.{key}" for key, _ in flatten(OmegaConf.to_container(OmegaConf.structured(HydraConf)))}
    for override in overrides:
        key = override.key_or_group
        if key in (*groups(), EXPERIMENT) or key.startswith("precision.args."):
            continue
        if key == "sweep":
            raise UserError(f"{override.input_line}: a named grid is of many runs: python -m narrowgauge --multirun")
        if key == _SOURCES or key.startswith(f"{_SOURCES}."):
            _check_source(key, base)
        elif _is_hydra(override):
            if key.startswith("hydra.searchpath"):
                raise UserError(f"{key}: --config-dir=DIR is where configs of your own are")
            if "/" in key:
                raise UserError(f"{key}: Hydra's own groups are not used here; drop this override")
            if not any(key == k or key.startswith(f"{k}.") for k in hydra_known):
                raise UserError(f"unknown key {key!r}{close(key, hydra_known)}")
        elif key not in known:
            near = close(key, known) or _alike_at_the_end(key, known)
            raise UserError(f"unknown key {key!r}{near}; python -m narrowgauge --cfg job shows all")


def _alike_at_the_end(key: str, known: Collection[str]) -> str:
    ends = {one.split(".")[-1]: one for one in sorted(known, reverse=True)}
    near = [ends[end] for end in get_close_matches(key.split(".")[-1], list(ends))]
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


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


def _compose(place: Place, name: str, overrides: list[str]) -> DictConfig:
    try:
        with hydra_at(place):
            return compose(name, overrides)
    except (HydraException, OmegaConfBaseException, AttributeError) as error:
        raise UserError(_composition_error(error)) from error


def _composition_error(error: BaseException) -> str:
    if not isinstance(error, OmegaConfBaseException) and (key := re.search(r"full_key: (\S+)", str(error))):
        # What OmegaConf makes of a mapping for a part that is null; from a yaml it takes one.
        return f"{key[1]}: is null, which no mapping replaces here: write it in a yaml (--config-dir=DIR, or FILE.yaml)"
    return _type_error(error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error)


def _type_error(error: BaseException) -> str:
    key = getattr(error, "full_key", None)
    lines = (getattr(error, "msg", None) or str(error)).splitlines()
    message = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).replace(f"In '{ENTRY}'", "in the file")
    if isinstance(error, GrammarParseError | InterpolationResolutionError):
        message += "; ${...} stands for another key's value, \\${...} for itself"
    return f"{key}: {message}" if key and key not in message else message
