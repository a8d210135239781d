"""scripts/host_cost.py: it measures a recipe without a GPU, and finds what makes host and device wait."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from narrowgauge.trainer.errors import UserError

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Expressions of one operation, x on the device and h on the host, and the counts that they are to give.
COUNTED = {
    "x + x": {"kernels": 1},
    "x.mT.view(2, 2)[0].expand(3, 2)": {},
    "torch.empty(2, device=x.device)": {},
    "torch.zeros(2, device=x.device)": {"kernels": 1},
    "x @ x.mT": {"products": 1},
    "h + h": {},
    "x * h.sum()": {"kernels": 1},
    "float(h.sum())": {},
    "float(x.sum())": {"kernels": 1, "copies": 1},
    "x.tolist()": {"copies": 1},
    "x.cpu()": {"copies": 1},
    "x[x > 0]": {"kernels": 1, "copies": 1},
    "torch.tensor(1.0, device=x.device)": {"copies": 1},
    "torch.as_tensor(h, device=x.device)": {"copies": 1},
    "torch.as_tensor(h, device=x.device) + 1": {"copies": 1, "kernels": 1},
    "torch.as_tensor(x, device=x.device)": {},
    "h.to(x.device)": {"copies": 1},
    "x.to(x.device)": {},
    "x.clone().copy_(h)": {"kernels": 1, "copies": 1},
    "twice(x)": {"kernels": 2},
    "torch.ops.pretended.thrice(x)": {"kernels": 3},
}
CHILD = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("measure", sys.argv[1])
m = importlib.util.module_from_spec(spec)
spec.loader.exec_module(m)
m.pretend()
torch = m.torch

@torch.library.custom_op("pretended::twice", mutates_args=(), device_types="cuda")
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1

library = torch.library.Library("pretended", "FRAGMENT")
library.define("thrice(Tensor x) -> Tensor")
library.impl("thrice", lambda x: x * 2 + 1 - x, "CompositeExplicitAutograd")


def counted():
    m.watch = m.Watch()
    counted = {}
    with m.watch:
        x, h = torch.ones(2, 2, device=m.GPU), torch.ones(2, 2)
        assert x.device.type == "cuda" and x.is_cuda and h.device.type == "cpu"
        for text in json.loads(sys.argv[2]):
            m.watch.counts.clear()
            eval(text)
            counted[text] = dict(m.watch.counts)
    return counted


before = counted()
rows = [m.measure(name, 3, 1) for name in ("fp8_current", "fp8_delayed")]
with m.unwatched():
    x = torch.ones(2, 2, device="cuda")
    assert x.to(x.device) is x and x.to(device=m.GPU, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert x.to(m.GPU, torch.bfloat16).dtype == torch.bfloat16 and torch.empty(2, device="meta").is_meta
print(json.dumps([before, counted(), *rows]))
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("host_cost", SCRIPTS / "host_cost.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_gpu_that_is_not_there(script: ModuleType) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-c", CHILD, str(SCRIPTS / "host_cost_measure.py"), json.dumps(list(COUNTED))]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    before, after, *rows = json.loads(result.stdout)
    assert before == COUNTED
    assert after == COUNTED
    for row in rows:
        assert row["unseen"] == []
        assert row["backends"] == "scaled_mm/scaled_mm/scaled_mm"
        assert row["launches"] > 0
        assert row["products"] == 3
        assert row["host_us"] > 0


def test_before_and_after_stand_in_one_row(script: ModuleType) -> None:
    before = {"recipe": "mxfp8", "linears": 3, "launches": 28 / 3, "products": 3, "kernels": 190, "copies": 0}
    before |= {"at_end": 0, "host_us": 2605.4, "backends": "triton/triton/triton"}
    after = before | {"launches": 2.0, "kernels": 6, "host_us": 301.0}
    failed = {"recipe": "nvfp4", "linears": 1, "error": "ValueError: no"}
    lines = script.table([[before, before | {"recipe": "nvfp4"}], [after, failed]]).splitlines()
    assert (
        lines[2]
        == "| mxfp8 | 3 | 9.33 -> 2 | 3 -> 3 | 190 -> 6 | 0 -> 0 | 0 -> 0 | 2,605 -> 301 | triton/triton/triton |"
    )
    assert lines[3] == "| nvfp4 | 1 | ValueError: no |"


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (["steps"], {}, "unknown argument 'steps'"),
        ([], {"recipes": "nvfp4,nvfp5"}, "recipes=nvfp5: of fp8_delayed,"),
        ([], {"names": "yes"}, "names=yes: true or false"),
    ],
    ids=["argument", "recipe", "names"],
)
def test_mistakes_are_one_line(script: ModuleType, arguments: list[str], options: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        script.main(arguments, **options)
