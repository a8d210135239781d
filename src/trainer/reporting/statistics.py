"""What a sweep's numbers say, and what they cannot: pure functions over plain numbers; None and NaN are not finite.

The paper that asks for these (arXiv 2405.18710) gives no threshold for a divergence, so the rule here is ours and
stands in every report; learning-rate sensitivity is that of arXiv 2309.14322.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9_999

Loss = float | None


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceRule:
    """When a run counts as diverged.

    Args:
        rise: nats that the smoothed loss must lie above its own minimum so far,
        steps: for this many steps in a row. As many non-finite losses in a row count too, or any number at the end.
        keep: of the exponential moving average, which leaves non-finite losses out.
    """

    rise: float = 1.0
    steps: int = 10
    keep: float = 0.9

    def __str__(self) -> str:
        return (
            f"diverged: {self.steps} non-finite training losses in a row or at the end, or the smoothed training loss "
            f"(moving average, factor {self.keep:g}) more than {self.rise:g} nats above its minimum so far for "
            f"{self.steps} steps in a row, or the trainer's own verdict"
        )

    def first_step(self, steps: Sequence[int], losses: Sequence[Loss]) -> int | None:
        """The first step of the stretch that breaks the rule, or None. ``losses`` belong to ``steps``, ascending."""
        lowest, nonfinite, above = math.inf, 0, 0
        for index, mean in enumerate(smoothed(losses, self.keep)):
            if mean is None:
                nonfinite += 1
            else:
                nonfinite, lowest = 0, min(lowest, mean)
                above = above + 1 if mean > lowest + self.rise else 0
            at_end = nonfinite and index == len(losses) - 1
            if nonfinite >= self.steps or at_end:
                return steps[index - nonfinite + 1]
            if above >= self.steps:
                return steps[index - above + 1]
        return None


def smoothed(losses: Sequence[Loss], keep: float = 0.9) -> list[Loss]:
    """The exponential moving average without its bias to zero; None where there is no loss, which it leaves out."""
    result: list[Loss] = []
    mean, weight = 0.0, 0.0
    for loss in losses:
        if loss is None or not math.isfinite(loss):
            result.append(None)
        else:
            mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
            result.append(mean / weight)
    return result


def first_below(steps: Sequence[int], losses: Sequence[Loss], target: float) -> int | None:
    """The first step whose loss is at most ``target``; None if there is none."""
    return next((step for step, loss in zip(steps, losses, strict=True) if loss is not None and loss <= target), None)


def wilson(successes: int, trials: int) -> Interval | None:
    """Wilson's score interval of a rate; None without trials."""
    if trials == 0:
        return None
    interval = stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def spikes(values: Sequence[Loss], *, window: int = 128, sigmas: float = 6.0) -> list[int]:
    """Positions of values more than ``sigmas`` standard deviations above the mean of the ``window`` values before them.

    Non-finite values are spikes, and are left out of windows. The first ``window`` finite values cannot be.
    """
    found: list[int] = []
    seen: list[float] = []
    for index, value in enumerate(values):
        if value is None or not math.isfinite(value):
            found.append(index)
            continue
        if len(seen) >= window:
            last = np.asarray(seen[-window:])
            if value > last.mean() + sigmas * last.std():
                found.append(index)
        seen.append(value)
    return found


def spike_score(values: Sequence[Loss], *, window: int = 128, sigmas: float = 6.0) -> float | None:
    """The share of values that are spikes, of those that could be; None where the run is not longer than the window."""
    countable = len(values) - window
    return len(spikes(values, window=window, sigmas=sigmas)) / countable if countable > 0 else None


def bootstrap_mean(values: Sequence[float]) -> Interval | None:
    """The percentile bootstrap interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    data = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(data[picks].mean(1), [tail, 1 - tail])
    return Interval(float(low), float(high))


def pooled_sd(groups: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """The standard deviation within groups, and its degrees of freedom; None where no group has two values."""
    freedom = sum(len(group) - 1 for group in groups if group)
    if freedom < 1:
        return None
    squares = sum(float(((np.asarray(group) - np.mean(group)) ** 2).sum()) for group in groups if group)
    return math.sqrt(squares / freedom), freedom


def noise_band(groups: Sequence[Sequence[float]], num: int) -> float | None:
    """How far the means of ``num`` runs each, alike but for the seed, may lie apart: t * sd * sqrt(2 / num).

    ``groups``: final losses of runs that differ in the seed alone. None where no group has two.
    """
    pooled = pooled_sd(groups)
    if pooled is None or num < 1:
        return None
    sd, freedom = pooled
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * sd * math.sqrt(2 / num)


def sign_test(values: Sequence[float]) -> float | None:
    """The two-sided p-value of as many positive values; zeros are left out; None where nothing is left."""
    signs = [value > 0 for value in values if value != 0]
    return float(stats.binomtest(sum(signs), len(signs)).pvalue) if signs else None


class Equivalence(NamedTuple):
    """``p`` of the two one-sided t-tests, the larger; ``equivalent`` at the 5% level."""

    p: float
    equivalent: bool


def equivalence(gaps: Sequence[float], margin: float, level: float = 0.05) -> Equivalence | None:
    """Whether the mean gap lies within +-margin (TOST: both one-sided t-tests reject); None for fewer than two gaps."""
    if len(gaps) < 2:
        return None
    if len(set(gaps)) == 1:  # no spread: the tests divide by zero
        inside = abs(gaps[0]) < margin
        return Equivalence(0.0 if inside else 1.0, inside)
    above = stats.ttest_1samp(gaps, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(gaps, margin, alternative="less").pvalue
    p = float(max(above, below))
    return Equivalence(p, p < level)


def lr_sensitivity(losses: Mapping[float, Loss], at_init: float) -> float | None:
    """The mean over learning rates of min(loss, loss at init) minus the best loss; None for fewer than two rates.

    A diverged rate (None) counts as the loss at init (arXiv 2309.14322).
    """
    if len(losses) < 2:
        return None
    capped = [at_init if loss is None or math.isnan(loss) else min(loss, at_init) for loss in losses.values()]
    return float(np.mean(capped)) - min(capped)


def usable_width(losses: Mapping[float, Loss], within: float = 0.1) -> float | None:
    """Decades of learning rate around the best whose loss is at most ``within`` nats above the best one's.

    Without a gap on the grid; 0 if the best stands alone. None where all diverged.
    """
    rates = sorted(losses)
    finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        return None
    best = min(sorted(finite), key=lambda rate: finite[rate])
    good = [rate in finite and finite[rate] <= finite[best] + within for rate in rates]
    low = high = rates.index(best)
    while low > 0 and good[low - 1]:
        low -= 1
    while high < len(rates) - 1 and good[high + 1]:
        high += 1
    return math.log10(rates[high] / rates[low])
