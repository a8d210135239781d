"""Pretrain Llama and GPT models from scratch in narrow number formats.

``narrowgauge.precision`` puts recipes into any tree of ``nn.Linear``, ``narrowgauge.models`` are plain PyTorch, and
``narrowgauge.trainer`` trains them: ``python -m narrowgauge`` is its command line.
"""

from pathlib import Path

if not Path(__file__).with_name("trainer").is_dir():  # a checkout, where the rooms lie beside this folder
    __path__.append(str(Path(__file__).parents[1]))
