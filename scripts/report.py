"""Which recipe, and what it costs, from run directories: python scripts/report.py DIR... [out=DIR] [baseline=bf16]

Reads every run below the directories, of a sweep that is not over too, and writes report.html (one file, no network),
report.md, summary.csv, summary.json and figures into out, which is the first DIR where it is not given. For a paper:
summary.tex is a table to \\input (booktabs), report.tex a document with all tables and figures. margin=0.02: nats that
count as no difference. formats=png,svg,pdf: of the figures.
"""

from pathlib import Path

from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.errors import UserError
from narrowgauge.trainer.reporting.report import Settings, write_report


def main(
    directories: list[str], *, out: str = "", baseline: str = "bf16", margin: float = 0.02, formats: str = "png,svg,pdf"
) -> None:
    if not directories:
        raise UserError("name the directory of a sweep, or of runs: python scripts/report.py multirun/example")
    if margin <= 0:
        raise UserError(f"margin={margin:g}: must be more than 0 nats")
    target = Path(out or directories[0])
    settings = Settings(baseline=baseline, margin=margin)
    summary = write_report(
        [Path(text) for text in directories],
        target,
        settings,
        [name.strip() for name in formats.split(",") if name.strip()],
    )
    for recipe, verdict in summary["times"]["verdicts"].items():
        print(f"{recipe}: {verdict}")
    for limit in summary["limits"]:
        print(f"- {limit}")
    print(f"report: {target / 'report.html'}")


if __name__ == "__main__":
    script_main(main, __doc__)
