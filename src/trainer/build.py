"""From a config to a job. The order is the file: meta model, recipe, compile, shard, initialize, optimizer."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from torch._dynamo import config as dynamo
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ..models import ARCHITECTURES, Model, ModelConfig, create
from ..models.hf import from_hf_config, piece_of, to_hf_config, to_hf_tensors
from ..models.layers import BLOCK_ATTENTION_MAX_POSITIONS
from ..precision.apply import apply
from ..precision.backends import require_backend
from ..precision.comm import gather_codes
from ..precision.coverage import CoverageWarning
from ..precision.loading import content_of, files_in, is_file, load, renamed, sha256
from ..precision.plan import Plan
from ..precision.recipe import Recipe, require_apart
from ..precision.states.moments import chosen
from ..precision.states.updates import CodecAdamW
from .data.batches import (
    DataConfig,
    DataSource,
    DocumentsApart,
    MixedSource,
    MixedWindows,
    Mixture,
    OrderedSource,
    ShuffledSource,
    TokenShards,
    TokenStream,
    TrainingSource,
    Windows,
)
from .data.corpus import CorpusFile
from .data.remote import remote_path
from .data.rows import is_elsewhere, is_rows
from .data.stream import StreamSource, TextStream, TextWindows, read_head
from .data.tokenizer import TextTokenizer, is_on_hub, load_tokenizer
from .distributed import ParallelConfig, World, say
from .errors import UserError, one_line
from .loop import EvalConfig
from .machine import memory_of_process
from .optim import OptimConfig, build_optimizer
from .own import CONFIG_DIR, setting, shell
from .pretrained import PretrainedDirectory
from .state import TrainState

# What a run does with its data, which preparing them does not ask for.
_NOT_PREPARED = {"name", "verify", "document_mask", "seq_len", "global_batch_size", "stream", "lanes", "shuffle_rows"}
#: ``model.arch`` -> the schema of the ``model`` group.
MODEL_SCHEMAS: dict[str, type] = dict(ARCHITECTURES)


@dataclass(kw_only=True)
class PrecisionConfig:
    """Which recipe, with which arguments (its signature is their schema), on which backend; what changes by step."""

    name: str
    recipe: str
    args: dict[str, Any] = field(default_factory=dict)
    schedule: list[Any] = field(default_factory=list)  # of phases: steps, gemms, recipe, args (precision.recipe)
    backend: str = "auto"

    def validate(self) -> None:
        """Raises ValueError for an unknown recipe, argument or backend, or a schedule that cannot be."""
        load(self.recipe, self.args, self.schedule)
        require_backend(self.backend)

    def validate_schedule(self, total_steps: int) -> None:
        """Raises ValueError for a schedule that cannot be in a run of this length."""
        require_apart(load(self.recipe, self.args, self.schedule).schedule, total_steps)

    def files(self) -> list[str]:
        """The users' recipe files that this config names, its own first."""
        return list(dict.fromkeys(files_in([{"": part} for part in (self.recipe, self.args, self.schedule)])))

    def require_said(self, said: Collection[str]) -> None:
        """Raises ValueError for a recipe file that the command line, which says ``said``, does not name."""
        named = {"recipe": self.recipe, "args": self.args, "schedule": self.schedule}
        for key, value in named.items():
            for file in files_in([{"": value}]):
                if file not in said:
                    way = f"says precision.recipe={file}" if key == "recipe" else f"names it in precision.{key}"
                    raise ValueError(
                        f"precision.{key} names the recipe file {file} (sha256 {sha256(file)}): it is Python, and runs "
                        f"only if the command line {way}"
                    )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint says of the recipe that its tensors are of: files by what they hold."""
        whole = {"name": self.recipe, "args": self.args} | ({"schedule": self.schedule} if self.schedule else {})
        return {key: renamed(value, content_of) for key, value in whole.items()}

    def restore(self, identity: Mapping[str, Any], said: Collection[str]) -> None:
        """Be the recipe of a checkpoint. A file of it is that of ``said`` which holds the same.

        Raises ValueError if there is none, naming what it holds, and for a recipe that cannot be.
        """
        there = {content_of(file): file for file in said if is_file(file)}

        def placed(file: str) -> str:
            if file not in there:
                held = file.removesuffix(".py").replace(":", " ")
                raise ValueError(f"a recipe file ({held}), which is Python and runs only if the command line names it")
            return there[file]

        self.recipe, self.args = renamed(identity["name"], placed), renamed(identity["args"], placed)
        self.schedule = renamed(identity.get("schedule", []), placed)
        self.validate()


@dataclass(frozen=True)
class Data:
    """The opened corpus, or corpora."""

    tokenizer: TextTokenizer
    training: TokenStream | Mixture | TextStream
    validation: Windows | None  # None if `eval.tokens` is 0
    fingerprint: str  # of all that the order and the content of batches follow from, beside the seed
    former_fingerprint: str  # the same as older checkpoints have it, which changed with the text's compression, too
    place: str


def open_data(config: DataConfig, evaluation: EvalConfig, world: World) -> Data:
    """Tokenizer and text, or token shards. Raises UserError, on all ranks alike, if they are missing, damaged or do not
    fit."""

    def opened() -> Data:
        tokenizer = _open_tokenizer(config)
        shards = _open_shards(config, tokenizer)
        if config.verify and world.is_main:
            for part in shards.values():
                part.verify()
        training = {name: TokenStream(part, "train", config.seq_len) for name, part in shards.items()}
        validation = _windows(shards, config, "validation", evaluation.tokens) if evaluation.tokens else None
        if config.sources is None:
            (name,) = training
            part = shards[name]
            return Data(
                tokenizer, training[name], validation, part.fingerprint, part.former_fingerprint, str(part.directory)
            )
        weights = [config.sources[name].weight for name in training]
        now = _fingerprint([[name, part.fingerprint] for name, part in shards.items()], weights)
        former = _fingerprint([[name, part.former_fingerprint] for name, part in shards.items()], weights)
        place = ", ".join(str(part.directory) for part in shards.values())
        return Data(tokenizer, Mixture(training, weights), validation, now, former, place)

    if config.stream:
        return _open_stream(config, evaluation, world)
    return world.on_all(opened)


def open_windows(config: DataConfig, tokenizer: TextTokenizer, split: str, tokens: int) -> Windows:
    """The windows of a split, of which the first ``tokens`` tokens (0 = all) are wanted; a mixture's by weight.

    Raises UserError for text or shards that cannot be used.
    """
    if config.stream:
        files = config.files([split])[split]
        wanted = -(-tokens // config.seq_len) * config.seq_len + 1 if tokens else None
        return _text_windows(*read_head(files, tokenizer, wanted, config.row_limits), config, split)
    return _windows(_open_shards(config, tokenizer), config, split, tokens)


def _windows(shards: Mapping[str, TokenShards], config: DataConfig, split: str, tokens: int) -> Windows:
    streams = {name: TokenStream(part, split, config.seq_len) for name, part in shards.items()}
    if config.sources is None:
        return next(iter(streams.values()))
    weights = [config.sources[name].weight for name in streams]
    most = -(-(tokens or sum(stream.num_tokens for stream in streams.values())) // config.seq_len)
    return MixedWindows(list(streams.values()), weights, most)


def _text_windows(tokens: Any, ends: Any, config: DataConfig, split: str) -> TextWindows:
    windows = TextWindows(tokens, ends, config.seq_len)
    if windows.num_windows == 0:
        raise UserError(
            f"data.path={config.path}: the {split} split has {windows.num_tokens} tokens, less than one window of "
            f"data.seq_len + 1 = {config.seq_len + 1}"
        )
    return windows


def _open_tokenizer(config: DataConfig) -> TextTokenizer:
    place = Path(config.tokenizer)
    own = any(Path(part.home) in place.parents for part in config.parts().values())  # trained there, not fetched
    if config.tokenizer != "bytes" and not place.exists() and (own or not is_on_hub(config.tokenizer)):
        raise UserError(f"data.tokenizer={config.tokenizer}: no such file or directory; {_preparing(config)}")
    return load_tokenizer(config.tokenizer, config.eot_token)


def _open_shards(config: DataConfig, tokenizer: TextTokenizer) -> dict[str, TokenShards]:
    """By the name of the source."""
    shards = {}
    for name, part in config.parts().items():
        here = Path(part.path).is_dir() or Path(part.shards_dir).is_dir() or is_elsewhere(part.path)
        if not here:
            key = "data.path" if config.sources is None else f"data.sources.{name}.path"
            raise UserError(f"{key}={part.path}: no such directory; {_preparing(config)}")
        shards[name] = TokenShards(part, tokenizer.fingerprint, _preparing(_beside(config, tokenizer.fingerprint)))
    return shards


def _beside(config: DataConfig, fingerprint: str) -> DataConfig:
    """With the shards of that tokenizer where preparing may write them: beside others, which runs go on with."""
    places = {name: (part.shards_dir, str(part.shards_of(fingerprint))) for name, part in config.parts().items()}
    moved = {name: place for name, (told, place) in places.items() if place != told}
    if config.sources is None:
        return replace(config, shards=next(iter(moved.values()), config.shards))
    sources = {name: replace(one, shards=moved.get(name, one.shards)) for name, one in config.sources.items()}
    return replace(config, sources=sources)


def require_data(config: DataConfig) -> None:
    """Raises UserError if the tokenizer, the token shards or the streamed files are not there or do not fit.

    Cheap: reads no checksums, asks no server of text; a tokenizer of the hub is fetched.
    """
    tokenizer = _open_tokenizer(config)
    if not config.stream:
        _open_shards(config, tokenizer)
    elif remote_path(config.path) is None:
        config.files()


def _preparing(config: DataConfig) -> str:
    """The command that makes what is missing: with the options in which this config differs from its yaml."""
    name = config.name
    if not (CONFIG_DIR / "data" / f"{name}.yaml").is_file():  # a user's: what says all of it is one of ours
        name = "mix" if config.sources else "c4_stream" if config.stream else "text" if is_rows(config.path) else "c4"
    raw = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "data" / f"{name}.yaml"))
    assert isinstance(raw, dict)
    plain = {key: value for key, value in raw.items() if "${" not in str(value)}  # the others follow from these
    leading = {key: getattr(config, key) for key in plain if key in ("path", "out", "vocab_size")}
    tree = OmegaConf.create({"data": raw | leading})
    known = OmegaConf.to_container(tree.data, resolve=True) | plain
    defaults = {part.name: part.default for part in fields(config) if part.default is not MISSING}
    told = [f"data={name}"]
    for part in fields(config):
        value = getattr(config, part.name)
        if part.name == "sources" and value:
            value = {name: {k: v for k, v in asdict(one).items() if v is not None} for name, one in value.items()}
        if part.name not in _NOT_PREPARED and value != known.get(part.name, defaults.get(part.name)):
            told.append(setting(f"data.{part.name}", value))
    script = "train_tokenizer" if config.stream else "prepare_data"
    return f"run python scripts/{script}.py {shell(told)}"


def _open_stream(config: DataConfig, evaluation: EvalConfig, world: World) -> Data:
    def read() -> tuple[list[CorpusFile], list[str], list[str], Any]:
        # By one process, for all: the same view of a directory that may change, and one request instead of many.
        tokenizer = _open_tokenizer(config)
        files = config.files()
        wanted = -(-evaluation.tokens // config.seq_len) * config.seq_len + 1
        head = read_head(files["validation"], tokenizer, wanted, config.row_limits) if evaluation.tokens else None
        train = files["train"]
        return train, [file.text_identity() for file in train], [file.identity() for file in train], head

    files, identities, former, head = world.on_main(read)
    tokenizer = world.on_all(lambda: _open_tokenizer(config))
    validation = _text_windows(*head, config, "validation") if head is not None else None
    training = TextStream(files, tokenizer, config.seq_len, config.lanes, config.shuffle_rows, config.row_limits)
    if world.is_main and (line := training.sharing(config.global_batch_size, world.size)) is not None:
        say(f"warning: {line}")
    now, before = (
        _fingerprint([[file.index, one] for file, one in zip(files, of_files, strict=True)], tokenizer.fingerprint)
        for of_files in (identities, former)
    )
    return Data(tokenizer, training, validation, now, before, config.path)


def _fingerprint(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def resolve_model(config: ModelConfig, vocab_size: int, seq_len: int) -> ModelConfig:
    """The model's config with its vocabulary. Raises UserError if tokens or positions do not fit into it."""
    if config.vocab_size is not None and config.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size={config.vocab_size} is less than the tokenizer's {vocab_size}: "
            "leave it null to follow the tokenizer"
        )
    if config.position_limit is not None and seq_len > config.position_limit:
        raise UserError(f"data.seq_len={seq_len} is beyond model.max_seq_len={config.position_limit} learned positions")
    return replace(config, vocab_size=config.vocab_size or vocab_size)


def build_model(
    config: ModelConfig,
    recipe: Recipe,
    parallel: ParallelConfig,
    world: World,
    *,
    backend: str = "auto",
    tokens: int | None = None,
    seed: int = 0,
) -> tuple[Model, Plan]:
    """The sharded model with its recipe in it, on the device, its parameters not yet set."""
    with torch.device("meta"):
        model = create(config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)  # a run says it on its console
            plan = apply(recipe, model, tokens=tokens, device=world.device, backend=backend, seed=seed)
    except ValueError as error:
        raise UserError(f"precision: {error}") from error
    if parallel.compiles(world.device):
        # All blocks share what is compiled: for training and validation, in both precisions, by phase of a schedule.
        dynamo.recompile_limit = max(64, dynamo.recompile_limit)
    for block in model.layers:
        block.recompute = parallel.activation_checkpointing
        if parallel.compiles(world.device):
            block.forward = torch.compile(block.forward)  # within FSDP's hooks, which cannot be compiled
    model.to(dtype=recipe.param_dtype)
    policy = MixedPrecisionPolicy(
        param_dtype=recipe.dtypes.compute, reduce_dtype=recipe.dtypes.reduce, cast_forward_inputs=False
    )
    mesh = world.mesh(parallel)
    reshards = parallel.reshards(world.size)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshards)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if parallel.fp8_all_gather and (shards := mesh.get_group(mesh.ndim - 1)).size() > 1:
        try:
            plan.rows = [*plan.rows, gather_codes(model, model.layers, shards, recipe.dtypes.compute)]
        except ValueError as error:
            raise UserError(f"parallel.fp8_all_gather=true: {error}") from error
    plan.rows = [*plan.rows, *execution_notes(model, recipe.dtypes.compute, parallel, world)]
    # The loss is already divided by the weight of the whole batch: gradients are summed, not averaged.
    for module in model.modules():
        if isinstance(module, FSDPModule):  # neither setting reaches the modules below
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=world.device)
    plan.reset_state()
    model.tie_weights()
    return model, plan


def execution_notes(model: nn.Module, dtype: torch.dtype, parallel: ParallelConfig, world: World) -> list[str]:
    """Lines of plan.txt: what ``auto`` came to, and what a GPU will be slow at."""
    device = world.device
    parts = [
        f"blocks {'compiled' if parallel.compiles(device) else 'eager'}",
        f"parameters {'gathered again for' if parallel.reshards(world.size) else 'kept until'} backward",
        f"sums in {'a fixed' if parallel.is_deterministic(device) else 'any'} order",
    ]
    warnings = narrow_rows(model, dtype) if device.type == "cuda" else []
    return [f"execution on {device.type}: {', '.join(parts)}", *warnings]


def narrow_rows(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """A warning for every width whose rows no bulk copy of a GPU (TMA) takes: 16 does not divide their bytes."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = None if isinstance(module, nn.Embedding) else module._parameters.get("weight")
        if weight is not None and weight.ndim == 2:
            for width in set(weight.shape):
                paths.setdefault(width, []).append(path)
    lines = []
    for width, (first, *others) in sorted(paths.items()):
        if (size := width * dtype.itemsize) % 16:
            where = f"{first}{' and others' if others else ''}"
            why = f"a row of {size:,} bytes is no multiple of 16, so no bulk copy (TMA) takes it and products are slow"
            lines.append(f"warning: width {width:,} ({where}): {why}")
    return lines


@torch.no_grad()
def initialize(model: Model, seed: int) -> None:
    """Set every parameter from (seed, its name): the whole tensor is drawn, each rank keeps its rows."""
    for name, parameter in model.named_parameters():
        _set_whole(parameter, model.init_of(name).draw(seed, name, parameter.shape))


@torch.no_grad()
def load_pretrained(model: Model, directory: PretrainedDirectory) -> None:
    """Set every parameter from a `transformers` checkpoint, one tensor in memory at a time.

    Raises UserError if the checkpoint is of another shape, lacks a tensor, or holds one that no parameter takes
    or a value that it cannot.
    """
    for name, parameter in model.named_parameters():
        piece = piece_of(model.config, name)
        whole = piece.cut(directory.tensor(piece.name))
        if whole.shape != parameter.shape:
            raise UserError(
                f"{directory.path}: {piece.name} gives {name} the shape {list(whole.shape)}, "
                f"the model wants {list(parameter.shape)}"
            )
        if not torch.isfinite(whole.to(parameter.dtype)).all():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(f"{directory.path}: {piece.name} holds values beyond {dtype}, which {name} is kept in")
        _set_whole(parameter, whole)
    directory.require_read(tied=model.config.tie_embeddings)


def _set_whole(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Copy this rank's part of ``full`` into the parameter; every rank has the same ``full``."""
    full = full.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        # src_data_rank=None: nothing needs to be sent.
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(full)


def pretrained_config(directory: PretrainedDirectory) -> ModelConfig:
    """The shape of a `transformers` checkpoint. Raises UserError for one that is not built here."""
    try:
        config = from_hf_config(directory.config, directory.path.name or "pretrained")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory.path / 'config.json'}: {one_line(error)}") from error
    return config


def _require_same_shape(config: ModelConfig, directory: PretrainedDirectory) -> None:
    theirs = pretrained_config(directory)
    if type(theirs) is not type(config):
        raise UserError(f"model.arch={config.arch}, but model.init_from={directory.path} holds a {theirs.arch}")
    for part in fields(config):
        ours, other = getattr(config, part.name), getattr(theirs, part.name)
        if part.name == "head_dim":
            ours, other = config.head_size, theirs.head_size
        if part.name not in ("name", "init_std", "init_from", "max_seq_len") and ours != other:
            raise UserError(f"model.{part.name}={ours}, but model.init_from={directory.path} has {other}")


def build_state(
    model_config: ModelConfig,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    optim: OptimConfig,
    world: World,
    *,
    seed: int,
    tokens: int | None = None,
    pretrained: str | None = None,
    seq_len: int | None = None,
    tokenizer: TextTokenizer | None = None,
) -> TrainState:
    """A state at step 0, with random weights, or with those of the `transformers` directory ``pretrained``.

    ``seq_len``, ``tokenizer``: of what it will be trained on; a line says so if that is longer than the model is said
    to be made for, or if the directory has another tokenizer. Raises UserError if the directory does not fit.
    """
    made_for = {f"model.max_seq_len={model_config.max_seq_len}": model_config.max_seq_len}
    recipe = recipe_of(precision, optim)
    model, plan = build_model(
        model_config, recipe, parallel, world, backend=precision.backend, tokens=tokens, seed=seed
    )
    if pretrained is None:
        initialize(model, seed)
    else:
        trained = world.on_all(lambda: _start_from(model, pretrained))
        made_for |= {} if trained is None else {f"the {trained} tokens that {pretrained} was trained at": trained}
        plan.forget()
    for said, length in made_for.items():
        if world.is_main and seq_len is not None and seq_len > length:
            say(f"warning: data.seq_len={seq_len} is longer than {said}")
    if world.is_main and pretrained is not None and tokenizer is not None and _reads_otherwise(tokenizer, pretrained):
        say(
            f"warning: data.tokenizer gives other tokens than the tokenizer in {pretrained}, whose weights know its own"
        )
    try:
        optimizer = build_optimizer(
            optim, model, recipe.update, recipe.moments, seed=seed, backend=precision.backend, plan=plan
        )
    except ValueError as error:
        raise UserError(f"optim.moments: {error}") from error
    plan.update_note = _moments_note(precision, optim, recipe, optimizer)
    return TrainState(model, optimizer, plan, num_replicas=parallel.replicate)


def recipe_of(precision: PrecisionConfig, optim: OptimConfig) -> Recipe:
    """The recipe, with what ``optim.moments`` says in place of its own.

    Raises UserError for a recipe file that is not what it was when the config was read.
    """
    try:
        recipe = load(precision.recipe, precision.args, precision.schedule)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    return replace(recipe, moments=chosen(optim.moments, recipe.moments))


def _moments_note(precision: PrecisionConfig, optim: OptimConfig, recipe: Recipe, optimizer: Optimizer) -> str:
    """A line of plan.txt: how states are kept, who says so, and who computes."""
    own = load(precision.recipe, precision.args).moments
    said = f"optim.moments; the recipe has {own}" if recipe.moments != own else "the recipe's"
    by = f"[{optimizer.choice}]" if isinstance(optimizer, CodecAdamW) else type(optimizer).__module__
    return f"{recipe.moments} ({said}), vectors fp32, updated by {by}"


def _start_from(model: Model, pretrained: str) -> int | None:
    """Returns the length, in tokens, that the weights were trained at, if it is known."""
    directory = PretrainedDirectory(pretrained)
    _require_same_shape(model.config, directory)
    load_pretrained(model, directory)
    return directory.trained_length


def _reads_otherwise(tokenizer: TextTokenizer, directory: str) -> bool:
    """Whether there is a tokenizer in ``directory``, and it makes other tokens of a text than ``tokenizer`` does."""
    sample = ["The train's 3 carriages (2 of them new) carry 1,024 bits over é hills.\n\tIt is 東."]
    try:
        theirs = load_tokenizer(f"{directory}/tokenizer.json")
        return (tokenizer.eot, tokenizer.encode_batch(sample)) != (theirs.eot, theirs.encode_batch(sample))
    except UserError:  # none, or none that can be used
        return False


def to_transformers(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor], end_of_text: int, trained_length: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """``config.json`` and state dict of the same model in `transformers`."""
    return to_hf_config(config, end_of_text, trained_length), to_hf_tensors(config, tensors)


def training_source(
    data: TokenStream | Mixture | TextStream, world: World, *, seed: int, global_batch: int, micro_batch: int
) -> TrainingSource:
    share = {"global_batch": global_batch, "micro_batch": micro_batch, "rank": world.rank, "world_size": world.size}
    if isinstance(data, TextStream):
        return StreamSource(data, seed=seed, together=lambda read: world.add_up(world.on_all(read)), **share)
    if isinstance(data, Mixture):
        return MixedSource(data, seed=seed, **share)
    return ShuffledSource(data, seed=seed, **share)


def validation_source(
    windows: Windows | None, config: EvalConfig, world: World, micro_batch: int, *, documents_end: int | None = None
) -> tuple[DataSource | None, float]:
    """The validation pass and the UTF-8 bytes that its targets spell; None if ``eval.tokens`` is 0.

    ``documents_end``: the end-of-text token, if documents are to be kept apart.
    """
    if windows is None or config.tokens == 0:
        return None, 0.0
    number = min(windows.num_windows, -(-config.tokens // windows.seq_len))
    source = OrderedSource(windows, num_windows=number, micro_batch=micro_batch, rank=world.rank, world_size=world.size)
    return kept_apart(source, documents_end), windows.num_bytes(number)


def kept_apart(source: DataSource, documents_end: int | None) -> DataSource:
    """``source``, with documents kept apart if there is a token that ends them."""
    return source if documents_end is None else DocumentsApart(source, documents_end)


def documents_end(config: DataConfig, tokenizer: TextTokenizer) -> int | None:
    """The token at which documents are parted, if ``data.document_mask`` asks for it."""
    return tokenizer.eot if config.document_mask else None


def micro_batch_size(
    wanted: Any,
    config: ModelConfig,
    data: DataConfig,
    parallel: ParallelConfig,
    world: World,
    dtype: torch.dtype = torch.float32,
    *,
    one: bool = False,
) -> int:
    """``wanted``, or for "auto" the largest that divides a process's share of the batch and fits in half its memory.

    That of the process with the least, so that all take alike: every process calls this.
    ``dtype``: of activations, which counts where blocks are compiled on CUDA. One process takes at most half of the
    batch, as two would. ``one``: a step has to be one micro-batch (``Recipe.one_micro_batch``).

    Raises UserError if the batch cannot be dealt out evenly, or not as the recipe has to have it.
    """
    share, rest = divmod(data.global_batch_size, world.size)
    if rest:
        near = max(world.size, data.global_batch_size - rest)
        raise UserError(
            f"data.global_batch_size={data.global_batch_size} does not divide into {world.size} processes: "
            f"take {near} or {near + world.size}"
        )
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    if one:
        if wanted not in ("auto", share):
            raise UserError(
                f"train.micro_batch_size={wanted}: precision.args.amax=step makes scales of the whole step, which has "
                f"to be one micro-batch: take {share} (data.global_batch_size / {world.size} processes), or amax=micro"
            )
        return share
    if wanted != "auto":
        if wanted not in divisors:
            raise UserError(
                f"train.micro_batch_size={wanted} does not divide the {share} sequences of a process "
                f"(data.global_batch_size / {world.size} processes): one of {', '.join(map(str, divisors))}"
            )
        return int(wanted)
    if world.size == 1:
        # Never the whole batch in one piece: what two processes compute in halves, one process does too, and both sum
        # the same numbers. In float32 they then agree bit for bit, where a chaotic step would blow up a last bit.
        divisors = [size for size in divisors if size <= max(1, share // 2)]
    fused = world.device.type == "cuda" and parallel.compiles(world.device)
    kept = dtype.itemsize if fused else None
    need = data.seq_len * activation_bytes_per_token(config, parallel, data.seq_len, kept)
    budget = -world.max(-_memory_of_process(world))[0] / 2  # of the process that has least: all take alike
    return max([size for size in divisors if size * need <= budget], default=1)


def activation_bytes_per_token(
    config: ModelConfig, parallel: ParallelConfig, seq_len: int, kept: int | None = None
) -> float:
    """A generous count of what backward keeps, in bytes a token.

    ``kept``: bytes an element, if compiled blocks keep the operands of their products and little else; the logits are
    then overwritten by their gradient. None: all is kept in float32, as in eager blocks, and the logits thrice.
    """
    hidden, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size or 0
    scores = config.num_heads * (
        seq_len if kept is None and seq_len <= BLOCK_ATTENTION_MAX_POSITIONS else 0
    )  # kept by attention on a CPU
    block = (kept or 4) * ((10 if kept else 12) * hidden + 4 * ffn + scores)
    held = (kept or 4) * hidden * config.num_layers + block
    blocks = held if parallel.activation_checkpointing else block * config.num_layers
    # Logits in the compute dtype and in float32, and their gradient; or the logits, and room for a chunk.
    return float(blocks + (2 * kept if kept else 12) * vocab)


def _memory_of_process(world: World) -> float:
    """Bytes of memory for one process. What it is given, not what is free just now: a restart must decide alike."""
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    return memory_of_process(world.local_size)


def num_parameters(model: nn.Module) -> int:
    """Parameters of the whole model; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
