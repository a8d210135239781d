"""Who stands still is named, with what it was doing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist
from narrowgauge.trainer import watch as module
from narrowgauge.trainer.watch import Watch


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watch, Watch]]:
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "_SILENT_SECONDS", 1.0)
    monkeypatch.setattr(module, "_SAY_SECONDS", 1.2)
    store = dist.HashStore()
    watches = Watch(0, 2, store), Watch(1, 2, store)
    for watch in watches:
        watch.start()
    yield watches
    for watch in watches:
        watch.stop()


def heard(capsys: pytest.CaptureFixture[str], enough: Callable[[str], bool]) -> str:
    out, deadline = "", time.monotonic() + 30
    while not enough(out):
        assert time.monotonic() < deadline, out
        time.sleep(0.02)
        out += capsys.readouterr().out
    return out


def test_a_rank_that_is_silent_is_named(pair: tuple[Watch, Watch], capsys: pytest.CaptureFixture[str]) -> None:
    main, other = pair
    other.at("step 7, reading its batch")
    time.sleep(0.1)
    other.stop()
    main.at("step 7")
    with main.waiting():
        out = heard(capsys, lambda out: "no progress" in out)
        assert main.accuse() == "rank 1 gives no sign of life, last heard of in: step 7, reading its batch"
    assert "rank 1 gives no sign of life, last heard of in: step 7, reading its batch" in out


def test_of_ranks_that_live_the_one_that_waits_for_nobody_is_named(
    pair: tuple[Watch, Watch], capsys: pytest.CaptureFixture[str]
) -> None:
    main, other = pair
    other.at("opening the data")
    main.at("looking for a checkpoint")
    with main.waiting():
        out = heard(capsys, lambda out: "no progress" in out)
        assert main.accuse() == other.accuse() == "rank 1 is in: opening the data"
    assert out.splitlines()[0].endswith(" s: rank 1 is in: opening the data")


def test_a_rank_that_gets_on_is_not_named(pair: tuple[Watch, Watch], capsys: pytest.CaptureFixture[str]) -> None:
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        pair[1].at("a step")
        time.sleep(0.02)
    assert capsys.readouterr().out == ""


def test_a_process_alone_tells_nobody() -> None:
    watch = Watch()
    watch.at("step 1")
    with watch.waiting():
        assert watch.accuse() == ""
    assert watch.section == "step 1"
