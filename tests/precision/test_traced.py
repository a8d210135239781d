"""``torch.compile`` takes a block with quantized linears as one graph, which computes what eager code does."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from narrowgauge.precision.apply import apply
from narrowgauge.precision.linear import QuantLinear
from narrowgauge.precision.loading import load
from narrowgauge.precision.plan import Plan
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

RECIPES: dict[str, dict[str, Any]] = {
    "fp8_current": {},
    "fp8_delayed": {},
    "fp8_rowwise": {"wgrad_high_precision": True},
    "nvfp4": {"keep_last": 0},
}


class Block(nn.Module):
    """Siblings that read one x and differ in width, a bias, and a last linear."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 64, bias=False), nn.Linear(64, 32)
        self.o = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.layer_norm(x, x.shape[-1:])
        q, k = self.q(y), self.k(y)
        return x + self.o(q * torch.cat((k, k), -1).tanh())


class Model(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Graphs:
    """A compiler that runs what it is given as it is, and keeps it."""

    def __init__(self) -> None:
        self.operators: list[Counter[str]] = []
        self.backend = aot_autograd(
            fw_compiler=self._take, bw_compiler=self._take, partition_fn=min_cut_rematerialization_partition
        )

    def _take(self, graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        names = (str(node.target).partition(".default")[0] for node in graph.graph.nodes)
        self.operators.append(Counter(name for name in names if name.startswith("narrowgauge")))
        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def made(name: str, blocks: int = 2, schedule: tuple[Any, ...] = ()) -> tuple[Model, Plan]:
    model = Model(blocks).bfloat16()
    return model, apply(load(name, RECIPES[name], schedule), model, tokens=32)


def trained(model: Model, plan: Plan, steps: int = 3) -> list[Tensor]:
    """Outputs, gradients and what is remembered."""
    results: list[Tensor] = []
    for step in range(steps):
        plan.begin_step(step, 4 * step, 10)
        plan.begin_micro(4 * step, 4)
        x = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(step)).bfloat16().requires_grad_()
        y = model(x)
        y.backward(torch.sin(100 * y.detach()))
        results += [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]  # type: ignore[list-item]
        plan.end_step()
    with torch.no_grad():
        results.append(model.eval()(x.detach()))
    model.train()
    return [*results, *(buffer.clone() for buffer in model.buffers())]


@pytest.mark.parametrize("name", RECIPES)
def test_a_block_is_one_graph_that_computes_as_eager_code(name: str) -> None:
    eager = trained(*made(name))
    model, plan = made(name)
    graphs = Graphs()
    for layer in model.layers:
        layer.compile(backend=graphs.backend)
    compiled = trained(model, plan)
    assert all(map(torch.equal, eager, compiled))
    assert len(eager) == len(compiled)
    assert not counters["graph_break"]
    forward, backward, evaluation = graphs.operators  # of two blocks: the second is computed by the graphs of the first
    assert forward["narrowgauge.linear"] == evaluation["narrowgauge.linear"] == 3
    assert backward == {"narrowgauge.linear_backward": 3}
    # q and k read one x, and share what is made of it where nothing but x decides.
    assert forward["narrowgauge.inputs"] == (0 if name == "fp8_delayed" else 2)


def test_many_blocks_are_one_graph() -> None:
    """More than dynamo would compile anew for."""
    model, plan = made("nvfp4", 12)
    graphs = Graphs()
    for layer in model.layers:
        layer.compile(backend=graphs.backend)
    trained(model, plan, 1)
    assert counters["stats"]["unique_graphs"] == 2  # for training, and without gradients


def test_a_schedule_changes_what_is_compiled() -> None:
    """Linears that have computed by a kind, and no longer do, do not stand for those that do."""
    schedule = ({"steps": [1, 2], "gemms": ["fprop", "wgrad"], "recipe": "fp8_rowwise"}, {"steps": [2, 3]})
    eager = trained(*made("fp8_current", 2, schedule))
    model, plan = made("fp8_current", 2, schedule)
    for layer in model.layers:
        layer.compile(backend=Graphs().backend)
    assert all(map(torch.equal, eager, trained(model, plan)))


KINDS = """
from narrowgauge.precision.apply import apply
from narrowgauge.precision.loading import load
from test_traced import RECIPES, Model
for name in RECIPES:
    model = Model(1)
    apply(load(name, RECIPES[name]), model, tokens=32)
    print(name, model.layers[0].q.plan.kind, model.layers[0].q.plan.kind_of_inputs)
"""


def test_kinds_are_the_same_in_every_process() -> None:
    """Compiled graphs hold them and are kept on disk: another recipe's graph must not be found by its number."""
    found = {}
    for name in reversed(RECIPES):
        linear = made(name, 1)[0].layers[0].q
        assert isinstance(linear, QuantLinear)
        found[name] = [str(linear.plan.kind), str(linear.plan.kind_of_inputs)]
    process = subprocess.run([sys.executable, "-c", KINDS], capture_output=True, text=True, check=True, env=paths())
    assert {name: kinds for name, *kinds in map(str.split, process.stdout.splitlines())} == found
    assert len({kind for kinds in found.values() for kind in kinds}) == 2 * len(found)


def paths() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_what_is_not_needed_is_not_computed() -> None:
    """A frozen weight, and an input without a gradient."""

    def run(compiled: bool) -> list[Tensor | None]:
        model, plan = made("fp8_current", 1)
        model.layers[0].q.weight.requires_grad_(False)
        if compiled:
            model.layers[0].compile(backend=Graphs().backend)
        plan.begin_step(0, 0, 1)
        x = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        model(x).sum().backward()
        return [p.grad for p in model.parameters()]

    eager, compiled = run(False), run(True)
    assert eager[0] is None
    assert compiled[0] is None
    assert all(a is None or torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))  # type: ignore[arg-type]


def test_a_copy_is_another_linear() -> None:
    """It writes its own amaxes, not those of what it was copied from."""
    model, plan = made("fp8_delayed", 1)
    twin = copy.deepcopy(model.layers[0])
    twin.compile(backend=Graphs().backend)
    plan.begin_step(0, 0, 1)
    twin(torch.randn(4, 8, 64).bfloat16()).sum().backward()
    first, second = model.layers[0].q, twin.q
    assert isinstance(first, QuantLinear)
    assert isinstance(second, QuantLinear)
    assert not first.amax_history.any()
    assert second.amax_history[0].all()


def test_what_is_watched_breaks_the_graph_and_stays_right() -> None:
    """An observer looks on from outside of graphs."""
    model, plan = made("fp8_current", 1)
    seen: list[str] = []

    class Observer:
        def operand(self, module: QuantLinear, row: str, *rest: Any) -> None:
            pass

        def output(self, module: QuantLinear, row: str, *rest: Any) -> str:
            return row

        def add(self, figures: list[Any]) -> None:
            seen.append(figures[-1])

    model.layers[0].compile(backend=Graphs().backend)
    plan.begin_step(0, 0, 1)
    x = torch.randn(4, 8, 64).bfloat16()
    y = model(x)
    for linear in (model.layers[0].q, model.layers[0].k, model.layers[0].o):
        linear.observer = Observer()  # type: ignore[assignment]
    watched = model(x)
    watched.sum().backward()
    assert torch.equal(y, watched)
    assert Counter(seen) == {"fprop.y": 3, "dgrad.dx": 1, "wgrad.dw": 3}  # no gradient goes to x
