"""The Triton backend, as far as a machine without a GPU can tell: in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hardware import pretend
from narrowgauge.precision.apply import apply
from narrowgauge.precision.backends import Cast, choose, quantize_by
from narrowgauge.precision.backends.triton import blocks, both, device, fused_kernels, kernels, launch, quantize
from narrowgauge.precision.backends.triton.blocks import CANDIDATES, BlockSize, fastest
from narrowgauge.precision.backends.triton.device import recording
from narrowgauge.precision.backends.triton.fused import StateMatrix, quantize_gradients
from narrowgauge.precision.backends.triton.launch import Launcher, start
from narrowgauge.precision.backends.triton.quantizer import Triton
from narrowgauge.precision.backends.triton.specs import grid_of
from narrowgauge.precision.formats import E2M1, E4M3, ExMy
from narrowgauge.precision.loading import load
from narrowgauge.precision.quantize import Quantized
from narrowgauge.precision.quantize import quantize as precision_quantize
from narrowgauge.precision.scaling import Error, FourOverSix, Fp32Decode, PowerOfTwo, Tile, TwoLevel
from narrowgauge.precision.spec import GemmSpec, OperandSpec
from narrowgauge.precision.swiglu import Gradients
from narrowgauge.precision.transforms import Hadamard
from torch import Tensor, nn
from triton.runtime.jit import KernelInterface

HERE = Path(__file__).parent


def python(*arguments: str) -> str:
    """What a Python process prints in which triton interprets its kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, "-W", "ignore:.*encountered in:RuntimeWarning", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=850)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_every_kernel_gives_the_bits_of_the_reference(which: str) -> None:
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::RuntimeWarning", "-x", "-m", which)
    assert "passed" in python("-m", "pytest", *options, str(HERE / "interpreted.py"))


def test_on_a_cpu_it_is_not_fastest() -> None:
    gemm = GemmSpec(a=OperandSpec(format=E4M3))
    assert "triton" not in str(choose(gemm, (None, 8, 8), torch.device("cpu"), "reference"))


class OtherFormat(ExMy):
    """As a recipe may write one: the fields of a known format, with values of its own."""

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return super().round(x * 0.5, noise)


class OtherPowers(PowerOfTwo):
    pass


class OtherLevels(TwoLevel):
    pass


class OtherTransform(Hadamard):
    def left(self, a: Tensor, stats: Tensor | None = None) -> Tensor:
        return -a


OTHER_E2M1, OTHER_E4M3 = (
    OtherFormat(**{field.name: getattr(format, field.name) for field in fields(format)}) for format in (E2M1, E4M3)
)
BLOCK = Tile(1, 16)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (OperandSpec(format=OTHER_E2M1), "no kernel for e2m1, a format of its own: OtherFormat"),
        (
            OperandSpec(format=E4M3, tile=BLOCK, scale=OtherPowers()),
            "no kernel for scales by e8m0-rceil, a rule of its own: OtherPowers",
        ),
        (
            OperandSpec(format=E2M1, tile=BLOCK, scale=OtherLevels()),
            "no kernel for scales by e4m3+fp32, a rule of its own: OtherLevels",
        ),
        (OperandSpec(format=E2M1, tile=BLOCK, scale=TwoLevel(block=OTHER_E4M3)), "no kernel for scales by e4m3+fp32"),
        (OperandSpec(format=E2M1, tile=BLOCK, scale=FourOverSix(error=Error.MSE)), "no kernel for scales by"),
    ],
    ids=("format", "rule", "levels", "format of scales", "four over six"),
)
def test_kernels_take_no_subclass_for_what_it_extends(spec: OperandSpec, reason: str) -> None:
    """It is refused with a reason, and whoever asks for it all the same is given the reference's values."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    backend = Triton()
    with recording((10, 0)) as launches:
        for gemm in (GemmSpec(a=spec), GemmSpec(b=spec)):
            assert str(backend.why_not(gemm, torch.device("cpu"))).startswith(reason)
        ours, plain = quantize_by(backend, x, spec), precision_quantize(x, spec)
        assert isinstance(backend.cast(x, Cast(spec=spec, codes=False)), Quantized)
        assert backend.cast_both(x, Cast(spec=spec)) is None
        assert quantize_gradients(Gradients(x, x, x), spec)[0].shape == x.shape
    assert launches == []
    assert torch.equal(ours.codes, plain.codes)
    assert torch.equal(ours.scales, plain.scales)


def test_kernels_take_no_subclass_of_a_transform() -> None:
    x = torch.randn(32, 64)
    with recording((10, 0)) as launches:
        assert torch.equal(Triton().transformed(OtherTransform(), x, left=True), -x)
    assert launches == []


def test_instructions_are_those_of_a_format_not_of_its_name() -> None:
    assert [grid_of(format).hardware for format in (E4M3, E2M1, replace(E4M3, max=240.0), OTHER_E2M1)] == [1, 3, 0, 0]
    scaled = OperandSpec(format=OTHER_E4M3, tile=Tile(1, 32), scale=Fp32Decode())
    with pytest.raises(ValueError, match="no kernel for states stored as e4m3"):
        StateMatrix(values=torch.zeros(4, 32, dtype=torch.uint8), scales=torch.ones(4, 1), spec=scaled).storage()


@dataclass(frozen=True)
class Way:
    """How a run comes to a kernel: ``precision.recipe``, ``precision.args``, ``precision.backend``; what its plan says.

    ``native``: on a pretended GPU of sm_100, whose products take codes.
    """

    recipe: str
    backend: str
    says: str
    args: dict[str, Any] = field(default_factory=dict)
    native: bool = False


SMOOTH = {"base": "mxfp8", "form": "token"}
FUSED = "silu(gate) * up: [triton, fused with the quantization of h, dgate and dup]"
WAYS = {
    "quantize_kernel": Way("mxfp8", "triton", "e4m3/1x32/e8m0-rceil  [triton]"),
    "quantize_both_kernel": Way("mxfp8", "triton", "e4m3/1x32/e8m0-rceil  [triton]"),
    "amax_kernel": Way("fp8_current", "triton", "e4m3/tensor/fp32  [triton]"),
    "values_kernel": Way("fp8_current", "triton", "e4m3/tensor/fp32  [triton]"),
    "scaled_output_kernel": Way("fp8_current", "triton", "e4m3/tensor/fp32  [triton]"),
    "hadamard_kernel": Way(
        "smooth_swiglu",
        "triton",
        "[smooth-token, hadamard32/0]  [triton]",
        SMOOTH | {"base": "mxfp4", "base_args": {"keep_last": 0}, "fuse": "never"},
    ),
    "swizzle_kernel": Way("mxfp8", "auto", "[scaled_mm, MXFP8 of sm_100, codes by triton]", native=True),
    "adamw_kernel": Way("fp8_full", "triton", "moments by triton", {"moments": "fp8"}),
    "swiglu_backward_kernel": Way("smooth_swiglu", "triton", FUSED, SMOOTH),
    "swiglu_backward_amax_kernel": Way("smooth_swiglu", "triton", FUSED, {"base": "fp8_delayed"}),
}


class Mlp(nn.Module):
    gated_activation = "silu"

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(64, 96, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def launched(way: Way) -> tuple[str, set[str]]:
    """What the plan of a step says, and the kernels that it would launch: they are noted and not run."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": Mlp()})])}).to(torch.bfloat16)
    recipe = load(way.recipe, way.args)
    with recording((10, 0)) as launches:
        plan = apply(recipe, model, tokens=32, backend=way.backend)
        plan.begin_step(0, 0, 2)
        x = torch.randn(32, 64).bfloat16().requires_grad_()
        mlp: nn.Module = model["layers"][0]["mlp"]  # type: ignore[index,assignment]
        mlp(x).float().square().mean().backward()
        plan.end_step()
        hyper: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "moments": recipe.moments, "seed": 0}
        groups = [{"params": list(model.named_parameters())}]
        optimizer = recipe.update.build(groups, **hyper, backend=way.backend)
        optimizer.step()
    by = ", ".join(map(str, getattr(optimizer, "choices", ["torch"])))
    return f"{plan}\nmoments by {by}", {each.kernel.__name__ for each in launches}


def test_every_kernel_has_a_way_from_a_recipe() -> None:
    """A kernel that no line of plan.txt leads to does nothing for anyone."""
    functions = {
        name: value for module in (kernels, fused_kernels) for name, value in vars(module).items() if callable(value)
    }
    assert {name for name, value in functions.items() if name.endswith("_kernel")} == set(WAYS)
    assert all(isinstance(functions[name], KernelInterface) for name in WAYS)


@pytest.mark.parametrize("kernel", WAYS)
def test_a_recipe_leads_to_the_kernel_and_the_plan_says_so(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    way = WAYS[kernel]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what no kernel writes
    try:
        with pretend(monkeypatch, 100, (Triton(by_column=True),)) if way.native else nullcontext():
            plan, seen = launched(way)
    finally:
        torch.use_deterministic_algorithms(False)
    assert way.says in plan
    assert kernel in seen


class FakeKernel:
    """What ``start`` knows of a jit function: launched triton's way it notes that and gives its compiled self."""

    arg_names = ("x", "out", "note", "rows", "BLOCK")
    params = tuple(SimpleNamespace(do_not_specialize_on_alignment=name == "note") for name in arg_names)

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.function, self.packed_metadata = "function", "metadata"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> FakeKernel:
            self.seen.append(("triton's way", grid, *args, kwargs["BLOCK"]))
            return self

        return launch

    def run(self, *args: Any) -> None:
        self.seen.append(args)


def test_a_compiled_kernel_is_kept_for_pointers_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next launch is direct and gives it the same arguments; other alignments are another kernel; other devices
    and hooks go triton's way."""
    hooks = SimpleNamespace(calls=[])
    runtime = SimpleNamespace(launch_enter_hook=hooks, launch_exit_hook=SimpleNamespace(calls=[]))
    device = SimpleNamespace(number=0)
    active = SimpleNamespace(get_current_device=lambda: device.number, get_current_stream=lambda of: f"stream of {of}")
    monkeypatch.setattr(launch, "_runtime", lambda: (runtime, active))
    monkeypatch.setattr(launch, "_direct", lambda kernel: True)
    kernel = FakeKernel()
    x, out = torch.ones(64), torch.ones(64)
    at = x.get_device()
    launcher = Launcher(kernel=kernel, programs=7, numbers=(5,), constexprs={"BLOCK": 64}, num_warps=4, device=at)

    def direct(*tensors: Tensor | None) -> bool:
        kernel.seen.clear()
        start(launcher, *tensors)
        (seen,) = kernel.seen
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        stream = f"stream of {device.number}"
        plain = (7, 1, 1, stream, "function", "metadata", None, None, None, *pointers, 5, 64)
        if seen == plain:
            return True
        assert seen[:2] == ("triton's way", (7,))
        assert all(ours is theirs for ours, theirs in zip(seen[2:5], tensors, strict=True))
        assert seen[5:] == (5, 64)
        return False

    assert not direct(x, out, None)
    assert direct(x, out, None)
    assert direct(out, x[4:], None)
    assert not direct(x[1:], out, None)  # aligned otherwise: another kernel
    assert not direct(x, out[1:], None)
    assert direct(x[2:], out, None)
    assert not direct(x, out, out)
    scalar = Launcher(kernel=kernel, programs=7, numbers=(5,), constexprs={"BLOCK": 64}, num_warps=4, device=at)
    kernel.seen.clear()
    for _ in range(2):
        start(scalar, x, out, out[1:])  # of which the kernel asks nothing
    assert [seen[0] for seen in kernel.seen] == ["triton's way", 7]
    hooks.calls.append(print)
    assert not direct(x, out, None)
    hooks.calls.clear()
    device.number = 1
    assert not direct(x, out, None)
    assert direct(x, out, None)
    with recording((9, 0)) as launches:
        start(launcher, x, out, None)
    assert launches[0].arguments == {"x": x, "out": out, "note": None, "rows": 5, "BLOCK": 64}
    launcher.device += 1
    assert not direct(x, out, None)


def test_plans_are_made_once_and_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of calling has a plan of its own, equal specs share one, and a second call makes none."""
    monkeypatch.setattr(launch, "_PLANS", {})
    monkeypatch.setattr(device, "capability", lambda device: (9, 0))
    for module in (quantize, both):
        monkeypatch.setattr(module, "runs_on", lambda device: True)
        monkeypatch.setattr(module, "start", lambda launcher, *tensors: None)
    x, top, note = torch.ones(64, 128), torch.ones(1), torch.zeros(1)
    spec, twin = (OperandSpec(format=E4M3) for _ in range(2))
    quantizer = Triton()

    def calls(spec: OperandSpec) -> None:
        for of in (x, x.mT, x.bfloat16(), x[:, :64]):
            for codes in (True, False):
                quantizer.cast(of, Cast(spec=spec, codes=codes))
                quantizer.cast(of, Cast(spec=spec, amax=top, codes=codes))
                quantizer.cast(of, Cast(spec=spec, amax=top, codes=codes, note=note))
                quantizer.cast_both(of, Cast(spec=spec, codes=codes))
                quantizer.cast_both(of, Cast(spec=spec, amax=top, codes=codes))

    calls(spec)
    planned = len(launch._PLANS)
    assert planned == 4 * 2 * 5
    monkeypatch.setattr(quantize, "QuantizePlan", None)
    monkeypatch.setattr(both, "BothPlan", None)
    calls(spec)
    calls(twin)
    assert len(launch._PLANS) == planned


def test_blocks_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a GPU, with made-up times: the fastest is kept in a file, which other processes read."""
    cuda, seen = torch.device("cuda"), []
    times = dict(zip((None, *CANDIDATES), (5.0, 4.0, 3.0, 1.0, 2.0), strict=True))
    monkeypatch.setattr(blocks, "_tuned_path", lambda: tmp_path / "kept" / "blocks.json")
    monkeypatch.setattr(blocks, "capability", lambda device: (9, 0))
    monkeypatch.setattr(blocks, "_milliseconds", lambda call: call())

    def run(size: BlockSize | None) -> float:
        seen.append(size)
        return times[size]

    blocks._tuned.cache_clear()
    try:
        assert fastest("rows", cuda, run) is None
        monkeypatch.setenv("NARROWGAUGE_TUNE", "1")
        assert fastest("rows", torch.device("cpu"), run) is None
        assert not seen
        assert fastest("rows", cuda, run) == fastest("rows", cuda, run) == CANDIDATES[2]
        assert seen == list(times)
        times[None] = 0.0
        assert fastest("columns", cuda, run) is None
        blocks._tuned.cache_clear()
        monkeypatch.delenv("NARROWGAUGE_TUNE")
        assert fastest("rows", cuda, run) == CANDIDATES[2]
        assert fastest("columns", cuda, run) is None
        monkeypatch.setattr(blocks, "capability", lambda device: (10, 0))
        assert fastest("rows", cuda, run) is None
        assert len(seen) == 2 * len(times)
    finally:
        blocks._tuned.cache_clear()
