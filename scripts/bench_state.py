"""Bytes a parameter of every tensor alive just before the optimizer step, by kind, on the ranks that train:
torchrun --nproc-per-node 2 scripts/bench_state.py [moments=fp32,fp8,...] [key=value ...]

Runs one training step of the trainer for each choice of `optim.moments` (`recipe` for the recipe's own), on random
tokens, and stops before the update: every tensor that Python can reach is counted once by its storage, on all ranks,
over the parameters of the model. `gathered`: weights that exist only while FSDP keeps them gathered, in the compute
dtype: none by then, since backward frees each block's and the head's. `others`: what is none of these (tokens, masks,
rotary tables, what a precision recipe remembers).
"""

import gc
import json

import torch
from narrowgauge.trainer import distributed
from narrowgauge.trainer.build import build_state, num_parameters, resolve_model, sequence_bytes
from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.costs import micro_batch_size
from narrowgauge.trainer.data.batches import Batch
from narrowgauge.trainer.distributed import World, say
from narrowgauge.trainer.errors import UserError
from narrowgauge.trainer.state import TrainState, local
from narrowgauge.trainer.step import update_from
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

MOMENTS = "fp32,bf16,fp8,fp8_tensor,fp8_fishman,fp8_lm,dynamic8,coat,pure_bf16,pure_bf16_sr,pure_bf16_kahan"
KINDS = ("weights", "master", "grads", "m", "v", "scales", "gathered", "others")
VOCABULARY = 4096


def main(overrides: list[str], *, moments: str = MOMENTS, as_json: int = 0) -> None:
    names = moments.split(",")
    configs = [load_config([*overrides, *([] if name == "recipe" else [f"optim.moments={name}"])]) for name in names]
    world = distributed.start(configs[0].parallel)
    try:
        if not as_json and world.is_main:
            say(f"{'moments':18}" + "".join(f"{kind:>10}" for kind in KINDS) + f"{'m+v+scales':>12}")
        for name, config in zip(names, configs, strict=True):
            sizes = measured(config, world)
            states = sum(sizes[kind] for kind in ("m", "v", "scales"))
            if world.is_main and as_json:
                say(json.dumps({"moments": name, **sizes}))
            elif world.is_main:
                say(f"{name:18}" + "".join(f"{sizes[kind]:10.3f}" for kind in KINDS) + f"{states:12.3f}")
    finally:
        distributed.finish()


def measured(config: object, world: World) -> dict[str, float]:
    """Bytes a parameter by kind, of one step under ``config``."""
    gc.collect()
    before = {tensor.untyped_storage().data_ptr() for tensor in _tensors()}  # of earlier runs, and of modules
    model_config = resolve_model(config.model, VOCABULARY, config.data.seq_len)
    precision = config.values.precision
    size = sequence_bytes(model_config, config.parallel, world.device, config.data.seq_len, torch.float32)
    micro = micro_batch_size(config.values.micro_batch, config.data.global_batch_size, size, world)
    state = build_state(
        model_config, precision, config.parallel, config.optim, world, seed=config.seed,
        tokens=micro * config.data.seq_len,
    )  # fmt: skip
    sizes: dict[str, float] = {}

    def count(optimizer: Optimizer, *_: object) -> None:
        sizes.update(_count(state, before))
        raise _Enough

    state.optimizer.register_step_pre_hook(count)
    try:
        update_from(state, _Random(micro, config.data.seq_len, world), world, config.optim, 0, config.train.steps)
    except _Enough:
        pass
    else:
        raise UserError("the step was skipped: its gradients are not finite")
    total = num_parameters(state.model)
    return {kind: size / total for kind, size in zip(KINDS, world.sum(*(sizes[k] for k in KINDS)), strict=True)}


class _Enough(Exception):
    pass


class _Random:
    """Two micro-batches of random tokens."""

    num_micro = 2

    def __init__(self, size: int, seq_len: int, world: World) -> None:
        self._shape, self._rank = (size, seq_len + 1), world.rank

    def first_sample(self, step: int) -> int:
        return 0

    def batch(self, step: int, micro: int) -> Batch:
        generator = torch.Generator().manual_seed(2 * self._rank + micro)
        tokens = torch.randint(VOCABULARY, self._shape, generator=generator)
        weights = torch.ones(self._shape[0], self._shape[1] - 1)
        return Batch(tokens, weights, first_sample=(2 * self._rank + micro) * self._shape[0])


def _tensors() -> list[Tensor]:
    """All that Python holds, as what lies on this rank."""
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]  # asks no proxy
    return [t for t in map(local, found) if not t.is_meta and t.layout == torch.strided]


def _count(state: TrainState, before: set[int]) -> dict[str, float]:
    kinds: dict[int, str] = {}

    def mark(tensor: Tensor, kind: str) -> None:
        kinds.setdefault(local(tensor).untyped_storage().data_ptr(), kind)

    for parameter in state.model.parameters():
        mark(parameter.detach(), "weights")
        if parameter.grad is not None:
            mark(parameter.grad, "grads")
        for key, value in state.optimizer.state[parameter].items():
            if key == "step":
                mark(value, "others")
            elif key.endswith(("_scales", "_powers")):
                mark(value, "scales")
            else:
                mark(value, {"exp_avg": "m", "exp_avg_sq": "v"}.get(key.removesuffix("_codes"), "master"))
    for module in state.model.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
            for part in group.fsdp_params:
                for gathered in (*part.all_gather_outputs, *getattr(part, "_unsharded_inner_tensors", ())):
                    mark(gathered, "gathered")
                if hasattr(part, "_unsharded_param"):
                    mark(part._unsharded_param, "gathered")
    sizes = dict.fromkeys(KINDS, 0.0)
    seen: set[int] = set()
    for tensor in _tensors():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and storage.data_ptr() not in before:
            seen.add(storage.data_ptr())
            sizes[kinds.get(storage.data_ptr(), "others")] += storage.nbytes()
    return sizes


if __name__ == "__main__":
    script_main(main, __doc__)
