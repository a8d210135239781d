"""From a config to a state. The order is the file: meta model, recipe, compile, shard, initialize, optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ..models import Decoder, create
from ..models.hf import from_hf_config, piece_of, to_hf_config, to_hf_tensors
from ..models.layers import Init
from ..precision.apply import apply
from ..precision.comm import gather_codes, reduce_codes
from ..precision.coverage import CoverageWarning
from ..precision.plan import Plan
from ..precision.recipe import Recipe
from ..precision.states.driver import StateOptimizer
from .data.tokenizer import TextTokenizer, load_tokenizer
from .distributed import ParallelConfig, World, say
from .errors import UserError, as_user_error
from .model import ModelConfig
from .optim import OptimConfig, build_optimizer
from .pretrained import PretrainedDirectory
from .recipe import Precision
from .state import TrainState


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


def build_state(
    model_config: ModelConfig,
    precision: Precision,
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
    recipe, backend = precision.recipe, precision.backend
    lengths = {f"model.max_seq_len={model_config.max_seq_len}": model_config.max_seq_len}
    model, plan = build_model(model_config, recipe, parallel, world, backend=backend, tokens=tokens, seed=seed)
    if pretrained is None:
        initialize(model, seed, plan)
    else:
        trained = world.on_all(lambda: _start_from(model, pretrained))
        lengths |= {} if trained is None else {f"the {trained} tokens that {pretrained} was trained at": trained}
        plan.forget()
    if world.is_main and seq_len is not None:
        for name, length in lengths.items():
            if seq_len > length:
                say(f"warning: data.seq_len={seq_len} is longer than {name}")
    if world.is_main and pretrained is not None and tokenizer is not None and _reads_otherwise(tokenizer, pretrained):
        say(
            f"warning: data.tokenizer gives other tokens than the tokenizer in {pretrained}, whose weights know its own"
        )
    with as_user_error("optim: ", ValueError):
        optimizer = build_optimizer(optim, plan, seed=seed, backend=backend)
    plan.update_note = _moments_note(precision, optimizer)
    return TrainState(model, optimizer, plan, num_replicas=parallel.replicate)


def build_model(
    config: ModelConfig,
    recipe: Recipe,
    parallel: ParallelConfig,
    world: World,
    *,
    backend: str = "auto",
    tokens: int | None = None,
    seed: int = 0,
) -> tuple[Decoder, Plan]:
    """The sharded model with its recipe in it, on the device, its parameters not yet set."""
    with torch.device("meta"):
        model = create(config)
    own = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    with as_user_error("precision: ", ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)  # a run says it on its console
        plan = apply(recipe, model, tokens=tokens, device=world.device, backend=backend, seed=seed)
    if parallel.compiles(world.device):
        # All blocks share what is compiled: for training and validation, in both precisions, by phase of a schedule.
        dynamo.recompile_limit = max(64, dynamo.recompile_limit)
    for block in model.layers:
        block.recompute = parallel.activation_checkpointing
        if parallel.compiles(world.device):
            block.forward = torch.compile(block.forward)  # within FSDP's hooks, which cannot be compiled
    model.to(dtype=recipe.param_dtype)
    for module, name, buffer in own:  # a model's own buffers keep their dtype
        module._buffers[name] = buffer
    policy = MixedPrecisionPolicy(
        param_dtype=recipe.dtypes.compute, reduce_dtype=recipe.dtypes.reduce, cast_forward_inputs=False
    )
    mesh = world.mesh(parallel)
    reduction = recipe.comm.reduce
    sharded = mesh if reduction is None else mesh["shard"]  # over replicas ``reduce_codes`` reduces
    reshards = parallel.reshards(world.size)
    for block in model.layers:
        fully_shard(block, mesh=sharded, mp_policy=policy, reshard_after_forward=reshards)
    fully_shard(model, mesh=sharded, mp_policy=policy, reshard_after_forward=False)
    plan.comm_notes = communication(plan, model, parallel, mesh)
    if model.counts_first:
        plan.rows = [
            *plan.rows,
            "every step begins with a forward pass of its micro-batches, without gradients, that counts",
        ]
    plan.rows = [*plan.rows, *execution_notes(model, recipe.dtypes.compute, parallel, world)]
    # The loss is already divided by the weight of the global batch: gradients are summed, not averaged.
    for module in model.modules():
        if isinstance(module, FSDPModule):  # neither setting reaches the modules below
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=world.device)
    with as_user_error("model: ", ValueError):
        plan.reset_state()
    model.tie_weights()
    return model, plan


def communication(plan: Plan, model: Decoder, parallel: ParallelConfig, mesh: DeviceMesh) -> list[str]:
    """Have FSDP send weights and gradients as the recipe and ``parallel.fp8_all_gather`` say; lines of plan.txt.

    Raises UserError where that cannot be.
    """
    comm, dtypes, shards = plan.recipe.comm, plan.recipe.dtypes, mesh.get_group(mesh.ndim - 1)
    lines = []
    if parallel.fp8_all_gather or comm.gather:
        said = "parallel.fp8_all_gather=true" if parallel.fp8_all_gather else "precision: the recipe's comm.gather"
        if parallel.reshard_after_forward is False:
            raise UserError(f"{said} needs parallel.reshard_after_forward=true or auto")
        if shards.size() > 1:
            with as_user_error(f"{said}: ", ValueError):
                lines.append(gather_codes(model, model.layers, shards, dtypes.compute))
        elif comm.gather:
            lines.append("weights of one shard are gathered by nobody: none are sent as codes")
    if comm.reduce is not None:
        with as_user_error("precision: ", ValueError):
            lines += reduce_codes(model, model.layers, mesh, comm.reduce, plan.context, dtypes.reduce)
    return lines


def execution_notes(model: Decoder, dtype: torch.dtype, parallel: ParallelConfig, world: World) -> list[str]:
    """Lines of plan.txt: what ``auto`` came to, and what a GPU will be slow at."""
    device = world.device
    parts = [
        f"blocks {'compiled' if parallel.compiles(device) else 'eager'}",
        f"parameters {'gathered again for' if parallel.reshards(world.size) else 'kept until'} backward",
        f"sums in {'a fixed' if parallel.is_deterministic(device) else 'any'} order",
    ]
    warnings = narrow_rows(model, dtype) if device.type == "cuda" else []
    counted = type(model).weights_per_token is not Decoder.weights_per_token
    if not counted and any(parameter.ndim > 2 for parameter in model.parameters()):
        warnings.append(f"warning: MFU leaves experts out: {type(model).__name__} has no weights_per_token of its own")
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
def initialize(model: Decoder, seed: int, plan: Plan) -> None:
    """Set every parameter from (seed, its name): the full tensor is drawn, each rank takes its rows.

    As the model says, or the recipe.
    """
    for name, parameter in model.named_parameters():
        said = plan.initial(name)
        init = model.init_of(name) if said is None else Init(*said)
        _set_from_full(parameter, init.draw(seed, name, parameter.shape))


@torch.no_grad()
def load_pretrained(model: Decoder, directory: PretrainedDirectory) -> None:
    """Set every parameter from a `transformers` checkpoint, one tensor in memory at a time.

    Raises UserError if the checkpoint is of another shape, lacks a tensor, or holds one that no parameter takes
    or a value that it cannot.
    """
    for name, parameter in model.named_parameters():
        piece = piece_of(model.config, name)
        full = piece.read(directory.tensor)
        if full.shape != parameter.shape:
            raise UserError(
                f"{directory.path}: {piece.name} gives {name} the shape {list(full.shape)}, "
                f"the model wants {list(parameter.shape)}"
            )
        if not torch.isfinite(full.to(parameter.dtype)).all():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(f"{directory.path}: {piece.name} holds values beyond {dtype}, which {name} is kept in")
        _set_from_full(parameter, full)
    directory.require_read(tied=model.config.tie_embeddings)


def _set_from_full(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Copy this rank's part of ``full`` into the parameter; every rank has the same ``full``."""
    full = full.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        # src_data_rank=None: nothing needs to be sent.
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(full)


def pretrained_config(directory: PretrainedDirectory) -> ModelConfig:
    """The shape of a `transformers` checkpoint. Raises UserError for one that is not built here."""
    with as_user_error(f"{directory.path / 'config.json'}: ", ValueError, KeyError, TypeError):
        return from_hf_config(directory.config, directory.path.name or "pretrained")


def _require_same_shape(config: ModelConfig, directory: PretrainedDirectory) -> None:
    there = pretrained_config(directory)
    if type(there) is not type(config):
        raise UserError(f"model.arch={config.arch}, but model.init_from={directory.path} holds a {there.arch}")
    for part in fields(config):
        ours, other = getattr(config, part.name), getattr(there, part.name)
        if part.name == "head_dim":
            ours, other = config.head_size, there.head_size
        if part.name not in ("name", "init_std", "init_from", "max_seq_len") and ours != other:
            raise UserError(f"model.{part.name}={ours}, but model.init_from={directory.path} has {other}")


def _start_from(model: Decoder, pretrained: str) -> int | None:
    """Returns the length, in tokens, that the weights were trained at, if it is known."""
    directory = PretrainedDirectory(pretrained)
    _require_same_shape(model.config, directory)
    load_pretrained(model, directory)
    return directory.trained_length


def _reads_otherwise(tokenizer: TextTokenizer, directory: str) -> bool:
    """Whether there is a tokenizer in ``directory``, and it makes other tokens of a text than ``tokenizer`` does."""
    sample = ["The train's 3 carriages (2 of them new) carry 1,024 bits over é hills.\n\tIt is 東."]
    try:
        other = load_tokenizer(f"{directory}/tokenizer.json")
        return (tokenizer.eot, tokenizer.encode_batch(sample)) != (other.eot, other.encode_batch(sample))
    except UserError:  # none, or none that can be used
        return False


def _moments_note(precision: Precision, optimizer: Optimizer) -> str:
    """A line of plan.txt: how states are held, who says so, and who computes."""
    rule = precision.recipe.update
    moments, own = precision.recipe.moments.text(rule), precision.own_moments.text(rule)
    source = f"optim.moments; the recipe has {own}" if moments != own else "the recipe's"
    by = optimizer.computed_by if isinstance(optimizer, StateOptimizer) else type(optimizer).__module__
    return f"{moments} ({source}), vectors fp32, updated by {by}"


def to_transformers(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor], end_of_text: int, trained_length: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """``config.json`` and state dict of the same model in `transformers`. Raises UserError if there is none."""
    with as_user_error("", ValueError):
        return to_hf_config(config, end_of_text, trained_length), to_hf_tensors(config, tensors)


def sequence_bytes(
    config: ModelConfig, parallel: ParallelConfig, device: torch.device, seq_len: int, dtype: torch.dtype
) -> int:
    """Bytes of activations that a sequence takes, or somewhat less. ``dtype``: of activations, which counts where
    blocks are compiled on CUDA."""
    fused = device.type == "cuda" and parallel.compiles(device)
    itemsize = dtype.itemsize if fused else None
    return config.activation_bytes(seq_len, itemsize, recompute=parallel.activation_checkpointing)


def num_parameters(model: nn.Module) -> int:
    """Parameters of the full model; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
