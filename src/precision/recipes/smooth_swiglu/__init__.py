"""Smooth-SwiGLU over any recipe that quantizes linears (arXiv 2409.12517, trillion-token FP8 training).

In long runs weight decay aligns the gate and up weights of some channels of a SwiGLU. Their product then grows with the
square of the weights, one channel sets the scale of all inputs of the down-projection, and FP8 training diverges.
The scales here even that input out before it is quantized and are undone exactly (``scales``): by channel, as the paper
writes, or by token, as its released code does. The rest of the model is the base recipe's.

What is lost: by channel, the down-projection's weight takes over the spread of the scales, is quantized once more for
dgrad, and is measured in every pass. Scales are those of a rank's micro-batch, so losses depend a little on world size
and micro-batch size. A model whose MLPs are no SwiGLU is refused.

A module says that it computes down_proj(silu(gate_proj(x)) * up_proj(x)) by a class attribute next to its forward pass,
``gated_activation = "silu"``; kernels then compute the product (``fused``). Those of `transformers` that are known to
do so need not say it. Any other module keeps its own forward pass, and ``plan.txt`` says why.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ...grouped import QuantGroupedLinear
from ...linear import QuantLinear
from ...loading import load
from ...recipe import NO_ARGUMENTS, Recipe, Rule, one_of
from ...swiglu import DOWN, GATE, PROJECTIONS, UP
from .fused import fuse_swiglu
from .scales import FORMS, smooth


def recipe(
    *,
    base: str = "fp8_delayed",
    base_args: Mapping[str, Any] = NO_ARGUMENTS,
    form: str = "channel",
    pow2: bool = True,
    fuse: str = "auto",
) -> Recipe:
    """
    Args:
        base: the recipe to smooth, by name.
        base_args: its arguments.
        form: channel (the paper's) or token (the released code's).
        pow2: scales are powers of two, so that applying and undoing them rounds nothing; otherwise the maxima.
        fuse: auto computes silu(gate) * up inside the kernels that quantize it, where Triton quantizes, with an
            exponential of our own (``precision.swiglu``: the last bits of FP32 differ from torch's); always does so
            without kernels, too, with the same bits; never leaves it to the model. ``plan.txt`` says which.
    """
    if not isinstance(base_args, Mapping):
        raise ValueError(f"base_args={base_args}: arguments of {base} by name, as base_args.KEY=VALUE")
    inner = load(base, base_args)
    if not inner.rules:
        raise ValueError(f"the base {base} quantizes no linear: there is nothing to smooth")
    make = smooth(one_of("form", form, FORMS), pow2=pow2)
    kinds = QuantLinear, QuantGroupedLinear  # these are refused
    rules = (*inner.rules, Rule(kind=kinds, path=rf"(.*\.)?{DOWN}", make=make, siblings=(GATE, UP)))
    if one_of("fuse", fuse, {"auto": "auto", "always": "always", "never": "never"}) != "never":
        make_fused = fuse_swiglu(always=fuse == "always")
        rules += (Rule(kind=nn.Module, path=".+", make=make_fused, children=PROJECTIONS, optional=True),)
    return replace(inner, rules=rules)
