"""A recipe on any tree of linears: where its blocks are, what the plan says is left out, steps that must be told."""

from __future__ import annotations

import copy
import pydoc
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from narrowgauge.precision import apply, available, load
from narrowgauge.precision.blocks import find_blocks
from narrowgauge.precision.coverage import CoverageWarning
from narrowgauge.precision.linear import QuantLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narrowgauge import precision

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}


def quantized_in(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, QuantLinear)]


def last_line(plan: precision.Plan) -> str:
    return str(plan).splitlines()[-1]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


def block(width: int = 32) -> nn.Module:
    return nn.ModuleDict({"up": nn.Linear(width, width), "down": nn.Linear(width, width)})


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def experts() -> nn.Module:
    """Eleven layers, so that the first number of a path has two digits, with lists of experts in them."""
    layer = lambda: nn.ModuleDict({"experts": nn.ModuleList([block() for _ in range(4)]), "gate": nn.Linear(32, 4)})  # noqa: E731
    return nn.ModuleDict({"layers": nn.ModuleList([layer() for _ in range(11)]), "head": nn.Linear(32, 8)})


def numbered() -> nn.Module:
    """Layers in a dictionary by number, as torchtitan keeps them."""
    return nn.ModuleDict({"layers": nn.ModuleDict({str(i): block() for i in range(3)}), "output": nn.Linear(32, 8)})


def parts() -> nn.Module:
    """Embedding, body and head one after another; the head is a list of linears."""
    head = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8))
    return nn.Sequential(nn.Embedding(64, 32), nn.Sequential(block(), block()), nn.LayerNorm(32), head)


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize(
    ("make", "stacks", "outside"),
    [
        (llama, {"model.layers": 3}, ["lm_head"]),
        (bert, {"bert.encoder.layer": 3}, ["cls.predictions.transform.dense", "cls.predictions.decoder"]),
        (t5, {"encoder.block": 3, "decoder.block": 3}, ["lm_head"]),
        (mixtral, {"model.layers": 3}, ["lm_head"]),
        (experts, {"layers": 11}, ["head"]),
        (numbered, {"layers": 3}, ["output"]),
        (parts, {"1": 2}, ["3.0", "3.2"]),
        (torch_encoder, {"layers": 2}, ["layers.0.self_attn.out_proj", "layers.1.self_attn.out_proj"]),
        (lambda: nn.Sequential(block(), block(), nn.Linear(32, 8)), {"": 2}, ["2"]),
        (lambda: nn.Sequential(parts()), {"0.1": 2}, ["0.3.0", "0.3.2"]),
        (mlp, {}, []),
        (lambda: nn.ModuleDict({"a": nn.Linear(32, 32), "b": block()}), {}, []),
    ],
    ids=[
        *("llama", "bert", "t5", "mixtral", "experts", "numbered", "parts", "torch_encoder"),
        *("sequential_with_head", "wrapped", "linears_alone", "bare"),
    ],
)
@pytest.mark.filterwarnings("ignore::narrowgauge.precision.coverage.CoverageWarning")
def test_blocks_are_found_by_structure(
    make: Callable[[], nn.Module], stacks: dict[str, int], outside: list[str]
) -> None:
    model = make()
    assert {stack: len(paths) for stack, paths in find_blocks(model).stacks.items()} == stacks
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    plan = apply("mxfp8", model)
    assert quantized_in(model) == [path for path in linears if path not in outside]
    assert ("blocks: none are found, so every linear counts as one" in str(plan)) is (not stacks)


def test_the_ends_are_those_of_every_stack() -> None:
    model = t5()
    apply("mxfp8", model, args={"keep_first": 1, "keep_last": 0.15})
    assert {path.rpartition(".layer.")[0] for path in quantized_in(model)} == {"encoder.block.1", "decoder.block.1"}
    many = experts()
    apply(load("mxfp8", {"keep_first": 2, "keep_last": 1}), many)
    left = {path.split(".")[1] for path in quantized_in(many)}
    assert left == {str(layer) for layer in range(2, 10)}
    alone = mlp()
    apply("nvfp4", alone)  # its last 0.15 of the blocks
    assert quantized_in(alone) == ["0", "2"]


def test_a_user_may_name_the_linears() -> None:
    model = bert()
    plan = apply("mxfp8", model, paths=[r".*\.query", "cls.*"], args={"keep_last": 1})
    query = [f"bert.encoder.layer.{layer}.attention.self.query" for layer in (0, 1)]
    assert quantized_in(model) == [*query, "cls.predictions.transform.dense", "cls.predictions.decoder"]
    assert "(not named by paths)" in last_line(plan)
    for paths, message in (
        (r".*\.qury", r"paths='.*qury' matches no Linear"),
        ("lm_haed", r"did you mean 'lm_head'"),
        ("(", "not a regular expression"),
    ):
        with pytest.raises(ValueError, match=message):
            apply("mxfp8", llama(), paths=paths)
    with pytest.raises(ValueError, match="this recipe chooses no linears of blocks"):
        apply("bf16", llama(), paths="lm_head")


@pytest.mark.parametrize(("make", "width"), [(mlp, 32), (bert, 0), (t5, 0)], ids=["linears", "bert", "t5"])
@pytest.mark.parametrize("recipe", ["nvfp4", "fp8_delayed"])
def test_any_tree_trains(make: Callable[[], nn.Module], width: int, recipe: str) -> None:
    torch.manual_seed(0)
    model = make()
    plan = apply(recipe, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(32).repeat(4, 1)
    x = torch.randn(64, width) if width else None
    losses = []
    for step in range(6):
        plan.begin_step(step, 4 * step)
        loss = (model(x) - x).square().mean() if x is not None else model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        plan.end_step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_the_plan_says_how_much_is_quantized() -> None:
    model = llama()
    in_blocks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    share = 100 * in_blocks / (in_blocks + 64 * 32)
    line = last_line(apply("mxfp8", model))
    assert line.startswith(
        f"quantized: {share:.1f}% of the FLOPs of matrix products with weights (fprop, dgrad, wgrad)"
    )
    assert f"not: lm_head {100 - share:.1f}% (outside the blocks)" in line
    assert "attention's score products have no weights and are not counted" in line
    tied = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True))
    assert last_line(apply("mxfp8", tied)) == line  # the table of a tied head multiplies once
    kept = last_line(apply("nvfp4", llama()))
    assert f"linears to keep {share / 3:.1f}% (last 0.15 of the blocks)" in kept
    half = apply("fp8_rowwise", mlp(), args={"wgrad_high_precision": True})
    assert half.coverage.share == pytest.approx(2 / 3)
    assert "wgrad of quantized linears 33.3% (in high precision by the recipe)" in last_line(half)
    assert last_line(apply("bf16", llama())) == "quantized: no matrix product with weights"


class Odd(nn.Module):
    """Matrices that no linear holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block()])
        self.mixing = nn.Parameter(torch.zeros(32, 32))
        self.positions = nn.Parameter(torch.zeros(1, 8, 32))  # added, not multiplied
        self.conv = nn.Conv2d(3, 32, 4)
        self.table, self.norm = nn.Embedding(64, 32), nn.LayerNorm([4, 32])


def test_what_is_no_linear_is_named() -> None:
    with pytest.warns(CoverageWarning, match="experts"):
        plan = apply("mxfp8", model := mixtral())
    line = last_line(plan)
    whole = sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "embed_tokens" not in name)
    quantized = sum(module.weight.numel() for module in model.modules() if isinstance(module, QuantLinear))
    gate_up = 3 * 4 * 128 * 32
    assert line.startswith(f"quantized: {100 * quantized / whole:.1f}% of the FLOPs")
    reason = "(3-D parameter of MixtralExperts, no nn.Linear)"
    assert f"model.layers.*.mlp.experts.gate_up_proj {100 * gate_up / whole:.1f}% {reason}" in line
    assert f"model.layers.*.mlp.experts.down_proj {50 * gate_up / whole:.1f}% {reason}" in line
    assert "experts count as if every one were used" in line
    with pytest.warns(CoverageWarning):
        odd = last_line(apply("mxfp8", Odd()))
    assert "conv.weight 33.3% (4-D parameter of Conv2d, no nn.Linear)" in odd
    assert "mixing 22.2% (2-D parameter of Odd, no nn.Linear)" in odd
    assert not any(name in odd for name in ("positions", "table", "norm"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoverageWarning)
        apply("nvfp4", llama())
        apply("mxfp8", mlp())
        apply("bf16", mixtral())


def test_torchs_own_layers_call_their_linears_in_evaluation_too() -> None:
    """Its attention reads its projections' weights and does not call them: they stay, by name."""
    torch.manual_seed(0)
    model = torch_encoder()
    with pytest.warns(CoverageWarning, match=r"in_proj_weight .* \(2-D parameter of MultiheadAttention"):
        plan = apply("mxfp4", model, args={"keep_last": 0})
    assert "layers.*.self_attn.out_proj 12.5% (read, not called, by nn.MultiheadAttention)" in last_line(plan)
    x, mask = torch.randn(2, 8, 32), torch.tensor([[False] * 8, [False] * 6 + [True] * 2])
    with torch.no_grad():
        trained = model.train()(x, src_key_padding_mask=mask)
        model.eval()
        assert torch.equal(model(x, src_key_padding_mask=mask)[mask.logical_not()], trained[mask.logical_not()])


def test_what_is_to_be_kept_may_be_in_high_precision_already() -> None:
    plan = apply("fp8_current", llama(), args={"keep_paths": ["lm_head", r"model\.layers\.0\..*"]})
    assert "to keep in high precision: path 'lm_head': lm_head is in high precision already" in str(plan)
    assert len(quantized_in(plan.model)) == 14
    with pytest.raises(ValueError, match=r"path 'lm_haed' matches no Linear \(did you mean 'lm_head'\?\)"):
        apply("fp8_current", llama(), args={"keep_paths": ["lm_haed"]})


def test_a_recipe_goes_into_a_model_once() -> None:
    model = llama()
    apply("mxfp8", model)
    with pytest.raises(ValueError, match=r"quantized already \(model.layers.0.self_attn.q_proj is a QuantLinear\)"):
        apply("nvfp4", model)
    with pytest.raises(ValueError, match="itself a Linear"):
        apply("mxfp8", nn.Linear(32, 32))
    with pytest.raises(ValueError, match="args are those of a recipe given by name"):
        apply(load("mxfp8"), llama(), args={"keep_last": 1})


@pytest.mark.parametrize("recipe", ["mxfp8", "smooth_swiglu"])
def test_a_recipe_that_fails_leaves_the_model_as_it_was(recipe: str) -> None:
    model = llama()
    before = list(model.modules())
    with pytest.raises(ValueError, match="scaled_mm"):
        apply(recipe, model, backend="scaled_mm")
    assert list(model.modules()) == before
    assert not any("forward" in vars(module) for module in before)
    assert len(quantized_in(apply(recipe, model).model)) == 21


def test_the_package_shows_what_there_is() -> None:
    assert load("nvfp4").schedule == load("nvfp4", {}).schedule
    assert {"bf16", "mxfp8", "nvfp4"} <= set(available())
    shown = pydoc.render_doc(precision, renderer=pydoc.plaintext)
    assert all(f"\n    {name}(" in shown for name in ("apply", "load", "available"))
    assert "class PrecisionCallback" in shown
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        precision.aply  # noqa: B018
    load_it = "import sys; from narrowgauge import precision"
    code = f"{load_it}; assert 'transformers' not in sys.modules; precision.PrecisionCallback"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# Steps that must be told.


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    y: Tensor = model(torch.ones(4, 32))
    y.sum().backward()
    if optimizer is not None:
        optimizer.step()
    return y


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp4", "fp8_delayed"])
def test_training_passes_without_a_step_are_an_error(recipe: str) -> None:
    model = mlp()
    plan = apply(recipe, model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step(model, optimizer)
    with pytest.raises(RuntimeError, match=r"plan\.begin_step\(.*PrecisionCallback"):
        step(model)
    for number in range(2):  # as often as it pleases within a step
        plan.begin_step(number, 0)
        step(model)
        step(model, optimizer if number else None)
    with pytest.raises(RuntimeError, match=r"of a new step .*plan\.begin_step"):
        step(model)
    plan.begin_micro(4)
    step(model)


def test_what_is_no_training_needs_no_step() -> None:
    model = mlp()
    apply("nvfp4", model)
    for _ in range(3):
        with torch.no_grad():
            model(torch.ones(4, 32))
        model.eval()(torch.ones(4, 32))
        model.train()
    for recipe in ("mxfp8", "bf16", "fp8_current"):  # nothing of these goes by the step
        model = mlp()
        apply(recipe, model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            step(model, optimizer)


def test_a_schedule_needs_steps() -> None:
    model = mlp()
    apply(load("mxfp8", {}, [{"steps": [0, 2]}]), model)
    step(model)
    with pytest.raises(RuntimeError, match="the schedule would stand still"):
        step(model)


def test_steps_go_with_recomputing_frozen_weights_and_copies() -> None:
    model = mlp()
    plan = apply("nvfp4", model)
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    plan.begin_step(0, 0)
    checkpoint(model, torch.ones(4, 32), use_reentrant=False).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="begin_step"):
        step(model)
    copied = copy.deepcopy(plan)
    copied.begin_step(1, 0)
    step(copied.model)
    with pytest.raises(RuntimeError, match="begin_step"):  # the other one has not begun it
        step(model)


def test_a_compiled_model_is_not_broken_by_it() -> None:
    seen: list[Any] = []

    def counted(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    model = mlp()
    plan = apply("nvfp4", model)
    compiled = torch.compile(model, backend=counted, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan.begin_step(0, 0)
    step(compiled, optimizer)
    step(compiled, optimizer)
    assert len(seen) == 1
