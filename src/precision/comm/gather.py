"""Weights gathered as codes: FSDP2 sends what GEMMs read of a weight, a byte or half a byte a value, instead of BF16.

A weight whose forward and backward GEMM read the same codes (square tiles, nearest rounding, no transform) may be
quantized before it is gathered: codes of rows are rows of codes. Every rank quantizes its own rows with the amax of the
full weight, found by one all-reduce(MAX) of all amaxes at the start of every forward pass, or tile by tile where no
tile crosses a shard. So the codes are those of the gathered weight, and a run gives the same losses, bit for bit.

FSDP2 has two doors for this. Its tensor extensions (``fsdp_pre_all_gather``) want a tensor subclass, or attributes on
local tensors that FSDP replaces when it pads uneven shards. We take the other, ``set_custom_all_gather``: a collective
over one group's flat buffer, which is the group's parameters in order, each padded to the rows of rank 0's shard. That
layout is documented nowhere, so the first gather compares the buffer with the parameters. A gathered weight then holds
its codes' values, unscaled and exact in BF16, and ``QuantizedModule.gathered`` the scales; nothing else may read it,
which is why parameters must be resharded after forward. What is saved is traffic, not memory: FSDP's buffers stay in
BF16. Which modules take part, and how, is their ``reads_weight`` and ``sends_weight``.

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

from ..backends import quantize_by
from ..module import QuantizedModule
from ..packing import Gathered
from ..quantize import Quantized
from ..scaling import TENSOR, Unit
from ..spec import OperandSpec
from .layout import all_gather, another_layout, parameters_of


@dataclass(eq=False)
class _Weight:
    """A module's weight in the buffer of its group. ``amax``: of the full weight, as gathered."""

    module: QuantizedModule
    reads: OperandSpec
    shape: tuple[int, int]
    amax: Tensor | None = None


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
        specs = [None if segment.weight is None else segment.weight.module.sends_weight for segment in self.segments]
        if not any(specs):
            for segment in self.segments:
                if segment.weight is not None:
                    segment.weight.module.gathered = None
            return all_gather(output_tensor, input_tensor, group, async_op)
        quantized = [
            _quantized(segment, part, spec) for segment, part, spec in zip(self.segments, parts, specs, strict=True)
        ]
        pieces = [
            [part.view(torch.uint8)] if q is None else [tensor.reshape(-1).view(torch.uint8) for tensor in _sent(q)]
            for part, q in zip(parts, quantized, strict=True)
        ]
        sent = torch.cat([piece for of_segment in pieces for piece in of_segment])
        received = torch.empty(group.size(), len(sent), dtype=torch.uint8, device=sent.device)
        all_gather(received.view(-1), sent, group)
        columns = iter(torch.split(received, [len(piece) for of_segment in pieces for piece in of_segment], 1))
        wanted = torch.split(output_tensor.view(group.size(), -1), [segment.numel for segment in self.segments], 1)
        for segment, q, out in zip(self.segments, quantized, wanted, strict=True):
            if q is None:
                out.copy_(next(columns).contiguous().view(out.dtype))
            else:
                _open(segment, q, next(columns), next(columns) if len(_sent(q)) > 1 else None, out)
            if segment.weight is not None and q is None:
                segment.weight.module.gathered = None
        return None

    def _check(self, buffer: Tensor) -> None:
        """Whether the flat buffer is what it is taken for."""
        sizes = [segment.numel for segment in self.segments]
        shards = [parameter.to_local().flatten() for parameter in parameters_of(self.group).values()]  # type: ignore[attr-defined]
        alike = buffer.numel() == sum(sizes) and all(
            torch.equal(part[: len(shard)].nan_to_num(), shard.to(part.dtype).nan_to_num())
            for part, shard in zip(torch.split(buffer, sizes), shards, strict=True)
        )
        if not alike:
            raise another_layout("parallel.fp8_all_gather=true: this torch lays out what FSDP gathers")
        self.checked = True


def _quantized(segment: _Segment, part: Tensor, spec: OperandSpec | None) -> Quantized | None:
    if spec is None or segment.weight is None:
        return None
    weight = segment.weight
    scaled_by = None
    if weight.amax is not None:
        scaled_by = weight.module.weight_amax(part, weight.amax)
    shard = part.view(segment.rows, segment.columns)
    return quantize_by(weight.module.weight_quantizer, shard, spec, amax=scaled_by)


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
    values, _ = weight.module.weight_quantizer.operand(every)
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
    weight.module.gathered = gathered


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
    left: list[str] = []
    sent = plain = 0
    for group in groups:
        assert isinstance(group, FSDPModule)
        assert isinstance(group, nn.Module)
        owners = {f"{path}.weight": one for path, one in group.named_modules() if isinstance(one, QuantizedModule)}
        segments = []
        for name, parameter in parameters_of(group).items():
            rows = -(-parameter.shape[0] // ranks)
            columns = math.prod(parameter.shape[1:])
            weight = _weight(owners[name], parameter, rows, left) if name in owners else None
            segments.append(_Segment(rows, columns, weight))
            plain += segments[-1].numel * dtype.itemsize
            sent += segments[-1].numel * dtype.itemsize if weight is None else _bytes(segments[-1], weight.reads)
            weights += [weight] if weight is not None else []
        group.set_custom_all_gather(CodesAllGather(group, segments))  # type: ignore[arg-type]  # a private protocol
    if not weights:
        raise ValueError("the recipe quantizes no weight")
    model.register_forward_pre_hook(_find_amaxes(weights, process_group, dtype), prepend=True)
    others = f"; as they are: {left[0]}{f' and {len(left) - 1} others' if len(left) > 1 else ''}" if left else ""
    return f"weights of {len(weights)} linears gathered as codes, {sent:,} bytes a rank for {plain:,}{others}"


def _weight(module: QuantizedModule, parameter: Tensor, rows: int, left: list[str]) -> _Weight | None:
    """None for a module without matrix products whose weight cannot go as codes: noted in ``left``."""
    spec = module.reads_weight
    if isinstance(spec, str):
        if module.coverage() == ():
            left.append(f"{module.path} ({spec})")
            return None
        raise ValueError(f"{module.path}: {spec}")
    if parameter.dim() != 2:
        raise ValueError(f"{module.path}: a weight of {parameter.dim()} dimensions is not gathered as codes")
    n, k = parameter.shape
    if spec.tile.outer > 0 and rows % spec.tile.outer and rows < n:
        raise ValueError(f"{module.path}: shards of {rows} rows cut its tiles of {spec.tile}")
    return _Weight(module, spec, (n, k))


def _bytes(segment: _Segment, spec: OperandSpec) -> int:
    """What a rank sends of a weight: codes, and the scales that belong to its shard alone."""
    codes = segment.rows * (-(-segment.columns // 2) if spec.format.bits == 4 else segment.columns)
    if spec.tile == TENSOR:
        return codes
    grid_rows, grid_columns = spec.tile.grid(segment.rows, segment.columns)
    return codes + grid_rows * grid_columns * (4 if spec.scale.format is None else 1)


def _find_amaxes(
    weights: Sequence[_Weight], group: dist.ProcessGroup, dtype: torch.dtype
) -> Callable[[nn.Module, object], None]:
    """A hook that sets ``amax`` of every weight whose scale depends on the full weight."""
    wanted = [
        weight
        for weight in weights
        if weight.reads.scale.levels and (weight.reads.scale.levels == 2 or weight.reads.tile == TENSOR)
    ]

    @torch.no_grad()
    def hook(model: nn.Module, arguments: object) -> None:
        if not wanted:
            return
        found = []
        for weight in wanted:
            parameter = weight.module.weight
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
