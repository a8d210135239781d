"""What this project does on one GPU, in one command of some minutes that needs no network.

python scripts/gpu_run.py prepare
    Here, with a network: wheels and token shards into .whl and .gpu, which travel with the tree; their sizes.
python scripts/gpu_run.py run out=DIR [budget=330] [stages=NAME,NAME:8b,...] [size=1b]
    There: unpacks .whl where hydra is missing, then runs the stages. out/results.json and out/log.txt hold all that is
    known after each; goals and a table are printed last. Exit code 1 if a stage did not end well.
python scripts/gpu_run.py table FILE.json ... [format=text]
    The goals and the table of one or several results; format=markdown for a document.

A stage is a process group of its own under a limit of its own: one that fails or hangs costs the others nothing. Those
that no longer fit into ``budget`` seconds are left out, and said to be. ``size`` is the model: 1b has Llama 3.2 1B's
blocks, 8b four of Llama 3's 8B; NAME:8b asks for it in one stage alone. Without a GPU everything runs at toy sizes.

roofs      what the rest is held against: copy bandwidth, BF16 and FP8 products
steps      training steps: BF16 and the FP8 recipes; tokens/s, MFU, memory, launches of the host
check      scripts/gpu_check.py: every claim
quantize   kernels that quantize: us, share of the copy bandwidth
products   the GEMMs of a block: BF16 against native FP8
emulated   steps of NVFP4 and MXFP8, emulated
peers      compiled `transformers`, and torchao's linears in our model
parity     ten losses on the CPU and on the GPU
resume     killed by SIGKILL and resumed: digits that differ; what determinism costs
nccl       torchrun with one rank: steps, a checkpoint, resumed
sums       by which rule (precision/sums.py) FP8 and BF16 products are summed: share of outputs with its bits
profile    where the time of a step goes
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from gpu_suite import bundle, results

ROOT = bundle.ROOT
#: In the order of worth: seconds a stage may take, and seconds without which it is not begun.
STAGES: dict[str, tuple[float, float]] = {
    "roofs": (40, 15),
    "steps": (200, 40),
    "check": (220, 30),
    "quantize": (60, 20),
    "products": (45, 15),
    "emulated": (90, 25),
    "peers": (130, 40),
    "parity": (80, 30),
    "resume": (170, 50),
    "nccl": (120, 40),
    "sums": (60, 20),
    "profile": (80, 25),
}
SIZED = ("steps", "products", "emulated", "peers", "profile")
SIZES = ("1b", "8b")
MARK = "GPU_RUN_STAGE"  # in the environment of all that a stage starts


def run(out: Path, budget: float, wanted: Sequence[str], size: str) -> int:
    """The stages of ``wanted``, NAME or NAME:SIZE, within ``budget`` seconds. 0 if all ended well, else 1."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    site = bundle.install(ROOT)
    found: results.Results = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "revision": bundle.revision(ROOT),
        "command": shlex.join(sys.argv),
        "machine": {},
        "stages": {},
    }
    with tempfile.TemporaryDirectory(prefix="gpu_run_") as scratch:
        environment = environment_of(site)
        for index, text in enumerate(wanted):
            name, _, own = text.partition(":")
            label = f"{name} {own or size}" if name in SIZED else name
            limit, least = STAGES[name]
            left = budget - (time.monotonic() - started)
            if left < least:
                found["stages"][label] = {"told": f"left out: {left:.0f} s left", "rows": []}
            else:
                folder = Path(scratch) / f"{index}"
                folder.mkdir()
                found["stages"][label] = one(name, own or size, folder, min(limit, left), environment, out / "log.txt")
            found["machine"] |= found["stages"][label].pop("machine", {})
            print(f"{label:12} {found['stages'][label]['told']}", flush=True)
            keep(out / "results.json", found)
    print(f"\n{results.compact(found)}", flush=True)
    return int(not all(entry["told"].startswith("ok") for entry in found["stages"].values()))


def command_of(stage: str, words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "gpu_suite", f"stage={stage}", *words]


def one(name: str, size: str, folder: Path, limit: float, environment: dict[str, str], log: Path) -> dict[str, object]:
    """A stage from start to end: what is told of it and its rows, however it ended. Its output goes to ``log``."""
    begun = time.monotonic()
    rows, output = folder / "rows.jsonl", folder / "output"
    words = [f"size={size}", f"rows={rows}", f"folder={folder}", f"until={time.time() + limit}"]
    environment = environment | {MARK: str(folder)}
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command_of(name, words),
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            told = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            told = f"stopped at its limit of {limit:.0f} s"
        finally:
            end(process, str(folder))
    lines = (
        [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        if rows.exists()
        else []
    )
    text = output.read_text(errors="replace", encoding="utf-8")
    with log.open("a", encoding="utf-8") as file:
        file.write(f"== {name} {size}\n{text[-2_000_000:]}\n")
    entry: dict[str, object] = {"told": f"{told} ({time.monotonic() - begun:.0f} s)"}
    entry["rows"] = [row for row in lines if "what" in row]
    for row in lines:
        entry |= {"machine": row["machine"]} if "machine" in row else {}
    return entry if told == "ok" else entry | {"end": text.strip().splitlines()[-4:]}


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kill the stage's process group and what has left it: runs of the trainer have sessions of their own, and may have
    lost their parents. All of them carry ``mark`` in their environment."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for other in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if other.environ().get(MARK) == mark:
                other.kill()
    process.wait()


def environment_of(site: str) -> dict[str, str]:
    """Where packages are; names of interfaces, since a machine without a network may not know its own; caches.

    What compilers made is kept for the next call, which so begins to measure earlier.
    """
    caches = Path(tempfile.gettempdir()) / f"gpu_run_{os.getuid()}"
    paths = [str(ROOT / part) for part in ("scripts", "src", "tests")]
    paths += [part for part in (site, os.environ.get("PYTHONPATH", "")) if part]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def keep(file: Path, found: results.Results) -> None:
    """Replaced in one go: whoever stops this process finds the last whole state."""
    part = file.with_suffix(".part")
    part.write_text(
        json.dumps(found | {"goals": [vars_of(goal) for goal in results.goals(found)]}, indent=1), encoding="utf-8"
    )
    part.replace(file)


def vars_of(goal: results.Goal) -> dict[str, object]:
    return {"name": goal.name, "wanted": goal.wanted, "measured": goal.measured, "reached": goal.reached}


def main(arguments: list[str]) -> int:
    """Exit code 2 for arguments that there are not."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print((__doc__ or "").strip())
        return 0 if arguments else 2
    verb, *rest = arguments
    words = dict(argument.partition("=")[::2] for argument in rest if "=" in argument)
    files = [Path(argument) for argument in rest if "=" not in argument]
    allowed = {"prepare": set(), "run": {"out", "budget", "stages", "size"}, "table": {"format"}}
    if verb not in allowed:
        return complain(f"{verb}: one of {', '.join(allowed)}")
    if unknown := sorted(words.keys() - allowed[verb]) or (verb != "table" and files):
        return complain(f"unknown argument {str(unknown[0])!r}; --help shows the ones there are")
    if verb == "prepare":
        return bundle.prepare()
    if verb == "table":
        if words.get("format", "text") not in ("text", "markdown") or not files:
            return complain("table FILE.json ... [format=text|markdown]")
        found = results.read(files)
        print(results.markdown(found) if words.get("format") == "markdown" else results.compact(found))
        return 0
    wanted = words["stages"].split(",") if words.get("stages") else list(STAGES)
    size = words.get("size", "1b")
    for text in wanted:
        name, _, own = text.partition(":")
        if name not in STAGES:
            return complain(f"stages={name}: of {', '.join(STAGES)}")
        if (own or size) not in SIZES:
            return complain(f"size={own or size}: one of {', '.join(SIZES)}")
    if "out" not in words:
        return complain("out=DIR is missing")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ending what runs
    return run(Path(words["out"]).resolve(), float(words.get("budget", 330)), wanted, size)


def complain(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
