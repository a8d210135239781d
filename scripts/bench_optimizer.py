"""Milliseconds of an optimizer step, against torch's fused AdamW: python scripts/bench_optimizer.py [moments=...]

[moments=fp32,fp8,...] of `precision.states.moments.CHOICES` or any that `optim.moments` takes, `/` included;
[rounds=30] [threads=0, as torch has them]; [cpu=1: one thread, and the processor time it took, on a machine that is
busy with other work]; overrides as for training: model=llama_15m ...

One step of every variant a round, in turn, so that what else the machine does falls on all alike. The gradients of a
step are the same for all. Variants that keep weights in BF16 have BF16 gradients, as they do in training.
"""

import statistics
import time

import torch
from narrowgauge.models import create
from narrowgauge.precision.states.adamw import AdamW
from narrowgauge.precision.states.driver import StateOptimizer
from narrowgauge.precision.states.moments import CHOICES, STANDARD, chosen
from narrowgauge.trainer.build import resolve_model
from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.errors import UserError
from torch import Tensor, nn

VOCABULARY = 4096


def main(
    overrides: list[str], *, moments: str = ",".join(CHOICES), rounds: int = 30, threads: int = 0, cpu: int = 0
) -> None:
    config = load_config(overrides)
    if threads or cpu:
        torch.set_num_threads(1 if cpu else threads)
    clock = time.thread_time if cpu else time.perf_counter
    with torch.device("meta"):
        model = create(resolve_model(config.model, VOCABULARY, config.data.seq_len))
    shapes = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator) * 1e-3 for _, shape in shapes]
    steppers = {"torch fused": Stepper(shapes, grads, None, fused=True)}
    steppers["torch foreach=False"] = Stepper(shapes, grads, None, fused=False)
    try:
        steppers |= {name: Stepper(shapes, grads, name) for name in moments.split(",") if name}
    except ValueError as error:
        raise UserError(f"moments: {error}") from error
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for round in range(rounds + 2):
        for name, stepper in steppers.items():
            started = clock()
            stepper.optimizer.step()
            if round >= 2:
                times[name].append((clock() - started) * 1e3)
    count = sum(shape.numel() for _, shape in shapes)
    said = "processor time of 1 thread" if cpu else f"{torch.get_num_threads()} threads"
    print(f"{config.model.name}: {count:,} parameters, {len(shapes)} tensors, {said}")
    print(f"{'moments':22} {'min, ms':>8} {'median':>8} {'min x':>7} {'median x':>9} {'bytes/param':>12}   kept as")
    base = times["torch fused"]
    for name, taken in times.items():
        least, middle = min(taken) / min(base), statistics.median(taken) / statistics.median(base)
        size = steppers[name].state_bytes() / count
        print(
            f"{name:22} {min(taken):8.2f} {statistics.median(taken):8.2f} {least:7.2f} {middle:9.2f} {size:12.3f}   "
            f"{steppers[name].kept}"
        )


class Stepper:
    """Parameters, gradients and an optimizer of one kind."""

    def __init__(
        self, shapes: list[tuple[str, torch.Size]], grads: list[Tensor], name: str | None, fused: bool = True
    ) -> None:
        moments = STANDARD if name is None else chosen(name, STANDARD)
        dtype = moments.param_dtype(torch.float32, torch.bfloat16)
        self.parameters = [nn.Parameter(torch.full(shape, 0.02, dtype=dtype)) for _, shape in shapes]
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad.to(dtype)
        named = [(n, parameter) for (n, _), parameter in zip(shapes, self.parameters, strict=True)]
        groups = [{"params": named, "weight_decay": 0.1}]
        hyper = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}
        if name is None:
            self.optimizer = AdamW(fused=fused).build(groups, **hyper)
        else:
            self.optimizer = StateOptimizer(groups, rule=AdamW(), **hyper, moments=moments)
        self.kept = "m fp32, v fp32" if name is None else f"{moments} [{self.optimizer.choices[0].backend.name}]"

    def state_bytes(self) -> int:
        """Of the moments, scales and masters that the optimizer keeps beside the parameters."""
        return sum(
            value.nbytes for state in self.optimizer.state.values() for key, value in state.items() if key != "step"
        )


if __name__ == "__main__":
    script_main(main, __doc__)
