"""Supported versions of Python's packages: the ranges, what sources use of torch and triton, what fails where."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import versions
from narrowgauge.precision.backends.triton import device
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("src", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]

NEWER = (ROOT / "tests" / "newer.txt").read_text().split()
"""What torch 2.13 and triton 3.9 have, and torch 2.11 and triton 3.6 have not: ``dir`` and signatures compared."""


def used(tree: ast.AST) -> Iterator[str]:
    """Names of torch and triton in a source, whole and dotted; ``name(parameter)`` for what is given by keyword."""
    roots: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                roots[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    roots = {name: whole for name, whole in roots.items() if whole.partition(".")[0] in ("torch", "triton")}

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return roots.get(node.id)
        before = dotted(node.value) if isinstance(node, ast.Attribute) else None
        return before and f"{before}.{node.attr}"

    yield from roots.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node)):
            yield name
        elif isinstance(node, ast.Call) and (name := dotted(node.func)):
            yield from (f"{name}({keyword.arg})" for keyword in node.keywords if keyword.arg)


USED = {path: sorted(set(used(ast.parse(path.read_text())))) for path in SOURCES}


def resolved(name: str) -> Any:
    """Raises AttributeError for what is not there."""
    found: Any = importlib.import_module(name.partition(".")[0])
    for at, part in list(enumerate(name.split(".")))[1:]:
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        try:
            found = importlib.import_module(".".join(name.split(".")[: at + 1]))
        except ImportError:
            raise AttributeError(name) from None
    return found


def is_there(name: str) -> bool:
    name, _, parameter = name.rstrip(")").partition("(")
    if name.startswith(("torch.ops.", "torch._C._cuda")):
        return True  # what is registered where the program runs, and what builds for CUDA have
    try:
        found = resolved(name)
        parameters = inspect.signature(found).parameters.values() if parameter else []
    except AttributeError:
        return False
    except RuntimeError:  # triton's driver is there, and looks for a GPU when it is asked for
        return name.startswith("triton.runtime.driver.")
    except (TypeError, ValueError):  # written in C++: no signature
        return True
    return not parameter or any(p.name == parameter or p.kind is p.VAR_KEYWORD for p in parameters)


def test_sources_use_what_the_installed_torch_and_triton_have() -> None:
    """Also on paths that only a GPU takes: on the oldest versions no test reaches those."""
    assert "torch.nn.functional.scaled_mm" in USED[ROOT / "src/precision/backends/scaled_mm.py"]
    missing = {
        f"{path.relative_to(ROOT)}: {name}" for path, names in USED.items() for name in names if not is_there(name)
    }
    assert missing == set()


def test_sources_use_nothing_newer_than_the_oldest_versions() -> None:
    newer = {name: path for path, names in USED.items() for name in names if name in NEWER}
    assert newer == {}


def test_what_is_used_is_found() -> None:
    source = (
        "import torch.nn.functional as F\nfrom torch import nn\nimport torch\n"
        "F.linear_cross_entropy(x, nn.Linear(3, 4, bias=False))\n"
        "@torch.compile(name='a')\ndef f(x): return x.torch.y\n"
    )
    found = set(used(ast.parse(source)))
    assert {"torch.nn.functional.linear_cross_entropy", "torch.nn.Linear(bias)", "torch.compile(name)"} <= found
    assert all(map(is_there, ("torch.nn.Linear(bias)", "torch.backends.cuda.matmul", "triton.language.load(mask)")))
    assert not any(map(is_there, ("torch.nn.Linear(bais)", "torch.nn.functional.linaer", "torch.absent.linear")))


def test_the_versions_of_make_are_in_the_ranges() -> None:
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.name != "triton":
            assert pins[requirement.name] in requirement.specifier, requirement
    (supported,) = (each.specifier for each in map(Requirement, project["dependencies"]) if each.name == "torch")
    assert ["2.10.0" in supported, "2.11.0" in supported, "2.13.0" in supported, "2.14.0" in supported] == [
        False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("node", versions.FAILS)
def test_what_is_expected_to_fail_is_a_test(node: str) -> None:
    path, _, name = node.partition("::")
    assert re.search(rf"^def {name.partition('[')[0]}\(", (ROOT / path).read_text(), re.M)
    assert versions.fails(node) in (versions.FAILS[node], None)


def test_a_package_is_older_or_not() -> None:
    assert versions.Before("torch", "99", "").applies()
    assert not versions.Before("torch", torch.__version__.partition("+")[0], "").applies()


@pytest.mark.parametrize("version", [(3, 6), (3, 8), (3, 9)], ids=str)
def test_old_tritons_on_old_gpus(version: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No FP8 conversions on Ada, which round twice."""
    monkeypatch.setattr(device, "version", lambda: version)
    here = torch.device("cpu")
    for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
        with device.recording(capability):
            assert device.hardware(here).fp8 == (version >= (3, 9) or capability > (8, 9))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "usage:"),
        (("2.11",), "'2.11'"),
        (("torch=2.10",), "torch=2.10"),
        (("torch=2.11", "venv=nowhere/at/all/venv", "where=there"), "'where=there'"),
    ],
    ids=["none", "no name", "unsupported", "unknown"],
)
def test_bad_arguments_of_test_on_are_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = subprocess.run(
        ["bash", "scripts/test_on.sh", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
