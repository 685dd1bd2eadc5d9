"""What a model learns from and what accuracy is counted on: the evaluation split, and more sets by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from accelerate import Accelerator
from torch import nn

from distprune.config import Config
from distprune.config.schema import Data
from distprune.data import Batch, load_tokenizer
from distprune.data.corruptions import corruptions
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
        classes: names of those of `train`.

    Raises:
        ConfigError: a split cannot be read, its classes are not those of `train`, or it cannot be corrupted.
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
        self.classes = train.classes
        self._corrupted = {}
        if config.eval.corruptions and isinstance(self.split, Images):
            self.split.first_inputs()  # says what is wrong with transforms
            for corruption in corruptions(config.eval.corruptions):
                self._corrupted[corruption.name] = self.split.corrupted_batches(corruption)

    def sets(self) -> Iterator[tuple[str, Callable[[], Iterator[Batch]]]]:
        """Names and batches: eval, `eval.sets` and `eval.corruptions`."""
        yield "eval", self._batches
        yield from self._sets.items()
        yield from self._corrupted.items()

    def evaluate(self, model: nn.Module, after_batch: Callable[[], None] = lambda: None) -> EvalResult:
        """Count on all ranks, see `evaluate`."""
        device, autocast = self._accelerator.device, self._accelerator.autocast
        main, *others = (
            evaluate(model, batches(), autocast, device, after_batch)
            for batches in (self._batches, *self._sets.values())
        )
        return replace(main, sets=dict(zip(self._sets, others, strict=True)))
