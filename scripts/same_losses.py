"""Did a change leave every other digit alone? python scripts/same_losses.py REV [overrides ...]

[short=false] [only=REGEX] [jobs=2] [out=DIRECTORY]

Trains a list of tiny configs for a few steps by their command lines, once with REV, checked out into a temporary
directory, and once with this checkout as it stands, on the same machine, data and environment (NARROWGAUGE_NATIVE is
handed on): every recipe, every way to keep states and weights, and variants of both, with 1 and 2 processes. Compares
every loss, gradient norm, validation and rate, and all final weights, moments and recipe states, bit for bit. Prints
`same` for each case, or the first step and figure that differs, then a summary; exit code 1 if anything differs.
A case whose keys REV does not know is named and not compared.

short: a handful of cases. only: those whose names match. jobs: runs at a time. out: where runs go (default: a temporary
directory); those that differ stay there. overrides: for all cases, such as another prepared corpus; by default it is
data=sample. Some 3,000 seconds of CPU: half an hour on two idle cores.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.command import command
from narrowgauge.trainer.config import groups, load_config
from narrowgauge.trainer.data.shards import MANIFEST
from narrowgauge.trainer.errors import ExitCode, UserError
from whole_runs import check_out, compare_runs

ROOT = Path(__file__).resolve().parents[1]
# Six steps: a schedule by parts of a run has steps on both sides, and a history of three is full.
TINY = (
    *("model.hidden_size=64", "model.num_layers=2", "model.num_heads=2", "data.seq_len=64", "data.global_batch_size=8"),
    *("train.steps=6", "train.micro_batch_size=4", "optim.warmup_steps=2", "optim.warmup_max_fraction=1"),
    *("eval.tokens=2000", "eval.every=0", "eval.sharpness=0", "checkpoint.every=0", "sample.tokens=0"),
    "parallel.threads=1",
)
LLAMA = ("model=llama_tiny", "model.intermediate_size=176", "model.num_kv_heads=2")
GPT = ("model=gpt2_tiny", "model.intermediate_size=256")
STATES = (
    *("fp8", "fp8_tensor", "fp8_fishman", "fp8_lm", "dynamic8", "coat", "bf16"),
    *("pure_bf16", "pure_bf16_sr", "pure_bf16_kahan", "{m: expanded/16, v: dynamic, master: bf16/kahan}"),
)
BOTH = (1, 2)


@dataclass(frozen=True)
class Case:
    """A run: its config, on as many processes; with ``then``, the same run goes on with these in a second command."""

    name: str
    overrides: tuple[str, ...]
    processes: int = 1
    then: tuple[str, ...] | None = None
    model: tuple[str, ...] = LLAMA

    def commands(self, more: list[str]) -> list[list[str]]:
        """The overrides of each command."""
        first = [*self.model, *TINY, *self.overrides, *more]
        return [first] if self.then is None else [first, [*first, *self.then]]


SHORT = (
    Case("nvfp4, document mask", ("precision=nvfp4", "data.document_mask=true")),
    Case("gpt, fp8_delayed, fp8 states", ("precision=fp8_delayed", "optim.moments=fp8"), model=GPT),
    Case("mxfp8, accumulation", ("precision=mxfp8", "train.micro_batch_size=1"), processes=2),
)


def whole() -> Iterator[Case]:
    """Every recipe, every kind of states, and variants."""
    for name in groups()["precision"]:
        yield from _of(name, f"precision={name}")
    for name in ("bf16", "fp8_delayed", "fp8_current", "fp8_block", "mxfp8", "mxfp4", "nvfp4"):
        yield Case(f"gpt, {name}", (f"precision={name}",), model=GPT)
    for kept in STATES:
        yield from _of(f"states {kept}", f"optim.moments={kept}")

    for recipe, arguments, processes in (
        ("fp8_delayed", "history=3 algo=most_recent margin=1 format=e4m3", (1,)),
        ("fp8_delayed", "history=3 reduce_amax=false", (2,)),
        ("fp8_delayed", "fast_accum=true keep_first=1", (1,)),
        ("fp8_current", "format=e4m3 pow2=true eps=0.001 fast_accum=true", BOTH),
        ("fp8_rowwise", "pow2=false wgrad_high_precision=true", (1,)),
        ("fp8_block", "pow2=false format=hybrid block=32", BOTH),
        ("mxfp8", "format=hybrid scale=floor weights_2d=true", (1,)),
        ("mxfp8", "scale=even block=16 keep_paths=[.*down_proj]", (1,)),
        ("mxfp4", "scale=ceil hadamard=0 stochastic=false weights_2d=true keep_last=0", (1,)),
        ("mxfp4", "signs=7 keep_last=0", BOTH),
        ("nvfp4", "keep_last=0 bf16_forward=0", BOTH),
        ("nvfp4", "keep_last=0 row_scaled_activations=true", (1,)),
        ("nvfp4", "keep_last=0 four_over_six=all four_over_six_error=mse hadamard=0 stochastic=false", (1,)),
        ("nvfp4", "keep_last=0 four_over_six=weights four_over_six_256=false", (1,)),
        ("nvfp4", "keep_last=0 four_over_six=everything four_over_six_form=authors", (1,)),
        ("nvfp4", "keep_last=0 four_over_six=all four_over_six_form=quartet2 four_over_six_error=mse", (1,)),
        ("nvfp4", "keep_last=0 weights_2d=false hadamard=0 stochastic=false", (1,)),
        ("nvfp4", "keep_last=0 hadamard=32 signs=3", (1,)),
        ("exmy", "exponent_bits=4 mantissa_bits=3 rounding=nearest", (1,)),
        ("smooth_swiglu", "base=nvfp4 base_args.keep_last=0 fuse=always", BOTH),
        ("smooth_swiglu", "base=mxfp8 form=token pow2=false", (1,)),
        ("smooth_swiglu", "base=fp8_current fuse=never", (1,)),
        ("fp8_full", "base=fp8_current moments=fp8 fuse=always", (1,)),
        ("fp16", "init_scale=1.0e11 backoff=0.001 interval=2", BOTH),  # overflows: steps are skipped
    ):
        options = [f"precision.args.{argument}" for argument in arguments.split()]
        yield from _of(f"{recipe} {arguments}", f"precision={recipe}", *options, processes=processes)

    back = "precision.schedule=[{steps: [0, 2]}, {steps: [0.8, 1.0], gemms: [fprop], recipe: fp8_current}]"
    part = "precision.schedule=[{steps: [2, 4], gemms: [dgrad, wgrad]}]"
    yield from _of("schedule, mxfp8", "precision=mxfp8", back)
    yield from _of("schedule, fp8_delayed", "precision=fp8_delayed", "precision.args.history=2", part)
    yield from _of("schedule, nvfp4", "precision=nvfp4", "precision.args.bf16_forward=0", back, processes=(1,))

    gather = "parallel.fp8_all_gather=true"
    for recipe, options in (
        ("fp8_current", ()),
        ("fp8_delayed", ("parallel.activation_checkpointing=true",)),
        ("fp8_block", ("precision.args.block=8",)),
        ("nvfp4", ("precision.args.keep_last=0", "model.intermediate_size=192")),  # shards of whole tiles
    ):
        yield from _of(f"gather, {recipe}", f"precision={recipe}", gather, *options, processes=(2,))
    for recipe in ("bf16", "fp8_delayed", "nvfp4", "fp16"):
        yield from _of(f"accumulation, {recipe}", f"precision={recipe}", "train.micro_batch_size=1")
    for recipe in ("bf16", "nvfp4"):
        yield from _of(f"document mask, {recipe}", f"precision={recipe}", "data.document_mask=true")
    mask = ("data.document_mask=true", "train.micro_batch_size=2")
    yield Case("document mask, gpt, fp8_current", ("precision=fp8_current", *mask), model=GPT)
    for recipe in ("bf16", "fp8_delayed", "nvfp4", "smooth_swiglu"):
        options = (f"precision={recipe}", "parallel.activation_checkpointing=true")
        yield from _of(f"activation checkpointing, {recipe}", *options, processes=(1,))
    for recipe in ("bf16", "fp8_current", "nvfp4"):
        options = (f"precision={recipe}", "parallel.compile=true", "model.num_layers=1", "train.steps=3")
        quantized = ("precision.args.keep_last=0",) if recipe == "nvfp4" else ()
        yield from _of(f"compile, {recipe}", *options, *quantized, processes=(1,))
    yield Case("compile, gpt, bf16", ("parallel.compile=true", "model.num_layers=1", "train.steps=3"), model=GPT)

    # Whole tiles of 128, grouped queries and a head of its own; then tiles that are all cut.
    wide = ("model.hidden_size=256", "model.num_heads=4", "model.intermediate_size=512", "data.seq_len=128")
    odd = ("model.hidden_size=88", "model.intermediate_size=107", "data.seq_len=50")
    for recipe in ("fp8_delayed", "fp8_rowwise", "fp8_block", "mxfp8", "mxfp4", "nvfp4"):
        options = (f"precision={recipe}", "model.tie_embeddings=false", *wide)
        yield from _of(f"wide, {recipe}", *options, processes=(1,))
        yield from _of(f"odd, {recipe}", f"precision={recipe}", *odd, processes=(1,))
    for recipe in ("bf16", "mxfp8", "nvfp4"):
        yield from _of(f"two threads, {recipe}", f"precision={recipe}", *wide, "parallel.threads=2", processes=(1,))
    for recipe in ("fp8_delayed", "nvfp4", "fp8_full"):
        yield from _of(f"reference, {recipe}", f"precision={recipe}", "precision.backend=reference", processes=(1,))
    yield Case("reference, one kv head", ("precision.backend=reference", "model.num_kv_heads=1"))
    yield Case("replicated, nvfp4", ("precision=nvfp4", "parallel=hsdp"), 2)
    yield Case("kept gathered, fp8_delayed", ("precision=fp8_delayed", "parallel.reshard_after_forward=false"), 2)

    yield Case("no clipping, wsd", ("optim.clip_norm=0", "optim.schedule=wsd", "optim.decay_fraction=0.5"))
    yield from _of("high-precision validation", "precision=mxfp4", "eval.precision=high", "eval.every=2")
    yield from _of("telemetry, pure_bf16_sr", "optim.moments=pure_bf16_sr", "optim.telemetry_every=2")
    yield from _of("probe, fp8_delayed", "precision=fp8_delayed", "probe.every=2", processes=(1,))
    often = ("checkpoint.every=2", "eval.every=2")
    for recipe in ("bf16", "fp8_delayed", "nvfp4", "fp16"):
        options = (f"precision={recipe}", *often, "train.steps=3", "optim.schedule=constant")
        yield from _of(f"goes on, {recipe}", *options, then=("train.steps=6",))
    stream = ("data=c4_stream", "data.path=data/sample", "data.shuffle_rows=8", "data.seq_len=64")
    yield from _of("streamed text", *stream, "data.global_batch_size=8", then=("train.steps=8",))
    mixed = "data.sources={a: {path: data/sample, weight: 3}, b: {path: data/sample, weight: 1}}"
    yield Case("mixture", ("data=mix", mixed, "data.seq_len=64", "data.global_batch_size=8"))


def _of(
    name: str, *overrides: str, processes: tuple[int, ...] = BOTH, then: tuple[str, ...] | None = None
) -> Iterator[Case]:
    for count in processes:
        yield Case(name, overrides, count, then)


@dataclass(frozen=True)
class Row:
    """What came of a case: ``same``, the first difference, or why it was not compared."""

    case: Case
    result: str

    def __str__(self) -> str:
        return f"| {self.case.name} | {self.case.processes} | {self.result} |"


def main(overrides: list[str], *, short: str = "false", only: str = "", jobs: int = 2, out: str = "") -> ExitCode:
    revisions = [argument for argument in overrides if "=" not in argument]
    if len(revisions) != 1:
        raise UserError("name one revision to compare with: python scripts/same_losses.py REV")
    if short not in ("true", "false"):
        raise UserError(f"short={short}: true or false")
    more = [argument for argument in overrides if "=" in argument]
    cases = [case for case in (SHORT if short == "true" else whole()) if re.search(only, case.name)]
    if not cases:
        raise UserError(f"only={only}: no case has such a name")
    if out and Path(out).exists() and any(Path(out).iterdir()):
        raise UserError(f"out={out}: not empty, and a run that is there would go on")
    _require_data(more)
    root = Path(out or tempfile.mkdtemp(prefix="same_losses_")).resolve()
    try:
        check_out(ROOT, revisions[0], root / "revision")
        trees = (root / "revision", ROOT)
        for tree in trees:
            _require_import(tree)
        rows = compare(cases, trees, more, root, jobs)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    shutil.rmtree(root / "revision")
    if not any(root.iterdir()):
        root.rmdir()
    same = sum(row.result == "same" for row in rows)
    unknown = sum(row.result.startswith("not compared") for row in rows)
    differing = len(rows) - same - unknown
    print(
        f"{len(rows)} cases against {revisions[0]}: {same} same, {differing} differ, {unknown} not compared"
        + (f"; the runs that differ are in {root}" if differing else "")
    )
    return ExitCode.FINISHED if same and not differing else ExitCode.FAILED


def _require_data(more: list[str]) -> None:
    data = load_config(more).data
    if not (Path(data.shards_dir) / MANIFEST).is_file():
        raise UserError(f"{data.shards_dir} is not prepared: python scripts/prepare_data.py data={data.name}")


def _environment(tree: Path) -> dict[str, str]:
    before = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tree / "src"), *([before] if before else [])])}


def _require_import(tree: Path) -> None:
    """Raises UserError where ``python -m trainer`` would run another tree's code."""
    packages = ["trainer", *(["narrowgauge"] if (tree / "src" / "narrowgauge").is_dir() else [])]
    code = "import sys, importlib.util as u; print(*(u.find_spec(name).origin for name in sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", code, *packages],
        env=_environment(tree),
        capture_output=True,
        text=True,
        check=True,
    )
    for file in result.stdout.split():
        if not Path(file).resolve().is_relative_to(tree.resolve()):
            raise UserError(f"{file} would be run instead of {tree / 'src'}: start this elsewhere")


def compare(cases: list[Case], trees: tuple[Path, Path], more: list[str], root: Path, jobs: int) -> list[Row]:
    """Run every case with both trees, ``jobs`` runs at a time, and print its row as soon as it is known."""
    print("| case | processes | against this checkout |\n|---|---|---|", flush=True)
    rows = []
    with ThreadPoolExecutor(jobs) as pool:
        started: list[tuple[Case, list[Path], list[Future[tuple[int, str]]]]] = []
        for index, case in enumerate(cases):
            places = [root / f"{index:03}-{side}" for side in ("revision", "here")]
            futures = [pool.submit(_run, case, tree, more, place) for tree, place in zip(trees, places, strict=True)]
            started.append((case, places, futures))
        try:
            for case, places, futures in started:
                result = judge([future.result() for future in futures], places)
                rows.append(Row(case, result))
                print(rows[-1], flush=True)
                if result == "same" or result.startswith("not compared"):
                    for place in places:
                        shutil.rmtree(place, ignore_errors=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return rows


def _run(case: Case, tree: Path, more: list[str], place: Path) -> tuple[int, str]:
    """The exit code of the case's last command, and its error line."""
    code, line = 0, ""
    for overrides in case.commands(more):
        result = subprocess.run(
            command([*overrides, f"run.dir={place}"], case.processes, module="trainer"),
            env=_environment(tree),
            capture_output=True,
            text=True,
            check=False,
        )
        lines = (result.stdout + result.stderr).strip().splitlines()
        errors = [line for line in lines if line.startswith("error:")] or lines[-1:]
        code, line = result.returncode, " ".join(errors)
        if code:
            break
    return code, line


def judge(ends: Sequence[tuple[int, str]], places: Sequence[Path]) -> str:
    """What the two runs of a case, by exit code and error line, say about it."""
    (before, why), (now, why_now) = ends
    if now == ExitCode.FINISHED and before and why.startswith("error:"):  # torchrun has one code for all that fails
        return f"not compared: {why}"
    if before or now:
        return f"exit codes {before} and {now}: {why_now if now else why}"
    problems = compare_runs(*places)
    if not problems:
        return "same"
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


if __name__ == "__main__":
    script_main(main, __doc__)
