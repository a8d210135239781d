"""The blocks of a model, found by its structure: where recipes quantize, and what ``keep_first`` counts.

A block is a member of a stack, and is no linear itself: ``model.layers.3``, ``encoder.block.3``. A stack is an
``nn.ModuleList`` (or what numbers its children like one) that has such members with linears in them, or an
``nn.Sequential`` that has several alike; none that lies in a block of another. So the parts of an
``nn.Sequential(embedding, body, head)``, the linears of a head that is an ``nn.Sequential``, and a list of experts in a
block are no blocks. Each stack of a model, as encoder and decoder, counts from its own ends.

Where nothing is a stack, every linear counts as a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import nn


class _ByStructure(type):
    def __instancecheck__(cls, module: object) -> bool:
        if not isinstance(module, nn.Module) or hasattr(module, "plan_rows"):  # quantized
            return False
        shape = tuple(getattr(module, name, None) for name in ("num_experts", "out_features", "in_features"))
        weight = getattr(module, "weight", None) if None not in shape else None
        return isinstance(weight, nn.Parameter) and weight.shape == shape and getattr(module, "bias", None) is None


class Experts(nn.Module, metaclass=_ByStructure):
    """What a module of the linears of many experts is known by (``isinstance``): a parameter ``weight`` [num_experts,
    out_features, in_features], attributes of these names, and no bias.

    Its forward pass takes x [rows, in_features], rows in the order of experts, and ``precision.grouped.Routing``.
    """

    num_experts: int
    in_features: int
    out_features: int
    weight: nn.Parameter


LINEARS: tuple[type[nn.Module], ...] = (nn.Linear, Experts)
"""What a recipe of linears quantizes."""


@dataclass(frozen=True, slots=True)
class Block:
    """One of the ``total`` blocks of a stack, in order."""

    index: int
    total: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """``stacks``: the paths of the blocks of every stack, by the path of the stack. ``linears``: all there are."""

    stacks: dict[str, list[str]]
    linears: list[str]
    _of: dict[str, Block] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for paths in self.stacks.values() or [self.linears]:
            self._of.update((path, Block(index, len(paths))) for index, path in enumerate(paths))

    @property
    def total(self) -> int:
        return len(self._of)

    def of(self, path: str) -> Block | None:
        """The block that a module is in, or is."""
        while path not in self._of and path:
            path = path.rpartition(".")[0]
        return self._of.get(path)

    def __str__(self) -> str:
        if not self.stacks:
            return "blocks: none are found, so every linear counts as one"
        counts = [f"{len(paths)} in {stack or 'the model'}" for stack, paths in self.stacks.items()]
        return f"blocks: {', '.join(counts)}"


def find_blocks(model: nn.Module) -> Blocks:
    """The blocks of ``model``, which is not quantized yet."""
    linears = [path for path, module in model.named_modules() if isinstance(module, LINEARS)]
    return Blocks(dict(_stacks(model, "")), linears)


def _stacks(module: nn.Module, path: str) -> list[tuple[str, list[str]]]:
    """The stacks in ``module``, which is at ``path``."""
    children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
    holders = [(at, child) for at, child in children if _linears_in(child)]
    members = _members(module, holders)
    if members and (path or len(holders) > 1):  # a wrapper of one complete model is no stack
        deeper = _deeper(holders) if isinstance(module, nn.Sequential) and len(members) == 1 else []
        return deeper or [(path, [at for at, _ in members])]
    return _deeper(holders)


def _deeper(holders: list[tuple[str, nn.Module]]) -> list[tuple[str, list[str]]]:
    return [stack for at, child in holders for stack in _stacks(child, at)]


def _members(module: nn.Module, holders: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The blocks among the children with linears, if the module is a stack."""
    composite = [(at, child) for at, child in holders if not isinstance(child, LINEARS)]
    if not isinstance(module, nn.Sequential):
        return composite if all(name.isdigit() for name, _ in module.named_children()) else []
    if len(holders) == 1:
        return composite
    counts = Counter(_kind(child) for _, child in composite)
    return [(at, child) for at, child in composite if counts[_kind(child)] > 1]


def _kind(module: nn.Module) -> Hashable:
    """What twins share: the type; of containers also where their linears are."""
    container = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return type(module), tuple(_linears_in(module)) if container else ()


def _linears_in(module: nn.Module) -> list[str]:
    return [path for path, inner in module.named_modules() if isinstance(inner, LINEARS)]
