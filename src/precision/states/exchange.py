"""Collectives of an update: maxima over the ranks that share parameters, and rows gathered from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .rules import Sum


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_as(part: Tensor, parameter: Tensor) -> Tensor:
    """``part``, whose rows are this rank's rows of ``parameter``, as a tensor of all ranks."""
    if not isinstance(parameter, DTensor):
        return part
    shape = torch.Size((parameter.shape[0], *part.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def row_offset(parameter: Tensor) -> int:
    """The first row of this rank's part in the full parameter."""
    if not isinstance(parameter, DTensor):
        return 0
    offset = 0
    for dim, placement in enumerate(parameter.placements):
        assert isinstance(placement, (Shard, Replicate)), "gradients must be complete before an update"
        if isinstance(placement, Shard):
            assert placement.dim == 0, "states follow parameters sharded by rows"
            rows, ranks = parameter.shape[0], parameter.device_mesh.size(dim)
            offset = min(rows, parameter.device_mesh.get_local_rank(dim) * -(-rows // ranks))
    return offset


def group_of(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks that have parts of the parameter; None if this one has all of it. Replicas hold the same."""
    if isinstance(parameter, DTensor):
        for dim, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard) and parameter.device_mesh.size(dim) > 1:
                return parameter.device_mesh.get_group(dim)
    return None


def over_ranks(amaxes: Tensor, parameter: Tensor) -> Tensor:
    """Their maxima over all ranks; NaN as an infinity, since a maximum over ranks may lose a NaN.

    ``parameter``: any of them: all are on one mesh.
    """
    amaxes = torch.where(amaxes.isnan(), torch.inf, amaxes)
    if (group := group_of(parameter)) is not None:
        dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=group)
    return amaxes


def exchanged(asked: Sequence[Tensor | Sum], parameters: Sequence[Tensor]) -> list[Tensor]:
    """All rows of each, or their sum over ranks in FP64, rounded to the value's dtype: one collective for each dtype.

    Args:
        asked: this rank's rows of what has the rows of its parameter, or terms of a sum; of one mesh.
        parameters: sharded by rows, or not sharded. Rows of stacks of matrices need nothing from other ranks.
    """
    result: list[Tensor | None] = [None] * len(asked)
    alike: dict[torch.dtype, list[int]] = {}
    for index, (one, parameter) in enumerate(zip(asked, parameters, strict=True)):
        value = one.value if isinstance(one, Sum) else one
        if group_of(parameter) is None or (parameter.dim() > 2 and not isinstance(one, Sum)):
            result[index] = value
        else:
            alike.setdefault(value.dtype, []).append(index)
    for dtype, indices in alike.items():
        group = group_of(parameters[indices[0]])
        assert group is not None
        flat = []
        for index in indices:
            one = asked[index]
            if isinstance(one, Sum):
                flat.append(one.value.reshape(-1))
            else:  # padded to the rows of a full shard
                rows = -(-parameters[index].shape[0] // group.size())
                padded = one.new_zeros(rows, *one.shape[1:])
                padded[: one.shape[0]] = one
                flat.append(padded.view(-1))
        sent = torch.cat(flat)
        received = torch.empty(group.size(), sent.numel(), dtype=dtype, device=sent.device)
        dist.all_gather(list(received.unbind()), sent, group=group)
        parts = torch.split_with_sizes(received, [part.numel() for part in flat], dim=1)
        for index, part in zip(indices, parts, strict=True):
            one = asked[index]
            if isinstance(one, Sum):
                result[index] = part.double().sum(0).to(dtype).view(one.value.shape)
            else:
                rows = -(-parameters[index].shape[0] // group.size()) * group.size()
                result[index] = part.reshape(rows, *one.shape[1:])[: parameters[index].shape[0]]
    return [value for value in result if value is not None]
