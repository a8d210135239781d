"""What the probe rows of run directories show: a map of layers by slots, and the layers that rounding hurts most.

Plain values that ``trainer.report`` makes tables and figures of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer.environ import printable
from trainer.metrics import number, read_rows

_SLOTS = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
_OUTPUTS = ("fprop.y", "dgrad.dx", "wgrad.dw")
_MOST_STEPS = 8  # that the map can be turned to
_WORST = 10
Entry = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One quantity of the map."""

    key: str
    title: str
    slots: Sequence[str]
    colors: str
    map: str  # the same in matplotlib: dark is bad
    low: bool = False  # is bad


_PANELS = (
    _Panel(key="sqnr_db", title="SQNR, dB", slots=_SLOTS, colors="YlGnBu", map="YlGnBu_r", low=True),
    _Panel(key="underflow_percent", title="underflow, %", slots=_SLOTS, colors="Reds", map="Reds"),
    _Panel(key="saturation_percent", title="saturation, %", slots=_SLOTS, colors="Reds", map="Reds"),
    _Panel(key="relative_error", title="error of output", slots=_OUTPUTS, colors="Reds", map="Reds"),
)


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """The probe rows of one run: step -> module -> slot -> row. Modules in the order of the model."""

    steps: Mapping[int, Mapping[str, Mapping[str, Entry]]]

    @property
    def last(self) -> int:
        return max(self.steps)


def numerics_of(runs: Iterable[tuple[str, Path]]) -> dict[str, Numerics]:
    """By recipe, from (recipe, run directory): the first run of each that was watched."""
    found: dict[str, Numerics] = {}
    for recipe, path in runs:
        if recipe not in found and (numerics := read_numerics(path / "metrics.jsonl")) is not None:
            found[recipe] = numerics
    return found


def read_numerics(metrics: Path) -> Numerics | None:
    """The probe rows of a ``metrics.jsonl``; of a step that stands twice the last rows count. None without any."""
    if not metrics.exists() or b'"kind": "probe"' not in metrics.read_bytes():
        return None
    steps: dict[int, dict[str, dict[str, Entry]]] = {}
    for row in read_rows(metrics, "probe"):
        if isinstance(row.get("module"), str) and isinstance(row.get("slot"), str):
            steps.setdefault(row["step"], {}).setdefault(printable(row["module"]), {})[row["slot"]] = row
    return Numerics(steps=dict(sorted(steps.items()))) if steps else None


def worst_layers(runs: Mapping[str, Numerics]) -> dict[str, Any]:
    """The fields of a table: the layers of every run's last watched step, by the lowest SQNR of a slot, worst first."""
    rows = []
    for name, numerics in runs.items():
        layers = numerics.steps[numerics.last]
        known = [(module, worst) for module, slots in layers.items() if (worst := _worst(slots)) is not None]
        for module, entry in sorted(known, key=lambda item: item[1]["sqnr_db"])[:_WORST]:
            errors = [number(layers[module].get(output, {}).get("relative_error")) for output in _OUTPUTS]
            figures = [number(entry.get(key)) for key in ("sqnr_db", "underflow_percent", "saturation_percent")]
            rows.append((name, numerics.last, module, entry["slot"], str(entry.get("format", "-")), *figures, *errors))
    return {
        "title": f"The {_WORST} layers that rounding hurts most",
        "note": "By the operand with the lowest SQNR (10 log10 of the sum of squares over that of squared rounding "
        "errors), at the last step that was watched. Underflow: not zero before, zero after; saturation: above what "
        "the largest code of its tile stands for; both of all elements. Errors of a product: norm of the difference "
        "to the product of unrounded operands over that product's norm.",
        "columns": [
            *("recipe", "step", "layer", "operand", "format", "SQNR dB", "underflow %", "saturation %"),
            *("error y", "error dx", "error dw"),
        ],
        "rows": rows,
    }


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """A plot of one run's probe rows."""

    name: str
    recipe: str
    numerics: Numerics
    note: str = "Dark is bad. The picture is of the last watched step; the page has a slider over them."

    @property
    def title(self) -> str:
        return f"Numerics of {self.recipe}, by layer"

    def to_plotly(self) -> dict[str, Any]:
        return heat_map(self.name, self.numerics)

    def save_png(self, file: Path) -> None:
        """Raises OSError where ``file`` cannot be written."""
        picture(self.recipe, self.numerics, file)


def heat_map(name: str, numerics: Numerics) -> dict[str, Any]:
    """A figure for plotly.js: layers by slots, a panel a quantity, a slider over the watched steps."""
    chosen = _thinned(list(numerics.steps))
    modules = list(numerics.steps[chosen[-1]])
    data: list[dict[str, Any]] = []
    for step in chosen:
        layers = numerics.steps[step]
        for index, panel in enumerate(_PANELS):
            cells = [[layers.get(module, {}).get(slot, {}) for slot in panel.slots] for module in modules]
            low, high = _range(numerics, chosen, panel)
            data.append(
                {
                    "type": "heatmap",
                    "x": list(panel.slots),
                    "y": [escape(m) for m in modules],
                    "colorscale": panel.colors,
                }
                | {"z": [[number(cell.get(panel.key)) for cell in row] for row in cells]}
                | {"text": [[_told(cell) for cell in row] for row in cells], "hoverinfo": "x+y+z+text"}
                | {"zmin": low, "zmax": high, "visible": step == chosen[-1]}
                | {"xaxis": f"x{index + 1}" if index else "x", "name": panel.title, "hoverongaps": False}
                | {"colorbar": {"orientation": "h", "thickness": 8, "y": 1.0, "yanchor": "bottom"} | _bar(index)}
            )
    layout: dict[str, Any] = {
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category", "tickfont": {"size": 9}},
        "margin": {"l": 50, "r": 10, "t": 70, "b": 60},
        "height": 220 + 13 * len(modules),
        "sliders": [
            {"active": len(chosen) - 1, "currentvalue": {"prefix": "step "}, "pad": {"t": 60}}
            | {
                "steps": [
                    {"label": str(step), "method": "restyle"}
                    | {"args": ["visible", [step == other for other in chosen for _ in _PANELS]]}
                    for step in chosen
                ]
            }
        ],
    }
    for index, panel in enumerate(_PANELS):
        axis = {"title": {"text": panel.title}, "domain": _domain(index), "tickangle": -45, "tickfont": {"size": 9}}
        layout[f"xaxis{index + 1}" if index else "xaxis"] = axis
    return {"name": name, "data": data, "layout": layout}


def picture(recipe: str, numerics: Numerics, file: Path) -> None:
    """The last watched step as a PNG. Raises OSError if it cannot be written."""
    layers = numerics.steps[numerics.last]
    widths = [len(panel.slots) for panel in _PANELS]
    figure = Figure(figsize=(12, 1.8 + 0.16 * len(layers)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for index, (axes, panel) in enumerate(
        zip(figure.subplots(1, len(_PANELS), width_ratios=widths), _PANELS, strict=True)
    ):
        cells = [[layers[module].get(slot, {}).get(panel.key) for slot in panel.slots] for module in layers]
        values = [[math.nan if (value := number(cell)) is None else value for cell in row] for row in cells]
        low, high = _range(numerics, [numerics.last], panel)
        image = axes.imshow(values, aspect="auto", cmap=panel.map, vmin=low, vmax=high, interpolation="none")
        figure.colorbar(image, ax=axes, location="top", shrink=0.9)
        axes.set_xticks(range(len(panel.slots)), panel.slots, rotation=60, fontsize=7)
        axes.set_yticks(
            range(len(layers)), [plain_label(m) for m in layers] if index == 0 else [""] * len(layers), fontsize=6
        )
        axes.set_xlabel(panel.title, fontsize=8)
    figure.suptitle(f"{plain_label(recipe)}, step {numerics.last}", fontsize=9)
    figure.savefig(file, metadata={"Software": None})


def plain_label(text: str) -> str:
    """For matplotlib, which takes what stands between dollars for a formula."""
    return text.replace("$", r"\$")


def _worst(slots: Mapping[str, Entry]) -> Entry | None:
    known = [slots[slot] for slot in _SLOTS if number(slots.get(slot, {}).get("sqnr_db")) is not None]
    return min(known, key=lambda entry: float(entry["sqnr_db"])) if known else None


def _told(cell: Entry) -> str:
    amax = number(cell.get("amax"))
    return escape(str(cell.get("format", "not seen"))) + (f"<br>amax {amax:.4g}" if amax is not None else "")


def _range(numerics: Numerics, steps: Sequence[int], panel: _Panel) -> tuple[float, float]:
    """Of the colours, one for all steps."""
    rows = (row for step in steps for slots in numerics.steps[step].values() for row in slots.values())
    values = [
        value for row in rows if row.get("slot") in panel.slots and (value := number(row.get(panel.key))) is not None
    ]
    low = min(values, default=0.0) if panel.low else 0.0
    high = max(values, default=1.0)
    return low, high if high > low else low + 1.0


def _domain(index: int) -> list[float]:
    gap, total = 0.02, sum(len(panel.slots) for panel in _PANELS)
    room = (1 - gap * (len(_PANELS) - 1)) / total
    start = sum(len(panel.slots) for panel in _PANELS[:index]) * room + index * gap
    return [round(start, 4), round(start + len(_PANELS[index].slots) * room, 4)]


def _bar(index: int) -> dict[str, Any]:
    start, end = _domain(index)
    return {"x": (start + end) / 2, "len": (end - start) * 0.9, "tickfont": {"size": 9}}


def _thinned(steps: Sequence[int]) -> list[int]:
    """At most ``_MOST_STEPS`` of them, evenly, the last one included."""
    every = math.ceil(len(steps) / _MOST_STEPS)
    return sorted(steps[::-1][::every])
