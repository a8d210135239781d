"""Every recipe and model in ``docs/extend.md`` is a file that trains, and is shown in plan.txt as the page says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import train_here
from narrowgauge.precision import Recipe, load
from narrowgauge.trainer.config import TrainConfig
from narrowgauge.trainer.errors import ExitCode
from narrowgauge.trainer.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "extend.md").read_text(encoding="utf-8"), flags=re.M)[1:]
RECIPES = {
    f"{section.splitlines()[0].lower()}-{number}": text
    for section in SECTIONS
    for number, text in enumerate(re.findall(r"```python\n(.*?)```", section, re.S), 1)
}
# What plan.txt says of each.
SHOWN = {
    "six slots-1": "dgrad: e5m2/row/fp32/sr x e2m1/1x32/e8m0-rceil/values",
    "number formats-1": "fprop: int6/row/fp32 x nf4/1x64/fp32-decode-floor1e-30",
    "scales-1": "fprop: int8/row/fp32-decode-floor1e-05 x int2/tensor/fp32-decode-floor1e-05/mean",
    "scales-2": "fprop: e2m1/1x16/best-of-3 x e2m1/1x16/best-of-3",
    "sums of parts-1": "dy, rest: e2m1/1x16/e4m3+fp32/sr",
    "transforms-1": "wgrad: e2m1/1x32/e8m0-rceil x e2m1/1x32/e8m0-rceil [hadamard32/step]",
    "derivatives-1": "wgrad: high precision (torch), dw * dge5",
    "sums of products-1": "fprop: e4m3/row/fp32 x e4m3/row/fp32, sums of 32 products at 13 bits  [cpu",
    "hooks-1": "a term of the loss; may change gradients; may change weights; parameter strength []",
    "parameters-1": "layers.0.self_attn.q_proj.weight and 17 others: learning rate x 0.5, decay independent of the",
    "update rules-1": "moments factored: m e4m3/128, row fp32, col fp32; adamw: m fp32, v fp32 (the recipe's)",
    "layers-1": "saved.x: e4m3/1x16/fp32  [cpu]\n    out: e4m3/tensor/fp32, for linears of this spec  [cpu]",
    "communication-1": "as e4m3/tensor/fp32-pow2, one scale for all ranks, times a factor that lets 1e-05 of the sums",
    "models-1": "every step begins with a forward pass of its micro-batches, without gradients, that counts",
    "experts-1": "fprop: e4m3/1x32/e8m0-rceil x e4m3/1x32/e8m0-rceil",
}


def test_every_section_has_a_recipe() -> None:
    assert RECIPES.keys() == SHOWN.keys()
    assert len(SECTIONS) == len({name.rpartition("-")[0] for name in RECIPES})
    first, papers = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8").split("\n## ")[0].split("\n### ")
    titles = [section.splitlines()[0] for section in SECTIONS]
    assert re.findall(r"\[([^]]+)\]\(#", first) == titles
    used = re.findall(r"\[([^]]+)\]\(#([^)]+)\)", papers)
    assert {name.lower() for name, _ in used} == {title.lower() for title in titles}
    assert all(anchor == name.lower().replace(" ", "-") for name, anchor in used)


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_of_the_page_trains(tiny: Callable[..., TrainConfig], tmp_path: Path, name: str) -> None:
    file = tmp_path / "recipe.py"
    file.write_text(RECIPES[name])
    key = "model.arch" if name.startswith("models") else "precision.recipe"
    assert key == "model.arch" or load(str(file)) != Recipe()
    options = ("model.num_layers=3", "train.steps=3", "checkpoint.every=0", "probe.every=3", "sample.tokens=0")
    config = tiny(f"{key}={file}", *options)
    assert train_here(config) is ExitCode.FINISHED
    root = Path(config.run.dir)
    assert SHOWN[name] in (root / "plan.txt").read_text()
    losses = [row["loss"] for row in read_metrics(root / "metrics.jsonl", "train").values()]
    assert losses[-1] < losses[0]
