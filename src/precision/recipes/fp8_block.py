"""FP8 in blocks, as DeepSeek-V3 trains (arXiv 2412.19437, section 3.3; TransformerEngine's Float8BlockScaling).

Activations and gradients have a scale per 128 consecutive values along the contraction, weights one per 128x128 tile:
fine enough that E4M3 serves gradients too, coarse enough for a GEMM to apply the scales every 128 products. Activations
are quantized from high precision once along each direction; a weight's tiles are square, so that forward and backward
see the same weight. Scales are powers of two by default, as Blackwell requires; FP32 scales, as on Hopper, are an
option, whose emulated products are in float32. Embeddings, head and norms stay in BF16.

Blocks along tokens (wgrad) lie alike in every micro-batch of a multiple of 128 (``block``) tokens; another cuts them,
and then has scales of its own: ``plan.txt`` says so.

Not finite: an infinite amax gives its block scale 1 and infinities saturate; NaN stays NaN in its element.
"""

from dataclasses import replace

from ..formats import E4M3, E5M2
from ..recipe import Keep, Recipe, block_linears, one_of, sums
from ..scaling import Fp32, Tile
from ..spec import GemmSpec, LinearSpec, OperandSpec


def recipe(
    *,
    pow2: bool = True,
    block: int = 128,
    format: str = "e4m3",
    eps: float = 0.0,
    accumulate: str = "fp32",
    keep: tuple[Keep, ...] = (),
) -> Recipe:
    """
    Args:
        pow2: scales down to powers of two; otherwise FP32.
        block: values that share a scale, and the side of a weight's tile.
        format: e4m3 (all operands) or hybrid (gradients in E5M2).
        eps: floor of amax.
        accumulate: how products are summed: fp32, or by the rule of a card's tensor cores, in every bit, which is
            emulated and slow (``precision.sums.RULES``). h100_fp8_promoted is DeepSeek-V3's: sums of 128 products are
            scaled and added up in FP32; rules that do not so need ``pow2``, whose scales are then part of the values.
        keep: linears left in BF16. ``keep_first``, ``keep_last``: of blocks, a number or a fraction, rounded up;
            ``keep_paths``: by regex.
    """
    x = OperandSpec(format=E4M3, tile=Tile(1, block), scale=Fp32(pow2=pow2, eps=eps, input_max=True))
    w = replace(x, tile=Tile(block, block))
    dy = replace(x, format=one_of("format", format, {"e4m3": E4M3, "hybrid": E5M2}))
    by = sums(accumulate)
    spec = LinearSpec(
        fprop=GemmSpec(a=x, b=w, accumulate=by),
        dgrad=GemmSpec(a=dy, b=w, accumulate=by),
        wgrad=GemmSpec(a=dy, b=x, accumulate=by),
    )
    return Recipe(rules=(block_linears(spec, keep),))
