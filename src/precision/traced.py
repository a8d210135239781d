"""Quantized linears as operators of torch, so that ``torch.compile`` takes a block of a model as one graph.

Three operators a linear, each opaque to the compiler, and each running what eager code runs:

inputs(x, kind, differentiated)                        operands of x, if all linears of the kind make the same ones
linear(x, weight, bias, shared, token, kind, ...)      [y, what is saved of x for backward]
linear_backward(dy, weight, saved, token, kind, ...)   [dx, dw, dbias]

``kind`` is a number that blocks share: one compiled block serves all. What differs between two linears of a kind, that
is amax histories and the keys of noise, is found by ``token``, an int64 on the CPU that the linear owns. The compiler
sees that siblings (q, k, v) call ``inputs`` with the same arguments and leaves one call. A linear's amax history is
written inside; nothing else in a graph reads it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

if TYPE_CHECKING:
    from .linear import QuantLinear


_modules: weakref.WeakValueDictionary[int, QuantLinear] = weakref.WeakValueDictionary()
_of_kind: dict[int, weakref.WeakSet[QuantLinear]] = {}
_next = 0


def register(module: QuantLinear) -> Tensor:
    """A token for this linear."""
    global _next
    _next += 1
    _modules[_next] = module
    return torch.tensor(_next, dtype=torch.int64, device="cpu")


def join(module: QuantLinear, *kinds: int) -> None:
    """This linear may compute by these kinds."""
    for kind in kinds:
        _of_kind.setdefault(kind, weakref.WeakSet()).add(module)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, kind: int, kind_of_inputs: int | None
) -> Tensor:
    """y [..., out_features] of the linear that ``token`` names.

    ``kind_of_inputs``: equal for all linears that make the same of x, None if no two do.
    """
    differentiated = torch.is_grad_enabled() and weight.requires_grad
    shared = []
    if kind_of_inputs is not None:
        shared = torch.ops.narrowgauge.inputs(x.detach(), kind_of_inputs, differentiated)
    y: Tensor = torch.ops.narrowgauge.linear(x, weight, bias, shared, token, kind, differentiated)[0]
    return y


class _Like(NamedTuple):
    """What a tensor looks like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor) -> _Like:
        return _Like(tuple(x.shape), x.stride(), x.dtype)


_saved_of: dict[tuple[Any, ...], tuple[int, ...] | None] = {}
_outputs: dict[tuple[Any, ...], list[_Like]] = {}


def _some(kind: int, device: torch.device) -> QuantLinear:
    """A linear that computes by this kind now: a schedule may have had others join it and leave."""
    return next(module for module in _of_kind[kind] if module.computes_by(kind, device))


def _inputs(x: Tensor, kind: int, differentiated: bool) -> list[Tensor]:
    return _some(kind, x.device).traced_inputs(x.detach(), differentiated)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shared: Sequence[Tensor],
    token: Tensor,
    kind: int,
    differentiated: bool,
) -> list[Tensor]:
    return _modules[int(token)].traced_forward(x, weight, bias, list(shared), differentiated)[0]


def _backward(
    dy: Tensor, weight: Tensor, saved: Sequence[Tensor], token: Tensor, kind: int, needed: Sequence[bool]
) -> list[Tensor]:
    wants_x, wants_w, wants_bias = needed
    results = _modules[int(token)].traced_backward(dy, weight, list(saved), (wants_x, wants_w, wants_bias))
    return [dy.new_empty(0) if result is None else result for result in results]


# To know what an operator gives, it is run once on zeros by any linear of the kind: who computes decides what is saved
# in which layout. A zero leaves no trace in an amax history.


def _inputs_fake(x: Tensor, kind: int, differentiated: bool) -> list[Tensor]:
    key = "inputs", kind, _static(x), differentiated
    if key not in _outputs:
        with unset_fake_temporarily(), torch.no_grad():
            _outputs[key] = [_Like.of(y) for y in _inputs(_zeros(x), kind, differentiated)]
    return _empty(x, _outputs[key])


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shared: Sequence[Tensor],
    token: Tensor,
    kind: int,
    differentiated: bool,
) -> list[Tensor]:
    key = "linear", kind, _static(x), differentiated
    if key not in _outputs:
        with unset_fake_temporarily(), torch.no_grad():
            zeros = _zeros(x), _zeros(weight), None if bias is None else _zeros(bias)
            outputs, _saved_of[key] = _some(kind, x.device).traced_forward(
                *zeros, [_zeros(y) for y in shared], differentiated
            )
            _outputs[key] = [_Like.of(y) for y in outputs]
    return _empty(x, _outputs[key])


def _backward_fake(
    dy: Tensor, weight: Tensor, saved: Sequence[Tensor], token: Tensor, kind: int, needed: Sequence[bool]
) -> list[Tensor]:
    wants_x, wants_w, wants_bias = needed
    return [
        dy.new_empty(*dy.shape[:-1], weight.shape[1]) if wants_x else dy.new_empty(0),
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if wants_w else dy.new_empty(0),
        dy.new_empty(weight.shape[0]) if wants_bias else dy.new_empty(0),
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, bias, shared, token, kind, differentiated = inputs
    _, *own = output
    which = _saved_of["linear", kind, _static(x), differentiated]
    saved = own or ([x] if which is None else [shared[place] for place in which])
    ctx.save_for_backward(weight, token, *(saved if differentiated else []))
    ctx.kind, ctx.has_bias, ctx.num_shared = kind, bias is not None, len(shared)
    ctx.set_materialize_grads(False)


def _differentiated(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    weight, token, *saved = ctx.saved_tensors
    dy, needs = grads[0], ctx.needs_input_grad
    no_grads = [None] * ctx.num_shared
    if dy is None:
        return None, None, None, no_grads, None, None, None
    needed = [needs[0], needs[1], ctx.has_bias and needs[2]]
    results = torch.ops.narrowgauge.linear_backward(dy, weight, saved, token, ctx.kind, needed)
    dx, dw, dbias = (result if wanted else None for result, wanted in zip(results, needed, strict=True))
    return dx, dw, dbias, no_grads, None, None, None


def _static(x: Tensor) -> _Like:
    """How x looks, in numbers: one graph for each shape."""
    return _Like(tuple(int(size) for size in x.shape), (), x.dtype)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros([int(size) for size in x.shape], dtype=x.dtype, device=x.device)


def _empty(x: Tensor, outputs: list[_Like]) -> list[Tensor]:
    return [x.new_empty_strided(like.shape, like.stride, dtype=like.dtype) for like in outputs]


_library: Any = torch.library.Library("narrowgauge", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("inputs(Tensor x, int kind, bool differentiated) -> Tensor[]")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] shared, Tensor token, int kind, bool differentiated)"
    " -> Tensor[]"
)
_library.define(
    "linear_backward(Tensor dy, Tensor weight, Tensor[] saved, Tensor token, int kind, bool[] needed) -> Tensor[]"
)
for _name, _function, _fake in (
    ("inputs", _inputs, _inputs_fake),
    ("linear", _linear, _linear_fake),
    ("linear_backward", _backward, _backward_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"narrowgauge::{_name}", _fake, lib=_library)
torch.library.register_autograd("narrowgauge::linear", _differentiated, setup_context=_setup, lib=_library)
