"""The flat buffers of an FSDP2 group: its parameters in order, each padded to the rows of rank 0's shard.

That layout is documented nowhere, so whoever relies on it compares a first buffer with the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def all_gather(
    received: Tensor, sent: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """Fill ``received`` [ranks * n] with every rank's ``sent`` [n]."""
    # As torch calls it from 2.13 on, or did before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(received, sent, group, async_op)
    return work


def another_layout(what: str) -> RuntimeError:
    """The error for a torch that lays out such a buffer otherwise; ``what``: the setting and the collective."""
    return RuntimeError(f"{what} in another way than 2.11 to 2.13")


def parameters_of(group: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a group by their names in it, in the order of its buffers.

    ``group``: what ``fully_shard`` was called on. Children come before their parents; what a nested group has is its
    own; what several modules share is there once.
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in _after_children(group, "", set()):
        for name, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), (f"{path}{name}", parameter))
    return dict(found.values())


def _after_children(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """``module`` and what is below it in the same group, with paths that end in a dot where they are not empty."""
    seen.add(id(module))
    for name, child in module.named_children():
        if id(child) not in seen and not isinstance(child, FSDPModule):
            yield from _after_children(child, f"{path}{name}.", seen)
    yield path, module
