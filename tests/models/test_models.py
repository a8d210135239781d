"""Shapes, published parameter counts, and `transformers` as the oracle of every layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import narrowgauge.models as package
import pytest
import torch
import transformers
from narrowgauge.models import GPT, GPTConfig, Llama, LlamaConfig, RopeScaling, architectures, create
from narrowgauge.models.hf import Piece, to_hf_tensors
from narrowgauge.models.kernels.attention import Rope
from narrowgauge.models.layers import (
    BLOCK_ATTENTION_MAX_POSITIONS,
    CausalAttention,
    Extras,
    Init,
    Losses,
    Places,
    causal_attention,
)
from narrowgauge.models.llama import rope_table
from narrowgauge.trainer.config import groups, load_config
from torch import Tensor, nn

PUBLISHED = [
    ("llama_tiny", 4096, 5_868_800),
    ("llama_15m", 32000, 15_191_712),
    ("llama_60m", 32000, 58_073_600),
    ("llama_130m", 32000, 134_105_856),
    ("llama_350m", 32000, 367_969_280),
    ("llama_1b", 32000, 1_339_082_752),
    ("llama_7b", 32000, 6_738_415_616),
    ("llama3_8b", 128256, 8_030_261_248),
    ("llama3_8b_4blocks", 128256, 1_923_125_248),
    ("llama3_1b", 128256, 1_235_814_400),
    ("llama3_70b", 128256, 70_553_706_496),
    ("gpt2_tiny", 4096, 6_049_792),
    ("gpt2_124m", 50257, 124_439_808),
    ("gpt2_355m", 50257, 354_823_168),
    ("gpt2_774m", 50257, 774_030_080),
    ("gpt2_1558m", 50257, 1_557_611_200),
]


@pytest.mark.parametrize(("name", "vocab_size", "expected"), PUBLISHED)
def test_parameter_counts(name: str, vocab_size: int, expected: int) -> None:
    config = load_config([f"model={name}", f"model.vocab_size={vocab_size}", "data.seq_len=256"]).model
    with torch.device("meta"):
        model = create(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert {type(m) for m in model.modules() if "proj" in str(type(m)) or isinstance(m, nn.Linear)} == {nn.Linear}


def test_every_model_config_has_its_count_tested() -> None:
    assert sorted(groups()["model"]) == sorted(name for name, *_ in PUBLISHED)


SHAPE = {"hidden_size": 48, "intermediate_size": 80, "num_layers": 2, "num_heads": 6}


def llama(**changes: object) -> Llama:
    shape = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 2,
        "num_heads": 6,
        "num_kv_heads": 2,
        "vocab_size": 101,
    }
    return set_randomly(Llama(LlamaConfig(name="t", **(shape | changes))))  # type: ignore[arg-type]


def gpt() -> GPT:
    shape = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 2,
        "num_heads": 6,
        "vocab_size": 101,
        "max_seq_len": 40,
    }
    return set_randomly(GPT(GPTConfig(name="t", **shape)))  # type: ignore[arg-type]


def set_randomly(model):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [None, RopeScaling(factor=4.0, original_max_seq_len=16)])
@pytest.mark.parametrize("head_dim", [None, 10])
def test_llama_gives_the_logits_of_transformers(tied: bool, scaling: RopeScaling | None, head_dim: int | None) -> None:
    model = llama(tie_embeddings=tied, rope_scaling=scaling, head_dim=head_dim)
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, head_dim=head_dim, rms_norm_eps=1e-5, tie_word_embeddings=tied,
            rope_parameters=rope, max_position_embeddings=64,
        )
    )  # fmt: skip
    state = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in model.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    tokens = torch.randint(101, (3, 37), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """GPT-2's Conv1D keeps its weight as [in, out]."""
    return x.T if x.ndim == 2 else x


def test_gpt_gives_the_logits_of_transformers() -> None:
    model = gpt()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=101, n_positions=40, n_embd=48, n_layer=2, n_head=6, n_inner=80, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ).eval()  # fmt: skip
    names = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj",
             "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}  # fmt: skip
    own = model.state_dict()
    state = {"transformer.wte.weight": own["embed_tokens.weight"], "lm_head.weight": own["embed_tokens.weight"],
             "transformer.wpe.weight": own["embed_positions.weight"]}  # fmt: skip
    for kind in ("weight", "bias"):
        state[f"transformer.ln_f.{kind}"] = own[f"norm.{kind}"]
        for layer in range(2):
            here, there = f"layers.{layer}", f"transformer.h.{layer}"
            qkv = torch.cat([own[f"{here}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
            state[f"{there}.attn.c_attn.{kind}"] = transposed(qkv)
            for ours, name in names.items():
                state[f"{there}.{name}.{kind}"] = transposed(own[f"{here}.{ours}.{kind}"])
    theirs.load_state_dict(state, strict=True)
    tokens = torch.randint(101, (3, 37), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [llama, gpt])
def test_losses_are_the_cross_entropy_of_the_logits(make: object) -> None:
    model = make()  # type: ignore[operator]
    tokens = torch.randint(101, (2, 20))
    losses = model(tokens[:, :-1], tokens[:, 1:])
    expected = -model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(losses, expected)
    assert losses.shape == (2, 19)
    assert losses.dtype == torch.float32


@pytest.mark.parametrize("make", [llama, gpt])
def test_recompute_changes_no_gradient(make: object) -> None:
    tokens = torch.randint(101, (2, 20), generator=torch.Generator().manual_seed(1))
    gradients = []
    for recompute in (False, True):
        model = make()  # type: ignore[operator]
        for layer in model.layers:
            layer.recompute = recompute
        model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("num_positions", [1, 7, 128, 129, 300, BLOCK_ATTENTION_MAX_POSITIONS + 1])
@pytest.mark.parametrize(("heads", "kv_heads", "v_width"), [(4, 4, 8), (6, 2, 8), (4, 2, 5), (2, 2, 12)])
def test_attention_and_its_gradient_in_fp64(num_positions: int, heads: int, kv_heads: int, v_width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, num_positions, heads, 8), (2, num_positions, kv_heads, 8), (2, num_positions, kv_heads, v_width)]
    q, k, v = (torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes)
    dy = torch.randn((2, num_positions, heads, v_width), dtype=torch.float64, generator=generator)
    ours = causal_attention(q, k, v)
    oracle = torch_attention(q, k, v)
    torch.testing.assert_close(ours, oracle)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (q, k, v), dy), torch.autograd.grad(oracle, (q, k, v), dy), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_places_in_rotation_and_starts_of_documents_are_apart() -> None:
    """Also where no kernel takes heads of these widths: BF16 falls to what takes them."""
    generator = torch.Generator().manual_seed(0)
    widths = (8, 8, 6)
    q, k, v = (torch.randn(1, 20, 2, width, dtype=torch.float64, generator=generator) for width in widths)
    angles = torch.outer(torch.arange(20.0, dtype=torch.float64), torch.tensor([1.0, 0.3, 0.1, 0.01]))
    rope = Rope(angles.cos(), angles.sin())
    starts = torch.cat((torch.zeros(9), torch.full((11,), 9))).long()[None]
    apart = causal_attention(q, k, v, rope, Places(None, starts))  # rotated by their places in the row
    alone = [causal_attention(*(x[:, part] for x in (q, k, v)), rope) for part in (slice(0, 9), slice(9, 20))]
    torch.testing.assert_close(apart, torch.cat(alone, 1))  # rotation is relative
    shifted = causal_attention(q, k, v, rope, Places(torch.arange(20)[None] // 2, starts))
    assert (shifted - apart).abs().max() > 0.01
    narrow = CausalAttention()(*(x.bfloat16() for x in (q, k, v)), rope, Places(None, starts))
    assert narrow.shape == (1, 20, 2, 6)
    assert (narrow.double() - apart).norm() < 0.02 * apart.norm()


def test_bf16_attention_is_as_near_to_fp64_as_torch_is() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 256, 4, 32, generator=generator).bfloat16() for _ in range(3))
    exact = causal_attention(q.double(), k.double(), v.double())
    ours = (causal_attention(q, k, v).double() - exact).norm() / exact.norm()
    theirs = (torch_attention(q, k, v).double() - exact).norm() / exact.norm()
    assert ours < 3 * theirs  # scores are rounded to BF16 before the softmax, as in eager attention


def test_init_depends_on_seed_and_name_alone() -> None:
    draw = Init(0.0, 0.02).draw
    shape = torch.Size((64, 48))
    first = draw(1, "layers.0.mlp.up_proj.weight", shape)
    assert torch.equal(first, draw(1, "layers.0.mlp.up_proj.weight", shape))
    assert not torch.equal(first, draw(2, "layers.0.mlp.up_proj.weight", shape))
    assert not torch.equal(first, draw(1, "layers.1.mlp.up_proj.weight", shape))
    assert abs(float(first.std()) - 0.02) < 0.001
    assert float(Init(1.0, 0.0).draw(0, "norm.weight", torch.Size((8,))).sum()) == 8


def test_init_scales_residual_outputs_and_leaves_norms_at_one() -> None:
    model = llama()
    assert model.init_of("layers.0.self_attn.q_proj.weight") == Init(0.0, 0.02)
    assert model.init_of("layers.1.mlp.down_proj.weight") == Init(0.0, 0.01)  # 1/sqrt(2 * 2 layers)
    assert model.init_of("norm.weight") == Init(1.0, 0.0)
    assert gpt().init_of("layers.0.input_layernorm.bias") == Init(0.0, 0.0)


def test_rope_turns_by_relative_position() -> None:
    config = llama().config
    cos, sin = rope_table(config, 50, torch.device("cpu"))
    assert cos.shape == (50, config.head_size // 2)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt])
def test_a_document_in_a_row_is_as_if_alone(make: Callable[[], Llama | GPT], dtype: torch.dtype) -> None:
    """With positions that start anew, the logits are those of the documents apart."""
    model = make().to(dtype)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(40, (2, 1, 13), generator=generator)
    row, positions = torch.cat((first, second), 1), torch.arange(13).repeat(2)[None]
    together = model(row, positions_BT=positions)
    apart = torch.cat((model(first), model(second)), 1)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    torch.testing.assert_close(together, apart, **tolerance)
    assert not torch.allclose(together[:, 13:], model(row)[:, 13:], rtol=0.02, atol=0.001)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_heads": 5}, "num_heads=5"),
        ({"num_kv_heads": 4}, "num_kv_heads=4"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"num_layers": 0}, "num_layers=0"),
    ],
)
def test_impossible_llamas_are_refused(change: dict[str, int], word: str) -> None:
    shape = SHAPE | {"num_kv_heads": 2}
    with pytest.raises(ValueError, match=word):
        LlamaConfig(name="t", **(shape | change)).validate()


@pytest.mark.parametrize(("change", "word"), [({"num_heads": 5}, "num_heads=5"), ({"max_seq_len": 0}, "max_seq_len=0")])
def test_impossible_gpts_are_refused(change: dict[str, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        GPTConfig(name="t", **(SHAPE | change)).validate()


class Choosy(nn.Module):
    """A dense MLP that says how even its first features are, and counts those that are large."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.register_buffer("bias", torch.ones(4))

    def forward(self, x_BTC: Tensor, counts: dict[str, Tensor] | None = None) -> tuple[Tensor, Extras]:
        p_BTE = (x_BTC[..., :4].float() + self.bias).softmax(-1)
        f_E = torch.ones(4) if counts is None else counts["large"].float()
        large_E = (p_BTE.detach() > 0.25).sum((0, 1))
        return self.mlp(x_BTC) * p_BTE[..., :1], Extras({"even": p_BTE @ f_E}, {"large": large_E})


class ChoosyLlama(Llama):
    def make_mlp(self, number: int) -> nn.Module:
        mlp = super().make_mlp(number)
        return mlp if number == 0 else Choosy(mlp)


def choosy() -> Any:
    shape = SHAPE | {"num_layers": 3, "num_kv_heads": 2, "vocab_size": 50}
    return set_randomly(ChoosyLlama(LlamaConfig(name="t", **shape)))  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_hand_out_losses_and_counts_compiled_and_computed_again(recompute: bool) -> None:
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for compiles in (False, True):
        model = choosy()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for block in model.layers:
            block.recompute = recompute and compiles
            if compiles:
                block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
        counts = model(tokens, counting=True)
        out = model(tokens, tokens, counts=counts)
        assert isinstance(out, Losses)
        (out.losses_BT + out.aux["even"]).sum().backward()
        results.append((out, counts, [parameter.grad for parameter in model.parameters()]))
        assert not torch._dynamo.utils.counters["graph_break"]
    (plain, counts, gradients), (ours, own_counts, own_gradients) = results
    assert counts.keys() == plain.counts.keys() == {"layers.1.large", "layers.2.large"}
    for name, count in counts.items():
        assert 0 < count.sum() <= 2 * 9 * 4
        assert torch.equal(count, plain.counts[name])
        assert torch.equal(count, own_counts[name])
        assert torch.equal(count, ours.counts[name])
    assert plain.aux["even"].shape == (2, 9)  # of both layers
    torch.testing.assert_close(plain.aux["even"], ours.aux["even"])
    for one, other in zip(gradients, own_gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_buffers_start_at_zero_or_as_their_module_says() -> None:
    model = choosy()
    model.reset_state()
    assert torch.equal(model.layers[1].mlp.bias, torch.zeros(4))
    model.layers[1].mlp.reset_state = lambda: None
    model.layers[1].mlp.bias.fill_(3)
    model.reset_state()
    assert float(model.layers[1].mlp.bias.sum()) == 12
    model.layers[2].mlp.register_buffer("table", torch.ones(2), persistent=False)
    with pytest.raises(ValueError, match=r"the buffer layers\.2\.mlp\.table is not persistent, and Choosy has"):
        model.reset_state()


def test_a_file_of_the_folder_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from .llama import LlamaConfig\n\nclass Mine(LlamaConfig):\n    arch: str = 'mine'\n"
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "none.py").write_text("from .llama import LlamaConfig\n")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    architectures.cache_clear()
    try:
        assert list(architectures()) == ["gpt", "llama", "mine"]
        assert architectures()["mine"].__name__ == "Mine"
    finally:
        architectures.cache_clear()


def test_experts_are_one_parameter_here_and_many_there() -> None:
    class Mixed(LlamaConfig):
        hf_type = "mixed"

        def piece_of(self, name: str) -> Piece:
            return Piece("experts.{}.w1.weight", transposed=True, experts=3)

    config = Mixed(name="t", **SHAPE | {"num_kv_heads": 2})  # type: ignore[arg-type]
    ours = torch.randn(3, 5, 4)
    theirs = to_hf_tensors(config, {"mlp.gate_proj.weight": ours})
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == {
        f"experts.{expert}.w1.weight": (4, 5) for expert in range(3)
    }
    assert torch.equal(config.piece_of("mlp.gate_proj.weight").read(theirs.__getitem__), ours)
