"""The tests themselves: every process that collects them finds the same ones, whenever it does."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import pytest


def collected_later(config: pytest.Config) -> list[str]:
    """The names that another process finds for the same arguments, with another seed of Python's hashes."""
    chosen = ["-k", config.option.keyword, "-m", config.option.markexpr]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    seed = str(int(os.environ.get("PYTHONHASHSEED", "0").replace("random", "0")) + 1)
    result = subprocess.run(
        [*command, *chosen, *config.args],
        cwd=config.invocation_params.dir,
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    return list(itertools.takewhile(bool, result.stdout.splitlines()))  # what is told of them comes after an empty line


def test_names_depend_on_no_clock_process_or_order(request: pytest.FixtureRequest) -> None:
    """Workers that collect different names run nothing at all; this process collected some seconds ago."""
    assert collected_later(request.config) == [item.nodeid for item in request.session.items]


def test_names_are_words(request: pytest.FixtureRequest) -> None:
    names = [item.nodeid for item in request.session.items]
    assert [name for name in names if re.search(r"\\[xuU][0-9a-f]{2}|0x[0-9a-f]{6}|[^ -~]", name)] == []
