"""State dicts and configs both ways, against `transformers` itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from narrowgauge.models import create
from narrowgauge.models.hf import from_hf_config, piece_of, to_hf_config, to_hf_tensors

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def llama(**changes: Any) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        **(
            {
                "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
                "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
            } | changes
        )
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2(**changes: Any) -> transformers.PreTrainedModel:
    shape = {"vocab_size": 101, "n_positions": 40, "n_embd": 48, "n_layer": 2, "n_head": 6}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(shape | changes)))


MODELS = [
    (llama, {}),
    (llama, {"tie_word_embeddings": True}),
    (llama, {"num_key_value_heads": 6, "head_dim": 10, "rms_norm_eps": 1e-5}),
    (llama, {"rope_parameters": LLAMA3}),
    (gpt2, {}),
    (gpt2, {"n_inner": 100}),
    (gpt2, {"tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("make", "changes"), MODELS)
def test_there_and_back(make: Any, changes: dict[str, Any]) -> None:
    theirs = make(**changes).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too
            parameter.normal_(0.1, 0.3)
    config = from_hf_config(theirs.config.to_dict(), "x")
    ours = create(config)
    pieces = {name: piece_of(config, name) for name, _ in ours.named_parameters()}
    tensors = theirs.state_dict()
    ours.load_state_dict({name: piece.cut(tensors[piece.name]) for name, piece in pieces.items()}, strict=False)
    tokens = torch.randint(101, (2, 37), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)

    again_config = type(theirs.config)(**to_hf_config(config, 0))
    again = type(theirs)(again_config).eval()
    missing, unexpected = again.load_state_dict(to_hf_tensors(config, dict(ours.named_parameters())), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    again.tie_weights()
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    assert from_hf_config(again_config.to_dict(), "x") == config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "rnn"}, "model_type 'rnn' is not built here; there are: gpt2, llama"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias=True"),
        ({"model_type": "llama", "rope_scaling": {"type": "yarn"}}, "rotary scaling 'yarn'"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"model_type": "gpt2", "activation_function": "relu"}, "activation_function='relu'"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention=True"),
    ],
)
def test_what_is_not_built_here_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_hf_config(config, "x")


def test_releases_before_5_name_the_rotary_base_elsewhere() -> None:
    old = llama().config.to_dict()
    del old["rope_parameters"]
    assert from_hf_config(old | {"rope_theta": 123.0}, "x").rope_theta == 123.0


def test_releases_before_5_find_stretched_positions_too() -> None:
    config = from_hf_config(llama(rope_parameters=LLAMA3).config.to_dict(), "x")
    theirs = to_hf_config(config, 0)
    assert theirs["rope_scaling"] | {"rope_theta": theirs["rope_theta"]} == theirs["rope_parameters"] == LLAMA3
    for newer_or_older in ("rope_scaling", "rope_parameters"):
        assert from_hf_config({k: v for k, v in theirs.items() if k != newer_or_older}, "x") == config
    assert "rope_scaling" not in to_hf_config(from_hf_config(llama().config.to_dict(), "x"), 0)


def test_the_length_trained_at_ends_rotary_positions_but_not_learned_ones() -> None:
    for make, key, length in ((llama, "max_position_embeddings", 16), (gpt2, "n_positions", 40)):
        assert to_hf_config(from_hf_config(make().config.to_dict(), "x"), 0, 16)[key] == length
