"""What the probe says, against sums made by hand; and that nothing hears of it."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from narrowgauge.precision.apply import apply
from narrowgauge.precision.codebook import Codebook
from narrowgauge.precision.formats import BF16, E2M1, E4M3, E5M2, Integer, NumberFormat, exmy
from narrowgauge.precision.linear import QuantLinear, quantized
from narrowgauge.precision.loading import load, names
from narrowgauge.precision.noise import Noise, base_key, step_key
from narrowgauge.precision.plan import Plan
from narrowgauge.precision.probe import Probe, Row, of_operand
from narrowgauge.precision.quantize import dequantize, quantize
from narrowgauge.precision.recipe import Recipe, Rule
from narrowgauge.precision.scaling import Delayed, PowerOfTwo, Tile, TwoLevel, Unit
from narrowgauge.precision.slots import OUTPUTS, SLOTS
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding
from narrowgauge.precision.transforms import Hadamard
from test_linear import INS, OUTS, SMOOTH, block_model, run, samples
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TENSOR8 = OperandSpec(format=E4M3)
MX8 = OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())
NV4 = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())
PATH = "layers.0.up_proj"


def plan_of(spec: LinearSpec, **options: object) -> Plan:
    return apply(Recipe(rules=(Rule(kind=nn.Linear, path=".*", make=quantized(spec)),)), block_model(), **options)  # type: ignore[arg-type]


def seen(plan: Plan, *batches: tuple[Tensor, Tensor], path: str = PATH) -> dict[str, Row]:
    """The rows of one linear after these micro-batches, by slot."""
    probe = Probe(plan, every=1)
    with probe.watching():
        for x, dy in batches:
            run(plan.model.get_submodule(path), x, dy)
    return {row.slot: row for row in probe.rows() if row.module == path}


def by_hand(given: Tensor, used: Tensor, top: float | Tensor) -> dict[str, float]:
    given, used = given.double(), used.double()
    noise = ((used - given) ** 2).sum()
    return {
        "sqnr_db": float(10 * torch.log10((given**2).sum() / noise)),
        "mse": float(noise / given.numel()),
        "underflow_percent": 100 * float(((given != 0) & (used == 0)).double().mean()),
        "saturation_percent": 100 * float((given.abs() > top).double().mean()),
        "amax": float(given.abs().max()),
    }


def told(row: Row, like: dict[str, float]) -> dict[str, float]:
    return {name: getattr(row, name) for name in like}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_slot_by_hand(backend: str, bias: bool) -> None:
    """MXFP8 forward; E2M1 with two levels, Hadamard and noise in wgrad; a plain dy in dgrad."""
    sr = replace(NV4, rounding=Rounding.STOCHASTIC)
    spec = LinearSpec(
        fprop=GemmSpec(a=MX8, b=replace(MX8, tile=Tile(32, 32))),
        dgrad=GemmSpec(b=TENSOR8),
        wgrad=GemmSpec(a=sr, b=NV4, transform=Hadamard()),
    )
    model = block_model(bias=bias)
    plan = apply(Recipe(rules=(Rule(kind=nn.Linear, path=".*", make=quantized(spec)),)), model, backend=backend, seed=5)
    plan.begin_step(3, 0)
    module = model.get_submodule(PATH)
    x, dy, w = samples(64, INS) * 40, samples(64, OUTS, seed=2) / 1024, module.weight.detach()
    rows = seen(plan, (x, dy))
    assert tuple(rows) == SLOTS + OUTPUTS

    noise = Noise(key=step_key(base_key(5, PATH, 4), 3), transposed=True)
    dy_t, x_t = Hadamard().left(dy.mT), Hadamard().right(x.mT)
    used = {
        "fprop.x": (x, quantize(x, MX8)),
        "fprop.w": (w, quantize(w, replace(MX8, tile=Tile(32, 32)))),
        "dgrad.w": (w.mT, quantize(w.mT, TENSOR8)),
        "wgrad.dy": (dy_t, quantize(dy_t, sr, noise=noise)),
        "wgrad.x": (x_t, quantize(x_t, NV4)),
    }
    for slot, (given, q) in used.items():
        full = 0x7F & ~1 if q.spec.format is E4M3 else 0x77  # the largest code
        top = dequantize(replace(q, codes=torch.full_like(q.codes, full)))
        expected = by_hand(given, dequantize(q), top * (1 + 2.0**-20))
        assert told(rows[slot], expected) == pytest.approx(expected, rel=1e-6), slot
        assert rows[slot].elements == given.numel()
        assert rows[slot].format == str(q.spec) + (" [hadamard16]" if slot.startswith("wgrad") else "")
    assert rows["wgrad.x"].underflow_percent > 1 < rows["wgrad.x"].saturation_percent
    exponents = quantize(x, MX8).scales.int() - 127
    assert (rows["fprop.x"].scale_min, rows["fprop.x"].scale_max) == (
        2.0 ** int(exponents.min()),
        2.0 ** int(exponents.max()),
    )
    blocks = E4M3.decode(used["wgrad.x"][1].scales) * used["wgrad.x"][1].tensor_scale
    assert (rows["wgrad.x"].scale_min, rows["wgrad.x"].scale_max) == (float(blocks.min()), float(blocks.max()))
    assert (rows["dgrad.dy"].format, rows["dgrad.dy"].sqnr_db, rows["dgrad.dy"].mse) == ("bfloat16", None, 0.0)

    y, dx, dw = run(module, x, dy)[:3]
    start = module.bias.detach().double() if bias else 0.0
    exact = {
        "fprop.y": (y, x.double() @ w.double().mT + start),
        "dgrad.dx": (dx, dy.double() @ w.double()),
        "wgrad.dw": (dw, dy.double().mT @ x.double()),
    }
    for slot, (ours, right) in exact.items():
        error = float((ours.double() - right).norm() / right.norm())
        assert rows[slot].relative_error == pytest.approx(error, rel=1e-3), slot
        assert rows[slot].sqnr_db is rows[slot].saturation_percent is None
    assert rows["fprop.x"].relative_error is None


@pytest.mark.parametrize("recipe", [name for name in names() if name not in SMOOTH])
def test_a_watched_step_has_the_bits_of_any_other(recipe: str) -> None:
    """Outputs, gradients and what is remembered, over steps; what is computed again for backward counts once."""
    results = []
    for watch, recompute in ((False, False), (True, False), (True, True)):
        model = block_model(layers=2)
        plan = apply(load(recipe, {}), model)
        probe = Probe(plan, every=1)
        module = model.get_submodule(PATH)
        steps: list[Tensor] = []
        for step in range(2):
            plan.begin_step(step, 4 * step)
            x, dy = samples(4, 32, INS, seed=step).requires_grad_(), samples(4, 32, OUTS, seed=9 + step) / 1024
            model.zero_grad()
            with probe.watching() if watch else nullcontext():
                y = checkpoint(module, x, use_reentrant=False) if recompute else module(x)
                y.backward(dy)
            plan.end_step()
            steps += [y.detach(), x.grad, module.weight.grad.clone()]
        results.append([*steps, *plan.state_tensors().values()])
        counts = {row.slot: row.elements for row in probe.rows() if row.module == PATH}
        assert counts["fprop.x"] == counts["wgrad.x"] == (4 * 32 * INS if watch else 0)
        assert all(not m._forward_hooks and getattr(m, "observer", None) is None for m in model.modules())
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("recipe", ["mxfp8", "mxfp4"])
def test_micro_batches_add_up_to_the_batch(recipe: str) -> None:
    plan = apply(load(recipe, {"keep_last": 0}), block_model())
    x, dy = samples(4, 32, INS), samples(4, 32, OUTS, seed=2)
    plan.begin_step(2, 0)
    whole = seen(plan, (x, dy))
    probe = Probe(plan, every=1)
    with probe.watching():
        for start in (0, 1, 3):
            stop = {0: 1, 1: 3, 3: 4}[start]
            plan.begin_micro(start)
            run(plan.model.get_submodule(PATH), x[start:stop], dy[start:stop])
    for row in probe.rows():
        if row.slot == "wgrad.dw":  # a product of its own in every micro-batch
            continue
        for name, value in asdict(whole[row.slot]).items():
            if name == "elements" and row.slot.endswith(".w"):
                assert row.elements == 3 * value
            else:
                close = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
                assert getattr(row, name) == close, (row.slot, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_zero_of_either_sign_is_zero(dtype: torch.dtype) -> None:
    given = torch.tensor([[0.0, -0.0, 1e-4, -1e-4, 1.0, -1.0, 2.0, 448.0]], dtype=dtype)
    sums, _ = of_operand(given, quantize(given, replace(TENSOR8, scale=Unit())))
    assert sums[:5].tolist() == [8, 0, 0, 2, 0]
    sums, extremes = of_operand(given * 2, quantize(given * 2, replace(TENSOR8, scale=Unit())))
    assert sums[:5].tolist() == [8, 0, 0, 2, 1]  # 896 is above the largest
    assert extremes.tolist() == [896.0, -math.inf, -math.inf]  # and there are no scales
    assert math.log2(float(sums[6])) == pytest.approx(math.log2(448.0**2), abs=1e-6)


@dataclass(frozen=True)
class Mine(NumberFormat):
    """A format of a recipe's own, whose codes run downwards."""

    name: str = "mine"
    bits: int = 4
    max: float = 2.0

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return x.float().clamp(-2, 2).round()

    def encode(self, values: Tensor) -> Tensor:
        return (7 - values).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return 7.0 - codes.float()


LEAVES = {
    "e1m2": (exmy(1, 2, ieee=False), -3.5, 3.5),
    "e3m0": (exmy(3, 0, ieee=False), -16.0, 16.0),
    "e4m1": (exmy(4, 1), -192.0, 192.0),
    "bf16": (BF16, -BF16.max, BF16.max),
    "int2": (Integer(bits=2), -1.0, 1.0),
    "int4": (Integer(bits=4), -7.0, 7.0),
    "int12": (Integer(bits=12), -2047.0, 2047.0),
    "table": (Codebook(name="table", values=(0.3, -0.2, -8.0, 0.0, 7.0), codes=(3, 0, 9, 12, 5), nan=15), -8.0, 7.0),
    "wide table": (Codebook(name="wide table", values=(-1.0, 0.0, 3.0), codes=(0, 1, 999)), -1.0, 3.0),
    "a recipe's own": (Mine(), -2.0, 2.0),
}


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("tile", [None, Tile(1, 8), Tile(3, 5)], ids=str)
def test_saturation_of_every_kind_of_format(leaf: str, tile: Tile | None) -> None:
    """Of both signs, by tile; an infinity is beyond everything."""
    fmt, low, high = LEAVES[leaf]
    x = samples(9, 33).float() * min(high, 1e30) / 2
    x[0, :4] = torch.tensor([low, high, 0.0, -0.0])
    spec = OperandSpec(format=fmt, scale=Unit()) if tile is None else OperandSpec(format=fmt, tile=tile)
    q = quantize(x, spec)
    if tile is not None:  # as of an amax that the tensor has outgrown
        q = replace(q, scales=q.scales / 2, codes=quantize(x * 2, spec).codes)
    scales = torch.ones(9, 33)
    if tile is not None:
        scales = q.scales.repeat_interleave(tile.outer, 0).repeat_interleave(tile.inner, 1)[:9, :33]
    beyond = ((x > high * scales * (1 + 2.0**-20)) | (x < low * scales * (1 + 2.0**-20))).sum()
    assert float(of_operand(x, q).sums[4]) == float(beyond)
    assert beyond > 0 or fmt is BF16
    assert leaf == "bf16" or float(of_operand(torch.full_like(x, -torch.inf), replace(q)).sums[4]) == x.numel()


def test_the_largest_value_of_a_scaled_tensor_does_not_saturate() -> None:
    for seed in range(20):
        x = samples(16, 32, seed=seed).float() * 1.1**seed
        for spec in (TENSOR8, MX8, replace(TENSOR8, format=E5M2)):
            assert float(of_operand(x, quantize(x, spec)).sums[4]) == 0


@pytest.mark.parametrize("recipe", [name for name in names() if name not in ("bf16", "fp32", *SMOOTH)])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_not_finite_is_counted(recipe: str, bad: float) -> None:
    plan = apply(load(recipe, {}), block_model(layers=2))
    x, dy = samples(64, INS), samples(64, OUTS, seed=2)
    x[3, 5] = bad
    rows = seen(plan, (x, dy))
    assert rows["fprop.x"].nonfinite == 1
    assert rows["fprop.w"].nonfinite == rows["dgrad.dy"].nonfinite == 0
    assert rows["fprop.x"].amax == float(x[x.isfinite()].abs().max())
    assert rows["fprop.y"].nonfinite == OUTS
    json.dumps([asdict(row) for row in rows.values()], allow_nan=False)


def test_a_poisoned_tile_and_an_empty_linear() -> None:
    x = samples(64, INS)
    x[3, 5] = math.nan
    rows = seen(plan_of(LinearSpec(fprop=GemmSpec(a=NV4))), (x, samples(64, OUTS)))
    assert rows["fprop.x"].poisoned == 64 * INS - 1  # the amax of the tensor is NaN
    assert rows["fprop.x"].sqnr_db is rows["fprop.x"].mse is None
    rows = seen(plan_of(LinearSpec(fprop=GemmSpec(a=NV4))), (x[:0], samples(0, OUTS)))
    assert (rows["fprop.x"].elements, rows["fprop.x"].amax) == (0, 0.0)


def test_delayed_scales_show_what_outgrows_them() -> None:
    spec = OperandSpec(format=E4M3, amax=Delayed(history=2))
    plan = plan_of(LinearSpec(fprop=GemmSpec(a=spec, b=spec)))
    plan.reset_state()
    module = plan.model.get_submodule(PATH)
    x = samples(64, INS)
    with torch.no_grad():
        module.amax_held[0] = x.abs().max() / 2
    rows = seen(plan, (x, samples(64, OUTS)))
    share = 100 * float((x.abs() > x.abs().max() / 2).double().mean())
    assert rows["fprop.x"].saturation_percent == pytest.approx(share)
    assert rows["fprop.x"].scale_min == pytest.approx(float(x.abs().max()) / 2 / 448, rel=1e-6)
    assert rows["fprop.w"].saturation_percent == 0.0


class Two(nn.Module):
    """A block, and a head that no recipe touches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(INS, INS)})])
        self.head = nn.Linear(INS, OUTS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers[0]["up_proj"](x))  # type: ignore[index]
        return y


@pytest.mark.parametrize("recipe", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("autocast", [False, True])
def test_plain_linears_stand_beside_narrow_ones(recipe: str, autocast: bool) -> None:
    """Under autocast what a plain linear rounds to BF16 is seen, and a quantized one starts from BF16 as well."""
    model = Two()
    plan = apply(load(recipe, {"keep_last": 0}), model)
    probe = Probe(plan, every=1)
    x = torch.randn(64, INS, generator=torch.Generator().manual_seed(3))
    with probe.watching(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
        y.float().sum().backward()
    rows = {(row.module, row.slot): row for row in probe.rows()}
    assert len(rows) == 2 * 9
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    name = "bfloat16" if autocast else "float32"
    for slot in ("fprop.x", "fprop.w", "wgrad.x", "dgrad.w"):
        row = rows["head", slot]
        assert row.format == name
        assert row.elements > 0
    weight = by_hand(model.head.weight.detach(), model.head.weight.detach().bfloat16(), math.inf)
    assert rows["head", "fprop.w"].sqnr_db == (pytest.approx(weight["sqnr_db"], rel=1e-6) if autocast else None)
    assert rows["head", "dgrad.dy"].amax == 1.0
    assert (rows["head", "fprop.y"].relative_error > 1e-3) is autocast
    assert rows["head", "wgrad.dw"].relative_error is None
    assert rows["layers.0.up_proj", "fprop.x"].sqnr_db < 40
    assert rows["layers.0.up_proj", "fprop.y"].format == name


def test_a_quantized_linear_is_plain_where_its_spec_is_empty() -> None:
    plan = plan_of(LinearSpec(fprop=GemmSpec(a=MX8)))
    module = plan.model.get_submodule(PATH)
    assert isinstance(module, QuantLinear)
    module.set_specs((module.spec, LinearSpec()))
    module.use((1, 1, 1))
    rows = seen(plan, (samples(64, INS), samples(64, OUTS)))
    assert (rows["fprop.x"].format, rows["fprop.x"].elements, rows["fprop.x"].mse) == ("bfloat16", 64 * INS, 0.0)


def test_compiled_code_is_left_as_it_is() -> None:
    """Quantized linears are measured, plain ones inside are not; also where a watched step is the first."""
    results = []
    for watch in (False, True):
        model = Two().bfloat16()
        plan = apply(load("mxfp8", {}), model)
        compiled = torch.compile(model, backend="eager")
        probe = Probe(plan, every=1)
        x = samples(64, INS).requires_grad_()
        for _ in range(2):
            with probe.watching() if watch else nullcontext():
                y = compiled(x)
                y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(map(torch.equal, *results))
    counts = {(row.module, row.slot): row.elements for row in probe.rows()}
    assert counts["layers.0.up_proj", "fprop.x"] == 64 * INS
    assert counts["head", "fprop.x"] == 0


def test_evaluation_is_not_counted() -> None:
    plan = plan_of(LinearSpec(fprop=GemmSpec(a=MX8)))
    probe = Probe(plan, every=1)
    module = plan.model.get_submodule(PATH).eval()
    with probe.watching():
        module(samples(4, INS))
        with torch.no_grad():
            module.train()(samples(4, INS))
    assert {row.elements for row in probe.rows()} == {0}


def test_what_is_wrong_is_one_line() -> None:
    plan = plan_of(LinearSpec(fprop=GemmSpec(a=MX8)))
    for settings, message in (
        ({"every": -1}, r"every=-1: must not be negative"),
        ({"every": 1, "layers": "["}, r"layers='\[': not a regular expression"),
        ({"every": 1, "layers": "layers.0.up_prj"}, r"matches no linear \(did you mean 'layers.0.up_proj'\?\)"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            Probe(plan, **settings)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert [Probe(plan, every=3).due(step) for step in (1, 2, 3, 4, 6)] == [False, False, True, False, True]
    assert not Probe(plan, every=0).due(0)
