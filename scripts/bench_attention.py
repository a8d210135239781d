"""Attention on a CPU, torch's fused one against blocks of matmul and softmax: python scripts/bench_attention.py

[batch=16] [heads=8] [positions=256] [head_dim=32] [rounds=15]

Prints the median forward + backward time of interleaved rounds, BF16, and the error of the result against float64.
"""

import statistics
import time
from collections.abc import Callable

import torch
from narrowgauge.models.layers import causal_attention
from narrowgauge.trainer import distributed
from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.errors import UserError
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def main(
    overrides: list[str],
    *,
    batch: int = 16,
    heads: int = 8,
    positions: int = 256,
    head_dim: int = 32,
    rounds: int = 15,
) -> None:
    if overrides:
        raise UserError(f"unknown argument {overrides[0]!r}; --help shows the ones there are")
    distributed.start(load_config([]).parallel)  # the allocator and the threads of a training run
    generator = torch.Generator().manual_seed(0)
    shape = (batch, heads, positions, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    dy = torch.randn(shape, generator=generator).bfloat16()
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True).detach()

    ways: dict[str, Callable[[], Tensor]] = {
        "blocks": lambda: causal_attention(q, k, v),
        "fused": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        "fused, float32": lambda: scaled_dot_product_attention(
            q.float(), k.float(), v.float(), is_causal=True
        ).bfloat16(),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, attention in ways.items():
            started = time.perf_counter()
            attention().backward(dy)
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    for name, attention in ways.items():
        median = statistics.median(times[name])
        error = float((attention().detach().double() - exact).norm() / exact.norm())
        ratio = median / statistics.median(times["blocks"])
        print(f"{name:16} {1e3 * median:7.1f} ms  {ratio:5.2f} times blocks  error {error:.4f}")
    distributed.finish()


if __name__ == "__main__":
    script_main(main, __doc__)
