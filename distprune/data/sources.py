"""Tables of Hugging Face datasets by source, and their labels, checked before anything is trained on them."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distprune.cache import is_offline
from distprune.config.schema import Data, Texts
from distprune.errors import ConfigError, MissingError, reason

if TYPE_CHECKING:
    import datasets  # for seconds, and not to be had everywhere: taken in where it is used

DIGITS_TEST_IMAGES = 360


def load_table(config: Data | Texts, split: str, columns: dict[str, str]) -> datasets.Dataset:
    """The rows of `split`, not empty, with `columns`, each by the key that names it.

    Raises:
        ConfigError: the source, the split or a column is not there, or the split is empty.
    """
    table = _load(config, split)
    for key, column in columns.items():
        if column not in table.column_names:
            near = difflib.get_close_matches(column, table.column_names, n=1, cutoff=0.0)
            raise ConfigError(
                f"data.{key}: {split} has no column {column!r}; it has {', '.join(table.column_names)}"
                + (f". Set data.{key}={near[0]}" if near else "")
            )
    if len(table) == 0:
        raise ConfigError(f"data: split {split!r} of {config.path or config.source} is empty")
    return table


def _load(config: Data | Texts, split: str) -> datasets.Dataset:
    import datasets

    if config.source == "digits":
        return _digits(split)
    where: dict[str, Any]
    if config.source == "hub":
        where = {"path": config.path, "name": config.name}
    else:
        where = {"path": "imagefolder" if config.source == "folder" else config.source, "data_dir": config.path}
    datasets.disable_progress_bars()
    # What goes wrong is raised as well, and told once.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return datasets.load_dataset(**where, split=split)
    except (OSError, ValueError, KeyError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        said = reason(error.__cause__ or error)
        fault = f"data: cannot load split {split!r} of {config.source} {config.path}: {said}"
        unreachable = isinstance(error, ConnectionError) or (is_offline() and "cache" in said)
        raise (MissingError if config.source == "hub" and unreachable else ConfigError)(fault) from error


def _digits(split: str) -> datasets.Dataset:
    """scikit-learn's 1,797 digits (8 x 8, 16 grey levels), the same fifth of each class held out as test every time."""
    import datasets
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    grey = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    parts = train_test_split(grey, labels, test_size=DIGITS_TEST_IMAGES, random_state=0, stratify=labels)
    columns = {"train": (parts[0], parts[2]), "test": (parts[1], parts[3])}
    try:
        instruction = datasets.ReadInstruction.from_spec(split)
        (part,) = instruction.to_absolute({name: len(y) for name, (_, y) in columns.items()})
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"data: digits has no split {split!r}; it has train and test ({error})") from None
    x, y = (column[part.from_ : part.to] for column in columns[part.splitname])
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    )
    return datasets.Dataset.from_dict({"image": list(x), "label": y}, features=features)


def read_labels(table: datasets.Dataset, column: str, split: str) -> tuple[Tensor, list[str]]:
    """Labels (int64, 1-D) and the names of the classes.

    Raises:
        ConfigError: the column holds no class numbers, or some that are none.
    """
    import datasets

    feature = table.features[column]
    values = np.asarray(table.select_columns([column]).with_format("numpy")[:][column])
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ConfigError(f"data.label_column: {column!r} of {split} holds {feature}, not one class number per sample")
    classes = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    count = len(classes) if classes is not None else int(values.max()) + 1
    wrong = np.flatnonzero((values < 0) | (values >= count))
    if len(wrong):
        raise ConfigError(
            f"data.label_column: {column!r} of {split} has {len(wrong)} labels outside 0 to {count - 1}, the first "
            f"({values[wrong[0]]}) at sample {wrong[0]}; a split without labels cannot be used"
        )
    return torch.from_numpy(values.astype(np.int64)), classes or [str(label) for label in range(count)]
