"""Statistics against scipy and against answers known by construction."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from narrowgauge.trainer.reporting.statistics import (
    DivergenceRule,
    bootstrap_mean,
    equivalence,
    lr_sensitivity,
    noise_band,
    pooled_sd,
    sign_test,
    spike_score,
    spikes,
    usable_width,
    wilson,
)
from scipy import stats

RULE = DivergenceRule(rise=1.0, steps=10, keep=0.9)


def falling(num: int) -> list[float | None]:
    return [8 - 4 * step / num for step in range(num)]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (falling(100), None),
        ([], None),
        ([*falling(50), *[None] * 9, *[4.0] * 20], None),  # skipped steps of a run that recovered
        ([*falling(50), *[None] * 10, *[4.0] * 20], 51),
        ([*falling(50), math.nan], 51),
        ([*falling(50), *[4.5] * 100], None),  # worse, but by less than the rule says
        ([None] * 3, 1),
    ],
)
def test_divergence_by_the_rule(losses: list[float | None], expected: int | None) -> None:
    assert RULE.first_step(range(1, len(losses) + 1), losses) == expected


def test_a_rise_of_the_smoothed_loss_is_a_divergence_once_it_lasts() -> None:
    # From 4 to 9: the average is 1 nat above its minimum as soon as 5 * (1 - 0.9^n) > 1, n = 3, up to its own start.
    losses = [4.0] * 200 + [9.0] * 30
    assert RULE.first_step(range(1, 231), losses) == 203
    assert RULE.first_step(range(1, 211), losses[:210]) is None  # eight steps above are not ten
    assert RULE.first_step(range(1, 401), [4.0] * 200 + [9.0] * 3 + [4.0] * 197) is None


@pytest.mark.parametrize(("k", "n"), [(0, 3), (3, 3), (1, 6), (18, 188)])
def test_wilson_is_the_textbook_formula(k: int, n: int) -> None:
    z, p = stats.norm.ppf(0.975), k / n
    centre = (p + z * z / 2 / n) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    interval = wilson(k, n)
    assert interval is not None
    assert interval == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-12)
    assert wilson(0, 0) is None


def test_spikes_are_found_where_they_were_put() -> None:
    rng = random.Random(0)
    values: list[float | None] = [3 + rng.gauss(0, 0.1) for _ in range(400)]
    assert spikes(values) == []
    values[200], values[300], values[50] = 5.0, None, 9.0  # the last lies inside the first window
    assert spikes(values) == [200, 300]
    assert spike_score(values) == 2 / (400 - 128)
    assert spike_score(values[:128]) is None


def test_bootstrap_agrees_with_scipy_and_is_the_same_each_time() -> None:
    values = np.random.default_rng(1).normal(0.02, 0.01, 12).tolist()
    ours = bootstrap_mean(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=0).confidence_interval
    assert ours is not None
    assert ours == pytest.approx((theirs.low, theirs.high), abs=5e-4)
    assert ours == bootstrap_mean(values)
    assert bootstrap_mean([0.25, 0.25, 0.25]) == (0.25, 0.25)
    assert bootstrap_mean([0.1]) is None


def test_noise_band_is_the_half_width_of_a_pooled_t_interval() -> None:
    one, other = [3.0, 3.1, 3.2], [4.0, 4.4, 4.1]
    pooled = pooled_sd([one, other, [5.0]])
    assert pooled is not None
    assert pooled == (pytest.approx(math.sqrt((np.var(one, ddof=1) + np.var(other, ddof=1)) / 2)), 4)
    result = stats.ttest_ind(one, other)
    half = np.ptp(result.confidence_interval()) / 2
    assert noise_band([one, other], 3) == pytest.approx(half)
    assert noise_band([[3.0], [4.0]], 3) is None
    assert noise_band([], 3) is None


def test_sign_test_is_the_binomial_one() -> None:
    assert sign_test([1, 2, 3, 0, -1]) == stats.binomtest(3, 4).pvalue
    assert sign_test([0.0, 0.0]) is None


def test_equivalence_is_a_ninety_percent_interval_within_the_margin() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        gaps = rng.normal(0.01, 0.01, 5).tolist()
        interval = stats.ttest_1samp(gaps, 0).confidence_interval(0.9)
        result = equivalence(gaps, 0.02)
        assert result is not None
        assert result.equivalent == (interval.low > -0.02 and interval.high < 0.02)
    assert equivalence([0.01], 0.02) is None
    assert equivalence([0.0, 0.0, 0.0], 0.02) == (0.0, True)
    assert equivalence([0.5, 0.5], 0.02) == (1.0, False)


def test_learning_rates() -> None:
    losses = {1e-4: 5.0, 1e-3: 3.0, 1e-2: 3.05, 1e-1: None}
    assert lr_sensitivity(losses, 9.0) == pytest.approx((5 + 3 + 3.05 + 9) / 4 - 3)
    assert lr_sensitivity({1e-3: 3.0, 1e-1: 30.0}, 9.0) == pytest.approx(3.0)  # no worse than untrained
    assert lr_sensitivity({1e-3: 3.0}, 9.0) is None
    assert usable_width(losses) == pytest.approx(1.0)
    assert usable_width({1e-3: 3.0, 1e-2: 5.0, 1e-1: 3.0}) == 0.0  # not across a gap
    assert usable_width({1e-3: None}) is None
