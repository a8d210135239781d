"""Reports of made-up run directories with known answers."""

from __future__ import annotations

import csv
import html.parser
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from chromium import CHROMIUM, browser
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.errors import UserError
from narrowgauge.trainer.reporting.drawing import save_plot, to_plotly
from narrowgauge.trainer.reporting.figures import plot_losses, smooth
from narrowgauge.trainer.reporting.latex import escaped
from narrowgauge.trainer.reporting.numerics import heat_map
from narrowgauge.trainer.reporting.plots import HeatMap, Kind, Mark, Plot, Style
from narrowgauge.trainer.reporting.report import Report, Settings, _md, find_runs, make_report, summarized, write_report
from omegaconf import OmegaConf
from scipy import stats

SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"
TOKENS = 8 * 256  # of a step
BASE = {seed: 3 + 0.01 * seed for seed in range(3)}
PLAN = """parameters float32, compute bfloat16, gradient reduction float32
update AdamW(fused=True)
layers.0.self_attn.q_proj                       256 -> 256
    fprop: e4m3/1x32/e8m0-rceil x e4m3/1x32/e8m0-rceil  [cpu]
    dgrad: high precision (torch)
    wgrad: e4m3/1x32/e8m0-rceil x e4m3/1x32/e8m0-rceil [hadamard16]  [reference (not cpu: no kernel), fp32 product]
lm_head                                         256 -> 4096    fprop, dgrad, wgrad: bfloat16 (torch)
"""
ENV = {"device": "cpu", "world_size": 1, "revision": "abc", "parameters": 1234, "data": "f00d"}
ENV |= {
    "packages": {"torch": "2.13.0"},
    "python": "3.11",
    "state_bytes": {"weights": 4e6, "optimizer": 8e6, "recipe": 0},
}
_CONFIGS: dict[str, str] = {}


def make_run(
    root: Path,
    recipe: str = "bf16",
    seed: int = 0,
    lr: float = 1e-3,
    final: float | None = 3.0,
    status: str | None = "finished",
    losses: Sequence[float | None] | None = None,
    arguments: str = "",
    **rows_too: Any,
) -> Path:
    """A run directory as the trainer leaves it, without checkpoints. ``rows_too``: keys of every row."""
    path = root / f"optim.lr={lr},precision={recipe},seed={seed}{arguments}"
    path.mkdir(parents=True)
    made = recipe + arguments
    if made not in _CONFIGS:
        _CONFIGS[made] = load_config([f"precision={recipe}", *arguments.split()]).to_yaml()
    text = _CONFIGS[made].replace("\nseed: 0\n", f"\nseed: {seed}\n").replace("  lr: 0.003\n", f"  lr: {lr}\n")
    (path / "config.yaml").write_text(text)
    (path / "env.json").write_text(json.dumps(ENV))
    (path / "plan.txt").write_text(PLAN if recipe != "bf16" else PLAN.splitlines()[-1])
    losses = losses if losses is not None else [8 - 5 * step / 20 for step in range(20)]
    rows = [
        {"kind": "train", "step": step, "loss": loss, "tokens_per_second": 1000.0, "grad_norm": 1 / step} | rows_too
        for step, loss in enumerate(losses, 1)
    ]
    if final is not None:
        half = {"kind": "eval", "step": len(losses) // 2, "loss": final + 1, "sharpness": 0.5 + seed}
        rows += [half, half | {"step": len(losses), "loss": final, "sharpness": 0.25 + seed}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if status is not None:
        (path / "done.json").write_text(json.dumps({"status": status, "step": len(losses), "reason": ""}))
    return path


def report_of(*directories: Path, **settings: Any) -> Report:
    told = Settings(**settings)
    return make_report(find_runs(directories, told), told)


def summary_of(*directories: Path, **settings: Any) -> dict[str, Any]:
    """As ``summary.json`` has it, without a file written."""
    summary: dict[str, Any] = summarized(report_of(*directories, **settings))
    return summary


def rows_of(report: Report, title: str) -> list[dict[str, Any]]:
    table = next(table for table in report.tables if table.title.startswith(title))
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_gaps_are_paired_by_seed_and_learning_rate(tmp_path: Path) -> None:
    gaps = {(seed, lr): 0.1 + 0.01 * seed + lr for seed in BASE for lr in (1e-3, 4e-3)}
    for (seed, lr), gap in gaps.items():
        make_run(tmp_path, "bf16", seed, lr, BASE[seed] + 50 * lr)
        make_run(tmp_path, "mxfp8", seed, lr, BASE[seed] + 50 * lr + gap)
    summary = summary_of(tmp_path)
    told = summary["recipes"]["mxfp8"]
    assert told["gap_mean"] == pytest.approx(sum(gaps.values()) / 6)
    assert sorted(told["gaps"]) == pytest.approx(sorted(gaps.values()))
    assert min(gaps.values()) < told["gap_interval"][0] < told["gap_mean"] < told["gap_interval"][1]
    assert told["sign_test_p"] == stats.binomtest(6, 6).pvalue
    # Seeds spread alike at both rates: sd 0.01, four degrees of freedom.
    assert told["seed_noise_band"] == pytest.approx(stats.t.ppf(0.975, 4) * 0.01 * math.sqrt(2 / 6))
    sample = (sorted(gaps.values()),)
    theirs = stats.bootstrap(sample, np.mean, method="percentile", n_resamples=9999, rng=0).confidence_interval
    assert told["gap_interval"] == pytest.approx((theirs.low, theirs.high), abs=1e-3)
    tests = [stats.ttest_1samp(sample[0], m, alternative=a).pvalue for m, a in ((-0.02, "greater"), (0.02, "less"))]
    assert told["equivalence_p"] == pytest.approx(max(tests))
    assert told["final_loss_sd"] == pytest.approx(0.02)  # the gap grows by 0.01 a seed, too
    assert told["usable_lr_decades"] == 0.0  # 0.15 nats apart, more than 0.1
    assert "worse than bf16, beyond its seed noise" in summary["times"]["verdicts"]["mxfp8"]
    rate = stats.binomtest(0, 6).proportion_ci(method="wilson")
    assert told["divergence_rate_interval"] == pytest.approx((rate.low, rate.high))


def test_identical_recipes_have_no_gap(tmp_path: Path) -> None:
    for seed in BASE:
        make_run(tmp_path, "bf16", seed, final=BASE[seed])
        make_run(tmp_path, "mxfp8", seed, final=BASE[seed])
    summary = summary_of(tmp_path)
    told = summary["recipes"]["mxfp8"]
    assert (told["gap_mean"], told["gap_interval"], told["equivalent"]) == (0.0, (0.0, 0.0), True)
    assert (told["tokens_to_target_ratio"], told["loss_ratio"], told["reached_target"]) == (1.0, 1.0, 3)
    assert "every digit" in summary["times"]["verdicts"]["mxfp8"]


def test_a_gap_smaller_than_seed_noise_is_said_to_be(tmp_path: Path) -> None:
    for seed in BASE:
        make_run(tmp_path, "bf16", seed, final=3 + 0.5 * seed)
        make_run(tmp_path, "mxfp8", seed, final=3 + 0.5 * seed + 0.01)
    verdict = summary_of(tmp_path)["times"]["verdicts"]["mxfp8"]
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
    assert told["tokens_to_divergence"] == 3 * TOKENS
    rate = stats.binomtest(3, 3).proportion_ci(method="wilson")
    assert told["divergence_rate_interval"] == pytest.approx((rate.low, rate.high))
    assert "diverged 3 of 3" in (tmp_path / "report.md").read_text()
    assert sum(row["state"] == "diverged" for row in csv.DictReader((tmp_path / "summary.csv").open())) == 3


def test_everything_diverged(tmp_path: Path) -> None:
    for recipe in ("bf16", "mxfp4"):
        for seed in range(2):
            make_run(tmp_path, recipe, seed, status="diverged", final=None, losses=[8.0, None])
    summary = summary_of(tmp_path)
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
    summary = summary_of(tmp_path)
    run = summary["runs"][path.name]
    assert run["corrupt_lines"] == [5, 6, 24 + 1]
    assert (run["final_loss"], run["step"]) == (3.0, 20)
    assert any(f"{path.name}/metrics.jsonl: 3 corrupt lines skipped, number 5, 6, 25" in x for x in summary["limits"])


def test_spikes_that_the_trainer_met_are_said(tmp_path: Path) -> None:
    path = make_run(tmp_path, "bf16", 0)
    rows = [
        {"kind": "spike", "step": step, "action": action, "samples": [8 * step, 8 * step + 7]}
        for step, action in ((3, "skip"), (7, "rollback"), (7, "rollback"), (9, "rollback"))  # 7: met again
    ]
    with (path / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    assert f"{path.name}: train.spike met 3 spikes (rollback 2, skip 1)." in summary_of(tmp_path)["limits"]


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
    names = summary_of(tmp_path)["recipes"]
    assert list(names) == ["exmy_e8m5 (mantissa_bits=4)", "exmy_e8m5 (mantissa_bits=5)"]


def test_the_summary_does_not_depend_on_where_and_in_which_order_runs_lie(tmp_path: Path) -> None:
    for order, name in ((1, "a"), (-1, "b")):
        for seed in list(BASE)[::order]:
            make_run(tmp_path / name, "mxfp8", seed, final=BASE[seed] + 0.02)
            make_run(tmp_path / name, "bf16", seed, final=BASE[seed])
    texts = [json.dumps(summary_of(tmp_path / name)) for name in "ab"]
    assert texts[0] == texts[1]


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tables = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tables += tag == "table"
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("page")
    for seed in BASE:
        make_run(tmp_path, "bf16", seed, final=BASE[seed])
        make_run(tmp_path, "mxfp8", seed, final=BASE[seed] + 0.02 * seed, update_ratio=1e-3)
    make_run(tmp_path, "exmy_e8m3", 0, final=3.2)
    make_run(tmp_path, "exmy_e5m2", 0, status="diverged", final=None, losses=[8.0, None])
    write_report([tmp_path], tmp_path, Settings())
    return tmp_path / "report.html"


def test_the_page_loads_nothing(page: Path) -> None:
    parser = _Page()
    parser.feed(page.read_text())
    assert [address for address in parser.addresses if not address.startswith("#")] == ["data:,"]
    assert parser.tables == sum(address.startswith("#table-") for address in parser.addresses)
    shown = (page.parent / "report.md").read_text()
    for picture in page.parent.glob("*.png"):
        assert f"]({picture.name})" in shown
        assert picture.stat().st_size > 5000
    assert {"losses.png", "gaps.png", "rates.png", "grad_norm.png", "sharpness.png"} <= {
        picture.name for picture in page.parent.glob("*.png")
    }


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_in_chromium(page: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as tab:
        for width in (1280, 400):
            tab.open(page, width)
            assert tab.value("plots = [...document.querySelectorAll('.plot')]; plots.length") >= 6
            # The library draws after the page has loaded.
            tab.wait_for("plots.every(p => p.querySelector('.point path, path.point, .js-line, .hm image'))")
            within = tab.value("[innerWidth, document.documentElement.scrollWidth]")
            assert within == [width, width]  # nothing sticks out
            assert tab.value(
                "plots.every(p => p.querySelector('.main-svg').getBoundingClientRect().right <= innerWidth)"
            )
            wide = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth).length"
            assert (tab.value(wide) > 0) == (width == 400)  # a table that is too wide scrolls in its own box

        heading = """th = [...document.querySelectorAll("th")].find(th => th.textContent === "validation loss");
            th.scrollIntoView({block: "center", inline: "center"}); box = th.getBoundingClientRect();
            [box.x + box.width / 2, box.y + box.height / 2]"""
        column = """[...th.closest("table").tBodies[0].rows].map(row => row.cells[th.cellIndex].textContent)"""
        place = tab.value(heading)
        orders = [tab.value(column)]
        for _ in range(2):
            tab.click(*place)
            orders.append(tab.value(column))
        numbers = sorted(text for text in orders[0] if text != "-")
        assert orders[1:] == [[*numbers, "-"], [*numbers[::-1], "-"]]  # what has no value stays last
        assert orders[0] != orders[1] != orders[2]

        area = """p = document.getElementById("plot-losses"); p.scrollIntoView({block: "center"});
            b = p.querySelector(".nsewdrag").getBoundingClientRect(); [b.x, b.y, b.width, b.height]"""
        ranges = "[...p._fullLayout.xaxis.range]"
        x, y, w, h = tab.value(area)
        before = tab.value(ranges)
        tab.drag((x + w / 4, y + h / 4), (x + w / 2, y + h * 3 / 4))
        tab.wait_for(f"JSON.stringify({ranges}) !== '{json.dumps(before, separators=(',', ':'))}'")
        after = tab.value(ranges)
        assert before[0] < after[0] < after[1] < before[1]
        assert after[1] - after[0] == pytest.approx((before[1] - before[0]) / 4, rel=0.1)

        assert tab.complaints == []
        assert {address for address in tab.requests if not address.startswith("data:")} == {page.as_uri()}


def test_the_script_writes_beside_the_runs(tmp_path: Path) -> None:
    make_run(tmp_path, "bf16")
    make_run(tmp_path, "mxfp8", final=3.02)
    result = subprocess.run(
        [sys.executable, SCRIPT, str(tmp_path), "margin=0.1"], capture_output=True, text=True, check=True
    )
    assert "mxfp8: worse than bf16 in these runs, which may be chance; gap to bf16 +0.0200 nats" in result.stdout
    assert json.loads((tmp_path / "summary.json").read_text())["settings"]["margin"] == 0.1


def test_the_headline_says_what_a_gap_means(tmp_path: Path) -> None:
    for seed in BASE:
        make_run(tmp_path, "bf16", seed, final=BASE[seed])
        make_run(tmp_path, "mxfp8", seed, final=BASE[seed] + 0.001)
        make_run(tmp_path, "fp8_block", seed, final=BASE[seed] - 1)
        make_run(tmp_path, "mxfp4", seed, final=None, status="diverged")
    told = {verdict.recipe: verdict.headline for verdict in report_of(tmp_path).verdicts}
    assert told == {
        "bf16": "the baseline: 3 runs finished",
        "mxfp8": "within seed noise of bf16",
        "fp8_block": "better than bf16, beyond its seed noise",
        "mxfp4": "every run diverged",
    }


def test_tokens_to_the_loss_of_the_baseline(tmp_path: Path) -> None:
    falling = [8 - 0.05 * step for step in range(100)]
    late = [8.0] * 10 + falling[:90]  # ten steps behind
    make_run(tmp_path, "bf16", 0, losses=falling)
    make_run(tmp_path, "mxfp8", 0, losses=late)
    make_run(tmp_path, "mxfp4", 0, losses=[8.0] * 100)
    recipes = summary_of(tmp_path)["recipes"]
    assert recipes["mxfp8"]["tokens_to_target_ratio"] == pytest.approx(90 / 80, abs=0.02)
    assert recipes["mxfp8"]["loss_ratio"] == pytest.approx((late[-1] + 0.45) / (falling[-1] + 0.45), abs=0.01)
    assert (recipes["mxfp4"]["reached_target"], recipes["mxfp4"]["tokens_to_target_ratio"]) == (0, None)


def test_the_best_learning_rate_is_one_where_nothing_diverged(tmp_path: Path) -> None:
    for seed in (0, 1):
        for lr, final in ((1e-3, 3.5), (2e-3, 3.2), (4e-3, 3.0)):
            bad = lr == 4e-3 and seed == 1
            make_run(tmp_path, "bf16", seed, lr, None if bad else final, "diverged" if bad else "finished")
    told = summary_of(tmp_path)["recipes"]["bf16"]
    assert told["best_lr"] == 2e-3
    assert told["lr_sensitivity"] == pytest.approx((0.3 + 0 + (8 - 3.2)) / 3)
    marks = next(plot for plot in report_of(tmp_path).plots if plot.name == "rates").marks
    assert [len(mark.x) for mark in marks if mark.kind is Kind.line] == [2]  # no mean where a run diverged
    assert [len(mark.x) for mark in marks if mark.kind is Kind.crosses] == [1]


def test_the_ladder_has_a_cell_for_every_rung(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path, "bf16", seed, final=3.0)
        make_run(tmp_path, "exmy_e8m3", seed, final=3.25)
        make_run(tmp_path, "exmy_e5m2", seed, final=None, status="diverged", losses=[8.0, None])
    make_run(
        tmp_path, "exmy", 0, final=3.125, arguments=" precision.args.rounding=nearest precision.args.mantissa_bits=3"
    )
    report = report_of(tmp_path)
    maps = {plot.name: plot for plot in report.plots if isinstance(plot, HeatMap)}
    assert set(maps) == {"ladder_nearest", "ladder_truncate"}
    truncated = maps["ladder_truncate"]
    assert (truncated.rows, truncated.columns) == (["M7", "M3", "M2"], ["E8", "E5"])
    assert truncated.values == [[0.0, None], [0.25, None], [None, None]]
    assert truncated.texts == [["0 (bf16)", ""], ["+0.2500", ""], ["", "diverged 2 of 2"]]
    assert rows_of(report, "The bit ladder, operands rounded: nearest")[1] == {"mantissa": "M3", "E8": "+0.1250"}


def test_switches_are_compared_one_at_a_time(tmp_path: Path) -> None:
    for seed in BASE:
        for hadamard in (0, 16):
            for stochastic in ("false", "true"):
                final = BASE[seed] + (0.1 if hadamard == 0 else 0) + (0.01 if stochastic == "false" else 0)
                told = f" precision.args.hadamard={hadamard} precision.args.stochastic={stochastic}"
                make_run(tmp_path, "mxfp4", seed, final=final, arguments=told)
    rows = rows_of(report_of(tmp_path), "Ingredients")
    assert [(row["argument"], row["from"], row["to"], row["pairs"]) for row in rows] == [
        *[("stochastic", "False", "True", 3), ("hadamard", "0", "16", 3)] * 1,
        *[("hadamard", "0", "16", 3), ("stochastic", "False", "True", 3)],
    ]
    assert [row["difference"] for row in rows] == pytest.approx([-0.01, -0.1, -0.1, -0.01])
    assert rows[0]["sign-test p"] == stats.binomtest(0, 3).pvalue


def test_curves_are_drawn_where_rows_have_them(tmp_path: Path) -> None:
    make_run(tmp_path, "bf16", 0)
    make_run(tmp_path, "mxfp8", 0, update_ratio=1e-3, lost_updates=0.5, edq=0.9)
    plots = {plot.name: plot for plot in report_of(tmp_path).plots if isinstance(plot, Plot)}
    recipes = {name: [mark.recipe for mark in plots[name].marks] for name in ("grad_norm", "update_ratio", "edq")}
    assert recipes == {"grad_norm": ["bf16", "mxfp8"], "update_ratio": ["mxfp8"], "edq": ["mxfp8"]}
    assert "lost_updates" in plots
    sharpness = plots["sharpness"].marks[0]
    assert (sharpness.x, sharpness.y) == ([10 * TOKENS, 20 * TOKENS], [0.5, 0.25])


def test_a_spike_survives_the_thinning_of_gradient_norms(tmp_path: Path) -> None:
    path = make_run(tmp_path, "bf16", 0, losses=[4.0] * 2001)
    text = (path / "metrics.jsonl").read_text().replace(f'"grad_norm": {1 / 1234}', '"grad_norm": 77.0')
    (path / "metrics.jsonl").write_text(text)
    mark = next(plot for plot in report_of(tmp_path).plots if plot.name == "grad_norm").marks[0]
    assert len(mark.x) <= 400
    assert (max(mark.y), mark.x[mark.y.index(77.0)]) == (77.0, 1234 * TOKENS)


def test_what_made_the_runs_is_told(tmp_path: Path) -> None:
    make_run(tmp_path, "bf16", 0)
    make_run(tmp_path, "mxfp8", 0)
    report = report_of(tmp_path)
    products = rows_of(report, "Matrix products")
    told = {(row["recipe"], row["product"]): (row["backend"], row["computed as"], row["linears"]) for row in products}
    assert told == {
        ("bf16", "all three"): ("torch", "high precision", 1),
        ("mxfp8", "all three"): ("torch", "high precision", 1),
        ("mxfp8", "dgrad"): ("torch", "high precision", 1),
        ("mxfp8", "fprop"): ("cpu", "emulated", 1),
        ("mxfp8", "wgrad"): ("reference", "emulated", 1),
    }
    (origin,) = rows_of(report, "Origin")
    assert (origin["revision"], origin["parameters"], origin["fingerprint"], origin["runs"]) == (
        "abc",
        "1,234",
        "f00d",
        2,
    )
    assert {"package": "torch", "version": "2.13.0"} in rows_of(report, "Versions")
    cost = rows_of(report, "Cost")[1]
    assert (cost["weights, MB"], cost["optimizer, MB"], cost["speed is"]) == (4.0, 8.0, "emulated")
    assert cost["seconds"] == round(20 * TOKENS / 1000)
    assert "memory of its state 12.0 MB (weights 4.0, optimizer 8.0)" in report.verdicts[1].details
    assert len({run.config_hash for run in report.runs}) == 2
    stability = rows_of(report, "Stability")[0]
    assert (stability["sharpness"], stability["diverged"], stability["of"]) == (0.25, 0, 1)


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    path = make_run(tmp_path, "mxfp8", 0)
    (path / "env.json").unlink()
    (path / "plan.txt").unlink()
    text = (path / "metrics.jsonl").read_text().replace('"sharpness"', '"other"')
    (path / "metrics.jsonl").write_text(text)
    limits = "\n".join(report_of(tmp_path).limits)
    assert "There is no run of bf16" in limits
    assert "Memory of weights and optimizer is not in the run directories of mxfp8" in limits
    assert "Sharpness was not measured" in limits


DEEP = "[" * 100_000
JUNK = {
    "list": "[1, 2]",
    "number": "3",
    "null": "null",
    "text": '"text"',
    "deep": DEEP,
    "deep-value": f'{{"status": {DEEP}',
    "torn": '{"status": "fin',
    "empty": "",
    "bytes": "caf\udce9",
    "long-number": "9" * 5000,
}


@pytest.mark.parametrize("file", ["config.yaml", "env.json", "done.json", "metrics.jsonl", "plan.txt"])
def test_a_malformed_file_is_passed_over_with_a_word(file: str, tmp_path: Path) -> None:
    """One run for every kind of junk, beside one that is well."""
    good = make_run(tmp_path, "bf16", 99)
    for seed, content in enumerate(JUNK.values()):
        (make_run(tmp_path, "bf16", seed) / file).write_bytes(content.encode(errors="surrogateescape"))
    summary = summary_of(tmp_path)
    assert summary["runs"][good.name]["final_loss"] == 3.0
    bad = [name for name in summary["runs"] if name != good.name]
    assert len(bad) == len(JUNK)
    limits = "\n".join(summary["limits"])
    for name, junk in zip(sorted(bad, key=lambda name: int(name.rpartition("=")[2])), JUNK, strict=True):
        if file in ("env.json", "done.json"):
            assert f"cannot be read: {name}/{file}: " in limits
        elif file == "metrics.jsonl" and junk != "empty":
            assert f"{name}/metrics.jsonl: 1 corrupt line skipped" in limits
        elif file == "config.yaml":
            assert summary["runs"][name]["state"] == "failed"


ODD_ROWS = [
    *({"kind": "train", "step": step, "loss": 1.0} for step in (-1, True, 1.5, "2", None, 10**400, [], 2**63)),
    *({"kind": kind, "step": 1} for kind in (None, 3, [], {})),
]
ODD_VALUES: list[Any] = [None, "x", [], {}, [[]], 10**400, True, math.inf, math.nan, -1, 0, "<b>"]


def test_rows_and_values_of_other_kinds_are_no_traceback(tmp_path: Path) -> None:
    make_run(tmp_path, "bf16", 99)
    for seed, odd in enumerate(ODD_VALUES):
        path = make_run(tmp_path, "mxfp8", seed)
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        rows += [row | dict.fromkeys(("loss", "tokens_per_second", "grad_norm", "sharpness"), odd) for row in rows]
        rows += [{"kind": "train", "step": 30}, {"kind": "eval", "step": 30}]
        probe = dict.fromkeys(("sqnr_db", "underflow_percent", "format", "amax"), odd)
        rows += [{"kind": "probe", "step": 1, "module": "m", "slot": "fprop.x"} | probe, *ODD_ROWS]
        rows += [{"kind": "probe", "step": 1, "module": odd, "slot": "fprop.w"}]
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        env = dict.fromkeys((*ENV, "device", "threads"), odd)
        (path / "env.json").write_text(json.dumps(env | {"state_bytes": {"weights": odd}}))
        (path / "done.json").write_text(json.dumps({"status": odd, "step": odd, "reason": odd}))
    write_report([tmp_path], tmp_path / "out", Settings())
    for path in tmp_path.glob("*precision=mxfp8*"):
        plot_losses(path, tmp_path / "loss.png")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(f"{key}:", value) for key in ("seed", "  lr", "  seq_len") for value in ("x", "[1]", "null", ".inf")],
        ("  global_batch_size:", "9" * 400),
    ],
)
def test_a_number_that_is_none_is_named(key: str, value: str, tmp_path: Path) -> None:
    make_run(tmp_path, "bf16", 0)
    path = make_run(tmp_path, "bf16", 1)
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(re.sub(rf"(?m)^{key} .*$", f"{key} {value}", text))
    (run,) = [run for run in find_runs([tmp_path], Settings()) if run.path == path]
    assert run.state == "failed"
    assert re.search(rf"config.yaml cannot be read: .*{key.strip(' :')}=.* is no number", run.reason)
    assert summary_of(tmp_path)["recipes"]["bf16"]["finished"] == 1


def test_a_secret_of_this_machine_is_in_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    make_run(tmp_path, "bf16", 0)
    config = make_run(tmp_path, "bf16", 1) / "config.yaml"
    config.write_text(config.read_text().replace("  name: llama_tiny", "  name: ${oc.env:SECRET}"))
    write_report([tmp_path], tmp_path / "out", Settings())
    texts = {file.name: file.read_text() for file in (tmp_path / "out").glob("*.*") if file.suffix != ".png"}
    assert "is an interpolation" in texts["report.md"]
    assert not any("swordfish" in text for text in texts.values())


EVIL = [
    "<script>alert(1)</script>",
    "a|b",
    "`code`",
    "[x](javascript:alert(1))",
    "![x](http://evil)",
    "*b* _i_ ~s~",
    "&lt;b&gt;",
    "two\nlines\r\t| cell",
    "$\\frac{$",
    "\x1b[31mred",
    "\u202eevil",
]
FORMULAS = ["=1+1", "+1", "-1+cmd", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1"]  # noqa: RUF001


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of runs whose names, recipes, models, reasons, modules and devices are all of ``EVIL``."""
    root = tmp_path_factory.mktemp("evil")
    for seed in BASE:
        make_run(root, "bf16", seed)
    for number, text in enumerate([*EVIL, *FORMULAS]):
        path = make_run(root / text.replace("/", "_"), "exmy_e8m5", number)
        tree = yaml.safe_load((path / "config.yaml").read_text())
        tree["model"]["name"] = tree["data"]["name"] = tree["precision"]["name"] = text
        tree["precision"]["args"] |= {text: text} | ({"rounding": text} if number < 3 else {})
        (path / "config.yaml").write_text(OmegaConf.to_yaml(tree), encoding="utf-8")
        (path / "env.json").write_text(json.dumps(ENV | {"device": text, "packages": {text: text}}))
        (path / "done.json").write_text(json.dumps({"status": "finished", "step": 20, "reason": text}))
        with (path / "metrics.jsonl").open("a") as file:
            row = {"kind": "probe", "step": 20, "module": text, "slot": "fprop.x", "sqnr_db": 3.0, "format": text}
            file.write(json.dumps(row) + "\n")
        with (path / "plan.txt").open("a", encoding="utf-8") as file:
            file.write(f"    fprop: {text}  [{text}]\n")
    write_report([root], root / "out", Settings())
    return root / "out"


def test_markdown_shows_what_runs_are_called(evil: Path) -> None:
    text = (evil / "report.md").read_text(encoding="utf-8")
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&amp;lt;b&amp;gt;" in text
    for raw in ("<script", "\x1b", "\r", "\t", "\u202e", "[x](", "\n| cell"):
        assert raw not in text
    assert re.search(r"(?<!\\)`", text) is None
    assert r"a\|b" in text
    assert "fp8_block" in _md("fp8_block")
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert len(tables) > 8
    for table in tables:
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(re.findall(r"\|", table[1]))}


def test_a_spreadsheet_takes_no_text_for_a_formula(evil: Path) -> None:
    with (evil / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(BASE) + len(EVIL) + len(FORMULAS)
    assert {f"'{text}" for text in FORMULAS if text[0] not in "\t\r"} <= {row["model"] for row in rows}
    for row in rows:
        for key in ("run", "recipe", "model", "data"):
            assert row[key].lstrip()[:1] not in ("=", "+", "-", "@", "＝")  # noqa: RUF001
            assert row[key].isprintable()
        float(row["final_loss"])


def test_the_page_has_no_element_of_theirs(evil: Path) -> None:
    page = (evil / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert page.count("<script") == 2
    parser = _Page()
    parser.feed(page)
    assert [address for address in parser.addresses if not address.startswith("#")] == ["data:,"]


def test_figures_hold_no_markup_of_theirs(tmp_path: Path, evil: Path) -> None:
    """plotly shows tags and links of labels; matplotlib's formulas have to be right, and names of files are ours."""
    assert {path.name for path in evil.glob("ladder*.png")} == {f"ladder{n}.png" for n in range(3)} | {
        "ladder_truncate.png"
    }
    assert {path.parent for path in evil.parent.rglob("*.png")} == {evil}
    report = make_report(find_runs([evil.parent], Settings()), Settings())
    for plot in report.plots:
        figure = json.dumps(to_plotly(plot) if isinstance(plot, Plot | HeatMap) else heat_map(plot.name, plot.numerics))
        assert "<script" not in figure
        assert "<b>" not in figure


FALLING = {
    "a line": lambda t: 9 - 6 * t,
    "an exponential": lambda t: 3 + 6 * np.exp(-8 * t),
    "a power": lambda t: 3 + 6 * (1 + 200 * t) ** -0.5,
    "a plateau, then an exponential": lambda t: 3 + 6 * np.exp(-8 * np.maximum(0, t - 0.1)),
}


@pytest.mark.parametrize("steps", [80, 600, 5_000])
@pytest.mark.parametrize("curve", FALLING)
def test_a_smoothed_loss_neither_lags_nor_shifts_at_its_ends(curve: str, steps: int) -> None:
    true = FALLING[curve](np.linspace(0, 1, steps))
    data = true + np.random.default_rng(0).normal(0, 0.1, steps)
    off = np.asarray(smooth(data.tolist())) - true
    assert abs(off.mean()) < 0.02
    assert off[: steps // 10].mean() == pytest.approx(0, abs=0.06)
    assert off[-steps // 10 :].mean() == pytest.approx(0, abs=0.06)
    assert np.abs(np.diff(off)).mean() < 0.4 * np.abs(np.diff(data - true)).mean()
    assert np.abs(np.asarray(smooth(true.tolist())) - true).max() < 0.2


def test_a_straight_line_is_its_own_course_and_gaps_stay_gaps() -> None:
    line: list[float | None] = [10 - 0.5 * step for step in range(12)]
    assert smooth(line) == pytest.approx(line)
    holes = [None if index in (0, 5, 11) else value for index, value in enumerate(line)] + [math.nan, math.inf]
    found = smooth(holes)
    assert [index for index, value in enumerate(found) if value is None] == [0, 5, 11, 12, 13]
    assert [value for value in found if value is not None] == pytest.approx(
        [line[i] for i in (1, 2, 3, 4, *range(6, 11))]
    )
    assert (smooth([]), smooth([None]), smooth([4.0]), smooth([4.0, 2.0])) == ([], [None], [4.0], [4.0, 2.0])


def test_every_point_stands_at_its_own_learning_rate(tmp_path: Path) -> None:
    rates = (1e-3, 1.5e-3, 1e-2)
    for recipe in ("bf16", "mxfp8", "mxfp4"):
        for seed in (0, 1):
            for lr in rates:
                bad = recipe == "mxfp4" and lr == 1e-2
                make_run(tmp_path, recipe, seed, lr, None if bad else 3.0, "diverged" if bad else "finished")
    plot = next(plot for plot in report_of(tmp_path).plots if plot.name == "rates")
    assert {x for mark in plot.marks for x in mark.x} == set(rates)
    crosses = [y for mark in plot.marks if mark.kind is Kind.crosses for y in mark.y]
    assert len(crosses) == 2
    assert min(crosses) > 3.0


def test_recipes_are_told_apart_without_colour() -> None:
    looks = [(style.marker, str(style.dash)) for style in map(Style.numbered, range(30))]
    assert len(set(looks)) == len(looks)
    near = [Style.numbered(number) for number in range(7)]
    assert len({style.color for style in near}) == 7
    for style in near:  # dark on white
        red, green, blue = (int(style.color[at : at + 2], 16) for at in (1, 3, 5))
        assert 0.299 * red + 0.587 * green + 0.114 * blue < 170


def test_figures_come_in_every_format_that_is_asked_for(tmp_path: Path) -> None:
    make_run(tmp_path, "bf16")
    write_report([tmp_path], tmp_path / "out", Settings(), ("svg", "pdf"))
    for head, kind in ((b"\x89PNG", "png"), (b"<?xml", "svg"), (b"%PDF", "pdf")):
        files = sorted((tmp_path / "out").glob(f"*.{kind}"))
        assert {"losses", "grad_norm"} <= {file.stem for file in files}
        assert all(file.read_bytes().startswith(head) for file in files)
    assert "keepaspectratio]{losses.pdf}" in (tmp_path / "out" / "report.tex").read_text(encoding="utf-8")
    plot = next(plot for plot in report_of(tmp_path).plots if plot.name == "losses")
    assert isinstance(plot, Plot)
    save_plot(plot, tmp_path / "again.png", ("svg", "pdf"))
    for kind in ("svg", "pdf"):
        assert (tmp_path / f"again.{kind}").read_bytes() == (tmp_path / "out" / f"losses.{kind}").read_bytes()
    with pytest.raises(UserError, match=r"formats=jpg: of png, svg, pdf"):
        write_report([tmp_path], tmp_path / "out", Settings(), ("jpg",))


def test_a_drawing_holds_no_element_of_theirs(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "--><script>alert(1)</script>", "]]>&lt;", "$\\frac{$", "東"]
    marks = [Mark(recipe=name, kind=Kind.line, x=[1, 2], y=[1, 2], label=name, in_legend=True) for name in names]
    styles = {name: Style.numbered(number) for number, name in enumerate(names)}
    plot = Plot(name="p", title=names[0], note="", x_label="tokens", y_label="nats", marks=marks, styles=styles)
    save_plot(plot, tmp_path / "p.png", ("svg",))
    tags = {element.tag for element in ElementTree.parse(tmp_path / "p.svg").iter()}
    assert {tag.rpartition("}")[2] for tag in tags if isinstance(tag, str)} <= {
        *("svg", "defs", "style", "g", "path", "use", "clipPath", "rect", "metadata", "RDF", "Work", "type", "format"),
        *("creator", "Agent", "title"),
    }


def latex_mistakes(text: str) -> list[str]:
    """What would not compile, or not show as meant, by rules: no LaTeX is at hand."""
    mistakes = []
    environments: list[str] = []
    columns = 0
    for line in re.sub(r"(\\includegraphics\[.*\])\{\w+(?:-\d+)?\.(?:png|pdf)\}", r"\1{file}", text).splitlines():
        if line == r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%":
            continue
        plain = re.sub(r"\\(textbackslash|textasciitilde|textasciicircum)\{\}|\\[&%$#_{}]", "", line)
        if plain.count("{") != plain.count("}") and line != r"\end{tabular}}":
            mistakes.append(f"braces: {line}")
        if plain.count("$") % 2:
            mistakes.append(f"dollars: {line}")
        math_left_out = re.sub(r"\$[^$]*\$", "", plain).removesuffix("%")
        if found := re.search(r"[_^~#%<>|\"]", math_left_out):
            mistakes.append(f"{found[0]}: {line}")
        if not all(char.isprintable() and (ord(char) < 128 or "\u00c0" <= char <= "\u017f") for char in line):
            mistakes.append(f"characters: {line!r}")
        for begin, name, aligned in re.findall(r"\\(begin|end)\{(\w+)\}(?:\{([lcr]+)\})?", line):
            if begin == "begin":
                environments.append(name)
                columns = len(aligned) if name == "tabular" else 0
            elif environments.pop() != name:
                mistakes.append(f"ends: {line}")
        if line.endswith(r" \\"):
            if plain.removesuffix(r" \\").count("&") != columns - 1:
                mistakes.append(f"cells: {line}")
            if line.startswith(("[", "*")):
                mistakes.append(f"argument: {line}")
    return mistakes + environments


def test_latex_by_its_rules(evil: Path) -> None:
    for name in ("report.tex", "summary.tex"):
        text = (evil / name).read_text(encoding="utf-8")
        assert latex_mistakes(text) == []
        assert text.count(r"\toprule") == text.count(r"\bottomrule") >= 1
    document = (evil / "report.tex").read_text(encoding="utf-8")
    assert document.startswith(r"\documentclass")
    assert document.rstrip().endswith(r"\end{document}")
    assert all((evil / file).exists() for file in re.findall(r"\\includegraphics\[.*?\]\{(.*?)\}", document))


def test_latex_shows_what_runs_are_called() -> None:
    assert escaped("fp8_block & 50%") == r"fp8\_block \& 50\%"
    assert escaped(r"\input{/etc/passwd} $x^2$ #1 ~") == (
        r"\textbackslash{}input\{/etc/passwd\} \$x\textasciicircum{}2\$ \#1 \textasciitilde{}"
    )
    assert escaped("a -- b ± 1") == r"a -{}- b $\pm$ 1"
    assert escaped("[x] * é 東\n") == r"{[}x{]} {*} é \texttt{U+6771}\textbackslash{}n"


def test_the_table_for_a_paper_has_means_gaps_and_divergences(tmp_path: Path) -> None:
    for seed in BASE:
        make_run(tmp_path, "bf16", seed, final=BASE[seed])
        make_run(tmp_path, "fp8_block", seed, final=BASE[seed] + 0.125)
    make_run(tmp_path, "mxfp4", 0, status="diverged", final=None, losses=[8.0, None])
    write_report([tmp_path], tmp_path / "out", Settings())
    rows = (tmp_path / "out" / "summary.tex").read_text(encoding="utf-8").splitlines()
    assert r"fp8\_block & $3.1350 \pm 0.0100$ & $+0.1250$ & $[+0.1250, +0.1250]$ & 0 of 3 & 1,000{*} \\" in rows
    assert r"mxfp4 & -- & -- & -- & 1 of 1 & 1,000{*} \\" in rows


def test_long_tables_go_over_pages(tmp_path: Path) -> None:
    for seed in range(45):
        make_run(tmp_path, "bf16", seed, losses=[4.0])
    write_report([tmp_path], tmp_path / "out", Settings())
    text = (tmp_path / "out" / "report.tex").read_text(encoding="utf-8")
    assert "Runs, continued." in text
    assert max(table.count(r" \\") for table in text.split(r"\begin{table}")) == 41
    assert latex_mistakes(text) == []


@pytest.mark.parametrize(
    ("losses", "final", "status"),
    [
        ([], None, None),
        ([], None, "failed"),
        ([4.0], 4.0, "finished"),
        ([8.0, 7.0], None, "stopped"),
        ([None] * 5, None, "diverged"),
    ],
    ids=["nothing yet", "failed at once", "one step", "no validation", "no finite loss"],
)
def test_one_run_that_has_little_to_say(
    losses: list[float | None], final: float | None, status: str | None, tmp_path: Path
) -> None:
    path = make_run(tmp_path, "mxfp8", 0, losses=losses, final=final, status=status)
    write_report([tmp_path], tmp_path / "out", Settings())
    assert latex_mistakes((tmp_path / "out" / "report.tex").read_text(encoding="utf-8")) == []
    plot_losses(path, path / "loss.png")
    assert (path / "loss.png").read_bytes().startswith(b"\x89PNG")
