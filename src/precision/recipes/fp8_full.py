"""All of "Scaling FP8 training to trillion-token LLMs" (arXiv 2409.12517): products, states and weights are narrow.

Matrix products in FP8 with delayed scaling, Smooth-SwiGLU at the input of every down-projection (``smooth_swiglu``),
Adam's first moment in E4M3, whose precision it needs, its second in E5M2, whose range it needs, and weights stored in
FP16: each with one scale for the tensor. Weight and states take 4 bytes a parameter instead of 12, and the BF16 values
that products read 2 more; gradients aside.

Not as the paper: amaxes of a step are used in the next (its code refreshes scales when a history is full), products in
TransformerEngine's E4M3 with a maximum of 448 and scales that are no powers of two (Gaudi: 240, powers of two), weights
and activations in E4M3 in backward, too, and gradients rounded to nearest, as the paper's text has it and not its code.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..recipe import NO_ARGUMENTS, Recipe
from ..states.moments import STANDARD, chosen
from . import smooth_swiglu


def recipe(
    *,
    base: str = "fp8_delayed",
    base_args: Mapping[str, Any] = NO_ARGUMENTS,
    form: str = "channel",
    pow2: bool = True,
    fuse: str = "auto",
    moments: str = "fp8_fishman",
) -> Recipe:
    """
    Args:
        base: the recipe of the matrix products, by name.
        base_args: its arguments.
        form: of Smooth-SwiGLU: channel (the paper's) or token (the released code's).
        pow2: the scales of Smooth-SwiGLU are powers of two.
        fuse: silu(gate) * up inside the kernels that quantize it, as ``smooth_swiglu`` has it.
        moments: how optimizer states and weights are stored, as optim.moments names it.
    """
    smoothed = smooth_swiglu.recipe(base=base, base_args=base_args, form=form, pow2=pow2, fuse=fuse)
    return replace(smoothed, moments=chosen(moments, STANDARD))
