"""What the runs of a recipe say: gaps, divergences, learning rates, tokens to a loss; the bit ladder, the switches."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from ...precision.suggest import close
from ..environ import printable
from ..errors import UserError
from ..metrics import number
from .runs import Key, Product, Run, Settings, arguments, differing_arguments
from .statistics import (
    Equivalence,
    Interval,
    bootstrap_mean,
    equivalence,
    first_below,
    lr_sensitivity,
    noise_band,
    pooled_sd,
    sign_test,
    smoothed,
    usable_width,
    wilson,
)


class LearningRates(NamedTuple):
    """Means over settings that differ in more than seed and learning rate."""

    learning_rates: int
    best_lr: float | None  # of the lowest mean loss, all its seeds finished; None if settings disagree
    lr_sensitivity: float | None
    usable_lr_decades: float | None


class Progress(NamedTuple):
    """Against the baseline's partner run, on smoothed training losses."""

    pairs: int
    reached_target: int
    tokens_to_target_ratio: float | None  # tokens to the target, over the baseline's; mean of those that reached it
    loss_ratio: float | None  # at equal tokens, the last that both have; mean over pairs


@dataclass(frozen=True, kw_only=True)
class RecipeSummary:
    """What the runs of one recipe say; fields have the names of ``summary.json``."""

    recipe: str
    runs: int
    finished: int
    diverged: int
    decided: int  # finished or diverged
    divergence_rate_interval: Interval | None
    times_to_divergence: list[int]  # steps
    tokens_to_divergence: float | None  # median
    final_loss_mean: float | None
    final_loss_sd: float | None  # of runs that differ in the seed alone
    final_loss_interval: Interval | None
    gaps: list[float]
    unpaired: int  # finished runs without a finished partner
    gap_mean: float | None
    gap_interval: Interval | None
    seed_noise_band: float | None
    sign_test_p: float | None
    equivalence: Equivalence | None
    rates: LearningRates
    progress: Progress
    spikes: int
    spike_score: float | None
    sharpness: float | None  # mean of the last ones of finished runs
    tokens_per_second: float | None
    state_bytes: dict[str, float]  # weights, optimizer ...: of the full model, mean over runs
    emulated: bool


class Rung(NamedTuple):
    """One recipe on the bit ladder."""

    exponent: int
    mantissa: int
    rounding: str
    summary: RecipeSummary


class Switch(NamedTuple):
    """Two variants of a recipe that differ in one argument: final loss with ``after`` minus that with ``before``."""

    recipe: str
    argument: str
    before: str
    after: str
    differences: list[float]


def summarize(runs: Sequence[Run], settings: Settings) -> list[RecipeSummary]:
    """The baseline first, then the recipes by name. Raises UserError for a baseline that no run has."""
    known = [run for run in runs if run.values]
    names = list(dict.fromkeys(run.recipe for run in known))
    if names and settings.baseline not in names and settings.baseline != "bf16":
        near = close(settings.baseline, names)
        raise UserError(f"baseline={settings.baseline}: no run of it{near}; there are: {', '.join(names)}")
    base = {run.key(): run for run in known if run.recipe == settings.baseline and run.final is not None}
    noise = _by_seed(base.values())
    return [
        _summarize(name, [run for run in known if run.recipe == name], base, noise, settings)
        for name in sorted(names, key=lambda name: (name != settings.baseline, name))
    ]


def _by_seed(runs: Iterable[Run]) -> list[list[float]]:
    """Final losses in groups whose runs differ in the seed alone."""
    groups: dict[Key, list[float]] = defaultdict(list)
    for run in runs:
        if run.final is not None:
            groups[run.key("seed")].append(run.final)
    return [groups[key] for key in sorted(groups)]


def _summarize(
    name: str, runs: Sequence[Run], base: Mapping[Key, Run], noise: Sequence[Sequence[float]], settings: Settings
) -> RecipeSummary:
    finished = [run for run in runs if run.final is not None]
    finals = [run.final for run in finished if run.final is not None]
    diverged = [run for run in runs if run.state == "diverged"]
    ended = [run for run in runs if run.over]
    ordered = sorted(finished, key=lambda run: run.key()) if name != settings.baseline else []
    pairs = [(run, base[run.key()]) for run in ordered if run.key() in base]
    gaps = [run.final - other.final for run, other in pairs if run.final is not None and other.final is not None]
    times = [(run.diverged_at, run.tokens_per_step) for run in diverged if run.diverged_at is not None]
    speeds = [run.tokens_per_second for run in runs if run.tokens_per_second is not None]
    spread = pooled_sd(_by_seed(sorted(finished, key=lambda run: run.key())))
    return RecipeSummary(
        recipe=name,
        runs=len(runs),
        finished=len(finished),
        diverged=len(diverged),
        decided=len(ended),
        divergence_rate_interval=wilson(len(diverged), len(ended)),
        times_to_divergence=sorted(step for step, _ in times),
        tokens_to_divergence=statistics.median(step * tokens for step, tokens in times) if times else None,
        final_loss_mean=mean(finals),
        final_loss_sd=spread[0] if spread else None,
        final_loss_interval=bootstrap_mean(sorted(finals)),
        gaps=gaps,
        unpaired=len(ordered) - len(pairs),
        gap_mean=mean(gaps),
        gap_interval=bootstrap_mean(gaps),
        seed_noise_band=noise_band(noise, len(gaps) or len(finished)),
        sign_test_p=sign_test(gaps),
        equivalence=equivalence(gaps, settings.margin),
        rates=_learning_rates(ended, settings),
        progress=_progress(pairs, settings),
        spikes=sum(run.num_spikes for run in runs),
        spike_score=mean(run.spike_score for run in runs if run.spike_score is not None),
        sharpness=mean(list(run.evals["sharpness"].values())[-1] for run in finished if "sharpness" in run.evals),
        tokens_per_second=statistics.median(speeds) if speeds else None,
        state_bytes=_state_bytes(runs),
        emulated=any(_is_emulated(run, settings) for run in runs),
    )


def is_emulated(product: Product) -> bool:
    """Whether a product of narrow operands is computed in wider ones."""
    return product.backend not in ("torch", "scaled_mm")


def _is_emulated(run: Run, settings: Settings) -> bool:
    if not run.products:  # without a plan.txt: a CPU multiplies nothing narrower than BF16
        return run.on_cpu and run.recipe != settings.baseline
    return any(is_emulated(product) for product in run.products)


def _learning_rates(runs: Sequence[Run], settings: Settings) -> LearningRates:
    """The loss of a learning rate is the mean over its seeds; None, as diverged, if one of them diverged."""
    groups: dict[Key, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.key("seed", "optim.lr")].append(run)
    sensitivities, widths, best = [], [], set()
    for _, group in sorted(groups.items()):
        losses = losses_by_rate(group)
        at_init = mean(run.losses[0] for run in group if run.losses and run.losses[0] is not None)
        if at_init is not None and (value := lr_sensitivity(losses, at_init)) is not None:
            sensitivities.append(value)
        if len(losses) > 1 and (width := usable_width(losses, settings.within)) is not None:
            widths.append(width)
        good = {rate: loss for rate, loss in losses.items() if loss is not None}
        if len(losses) > 1 and good:
            best.add(min(good, key=lambda rate: good[rate]))
    return LearningRates(
        learning_rates=len({run.lr for run in runs}),
        best_lr=best.pop() if len(best) == 1 else None,
        lr_sensitivity=mean(sensitivities),
        usable_lr_decades=mean(widths),
    )


def losses_by_rate(runs: Iterable[Run]) -> dict[float, float | None]:
    """The mean final loss over the seeds of each learning rate; None where one has none."""
    groups: dict[float, list[float | None]] = defaultdict(list)
    for run in runs:
        groups[run.lr].append(run.final)
    return {
        rate: None if None in group else mean(loss for loss in group if loss is not None)
        for rate, group in sorted(groups.items())
    }


def _progress(pairs: Sequence[tuple[Run, Run]], settings: Settings) -> Progress:
    tokens, losses = [], []
    for run, other in pairs:
        curve, target_curve = smoothed(run.losses), smoothed(other.losses)
        at = int(settings.target_at * len(target_curve)) - 1
        target = target_curve[at] if at >= 0 else None
        if target is not None:
            step, target_step = first_below(run.steps, curve, target), first_below(other.steps, target_curve, target)
            if step is not None and target_step is not None:
                tokens.append(step * run.tokens_per_step / (target_step * other.tokens_per_step))
        last = min(len(curve), len(target_curve)) - 1
        if last >= 0 and (loss := curve[last]) is not None and (target_loss := target_curve[last]) is not None:
            losses.append(loss / target_loss)
    return Progress(
        pairs=len(pairs), reached_target=len(tokens), tokens_to_target_ratio=mean(tokens), loss_ratio=mean(losses)
    )


def _state_bytes(runs: Sequence[Run]) -> dict[str, float]:
    parts: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        sizes = run.environment.get("state_bytes")
        for name, size in sizes.items() if isinstance(sizes, dict) else ():
            if (known := number(size)) is not None:
                parts[printable(name)].append(known)
    return {name: math.fsum(sizes) / len(sizes) for name, sizes in parts.items()}


def ladder(runs: Sequence[Run], recipes: Sequence[RecipeSummary], settings: Settings) -> list[Rung]:
    """The recipes whose arguments say how many bits operands have, and the BF16 baseline (E8M7); empty without any."""
    rungs = []
    for summary in recipes:
        run = next(run for run in runs if run.recipe == summary.recipe)
        if (bits := _bits(run)) is not None:
            rungs.append(Rung(*bits, str(run.values.get("precision.args.rounding", "")), summary))
    base = [summary for summary in recipes if summary.recipe == settings.baseline == "bf16"]
    roundings = dict.fromkeys(rung.rounding for rung in rungs)
    return [*rungs, *(Rung(8, 7, rounding, summary) for rounding in roundings for summary in base)]


def _bits(run: Run) -> tuple[int, int] | None:
    """Of exponent and mantissa, for a recipe that has them as arguments."""
    exponent, mantissa = (number(run.values.get(f"precision.args.{part}_bits")) for part in ("exponent", "mantissa"))
    return None if exponent is None or mantissa is None else (int(exponent), int(mantissa))


def switches(runs: Sequence[Run]) -> list[Switch]:
    """Every pair of variants of a recipe's file that differ in one argument, with the differences of paired runs."""
    files: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.values and _bits(run) is None:  # those with bits have their ladder
            files[str(run.values.get("precision.recipe"))].append(run)
    found = []
    for name, members in sorted(files.items()):
        differing = differing_arguments(members)
        variants: dict[tuple[tuple[str, str], ...], dict[Key, Run]] = defaultdict(dict)
        for run in members:
            own = arguments(run)
            variants[tuple((k, own.get(k, "")) for k in differing)][run.key()] = run
        for one, other in combinations(sorted(variants), 2):
            changed = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
            if len(changed) == 1:
                (argument, before), (_, after) = changed[0]
                pairs = [(variants[one][k], variants[other][k]) for k in sorted(variants[one]) if k in variants[other]]
                gaps = [b.final - a.final for a, b in pairs if a.final is not None and b.final is not None]
                found.append(Switch(name, argument, before, after, gaps))
    return found


def mean(values: Iterable[float]) -> float | None:
    """None without values."""
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else None
