"""The stages of ``gpu_run.py``: each gives rows, one by one, as soon as they are known.

Rows say ``what`` they are of and then numbers. Without a GPU all run at toy sizes, and a row that cannot says so.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gpu_check
import torch
from narrowgauge.precision.backends import NATIVE, QUANTIZERS, quantize_by
from narrowgauge.precision.backends.triton.both import quantize_both
from narrowgauge.precision.backends.triton.device import runs_on
from narrowgauge.precision.backends.triton.quantize import prepare_fused, quantize_fused
from narrowgauge.precision.formats import E2M1, E4M3, E5M2
from narrowgauge.precision.noise import Noise, base_key, step_key
from narrowgauge.precision.scaling import Fp32, PowerOfTwo, Tile, TwoLevel
from narrowgauge.precision.spec import GemmSpec, OperandSpec, Rounding
from narrowgauge.precision.transforms import Hadamard
from narrowgauge.trainer import distributed
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.distributed import World
from narrowgauge.trainer.step import update_from
from torch import Tensor
from torch.profiler import ProfilerActivity

from gpu_suite.bundle import ROOT
from gpu_suite.clock import timed
from gpu_suite.peers import torchao_row, transformers_row
from gpu_suite.profiles import profile_rows
from gpu_suite.results import UNPROVED
from gpu_suite.runs import corpus_overrides, parity_losses, resumed, torchrun_twice
from gpu_suite.steps import (
    RandomTokens,
    Row,
    build_here,
    compiled,
    cuda,
    device,
    forget,
    known,
    measured,
    one_line,
    shape_of,
    synchronize,
    within_memory,
)
from gpu_suite.sums import sums_rows


@dataclass(frozen=True, slots=True)
class Task:
    """What a stage is asked: the size of its model, a folder for its files, the time.time() at which it must end."""

    size: str
    folder: Path
    until: float

    def left(self) -> float:
        return self.until - time.time()


def roofs(task: Task) -> Iterator[Row]:
    """What the rest is held against: bytes read and written by a copy, products of 8192^3."""
    here, side, size = device(), 8192 if cuda() else 256, (1 << 30) if cuda() else (1 << 20)
    x, y = (torch.randint(100, (size,), dtype=torch.int8, device=here) for _ in range(2))
    yield {"what": "copy", "GB/s": 2 * size / timed(partial(y.copy_, x)).ms / 1e6}
    del x, y
    a, b = (torch.randn(side, side, device=here).bfloat16() for _ in range(2))

    def rate(call: Callable[[], object]) -> float:
        return 2 * side**3 / timed(call).ms / 1e9

    yield {"what": f"BF16 {side}^3", "TFLOP/s": rate(lambda: a @ b.mT)}
    if not cuda():
        yield {"what": f"FP8 {side}^3", "": UNPROVED}
        return
    fa, fb = (x.clamp(-448, 448).to(torch.float8_e4m3fn) for x in (a, b))
    one, rows = torch.ones((), device=here), torch.ones(side, 1, device=here)
    for name, scales in {"tensor-wise": (one, one), "row-wise": (rows, rows.mT)}.items():
        for fast in (True, False):
            product = partial(torch._scaled_mm, fa, fb.mT, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)
            yield _or_error(f"FP8 {name} {side}^3, fast={fast}", lambda product=product: {"TFLOP/s": rate(product)})


def _or_error(what: str, row: Callable[[], Row]) -> Row:
    try:
        return {"what": what} | row()
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {"what": what, "error": one_line(error)}


#: Name -> overrides and whether blocks are compiled, in the order of worth. ``keep_last=0``: all blocks in four bits.
STEPS: dict[str, tuple[list[str], bool]] = {
    "bf16 compiled": (["precision=bf16"], True),
    "fp8_current compiled": (["precision=fp8_current"], True),
    "fp8_rowwise compiled": (["precision=fp8_rowwise"], True),
    "fp8_block compiled": (["precision=fp8_block"], True),
    "fp8_delayed compiled": (["precision=fp8_delayed"], True),
    "bf16 eager": (["precision=bf16"], False),
}
EMULATED: dict[str, tuple[list[str], bool]] = {
    "nvfp4 compiled": (["precision=nvfp4", "precision.args.keep_last=0"], True),
    "mxfp8 compiled": (["precision=mxfp8"], True),
}


def _world(overrides: Sequence[str] = ()) -> World:
    return distributed.start(load_config(list(overrides)).parallel)


def _trained(task: Task, ways: dict[str, tuple[list[str], bool]], world: World) -> Iterator[Row]:
    longest = 0.0
    for what, (overrides, compile_) in ways.items():
        if task.left() < 1.2 * longest:
            yield {"what": what, "": f"left out: {task.left():.0f} s left"}
            continue
        begun = time.time()
        words = [*overrides, *compiled(compile_)]
        row = within_memory(
            what, lambda divide, what=what, words=words: measured(what, task.size, world, words, divide=divide)
        )
        yield row | ({"": f"compiled {UNPROVED}"} if compile_ and not cuda() else {})
        longest = max(longest, time.time() - begun)


def _shape_row(task: Task) -> Row:
    model, sequences, positions = shape_of(task.size)
    said = f"{model.num_layers} x {model.hidden_size}, ff {model.intermediate_size}, vocabulary {model.vocab_size}"
    return {"what": f"model {model.name}", "shape": said, "tokens": f"{sequences} x {positions}"}


def steps(task: Task) -> Iterator[Row]:
    """Training steps of BF16 and of the FP8 recipes; last a single block under a vocabulary of 128,256."""
    yield _shape_row(task)
    world = _world()
    yield from _trained(task, STEPS, world)
    if task.left() > 30:
        change = {"num_layers": 1, "vocab_size": 128_256 if cuda() else 512}
        words = ["precision=bf16", *compiled()]
        what = f"bf16 compiled, 1 block, {change['vocab_size']} words"
        yield _or_error(what, lambda: measured(what, task.size, world, words, change=change))


def emulated(task: Task) -> Iterator[Row]:
    """Steps of formats that the card does not multiply: values rounded to theirs, products in BF16."""
    yield from _trained(task, EMULATED, _world())


def check(task: Task) -> Iterator[Row]:
    """Every claim of ``gpu_check.py``: what fails, then how many hold."""
    counts = {"ok": 0, "FAIL": 0, "-": 0}
    given_up = 0
    for row in gpu_check.results([], limit=60.0, until=task.until - 6):
        counts[row["result"]] += 1
        given_up += row["measured"] == gpu_check.GIVEN_UP
        fails = row["result"] == "FAIL"
        said = {"result": row["result"], "measured": row["measured"]}
        yield {"what": row["check"], **said} | ({} if fails else {"detail": True})
    yield {
        "what": "claims",
        "hold": counts["ok"],
        "fail": counts["FAIL"],
        "not here": counts["-"] - given_up,
        "left out": given_up,
    }


def quantize(task: Task) -> Iterator[Row]:
    """Kernels that quantize, over matrices that take turns and together are larger than the cache."""
    here = device()
    rows, cols = (16384, 2048) if cuda() else (64, 128)
    xs = [torch.randn(rows, cols, device=here).bfloat16() for _ in range(4)]
    ys = [torch.empty_like(x) for x in xs]
    copies = [partial(y.copy_, x) for x, y in zip(xs, ys, strict=True)]
    bandwidth = 2 * xs[0].nbytes / timed(*copies).ms / 1e6
    yield {"what": f"copy of BF16 {rows} x {cols}", "GB/s": bandwidth}
    if not runs_on(here):
        yield {"what": "kernels", "": UNPROVED}
        return
    for what, (kind, call, least) in _kernels(here).items():

        def row(kind: str = kind, call: Callable[[Tensor], object] = call, least: float = least) -> Row:
            timing = timed(*(partial(call, x) for x in xs))
            rate = least * rows * cols / timing.ms / 1e6
            said: Row = {"us": 1e3 * timing.ms, "GB/s": rate, "%copy": round(100 * rate / bandwidth, 1), "kind": kind}
            return said | ({} if timing.of_device else {"": "host bound" if cuda() else f"interpreted; us {UNPROVED}"})

        yield _or_error(what, row) | {"kind": kind}


def _kernels(here: torch.device) -> dict[str, tuple[str, Callable[[Tensor], object], float]]:
    """Name -> kind of the goal, the call, bytes an element that it must read and write."""
    zero = torch.zeros((), dtype=torch.int64, device=here)
    noise = Noise(key=step_key(base_key(1, "x", 2, device=here), zero), row_offset=zero)
    columns = Noise(key=noise.key, row_offset=zero, transposed=True)
    top = torch.full((), 6.0, device=here)
    tensor, wide = OperandSpec(format=E4M3), OperandSpec(format=E5M2)
    row = OperandSpec(format=E4M3, tile=Tile(1, -1), scale=Fp32(pow2=True))
    fine = OperandSpec(format=E4M3, tile=Tile(1, 128), scale=Fp32(pow2=True, input_max=True))
    mx = OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())
    nv = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())
    random = replace(nv, rounding=Rounding.STOCHASTIC)
    one, both, hadamard = "one direction", "both directions", "hadamard"
    butterfly = {"noise": columns, "transform": Hadamard(size=16)}
    return {
        "fp8 tensor, amax given": (one, lambda x: quantize_fused(x, tensor, amax=top), 3),
        # A scale of the whole matrix comes before its first code: 2 bytes more, of a first read.
        "fp8 tensor": (one, lambda x: quantize_fused(x, tensor), 5),
        "fp8 e5m2 tensor": (one, lambda x: quantize_fused(x, wide), 5),
        "fp8 row": (one, lambda x: quantize_fused(x, row), 3),
        "fp8 row, columns": (one, lambda x: quantize_fused(x.mT, row), 3),
        "fp8 1x128": (one, lambda x: quantize_fused(x, fine, by_column=True), 3.03),
        "fp8 1x128, both": (both, lambda x: quantize_both(x, fine, by_column=True), 4.06),
        "fp8 row, both": (both, lambda x: quantize_both(x, row), 4),
        "fp8 tensor, both, amax given": (both, lambda x: quantize_both(x, tensor, amax=top), 4),
        "mxfp8": (one, lambda x: quantize_fused(x, mx), 3.03),
        "mxfp8, columns": (one, lambda x: quantize_fused(x.mT, mx), 3.03),
        "mxfp8, both": (both, lambda x: quantize_both(x, mx), 4.06),
        "mxfp8 to BF16": (one, lambda x: prepare_fused(x, mx), 4),
        "nvfp4 to BF16": (one, lambda x: prepare_fused(x, nv), 6),
        "nvfp4": (one, lambda x: quantize_fused(x, nv), 4.56),
        "nvfp4 sr": (one, lambda x: quantize_fused(x, random, noise=noise), 4.56),
        "nvfp4 sr, columns, hadamard": (hadamard, lambda x: quantize_fused(x.mT, random, **butterfly), 4.56),
    }


def products(task: Task) -> Iterator[Row]:
    """GEMMs of a block: BF16, and how many times faster native FP8 is, quantization left out."""
    model, sequences, positions = shape_of(task.size)
    here, m, c, f = device(), sequences * positions, model.hidden_size, model.intermediate_size
    tensor, gradient = OperandSpec(format=E4M3), OperandSpec(format=E5M2)
    row = OperandSpec(format=E4M3, tile=Tile(1, -1), scale=Fp32(pow2=True))
    fine, square = (OperandSpec(format=E4M3, tile=Tile(n, 128), scale=Fp32(input_max=True)) for n in (1, 128))
    kinds = {"tensor": (tensor, tensor), "e5m2": (gradient, tensor), "row": (row, row), "block": (fine, square)}
    made = next(q for q in QUANTIZERS if q.why_not(GemmSpec(), here) is None)
    for what, (k, n) in {"q, o": (c, c), "gate, up": (c, f), "down": (f, c)}.items():
        for gemm, (rows, inner, cols) in {"fprop": (m, k, n), "dgrad": (m, n, k), "wgrad": (n, m, k)}.items():
            a, b = (torch.randn(size, inner, device=here).bfloat16() for size in (rows, cols))
            bf16 = timed(lambda a=a, b=b: a @ b.mT).ms
            result: Row = {"what": f"{what} {gemm} {rows}x{inner}x{cols}", "bf16 ms": bf16}
            result["TFLOP/s"] = 2 * rows * inner * cols / bf16 / 1e9
            for kind, specs in kinds.items():
                spec = GemmSpec(a=specs[0], b=specs[1])
                if NATIVE.why_not(spec, (rows, cols, inner), here) is not None:
                    result[kind] = "-" if cuda() else UNPROVED
                    continue
                try:
                    left, right = (quantize_by(made, x, operand) for x, operand in zip((a, b), specs, strict=True))
                    call = partial(NATIVE.gemm, left, right, bias=None, dtype=torch.bfloat16)
                    result[kind] = f"{bf16 / timed(call).ms:.2f}x"
                except Exception as error:
                    traceback.print_exc(file=sys.stderr)
                    result[kind] = type(error).__name__
            yield result


def sums(task: Task) -> Iterator[Row]:
    """Products of FP8, fast and not, and of BF16: how much of their FP32 outputs, in percent, follows which rule."""
    for row in sums_rows(device(), task.until - 6):
        yield row if cuda() else row | {"": f"of a CPU; a card's sums {UNPROVED}"}


def peers(task: Task) -> Iterator[Row]:
    """The same shape in `transformers`, and our model with torchao's linears in place of ours."""
    yield within_memory("transformers compiled", partial(transformers_row, task.size, True))
    world = _world()
    for recipe in ("tensorwise", "rowwise"):
        what = f"torchao {recipe}"
        if task.left() < 20:
            yield {"what": what, "": f"left out: {task.left():.0f} s left"}
            continue
        yield within_memory(what, partial(torchao_row, what, recipe, task.size, world))
    if task.left() > 25:
        yield within_memory("transformers eager", partial(transformers_row, task.size, False))


def parity(task: Task) -> Iterator[Row]:
    """Ten losses of a small Llama on the CPU and on the GPU: sums of another order, and FP8's own products."""
    found = parity_losses(task.folder, "fp32", "bf16", "fp8_current", "fp8_delayed", "nvfp4", seconds=task.left() - 6)
    for recipe, (on_cpu, on_gpu) in found.items():
        if on_cpu is None:
            yield {"what": recipe, "error": "did not run on the CPU"}
        elif on_gpu is None:
            said = {"error": "did not run on the GPU"} if cuda() else {"": f"against a GPU {UNPROVED}"}
            yield {"what": recipe, "first": on_cpu[0], "CPU": on_cpu[-1], **said}
        else:
            apart = max(abs(a - b) for a, b in zip(on_cpu, on_gpu, strict=True))
            yield {"what": recipe, "first": on_cpu[0], "CPU": on_cpu[-1], "GPU": on_gpu[-1], "most apart": apart}


def resume(task: Task) -> Iterator[Row]:
    """Killed by SIGKILL and started again, against a run left alone: what differs. Then what determinism costs."""
    where = corpus_overrides(task.folder)
    settings = ["true", "false"] if known("parallel.deterministic=true") else [None]
    recipes = ("fp8_delayed", "nvfp4") if cuda() else ("fp8_delayed",)
    for recipe in recipes:
        if task.left() < 30:
            yield {"what": f"{recipe}, killed", "": f"left out: {task.left():.0f} s left"}
            continue
        yield _or_error(f"{recipe}, killed", partial(_killed, task, [*where, f"precision={recipe}"], settings[0]))
    for setting in settings:
        what = f"bf16 compiled, deterministic={setting or 'not a key here'}"
        words = ["precision=bf16", *compiled(), *_deterministic(setting)]
        if task.left() < 30:
            yield {"what": what, "": f"left out: {task.left():.0f} s left"}
        elif setting is not None:  # in a process of its own: it is set where a process starts
            yield from _apart(task, what, words)


def _deterministic(setting: str | None) -> list[str]:
    return [] if setting is None else [f"parallel.deterministic={setting}"]


def _killed(task: Task, overrides: list[str], setting: str | None) -> Row:
    begun = time.time()
    differ = resumed(task.folder / "resume", [*overrides, *_deterministic(setting)])
    shown = differ[0][:60] if differ else "no digit"
    row: Row = {"differ": len(differ), "differs": shown, "deterministic": setting or "not a key here"}
    return row | {"s": round(time.time() - begun)}


def _apart(task: Task, what: str, words: list[str]) -> Iterator[Row]:
    rows = task.folder / "apart.jsonl"
    rows.unlink(missing_ok=True)
    command = [sys.executable, "-m", "gpu_suite", "stage=one", f"size={task.size}", f"until={task.until}"]
    command += [f"rows={rows}", f"folder={task.folder}", f"what={what}", *words]
    try:
        subprocess.run(command, check=True, timeout=max(1.0, task.left() - 2), cwd=ROOT)
    except subprocess.SubprocessError as error:
        yield {"what": what, "error": one_line(error)}
    if rows.exists():
        yield from (row for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines()) if "what" in row)


def one(task: Task, what: str, overrides: list[str]) -> Iterator[Row]:
    """A single row of ``steps``, of a process that is started with ``overrides``."""
    world = _world(overrides)
    yield within_memory(what, lambda divide: measured(what, task.size, world, overrides, divide=divide))


def nccl(task: Task) -> Iterator[Row]:
    """torchrun with one rank: some steps, a checkpoint, and the same command again with more of them."""
    row = torchrun_twice(task.folder / "nccl", corpus_overrides(task.folder), seconds=task.left() - 6)
    yield {"what": "torchrun, one rank"} | row | ({} if cuda() else {"": f"gloo; nccl {UNPROVED}"})


def profile(task: Task) -> Iterator[Row]:
    """Where the device's time in a step goes: by kind of kernel, and the kernels with the most."""
    world, optim = _world(), load_config(["optim.lr=1e-4"]).optim
    model, sequences, positions = shape_of(task.size)
    source = RandomTokens(sequences, positions, model.vocab_size or 0)
    for what in ("fp8_current compiled", "bf16 compiled"):
        if task.left() < 20:
            yield {"what": what, "": f"left out: {task.left():.0f} s left"}
            continue
        forget()
        words = [*STEPS[what][0], *compiled()]
        state = build_here(model, words, world, sequences * positions, None)
        for step in range(3):
            update_from(state, source, world, optim, step, 100)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda() else [])]
        with torch.profiler.profile(activities=activities) as seen:
            update_from(state, source, world, optim, 3, 100)
            synchronize()
        yield from profile_rows(what, seen.key_averages())
        del state, seen


def machine() -> Row:
    """The machine that a stage runs on."""
    row: Row = {"device": "cuda" if cuda() else "cpu", "python": platform.python_version(), "torch": torch.__version__}
    with suppress(PackageNotFoundError):
        row["triton"] = version("triton")
    if cuda():
        properties = torch.cuda.get_device_properties(0)
        row |= {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": _driver()}
        row |= {"GiB": properties.total_memory / 2**30, "multiprocessors": properties.multi_processor_count}
    else:
        row["card"] = f"no GPU, {os.cpu_count()} cores"
    return row


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
