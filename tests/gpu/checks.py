"""What this project claims of GPUs, as a list of checks: a new kernel is one line of ``KERNELS``.

``scripts/gpu_check.py`` runs them all and prints a table; ``test_gpu.py`` makes each a test. Without a GPU, kernels run
in Triton's interpreter on small shapes, and what needs hardware says so.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from gpu_suite.clock import timed
from narrowgauge.precision.apply import apply
from narrowgauge.precision.backends import NATIVE, QUANTIZERS, REFERENCE, Cast, Quantizer
from narrowgauge.precision.backends.scaled_mm import SQNR_DB, architecture
from narrowgauge.precision.backends.triton.device import installed, runs_on
from narrowgauge.precision.backends.triton.fused import quantize_gradients
from narrowgauge.precision.backends.triton.quantize import quantize_fused
from narrowgauge.precision.formats import E2M1, E4M3, E5M2
from narrowgauge.precision.loading import load, names
from narrowgauge.precision.noise import Noise, base_key, step_key
from narrowgauge.precision.quantize import Quantized, quantize
from narrowgauge.precision.scaling import Fp32, PowerOfTwo, Tile, TwoLevel
from narrowgauge.precision.spec import GemmSpec, OperandSpec, Rounding
from narrowgauge.precision.swiglu import Gradients, Hidden
from narrowgauge.precision.transforms import Hadamard
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Outcome:
    """``ok`` is None where the check needs other hardware; ``time`` is of a GPU alone."""

    ok: bool | None
    measured: str
    time: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    claim: str
    run: Callable[[], Outcome]


HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ARCH = architecture(HERE)
#: Rows and columns: of a layer on a GPU, of a few blocks for the interpreter.
SHAPE = (8192, 4096) if HERE.type == "cuda" else (40, 64)
LAYER = (4096, 4096, 4096)  # m, n, k of a product


def not_here(why: str) -> Outcome:
    return Outcome(None, f"not on this machine: {why}")


def sqnr(ours: Tensor, exact: Tensor) -> float:
    """In dB; infinite where they are equal."""
    noise = (ours.double() - exact.double()).norm()
    return float("inf") if noise == 0 else float(20 * torch.log10(exact.double().norm() / noise))


# Quantization kernels: bit for bit the reference's.

BLOCK16 = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())
MX = OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())
FP4 = OperandSpec(format=E2M1, tile=Tile(1, 32), scale=PowerOfTwo())
FINE, SQUARE = (
    OperandSpec(format=E4M3, tile=Tile(outer, 128), scale=Fp32(pow2=True, input_max=True)) for outer in (1, 128)
)
#: Name -> backend, spec, size of the Hadamard transform before it.
KERNELS: dict[str, tuple[str, OperandSpec, int]] = {
    "FP8 e4m3, tensor": ("triton", OperandSpec(format=E4M3), 0),
    "FP8 e5m2, tensor": ("triton", OperandSpec(format=E5M2), 0),
    "FP8 e4m3, row": ("triton", OperandSpec(format=E4M3, tile=Tile(1, -1), scale=Fp32(pow2=True)), 0),
    "FP8 e4m3, 1x128": ("triton", FINE, 0),
    "FP8 e4m3, 128x128": ("triton", SQUARE, 0),
    "MXFP8, 1x32": ("triton", MX, 0),
    "MXFP8, 32x32": ("triton", OperandSpec(format=E4M3, tile=Tile(32, 32), scale=PowerOfTwo()), 0),
    "MXFP4, 1x32": ("triton", OperandSpec(format=E2M1, tile=Tile(1, 32), scale=PowerOfTwo()), 0),
    "NVFP4, 1x16": ("triton", BLOCK16, 0),
    "NVFP4, 16x16": ("triton", OperandSpec(format=E2M1, tile=Tile(16, 16), scale=TwoLevel()), 0),
    "NVFP4, 1x16, stochastic": (
        "triton",
        OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel(), rounding=Rounding.STOCHASTIC),
        0,
    ),
    "Hadamard 16, then NVFP4": ("triton", BLOCK16, 16),
}  # fmt: skip


def check_kernel(backend_name: str, spec: OperandSpec, hadamard: int, *, transposed: bool) -> Outcome:
    backend = next((backend for backend in QUANTIZERS if backend.name == backend_name), None)
    if backend is None:
        return not_here(f"this build has no backend {backend_name}")
    gemm = GemmSpec(a=spec, b=spec, transform=Hadamard(size=hadamard) if hadamard else None)
    if reason := backend.why_not(gemm, HERE):
        return not_here(reason)
    torch.manual_seed(0)
    x = torch.randn(SHAPE, device=HERE) * torch.exp(torch.randn(SHAPE, device=HERE))
    x.view(-1)[:: 64 * 64 + 1] = 0.0
    x = x.to(torch.bfloat16)
    x = x.mT if transposed else x
    zero = torch.zeros((), dtype=torch.int64, device=HERE)
    key = step_key(base_key(1, "layers.0", 2, device=HERE), zero)
    random = spec.rounding is Rounding.STOCHASTIC
    noise = Noise(key=key, row_offset=zero, transposed=transposed) if random else None

    def made(by: Quantizer, x: Tensor) -> Quantized:
        q = by.cast(x, Cast(spec=spec, noise=noise, transform=gemm.transform))
        assert isinstance(q, Quantized)
        return q

    ours, reference = made(backend, x), made(REFERENCE.quantizer, x)
    tensors = [(q.codes, q.scales.float(), q.tensor_scale) for q in (ours, reference)]
    wrong = sum(int((a != b).sum()) for a, b in zip(*tensors, strict=True) if a is not None and b is not None)
    nonzero = float((reference.codes & 0x7F != 0).float().mean())
    time = ""
    if HERE.type == "cuda":
        timing = timed(*(partial(made, backend, copy) for copy in (x, x.clone(), x.clone())))
        moved = x.numel() * x.element_size() + ours.codes.numel() + ours.scales.numel() * ours.scales.element_size()
        time = f"{timing}, {moved / timing.ms / 1e6:.0f} GB/s of its least traffic"
    where = "" if HERE.type == "cuda" else ", interpreted"
    measured = f"{wrong} of {ours.codes.numel()} codes and scales differ; {nonzero:.0%} of bytes not zero{where}"
    return Outcome(wrong == 0 and nonzero > 0.3, measured, time)


#: Specs of silu(gate) * up and of its gradients, computed inside the kernels that quantize them.
FUSED = {"FP8 e4m3, tensor": OperandSpec(format=E4M3), "MXFP8, 1x32": MX, "NVFP4, 1x16": BLOCK16}


def check_swiglu(spec: OperandSpec, *, transposed: bool) -> Outcome:
    if not runs_on(HERE) or not installed():
        return not_here("no GPU, and kernels are not interpreted")
    torch.manual_seed(0)
    gate, up, dh = (torch.randn(SHAPE, device=HERE).to(torch.bfloat16) for _ in range(3))
    d = torch.rand(SHAPE[1], device=HERE) + 0.5
    h, gradients = Hidden(gate, up, d, 1), Gradients(dh, gate, up)
    h, gradients = (h.mT, gradients.mT) if transposed else (h, gradients)

    def made() -> list[Quantized]:
        return [quantize_fused(h, spec), *quantize_gradients(gradients, spec)]

    plain = [h.computed(), *gradients.computed()]
    wrong = total = 0
    for ours, x in zip(made(), plain, strict=True):
        reference = quantize(x, spec)
        wrong += int((ours.codes != reference.codes).sum()) + int((ours.scales != reference.scales).sum())
        total += ours.codes.numel()
    time = f"{timed(made)}, forward and backward" if HERE.type == "cuda" else ""  # more than the cache holds
    return Outcome(wrong == 0, f"{wrong} of {total} codes and scales differ", time)


# Native products.

ROW = OperandSpec(format=E4M3, tile=Tile(1, -1))
HOPPER_FINE, HOPPER_SQUARE = (
    OperandSpec(format=E4M3, tile=Tile(outer, 128), scale=Fp32(input_max=True)) for outer in (1, 128)
)
PRODUCTS: dict[str, tuple[OperandSpec, OperandSpec]] = {
    "tensor-wise e4m3 x e4m3": (OperandSpec(format=E4M3), OperandSpec(format=E4M3)),
    "tensor-wise e5m2 x e4m3": (OperandSpec(format=E5M2), OperandSpec(format=E4M3)),
    "row-wise e4m3 x e4m3": (ROW, ROW),
    "row-wise e4m3 x tensor-wise": (ROW, OperandSpec(format=E4M3)),
    "1x128 x 128x128, powers of two": (FINE, SQUARE),
    "1x128 x 1x128, powers of two": (FINE, FINE),
    "1x128 x 128x128, FP32 scales": (HOPPER_FINE, HOPPER_SQUARE),
    "MXFP8": (MX, MX),
    "MXFP8, weights 32x32": (MX, OperandSpec(format=E4M3, tile=Tile(32, 32), scale=PowerOfTwo())),
    "MXFP4 as MXFP8": (FP4, FP4),
    "NVFP4": (BLOCK16, BLOCK16),
    "NVFP4, weights 16x16": (BLOCK16, OperandSpec(format=E2M1, tile=Tile(16, 16), scale=TwoLevel())),
}


def check_product(a: OperandSpec, b: OperandSpec, *, ragged: bool) -> Outcome:
    """m, n, k of a layer, or of none of the multiples that hardware wants; bias, three output dtypes, a transpose."""
    m, n, k = (size - less * ragged for size, less in zip(LAYER, (31, 24, 14), strict=True))
    if reason := NATIVE.why_not(GemmSpec(a=a, b=b), (m, n, k), HERE):
        return not_here(reason)
    torch.manual_seed(0)
    left, right = (
        quantize(torch.randn(rows, k, device=HERE, dtype=torch.bfloat16), spec) for rows, spec in ((m, a), (n, b))
    )
    pairs = [(left, right)]
    if b.tile.outer == b.tile.inner:  # as in dgrad: codes of the transpose
        w = torch.randn(k, n, device=HERE, dtype=torch.bfloat16)
        pairs.append((left, quantize(w, b).t()))
    worst = float("inf")
    for x, w_q in pairs:
        exact = REFERENCE.product.gemm(x, w_q, bias=None, dtype=torch.float32)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for bias in (None, torch.randn(n, device=HERE).to(dtype)):
                y = NATIVE.gemm(x, w_q, bias=bias, dtype=dtype)
                wanted = exact if bias is None else exact + bias.float()
                worst = min(worst, sqnr(y, wanted))
    copies = [[replace(q, codes=q.codes.clone()) for q in (left, right)] for _ in range(3)]
    ours = timed(*(partial(NATIVE.gemm, *pair, bias=None, dtype=torch.bfloat16) for pair in copies))
    plain = [[torch.randn(rows, k, device=HERE, dtype=torch.bfloat16) for rows in (m, n)] for _ in range(3)]
    bf16 = timed(*(partial(nn.functional.linear, *pair) for pair in plain))
    time = f"{ours}, {2 * m * n * k / ours.ms / 1e9:.0f} TFLOP/s, {bf16.ms / ours.ms:.2f} of BF16's speed"
    return Outcome(worst >= SQNR_DB, f"{worst:.1f} dB at worst", time)


# Whole linears.

TOKENS = 1024


class OneBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(512, 768))])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](x)
        return y


class OneMlp(nn.Module):
    """A SwiGLU, for recipes that want one."""

    def __init__(self) -> None:
        super().__init__()
        mlp = {"gate_proj": (512, 768), "up_proj": (512, 768), "down_proj": (768, 512)}
        linears = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in mlp.items()})
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": SwiGLU(linears)})])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0]["mlp"](x)  # type: ignore[index]
        return y


class SwiGLU(nn.Module):
    gated_activation = "silu"

    def __init__(self, linears: nn.ModuleDict) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linears.values()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def check_recipe(name: str) -> Outcome:
    """y, dx and dw of a linear under ``backend=auto`` against ``backend=reference``, both on the GPU."""
    if NATIVE.detect(HERE) is None:
        return not_here(f"the model is on {HERE.type}")
    args = {"keep_last": 0} if name in ("nvfp4", "mxfp4") else {}
    smooth = name in ("smooth_swiglu", "fp8_full")
    args |= {"fuse": "always"} if smooth else {}  # of one exponential
    results, plans = [], []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        model = (OneMlp() if smooth else OneBlock()).to(HERE, torch.bfloat16)
        plans.append(str(apply(load(name, args), model, tokens=TOKENS, device=HERE, backend=backend)))
        x = torch.randn(TOKENS, 512, device=HERE, dtype=torch.bfloat16, requires_grad=True)
        y = model(x)
        y.backward(torch.randn_like(y))
        results.append([y, x.grad, *(parameter.grad for parameter in model.parameters() if parameter.ndim > 1)])
    worst = min(sqnr(ours, theirs) for ours, theirs in zip(*results, strict=True))
    return Outcome(
        worst >= SQNR_DB,
        f"{worst:.1f} dB at worst, {plans[0].count('[scaled_mm')} of {9 if smooth else 3} GEMMs native",
    )


def check_all_gather() -> Outcome:
    if torch.cuda.device_count() < 2:
        return not_here(f"{torch.cuda.device_count()} GPUs")
    test = [sys.executable, "-m", "pytest", "-q", "-m", "slow", str(ROOT / "tests/trainer/test_all_gather.py")]
    result = subprocess.run(test, capture_output=True, text=True, check=False, cwd=ROOT)
    return Outcome(result.returncode == 0, result.stdout.strip().splitlines()[-1])


def all_checks() -> Iterator[Check]:
    for name, (backend, spec, hadamard) in KERNELS.items():
        for transposed in (False, True):
            yield Check(
                f"{backend}: {name}{' of the transpose' if transposed else ''}",
                "the reference's bits",
                partial(check_kernel, backend, spec, hadamard, transposed=transposed),
            )
    for name, spec in FUSED.items():
        for transposed in (False, True):
            yield Check(
                f"triton: SwiGLU to {name}{', of the transpose' if transposed else ''}",
                "the reference's bits",
                partial(check_swiglu, spec, transposed=transposed),
            )
    for name, (a, b) in PRODUCTS.items():
        for ragged in (False, True):
            yield Check(
                f"scaled_mm: {name}{', ragged' if ragged else ''}",
                f">= {SQNR_DB:g} dB of the reference",
                partial(check_product, a, b, ragged=ragged),
            )
    for recipe in names():
        if recipe not in ("bf16", "fp32"):
            yield Check(f"recipe: {recipe}", f">= {SQNR_DB:g} dB of the reference", partial(check_recipe, recipe))
    yield Check("parallel.fp8_all_gather on 2 GPUs", "the same losses, bit for bit", check_all_gather)


CHECKS = tuple(all_checks())
