"""What sums by a tensor core's rule cost: python scripts/bench_sums.py [size=1024] [rounds=7] [threads=2]

The time of a product of FP8 values [size, size] by each rule of ``precision.sums``, in C++, and of FP32's ``torch.mm``,
in turn; medians, and their ratios to the latter.
"""

import time
from statistics import median

import torch
from narrowgauge.precision.backends.cpu.accumulate import CompiledSums
from narrowgauge.precision.formats import E4M3
from narrowgauge.precision.sums import RULES, Side, summed
from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.errors import UserError


def main(overrides: list[str], *, size: int = 1024, rounds: int = 7, threads: int = 2) -> None:
    if overrides or min(size, rounds, threads) < 1:
        raise UserError("size, rounds and threads are whole numbers from 1: python scripts/bench_sums.py size=512")
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    a, b = (E4M3.round(torch.randn(size, size, generator=generator)) for _ in range(2))
    rules = {rule: name for name, rule in reversed(RULES.items())}
    sides = [Side(values=x, tiny=E4M3.min_exponent) for x in (a, b)]
    ways = {"torch.mm": lambda: a @ b.mT}
    ways |= {name: lambda rule=rule: summed(*sides, rule, by=CompiledSums()) for rule, name in rules.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begun)
    print("| sums | ms, median | times torch.mm |\n|---|---|---|")
    for name, taken in seconds.items():
        print(f"| {name} | {1e3 * median(taken):.1f} | {median(taken) / median(seconds['torch.mm']):.1f} |")


if __name__ == "__main__":
    script_main(main, __doc__)
