"""Reports of made-up run directories with known answers."""

from __future__ import annotations

import csv
import html
import html.parser
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from trainer.config import load_config
from trainer.errors import UserError
from trainer.report import Settings, write_report

SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"
BASE = {seed: 3 + 0.01 * seed for seed in range(3)}
CHROMIUM = shutil.which("chromium")
_CONFIGS: dict[str, str] = {}


def make_run(
    root: Path,
    recipe: str = "bf16",
    seed: int = 0,
    lr: float = 1e-3,
    final: float | None = 3.0,
    status: str | None = "finished",
    losses: list[float | None] | None = None,
) -> Path:
    """A run directory as the trainer leaves it, without checkpoints."""
    path = root / f"optim.lr={lr},precision={recipe},seed={seed}"
    path.mkdir(parents=True)
    if recipe not in _CONFIGS:
        _CONFIGS[recipe] = load_config([f"precision={recipe}"]).to_yaml()
    text = _CONFIGS[recipe].replace("\nseed: 0\n", f"\nseed: {seed}\n").replace("  lr: 0.003\n", f"  lr: {lr}\n")
    (path / "config.yaml").write_text(text)
    (path / "env.json").write_text(json.dumps({"device": "cpu", "world_size": 1, "revision": "abc"}))
    losses = losses if losses is not None else [8 - 5 * step / 20 for step in range(20)]
    rows = [
        {"kind": "train", "step": step, "tokens": step * 8192, "loss": loss, "tokens_per_second": 1000.0}
        for step, loss in enumerate(losses, 1)
    ]
    if final is not None:
        rows.append({"kind": "eval", "step": len(losses), "loss": final})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if status is not None:
        (path / "done.json").write_text(json.dumps({"status": status, "step": len(losses), "reason": ""}))
    return path


def test_gaps_are_paired_by_seed_and_learning_rate(tmp_path: Path) -> None:
    gaps = {(seed, lr): 0.1 + 0.01 * seed + lr for seed in BASE for lr in (1e-3, 4e-3)}
    for (seed, lr), gap in gaps.items():
        make_run(tmp_path, "bf16", seed, lr, BASE[seed] + 50 * lr)
        make_run(tmp_path, "mxfp8", seed, lr, BASE[seed] + 50 * lr + gap)
    summary = write_report([tmp_path], tmp_path, Settings())
    told = summary["recipes"]["mxfp8"]
    assert told["gap_mean"] == pytest.approx(sum(gaps.values()) / 6)
    assert sorted(told["gaps"]) == pytest.approx(sorted(gaps.values()))
    assert min(gaps.values()) < told["gap_interval"][0] < told["gap_mean"] < told["gap_interval"][1]
    assert told["sign_test_p"] == stats.binomtest(6, 6).pvalue
    # Seeds spread alike at both rates: sd 0.01, four degrees of freedom.
    assert told["seed_noise_band"] == pytest.approx(stats.t.ppf(0.975, 4) * 0.01 * math.sqrt(2 / 6))
    assert told["usable_lr_decades"] == 0.0  # 0.15 nats apart, more than 0.1
    assert "beyond the seed noise" in summary["times"]["verdicts"]["mxfp8"]
    rate = stats.binomtest(0, 6).proportion_ci(method="wilson")
    assert told["divergence_rate_interval"] == pytest.approx((rate.low, rate.high))


def test_identical_recipes_have_no_gap(tmp_path: Path) -> None:
    for seed in BASE:
        make_run(tmp_path, "bf16", seed, final=BASE[seed])
        make_run(tmp_path, "mxfp8", seed, final=BASE[seed])
    summary = write_report([tmp_path], tmp_path, Settings())
    told = summary["recipes"]["mxfp8"]
    assert (told["gap_mean"], told["gap_interval"], told["equivalent"]) == (0.0, (0.0, 0.0), True)
    assert "every digit" in summary["times"]["verdicts"]["mxfp8"]


def test_a_gap_smaller_than_seed_noise_is_said_to_be(tmp_path: Path) -> None:
    for seed in BASE:
        make_run(tmp_path, "bf16", seed, final=3 + 0.5 * seed)
        make_run(tmp_path, "mxfp8", seed, final=3 + 0.5 * seed + 0.01)
    verdict = write_report([tmp_path], tmp_path, Settings())["times"]["verdicts"]["mxfp8"]
    assert "within seed noise" in verdict
    assert "diverged 0 of 3" in verdict
    assert "emulated" in verdict


def test_diverged_runs_are_counted_and_never_dropped(tmp_path: Path) -> None:
    for seed in BASE:
        make_run(tmp_path, "bf16", seed, final=BASE[seed])
    make_run(tmp_path, "mxfp4", 0, status="diverged", final=None, losses=[8.0, 7.0, None, None])
    make_run(tmp_path, "mxfp4", 1, status="finished", final=9.0, losses=[4.0] * 50 + [9.0] * 50)  # by the rule
    make_run(tmp_path, "mxfp4", 2, status="diverged", final=None, losses=[8.0, 7.0])
    summary = write_report([tmp_path], tmp_path, Settings())
    told = summary["recipes"]["mxfp4"]
    assert (told["diverged"], told["decided"], told["gaps"], told["gap_mean"]) == (3, 3, [], None)
    assert told["times_to_divergence"] == [2, 3, 53]
    rate = stats.binomtest(3, 3).proportion_ci(method="wilson")
    assert told["divergence_rate_interval"] == pytest.approx((rate.low, rate.high))
    assert "diverged 3 of 3" in (tmp_path / "report.md").read_text()
    assert sum(row["state"] == "diverged" for row in csv.DictReader((tmp_path / "summary.csv").open())) == 3


def test_everything_diverged(tmp_path: Path) -> None:
    for recipe in ("bf16", "mxfp4"):
        for seed in range(2):
            make_run(tmp_path, recipe, seed, status="diverged", final=None, losses=[8.0, None])
    summary = write_report([tmp_path], tmp_path, Settings())
    assert all(told["diverged"] == told["decided"] == 2 for told in summary["recipes"].values())
    assert all(told["gap_mean"] is None for told in summary["recipes"].values())


def test_a_partial_sweep(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path, "bf16", seed, final=BASE[seed])
    for seed in BASE:  # the partner of seed 2 is missing
        make_run(tmp_path, "mxfp8", seed, final=BASE[seed] + 0.1)
    make_run(tmp_path, "nvfp4", 0, status=None, final=None, losses=[8.0, None])  # running: it may recover
    make_run(tmp_path, "nvfp4", 1, status="stopped", final=None)
    (tmp_path / "precision=nvfp4,seed=2").mkdir()
    (tmp_path / "precision=nvfp4,seed=2" / "console.log").write_text("error: no such corpus\n")
    summary = write_report([tmp_path], tmp_path, Settings())
    assert len(summary["recipes"]["mxfp8"]["gaps"]) == 2
    assert summary["recipes"]["mxfp8"]["unpaired"] == 1
    assert summary["recipes"]["nvfp4"]["decided"] == 0
    assert sorted(run["state"] for run in summary["runs"].values() if run["state"] != "finished") == [
        "not started",
        "stopped",
        "unfinished",
    ]
    assert "missing" in (tmp_path / "report.md").read_text()
    assert any(limit.startswith("3 runs not over") for limit in summary["limits"])


def test_corrupt_lines_are_named_skipped_and_counted(tmp_path: Path) -> None:
    path = make_run(tmp_path, "bf16", 0)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines[4:4] = ["{broken", '"no row"']
    (path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tra')
    summary = write_report([tmp_path], tmp_path, Settings())
    run = summary["runs"][path.name]
    assert run["corrupt_lines"] == [5, 6, 23 + 1]
    assert (run["final_loss"], run["step"]) == (3.0, 20)
    assert any(f"{path.name}/metrics.jsonl: 3 corrupt lines skipped, number 5, 6, 24" in x for x in summary["limits"])


def test_nothing_to_report_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directories in"):
        write_report([tmp_path], tmp_path, Settings())
    with pytest.raises(UserError, match="not a directory"):
        write_report([tmp_path / "nowhere"], tmp_path, Settings())
    make_run(tmp_path)
    with pytest.raises(UserError, match="did you mean 'bf16'"):
        write_report([tmp_path], tmp_path, Settings(baseline="bf61"))


def test_the_arguments_of_a_recipe_tell_runs_apart(tmp_path: Path) -> None:
    make_run(tmp_path, "exmy_e8m5", 0)
    other = make_run(tmp_path, "exmy_e8m5", 1) / "config.yaml"
    other.write_text(other.read_text().replace("mantissa_bits: 5", "mantissa_bits: 4"))
    names = write_report([tmp_path], tmp_path, Settings())["recipes"]
    assert list(names) == ["exmy_e8m5 (mantissa_bits=4)", "exmy_e8m5 (mantissa_bits=5)"]


def test_the_summary_does_not_depend_on_where_and_in_which_order_runs_lie(tmp_path: Path) -> None:
    for order, name in ((1, "a"), (-1, "b")):
        for seed in list(BASE)[::order]:
            make_run(tmp_path / name, "mxfp8", seed, final=BASE[seed] + 0.02)
            make_run(tmp_path / name, "bf16", seed, final=BASE[seed])
        write_report([tmp_path / name], tmp_path / name, Settings())
    texts = [(tmp_path / name / "summary.json").read_text() for name in "ab"]
    assert texts[0] == texts[1]


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tables = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tables += tag == "table"
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    for seed in BASE:
        make_run(tmp_path, "bf16", seed, final=BASE[seed])
        make_run(tmp_path, "mxfp8", seed, final=BASE[seed] + 0.02 * seed)
    write_report([tmp_path], tmp_path, Settings())
    return tmp_path / "report.html"


def test_the_page_loads_nothing(page: Path) -> None:
    parser = _Page()
    parser.feed(page.read_text())
    assert parser.addresses == ["data:,"]
    assert parser.tables == 4
    assert all((page.parent / f"{name}.png").stat().st_size > 5000 for name in ("losses", "gaps", "rates"))


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_in_chromium(page: Path, tmp_path: Path) -> None:
    script = """<script>addEventListener("load", () => setTimeout(() => {
        const heading = [...document.querySelectorAll("th")].find(th => th.textContent === "validation loss");
        const rows = heading.closest("table").tBodies[0].rows;
        const read = () => [...rows].map(row => row.cells[heading.cellIndex].textContent);
        heading.click(); const up = read(); heading.click(); const down = read();
        document.title = JSON.stringify({up, down, errors: window.seen,
            plots: document.querySelectorAll(".plot .main-svg").length,
            drawn: document.querySelectorAll(".plot .point, .plot .js-line").length,
            loaded: performance.getEntriesByType("resource").map(entry => entry.name),
            wide: document.documentElement.scrollWidth > innerWidth});
    }, 300));</script>"""
    text = page.read_text().replace("<head>", "<head><script>seen = []; onerror = m => seen.push(m);</script>", 1)
    page.write_text(text.replace("</body>", script + "</body>"))
    for width in (1280, 400):
        told = _title_in_chromium(page, tmp_path / f"profile-{width}", width)
        assert told["errors"] == []
        assert told["loaded"] == []
        assert told["plots"] >= 3
        assert told["drawn"] >= 3
        assert told["up"] == told["down"][::-1] == sorted(told["up"])
        assert not told["wide"]


def _title_in_chromium(page: Path, profile: Path, width: int) -> dict:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    command += [f"--user-data-dir={profile}", f"--window-size={width},900", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = result.stdout.partition("<title>")[2].partition("</title>")[0]
    return json.loads(html.unescape(title))


def test_the_script_writes_beside_the_runs(page: Path) -> None:
    result = subprocess.run(
        [sys.executable, SCRIPT, str(page.parent), "margin=0.1"], capture_output=True, text=True, check=True
    )
    assert "mxfp8: gap to bf16 +0.0200 nats" in result.stdout
    assert json.loads((page.parent / "summary.json").read_text())["settings"]["margin"] == 0.1
