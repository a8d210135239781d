"""FP8 with a scale per row of every operand (torchao's `rowwise` recipe; FP8-LM and Llama 3, arXiv 2407.21783, sec. 6).

One scale per token, per output channel or per input channel, whichever runs across the contraction: an outlier token no
longer costs the others precision, as it does with one scale per tensor, and a scale is still constant along each dot
product, so it multiplies the result. E4M3 throughout; scales are powers of two, rounded so that nothing saturates.
Every operand is quantized from high precision along the direction it is contracted in. Head, embeddings and norms stay
in BF16.

The rows of wgrad run over the tokens of one rank's micro-batch, so gradients of weights depend a little on the number
of processes and on the micro-batch (scales that are powers of two change only what is subnormal); ``amax: step`` makes
them rows of the whole step.

Native FP8 products of Ada and Hopper do not sum in FP32, fast or not: their tensor cores cut every product to 13
fraction bits below the largest of a step (of 16 or 32 products), and sums that are not fast are added up in FP32 only
between intervals (``precision.backends.scaled_mm``). At K = 4096 this changes 25% of BF16 outputs with fast sums, 6%
with FP32 every 128 products, and none on B200, against emulation, which sums in FP32.

Not finite: an infinite amax gives its row scale 1 and infinities saturate; NaN stays NaN in its element.
"""

from dataclasses import replace

from ..formats import E4M3
from ..recipe import Keep, Recipe, block_linears, current, fast_sums, sums
from ..scaling import Fp32, Tile
from ..spec import GemmSpec, LinearSpec, OperandSpec

_EPS = 1e-12


def recipe(
    *,
    pow2: bool = True,
    wgrad_high_precision: bool = False,
    amax: str = "micro",
    fast_accum: bool | str = "auto",
    accumulate: str = "fp32",
    keep: tuple[Keep, ...] = (),
) -> Recipe:
    """
    Args:
        pow2: scales are powers of two; otherwise FP32, and the emulated products are in float32.
        wgrad_high_precision: weight gradients from BF16 operands, and one scale for the weight in dgrad (torchao's
            `rowwise_with_gw_hp`).
        amax: what wgrad's scales are made from, whose rows run over tokens: micro, those of a rank's micro-batch, or
            step, those of the whole step, so that every number of processes has the same scales: two small all-reduces
            for each linear, and a step must be one micro-batch. All ranks call the same linears in the same order.
        fast_accum: native products of fprop may sum without additions in FP32 in between, which is faster; auto: on
            Ada and Hopper. Those of dgrad and wgrad, whose errors add up in the weights, never do (as TransformerEngine
            and torchao have it).
        accumulate: how products are summed, in all three GEMMs: fp32, or by the rule of a card's tensor cores, in every
            bit (``precision.sums.RULES``: h100_fp8, ada_fp8 ...), which is emulated and slow.
        keep: linears left in BF16. ``keep_first``, ``keep_last``: of blocks, a number or a fraction, rounded up;
            ``keep_paths``: by regex.
    """
    scale = Fp32(pow2=pow2, eps=_EPS)
    row = OperandSpec(format=E4M3, tile=Tile(1, -1), scale=scale)
    channel = replace(row, amax=current(amax))  # over tokens
    by = sums(accumulate)
    fprop = GemmSpec(a=row, b=row, accumulate=sums(accumulate, fast_sums(fast_accum)))
    dgrad, wgrad = GemmSpec(a=row, b=row, accumulate=by), GemmSpec(a=channel, b=channel, accumulate=by)
    spec = LinearSpec(fprop=fprop, dgrad=dgrad, wgrad=wgrad)
    if wgrad_high_precision:
        dgrad = replace(dgrad, b=OperandSpec(format=E4M3, scale=scale))
        spec = LinearSpec(fprop=fprop, dgrad=dgrad)
    return Recipe(rules=(block_linears(spec, keep),), one_micro_batch=amax == "step" and not wgrad_high_precision)
