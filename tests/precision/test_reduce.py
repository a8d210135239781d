"""Gradients reduced as codes: what every rank rounds, in which order it is summed, what is sent, what is refused."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from narrowgauge.precision import Recipe, apply
from narrowgauge.precision.comm import reduce_codes
from narrowgauge.precision.comm.layout import parameters_of
from narrowgauge.precision.comm.reduce import CodesReduce
from narrowgauge.precision.comm_spec import Comm, Reduction
from narrowgauge.precision.context import StepContext
from narrowgauge.precision.formats import BF16, E2M1, E4M3
from narrowgauge.precision.quantize import dequantize, quantize
from narrowgauge.precision.scaling import Current, Mean, Tile, TwoLevel
from narrowgauge.precision.spec import OperandSpec, Rounding
from narrowgauge.trainer.distributed import World
from reduced import BLOCK, CASES, NAMES, SEED, STEP, Model, given, run_case
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

MESHES = ((4,), (2, 2), (4, 1))
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By case and mesh, what each of 4 ranks has."""
    root = tmp_path_factory.mktemp("reduced")
    script = [str(Path(__file__).parents[1] / "reduced.py"), str(root)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    result = subprocess.run(
        [sys.executable, *launcher, *script], capture_output=True, text=True, check=False, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    ranks = [torch.load(root / f"{rank}.pt") for rank in range(4)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


# The oracle: elements one by one, by tables of values, and the hash of ``precision.noise`` in Python's integers.


def values_of(name: str) -> np.ndarray:
    """The values that are not negative, by code, up to the largest finite one."""
    if name == "e2m1":
        return np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    values = torch.arange(128, dtype=torch.uint8).view(dtype).double().numpy()
    return values[np.isfinite(values)]


def fmix32(h: int) -> int:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ h >> shift) * factor % 2**32
    return h ^ h >> 16


def noise_of(name: str, rank: int, slot: int, row: int, column: int) -> float:
    text = b"narrowgauge rounding noise 1" + SEED.to_bytes(8, "little") + slot.to_bytes(4, "little")
    digest = hashlib.sha256(text + f"gradient of {name} on rank {rank}".encode()).digest()
    keys = [fmix32(fmix32(int.from_bytes(digest[i : i + 4], "little") ^ STEP)) for i in (0, 4)]
    row_hash = fmix32(fmix32(row ^ keys[0]))
    return (fmix32((row_hash + column * 0x9E3779B9) % 2**32 ^ keys[1]) >> 8) * 2.0**-24


def rounded(y: float, grid: np.ndarray, noise: float | None) -> float:
    size = min(abs(y), grid[-1])
    above = int(np.searchsorted(grid, size))
    if grid[above] == size:
        return float(np.copysign(size, y))
    low, high = grid[above - 1], grid[above]
    part = (size - low) / (high - low)
    up = noise < part if noise is not None else part > 0.5 or (part == 0.5 and above % 2 == 0)
    return float(np.copysign(high if up else low, y))


def oracle(
    x: Tensor, reduction: Reduction, name: str, rank: int, slot: int, amax: float | None, factor: float
) -> Tensor:
    """What a gradient becomes by its codes: FP32 scales, of the tensor or of parts of rows."""
    spec = reduction.spec
    grid, block = values_of(spec.format.name), spec.tile.inner
    rows = x.double().numpy().reshape(1 if x.dim() == 1 else -1, x.shape[-1])
    result = np.zeros_like(rows, dtype=np.float32)
    for (row, column), value in np.ndenumerate(rows):
        width = block if block > 0 else rows.shape[1]
        tile = rows if spec.tile == (-1, -1) else rows[row, column // width * width :][:width]
        largest = np.float32(np.abs(tile).max() if amax is None else amax)
        scale = np.float32(grid[-1]) / largest if largest > 0 else np.float32(1)
        noise = noise_of(name, rank, slot, row, column) if spec.rounding is Rounding.STOCHASTIC else None
        y = float(np.float32(value * factor) * scale)
        result[row, column] = np.float32(rounded(y, grid, noise)) * (np.float32(1) / scale)
    return torch.from_numpy(result).view(x.shape)


def house(
    x: Tensor, reduction: Reduction, name: str, rank: int, slot: int, amax: float | None, factor: float
) -> Tensor:
    """For scales of other kinds: what ``quantize`` makes of it."""
    matrix = x.reshape(1 if x.dim() == 1 else -1, x.shape[-1])
    return dequantize(quantize(matrix, reduction.spec)).view(x.shape)


def in_order(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def expected(name: str, parameter: str, mesh: tuple[int, ...]) -> Tensor:
    """The reduced gradient of a parameter, by the laws of ``comm.reduce``."""
    case = CASES[name]
    reduction = case.reduction()
    assert reduction is not None
    ranks = int(np.prod(mesh))
    local = [given(rank)[parameter].to(case.dtype).float() for rank in range(ranks)]  # as FSDP's buffer has them
    replicas = np.split(np.arange(ranks), mesh[0]) if len(mesh) == 2 and mesh[1] > 1 else [np.arange(ranks)]
    matrices = parameter.startswith("block") and local[0].dim() > 1
    coded = any(re.fullmatch(path, parameter) for path in reduction.paths) if reduction.paths else matrices
    if not coded:
        return in_order([in_order([local[rank] for rank in replica]) for replica in replicas])
    factor = 0.5 if reduction.headroom is not None else 1.0
    by = house if reduction.spec.scale.levels == 2 else oracle

    def decoded(terms: list[Tensor], numbers: list[int], slot: int) -> list[Tensor]:
        amax = max(float(term.abs().max()) for term in all_of[slot]) if reduction.shared_scale else None
        amaxes = [float(term.abs().max()) if factor != 1 and amax is None else amax for term in terms]
        pairs = zip(terms, numbers, amaxes, strict=True)
        return [by(term, reduction, parameter, number, slot, amax, factor) for term, number, amax in pairs]

    all_of = {64: local}
    sums = [in_order(decoded([local[r] for r in ranks], list(ranks), 64)) / factor for ranks in replicas]
    sums = [term.to(case.dtype).float() for term in sums]
    if len(replicas) == 1:
        return sums[0]
    all_of[65] = sums
    return (in_order(decoded(sums, list(range(len(sums))), 65)) / factor).to(case.dtype).float()


ROUNDED = [name for name, case in CASES.items() if case.spoilt is None and name != "plain"]


@pytest.mark.parametrize("name", ROUNDED)
def test_one_process_rounds_its_gradients(world: World, name: str) -> None:
    made = run_case(CASES[name], (1,)).gradients
    for parameter in NAMES:
        assert torch.equal(made[parameter], expected(name, parameter, (1,))), parameter


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=["shards", "both", "replicas"])
@pytest.mark.parametrize("name", ROUNDED)
def test_ranks_sum_in_their_order_what_each_has_rounded(results: Results, name: str, mesh: tuple[int, ...]) -> None:
    for rank in results[f"{name} {mesh}"]:
        assert rank["gradients"].keys() == set(NAMES)
        for parameter, made in rank["gradients"].items():
            assert torch.equal(made, expected(name, parameter, mesh)), parameter


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=["shards", "both", "replicas"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.spoilt is not None])
def test_what_is_not_finite_is_seen_on_every_rank(results: Results, name: str, mesh: tuple[int, ...]) -> None:
    for rank in results[f"{name} {mesh}"]:
        assert rank["gradients"].pop("block.inner.p0").isnan().all()
        assert all(gradient.isfinite().all() for gradient in rank["gradients"].values())


def test_one_process_sees_it_too(world: World) -> None:
    for name in ("nan", "inf"):
        assert run_case(CASES[name], (1,)).gradients["block.inner.p0"].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=["shards", "both", "replicas"])
def test_plan_txt_says_what_is_sent(results: Results, mesh: tuple[int, ...]) -> None:
    (plain, *_) = results[f"plain {mesh}"]
    for name in (*[name for name in ROUNDED if name != "bf16"], "nan"):
        (rank, *_) = results[f"{name} {mesh}"]
        first, second = rank["lines"]
        assert re.fullmatch(r"reduced: ([\d,]+) bytes a step and rank, for ([\d,]+) in float32", second)
        said, without = (int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?= bytes| in)", second))
        assert (said, without) == (rank["bytes"], plain["bytes"])
        assert f"as {CASES[name].reduction()}, " in first
    lines = results[f"fp4 {mesh}"][0]["lines"]
    ways = {
        (4,): "all to all over 4 ranks",
        (2, 2): "all to all over 2 ranks, then gathered from 2 replicas",
        (4, 1): "gathered from 4 replicas",
    }
    assert lines[0] == (
        f"reduced: gradients of block.inner.p0 and 3 others as e2m1/row/fp32, {ways[mesh]}, summed in rank order in "
        "float32; block.inner.p2 and head.p0 in float32"
    )


@pytest.mark.slow
def test_a_headroom_sees_the_codes_of_all_ranks_and_their_sum(results: Results) -> None:
    for number, rank in enumerate(results["headroom (4,)"]):
        rows = [row for row in range(7) if row // 2 == number]
        codes, total = rank["seen"]["block.inner.p0"]
        assert torch.equal(total, rank["gradients"]["block.inner.p0"][rows] * 0.5)
        decoded = [E4M3.decode(one) for one in codes]
        assert len(decoded) == 4
        # Half of the amax lies at half of the top.
        assert max(float(one.abs().max()) for one in decoded) <= 224
        assert (rank["seen"].keys() == {"block.inner.p0", "block.inner.p1", "block.inner.p3", "block.gain"}) == (
            number < 2
        )


def test_parameters_are_in_the_order_of_fsdps_buffers(world: World) -> None:
    model = Model()
    for module in (model.block, model):
        fully_shard(module)
    assert list(parameters_of(model.block)) == [*(f"inner.p{number}" for number in range(len(BLOCK))), "gain"]
    assert list(parameters_of(model)) == ["head.p0"]


def test_another_layout_of_the_buffer_is_found_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parameters of one size, taken for each other."""
    real = CodesReduce.__init__

    def exchanged(self: CodesReduce, group: nn.Module, segments: list[Any], *rest: Any) -> None:
        real(self, group, [*segments[1:2], segments[0], *segments[2:]], *rest)

    monkeypatch.setattr(CodesReduce, "__init__", exchanged)
    with pytest.raises(RuntimeError, match=r"this torch lays out what FSDP reduces in another way than 2\.11 to 2\.13"):
        run_case(CASES["own"], (1,))


def test_a_parameter_without_a_gradient_is_one_line(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reduced.Block.forward", lambda self, gradients: (self.gain * gradients["block.gain"]).sum())
    with pytest.raises(RuntimeError, match="every parameter that is trained needs a gradient"):
        run_case(CASES["own"], (1,))


def test_another_operation_than_a_sum_is_refused(world: World) -> None:
    ranks: Any = None
    reduce = CodesReduce(nn.Linear(2, 2), [], Reduction(spec=OperandSpec(format=E4M3)), ranks, StepContext())
    with pytest.raises(RuntimeError, match=r"call set_gradient_divide_factor\(1\.0\)"):
        reduce(torch.zeros(1), torch.zeros(1), None, torch.distributed.ReduceOp.AVG)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reduction(spec=OperandSpec(format=BF16)), "codes of at most 8 bits: bf16 has 16"),
        (lambda: Reduction(spec=OperandSpec(format=E4M3, tile=Tile(16, 16))), "tiles of 16x16 lie over rows"),
        (lambda: Reduction(spec=OperandSpec(format=E4M3, tile=Tile(-1, 1))), "tiles of column lie over rows"),
        (lambda: Reduction(spec=OperandSpec(format=E4M3, amax=Current(step=True))), "by shared_scale=True"),
        (
            lambda: Reduction(spec=OperandSpec(format=E4M3, tile=Tile(1, 4)), shared_scale=True),
            "shared_scale=True: e4m3/1x4/fp32 has no scale of a tensor",
        ),
        (
            lambda: Reduction(spec=OperandSpec(format=E4M3, statistic=Mean()), shared_scale=True),
            "shared_scale=True: e4m3/tensor/fp32/mean has no scale",
        ),
        (
            lambda: Reduction(
                spec=OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel()), headroom=CASES["headroom"]
            ),
            "has not one scale per tensor",
        ),
        (lambda: Reduction(spec=OperandSpec(format=E4M3), paths=("(",)), r"paths='\(': not a regular expression"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Reduction], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_paths_that_match_nothing_are_refused(world: World) -> None:
    model = Model()
    for module in (model.block, model):
        fully_shard(module)
    reduction = Reduction(spec=OperandSpec(format=E4M3), paths=(r"block\.inner\.p0", "heads.p0"))
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    with pytest.raises(ValueError, match=r"'heads.p0' matches no parameter.*head\.p0"):
        reduce_codes(model, [model.block], mesh, reduction, StepContext(), torch.float32)


def test_another_trainer_is_told_what_is_left_to_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    spec = OperandSpec(format=E4M3, rounding=Rounding.STOCHASTIC)
    plan = apply(Recipe(comm=Comm(gather=True, reduce=Reduction(spec=spec, shared_scale=True))), model)
    assert str(plan).count("left to the trainer") == 2
    assert "gradients reduced as e4m3/tensor/fp32/sr, one scale for all ranks: left to the trainer, by" in str(plan)
    assert str(apply(Recipe(), nn.Sequential(nn.Linear(4, 4)))).count("trainer") == 0
