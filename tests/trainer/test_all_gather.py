"""Weights gathered as codes: the same run, bit for bit, for fewer bytes; refused where it would be another run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from narrowgauge.precision.apply import apply
from narrowgauge.precision.comm import gather_codes
from narrowgauge.precision.comm.gather import CodesAllGather, _Segment, _Weight
from narrowgauge.precision.context import StepContext
from narrowgauge.precision.formats import E4M3
from narrowgauge.precision.linear import QuantLinear
from narrowgauge.precision.loading import load
from narrowgauge.precision.module import QuantizedModule
from narrowgauge.precision.quantize import quantize
from narrowgauge.precision.scaling import Tile
from narrowgauge.precision.spec import OperandSpec
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.distributed import World
from narrowgauge.trainer.errors import UserError
from torch import nn
from torch.distributed.fsdp import fully_shard


@dataclass(frozen=True)
class Case:
    """2 steps of 2 micro-batches and a validation of 2, on as many ranks as there are processes; 2 hold a weight.

    Args:
        overrides: of the tiny config.
        gathers: of blocks whose weights may go as codes: 2 blocks, 4 times forward and backward, 2 times forward.
        saved: bytes that a rank does not send in each of them, compared with BF16.
        amaxes: whether scales are made of the whole weight's amax.
        whole: gathers that are compared with the codes of the whole weight: the first one of every linear in codes
            whose scale is not of earlier steps.
    """

    overrides: tuple[str, ...]
    gathers: int
    saved: int
    amaxes: bool = True
    gpt: bool = False
    whole: int = 14
    processes: int = 2


TINY_MODEL = [override for override in TINY if override.startswith("model.")]
# Values of a shard: in a Llama's block q and o 16x32 each, k and v 8x32, gate and up 32x32, down 16x64.
CASES = {
    # 63 rows are 32 and 31: the shard of the second rank is padded. Validation gathers BF16.
    "current": Case(
        ("precision=fp8_current", "model.intermediate_size=63", "eval.precision=high"), 16, 1536 + 2048 + 16 * 63
    ),
    "delayed": Case(("precision=fp8_delayed", "parallel.activation_checkpointing=true"), 20, 4096, gpt=True, whole=0),
    # A float32 scale for every 8x8 values.
    "block": Case(
        ("precision=fp8_block", "precision.args={block: 8, pow2: false}"), 20, 4608 - 4608 // 64 * 4, amaxes=False
    ),
    # One block of two, in the first step of two; half a byte a value and a byte for every 16x16.
    "nvfp4": Case(
        ("precision=nvfp4", "precision.args={keep_last: 1, bf16_forward: 0.5}", "model.num_kv_heads=4"),
        4,
        5120 * 2 - 5120 // 2 - 5120 // 256,
        whole=7,
    ),
}
# Two copies of a model, on two ranks each: what a copy gathers is what two ranks alone would.
CASES["replicated"] = replace(CASES["current"], overrides=("parallel=hsdp", *CASES["current"].overrides), processes=4)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for processes in (2, 4):
        made |= run_cases(tmp_path_factory.mktemp("gathered"), processes)
    return made


def run_cases(root: Path, processes: int) -> dict[str, Any]:
    """Those of so many processes, one after the other in one group."""
    jobs = {
        name: [
            *(("model=gpt2_tiny",) if case.gpt else ("model=llama_tiny", "model.num_kv_heads=2")),
            *TINY_MODEL,
            *case.overrides,
        ]
        for name, case in CASES.items()
        if case.processes == processes
    }
    (root / "in.json").write_text(json.dumps(jobs))
    script = [str(Path(__file__).parents[1] / "gather.py"), str(root / "in.json"), str(root / "out.json")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    result = subprocess.run(
        [sys.executable, *launcher, *script], capture_output=True, text=True, check=False, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    made: dict[str, Any] = json.loads((root / "out.json").read_text())
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_same_run_for_fewer_bytes(results: dict[str, Any], name: str) -> None:
    case, (plain, codes) = CASES[name], results[name]["sent"]
    assert results[name]["same"]
    assert codes["gathers"] == plain["gathers"]
    assert plain["bytes"] - codes["bytes"] == case.gathers * case.saved
    assert plain["amax reductions"] == 0
    assert codes["amax reductions"] == 6 * case.amaxes  # one for every forward pass
    assert results[name]["first gathers"] == [case.whole, 0]
    assert "linears gathered as codes" not in results[name]["plans"][0]
    said = re.search(r"linears gathered as codes, ([\d,]+) bytes a rank for ([\d,]+)", results[name]["plans"][1])
    assert said is not None
    sent, without = (int(number.replace(",", "")) for number in said.groups())
    assert without - sent == case.saved * (1 if name == "nvfp4" else 2)  # blocks


@pytest.mark.parametrize(
    ("recipe", "args", "reason"),
    [
        ("fp8_current", {}, None),
        ("fp8_current", {"pow2": True, "format": "e4m3"}, None),
        ("fp8_delayed", {}, None),
        ("fp8_block", {}, None),
        ("mxfp8", {"weights_2d": True}, None),
        ("mxfp4", {"weights_2d": True}, None),
        ("nvfp4", {}, None),
        ("mxfp8", {}, "a weight in tiles of 1x32 is quantized anew for dgrad, along its other dimension"),
        ("nvfp4", {"weights_2d": False}, "a weight in tiles of 1x16 is quantized anew for dgrad"),
        ("fp8_rowwise", {}, "a weight in tiles of row is quantized anew for dgrad"),
        ("exmy", {}, "bf16 is no narrower than what is gathered"),
    ],
)
def test_which_recipes_may(recipe: str, args: dict[str, Any], reason: str | None) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(8, 8)}) for _ in range(9)])})
    apply(load(recipe, args), model)
    (spec, *_) = {m.plan.weight_once for m in model.modules() if isinstance(m, QuantLinear)}
    assert isinstance(spec, str) == (reason is not None)
    if reason is not None:
        assert str(spec).startswith(reason)


@dataclass
class Group:
    """Of so many processes."""

    processes: int

    def size(self) -> int:
        return self.processes


class Blocks(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(OrderedDict(proj=nn.Linear(16, rows)))])


@pytest.mark.parametrize(
    ("recipe", "args", "rows", "error"),
    [
        ("bf16", {}, 32, "the recipe quantizes no weight"),
        ("mxfp8", {}, 32, r"layers\.0\.proj: a weight in tiles of 1x32 is quantized anew"),
        ("mxfp8", {"weights_2d": True}, 96, r"layers\.0\.proj: shards of 48 rows cut its tiles of 32x32"),
    ],
)
def test_what_would_be_another_run_is_refused(
    world: World, recipe: str, args: dict[str, Any], rows: int, error: str
) -> None:
    model = Blocks(rows)
    apply(load(recipe, args), model)
    fully_shard(model.layers[0])
    with pytest.raises(ValueError, match=error):
        gather_codes(model, model.layers, Group(2), torch.bfloat16)  # type: ignore[arg-type]


def test_a_schedule_over_amax_histories_is_refused(world: World) -> None:
    model = Blocks(32)
    apply(load("fp8_delayed", {}, [{"steps": [0, 4], "gemms": ["fprop"]}]), model)
    fully_shard(model.layers[0])
    with pytest.raises(ValueError, match=r"layers\.0\.proj: under its schedule"):
        gather_codes(model, model.layers, Group(2), torch.bfloat16)  # type: ignore[arg-type]


class OwnLinear(QuantizedModule):
    """A module of a recipe's own that multiplies by the codes of its weight, or does not say so."""

    def __init__(self, shape: tuple[int, ...], reads: OperandSpec | None) -> None:
        super().__init__()
        self.path, self.reads = "layers.0.proj", reads
        self.weight = nn.Parameter(torch.randn(shape))

    def coverage(self) -> tuple[tuple[str, int, bool], ...]:
        return (("fprop", self.weight.numel(), True),)

    @property
    def reads_weight(self) -> OperandSpec | str:
        return super().reads_weight if self.reads is None else self.reads


class OwnNorm(QuantizedModule):
    path = "layers.0.norm"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def own(shape: tuple[int, ...], reads: OperandSpec | None) -> nn.Module:
    model = Blocks(8)
    model.layers[0] = nn.Sequential(OrderedDict(proj=OwnLinear(shape, reads), norm=OwnNorm()))
    fully_shard(model.layers[0])
    return model


def test_a_module_of_a_recipes_own_takes_part(world: World) -> None:
    spec = OperandSpec(format=E4M3, tile=Tile(1, 4))
    model = own((6, 8), spec)
    block = model.layers[0]  # type: ignore[index]
    line = gather_codes(model, [block], Group(1), torch.float32)  # type: ignore[arg-type]
    why = "layers.0.norm (OwnNorm does not say how it reads its weight)"
    assert (
        line == f"weights of 1 linears gathered as codes, {48 + 12 * 4 + 16} bytes a rank for 208; as they are: {why}"
    )
    weight = block.proj.weight.to_local().detach()
    block.proj.context, codes = StepContext(), quantize(weight, spec)
    gather = CodesAllGather(block, [_Segment(6, 8, _Weight(block.proj, spec, (6, 8))), _Segment(4, 1, None)])
    sent, received = torch.cat([weight.flatten(), block.norm.weight.to_local().detach()]), torch.empty(52)
    gather(received, sent, torch.distributed.group.WORLD)  # type: ignore[arg-type]
    assert torch.equal(received[:48].view(6, 8), E4M3.decode(codes.codes))
    assert torch.equal(block.proj.gathered.scales, codes.scales)
    assert torch.equal(received[48:], torch.ones(4))
    block.proj.context.high_precision = True
    gather(received, sent, torch.distributed.group.WORLD)  # type: ignore[arg-type]
    assert torch.equal(received, sent)
    assert block.proj.gathered is None


@pytest.mark.parametrize(
    ("shape", "reads", "error"),
    [
        ((6, 8), None, "OwnLinear does not say how it reads its weight"),
        ((3, 6, 8), OperandSpec(format=E4M3), "a weight of 3 dimensions is not gathered as codes"),
    ],
)
def test_a_module_of_a_recipes_own_is_refused(
    world: World, shape: tuple[int, ...], reads: OperandSpec | None, error: str
) -> None:
    model = own(shape, reads)
    with pytest.raises(ValueError, match=rf"layers\.0\.proj: {error}"):
        gather_codes(model, model.layers, Group(2), torch.float32)  # type: ignore[arg-type]


def test_kept_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"fp8_all_gather=true needs parallel\.reshard_after_forward=true"):
        load_config(["parallel.fp8_all_gather=true", "parallel.reshard_after_forward=false"])


def test_another_layout_of_the_buffer_is_found_out(world: World) -> None:
    """torch promises none: parameters in another order, or padded otherwise, must not become other weights."""
    block = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False))
    fully_shard(block)
    shards = [parameter.to_local().flatten() for parameter in block.parameters()]
    segments = [_Segment(6, 4, None), _Segment(4, 6, None)]
    CodesAllGather(block, segments)._check(torch.cat(shards))
    for wrong in (torch.cat(shards[::-1]), torch.cat([*shards, shards[0]])):
        with pytest.raises(RuntimeError, match=r"this torch lays out what FSDP gathers in another way"):
            CodesAllGather(block, segments)._check(wrong)
