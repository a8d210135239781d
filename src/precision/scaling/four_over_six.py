"""Four over six (arXiv 2512.02010): E2M1 is sparse between 4 and 6, so a tile may be better off with its top at 4."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..formats import E4M3, NumberFormat
from .rules import Scales
from .tiles import TENSOR, Tile
from .trial import Trial
from .two_level import check_blocks, named_max, of_block, tensor_level


class Error(enum.Enum):
    """What is compared between two quantizations of a tile: the sum of absolute or of squared differences, or the
    largest absolute one."""

    MAE = "mae"
    MSE = "mse"
    ABSMAX = "absmax"


class Form(enum.Enum):
    """The published forms of four over six, which differ in their float order; see ``FourOverSix``."""

    TE = "te"
    AUTHORS = "authors"
    QUARTET2 = "quartet2"


@dataclass(frozen=True, slots=True, kw_only=True)
class FourOverSix:
    """Two candidates for the scale of a tile, which put its largest value at 6 and at 4: the one of smaller error wins,
    a tie is the first's. Else as ``TwoLevel``, with its a, A, m, M, S and T.

    TE (TransformerEngine) and AUTHORS (the paper's repository, whose plain reference has the same operations):

    2'. d = block.round(min((a / m) * S, block.max)), and block.round(min((a / m) * S * 1.5, block.max))

    QUARTET2 (arXiv 2601.22813; that the second d is made of the first after its rounding is not verified):

    1". T = (A / block_max) / m; T = 1 where A is 0 or infinite, or T is 0
    2". d = block.round(min((a / m) / T, block.max)), and block.round(d * 1.5); where the first is 0, d = 1
    3". y = x / (d * T), a division: the other forms multiply by a reciprocal

    Compared is, per element in FP32, back - x with back = ((code value * d) * A) / M; QUARTET2: (code value * d) * T.
    Sums go over a tile as ``Trial.sums`` does (only TE's order is known). A tile with a NaN in its errors takes the
    first candidate.

    Rounded stochastically: TE's and QUARTET2's candidates see the same noise, and are compared as they come out, so the
    codes that are used are those that were compared. AUTHORS draws anew for the second. The better of two unbiased
    candidates is biased.

    AUTHORS stores code 0 in a tile whose scale is 0; the others what x * FLT_MAX rounds to, which decodes to 0, too.
    """

    levels: ClassVar[int] = 2
    power_of_two: ClassVar[bool] = False

    error: Error = Error.MAE
    form: Form = Form.TE
    block: NumberFormat = E4M3
    block_max: float | None = 256.0
    outer: Tile = TENSOR

    def __post_init__(self) -> None:
        check_blocks(self.block, self.block_max)
        if self.form is Form.TE and self.error is Error.ABSMAX:
            raise ValueError("four over six as TransformerEngine has it compares mae or mse; absmax is form=authors")
        if self.form is Form.QUARTET2 and self.error is not Error.MSE:
            raise ValueError(f"four over six as Quartet II has it compares mse, not {self.error.value}")

    @property
    def format(self) -> NumberFormat | None:
        return self.block

    def scales(
        self,
        amax: Tensor,
        element: NumberFormat,
        *,
        tensor_amax: Tensor | None = None,
        dtype: torch.dtype,
        top: float = 1.0,
    ) -> Scales:
        """The first candidate: the largest value at 6."""
        assert tensor_amax is not None, "two levels of scales need the tensor's amax"
        m = element.max * top
        if self.form is Form.QUARTET2:
            return self._divided(amax, tensor_amax, m)
        s, tensor = tensor_level(tensor_amax, m * self._most)
        return self._of_block((amax / torch.full_like(amax, m)) * s, s, tensor)

    def at_four(self, amax: Tensor, element: NumberFormat, tensor_amax: Tensor, top: float = 1.0) -> Scales:
        """The second candidate: the largest value at 4."""
        m = element.max * top
        if self.form is Form.QUARTET2:
            six = self._divided(amax, tensor_amax, m)
            assert six.tensor is not None
            d = self.block.round((self.block.decode(six.stored) * 1.5).clamp(max=self.block.max))
            return Scales(1.0 / (d * six.tensor), self.block.encode(d), six.tensor)
        s, tensor = tensor_level(tensor_amax, m * self._most)
        return self._of_block((amax / torch.full_like(amax, m)) * s * 1.5, s, tensor)

    def finish(self, trial: Trial) -> tuple[Scales, Tensor | None]:
        tensor_amax = trial.tensor_statistic
        assert tensor_amax is not None
        six, four = trial.scales, self.at_four(trial.statistic, trial.element, tensor_amax, trial.top)
        most = trial.element.max * trial.top * self._most
        codes, errors, divided = [], [], []
        for number, scales in enumerate((six, four)):
            d = self.block.decode(scales.stored)
            if self.form is Form.QUARTET2:
                assert scales.tensor is not None
                divisor = trial.scaled(torch.ones_like(trial.x), d * scales.tensor)
                divided.append(trial.x / divisor)
                codes.append(trial.codes_of(divided[-1]))
                back = trial.scaled(trial.values(codes[-1], d), scales.tensor)
            else:
                codes.append(trial.codes(scales.encode, again=self.form is Form.AUTHORS and number == 1))
                back = trial.scaled(trial.values(codes[-1], d), tensor_amax)
                back = back / torch.full_like(back, most)
            errors.append(self._error(trial, back - trial.x))
        better = errors[1] < errors[0]
        encode, stored = (torch.where(better, b, a) for a, b in zip(six[:2], four[:2], strict=True))
        chosen = Scales(encode, stored, six.tensor)
        return chosen, None if self.form is Form.TE else trial.chosen(better, codes[1], codes[0])

    @property
    def _most(self) -> float:
        return self.block_max or self.block.max

    def _error(self, trial: Trial, difference: Tensor) -> Tensor:
        if self.error is Error.ABSMAX:
            return trial.tiles(difference.abs()).amax((1, 3))
        return trial.sums(difference.abs() if self.error is Error.MAE else difference * difference)

    def _of_block(self, wanted: Tensor, s: Tensor, tensor: Tensor) -> Scales:
        scales = of_block(self.block, wanted, s, tensor)
        if self.form is not Form.AUTHORS:
            return scales
        return scales._replace(encode=torch.where(self.block.decode(scales.stored) == 0, 0.0, scales.encode))

    def _divided(self, amax: Tensor, tensor_amax: Tensor, m: float) -> Scales:
        tensor = (tensor_amax / torch.full_like(tensor_amax, self._most)) / torch.full_like(tensor_amax, m)
        tensor = torch.where((tensor == 0) | (tensor == math.inf), 1.0, tensor)
        d = self.block.round(((amax / torch.full_like(amax, m)) / tensor).clamp(max=self.block.max))
        d = torch.where(d == 0, 1.0, d)
        return Scales(1.0 / (d * tensor), self.block.encode(d), tensor)

    def __str__(self) -> str:
        outer = {TENSOR: "", (1, -1): "row"}.get(self.outer, f"-{self.outer}")
        form = "" if self.form is Form.TE else f"-{self.form.value}"
        return f"{self.block}{named_max(self.block_max)}+fp32{outer}-4over6{self.error.value}{form}"
