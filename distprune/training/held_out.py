"""What a model learns from and what accuracy is counted on: the evaluation split, and more sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from accelerate import Accelerator
from torch import nn

from distprune.config import Config
from distprune.config.schema import Data
from distprune.data import load_tokenizer
from distprune.training.checks import check_labels
from distprune.training.evaluation import EvalResult, evaluate
from distprune.training.images import Images
from distprune.training.splits import Split
from distprune.training.texts import Texts


def open_split(config: Config, split: str, accelerator: Accelerator) -> Split:
    """A split of the section `data`, for one rank.

    Raises:
        ConfigError: it cannot be read.
    """
    data = config.data
    if isinstance(data, Data):
        return Images(config, data, split, accelerator)
    return Texts(config, data, split, load_tokenizer(config, data), accelerator)


class HeldOut:
    """Samples of `data.eval_split` and of `eval.sets`, for one rank.

    Args:
        config: of the run.
        train: what the model learns from.
        accelerator: ranks, device and autocast.

    Attributes:
        split: `data.eval_split`.

    Raises:
        ConfigError: a split cannot be read, or its classes are not those of `train`.
    """

    def __init__(self, config: Config, train: Split, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.split = open_split(config, config.data.eval_split, accelerator)
        check_labels(train, self.split, "data.eval_split", config.data.eval_split)
        self._batches = self.split.eval_batches()
        self._sets = {}
        for name, split in config.eval.sets.items():
            more = open_split(config, split, accelerator)
            check_labels(train, more, f"eval.sets.{name}", split)
            self._sets[name] = more.eval_batches()

    def evaluate(self, model: nn.Module, after_batch: Callable[[], None] = lambda: None) -> EvalResult:
        """Count on all ranks, see `evaluate`."""
        device, autocast = self._accelerator.device, self._accelerator.autocast
        main, *others = (
            evaluate(model, batches(), autocast, device, after_batch)
            for batches in (self._batches, *self._sets.values())
        )
        return replace(main, sets=dict(zip(self._sets, others, strict=True)))
