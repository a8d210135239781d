"""The loss curve of a run directory as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer.environ import printable
from trainer.metrics import number, read_metrics


def plot_losses(run_dir: Path, target: Path) -> None:
    """Training loss (every step, and smoothed) and validation loss over tokens, from ``metrics.jsonl``."""
    rows = [row for row in _rows(run_dir, "train") if number(row.get("tokens")) is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens, losses = [row["tokens"] for row in rows], [row["loss"] for row in rows]
    axes.plot(tokens, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="train, each step")
    axes.plot(tokens, _smooth(losses), color="tab:blue", linewidth=1.5, label="train, smoothed")
    if rows:
        per_step = rows[-1]["tokens"] / max(1, rows[-1]["step"])
        evals = _rows(run_dir, "eval")
        axes.plot(
            [row["step"] * per_step for row in evals],
            [row["loss"] for row in evals],
            "o-",
            color="tab:orange",
            markersize=4,
            label="validation",
        )
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=printable(run_dir.name).replace("$", r"\$"))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, metadata={"Software": None})


def _rows(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    rows = read_metrics(run_dir / "metrics.jsonl", kind).values()
    return [row for row in rows if number(row.get("loss")) is not None]


def _smooth(values: list[float], keep: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight)
    return result
