"""From a run to `transformers` and back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import train_here
from safetensors.torch import load_file, save_file

from models.hf import to_hf_config
from models.llama import LlamaConfig
from trainer import distributed
from trainer.build import pretrained_config
from trainer.checkpoint import read_tensors
from trainer.config import TrainConfig
from trainer.errors import ExitCode, UserError
from trainer.evaluation import Evaluation, evaluate_on, open_pretrained, open_run
from trainer.export import export_run
from trainer.metrics import read_metrics
from trainer.pretrained import PretrainedDirectory
from trainer.tokenizer import load_tokenizer, save_for_transformers, train_bpe

Tiny = Callable[..., TrainConfig]


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


def test_only_a_swiglu_folds(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("train.steps=1", gpt=True)
    train_here(config)
    with pytest.raises(UserError, match=r"fold=true: .*trains a gpt, whose MLPs are no SwiGLU"):
        export_run(Path(config.run.dir), tmp_path / "hf", folded=True)
