"""Plain float32 (IEEE 754 binary32) everywhere: the reference that laws are tested on, not a way to train.

Losses of two world sizes agree to the order of float32 sums, which BF16's coarser rounding would hide.
"""

import torch

from ..recipe import Dtypes, Recipe


def recipe() -> Recipe:
    return Recipe(dtypes=Dtypes(param=torch.float32, compute=torch.float32, reduce=torch.float32))
