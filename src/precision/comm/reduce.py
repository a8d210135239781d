"""Gradients reduced as codes: FSDP2's reduce-scatter as an exchange of codes, all to all, summed in rank order in FP32.

Every rank rounds its own gradient of a parameter, whole (``comm_spec.Reduction``), and sends every other rank the codes
of that one's rows, with the scales that belong to them; so nothing is rounded on the way, and a sum does not depend on
a ring. Parameters of the same FSDP group that are not rounded travel in the same exchange as they are, and are summed
alike. Under HSDP the sums of each replica are rounded again, gathered from all replicas, and summed in their order; the
bytes of that grow with the number of replicas, where those of a ring would not. One process alone rounds once.

FSDP2 has two doors for this: ``set_custom_reduce_scatter``, a collective over a group's flat buffer (``layout``), and
``set_all_reduce_hook``, called with what it gave. HSDP's own all-reduce has none, so a model whose gradients are
reduced so is sharded over one replica's mesh, and the hook reduces over the others.

Micro-batches add up on each rank in ``dtypes.reduce``, before the one reduction of a step. A vector is sent whole to
every rank: blocks of it, and bytes of two codes, may lie in two shards. A gradient that is not finite anywhere becomes
NaN everywhere, so that the step is seen for what it is: a byte for every parameter and rank tells of it, because few
formats could.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from ..comm_spec import Reduction
from ..context import StepContext
from ..noise import Noise, base_key
from ..quantize import Quantized, amax, dequantize, quantize
from ..scaling import AMAX, TENSOR
from ..suggest import close
from .layout import all_gather, another_layout, parameters_of
from .traffic import Cost, Part, Ranks, Segment, parts_of

_SLOTS = (64, 65)  # of rounding noise, at the first and at the second rounding: modules and states have lower ones


@dataclass(frozen=True, slots=True)
class _Rounded:
    """A rounded matrix.

    Args:
        factor: on what was rounded.
        pieces: bytes of its ``parts``, and whether all was finite: by destination [ranks, n], or [1, n] for all alike.
    """

    q: Quantized
    parts: Sequence[Part]
    factor: Tensor | float | None
    pieces: Sequence[Tensor]


@dataclass(eq=False)
class CodesReduce:
    """The reduction of one FSDP group: its reduce-scatter (``torch.distributed.fsdp``'s ``ReduceScatter``), and what
    ``all_reduce`` does with the result."""

    group: nn.Module
    segments: Sequence[Segment]
    reduction: Reduction
    ranks: Ranks
    context: StepContext
    _vectors: dict[str, Tensor] = field(default_factory=dict, init=False)  # whole sums, between the two reductions
    _keys: dict[tuple[str, int], Tensor] = field(default_factory=dict, init=False)
    _awaited: dict[str, Tensor] | None = field(default=None, init=False)  # what FSDP is to give the parameters
    _handles: list[Any] = field(default_factory=list, init=False)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any = dist.ReduceOp.SUM,
        async_op: bool = False,
    ) -> None:
        """Fill ``output_tensor`` [n] with the sum over ranks of this rank's row of ``input_tensor`` [ranks * n].

        Raises RuntimeError for another operation than a sum, and for a buffer that is not the group's parameters.
        """
        if op != dist.ReduceOp.SUM:
            raise RuntimeError(
                "gradients are summed as codes: call set_gradient_divide_factor(1.0) and "
                "set_force_sum_reduction_for_comms(True) of every FSDP module"
            )
        ranks = self.ranks
        self._require_size(output_tensor)
        parts = torch.split(input_tensor.view(ranks.num_shards, -1), [one.numel for one in self.segments], 1)
        wholes = {
            one.name: one.matrix(part.reshape(-1)[: math.prod(one.shape)])
            for one, part in zip(self.segments, parts, strict=True)
            if one.coded
        }
        amaxes = self._amaxes(wholes, [ranks.shards, ranks.replicas] if self.reduction.shared_scale else [])
        rounded: dict[str, _Rounded] = {}
        pieces: list[Tensor] = []
        for one, part in zip(self.segments, parts, strict=True):
            if one.coded:
                rounded[one.name] = self._rounded(one, wholes[one.name], amaxes.get(one.name), 0)
                pieces += rounded[one.name].pieces
            else:
                pieces.append(part.contiguous().view(torch.uint8))
        sent = torch.cat([piece.expand(ranks.num_shards, -1) for piece in pieces], 1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        arrived = iter(torch.split(received, [piece.shape[1] for piece in pieces], 1))
        outputs = torch.split(output_tensor, [one.numel for one in self.segments])
        self._vectors.clear()
        for one, out in zip(self.segments, outputs, strict=True):
            if not one.coded:
                out.copy_(_sum(next(arrived), out.dtype))
                continue
            mine = rounded[one.name]
            there = [next(arrived) for _ in mine.pieces]
            start, held = ranks.shard * one.rows, one.held(ranks.shard)
            total = self._summed(one, mine, there, 1 if one.vector else one.matrix_rows(held)).to(out.dtype)
            if one.vector:
                self._vectors[one.name] = total
                total = total[:, start : start + held]
            out[: total.numel()].copy_(total.flatten())
            out[total.numel() :].zero_()
        if ranks.num_replicas == 1:
            self._compare_soon(outputs)

    @torch.no_grad()
    def all_reduce(self, output: Tensor) -> None:
        """Sum ``output`` [n], a shard's sums, over replicas in place; of one process alone, round it.

        Raises RuntimeError for a buffer that is not the group's parameters.
        """
        ranks = self.ranks
        self._require_size(output)
        _hold(output)
        parts = torch.split(output, [one.numel for one in self.segments])
        second = int(ranks.num_shards > 1)
        matrices: dict[str, Tensor] = {}
        for one, part in zip(self.segments, parts, strict=True):
            if one.coded and one.name in self._vectors:
                matrices[one.name] = self._vectors.pop(one.name)
                if output.is_cuda:  # made on the stream of the reduce-scatter
                    matrices[one.name].record_stream(torch.cuda.current_stream(output.device))
            elif one.coded:
                matrices[one.name] = one.matrix(part[: math.prod((one.held(ranks.shard), *one.shape[1:]))])
        meets = [ranks.replicas] if self.reduction.shared_scale else []
        meets += [ranks.shards] if second and self.reduction.per_tensor else []
        amaxes = self._amaxes(matrices, meets)
        rounded: dict[str, _Rounded] = {}
        pieces: list[Tensor] = []
        for one, part in zip(self.segments, parts, strict=True):
            if one.coded:
                rounded[one.name] = self._rounded(one, matrices[one.name], amaxes.get(one.name), second)
                pieces += rounded[one.name].pieces
            else:
                pieces.append(part.view(1, -1).view(torch.uint8))
        received = sent = torch.cat(pieces, 1)
        if ranks.num_replicas > 1:
            received = torch.empty(ranks.num_replicas, sent.shape[1], dtype=torch.uint8, device=sent.device)
            all_gather(received.view(-1), sent.view(-1), ranks.replicas)
        arrived = iter(torch.split(received, [piece.shape[1] for piece in pieces], 1))
        for one, out in zip(self.segments, parts, strict=True):
            if not one.coded:
                out.copy_(_sum(next(arrived), out.dtype))
                continue
            mine = rounded[one.name]
            total = self._summed(one, mine, [next(arrived) for _ in mine.pieces], mine.q.shape[0])
            if one.vector and second:
                start = ranks.shard * one.rows
                total = total[:, start : start + one.held(ranks.shard)]
            out[: total.numel()].copy_(total.flatten())
        self._compare_soon(parts)

    def _require_size(self, shard: Tensor) -> None:
        if shard.numel() != sum(one.numel for one in self.segments):
            raise RuntimeError(
                "gradients reduced as codes: FSDP reduces another number of values than the group's parameters have; "
                "every parameter that is trained needs a gradient at every step"
            )

    def _amaxes(self, matrices: dict[str, Tensor], groups: Sequence[dist.ProcessGroup | None]) -> dict[str, Tensor]:
        """The amax of each matrix, over these groups; none where each is to be found by who rounds."""
        groups = [group for group in groups if group is not None]
        if not matrices or not (groups or self.reduction.headroom is not None):
            return {}
        found = torch.cat([amax(matrix, TENSOR).flatten() for matrix in matrices.values()])
        # As integers: the same order, but for NaN, which is above all. A maximum over ranks may lose a NaN.
        bits = torch.where(found.isnan(), torch.nan, found).view(torch.int32)
        for group in groups:
            dist.all_reduce(bits, dist.ReduceOp.MAX, group)
        return dict(zip(matrices, bits.view(torch.float32), strict=True))

    def _rounded(self, one: Segment, x: Tensor, of_tensor: Tensor | None, second: int) -> _Rounded:
        """x [rows, columns] at its first, or second, rounding; by destination at the first."""
        spec, ranks = self.reduction.spec, self.ranks
        finite = x.isfinite().all()
        noise = None
        if spec.stochastic:
            rank = ranks.replica if second else ranks.replica * ranks.num_shards + ranks.shard
            offset = one.matrix_rows(ranks.shard * one.rows) if second and not one.vector else 0
            key = self._key(one.name, rank, second, x.device)
            noise = Noise.of(base=key, step=self.context.step, first_sample=offset, rows_of_a_sample=1)
        headroom = self.reduction.headroom
        factor = None if headroom is None else headroom.factor(one.name)
        q = quantize(x if factor is None else x.float() * factor, spec, amax=of_tensor, noise=noise)
        parts = parts_of(q, one.vector)
        pieces = []
        for tensor, by_row in parts:
            if by_row and not second and ranks.num_shards > 1:
                padded = tensor.new_zeros(one.matrix_rows(one.rows) * ranks.num_shards, tensor.shape[1])
                padded[: len(tensor)] = tensor
                pieces.append(padded.view(torch.uint8).view(ranks.num_shards, -1))
            else:
                pieces.append(tensor.contiguous().reshape(-1).view(torch.uint8).view(1, -1))
        pieces.append(finite.to(torch.uint8).view(1, 1))
        return _Rounded(q, parts, factor, pieces)

    def _summed(self, one: Segment, mine: _Rounded, arrived: Sequence[Tensor], rows: int) -> Tensor:
        """The sum of what every rank sent of these ``rows``: FP32 [rows, columns]."""
        *pieces, finite = arrived
        codes = []
        for rank in range(len(finite)):
            tensors: list[Tensor | None] = []
            for (tensor, by_row), piece in zip(mine.parts, pieces, strict=True):
                flat = piece[rank].clone().view(tensor.dtype)  # which begins where a dtype may
                tensors.append(flat.view(-1, tensor.shape[1])[:rows] if by_row else flat.view(tensor.shape))
            there, scales, of_tensor = (*tensors, None) if len(tensors) == 2 else tensors
            assert there is not None
            assert scales is not None
            shape = rows, mine.q.shape[1]
            codes.append(replace(mine.q, codes=there, scales=scales, tensor_scale=of_tensor, shape=shape))
        total = dequantize(codes[0])
        for other in codes[1:]:
            total = total + dequantize(other)
        total.masked_fill_(finite.min() == 0, torch.nan)
        if self.reduction.headroom is not None and total.numel():
            self.reduction.headroom.reduced(one.name, codes, total)
        return total if mine.factor is None else total / mine.factor

    def _key(self, name: str, rank: int, second: int, device: torch.device) -> Tensor:
        if (name, second) not in self._keys:
            path = f"gradient of {name} on rank {rank}"
            self._keys[name, second] = base_key(self.context.seed, path, _SLOTS[second], device=device)
        return self._keys[name, second]

    def _compare_soon(self, outputs: Sequence[Tensor]) -> None:
        """The first time: have FSDP's gradients compared with the parts that are taken for theirs."""
        if self._awaited is None:
            self._awaited = {}
            parameters = [one for one in parameters_of(self.group).values() if one.requires_grad]
            for one, parameter, output in zip(self.segments, parameters, outputs, strict=True):
                self._awaited[one.name] = output
                hook = parameter.register_post_accumulate_grad_hook(_Comparison(self, one.name))  # type: ignore[no-untyped-call]
                self._handles.append(hook)
        elif self._awaited:
            raise _layout_error()
        while self._handles and not self._awaited:
            self._handles.pop().remove()

    def compare(self, name: str, parameter: Tensor) -> None:
        """Raises RuntimeError where the first gradient of a parameter is not the part that is taken for it."""
        if self._awaited and name in self._awaited:
            grad = parameter.grad
            assert grad is not None
            given = grad.to_local().flatten()  # type: ignore[attr-defined]
            part = self._awaited.pop(name)[: len(given)].to(given.dtype)
            if not torch.equal(given.nan_to_num(), part.nan_to_num()):
                raise _layout_error()


@dataclass(frozen=True)
class _Comparison:
    reduce: CodesReduce
    name: str

    def __call__(self, parameter: Tensor) -> None:
        self.reduce.compare(self.name, parameter)


def _layout_error() -> RuntimeError:
    return another_layout("gradients reduced as codes: this torch lays out what FSDP reduces")


def _sum(arrived: Tensor, dtype: torch.dtype) -> Tensor:
    """FP32 sum of rows of bytes [ranks, n], values in ``dtype``, in their order."""
    values = arrived.clone(memory_format=torch.contiguous_format).view(dtype)  # which begin where a dtype may
    total = values[0].float()
    for row in values[1:]:
        total = total + row.float()
    return total


@dataclass(frozen=True, slots=True)
class _AllReduce:
    """Of a group without codes over replicas."""

    replicas: dist.ProcessGroup

    def __call__(self, output: Tensor) -> None:
        _hold(output)
        dist.all_reduce(output, group=self.replicas)


def _hold(output: Tensor) -> None:
    """Have the allocator know that this stream, which is not that of the reduce-scatter, reads and writes the buffer:
    FSDP lets go of it where gradients get another dtype, and holds it for its own all-reduce alone."""
    if output.is_cuda:
        output.record_stream(torch.cuda.current_stream(output.device))


def reduce_codes(
    model: nn.Module,
    groups: Iterable[nn.Module],
    mesh: DeviceMesh,
    reduction: Reduction,
    context: StepContext,
    dtype: torch.dtype,
) -> list[str]:
    """Let FSDP reduce gradients as codes; called once, after ``fully_shard`` over the last dimension of ``mesh`` alone.

    Args:
        model: the root of the FSDP modules.
        groups: the modules that ``fully_shard`` was called on, all but the root: the blocks.
        mesh: [shards], or [replicas, shards].
        reduction: what the recipe says.
        context: of the plan: seed and step of rounding noise.
        dtype: what gradients are reduced in otherwise.

    Gives lines for plan.txt. Raises ValueError for paths that match no parameter, and for a statistic of a tensor that
    no rank has whole.
    """
    ranks = Ranks.of(mesh)
    if ranks.num_replicas > 1 < ranks.num_shards and reduction.per_tensor and reduction.spec.statistic != AMAX:
        raise ValueError(f"{reduction.spec}: no rank has all of a replica's sum to take its {reduction.spec.statistic}")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks = list(groups)
    of_blocks = {names[id(p)] for block in blocks for p in parameters_of(block).values() if p.dim() > 1}
    everywhere = {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    chosen = _chosen(reduction, everywhere, of_blocks)
    cost = Cost(reduction, ranks, dtype)
    for group in [*blocks, model]:
        assert isinstance(group, FSDPModule)
        segments = []
        for parameter in parameters_of(group).values():
            if parameter.requires_grad:
                name, shape = names[id(parameter)], tuple(parameter.shape)
                segments.append(Segment(name, shape, -(-shape[0] // ranks.num_shards), name in chosen))
        cost.add(segments)
        if not any(one.coded for one in segments):
            if ranks.replicas is not None:
                group.set_all_reduce_hook(_AllReduce(ranks.replicas))
            continue
        reduce = CodesReduce(group, segments, reduction, ranks, context)
        if ranks.num_shards > 1:
            group.set_custom_reduce_scatter(reduce)  # type: ignore[arg-type]  # a private protocol
        if ranks.num_shards == 1 or ranks.num_replicas > 1:
            group.set_all_reduce_hook(reduce.all_reduce)
    return cost.lines


def _chosen(reduction: Reduction, names: Mapping[str, str], of_blocks: set[str]) -> set[str]:
    """``names``: every name of a parameter, and the first of its own: tied ones have several."""
    if not reduction.paths:
        if not of_blocks:
            raise ValueError("the blocks have no matrices whose gradients could be reduced as codes")
        return of_blocks
    chosen = set()
    for path in reduction.paths:
        found = {own for name, own in names.items() if re.fullmatch(path, name)}
        if not found:
            raise ValueError(f"gradients reduced as codes: {path!r} matches no parameter{close(path, names)}")
        chosen |= found
    return chosen
