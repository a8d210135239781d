"""silu(gate) * up and its gradients in single FP32 operations of a stated order: the same bits wherever they are done.

torch's exponential differs between CPUs, GPUs and builds in the last bit, so a kernel cannot have "its" bits. Here

    exp(x)   n = rint(x log2 e);  r = (x - n C1) - n C2;  p = 1 + (r + r^2 (c0 + r (c1 + ... + r c5)));  p 2^n
    silu(g)  g / (1 + exp(-g))
    dup      dh (g s)                                        with s = 1 / (1 + exp(-g))
    dgate    (dh up) (s (1 + g (1 - s)))

each rounded to FP32 once per operation, none contracted (constants C and c are Cephes'; an error of two units in the
last place). ``backends.triton.numerics`` does the same on GPUs. The models' own SwiGLU stays theirs: it agrees
with this one up to the last bits of FP32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOG2_E, C1, C2 = 1.44269504088896341, 0.693359375, -2.12194440e-4
POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
MAGIC, MAGIC_BITS = 1.5 * 2.0**23, 0x4B400000  # added and taken away, it rounds to a whole number
TOP, BOTTOM = 100.0, -110.0  # beyond, exp is infinite and 0


def exp(x: Tensor) -> Tensor:
    """e^x of FP32, in FP32: subnormals, 0 and infinity included; NaN stays."""
    x = torch.where(x > TOP, TOP, x)
    x = torch.where(x < BOTTOM, BOTTOM, x)
    shifted = x * LOG2_E + MAGIC
    n = shifted - MAGIC
    r = (x - n * C1) - n * C2
    p = torch.full_like(r, POLYNOMIAL[0])
    for c in POLYNOMIAL[1:]:
        p = p * r + c
    p = (p * (r * r) + r) + 1.0
    whole = shifted.view(torch.int32) - MAGIC_BITS
    low = whole >> 1  # in two halves, each a normal number: only the last product rounds
    return (p * _power(low)) * _power(whole - low)


def _power(n: Tensor) -> Tensor:
    return ((n + 127) << 23).view(torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Hidden:
    """silu(gate) * up, divided by d: a matrix that is yet to be computed. Rounded to its dtype before and after d.

    Args:
        gate, up: [rows, cols], detached, of one dtype and layout.
        d: FP32, one for each row (``along`` 0) or column (1); None for 1.
    """

    gate: Tensor
    up: Tensor
    d: Tensor | None = None
    along: int = 0

    @property
    def mT(self) -> Hidden:
        return replace(self, gate=self.gate.mT, up=self.up.mT, along=1 - self.along)

    def computed(self) -> Tensor:
        g, u = self.gate.float(), self.up.float()
        return divided(((g / (1.0 + exp(-g))) * u).to(self.up.dtype), self.d, self.along)


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """Those of gate and up, yet to be computed, for the gradient dh / d of silu(gate) * up; ``Hidden`` for the rest."""

    dh: Tensor
    gate: Tensor
    up: Tensor
    d: Tensor | None = None
    along: int = 0

    @property
    def mT(self) -> Gradients:
        return replace(self, dh=self.dh.mT, gate=self.gate.mT, up=self.up.mT, along=1 - self.along)

    def computed(self) -> tuple[Tensor, Tensor]:
        """dgate, dup."""
        dh, g, u = divided(self.dh, self.d, self.along).float(), self.gate.float(), self.up.float()
        s = 1.0 / (1.0 + exp(-g))
        dgate = (dh * u) * (s * (1.0 + g * (1.0 - s)))
        return dgate.to(self.dh.dtype), (dh * (g * s)).to(self.dh.dtype)


def divided(x: Tensor, d: Tensor | None, along: int) -> Tensor:
    """x / d in the dtype of x."""
    return x if d is None else (x / (d[:, None] if along == 0 else d)).to(x.dtype)
