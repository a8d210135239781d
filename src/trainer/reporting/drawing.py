"""The plots of a report, drawn by plotly for the page and by matplotlib for the PNGs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from .figures import save_figure, shown, token_axis
from .plots import NATS, HeatMap, Kind, Mark, Plot, Style

_HEAT = [[0.0, "#67a9cf"], [0.5, "#f7f7f7"], [1.0, "#ef8a62"]]  # worse is red; text stays readable on both ends
_MOST_MARKED = 40  # curves that have markers: of more one sees the markers alone
_MOST_NAMES = 24  # that stand in the legend of a picture


def to_plotly(plot: Plot | HeatMap) -> dict[str, Any]:
    """``{"name", "data", "layout"}`` for ``Plotly.newPlot``."""
    if isinstance(plot, HeatMap):
        return _heat_map_to_plotly(plot)
    x_axis: dict[str, Any] = {"title": {"text": plot.x_label}, "automargin": True}
    if plot.log_x:
        x_axis["type"] = "log"
    elif plot.ticks is not None:
        x_axis["range"] = [-0.5, len(plot.ticks) - 0.5]
    if plot.ticks is not None:
        x_axis |= {
            "zeroline": False,
            "tickmode": "array",
            "tickvals": list(plot.ticks),
            "ticktext": [escape(text) for text in plot.ticks.values()],
        }
    y_axis: dict[str, Any] = {"title": {"text": plot.y_label}, "automargin": True, "zeroline": plot.zero_line}
    if plot.log_y:
        y_axis |= {"type": "log", "exponentformat": "power", "dtick": 1}
    return {
        "name": plot.name,
        "data": [_trace(mark, plot.styles[mark.recipe]) for mark in plot.marks],
        "layout": _layout(x_axis, y_axis) | {"showlegend": any(mark.in_legend for mark in plot.marks)},
    }


def _trace(mark: Mark, style: Style) -> dict[str, Any]:
    color = style.color
    trace: dict[str, Any] = {
        "x": list(mark.x),
        "y": list(mark.y),
        "name": escape(mark.recipe),
        "text": escape(mark.label),
        "hoverinfo": "x+y+text",
        "legendgroup": escape(mark.recipe),
        "showlegend": mark.in_legend,
    }
    if mark.kind in (Kind.line, Kind.dotted):
        dash = "dot" if mark.kind is Kind.dotted else style.plotly_dash
        return trace | {"mode": "lines", "line": {"color": color, "width": 1.2, "dash": dash}}
    looks: dict[Kind, dict[str, Any]] = {
        Kind.dots: {"symbol": style.symbol, "size": 8, "opacity": 0.7},
        Kind.crosses: {"symbol": "x", "size": 9},
        Kind.diamond: {"symbol": "diamond", "size": 11},
    }
    trace |= {"mode": "markers", "marker": {"color": color} | looks[mark.kind]}
    if mark.interval is not None:
        low, high = mark.interval
        ends = {"array": [high - mark.y[0]], "arrayminus": [mark.y[0] - low]}
        trace["error_y"] = {"type": "data", "symmetric": False, "color": color, **ends}
    return trace


def _heat_map_to_plotly(plot: HeatMap) -> dict[str, Any]:
    found = [abs(value) for row in plot.values for value in row if value is not None]
    most = max(found, default=0.0) or 1.0
    trace = {
        "type": "heatmap",
        "x": list(plot.columns),
        "y": list(plot.rows),
        "z": [list(row) for row in plot.values],
        "zmin": -most,
        "zmax": most,
        "colorscale": _HEAT,
        "hoverinfo": "x+y+z",
        "xgap": 2,
        "ygap": 2,
        "colorbar": {"thickness": 12},
    }
    # A cell without a number takes no text of the trace's own.
    notes = [
        {"x": column, "y": row, "text": escape(text).replace(", ", "<br>"), "showarrow": False, "font": {"size": 12}}
        for row, texts in zip(plot.rows, plot.texts, strict=True)
        for column, text in zip(plot.columns, texts, strict=True)
        if text
    ]
    x_axis = {"title": {"text": plot.x_label}, "type": "category", "automargin": True}
    y_axis = {"title": {"text": plot.y_label}, "type": "category", "autorange": "reversed", "automargin": True}
    height = 160 + 60 * len(plot.rows)
    return {
        "name": plot.name,
        "data": [trace],
        "layout": _layout(x_axis, y_axis) | {"annotations": notes, "height": height},
    }


def _layout(x_axis: dict[str, Any], y_axis: dict[str, Any]) -> dict[str, Any]:
    return {
        "xaxis": x_axis,
        "yaxis": y_axis,
        "margin": {"l": 50, "r": 10, "t": 30, "b": 45},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        "hovermode": "closest",
        "height": 420,
    }


def save_plot(plot: Plot | HeatMap, file: Path, formats: Sequence[str] = ("png",)) -> None:
    """Raises OSError where ``file`` cannot be written."""
    size = (8.0, 4.8)
    if isinstance(plot, HeatMap):
        size = (max(6.0, 2.0 + 1.5 * len(plot.columns)), max(3.0, 1.6 + 0.7 * len(plot.rows)))
    save_figure(lambda figure: _draw(figure.subplots(), plot), file, size, formats)


def _draw(axes: Axes, plot: Plot | HeatMap) -> None:
    axes.set(title=shown(plot.title), xlabel=plot.x_label, ylabel=plot.y_label)
    if isinstance(plot, HeatMap):
        _draw_heat_map(axes, plot)
    else:
        _draw_marks(axes, plot)


def _draw_marks(axes: Axes, plot: Plot) -> None:
    many = len(plot.marks) > _MOST_MARKED
    for mark in plot.marks:
        style = plot.styles[mark.recipe]
        color = style.color
        label = shown(mark.recipe, 32) if mark.in_legend else None
        match mark.kind:
            case Kind.line | Kind.dotted:
                dash = ":" if mark.kind is Kind.dotted else style.dash
                look: dict[str, Any] = {"marker": "", "linewidth": 0.7, "alpha": 0.6} if many else {"linewidth": 1.2}
                look = {"marker": style.marker, "markersize": 4, "markevery": max(1, len(mark.x) // 8)} | look
                axes.plot(mark.x, mark.y, linestyle=dash, color=color, label=label, **look)
            case Kind.dots:
                axes.plot(
                    mark.x, mark.y, style.marker, color=color, alpha=0.7, markersize=6, fillstyle="none", label=label
                )
            case Kind.crosses:
                axes.plot(mark.x, mark.y, "x", color=color, markersize=8, markeredgewidth=2, label=label)
            case Kind.diamond:
                axes.plot(mark.x, mark.y, "D", color=color, markersize=7, label=label)
                if mark.interval is not None:
                    axes.vlines(mark.x, *mark.interval, color=color, linewidth=1.5)
    if plot.log_x:
        axes.set_xscale("log")
    if plot.log_y:
        axes.set_yscale("log")
    if plot.x_label == "tokens":
        token_axis(axes)
    if plot.ticks is not None:
        _label_ticks(axes, plot.ticks, plot.log_x)
    if plot.zero_line:
        axes.axhline(0, color="black", linewidth=0.8)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        outside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(handles) > 6 else {}
        axes.legend(handles[:_MOST_NAMES], labels[:_MOST_NAMES], fontsize=8 if len(handles) > 6 else 9, **outside)
    axes.grid(alpha=0.3)


def _label_ticks(axes: Axes, ticks: dict[float, str], log_x: bool) -> None:
    """Every tick its text, but for those that would stand in one another."""
    places = [math.log10(place) if log_x else place for place in ticks]
    room = (max(places, default=0) - min(places, default=0)) / 16
    labelled: list[float] = []
    for place, where in zip(ticks, places, strict=True):
        if not log_x or not labelled or where - math.log10(labelled[-1]) >= room:
            labelled.append(place)
    turned = not log_x and (len(ticks) > 6 or max(map(len, ticks.values()), default=0) > 12)
    turn: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    axes.set_xticks(labelled, [shown(ticks[place], 32) for place in labelled], fontsize=9, **turn)
    axes.minorticks_off()


def _draw_heat_map(axes: Axes, plot: HeatMap) -> None:
    numbers = [[math.nan if value is None else value for value in row] for row in plot.values]
    most = max((abs(value) for row in numbers for value in row if not math.isnan(value)), default=0.0) or 1.0
    image = axes.imshow(
        numbers,
        cmap=LinearSegmentedColormap.from_list("heat", [color for _, color in _HEAT]),
        vmin=-most,
        vmax=most,
        aspect="auto",
    )
    axes.figure.colorbar(image, ax=axes, label=NATS)
    for row, texts in enumerate(plot.texts):
        for column, text in enumerate(texts):
            axes.text(column, row, text.replace(", ", "\n"), ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(plot.columns)), plot.columns)
    axes.set_yticks(range(len(plot.rows)), plot.rows)
