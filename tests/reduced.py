"""A model whose gradients are given, reduced as codes in every way that its processes can be arranged.

torchrun reduced.py DIRECTORY: writes ``RANK.pt``: name of the case and mesh -> ``Result``'s fields.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from narrowgauge.precision.comm import reduce_codes
from narrowgauge.precision.comm_spec import Reduction
from narrowgauge.precision.context import StepContext
from narrowgauge.precision.formats import E2M1, E4M3, E5M2
from narrowgauge.precision.scaling import PowerOfTwo, Tile, TwoLevel
from narrowgauge.precision.spec import OperandSpec, Rounding
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

# Rows that 2 and 4 ranks share unevenly, a shard without rows, a vector, a tensor of three dimensions.
BLOCK = ((7, 5), (2, 6), (9,), (3, 2, 5))
ROOT = ((4, 3),)
SEED, STEP = 11, 5
NAMES = ["block.inner.p0", "block.inner.p1", "block.inner.p2", "block.inner.p3", "head.p0", "block.gain"]


class Given(nn.Module):
    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        for number, shape in enumerate(shapes):
            self.register_parameter(f"p{number}", nn.Parameter(torch.zeros(shape)))


class Block(nn.Module):
    """A parameter of its own beside those of a child: FSDP has the child's first."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(2, 3))
        self.inner = Given(BLOCK)

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return dots(self, gradients, "block.")


class Model(nn.Module):
    """``tail`` is ``head``: a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = self.tail = Given(ROOT)
        self.block = Block()

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        first = dots(self.head, gradients, "head.", 0.25)
        return self.block(gradients) + first + dots(self.tail, gradients, "head.", 0.75)


def dots(module: nn.Module, gradients: dict[str, Tensor], prefix: str, part: float = 1.0) -> Tensor:
    """Whose gradient with respect to a parameter is the one that is given for it."""
    pairs = [(parameter, gradients[prefix + name]) for name, parameter in module.named_parameters()]
    return torch.stack([(parameter * gradient * part).sum() for parameter, gradient in pairs]).sum()


def given(rank: int, spoilt: float | None = None) -> dict[str, Tensor]:
    """The local gradients of a rank, multiples of 2^-20; ``spoilt``: an element of one of rank 1, if any."""
    shapes = dict(zip(NAMES, [*BLOCK, *ROOT, (2, 3)], strict=True))
    generator = torch.Generator().manual_seed(1000 + rank)
    gradients = {
        name: (torch.randn(shape, generator=generator) * 2**18).round() * 2.0**-20 for name, shape in shapes.items()
    }
    if spoilt is not None and rank == 1 % world_size():
        gradients["block.inner.p0"][6, 4] = spoilt
    return gradients


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class Half:
    """A factor of 1/2 for every parameter; counts codes at the top and sums."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Any]] = {}

    def factor(self, name: str) -> float:
        return 0.5

    def reduced(self, name: str, codes: Sequence[Any], total: Tensor) -> None:
        self.seen[name] = [[one.codes for one in codes], total]

    def __str__(self) -> str:
        return "a half"


@dataclass(frozen=True)
class Case:
    reduction: Callable[[], Reduction | None]
    spoilt: float | None = None
    micro: int = 1
    dtype: torch.dtype = torch.float32


def case(spec: OperandSpec, spoilt: float | None = None, micro: int = 1, **more: Any) -> Case:
    headroom = more.pop("headroom", None)
    return Case(lambda: Reduction(spec=spec, headroom=headroom and headroom(), **more), spoilt, micro)


ALL = (r".*",)
FP8 = OperandSpec(format=E4M3)
CASES = {
    "stochastic": case(OperandSpec(format=E5M2, tile=Tile(1, 4), rounding=Rounding.STOCHASTIC), paths=ALL),
    "own": case(FP8, paths=ALL),
    "shared": case(FP8, shared_scale=True, paths=(r"block.*p[013]", r"head.*")),
    "headroom": case(FP8, shared_scale=True, headroom=Half),
    "fp4": case(OperandSpec(format=E2M1, tile=Tile(1, -1)), micro=2),
    "two": case(OperandSpec(format=E2M1, tile=Tile(1, 2), scale=TwoLevel()), paths=ALL),
    "nan": case(OperandSpec(format=E2M1, tile=Tile(1, 4), scale=PowerOfTwo()), spoilt=torch.nan),
    "inf": case(FP8, spoilt=-torch.inf, shared_scale=True),
    "bf16": replace(case(FP8, paths=ALL), dtype=torch.bfloat16),
    "plain": Case(lambda: None),
}


@dataclass
class Result:
    """Whole gradients by name; lines of plan.txt; bytes handed to collectives; what a headroom saw."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    bytes: int = 0
    seen: dict[str, Any] = field(default_factory=dict)


def run_case(case: Case, mesh_shape: tuple[int, ...]) -> Result:
    names = ("shard",) if len(mesh_shape) == 1 else ("replicate", "shard")
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    model, policy = Model(), MixedPrecisionPolicy(reduce_dtype=case.dtype)
    reduction, context, result = case.reduction(), StepContext(seed=SEED), Result()
    for module in (model.block, model):
        sharded = mesh if reduction is None else mesh["shard"]
        fully_shard(module, mesh=sharded, mp_policy=policy, reshard_after_forward=False)
    if reduction is not None:
        result.lines = reduce_codes(model, [model.block], mesh, reduction, context, case.dtype)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    context.set(STEP, 0, None)
    whole = given(dist.get_rank(), case.spoilt)
    for step in range(2):  # the first compares the layout, and writes other gradients
        model.zero_grad()
        result.bytes = 0
        for micro in range(case.micro):
            model.set_requires_gradient_sync(micro == case.micro - 1)
            part = (1.0 if case.micro == 1 else (0.25, 0.75)[micro]) * (3 if step == 0 else 1)
            loss = model({name: gradient * part for name, gradient in whole.items()})
            with ExitStack() as stack:
                count(stack, result)
                loss.backward()
    # ``named_parameters`` gives a tied weight once.
    result.gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    result.seen = getattr(reduction and reduction.headroom, "seen", {})
    return result


def count(stack: ExitStack, result: Result) -> None:
    """Add up what is handed to collectives."""
    for name, place in COLLECTIVES.items():
        if (real := getattr(dist, name, None)) is None:
            continue

        def counted(*arguments: Any, real: Any = real, place: Any = place, **more: Any) -> Any:
            tensor = more[place[1]] if place[1] in more else arguments[place[0]]
            result.bytes += tensor.numel() * tensor.element_size()
            return real(*arguments, **more)

        stack.enter_context(patch.object(dist, name, counted))


COLLECTIVES = {
    "all_to_all_single": (1, "input"),
    "reduce_scatter_tensor": (1, "input"),
    "reduce_scatter_single": (1, "input"),  # as torch calls it from 2.13 on
    "all_reduce": (0, "tensor"),
    "all_gather_into_tensor": (1, "input_tensor"),
    "all_gather_single": (1, "input_tensor"),
}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    made = {
        f"{name} {shape}": asdict(run_case(one, shape))
        for name, one in CASES.items()
        for shape in ((size,), (2, size // 2), (size, 1))
    }
    torch.save(made, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
