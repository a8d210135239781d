"""Every kind of optimizer state on 1, 2 and 4 ranks: python reshard.py

Two updates on 2 ranks, saved; loaded on 1 and on 4, one update more. All must be what one process alone computes.
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
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent / "precision"))
from narrowgauge.precision.states.adamw import AdamW
from narrowgauge.precision.states.driver import StateOptimizer
from narrowgauge.precision.states.moments import STANDARD, chosen
from test_updates import HYPER, VARIANTS

SHAPES = [(7, 130), (5, 64), (3, 9), (6,), (2, 4)]  # no size divides into 4 rows of equal number


def optimizer_on(mesh: DeviceMesh | None, variant: object) -> StateOptimizer:
    kept = chosen(variant, STANDARD)  # type: ignore[arg-type]
    dtype = kept.param_dtype(torch.float32, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    whole = [(torch.randn(shape, generator=generator) * 0.02).to(dtype) for shape in SHAPES]
    params = [nn.Parameter(split(tensor, mesh)) for tensor in whole]
    named = [(f"p{index}", parameter) for index, parameter in enumerate(params)]
    return StateOptimizer([{"params": named, "weight_decay": 0.1}], rule=AdamW(), moments=kept, seed=5, **HYPER)  # type: ignore[arg-type]


def split(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def update(optimizer: StateOptimizer, mesh: DeviceMesh | None, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in optimizer.param_groups[0]["params"]:
        grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** -(step % 3)
        parameter.grad = split(grad.to(parameter.dtype), mesh)
    optimizer.step()


def tensors(optimizer: StateOptimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": value.detach()
        for index, parameter in enumerate(optimizer.param_groups[0]["params"])
        for key, value in [("weight", parameter), *optimizer.state[parameter].items()]
    }


def whole(optimizer: StateOptimizer) -> dict[str, Tensor]:
    result = {}
    for name, value in tensors(optimizer).items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        result[name] = full.contiguous().reshape(-1).view(torch.uint8).clone()  # as bytes
    return result


def require_same(one: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    assert one.keys() == other.keys()
    bad = [name for name in one if not torch.equal(one[name], other[name])]
    assert not bad, f"{what}: {bad}"


def main(rank: int, place: str) -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist, as meant here
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=4)
    pair = dist.new_group([0, 1])
    two, four = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 1, 2, 3])
    for number, variant in enumerate(VARIANTS):
        directory = Path(place) / str(number)
        alone = optimizer_on(None, variant)
        for step in range(2):
            update(alone, None, step)
        if rank < 2:
            shared = optimizer_on(two, variant)
            for step in range(2):
                update(shared, two, step)
            require_same(whole(alone), whole(shared), f"{variant}: 2 ranks")
            dcp.save(tensors(shared), checkpoint_id=directory, process_group=pair)
        dist.barrier()
        loaded = optimizer_on(None, variant)
        dcp.load(tensors(loaded), checkpoint_id=directory, no_dist=True)
        require_same(whole(alone), whole(loaded), f"{variant}: loaded on 1")
        spread = optimizer_on(four, variant)
        dcp.load(tensors(spread), checkpoint_id=directory)
        require_same(whole(alone), whole(spread), f"{variant}: loaded on 4")
        update(alone, None, 2)
        update(loaded, None, 2)
        update(spread, four, 2)
        require_same(whole(alone), whole(loaded), f"{variant}: one update on 1")
        require_same(whole(alone), whole(spread), f"{variant}: one update on 4")
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
