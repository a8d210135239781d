"""BF16 mixed precision (arXiv 1905.12322): the baseline every other recipe is measured against.

BF16 has float32's range and 8 significant bits, so neither loss scaling nor amax tracking is needed. What 8 bits
cannot hold is a sum of many small terms: the master weights that the optimizer updates, its moments and the
gradient reduction over ranks stay in float32. Every matrix product reads BF16 and accumulates in float32.
"""

import torch

from ..recipe import Dtypes, Recipe


def recipe() -> Recipe:
    return Recipe(dtypes=Dtypes(param=torch.float32, compute=torch.bfloat16, reduce=torch.float32))
