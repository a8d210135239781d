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
from .quantize import operand_dtype
from .scaling import AMAX, TENSOR, Current, Delayed, FourOverSix, Unit, finishes, outer_of, reads
from .spec import (
    GemmSpec,
    LinearSpec,
    OperandSpec,
    Part,
    SlotSpec,
    Source,
    Split,
    Transform,
    assembled,
    changes,
    draws,
    specs_of,
)

FPROP, DGRAD, WGRAD = range(3)
X, W, DGRAD_DY, DGRAD_W, WGRAD_DY, WGRAD_X = range(6)
TENSORS = ("x", "w", "dy", "w", "dy", "x")
TRANSPOSED = (False, False, False, True, True, True)
SLOTS = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
OUTPUTS = ("fprop.y", "dgrad.dx", "wgrad.dw")
EARLIER = {DGRAD_W: W, WGRAD_DY: DGRAD_DY, WGRAD_X: X}  # the slot that sees the same tensor first
PARTS = 16  # part p of slot s has the noise of slot s + 16 p; the first is the slot's own
SIGNS = 8  # GEMM g draws its transform from the noise of slot 8 + g

Backends = tuple[Backend, Backend, Backend]
"""Of fprop, dgrad and wgrad."""


class Origin(Enum):
    """What a slot's operand is computed from."""

    TENSOR = "the tensor, in high precision"
    TRANSPOSED = "the codes of the earlier slot of this tensor, transposed"
    REQUANTIZED = "the values of those codes, quantized again"
    VALUES = "the values of those codes, as they are"


class Saved(Enum):
    """What of x is saved for backward."""

    INPUT = "x itself"
    FPROP = "the codes that fprop reads, seen transposed"
    VALUES = "the codes that fprop reads, as they are"
    REQUANTIZED = "the values of those codes, quantized again for wgrad"
    WGRAD = "x quantized for wgrad"


@dataclass(frozen=True, slots=True, eq=False)
class SlotPlan:
    """One of the six operands.

    Args:
        number: of the slot; its GEMM is number // 2.
        row: in the probe's table.
        spec: how it is quantized; None leaves it in high precision, but for ``split``.
        split: the parts that it is a sum of, each quantized by a spec of its own; None where it is one.
        parts: of ``split``, each as an operand of its own.
        noise: whose rounding noise it has: the slot, but for parts after the first.
        transform: of its GEMM's operands, or None.
        draws: the transform is drawn anew at every step.
        left: side of its product.
        transposed: it is the transpose of what the linear reads.
        origin: what it is computed from.
        rereads: its spec asks for the codes of the earlier slot.
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
    row: str
    spec: OperandSpec | None
    split: Split | None
    parts: tuple[SlotPlan, ...]
    noise: int
    transform: Transform | None
    draws: bool
    left: bool
    transposed: bool
    origin: Origin
    rereads: bool
    stochastic: bool
    column: int | None
    all_ranks: bool
    own_rows: bool
    one_read: bool
    quantizer: Quantizer
    reads_rows: bool
    key: int

    @property
    def quantized(self) -> bool:
        return self.spec is not None or self.split is not None

    def described(self, dtype: torch.dtype) -> str:
        """How a tensor of ``dtype`` is rounded here, in words."""
        says = self.split or self.spec
        name = str(dtype).removeprefix("torch.") if says is None else str(says)
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
        rotated: the transform of fprop, where dgrad, or wgrad, reads codes of the transformed w, or x: its output is a
            gradient with respect to the transformed operand. None elsewhere.
        empty: nothing is quantized.
        all_ranks: a scale is computed from all ranks' tensors.
        shares_inputs: every linear of this kind makes the same of one x.
        traceable: what it computes can be an operator of ``precision.traced``.
    """

    spec: LinearSpec
    backends: Backends
    slots: tuple[SlotPlan, ...]
    saved: Saved
    weight_once: OperandSpec | str
    unmeasured: tuple[Unmeasured, ...]
    kind: int
    kind_of_inputs: int
    rotated: tuple[Transform | None, Transform | None]
    empty: bool
    all_ranks: bool
    shares_inputs: bool
    traceable: bool

    def __deepcopy__(self, memo: object) -> LinearPlan:
        """A copy of a linear has the same plans: nothing of them changes."""
        return self

    @property
    def saves_fprop_codes(self) -> bool:
        """What is saved of x comes from the codes that fprop reads."""
        return self.saved in (Saved.FPROP, Saved.VALUES, Saved.REQUANTIZED)


def gemms(spec: LinearSpec) -> tuple[GemmSpec, GemmSpec, GemmSpec]:
    return spec.fprop, spec.dgrad, spec.wgrad


def operands(spec: LinearSpec) -> tuple[SlotSpec | None, ...]:
    """What the spec says of the six slots."""
    return tuple(operand for gemm in gemms(spec) for operand in (gemm.a, gemm.b))


def is_stochastic(operand: SlotSpec | None) -> bool:
    return any(spec.stochastic for spec in specs_of(operand))


def columns_of(spec: LinearSpec) -> dict[int, Column]:
    """The column of every slot with delayed scaling; slots that see the same tensor alike share one."""
    return {
        slot: Column(TENSORS[slot], _rewritten(gemms(spec)[slot // 2].transform, slot), operand.amax)
        for slot, operand in enumerate(operands(spec))
        if isinstance(operand, OperandSpec) and isinstance(operand.amax, Delayed)
    }


def _rewritten(transform: Transform | None, slot: int) -> str:
    return str(transform) if changes(transform, left=slot % 2 == 0) else ""


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
    rotation = spec.fprop.transform
    rotated = (
        None if slots[DGRAD_W].origin is Origin.TENSOR else rotation,
        None if slots[WGRAD_X].origin is Origin.TENSOR else rotation,
    )
    reads_codes = all(slot.split is None and slot.origin is not Origin.VALUES for slot in slots)
    traceable = reads_codes and rotated == (None, None) and not any(slot.draws for slot in slots)
    traceable = traceable and spec.dx is None and spec.dw is None
    by = [backend.identity for backend in backends]
    inputs = [(number, slots[number].spec, slots[number].transform, by[number // 2][0]) for number in (X, WGRAD_X)]
    reused = [slots[number].origin.name for number in (WGRAD_X, WGRAD_DY)]
    return LinearPlan(
        spec=spec,
        backends=backends,
        slots=slots,
        saved=saved,
        weight_once=_weight_once(slots, spec),
        unmeasured=tuple(unmeasured.values()),
        kind=stable_number(spec, by, [tuple(one) for one in unmeasured.values()], shape),
        kind_of_inputs=stable_number("inputs", inputs, reused, shape[0]),
        rotated=rotated,
        empty=not any(slot.quantized for slot in slots),
        all_ranks=any(slot.all_ranks for slot in slots),
        shares_inputs=slots[X].spec is not None
        and traceable
        and not unmeasured
        and not any(slots[number].stochastic or slots[number].column is not None for number in (X, WGRAD_X)),
        traceable=traceable,
    )


def _slot(
    spec: LinearSpec, number: int, backends: Backends, own: dict[int, Column], columns: Sequence[Column]
) -> SlotPlan:
    gemm, says, backend = gemms(spec)[number // 2], operands(spec)[number], backends[number // 2]
    operand = says if isinstance(says, OperandSpec) else None
    stochastic = is_stochastic(says)
    tile = operand.tile if operand is not None else TENSOR
    slot = SlotPlan(
        number=number,
        row=SLOTS[number],
        spec=operand,
        split=says if isinstance(says, Split) else None,
        parts=(),
        noise=number,
        transform=gemm.transform,
        draws=draws(gemm.transform),
        left=number % 2 == 0,
        transposed=TRANSPOSED[number],
        origin=_origin(spec, number),
        rereads=says is not None and says.source is not Source.ORIGINAL,
        stochastic=stochastic,
        column=columns.index(own[number]) if number in own else None,
        all_ranks=operand is not None and operand.amax == Current(step=True),
        own_rows=tile.outer == tile.inner and gemm.transform is None and not stochastic,
        one_read=_one_read(spec, number, backends),
        quantizer=backend.quantizer,
        reads_rows=backend.product.reads_rows,
        key=_number((number, says, gemm.transform, backend.name, backend.product.reads_rows)),
    )
    if slot.split is None:
        return slot
    return replace(slot, parts=tuple(_part(slot, *part) for part in enumerate(slot.split.parts)))


def _part(slot: SlotPlan, place: int, part: Part) -> SlotPlan:
    return replace(
        slot,
        row=f"{slot.row}.{part.name}",
        spec=part.spec,
        split=None,
        noise=slot.number + PARTS * place,
        stochastic=is_stochastic(part.spec),
        own_rows=False,
    )


def _origin(spec: LinearSpec, number: int) -> Origin:
    """Codes are those of the earlier slot, transposed, for tiles that are square, specs that are alike and tensors that
    no transform has changed; rounded stochastically, only if the spec says to reuse: else each slot has noise of its
    own."""
    operand = operands(spec)[number]
    if number not in EARLIER or operand is None:
        return Origin.TENSOR
    earlier, first = EARLIER[number], operands(spec)[EARLIER[number]]
    reuses, values = operand.source is not Source.ORIGINAL, operand.source is Source.VALUES
    plain = not changes(gemms(spec)[number // 2].transform, left=number % 2 == 0)
    plain = plain and (values or gemms(spec)[earlier // 2].transform is None)
    square = isinstance(operand, OperandSpec) and operand.tile.outer == operand.tile.inner
    square = square and replace(operand, source=Source.ORIGINAL) == first
    if plain and square and (reuses or not is_stochastic(operand)):
        return Origin.TRANSPOSED
    if values:
        return Origin.VALUES
    return Origin.REQUANTIZED if reuses else Origin.TENSOR


def _one_read(spec: LinearSpec, number: int, backends: Backends) -> bool:
    """Whether the quantizer may make this operand and that of the later slot of the tensor together."""
    if number not in (X, DGRAD_DY):
        return False
    later = {first: second for second, first in EARLIER.items()}[number]
    first, second = operands(spec)[number], operands(spec)[later]
    by, by_later = backends[number // 2], backends[later // 2]
    if not isinstance(first, OperandSpec) or not isinstance(second, OperandSpec):
        return False
    if Source.VALUES in (first.source, second.source) or (isinstance(first.amax, Delayed) and not by.quantizer.notes):
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
    if not slot.quantized:
        return Saved.INPUT
    return {
        Origin.TENSOR: Saved.WGRAD,
        Origin.TRANSPOSED: Saved.FPROP,
        Origin.VALUES: Saved.VALUES,
        Origin.REQUANTIZED: Saved.REQUANTIZED,
    }[slot.origin]


def _weight_once(slots: Sequence[SlotPlan], spec: LinearSpec) -> OperandSpec | str:
    w, w_t = slots[W], slots[DGRAD_W]
    if spec.dw is not None:
        return f"dw * {spec.dw} is computed from the weight in high precision"
    if w.split is not None or w_t.split is not None:
        return "a weight in parts is quantized where it is whole"
    if w.spec is None or w_t.spec is None:
        return f"{'fprop' if w.spec is None else 'dgrad'} reads the weight in high precision"
    if w.spec.format.bits > 8:
        return f"{w.spec.format} is no narrower than what is gathered"
    if operand_dtype(OperandSpec(format=w.spec.format, scale=Unit())) != torch.bfloat16:
        return f"BF16 is not known to hold the values of {w.spec.format}, as which codes are gathered"
    rule = w.spec.scale
    sees_tiles = type(rule) is not FourOverSix and (finishes(rule) or reads(rule))
    if sees_tiles or w.spec.statistic != AMAX or outer_of(rule) != TENSOR:
        return f"scales by {w.spec} are not known to be the same of a shard and of the whole weight"
    if w.spec.tile.outer != w.spec.tile.inner:
        how = "read" if w_t.origin is Origin.VALUES else "quantized anew"
        return f"a weight in tiles of {w.spec.tile} is {how} for dgrad, along its other dimension"
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
