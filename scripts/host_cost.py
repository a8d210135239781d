"""Host time, launches and copies of a quantized linear: python scripts/host_cost.py [rev=REV] [recipes=nvfp4,mxfp8]

[steps=20] [names=false] [json=FILE]

Per linear and recipe, forward and backward, on a machine without a GPU: what the host spends before kernels run, how
many Triton kernels, products and other torch kernels it launches, and how often host and device wait for each other.
With ``rev`` before and after, as ``before -> after``: each revision in a process of its own, one after the other.
``names`` adds which kernels and copies of torch those are. x is read by one linear, or by three that share what can be
shared; figures are those of one. Exit code 1 if a recipe fails. How it is measured, and what is not:
scripts/host_cost_measure.py.
"""

import json as json_module
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.errors import ExitCode, UserError
from whole_runs import check_out

ROOT = Path(__file__).resolve().parents[1]
RECIPES = "fp8_delayed,fp8_current,fp8_rowwise,fp8_rowwise_gw_hp,fp8_block,mxfp8,mxfp4,nvfp4"
COLUMNS = {
    "launches": "Triton launches",
    "products": "products",
    "kernels": "torch kernels",
    "copies": "waits",
    "at_end": "at a step's end",
}


def main(
    overrides: list[str],
    *,
    rev: str = "",
    recipes: str = RECIPES,
    steps: int = 20,
    names: str = "false",
    json: str = "",
) -> None:
    if overrides:
        raise UserError(f"unknown argument {overrides[0]!r}; --help shows the ones there are")
    if unknown := [name for name in recipes.split(",") if name not in RECIPES.split(",")]:
        raise UserError(f"recipes={unknown[0]}: of {RECIPES}")
    if names not in ("true", "false"):
        raise UserError(f"names={names}: true or false")
    with tempfile.TemporaryDirectory(prefix="host_cost_") as temporary:
        sides = []
        if rev:
            check_out(ROOT, rev, Path(temporary) / "revision")
            sides.append(measured(Path(temporary) / "revision", recipes, steps))
        sides.append(measured(ROOT, recipes, steps))
    if json:
        Path(json).write_text(
            json_module.dumps(dict(zip([rev, "here"][-len(sides) :], sides, strict=True)), indent=1), encoding="utf-8"
        )
    print(table(sides))
    for row in sides[-1]:
        if names == "true" and "names" in row:
            each = ", ".join(f"{count} {name}" for name, count in sorted(row["names"].items()))
            print(f"{row['recipe']}, {row['linears']} linears together: {each}")
        if row.get("unseen"):
            print(f"{row['recipe']}: not looked into: {', '.join(row['unseen'])}")
    return ExitCode.FAILED if any("error" in row for rows in sides for row in rows) else ExitCode.FINISHED


def measured(tree: Path, recipes: str, steps: int) -> list[dict[str, Any]]:
    """The rows of the revision in ``tree``, of a process of its own."""
    path = os.pathsep.join([str(tree / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(prefix="host_cost_") as temporary:
        out = Path(temporary) / "rows.json"
        command = [sys.executable, str(ROOT / "scripts" / "host_cost_measure.py"), str(out), recipes, str(steps)]
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise UserError(f"{tree}: {(result.stderr.strip().splitlines() or ['no output'])[-1]}")
        rows: list[dict[str, Any]] = json_module.loads(out.read_text(encoding="utf-8"))
    return rows


def table(sides: list[list[dict[str, Any]]]) -> str:
    """A row for each recipe and number of linears that share an x; figures are those of one linear."""
    lines = [
        f"| recipe | linears of one x | {' | '.join(COLUMNS.values())} | host us | products by |",
        f"|---|---|{'---|' * len(COLUMNS)}---|---|",
    ]
    for rows in zip(*sides, strict=True):
        cells = [rows[-1]["recipe"], str(rows[-1]["linears"])]
        if failed := next((row["error"] for row in rows if "error" in row), None):
            lines.append(f"| {' | '.join(cells)} | {failed} |")
            continue
        cells += [" -> ".join(f"{row[key]:.3g}" for row in rows) for key in COLUMNS]
        cells.append(" -> ".join(f"{row['host_us']:,.0f}" for row in rows))
        lines.append(f"| {' | '.join(cells)} | {rows[-1]['backends']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    script_main(main, __doc__)
