"""The probe in whole runs, and what the report makes of its rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_overrides, train_here
from matplotlib.figure import Figure
from narrowgauge.trainer.checkpoint import list_checkpoints, read_tensors
from narrowgauge.trainer.config import TrainConfig, load_config
from narrowgauge.trainer.errors import ExitCode, UserError
from narrowgauge.trainer.metrics import read_metrics, read_rows
from narrowgauge.trainer.reporting.numerics import (
    LayerMap,
    Numerics,
    draw,
    heat_map,
    numerics_of,
    read_numerics,
    worst_layers,
)
from narrowgauge.trainer.reporting.report import Settings, write_report
from test_distributed import run_many
from test_report import make_run

Tiny = Callable[..., TrainConfig]
SLOTS = ["fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x", "fprop.y", "dgrad.dx", "wgrad.dw"]


def losses(path: Path, kind: str = "train") -> list[float]:
    return [row["loss"] for row in read_metrics(path / "metrics.jsonl", kind).values()]


@pytest.mark.parametrize(
    "options",
    [
        ("precision=fp8_delayed", "train.micro_batch_size=2", "log.trackers=[tensorboard]"),
        ("precision=nvfp4", "parallel.activation_checkpointing=true", "train.micro_batch_size=4", "eval.every=2"),
    ],
)
def test_a_watched_run_is_the_run(tiny: Tiny, corpus: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Losses, validation and checkpoint bit for bit; rows for every linear, each counted once."""
    paths = []
    for every in (0, 2):
        config = load_config(
            tiny_overrides(corpus, tmp_path / str(every), *options, f"probe.every={every}", "train.steps=4")
        )
        assert train_here(config) is ExitCode.FINISHED
        paths.append(Path(config.run.dir))
    plain, watched = paths
    assert losses(plain) == losses(watched)
    assert losses(plain, "eval") == losses(watched, "eval")
    saved = [read_tensors(list_checkpoints(path / "checkpoints")[-1], "") for path in paths]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert not list(read_rows(plain / "metrics.jsonl", "probe"))
    rows = list(read_rows(watched / "metrics.jsonl", "probe"))
    assert sorted({row["step"] for row in rows}) == [2, 4]
    assert [row["slot"] for row in rows] == SLOTS * (len(rows) // len(SLOTS))
    told = b"".join(file.read_bytes() for file in watched.glob("tensorboard/**/events*"))
    if "log.trackers=[tensorboard]" in options:
        assert b"probe/layers.0.self_attn.q_proj/wgrad.dy/sqnr_db" in told
    tokens = 8 * 32
    by_place = {(row["step"], row["module"], row["slot"]): row for row in rows}
    assert {module for _, module, _ in by_place} >= {"layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "lm_head"}
    for step in (2, 4):
        for module in ("layers.0.self_attn.q_proj", "lm_head"):
            assert by_place[step, module, "fprop.x"]["elements"] == tokens * 32
        assert by_place[step, "lm_head", "fprop.x"]["format"] == "bfloat16"
        assert by_place[step, "lm_head", "fprop.x"]["sqnr_db"] is None
        assert 5 < by_place[step, "layers.0.self_attn.q_proj", "fprop.w"]["sqnr_db"] < 40
        assert 0 < by_place[step, "layers.0.mlp.up_proj", "wgrad.dw"]["relative_error"] < 0.5


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(corpus: Path, tmp_path: Path) -> None:
    """Tiles within a sample, micro-batches alike: the same figures but for the order of sums."""
    options = ["train.steps=1", "train.micro_batch_size=2", "eval.tokens=0", "sample.tokens=0", "probe.every=1"]
    recipes = ("mxfp4", "fp8_delayed")
    for processes in (1, 2):
        configs = [
            tiny_overrides(corpus, tmp_path / f"{name}-{processes}", *options, f"precision={name}") for name in recipes
        ]
        run_many(configs, processes, tmp_path)
    for name in recipes:
        one, two = (
            list(read_rows(tmp_path / f"{name}-{processes}" / "metrics.jsonl", "probe")) for processes in (1, 2)
        )
        assert len(one) == len(two) == 15 * 9
        for ours, theirs in zip(two, one, strict=True):
            for key, value in theirs.items():
                close = pytest.approx(value, rel=1e-3, abs=1e-12) if isinstance(value, float) else value
                assert ours[key] == close, (name, ours["module"], ours["slot"], key)


def test_wrong_settings_are_one_line(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"probe.every=-1: must not be negative"):
        tiny("probe.every=-1")
    with pytest.raises(UserError, match=r"probe.layers='\[': not a regular expression"):
        tiny("probe.layers='['")
    with pytest.raises(UserError, match=r"probe.layers='lm_hed' matches no linear \(did you mean 'lm_head'\?\)"):
        train_here(tiny("probe.every=1", "probe.layers=lm_hed"))


def probe_rows(step: int, modules: int = 12, **more: Any) -> list[dict[str, Any]]:
    """Layer n has 40 - n dB in all slots, and layer 3 the least, 5 dB, in wgrad.dy."""
    rows = []
    for number in range(modules):
        for slot in SLOTS:
            output = slot in SLOTS[6:]
            sqnr = 5.0 if (number, slot) == (3, "wgrad.dy") else 40.0 - number
            row = {"kind": "probe", "step": step, "module": f"layers.{number}.up", "slot": slot, "format": "e4m3"}
            row |= {"sqnr_db": None if output else sqnr, "underflow_percent": None if output else 0.5}
            row |= {"saturation_percent": None if output else 0.25, "relative_error": 0.01 if output else None}
            rows.append(row | {"amax": 1.0} | more)
    return rows


def watched_run(root: Path, recipe: str, rows: list[dict[str, Any]]) -> Path:
    path = make_run(root, recipe)
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_the_worst_layers_come_first(tmp_path: Path) -> None:
    again = [row | {"sqnr_db": 30.0} for row in probe_rows(20)]
    watched_run(tmp_path, "mxfp8", [*probe_rows(10), *again, *probe_rows(20)])  # step 20 twice: the last counts
    make_run(tmp_path, "bf16")
    table = worst_layers(numerics_of([("mxfp8", next(tmp_path.glob("*mxfp8*"))), ("bf16", tmp_path / "none")]))
    assert len(table["rows"]) == 10
    first, second, *_ = (dict(zip(table["columns"], row, strict=True)) for row in table["rows"])
    assert (first["layer"], first["operand"], first["SQNR dB"], first["step"]) == ("layers.3.up", "wgrad.dy", 5.0, 20)
    assert (second["layer"], second["SQNR dB"], second["error dw"]) == ("layers.11.up", 29.0, 0.01)


def test_the_map_turns_to_any_watched_step(tmp_path: Path) -> None:
    rows = [row for step in range(1, 31) for row in probe_rows(step)]
    numerics = read_numerics(watched_run(tmp_path, "mxfp8", rows) / "metrics.jsonl")
    assert numerics is not None
    plot = heat_map("numerics-1", numerics)
    (slider,) = plot["layout"]["sliders"]
    labels = [step["label"] for step in slider["steps"]]
    assert len(labels) <= 8
    assert labels[-1] == "30"
    assert len(plot["data"]) == 4 * len(labels)
    shown = [trace for trace in plot["data"] if trace["visible"]]
    assert [trace["name"] for trace in shown] == ["SQNR, dB", "underflow, %", "saturation, %", "error of output"]
    assert shown[0]["z"][3] == [37.0, 37.0, 37.0, 37.0, 5.0, 37.0]
    assert shown[3]["x"] == SLOTS[6:]
    for number, step in enumerate(slider["steps"]):
        method, visible = step["args"]
        assert method == "visible"
        assert [index for index, on in enumerate(visible) if on] == list(range(4 * number, 4 * number + 4))
    LayerMap(name="numerics-1", recipe="mxfp8", numerics=numerics).save(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_has_the_numerics_of_runs_that_were_watched(tmp_path: Path) -> None:
    nothing = {
        "sqnr_db": None,
        "underflow_percent": None,
        "saturation_percent": None,
        "relative_error": None,
        "amax": None,
    }
    watched_run(tmp_path, "mxfp8", probe_rows(20))
    watched_run(tmp_path, "bf16", probe_rows(20, format="bfloat16", **nothing))  # a recipe without any rounding
    make_run(tmp_path, "mxfp4")
    write_report([tmp_path], tmp_path / "out", Settings())
    html, markdown = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "Numerics of mxfp8, by layer" in html
    assert "Numerics of mxfp4" not in html
    assert "Numerics of bf16" not in html  # a map of nothing
    assert re.search(r"\| mxfp8 \| 20 \| layers.3.up \| wgrad.dy \| e4m3 \| 5.0000 \|", markdown)
    for line in re.findall(r"!\[numerics of .*?\]\((.*?)\)", markdown):
        assert (tmp_path / "out" / line).exists()
    make_run(plain := tmp_path / "plain", "bf16")
    write_report([plain], plain / "out", Settings())
    assert "umerics" not in (plain / "out" / "report.md").read_text()


def in_high_precision(rows: list[dict[str, Any]], gemms: str) -> list[dict[str, Any]]:
    """The rows as the probe leaves them where nothing is rounded: zeros, and no SQNR."""
    plain = {"format": "bfloat16", "sqnr_db": None, "underflow_percent": 0.0, "saturation_percent": 0.0}
    return [row | plain if row["slot"].startswith(tuple(gemms.split())) else row for row in rows]


def drawn(numerics: Numerics) -> tuple[str, list[Any]]:
    """The title of the picture, and the cells of its four panels, NaN where nothing is drawn."""
    figure = Figure(figsize=(14, 6))
    draw(figure, "nvfp4", numerics, 6)
    panels = [axes for axes in figure.axes if axes.images]
    return figure.get_suptitle(), [axes.images[0].get_array().filled(math.nan) for axes in panels]


def test_a_product_that_ends_in_high_precision_shows_its_last_rounded_step(tmp_path: Path) -> None:
    rows = [*probe_rows(10, amax=3.0), *probe_rows(20), *in_high_precision(probe_rows(30), "fprop")]
    numerics = read_numerics(watched_run(tmp_path, "nvfp4", rows) / "metrics.jsonl")
    assert numerics is not None
    title, panels = drawn(numerics)
    assert title == "nvfp4; fprop: step 20; dgrad: step 30; wgrad: step 30"
    assert not any(np.isnan(panel).any() for panel in panels)
    assert panels[0][0].tolist() == [40.0] * 6
    assert {row[1] for row in worst_layers({"nvfp4": numerics})["rows"]} == {20, 30}
    plot = heat_map("numerics-1", numerics)
    (slider,) = plot["layout"]["sliders"]
    assert slider["steps"][slider["active"]]["label"] == "20"  # the page opens where most is to be seen
    at_30 = plot["data"][4 * [step["label"] for step in slider["steps"]].index("30")]
    assert at_30["z"][0] == [None, None, 40.0, 40.0, 40.0, 40.0]


def test_layers_in_high_precision_are_hatched_and_said_to_be(tmp_path: Path) -> None:
    rows = probe_rows(10, modules=2)
    rows = [*rows[:9], *in_high_precision(rows[9:], "fprop dgrad wgrad")]
    numerics = read_numerics(watched_run(tmp_path, "nvfp4", rows) / "metrics.jsonl")
    assert numerics is not None
    figure = Figure(figsize=(14, 6))
    draw(figure, "nvfp4", numerics, 6)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["high precision: nothing is rounded"]
    for axes in (axes for axes in figure.axes if axes.images):
        ((x, y),) = [patch.get_xy() for patch in axes.patches if patch.get_hatch()]
        assert (x, y) == (-0.5, 0.5)
        assert np.isnan(axes.images[0].get_array().filled(math.nan)[1]).all()
    all_plain = read_numerics(
        watched_run(tmp_path, "bf16", in_high_precision(probe_rows(5), "fprop dgrad wgrad")) / "metrics.jsonl"
    )
    assert all_plain is not None
    assert drawn(all_plain)[0] == "nvfp4; high precision"


def test_many_layers_with_long_names_fit(tmp_path: Path) -> None:
    rows = [row | {"module": "model.decoder." * 6 + row["module"]} for row in probe_rows(1, modules=200)]
    numerics = read_numerics(watched_run(tmp_path, "mxfp8", rows) / "metrics.jsonl")
    assert numerics is not None
    figure = Figure(figsize=(14, 20))
    draw(figure, "mxfp8", numerics, 20)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert max(map(len, labels)) <= 45
    assert labels[0].endswith("layers.0.up")
    assert 20 * 72 / len(labels) > 8  # points from one to the next, at a size of 8


@pytest.mark.parametrize(("count", "wanted"), [(1, 1), (8, 3), (9, 8), (30, 29), (30, 2)])
def test_the_slider_has_the_step_it_opens_at_and_the_last(count: int, wanted: int, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        plain = in_high_precision(probe_rows(step, 1), "fprop")
        rows += probe_rows(step, 1) if step == wanted else plain
    numerics = read_numerics(watched_run(tmp_path, "nvfp4", rows) / "metrics.jsonl")
    assert numerics is not None
    (slider,) = heat_map("numerics-1", numerics)["layout"]["sliders"]
    labels = [int(step["label"]) for step in slider["steps"]]
    assert labels == sorted(set(labels))
    assert len(labels) <= 8
    assert labels[-1] == count
    assert labels[slider["active"]] == wanted
