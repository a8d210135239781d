"""Sharpness of the loss in the logits of the last token (after arXiv 2405.18710, section on sharpness).

phi = 100 * (max L(y + d) - L(y)) / (1 + L(y))    over |d_i| <= epsilon * (|y_i| + 1)

with y the logits at a sequence's last position and L their mean cross-entropy over sequences: the measure of Keskar et
al. (arXiv 1609.04836), with logits in the place of weights, so one forward pass is enough. **Epsilon, the box and the
mean over sequences are ours**: the paper's are not known to us.

No search is needed for the maximum. The cross-entropy of a sequence rises in every logit but the target's (by its
probability) and falls in that (by one minus it), so the maximum lies in one corner of the box; and every sequence has a
box of its own, so the maximum of the mean is the mean of the maxima.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.batches import DataSource
from .distributed import World
from .state import TrainState, evaluating

EPSILON = 1e-3


def worst_losses(logits_BV: Tensor, targets_B: Tensor, epsilon: float = EPSILON) -> tuple[Tensor, Tensor]:
    """Cross-entropy [B] in nats, float64, at the logits and at the worst place in their box."""
    y_BV = logits_BV.double()
    reach_BV = epsilon * (y_BV.abs() + 1)
    is_target_BV = F.one_hot(targets_B, y_BV.shape[-1]).bool()
    worst_BV = torch.where(is_target_BV, y_BV - reach_BV, y_BV + reach_BV)
    loss, worst = (F.cross_entropy(y, targets_B, reduction="none") for y in (y_BV, worst_BV))
    return loss, worst


def sharpness(
    state: TrainState, source: DataSource, world: World, sequences: int, epsilon: float = EPSILON
) -> float | None:
    """phi over the first ``sequences`` of a validation pass, the same at every world size; None if there are none."""
    loss_sum = worst_sum = count = 0.0
    with evaluating(state.model):
        for micro in range(source.num_micro):
            batch = source.batch(0, micro)
            if batch.first_sample - world.rank * len(batch.tokens) >= sequences:
                break  # on all ranks alike
            tokens_BT = batch.tokens.to(world.device)
            positions_BT = None if batch.positions is None else batch.positions.to(world.device)
            logits_BV = state.model(tokens_BT[:, :-1], None, positions_BT)[:, -1]
            loss_B, worst_B = worst_losses(logits_BV, tokens_BT[:, -1])
            wanted_B = torch.arange(len(loss_B)) + batch.first_sample < sequences
            weights_B = (wanted_B * batch.weights[:, -1]).to(world.device, torch.float64)
            loss_sum += float((loss_B * weights_B).sum())
            worst_sum += float((worst_B * weights_B).sum())
            count += float(weights_B.sum())
    loss_sum, worst_sum, count = world.sum(loss_sum, worst_sum, count)
    return 100 * (worst_sum - loss_sum) / (count + loss_sum) if count else None
