"""Update rules on 1, 2 and 3 ranks and on replicas of 2, given the same gradients: python rule_ranks.py

Two updates by each number of ranks must be those of one process, bit for bit; a checkpoint of 2 ranks is loaded on 1,
and goes on alike. Sums over ranks have another order: where a rule asks for one, it is close.
"""

import multiprocessing
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent / "precision"))
from narrowgauge.precision.states import driver
from narrowgauge.precision.states.driver import StateOptimizer
from narrowgauge.precision.states.moments import STANDARD, Moments, chosen
from narrowgauge.precision.states.rules import UpdateRule
from test_rules import HYPER, KINDS, Bf16AdamW

SHAPES = [(7, 10), (4, 33), (1, 6), (3, 5, 4), (2, 9, 3), (11,), (2,), (5, 12)]
MOMENTS: list[object] = [None, {"m": "e4m3/tensor/sr", "master": "fp16/tensor"}, "pure_bf16_sr"]
SUMMED = ("columns", "galore")  # whose states other ranks add up


def optimizer_on(mesh: DeviceMesh | None, rule: UpdateRule, moments: Moments) -> StateOptimizer:
    generator = torch.Generator().manual_seed(0)
    dtype = moments.param_dtype(torch.float32, torch.bfloat16)
    whole = [(torch.randn(shape, generator=generator) * 0.1).to(dtype) for shape in SHAPES]
    named = [(f"layers.{index}.weight", nn.Parameter(split(tensor, mesh))) for index, tensor in enumerate(whole)]
    return StateOptimizer([{"params": named, "weight_decay": 0.1}], rule=rule, moments=moments, seed=5, **HYPER)


def split(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return tensor
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def update(optimizer: StateOptimizer, mesh: DeviceMesh | None, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        grad = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if (step, index) == (1, 3) else split(grad.to(parameter.dtype), mesh)
    optimizer.step()


def tensors(optimizer: StateOptimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": value.detach()
        for index, parameter in enumerate(optimizer.param_groups[0]["params"])
        for key, value in [("weight", parameter), *optimizer.state[parameter].items()]
    }


def whole(optimizer: StateOptimizer) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in tensors(optimizer).items()
    }


def require_same(one: dict[str, Tensor], other: dict[str, Tensor], what: str, *, close: bool = False) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if close:
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=f"{what}: {name}")
        else:
            assert torch.equal(value, other[name]), f"{what}: {name}"


def main(rank: int, place: str) -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist, as meant here
    torch.set_num_threads(1)
    driver._GATHERED = 150  # several collectives an update
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=4)
    pair = dist.new_group([0, 1])
    two, three = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 1, 2])
    replicas = DeviceMesh("cpu", [[0, 1], [2, 3]])
    rules = KINDS | {"bf16": Bf16AdamW()}
    cases = [("muon", choice) for choice in MOMENTS] + [(name, MOMENTS[name not in SUMMED]) for name in rules]
    for number, (name, choice) in enumerate(cases):
        rule, directory = rules[name], Path(place) / str(number)
        moments = chosen(choice, STANDARD, rule)  # type: ignore[arg-type]
        alone = optimizer_on(None, rule, moments)
        everywhere = {"replicas": (replicas, optimizer_on(replicas, rule, moments))}
        if rank < 3:
            everywhere["3 ranks"] = three, optimizer_on(three, rule, moments)
        if rank < 2:
            everywhere["2 ranks"] = two, optimizer_on(two, rule, moments)
        for step in range(2):
            update(alone, None, step)
            for mesh, shared in everywhere.values():
                update(shared, mesh, step)
        for ranks, (_, shared) in everywhere.items():
            require_same(whole(alone), whole(shared), f"{name}, {choice}: {ranks}", close=name in SUMMED)
        if rank < 2:
            dcp.save(tensors(everywhere["2 ranks"][1]), checkpoint_id=directory, process_group=pair)
        dist.barrier()
        loaded = optimizer_on(None, rule, moments)
        dcp.load(tensors(loaded), checkpoint_id=directory, no_dist=True)
        if rank < 2:
            require_same(whole(everywhere["2 ranks"][1]), whole(loaded), f"{name}, {choice}: loaded")
            update(everywhere["2 ranks"][1], two, 2)
            update(loaded, None, 2)
            went_on = whole(everywhere["2 ranks"][1])
            require_same(whole(loaded), went_on, f"{name}, {choice}: went on", close=name in SUMMED)
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked before torch has threads: the imports are paid for once.
    with tempfile.TemporaryDirectory() as place:
        ranks = [multiprocessing.get_context("fork").Process(target=main, args=(rank, place)) for rank in range(4)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        sys.exit(max(abs(process.exitcode or 0) for process in ranks))
