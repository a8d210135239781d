"""Linears of many experts as one parameter: rows are sorted by expert, and each expert multiplies its own.

Shape suffixes: R rows, E experts.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Routing:
    """Which expert reads which rows of a micro-batch.

    Args:
        counts_E: int64 [E], rows of every expert; rows lie in the order of experts.
        ids_R: int64 [R], the place of every row among all that the micro-batch could route: different for different
            rows, below ``total``, ascending over samples: as token * k + choice. Rounding noise goes by it, so that
            it follows a token to whichever expert reads it, with whichever neighbours.
        total: number of places, a multiple of the number of samples.
    """

    counts_E: Tensor
    ids_R: Tensor
    total: int

    @functools.cached_property
    def rows(self) -> list[int]:
        """``counts_E`` on the host, which waits for the device: once for all linears of a block."""
        counts: list[int] = self.counts_E.tolist()
        return counts


class GroupedLinear(nn.Module):
    """y_r = W_e x_r, with e the expert of row r, and without a bias. [R, in_features] -> [R, out_features].

    Every expert computes, one without rows too: its weight then has a gradient of zeros, and every rank reduces the
    same gradients.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=1 / math.sqrt(in_features))

    def forward(self, x_RC: Tensor, routing: Routing) -> Tensor:
        rows = x_RC.split(routing.rows)
        return torch.cat([F.linear(x, w) for x, w in zip(rows, self.weight.unbind(), strict=True)])

    def extra_repr(self) -> str:
        return f"{self.num_experts} x {self.in_features} -> {self.out_features}"
