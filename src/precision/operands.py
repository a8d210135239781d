"""A forward pass of a linear and its backward pass: operands are computed, and multiplied, as its plan says."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends import Cast, Operand
from .context import SharedInput
from .estimator import multiplied, pack_bits, unpack_bits
from .noise import Noise, Rows, base_key, step_key
from .observing import measured
from .packing import AnyOperand, Parts, Saving, WithDerivative, parts_of, values
from .quantize import Prepared, Quantized, dequantize, scaled_values
from .slots import (
    DGRAD,
    DGRAD_DY,
    DGRAD_W,
    EARLIER,
    FPROP,
    SIGNS,
    TENSORS,
    WGRAD,
    WGRAD_DY,
    WGRAD_X,
    LinearPlan,
    Origin,
    Saved,
    SlotPlan,
    W,
    X,
)
from .spec import Estimator, Transform
from .transforms import Composed, back, drawn

if TYPE_CHECKING:
    from .grouped import Multiplier
    from .module import Observer


@dataclass(slots=True)  # a frozen one takes several times as long to make
class Call:
    """One forward pass of a linear and its backward pass: both follow one plan and one place in the data.

    Args:
        linear, plan: whose, and by which plan.
        first_sample: 0-dim int64, global index of the micro-batch's first sample.
        rows_per_sample: rows of x that a sample takes; of an expert, which rows they are.
        shared: operands of x, those of sibling linears included; None in the backward pass.
        stats: what transforms read.
        observer: who watches the GEMMs of training steps, and changes nothing.
    """

    linear: Multiplier
    plan: LinearPlan
    first_sample: Tensor
    rows_per_sample: int | Rows
    shared: dict[Hashable, AnyOperand] | None
    stats: Tensor | None = None
    observer: Observer | None = None

    def with_stats(self, stats: Tensor | None) -> Call:
        return self if stats is self.stats else replace(self, stats=stats)

    def for_backward(self) -> Call:
        """What backward reads of it."""
        return Call(self.linear, self.plan, self.first_sample, self.rows_per_sample, None, None, self.observer)

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, differentiated: bool, wants_dx: bool = True
    ) -> tuple[Tensor, Saving | None, Any]:
        """y of x [rows, in_features]; what is saved of x for the gradient of the weight, if ``differentiated``, and for
        that of x, if ``wants_dx``; an observer's figures of fprop."""
        self.linear.amaxes.measure_rest(self.stats, x=x, w=weight)
        if differentiated:
            self.share_pair(x)
        a = self.operand(X, x, codes=differentiated and self.plan.saves_fprop_codes)
        w = self.weight(W, weight)
        y = self.product(FPROP, a, w, dtype=x.dtype, bias=bias)
        figures = None
        if self.observer is not None:
            # Counted in backward, which runs once also where the forward pass is computed again; it measures by x.
            figures = measured(self, self.observer, FPROP, (x, weight), (a, w), y, bias)
        if differentiated:
            return y, self.saved(x, a), figures
        estimator = self.plan.spec.dx if wants_dx else None
        return y, None if estimator is None else WithDerivative(None, self._derivative(x, estimator)), figures

    def backward(
        self,
        dy: Tensor,
        weight: Tensor,
        saved: Saving,
        needed: tuple[bool, bool],
        watched: tuple[Any, Tensor] | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """dx and dw, where they are needed, from dy [rows, out_features] and what was saved of x.

        ``watched``: the observer's figures of fprop, and x, if there is an observer.
        """
        dx = dw = None
        saved_x, derivative = saved if isinstance(saved, WithDerivative) else (saved, None)
        self.linear.amaxes.measure_rest(self.stats, dy=dy)
        pair = self.pair(DGRAD_DY, dy, codes=False) if all(needed) else None
        first: AnyOperand = dy
        if needed[0]:
            later = self.plan.slots[WGRAD_DY]
            read_again = later.origin in (Origin.REQUANTIZED, Origin.VALUES)
            read_again = read_again or (later.origin is Origin.TRANSPOSED and later.reads_rows)
            first = self.operand(DGRAD_DY, dy, codes=read_again) if pair is None else pair[0]
            w_t = self.weight(DGRAD_W, weight)
            dx = self.product(DGRAD, first, w_t, dtype=dy.dtype)
            if self.observer is not None:
                given = dy, self._rounded_from(W, weight).mT
                self.observer.add(measured(self, self.observer, DGRAD, given, (first, w_t), dx))
            if self.plan.spec.dx is not None or self.plan.rotated[0] is not None:
                dx = self._derived(X, dx, self.plan.spec.dx, derivative)
        if needed[1]:
            assert saved_x is not None, "saved, where the weight has a gradient"
            x_t = self.saved_operand(saved_x)
            dy_t = self.dy_for_wgrad(dy, first) if pair is None else pair[1]
            dw = self.product(WGRAD, dy_t, x_t, dtype=weight.dtype)
            if self.observer is not None and watched is not None:
                self.observer.add(watched[0])
                given = dy.mT, self._rounded_from(X, watched[1]).mT
                self.observer.add(measured(self, self.observer, WGRAD, given, (dy_t, x_t), dw))
            if self.plan.spec.dw is not None or self.plan.rotated[1] is not None:
                dw = self._derived(W, dw, self.plan.spec.dw, weight)
        return dx, dw

    def _rounded_from(self, number: int, x: Tensor) -> Tensor:
        """x, or w, as codes of it that a backward GEMM reads stand for it: transformed, if fprop transforms it."""
        rotated = self.plan.rotated[0 if number == W else 1]
        return x if rotated is None else self.transformed(self.plan.slots[number], x)

    def noise(self, slot: SlotPlan) -> Noise:
        """Of the slot's tensor at this place in the data; that of a weight is the same everywhere."""
        place, of_weight = self.rows_per_sample, TENSORS[slot.number] == "w"
        first: Tensor | int = self.first_sample
        if not isinstance(place, Rows):
            each, ids = 0 if of_weight else place, None
        elif of_weight:
            first, each, ids = place.first_of_weight, 1, None
        else:
            each, ids = place.per_sample, place.ids
        return Noise.of(
            base=self._base_key(slot.noise),
            step=self.linear.context.step,
            first_sample=first,
            rows_of_a_sample=each,
            rows=ids,
            transposed=slot.transposed,
        )

    def _base_key(self, noise: int) -> Tensor:
        linear = self.linear
        base = linear.base_keys.get(noise)
        if base is None:
            base = base_key(linear.context.seed, linear.path, noise, device=linear.weight.device)
            linear.base_keys[noise] = base
        return base

    def transform(self, slot: SlotPlan) -> Transform | None:
        """The slot's transform, at this step."""
        if slot.transform is None or not slot.draws:
            return slot.transform
        gemm, step = slot.number // 2, self.linear.context.step
        last = self.linear.drawn.get(gemm)
        if last is None or last[0] is not step:
            last = step, drawn(slot.transform, step_key(self._base_key(SIGNS + gemm), step))
            self.linear.drawn[gemm] = last
        return last[1]

    def operand(self, number: int, x: Tensor, *, codes: bool = False) -> AnyOperand:
        """The slot's operand of ``x``, which is transposed already where the slot is.

        ``codes``: as codes and scales, and not as the values that a product reads.
        """
        slot = self.plan.slots[number]
        codes = codes or self.observer is not None  # which reads them
        if self.shared is None or not slot.quantized or number not in (X, WGRAD_X) or slot.stochastic:
            return self._cast(slot, x, codes)
        key = self._key(slot, x)
        if key is None:
            return self._cast(slot, x, codes)
        if (key, codes) not in self.shared:
            handed_on = self._handed_on(slot)
            self.shared[key, codes] = self._cast(slot, x, codes) if handed_on is None else handed_on
        return self.shared[key, codes]

    def _handed_on(self, slot: SlotPlan) -> AnyOperand | None:
        """The slot's codes, where the layer that gave x made them by its spec."""
        own = slot.transform is None and slot.column is None and not slot.all_ranks
        return SharedInput.handed_on(self.shared, slot.spec, slot.transposed) if own and self.shared else None

    def weight(self, number: int, weight: Tensor) -> AnyOperand:
        """The operand of slot W or DGRAD_W."""
        slot = self.plan.slots[number]
        if self.linear.gathered is not None:
            spec = self.plan.slots[W].spec
            assert spec is not None, "gathered as codes"
            codes = self.linear.gathered.codes_of(weight, spec, self.plan.slots[number].quantizer)
            return codes if number == W else codes.t()
        if number == W:
            return self.operand(W, weight)
        if slot.rereads:
            return self._read_again(DGRAD_W, self.operand(W, weight, codes=True))
        return self.operand(DGRAD_W, weight.mT)

    def saved(self, x: Tensor, a: AnyOperand) -> Saving:
        """What is saved of x for backward; ``a``: the operand of fprop."""
        saved, estimator = self._saved(x, a), self.plan.spec.dx
        if estimator is None:
            return saved
        return WithDerivative(saved, self._derivative(x, estimator))

    def _derivative(self, x: Tensor, estimator: Estimator) -> Tensor:
        """What the factors of dx are computed from in backward."""
        return pack_bits(self._factor(X, x, estimator)) if estimator.mask else x

    def _saved(self, x: Tensor, a: AnyOperand) -> AnyOperand:
        match self.plan.saved:
            case Saved.INPUT:
                return x
            case Saved.FPROP:
                columns = self._columns(x)
                assert isinstance(a, Quantized), "codes, as the plan says"
                return a.t() if columns is None else columns
            case Saved.VALUES:
                return a
            case Saved.REQUANTIZED:
                return self._requantized(WGRAD_X, a, codes=True)
            case Saved.WGRAD:
                return self.operand(WGRAD_X, x.mT, codes=True)

    def saved_operand(self, saved: AnyOperand) -> AnyOperand:
        """The operand of slot WGRAD_X, from what was saved of x."""
        if self.plan.saved is Saved.VALUES:
            return self._read_again(WGRAD_X, saved)
        return self.operand(WGRAD_X, saved.mT) if isinstance(saved, Tensor) else saved

    def dy_for_wgrad(self, dy: Tensor, first: AnyOperand) -> AnyOperand:
        """The operand of slot WGRAD_DY; ``first``: that of DGRAD_DY, or dy where no dx is needed."""
        slot = self.plan.slots[WGRAD_DY]
        if slot.rereads and first is dy:
            first = self.operand(DGRAD_DY, dy, codes=True)
        if slot.origin is Origin.TENSOR or isinstance(first, Tensor):
            return self.operand(WGRAD_DY, dy.mT)
        return self._read_again(WGRAD_DY, first)

    def product(
        self, gemm: int, a: AnyOperand, b: AnyOperand, *, dtype: torch.dtype, bias: Tensor | None = None
    ) -> Tensor:
        """The output of GEMM 0, 1 or 2."""
        slot, by = self.plan.slots[2 * gemm], self.plan.backends[gemm].product
        if isinstance(a, Parts) or isinstance(b, Parts):
            wide = torch.promote_types(dtype, torch.float32)
            pairs = [(p, q) for p in parts_of(a) for q in parts_of(b)]
            y = functools.reduce(torch.add, (by.gemm(p, q, bias=None, dtype=wide) for p, q in pairs))
        elif slot.transform is None:
            return by.gemm(a, b, bias=bias, dtype=dtype)
        else:
            y = by.gemm(a, b, bias=None, dtype=dtype)
        transform = self.transform(slot)
        y = y if transform is None else transform.output(y, self.stats)
        return (y if bias is None else y + bias).to(dtype)

    def transformed(self, slot: SlotPlan, x: Tensor) -> Tensor:
        """The tensor that is quantized in place of x."""
        transform = self.transform(slot)
        return x if transform is None else self._transformed(slot, transform, x, self.stats)

    def pair(
        self, number: int, x: Tensor, *, codes: bool = True
    ) -> tuple[Quantized, Quantized] | tuple[Prepared, Prepared] | None:
        """The operands of slot X or DGRAD_DY and of the later slot of that tensor, if the quantizer makes both in one
        read."""
        slot, spec = self.plan.slots[number], self.plan.slots[number].spec
        if not slot.one_read or spec is None or self.observer is not None:
            return None
        later = self.plan.slots[WGRAD_X if number == X else WGRAD_DY]
        noise = (self.noise(slot), self.noise(later)) if slot.stochastic else None
        amax, note = self._amax(slot, x)
        codes = codes or slot.reads_rows
        return slot.quantizer.cast_both(x, Cast(spec=spec, amax=amax, noise=noise, codes=codes, note=note))

    def share_pair(self, x: Tensor) -> None:
        """Have the codes of x for fprop and for wgrad ready, if one read makes both."""
        slot = self.plan.slots[X]
        if self.shared is None or not slot.one_read or slot.stochastic or self._handed_on(slot) is not None:
            return
        keys = (
            (self._key(slot, x), self.plan.saves_fprop_codes),
            (self._key(self.plan.slots[WGRAD_X], x), True),
        )
        if keys[0] not in self.shared and (pair := self.pair(X, x)) is not None:
            self.shared.update(zip(keys, pair, strict=True))

    def _cast(self, slot: SlotPlan, x: Tensor, codes: bool) -> AnyOperand:
        """x, transformed and quantized as the slot says."""
        if slot.split is None:
            return self._quantized(slot, x, codes)
        return self._parts(slot, self.split(slot, x), x.shape[1 if slot.transposed else 0], codes)

    def split(self, slot: SlotPlan, x: Tensor) -> list[Tensor]:
        """The parts of x, which is transposed where the slot is; they are not."""
        assert slot.split is not None
        try:
            return slot.split.of(x.mT if slot.transposed else x)
        except ValueError as error:
            raise ValueError(f"{self.linear.path}: {error}") from error

    def _parts(self, slot: SlotPlan, tensors: Sequence[Tensor], rows: int, codes: bool) -> Parts:
        """The slot's operand as a sum of these tensors [rows, columns], some of one row that stands for all."""
        parts = zip(slot.parts, tensors, strict=True)
        return Parts(tuple(self._part(part, tensor, rows, codes) for part, tensor in parts))

    def _part(self, part: SlotPlan, x: Tensor, rows: int, codes: bool) -> Operand:
        if not part.transposed:
            return self._quantized(part, x, codes)
        if len(x) == rows or part.spec is None or part.reads_rows:
            return self._quantized(part, x.expand(rows, -1).mT, codes)
        # Blocks along equal values would all err alike: the row is rounded, as where it is not transposed.
        row = self._quantized(replace(part, transform=None, draws=False, transposed=False), x, codes=True)
        return self.transformed(part, values(row).expand(rows, -1).mT)

    def _quantized(self, slot: SlotPlan, x: Tensor, codes: bool) -> Operand:
        spec, transform = slot.spec, self.transform(slot)
        # A remembered amax, or that of all ranks, is of the transformed tensor; else one pass may do both.
        apart = spec is None or slot.all_ranks or self.stats is not None
        apart = apart or (slot.column is not None and not slot.quantizer.notes)
        if transform is not None and (apart or (slot.column is not None and self.linear.amaxes.unknown())):
            x, transform = self._transformed(slot, transform, x, self.stats), None
        if spec is None:
            return x
        # The same codes, read along the tensor's own rows; but products that read rows would copy them.
        own_rows = slot.transposed and slot.own_rows and not slot.reads_rows
        if own_rows:
            x = x.mT
        noise = self.noise(slot) if slot.stochastic else None
        amax, note = self._amax(slot, x)
        codes = codes or slot.reads_rows
        cast = Cast(spec=spec, amax=amax, noise=noise, transform=transform, left=slot.left, codes=codes, note=note)
        operand = slot.quantizer.cast(x, cast)
        return operand.t() if own_rows else operand

    def _amax(self, slot: SlotPlan, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the slot's scale is computed from, None for the tensor's own amax; and where that is recorded."""
        if slot.column is not None:
            return self.linear.amaxes.held_and_note(slot, x)
        return (self.linear.amaxes.of_all_ranks(slot, x) if slot.all_ranks else None), None

    def _transformed(self, slot: SlotPlan, transform: Transform, x: Tensor, stats: Tensor | None) -> Tensor:
        if stats is None:
            return slot.quantizer.transformed(transform, x, left=slot.left)
        if isinstance(transform, Composed):  # the second reads no statistics, so it is the quantizer's
            return self._transformed(slot, transform.second, self._transformed(slot, transform.first, x, stats), None)
        return transform.left(x, stats) if slot.left else transform.right(x, stats)

    def _read_again(self, number: int, earlier: AnyOperand) -> AnyOperand:
        """The slot's operand from the codes of the earlier slot of the tensor."""
        slot = self.plan.slots[number]
        if slot.origin is Origin.REQUANTIZED:
            return self._requantized(number, earlier)
        if isinstance(earlier, Tensor):
            return earlier.mT
        if isinstance(earlier, Parts):
            return earlier.sum(self._reread(number)).mT
        if slot.origin is Origin.VALUES and isinstance(earlier, Quantized):
            matrix, factor = slot.quantizer.operand(earlier)
            return Prepared(matrix=matrix.mT, factor=factor)
        return earlier.t()

    def _requantized(self, number: int, earlier: AnyOperand, *, codes: bool = False) -> AnyOperand:
        """The slot's operand from the codes of an earlier slot of the transposed tensor."""
        if isinstance(earlier, Parts):
            slot, places = self.plan.slots[number], self._reread(number)
            whole = earlier.sum(places)
            if slot.split is None:
                return self.operand(number, whole.mT, codes=codes)
            tensors = [values(earlier.operands[place]) for place in places]
            return self._parts(slot, tensors, len(whole), codes or self.observer is not None)
        assert isinstance(earlier, Quantized)
        return self.operand(number, dequantize(earlier).mT, codes=codes)

    def _reread(self, number: int) -> tuple[int, ...]:
        """The parts of the earlier slot that this one reads."""
        split = self.plan.slots[EARLIER[number]].split
        assert split is not None
        return split.read_again

    def _factor(self, number: int, x: Tensor, estimator: Estimator) -> Tensor:
        """What multiplies the gradient of x, or of w, where fprop rounds it."""
        slot = self.plan.slots[number]
        assert slot.spec is not None, "the spec says that it is rounded"
        x = self.transformed(slot, x)
        # Recorded a second time, an amax of the same tensor changes nothing.
        amax = self.linear.amaxes.of_all_ranks(slot, x) if slot.all_ranks else self.linear.amaxes.held(slot, x)
        noise = self.noise(slot) if slot.stochastic else None
        return estimator.factor(scaled_values(x, slot.spec, amax=amax, noise=noise), slot.spec.format)

    def _derived(self, number: int, g: Tensor, estimator: Estimator | None, source: Tensor | None) -> Tensor:
        """The gradient of x, or of w, from what the product gave.

        ``source``: what the factors are computed from: their bits (uint8), or the tensor.
        """
        slot, rotated = self.plan.slots[number], self.plan.rotated[0 if number == X else 1] is not None
        transform = self.transform(slot)
        if estimator is not None:
            assert source is not None
            bits = number == X and estimator.mask
            factor = unpack_bits(source, g.shape[1]) if bits else self._factor(number, source, estimator)
            if transform is not None and not rotated:  # to where it was rounded, and back
                g, rotated = self._transformed(slot, transform, g, self.stats), True
            g = multiplied(g, factor)
        return back(transform, g, left=slot.left, stats=self.stats) if rotated and transform is not None else g

    def _columns(self, x: Tensor) -> AnyOperand | None:
        """The codes of x.mT for wgrad, if one read gave them with those of x."""
        if self.shared is None or not self.plan.slots[X].reads_rows:
            return None
        return self.shared.get((self._key(self.plan.slots[WGRAD_X], x), True))

    def _key(self, slot: SlotPlan, x: Tensor) -> Hashable | None:
        """What the codes of a slot depend on, x apart; None where a device would have to be waited for to know.

        An amax of earlier steps is part of it, and the new one is recorded, as it would be in making the codes.
        """
        if slot.draws or (slot.transform is not None and self.stats is not None):
            return None
        if slot.column is None:
            return slot.key
        if slot.transform is not None:
            return None
        if slot.quantizer.notes:
            return slot.key, self._leader(slot)
        if x.device.type != "cpu":
            return None
        amax = self.linear.amaxes.held(slot, x)
        return slot.key, None if amax is None else float(amax)

    def _leader(self, slot: SlotPlan) -> int:
        """Whose remembered amax scales x for this linear: that of a sibling that read x before, if the two agree."""
        assert self.shared is not None
        first: Any = self.shared.setdefault(("leader", slot.key), self.linear)  # type: ignore[arg-type]
        return id(first if first is self.linear or self.linear.amaxes.follows(first, slot) else self.linear)
