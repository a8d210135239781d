"""A linear is resolved once per spec: what becomes of its six operands, before any tensor is there.

fprop  y  = x  @ w.mT        slots 0 (x) and 1 (w)
dgrad  dx = dy @ w           slots 2 (dy) and 3 (w.mT)
wgrad  dw = dy.mT @ x        slots 4 (dy.mT) and 5 (x.mT)

``LinearPlan`` says of each slot which tensor or earlier slot it is computed from, transposed or not, through which
transform, by which spec, with which noise and amax, and with which other slot in one read; and what of x is saved for
backward. Passes over a linear (``operands.py``), the weight gather, the fused MLP and the probe read it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import torch

from .backends import Backend, Quantizer
from .scaling import AMAX, TENSOR, Current, Delayed, FourOverSix, finishes, outer_of, reads
from .spec import GemmSpec, LinearSpec, OperandSpec, Source, Transform, assembled

FPROP, DGRAD, WGRAD = range(3)
X, W, DGRAD_DY, DGRAD_W, WGRAD_DY, WGRAD_X = range(6)
TENSORS = ("x", "w", "dy", "w", "dy", "x")
TRANSPOSED = (False, False, False, True, True, True)
SLOTS = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
OUTPUTS = ("fprop.y", "dgrad.dx", "wgrad.dw")
EARLIER = {DGRAD_W: W, WGRAD_DY: DGRAD_DY, WGRAD_X: X}  # the slot that sees the same tensor first

Backends = tuple[Backend, Backend, Backend]
"""Of fprop, dgrad and wgrad."""


class Origin(Enum):
    """What a slot's operand is computed from."""

    TENSOR = "the tensor, in high precision"
    TRANSPOSED = "the codes of the earlier slot of this tensor, transposed"
    REQUANTIZED = "the values of those codes, quantized again"


class Saved(Enum):
    """What of x is saved for backward."""

    INPUT = "x itself"
    FPROP = "the codes that fprop reads, seen transposed"
    REQUANTIZED = "the values of those codes, quantized again for wgrad"
    WGRAD = "x quantized for wgrad"


@dataclass(frozen=True, slots=True, eq=False)
class SlotPlan:
    """One of the six operands.

    Args:
        number: of the slot; its GEMM is number // 2.
        spec: how it is quantized; None leaves it in high precision.
        transform: of its GEMM's operands, or None.
        left: side of its product.
        transposed: it is the transpose of what the linear reads.
        origin: what it is computed from.
        stochastic: its rounding needs noise.
        column: of the amax history that scales it (delayed scaling), or None.
        all_ranks: scaled by the amax of all ranks' tensors.
        own_rows: the codes of the transpose are the codes of the tensor, transposed.
        one_read: its operand and that of the later slot of the same tensor may be computed in one read.
        quantizer: who makes it.
        reads_rows: its product reads codes along the contraction: it needs codes, and would copy those of a transpose.
        key: equal where equal tensors become equal codes, but for amaxes and statistics.
    """

    number: int
    spec: OperandSpec | None
    transform: Transform | None
    left: bool
    transposed: bool
    origin: Origin
    stochastic: bool
    column: int | None
    all_ranks: bool
    own_rows: bool
    one_read: bool
    quantizer: Quantizer
    reads_rows: bool
    key: int

    def described(self, dtype: torch.dtype) -> str:
        """How a tensor of ``dtype`` is rounded here, in words."""
        name = str(dtype).removeprefix("torch.") if self.spec is None else str(self.spec)
        return name if self.transform is None else f"{name} [{self.transform}]"


class Column(NamedTuple):
    """One column of an amax history: of which tensor, seen through which transform."""

    tensor: str
    transform: str
    delayed: Delayed


class Unmeasured(NamedTuple):
    """A column that no slot of a plan measures: a slot of another plan sees its tensor, through a transform."""

    column: int
    slot: int
    transform: Transform | None


@dataclass(frozen=True, slots=True, eq=False)
class LinearPlan:
    """What a linear computes at a step.

    Args:
        spec: fprop, dgrad and wgrad, each of one of the linear's specs.
        backends: of the three GEMMs.
        slots: the six operands.
        saved: what of x is saved for backward.
        weight_once: the one quantization of the weight that fprop and dgrad read, or why there is none. It depends on
            the weight alone, so that it may be computed before the weight is gathered.
        unmeasured: columns of the history whose amaxes are measured apart.
        kind: equal where linears differ in histories and in noise alone.
        kind_of_inputs: equal where linears make the same of one x.
        empty: nothing is quantized.
        all_ranks: a scale is computed from all ranks' tensors.
        shares_inputs: every linear of this kind makes the same of one x.
    """

    spec: LinearSpec
    backends: Backends
    slots: tuple[SlotPlan, ...]
    saved: Saved
    weight_once: OperandSpec | str
    unmeasured: tuple[Unmeasured, ...]
    kind: int
    kind_of_inputs: int
    empty: bool
    all_ranks: bool
    shares_inputs: bool

    def __deepcopy__(self, memo: object) -> LinearPlan:
        """A copy of a linear has the same plans: nothing of them changes."""
        return self

    @property
    def saves_fprop_codes(self) -> bool:
        """What is saved of x comes from the codes that fprop reads."""
        return self.saved in (Saved.FPROP, Saved.REQUANTIZED)


def gemms(spec: LinearSpec) -> tuple[GemmSpec, GemmSpec, GemmSpec]:
    return spec.fprop, spec.dgrad, spec.wgrad


def operands(spec: LinearSpec) -> tuple[OperandSpec | None, ...]:
    """The specs of the six slots."""
    return tuple(operand for gemm in gemms(spec) for operand in (gemm.a, gemm.b))


def is_stochastic(operand: OperandSpec | None) -> bool:
    return operand is not None and operand.stochastic


def columns_of(spec: LinearSpec) -> dict[int, Column]:
    """The column of every slot with delayed scaling; slots that see the same tensor alike share one."""
    return {
        slot: Column(TENSORS[slot], str(gemms(spec)[slot // 2].transform or ""), operand.amax)
        for slot, operand in enumerate(operands(spec))
        if operand is not None and isinstance(operand.amax, Delayed)
    }


def resolve(
    specs: Sequence[LinearSpec],
    picks: tuple[int, int, int],
    backends: Backends,
    columns: Sequence[Column],
    shape: tuple[int, int, bool],
) -> LinearPlan:
    """The plan of fprop, dgrad and wgrad by the picked ones of ``specs``.

    Args:
        columns: of the linear's amax history, which serves all of ``specs``.
        shape: in_features, out_features, whether there is a bias.
    """
    spec = assembled(specs, picks)
    own = columns_of(spec)
    slots = tuple(_slot(spec, number, backends, own, columns) for number in range(6))
    unmeasured: dict[int, Unmeasured] = {}
    for other in specs:
        for number, column in columns_of(other).items():
            if column not in own.values():
                index = columns.index(column)
                unmeasured.setdefault(index, Unmeasured(index, number, gemms(other)[number // 2].transform))
    saved = _saved(slots[WGRAD_X])
    by = [backend.identity for backend in backends]
    inputs = [(number, slots[number].spec, slots[number].transform, by[number // 2][0]) for number in (X, WGRAD_X)]
    reused = [slots[number].origin.name for number in (WGRAD_X, WGRAD_DY)]
    return LinearPlan(
        spec=spec,
        backends=backends,
        slots=slots,
        saved=saved,
        weight_once=_weight_once(slots),
        unmeasured=tuple(unmeasured.values()),
        kind=stable_number(spec, by, [tuple(one) for one in unmeasured.values()], shape),
        kind_of_inputs=stable_number("inputs", inputs, reused, shape[0]),
        empty=all(slot.spec is None for slot in slots),
        all_ranks=any(slot.all_ranks for slot in slots),
        shares_inputs=slots[X].spec is not None
        and not unmeasured
        and not any(slots[number].stochastic or slots[number].column is not None for number in (X, WGRAD_X)),
    )


def _slot(
    spec: LinearSpec, number: int, backends: Backends, own: dict[int, Column], columns: Sequence[Column]
) -> SlotPlan:
    gemm, operand, backend = gemms(spec)[number // 2], operands(spec)[number], backends[number // 2]
    stochastic = is_stochastic(operand)
    tile = operand.tile if operand is not None else TENSOR
    return SlotPlan(
        number=number,
        spec=operand,
        transform=gemm.transform,
        left=number % 2 == 0,
        transposed=TRANSPOSED[number],
        origin=_origin(spec, number),
        stochastic=stochastic,
        column=columns.index(own[number]) if number in own else None,
        all_ranks=operand is not None and operand.amax == Current(step=True),
        own_rows=tile.outer == tile.inner and gemm.transform is None and not stochastic,
        one_read=_one_read(spec, number, backends),
        quantizer=backend.quantizer,
        reads_rows=backend.product.reads_rows,
        key=_number((number, operand, gemm.transform, backend.name)),
    )


def _origin(spec: LinearSpec, number: int) -> Origin:
    """Codes are those of the earlier slot, transposed, for tiles that are square, specs that are alike and tensors that
    no transform has changed; rounded stochastically, only if the spec says to reuse: else each slot has noise of its
    own."""
    operand = operands(spec)[number]
    if number not in EARLIER or operand is None:
        return Origin.TENSOR
    earlier, first = EARLIER[number], operands(spec)[EARLIER[number]]
    reuses = operand.source is Source.QUANTIZED
    plain = gemms(spec)[number // 2].transform is None and gemms(spec)[earlier // 2].transform is None
    square = operand.tile.outer == operand.tile.inner and replace(operand, source=Source.ORIGINAL) == first
    if plain and square and (reuses or not is_stochastic(operand)):
        return Origin.TRANSPOSED
    return Origin.REQUANTIZED if reuses else Origin.TENSOR


def _one_read(spec: LinearSpec, number: int, backends: Backends) -> bool:
    """Whether the quantizer may make this operand and that of the later slot of the tensor together."""
    if number not in (X, DGRAD_DY):
        return False
    later = {first: second for second, first in EARLIER.items()}[number]
    first, second = operands(spec)[number], operands(spec)[later]
    by, by_later = backends[number // 2], backends[later // 2]
    if first is None or second is None or (isinstance(first.amax, Delayed) and not by.quantizer.notes):
        return False
    if gemms(spec)[number // 2].transform is not None or gemms(spec)[later // 2].transform is not None:
        return False
    square = first.tile.outer == first.tile.inner and not is_stochastic(first)
    # Codes of a square tile are reused by transposing them: they are those of the original.
    if first != second and not (square and first == replace(second, source=Source.ORIGINAL)):
        return False
    if square and not (by.product.reads_rows and by_later.product.reads_rows):
        return False  # one is the other, transposed
    # With one scale per row, computed from all ranks' rows: rows of the one are not rows of the other.
    return not (first.amax == Current(step=True) and first.tile != TENSOR and first.scale.levels == 1)


def _saved(slot: SlotPlan) -> Saved:
    if slot.spec is None:
        return Saved.INPUT
    return {Origin.TENSOR: Saved.WGRAD, Origin.TRANSPOSED: Saved.FPROP, Origin.REQUANTIZED: Saved.REQUANTIZED}[
        slot.origin
    ]


def _weight_once(slots: Sequence[SlotPlan]) -> OperandSpec | str:
    w, w_t = slots[W], slots[DGRAD_W]
    if w.spec is None or w_t.spec is None:
        return f"{'fprop' if w.spec is None else 'dgrad'} reads the weight in high precision"
    if w.spec.format.bits > 8:
        return f"{w.spec.format} is no narrower than what is gathered"
    rule = w.spec.scale
    sees_tiles = type(rule) is not FourOverSix and (finishes(rule) or reads(rule))
    if sees_tiles or w.spec.statistic != AMAX or outer_of(rule) != TENSOR:
        return f"scales by {w.spec} are not known to be the same of a shard and of the whole weight"
    if w.spec.tile.outer != w.spec.tile.inner:
        return f"a weight in tiles of {w.spec.tile} is quantized anew for dgrad, along its other dimension"
    if w.stochastic or w.transform is not None or w_t.origin is Origin.TENSOR:
        return "fprop and dgrad do not read the same codes of the weight"
    return w.spec


_KEYS: dict[Hashable, int] = {}
"""Interned keys: a step compares numbers alone."""


def _number(key: Hashable) -> int:
    return _KEYS.setdefault(key, len(_KEYS))


def stable_number(*parts: object) -> int:
    """A number that means the same in every process: compiled graphs hold it, and are found on disk by what they hold.

    ``parts`` are told apart by their representation; one with an address in it is found by nobody.
    """
    digest = hashlib.sha256(repr((_sources(), *parts)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


@functools.cache
def _sources() -> str:
    """A digest of this code, from which what an operator gives follows, too."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def plain(backends: Backends) -> LinearPlan:
    """The plan of a linear that quantizes nothing."""
    return resolve((LinearSpec(),), (0, 0, 0), backends, (), (0, 0, False))
