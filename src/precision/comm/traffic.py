"""What ranks exchange to reduce gradients as codes: among whom, of which parameters, in how many bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..comm_spec import Reduction
from ..noise import Noise
from ..quantize import Quantized, quantize
from ..scaling import TENSOR


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that gradients are summed over: those that share a replica, and those that hold the same shard."""

    shards: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    shard: int
    replica: int
    num_shards: int
    num_replicas: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Ranks:
        last = mesh.ndim - 1
        several = last > 0
        return cls(
            shards=mesh.get_group(last),
            replicas=mesh.get_group(0) if several else None,
            shard=mesh.get_local_rank(last),
            replica=mesh.get_local_rank(0) if several else 0,
            num_shards=mesh.size(last),
            num_replicas=mesh.size(0) if several else 1,
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """A parameter's part of the flat buffers: ``rows`` of its first dimension on every rank, the last ones padded."""

    name: str
    shape: tuple[int, ...]
    rows: int
    coded: bool

    @property
    def vector(self) -> bool:
        return len(self.shape) == 1

    @property
    def numel(self) -> int:
        """Of a shard, with padding."""
        return self.rows * math.prod(self.shape[1:])

    @property
    def columns(self) -> int:
        return self.shape[-1]

    def matrix_rows(self, rows: int) -> int:
        """Of the matrix of so many rows of the first dimension."""
        return rows * math.prod(self.shape[1:-1])

    def held(self, shard: int) -> int:
        """Rows of the first dimension that a shard holds."""
        return max(0, min(self.rows, self.shape[0] - shard * self.rows))

    def matrix(self, flat: Tensor) -> Tensor:
        """[rows, columns] of whole rows of the parameter; a vector is one row."""
        return flat.reshape(1, -1) if self.vector else flat.reshape(-1, self.columns)


class Part(NamedTuple):
    """Codes or scales of a rounded matrix: [rows, n] by row, or of all of it."""

    tensor: Tensor
    by_row: bool


def parts_of(q: Quantized, vector: bool) -> list[Part]:
    """Codes, scales, and those of an outer level if there is one."""
    parts = [Part(q.codes, True), Part(q.scales, q.spec.tile != TENSOR)]
    parts += [] if q.tensor_scale is None else [Part(q.tensor_scale, q.tensor_scale.dim() == 2)]
    return [Part(tensor, by_row and not vector) for tensor, by_row in parts]


@dataclass(eq=False)
class Cost:
    """What a rank hands to collectives to reduce the gradients of a step, in bytes."""

    reduction: Reduction
    ranks: Ranks
    dtype: torch.dtype
    coded: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    bytes: int = 0
    plain: int = 0

    def add(self, segments: Sequence[Segment]) -> None:
        ranks = self.ranks
        shards, replicas = ranks.num_shards, ranks.num_replicas
        values = sum(one.numel for one in segments) * self.dtype.itemsize
        plain = (values * shards if shards > 1 else 0) + (values if replicas > 1 else 0)
        self.plain += plain
        coded = [one for one in segments if one.coded]
        self.coded += [one.name for one in coded]
        self.others += [one.name for one in segments if not one.coded]
        if not coded:
            self.bytes += plain
            return
        amaxes = 4 * len(coded)
        if shards > 1:
            for one in segments:
                rows = one.matrix_rows(one.rows)
                self.bytes += shards * (self._of(one, rows) if one.coded else one.numel * self.dtype.itemsize)
            self.bytes += amaxes * (1 + (replicas > 1)) if self.reduction.shared_scale else 0
        if replicas > 1:
            for one in segments:
                rows = one.matrix_rows(one.held(ranks.shard))
                self.bytes += self._of(one, rows) if one.coded else one.numel * self.dtype.itemsize
            self.bytes += amaxes if self.reduction.shared_scale else 0
            self.bytes += amaxes if shards > 1 and self.reduction.per_tensor else 0

    def _of(self, one: Segment, rows: int) -> int:
        """Codes, scales and a byte for what is not finite, of so many rows of a matrix."""
        noise = Noise(key=torch.zeros(2, dtype=torch.int32)) if self.reduction.spec.stochastic else None
        q = quantize(torch.zeros(1, one.columns), self.reduction.spec, noise=noise)
        parts = parts_of(q, one.vector)
        return 1 + sum(part.tensor.numel() * part.tensor.itemsize * (rows if part.by_row else 1) for part in parts)

    @property
    def lines(self) -> list[str]:
        """Of plan.txt."""
        ranks, dtype = self.ranks, str(self.dtype).removeprefix("torch.")
        others = f"; {_listed(self.others)} in {dtype}" if self.others else ""
        what = f"gradients of {_listed(self.coded)} as {self.reduction}"
        if ranks.num_shards * ranks.num_replicas == 1:
            return [f"rounded: {what}, once a step: one process sends none{others}"]
        ways = [f"all to all over {ranks.num_shards} ranks"] if ranks.num_shards > 1 else []
        ways += [f"gathered from {ranks.num_replicas} replicas"] if ranks.num_replicas > 1 else []
        return [
            f"reduced: {what}, {', then '.join(ways)}, summed in rank order in float32{others}",
            f"reduced: {self.bytes:,} bytes a step and rank, for {self.plain:,} in {dtype}",
        ]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} others"
