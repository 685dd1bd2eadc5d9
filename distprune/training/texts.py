"""Texts as the model sees them: loaders of one split, for one rank, with tokens on the device."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from distprune.config import Config
from distprune.config.schema import CausalLM, TextClassification
from distprune.data import Batch, Inputs, Samples, load_texts
from distprune.training.logits import to_device
from distprune.training.splits import Split


class Texts(Split):
    """Loaders of one split of texts for one rank, see `Split`.

    Raises:
        ConfigError: see `load_texts`.
    """

    def __init__(
        self,
        config: Config,
        data: TextClassification | CausalLM,
        split: str,
        tokenizer: Any,
        accelerator: Accelerator,
    ) -> None:
        super().__init__(config, accelerator)
        self.tokenizer = tokenizer
        self._texts = load_texts(data, split, tokenizer)
        self.what = "blocks of tokens" if self._texts.labels is None else "texts"
        self.labels, self.outputs = self._texts.labels, self._texts.outputs
        self.classes = list(self._texts.classes)

    def __len__(self) -> int:
        return len(self._texts)

    def first_samples(self, training: bool = False) -> Batch:
        inputs, labels = self._texts.batch(self._ends)
        return self._on_device(inputs), labels.to(self._accelerator.device)

    def _samples(self, training: bool) -> Samples:
        return self._texts

    def _on_device(self, inputs: Inputs) -> Inputs:
        return to_device(inputs, self._accelerator.device)
