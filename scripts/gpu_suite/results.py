"""What a run of ``gpu_run.py`` has found, as goals and as a table. Needs no torch.

A result is ``{"machine": ..., "stages": {name: {"told": "ok (12 s)", "rows": [{"what": ..., key: value}, ...]}}}``.
Stages whose numbers depend on the model carry its size in their name: ``steps 1b``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE_BYTES = 8000  # of the compact table: it is read at the end of a log
UNPROVED = "(only on a GPU)"
TOY = f"Toy sizes on a CPU: no number below is of a GPU; {UNPROVED}: did not run here."
Results = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Goal:
    """``reached`` is None where nothing was measured."""

    name: str
    wanted: str
    measured: str = "-"
    reached: bool | None = None

    def __str__(self) -> str:
        verdict = {True: "yes", False: "NO", None: "not measured"}[self.reached]
        return f"{self.name:54} {self.wanted:>10}  {self.measured:>18}  {verdict}"


def merged(parts: Sequence[Results]) -> Results:
    """Several passes as one result; of a stage that stands in two, the later.

    Where cards differ, or dates and revisions, all are named: the goals are ratios between stages.
    """
    whole: Results = {**parts[-1], "stages": {}}
    for part in parts:
        whole["stages"] |= part["stages"]
    for key in ("date", "revision"):
        whole[key] = " and ".join(dict.fromkeys(str(part.get(key, "unknown")) for part in parts))
    cards = dict.fromkeys(str(part.get("machine", {}).get("card")) for part in parts)
    if len(cards) > 1:
        whole["machine"] = {**whole["machine"], "card": f"{' and '.join(cards)} (ratios between them say nothing)"}
    return whole


def read(files: Sequence[Path]) -> Results:
    return merged([json.loads(file.read_text(encoding="utf-8")) for file in files])


def on_gpu(results: Results) -> bool:
    return results.get("machine", {}).get("device") == "cuda"


def rows_of(results: Results, stage: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = results["stages"].get(stage, {}).get("rows", [])
    return rows


def value(results: Results, stage: str, what: str, key: str) -> float | None:
    """The number under ``key`` in the row ``what`` of a stage; None where it is not known."""
    for row in rows_of(results, stage):
        if row.get("what") == what and isinstance(row.get(key), int | float):
            return float(row[key])
    return None


def goals(results: Results) -> list[Goal]:
    """Every goal. Ratios are of rows of this result alone; without a GPU only what a CPU can show is judged."""
    found = [*_ended(results)]
    if not on_gpu(results):
        return found
    for size, mfu, tensor in (("1b", 50, 1.15), ("8b", 55, 1.25)):
        steps, peers, emulated = (f"{stage} {size}" for stage in ("steps", "peers", "emulated"))

        def speed(what: str, stage: str = steps) -> float | None:
            return value(results, stage, what, "tok/s")

        ours, native = speed("bf16 compiled"), _most(speed("fp8_current compiled"), speed("fp8_delayed compiled"))
        found += [
            _least(f"{size}: BF16 compiled, MFU %", mfu, value(results, steps, "bf16 compiled", "MFU%")),
            _ratio(f"{size}: BF16 compiled / transformers compiled", 1.0, ours, speed("transformers compiled", peers)),
            _ratio(f"{size}: FP8 tensor-wise / BF16", tensor, native, ours),
            _ratio(f"{size}: FP8 tensor-wise / torchao tensorwise", 1.0, native, speed("torchao tensorwise", peers)),
            _ratio(f"{size}: FP8 row-wise / BF16", 1.1, speed("fp8_rowwise compiled"), ours),
            _ratio(f"{size}: FP8 in blocks / BF16", 1.1, speed("fp8_block compiled"), ours),
        ]
        for recipe in ("nvfp4", "mxfp8"):
            step = speed(f"{recipe} compiled", emulated)
            found.append(_most_ratio(f"{size}: {recipe} emulated, step / BF16's", 1.5, ours, step))
    found += [*_bandwidths(results)]
    memory = value(results, "steps 1b", "bf16 compiled", "GiB")
    found.append(_judged("1b: BF16 compiled, peak GiB", "<= 45", memory, lambda x: x <= 45))
    limits = {"fp32": 1e-4, "bf16": 1e-2, "fp8_current": 3e-2, "fp8_delayed": 3e-2, "nvfp4": 3e-2}
    for recipe, limit in limits.items():
        apart = value(results, "parity", recipe, "most apart")
        found.append(_judged(f"CPU against GPU, ten losses: {recipe}", f"<= {limit:g}", apart, _at_most(limit)))
    found.append(_resumed(results))
    return found


def _ended(results: Results) -> Iterable[Goal]:
    stages = results["stages"]
    ended = sum(entry["told"].startswith("ok") for entry in stages.values())
    yield Goal("every stage ends", "all", f"{ended} of {len(stages)}", ended == len(stages))
    errors = sum("error" in row for entry in stages.values() for row in entry["rows"])
    yield Goal("rows that are errors", "0", str(errors), errors == 0)
    fails = value(results, "check", "claims", "fail")
    if not fails and value(results, "check", "claims", "left out"):
        fails = None
    yield _judged("claims that fail", "0", fails, lambda x: x == 0)


def _bandwidths(results: Results) -> Iterable[Goal]:
    wanted = {"one direction": 80.0, "both directions": 70.0, "hadamard": 50.0}
    rows = rows_of(results, "quantize")
    for kind, limit in wanted.items():
        shares = [row["%copy"] for row in rows if row.get("kind") == kind and "%copy" in row]
        complete = shares and all("%copy" in row for row in rows if row.get("kind") == kind)
        name = f"quantization, {kind}: % of copy, the least"
        yield _least(name, limit, min(shares) if complete else None)


def _resumed(results: Results) -> Goal:
    name, rows = "killed and resumed, deterministic: digits apart", rows_of(results, "resume")
    counts = [row["differ"] for row in rows if row.get("deterministic") == "true" and "differ" in row]
    return _judged(name, "0", float(max(counts)) if counts else None, lambda x: x == 0)


def _judged(name: str, wanted: str, measured: float | None, holds: Callable[[float], bool]) -> Goal:
    if measured is None:
        return Goal(name, wanted)
    return Goal(name, wanted, short(measured), holds(measured))


def _at_most(limit: float) -> Callable[[float], bool]:
    return lambda measured: measured <= limit


def _least(name: str, limit: float, measured: float | None) -> Goal:
    return _judged(name, f">= {limit:g}", measured, lambda x: x >= limit)


def _ratio(name: str, limit: float, over: float | None, under: float | None) -> Goal:
    return _least(name, limit, over / under if over is not None and under else None)


def _most_ratio(name: str, limit: float, over: float | None, under: float | None) -> Goal:
    return _judged(name, f"<= {limit:g}", over / under if over is not None and under else None, _at_most(limit))


def _most(*values: float | None) -> float | None:
    return max((v for v in values if v is not None), default=None)


def compact(results: Results) -> str:
    """Goals, then a line a row, the stages in the order in which they ran, at most ``TABLE_BYTES`` of rows."""
    lines = [headline(results), "", f"{'goal':54} {'wanted':>10}  {'measured':>18}", *map(str, goals(results)), ""]
    if not on_gpu(results):
        lines.insert(1, TOY)
    blocks = {name: _block(entry, name) for name, entry in results["stages"].items()}
    while sum(len(line) + 1 for block in blocks.values() for line in block) > TABLE_BYTES:
        longest = max(blocks, key=lambda name: len(blocks[name]))
        if len(blocks[longest]) < 4:
            break
        blocks[longest] = [*blocks[longest][:-2], "   ... more in results.json"]
    return "\n".join([*lines, *(line for block in blocks.values() for line in block)])


def _block(entry: dict[str, Any], name: str) -> list[str]:
    lines = [f"== {name}: {entry['told']}"]
    for row in entry["rows"]:
        if not row.get("detail"):
            values = "  ".join(f"{key} {short(v)}" for key, v in row.items() if key not in ("what", "kind", "detail"))
            lines.append(f"{row['what'][:36]:36} {values}"[:200])
    if not entry["told"].startswith("ok"):
        lines += [f"   | {line[:150]}" for line in entry.get("end", [])]
    return lines


def headline(results: Results) -> str:
    machine = results.get("machine", {})
    said = [results.get("date", ""), machine.get("card", "no stage has said which card")]
    said += [f"{key} {machine[key]}" for key in ("driver", "torch", "cuda", "triton", "python") if machine.get(key)]
    return ", ".join([*said, f"revision {results.get('revision', 'unknown')}"])


def markdown(results: Results) -> str:
    """Goals and every stage as tables, for docs/gpu.md."""
    lines = [f"{headline(results)}.", "", "| goal | wanted | measured | reached |", "|---|---|---|---|"]
    if not on_gpu(results):
        lines.insert(1, TOY)
    words = {True: "yes", False: "**no**", None: "not measured"}
    lines += [f"| {goal.name} | {goal.wanted} | {goal.measured} | {words[goal.reached]} |" for goal in goals(results)]
    for name, entry in results["stages"].items():
        rows = [row for row in entry["rows"] if not row.get("detail")]
        keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("what", "kind", "detail")))
        lines += ["", f"**{name}**: {entry['told']}"]
        if rows:
            lines += ["", f"| | {' | '.join(keys)} |", f"|---{'|---' * len(keys)}|"]
            lines += [f"| {' | '.join(_cell(row.get(key, '')) for key in ('what', *keys))} |" for row in rows]
    return "\n".join(lines)


def _cell(v: Any) -> str:
    return short(v).replace("|", "\\|").replace("<", "&lt;")  # names of kernels have both


def short(v: Any) -> str:
    return f"{v:.4g}" if isinstance(v, float) else str(v)
