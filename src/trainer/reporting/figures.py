"""How figures look and are written, and the loss curve of a run directory."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ..environ import printable
from ..metrics import number, read_metrics

FORMATS = ("png", "svg", "pdf")
# Okabe and Ito's, which the colour-blind tell apart, without the yellow, which white paper swallows.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9")
# Text as outlines in SVG and as TrueType in PDF, so that both look the same everywhere and journals take them.
_STYLE = {"svg.fonttype": "path", "svg.hashsalt": "narrowgauge", "pdf.fonttype": 42, "font.size": 11}
_NO_DATE: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def save_figure(
    draw: Callable[[Figure], None], file: Path, size: tuple[float, float], formats: Sequence[str] = ("png",)
) -> None:
    """Have ``draw`` fill a figure of ``size``, in inches, and write it as ``file`` with the suffix of each format.

    The same figure gives the same bytes. Raises OSError where a file cannot be written.
    """
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name's: a box stands for it
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.get_layout_engine().execute(figure)  # once for all formats
        figure.set_layout_engine("none")
        for kind in formats:
            # By its own name: what stands after the last point of a name need not be a suffix.
            figure.savefig(file.with_name(f"{file.stem}.{kind}"), format=kind, metadata=_NO_DATE[kind])


def smooth(values: Sequence[float | None], fits: int = 2_000) -> list[float | None]:
    """The course of ``values`` for the eye, without lag or bias; None where a value is not finite.

    Around each value a line is fitted with tricube weights (Cleveland 1979): unlike a mean over the past it leaves a
    straight line as it is, up to both ends. The window widens with the step, as a loss falls fastest at the start. Of
    more than ``fits`` values those in between are interpolated.
    """
    known = [index for index, value in enumerate(values) if value is not None and math.isfinite(value)]
    result: list[float | None] = [None] * len(values)
    if not known:
        return result
    x = np.asarray(known, dtype=float)
    y = np.asarray([values[index] for index in known], dtype=float)
    widest = max(6, len(x) // 30)
    centres = np.unique(np.linspace(0, len(x) - 1, min(fits, len(x))).round().astype(int))
    fitted = []
    for centre in centres:
        half = min(widest, centre * 3 // 20)
        window = slice(max(0, centre - half), centre + half + 1)
        weights = (1 - (np.abs(np.arange(len(x))[window] - centre) / (half + 1)) ** 3) ** 3
        away = x[window] - x[centre]
        mean_x, mean_y = np.average(away, weights=weights), np.average(y[window], weights=weights)
        spread = np.average((away - mean_x) ** 2, weights=weights)
        slope = np.average((away - mean_x) * (y[window] - mean_y), weights=weights) / spread if spread else 0.0
        fitted.append(mean_y - slope * mean_x)
    for index, value in zip(known, np.interp(x, x[centres], fitted).tolist(), strict=True):
        result[index] = value
    return result


def plot_losses(run_dir: Path, target: Path) -> None:
    """Training loss (every step, and smoothed) and validation loss over tokens and steps, from ``metrics.jsonl``."""
    save_figure(lambda figure: _draw_losses(figure.subplots(), run_dir), target, (8, 4.8))


def _draw_losses(axes: Axes, run_dir: Path) -> None:
    rows = [row for row in _rows(run_dir, "train") if number(row.get("tokens")) is not None]
    tokens, losses = [row["tokens"] for row in rows], [row["loss"] for row in rows]
    axes.plot(tokens, losses, color=COLORS[0], alpha=0.35, linewidth=0.8, label="training, each step")
    axes.plot(tokens, smooth(losses), color=COLORS[0], linewidth=1.8, label="training, smoothed")
    evals = _rows(run_dir, "eval")
    if rows and (per_step := rows[-1]["tokens"] / max(1, rows[-1]["step"])):
        x, y = [row["step"] * per_step for row in evals], [row["loss"] for row in evals]
        axes.plot(x, y, "o--", color=COLORS[1], markersize=5, linewidth=1.2, label="validation")
        steps = axes.secondary_xaxis("top", functions=(lambda x: x / per_step, lambda x: x * per_step))
        steps.set_xlabel("steps")
        steps.xaxis.set_major_formatter(EngFormatter(sep=""))
    if not rows:
        axes.text(0.5, 0.5, "no training step has a finite loss", ha="center", transform=axes.transAxes)
    token_axis(axes)
    axes.set(ylabel="loss (nats per token)", title=shown(run_dir.name))
    axes.grid(alpha=0.3)
    axes.legend()


def token_axis(axes: Axes) -> None:
    """Label x as tokens, in thousands, millions and so on."""
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def shown(text: str, width: int = 70) -> str:
    """For matplotlib, in lines of ``width``; it takes what stands between dollars for a formula."""
    return "\n".join(textwrap.wrap(printable(text), width)).replace("$", r"\$")


def _rows(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    rows = read_metrics(run_dir / "metrics.jsonl", kind).values()
    return [row for row in rows if number(row.get("loss")) is not None]
