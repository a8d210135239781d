"""By what rule a card sums products: its outputs in FP32 against the rules of ``precision.sums``, bit by bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from narrowgauge.precision.formats import BF16, E4M3, E5M2, NumberFormat
from narrowgauge.precision.sums import A100_BF16, ADA_FP8, B200_FP8, H100_BF16, H100_FP8, Accumulate, Side, summed
from torch import Tensor

from gpu_suite.steps import Row, one_line

#: FP32: the exact sum, rounded once. Where c enters late (as in B200's FP8), a step is its own interval.
FP8_RULES: dict[str, Accumulate | None] = {
    "fp32": None,
    "ada": ADA_FP8,
    "h100": H100_FP8,
    "h100 late c": Accumulate(step=32, bits=13, promote_every=32),
    "h100 /64": Accumulate(step=32, bits=13, promote_every=64),
    "h100 /128": Accumulate(step=32, bits=13, promote_every=128),
    "h100 /256": Accumulate(step=32, bits=13, promote_every=256),
    "b200": B200_FP8,
    "b200 early c": Accumulate(step=32, bits=25),
}
BF16_RULES: dict[str, Accumulate | None] = {
    "fp32": None,
    "a100": A100_BF16,
    "h100": H100_BF16,
    "h100 late c": Accumulate(step=16, bits=25, promote_every=16),
}

Product = Callable[[Tensor, Tensor], Tensor]
"""a [m, k] and b [n, k] in their dtype to FP32 [m, n]."""


def fp8(a: Tensor, b: Tensor, *, fast: bool) -> Tensor:
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b.mT, one, one, out_dtype=torch.float32, use_fast_accum=fast)


def bf16(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b.mT, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float().mT


def operands(kind: str, formats: tuple[NumberFormat, NumberFormat], size: int, k: int) -> tuple[Tensor, Tensor]:
    """FP32 values on the formats' grids: normal; spread over all exponents; cancelling: each product's opposite is half
    of K away, but for one in eight."""
    generator = torch.Generator().manual_seed(k)
    a, b = (torch.randn(size, k, generator=generator) for _ in range(2))
    if kind == "spread":
        a, b = (x * spread(x, format, generator) for x, format in zip((a, b), formats, strict=True))
    if kind == "cancelling":
        half = k // 2
        b[:, half : 2 * half] = b[:, :half]
        kept = torch.rand(size, half, generator=generator) < 1 / 8
        a[:, half : 2 * half] = torch.where(kept, a[:, half : 2 * half], -a[:, :half])
    return formats[0].round(a), formats[1].round(b)


def spread(x: Tensor, format: NumberFormat, generator: torch.Generator) -> Tensor:
    low, high = max(format.tiny_exponent, -60), min(format.max_exponent, 60)
    return torch.exp2(torch.randint(low, high, x.shape, generator=generator).float())


def shares(
    y: Tensor, a: Tensor, b: Tensor, formats: tuple[NumberFormat, NumberFormat], rules: dict[str, Accumulate | None]
) -> Row:
    """By rule: how much of y, in percent, has its bits."""
    row: Row = {}
    sides = [Side(values=x, tiny=format.min_exponent) for x, format in zip((a, b), formats, strict=True)]
    for name, rule in rules.items():
        expected = (a.double() @ b.double().mT).float() if rule is None else summed(sides[0], sides[1], rule)
        row[name] = round(100 * float((expected == y).double().mean()), 2)
    return row


def sums_rows(here: torch.device, until: float, products: dict[str, Product] | None = None) -> Iterator[Row]:
    """A row for each product, kind of operands and length of the contraction: one step first, then longer ones."""
    cuda = here.type == "cuda"
    size, lengths = (128, (16, 32, 64, 128, 256, 4096)) if cuda else (16, (16, 64))
    given = products or {"FP8 fast": partial(fp8, fast=True), "FP8": partial(fp8, fast=False), "BF16": bf16}
    for name, product in given.items():
        narrow = name.startswith("FP8")
        pairs = [(E4M3, E4M3), (E5M2, E4M3)] if narrow else [(BF16, BF16)]
        for formats in pairs:
            for kind in ("normal", "spread", "cancelling"):
                for k in lengths:
                    what = f"{name} {formats[0]} x {formats[1]}, {kind}, K {k}"
                    if time.time() > until:
                        yield {"what": what, "": "left out: no time"}
                        return
                    a, b = (x.to(here) for x in operands(kind, formats, size, k))
                    try:
                        y = product(*(x.to(format.dtype) for x, format in zip((a, b), formats, strict=True)))
                    except Exception as error:
                        yield {"what": what, "error": one_line(error)} if cuda else {"what": what, "": one_line(error)}
                        break
                    rules = FP8_RULES if narrow else BF16_RULES
                    shown = kind == "normal" and k in (lengths[1], 128, lengths[-1])
                    yield {"what": what} | shares(y, a, b, formats, rules) | ({} if shown else {"detail": True})
