"""Smooth-SwiGLU (arXiv 2409.12517): the input of a SwiGLU's down-projection, rescaled before it is quantized.

h = silu(gate) * up is a product of two numbers, so where the weights of a channel align it grows with their square, and
one scale for all of h then serves that channel alone. Both forms divide h by scales d of this forward pass, on
this rank: detached, and 1 where a maximum is zero, below 2^-126 or not finite (``precision.swiglu.scales_of``).

``channel`` is the paper's: d_i is the maximum of channel i over the tokens of the micro-batch.

    fprop   y  = Q(h / d) Q(W d)^T          dgrad  dh = Q(dy) Q(W)           wgrad  dW = (Q(dy)^T Q(h / d)) d

The paper writes Q(h / d) d before the product with Q(W). No narrow matrix product can scale along its contraction, so
the factor d goes into the columns of W before W is quantized, as the paper does for inference; for d a power of two it
is the same but for what leaves W's range. W d is a tensor of this step, as d is: its amax is always its own, also over
a base with delayed scaling, whose history would be wrong by every growth of d. What is gained in h is in part lost in
W, whose columns now differ as those of h did.

``token`` is the released code's: d_t is the maximum over the hidden channels of |up| of token t, of the linear branch
alone.

    fprop   y  = (Q(h / d) Q(W)^T) d        dgrad  dh = (Q(dy d) Q(W)) / d   wgrad  dW = Q(dy d)^T Q(h / d)

It evens tokens out, not channels, needs nothing of W, and cannot be folded into weights. A token of zeros, 0/0 in the
released code, has d = 1 here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...linear import QuantLinear
from ...scaling import Current
from ...slots import operands
from ...spec import GemmSpec, LinearSpec, OperandSpec, Source, Split, Transform
from ...swiglu import DOWN, UP, scales_of
from ...transforms import Along, Composed, Rescale


@dataclass(frozen=True, slots=True)
class Form:
    """How the three GEMMs are rescaled; None where one is left as it is. ``folds``: whether W is, in fprop."""

    fprop: Rescale
    dgrad: Rescale | None
    wgrad: Rescale
    folds: bool


CHANNEL = Form(
    fprop=Rescale(name="smooth-channel", a=Along(1, -1), b=Along(1, 1)),
    dgrad=None,
    wgrad=Rescale(name="smooth-channel", b=Along(0, -1), y=Along(1, 1)),
    folds=True,
)
TOKEN = Form(
    fprop=Rescale(name="smooth-token", a=Along(0, -1), y=Along(0, 1)),
    dgrad=Rescale(name="smooth-token", a=Along(0, 1), y=Along(0, -1)),
    wgrad=Rescale(name="smooth-token", a=Along(1, 1), b=Along(1, -1)),
    folds=False,
)
FORMS = {"channel": CHANNEL, "token": TOKEN}


@dataclass(slots=True)
class ChannelScales:
    """d of every channel of h [tokens, channels]."""

    pow2: bool

    def __call__(self, h: Tensor) -> Tensor:
        if not len(h):  # an expert that no token has chosen
            return h.new_ones(h.shape[-1], dtype=torch.float32)
        return scales_of(h.detach().abs().amax(0), pow2=self.pow2)


@dataclass(slots=True, eq=False)
class TokenScales:
    """d of every token, from the output of the up-projection just before: ``measure`` is its forward hook."""

    pow2: bool
    amax: Tensor | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def measure(self, up_proj: nn.Module, arguments: Any, up: Tensor) -> None:
        self.amax = up.detach().abs().amax(-1).flatten()

    def __call__(self, h: Tensor) -> Tensor:
        amax, self.amax = self.amax, None
        if amax is None or len(amax) != len(h):
            raise RuntimeError(
                f"a {DOWN} with scales of tokens reads {len(h)} of them, but its {UP} did not run on them"
            )
        return scales_of(amax, pow2=self.pow2)


def smooth(form: Form, *, pow2: bool) -> Callable[..., QuantLinear]:
    """The ``make`` of a rule for quantized down-projections, with siblings gate and up.

    It raises ValueError for one that is smoothed already, for that of experts, and as ``smoothed`` does.
    """

    def make(down: nn.Module, path: str, gate: nn.Module, up: nn.Module) -> QuantLinear:
        if not isinstance(down, QuantLinear):
            raise ValueError(
                f"{path}: Smooth-SwiGLU is not for experts, whose rows have no scales of their own: take its base "
                "recipe, or keep them in high precision (keep_paths of base_args)"
            )
        if down.statistics is not None:
            raise ValueError(f"{path} is smoothed already")
        linear = QuantLinear(down, path, smoothed(down.spec, form))
        if form.folds:
            linear.statistics = ChannelScales(pow2)
        else:
            linear.statistics = scales = TokenScales(pow2)
            up.register_forward_hook(scales.measure)
        return linear

    return make


def smoothed(spec: LinearSpec, form: Form) -> LinearSpec:
    """``spec`` with its GEMMs rescaled, before its own transforms.

    Raises ValueError where the input is not quantized, so that there is nothing to smooth, for operands that are
    quantized from the codes of another GEMM, which would be rescaled twice, for sums of parts and for derivatives of
    rounding, which would be those of other values.
    """
    if spec.fprop.a is None:
        raise ValueError(f"Smooth-SwiGLU rescales the quantized input of {DOWN}: in {spec} it is not quantized")
    if any(operand is not None and operand.source is not Source.ORIGINAL for operand in operands(spec)):
        raise ValueError(f"Smooth-SwiGLU takes no base that reads codes again: {spec}")
    if spec.dx is not None or spec.dw is not None or any(isinstance(operand, Split) for operand in operands(spec)):
        raise ValueError(f"Smooth-SwiGLU takes no base with sums of parts or derivatives of rounding: {spec}")
    fprop = spec.fprop
    if form.folds and isinstance(fprop.b, OperandSpec):
        fprop = replace(fprop, b=replace(fprop.b, amax=Current()))
    return LinearSpec(
        fprop=_rescaled(fprop, form.fprop),
        dgrad=_rescaled(spec.dgrad, form.dgrad),
        wgrad=_rescaled(spec.wgrad, form.wgrad),
    )


def _rescaled(gemm: GemmSpec, rescale: Rescale | None) -> GemmSpec:
    if rescale is None or (gemm.a is None and gemm.b is None):
        return gemm
    transform: Transform = rescale if gemm.transform is None else Composed(first=rescale, second=gemm.transform)
    return replace(gemm, transform=transform)
