"""``scripts/gpu_run.py`` without a GPU: whatever a stage does, the others run and the table comes last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_check
import gpu_run
import psutil
import pytest
import torch
from gpu_suite import bundle, clock, profiles, results, stages, steps
from gpu_suite.sums import sums_rows
from hardware import pretend
from narrowgauge.models import create
from narrowgauge.precision.backends.scaled_mm import ScaledMM
from narrowgauge.precision.backends.triton.device import recording
from narrowgauge.precision.sums import H100_FP8, Side, summed
from narrowgauge.trainer.distributed import World

#: What a stage may do, as programs: argv is rows=FILE and a folder for what they leave behind.
FAKES = {
    "roofs": 'emit(machine={"device": "cpu", "card": "none"}); emit(what="copy", rate=1.5)',
    "steps": 'emit(what="first"); sys.exit("out of luck")',
    "check": 'emit(what="before"); emit(what="told", n=(out / "results.json").read_text().count("told"))',
    "nccl": """
orphan = "import subprocess as s; print(s.Popen(['sleep', '600'], stdout=-3, stderr=-3, start_new_session=True).pid)"
left = subprocess.run([sys.executable, "-S", "-c", orphan], capture_output=True, text=True, check=True).stdout
emit(what="left", n=int(left))
time.sleep(600)
""",
    "profile": 'emit(what="never")',
}
PREAMBLE = """
import json, pathlib, subprocess, sys, time
out = pathlib.Path(sys.argv[1])
words = dict(word.partition("=")[::2] for word in sys.argv[2:])
def emit(**row):
    with open(words["rows"], "a") as file:
        file.write(json.dumps(row) + "\\n")
"""


def test_a_stage_that_fails_or_hangs_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command_of(stage: str, words: Sequence[str]) -> list[str]:
        return [sys.executable, "-S", "-c", PREAMBLE + FAKES[stage], str(tmp_path), *words]

    monkeypatch.setattr(gpu_run, "command_of", command_of)
    limits = {
        "roofs": (20.0, 1.0),
        "steps": (20.0, 1.0),
        "nccl": (2.0, 1.0),
        "check": (20.0, 1.0),
        "profile": (9.0, 1e6),
    }
    monkeypatch.setattr(gpu_run, "STAGES", limits)
    assert gpu_run.run(tmp_path, 100.0, ["roofs", "steps:8b", "nccl", "check", "profile"], "1b") == 1

    found = json.loads((tmp_path / "results.json").read_text())
    entries = found["stages"]
    assert list(entries) == ["roofs", "steps 8b", "nccl", "check", "profile 1b"]
    told = {name: entry["told"].partition(" (")[0] for name, entry in entries.items()}
    assert told["roofs"] == told["check"] == "ok"
    assert told["steps 8b"] == "exit code 1"
    assert told["nccl"] == "stopped at its limit of 2 s"
    assert told["profile 1b"].startswith("left out")
    assert [row["what"] for row in entries["steps 8b"]["rows"]] == ["first"]
    assert entries["steps 8b"]["end"] == ["out of luck"]
    assert entries["check"]["rows"][1]["n"] == 3  # of the stages before it, in a file that was whole
    (left,) = (row["n"] for row in entries["nccl"]["rows"])
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE
    assert found["machine"] == {"device": "cpu", "card": "none"}
    assert "out of luck" in (tmp_path / "log.txt").read_text()
    printed = capsys.readouterr().out
    assert printed.index("every stage ends") < printed.index("== roofs: ok") < printed.index("rate 1.5")
    assert printed.rstrip().splitlines()[-1].startswith("== profile 1b: left out")


def test_the_command_runs_a_stage_from_start_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(bundle.ROOT / "scripts" / "gpu_run.py")]
    result = subprocess.run(
        [*command, "run", f"out={tmp_path}", "stages=roofs", "budget=120"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert found["stages"]["roofs"]["rows"][0]["GB/s"] > 0
    if not torch.cuda.is_available():
        assert "Toy sizes on a CPU" in result.stdout
        assert results.UNPROVED in result.stdout
    table = subprocess.run(
        [*command, "table", str(tmp_path / "results.json"), "format=markdown"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "| every stage ends | all | 1 of 1 | yes |" in table.stdout
    assert "**roofs**: ok" in table.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="nothing"),
        pytest.param(["measure"], id="verb"),
        pytest.param(["run"], id="no folder"),
        pytest.param(["run", "out=x", "stages=steps,speed"], id="stage"),
        pytest.param(["run", "out=x", "size=7b"], id="size"),
        pytest.param(["run", "out=x", "stages=steps:7b"], id="size of a stage"),
        pytest.param(["run", "out=x", "time=3"], id="key"),
        pytest.param(["prepare", "now"], id="word"),
        pytest.param(["table"], id="no file"),
        pytest.param(["table", "x.json", "format=html"], id="format"),
    ],
)
def test_arguments_that_there_are_not(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_run.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == bool(arguments)


# Goals.


def reached() -> results.Results:
    """A result that reaches every goal, by a little."""
    found: dict[str, list[dict[str, Any]]] = {"check": [{"what": "claims", "hold": 60, "fail": 0, "not here": 6}]}
    for size, mfu, tensor in (("1b", 50.1, 1.16), ("8b", 55.1, 1.26)):
        names = {"bf16": 1.0, "fp8_current": tensor, "fp8_rowwise": 1.11, "fp8_block": 1.11}
        found[f"steps {size}"] = [{"what": f"{name} compiled", "tok/s": 1e4 * rate} for name, rate in names.items()]
        found[f"steps {size}"][0] |= {"MFU%": mfu, "GiB": 44.0}
        peers = {"transformers compiled": 0.99, "torchao tensorwise": tensor - 0.01}
        found[f"peers {size}"] = [{"what": name, "tok/s": 1e4 * rate} for name, rate in peers.items()]
        found[f"emulated {size}"] = [{"what": f"{name} compiled", "tok/s": 0.67e4} for name in ("nvfp4", "mxfp8")]
    kinds = {"one direction": 81.0, "both directions": 71.0, "hadamard": 51.0}
    found["quantize"] = [{"what": kind, "kind": kind, "%copy": share} for kind, share in kinds.items()]
    apart = {"fp32": 9e-5, "bf16": 9e-3, "fp8_current": 0.02, "fp8_delayed": 0.02, "nvfp4": 0.02}
    found["parity"] = [{"what": name, "most apart": value} for name, value in apart.items()]
    found["resume"] = [{"what": "fp8_delayed, killed", "differ": 0, "deterministic": "true"}]
    told = {name: {"told": "ok (1 s)", "rows": rows} for name, rows in found.items()}
    return {"machine": {"device": "cuda", "card": "a card"}, "stages": told}


#: Stage, row, key -> a value that misses the goal, and the goals that it misses.
MISSES: dict[str, tuple[str, str, str, float, int]] = {
    "a claim": ("check", "claims", "fail", 1, 1),
    "utilization": ("steps 1b", "bf16 compiled", "MFU%", 49.9, 1),
    "utilization of wide blocks": ("steps 8b", "bf16 compiled", "MFU%", 54.9, 1),
    "transformers": ("peers 1b", "transformers compiled", "tok/s", 1.01e4, 1),
    "tensor-wise": ("steps 8b", "fp8_current compiled", "tok/s", 1.24e4, 2),
    "torchao": ("peers 8b", "torchao tensorwise", "tok/s", 1.27e4, 1),
    "row-wise": ("steps 1b", "fp8_rowwise compiled", "tok/s", 1.09e4, 1),
    "blocks": ("steps 8b", "fp8_block compiled", "tok/s", 1.09e4, 1),
    "emulation": ("emulated 1b", "mxfp8 compiled", "tok/s", 0.66e4, 1),
    "bandwidth": ("quantize", "one direction", "%copy", 79.0, 1),
    "bandwidth of both": ("quantize", "both directions", "%copy", 69.0, 1),
    "hadamard": ("quantize", "hadamard", "%copy", 49.0, 1),
    "memory": ("steps 1b", "bf16 compiled", "GiB", 45.1, 1),
    "parity": ("parity", "nvfp4", "most apart", 0.031, 1),
    "parity, not a number": ("parity", "bf16", "most apart", float("nan"), 1),
    "resume": ("resume", "fp8_delayed, killed", "differ", 1, 1),
}


def test_every_goal_can_be_reached() -> None:
    goals = results.goals(reached())
    assert [goal.name for goal in goals if goal.reached is not True] == []
    assert len(goals) == 29


@pytest.mark.parametrize("name", MISSES)
def test_a_goal_that_is_missed_is_said_to_be(name: str) -> None:
    stage, what, key, value, number = MISSES[name]
    found = reached()
    (row,) = (row for row in found["stages"][stage]["rows"] if row["what"] == what)
    row[key] = value
    missed = [goal for goal in results.goals(found) if goal.reached is False]
    assert len(missed) == number, missed
    assert str(missed[0]).endswith("NO")
    del row[key]
    unknown = [goal for goal in results.goals(found) if goal.reached is None]
    assert unknown
    assert str(unknown[0]).endswith("not measured")


def test_nothing_is_judged_of_a_gpu_without_one() -> None:
    found = reached()
    found["machine"]["device"] = "cpu"
    found["stages"]["parity"]["told"] = "exit code 1 (2 s)"
    assert [goal.reached for goal in results.goals(found)] == [False, True, True]


def test_claims_that_were_not_looked_at_are_no_success() -> None:
    found = reached()
    found["stages"]["check"]["rows"][0]["left out"] = 3
    assert next(goal for goal in results.goals(found) if goal.name == "claims that fail").reached is None


def test_a_kernel_that_fails_leaves_its_goal_open() -> None:
    found = reached()
    found["stages"]["quantize"]["rows"].append({"what": "mxfp8", "kind": "one direction", "error": "it failed"})
    goals = results.goals(found)
    assert next(goal for goal in goals if "one direction" in goal.name).reached is None
    assert next(goal for goal in goals if goal.name == "rows that are errors").reached is False


def test_the_table_fits_the_end_of_a_log() -> None:
    found = reached()
    for entry in found["stages"].values():
        entry["rows"] = entry["rows"] + [{"what": f"row {n}", "text": "x" * 200, "ms": n / 3} for n in range(60)]
        entry["rows"].append({"what": "hidden", "detail": True})
    text = results.compact(found)
    assert len(text) < 12_000
    assert text.count("more in results.json") >= 1
    assert "hidden" not in text + results.markdown(found)
    found["stages"]["check"]["rows"].append({"what": "void f<a|b>", "n": 1})
    assert "| void f&lt;a\\|b> |" in results.markdown(found)
    assert all(f"== {name}: ok" in text for name in found["stages"])


def test_two_passes_make_one_result(tmp_path: Path) -> None:
    first, second = reached(), reached()
    second["stages"] = {"nccl": {"told": "ok (3 s)", "rows": []}, "parity": {"told": "exit code 1 (1 s)", "rows": []}}
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file, part in zip(files, (first, second), strict=True):
        file.write_text(json.dumps(part))
    whole = results.read(files)
    assert whole["stages"]["nccl"]["told"] == "ok (3 s)"
    assert whole["stages"]["parity"]["told"].startswith("exit code")
    assert whole["stages"]["roofs" if "roofs" in whole["stages"] else "check"]
    assert whole["machine"]["card"] == "a card"
    second["machine"]["card"] = "another"
    assert "say nothing" in results.headline(results.merged([first, second]))


# What travels.


def test_the_bundle_is_weighed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("/.whl/\n/.gpu/\n/ignored\n")
    (tmp_path / "code.py").write_bytes(b"x" * 1000)
    (tmp_path / "ignored").write_bytes(b"x" * 100_000)
    for part in (bundle.WHEELS, bundle.EXTRAS):
        (tmp_path / part).mkdir()
        (tmp_path / part / "file").write_bytes(b"x" * 500)
    travels = 2000 + (tmp_path / ".gitignore").stat().st_size
    assert bundle.weigh(tmp_path, limit=travels) == 0
    assert ".whl/file" in capsys.readouterr().out
    assert bundle.weigh(tmp_path, limit=travels - 1) == 1


def test_a_copy_without_git_knows_its_revision_while_it_is_unchanged(tmp_path: Path) -> None:
    assert bundle.revision(tmp_path) == "unknown"
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "code.py").write_text("1\n")
    (tmp_path / bundle.EXTRAS).mkdir()
    (tmp_path / bundle.EXTRAS / "revision").write_text(f"abc123\n{bundle.fingerprint(tmp_path)}\n")
    assert bundle.revision(tmp_path) == "abc123"
    (tmp_path / "src" / "code.py").write_text("2\n")
    assert bundle.revision(tmp_path) == "abc123, changed since"


def test_wheels_are_unpacked_where_hydra_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert bundle.install(tmp_path) == ""
    monkeypatch.setattr(bundle.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="prepare"):
        bundle.install(tmp_path)
    (tmp_path / bundle.WHEELS).mkdir()
    wheel = tmp_path / bundle.WHEELS / "hydra-1.0-py3-none-any.whl"
    wheel.touch()
    commands: list[list[str]] = []
    monkeypatch.setattr(bundle.subprocess, "run", lambda command, **more: commands.append(command))
    assert bundle.install(tmp_path) == str(tmp_path / bundle.SITE)
    assert {"--no-index", "--target", str(wheel)} <= set(commands[0])


def test_wheels_are_of_the_pinned_versions() -> None:
    names = (*bundle.NEEDED, *bundle.SOURCES, *bundle.COMPARED, *bundle.ORACLES)
    assert [pin.partition("==")[0].lower() for pin in bundle.pinned(*names)] == list(names)
    with pytest.raises(KeyError):
        bundle.pinned("no-such-package")


# Time and steps.


@pytest.mark.parametrize(
    ("ahead", "rounds"),
    [((True,), 3), ((False, True), 6), ((False,), 9)],
    ids=["in time", "in time behind a longer pause", "never in time"],
)
def test_a_round_that_the_host_was_late_for_is_repeated(
    monkeypatch: pytest.MonkeyPatch, ahead: tuple[bool, ...], rounds: int
) -> None:
    seen: list[tuple[int, float]] = []

    def round_(calls: object, launches: int, pause: float) -> tuple[float, bool]:
        seen.append((launches, pause))
        return 2.0, ahead[min((len(seen) - 1) // 3, len(ahead) - 1)]

    monkeypatch.setattr(clock, "_round", round_)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timing = clock.timed(lambda: None)
    assert timing == (2.0, ahead[-1])
    assert len(seen) == rounds
    assert sorted({launches for launches, _ in seen}) == [5, 10, 20][3 - rounds // 3 :]
    assert [pause for _, pause in seen] == sorted(pause for _, pause in seen)
    assert ("host bound" in str(timing)) is not ahead[-1]


def test_the_device_is_kept_busy_while_a_round_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            self.name = "" if enable_timing else "an event without a time"

        def record(self) -> None:
            self.name = "end" if "start" in seen else "start"
            seen.append(self.name)

        def query(self) -> bool:
            seen.append(f"has {self.name} passed?")
            return False

        def elapsed_time(self, end: Event) -> float:
            assert (self.name, end.name) == ("start", "end")
            return 8.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append(f"{cycles / clock._CYCLES:.1f} s"))
    calls = (lambda: seen.append("a"), lambda: seen.append("b"))
    assert clock._round(calls, 4, 0.2) == (2.0, True)
    assert seen == ["wait", "0.2 s", "start", "a", "b", "a", "b", "has start passed?", "end", "wait"]


def test_operations_are_those_of_the_products_and_of_causal_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in steps.SIZES:
        monkeypatch.setattr(steps, "cuda", lambda: True)
        model, sequences, positions = steps.shape_of(size)
        with torch.device("meta"):
            built = create(model)
        weights = sum(p.numel() for name, p in built.named_parameters() if p.ndim == 2 and "embed" not in name)
        scores = model.num_layers * model.num_heads * model.head_size * positions  # half of q k^T and of p v
        tokens = sequences * positions
        assert steps.flops(model, tokens, positions) == tokens * (6 * weights + 3 * 2 * scores)


def test_a_row_of_a_step_says_what_it_was(world: World) -> None:
    row = steps.measured("fp8", "1b", world, ["precision=fp8_current", *steps.compiled(False)])
    first, last = map(float, row["loss"].split(">"))
    assert last < first
    assert row["tok/s"] == pytest.approx(1e3 * 2 * 64 / row["ms"], rel=0.1)
    assert row["native"] == "0/42"
    assert "skipped" not in row
    halved = steps.measured("bf16", "1b", world, ["precision=bf16"], divide=2)
    assert halved["batch"] == 1


def test_a_batch_that_does_not_fit_is_halved() -> None:
    def row(divide: int) -> steps.Row:
        if divide < 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"what": "fits", "batch": 1}

    assert steps.within_memory("steps", row) == {"what": "fits", "batch": 1}

    def fails(divide: int) -> steps.Row:
        assert divide == 1, "only memory is a reason to try again"
        raise ValueError("first line\nsecond line")

    assert steps.within_memory("steps", fails) == {"what": "steps", "error": "ValueError: first line"}


def test_what_the_config_does_not_know_is_left_out() -> None:
    assert steps.known("parallel.threads=2")
    assert not steps.known("parallel.no_such_key=true")
    assert not steps.known("parallel.threads=many")


# Stages whose calls need a GPU.


def test_kernels_that_are_timed_are_launched() -> None:
    x = torch.empty(256, 512, dtype=torch.bfloat16, device="meta")
    for what, (_, call, _) in stages._kernels(torch.device("cpu")).items():
        with recording((9, 0)) as launches:
            call(x)
        assert launches, what


def test_products_are_compared_with_native_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pretend(monkeypatch, 90):
        monkeypatch.setattr(stages, "NATIVE", ScaledMM(detect=lambda device: 90))
        rows = list(stages.products(stages.Task("1b", tmp_path, time.time() + 100)))
    assert len(rows) == 9
    for row in rows:
        assert row["tensor"].endswith("x"), row
        assert row["e5m2"].endswith("x"), row
        assert row["row"].endswith("x"), row


def test_the_rule_of_a_card_is_told_from_the_others() -> None:
    """Where a stand-in sums by one rule, all outputs are found to follow it, and the others' shares say that they do
    not; what cannot run leaves a row that says why."""

    tiny = {torch.float8_e5m2: -14, torch.float8_e4m3fn: -6}

    def card(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        left, right = (Side(values=x.float(), tiny=tiny[x.dtype]) for x in (a, b))
        return summed(left, right, H100_FP8)

    def broken(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such product")

    rows = list(sums_rows(torch.device("cpu"), time.time() + 60, {"FP8 card": card, "BF16 broken": broken}))
    whole = [row for row in rows if "h100" in row and row["what"].endswith("normal, K 64")]
    assert [row["h100"] for row in whole] == [100.0, 100.0]
    assert all(row[name] < 90 for row in whole for name in ("fp32", "ada", "h100 late c", "b200"))
    assert rows[-1] == {"what": "BF16 broken bf16 x bf16, cancelling, K 16", "": "RuntimeError: no such product"}
    assert next(sums_rows(torch.device("cpu"), 0.0))[""] == "left out: no time"


def test_a_profile_is_summed_by_kind() -> None:
    names = {
        "void cutlass::Kernel2<sm90_gemm>": "products",
        "nvjet_hsh_128x256": "products",
        "pytorch_flash::flash_fwd_kernel": "attention",
        "quantize_kernel": "quantization",
        "triton_poi_fused_add": "inductor",
        "multi_tensor_apply_kernel<FusedAdam>": "optimizer",
        "Memcpy DtoD": "copies",
        "vectorized_elementwise_kernel": "other",
    }
    assert {name: profiles.kind_of(name) for name in names} == names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        torch.ones(8, 8) @ torch.ones(8, 8)
    head, *kernels = profiles.profile_rows("product", seen.key_averages())
    assert head["kernels"] >= 1
    assert sum(row["%"] for row in kernels) <= 100.1
    (row,) = profiles.profile_rows("nothing", [])
    assert "saw nothing" in row["error"]


# gpu_check.py: a check that hangs, or takes its process with it.

CHECKS = """
import json, sys, time
def tell(**event): print(json.dumps({"gpu_check": event}), flush=True)
first = int(sys.argv[1])
tell(names=[[f"check {n}", "a claim"] for n in range(6)], on="a card")
print("noise of a library")
for n in range(first, 6):
    tell(begins=n)
    if n == 1: time.sleep(600)
    if n == 3: sys.exit(7)
    tell(ends=n, result="FAIL" if n == 4 else "ok", measured="as it should be")
    if n == 4: sys.exit(3)
"""


def test_a_check_that_hangs_or_dies_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "command_of", lambda words, first: [sys.executable, "-S", "-c", CHECKS, str(first)])
    rows = list(gpu_check.results([], limit=1.0))
    assert [row["check"] for row in rows] == [f"check {n}" for n in range(6)]
    assert [row["result"] for row in rows] == ["ok", "FAIL", "ok", "FAIL", "FAIL", "ok"]
    assert rows[1]["measured"] == "no end after 1 s"
    assert rows[3]["measured"] == "the process ended with code 7"
    assert gpu_check.table(rows).endswith("3 claims fail")
    rows = list(gpu_check.results([], limit=60.0, until=time.time() + 1))
    assert [row["result"] for row in rows] == ["ok", "-", "-", "-", "-", "-"]
    assert rows[-1]["measured"] == "left out: no time"
    monkeypatch.setattr(gpu_check, "command_of", lambda words, first: [sys.executable, "-c", "raise SystemExit(5)"])
    with pytest.raises(RuntimeError, match="code 5 before its first check"):
        list(gpu_check.results([], limit=1.0))
