"""What the probe rows of run directories show: a map of layers by slots, and the layers that rounding hurts most.

Plain values that ``report`` makes tables and figures of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from ..environ import printable
from ..metrics import number, read_rows
from .figures import save_figure, shown

_SLOTS = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
_OUTPUTS = ("fprop.y", "dgrad.dx", "wgrad.dw")
_MOST_STEPS = 8  # that the map can be turned to
_WORST = 10
_PLAIN = ("float64", "float32", "bfloat16", "float16")  # formats in which nothing is rounded
_TALLEST = 60.0  # inches of a picture
_HATCHED: dict[str, Any] = {"facecolor": "#f2f2f2", "edgecolor": "#999999", "hatch": "////", "linewidth": 0}
Entry = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One quantity of the map."""

    key: str
    title: str
    slots: Sequence[str]
    colors: str  # dark is bad
    low: bool = False  # is bad


_PANELS = (
    _Panel(key="sqnr_db", title="SQNR, dB", slots=_SLOTS, colors="YlGnBu", low=True),
    _Panel(key="underflow_percent", title="underflow, %", slots=_SLOTS, colors="Reds"),
    _Panel(key="saturation_percent", title="saturation, %", slots=_SLOTS, colors="Reds"),
    _Panel(key="relative_error", title="error of output", slots=_OUTPUTS, colors="Reds"),
)


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """The probe rows of one run: step -> module -> slot -> row. Modules in the order of the model."""

    steps: Mapping[int, Mapping[str, Mapping[str, Entry]]]

    @cached_property
    def newest(self) -> dict[str, dict[str, Entry]]:
        """By module and slot, each product's rows of the last step at which its operands were rounded.

        Where they never were, of the last step that has them. A run may end in high precision.
        """
        found: dict[str, dict[str, Entry]] = {}
        for layers in reversed(self.steps.values()):
            for module, slots in layers.items():
                for gemm, parts in _by_gemm(slots).items():
                    there = _by_gemm(found.get(module, {})).get(gemm, {})
                    if not there or (is_rounded(parts) and not is_rounded(there)):
                        found.setdefault(module, {}).update(parts)
        return found

    @property
    def linears(self) -> dict[str, dict[str, Entry]]:
        """The newest rows of modules with the slots of a linear: what the map shows."""
        return {module: slots for module, slots in self.newest.items() if any(slot in _SLOTS for slot in slots)}

    @property
    def fullest(self) -> int:
        """The last step of those at which most operands were rounded."""
        counts = {
            step: sum(is_rounded(parts) for slots in layers.values() for parts in _by_gemm(slots).values())
            for step, layers in self.steps.items()
        }
        return max(counts, key=lambda step: (counts[step], step))


def is_rounded(slots: Mapping[str, Entry]) -> bool:
    """Whether an operand of a product is in a narrow format. ``slots``: the product's rows by slot."""
    return any(
        isinstance(entry.get("format"), str) and entry["format"] not in _PLAIN
        for slot, entry in slots.items()
        if slot not in _OUTPUTS
    )


def _by_gemm(slots: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    gemms: dict[str, dict[str, Entry]] = {}
    for slot, entry in slots.items():
        gemms.setdefault(slot.partition(".")[0], {})[slot] = entry
    return gemms


def numerics_of(runs: Iterable[tuple[str, Path]]) -> dict[str, Numerics]:
    """By recipe, from (recipe, run directory): the first run of each that was watched and rounded something."""
    found: dict[str, Numerics] = {}
    for recipe, path in runs:
        numerics = None if recipe in found else read_numerics(path / "metrics.jsonl")
        if numerics is not None and any(is_rounded(slots) for slots in numerics.newest.values()):
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
    """The fields of a table: every run's layers as last rounded, by the lowest SQNR of a slot, worst first."""
    rows = []
    for name, numerics in runs.items():
        layers = numerics.newest
        known = [(module, worst) for module, slots in layers.items() if (worst := _worst(slots)) is not None]
        for module, entry in sorted(known, key=lambda item: item[1]["sqnr_db"])[:_WORST]:
            errors = [number(layers[module].get(output, {}).get("relative_error")) for output in _OUTPUTS]
            figures = [number(entry.get(key)) for key in ("sqnr_db", "underflow_percent", "saturation_percent")]
            rows.append((name, entry["step"], module, entry["slot"], str(entry.get("format", "-")), *figures, *errors))
    return {
        "title": f"The {_WORST} layers that rounding hurts most",
        "note": "By the operand with the lowest SQNR (10 log10 of the sum of squares over that of squared rounding "
        "errors), at the last watched step at which it was rounded. Underflow: not zero before, zero after; "
        "saturation: above what the largest code of its tile stands for; both of all elements. Errors of a product: "
        "norm of the difference to the product of unrounded operands over that product's norm.",
        "columns": [
            *("recipe", "step", "layer", "operand", "format", "SQNR dB", "underflow %", "saturation %"),
            *("error y", "error dx", "error dw"),
        ],
        "rows": rows,
    }


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """A plot of one run's probe rows."""

    wide: ClassVar[bool] = True  # on the page

    name: str
    recipe: str
    numerics: Numerics
    note: str = (
        "Dark is bad. Hatched, or grey on the page: high precision, nothing is rounded. The picture shows each product "
        "at the last watched step at which its operands were rounded; the page has a slider over the steps."
    )

    @property
    def title(self) -> str:
        return f"Numerics of {self.recipe}, by layer"

    def save(self, file: Path, formats: Sequence[str] = ("png",)) -> None:
        """Each product at the last watched step at which its operands were rounded.

        Raises OSError where ``file`` cannot be written.
        """
        height = min(_TALLEST, 3.0 + 0.2 * len(self.numerics.linears))
        save_figure(lambda figure: draw(figure, self.recipe, self.numerics, height), file, (14, height), formats)


def heat_map(name: str, numerics: Numerics) -> dict[str, Any]:
    """A figure for plotly.js: layers by slots, a panel a quantity, a slider over the watched steps."""
    first = numerics.fullest  # that the page opens at
    chosen = _thinned(list(numerics.steps), first)
    modules = list(numerics.linears)
    data: list[dict[str, Any]] = []
    for step in chosen:
        layers = numerics.steps[step]
        for index, panel in enumerate(_PANELS):
            cells = [[layers.get(module, {}).get(slot, {}) for slot in panel.slots] for module in modules]
            low, high = _range(numerics, chosen, panel)
            data.append(
                {"type": "heatmap", "x": list(panel.slots), "y": [escape(module) for module in modules]}
                | {"colorscale": panel.colors}
                | {"z": [[_value(layers.get(m, {}), slot, panel.key) for slot in panel.slots] for m in modules]}
                | {"text": [[_hover_text(cell) for cell in row] for row in cells], "hoverinfo": "x+y+z+text"}
                | {"zmin": low, "zmax": high, "visible": step == first}
                | {"xaxis": f"x{index + 1}" if index else "x", "name": panel.title, "hoverongaps": False}
                | {"colorbar": {"orientation": "h", "thickness": 8, "y": 1.0, "yanchor": "bottom"} | _bar(index)}
            )
    layout: dict[str, Any] = {
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category", "tickfont": {"size": 9}}
        | {"showgrid": False},
        "margin": {"l": 50, "r": 10, "t": 70, "b": 60},
        "height": 220 + 13 * len(modules),
        "plot_bgcolor": "#d9d9d9",
        "sliders": [
            {"active": chosen.index(first), "currentvalue": {"prefix": "step "}, "pad": {"t": 60}}
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
        layout[f"xaxis{index + 1}" if index else "xaxis"] = {
            "title": {"text": panel.title, "font": {"size": 11}},
            "domain": _domain(index),
            "tickangle": -45,
            "tickfont": {"size": 9},
            "showgrid": False,
        }
    return {"name": name, "data": data, "layout": layout}


def draw(figure: Figure, recipe: str, numerics: Numerics, height: float) -> None:
    """A picture of the map, on a figure of ``height`` inches."""
    layers = numerics.linears
    labels = [_short(module) for module in layers]
    every = math.ceil(len(labels) * 0.14 / height)  # as many as there is room for
    widths = [len(panel.slots) for panel in _PANELS]
    hatched = False
    for index, (axes, panel) in enumerate(
        zip(figure.subplots(1, len(_PANELS), width_ratios=widths), _PANELS, strict=True)
    ):
        values = [[_value(slots, slot, panel.key) for slot in panel.slots] for slots in layers.values()]
        known = [value for row in values for value in row if value is not None]
        low, high = _limits(known, panel)
        drawn = [[math.nan if value is None else value for value in row] for row in values]
        colors = f"{panel.colors}_r" if panel.low else panel.colors  # plotly's begin at the other end
        image = axes.imshow(drawn, aspect="auto", cmap=colors, vmin=low, vmax=high, interpolation="none")
        bar = figure.colorbar(image, ax=axes, location="top", shrink=0.9)
        bar.set_label(panel.title, fontsize=10)
        bar.ax.tick_params(labelsize=8)
        bar.locator = MaxNLocator(4)
        bar.update_ticks()
        for y, slots in enumerate(layers.values()):
            plain = [value is None and slot in slots for slot, value in zip(panel.slots, values[y], strict=True)]
            x = 0
            for is_plain, cells in groupby(plain):
                width = len(list(cells))
                if is_plain:
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, 1, **_HATCHED))
                    hatched = True
                x += width
        axes.set_xticks(
            range(len(panel.slots)), panel.slots, rotation=60, fontsize=9, ha="right", rotation_mode="anchor"
        )
        axes.set_yticks(range(0, len(labels), every), labels[::every] if index == 0 else [], fontsize=8)
    if hatched:
        label = "high precision: nothing is rounded"
        figure.legend(handles=[Patch(label=label, **_HATCHED)], loc="outside lower center", fontsize=9)
    figure.suptitle(f"{shown(recipe)}; {_steps_text(layers)}", fontsize=11)


def _value(slots: Mapping[str, Entry], slot: str, key: str) -> float | None:
    """None where nothing is rounded: zero underflow of a tensor that is not rounded says nothing."""
    entry = slots.get(slot, {})
    measured = {slot: entry} if slot in _SLOTS else _by_gemm(slots).get(slot.partition(".")[0], {})
    return number(entry.get(key)) if is_rounded(measured) else None


def _steps_text(layers: Mapping[str, Mapping[str, Entry]]) -> str:
    """``step 80``, or by product where they differ."""
    steps: dict[str, set[int]] = {}
    for slots in layers.values():
        for gemm, parts in _by_gemm(slots).items():
            if is_rounded(parts):
                steps.setdefault(gemm, set()).update(entry["step"] for entry in parts.values())
    texts = {
        gemm: f"step {min(found)}" if len(found) == 1 else f"steps {min(found)} to {max(found)}"
        for gemm, found in steps.items()
    }
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{gemm}: {text}" for gemm, text in texts.items()) or "high precision"


def _short(text: str, most: int = 44) -> str:
    """Both ends of a long name: its layer and its kind."""
    text = text if len(text) <= most else f"{text[: most // 2]}\u2026{text[-most // 2 :]}"
    return shown(text, len(text) + 1)


def _worst(slots: Mapping[str, Entry]) -> Entry | None:
    known = [entry for entry in slots.values() if number(entry.get("sqnr_db")) is not None]
    return min(known, key=lambda entry: float(entry["sqnr_db"])) if known else None


def _hover_text(cell: Entry) -> str:
    amax = number(cell.get("amax"))
    return escape(str(cell.get("format", "not seen"))) + (f"<br>amax {amax:.4g}" if amax is not None else "")


def _range(numerics: Numerics, steps: Sequence[int], panel: _Panel) -> tuple[float, float]:
    """Of the colours, one for all steps."""
    slots = (slots for step in steps for slots in numerics.steps[step].values())
    values = (_value(each, slot, panel.key) for each in slots for slot in panel.slots)
    return _limits([value for value in values if value is not None], panel)


def _limits(values: Sequence[float], panel: _Panel) -> tuple[float, float]:
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


def _thinned(steps: Sequence[int], wanted: int) -> list[int]:
    """At most ``_MOST_STEPS`` of them, evenly, the last one included, and ``wanted`` in place of the one next to it."""
    every = math.ceil(len(steps) / _MOST_STEPS)
    chosen = steps[::-1][::every]
    if wanted not in chosen:
        chosen.remove(min(chosen[1:] or chosen, key=lambda step: abs(step - wanted)))
        chosen.append(wanted)
    return sorted(chosen)
