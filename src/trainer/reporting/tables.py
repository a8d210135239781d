"""The tables of a report, for HTML and Markdown alike."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from ..environ import printable
from ..metrics import number
from ..sharpness import EPSILON
from .measures import RecipeSummary, Rung, Switch, is_emulated, mean
from .runs import Product, Run, Settings
from .statistics import bootstrap_mean, sign_test

Cell = str | float | int | None

SHARPNESS = (
    "Sharpness: 100 (max L(y + d) - L(y)) / (1 + L(y)) over |d_i| <= eps (|y_i| + 1), y the logits of a sequence's "
    "last token, L their mean cross-entropy; after arXiv 2405.18710, in the form of Keskar et al. (2017). The paper's "
    f"eps, box and reduction were not at hand: this box, the mean over sequences and eps = {EPSILON:g} are ours."
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as numbers where they are numbers."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def tables(
    runs: Sequence[Run],
    recipes: Sequence[RecipeSummary],
    rungs: Sequence[Rung],
    switched: Sequence[Switch],
    settings: Settings,
) -> list[Table]:
    """All there are; those without rows have nothing to say."""
    known = [run for run in runs if run.values]
    return [
        _losses(recipes, settings),
        _divergences(recipes, settings),
        _learning_rates(recipes, settings),
        _progress(recipes, settings),
        *(
            _ladder([rung for rung in rungs if rung.rounding == way], way)
            for way in sorted({r.rounding for r in rungs})
        ),
        _switches(switched),
        _cost(recipes, known),
        _coverage(known, recipes, settings),
        _runs(runs),
        _origin(known),
        _products(known, recipes),
        _versions(known),
    ]


def shown(table: Table) -> Table:
    """The table with every text on one line, of characters that can be written."""
    cells = [[printable(cell) if isinstance(cell, str) else cell for cell in row] for row in table.rows]
    columns = [printable(column) for column in table.columns]
    return replace(table, title=printable(table.title), columns=columns, rows=cells)


def _losses(recipes: Sequence[RecipeSummary], settings: Settings) -> Table:
    return Table(
        title="Validation loss",
        note="At the end of runs that finished, in nats per token. sd: of runs that differ in the seed alone. Gap: to "
        f"the {settings.baseline} run of the same config, seed and learning rate included; mean over "
        "pairs, bootstrap interval of 95%. Noise: how far apart two means of as many "
        f"{settings.baseline} runs may lie by their seeds alone. Equivalence p: the larger of two one-sided t-tests of "
        f"the gap against {settings.margin:g} nats.",
        columns=(
            *("recipe", "finished", "mean", "low", "high", "sd"),
            *("pairs", "gap", "gap low", "gap high", "noise", "sign-test p", "equivalence p"),
        ),
        rows=[
            (
                *(s.recipe, s.finished, s.final_loss_mean, *_ends(s.final_loss_interval), s.final_loss_sd),
                *(len(s.gaps), s.gap_mean, *_ends(s.gap_interval), s.seed_noise_band, s.sign_test_p),
                s.equivalence.p if s.equivalence else None,
            )
            for s in recipes
        ],
    )


def _divergences(recipes: Sequence[RecipeSummary], settings: Settings) -> Table:
    return Table(
        title="Stability",
        note=f"The rule: {settings.rule}. The rate has Wilson's interval of 95%; steps and tokens to divergence "
        "are medians. Spikes: training losses more than 6 standard deviations above the mean of the 128 before; score: "
        f"their share. {SHARPNESS} Here: the mean of the last one of finished runs.",
        columns=(
            *("recipe", "diverged", "of", "rate low", "rate high", "at step", "at tokens"),
            *("spikes", "spike score", "sharpness"),
        ),
        rows=[
            (
                *(s.recipe, s.diverged, s.decided, *_ends(s.divergence_rate_interval)),
                median(s.times_to_divergence) if s.times_to_divergence else None,
                *(s.tokens_to_divergence, s.spikes, s.spike_score, s.sharpness),
            )
            for s in recipes
        ],
    )


def _learning_rates(recipes: Sequence[RecipeSummary], settings: Settings) -> Table:
    rows = []
    for s in recipes:
        tried, best, sensitivity, width = s.rates
        rows.append((s.recipe, tried, _rate(best), sensitivity, width))
    return Table(
        title="Learning rates",
        note="Best: of the lowest mean validation loss, where no run diverged. Sensitivity: mean over rates of "
        "min(loss, loss at init) minus the best (arXiv 2309.14322). Width: decades of learning rate within "
        f"{settings.within:g} nats of the best.",
        columns=("recipe", "tried", "best", "sensitivity", "width"),
        rows=rows,
    )


def _progress(recipes: Sequence[RecipeSummary], settings: Settings) -> Table:
    return Table(
        title=f"Tokens to the same loss as {settings.baseline}",
        note=f"The target of a pair is the training loss, smoothed, that {settings.baseline} has after "
        f"{settings.target_at:.0%} of its run. Tokens: what the recipe needed to get there over what "
        f"{settings.baseline} needed, mean over the pairs that reached it. Loss ratio: smoothed training losses at "
        "equal tokens, the last that both have.",
        columns=("recipe", "pairs", "reached", "tokens", "loss ratio"),
        rows=[(s.recipe, *s.progress) for s in recipes if s.progress.pairs],
    )


def _ladder(rungs: Sequence[Rung], rounding: str) -> Table:
    exponents = sorted({rung.exponent for rung in rungs}, reverse=True)
    mantissas = sorted({rung.mantissa for rung in rungs}, reverse=True)
    cells: dict[tuple[int, int], list[str]] = defaultdict(list)
    for rung in rungs:
        cells[rung.mantissa, rung.exponent].append(rung_text(rung))
    return Table(
        title=f"The bit ladder, operands rounded: {rounding}",
        note="BF16 operands of every quantized product masked to fewer bits (arXiv 2405.18710): the gap to bf16, and "
        "how many of the runs that are over diverged. Rows: bits of mantissa, columns: bits of exponent; E8M7 is BF16.",
        columns=["mantissa", *(f"E{exponent}" for exponent in exponents)],
        rows=[(f"M{m}", *("; ".join(cells[m, e]) or None for e in exponents)) for m in mantissas],
    )


def rung_text(rung: Rung) -> str:
    """The gap, and how many diverged, where any did."""
    s = rung.summary
    if s.decided and s.diverged == s.decided:
        return f"diverged {s.diverged} of {s.decided}"
    if (rung.exponent, rung.mantissa) == (8, 7) and s.gap_mean is None:
        text = "0 (bf16)"
    else:
        text = "no pair" if s.gap_mean is None else f"{s.gap_mean:+.4f}"
    return text + (f", diverged {s.diverged} of {s.decided}" if s.diverged else "")


def _switches(switched: Sequence[Switch]) -> Table:
    rows = []
    for switch in switched:
        interval = bootstrap_mean(switch.differences)
        names = (switch.recipe, switch.argument, switch.before, switch.after, len(switch.differences))
        rows.append((*names, mean(switch.differences), *_ends(interval), sign_test(switch.differences)))
    return Table(
        title="Ingredients",
        note='Variants of one recipe that differ in one argument: validation loss with "to" minus that with "from", '
        "over pairs of the same config and seed.",
        columns=("recipe", "argument", "from", "to", "pairs", "difference", "low", "high", "sign-test p"),
        rows=rows,
    )


def _cost(recipes: Sequence[RecipeSummary], runs: Sequence[Run]) -> Table:
    parts = list(dict.fromkeys(name for s in recipes for name in s.state_bytes))
    rows: list[tuple[Cell, ...]] = []
    for s in recipes:
        seconds = [run.seconds for run in runs if run.recipe == s.recipe and run.seconds is not None]
        speed = round(s.tokens_per_second) if s.tokens_per_second is not None else None
        how = "emulated" if s.emulated else "as computed here"
        sizes = [s.state_bytes[part] / 1e6 if part in s.state_bytes else None for part in parts]
        rows.append((s.recipe, speed, how, round(math.fsum(seconds)) if seconds else None, *sizes))
    return Table(
        title="Cost",
        note="Tokens/s: median over steps and runs. Seconds: of all steps of all runs. Memory in MB: of the whole "
        "model over all processes, what a checkpoint holds; gradients and activations come on top.",
        columns=("recipe", "tokens/s", "speed is", "seconds", *(f"{part}, MB" for part in parts)),
        rows=rows,
    )


def _coverage(runs: Sequence[Run], recipes: Sequence[RecipeSummary], settings: Settings) -> Table:
    columns = sorted({(run.lr, run.seed) for run in runs})
    cells: dict[tuple[str, float, int], list[str]] = defaultdict(list)
    for run in runs:
        cells[run.recipe, run.lr, run.seed].append(run.state if run.final is None else f"{run.final:.4f}")
    return Table(
        title="Coverage",
        note="Final validation loss, or what became of the run.",
        columns=["recipe", *(f"lr {lr:g}, seed {seed}" for lr, seed in columns)],
        rows=[
            (s.recipe, *(", ".join(cells.get((s.recipe, lr, seed), ["missing"])) for lr, seed in columns))
            for s in recipes
        ],
    )


def _runs(runs: Sequence[Run]) -> Table:
    return Table(
        title="Runs",
        note="Every run directory that was found. Config: a hash of all that decides the numbers.",
        columns=(
            *("run", "recipe", "lr", "seed", "state", "step"),
            *("validation loss", "diverged at", "spikes", "corrupt", "config"),
        ),
        rows=[
            (
                run.name,
                run.recipe,
                _rate(run.lr) if run.values else None,
                run.seed if run.values else None,
                run.state + (f": {run.reason}" if run.reason and run.state != "finished" else ""),
                run.step,
                run.final,
                run.diverged_at,
                run.num_spikes,
                len(run.corrupt),
                run.config_hash if run.values else None,
            )
            for run in runs
        ],
    )


def _origin(runs: Sequence[Run]) -> Table:
    def origin(run: Run) -> tuple[str, ...]:
        names = ("revision", "device", "world_size")
        env = [_text(run.environment.get(name)) for name in names]
        parameters, data = run.environment.get("parameters"), _text(run.environment.get("data"))
        size = f"{parameters:,}" if isinstance(parameters, int) and number(parameters) is not None else "-"
        tokens = f"{int(run.values.get('train.steps') or 0) * run.tokens_per_step:,}"
        return (*env, _text(run.values.get("model.name")), size, _text(run.values.get("data.name")), data, tokens)

    return Table(
        title="Origin",
        note="What made these runs: env.json and config.yaml. Fingerprint: of the tokens trained on.",
        columns=(
            *("revision", "device", "processes", "model", "parameters"),
            *("data", "fingerprint", "tokens a run", "runs"),
        ),
        rows=[(*key, count) for key, count in sorted(Counter(map(origin, runs)).items())],
    )


def _products(runs: Sequence[Run], recipes: Sequence[RecipeSummary]) -> Table:
    def how(product: Product) -> str:
        return "high precision" if product.backend == "torch" else "emulated" if is_emulated(product) else "hardware"

    rows: list[tuple[Cell, ...]] = []
    for s in recipes:
        plans = [tuple(sorted(run.products.items())) for run in runs if run.recipe == s.recipe and run.products]
        for plan in sorted(set(plans)):
            rows += [(s.recipe, p.gemm, p.operands, p.backend, how(p), number) for p, number in plan]
    return Table(
        title="Matrix products",
        note="By recipe, from plan.txt: both operands, who computes them, and of how many linears.",
        columns=("recipe", "product", "operands", "backend", "computed as", "linears"),
        rows=rows,
    )


def _versions(runs: Sequence[Run]) -> Table:
    versions: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        packages = run.environment.get("packages")
        packages_found = {"python": run.environment.get("python"), **(packages if isinstance(packages, dict) else {})}
        for name, version in packages_found.items():
            if version is not None:
                versions[str(name)].add(str(version))
    return Table(
        title="Versions",
        note="Of the packages that made these runs.",
        columns=("package", "version"),
        rows=[(name, ", ".join(sorted(found))) for name, found in sorted(versions.items())],
    )


def _ends(interval: tuple[float, float] | None) -> tuple[float | None, float | None]:
    return interval or (None, None)


def _rate(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
