"""The scores of a model's weights, as keys to select on, and what gradients have said of them so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distprune.pruning.prunable import Prunable
from distprune.pruning.scores import DOUBLE, SIGNED, SINGLE, GradientScore, KeyFormat, Piece, Score, magnitude
from distprune.pruning.shards import flat, local


class Scorer:
    """Scores weights.

    Magnitudes are compared in float32, or in float64 if any weight is float64; all other scores in float32.

    Args:
        score: what a weight is worth.
        tensors: the prunable tensors.
    """

    def __init__(self, score: Score, tensors: Sequence[Prunable]) -> None:
        self._score = score
        self._tensors = tensors
        self._watching = score if isinstance(score, GradientScore) else None
        self.is_magnitude = score is magnitude
        self.format: KeyFormat = SIGNED
        if self.is_magnitude:
            self.format = DOUBLE if torch.float64 in {t.weight.dtype for t in tensors} else SINGLE
        self.observed: dict[str, Tensor] = {}
        """By tensor name, what was observed, added up: float32, shaped and sharded as the weight."""
        self.observations = 0
        """Over how many steps."""
        if self._watching is not None:
            self.observed = {t.name: torch.zeros_like(t.weight, dtype=torch.float32).detach() for t in tensors}

    @property
    def watches(self) -> bool:
        """Whether the score looks at gradients."""
        return self._watching is not None

    def keys(self, tensor: Prunable, mask: Tensor, begin: int, end: int) -> Tensor:
        """The keys of the elements from `begin` to `end` of this rank's part, in memory order; 0 where `mask` prunes.

        Args:
            tensor: whose.
            mask: its mask, flat, True where a weight is kept; pruned weights are 0.
            begin, end: places in memory order.
        """
        scores = self.scores(tensor, begin, end)
        # Pruned weights are 0, and so are the keys of their magnitudes.
        return self.format.keys(scores) if self.is_magnitude else self.format.keys(scores) * mask[begin:end]

    def scores(self, tensor: Prunable, begin: int, end: int) -> Tensor:
        """The scores of the elements from `begin` to `end` of this rank's part, in memory order (floats, 1-D).

        Raises:
            ValueError: the score gives another number of them.
        """
        weight = flat(tensor.local)[begin:end]
        observed = None
        if self._watching is not None:
            observed = flat(local(self.observed[tensor.name]))[begin:end]
            observed = observed / self.observations if self._watching.forgets else observed
        scores = self._score(Piece(tensor, begin, weight, observed))
        if scores.shape != weight.shape:
            raise ValueError(f"the score of {tensor.name} has shape {tuple(scores.shape)}, not {tuple(weight.shape)}")
        return scores

    def value(self, key: int) -> float:
        """The score that `key` stands for; 0.0 for that of pruned weights."""
        return float(self.format.values(torch.tensor([key]))) if key else 0.0

    def observe(self, scale: Tensor | None = None) -> None:
        """Take note of the gradients as they are, divided by `scale`; called once before each optimizer step."""
        if self._watching is None:
            return
        self.lay_out()
        for tensor in self._tensors:
            if (gradient := tensor.weight.grad) is not None:
                seen = self._watching.observe(tensor.local, local(gradient)).float()
                local(self.observed[tensor.name]).add_(seen if scale is None else seen / scale)
        self.observations += 1

    def forget(self) -> None:
        """Begin anew after an update, where the score asks for that."""
        if self._watching is not None and self._watching.forgets:
            for total in self.observed.values():
                local(total).zero_()
            self.observations = 0

    def refuse_unobserved(self, step: int) -> None:
        """Refuse to score by gradients that nobody has seen.

        Raises:
            ValueError: no optimizer step was done since the last update.
        """
        if self._watching is not None and not self.observations:
            raise ValueError(
                f"the score {type(self._watching).__name__} has seen no gradient by step {step}; begin to prune after "
                "the first optimizer step"
            )

    def lay_out(self) -> None:
        """Follow weights that were moved to another device or memory format."""
        for tensor in self._tensors:
            seen = self.observed.get(tensor.name)
            if seen is not None and (seen.device != tensor.weight.device or seen.stride() != tensor.weight.stride()):
                moved = torch.zeros_like(tensor.weight, dtype=torch.float32).detach()
                local(moved).copy_(local(seen))
                self.observed[tensor.name] = moved

    def load(self, observed: Mapping[str, Tensor], observations: int) -> None:
        """Go on from what was observed before.

        Raises:
            ValueError: it is of other tensors, and nothing has changed.
        """
        shapes = {name: local(seen).shape for name, seen in observed.items()}
        if shapes != {name: local(seen).shape for name, seen in self.observed.items()}:
            raise ValueError("what was observed of weights is of another score or of other tensors")
        for name, seen in observed.items():
            local(self.observed[name]).copy_(local(seen))
        self.observations = observations
