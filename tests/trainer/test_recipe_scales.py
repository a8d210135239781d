"""A toy recipe whose scales are made of another statistic, and decided after the codes, in a whole run."""

from __future__ import annotations

from pathlib import Path

from narrowgauge.trainer.metrics import read_rows
from test_recipes import Tiny, finished_with

SCALES = '''"""A toy: E2M1 in blocks of 16 under FP32 scales that are made anew from the codes.

Each block is first scaled by its root mean square, so that one outlier does not take the grid from the others; then
its scale becomes the one by which its codes lie closest to x, rounded stochastically to BF16. Gradients keep their
amax, and round stochastically themselves.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from narrowgauge.precision.formats import BF16, E2M1, NumberFormat
from narrowgauge.precision.recipe import Recipe, block_linears
from narrowgauge.precision.scaling import Fp32, Rms, Scales, Tile, Trial
from narrowgauge.precision.spec import GemmSpec, LinearSpec, OperandSpec, Rounding
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastSquares:
    """encode as ``Fp32``; decode = BF16.round(sum(x q) / sum(q^2)) over a tile's code values q, unless all are 0."""

    format: ClassVar[NumberFormat | None] = None
    levels: ClassVar[int] = 1
    power_of_two: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True  # its scales need noise, though the codes round to nearest

    def scales(
        self,
        amax: Tensor,  # or what else the spec's statistic makes of a tile
        element: NumberFormat,
        *,
        tensor_amax: Tensor | None = None,
        dtype: torch.dtype,
        top: float = 1.0,
    ) -> Scales:
        return Fp32().scales(amax, element, dtype=dtype, top=top)

    def finish(self, trial: Trial) -> tuple[Scales, Tensor | None]:
        codes = trial.codes()
        q = trial.values(codes)
        along, length = trial.sums(trial.x * q), trial.sums(q * q)
        decode = torch.where(length > 0, along / length, trial.scales.stored)
        return trial.scales._replace(stored=BF16.round(decode, trial.uniform())), codes

    def __str__(self) -> str:
        return "leastsquares"


def recipe() -> Recipe:
    block = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=LeastSquares())
    forward = replace(block, statistic=Rms(), top=0.4)  # the rms becomes 2.4 of 6
    dy = replace(block, scale=Fp32(), rounding=Rounding.STOCHASTIC)
    spec = LinearSpec(
        fprop=GemmSpec(a=forward, b=forward),
        dgrad=GemmSpec(a=dy, b=forward),
        wgrad=GemmSpec(a=dy, b=forward),
    )
    return Recipe(rules=(block_linears(spec, ()),))
'''


def test_scales_that_see_the_tile_and_draw_noise(tiny: Tiny, tmp_path: Path) -> None:
    """It resumes bit for bit, plan.txt says what is computed and by whom, and the probe sees what was read."""
    config, plan = finished_with(tiny, tmp_path / "scales.py", SCALES, "eval.precision=high", "probe.every=3")
    operand = "e2m1/1x16/leastsquares/rms/top0.4"
    by = "[reference (not cpu: no kernel for scales by leastsquares, a rule of its own: LeastSquares), fp32 product]"
    assert f"fprop: {operand} x {operand}  {by}" in plan
    assert f"dgrad: e2m1/1x16/fp32/sr x {operand}  {by}" in plan
    watched = [row for row in read_rows(Path(config.run.dir) / "metrics.jsonl", "probe") if row["step"] == 6]
    sqnr = {row["slot"]: row["sqnr_db"] for row in watched if row["module"].endswith("up_proj")}
    assert 18 < sqnr["fprop.x"] < 24
    assert 18 < sqnr["fprop.w"] < 24
