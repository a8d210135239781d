"""The six operand slots of a linear as its plan has them: python scripts/six_slots.py [recipe=nvfp4] [out=FILE.svg]

Draws fprop, dgrad and wgrad with what each operand is made from, its format, tile, scale, transform and noise, and what
is saved for backward. All of it is read from the ``LinearPlan`` of a linear. `docs/six_slots.svg` is that of nvfp4.
"""

from html import escape
from pathlib import Path

import torch
from narrowgauge.precision import apply, available, load
from narrowgauge.precision.linear import QuantLinear
from narrowgauge.precision.slots import EARLIER, TENSORS, WGRAD_X, LinearPlan, Origin, Saved, SlotPlan
from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.errors import UserError
from torch import nn

GEMMS = (("fprop", "y = x @ w.mT"), ("dgrad", "dx = dy @ w"), ("wgrad", "dw = dy.mT @ x"))
ORIGINS = {Origin.TRANSPOSED: "the codes, transposed, of", Origin.REQUANTIZED: "quantized again from the codes of"}
WIDTH, BOX, HEIGHT, LEFT, TOP = 860, 330, 96, 20, 56
COLORS = {"x": "#dbeafe", "w": "#dcfce7", "dy": "#fee2e2"}


def main(overrides: list[str], *, recipe: str = "nvfp4", out: str = "docs/six_slots.svg") -> None:
    if overrides:
        raise UserError(f"{overrides[0]}: only recipe= and out= are taken")
    if recipe not in available():
        raise UserError(f"recipe={recipe}: one of {', '.join(available())}")
    Path(out).write_text(drawing(recipe), encoding="utf-8")
    print(out)


def drawing(recipe: str) -> str:
    """The SVG of the first quantized linear that the recipe makes."""
    block = nn.ModuleDict({"proj": nn.Linear(64, 64)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block, nn.ModuleDict({"proj": nn.Linear(64, 64)})])})
    apply(load(recipe), model, device=torch.device("cpu"), backend="reference")
    linear = next((module for module in model.modules() if isinstance(module, QuantLinear)), None)
    if linear is None:
        raise UserError(f"recipe={recipe} quantizes no linear")
    height = TOP + 3 * (HEIGHT + 34) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(LEFT, 28, f"The six operand slots of a linear under {recipe}", size=17, bold=True),
        *(part for gemm in range(3) for part in _gemm(linear.plan, gemm)),
        _text(LEFT, height - 14, f"Saved for backward of x: {linear.plan.saved.value}. Of w: the parameter itself."),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _gemm(plan: LinearPlan, gemm: int) -> list[str]:
    name, formula = GEMMS[gemm]
    y = TOP + gemm * (HEIGHT + 34)
    left, right = plan.slots[2 * gemm : 2 * gemm + 2]
    return [
        _text(LEFT, y - 6, f"{name}   {formula}", size=14, bold=True),
        *_box(LEFT, y, left, plan),
        _text(LEFT + BOX + 14, y + HEIGHT // 2 + 5, "@", size=20),
        *_box(LEFT + BOX + 46, y, right, plan),
        _text(LEFT + 2 * BOX + 60, y + HEIGHT // 2 + 5, f"= {formula.split(' =')[0]}", size=16),
    ]


def _box(x: int, y: int, slot: SlotPlan, plan: LinearPlan) -> list[str]:
    tensor = TENSORS[slot.number]
    lines = [f"slot {slot.number}: {tensor}{'.mT' if slot.transposed else ''}"]
    if slot.spec is None:
        lines.append("high precision")
    else:
        lines += [f"{slot.spec.format}, tiles {slot.spec.tile}, scale {slot.spec.scale}"]
        lines += [f"{ORIGINS[slot.origin]} slot {EARLIER[slot.number]}"] if slot.origin in ORIGINS else []
        lines += [f"rounded {slot.spec.rounding.value}" + (", keyed noise" if slot.stochastic else "")]
        lines += [f"transform: {slot.transform}"] if slot.transform is not None else []
    saved = slot.number == WGRAD_X and plan.saved is not Saved.INPUT
    edge = 'stroke="#1d4ed8" stroke-width="2.5" stroke-dasharray="6 3"' if saved else 'stroke="#64748b"'
    lines += ["made in forward, saved for backward"] if saved else []
    rect = f'<rect x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="6" fill="{COLORS[tensor]}" {edge}/>'
    return [rect, *(_text(x + 10, y + 20 + 17 * row, line, bold=row == 0) for row, line in enumerate(lines))]


def _text(x: int, y: int, text: str, *, size: int = 12, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}"{weight}>{escape(text)}</text>'


if __name__ == "__main__":
    script_main(main, __doc__)
