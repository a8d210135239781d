"""Tables as LaTeX, with booktabs: one for a paper's text, and all of them with the figures as a document."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from ..environ import printable
from .measures import RecipeSummary
from .runs import Settings
from .tables import Cell, Table

_ROWS = 40  # of a table on one page
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?")
_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    # After the end of a row these would be an argument of it.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "±": r"$\pm$",
    "\u00d7": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
} | {char: f"\\{char}" for char in "&%$#_{}"}
_PREAMBLE = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage{textcomp}
\usepackage[margin=2cm]{geometry}
\usepackage{booktabs,graphicx}
\begin{document}
"""


def escaped(text: str) -> str:
    """``text`` as LaTeX shows it: no command, formula or cell begins in it. What pdflatex lacks stands as its code."""
    shown = "".join(map(_as_latex, printable(text)))
    return re.sub("([-',])(?=\\1)", r"\1{}", shown)  # two of them are another character


def _as_latex(char: str) -> str:
    """T1 has ASCII, and Latin letters with accents."""
    known = char.isascii() or ("\u00c0" <= char <= "\u017f" and char.isalpha() and char not in "Ŀŀŉſ")
    return _ESCAPES.get(char) or (char if known else rf"\texttt{{U+{ord(char):04X}}}")


def summary_table(recipes: Sequence[RecipeSummary], settings: Settings) -> str:
    """What a paper says of the recipes, for its text to put in; it needs booktabs and graphicx."""
    columns = ["recipe", "validation loss", f"gap to {settings.baseline}", "95% interval", "diverged", "tokens/s"]
    rows = []
    for s in recipes:
        loss = "" if s.final_loss_mean is None else f"${s.final_loss_mean:.4f}$"
        if s.final_loss_mean is not None and s.final_loss_sd is not None:
            loss = rf"${s.final_loss_mean:.4f} \pm {s.final_loss_sd:.4f}$"
        gap = "" if s.gap_mean is None else f"${s.gap_mean:+.4f}$"
        interval = "" if s.gap_interval is None else f"$[{s.gap_interval.low:+.4f}, {s.gap_interval.high:+.4f}]$"
        speed = "" if s.tokens_per_second is None else f"{s.tokens_per_second:,.0f}" + ("*" if s.emulated else "")
        cells = [loss, gap, interval, f"{s.diverged} of {s.decided}", escaped(speed)]
        rows.append([escaped(s.recipe), *(cell or "--" for cell in cells)])
    note = (
        r"Validation loss in nats per token at the end of runs that finished: mean $\pm$ standard deviation over "
        f"seeds. Gap: to the {escaped(settings.baseline)} run of the same config and seed, mean over pairs, with its "
        "bootstrap interval."
    )
    if any(s.emulated for s in recipes):
        note += " {*}: emulated, this machine's speed."
    return _float(note, "recipes", columns, rows, "lrrrrr")


def document(
    tables: Sequence[Table], figures: Sequence[tuple[str, str, str]], show: Callable[[Cell], str], summary: str
) -> str:
    """A document that compiles by itself. ``figures``: file, title, note."""
    parts = [_PREAMBLE + summary]
    for number, table in enumerate(tables, 1):
        aligned = [
            "r" if all(_is_number(show(row[at])) for row in table.rows) else "l" for at in range(len(table.columns))
        ]
        rows = [[_cell(show(cell)) for cell in row] for row in table.rows]
        for part in range(math.ceil(len(rows) / _ROWS)):
            some = rows[part * _ROWS : (part + 1) * _ROWS]
            caption = f". {escaped(table.note)}" if part == 0 else ", continued."
            name = f"table-{number}-{part + 1}"
            parts.append(_float(escaped(table.title) + caption, name, table.columns, some, "".join(aligned)))
    for file, title, note in figures:
        parts.append(
            "\\begin{figure}[tbp]\n\\centering\n"
            f"\\includegraphics[width=\\linewidth,height=0.8\\textheight,keepaspectratio]{{{file}}}\n"
            f"\\caption{{{escaped(f'{title}. {note}'.strip())}}}\n\\end{{figure}}\n"
        )
    # A page for each: LaTeX holds back only so many that find no place.
    return "\n\\clearpage\n".join(parts) + "\n\\end{document}\n"


def _float(caption: str, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], aligned: str) -> str:
    lines = [
        r"\begin{table}[tbp]",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{tab:{name}}}",
        # As wide as it is, up to the page.
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{aligned}}}",
        r"\toprule",
        " & ".join(map(escaped, columns)) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    if text == "-":
        return "--"
    if not _NUMBER.fullmatch(text):
        return escaped(text)
    mantissa, _, exponent = text.partition("e")
    power = rf" \times 10^{{{int(exponent)}}}" if exponent else ""
    return f"${mantissa.replace(',', '{,}')}{power}$"


def _is_number(text: str) -> bool:
    return text == "-" or _NUMBER.fullmatch(text) is not None
