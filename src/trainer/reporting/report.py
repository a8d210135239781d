"""The report of a sweep, from run directories alone: which recipe, what it costs, and what the data cannot say.

Reads ``config.yaml, plan.txt, metrics.jsonl, done.json, env.json`` of every run below the given directories. A diverged
run is never dropped: it has no place in a mean of losses, so it is counted apart.
"""

from __future__ import annotations

import base64
import csv
import gzip
import html
import io
import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...precision.suggest import close
from ..environ import printable
from ..errors import UserError
from ..files import write_json, write_text

try:  # extra `report`
    import jinja2
    from plotly.offline import get_plotlyjs

    from .drawing import save_plot, to_plotly
    from .figures import FORMATS
    from .latex import document, summary_table
    from .measures import RecipeSummary, Rung, Switch, ladder, summarize, switches
    from .numerics import LayerMap, heat_map, numerics_of, worst_layers
    from .plots import HeatMap, Plot, plots
    from .runs import Run, Settings, find_runs
    from .statistics import CONFIDENCE
    from .tables import Cell, Table, shown, tables
    from .words import Verdict, limits, verdict
except ImportError as missing:
    raise SystemExit(f"error: {missing}: pip install 'narrowgauge[report]'") from missing

_RUN_COLUMNS = (
    *("run", "recipe", "model", "data", "lr", "seed", "state", "step", "final_loss", "diverged_at", "spikes"),
    *("sharpness", "corrupt_lines", "config", "tokens_per_second", "seconds"),
)


_FORMULAS = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\\t", "\\r")  # noqa: RUF001 - full width counts, too
_MARKUP = re.compile(r"[\\`|*~]|](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])")  # inside of a word an underscore is one
_TO_HTML = str.maketrans("<>&`", ",:./")
DIGITS = f"{string.digits}{string.ascii_uppercase}{string.ascii_lowercase}!#$%&()*+-;<=>?@^_`{{|}}~".translate(_TO_HTML)
"""Those of ``base64.b85encode``, as ``pack`` writes them."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is written, before it is."""

    settings: Settings
    runs: Sequence[Run]
    recipes: Sequence[RecipeSummary]
    rungs: Sequence[Rung]
    switches: Sequence[Switch]
    verdicts: Sequence[Verdict]
    limits: Sequence[str]
    tables: Sequence[Table]
    plots: Sequence[Plot | HeatMap | LayerMap]


def write_report(
    directories: Sequence[Path], out: Path, settings: Settings, formats: Sequence[str] = ("png",)
) -> dict[str, Any]:
    """Write ``report.{html,md,tex}, summary.{csv,json,tex}`` and figures into ``out``; gives back the summary.

    ``formats``: of the figures, of FORMATS; PNG, which report.md shows, is always written.
    Raises UserError if a directory is not there, or none holds a run, or for another format.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise UserError(f"formats={unknown[0]}: of {', '.join(FORMATS)}{close(unknown[0], FORMATS)}")
    report = make_report(find_runs(directories, settings), settings)
    summary = summarized(report)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "summary.json", summary)
        write_text(out / "summary.csv", _csv(report.runs))
        write_text(out / "report.md", _markdown(report))
        brief = summary_table(report.recipes, settings)
        write_text(out / "summary.tex", brief)
        kind = "pdf" if "pdf" in formats else "png"
        figures = [(f"{plot.name}.{kind}", plot.title, plot.note) for plot in report.plots]
        write_text(out / "report.tex", document(report.tables, figures, _show, brief))
        write_text(out / "report.html", _html(report))
        for plot in report.plots:
            file, kinds = out / f"{plot.name}.png", sorted({"png", *formats})
            plot.save(file, kinds) if isinstance(plot, LayerMap) else save_plot(plot, file, kinds)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    return summary


def make_report(runs: Sequence[Run], settings: Settings) -> Report:
    """Measured, put into words, tables and plots."""
    recipes = summarize(runs, settings)
    rungs, switched = ladder(runs, recipes, settings), switches(runs)
    numerics = numerics_of((run.recipe, run.path) for run in runs)
    maps = [LayerMap(name=f"numerics-{n}", recipe=r, numerics=each) for n, (r, each) in enumerate(numerics.items(), 1)]
    worst = Table(**worst_layers(numerics))
    return Report(
        settings=settings,
        runs=runs,
        recipes=recipes,
        rungs=rungs,
        switches=switched,
        verdicts=[verdict(summary, settings) for summary in recipes],
        limits=limits(runs, recipes, settings),
        tables=[shown(table) for table in (*tables(runs, recipes, rungs, switched, settings), worst) if table.rows],
        plots=[*plots(runs, recipes, rungs), *maps],
    )


def summarized(report: Report) -> dict[str, Any]:
    """All numbers; what a clock has a part in stands under ``times``, so that the rest is the same after a restart."""
    settings = report.settings
    return {
        "settings": {
            "baseline": settings.baseline,
            "margin": settings.margin,
            "within": settings.within,
            "target_at": settings.target_at,
            "rule": str(settings.rule),
            "confidence": CONFIDENCE,
        },
        "recipes": {s.recipe: _numbers(s) for s in report.recipes},
        "ladder": [
            {"exponent": r.exponent, "mantissa": r.mantissa, "rounding": r.rounding, "recipe": r.summary.recipe}
            for r in report.rungs
        ],
        "ingredients": [switch._asdict() for switch in report.switches],
        "runs": {
            run.name: {
                "recipe": run.recipe,
                "lr": run.lr if run.values else None,
                "seed": run.seed if run.values else None,
                "state": run.state,
                "step": run.step,
                "final_loss": run.final,
                "diverged_at": run.diverged_at,
                "spikes": run.num_spikes,
                "sharpness": run.evals.get("sharpness"),
                "corrupt_lines": run.corrupt,
                "config": run.config_hash if run.values else None,
            }
            for run in report.runs
        },
        "limits": list(report.limits),
        "times": {
            "tokens_per_second": {s.recipe: s.tokens_per_second for s in report.recipes},
            "seconds": {run.name: run.seconds for run in report.runs},
            "emulated": any(s.emulated for s in report.recipes),
            "verdicts": {one.recipe: str(one) for one in report.verdicts},
        },
    }


def _numbers(s: RecipeSummary) -> dict[str, Any]:
    apart = ("recipe", "tokens_per_second", "emulated", "equivalence", "rates", "progress")
    values = {field.name: getattr(s, field.name) for field in fields(s) if field.name not in apart}
    p, equivalent = s.equivalence or (None, None)
    progress = {name: value for name, value in s.progress._asdict().items() if name != "pairs"}
    return values | {"equivalence_p": p, "equivalent": equivalent} | s.rates._asdict() | progress


def _csv(runs: Sequence[Run]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_RUN_COLUMNS)
    for run in runs:
        names = [run.values.get("model.name"), run.values.get("data.name")]
        own = [run.lr, run.seed] if run.values else [None, None]
        sharpness = list(run.evals.get("sharpness", {0: None}).values())[-1]
        counts = [run.diverged_at, run.num_spikes, sharpness, len(run.corrupt)]
        others = [run.config_hash if run.values else None, run.tokens_per_second, run.seconds]
        row = [run.name, run.recipe, *names, *own, run.state, run.step, run.final, *counts, *others]
        writer.writerow([_csv_cell(cell) for cell in row])
    return text.getvalue()


def _csv_cell(cell: Any) -> Any:
    """A spreadsheet takes a text that begins like these for a formula, and runs it."""
    if cell is None or isinstance(cell, int | float):
        return cell
    text = printable(str(cell))
    return f"'{text}" if text.lstrip().startswith(_FORMULAS) else text


def _show(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        if cell >= 1000 and cell == int(cell):
            return f"{cell:,.0f}"
        return f"{cell:.4f}" if 0.01 <= abs(cell) < 1000 or cell == 0 else f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _is_text(cell: Cell) -> bool:
    return isinstance(cell, str) and re.fullmatch(r"[-+.,\de]+", cell) is None


def _markdown(report: Report) -> str:
    lines = ["# Which recipe, and what it costs", ""]
    lines += [f"- **{_md(one.recipe)}: {_md(one.headline)}.** {_md(_sentence(one.details))}" for one in report.verdicts]
    lines += ["", "## What these runs cannot say", "", *(f"- {_md(limit)}" for limit in report.limits)]
    for table in report.tables:
        lines += ["", f"## {_md(table.title)}", "", _md(table.note), ""]
        lines += ["| " + " | ".join(map(_md, table.columns)) + " |", "|" + "---|" * len(table.columns)]
        lines += ["| " + " | ".join(_md(_show(cell)) for cell in row) + " |" for row in table.rows]
    lines += ["", "## Plots"]
    for plot in report.plots:
        title = _md(plot.title)
        lines += ["", f"{title}. {_md(plot.note)}".strip(), "", f"![{title}]({plot.name}.png)"]
    return "\n".join(lines) + "\n"


def _md(text: str) -> str:
    """Text of one line that Markdown shows as it is: no tag, link, code, cell or emphasis begins in it."""
    return _MARKUP.sub(r"\\\g<0>", html.escape(printable(text), quote=False))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _html(report: Report) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    figures = [
        heat_map(plot.name, plot.numerics) if isinstance(plot, LayerMap) else to_plotly(plot) for plot in report.plots
    ]
    return environment.get_template("report.html.j2").render(
        report=report,
        show=_show,
        is_text=_is_text,
        sentence=_sentence,
        packed=pack(f"window.figures = {json.dumps(figures, allow_nan=False)};\n{get_plotlyjs()}"),
        digits=DIGITS,
    )


def pack(script: str) -> str:
    """gzip in base 85, in digits that mean nothing to HTML; the page unpacks it."""
    return base64.b85encode(gzip.compress(script.encode(), mtime=0)).decode().translate(_TO_HTML)
