"""Texts as tokens: made once, into a file that ranks and workers map into memory, and cut up into samples."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from distprune.cache import cache_folder
from distprune.config.schema import HF, CausalLM, Config, TextClassification, Texts
from distprune.data.loader import PADDING, Batch
from distprune.data.sampler import Token
from distprune.data.sources import load_table, read_labels
from distprune.errors import ConfigError
from distprune.hub import loading

if TYPE_CHECKING:
    import datasets

BATCH = 1000
MULTIPLE = 8
"""Batches are a multiple of so many tokens long, as matrix units like it."""


class LabelledTexts:
    """Texts, or pairs of texts, with one label each.

    Args:
        tokens: see `_tokens`.
        labels: int64, 1-D.
        classes: their names.
        tokenizer: knows what to pad with.
        max_length: of no batch more.
    """

    def __init__(
        self, tokens: dict[str, Tensor], labels: Tensor, classes: list[str], tokenizer: Any, max_length: int
    ) -> None:
        self.labels = labels
        self.classes = classes
        self.outputs = len(classes)
        self.tokenizer = tokenizer
        self._tokens = tokens
        self._max_length = max_length
        fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        self._fill = {name: fill[name] for name in tokens if name != "ends"}

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, tokens: Sequence[Token]) -> Batch:
        """input_ids, attention_mask and, of pairs, token_type_ids, padded on the right to the longest; and labels."""
        indices = torch.tensor([index for _, index in tokens])
        ends = self._tokens["ends"]
        begins = torch.where(indices > 0, ends[indices - 1], 0)
        lengths = ends[indices] - begins
        width = min(-(-int(lengths.max()) // MULTIPLE) * MULTIPLE, self._max_length)
        mask = torch.arange(width) < lengths[:, None]
        places = (begins[:, None] + torch.arange(width))[mask]
        inputs = {"attention_mask": mask.long()}
        for name, fill in self._fill.items():
            inputs[name] = torch.full((len(indices), width), fill).masked_scatter_(
                mask, self._tokens[name][places].long()
            )
        return inputs, self.labels[indices]


class Blocks:
    """Texts one behind the other, cut into blocks of as many tokens, the last incomplete one left out.

    Args:
        tokens: see `_tokens`.
        tokenizer: which made them.
        length: of a block.
    """

    labels = None
    classes: tuple[str, ...] = ()

    def __init__(self, tokens: dict[str, Tensor], tokenizer: Any, length: int) -> None:
        self.outputs = len(tokenizer)
        self.tokenizer = tokenizer
        self._ids = tokens["input_ids"]
        self._length = length

    def __len__(self) -> int:
        return len(self._ids) // self._length

    def batch(self, tokens: Sequence[Token]) -> Batch:
        """input_ids, and as label of each token the next one; the last of a block has none."""
        begins = torch.tensor([index * self._length for _, index in tokens])
        ids = self._ids[begins[:, None] + torch.arange(self._length)].long()
        labels = torch.full_like(ids, PADDING)
        labels[:, :-1] = ids[:, 1:]
        return {"input_ids": ids}, labels


def load_tokenizer(config: Config, data: Texts) -> Any:
    """The tokenizer of `data.tokenizer`, or of the model.

    Raises:
        ConfigError: there is none, or it does not make samples of data.max_length.
        MissingError: see `loading`.
    """
    name = data.tokenizer or config.model.name.removeprefix(HF)
    with loading("data.tokenizer", name):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ConfigError(f"data.tokenizer: {name} has no vocabulary; name a folder with the files of a tokenizer")
    if isinstance(data, TextClassification):
        marks = tokenizer.num_special_tokens_to_add(pair=data.pair_column is not None)
        if data.max_length <= marks:
            raise ConfigError(
                f"data.max_length: is {data.max_length}, and {marks} tokens of that mark where texts begin and end; "
                "raise it"
            )
    if data.max_length > tokenizer.model_max_length:
        raise ConfigError(
            f"data.max_length: is {data.max_length}, but the tokenizer {name} is of a model that takes "
            f"{tokenizer.model_max_length} at most; lower it"
        )
    if isinstance(data, TextClassification) and tokenizer.pad_token_id is None:
        raise ConfigError(
            f"data.tokenizer: {name} has no padding token, which batches of texts take; name one that has, as a folder "
            "to which a tokenizer with pad_token set was saved"
        )
    return tokenizer


def load_texts(data: TextClassification | CausalLM, split: str, tokenizer: Any) -> LabelledTexts | Blocks:
    """Load `split`, as tokens.

    Raises:
        ConfigError: see `load_table`; or a column holds no texts, or no labels; or there is not one sample.
    """
    columns = {"text_column": data.text_column}
    if isinstance(data, CausalLM):
        table = load_table(data, split, columns)
        blocks = Blocks(_tokens(table, columns, tokenizer, None, data.cache_dir), tokenizer, data.max_length)
        if len(blocks) == 0:
            raise ConfigError(f"data.max_length: {split} has fewer than {data.max_length} tokens; lower it")
        return blocks
    if data.pair_column is not None:
        columns["pair_column"] = data.pair_column
    table = load_table(data, split, {**columns, "label_column": data.label_column})
    labels, classes = read_labels(table, data.label_column, split)
    tokens = _tokens(table, columns, tokenizer, data.max_length, data.cache_dir)
    return LabelledTexts(tokens, labels, classes, tokenizer, data.max_length)


def _tokens(
    table: datasets.Dataset, columns: dict[str, str], tokenizer: Any, max_length: int | None, cache_dir: str | None
) -> dict[str, Tensor]:
    """The tokens of all texts one behind the other (input_ids, of pairs token_type_ids; int32), and the `ends` of texts
    in them (int64), mapped from a file that is written where no earlier run has. One process writes, others wait."""
    for key, column in columns.items():
        if table.features[column].dtype not in ("string", "large_string"):
            raise ConfigError(f"data.{key}: {column!r} holds {table.features[column]}, not texts")
    folder = cache_folder() if cache_dir is None else Path(cache_dir).expanduser()
    told = json.dumps([table._fingerprint, list(columns.values()), _digest(tokenizer), max_length])
    path = folder / f"{hashlib.blake2b(told.encode(), digest_size=12).hexdigest()}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            partial = path.with_suffix(".partial")
            try:
                save_file(_tokenize(table, columns, tokenizer, max_length), partial)
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)
    return dict(load_file(path))


def _tokenize(
    table: datasets.Dataset, columns: dict[str, str], tokenizer: Any, max_length: int | None
) -> dict[str, Tensor]:
    names = ("input_ids", "token_type_ids") if len(columns) == 2 else ("input_ids",)
    flat: dict[str, list[Any]] = {name: [] for name in names}
    lengths: list[int] = []
    cut = {"truncation": max_length is not None, "max_length": max_length}
    for begin in range(0, len(table), BATCH):
        rows = table[begin : begin + BATCH]
        for key, column in columns.items():
            if None in rows[column]:
                raise ConfigError(f"data.{key}: text {begin + rows[column].index(None)} is missing")
        texts = (rows[column] for column in columns.values())
        made = tokenizer(*texts, **cut, return_attention_mask=False, verbose=False)
        lengths += map(len, made["input_ids"])
        for name in names:
            if name in made:
                flat[name].append(np.concatenate([np.asarray(row, np.int32) for row in made[name]]))
    if tokenizer.is_fast:  # it keeps the last call's in its file
        tokenizer.backend_tokenizer.no_truncation()
    tokens = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in flat.items() if parts}
    return {**tokens, "ends": torch.tensor(lengths).cumsum(0)}


def _digest(tokenizer: Any) -> str:
    """Of the files that make a tokenizer."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(tokenizer.save_pretrained(folder)):
            if Path(file).is_file():
                digest.update(Path(file).read_bytes())
    return digest.hexdigest()
