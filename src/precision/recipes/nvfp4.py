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
from precision.hooks import HighPrecisionForward
from precision.linear import quantized
from precision.recipe import BLOCK_LINEARS, Recipe, Rule, keep
from precision.scaling import Tile, TwoLevel
from precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding
from precision.transforms import Hadamard


def recipe(
    *,
    hadamard: int = 16,
    signs: str | int = "te",
    stochastic: bool = True,
    weights_2d: bool = True,
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
        bf16_forward: last part of the run whose forward GEMMs are in BF16; 0 = none.
        keep_first, keep_last: blocks left in BF16: a number, or a fraction, rounded up.
        keep_paths: linears left in BF16, by regex.
    """
    block = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())
    weight = replace(block, tile=Tile(16, 16)) if weights_2d else block
    gradient = replace(block, rounding=Rounding.STOCHASTIC) if stochastic else block
    transform = Hadamard(size=hadamard, signs=signs) if hadamard else None
    spec = LinearSpec(
        fprop=GemmSpec(a=block, b=weight),
        dgrad=GemmSpec(a=gradient, b=weight),
        wgrad=GemmSpec(a=gradient, b=block, transform=transform),
    )
    kept = keep(first=keep_first, last=keep_last, paths=keep_paths)
    return Recipe(
        rules=(Rule(kind=nn.Linear, path=BLOCK_LINEARS, make=quantized(spec), keep=kept),),
        hooks=(HighPrecisionForward(fraction=bf16_forward),) if bf16_forward else (),
    )
