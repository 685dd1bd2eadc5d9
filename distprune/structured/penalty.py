"""A penalty that draws the weights of weak units together to 0, before any is removed."""

from __future__ import annotations

import math

import torch

from distprune.pruning.shards import local
from distprune.structured.pruner import ChannelPruner


class GroupPenalty:
    """weight / 2 * sum over units of gamma * |w|^2, with all scored weights w of a unit and
    gamma = 2^(alpha (I_max - I) / (I_max - I_min)), where I = |w| and the extremes are those of its group: the weaker a
    unit, the more it is drawn to 0 (sparse learning in Fang et al. 2023, arXiv:2301.12900, section 3.4). gamma is not
    differentiated.

    Args:
        pruner: knows the units of the model.
        weight: of the penalty.
        alpha: the weakest unit is drawn 2^alpha times as much as the strongest.
    """

    def __init__(self, pruner: ChannelPruner, weight: float, alpha: float = 4.0) -> None:
        self._pruner = pruner
        self._weight = weight
        self._alpha = alpha

    @torch.no_grad()
    def add_to_gradients(self, scale: float = 1.0) -> None:
        """Add its gradient, times `scale` as those of the model are, to these; called on all ranks between backward and
        the optimizer step."""
        pruner = self._pruner
        strengths = pruner.unit_norms()
        all_kept = pruner.kept.to(strengths.device)
        factors = torch.zeros(len(strengths) + 1, device=strengths.device)  # the last is of what belongs to no unit
        for group in pruner.channels.groups:
            own, kept = strengths[group.units], all_kept[group.units]
            low, high = torch.where(kept, own, math.inf).min(), torch.where(kept, own, 0.0).max()
            share = ((high - own) / (high - low).clamp(min=torch.finfo(own.dtype).tiny)).clamp(0, 1)
            factors[group.units] = torch.where(kept, scale * self._weight * torch.exp2(self._alpha * share), 0.0)
        for tensor, dim, owner in pruner.scored_parts():
            if tensor.weight.grad is not None:
                along = factors[owner].to(tensor.local.dtype)
                shape = [-1 if d == dim else 1 for d in range(tensor.local.dim())]
                local(tensor.weight.grad).addcmul_(tensor.local, along.view(shape))
