"""FP8 with current scaling (arXiv 2209.05433; TransformerEngine's Float8CurrentScaling).

A tensor's scale comes from its own absolute maximum: nothing saturates and nothing is remembered, at the price of
reading every tensor twice. E4M3 forward, E5M2 for gradients (HYBRID), one scale per tensor. Head, embeddings and norms
stay in BF16.

The scale spans one rank's micro-batch, so losses depend a little on the number of processes and on the micro-batch, and
not on the order of sums alone; ``amax: step`` makes it one of the whole step.

Native FP8 products of Ada and Hopper do not sum in FP32, fast or not: their tensor cores cut every product to 13
fraction bits below the largest of a step (of 16 or 32 products), and sums that are not fast are added up in FP32 only
between intervals (``precision.backends.scaled_mm``). At K = 4096 this changes 25% of BF16 outputs with fast sums, 6%
with FP32 every 128 products, and none on B200, against emulation, which sums in FP32.

Not finite: an infinite amax gives scale 1 and infinities saturate; NaN stays NaN in its element.
"""

from dataclasses import replace

from ..formats import E4M3, E5M2
from ..recipe import Keep, Recipe, block_linears, current, fast_sums, one_of, sums
from ..scaling import Fp32
from ..spec import GemmSpec, LinearSpec, OperandSpec


def recipe(
    *,
    format: str = "hybrid",
    pow2: bool = False,
    eps: float = 0.0,
    amax: str = "micro",
    fast_accum: bool | str = "auto",
    accumulate: str = "fp32",
    keep: tuple[Keep, ...] = (),
) -> Recipe:
    """
    Args:
        format: hybrid (gradients in E5M2) or e4m3 (all in E4M3).
        pow2: round scales down to powers of two.
        eps: floor of amax.
        amax: what the scales of x and dy are made from: micro, the tensor of a rank's micro-batch, or step, that of the
            whole step, so that every number of processes has the same scales: one small all-reduce for each tensor, and
            a step must be one micro-batch. Weights are the same everywhere. All ranks call the same linears in the same
            order while they train: no experts that some ranks pass by.
        fast_accum: native products of fprop may sum without additions in FP32 in between, which is faster; auto: on
            Ada and Hopper. Those of dgrad and wgrad, whose errors add up in the weights, never do (as TransformerEngine
            and torchao have it).
        accumulate: how products are summed, in all three GEMMs: fp32, or by the rule of a card's tensor cores, in every
            bit (``precision.sums.RULES``: h100_fp8, ada_fp8 ...), which is emulated and slow.
        keep: linears left in BF16. ``keep_first``, ``keep_last``: of blocks, a number or a fraction, rounded up;
            ``keep_paths``: by regex.
    """
    scale = Fp32(pow2=pow2, eps=eps)
    w = OperandSpec(format=E4M3, scale=scale)
    x = replace(w, amax=current(amax))
    dy = replace(x, format=one_of("format", format, {"hybrid": E5M2, "e4m3": E4M3}))
    spec = LinearSpec(
        fprop=GemmSpec(a=x, b=w, accumulate=sums(accumulate, fast_sums(fast_accum))),
        dgrad=GemmSpec(a=dy, b=w, accumulate=sums(accumulate)),
        wgrad=GemmSpec(a=dy, b=x, accumulate=sums(accumulate)),
    )
    return Recipe(rules=(block_linears(spec, keep),), one_micro_batch=amax == "step")
