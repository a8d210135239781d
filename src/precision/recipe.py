"""A recipe is a frozen value; ``apply`` puts it into a model and gives back the plan of what was done.

recipe = load("bf16", {})
plan = apply(recipe, model)
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from precision import recipes
from precision.updates import AdamW, UpdateRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Dtypes:
    """What parameters are kept in, computed in, and what gradients are summed in over ranks."""

    param: torch.dtype = torch.float32
    compute: torch.dtype = torch.bfloat16
    reduce: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Replaces every module of type ``kind`` whose path matches ``path`` in full by ``make(module, path)``."""

    kind: type[nn.Module]
    path: str
    make: Callable[[nn.Module, str], nn.Module]


class Hook(Protocol):
    """What a recipe does once per optimizer step, on all ranks alike."""

    def begin_step(self, model: nn.Module, step: int) -> None: ...

    def end_step(self, model: nn.Module, step: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that a paper may change about precision. The trainer reads these fields and never the recipe's name."""

    rules: tuple[Rule, ...] = ()
    dtypes: Dtypes = Dtypes()
    update: UpdateRule = field(default_factory=AdamW)
    hooks: tuple[Hook, ...] = ()


class PlanRow(Protocol):
    """One line of ``plan.txt``."""

    def __str__(self) -> str: ...


@dataclass(frozen=True, slots=True)
class NativeLinear:
    """A linear left to torch, in the recipe's compute dtype."""

    path: str
    shape: tuple[int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        out_features, in_features = self.shape
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.path:44} {in_features:>6} -> {out_features:<6}  fprop, dgrad, wgrad: {dtype} (torch)"


@dataclass
class Plan:
    """What ``apply`` did to a model, and the recipe's door for the training loop."""

    recipe: Recipe
    model: nn.Module
    rows: Sequence[PlanRow]
    _step: int = field(default=0, init=False)

    def begin_step(self, step: int, sample_offset: int) -> None:
        """Before the first micro-batch of ``step``; ``sample_offset`` is this rank's first sample, by global index."""
        self._step = step
        for hook in self.recipe.hooks:
            hook.begin_step(self.model, step)

    def end_step(self) -> None:
        """After the last backward pass, before the parameters change."""
        for hook in self.recipe.hooks:
            hook.end_step(self.model, self._step)

    def state_tensors(self) -> dict[str, Tensor]:
        """What the recipe remembers from step to step, by name: the model's persistent buffers."""
        saved = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in saved}

    @contextmanager
    def high_precision(self) -> Iterator[None]:
        """Evaluate without the recipe's quantization."""
        yield

    def __str__(self) -> str:
        dtypes = self.recipe.dtypes
        names = {key: str(getattr(dtypes, key)).removeprefix("torch.") for key in ("param", "compute", "reduce")}
        head = "parameters {param}, compute {compute}, gradient reduction {reduce}".format(**names)
        return "\n".join([head, f"update {self.recipe.update}", *map(str, self.rows)]) + "\n"


def names() -> list[str]:
    """The recipes there are: the modules of ``precision.recipes``."""
    return sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))


def load(name: str, args: Mapping[str, Any]) -> Recipe:
    """The recipe ``precision.recipes.<name>`` with these arguments; its signature is the schema.

    Raises ValueError for an unknown recipe or argument (with the close matches) and for a missing one.
    """
    if name not in names():
        raise ValueError(f"no recipe named {name!r}{close(name, names())}; there are: {', '.join(names())}")
    make = importlib.import_module(f"precision.recipes.{name}").recipe
    parameters = inspect.signature(make).parameters
    for key in args:
        if key not in parameters:
            allowed = ", ".join(parameters) or "none"
            raise ValueError(f"recipe {name!r} has no argument {key!r}{close(key, parameters)}; it takes: {allowed}")
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in args]
    if missing:
        raise ValueError(f"recipe {name!r} needs {', '.join(missing)}")
    recipe = make(**args)
    assert isinstance(recipe, Recipe)
    return recipe


def close(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=3)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def apply(
    recipe: Recipe,
    model: nn.Module,
    *,
    tokens: int | None = None,
    device: torch.device | None = None,
    backend: str = "auto",
) -> Plan:
    """Replace modules of ``model`` in place as the recipe's rules say. Works on any tree of ``nn.Linear``.

    Args:
        tokens: rows of every activation matrix in one micro-batch, for backends that care about shapes.
        device: where the model will run; the model itself may be on the meta device.
        backend: ``auto``, or the one backend to use.

    Raises ValueError when a rule matches no module: a recipe that silently does nothing is worse than none.
    """
    for rule in recipe.rules:
        pattern = re.compile(rule.path)
        matched = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, rule.kind) and pattern.fullmatch(path)
        ]
        if not matched:
            kinds = sorted(path for path, module in model.named_modules() if isinstance(module, rule.kind))
            raise ValueError(
                f"the rule {rule.path!r} matches no {rule.kind.__name__}{close(rule.path, kinds)}; "
                f"there are {len(kinds)}, the first: {', '.join(kinds[:3]) or 'none'}"
            )
        for path, module in matched:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, rule.make(module, path))
    rows = [
        NativeLinear(path, (module.out_features, module.in_features), recipe.dtypes.compute)
        for path, module in model.named_modules()
        if type(module) is nn.Linear
    ]
    return Plan(recipe, model, rows)
