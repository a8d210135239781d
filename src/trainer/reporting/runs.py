"""Run directories as values: what was trained, what became of it, its curves, what it ran on."""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from ..config import flatten, read_yaml
from ..environ import printable
from ..errors import UserError, one_line
from ..metrics import corrupt_lines, number, read_metrics, read_rows
from .statistics import DivergenceRule, spike_score, spikes

# What two runs that are compared may differ in, besides the recipe: none of it changes what is computed on paper.
_FREE = (
    *("precision", "eval.precision", "optim.moments", "parallel", "probe"),
    *("run", "log", "sample", "checkpoint", "resume"),
)
_STATES = ("finished", "diverged", "stopped", "failed")  # of done.json
_NUMBERS = ("seed", "optim.lr", "train.steps", "data.seq_len", "data.global_batch_size")
TRAIN_SERIES = ("grad_norm", "update_ratio", "lost_updates", "edq")  # of train rows, where they have them
EVAL_SERIES = ("loss", "sharpness")  # of eval rows
_PRODUCT = re.compile(r"\s+(fprop|dgrad|wgrad): (.+?)(?:  \[(.+)\])?")
_PLAIN = re.compile(r"\S+\s+\d+ -> \d+\s+fprop, dgrad, wgrad: (.+)")

Key = tuple[tuple[str, str], ...]


class Product(NamedTuple):
    """One kind of matrix product in a ``plan.txt``."""

    gemm: str  # fprop, dgrad, wgrad, or all three
    operands: str
    backend: str  # torch: in high precision


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a report is asked for, and says that it was."""

    baseline: str = "bf16"
    margin: float = 0.02  # nats that count as no difference
    within: float = 0.1  # nats of the best loss that a learning rate is usable in
    target_at: float = 0.8  # of the baseline's run: the loss it has there is the target
    rule: DivergenceRule = field(default_factory=DivergenceRule)


@dataclass(kw_only=True)
class Run:
    """One run directory."""

    name: str
    path: Path
    values: dict[str, Any]  # config.yaml, flat
    recipe: str = ""
    state: str = "not started"  # finished, diverged, stopped, failed, unfinished, not started
    reason: str = ""
    step: int = 0
    steps: list[int] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)  # of training, at ``steps``
    series: dict[str, list[float | None]] = field(default_factory=dict)  # TRAIN_SERIES that are there, at ``steps``
    evals: dict[str, dict[int, float]] = field(default_factory=dict)  # EVAL_SERIES that are there, by step
    final: float | None = None  # validation loss at the last step of a run that finished
    diverged_at: int | None = None
    num_spikes: int = 0
    spike_score: float | None = None
    spikes_met: dict[str, int] = field(default_factory=dict)  # by what the trainer did about them: ``train.spike``
    tokens_per_step: int = 0
    tokens_per_second: float | None = None
    seconds: float | None = None  # in steps, of the rows there are
    environment: dict[str, Any] = field(default_factory=dict)  # env.json
    products: dict[Product, int] = field(default_factory=dict)  # of plan.txt, with their number
    corrupt: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # files other than metrics.jsonl, with the reason

    @property
    def seed(self) -> int:
        return int(self.values.get("seed", 0))

    @property
    def lr(self) -> float:
        return float(self.values.get("optim.lr", math.nan))

    @property
    def on_cpu(self) -> bool:
        return str(self.environment.get("device", "")).startswith("cpu")

    @property
    def over(self) -> bool:
        return self.state in ("finished", "diverged")

    @property
    def config_hash(self) -> str:
        """Of everything that decides the numbers, the recipe included; where the run lies is no part of it."""
        own = [(k, repr(v)) for k, v in sorted(self.values.items()) if k.startswith(("precision.", "eval.precision"))]
        return hashlib.sha256(json.dumps([self.key(), own]).encode()).hexdigest()[:8]

    def key(self, *without: str) -> Key:
        """What makes runs comparable: the config but for what is free, and ``without``."""
        skip = (*_FREE, *without)
        telling = {k: v for k, v in self.values.items() if not any(k == s or k.startswith(f"{s}.") for s in skip)}
        return tuple(sorted((name, repr(value)) for name, value in telling.items()))


def find_runs(directories: Sequence[Path], settings: Settings) -> list[Run]:
    """Every run below the directories, by name. Raises UserError if there is none, or no such directory."""
    found: dict[Path, str] = {}
    for root in directories:
        if not root.is_dir():
            raise UserError(f"{root} is not a directory")
        marks = (file for name in ("config.yaml", "console.log") for file in root.rglob(name))
        for path in sorted({mark.parent for mark in marks}):
            if not any(part.startswith("earlier-") for part in path.relative_to(root).parts):
                name = str(path.relative_to(root)) if path != root else path.name
                found.setdefault(path.resolve(), printable(name))
    if not found:
        raise UserError(f"no run directories in {', '.join(map(str, directories))}: a run has a config.yaml")
    runs = sorted((read_run(path, name, settings) for path, name in found.items()), key=lambda run: run.name)
    _label(runs)
    return sorted(runs, key=lambda run: (run.recipe != settings.baseline, run.recipe, run.lr, run.seed, run.name))


def read_run(path: Path, name: str, settings: Settings) -> Run:
    """A run directory, however little of it there is."""
    run = Run(name=name, path=path, values={})
    if not (path / "config.yaml").exists():
        return run
    try:
        values = dict(flatten(OmegaConf.to_container(read_yaml(path / "config.yaml"), resolve=True)))
        if bad := [key for key in _NUMBERS if key in values and number(values[key]) is None]:
            raise ValueError(f"{bad[0]}={values[bad[0]]!r} is no number")
        run.values = values
    except (OSError, ValueError) as error:
        run.state, run.reason = "failed", printable(f"config.yaml cannot be read: {one_line(error)}")
        return run
    run.tokens_per_step = int(run.values.get("data.global_batch_size") or 0) * int(run.values.get("data.seq_len") or 0)
    run.environment, run.products = _json(path / "env.json", run), read_products(path / "plan.txt")
    metrics = path / "metrics.jsonl"
    run.corrupt = corrupt_lines(metrics)
    evals = read_metrics(metrics, "eval")
    _read_rows(run, read_metrics(metrics, "train"), evals)
    _judge(run, _json(path / "done.json", run), evals, settings.rule)
    run.num_spikes, run.spike_score = len(spikes(run.losses)), spike_score(run.losses)
    # By its samples: one that a run came to again after a restart is the same one.
    met = {str((row["step"], row.get("samples"))): str(row.get("action")) for row in read_rows(metrics, "spike")}
    run.spikes_met = dict(Counter(met.values()))
    return run


def _read_rows(run: Run, rows: Mapping[int, Mapping[str, Any]], evals: Mapping[int, Mapping[str, Any]]) -> None:
    run.steps, run.losses = list(rows), [number(row.get("loss")) for row in rows.values()]
    run.step = max(rows, default=0)
    for name in TRAIN_SERIES:
        values = [number(row.get(name)) for row in rows.values()]
        if any(value is not None for value in values):
            run.series[name] = values
    for name in EVAL_SERIES:
        points = {step: value for step, row in evals.items() if (value := number(row.get(name))) is not None}
        if points:
            run.evals[name] = points
    rates = [rate for row in rows.values() if (rate := number(row.get("tokens_per_second")))]
    run.tokens_per_second = statistics.median(rates) if rates else None
    run.seconds = math.fsum(run.tokens_per_step / rate for rate in rates) if rates else None


def _judge(run: Run, done: Mapping[str, Any], evals: Mapping[int, Mapping[str, Any]], rule: DivergenceRule) -> None:
    """State, step of divergence and final loss, from ``done.json``, the rule and the last validation."""
    last = number(evals[max(evals)].get("loss")) if evals else None
    run.state, run.reason = done.get("status", "unfinished"), printable(str(done.get("reason") or ""))
    if done and run.state not in _STATES:
        run.unreadable.append(printable(f"done.json: no status is called {run.state!r}"))
        run.state = "unfinished"
    run.diverged_at = rule.first_step(run.steps, run.losses if run.over else _open_end(run.losses))
    if run.state == "diverged" and run.diverged_at is None:
        run.diverged_at = run.step
    if run.state == "finished" and evals and last is None and run.diverged_at is None:
        run.diverged_at = max(evals)
    if run.diverged_at is not None:
        run.state = "diverged"
    if run.state == "finished" and evals and max(evals) == done.get("step", run.step):
        run.final = last


def _open_end(losses: Sequence[float | None]) -> list[float | None]:
    """Without the non-finite losses at the end: the trainer may yet get over them."""
    end = len(losses)
    while end and losses[end - 1] is None:
        end -= 1
    return list(losses[:end])


def read_products(file: Path) -> dict[Product, int]:
    """The kinds of matrix product in a ``plan.txt``, and how many linears have each; nothing where there is none."""
    counts: dict[Product, int] = defaultdict(int)
    try:
        lines = file.read_text(errors="replace", encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        if match := _PRODUCT.fullmatch(line):
            gemm, operands, note = match.groups()
            counts[Product(gemm, operands, re.split(r"[ ,]", note)[0] if note else "torch")] += 1
        elif match := _PLAIN.fullmatch(line):
            counts[Product("all three", match[1].removesuffix(" (torch)"), "torch")] += 1
    return dict(counts)


def _label(runs: Sequence[Run]) -> None:
    """Recipes by the name of their config; with the arguments that differ where one name has several sets."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[str(run.values.get("precision.name", "unknown"))].append(run)
    for name, members in groups.items():
        differing = differing_arguments(members)
        for run in members:
            shown = [f"{k}={v}" for k, v in arguments(run).items() if k in differing]
            run.recipe = printable(f"{name} ({', '.join(shown)})" if shown else name)


def arguments(run: Run) -> dict[str, str]:
    """The recipe's arguments by name, its schedule, and what replaces its moments and its update rule, as text."""
    telling = ("precision.args.", "precision.schedule", "optim.moments", "optim.update")
    values = {k: repr(v) for k, v in sorted(run.values.items()) if k.startswith(telling) and v not in (None, [], {})}
    return {k.removeprefix("precision.args."): v for k, v in values.items()}


def differing_arguments(runs: Iterable[Run]) -> list[str]:
    """Names of the arguments that are not the same in all runs."""
    sets = [arguments(run) for run in runs]
    return sorted({k for one in sets for k in one if any(one[k] != other.get(k) for other in sets)})


def _json(file: Path, run: Run) -> dict[str, Any]:
    """Nothing where there is no file; where it holds no JSON object, ``run`` says so."""
    try:
        value = json.loads(file.read_bytes())
        if isinstance(value, dict):
            return value
        reason = f"a {type(value).__name__}, no object"
    except FileNotFoundError:
        return {}
    except RecursionError:
        reason = "nested without end"
    except (OSError, ValueError) as error:
        reason = one_line(error)
    run.unreadable.append(printable(f"{file.name}: {reason}"))
    return {}
