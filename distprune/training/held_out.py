"""What accuracy is counted on: the evaluation split, and more sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from accelerate import Accelerator
from torch import nn

from distprune.config import Config
from distprune.data import ImageData
from distprune.training.checks import check_labels
from distprune.training.evaluation import EvalResult, evaluate
from distprune.training.images import Images


class HeldOut:
    """Images of `data.eval_split` and of `eval.sets`, for one rank.

    Args:
        config: of the run.
        train: what the model learns from.
        accelerator: ranks, device and autocast.

    Raises:
        ConfigError: a split cannot be read, or its classes are not those of `train`.
    """

    def __init__(self, config: Config, train: ImageData, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.images = Images(config, config.data.eval_split, accelerator)
        check_labels(train, self.images.data, "data.eval_split", config.data.eval_split)
        self._batches = self.images.eval_batches()
        self._sets = {}
        for name, split in config.eval.sets.items():
            images = Images(config, split, accelerator)
            check_labels(train, images.data, f"eval.sets.{name}", split)
            self._sets[name] = images.eval_batches()

    def evaluate(self, model: nn.Module, after_batch: Callable[[], None] = lambda: None) -> EvalResult:
        """Count on all ranks, see `evaluate`."""
        device, autocast = self._accelerator.device, self._accelerator.autocast
        main, *others = (
            evaluate(model, batches(), autocast, device, after_batch)
            for batches in (self._batches, *self._sets.values())
        )
        return replace(main, sets=dict(zip(self._sets, others, strict=True)))
