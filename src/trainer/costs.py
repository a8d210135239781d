"""What a model costs in operations and memory, what a device can do, and what the size in a model's name means."""

from __future__ import annotations

import re
import resource
import sys
from typing import Any

import torch
from torch import nn

from .distributed import World
from .errors import UserError
from .machine import memory_of_process

#: ``model.name`` with a size in it -> the vocabulary that size is of, and the parameters with it.
NAMED_SIZES = {
    "llama_15m": (32_000, 15_191_712),
    "llama_60m": (32_000, 58_073_600),
    "llama_130m": (32_000, 134_105_856),
    "llama_350m": (32_000, 367_969_280),
    "llama_1b": (32_000, 1_339_082_752),
    "llama_7b": (32_000, 6_738_415_616),
    "llama3_1b": (128_256, 1_235_814_400),
    "llama3_8b": (128_256, 8_030_261_248),
    "llama3_8b_4blocks": (128_256, 1_923_125_248),
    "llama3_70b": (128_256, 70_553_706_496),
    "gpt2_124m": (50_257, 124_439_808),
    "gpt2_355m": (50_257, 354_823_168),
    "gpt2_774m": (50_257, 774_030_080),
    "gpt2_1558m": (50_257, 1_557_611_200),
}
#: Dense BF16 products with float32 sums, TFLOP/s by NVIDIA's data sheets and white papers: half of what they print for
#: sparse ones. The first pattern that is found in a device's name counts.
PEAK_TFLOPS = (
    (r"\bGB[23]00\b", 2500.0),
    (r"\bB[23]00\b", 2250.0),
    (r"\bH[12]00 NVL\b", 835.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\b(GH200|H200|H100|H800)\b", 989.4),
    (r"\bH20\b", 148.0),
    (r"\b(A100|A800)\b", 312.0),
    (r"\bA40\b", 149.7),
    (r"\bA30\b", 165.0),
    (r"\bA10\b", 125.0),
    (r"\bL40S\b", 362.0),
    (r"\bL40\b", 181.0),
    (r"\bL4\b", 121.0),
    (r"\bRTX A6000\b", 154.8),
    (r"\bRTX 5090\b(?! (D|Laptop))", 209.5),
    (r"\bRTX 4090\b(?! (D|Laptop))", 165.2),
    (r"\bRTX 3090\b(?! Ti)", 71.0),
)


def peak_flops(device: str) -> float | None:
    """FLOP/s of dense BF16 products of the device of that name; None for one that is not known, or a part of one."""
    if " MIG " in device:
        return None
    return next((1e12 * peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, device)), None)


def flops_per_token(model: Any, seq_len: int) -> float:
    """Of training, every product counted once, as the model itself counts them."""
    flops: float = model.flops_per_token(seq_len)
    return flops


def peak_memory(device: torch.device) -> int:
    """Bytes that this process had allocated on the GPU at most, or, on a CPU, that were resident at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size_in_name(model: nn.Module) -> str | None:
    """What the size in the model's name counts, where that is another vocabulary than the model has; else None."""
    config = model.config
    vocabulary, size = NAMED_SIZES.get(config.name, (config.vocab_size, 0))
    # By name: blocks may be as wide as the vocabulary is large.
    words = [each for name, each in model.named_parameters() if re.search(r"\b(embed_tokens|lm_head)\.weight$", name)]
    a_word = sum(each.numel() // config.vocab_size for each in words)
    named = sum(each.numel() for each in model.parameters()) + (vocabulary - config.vocab_size) * a_word
    if config.vocab_size == vocabulary or named != size:  # another shape under the old name
        return None
    return f"{short(size)} with the vocabulary of {vocabulary:,} that its name means"


def short(count: float) -> str:
    """Three digits: 15.2M, 1.34B."""
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * unit:
            digits = 2 if count < 9.995 * unit else 1 if count < 99.95 * unit else 0
            return f"{count / unit:.{digits}f}{suffix}"
    return f"{count:.0f}"


def micro_batch_size(
    wanted: int | None, global_batch: int, sequence_bytes: float, world: World, *, one: bool = False
) -> int:
    """``wanted``, or for None the largest that divides a process's share of the batch and fits in half its memory.

    That of the process with the least, so that all take alike: every process calls this. One process takes at most half
    of the batch, as two would. ``sequence_bytes``: of activations. ``one``: a step has to be one micro-batch
    (``Recipe.one_micro_batch``).

    Raises UserError if the batch cannot be dealt out evenly, or not as the recipe has to have it.
    """
    share, rest = divmod(global_batch, world.size)
    if rest:
        near = max(world.size, global_batch - rest)
        raise UserError(
            f"data.global_batch_size={global_batch} does not divide into {world.size} processes: "
            f"take {near} or {near + world.size}"
        )
    if one:
        if wanted not in (None, share):
            raise UserError(
                f"train.micro_batch_size={wanted}: precision.args.amax=step makes scales of the whole step, which has "
                f"to be one micro-batch: take {share} (data.global_batch_size / {world.size} processes), or amax=micro"
            )
        return share
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    if wanted is not None:
        if wanted not in divisors:
            raise UserError(
                f"train.micro_batch_size={wanted} does not divide the {share} sequences of a process "
                f"(data.global_batch_size / {world.size} processes): one of {', '.join(map(str, divisors))}"
            )
        return wanted
    # One process never takes the full batch in one piece: what two processes compute in halves, it does too, and both
    # sum the same numbers. In float32 they then agree bit for bit, where a chaotic step would blow up a last bit.
    most = max(1, share // 2) if world.size == 1 else share
    budget = -world.max(-_memory_of_process(world))[0] / 2  # of the process that has least: all take alike
    return max([size for size in divisors if size <= most and size * sequence_bytes <= budget], default=1)


def _memory_of_process(world: World) -> float:
    """Bytes of memory for one process. What it is given, not what is free just now: a restart must decide alike."""
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    return memory_of_process(world.local_size)
