"""The verdict on each recipe in plain words, and what the data cannot say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .measures import RecipeSummary
from .runs import Run, Settings

EMULATED = "emulated: this machine's speed, not narrow hardware's"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """On one recipe: a few words, and what they rest on."""

    recipe: str
    headline: str
    details: str

    def __str__(self) -> str:
        return f"{self.headline}; {self.details}"


def verdict(s: RecipeSummary, settings: Settings) -> Verdict:
    """The gap with its interval, whether that is more than seed noise, divergences k of n, speed and memory."""
    parts = []
    if s.recipe == settings.baseline:
        if s.final_loss_mean is not None:
            parts.append(f"mean validation loss {s.final_loss_mean:.4f}")
        one = None if s.seed_noise_band is None else s.seed_noise_band * math.sqrt(max(1, s.finished))
        parts.append(
            "its seed noise is not known: no two finished runs differ in the seed alone"
            if one is None
            else f"95 of 100 pairs of its runs that differ in the seed alone lie within {one:.4f} nats"
        )
    elif s.gap_mean is None:
        parts.append(f"no gap to {settings.baseline}: no finished run has a finished partner of the same config")
    else:
        interval = (
            f" [{s.gap_interval.low:+.4f}, {s.gap_interval.high:+.4f}]"
            if s.gap_interval
            else " (no interval from one pair)"
        )
        parts.append(f"gap to {settings.baseline} {s.gap_mean:+.4f} nats{interval} over {plural(len(s.gaps), 'pair')}")
        parts += _meaning(s, settings)
    text = f"diverged {s.diverged} of {s.decided}"
    if s.divergence_rate_interval is not None:
        text += f" (95% interval {s.divergence_rate_interval.low:.0%} to {s.divergence_rate_interval.high:.0%})"
    if s.times_to_divergence:
        text += f", at steps {', '.join(map(str, s.times_to_divergence))}"
    parts.append(text)
    if s.runs > s.decided:
        parts.append(f"{plural(s.runs - s.decided, 'run')} not over")
    if s.state_bytes:
        text = ", ".join(f"{name} {megabytes(size)}" for name, size in s.state_bytes.items() if size)
        parts.append(f"memory of its state {megabytes(math.fsum(s.state_bytes.values()))} MB ({text})")
    if s.tokens_per_second is not None:
        parts.append(f"{s.tokens_per_second:,.0f} tokens/s{f' ({EMULATED})' if s.emulated else ''}")
    return Verdict(recipe=s.recipe, headline=_headline(s, settings), details="; ".join(parts))


def _headline(s: RecipeSummary, settings: Settings) -> str:
    base = settings.baseline
    if s.decided == 0:
        return "no run is over"
    if s.diverged == s.decided:
        return "every run diverged" if s.decided > 1 else "its one run diverged"
    some = f", and {plural(s.diverged, 'run')} diverged" if s.diverged else ""
    if s.recipe == base:
        return f"the baseline: {plural(s.finished, 'run')} finished{some}"
    if s.gap_mean is None:
        return f"cannot be compared with {base}{some}"
    if all(gap == 0 for gap in s.gaps):
        return f"the same losses as {base}, every digit{some}"
    worse = "worse" if s.gap_mean > 0 else "better"
    if s.seed_noise_band is None:
        return f"{worse} than {base} in these runs, which may be chance{some}"
    if abs(s.gap_mean) <= s.seed_noise_band:
        return f"within seed noise of {base}{some}"
    return f"{worse} than {base}, beyond its seed noise{some}"


def _meaning(s: RecipeSummary, settings: Settings) -> list[str]:
    assert s.gap_mean is not None
    if all(gap == 0 for gap in s.gaps):
        return []
    says = []
    if s.seed_noise_band is None:
        says.append(f"{settings.baseline}'s seed noise is not known")
    elif abs(s.gap_mean) <= s.seed_noise_band:
        words = f"{settings.baseline} against itself would give up to {s.seed_noise_band:.4f}"
        if s.gap_interval and not s.gap_interval.low <= 0 <= s.gap_interval.high:
            words += ", though the interval of the pairs leaves out zero"
        says.append(words)
    else:
        says.append(f"seed noise is {s.seed_noise_band:.4f}")
    if s.equivalence is not None:
        word = "equivalent" if s.equivalence.equivalent else "not shown to be equivalent"
        says.append(f"{word} within {settings.margin:g} nats (p = {s.equivalence.p:.3f})")
    return says


def limits(runs: Sequence[Run], recipes: Sequence[RecipeSummary], settings: Settings) -> list[str]:
    """What the data cannot say."""
    says = []
    if settings.baseline not in {summary.recipe for summary in recipes}:
        says.append(f"There is no run of {settings.baseline}, so no recipe has a gap.")
    few = [s.recipe for s in recipes if s.recipe != settings.baseline and 0 < len(s.gaps) < 6]
    if few:
        says.append(f"Fewer than 6 pairs, so the intervals are rough: {', '.join(few)}.")
    known = [run for run in runs if run.values]
    seeds = {run.seed for run in known}
    if len(seeds) < 3:
        says.append(f"{plural(len(seeds), 'seed')}: too few to tell a recipe from chance.")
    rates = {run.lr for run in known}
    if len(rates) < 3:
        says.append(f"{plural(len(rates), 'learning rate')}: where a recipe's best one lies is not known.")
    clean = [s for s in recipes if s.diverged == 0 and s.divergence_rate_interval is not None]
    if clean:
        most = max(s.divergence_rate_interval.high for s in clean if s.divergence_rate_interval is not None)
        says.append(f"No divergence in these runs still allows a rate of up to {most:.0%}.")
    longest = max((run.step * run.tokens_per_step for run in runs), default=0)
    says.append(f"The longest run saw {longest:,} tokens: nothing is said about longer training or larger models.")
    if any(s.emulated for s in recipes) or any(run.on_cpu for run in runs):
        says.append("Narrow formats were emulated: tokens/s say nothing about hardware that has them.")
    unknown = [s.recipe for s in recipes if not s.state_bytes]
    if unknown:
        says.append(f"Memory of weights and optimizer is not in the run directories of {', '.join(unknown)}.")
    says.append(
        "Memory of activations and gradients is in no run directory: scripts/bench_memory.py measures what "
        "backward keeps."
    )
    if not any("sharpness" in run.evals for run in known):
        says.append("Sharpness was not measured in these runs.")
    diverged = sum(run.state == "diverged" for run in runs)
    if diverged:
        says.append(f"{plural(diverged, 'diverged run')}: in the counts, not in the gaps, which flatter such a recipe.")
    pending = [run for run in runs if not run.over]
    if pending:
        says.append(f"{plural(len(pending), 'run')} not over: {', '.join(run.name for run in pending)}.")
    for run in runs:
        if run.spikes_met:
            met = ", ".join(f"{action} {count}" for action, count in sorted(run.spikes_met.items()))
            says.append(f"{run.name}: train.spike met {plural(sum(run.spikes_met.values()), 'spike')} ({met}).")
    says += [
        f"{run.name}/metrics.jsonl: {plural(len(run.corrupt), 'corrupt line')} skipped, number "
        f"{', '.join(map(str, run.corrupt))}."
        for run in runs
        if run.corrupt
    ]
    says += [f"Passed over, as it cannot be read: {run.name}/{reason}." for run in runs for reason in run.unreadable]
    return says


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"
