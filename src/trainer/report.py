"""The report of a sweep, from run directories alone: which recipe, what it costs, and what the data cannot say.

Reads ``config.yaml, metrics.jsonl, done.json, env.json`` of every run below the given directories. A diverged run is
never dropped: it has no place in a mean of losses, so it is counted beside it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from precision.recipe import close
from trainer.config import flatten
from trainer.errors import UserError, one_line
from trainer.files import write_json, write_text
from trainer.metrics import corrupt_lines, read_metrics
from trainer.numerics import heat_map, numerics_of, picture, worst_layers

try:  # extra `report`
    import jinja2
    from plotly.offline import get_plotlyjs

    from trainer.statistics import (
        CONFIDENCE,
        DivergenceRule,
        Equivalence,
        Interval,
        bootstrap_mean,
        equivalence,
        lr_sensitivity,
        noise_band,
        sign_test,
        spike_score,
        spikes,
        usable_width,
        wilson,
    )
except ImportError as missing:
    raise SystemExit(f"error: {missing}: pip install 'narrowgauge[report]'") from missing

# What two runs that are compared may differ in, beside the recipe: none of it changes what is computed on paper.
_FREE = ("precision", "run", "log", "sample", "checkpoint", "resume", "parallel", "eval.precision", "probe")
_MOST_POINTS = 400  # of a curve
_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
_RECIPE_COLUMNS = (
    *("recipe", "finished", "pairs", "gap", "low", "high", "noise", "sign-test p", "equivalence p", "diverged"),
    *("rate low", "rate high", "sensitivity", "width", "spikes", "tokens/s"),
)
_RUN_COLUMNS = (
    *("run", "recipe", "model", "data", "lr", "seed", "state", "step", "final_loss", "diverged_at", "spikes"),
    *("corrupt_lines", "tokens_per_second"),
)
Key = tuple[tuple[str, str], ...]
Cell = str | float | int | None


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
    final: float | None = None  # validation loss at the last step of a run that finished
    diverged_at: int | None = None
    num_spikes: int = 0
    spike_score: float | None = None
    tokens_per_step: int = 0
    tokens_per_second: float | None = None
    device: str = ""
    world_size: int | None = None
    revision: str = ""
    corrupt: list[int] = field(default_factory=list)

    @property
    def seed(self) -> int:
        return int(self.values.get("seed", 0))

    @property
    def lr(self) -> float:
        return float(self.values.get("optim.lr", math.nan))

    def key(self, *without: str) -> Key:
        """What makes runs comparable: the config but for what is free, and ``without``."""
        skip = (*_FREE, *without)
        kept = {k: v for k, v in self.values.items() if not any(k == s or k.startswith(f"{s}.") for s in skip)}
        return tuple(sorted((name, repr(value)) for name, value in kept.items()))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the report is told, and states."""

    baseline: str = "bf16"
    margin: float = 0.02  # nats that count as no difference
    within: float = 0.1  # nats of the best loss that a learning rate is usable in
    rule: DivergenceRule = field(default_factory=DivergenceRule)


@dataclass(kw_only=True)
class RecipeSummary:
    """What the runs of one recipe say."""

    recipe: str
    runs: int
    finished: int
    diverged: int
    decided: int  # finished or diverged
    rate: Interval | None  # of divergence
    times_to_divergence: list[int]
    final_mean: float | None
    gaps: list[float]
    unpaired: int  # finished runs without a finished partner
    gap: float | None
    interval: Interval | None
    band: float | None
    sign_p: float | None
    equivalence: Equivalence | None
    lr_sensitivity: float | None
    usable_width: float | None
    rates: int  # learning rates tried
    spikes: int
    spike_score: float | None
    tokens_per_second: float | None
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """For HTML and Markdown alike."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure for plotly.js."""

    name: str
    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def write_report(directories: Sequence[Path], out: Path, settings: Settings) -> dict[str, Any]:
    """Write ``report.html, report.md, summary.csv, summary.json`` and PNGs into ``out``; gives back the summary.

    Raises UserError if a directory is not there, or none holds a run.
    """
    runs = find_runs(directories, settings)
    recipes = summarize(runs, settings)
    numerics = numerics_of((run.recipe, run.path) for run in runs)
    maps = [(f"numerics-{number}", recipe, each) for number, (recipe, each) in enumerate(numerics.items(), 1)]
    tables = [*_tables(runs, recipes, settings), *([Table(**worst_layers(numerics))] if numerics else [])]
    limits = _limits(runs, recipes, settings)
    summary = _summary(runs, recipes, limits, settings)
    out.mkdir(parents=True, exist_ok=True)
    try:
        write_json(out / "summary.json", summary)
        write_text(out / "summary.csv", _csv(runs))
        shown = "".join(f"\n![numerics of {recipe}]({name}.png)\n" for name, recipe, _ in maps)
        write_text(out / "report.md", _markdown(recipes, tables, limits) + shown)
        plots = [*_plots(runs, recipes), *(Plot(**heat_map(*each)) for each in maps)]
        write_text(out / "report.html", _html(recipes, tables, limits, plots))
        _pictures(runs, recipes, out)
        for name, recipe, each in maps:
            picture(recipe, each, out / f"{name}.png")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    return summary


# --- reading


def find_runs(directories: Sequence[Path], settings: Settings) -> list[Run]:
    """Every run below the directories, by name. Raises UserError if there is none, or no such directory."""
    found: dict[Path, str] = {}
    for root in directories:
        if not root.is_dir():
            raise UserError(f"{root} is not a directory")
        marks = (file for name in ("config.yaml", "console.log") for file in root.rglob(name))
        for path in sorted({mark.parent for mark in marks}):
            if not any(part.startswith("earlier-") for part in path.relative_to(root).parts):
                found.setdefault(path.resolve(), str(path.relative_to(root)) if path != root else path.name)
    if not found:
        raise UserError(f"no run directories in {', '.join(map(str, directories))}: a run has a config.yaml")
    runs = sorted((_read_run(path, name, settings) for path, name in found.items()), key=lambda run: run.name)
    _label(runs)
    return sorted(runs, key=lambda run: (run.recipe != settings.baseline, run.recipe, run.lr, run.seed, run.name))


def _read_run(path: Path, name: str, settings: Settings) -> Run:
    run = Run(name=name, path=path, values={})
    if not (path / "config.yaml").exists():
        return run
    try:
        run.values = dict(flatten(OmegaConf.to_container(OmegaConf.load(path / "config.yaml"), resolve=True)))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        run.state, run.reason = "failed", f"config.yaml cannot be read: {one_line(error)}"
        return run
    metrics = path / "metrics.jsonl"
    run.corrupt = corrupt_lines(metrics)
    rows = read_metrics(metrics, "train")
    run.steps, run.losses = list(rows), [_number(row.get("loss")) for row in rows.values()]
    rates = [rate for row in rows.values() if (rate := _number(row.get("tokens_per_second"))) is not None]
    run.tokens_per_second = statistics.median(rates) if rates else None
    run.tokens_per_step = int(run.values.get("data.global_batch_size") or 0) * int(run.values.get("data.seq_len") or 0)
    environment, done = _json(path / "env.json"), _json(path / "done.json")
    run.device, run.world_size = str(environment.get("device", "")), environment.get("world_size")
    run.revision = str(environment.get("revision") or "")
    run.step = max(rows, default=0)
    run.state, run.reason = str(done.get("status", "unfinished")), str(done.get("reason") or "")
    evals = read_metrics(metrics, "eval")
    last = _number(evals[max(evals)].get("loss")) if evals else None
    over = run.state in ("finished", "diverged")
    run.diverged_at = settings.rule.first_step(run.steps, run.losses if over else _open_end(run.losses))
    if run.state == "diverged" and run.diverged_at is None:
        run.diverged_at = run.step
    if run.state == "finished" and evals and last is None and run.diverged_at is None:
        run.diverged_at = max(evals)
    if run.diverged_at is not None:
        run.state = "diverged"
    if run.state == "finished" and evals and max(evals) == done.get("step", run.step):
        run.final = last
    run.num_spikes, run.spike_score = len(spikes(run.losses)), spike_score(run.losses)
    return run


def _open_end(losses: Sequence[float | None]) -> list[float | None]:
    """Without the non-finite losses at the end: the trainer may yet get over them."""
    end = len(losses)
    while end and losses[end - 1] is None:
        end -= 1
    return list(losses[:end])


def _label(runs: Sequence[Run]) -> None:
    """Recipes by the name of their config; with the arguments that differ where one name has several sets."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[str(run.values.get("precision.name", "unknown"))].append(run)
    for name, members in groups.items():
        arguments = [{k: repr(v) for k, v in run.values.items() if k.startswith("precision.args.")} for run in members]
        differing = sorted({k for one in arguments for k in one if any(one.get(k) != o.get(k) for o in arguments)})
        for run, own in zip(members, arguments, strict=True):
            told = [f"{k.removeprefix('precision.args.')}={own[k]}" for k in differing if k in own]
            run.recipe = f"{name} ({', '.join(told)})" if told else name


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


# --- measuring


def summarize(runs: Sequence[Run], settings: Settings) -> list[RecipeSummary]:
    """The baseline first, then the recipes by name. Raises UserError for a baseline that no run has."""
    known = [run for run in runs if run.values]
    names = list(dict.fromkeys(run.recipe for run in known))
    if names and settings.baseline not in names and settings.baseline != "bf16":
        near = close(settings.baseline, names)
        raise UserError(f"baseline={settings.baseline}: no run of it{near}; there are: {', '.join(names)}")
    base = {run.key(): run for run in known if run.recipe == settings.baseline and run.final is not None}
    seeds: dict[Key, list[float]] = defaultdict(list)
    for run in base.values():
        assert run.final is not None
        seeds[run.key("seed")].append(run.final)
    noise = [seeds[key] for key in sorted(seeds)]
    return [
        _summarize(name, [run for run in known if run.recipe == name], base, noise, settings)
        for name in sorted(names, key=lambda name: (name != settings.baseline, name))
    ]


def _summarize(
    name: str,
    runs: Sequence[Run],
    base: Mapping[Key, Run],
    noise: Sequence[Sequence[float]],
    settings: Settings,
) -> RecipeSummary:
    finished = [run for run in runs if run.final is not None]
    diverged = [run for run in runs if run.state == "diverged"]
    ended = [run for run in runs if run.state in ("finished", "diverged")]
    gaps, unpaired = [], 0
    for run in sorted(finished, key=lambda run: run.key()) if name != settings.baseline else ():
        partner = base.get(run.key())
        if partner is None or partner.final is None or run.final is None:
            unpaired += 1
        else:
            gaps.append(run.final - partner.final)
    speeds = [run.tokens_per_second for run in runs if run.tokens_per_second is not None]
    scores = [run.spike_score for run in runs if run.spike_score is not None]
    sensitivity, width, rates = _learning_rates(ended, settings)
    result = RecipeSummary(
        recipe=name,
        runs=len(runs),
        finished=len(finished),
        diverged=len(diverged),
        decided=len(ended),
        rate=wilson(len(diverged), len(ended)),
        times_to_divergence=sorted(run.diverged_at for run in diverged if run.diverged_at is not None),
        final_mean=_mean([run.final for run in finished if run.final is not None]),
        gaps=gaps,
        unpaired=unpaired,
        gap=_mean(gaps),
        interval=bootstrap_mean(gaps),
        band=noise_band(noise, len(gaps) or len(finished)),
        sign_p=sign_test(gaps),
        equivalence=equivalence(gaps, settings.margin),
        lr_sensitivity=sensitivity,
        usable_width=width,
        rates=rates,
        spikes=sum(run.num_spikes for run in runs),
        spike_score=_mean(scores),
        tokens_per_second=statistics.median(speeds) if speeds else None,
    )
    result.verdict = _verdict(result, runs, settings)
    return result


def _learning_rates(runs: Sequence[Run], settings: Settings) -> tuple[float | None, float | None, int]:
    """Sensitivity and usable width, means over settings that differ in more than seed and learning rate; rates tried.

    The loss of a learning rate is the mean over its seeds; None, as diverged, if one of them diverged.
    """
    settled: dict[Key, dict[float, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        settled[run.key("seed", "optim.lr")][run.lr].append(run)
    sensitivities, widths, rates = [], [], set()
    for key in sorted(settled):
        losses: dict[float, float | None] = {}
        for lr, members in sorted(settled[key].items()):
            finals = [run.final for run in members]
            losses[lr] = _mean([final for final in finals if final is not None]) if None not in finals else None
            rates.add(lr)
        first = [run.losses[0] for runs_ in settled[key].values() for run in runs_ if run.losses]
        at_init = _mean([loss for loss in first if loss is not None])
        if at_init is not None and (value := lr_sensitivity(losses, at_init)) is not None:
            sensitivities.append(value)
        if len(losses) > 1 and (width := usable_width(losses, settings.within)) is not None:
            widths.append(width)
    return _mean(sensitivities), _mean(widths), len(rates)


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else None


# --- saying


def _verdict(s: RecipeSummary, runs: Sequence[Run], settings: Settings) -> str:
    parts = []
    if s.recipe == settings.baseline:
        parts.append(f"the baseline: {_plural(s.finished, 'run')} finished")
        if s.final_mean is not None:
            parts[0] += f", mean validation loss {s.final_mean:.4f}"
        one = None if s.band is None else s.band / math.sqrt(2 / max(1, s.finished)) * math.sqrt(2)
        parts.append(
            "its seed noise is not known: no two finished runs differ in the seed alone"
            if one is None
            else f"95 of 100 pairs of its runs that differ in the seed alone lie within {one:.4f} nats"
        )
    elif s.gap is None:
        parts.append(f"no gap to {settings.baseline}: no finished run has a finished partner of the same config")
    else:
        interval = f" [{s.interval.low:+.4f}, {s.interval.high:+.4f}]" if s.interval else " (no interval from one pair)"
        parts.append(f"gap to {settings.baseline} {s.gap:+.4f} nats{interval} over {_plural(len(s.gaps), 'pair')}")
        parts.append(_meaning(s, settings))
    told = f"diverged {s.diverged} of {s.decided}"
    if s.rate is not None:
        told += f" (95% interval {s.rate.low:.0%} to {s.rate.high:.0%})"
    if s.times_to_divergence:
        told += f", at steps {', '.join(map(str, s.times_to_divergence))}"
    parts.append(told)
    if s.runs > s.decided:
        parts.append(f"{_plural(s.runs - s.decided, 'run')} not over")
    if s.tokens_per_second is not None:
        narrow = s.recipe != settings.baseline
        emulated = " (emulated: this machine's speed, not narrow hardware's)" if narrow and _on_cpu(runs) else ""
        parts.append(f"{s.tokens_per_second:,.0f} tokens/s{emulated}")
    return "; ".join(parts)


def _meaning(s: RecipeSummary, settings: Settings) -> str:
    assert s.gap is not None
    if all(gap == 0 for gap in s.gaps):
        return f"the same losses as {settings.baseline}, every digit"
    says = []
    if s.band is None:
        says.append(f"{settings.baseline}'s seed noise is not known, so this may be chance")
    elif abs(s.gap) <= s.band:
        says.append(f"within seed noise: {settings.baseline} against itself would give up to {s.band:.4f}")
        if s.interval and not s.interval.low <= 0 <= s.interval.high:
            says.append("though pair by pair the sign holds")
    else:
        says.append(f"beyond the seed noise of {s.band:.4f}: {'worse' if s.gap > 0 else 'better'}")
    if s.equivalence is not None:
        word = "equivalent" if s.equivalence.equivalent else "not shown to be equivalent"
        says.append(f"{word} within {settings.margin:g} nats (p = {s.equivalence.p:.3f})")
    return ", ".join(says)


def _limits(runs: Sequence[Run], recipes: Sequence[RecipeSummary], settings: Settings) -> list[str]:
    """What the data cannot say."""
    limits = []
    names = [summary.recipe for summary in recipes]
    if settings.baseline not in names:
        limits.append(f"There is no run of {settings.baseline}, so no recipe has a gap.")
    few = [s.recipe for s in recipes if s.recipe != settings.baseline and 0 < len(s.gaps) < 6]
    if few:
        limits.append(f"Fewer than 6 pairs, so the intervals are rough: {', '.join(few)}.")
    seeds = {run.seed for run in runs if run.values}
    if len(seeds) < 3:
        limits.append(f"{_plural(len(seeds), 'seed')}: too few to tell a recipe from chance.")
    rates = {run.lr for run in runs if run.values}
    if len(rates) < 3:
        limits.append(f"{_plural(len(rates), 'learning rate')}: where a recipe's best one lies is not known.")
    clean = [s for s in recipes if s.diverged == 0 and s.rate is not None]
    if clean:
        most = max(s.rate.high for s in clean if s.rate is not None)
        limits.append(f"No divergence in these runs still allows a rate of up to {most:.0%}.")
    longest = max((run.step * run.tokens_per_step for run in runs), default=0)
    limits.append(f"The longest run saw {longest:,} tokens: nothing is said about longer training or larger models.")
    if _on_cpu(runs):
        limits.append("Narrow formats were emulated on a CPU: tokens/s say nothing about hardware that has them.")
    limits.append("Memory is not in the run directories: scripts/bench_memory.py measures it.")
    diverged = sum(run.state == "diverged" for run in runs)
    if diverged:
        limits.append(
            f"{_plural(diverged, 'diverged run')}: in the counts, not in the gaps, which flatter such a recipe."
        )
    pending = [run for run in runs if run.state not in ("finished", "diverged")]
    if pending:
        limits.append(f"{_plural(len(pending), 'run')} not over: {', '.join(run.name for run in pending)}.")
    limits += [
        f"{run.name}/metrics.jsonl: {_plural(len(run.corrupt), 'corrupt line')} skipped, number "
        f"{', '.join(map(str, run.corrupt))}."
        for run in runs
        if run.corrupt
    ]
    return limits


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _on_cpu(runs: Sequence[Run]) -> bool:
    return any(run.device.startswith("cpu") for run in runs)


def _tables(runs: Sequence[Run], recipes: Sequence[RecipeSummary], settings: Settings) -> list[Table]:
    first = Table(
        title="Recipes",
        note=f"Gap: final validation loss minus that of {settings.baseline} at the same config, seed and learning rate "
        "included; mean over pairs, bootstrap interval of 95%. Noise: how far apart two means of as many "
        f"{settings.baseline} runs may lie by their seeds alone. Sensitivity: mean over learning rates of "
        "min(loss, loss at init) minus the best (arXiv 2309.14322). Width: decades of learning rate within "
        f"{settings.within:g} nats of the best. Spikes: training losses more than 6 standard deviations above the mean "
        "of the 128 before.",
        columns=_RECIPE_COLUMNS,
        rows=[
            (
                s.recipe,
                s.finished,
                len(s.gaps),
                s.gap,
                s.interval.low if s.interval else None,
                s.interval.high if s.interval else None,
                s.band,
                s.sign_p,
                s.equivalence.p if s.equivalence else None,
                f"{s.diverged} of {s.decided}",
                s.rate.low if s.rate else None,
                s.rate.high if s.rate else None,
                s.lr_sensitivity,
                s.usable_width,
                s.spikes,
                round(s.tokens_per_second) if s.tokens_per_second is not None else None,
            )
            for s in recipes
        ],
    )
    known = [run for run in runs if run.values]
    columns = sorted({(run.lr, run.seed) for run in known})
    cells: dict[tuple[str, float, int], list[str]] = defaultdict(list)
    for run in known:
        cells[run.recipe, run.lr, run.seed].append(run.state if run.final is None else f"{run.final:.4f}")
    coverage = Table(
        title="Coverage",
        note=f"Final validation loss, or what became of the run; {settings.rule}.",
        columns=["recipe", *(f"lr {lr:g}, seed {seed}" for lr, seed in columns)],
        rows=[
            (s.recipe, *(", ".join(cells.get((s.recipe, lr, seed), ["missing"])) for lr, seed in columns))
            for s in recipes
        ],
    )
    every = Table(
        title="Runs",
        note="Every run directory that was found.",
        columns=["run", "recipe", "lr", "seed", "state", "step", "validation loss", "diverged at", "spikes", "corrupt"],
        rows=[
            (
                run.name,
                run.recipe,
                run.lr if run.values else None,
                run.seed if run.values else None,
                run.state + (f": {run.reason}" if run.reason and run.state != "finished" else ""),
                run.step,
                run.final,
                run.diverged_at,
                run.num_spikes,
                len(run.corrupt),
            )
            for run in runs
        ],
    )
    origin = Table(
        title="Origin",
        note="What made these runs, from their env.json.",
        columns=["revision", "device", "processes", "model", "data", "tokens a run", "runs"],
        rows=[(*key, count) for key, count in sorted(_count(_origin(run) for run in known).items())],
    )
    return [first, coverage, every, origin]


def _origin(run: Run) -> tuple[str, ...]:
    values = (run.revision, run.device, run.world_size, run.values.get("model.name"), run.values.get("data.name"))
    return (*map(str, values), f"{int(run.values.get('train.steps') or 0) * run.tokens_per_step:,}")


def _count(items: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], int]:
    counts: dict[tuple[str, ...], int] = defaultdict(int)
    for item in items:
        counts[item] += 1
    return counts


# --- writing


def _summary(
    runs: Sequence[Run], recipes: Sequence[RecipeSummary], limits: Sequence[str], settings: Settings
) -> dict[str, Any]:
    """All numbers; what a clock has a part in stands under ``times``, so that the rest is the same after a restart."""
    return {
        "settings": {
            "baseline": settings.baseline,
            "margin": settings.margin,
            "within": settings.within,
            "rule": str(settings.rule),
            "confidence": CONFIDENCE,
        },
        "recipes": {
            s.recipe: {
                "runs": s.runs,
                "finished": s.finished,
                "diverged": s.diverged,
                "decided": s.decided,
                "divergence_rate_interval": s.rate,
                "times_to_divergence": s.times_to_divergence,
                "final_loss_mean": s.final_mean,
                "gaps": s.gaps,
                "unpaired": s.unpaired,
                "gap_mean": s.gap,
                "gap_interval": s.interval,
                "seed_noise_band": s.band,
                "sign_test_p": s.sign_p,
                "equivalence_p": s.equivalence.p if s.equivalence else None,
                "equivalent": s.equivalence.equivalent if s.equivalence else None,
                "lr_sensitivity": s.lr_sensitivity,
                "usable_lr_decades": s.usable_width,
                "learning_rates": s.rates,
                "spikes": s.spikes,
                "spike_score": s.spike_score,
            }
            for s in recipes
        },
        "runs": {
            run.name: {
                "recipe": run.recipe,
                "lr": run.lr if run.values else None,
                "seed": run.seed if run.values else None,
                "state": run.state,
                "step": run.step,
                "final_loss": run.final,
                "diverged_at": run.diverged_at,
                "spikes": run.num_spikes,
                "corrupt_lines": run.corrupt,
            }
            for run in runs
        },
        "limits": list(limits),
        "times": {
            "tokens_per_second": {s.recipe: s.tokens_per_second for s in recipes},
            "emulated": _on_cpu(runs),
            "verdicts": {s.recipe: s.verdict for s in recipes},
        },
    }


def _csv(runs: Sequence[Run]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_RUN_COLUMNS)
    for run in runs:
        names = [run.values.get("model.name"), run.values.get("data.name")]
        own = [run.lr, run.seed] if run.values else [None, None]
        counts = [run.diverged_at, run.num_spikes, len(run.corrupt), run.tokens_per_second]
        writer.writerow([run.name, run.recipe, *names, *own, run.state, run.step, run.final, *counts])
    return text.getvalue()


def _show(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4f}" if 0.01 <= abs(cell) < 1000 or cell == 0 else f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _markdown(recipes: Sequence[RecipeSummary], tables: Sequence[Table], limits: Sequence[str]) -> str:
    lines = ["# Which recipe, and what it costs", ""]
    lines += [f"- **{s.recipe}**: {s.verdict}." for s in recipes]
    lines += ["", "## What these runs cannot say", "", *(f"- {limit}" for limit in limits)]
    for table in tables:
        lines += ["", f"## {table.title}", "", table.note, ""]
        lines += ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
        lines += ["| " + " | ".join(_show(cell).replace("|", "\\|") for cell in row) + " |" for row in table.rows]
    lines += ["", "![training loss](losses.png)", "", "![gap](gaps.png)", "", "![learning rates](rates.png)"]
    return "\n".join(lines) + "\n"


def _html(
    recipes: Sequence[RecipeSummary], tables: Sequence[Table], limits: Sequence[str], plots: Sequence[Plot]
) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "report.html.j2"
    )
    figures = [{"name": plot.name, "data": plot.data, "layout": plot.layout} for plot in plots]
    return template.render(
        recipes=recipes,
        tables=tables,
        limits=limits,
        plots=plots,
        show=_show,
        plotly=get_plotlyjs(),
        figures=json.dumps(figures, allow_nan=False).replace("</", "<\\/"),
    )


def _plots(runs: Sequence[Run], recipes: Sequence[RecipeSummary]) -> list[Plot]:
    colors = _colors(recipes)
    losses, rates, gaps = [], [], []
    shown = set()
    for run in runs:
        if run.values and run.losses:
            x, y = _curve(run)
            line = {"color": colors[run.recipe], "width": 1.2, "dash": "dot" if run.state == "diverged" else "solid"}
            losses.append(
                {"x": x, "y": y, "name": run.recipe, "text": run.name, "mode": "lines", "line": line}
                | {"legendgroup": run.recipe, "showlegend": run.recipe not in shown, "hoverinfo": "x+y+text"}
            )
            shown.add(run.recipe)
    for s in recipes:
        own = [run for run in runs if run.recipe == s.recipe and run.values]
        marker = {"color": colors[s.recipe]}
        good = [run for run in own if run.final is not None]
        rates.append(
            {"x": [run.lr for run in good], "y": [run.final for run in good], "text": [run.name for run in good]}
            | {"name": s.recipe, "mode": "markers", "marker": marker, "legendgroup": s.recipe}
        )
        bad = [run for run in own if run.state == "diverged"]
        if bad:
            rates.append(
                {"x": [run.lr for run in bad], "y": [run.losses[0] if run.losses else None for run in bad]}
                | {"name": f"{s.recipe} diverged", "mode": "markers", "legendgroup": s.recipe}
                | {"marker": marker | {"symbol": "x", "size": 9}}
            )
        if s.gaps:
            gaps.append(
                {"x": [s.recipe] * len(s.gaps), "y": s.gaps, "mode": "markers", "showlegend": False}
                | {"marker": marker | {"opacity": 0.5}, "name": s.recipe}
            )
            error = None
            if s.interval and s.gap is not None:
                error = {"type": "data", "symmetric": False}
                error |= {"array": [s.interval.high - s.gap], "arrayminus": [s.gap - s.interval.low]}
            mean = {"x": [s.recipe], "y": [s.gap], "mode": "markers", "name": f"{s.recipe}, mean", "showlegend": False}
            gaps.append(
                mean | {"marker": marker | {"size": 11, "symbol": "diamond"}} | ({"error_y": error} if error else {})
            )
    return [
        Plot(name="losses", title="Training loss, smoothed", data=losses, layout=_layout("tokens", "nats per token")),
        Plot(name="gaps", title="Gap to the baseline, pair by pair", data=gaps, layout=_layout("", "nats per token")),
        Plot(
            name="rates",
            title="Final validation loss by learning rate; diverged runs as crosses at their first loss",
            data=rates,
            layout=_layout("learning rate", "nats per token", log_x=True),
        ),
    ]


def _layout(x: str, y: str, *, log_x: bool = False) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x}, "automargin": True, **({"type": "log"} if log_x else {})},
        "yaxis": {"title": {"text": y}, "automargin": True},
        "margin": {"l": 50, "r": 10, "t": 10, "b": 45},
        "legend": {"orientation": "h", "y": -0.25},
        "height": 420,
    }


def _colors(recipes: Sequence[RecipeSummary]) -> dict[str, str]:
    return {s.recipe: _COLORS[index % len(_COLORS)] for index, s in enumerate(recipes)}


def _curve(run: Run, keep: float = 0.9) -> tuple[list[int], list[float]]:
    """Tokens and smoothed loss, thinned to at most ``_MOST_POINTS`` and the last; non-finite losses are left out."""
    x, y, mean, weight = [], [], 0.0, 0.0
    for step, loss in zip(run.steps, run.losses, strict=True):
        if loss is not None:
            mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
            x.append(step * run.tokens_per_step)
            y.append(round(mean / weight, 5))
    every = max(1, math.ceil(len(x) / _MOST_POINTS))
    picks = sorted({*range(0, len(x), every), len(x) - 1} - {-1})
    return [x[i] for i in picks], [y[i] for i in picks]


def _pictures(runs: Sequence[Run], recipes: Sequence[RecipeSummary], out: Path) -> None:
    colors = _colors(recipes)
    rates = sorted({run.lr for run in runs if run.values})
    for name, title, x_label in (
        ("losses", "training loss, smoothed", "tokens"),
        ("gaps", "gap to the baseline: pairs, mean, 95% interval", ""),
        ("rates", "final validation loss; crosses: diverged, at their first loss", "learning rate"),
    ):
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for index, s in enumerate(recipes):
            own = [run for run in runs if run.recipe == s.recipe and run.values]
            color = colors[s.recipe]
            if name == "losses":
                for number, run in enumerate(own):
                    style = ":" if run.state == "diverged" else "-"
                    label = s.recipe if number == 0 else None
                    axes.plot(*_curve(run), color=color, linewidth=0.9, linestyle=style, label=label)
            elif name == "gaps" and s.gap is not None:
                axes.plot([s.recipe] * len(s.gaps), s.gaps, "o", color=color, alpha=0.4)
                axes.plot([s.recipe], [s.gap], "D", color=color)
                if s.interval is not None:
                    axes.vlines([s.recipe], s.interval.low, s.interval.high, color=color)
            elif name == "rates":
                good = [run for run in own if run.final is not None]
                shift = 0.6 * ((index + 0.5) / len(recipes) - 0.5)  # side by side
                points = [rates.index(run.lr) + shift for run in good], [run.final for run in good]
                axes.plot(*points, "o", color=color, label=s.recipe, markersize=5)
                bad = [run for run in own if run.state == "diverged" and run.losses and run.losses[0] is not None]
                places = [rates.index(run.lr) + shift for run in bad]
                axes.plot(places, [run.losses[0] for run in bad], "x", color=color)
        if name == "gaps":
            axes.axhline(0, color="black", linewidth=0.8)
            axes.tick_params(axis="x", rotation=30)
        elif recipes:
            axes.legend(fontsize=8)
        if name == "rates":
            axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set(title=title, xlabel=x_label, ylabel="nats per token")
        axes.grid(alpha=0.3)
        figure.savefig(out / f"{name}.png", metadata={"Software": None})
