"""The plots of a report as plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NamedTuple

from ..environ import printable
from .figures import COLORS, smooth
from .measures import RecipeSummary, Rung, losses_by_rate
from .runs import Run
from .tables import rung_text

_MOST_POINTS = 400  # of a curve
NATS = "nats per token"
_LOST = "Parameters that an update left as they were; smoothed."
_LOGARITHMIC = ("grad_norm", "update_ratio")
_MARKERS = ("o", "s", "^", "v", "P", "*", "<", ">", "h")  # of matplotlib; no cross and no diamond: these mean something
_SYMBOLS = ("circle", "square", "triangle-up", "triangle-down", "cross", "star", "triangle-left", "triangle-right")
_DASHES = ("-", "--", "-.", (0, (8, 2)))  # dotted is diverged
_PLOTLY_DASHES = ("solid", "dash", "dashdot", "longdash")
Points = tuple[list[float], list[float]]
_Curve = tuple[str, str, str, str, Callable[[Run, str], Points], str]  # name, title, unit, note, points, of what


class Style(NamedTuple):
    """How a recipe is drawn: its colour, and what tells it apart without one."""

    color: str
    marker: str
    symbol: str
    dash: Any
    plotly_dash: str

    @classmethod
    def numbered(cls, number: int) -> Style:
        choices = (COLORS, _MARKERS, _SYMBOLS, _DASHES, _PLOTLY_DASHES)
        return cls(*(of_kind[number % len(of_kind)] for of_kind in choices))


class Kind(Enum):
    """How a mark is drawn: symbol for plotly, style for matplotlib."""

    line = "line"
    dotted = "dotted"
    dots = "dots"
    crosses = "crosses"
    diamond = "diamond"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Points of one recipe that are drawn alike."""

    recipe: str
    kind: Kind
    x: Sequence[float]
    y: Sequence[float]
    label: str  # shown under the pointer
    interval: tuple[float, float] | None = None  # of a diamond
    in_legend: bool = False


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Marks on two axes."""

    wide: ClassVar[bool] = False  # on the page

    name: str
    title: str
    note: str
    x_label: str
    y_label: str
    marks: Sequence[Mark]
    styles: dict[str, Style]
    log_x: bool = False
    log_y: bool = False
    ticks: dict[float, str] | None = None  # of x, where they are no plain numbers
    zero_line: bool = False


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """One number a cell, None where there is none, and what stands in it."""

    wide: ClassVar[bool] = False

    name: str
    title: str
    note: str
    x_label: str
    y_label: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    texts: Sequence[Sequence[str]]


def plots(runs: Sequence[Run], recipes: Sequence[RecipeSummary], rungs: Sequence[Rung]) -> list[Plot | HeatMap]:
    """All that have something to show."""
    styles = {s.recipe: Style.numbered(number) for number, s in enumerate(recipes)}
    known = [run for run in runs if run.values]
    curves: list[_Curve] = [
        ("losses", "Training loss", NATS, "Smoothed. Dotted: diverged.", _smoothed, "loss"),
        ("validation", "Validation loss", NATS, "As measured.", _as_measured, "loss"),
        ("sharpness", "Sharpness", "percent", "Defined under Stability.", _as_measured, "sharpness"),
        ("grad_norm", "Gradient norm", "before clipping", "Largest of each stretch of steps.", _peaks, "grad_norm"),
        ("update_ratio", "Update ratio", "|update| / |weights|", "Smoothed.", _smoothed, "update_ratio"),
        ("lost_updates", "Lost updates", "share of parameters", _LOST, _smoothed, "lost_updates"),
        ("edq", "Effective descent quality", "", "Smoothed.", _smoothed, "edq"),
    ]
    lines = [_over_tokens(curve, known, styles) for curve in curves]
    drawn = [_gaps(recipes, styles), lines[0], _rates(known, recipes, styles), *lines[1:]]
    maps = [
        _heat_map([rung for rung in rungs if rung.rounding == way], way, number)
        for number, way in enumerate(sorted({r.rounding for r in rungs}))
    ]
    return [*maps, *(plot for plot in drawn if plot.marks)]


def _over_tokens(curve: _Curve, runs: Sequence[Run], styles: dict[str, Style]) -> Plot:
    """One line a run, over the tokens it has seen."""
    name, title, y_label, note, points, key = curve
    marks: list[Mark] = []
    for run in runs:
        x, y = points(run, key)
        if x:
            first = all(mark.recipe != run.recipe for mark in marks)
            kind = Kind.dotted if run.state == "diverged" else Kind.line
            marks.append(Mark(recipe=run.recipe, kind=kind, x=x, y=y, label=_label(run), in_legend=first))
    return Plot(
        name=name,
        title=title,
        note=note,
        x_label="tokens",
        y_label=y_label,
        marks=marks,
        styles=styles,
        log_y=name in _LOGARITHMIC,
    )


def _label(run: Run) -> str:
    return f"{run.recipe}, lr {run.lr:g}, seed {run.seed}"


def _smoothed(run: Run, key: str) -> Points:
    return _thinned(run, smooth(run.losses if key == "loss" else run.series.get(key, [])))


def _as_measured(run: Run, key: str) -> Points:
    points = run.evals.get(key, {})
    if len(points) < 2:  # no curve, and the end of each run is in a table
        return [], []
    return [step * run.tokens_per_step for step in points], [round(value, 5) for value in points.values()]


def _stretches(run: Run, values: Sequence[float | None]) -> list[list[tuple[float, float]]]:
    """(tokens, value) of every step that has one, in at most ``_MOST_POINTS`` stretches of the same length."""
    points = [
        (s * run.tokens_per_step, value) for s, value in zip(run.steps, values, strict=False) if value is not None
    ]
    every = max(1, math.ceil(len(points) / _MOST_POINTS))
    return [points[start : start + every] for start in range(0, len(points), every)]


def _axes(points: Sequence[tuple[float, float]]) -> Points:
    return [x for x, _ in points], [float(f"{y:.6g}") for _, y in points]


def _thinned(run: Run, values: Sequence[float | None]) -> Points:
    """The first point of each stretch, and the last of all."""
    parts = _stretches(run, values)
    return _axes([part[0] for part in parts] + [part[-1] for part in parts[-1:] if len(part) > 1])


def _peaks(run: Run, key: str) -> Points:
    """The largest value of each stretch."""
    return _axes([max(part, key=lambda point: point[::-1]) for part in _stretches(run, run.series.get(key, []))])


def _gaps(recipes: Sequence[RecipeSummary], styles: dict[str, Style]) -> Plot:
    shown = [s for s in recipes if s.gap_mean is not None]
    marks = []
    for place, s in enumerate(shown):
        places, label = [place] * len(s.gaps), f"{s.recipe}, mean"
        marks += [
            Mark(recipe=s.recipe, kind=Kind.dots, x=places, y=s.gaps, label=f"{s.recipe}, pairs"),
            Mark(recipe=s.recipe, kind=Kind.diamond, x=[place], y=[s.gap_mean], label=label, interval=s.gap_interval),
        ]
    return Plot(
        name="gaps",
        title="Gap to the baseline",
        note="Dots: pairs; diamonds: their mean and its 95% interval. Above zero is worse.",
        x_label="",
        y_label=NATS,
        marks=marks,
        styles=styles,
        ticks={float(place): s.recipe for place, s in enumerate(shown)},
        zero_line=True,
    )


def _rates(runs: Sequence[Run], recipes: Sequence[RecipeSummary], styles: dict[str, Style]) -> Plot:
    rates = sorted({run.lr for run in runs if run.lr > 0})
    finals = [run.final for run in runs if run.final is not None]
    top = max(finals, default=0.0) + 0.08 * (max(finals, default=1.0) - min(finals, default=0.0) or 1.0)
    marks = []
    for s in recipes:
        own = [run for run in runs if run.recipe == s.recipe and run.lr > 0]
        good = [(run.lr, run.final) for run in own if run.final is not None]
        failed = [(run.lr, top) for run in own if run.state == "diverged"]
        means = [(rate, loss) for rate, loss in losses_by_rate(r for r in own if r.over).items() if loss is not None]
        for kind, points, suffix in (
            (Kind.dots, good, ""),
            (Kind.crosses, failed, ", diverged"),
            (Kind.line, means, ", mean"),
        ):
            if points and (kind is not Kind.line or len(points) > 1):
                x, y = [point[0] for point in points], [point[1] for point in points]
                first = all(mark.recipe != s.recipe for mark in marks)
                marks.append(Mark(recipe=s.recipe, kind=kind, x=x, y=y, label=s.recipe + suffix, in_legend=first))
    return Plot(
        name="rates",
        title="Validation loss by learning rate",
        note="At the end, each at its own rate. Crosses, above all others: diverged, whatever the loss. Lines: means "
        "of rates where none diverged.",
        x_label="learning rate",
        y_label=NATS,
        marks=marks,
        styles=styles,
        log_x=True,
        ticks={rate: f"{rate:g}" for rate in rates},
    )


def _heat_map(rungs: Sequence[Rung], rounding: str, number: int) -> HeatMap:
    """``number``: in the name of its files, where the rounding has none that a file could bear."""
    exponents = sorted({rung.exponent for rung in rungs}, reverse=True)
    mantissas = sorted({rung.mantissa for rung in rungs}, reverse=True)
    cells = {(rung.mantissa, rung.exponent): rung for rung in rungs}

    def value(rung: Rung | None) -> float | None:
        if rung is None:
            return None
        is_bf16 = (rung.exponent, rung.mantissa) == (8, 7)
        return 0.0 if is_bf16 and rung.summary.gap_mean is None else rung.summary.gap_mean

    return HeatMap(
        name=f"ladder_{rounding}" if re.fullmatch(r"\w+", rounding, re.ASCII) else f"ladder{number}",
        title=printable(f"The bit ladder, rounding: {rounding}"),
        note="Gap to bf16 in nats per token, by bits of exponent and mantissa. No colour: no pair finished.",
        x_label="exponent",
        y_label="mantissa",
        columns=[f"E{exponent}" for exponent in exponents],
        rows=[f"M{mantissa}" for mantissa in mantissas],
        values=[[value(cells.get((m, e))) for e in exponents] for m in mantissas],
        texts=[[rung_text(cells[m, e]) if (m, e) in cells else "" for e in exponents] for m in mantissas],
    )
