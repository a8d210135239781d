"""Smooth-SwiGLU over any recipe that quantizes linears (arXiv 2409.12517, trillion-token FP8 training).

In long runs weight decay aligns the gate and up weights of some channels of a SwiGLU. Their product then grows with the
square of the weights, one channel sets the scale of the whole input of the down-projection, and FP8 training diverges.
The scales here even that input out before it is quantized and are undone exactly (``precision.smooth``): by channel, as
the paper writes, or by token, as its released code does. The rest of the model is the base recipe's.

What is lost: by channel, the down-projection's weight takes over the spread of the scales, is quantized once more for
dgrad, and is measured in every pass. Scales are those of a rank's micro-batch, so losses depend a little on world size
and micro-batch size. A model whose MLPs are no SwiGLU is refused.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import nn

from ..linear import QuantLinear
from ..loading import load
from ..recipe import Recipe, Rule, one_of
from ..smooth import DOWN, FORMS, GATE, UP, fused, smooth

NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})


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
    rule = Rule(kind=QuantLinear, path=rf"(.*\.)?{DOWN}", make=make, siblings=(GATE, UP))
    rules = (*inner.rules, rule)
    if one_of("fuse", fuse, {"auto": "auto", "always": "always", "never": "never"}) != "never":
        into = fused(always=fuse == "always")
        rules += (Rule(kind=nn.Module, path=".+", make=into, children=(GATE, UP, DOWN), optional=True),)
    return replace(inner, rules=rules)
