"""What scripts/host_cost.py starts for each revision: a quantized linear on a GPU that is not there. It is one file of
more than 450 lines because all that stands in for the GPU reads and counts in the same few names of this module.

python scripts/host_cost_measure.py OUT.json RECIPE,RECIPE STEPS   (the revision's src stands first in PYTHONPATH)

Tensors lie on the CPU and say that they are on ``cuda:0``; what torch is asked to make there it makes on the CPU.
Triton compiles every kernel for sm_90 and launches it into a driver that counts and does nothing: what is counted is
what reaches the driver, however it was launched. Products are counted and not computed. Nothing of the project is
replaced.

Counted in one pass, with every operation of torch watched:

* launches: of Triton kernels
* products: matrix products, native or torch's
* kernels: other operations of torch that read or write a tensor of the device; views and allocations are none
* copies: what makes the host wait for the device or the device for the host: a value read (``item``, ``float``,
  ``nonzero``, a boolean index), a tensor of the host copied to the device, one of the device copied to the host.
  Tensors made without a device, and what is computed of them alone, are the host's.
* at_end: all of these that a recipe adds at the end of a step, once for however many micro-batches; nothing of the
  optimizer

Timed in other passes, with nothing watched: CPU time of the process for forward and backward, minimum of many. No time
of the CUDA driver and of its allocator is in it, nor a launch of Triton's or of a product, and as little as may be of
what stands in for a GPU here (``unwatched``).
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

HOST, GPU = torch.device("cpu"), torch.device("cuda", 0)
# With the last blocks of a model in BF16 there would be nothing left of a model of one.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8_delayed": ("fp8_delayed", {}),
    "fp8_current": ("fp8_current", {}),
    "fp8_rowwise": ("fp8_rowwise", {}),
    "fp8_rowwise_gw_hp": ("fp8_rowwise", {"wgrad_high_precision": True}),
    "fp8_block": ("fp8_block", {}),
    "mxfp8": ("mxfp8", {}),
    "mxfp4": ("mxfp4", {"keep_last": 0}),
    "nvfp4": ("nvfp4", {"keep_last": 0}),
}
SIZES = {"fp8_block": (256, 512, 512)}
"""Tokens, inputs and outputs, where scales need more than the usual ones to be of more than one column. What torch
computes on them is in the time, so they are small; no product pads them."""
FACTORIES = (
    *("tensor", "as_tensor", "scalar_tensor", "empty", "zeros", "ones", "full", "arange", "eye", "rand", "randn"),
    *("randint", "empty_strided", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like"),
)
METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")
ALLOCATIONS = {
    *(
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "detach",
        "alias",
        "lift",
        "lift_fresh",
    ),
    *("_unsafe_view", "_reshape_alias", "view_as", "set_", "resize_"),
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_mm", "_scaled_mm_v2", "_scaled_grouped_mm"}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "is_nonzero"}


class Launcher:
    """What Triton calls to launch a compiled kernel."""

    count = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> None:
        Launcher.count += 1


class Utils:
    """What Triton's driver knows of a device."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 0, 0, 40, 0, 1024  # module, function, registers, spills, threads at most

    def unload_module(self, *_: Any) -> None:
        pass

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232448,
            "max_num_regs": 65536,
            "warpSize": 32,
            "multiprocessor_count": 132,
            "sm_clock_rate": 1_980_000,
            "mem_clock_rate": 2_619_000,
            "mem_bus_width": 5120,
        }


class Driver:
    """Triton's driver of one H100 that does nothing."""

    utils = Utils()
    launcher_cls = Launcher

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return GPU

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, type: str) -> str:
        return type

    def get_empty_cache_for_benchmark(self) -> Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: Tensor) -> None:
        pass

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(function: Callable[[], Any], **_: Any) -> list[float]:
            function()
            return [1.0, 1.0, 1.0]

        return benchmark


class Watch(TorchDispatchMode):
    """Counts operations by what they would be on a GPU, and remembers which tensors are the host's."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        self.opaque: set[str] = set()
        self.makes_host = True  # where an operation has no tensor to say so

    def note(self, kind: str, name: str) -> None:
        self.counts[kind] += 1
        self.names[f"{kind}: {name}"] += 1

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), more: dict[str, Any] | None = None
    ) -> Any:
        more = more or {}
        if function.namespace not in ("aten", "prim", "prims"):
            body = bodies.get(function._schema.name)
            if body is not None:  # an operator of the project's own is what its body does
                with self:
                    return body(*arguments, **more)
            self.opaque.add(str(function))
        given = [x for x in tree_leaves((arguments, more)) if isinstance(x, Tensor)]
        of_host = [x for x in given if on_host(x)]
        name = function._schema.name.split("::")[-1]
        result = function(*arguments, **more)
        host = len(of_host) == len(given) if given else self.makes_host
        if host:
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    to_host(x)
            return result
        if name in WAITING or (name.startswith("index") and _waits(arguments)):
            self.note("copies", name)
        elif name == "copy_" and on_host(arguments[1]):
            self.note("copies", "copy_ to the device")
        elif name in PRODUCTS:
            self.note("products", name)
        elif name not in ALLOCATIONS and not function.is_view:
            self.note("kernels", name)
        return result


def _waits(arguments: tuple[Any, ...]) -> bool:
    """Whether an index is a mask, whose size the host must learn, or lies on the host."""
    indices = [x for x in tree_leaves(arguments[1:2]) if isinstance(x, Tensor)]
    return any(x.dtype == torch.bool or (on_host(x) and x.dim() > 0) for x in indices)


def on_host(x: Tensor) -> bool:
    return "_of_host" in x.__dict__


def to_host(x: Tensor) -> Tensor:
    x.__dict__["_of_host"] = True
    return x


def to_gpu(x: Tensor) -> Tensor:
    x.__dict__.pop("_of_host", None)
    return x


watch: Watch | None = None
bodies: dict[str, Callable[..., Any]] = {}
real_device = torch.Tensor.device
originals: dict[tuple[Any, str], Callable[..., Any]] = {}


def _device(x: Tensor) -> torch.device:
    real: torch.device = real_device.__get__(x)
    return GPU if real == HOST and not (watch is not None and on_host(x)) else real


def _factory(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``original``, which makes on the CPU what it is to make on the GPU."""

    def make(*arguments: Any, **more: Any) -> Any:
        device = more.get("device")
        if device is not None and torch.device(device).type == "cuda":
            more["device"] = HOST
        if watch is None:
            return original(*arguments, **more)
        first = arguments[0] if arguments else None
        known = isinstance(first, Tensor)
        wanted = device is not None and torch.device(device).type == "cuda"
        watch.makes_host, before = (not wanted) if device is not None or not known else on_host(first), watch.makes_host
        try:
            result = original(*arguments, **more)
        finally:
            watch.makes_host = before
        if name == "as_tensor" and known and device is None:
            return result
        if name in ("tensor", "as_tensor", "new_tensor") and wanted and (not known or on_host(first)):
            watch.note("copies", f"{name} to the device")
            return to_gpu(result.clone() if result is first else result)
        if device is not None:
            return to_gpu(result) if wanted or result.is_meta else to_host(result)
        return result if known else to_host(result)

    return make


def _to(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def to(x: Tensor, *arguments: Any, **more: Any) -> Tensor:
        places = [a for a in (*arguments, more.get("device")) if isinstance(a, torch.device | str)]
        arguments = tuple(a for a in arguments if not isinstance(a, torch.device | str))
        more.pop("device", None)
        result = original(x, *arguments, **more) if arguments or more else x
        if watch is None or not places:
            return result
        to_device = torch.device(places[0]).type == "cuda"
        if to_device != on_host(x):
            return result
        if not more.get("non_blocking"):
            watch.note("copies", "to the device" if to_device else "to the host")
        result = result.clone() if result is x else result
        return to_gpu(result) if to_device else to_host(result)

    return to


def _reading(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    def read(x: Tensor, *arguments: Any, **more: Any) -> Any:
        if watch is not None and not on_host(x):
            watch.note("copies", name)
        return original(x, *arguments, **more)

    return read


def _product(original: Callable[..., Tensor], left: int) -> Callable[..., Tensor]:
    """A matrix product of argument ``left`` and the next: not computed where it is no part of torch's own graph."""

    def product(*arguments: Any, **more: Any) -> Tensor:
        a, b = arguments[left : left + 2]
        if torch.is_grad_enabled() and any(x.requires_grad for x in (a, b)):
            return original(*arguments, **more)
        if watch is not None:
            watch.note("products", getattr(original, "__name__", "product"))
        dtype = more.get("output_dtype") or more.get("out_dtype") or a.dtype
        return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)

    return product


def pretend() -> None:
    """Make torch and Triton say that there is a GPU. Nothing of the project may be imported before."""
    driver.set_active(Driver())
    torch.Tensor.device = property(_device)
    torch.Tensor.is_cuda = property(lambda x: x.device.type == "cuda")
    torch.Tensor.is_cpu = property(lambda x: x.device.type == "cpu")
    torch.Tensor.get_device = lambda x: 0 if x.device.type == "cuda" else -1
    for owner, names in ((torch, FACTORIES), (torch.Tensor, METHODS)):
        for name in names:
            originals[owner, name] = getattr(owner, name)
            setattr(owner, name, _factory(originals[owner, name], name))
    originals[torch.Tensor, "to"] = torch.Tensor.to
    torch.Tensor.to = _to(torch.Tensor.to)
    for name in ("cpu", "numpy", "tolist"):
        setattr(torch.Tensor, name, _reading(getattr(torch.Tensor, name), name))
    for owner, name, left in (
        *((torch.Tensor, "__matmul__", 0), (torch, "matmul", 0), (torch, "mm", 0), (torch, "addmm", 1)),
        *((F, "scaled_mm", 0), (torch, "_scaled_mm", 0)),
    ):
        if hasattr(owner, name):
            setattr(owner, name, _product(getattr(owner, name), left))
    stream = SimpleNamespace(cuda_stream=0, device=GPU)
    properties = SimpleNamespace(
        name="none", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20
    )
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "current_stream": lambda device=None: stream,
        "is_current_stream_capturing": lambda: False,
    }.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.library.Library.impl = _registering(torch.library.Library.impl)


@contextmanager
def unwatched() -> Iterator[None]:
    """What ``pretend`` put in place, as cheap as what it stands for: every tensor is one of the GPU."""
    replaced: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        replaced.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, value)

    def allocating(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*arguments: Any, device: Any = None, **more: Any) -> Tensor:
            if device is None or device is GPU:
                return original(*arguments, **more)
            return original(*arguments, device=HOST if torch.device(device).type == "cuda" else device, **more)

        return make

    def to(x: Tensor, *arguments: Any, **more: Any) -> Tensor:
        more.pop("device", None)
        if arguments and isinstance(arguments[0], torch.device | str):
            arguments = arguments[1:]
        return originals[torch.Tensor, "to"](x, *arguments, **more) if arguments or more else x

    for name, value in {"device": GPU, "is_cuda": True, "is_cpu": False, "get_device": functools.partial(int)}.items():
        put(torch.Tensor, name, value)
    for owner, names in ((torch, FACTORIES), (torch.Tensor, METHODS)):
        for name in names:
            put(owner, name, allocating(originals[owner, name]))
    put(torch.Tensor, "to", to)
    try:
        yield
    finally:
        for owner, name, value in reversed(replaced):
            setattr(owner, name, value)


def _registering(original: Callable[..., Any]) -> Callable[..., Any]:
    """Remember the body of every operator; one for GPUs alone is for tensors that say that they are there."""

    def impl(library: Any, operator: Any, body: Any, key: str = "", **more: Any) -> Any:
        name = operator if isinstance(operator, str) else operator._schema.name
        name = name if "::" in name else f"{library.ns}::{name}"
        if key in ("", "CompositeExplicitAutograd", "CompositeImplicitAutograd", "CPU", "CUDA"):
            bodies[name] = body
        of_torch = (
            body.__module__.startswith("torch.") and "custom_ops" not in body.__module__
        )  # which has all it needs
        key = "CPU" if key == "CUDA" and not of_torch else key
        return original(library, operator, body, key, **more)

    return impl


class Model(nn.Module):
    """A block of linears that read one x."""

    def __init__(self, num_linears: int, ins: int, outs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList(nn.Linear(ins, outs, bias=False) for _ in range(num_linears))])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.layers[0]]


def measure(name: str, num_linears: int, steps: int) -> dict[str, Any]:
    """Counts and host microseconds of one linear, forward and backward, of ``num_linears`` that share an x."""
    global watch
    tree = Path(os.environ.get("PYTHONPATH", "").split(os.pathsep)[0])
    before_the_package = (tree / "precision").is_dir() and not (tree / "narrowgauge").is_dir()
    precision = importlib.import_module("precision" if before_the_package else "narrowgauge.precision")
    kind, arguments = RECIPES[name]
    tokens, ins, outs = SIZES.get(name, (128, 128, 128))
    torch.manual_seed(0)
    watch = Watch()
    with watch:
        model = Model(num_linears, ins, outs).to(torch.bfloat16)
        _place(model)
        plan = precision.apply(precision.load(kind, arguments), model, tokens=tokens, device=GPU)
        _place(model)
        x = to_gpu(torch.randn(1, tokens, ins, dtype=torch.bfloat16))
        dy = [to_gpu(torch.randn(1, tokens, outs, dtype=torch.bfloat16)) for _ in range(num_linears)]

        parameters = list(model.parameters())

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            torch.autograd.backward(model(x.detach().requires_grad_()), dy)

        plan.begin_step(0, 0, 10)
        step()
        plan.begin_step(1, 4, 10)  # what a step does once is not what a micro-batch does
        step()
        _place(model)
        watch.counts.clear()
        watch.names.clear()
        Launcher.count = 0
        step()
        launches, counts, names = Launcher.count, dict(watch.counts), dict(watch.names)
        Launcher.count = 0
        watch.counts.clear()
        plan.end_step()
        at_end = Launcher.count + watch.counts.total()
    opaque, watch = sorted(watch.opaque), None
    with unwatched():
        step()
        Launcher.count = 0
        step()
        launches_then = Launcher.count
        best = float("inf")
        for _ in range(25):
            start = time.process_time()
            for _ in range(steps):
                step()
            best = min(best, (time.process_time() - start) / steps)
    backends = [backend.name for backend in next(m for m in model.modules() if hasattr(m, "backends")).backends]
    return {
        "recipe": name,
        "linears": num_linears,
        "backends": "/".join(backends),
        "launches": launches / num_linears,
        **{kind: counts.get(kind, 0) / num_linears for kind in ("products", "kernels", "copies")},
        "at_end": at_end / num_linears,
        "host_us": best * 1e6 / num_linears,
        "names": names,
        "unseen": opaque if launches == launches_then else [*opaque, f"{launches_then} launches, unwatched"],
    }


def _place(model: nn.Module) -> None:
    for x in (*model.parameters(), *model.buffers()):
        to_gpu(x)


if __name__ == "__main__":
    out, wanted, steps = sys.argv[1:]
    torch.set_num_threads(1)
    pretend()
    rows: list[dict[str, Any]] = []
    for name in wanted.split(","):
        for num_linears in (1, 3):
            try:
                rows.append(measure(name, num_linears, int(steps)))
            except Exception as error:  # a recipe that fails must not hide the others
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                rows.append({"recipe": name, "linears": num_linears, "error": reason})
            Path(out).write_text(json.dumps(rows), encoding="utf-8")
