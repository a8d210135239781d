"""scripts/bench_precision.py: the table of first steps, by a run that is small and by times that are made up."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from narrowgauge.trainer.errors import UserError


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "bench_precision", Path(__file__).parents[2] / "scripts" / "bench_precision.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_first_step_is_timed_in_a_process_of_its_own(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"VOCAB": 257, "LAYERS": 1, "HEADS": 1, "POSITIONS": 16, "SEQUENCES": 2, "INS": 16, "OUTS": 32}
    for name, value in small.items():
        monkeypatch.setattr(bench, name, value)
    bench.main([], parts="start", starts="", threads=1, json=str(tmp_path / "table.json"))
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["name"] == "first step, kernels built before: bf16"
    assert 0 < row["min"] == row["median"]
    assert row["ratio_min"] == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(row["name"])


def test_recipes_start_with_kernels_and_without(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row is printed before the next run starts."""
    caches: list[str | None] = []
    here = bench.os.environ.get("XDG_CACHE_HOME")

    def first_step(recipe: str, text: Path, environment: dict[str, str]) -> float:
        assert capsys.readouterr().out.count("first step") == bool(caches)
        caches.append(environment.get("XDG_CACHE_HOME"))
        return {"bf16": 8.0, "mxfp4": 12.0, "nvfp4": 10.0}[recipe]

    monkeypatch.setattr(bench, "_first_step", first_step)
    bench.main([], parts="start", starts="nvfp4,mxfp4", threads=1, json=str(tmp_path / "table.json"))
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"].removeprefix("first step, kernels ") for row in rows] == [
        "built before: bf16",
        *("built before: nvfp4", "empty: nvfp4", "built before: mxfp4", "empty: mxfp4"),
    ]
    assert [row["ratio_min"] for row in rows] == [1, 1.25, 1.25, 1.5, 1.5]
    assert [place == here for place in caches] == [True, True, False, True, False]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"starts": "nvfp5"}, "starts=nvfp5: of bf16, "),
        ({"parts": "begin"}, "parts=begin: one of elements, linear"),
        ({"clock": "sun"}, "clock=sun: wall or cpu"),
    ],
)
def test_mistakes_are_one_line(bench: ModuleType, arguments: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        bench.main([], **arguments)


def test_it_says_at_once_what_comes_and_how_long_it_takes(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(rounds: int, world: object) -> list[object]:
        assert f"part {len(done) + 1} of 2, " in capsys.readouterr().err
        done.append(rounds)
        return []

    done: list[int] = []
    monkeypatch.setattr(bench, "elements", nothing)
    monkeypatch.setattr(bench, "step", nothing)
    start = bench.distributed.start

    def told_before(*arguments: object) -> object:
        assert capsys.readouterr().err.startswith("parts=elements,step: about 5 min on 2 cores")
        return start(*arguments)

    monkeypatch.setattr(bench.distributed, "start", told_before)
    bench.main([], parts="elements,step", threads=1)
    assert done == [9, 9]
    assert bench.estimated(["step"], 1, 0) < bench.estimated(["step"], 9, 0)
    assert bench.estimated(["start"], 9, 1) < bench.estimated(["start"], 9, 2)


def test_every_way_of_a_part_is_counted_on_the_bar(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bench.interleaved({"one": lambda: None, "two": lambda: None}, 3, what="linear")
    assert "linear:" in terminal.getvalue()
    assert "/10 [" in terminal.getvalue()
    assert ", two]" in terminal.getvalue()
    assert capsys.readouterr().out == ""
