"""From a run to `transformers` and back."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import check_export
import pytest
import torch
import transformers
from conftest import train_here
from narrowgauge.models import GPTConfig, LlamaConfig, create
from narrowgauge.models.hf import to_hf_config, to_hf_tensors
from narrowgauge.precision.swiglu import fold, scales_of
from narrowgauge.trainer import distributed
from narrowgauge.trainer.build import load_pretrained, pretrained_config
from narrowgauge.trainer.checkpoint import read_tensors
from narrowgauge.trainer.config import TrainConfig
from narrowgauge.trainer.data.tokenizer import load_tokenizer, save_for_transformers, train_bpe
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.metrics import read_metrics
from narrowgauge.trainer.pretrained import DOCUMENT_MASK, PretrainedDirectory
from narrowgauge.trainer.tools.evaluation import Evaluation, evaluate_on, open_pretrained, open_run
from narrowgauge.trainer.tools.export import export_run
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

Tiny = Callable[..., TrainConfig]
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["llama", "untied", "gpt"])
def exported(tiny: Tiny, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[TrainConfig, Path]:
    """A finished run and its export."""
    config = tiny(f"model.tie_embeddings={request.param != 'untied'}", gpt=request.param == "gpt")
    assert train_here(config) is ExitCode.FINISHED
    assert export_run(Path(config.run.dir), tmp_path / "hf") == 6
    return config, tmp_path / "hf"


def evaluate_here(subject_of: Callable[[], object], *arguments: object) -> Evaluation:
    try:
        return evaluate_on(subject_of(), *arguments)  # type: ignore[arg-type]
    finally:
        distributed.finish()


def test_transformers_loads_it_and_evaluate_agrees(exported: tuple[TrainConfig, Path], corpus: Path) -> None:
    config, directory = exported
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert tokenizer("é a")["input_ids"] == list("é a".encode())
    assert (tokenizer.eos_token_id, model.config.vocab_size) == (256, 257)
    theirs = model.state_dict()
    master = read_tensors(Path(config.run.dir) / "checkpoints" / "step-00000006", "model.")
    total = sum(float(tensor.double().sum()) for tensor in master.values())
    tied = config.model.tie_embeddings
    assert sum(float(t.double().sum()) for n, t in theirs.items() if not (tied and n.startswith("lm_head"))) == (
        pytest.approx(total, rel=1e-9)
    )

    row = read_metrics(Path(config.run.dir) / "metrics.jsonl", "eval")[6]
    own = evaluate_here(lambda: open_run(Path(config.run.dir)), None, "validation", 500, 8)
    assert (own.loss, own.bits_per_byte, own.tokens) == (row["loss"], row["bits_per_byte"], row["tokens"])
    hf = evaluate_here(lambda: open_pretrained(str(directory), "bf16", 32), str(corpus), "validation", 500, 8)
    assert hf == own


def test_training_goes_on_from_it(exported: tuple[TrainConfig, Path], tiny: Tiny, tmp_path: Path) -> None:
    config, directory = exported
    gpt = config.model.arch == "gpt"
    more = (f"model.init_from={directory}", f"run.dir={tmp_path / 'next'}", "optim.lr=1e-30", "optim.weight_decay=0")
    following = tiny(f"model.tie_embeddings={config.model.tie_embeddings}", *more, gpt=gpt)
    assert train_here(following) is ExitCode.FINISHED
    first, second = (
        read_tensors(Path(c.run.dir) / "checkpoints" / "step-00000006", "model.") for c in (config, following)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    for file in directory.iterdir():
        file.unlink()  # a run that goes on does not need it any more
    longer = tiny(f"model.tie_embeddings={config.model.tie_embeddings}", *more, "train.steps=7", gpt=gpt)
    assert train_here(longer) is ExitCode.FINISHED


def refusal(config: TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        train_here(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def directory(tiny: Tiny, tmp_path: Path) -> Path:
    config = tiny(f"run.dir={tmp_path / 'first'}", "train.steps=1")
    train_here(config)
    export_run(Path(config.run.dir), tmp_path / "hf")
    return tmp_path / "hf"


def test_directories_that_do_not_fit(directory: Path, tiny: Tiny, tmp_path: Path) -> None:
    start = f"model.init_from={directory}"
    assert "model.hidden_size=64, but model.init_from=" in refusal(tiny(start, "model.hidden_size=64"))
    assert "model.num_kv_heads=4, but" in refusal(tiny(start, "model.num_kv_heads=4"))
    assert "model.arch=gpt, but" in refusal(tiny(start, gpt=True))
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, directory / "model.safetensors")
    assert f"lacks the tensor {name}" in refusal(tiny(start))
    save_file(tensors | {name: torch.zeros(3, 32)}, directory / "model.safetensors")
    assert f"{name} gives layers.1.mlp.up_proj.weight the shape [3, 32], the model wants [64, 32]" in refusal(
        tiny(start)
    )
    (directory / "model.safetensors").write_bytes(b"nonsense")
    assert "model.safetensors cannot be read" in refusal(tiny(start))
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle and is not read" in refusal(tiny(start))
    (directory / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(tiny(start))
    (directory / "config.json").unlink()
    assert "holds no config.json" in refusal(tiny(start))
    assert "no such directory" in refusal(tiny(f"model.init_from={tmp_path / 'none'}"))


DEEP = "[" * 100_000
NOT_OBJECTS = {"list": "[]", "number": "7", "null": "null", "text": '"x"', "deep": DEEP, "deep inside": '{"a": ' + DEEP}


def complaint(directory: Path) -> str:
    def read() -> None:
        opened = PretrainedDirectory(str(directory))
        pretrained_config(opened)
        opened.tensor("model.norm.weight")

    with pytest.raises(UserError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def small_directory(tmp_path: Path) -> Path:
    """A Llama's config and one of its tensors."""
    config = to_hf_config(LlamaConfig(name="x", hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4,
                                      num_kv_heads=2, vocab_size=257), 256)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("kind", NOT_OBJECTS)
def test_descriptions_that_are_none(small_directory: Path, kind: str) -> None:
    for name in ("model.safetensors.index.json", "config.json"):
        (small_directory / name).write_text(NOT_OBJECTS[kind])
        assert f"{small_directory / name} cannot be read: " in complaint(small_directory)


@pytest.mark.parametrize(
    "files",
    [
        None,
        ["model.safetensors"],
        {"model.norm.weight": 3},
        {"model.norm.weight": None},
        {"model.norm.weight": "../model.safetensors"},
        {"model.norm.weight": "/model.safetensors"},
        {"model.norm.weight": ".."},
        {"model.norm.weight": ""},
        {"model.norm.weight": "pytorch_model.bin"},
    ],
    ids=["missing", "list", "number", "null", "above", "absolute", "only dots", "empty", "pickle"],
)
def test_indices_that_lead_elsewhere(small_directory: Path, files: object) -> None:
    (small_directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert f"{small_directory}/model.safetensors.index.json" in complaint(small_directory)


def test_indices_that_do_not_fit_their_files(small_directory: Path) -> None:
    index = small_directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "none.safetensors"}}))
    assert "none.safetensors cannot be read" in complaint(small_directory)
    save_file({"other": torch.ones(1)}, small_directory / "model.safetensors")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    assert "model.safetensors lacks the tensor model.norm.weight" in complaint(small_directory)


NO_CONFIGS: dict[str, tuple[str, object]] = {
    "no type": ("model_type", None),
    "a type in lists": ("model_type", [["llama"]]),
    "no vocabulary": ("vocab_size", None),
    "vocabulary as text": ("vocab_size", "257"),
    "vocabulary that is true": ("vocab_size", True),
    "half a token": ("vocab_size", 1.5),
    "no width": ("hidden_size", 0),
    "negative width": ("hidden_size", -32),
    "width in a list": ("intermediate_size", [64]),
    "layers in an object": ("num_hidden_layers", {"a": 1}),
    "heads that do not divide": ("num_attention_heads", 5),
    "key heads that do not divide": ("num_key_value_heads", 3),
    "head size as text": ("head_dim", "8"),
    "base as text": ("rope_theta", "big"),
    "eps that is none": ("rms_norm_eps", float("nan")),
    "negative eps": ("rms_norm_eps", -1e-5),
    "rotary list": ("rope_parameters", [1]),
    "rotary text": ("rope_parameters", "default"),
    "rotary type in a list": ("rope_parameters", {"rope_type": ["llama3"]}),
    "scaling without numbers": ("rope_parameters", {"rope_type": "llama3"}),
    "scaling as text": ("rope_parameters", {"rope_type": "llama3", "factor": "8"}),
    "tied by text": ("tie_word_embeddings", "yes"),
    "bias by an object": ("attention_bias", {}),
    "activation by number": ("hidden_act", 3),
}


@pytest.mark.parametrize("name", NO_CONFIGS)
def test_configs_that_no_model_has(small_directory: Path, name: str) -> None:
    file, (key, value) = small_directory / "config.json", NO_CONFIGS[name]
    config = json.loads(file.read_text()) | {key: value}
    if key == "rope_theta":
        del config["rope_parameters"]
    file.write_text(json.dumps(config))
    assert re.match(re.escape(f"{file}: ") + r"\S+ .*(is|must|not) ", complaint(small_directory))


def block_maxima(weight: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 16, 0, -weight.shape[0] % 32))
    return padded.unflatten(0, (-1, 32)).unflatten(2, (-1, 16)).abs().amax((1, 3))


E4M3 = torch.float8_e4m3fn
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
BLOCKS = {"config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [32, 16]}}}}
FP8: dict[str, tuple[str, dict[str, object], Callable[[torch.Tensor], torch.Tensor]]] = {
    "one number": ("scale", COMPRESSED, lambda w: w.abs().amax().reshape(1)),
    "one number without a dimension": ("scale_inv", {"quant_method": "fp8"}, lambda w: w.abs().amax()),
    "a row": ("scale", COMPRESSED, lambda w: w.abs().amax(1, keepdim=True)),
    "a row in BF16": ("scale", COMPRESSED, lambda w: w.abs().amax(1, keepdim=True).bfloat16()),
    "a row of fbgemm": ("scale", {"quant_method": "fbgemm_fp8"}, lambda w: w.abs().amax(1)),
    "a block": ("scale_inv", {"quant_method": "fp8", "weight_block_size": [32, 16]}, block_maxima),
    "a compressed block": ("scale", COMPRESSED | BLOCKS, lambda w: block_maxima(w).bfloat16()),
    "a power of two for a block": (
        "scale_inv",
        {"quant_method": "fp8", "weight_block_size": [32, 16]},
        lambda w: (448 * block_maxima(w).log2().ceil().exp2()).to(torch.float8_e8m0fnu),
    ),
}


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A scale for every element, found by where it lies."""
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(shape)
    if scale.numel() == shape[0]:
        return scale.reshape(-1, 1).expand(shape)
    return scale[torch.arange(shape[0])[:, None] // 32, torch.arange(shape[1]) // 16]


LLAMA = LlamaConfig(name="x", hidden_size=48, intermediate_size=72, num_layers=2, num_heads=6,
                    num_kv_heads=2, vocab_size=257)  # fmt: skip


def random_weights(config: LlamaConfig | GPTConfig = LLAMA) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ours = {name: torch.randn(p.shape, generator=generator) for name, p in create(config).named_parameters()}
    return to_hf_tensors(config, ours)


def write_pretrained(directory: Path, tensors: dict[str, torch.Tensor], config: LlamaConfig | GPTConfig = LLAMA,
                     **changes: object) -> Path:  # fmt: skip
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(to_hf_config(config, 256) | changes))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def loaded(directory: Path) -> dict[str, torch.Tensor]:
    opened = PretrainedDirectory(str(directory))
    model = create(pretrained_config(opened))
    load_pretrained(model, opened)
    return to_hf_tensors(model.config, {name: p.detach() for name, p in model.named_parameters()})


def quantized(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An FP8 checkpoint's tensors, and what they stand for."""
    stored, meant = random_weights(), {}
    suffix, _, scale_of = FP8[kind]
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        weight = stored[name]
        scale = scale_of(weight).to(torch.float32) / 448
        scale = scale.to(scale_of(weight).dtype)
        codes = (weight / spread(scale, weight.shape)).to(E4M3)
        stored |= {name: codes, f"{name}_{suffix}": scale}
        meant[name] = codes.float() * spread(scale, weight.shape)
    return stored, random_weights() | meant


@pytest.mark.parametrize("kind", FP8)
def test_codes_are_read_with_their_scales(tmp_path: Path, kind: str) -> None:
    stored, meant = quantized(kind)
    read = loaded(write_pretrained(tmp_path / "fp8", stored, quantization_config=FP8[kind][1]))
    assert all(torch.equal(read[name], meant[name]) for name in read)
    whole = random_weights()
    assert all((read[name] - whole[name]).abs().max() < 0.3 for name in read)


def test_an_fp8_checkpoint_has_the_loss_of_what_it_stands_for(corpus: Path, tmp_path: Path) -> None:
    stored, meant = quantized("a row")
    save_for_transformers("bytes", None, write_pretrained(tmp_path / "meant", meant))
    save_for_transformers("bytes", None, write_pretrained(tmp_path / "fp8", stored, quantization_config=COMPRESSED))
    where = (str(corpus), "validation", 100, 8)
    losses = [
        evaluate_here(lambda name=name: open_pretrained(str(tmp_path / name), "fp32", 32), *where)
        for name in ("fp8", "meant")
    ]
    assert losses[0] == losses[1]


Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
CODES = torch.ones(48, 48).to(E4M3)
NOT_READ: dict[str, tuple[dict[str, object], dict[str, torch.Tensor], str]] = {
    "codes without a quantization": ({}, {Q: CODES}, f"{Q} is float8_e4m3fn, and config.json has"),
    "codes without a scale": (
        {"quantization_config": COMPRESSED},
        {Q: CODES},
        f"{Q} is float8_e4m3fn, and there is not one scale for it",
    ),
    "codes with two scales": (
        {"quantization_config": COMPRESSED},
        {Q: CODES, f"{Q}_scale": torch.ones(1), f"{Q}_scale_inv": torch.ones(1)},
        "there is not one scale",
    ),
    "scales of another shape": (
        {"quantization_config": COMPRESSED},
        {Q: CODES, f"{Q}_scale": torch.ones(1, 48)},
        f"{Q}_scale, float32 of shape [1, 48], is no scale of {Q}",
    ),
    "scales in whole numbers": (
        {"quantization_config": COMPRESSED},
        {Q: CODES, f"{Q}_scale": torch.ones(1, dtype=torch.uint8)},
        f"{Q}_scale, uint8 of shape [1], is no scale",
    ),
    "a scale of a weight that is no code": (
        {"quantization_config": COMPRESSED}, {f"{Q}_scale": torch.ones(1)}, f"does not read: {Q}_scale;",
    ),
    "an offset of codes": (
        {"quantization_config": COMPRESSED},
        {Q: CODES, f"{Q}_scale": torch.ones(1), f"{Q}_zero_point": torch.ones(1)},
        f"does not read: {Q}_zero_point;",
    ),
    "packed integers": (
        {"quantization_config": COMPRESSED | {"format": "pack-quantized"}},
        {},
        "weights quantized by 'compressed-tensors', format 'pack-quantized' are not read here",
    ),
    "a sparse format": (
        {"quantization_config": COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}}, {}, "sparse are",
    ),
    "another method": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, "weights quantized by 'gptq'"),
    "a quantization in words": ({"quantization_config": "fp8"}, {}, "quantization_config is 'fp8', not an object"),
    "integers": ({}, {Q: torch.ones(48, 48, dtype=torch.int8)}, f"{Q} is int8, no weights"),
    "bytes": ({}, {K: torch.ones(16, 48, dtype=torch.uint8)}, f"{K} is uint8, no weights"),
    "a number that is none": ({}, {Q: torch.full((48, 48), torch.nan)}, f"{Q} holds values that are not finite"),
    "a scale that is none": (
        {"quantization_config": COMPRESSED},
        {Q: CODES, f"{Q}_scale": torch.tensor([torch.inf])},
        f"{Q} holds values that are not finite",
    ),
    "biases": (
        {},
        {f"model.layers.{i}.self_attn.{n}_proj.bias": torch.ones(48) for i in (0, 1) for n in "qo"},
        "holds tensors that a llama built here does not read: model.layers.0.self_attn.o_proj.bias, "
        "model.layers.0.self_attn.q_proj.bias, model.layers.1.self_attn.o_proj.bias and 1 more;",
    ),
    "a layer more": ({}, {"model.layers.2.mlp.up_proj.weight": torch.ones(72, 48)}, "not read: model.layers.2.mlp"),
    "a head of its own": (
        {"tie_word_embeddings": True}, {}, "lm_head.weight is not model.embed_tokens.weight, though config",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_READ)
def test_no_tensor_is_passed_over(tmp_path: Path, name: str) -> None:
    changes, tensors, words = NOT_READ[name]
    directory = write_pretrained(tmp_path / "hf", random_weights() | tensors, **changes)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        loaded(directory)
    assert str(tmp_path / "hf") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_their_type_does_not_hold_are_refused(tmp_path: Path) -> None:
    large = random_weights()
    large["model.norm.weight"][3] = 1e5
    opened = PretrainedDirectory(str(write_pretrained(tmp_path / "hf", large)))
    load_pretrained(create(LLAMA), opened)
    with pytest.raises(
        UserError, match=r"model\.norm\.weight holds values beyond float16, which norm\.weight is kept in"
    ):
        load_pretrained(create(LLAMA).half(), opened)


def test_tensors_that_follow_from_the_config_may_be_there(tmp_path: Path) -> None:
    whole = random_weights()
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    read = loaded(write_pretrained(tmp_path / "llama", whole | table))
    assert all(torch.equal(read[name], whole[name]) for name in whole)
    tied = replace(LLAMA, tie_embeddings=True)
    copied = random_weights(tied)
    copied["lm_head.weight"] = copied["model.embed_tokens.weight"]
    assert "lm_head.weight" not in loaded(write_pretrained(tmp_path / "tied", copied, tied))
    gpt = GPTConfig(name="x", hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, vocab_size=257)
    whole = random_weights(gpt)
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4), "transformer.h.0.attn.masked_bias": torch.ones(())}
    headless = {name.removeprefix("transformer."): tensor for name, tensor in (whole | masks).items()}
    for index, tensors in enumerate((whole | masks, headless)):
        read = loaded(write_pretrained(tmp_path / f"gpt{index}", tensors, gpt))
        assert all(torch.equal(read[name], whole[name]) for name in whole)


def test_tensors_beside_the_index_are_no_less_there(tmp_path: Path) -> None:
    whole = random_weights()
    directory = write_pretrained(tmp_path / "hf", whole | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(whole, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"does not read: model\.layers\.0\.self_attn\.q_proj\.bias"):
        loaded(directory)
    save_file(whole, directory / "model-00001-of-00001.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in loaded(directory).items())
    save_file(whole, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"holds model.safetensors and, in model.safetensors.index.json, others"):
        loaded(directory)


def test_exports_that_are_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists and is not empty"):
        export_run(tmp_path / "first", directory)
    with pytest.raises(UserError, match="dtype=fp8: one of float32, bfloat16"):
        export_run(tmp_path / "first", tmp_path / "x", "fp8")
    with pytest.raises(UserError, match="is not a run directory"):
        export_run(tmp_path / "none", tmp_path / "x")


def test_bfloat16_is_half_the_size_and_says_so(directory: Path, tmp_path: Path) -> None:
    export_run(tmp_path / "first", tmp_path / "half", "bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    full, half = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "half"))
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)


def test_a_trained_tokenizer_is_exported_as_it_is(tmp_path: Path) -> None:
    train_bpe(["some text to train on", "and é more"], 280, tmp_path / "bpe", progress=False)
    save_for_transformers(str(tmp_path / "bpe"), None, tmp_path / "out")
    assert load_tokenizer(str(tmp_path / "out")).fingerprint == load_tokenizer(str(tmp_path / "bpe")).fingerprint


FIRST, LAST = "<s>", "</s>"
WITH_FIRST = processors.TemplateProcessing(
    single=f"{FIRST} $A", pair=f"{FIRST} $A {LAST} $B:1", special_tokens=[(FIRST, 0), (LAST, 1)]
)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def lowered(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])


def cut_and_padded(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16, pad_token=LAST)


def prefixed(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


def with_words(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens(["people", AddedToken(" the ", lstrip=True)])
    tokenizer.post_processor = WITH_FIRST


def of_pieces(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = WITH_FIRST


def sets(processor: object) -> Callable[[Tokenizer], None]:
    return lambda tokenizer: setattr(tokenizer, "post_processor", processor)


TOKENIZERS: dict[str, Callable[[Tokenizer], None]] = {
    "nothing": sets(None),
    "template": sets(WITH_FIRST),
    "template at both ends": sets(
        processors.TemplateProcessing(single=f"{FIRST} $A {LAST}", special_tokens=[(FIRST, 0), (LAST, 1)])
    ),
    "template that adds nothing": sets(processors.TemplateProcessing(single="$A:0")),
    "roberta": sets(processors.RobertaProcessing((LAST, 1), (FIRST, 0), trim_offsets=True)),
    "bert": sets(processors.BertProcessing((LAST, 1), (FIRST, 0))),
    "sequence": sets(processors.Sequence([processors.ByteLevel(trim_offsets=True), WITH_FIRST])),
    "sequence of a sequence": sets(processors.Sequence([processors.Sequence([WITH_FIRST]), processors.ByteLevel()])),
    "lowered": lowered,
    "cut and padded": cut_and_padded,
    "prefixed": prefixed,
    "words of its own": with_words,
    "pieces": of_pieces,
}
ADDED: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]] = {
    "special": lambda token: token,
    "in the vocabulary only": lambda token: None,
}
SPOKEN = [
    "the people",
    "",
    " the  people\n\n",
    f"a{LAST}b {FIRST} c",
    f"{FIRST}the people",
    "É 東 Ⅷ the the people",
    "a , b 's .",
]


@pytest.mark.parametrize(
    ("name", "adds", "added"),
    [
        *((name, adds, "special") for name in TOKENIZERS for adds in ("", "LlamaTokenizerFast", "GPT2Tokenizer")),
        *(("template", "LlamaTokenizer", added) for added in ADDED),
        *(("nothing", "", added) for added in ADDED if added != "special"),
    ],
)
def test_an_exported_tokenizer_gives_what_training_used(tmp_path: Path, name: str, adds: str, added: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = BYTE_LEVEL, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=[FIRST, LAST], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the people of the united states and the government"] * 9, trainer)
    TOKENIZERS[name](tokenizer)
    (tmp_path / "theirs").mkdir()
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = [changed for token in tree["added_tokens"] if (changed := ADDED[added](token))]
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(tree))
    if adds:
        settings = {"tokenizer_class": adds, "bos_token": FIRST, "eos_token": LAST, "add_bos_token": True}
        (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(settings | {"add_eos_token": True}))
    trained = load_tokenizer(str(tmp_path / "theirs"))
    write_pretrained(tmp_path / "out", {})
    save_for_transformers(str(tmp_path / "theirs"), None, tmp_path / "out", 32)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert exported(SPOKEN).input_ids == trained.encode_batch(SPOKEN)
    assert load_tokenizer(str(tmp_path / "out")).encode_batch(SPOKEN) == trained.encode_batch(SPOKEN)
    assert exported.decode(exported(SPOKEN[-1]).input_ids) == trained.decode(trained.encode_batch(SPOKEN[-1:])[0])
    assert (exported.bos_token, exported.eos_token, exported.model_max_length) == (LAST, LAST, 32)
    described = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert described.get("add_prefix_space") == tree["pre_tokenizer"].get("add_prefix_space")
    # What only trims offsets is left.
    span = [exported(" the people", return_offsets_mapping=True).offset_mapping[0]]
    assert span == [tokenizer.encode(" the people", add_special_tokens=False).offsets[0]] or name == "cut and padded"


def test_the_name_of_the_class_is_one_that_releases_before_5_know(directory: Path) -> None:
    assert json.loads((directory / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    exported = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert set(exported("a")) == {"input_ids", "attention_mask"}  # others a causal model of theirs refuses


@pytest.mark.parametrize("gpt", [False, True], ids=["llama", "gpt"])
def test_the_length_trained_at_stands_in_the_export(tiny: Tiny, tmp_path: Path, corpus: Path, gpt: bool) -> None:
    config = tiny("train.steps=1", "model.max_seq_len=48", "sample.tokens=0", gpt=gpt)
    train_here(config)
    hf = tmp_path / "hf"
    export_run(Path(config.run.dir), hf)
    described = json.loads((hf / "config.json").read_text())
    assert (described.get("max_position_embeddings"), described.get("n_positions")) == (
        (None, 48) if gpt else (32, None)
    )
    assert json.loads((hf / "tokenizer_config.json").read_text())["model_max_length"] == 32
    said = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256, "max_length": 32}
    assert json.loads((hf / "generation_config.json").read_text()) == said
    assert PretrainedDirectory(str(hf)).trained_length == 32
    own = evaluate_here(lambda: open_run(Path(config.run.dir)), None, "validation", 500, 8)
    assert own.seq_len == 32
    assert evaluate_here(lambda: open_pretrained(str(hf), "bf16"), str(corpus), "validation", 500, 8) == own


def test_documents_kept_apart_in_training_are_in_an_evaluation_too(tiny: Tiny, tmp_path: Path, corpus: Path) -> None:
    config = tiny("sample.tokens=0", "data.document_mask=true", "optim.lr=1e-2")
    train_here(config)
    export_run(Path(config.run.dir), tmp_path / "hf")
    own = evaluate_here(lambda: open_run(Path(config.run.dir)), None, "validation", 500, 8)
    where = (str(corpus), "validation", 500, 8)
    assert evaluate_here(lambda: open_pretrained(str(tmp_path / "hf"), "bf16"), *where) == own
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({k: v for k, v in described.items() if k != DOCUMENT_MASK}))
    assert evaluate_here(lambda: open_pretrained(str(tmp_path / "hf"), "bf16"), *where).loss != own.loss


def test_another_length_is_said(tiny: Tiny, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny("train.steps=1", "model.max_seq_len=40", "sample.tokens=0", gpt=True)
    train_here(config)
    run, hf, where = Path(config.run.dir), tmp_path / "hf", (None, "validation", 500, 8)
    export_run(run, hf)
    assert evaluate_here(lambda: open_run(run, 16), *where).seq_len == 16
    assert "warning" not in capsys.readouterr().out
    assert evaluate_here(lambda: open_run(run, 40), *where).seq_len == 40
    assert f"warning: seq_len=40 is longer than the 32 tokens that {run} was trained at" in capsys.readouterr().out
    assert evaluate_here(lambda: open_pretrained(str(hf), "bf16", 40), str(corpus), *where[1:]).seq_len == 40
    assert f"warning: seq_len=40 is longer than the 32 tokens that {hf} was trained at" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"seq_len=41 is beyond the 40 learned positions of .*hf"):
        open_pretrained(str(hf), "bf16", 41)


def test_a_run_that_is_longer_than_its_model_says_so(
    directory: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = ("data.seq_len=48", "train.steps=1", "sample.tokens=0", f"model.init_from={directory}")
    for limit, said in ((2048, []), (40, ["warning: data.seq_len=48 is longer than model.max_seq_len=40"])):
        capsys.readouterr()
        config = tiny(*longer, f"model.max_seq_len={limit}", f"run.dir={tmp_path / str(limit)}")
        assert train_here(config) is ExitCode.FINISHED
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: data.seq_len")]
        assert lines == [
            *said,
            f"warning: data.seq_len=48 is longer than the 32 tokens that {directory} was trained at",
        ]


def test_another_tokenizer_than_that_of_the_weights_is_said(
    directory: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of the export is read as it is, though it is a BPE by now and was bytes in training."""
    shifted = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = shifted["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    said = f"warning: data.tokenizer gives other tokens than the tokenizer in {directory}"
    only = ("train.steps=1", "sample.tokens=0", "eval.tokens=0", f"model.init_from={directory}", "run.resume=never")
    for content, warned in ((None, False), (json.dumps(shifted), True), ("{", False)):
        if content is not None:
            (directory / "tokenizer.json").write_text(content)
        capsys.readouterr()
        train_here(tiny(*only))
        assert (said in capsys.readouterr().out) == warned


def test_a_model_that_was_trained_longer_than_a_pass_needs_says_so(
    directory: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        described = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(described | {key: 131_072}))
    with pytest.raises(UserError, match=r"less than one window of .* 4,?097"):
        evaluate_here(lambda: open_pretrained(str(directory), "bf16"), str(corpus), "validation", 500, 8)
    assert f"windows of 4,096 tokens, not of the 131,072 that {directory} names" in capsys.readouterr().out


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path: Path) -> None:
    small = replace(LLAMA, vocab_size=200)
    save_for_transformers("bytes", None, write_pretrained(tmp_path / "hf", random_weights(small), small))
    with pytest.raises(UserError, match="the tokenizer has 257 tokens, the model 200"):
        open_pretrained(str(tmp_path / "hf"), "bf16")


def test_an_export_has_the_mode_that_the_umask_says(directory: Path, tmp_path: Path) -> None:
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            export_run(tmp_path / "first", tmp_path / f"mode{mode:o}")
        finally:
            os.umask(before)
        assert {file.stat().st_mode & 0o777 for file in (tmp_path / f"mode{mode:o}").iterdir()} == {mode}


@pytest.mark.parametrize("stands", [False, True], ids=["new", "empty directory"])
def test_half_an_export_is_none(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stands: bool) -> None:
    out = tmp_path / "new"
    if stands:
        out.mkdir()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("narrowgauge.trainer.tools.export.write_json", full)
        with pytest.raises(UserError, match=re.escape(f"out={out} cannot be written: ") + ".*No space left"):
            export_run(tmp_path / "first", out)
    assert out.exists() == stands
    assert not list(tmp_path.glob("**/*.incomplete"))
    export_run(tmp_path / "first", out)
    assert {file.name for file in out.iterdir()} == {file.name for file in directory.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folded_scales_leave_every_logit(directory: Path, tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    first = tmp_path / "first"
    assert export_run(first, tmp_path / "plain", dtype) == export_run(first, tmp_path / "folded", dtype, folded=True)
    plain, folded = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, local_files_only=True)
        for name in ("plain", "folded")
    )
    tokens = torch.arange(32).view(2, 16)
    assert torch.equal(plain(tokens).logits, folded(tokens).logits)
    ups = [model.model.layers[0].mlp.up_proj.weight.detach() for model in (plain, folded)]
    ratio = (ups[0] / ups[1]).float()
    assert (ratio == ratio[:, :1]).all()  # one factor a row, a power of two, and not the same for all
    assert (ratio.log2() == ratio.log2().round()).all()
    assert len(ratio.unique()) > 1


def test_a_scale_is_a_power_of_two_or_one() -> None:
    amax = torch.tensor([3.0, 0.75, 0.0, 1e-40, torch.inf, torch.nan])
    up, down = fold(torch.ones(6, 2), torch.ones(3, 6), scales_of(amax, pow2=True))
    assert down[0].tolist() == [2.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert (up * down[0][:, None] == 1).all()


def test_only_a_swiglu_folds(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("train.steps=1", gpt=True)
    train_here(config)
    with pytest.raises(UserError, match=r"fold=true: .*trains a gpt, whose MLPs are no SwiGLU"):
        export_run(Path(config.run.dir), tmp_path / "hf", folded=True)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EVALUATE: dict[str, tuple[list[str], dict[str, object], str]] = {
    "a word unknown": (["sequence=3"], {"hf": "x", "path": "y"}, "sequence=3: not together with hf="),
    "a run as well": (["run.dir=a"], {"hf": "x", "path": "y"}, "run.dir=a: not together with hf="),
    "a precision for a run": (["run.dir=a"], {"precision": "fp32"}, "precision=fp32 is for hf="),
    "no length": (["run.dir=a"], {"seq_len": -1}, "seq_len=-1: must be at least 0"),
    "no corpus": ([], {"hf": "x"}, "hf=... needs path=..."),
}


@pytest.mark.parametrize("name", EVALUATE)
def test_what_evaluate_would_pass_over_is_refused(name: str) -> None:
    overrides, own, said = EVALUATE[name]
    with pytest.raises(UserError, match=re.escape(said)):
        script("evaluate").main(overrides, **own)


def test_scripts_say_what_they_measure(
    directory: Path, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = f"run.dir={tmp_path / 'first'}"
    script("evaluate").main([first], tokens=100_000)
    words = capsys.readouterr().out
    assert re.search(r"of validation in windows of 32, all there are of the 100,000 asked for\n", words)
    script("evaluate").main([], hf=str(directory), path=str(corpus), tokens=64)
    assert "over 64 tokens of validation in windows of 32\n" in capsys.readouterr().out
    script("export_hf").main([first], out=str(tmp_path / "again"))
    words = capsys.readouterr().out
    assert "trained on 32 tokens at a time" in words
    assert f"pretrained={tmp_path / 'again'},dtype=float32,max_length=32" in words
    script("generate").main([first], prompt="a" * 40, tokens=1, temperature=1e-300)
    assert "warning: of the prompt's 40 tokens the last 32 are seen" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"tokens": -1}, {"seed": -1}],
    ids=["cold", "no temperature", "top", "tokens", "seed"],
)
def test_samples_that_cannot_be_are_refused(wrong: dict[str, float], tmp_path: Path) -> None:
    ((key, value),) = wrong.items()
    with pytest.raises(UserError, match=rf"^{key}={value}: must"):
        script("generate").main([f"run.dir={tmp_path}"], **wrong)


ENVIRONMENTS = sorted(path.name.removeprefix(".venv-transformers-") for path in ROOT.glob(".venv-transformers-*"))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("version", ["", *ENVIRONMENTS], ids=lambda version: version or "installed")
def test_releases_of_transformers_find_what_training_was(
    version: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In those environments that scripts/check_export.py has made."""
    monkeypatch.chdir(ROOT)
    assert check_export.main([], transformers=version) is ExitCode.FINISHED, capsys.readouterr().out


def test_what_check_export_finds_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *_ = check_export.CASES
    expected = {name: {"directory": str(tmp_path / "none"), "loss": 1.0, "text": "a b"}}
    table, wrong = check_export.check(expected, Path(sys.executable), tmp_path)
    assert (table, wrong[0].startswith(f"transformers cannot load {name}: ")) == ([], True)
    found = {"name": name, "transformers": "x", "same_tokens": False, "loss": float("nan"), "text": "a"}
    loader = tmp_path / "python"
    loader.write_text(f"#!/bin/sh\necho '{json.dumps(found)}'\n")
    loader.chmod(0o755)
    table, wrong = check_export.check(expected, loader, tmp_path)
    assert wrong == [
        f"{name}: other tokens than training used",
        f"{name}: the losses are nan nats a token apart",
        f"{name}: goes on with 'a', not with 'a b'",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"transformers": "4.30"}, "transformers=4.30: 4.57, or"),
        ({"transformers": "5.17", "venv": "."}, "is there and is no environment"),
        ({"out": "."}, "out=. exists"),
    ],
    ids=["release", "environment", "place"],
)
def test_bad_arguments_of_check_export(
    arguments: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(said)):
        check_export.main([], **arguments)
