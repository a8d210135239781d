"""NVFP4 pretraining (arXiv 2509.25149).

E2M1 values in blocks of 16 with an E4M3 scale each, and an FP32 scale for the tensor. Four bits are few, so four
things hold training up: 16x16 tiles for weights, so that forward and backward see the same weight; a random Hadamard
transform along tokens on both operands of wgrad, which spreads outliers over 16 values and cancels in the product;
stochastic rounding of gradients, which keeps small ones alive on average; and the last blocks in BF16, as models
diverge without them. Forward GEMMs go back to BF16 for the last part of training, which closes most of the remaining
gap to FP8. Embeddings, head and norms stay in BF16.

Float order and the sign vector are TransformerEngine's; the random numbers are ours. The outer scale spans one rank's
micro-batch, so losses depend a little on the number of processes and on the micro-batch, and not on the order of sums
alone; ``amax: step`` makes it one of the whole step. Blocks along tokens (wgrad) must lie within a micro-batch, too:
its tokens are a multiple of 16.

Four over six (arXiv 2512.02010) has three published forms. TransformerEngine's is for x and weights, never for
gradients, and it takes no Hadamard transform with it: ``all`` (or ``activations``, ``weights``) with hadamard 0. The
authors' code has it for gradients too, rounded stochastically, and with the transform: ``everything``. The better of
two unbiased candidates is biased (arXiv 2601.22813 measures it): a reason to leave gradients out. Quartet II has it in
the forward pass. Their float orders are those of ``precision.scaling.FourOverSix``.

Not finite: a NaN makes its tensor NaN; an infinity gives its tensor scale 1 and saturates.
"""

from dataclasses import replace

from ..formats import E2M1
from ..recipe import Keep, Phase, Recipe, block_linears, current, one_of
from ..scaling import ROW, TENSOR, Current, Error, Form, FourOverSix, Tile, TwoLevel
from ..schedule import Span
from ..spec import GemmSpec, LinearSpec, OperandSpec, Rounding
from ..transforms import Hadamard

_FOUR_OVER_SIX = {
    "none": (),
    "weights": ("w",),
    "activations": ("x",),
    "gradients": ("dy",),
    "all": ("w", "x"),
    "everything": ("w", "x", "dy"),
}


def recipe(
    *,
    hadamard: int = 16,
    signs: str | int = "te",
    stochastic: bool = True,
    weights_2d: bool = True,
    row_scaled_activations: bool | str = False,
    four_over_six: str = "none",
    four_over_six_error: str = "mae",
    four_over_six_256: bool = True,
    four_over_six_form: str = "te",
    amax: str = "micro",
    bf16_forward: float = 0.18,
    keep: tuple[Keep, ...] = (Keep(last=0.15),),
) -> Recipe:
    """
    Args:
        hadamard: size of the transform on wgrad's operands; 0 = none.
        signs: of the transform: te (the fixed vector of TransformerEngine), none, or a seed.
        stochastic: round gradients stochastically.
        weights_2d: 16x16 tiles for weights instead of 1x16.
        row_scaled_activations: an FP32 scale for each row of what is quantized of x, instead of one for the tensor:
            a token in fprop, a channel (after the transform) in wgrad, as TransformerEngine has it. fprop: in fprop
            alone, wgrad with one for the tensor. A token then does not depend on the others, but those products are
            emulated in float32.
        four_over_six: which tensors may have their largest value at 4 instead of 6, tile by tile: none, weights,
            activations (x), gradients (dy), all (weights and x: TransformerEngine's), or everything (dy, too: the
            authors').
        four_over_six_error: what is compared: mae, mse, or absmax (the authors' alone).
        four_over_six_256: the tensor's scale maps it to 6 * 256 for these operands, so that a scale for 4 is not cut
            off at 448.
        four_over_six_form: whose float order: te, authors, or quartet2 (which compares mse).
        amax: what the scales of x and dy are made from: micro, the tensor of a rank's micro-batch, or step, that of the
            whole step, so that every number of processes has the same scales: one small all-reduce for each tensor, and
            a step must be one micro-batch. Weights are the same everywhere. All ranks call the same linears in the same
            order while they train: no experts that some ranks pass by.
        bf16_forward: last part of the run whose forward GEMMs are in BF16; 0 = none.
        keep: linears left in BF16. ``keep_first``, ``keep_last``: of blocks, a number or a fraction, rounded up;
            ``keep_paths``: by regex.
    """
    if not 0 <= bf16_forward <= 1:
        raise ValueError(f"the part of a run is between 0 and 1, not {bf16_forward}")
    scope = one_of("four_over_six", four_over_six, _FOUR_OVER_SIX)
    error = one_of("four_over_six_error", four_over_six_error, {error.value: error for error in Error})
    by_row = row_scaled_activations
    by_row = one_of("row_scaled_activations", by_row, {"fprop": "fprop"}) if isinstance(by_row, str) else by_row
    form = one_of("four_over_six_form", four_over_six_form, {form.value: form for form in Form})
    top = 256.0 if four_over_six_256 else None
    chosen = FourOverSix(error=error, form=form, block_max=top) if scope else TwoLevel()
    of_x, of_w, of_dy = (chosen if tensor in scope else TwoLevel() for tensor in ("x", "w", "dy"))
    block = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel(), amax=current(amax))
    # A row of fprop is a token, complete in every micro-batch.
    x = replace(block, scale=replace(of_x, outer=ROW), amax=Current()) if by_row else replace(block, scale=of_x)
    x_columns = replace(block, scale=replace(of_x, outer=ROW if by_row is True else TENSOR))
    weight = replace(block, tile=Tile(16 if weights_2d else 1, 16), scale=of_w, amax=Current())
    dy = replace(block, scale=of_dy, rounding=Rounding.STOCHASTIC if stochastic else Rounding.NEAREST)
    transform = Hadamard(size=hadamard, signs=signs) if hadamard else None
    spec = LinearSpec(
        fprop=GemmSpec(a=x, b=weight),
        dgrad=GemmSpec(a=dy, b=weight),
        wgrad=GemmSpec(a=dy, b=x_columns, transform=transform),
    )
    return Recipe(
        rules=(block_linears(spec, keep),),
        schedule=(Phase(span=Span(start=1 - bf16_forward, end=1), gemms=("fprop",)),) if bf16_forward else (),
        one_micro_batch=amax == "step",
    )
