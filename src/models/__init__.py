"""Llama and GPT as plain PyTorch: every matrix product is an ``nn.Linear``.

A model never hears the word "precision": narrow formats are put in from outside, by replacing linears. A class that
computes down_proj(f(gate_proj(x)) * up_proj(x)) says so by an attribute: ``gated_activation``, the name of f.
"""

from .gpt import GPT as GPT
from .gpt import GPTConfig as GPTConfig
from .llama import Llama as Llama
from .llama import LlamaConfig as LlamaConfig
from .llama import RopeScaling as RopeScaling

ModelConfig = LlamaConfig | GPTConfig
Model = Llama | GPT

#: ``model.arch`` of a config -> the dataclass that describes it.
ARCHITECTURES: dict[str, type[ModelConfig]] = {"llama": LlamaConfig, "gpt": GPTConfig}


def create(config: ModelConfig) -> Model:
    """The model that ``config`` describes, on the current default device (use ``torch.device("meta")``)."""
    return Llama(config) if isinstance(config, LlamaConfig) else GPT(config)
