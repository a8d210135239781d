"""What emulation costs in time: python scripts/bench_precision.py [parts=elements,linear,step,start] [rounds=9]
[starts=nvfp4] [threads=0: all] [clock=wall] [json=]

One process, every way in turn in every round; the minimum and the median over rounds, and their ratios to BF16.

elements    quantizing a BF16 matrix, in ns per element and in BF16 copies of the same matrix. Warm: one matrix, as the
            caches leave it. Cold: matrices in turn, so that every one has left the caches, copies included.
linear      forward and backward of one linear 256 -> 704 at 8,192 rows against `F.linear` in BF16, and torchao's
            emulated Float8Linear and MXFP8 linear where torchao is installed.
step        a training step of this trainer: vocabulary 8,192, hidden 256, FFN 704, 8 layers, 8 heads, 16 sequences of
            512 tokens.
start       from the start of `python -m narrowgauge` to the end of its first step, of BF16 and of every recipe in
            ``starts=RECIPE,...``, with kernels built before and with an empty cache. Wall time of one run each, 10 to
            30 s; ``rounds`` and ``clock`` are of the other parts.

``json=PATH`` writes the table there as well. On a machine that others use too, ``threads=1 clock=cpu`` counts the CPU
seconds of one thread. Times are of emulation on this CPU: nothing about narrow hardware.
"""

import gzip
import itertools
import json as jsonlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from narrowgauge.models import LlamaConfig
from narrowgauge.precision.apply import apply
from narrowgauge.precision.backends import Cast, choose
from narrowgauge.precision.formats import E2M1, E4M3
from narrowgauge.precision.linear import QuantLinear
from narrowgauge.precision.loading import load
from narrowgauge.precision.noise import Noise, base_key, step_key
from narrowgauge.precision.plan import Plan
from narrowgauge.precision.scaling import PowerOfTwo, Tile, TwoLevel
from narrowgauge.precision.spec import GemmSpec, OperandSpec, Rounding
from narrowgauge.precision.transforms import Hadamard
from narrowgauge.trainer import distributed
from narrowgauge.trainer.build import build_state
from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.config import TrainConfig, groups, load_config
from narrowgauge.trainer.data.batches import Batch
from narrowgauge.trainer.distributed import World
from narrowgauge.trainer.errors import UserError
from narrowgauge.trainer.kernels import KERNELS
from narrowgauge.trainer.metrics import read_metrics
from narrowgauge.trainer.step import update_from
from torch import Tensor, nn
from tqdm import tqdm

from narrowgauge import native

try:  # a test-only dependency
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.prototype.moe_training.config import MXFP8TrainingOpConfig, MXFP8TrainingRecipe
    from torchao.quantization import quantize_
except ImportError:
    convert_to_float8_training = None

PARTS = {
    "elements": "quantizing a matrix",
    "linear": "forward and backward of a linear",
    "step": "a training step of 8 layers",
    "start": "a run's first step",
}
# Of 2 cores (Zen 4): once, and a round; of the start, of BF16 and of a recipe.
SECONDS = {"elements": (5.0, 0.3), "linear": (3.0, 0.7), "step": (15.0, 23.0), "start": (10.0, 38.0)}
ROWS, INS, OUTS = 8192, 256, 704
VOCAB, LAYERS, HEADS, POSITIONS, SEQUENCES = 8192, 8, 8, 512, 16
# Of a BF16 copy, of a BF16 linear, of a BF16 step.
ELEMENT_TARGETS = {
    "FP8, scale given": 2.0,
    "FP8, current scale": 2.0,
    "MXFP8": 2.5,
    "NVFP4": 4.0,
    "NVFP4 stochastic": 5.0,
    "Hadamard + NVFP4 stochastic": 7.0,
}
LINEAR_TARGETS = {"fp8_delayed": 1.35, "mxfp8": 1.8, "fp8_block": 2.0, "nvfp4": 2.8}
STEP_TARGETS = {"fp8_delayed": 1.3, "mxfp8": 1.45, "fp8_block": 1.6, "nvfp4": 1.8}
# What is timed beside: NVFP4 keeps 15% of the blocks in BF16 if not told otherwise.
STEP_OTHERS = {
    "nvfp4 in every block": ["precision=nvfp4", "precision.args.keep_last=0"],
    "smooth_swiglu": ["precision=smooth_swiglu"],
    "smooth_swiglu by token": ["precision=smooth_swiglu", "precision.args.form=token"],
    "fp8_full": ["precision=fp8_full"],
}
COLD_BYTES = 128 << 20  # of matrices in turn: beyond any cache here

_clock: Callable[[], float] = time.perf_counter

Row = dict[str, str | float | None]
Way = Callable[[], object]


class RandomSource:
    """Batches of random tokens."""

    num_micro = 1

    def first_sample(self, step: int) -> int:
        return step * SEQUENCES

    def batch(self, step: int, micro: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCAB, (SEQUENCES, POSITIONS + 1), generator=generator)
        return Batch(tokens, torch.ones(SEQUENCES, POSITIONS), self.first_sample(step))


def estimated(parts: Sequence[str], rounds: int, starts: int) -> float:
    """Seconds that ``parts`` take, about."""
    turns = {"start": starts}
    return sum(SECONDS[part][0] + SECONDS[part][1] * turns.get(part, rounds + 2) for part in parts)


def progress(what: str, total: int) -> tqdm:
    """On standard error, for a person: results alone are on standard output."""
    return tqdm(total=total, desc=what, unit="turn", file=sys.stderr, disable=None, leave=False, dynamic_ncols=True)


def interleaved(ways: Mapping[str, Way], rounds: int, repeats: int = 1, what: str = "") -> dict[str, list[float]]:
    """Seconds of every way, once per round; two rounds before are not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    bar = progress(what, (rounds + 2) * len(ways))
    for turn in range(rounds + 2):
        for name, way in ways.items():
            bar.set_postfix_str(name)
            started = _clock()
            for _ in range(repeats):
                way()
            if turn >= 2:
                times[name].append((_clock() - started) / repeats)
            bar.update()
    bar.close()
    return times


def elements(rounds: int, world: World) -> list[Row]:
    spec8 = OperandSpec(format=E4M3)
    mx8 = OperandSpec(format=E4M3, tile=Tile(1, 32), scale=PowerOfTwo())
    nv4 = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())
    nv4_sr = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel(), rounding=Rounding.STOCHASTIC)
    by = choose(GemmSpec(a=spec8, b=spec8), (ROWS, OUTS, INS), torch.device("cpu")).backend.quantizer
    given = torch.tensor([5.0])
    noise = Noise(key=step_key(base_key(0, "bench", 2), 1), row_offset=7)
    transposed = Noise(key=step_key(base_key(0, "bench", 4), 1), row_offset=7, transposed=True)
    hadamard = Hadamard()
    quantizers: dict[str, Callable[[Tensor], object]] = {
        "BF16 copy": lambda x: x.clone(),
        "FP8, scale given": lambda x: by.cast(x, Cast(spec=spec8, amax=given)),
        "FP8, current scale": lambda x: by.cast(x, Cast(spec=spec8)),
        "MXFP8": lambda x: by.cast(x, Cast(spec=mx8)),
        "NVFP4": lambda x: by.cast(x, Cast(spec=nv4)),
        "NVFP4 stochastic": lambda x: by.cast(x, Cast(spec=nv4_sr, noise=noise)),
        # Along tokens, as wgrad reads it.
        "Hadamard + NVFP4 stochastic": lambda x: by.cast(x.mT, Cast(spec=nv4_sr, noise=transposed, transform=hadamard)),
    }
    rows: list[Row] = []
    for columns in (INS, OUTS):
        for kind in ("warm", "cold"):
            shape = (ROWS, columns)
            number = 1 if kind == "warm" else -(-COLD_BYTES // (2 * ROWS * columns))
            matrices = [torch.randn(shape).bfloat16() for _ in range(number)]
            place = 0

            def turn(quantizer: Callable[[Tensor], object], matrices: list[Tensor] = matrices) -> object:
                nonlocal place
                place = (place + 1) % len(matrices)
                return quantizer(matrices[place])

            ways: dict[str, Way] = {name: lambda q=q, turn=turn: turn(q) for name, q in quantizers.items()}  # type: ignore[misc]
            times = interleaved(ways, rounds, repeats=5, what=f"elements, {ROWS}x{columns} {kind}")
            scale = 1e9 / (ROWS * columns)
            for name, seconds in times.items():
                rows.append(
                    _row(f"{ROWS}x{columns} {kind}: {name}", seconds, times["BF16 copy"], scale, "ns per element")
                    | {"target": ELEMENT_TARGETS.get(name)}
                )
    return rows


def linear(rounds: int, world: World) -> list[Row]:
    ways: dict[str, Way] = {"bf16": _linear_way(_plain(), None)}
    for name in LINEAR_TARGETS:
        ways[name] = _linear_way(*_quantized(name))
    if convert_to_float8_training is not None:
        float8 = nn.Sequential(_plain())
        convert_to_float8_training(float8, config=Float8LinearConfig(emulate=True))
        ways["torchao Float8Linear, emulated"] = _linear_way(float8, None)
        mx = nn.Sequential(_plain())
        quantize_(
            mx,
            MXFP8TrainingOpConfig.from_recipe(MXFP8TrainingRecipe.MXFP8_EMULATED_RCEIL),
            filter_fn=lambda module, name: isinstance(module, nn.Linear),
        )
        ways["torchao MXFP8 linear, emulated"] = _linear_way(mx, None)
    times = interleaved(ways, rounds, what="linear")
    return [
        _row(f"linear: {name}", seconds, times["bf16"], 1e3, "ms") | {"target": LINEAR_TARGETS.get(name)}
        for name, seconds in times.items()
    ]


def _plain() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INS, OUTS, bias=False).bfloat16()


def _quantized(recipe: str) -> tuple[nn.Module, Plan]:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up_proj": _plain()})])})
    args = {"keep_last": 0, "bf16_forward": 0} if recipe == "nvfp4" else {}
    plan = apply(load(recipe, args), model)
    module = model.get_submodule("layers.0.up_proj")
    assert isinstance(module, QuantLinear)
    return module, plan


def _linear_way(module: nn.Module, plan: Plan | None) -> Way:
    # Two inputs in turn: a linear knows again what it has just read.
    inputs = [torch.randn(SEQUENCES, ROWS // SEQUENCES, INS).bfloat16().requires_grad_() for _ in range(2)]
    dy = torch.randn(SEQUENCES, ROWS // SEQUENCES, OUTS).bfloat16() / ROWS
    step = 0

    def way() -> None:
        nonlocal step
        step += 1
        x = inputs[step % 2]
        module.zero_grad()
        x.grad = None
        if plan is not None:
            plan.begin_step(step, 0)
        module(x).backward(dy)
        if plan is not None:
            plan.end_step()

    return way


def step(rounds: int, world: World) -> list[Row]:
    ways = {name: _step_way(_step_config(name), world) for name in ("bf16", *STEP_TARGETS)}
    ways |= {name: _step_way(load_config(overrides), world) for name, overrides in STEP_OTHERS.items()}
    times = interleaved(ways, rounds, what="step")
    return [
        _row(f"step: {name}", seconds, times["bf16"], 1e3, "ms") | {"target": STEP_TARGETS.get(name)}
        for name, seconds in times.items()
    ]


def _step_config(recipe: str, threads: int = 0) -> TrainConfig:
    return load_config([f"precision={recipe}", f"parallel.threads={threads or 'null'}"])


def _step_way(config: TrainConfig, world: World) -> Way:
    model = LlamaConfig(
        name="bench",
        vocab_size=VOCAB,
        hidden_size=INS,
        intermediate_size=OUTS,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        tie_embeddings=True,
    )
    state = build_state(model, config.values.precision, config.parallel, config.optim, world, seed=0)
    source = RandomSource()
    number = 0

    def way() -> None:
        nonlocal number
        number += 1
        update_from(state, source, world, config.optim, number, 1 << 30)  # NVFP4's BF16 phase is far

    return way


def start(recipes: Sequence[str]) -> Iterator[Row]:
    """Runs of one step, one at a time."""
    base: list[float] = []
    turns = [("bf16", "built before"), *itertools.product(recipes, ("built before", "empty"))]
    with progress("start", len(turns)) as bar, tempfile.TemporaryDirectory() as scratch:
        text = _text(Path(scratch))
        for name, cache in turns:
            bar.set_postfix_str(f"{name}, kernels {cache}")
            with tempfile.TemporaryDirectory() as empty:
                more = {"XDG_CACHE_HOME": empty} if cache == "empty" else {}
                seconds = [_first_step(name, text, os.environ | more)]
            base = base or seconds
            bar.update()
            yield _row(f"first step, kernels {cache}: {name}", seconds, base, 1.0, "s") | {"target": None}


def _text(directory: Path) -> Path:
    """Files of C4's layout with the bytes of a step."""
    (directory / "en").mkdir()
    line = jsonlib.dumps({"text": "Two rails, a narrow gauge apart. " * 64})
    for split in ("train", "validation"):
        file = directory / "en" / f"c4-{split}.00000-of-00001.json.gz"
        file.write_bytes(gzip.compress(f"{line}\n".encode() * SEQUENCES))
    return directory


def _first_step(recipe: str, text: Path, environment: Mapping[str, str]) -> float:
    """Seconds from the start of the process to what its ``metrics.jsonl`` says of step 1."""
    run = text / "run"
    command = [sys.executable, "-m", "narrowgauge", *_first_step_overrides(recipe, text, run)]
    started = time.time()
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise UserError(f"{recipe}: the run of one step failed: {ran.stderr.strip().splitlines()[-1]}")
    return float(read_metrics(run / "metrics.jsonl", "train")[1]["time"]) - started


def _first_step_overrides(recipe: str, text: Path, run: Path) -> list[str]:
    model = [f"model.vocab_size={VOCAB}", f"model.num_layers={LAYERS}", f"model.num_heads={HEADS}"]
    model += [f"model.num_kv_heads={HEADS}", f"model.hidden_size={INS}", f"model.intermediate_size={OUTS}"]
    data = ["data=c4_stream", f"data.path={text}", "data.tokenizer=bytes", f"data.seq_len={POSITIONS}"]
    data += [f"data.global_batch_size={SEQUENCES}", "eval.tokens=0", "sample.tokens=0"]
    train = ["train.steps=1", "checkpoint.every=0", "run.resume=never", f"run.dir={run}"]
    return [f"precision={recipe}", *model, *data, *train]


def _row(name: str, seconds: list[float], base: list[float], scale: float, unit: str) -> Row:
    least, median = min(seconds), statistics.median(seconds)
    return {
        "name": name,
        "unit": unit,
        "min": least * scale,
        "median": median * scale,
        "ratio_min": least / min(base),
        "ratio_median": median / statistics.median(base),
    }


def _print(row: Row, previous: Row | None) -> None:
    if previous is None or row["unit"] != previous["unit"]:
        print(f"\n{row['unit']:58} {'min':>9} {'median':>9} {'times min':>10} {'times med':>10} {'target':>7}")
    target = "" if row["target"] is None else f"{row['target']:.2f}"
    figures = f"{row['min']:9.3f} {row['median']:9.3f} {row['ratio_min']:10.2f} {row['ratio_median']:10.2f}"
    print(f"{row['name']:58} {figures} {target:>7}", flush=True)


def main(
    overrides: list[str],
    *,
    parts: str = ",".join(PARTS),
    rounds: int = 9,
    starts: str = "nvfp4",
    threads: int = 0,
    clock: str = "wall",
    json: str = "",
) -> None:
    global _clock
    if overrides:
        raise UserError(f"unknown argument {overrides[0]!r}; --help shows the ones there are")
    wanted = parts.split(",")
    if unknown := [part for part in wanted if part not in PARTS]:
        raise UserError(f"parts={unknown[0]}: one of {', '.join(PARTS)}")
    recipes = [name for name in starts.split(",") if name]
    if unknown := [name for name in recipes if name not in groups()["precision"]]:
        raise UserError(f"starts={unknown[0]}: of {', '.join(groups()['precision'])}")
    if clock not in ("wall", "cpu"):
        raise UserError(f"clock={clock}: wall or cpu")
    _clock = time.process_time if clock == "cpu" else time.perf_counter
    measure: Mapping[str, Callable[[World], Iterable[Row]]] = {
        "elements": lambda world: elements(rounds, world),
        "linear": lambda world: linear(rounds, world),
        "step": lambda world: step(rounds, world),
        "start": lambda world: start(recipes),
    }
    told = estimated(wanted, rounds, len(recipes))
    shown = f"{told / 60:.0f} min" if told >= 90 else f"{told:.0f} s"
    # Before anything is built or measured.
    print(
        f"parts={','.join(wanted)}: about {shown} on 2 cores; parts= and rounds= make it less",
        file=sys.stderr,
        flush=True,
    )
    world = distributed.start(_step_config("bf16", threads).parallel)  # it sets the threads and the allocator
    for kernels in KERNELS:
        native.library(kernels)
    print(f"{torch.get_num_threads()} threads, {clock} time, {rounds} rounds", flush=True)
    rows: list[Row] = []
    for number, part in enumerate(wanted, 1):
        print(f"part {number} of {len(wanted)}, {part}: {PARTS[part]}", file=sys.stderr, flush=True)
        for row in measure[part](world):
            with tqdm.external_write_mode(file=sys.stdout):
                _print(row, rows[-1] if rows else None)
            rows.append(row)
    distributed.finish()
    if json:
        Path(json).write_text(jsonlib.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    script_main(main, __doc__)
