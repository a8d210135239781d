"""Two steps and a validation of each case, without and with gathered codes, in one group of processes.

torchrun gather.py IN.json OUT.json: name -> overrides; what was sent, whether all that came of it is the same, bit
for bit, on every rank, and how many first gathers held the codes and scales of the whole weight.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from narrowgauge.precision.linear import QuantLinear
from narrowgauge.precision.quantize import Quantized, quantize
from narrowgauge.precision.scaling import Unit
from narrowgauge.precision.spec import OperandSpec
from narrowgauge.trainer import distributed
from narrowgauge.trainer.build import build_state, resolve_model
from narrowgauge.trainer.config import TrainConfig, load_config
from narrowgauge.trainer.data.batches import Batch
from narrowgauge.trainer.distributed import World
from narrowgauge.trainer.loop import validate
from narrowgauge.trainer.state import local
from narrowgauge.trainer.step import update_from
from narrowgauge.trainer.stop import StopRequest

counts: Counter[str] = Counter()


class Drawn:
    """Two micro-batches of two samples on each rank."""

    num_micro = 2

    def __init__(self, world: World) -> None:
        self.world = world

    def first_sample(self, step: int) -> int:
        return (step * self.world.size + self.world.rank) * 4

    def batch(self, step: int, micro: int) -> Batch:
        first = self.first_sample(step) + 2 * micro
        tokens = torch.randint(0, 257, (2, 17), generator=torch.Generator().manual_seed(first))
        return Batch(tokens, torch.ones(2, 16), first)


def counting(function: Any, count: Any) -> Any:
    def counted(*arguments: Any, **more: Any) -> Any:
        count(*arguments, **more)
        return function(*arguments, **more)

    return counted


def gathered(output_tensor: torch.Tensor, input_tensor: torch.Tensor, *rest: Any, **more: Any) -> None:
    counts["gathers"] += 1
    counts["bytes"] += input_tensor.numel() * input_tensor.element_size()


def reduced(tensor: torch.Tensor, *rest: Any, **more: Any) -> None:
    counts["amax reductions"] += int(tensor.dtype == torch.int32)


def watch(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Count, of every weight's first gather, whether its codes and scales are those of the whole weight."""

    def compare(linear: QuantLinear, whole: Quantized) -> None:
        if linear.gathered is None:
            return
        values = OperandSpec(format=whole.spec.format, scale=Unit())
        codes = quantize(linear.weight, values).codes
        pairs = [(codes, whole.codes), (linear.gathered.scales, whole.scales)]
        if whole.tensor_scale is not None:
            assert linear.gathered.tensor_scale is not None
            pairs.append((linear.gathered.tensor_scale, whole.tensor_scale))
        counts["whole" if all(torch.equal(*pair) for pair in pairs) else "other"] += 1
        handles[linear].remove()

    handles = {}
    for linear in model.modules():
        if isinstance(linear, QuantLinear) and linear.delayed is None:
            spec = linear.spec.fprop.b
            assert spec is not None
            weight = linear.weight.full_tensor().to(dtype)  # type: ignore[attr-defined]
            whole = quantize(weight, spec)
            handles[linear] = linear.register_forward_pre_hook(lambda module, _, whole=whole: compare(module, whole))


def trained(config: TrainConfig, world: World) -> tuple[list[float], dict[str, torch.Tensor], str]:
    """Losses and gradient norms, the state, and the plan."""
    model = resolve_model(config.model, 257, 16)
    state = build_state(model, config.values.precision, config.parallel, config.optim, world, seed=1, tokens=32)
    if config.parallel.fp8_all_gather:
        watch(state.model, state.plan.recipe.dtypes.compute)
    source, numbers = Drawn(world), []
    for step in range(2):
        result = update_from(state, source, world, config.optim, step, 2)
        numbers += [result.loss, result.grad_norm]
    numbers += validate(state, source, world, StopRequest(), config.eval.precision)  # type: ignore[arg-type]
    return numbers, {name: local(tensor).clone() for name, tensor in state.tensors().items()}, str(state.plan)


if __name__ == "__main__":
    for name in ("all_gather_into_tensor", "all_gather_single"):
        if hasattr(dist, name):  # the second from torch 2.13 on
            setattr(dist, name, counting(getattr(dist, name), gathered))
    dist.all_reduce = counting(dist.all_reduce, reduced)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    world = distributed.start(load_config(["parallel.threads=1"]).parallel)
    results = {}
    for name, overrides in jobs.items():
        made, sent = [], []
        for codes in ("false", "true"):
            counts.clear()
            made.append(trained(load_config([*overrides, f"parallel.fp8_all_gather={codes}"]), world))
            sent.append({key: counts[key] for key in ("gathers", "bytes", "amax reductions")})
        (numbers, tensors, plan), (other_numbers, other_tensors, other_plan) = made
        same = numbers == other_numbers and all(torch.equal(tensors[key], other_tensors[key]) for key in tensors)
        results[name] = {
            "sent": sent,
            "plans": [plan, other_plan],
            "same": world.max(not same) == [0.0],
            "first gathers": [counts["whole"], world.max(counts["other"])[0]],
        }
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(results))
    distributed.finish()
