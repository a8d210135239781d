"""NVFP4 pretraining (arXiv 2509.25149).

E2M1 values in blocks of 16 with an E4M3 scale each, and an FP32 scale for the tensor. Four bits are few, so four
things hold training up: 16x16 tiles for weights, so that forward and backward see the same weight; a random Hadamard
transform along tokens on both operands of wgrad, which spreads outliers over 16 values and cancels in the product;
stochastic rounding of gradients, which keeps small ones alive on average; and the last blocks in BF16, as models
diverge without them. Forward GEMMs go back to BF16 for the last part of training, which closes most of the remaining
gap to FP8. Embeddings, head and norms stay in BF16.

Float order and the sign vector are TransformerEngine's; the random numbers are ours. The amax of the tensor spans one
rank's micro-batch, so losses depend a little on world size and micro-batch size.

Not finite: a NaN makes its tensor NaN; an infinity gives its tensor scale 1 and saturates.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from precision.formats import E2M1
from precision.linear import quantized
from precision.recipe import BLOCK_LINEARS, Phase, Recipe, Rule, keep, one_of
from precision.scaling import Error, Tile, TwoLevel
from precision.schedule import Span
from precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding
from precision.transforms import Hadamard


def recipe(
    *,
    hadamard: int = 16,
    signs: str | int = "te",
    stochastic: bool = True,
    weights_2d: bool = True,
    row_scaled_activations: bool = False,
    four_over_six: str = "none",
    four_over_six_error: str = "mae",
    four_over_six_256: bool = True,
    bf16_forward: float = 0.18,
    keep_first: float = 0,
    keep_last: float = 0.15,
    keep_paths: Sequence[str] = (),
) -> Recipe:
    """
    Args:
        hadamard: size of the transform on wgrad's operands; 0 = none.
        signs: of the transform: te (the fixed vector of TransformerEngine), none, or a seed.
        stochastic: round gradients stochastically.
        weights_2d: 16x16 tiles for weights instead of 1x16.
        row_scaled_activations: an FP32 scale for each row of x in fprop, instead of one for the tensor: a token does
            not depend on the others, but the product is emulated in float32.
        four_over_six: which operands may have their largest value at 4 instead of 6, tile by tile: none, weights,
            activations (x and dy; needs hadamard 0 and stochastic false) or all.
        four_over_six_error: what is compared, mae or mse.
        four_over_six_256: the tensor's scale maps it to 6 * 256 for these operands, so that a scale for 4 is not cut
            off at 448.
        bf16_forward: last part of the run whose forward GEMMs are in BF16; 0 = none.
        keep_first, keep_last: blocks left in BF16: a number, or a fraction, rounded up.
        keep_paths: linears left in BF16, by regex.
    """
    if not 0 <= bf16_forward <= 1:
        raise ValueError(f"the part of a run is between 0 and 1, not {bf16_forward}")
    scopes = {"none": (), "weights": ("w",), "activations": ("x",), "all": ("w", "x")}
    scope = one_of("four_over_six", four_over_six, scopes)
    error = one_of("four_over_six_error", four_over_six_error, {error.value: error for error in Error})
    if "x" in scope and (hadamard or stochastic):
        raise ValueError(f"four_over_six={four_over_six} needs hadamard=0 and stochastic=false")
    chosen = TwoLevel(four_over_six=error, block_max=256.0 if four_over_six_256 else None)
    of_x = chosen if "x" in scope else TwoLevel()
    block = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=of_x)
    weight = OperandSpec(
        format=E2M1, tile=Tile(16 if weights_2d else 1, 16), scale=chosen if "w" in scope else TwoLevel()
    )
    row = replace(block, scale=replace(of_x, rows=row_scaled_activations))
    gradient = replace(block, rounding=Rounding.STOCHASTIC) if stochastic else block
    transform = Hadamard(size=hadamard, signs=signs) if hadamard else None
    spec = LinearSpec(
        fprop=GemmSpec(a=row, b=weight),
        dgrad=GemmSpec(a=gradient, b=weight),
        wgrad=GemmSpec(a=gradient, b=block, transform=transform),
    )
    kept = keep(first=keep_first, last=keep_last, paths=keep_paths)
    return Recipe(
        rules=(Rule(kind=nn.Linear, path=BLOCK_LINEARS, make=quantized(spec), keep=kept),),
        schedule=(Phase(span=Span(start=1 - bf16_forward, end=1), gemms=("fprop",)),) if bf16_forward else (),
    )
