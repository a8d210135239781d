"""docs/architecture.md is true: its figure is what the code draws, and every file that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import six_slots

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"


def test_the_picture_of_the_slots_is_the_plan() -> None:
    assert (ROOT / "docs" / "six_slots.svg").read_text(encoding="utf-8") == six_slots.drawing("nvfp4")


def test_every_place_that_the_page_names_is_there() -> None:
    places = set(re.findall(r"`((?:src|scripts|configs|tests|docs)/[\w/.]+)`", PAGE.read_text(encoding="utf-8")))
    assert len(places) > 30
    assert [place for place in sorted(places) if not (ROOT / place).exists()] == []


def test_every_room_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rooms = {file.parent.relative_to(ROOT) for file in (ROOT / "src").rglob("*.py")}
    assert [str(room) for room in sorted(rooms) if f"`{room}/`" not in text] == []
