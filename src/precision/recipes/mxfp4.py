"""MXFP4 pretraining, the baseline of "Pretraining LLMs with NVFP4" (arXiv 2509.25149, section 5 and appendix).

E2M1 in blocks of 32 with a power-of-two scale, rounded up so that nothing saturates. The coarse scale wastes up to a
bit of a format that has four: it needs a third more tokens than NVFP4 for the same loss there. What holds it up is as
in ``nvfp4``: a random Hadamard transform (of 32) on the operands of wgrad, stochastic rounding of gradients, the last
blocks in BF16. Head, embeddings and norms stay in BF16.

The paper does not say which signs its transform of 32 uses: ours are drawn once from ``signs``.

Blocks along tokens (wgrad) lie alike in every micro-batch of a multiple of 32 tokens; another cuts them, and then has
scales of its own: ``plan.txt`` says so.

Not finite: a block with a NaN is NaN; infinities saturate at the largest scale.
"""

from dataclasses import replace

from ..formats import E2M1
from ..recipe import Keep, Recipe, block_linears, one_of
from ..scaling import MX_POWERS, PowerOfTwo, Tile
from ..spec import GemmSpec, LinearSpec, OperandSpec, Rounding
from ..transforms import Hadamard


def recipe(
    *,
    scale: str = "rceil",
    hadamard: int = 32,
    signs: int = 0,
    stochastic: bool = True,
    weights_2d: bool = False,
    keep: tuple[Keep, ...] = (Keep(last=0.15),),
) -> Recipe:
    """
    Args:
        scale: how amax becomes a power of two: rceil, floor, ceil or even.
        hadamard: size of the transform on wgrad's operands; 0 = none.
        signs: seed of its signs.
        stochastic: round gradients stochastically.
        weights_2d: 32x32 tiles for weights, the same codes forward and backward.
        keep: linears left in BF16. ``keep_first``, ``keep_last``: of blocks, a number or a fraction, rounded up;
            ``keep_paths``: by regex.
    """
    rule = PowerOfTwo(mode=one_of("scale", scale, {power.value: power for power in MX_POWERS}))
    x = OperandSpec(format=E2M1, tile=Tile(1, 32), scale=rule)
    w = replace(x, tile=Tile(32, 32)) if weights_2d else x
    dy = replace(x, rounding=Rounding.STOCHASTIC) if stochastic else x
    transform = Hadamard(size=hadamard, signs=signs) if hadamard else None
    spec = LinearSpec(
        fprop=GemmSpec(a=x, b=w), dgrad=GemmSpec(a=dy, b=w), wgrad=GemmSpec(a=dy, b=x, transform=transform)
    )
    return Recipe(rules=(block_linears(spec, keep),))
