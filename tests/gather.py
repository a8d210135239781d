"""Runs one after the other in one process group, counting what is gathered: torchrun gather.py FILE.json"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer import distributed
from trainer.config import load_config
from trainer.run import run

counts: Counter[str] = Counter()


def counting(function: Any, count: Any) -> Any:
    def counted(*arguments: Any, **more: Any) -> Any:
        count(*arguments, **more)
        return function(*arguments, **more)

    return counted


def gathered(output_tensor: torch.Tensor, input_tensor: torch.Tensor, *rest: Any, **more: Any) -> None:
    counts["gathers"] += 1
    counts["bytes"] += input_tensor.numel() * input_tensor.element_size()


def reduced(tensor: torch.Tensor, *rest: Any, **more: Any) -> None:
    counts["amax reductions"] += int(tensor.dtype == torch.int32)


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for name in ("all_gather_into_tensor", "all_gather_single"):
        setattr(dist, name, counting(getattr(dist, name), gathered))
    dist.all_reduce = counting(dist.all_reduce, reduced)
    world = distributed.start(load_config(next(iter(jobs.values()))).parallel)
    distributed.start, distributed.finish = lambda config: world, lambda: None
    results = {}
    for name, overrides in jobs.items():
        counts.clear()
        code = run(load_config(overrides))
        results[name] = dict(counts) | {"code": int(code)}
    if world.is_main:
        Path(sys.argv[1]).with_suffix(".counts").write_text(json.dumps(results))
    dist.destroy_process_group()
