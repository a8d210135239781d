"""The house rules that no other tool checks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC, RECIPES = ROOT / "src", ROOT / "src" / "precision" / "recipes"
DTYPES = {"bf16", "fp16", "fp32"}  # names of recipes that are names of number formats, too
OPERANDS = {"exmy", "mxfp4", "mxfp8", "nvfp4"}  # so are these: of what kernels read


def words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every identifier, module name and string constant but docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield line, node.value
        elif isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield line, node.name
        elif isinstance(node, ast.arg | ast.keyword):
            yield line, node.arg or ""
        elif isinstance(node, ast.alias):
            yield from ((line, part) for part in node.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            yield from ((line, part) for part in (node.module or "").split("."))


def named(text: str, recipes: set[str]) -> list[str]:
    return [f"{line}: {word}" for line, word in words(ast.parse(text)) if word in recipes]


def test_no_recipe_is_named_outside_its_file() -> None:
    """A recipe is a value to all others: what is to be known of it, its fields, its plan or its arguments say."""
    recipes = {place.stem for place in RECIPES.iterdir() if not place.name.startswith("_")} - DTYPES
    found = []
    for file in sorted(SRC.rglob("*.py")):
        if not file.is_relative_to(RECIPES):
            others = recipes - OPERANDS if file.is_relative_to(SRC / "precision") else recipes
            found += [f"{file.relative_to(ROOT)}:{word}" for word in named(file.read_text(encoding="utf-8"), others)]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "if values['precision.recipe'] == 'toy': pass",
        "from ..precision.recipes import toy",
        "from ..precision.recipes.toy import recipe",
        "import toy",
        "x.toy(toy=1)",
        "def toy(): pass",
    ],
    ids=["string", "module", "from", "import", "attribute", "function"],
)
def test_a_named_recipe_is_found(text: str) -> None:
    assert named(f'"""As toy does."""\n{text}\n', {"toy"})


def test_docstrings_may_name_a_recipe() -> None:
    assert not named('"""toy"""\ndef apply(recipe):\n    """toy"""\n', {"toy"})
