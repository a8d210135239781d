"""Models as plain PyTorch: every matrix product is an ``nn.Linear``, or a ``GroupedLinear`` of experts.

A model never hears the word "precision": narrow formats are put in from outside, by replacing modules. A class that
computes down_proj(f(gate_proj(x)) * up_proj(x)) says so by an attribute: ``gated_activation``, the name of f. Each file
that has a config derived from ``DecoderConfig`` is a model (``registry``).
"""

from .config import DecoderConfig as DecoderConfig
from .gpt import GPT as GPT
from .gpt import GPTConfig as GPTConfig
from .layers import Decoder as Decoder
from .llama import Llama as Llama
from .llama import LlamaConfig as LlamaConfig
from .llama import RopeScaling as RopeScaling
from .registry import architectures as architectures
from .registry import config_in as config_in


def create(config: DecoderConfig) -> Decoder:
    """The model that ``config`` describes, on the current default device (use ``torch.device("meta")``)."""
    return config.build()
