"""Bytes alive between forward and backward, by recipe: python scripts/bench_memory.py [recipes=...] [key=value ...]

[recipes=bf16,fp8_delayed,fp8_current,mxfp8,mxfp4,nvfp4] [batch=4 sequences]; overrides as for training: model=...
data.seq_len=...

Runs the forward pass of the whole model on random tokens and counts every storage that the graph holds for backward
once, parameters aside: what quantized linears keep (codes and scales of their inputs), and everything else (attention,
norms, SwiGLU, loss), which no recipe here narrows. What both keep (a plain o_proj reads attention's output) counts
among the rest. Beside it the arithmetic: tokens x inputs x bits / 8 of every tensor that a linear reads; siblings (q,
k, v; gate, up) count once.
"""

from contextlib import AbstractContextManager

import torch
from narrowgauge.models import create
from narrowgauge.precision.apply import apply
from narrowgauge.precision.linear import QuantLinear
from narrowgauge.precision.loading import load
from narrowgauge.precision.spec import LinearSpec
from narrowgauge.trainer.build import resolve_model
from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.errors import UserError
from torch import Tensor

RECIPES = "bf16,fp8_delayed,fp8_current,mxfp8,mxfp4,nvfp4"
VOCABULARY = 4096
SIBLINGS = {"k_proj", "v_proj", "up_proj"}  # read what q_proj and gate_proj read (GPT's up_proj reads alone)


class Kept:
    """Counts what autograd is asked to keep, by whether a quantized linear asks."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._storages: dict[int, tuple[int, bool]] = {}
        self._inside = False
        for module in model.modules():
            if isinstance(module, QuantLinear) or type(module) is torch.nn.Linear:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, module: torch.nn.Module, args: object) -> None:
        self._inside = True

    def _leave(self, module: torch.nn.Module, args: object, output: object) -> None:
        self._inside = False

    def counting(self) -> AbstractContextManager[None]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._storages.setdefault(storage.data_ptr(), (storage.nbytes(), self._inside))
        return tensor

    def bytes(self) -> tuple[int, int]:
        """Kept by linears, and by the rest."""
        linears = sum(size for size, inside in self._storages.values() if inside)
        return linears, sum(size for size, _ in self._storages.values()) - linears


def bits_of(spec: LinearSpec) -> float:
    """Bits an element that wgrad's copy of x takes, scales included; 16 where it is left alone."""
    kept = spec.wgrad.b
    if kept is None:
        return 16
    tile, stored = kept.tile, kept.scale.format
    shared = max(1, tile.outer) * max(1, tile.inner) if tile.inner > 0 else float("inf")
    return kept.format.bits + (32 if stored is None else stored.bits) / shared


def main(overrides: list[str], *, recipes: str = RECIPES, batch: int = 4) -> None:
    if any(override.startswith("precision=") for override in overrides):
        raise UserError("name the recipes with recipes=...")
    print(f"{'recipe':14} {'linears, MB':>12} {'arithmetic':>11} {'the rest, MB':>13} {'all, MB':>9}")
    for name in recipes.split(","):
        config = load_config([*overrides, f"precision={name}"])
        # Without sharding: parameters are known by their storage, and activations are the same.
        model = create(resolve_model(config.model, VOCABULARY, config.data.seq_len))
        recipe = load(config.precision.recipe, config.precision.args)
        model.to(recipe.dtypes.compute)
        apply(recipe, model, tokens=batch * config.data.seq_len).begin_step(0, 0)
        tokens = torch.randint(VOCABULARY, (batch, config.data.seq_len + 1))
        kept = Kept(model)
        with kept.counting():
            losses = model(tokens[:, :-1], tokens[:, 1:])
        linears, rest = kept.bytes()
        print(
            f"{name:14} {linears / 1e6:12.2f} {_arithmetic(model, batch * config.data.seq_len) / 1e6:11.2f} "
            f"{rest / 1e6:13.2f} {(linears + rest) / 1e6:9.2f}"
        )
        del losses


def _arithmetic(model: torch.nn.Module, tokens: int) -> float:
    total = 0.0
    gated = any(name.endswith("gate_proj") for name, _ in model.named_modules())
    for path, module in model.named_modules():
        child = path.rpartition(".")[2]
        if child in SIBLINGS and not (child == "up_proj" and not gated):
            continue
        if isinstance(module, QuantLinear):
            total += tokens * module.in_features * bits_of(module.spec) / 8
        elif type(module) is torch.nn.Linear:
            total += tokens * module.in_features * 2
    return total


if __name__ == "__main__":
    script_main(main, __doc__)
