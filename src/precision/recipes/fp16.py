"""FP16 mixed precision with dynamic loss scaling (arXiv 1710.03740).

FP16 has 11 significant bits, eight times finer than BF16, but its range ends at 65504 and 2^-24: gradients underflow.
So the loss is multiplied by a large power of two before backward, and gradients are divided by it in float32 before
anything looks at them. Where a gradient overflows, the step is skipped on all ranks and the scale is halved; after many
clean steps it is doubled again. Master weights, moments and gradient reductions stay in float32. Constants and rules
are those of `torch.amp.GradScaler`; beyond them the scale has a floor.

Not finite: an overflow in the backward pass is the scale's business. One in the forward pass makes the loss infinite,
which no scale mends: that step is skipped and counts towards divergence, as do overflows at the floor.

On a CPU matrix products are computed in float32 and rounded once to FP16: torch multiplies FP16 there in a scalar loop.
"""

import torch

from ..blocks import LINEARS
from ..linear import quantized
from ..loss_scale import LossScaler
from ..recipe import Dtypes, Recipe, Rule
from ..spec import LinearSpec


def recipe(
    *,
    init_scale: float = 65536.0,
    growth: float = 2.0,
    backoff: float = 0.5,
    interval: int = 2000,
    min_scale: float = 1.0,
) -> Recipe:
    """
    Args:
        init_scale: the loss scale of the first step.
        growth: its factor after so many clean steps in a row ...
        interval: ... as these.
        backoff: its factor after an overflow.
        min_scale: the scale goes no lower.
    """
    return Recipe(
        rules=(Rule(kind=LINEARS, path=".*", make=quantized(LinearSpec())),),
        dtypes=Dtypes(param=torch.float32, compute=torch.float16, reduce=torch.float32),
        loss_scale=LossScaler(init=init_scale, growth=growth, backoff=backoff, interval=interval, floor=min_scale),
    )
