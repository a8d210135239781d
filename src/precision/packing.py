"""Operands, what else a linear saves for backward, and both as lists of tensors, for what takes nothing else:
``save_for_backward``, and operators of torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import Operand, Quantizer, quantize_by
from .quantize import Prepared, Quantized, dequantize
from .scaling import Unit
from .spec import OperandSpec


class Gathered(NamedTuple):
    """How to read a weight that holds the values of its codes, unscaled (``precision.comm``).

    ``scales`` and ``tensor_scale`` are those of the full weight, as in ``Quantized``.
    """

    scales: Tensor
    tensor_scale: Tensor | None

    def codes_of(self, weight: Tensor, spec: OperandSpec, quantizer: Quantizer) -> Quantized:
        """The codes by ``spec`` whose values ``weight`` holds."""
        # Values of codes have the codes back when they are rounded without a scale.
        values = OperandSpec(format=spec.format, scale=Unit())
        return Quantized(
            codes=quantize_by(quantizer, weight, values).codes,
            scales=self.scales,
            tensor_scale=self.tensor_scale,
            shape=(weight.shape[0], weight.shape[1]),
            spec=spec,
        )


class Parts(NamedTuple):
    """An operand that is a sum (``spec.Split``)."""

    operands: tuple[Operand, ...]

    def sum(self, places: Sequence[int] | None = None) -> Tensor:
        """The values of these parts, of all if left out, added up in FP32 in their order: [rows, columns]."""
        operands = self.operands if places is None else [self.operands[place] for place in places]
        total = functools.reduce(torch.add, map(values, operands))
        shape = torch.broadcast_shapes(*map(_shape, self.operands))  # type: ignore[no-untyped-call]
        return total.expand(shape)


class WithDerivative(NamedTuple):
    """What is saved of x, None where the weight has no gradient; and what the factors of dx are computed from: their
    bits (uint8), or x."""

    saved: Operand | Parts | None
    source: Tensor


AnyOperand = Operand | Parts
Saving = AnyOperand | WithDerivative

Layout = tuple[Any, ...]
"""Of one operand: its type and what of it is no tensor."""


def parts_of(operand: AnyOperand) -> tuple[Operand, ...]:
    return operand.operands if isinstance(operand, Parts) else (operand,)


def _shape(operand: Operand) -> tuple[int, ...]:
    return tuple(operand.matrix.shape if isinstance(operand, Prepared) else operand.shape)


def values(operand: Operand) -> Tensor:
    """What it stands for, in FP32."""
    if isinstance(operand, Quantized):
        return dequantize(operand)
    if isinstance(operand, Prepared):
        operand = operand.matrix if operand.factor is None else operand.matrix * operand.factor
    return operand.float()


def unpack(operand: Saving | None) -> tuple[tuple[Tensor | None, ...], Layout]:
    """The tensors of an operand, and the rest that ``pack`` needs."""
    if isinstance(operand, Quantized):
        rest = operand.shape, operand.spec, operand.transposed
        return (operand.codes, operand.scales, operand.tensor_scale), (Quantized, *rest)
    if isinstance(operand, Prepared):
        return (operand.matrix, operand.factor), (Prepared,)
    if isinstance(operand, (Parts, WithDerivative)):
        several = operand.operands if isinstance(operand, Parts) else operand
        parts, layouts = zip(*map(unpack, several), strict=True)
        return tuple(tensor for part in parts for tensor in part), (type(operand), layouts)
    return (operand,), (Tensor,)


def pack(tensors: Iterator[Any], layout: Layout) -> Any:
    """The operand again, from the next of ``tensors``."""
    kind, *rest = layout
    if kind is Quantized:
        shape, spec, transposed = rest
        codes, scales, tensor_scale = next(tensors), next(tensors), next(tensors)
        return Quantized(
            codes=codes, scales=scales, tensor_scale=tensor_scale, shape=shape, spec=spec, transposed=transposed
        )
    if kind is Prepared:
        return Prepared(matrix=next(tensors), factor=next(tensors))
    if kind in (Parts, WithDerivative):
        several = [pack(tensors, layout) for layout in rest[0]]
        return Parts(tuple(several)) if kind is Parts else WithDerivative(*several)
    return next(tensors)


def unpack_all(operands: Sequence[Saving | None]) -> tuple[list[Tensor], tuple[Layout, ...]]:
    """The tensors of several operands, one that several share only once, and how to have the operands again."""
    tensors: list[Tensor] = []
    places: dict[int, int] = {}
    layouts = []
    for operand in operands:
        parts, layout = unpack(operand)
        for part in parts:
            if part is not None and id(part) not in places:
                places[id(part)] = len(tensors)
                tensors.append(part)
        layouts.append((layout, tuple(None if part is None else places[id(part)] for part in parts)))
    return tensors, tuple(layouts)


def pack_all(tensors: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Any]:
    """The inverse of ``unpack_all``."""
    return [
        pack(iter([None if place is None else tensors[place] for place in places]), layout)
        for layout, places in layouts
    ]
