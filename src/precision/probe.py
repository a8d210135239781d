"""What rounding does to every operand of every linear, and to the products: measured on steps that are due.

Per linear nine rows, one for each operand slot and one for each output, and per module of a recipe's own those that it
names (``QuantizedModule.observed``):

* fprop.x, fprop.w, dgrad.dy, dgrad.w, wgrad.dy, wgrad.x: what the GEMM reads, against what it would read unrounded.
  Where a transform comes first, against the transformed tensor.
* fprop.y, dgrad.dx, wgrad.dw: what the GEMM gives, against the float32 product of the operands as they were.

Sums, counts and extremes are added up over micro-batches and ranks before ratios are taken: they do not depend on how
a batch is dealt out, but where a recipe itself depends on it (a scale that spans a micro-batch, and the products, of
which there is one per micro-batch).

A forward pass that is computed again for backward counts once; evaluation does not count. Nothing that is computed
changes: a watched step gives the bits of one that is not. Between watched steps nothing is attached to the model.

A linear that is computed plainly is measured by hooks: its operands in what they are cast to, and the output of fprop.
Inside blocks that are compiled such hooks do not run, and its rows stand without numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .backends import Operand
from .blocks import Experts
from .formats import pack4
from .module import QuantizedModule
from .plan import Plan
from .quantize import Prepared, Quantized, decode_scales, dequantize
from .slots import OUTPUTS, SLOTS, TENSORS
from .suggest import close

_SLACK = 1 + 2.0**-20
"""What FP32 scales lose: the largest value of a tile may lie so far above what its largest code stands for."""


class Figures(NamedTuple):
    """One tensor: float64 [7] to be added up, and float64 [3] of which the largest count."""

    sums: Tensor  # elements, not finite, poisoned, underflow, saturated, sum of squares, of squared errors
    extremes: Tensor  # amax, largest scale, smallest scale negated


class _Measured(NamedTuple):
    """One tensor of a module: the number of its row, how it is rounded, and its figures."""

    row: int
    format: str
    figures: Figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One operand, or one output, of one linear.

    Args:
        module, slot: which.
        format: how it is rounded, as in plan.txt; a dtype where nothing is.
        elements: measured, over all micro-batches and ranks.
        nonfinite: of these infinite or NaN; they are in no other figure but ``saturation_percent``.
        poisoned: finite ones that became infinite or NaN, as in a tile with a NaN.
        sqnr_db: 10 log10 of the sum of squares over that of squared errors. None where there is no error.
        mse: the mean squared error.
        underflow_percent: not zero before, zero after, of all elements; -0 is zero.
        saturation_percent: values beyond what the largest and smallest finite codes of their tile stand for, of all
            elements.
        amax: the largest finite magnitude.
        scale_min, scale_max: of the scales that codes are multiplied with to get values back.
        relative_error: the norm of the error over that of the exact product; of outputs.
    """

    module: str
    slot: str
    format: str
    elements: int
    nonfinite: int
    poisoned: int
    sqnr_db: float | None
    mse: float | None
    underflow_percent: float | None
    saturation_percent: float | None
    amax: float | None
    scale_min: float | None
    scale_max: float | None
    relative_error: float | None


class Probe:
    """Watches the linears of a plan, and what else of it says that it can be watched.

    Args:
        plan: what ``precision.recipe.apply`` gave.
        every: steps, counted from 1; 0 for none.
        layers: regex, full match, of their paths; None for all.

    Raises ValueError for a negative number, for what is no regular expression, and for one that matches no linear.
    """

    def __init__(self, plan: Plan, *, every: int, layers: str | None = None) -> None:
        check_settings(every, layers)
        rows = {path: _rows_of(module) for path, module in plan.model.named_modules()}
        candidates = [path for path in rows if rows[path]]
        watched = [path for path in candidates if layers is None or re.fullmatch(layers, path)]
        if every and not watched:
            near = close(layers or "", candidates)
            raise ValueError(f"layers={layers!r} matches no linear{near}; there are: {', '.join(candidates[:3])} ...")
        self._every = every
        self._modules = [plan.model.get_submodule(path) for path in watched]
        self._labels = [(path, slot) for path in watched for slot in rows[path]]
        keys = [(id(module), slot) for module, path in zip(self._modules, watched, strict=True) for slot in rows[path]]
        self._index = {key: index for index, key in enumerate(keys)}
        self._dtype = _name(plan.recipe.dtypes.compute)
        self._device = next((p.device for p in plan.model.parameters()), torch.device("cpu"))
        self._clear()

    def due(self, step: int) -> bool:
        """Whether ``step``, counted from 1, is to be watched."""
        return self._every > 0 and step % self._every == 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what the model computes within, from anew."""
        self._clear()
        hooks = [module.register_forward_hook(self._plain) for module in self._modules]
        self._observe(self)
        try:
            yield
        finally:
            self._observe(None)
            for hook in hooks:
                hook.remove()

    def rows(self) -> list[Row]:
        """What was seen in the last watched step, on all ranks, which must all call this."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
            dist.all_reduce(self._extremes, op=dist.ReduceOp.MAX)
        figures = zip(self._labels, self._formats, self._sums.tolist(), self._extremes.tolist(), strict=True)
        return [_row(*label, format, sums, extremes) for label, format, sums, extremes in figures]

    def _clear(self) -> None:
        rows = len(self._labels)
        self._sums = torch.zeros(rows, 7, dtype=torch.float64, device=self._device)
        self._extremes = torch.full((rows, 3), -math.inf, dtype=torch.float64, device=self._device)
        self._formats = [self._dtype] * rows

    def _observe(self, observer: Probe | None) -> None:
        for module in self._modules:
            if isinstance(module, QuantizedModule):
                module.observe(observer)

    # It is an observer (``precision.module``).

    @torch.no_grad()
    def operand(self, module: nn.Module, row: str, format: str, given: Tensor, used: Operand) -> _Measured:
        return _Measured(self._index[id(module), row], format, of_operand(given, used))

    @torch.no_grad()
    def output(
        self, module: nn.Module, row: str, a: Tensor, b: Tensor, y: Tensor, bias: Tensor | None = None
    ) -> _Measured:
        return _Measured(self._index[id(module), row], _name(y.dtype), _of_output(a, b, y, bias))

    def add(self, figures: list[_Measured]) -> None:
        for row, format, (sums, extremes) in figures:
            self._formats[row] = format
            self._sums[row] += sums
            self._extremes[row] = torch.maximum(self._extremes[row], extremes)

    # The hook of linears that are computed plainly.

    def _plain(self, module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
        if torch.compiler.is_compiling():
            return  # what is compiled stays as it would be
        if isinstance(module, QuantizedModule) and not module.is_plain_linear:
            return
        if not (module.training and y.requires_grad):
            return
        x, weight, bias = inputs[0].detach(), module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor | None)
        forward = [*self._plain_rows(module, "x", x, y.dtype), *self._plain_rows(module, "w", weight, y.dtype)]
        matrices = [(x.reshape(-1, x.shape[-1]), weight, y.detach().reshape(-1, y.shape[-1]))]
        if weight.dim() == 3:
            counts = inputs[1].rows
            matrices = list(zip(torch.split(x, counts), weight.unbind(), torch.split(y.detach(), counts), strict=True))
        forward += [self.output(module, OUTPUTS[0], *matrix, bias) for matrix in matrices]

        def backward(dy: Tensor) -> None:  # once, also where the forward pass is computed again
            self.add([*forward, *self._plain_rows(module, "dy", dy.detach(), dy.dtype)])

        y.register_hook(backward)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _plain_rows(self, module: nn.Module, tensor: str, x: Tensor, dtype: torch.dtype) -> list[_Measured]:
        figures = of_operand(x, x.to(dtype))
        slots = [slot for slot, of in zip(SLOTS, TENSORS, strict=True) if of == tensor]
        return [_Measured(self._index[id(module), slot], _name(dtype), figures) for slot in slots]


def _rows_of(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, QuantizedModule):
        return module.observed
    return SLOTS + OUTPUTS if type(module) is nn.Linear or isinstance(module, Experts) else ()


def check_settings(every: int, layers: str | None) -> None:
    """Raises ValueError for a negative number and for what is no regular expression."""
    if every < 0:
        raise ValueError(f"every={every}: must not be negative")
    try:
        re.compile(layers or "")
    except re.error as error:
        raise ValueError(f"layers={layers!r}: not a regular expression: {error}") from error


@torch.no_grad()
def of_operand(given: Tensor, used: Operand) -> Figures:
    """What became of ``given`` (any float dtype) in ``used``: codes and scales, or values of the same shape."""
    if isinstance(used, Prepared):  # values of codes, read again
        used = used.matrix if used.factor is None else used.matrix * used.factor
    if isinstance(used, Tensor):
        return _figures(given, used, None, None)
    format = used.spec.format
    high = _all(used, format.max)
    low = -high if format.min == -format.max else _all(used, format.min)
    return _figures(given, dequantize(used), (low, high), decode_scales(used))


def _all(used: Quantized, value: float) -> Tensor:
    """What ``used`` would stand for if every code were that of ``value``."""
    format = used.spec.format
    if format.bits > 8:
        codes = torch.full_like(used.codes, value)
    else:
        one = format.encode(torch.full((1, 2), value, dtype=torch.float32, device=used.codes.device))
        codes = (pack4(one) if format.bits == 4 else one)[0, 0].expand_as(used.codes)
    return dequantize(replace(used, codes=codes))


def _of_output(a: Tensor, b: Tensor, y: Tensor, bias: Tensor | None) -> Figures:
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    exact = a.to(wide) @ b.to(wide).mT
    return _figures(exact if bias is None else exact + bias.to(wide), y, None, None)


def _figures(given: Tensor, used: Tensor, limits: tuple[Tensor, Tensor] | None, scales: Tensor | None) -> Figures:
    wide = torch.float64 if given.dtype == torch.float64 else torch.float32
    x, q = given.to(wide), used.to(wide)
    finite = x.isfinite()
    both = finite & q.isfinite()
    size = torch.where(finite, x, 0.0).abs()
    saturated = torch.zeros((), dtype=torch.float32, device=x.device)
    if limits is not None:
        low, high = limits
        saturated = ((x > high * _SLACK) | (x < low * _SLACK)).sum()
    sums = (
        torch.tensor(x.numel(), device=x.device),
        x.numel() - finite.sum(),
        finite.sum() - both.sum(),
        (finite & (x != 0) & (q == 0)).sum(),
        saturated,
        _square(torch.where(both, x, 0.0)),
        _square(torch.where(both, q - x, 0.0)),
    )
    amax = size.max() if size.numel() else torch.zeros((), dtype=torch.float32, device=x.device)
    extremes = [amax, *(torch.full((), -math.inf, dtype=torch.float32, device=x.device) for _ in range(2))]
    if scales is not None and scales.numel() and x.numel():
        known = scales.isfinite()
        extremes[1] = torch.where(known, scales, -math.inf).max()
        extremes[2] = torch.where(known, -scales, -math.inf).max()
    return Figures(*(torch.stack([part.double() for part in parts]) for parts in (sums, extremes)))


def _square(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm * norm


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row(module: str, slot: str, format: str, sums: list[float], extremes: list[float]) -> Row:
    elements, nonfinite, poisoned, underflow, saturated, signal, noise = sums
    amax, scale_max, negative_min = extremes
    operand = slot not in OUTPUTS
    known = elements - nonfinite - poisoned > 0
    ratio = signal / noise if noise > 0 else math.inf
    return Row(
        module=module,
        slot=slot,
        format=format,
        elements=int(elements),
        nonfinite=int(nonfinite),
        poisoned=int(poisoned),
        sqnr_db=_finite(10 * math.log10(ratio)) if known and ratio > 0 and operand else None,
        mse=noise / (elements - nonfinite - poisoned) if known else None,
        underflow_percent=100 * underflow / elements if elements and operand else None,
        saturation_percent=100 * saturated / elements if elements and operand else None,
        amax=_finite(amax),
        scale_min=_finite(-negative_min),
        scale_max=_finite(scale_max),
        relative_error=_finite(math.sqrt(noise / signal)) if known and signal > 0 and not operand else None,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
