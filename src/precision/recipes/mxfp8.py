"""MXFP8 (OCP Microscaling v1.0; arXiv 2310.10537; NVIDIA's pretraining recipe, arXiv 2506.08027).

Every 32 consecutive values along a GEMM's contraction share a power-of-two scale, so an outlier costs precision in its
own block alone, and E4M3 is wide enough for gradients too. Scales round up (RCEIL): nothing saturates. A tensor is
quantized from high precision once along each direction it is contracted in; the two copies differ. Head, embeddings
and norms stay in BF16.

Blocks along tokens (wgrad) lie alike in every micro-batch of a multiple of 32 (``block``) tokens; another cuts them,
and then has scales of its own: ``plan.txt`` says so.

Not finite: a block with a NaN is NaN; infinities saturate at the largest scale.
"""

from ..formats import E4M3, E5M2
from ..recipe import Keep, Recipe, block_linears, one_of
from ..scaling import MX_POWERS, PowerOfTwo, Tile
from ..spec import GemmSpec, LinearSpec, OperandSpec


def recipe(
    *,
    format: str = "e4m3",
    scale: str = "rceil",
    block: int = 32,
    weights_2d: bool = False,
    keep: tuple[Keep, ...] = (),
) -> Recipe:
    """
    Args:
        format: e4m3 (all operands) or hybrid (gradients in E5M2).
        scale: how amax becomes a power of two: rceil, floor, ceil or even.
        block: values that share a scale.
        weights_2d: square tiles for weights, the same codes forward and backward.
        keep: linears left in BF16. ``keep_first``, ``keep_last``: of blocks, a number or a fraction, rounded up;
            ``keep_paths``: by regex.
    """
    rule = PowerOfTwo(mode=one_of("scale", scale, {power.value: power for power in MX_POWERS}))
    x = OperandSpec(format=E4M3, tile=Tile(1, block), scale=rule)
    w = OperandSpec(format=E4M3, tile=Tile(block if weights_2d else 1, block), scale=rule)
    gradient = one_of("format", format, {"e4m3": E4M3, "hybrid": E5M2})
    dy = OperandSpec(format=gradient, tile=Tile(1, block), scale=rule)
    spec = LinearSpec(fprop=GemmSpec(a=x, b=w), dgrad=GemmSpec(a=dy, b=w), wgrad=GemmSpec(a=dy, b=x))
    return Recipe(rules=(block_linears(spec, keep),))
