"""Text from a model, token by token; the prefix is computed anew each time, which is plenty for samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.tokenizer import TextTokenizer
from ..state import evaluating

_COLDEST = 1e-6  # below, logits divided by it are infinite or as good as


@dataclass(kw_only=True)
class SampleConfig:
    """The text that a run writes at its end."""

    prompt: str = "The"
    tokens: int = 120  # 0 = write none
    temperature: float = 0.8  # 0 = always the likeliest token
    top_k: int = 50  # 0 = all
    seed: int = 0

    def validate(self) -> None:
        """Raises ValueError for values out of range."""
        if self.tokens < 0:
            raise ValueError(f"sample.tokens={self.tokens}: must not be negative")
        if not self.temperature >= 0:
            raise ValueError(f"sample.temperature={self.temperature}: must not be negative")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"sample.seed={self.seed}: must be from 0 to 2^63 - 1")
        if self.top_k < 0:
            raise ValueError(f"sample.top_k={self.top_k}: must not be negative")


def generate(
    model: nn.Module, tokenizer: TextTokenizer, config: SampleConfig, *, context: int, device: torch.device
) -> str:
    """``config.prompt`` and what the model makes of it, up to the end of text.

    With a sharded model every rank calls this, and all draw the same tokens.
    """
    generator = torch.Generator().manual_seed(config.seed)
    tokens = tokenizer.encode_batch([config.prompt])[0] or [tokenizer.eot]
    # Every prefix is of another length, and would be compiled for.
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        for _ in range(config.tokens):
            window = torch.tensor([tokens[-context:]], device=device)
            token = _choose(model(window)[0, -1].float().cpu()[: tokenizer.vocab_size], config, generator)
            if token == tokenizer.eot:
                break
            tokens.append(token)
    return tokenizer.decode(tokens)


def _choose(logits: Tensor, config: SampleConfig, generator: torch.Generator) -> int:
    if config.temperature < _COLDEST:
        return int(logits.argmax())
    logits = logits / config.temperature
    if 0 < config.top_k < logits.numel():
        logits[logits < logits.topk(config.top_k).values[-1]] = -torch.inf
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
