"""The bit ladder of "To FP8 and Back Again" (arXiv 2405.18710): BF16 operands with fewer bits, and nothing else.

Both operands of all three GEMMs are cut from BF16 (E8M7) to EeMm, without any scale: a probe of which bits training
lives on, not a recipe to train with. What is lost is what the rung takes away; truncation, as in the paper's masking,
also shrinks every product a little, a bias that nearest rounding has not. Head, embeddings and norms stay in BF16.

Ours, where the paper's text was not to be had: masking happens in fprop, dgrad and wgrad alike; fewer exponent bits
mean the bias 2^(e - 1) - 1 with the top exponent reserved, large values saturate at (2 - 2^-m) * 2^(2^(e - 1) - 1), and
small ones go on as subnormals, then as zeros. With 8 exponent bits truncation is the AND mask of the BF16 word.

Not finite: an infinity becomes the largest value of its sign; NaN stays NaN.
"""

from ..formats import exmy
from ..recipe import Keep, Recipe, block_linears, one_of
from ..scaling import Unit
from ..spec import GemmSpec, LinearSpec, OperandSpec, Rounding


def recipe(
    *,
    exponent_bits: int = 8,
    mantissa_bits: int = 7,
    rounding: str = "truncate",
    keep: tuple[Keep, ...] = (),
) -> Recipe:
    """
    Args:
        exponent_bits: 2 to 8.
        mantissa_bits: 1 to 7; 8 and 7 is BF16 itself.
        rounding: truncate (the paper's) or nearest.
        keep: linears left in BF16. ``keep_first``, ``keep_last``: of blocks, a number or a fraction, rounded up;
            ``keep_paths``: by regex.

    Raises ValueError for bits that BF16 does not have.
    """
    if not (2 <= exponent_bits <= 8 and 1 <= mantissa_bits <= 7):
        raise ValueError(
            f"exponent_bits={exponent_bits}, mantissa_bits={mantissa_bits}: a mask of BF16 keeps 2 to 8 and 1 to 7 bits"
        )
    roundings = {mode.value: mode for mode in (Rounding.TRUNCATE, Rounding.NEAREST)}
    operand = OperandSpec(
        format=exmy(exponent_bits, mantissa_bits),
        scale=Unit(),
        rounding=one_of("rounding", rounding, roundings),
    )
    gemm = GemmSpec(a=operand, b=operand)
    spec = LinearSpec(fprop=gemm, dgrad=gemm, wgrad=gemm)
    return Recipe(rules=(block_linears(spec, keep),))
