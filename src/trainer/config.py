"""Hydra composes, OmegaConf checks types, the dataclasses validate. Every error is one line with the close matches."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.conf import HydraConf
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from ..precision.loading import files_in, filled, is_file
from ..precision.suggest import close
from .data.config import SourceConfig
from .environ import is_text, unquoted
from .errors import UserError, as_user_error, one_line
from .model import OWN_SCHEMAS, ModelConfig, UnreadConfig, require_said, said_file, schema_of, unread_schema
from .overrides import SOURCES, compose_line, for_compose, groups, is_hydra, kinds, parse
from .own import ENTRY, EXPERIMENT, Place, entry, hydra_at, keys_of, read_own, split, text_of
from .rundir import Resume, RunDirectory
from .schema import TrainConfig, flatten, plain

MODEL = "model.arch"
_OPEN = re.compile(  # of any names
    r"precision\.args\.|optim\.update_args\.|"
    rf"data\.sources\.[^.]+(\.({'|'.join(part.name for part in fields(SourceConfig))}))?$"
)
_EXECUTES = re.compile(r"hydra\.(searchpath|callbacks|hydra_logging|job_logging)\b")
_MOST_DEPTH = 20  # of a config.yaml; those that are written have some 5
_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*(\$\{.*)", re.DOTALL)  # an even number of backslashes escapes nothing


def load_config(overrides: Sequence[str], *, keys_are_known: bool = False) -> TrainConfig:
    """Compose ``configs/train.yaml``, or what ``trainer.own``'s flags name, with Hydra overrides, and validate.

    Where ``run.dir`` names a run that is to go on, what it was trained with takes the place of ``configs``: the path
    alone is enough, and a choice that is the run's own adds nothing.

    Raises UserError, one line: an unknown key, group or value (with the closest valid names), a wrong type, or a
    value out of range.
    """
    place, rest = split(overrides)
    arch = own_model(rest)
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
            tree = _compose(place, name, for_compose(list(choices.values())))
            _check_keys(parsed, with_model(tree, arch, []))
        lines = for_compose([override for override in parsed if not is_hydra(override)])
        tree = with_model(_compose(place, name, [*lines, *name_of_file(parsed)]), arch, parsed)
        config = to_config(tree, said)
        arguments = filled(config.precision.recipe, {})
        for key in (o.key_or_group for o in parsed if o.is_delete() and o.key_or_group.startswith("precision.args.")):
            own = key.removeprefix("precision.args.").split(".")[0]
            if arguments and own not in arguments:
                raise UserError(f"~{key}: {config.precision.recipe} has no argument {own!r}{close(own, arguments)}")
        return config
    try:
        tree = with_model(_run_tree(earlier, choices, place), arch, [])
        _check_keys(parsed, tree)
        keys = [o for o in parsed if not is_hydra(o) and o.key_or_group not in choices]
        # What the run's first command added or took away is as it wants it already.
        keys = [o for o in keys if not o.is_delete() or OmegaConf.select(tree, o.key_or_group) is not None]
        lines = [re.sub(r"^\+(?!\+)", "++", compose_line(override)) for override in keys]
        lines += name_of_file(parsed, tree.precision.recipe)
        ConfigLoaderImpl._apply_overrides_to_config(parse(lines), tree)
    except (HydraException, OmegaConfBaseException, AttributeError) as error:
        raise UserError(_composition_error(error)) from error
    return to_config(tree, said)


def own_model(arguments: Sequence[str]) -> str | None:
    """The model file that the command line names, which is run: it says what keys a model has."""
    for key, _, value in (argument.partition("=") for argument in arguments):
        if key.lstrip("+") == MODEL and is_file(unquoted(value)):
            with as_user_error("", ValueError):
                schema_of(unquoted(value))
            return unquoted(value)
    return None


def with_model(tree: DictConfig, arch: str | None, overrides: Sequence[Override]) -> DictConfig:
    """A composed tree whose ``model`` is of the schema of the file ``arch``; as it is without one.

    Of a chosen model of another schema those values count that differ from its schema's own, and that the file's has.
    ``overrides`` are laid over once more: they are said. Raises UserError for a key that the file's schema lacks.
    """
    if arch is None:
        return tree
    schema, kind = schema_of(arch), OmegaConf.get_type(tree.model)
    values: dict[str, Any] = OmegaConf.to_container(tree.model)  # type: ignore[assignment]
    known = [part.name for part in fields(schema)]
    said = {override.key_or_group for override in overrides}
    if is_dataclass(kind) and kind is not schema and not issubclass(kind, UnreadConfig):
        usual: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(kind))  # type: ignore[assignment]
        values = {key: value for key, value in values.items() if key in known and value != usual.get(key)}
        if "model.name" not in said:
            values["name"] = _name_of(arch)
    for key in values:
        if key not in known:
            raise UserError(f"unknown key 'model.{key}'{close(key, known)}; {arch} has {', '.join(known)}")
    lines = [one.input_line or "" for one in overrides if one.key_or_group.startswith("model.")]
    with open_dict(tree), _composing():
        base = OmegaConf.create({"model": OmegaConf.structured(schema)})  # so that an error says model.KEY
        tree.model = OmegaConf.merge(base, {"model": values | {"arch": arch}}).model
        plain_lines = [line.lstrip("+") for line in lines]
        ConfigLoaderImpl._apply_overrides_to_config(parse(plain_lines, several=False), tree)
    return tree


def said_files(overrides: Sequence[Override]) -> set[str]:
    """The recipe files, and the model files, that the command line names."""
    keys = ("precision.", MODEL)
    values = [override.value() for override in overrides if override.key_or_group.startswith(keys)]
    return {str(file) for value in values for file in files_in([{"": value}])}


def name_of_file(overrides: Sequence[Override], before: str | None = None) -> list[str]:
    """What else follows from a recipe file that is not the one ``before``: a name, if none is given, for the run."""
    values = {override.key_or_group: override.value() for override in overrides}
    recipe = values.get("precision.recipe")
    if not isinstance(recipe, str) or not is_file(recipe) or recipe == before or "precision.name" in values:
        return []
    return [f"precision.name={_name_of(recipe)}"]


def _name_of(file: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", Path(file).stem)


def entry_config(place: Place, parsed: Sequence[Override]) -> str:
    """The name of the entry config for Hydra. Raises UserError for a choice that is none, or a file that is not one."""
    _check_choices(place, parsed)
    if place.file is not None:
        check_own(place.file, "")
    return entry(place, [override.key_or_group for override in parsed], list(groups()))


def _only_said(arch: str) -> str:
    return f"{MODEL} names a file, {arch}, which is Python and runs only if the command line says {MODEL}={arch}"


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
    arch = OmegaConf.select(tree, MODEL.removeprefix(prefix))
    if isinstance(arch, str) and is_file(arch) and not OWN_SCHEMAS:
        raise UserError(f"{file}: {_only_said(arch)}")
    known = _with_parts(kinds(TrainConfig))
    for key, value in flatten(OmegaConf.to_container(tree, resolve=False)):
        full = f"{prefix}{key}"
        chosen = not prefix and key in groups() and isinstance(value, str)
        if _EXECUTES.match(key):
            raise UserError(f"{file}: {key} is not a config's to set: it finds or executes code")
        if not (key.startswith(("defaults", "hydra.")) or full in known or _OPEN.match(full) or chosen):
            near = close(full, known).replace(f"'{prefix}", "'") or _alike_at_the_end(key, known)
            raise UserError(f"{file}: unknown key {key!r}{near}")
    return package


def _earlier_run(overrides: Sequence[Override]) -> RunDirectory | None:
    """The directory that ``run.dir`` names, if a run in it is to go on."""
    values = {override.key_or_group: override.value() for override in overrides}
    directory, resume = values.get("run.dir"), values.get("run.resume")
    if not directory or not isinstance(directory, str) or "${" in directory or resume == Resume.never.name:
        return None
    earlier = RunDirectory(Path(directory))
    with as_user_error(f"run.dir={directory} cannot be read: ", OSError):
        return earlier if earlier.config.is_file() and earlier.has_run() else None


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
                OmegaConf.update(tree, key, plain(before, escaped=True))
    OmegaConf.set_struct(tree, True)
    return tree


def restored_model(config: TrainConfig, identity: Mapping[str, Any], said: Iterable[str]) -> TrainConfig:
    """A config that was read with no file run, with its model as the file says; ``identity``: of a checkpoint.

    Raises UserError, where the model's is a file, if none of ``said`` holds what it held.
    """
    if not isinstance(config.model, UnreadConfig):
        return config
    with as_user_error("", ValueError):
        arch = said_file(config.model.arch, identity.get(MODEL), said)
    values = {part.name: getattr(config.model, part.name) for part in fields(config.model)} | {"arch": arch}
    with _composing():
        model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema_of(arch)), values))
    return replace(config, model=model)


def load_run_config(file: Path, said: Collection[str] | None = frozenset()) -> TrainConfig:
    """The ``config.yaml`` of a run directory. Raises UserError if there is none or it cannot be read.

    ``said``: the recipe files that may be run, for the command line names them; None to run none and only read.
    """
    return _read_run(file, said)[1]


def _read_run(file: Path, said: Collection[str] | None = frozenset()) -> tuple[DictConfig, TrainConfig]:
    try:
        tree = read_yaml(file)
        arch = tree.model.arch
        unread = is_file(arch) and (said is None or arch not in said)
        schema = unread_schema(tree.model) if unread else schema_of(arch)
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
    if not isinstance(config.model, ModelConfig):
        if isinstance(config.model, dict) and is_file(arch := str(config.model.get("arch"))):
            raise UserError(_only_said(arch))
        raise UserError("model: the chosen config lacks the defaults entry that names its schema")
    if said is not None:
        with as_user_error("", ValueError):
            require_said(config.model.arch, said)
            config.precision.require_said(said)
    config.validate(recipe=said is not None or not config.precision.files())
    config.precision.args = filled(config.precision.recipe, config.precision.args)
    return config


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with the old and the new value; None for a key that one of them does not have."""
    before, after = ({key: value for key, value in config.flat().items() if value != {}} for config in (old, new))
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


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
    known = _with_parts(key for key, _ in flatten(OmegaConf.to_container(base, resolve=False)))
    hydra_known = {f"hydra.{key}" for key, _ in flatten(OmegaConf.to_container(OmegaConf.structured(HydraConf)))}
    for override in overrides:
        key = override.key_or_group
        if key in (*groups(), EXPERIMENT) or key.startswith(("precision.args.", "optim.update_args.")):
            continue
        if key == "sweep":
            raise UserError(f"{override.input_line}: a named grid is of many runs: python -m narrowgauge --multirun")
        if key == SOURCES or key.startswith(f"{SOURCES}."):
            _check_source(key, base)
        elif is_hydra(override):
            if key.startswith("hydra.searchpath"):
                raise UserError(f"{key}: --config-dir=DIR is where configs of your own are")
            if "/" in key:
                raise UserError(f"{key}: Hydra's own groups are not used here; drop this override")
            if not any(key == k or key.startswith(f"{k}.") for k in hydra_known):
                raise UserError(f"unknown key {key!r}{close(key, hydra_known)}")
        elif key not in known:
            near = close(key, known) or _alike_at_the_end(key, known)
            raise UserError(f"unknown key {key!r}{near}; python -m narrowgauge --cfg job shows all")


def _with_parts(keys: Iterable[str]) -> set[str]:
    """Dotted keys, and the parts of the config that they are in."""
    return {key.rsplit(".", up)[0] for key in keys for up in range(key.count(".") + 1)}


def _alike_at_the_end(key: str, known: Collection[str]) -> str:
    ends = {one.split(".")[-1]: one for one in sorted(known, reverse=True)}
    near = [ends[end] for end in get_close_matches(key.split(".")[-1], list(ends))]
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def _check_source(key: str, base: DictConfig) -> None:
    if base.data.sources is None:
        raise UserError(f"{key}: data={base.data.name} reads one corpus, data.path; data=mix reads several")
    known = [part.name for part in fields(SourceConfig)]
    _, *parts = key.removeprefix(SOURCES).split(".")  # NAME, NAME.FIELD, or nothing
    if len(parts) > 2 or (len(parts) == 2 and parts[1] not in known):
        raise UserError(f"unknown key {key!r}{close(parts[1], known)}; a source has {', '.join(known)}")


def _compose(place: Place, name: str, overrides: list[str]) -> DictConfig:
    with _composing(), hydra_at(place):
        return compose(name, overrides)


@contextmanager
def _composing() -> Iterator[None]:
    try:
        yield
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
