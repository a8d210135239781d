"""silu(gate) * up and its gradients in single FP32 operations of a stated order: the same bits wherever they are done.

torch's exponential differs between CPUs, GPUs and builds in the last bit, so a kernel cannot have "its" bits. Here

    exp(x)   n = rint(x log2 e);  r = (x - n C1) - n C2;  p = 1 + (r + r^2 (c0 + r (c1 + ... + r c5)));  p 2^n
    silu(g)  g / (1 + exp(-g))
    dup      dh (g s)                                        with s = 1 / (1 + exp(-g))
    dgate    (dh up) (s (1 + g (1 - s)))

each rounded to FP32 once per operation, none contracted (constants C and c are Cephes'; an error of two units in the
last place). ``precision.backends.triton.numerics`` does the same on GPUs. The models' own SwiGLU agrees with this one
up to the last bits of FP32.

A module of a model is known to compute a SwiGLU by the names of its projections and by what it says of its activation
(``activation_of``). The scales of channels here can be folded into the weights of projections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PROJECTIONS = GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
_KNOWN_FORWARDS = frozenset(
    f"transformers.models.{name}.modeling_{name}.{kind}.forward"
    for name, kind in (("llama", "LlamaMLP"), ("mistral", "MistralMLP"), ("qwen2", "Qwen2MLP"), ("qwen3", "Qwen3MLP"))
)
"""down_proj(act_fn(gate_proj(x)) * up_proj(x)), of classes that do not name their activation."""
_KNOWN_ACTIVATIONS = {"transformers.activations.SiLUActivation": "silu", "torch.nn.modules.activation.SiLU": "silu"}


def activation_of(mlp: nn.Module) -> str | None:
    """The name of f, if the module says that it computes down_proj(f(gate_proj(x)) * up_proj(x)); else None.

    A class says so by an attribute ``gated_activation``. It speaks for the forward pass of that class, not for another
    one of a subclass. Of `transformers` some classes are known, whose ``act_fn`` says it.
    """
    named = _said(mlp, "gated_activation")
    if named is not None or any("gated_activation" in vars(base) for base in type(mlp).__mro__):
        return named
    known = _name(type(mlp).forward) in _KNOWN_FORWARDS
    return _known(mlp.act_fn) if known else None


def replaced_activation(mlp: nn.Module) -> nn.Module | None:
    """The child ``act`` of a module that names its activation, if it does not name the same: a rule has put it in."""
    act = mlp._modules.get("act")
    if act is None or (_said(act, "activation") or _known(act)) == _said(mlp, "gated_activation"):
        return None
    return act


def _said(module: nn.Module, attribute: str) -> str | None:
    """What the class says of its forward pass; None where it does not, or has another one since."""
    kind = type(module)
    for base in kind.__mro__:
        if attribute in vars(base):
            return str(getattr(module, attribute)) if kind.forward is getattr(base, "forward", None) else None
    return None


def _known(activation: Any) -> str | None:
    return _KNOWN_ACTIVATIONS.get(_name(type(activation)))


def _name(of: Any) -> str:
    return f"{of.__module__}.{of.__qualname__}"


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
    exponent = shifted.view(torch.int32) - MAGIC_BITS
    half = exponent >> 1  # two factors, each a normal number: only the last product rounds
    return (p * _power(half)) * _power(exponent - half)


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


def scales_of(amax: Tensor, *, pow2: bool) -> Tensor:
    """Scales (FP32, the shape of ``amax``): amax itself, or the power of two at or below it.

    1 where amax is zero, below 2^-126 or not finite.
    """
    amax = amax.detach().float()
    scale = (amax.view(torch.int32) & 0x7F800000).view(torch.float32) if pow2 else amax
    return torch.where((amax >= 2.0**-126) & (amax < math.inf), scale, 1.0)


def fold(up_weight: Tensor, down_weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Up-projection rows divided by ``scales`` [channels], down-projection columns times them: the same function.

    Exact for powers of two, while nothing leaves the range of the dtype.
    """
    factor = scales.to(up_weight.dtype)
    return up_weight / factor[:, None], down_weight * factor


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return Hidden(gate, up).computed()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        return Gradients(dh, *ctx.saved_tensors).computed()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in plain torch, with the gradients above."""
    h: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return h
