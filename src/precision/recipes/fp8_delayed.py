"""FP8 with delayed scaling (arXiv 2209.05433, as TransformerEngine defines it).

A tensor's scale comes from the absolute maxima of earlier steps, so it is cast in one pass, without looking at it
first. What is lost: a tensor that grows faster than its history saturates for a step, and one outlier keeps the scale
low until it leaves the history. E4M3 forward for precision, E5M2 for gradients, whose range is wider (HYBRID). One
scale per tensor; the first step has scale 1, as there. Head, embeddings and norms stay in BF16.

Histories move on once per optimizer step, as the definition reads, so that accumulation changes only the order of sums.
TransformerEngine's code moves them whenever its outermost autocast is left, so after every micro-batch: ``roll: micro``
is that, with a history of as many micro-batches. The two are one without accumulation.

Native FP8 products of Ada and Hopper do not sum in FP32, fast or not: their tensor cores cut every product to 13
fraction bits below the largest of a step (of 16 or 32 products), and sums that are not fast are added up in FP32 only
between intervals (``precision.backends.scaled_mm``). At K = 4096 this changes 25% of BF16 outputs with fast sums, 6%
with FP32 every 128 products, and none on B200, against emulation, which sums in FP32.

Not finite: an infinity saturates, NaN stays NaN, so that loss and gradient show it and the trainer skips the step; an
amax that is not finite is not remembered (TransformerEngine's would hold the scale until it left the history).
"""

from ..formats import E4M3, E5M2
from ..hooks import RollAmax
from ..recipe import Keep, Recipe, block_linears, fast_sums, one_of, sums
from ..scaling import Delayed, Fp32, Reduce
from ..spec import GemmSpec, LinearSpec, OperandSpec


def recipe(
    *,
    history: int = 1024,
    algo: str = "max",
    margin: int = 0,
    format: str = "hybrid",
    reduce_amax: bool = True,
    roll: str = "step",
    fast_accum: bool | str = "auto",
    accumulate: str = "fp32",
    keep: tuple[Keep, ...] = (),
) -> Recipe:
    """
    Args:
        history: steps (with roll=micro: micro-batches) that a scale looks back on, the newest included.
        algo: max or most_recent, over the history.
        margin: bits of head-room: amax is mapped to the format's maximum times 2^-margin.
        format: hybrid (gradients in E5M2) or e4m3 (all in E4M3).
        reduce_amax: one amax over all ranks.
        roll: when histories move on: step, after every optimizer step, or micro, after every micro-batch, as
            TransformerEngine does.
        fast_accum: native products of fprop may sum without additions in FP32 in between, which is faster; auto: on
            Ada and Hopper. Those of dgrad and wgrad, whose errors add up in the weights, never do (as TransformerEngine
            and torchao have it).
        accumulate: how products are summed, in all three GEMMs: fp32, or by the rule of a card's tensor cores, in every
            bit (``precision.sums.RULES``: h100_fp8, ada_fp8 ...), which is emulated and slow.
        keep: linears left in BF16. ``keep_first``, ``keep_last``: of blocks, a number or a fraction, rounded up;
            ``keep_paths``: by regex.
    """
    amax = Delayed(history=history, reduce=one_of("algo", algo, {reduce.value: reduce for reduce in Reduce}))
    forward = OperandSpec(format=E4M3, scale=Fp32(margin=margin), amax=amax)
    gradient = one_of("format", format, {"hybrid": E5M2, "e4m3": E4M3})
    dy = OperandSpec(format=gradient, scale=Fp32(margin=margin), amax=amax)
    spec = LinearSpec(
        fprop=GemmSpec(a=forward, b=forward, accumulate=sums(accumulate, fast_sums(fast_accum))),
        dgrad=GemmSpec(a=dy, b=forward, accumulate=sums(accumulate)),
        wgrad=GemmSpec(a=dy, b=forward, accumulate=sums(accumulate)),
    )
    return Recipe(
        rules=(block_linears(spec, keep),),
        hooks=(RollAmax(reduce=reduce_amax, micro=one_of("roll", roll, {"step": False, "micro": True})),),
    )
