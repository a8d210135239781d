"""What others make of the same step: `transformers`, and torchao's linears in our model."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from narrowgauge.trainer.distributed import World
from torch import Tensor, nn

from gpu_suite.results import UNPROVED
from gpu_suite.steps import (
    PEAK_FLOPS,
    RandomTokens,
    Row,
    compiled,
    cuda,
    device,
    flops,
    forget,
    measured,
    shape_of,
    synchronize,
)


def torchao_row(what: str, recipe: str, size: str, world: World, divide: int) -> Row:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # a peer, carried along

    def convert(model: nn.Module) -> None:
        config = Float8LinearConfig.from_recipe_name(recipe)
        # Without FP8 instructions torchao emulates: for the toy's sake alone.
        convert_to_float8_training(model.layers, config=config if cuda() else replace(config, emulate=True))

    row = measured(what, size, world, ["precision=bf16", *compiled()], convert=convert, divide=divide)
    return {key: v for key, v in row.items() if key != "native"} | ({} if cuda() else {"": f"compiled {UNPROVED}"})


def transformers_row(size: str, compiled_: bool, divide: int) -> Row:
    """AdamW, fused, over float32 weights under BF16 autocast: what our BF16 keeps and computes."""
    import transformers  # a peer; every other stage starts seconds earlier without it

    ours, sequences, positions = shape_of(size)
    sequences = max(1, sequences // divide)
    here, tokens = device(), sequences * positions
    forget()
    config = transformers.LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with here:
        model = transformers.LlamaForCausalLM(config).float().train()
    call = torch.compile(model) if compiled_ and cuda() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = RandomTokens(sequences, positions, ours.vocab_size or 0).batch(0, 0).tokens[:, :-1].to(here)
    losses: list[Tensor] = []

    def some(count: int) -> None:
        for _ in range(count):
            with torch.autocast(here.type, torch.bfloat16):
                loss = call(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        synchronize()

    some(3 if cuda() else 1)
    count = 6 if cuda() else 2
    begun = time.perf_counter()
    some(count)
    mean = (time.perf_counter() - begun) / count
    return {
        "what": f"transformers {'compiled' if compiled_ else 'eager'}",
        "tok/s": round(tokens / mean),
        "ms": 1e3 * mean,
        "MFU%": round(100 * flops(ours, tokens, positions) / mean / PEAK_FLOPS, 1),
        "GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda() else 0.0,
        "loss": f"{float(losses[0]):.3f}>{float(losses[-1]):.3f}",
        **({"batch": sequences} if divide > 1 else {}),
        **({"": f"compiled {UNPROVED}"} if compiled_ and not cuda() else {}),
    }
