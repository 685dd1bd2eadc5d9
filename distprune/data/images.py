"""Image sets by source, checked before anything is trained on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

from torch import Tensor

from distprune.config.schema import Data
from distprune.data.sources import load_table, read_labels
from distprune.data.storage import MemoryStore, Store, open_store
from distprune.data.tensors import read_split


class ImageData:
    """One split of images.

    Args:
        labels: int64, 1-D.
        classes: their names.
        opened: gives the images, which may be decoded then; called once, when they are first asked for.
    """

    def __init__(self, labels: Tensor, classes: list[str], opened: Callable[[], Store]) -> None:
        self.labels = labels
        self.classes = classes
        self._opened = opened

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def images(self) -> Store:
        """Images by index (uint8, C x H x W).

        Raises:
            ConfigError: see `open_store`.
        """
        return self._opened()


def load_images(config: Data, split: str) -> ImageData:
    """Load and check `split` of the configured source.

    Raises:
        ConfigError: the source, the split or a column is not there, the split is empty, or a label is none.
    """
    if config.source == "tensors":
        images, labels, classes = read_split(config, split)
        return ImageData(labels, classes, partial(MemoryStore, images))
    table = load_table(config, split, {"image_column": config.image_column, "label_column": config.label_column})
    labels, classes = read_labels(table, config.label_column, split)
    return ImageData(labels, classes, partial(open_store, table, config))
