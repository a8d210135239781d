"""Number formats and precision recipes for pretraining: for any tree of ``nn.Linear``, under any trainer.

>>> plan = apply(load("mxfp8", {}), model)
"""

from precision.recipe import apply as apply
from precision.recipe import load as load
