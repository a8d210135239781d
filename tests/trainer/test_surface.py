"""What a user types, frozen: flags, groups with their choices, keys with their types.

To add or rename one is to edit these lists on purpose: somebody's scripts, yamls and run directories have the old name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import get_type_hints

from hydra._internal.utils import get_args_parser
from narrowgauge.trainer import own
from narrowgauge.trainer.config import groups, load_config
from narrowgauge.trainer.data.config import SourceConfig
from narrowgauge.trainer.model import MODEL_SCHEMAS
from narrowgauge.trainer.schema import TrainConfig

FLAGS = """
--config-dir -cd --config-name -cn --config
"""
HYDRA_FLAGS = """
--help -h --hydra-help --version --cfg -c --resolve --package -p --run -r --multirun -m --shell-completion -sc
--config-path -cp --config-name -cn --config-dir -cd --experimental-rerun --info -i
"""
GROUPS = """
data: c4 c4_stream mix sample text
model: gpt2_124m gpt2_1558m gpt2_355m gpt2_774m gpt2_tiny llama3_1b llama3_70b llama3_8b llama3_8b_4blocks
    llama_130m llama_15m llama_1b llama_350m llama_60m llama_7b llama_tiny
optim: adamw lion muon
parallel: fsdp hsdp
precision: bf16 exmy exmy_e5m2 exmy_e8m3 exmy_e8m5 fp16 fp32 fp8_block fp8_current fp8_delayed fp8_full fp8_rowwise
    fp8_rowwise_gw_hp mxfp4 mxfp8 nvfp4 smooth_swiglu
"""
KEYS = """
model[gpt].name: str
model[gpt].arch: str
model[gpt].vocab_size: int | None
model[gpt].hidden_size: int
model[gpt].intermediate_size: int
model[gpt].num_layers: int
model[gpt].num_heads: int
model[gpt].max_seq_len: int
model[gpt].norm_eps: float
model[gpt].tie_embeddings: bool
model[gpt].init_std: float
model[gpt].init_from: str | None
model[llama].name: str
model[llama].arch: str
model[llama].vocab_size: int | None
model[llama].hidden_size: int
model[llama].intermediate_size: int
model[llama].num_layers: int
model[llama].num_heads: int
model[llama].max_seq_len: int
model[llama].norm_eps: float
model[llama].tie_embeddings: bool
model[llama].init_std: float
model[llama].init_from: str | None
model[llama].num_kv_heads: int
model[llama].head_dim: int | None
model[llama].rope_theta: float
model[llama].rope_scaling: RopeScaling | None
data.name: str
data.path: str
data.tokenizer: str
data.eot_token: str | None
data.shards: str | None
data.out: str | None
data.field: str
data.subset: str | None
data.train_split: str
data.validation_split: str | None
data.validation_fraction: float | None
data.sample_by: str
data.verify: bool
data.max_files: int | None
data.attempts: int
data.min_bytes_per_second: int
data.max_line_bytes: int
data.max_bad_rows: int
data.stream: bool
data.lanes: int
data.shuffle_rows: int
data.sources: dict[str, SourceConfig] | None
data.document_mask: bool
data.seq_len: int
data.global_batch_size: int
data.vocab_size: int
data.tokenizer_train_bytes: int
precision.name: str
precision.recipe: str
precision.args: dict[str, Any]
precision.schedule: list[Any]
precision.backend: str
optim.name: str
optim.lr: float
optim.beta1: float
optim.beta2: float
optim.eps: float
optim.weight_decay: float
optim.clip_norm: float
optim.schedule: constant | linear | cosine | wsd
optim.warmup_steps: int
optim.warmup_max_fraction: float
optim.min_lr_ratio: float
optim.decay_fraction: float
optim.update: str | None
optim.update_args: dict[str, Any]
optim.moments: Any
optim.telemetry_every: int
parallel.name: str
parallel.replicate: int
parallel.reshard_after_forward: Any
parallel.compile: Any
parallel.deterministic: Any
parallel.fp8_all_gather: bool
parallel.activation_checkpointing: bool
parallel.threads: int | None
parallel.timeout_seconds: int
parallel.start_timeout_seconds: int
seed: int
run.dir: str
run.resume: auto | never | must
train.steps: int
train.micro_batch_size: Any
train.max_nonfinite_in_a_row: int
train.stop_after: str | None
train.spike: off | skip | rollback
train.spike_window: int
train.spike_deviations: float
train.spike_limit: int
eval.every: int
eval.tokens: int
eval.precision: recipe | high
eval.sharpness: int
probe.every: int
probe.layers: str | None
checkpoint.every: int
checkpoint.every_minutes: float
checkpoint.keep_last: int
checkpoint.keep_every: int
checkpoint.asynchronous: bool
checkpoint.max_failures: int
resume.recipe_change: allow | forbid
log.every: int
log.trackers: list[str]
log.project: str
log.wandb_mode: str
sample.prompt: str
sample.tokens: int
sample.temperature: float
sample.top_k: int
sample.seed: int
"""
SOURCE_KEYS = """
path: str
weight: float
shards: str | None
field: str | None
subset: str | None
"""


def keys_of(schema: type, prefix: str = "") -> Iterator[str]:
    """``key: type`` of every leaf; an enum by the names that a user types."""
    hints = get_type_hints(schema)
    for part in fields(schema):
        key, hint = f"{prefix}{part.name}", hints[part.name]
        if (schema, key) == (TrainConfig, "model"):
            for arch, model in MODEL_SCHEMAS.items():
                yield from keys_of(model, f"model[{arch}].")
        elif is_dataclass(hint):
            yield from keys_of(hint, f"{key}.")
        elif isinstance(hint, type) and issubclass(hint, Enum):
            yield f"{key}: {' | '.join(member.name for member in hint)}"
        else:
            yield f"{key}: {part.type}"


def lines(text: str) -> list[str]:
    return text.strip().split("\n")


def test_keys_and_their_types_are_these() -> None:
    assert list(keys_of(TrainConfig)) == lines(KEYS)
    assert list(keys_of(SourceConfig)) == lines(SOURCE_KEYS)


def test_the_default_config_has_every_key() -> None:
    model = "model[llama]"
    keys = {line.partition(":")[0].replace(model, "model") for line in lines(KEYS) if "model[gpt]" not in line}
    assert set(load_config([]).flat()) == keys


def test_groups_and_their_choices_are_these() -> None:
    found = {group: list(names) for group, names in groups().items() if group != "hydra"}
    texts = " ".join(GROUPS.split()).replace(": ", ":")
    assert " ".join(f"{group}:{' '.join(names)}" for group, names in found.items()) == texts


def test_flags_are_these() -> None:
    assert list(own._FLAGS) == FLAGS.split()
    assert [flag for action in get_args_parser()._actions for flag in action.option_strings] == HYDRA_FLAGS.split()
