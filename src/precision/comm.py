"""Weights gathered as codes: FSDP2 sends what GEMMs read of a weight, a byte or half a byte a value, instead of BF16.

A weight whose forward and backward GEMM read the same codes (square tiles, nearest rounding, no transform) may be
quantized before it is gathered: codes of rows are rows of codes. Every rank quantizes its own rows with the amax of the
full weight, found by one all-reduce(MAX) of all amaxes at the start of every forward pass, or tile by tile where no
tile crosses a shard. So the codes are those of the gathered weight, and a run gives the same losses, bit for bit.

FSDP2 has two doors for this. Its tensor extensions (``fsdp_pre_all_gather``) want a tensor subclass, or attributes on
local tensors that FSDP replaces when it pads uneven shards. We take the other, ``set_custom_all_gather``: a collective
over one group's flat buffer, which is the group's parameters in order, each padded to the rows of rank 0's shard. That
layout is documented nowhere, so the first gather compares the buffer with the parameters. A gathered weight then holds
its codes' values, unscaled and exact in BF16, and ``QuantLinear.gathered`` the scales; nothing else may read it, which
is why parameters must be resharded after forward. What is saved is traffic, not memory: FSDP's buffers stay in BF16.

Gradients are reduced as before. BF16 is gathered for validation in high precision, for GEMMs that a hook takes in it,
and in steps that are watched (``precision.probe`` measures against the weight).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .backends import quantize_by
from .linear import QuantLinear
from .packing import Gathered
from .quantize import Quantized
from .scaling import TENSOR, Unit
from .slots import W
from .spec import LinearSpec, OperandSpec


@dataclass(eq=False)
class _Weight:
    """A quantized linear's weight in the buffer of its group. ``amax``: of the full weight, as gathered."""

    linear: QuantLinear
    shape: tuple[int, int]
    amax: Tensor | None = None

    @property
    def spec(self) -> OperandSpec | None:
        """What it is quantized by before it is gathered; None where GEMMs of this pass want it as it is."""
        if self.linear.context.high_precision or self.linear.observer is not None:
            return None
        spec = self.linear.plan.weight_once
        return None if isinstance(spec, str) else spec


@dataclass(frozen=True, slots=True)
class _Segment:
    """A parameter's part of the flat buffer: ``rows`` of a shard, ``columns`` values each."""

    rows: int
    columns: int
    weight: _Weight | None

    @property
    def numel(self) -> int:
        return self.rows * self.columns


@dataclass(eq=False)
class CodesAllGather:
    """The all-gather of one FSDP group (``torch.distributed.fsdp``'s ``AllGather``)."""

    group: nn.Module
    segments: Sequence[_Segment]
    checked: bool = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Fill ``output_tensor`` [ranks * n] from every rank's ``input_tensor`` [n].

        Raises RuntimeError for a buffer that is not the group's parameters.
        """
        if not self.checked:
            self._check(input_tensor)
        parts = torch.split(input_tensor, [segment.numel for segment in self.segments])
        specs = [segment.weight.spec if segment.weight is not None else None for segment in self.segments]
        if not any(specs):
            for segment in self.segments:
                if segment.weight is not None:
                    segment.weight.linear.gathered = None
            work: dist.Work | None = dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)
            return work
        quantized = [
            _quantized(segment, part, spec) for segment, part, spec in zip(self.segments, parts, specs, strict=True)
        ]
        pieces = [
            [part.view(torch.uint8)] if q is None else [tensor.reshape(-1).view(torch.uint8) for tensor in _sent(q)]
            for part, q in zip(parts, quantized, strict=True)
        ]
        sent = torch.cat([piece for of_segment in pieces for piece in of_segment])
        received = torch.empty(group.size(), len(sent), dtype=torch.uint8, device=sent.device)
        dist.all_gather_into_tensor(received.view(-1), sent, group)
        columns = iter(torch.split(received, [len(piece) for of_segment in pieces for piece in of_segment], 1))
        wanted = torch.split(output_tensor.view(group.size(), -1), [segment.numel for segment in self.segments], 1)
        for segment, q, out in zip(self.segments, quantized, wanted, strict=True):
            if q is None:
                out.copy_(next(columns).contiguous().view(out.dtype))
            else:
                _open(segment, q, next(columns), next(columns) if len(_sent(q)) > 1 else None, out)
            if segment.weight is not None and q is None:
                segment.weight.linear.gathered = None
        return None

    def _check(self, buffer: Tensor) -> None:
        """Whether the flat buffer is what it is taken for."""
        sizes = [segment.numel for segment in self.segments]
        shards = [parameter.to_local().flatten() for parameter in self.group.parameters()]  # type: ignore[attr-defined]
        alike = buffer.numel() == sum(sizes) and all(
            torch.equal(part[: len(shard)].nan_to_num(), shard.to(part.dtype).nan_to_num())
            for part, shard in zip(torch.split(buffer, sizes), shards, strict=True)
        )
        if not alike:
            raise RuntimeError(
                "parallel.fp8_all_gather=true: this torch lays out what FSDP gathers in another way than 2.11 to 2.13"
            )
        self.checked = True


def _quantized(segment: _Segment, part: Tensor, spec: OperandSpec | None) -> Quantized | None:
    if spec is None or segment.weight is None:
        return None
    weight = segment.weight
    scaled_by = None
    if weight.amax is not None:
        scaled_by = weight.linear.amaxes.held(weight.linear.plan.slots[W], part, now=weight.amax)
        scaled_by = weight.amax if scaled_by is None else scaled_by
    shard = part.view(segment.rows, segment.columns)
    return quantize_by(weight.linear.backends[0].quantizer, shard, spec, amax=scaled_by)


def _sent(q: Quantized) -> tuple[Tensor, ...]:
    """Codes, and the scales that belong to this shard alone."""
    return (q.codes,) if q.spec.tile == TENSOR else (q.codes, q.scales)


def _open(segment: _Segment, q: Quantized, codes: Tensor, scales: Tensor | None, out: Tensor) -> None:
    """Put the values of all ranks' codes where the weight goes, and their scales with the linear."""
    assert segment.weight is not None
    weight = segment.weight
    ranks = len(codes)
    all_codes = codes.reshape(ranks * segment.rows, -1)
    every = Quantized(
        codes=all_codes,
        scales=torch.ones(1, 1, dtype=torch.float32, device=codes.device),
        tensor_scale=None,
        shape=(ranks * segment.rows, segment.columns),
        spec=OperandSpec(format=q.spec.format, scale=Unit()),
    )
    values, _ = weight.linear.backends[0].quantizer.operand(every)
    out.copy_(values.reshape(out.shape))
    all_scales = q.scales
    if scales is not None:
        rows, columns = q.spec.tile.grid(*weight.shape)
        all_scales = scales.contiguous().view(q.scales.dtype).reshape(-1, columns)[:rows]
    gathered = Gathered(all_scales, q.tensor_scale)
    if out.is_cuda:  # written on FSDP's own stream, read on that of the model
        for tensor in gathered:
            if tensor is not None:
                tensor.record_stream(torch.cuda.default_stream(out.device))
    weight.linear.gathered = gathered


def gather_codes(
    model: nn.Module, groups: Iterable[nn.Module], process_group: dist.ProcessGroup, dtype: torch.dtype
) -> str:
    """Let FSDP gather the weights of quantized linears as codes; called once, after ``fully_shard``.

    Args:
        model: the root, whose forward pass starts with the all-reduce of amaxes.
        groups: the modules that ``fully_shard`` was called on, all but the root.
        process_group: the processes that a weight is sharded over.
        dtype: what parameters are gathered in otherwise.

    Gives a line for plan.txt. Raises ValueError for a recipe that this would change, and for tiles across shards.
    """
    ranks = process_group.size()
    weights: list[_Weight] = []
    for group in groups:
        assert isinstance(group, FSDPModule)
        assert isinstance(group, nn.Module)
        owners = {f"{path}.weight": linear for path, linear in group.named_modules() if isinstance(linear, QuantLinear)}
        segments = []
        for name, parameter in group.named_parameters():
            rows = -(-parameter.shape[0] // ranks)
            columns = math.prod(parameter.shape[1:])
            weight = _weight(owners[name], rows) if name in owners else None
            weights += [weight] if weight is not None else []
            segments.append(_Segment(rows, columns, weight))
        group.set_custom_all_gather(CodesAllGather(group, segments))  # type: ignore[arg-type]  # a private protocol
    if not weights:
        raise ValueError("the recipe quantizes no weight")
    model.register_forward_pre_hook(_find_amaxes(weights, process_group, dtype), prepend=True)
    return f"weights of {len(weights)} linears gathered as codes"


def _weight(linear: QuantLinear, rows: int) -> _Weight:
    spec = linear.reads_weight
    if isinstance(spec, str):
        raise ValueError(f"{linear.path}: {spec}")
    for other in linear.specs[1:]:
        # Histories want every step's amax of the weight itself, and phases in high precision alone are looked out for.
        if linear.delayed is not None or other != LinearSpec():
            raise ValueError(f"{linear.path}: under its schedule, weights cannot be gathered as codes")
    n, k = linear.out_features, linear.in_features
    if spec.tile.outer > 0 and rows % spec.tile.outer and rows < n:
        raise ValueError(f"{linear.path}: shards of {rows} rows cut its tiles of {spec.tile}")
    return _Weight(linear, (n, k))


def _find_amaxes(
    weights: Sequence[_Weight], group: dist.ProcessGroup, dtype: torch.dtype
) -> Callable[[nn.Module, object], None]:
    """A hook that sets ``amax`` of every weight whose scale depends on the full weight."""
    specs = [weight.linear.reads_weight for weight in weights]
    wanted = [
        weight
        for weight, spec in zip(weights, specs, strict=True)
        if isinstance(spec, OperandSpec) and spec.scale.levels and (spec.scale.levels == 2 or spec.tile == TENSOR)
    ]

    @torch.no_grad()
    def hook(model: nn.Module, arguments: object) -> None:
        if not wanted:
            return
        found = []
        for weight in wanted:
            parameter = weight.linear.weight
            assert isinstance(parameter, DTensor), "gathered before its amax was known"
            shard = parameter.to_local()
            found.append(shard.abs().amax() if shard.numel() else shard.new_zeros(()))
        amaxes = torch.stack(found).to(dtype).float()  # as of values in that dtype: rounding keeps order
        # As integers: the same order, but for NaN, which is above all. A maximum over ranks may lose a NaN.
        bits = torch.where(amaxes.isnan(), torch.nan, amaxes).view(torch.int32)
        dist.all_reduce(bits, dist.ReduceOp.MAX, group)
        for weight, amax in zip(wanted, bits.view(torch.float32), strict=True):
            weight.amax = amax

    return hook
