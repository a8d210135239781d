"""Muon: momentum whose singular values are all drawn towards one (K. Jordan et al. 2024; arXiv 2502.16982)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .adamw import AdamW
from .rules import Scalars, Shape, State, UpdateRule, Values

_ADAMW = AdamW()
_OF_BLOCKS = re.compile(r"(?!recipe\.)(.*\.)?\d+\..+")  # of a member of a numbered stack
_NO_MATRICES = re.compile(r"embed_tokens|embed_positions|lm_head|norm|\bbias\b")


def scale_of(scale: str, rows: int, cols: int) -> float:
    """What the update of a matrix is multiplied by beside the learning rate."""
    if scale == "original":
        return math.sqrt(max(1.0, rows / cols))
    return 0.2 * math.sqrt(max(rows, cols))


@dataclass(frozen=True, slots=True, kw_only=True)
class Muon(UpdateRule):
    """m = momentum m + (1 - momentum) g; the update is the orthogonalised momentum, or its look-ahead.

    For matrices, and stacks of them, of the blocks; ``rest`` has embeddings, head, norms and biases. The whole matrix
    is needed: its rows are gathered in BF16, as the iteration reads them, and each rank computes all of it. Weights
    decay by lr * decay, whatever the scale.

    Args:
        momentum: of the average of gradients, the only state.
        nesterov: orthogonalise lerp(g, m, momentum), and not m.
        iterations: of Newton-Schulz, in BF16.
        coefficients: a, b, c of x -> a x + (b x x^T + c (x x^T)^2) x.
        eps: the least Frobenius norm that a matrix is divided by.
        scale: ``original``: max(1, rows / cols)^0.5. ``match_rms_adamw``: 0.2 max(rows, cols)^0.5, with which elements
            move about as far as AdamW's (Moonshot), so that one learning rate serves both.
        rest: the rule of all other parameters.

    Raises ValueError for a value outside its range.
    """

    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    scale: str = "original"
    rest: UpdateRule = _ADAMW
    states = (State(name="m", key="exp_avg"),)

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: at least 0 and below 1")
        if not 1 <= self.iterations <= 99:
            raise ValueError(f"iterations={self.iterations}: from 1 to 99")
        if len(self.coefficients) != 3:
            raise ValueError(f"coefficients={self.coefficients}: three numbers")
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps={self.eps}: at least 0, and finite")
        if self.scale not in ("original", "match_rms_adamw"):
            raise ValueError(f"scale={self.scale!r}: original or match_rms_adamw")

    def takes(self, name: str, shape: Shape) -> bool:
        inside = _OF_BLOCKS.fullmatch(name) is not None and _NO_MATRICES.search(name) is None
        return inside and len(shape) in (2, 3)

    def exchange(self, states: Values, grad: Tensor, weight: Tensor, scalars: Scalars) -> Tensor:
        m = states["m"].lerp(grad, 1 - self.momentum)
        return (grad.lerp(m, self.momentum) if self.nesterov else m).bfloat16()

    def update(self, states: Values, grad: Tensor, weight: Tensor, scalars: Scalars) -> tuple[Values, Tensor]:
        whole = scalars.exchanged
        assert whole is not None
        rows, cols = scalars.shape[-2:]
        new = weight * (1 - scalars.lr * scalars.decay)
        step = scalars.lr * scale_of(self.scale, rows, cols)
        if len(scalars.shape) == 2:
            direction = self.orthogonal(whole)[scalars.rows]
        else:  # one by one: how many a rank has changes no digit
            direction = torch.stack([self.orthogonal(one) for one in whole]) if len(whole) else whole
        return {"m": states["m"].lerp(grad, 1 - self.momentum)}, new.add_(direction.to(new.dtype), alpha=-step)

    def orthogonal(self, matrix: Tensor) -> Tensor:
        """The matrix [rows, cols] with singular values near 1, from about 0.7 to 1.2: BF16."""
        a, b, c = self.coefficients
        x = matrix.bfloat16()
        x = x.mT if x.shape[0] > x.shape[1] else x  # the smaller of both products x x^T and x^T x
        x = x / x.norm().clamp(min=self.eps)
        for _ in range(self.iterations):
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if matrix.shape[0] > matrix.shape[1] else x
