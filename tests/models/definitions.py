"""What the kernels of attention and of the loss are held against, in plain torch."""

from __future__ import annotations

import torch
from narrowgauge.models.kernels.attention import visible_keys
from torch import Tensor
from torch.nn.functional import cross_entropy


def attention_definition(q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor, starts_NT: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D), masked) v of N independent heads."""
    scores_NTT = (q_NTD * q_NTD.shape[-1] ** -0.5) @ k_NTD.mT
    hidden = ~visible_keys(q_NTD.shape[1], starts_NT, q_NTD.device)
    return scores_NTT.masked_fill(hidden, -torch.inf).softmax(-1) @ v_NTD


def cross_entropy_definition(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log softmax(logits)[target], in nats, float32 [N]."""
    return cross_entropy(logits_NV.float(), targets_N, reduction="none")
