"""Images that are tensors in files: the same samples as from images, and what is refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distprune.config.schema import Data
from distprune.data import load_images
from distprune.errors import ConfigError
from tests.data.made import parquet, random_images, write_parquet

LABELS = [0, 1, 2, 1] * 10


@pytest.fixture
def folder(tmp_path):
    """40 images in colour, as tensors and as a table, and 12 to test on."""
    for split, count, seed in (("train", 40, 0), ("test", 12, 1)):
        images = random_images(count, (6, 5, 3), seed)
        write_parquet(tmp_path / "table", split, images, LABELS[:count])
        write(tmp_path, split, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), LABELS[:count])
    return tmp_path


def write(folder, split, images, labels, **more):
    tensors = {"images": images.contiguous(), "labels": torch.as_tensor(labels)}
    save_file(tensors, folder / f"{split}.safetensors", more)


def tensors(folder, **more):
    return Data(**{"source": "tensors", "path": str(folder), "mean": [0.5] * 3, "std": [0.5] * 3, **more})


@pytest.mark.parametrize(
    "split", ["train", "test", "train[:10]", "train[-10:]", "train[90%:]", "train[:33%]", "train[10:20]", "train[:99]"]
)
def test_a_split_holds_what_the_same_split_of_a_table_holds(folder, split):
    read, expected = (
        load_images(config, split)
        for config in (tensors(folder), parquet(folder / "table", mean=[0.5] * 3, std=[0.5] * 3))
    )
    everything = list(range(len(expected)))
    assert len(read) == len(expected)
    assert torch.equal(read.labels, expected.labels)
    assert read.labels.dtype == torch.int64
    assert torch.equal(read.images.get(everything), expected.images.get(everything))
    assert read.classes == expected.classes == ["0", "1", "2"]


def test_grey_images_have_one_channel_and_names_of_classes_come_from_the_file(tmp_path):
    labels = torch.tensor([0, 1, 1, 0], dtype=torch.uint16)
    write(tmp_path, "train", torch.zeros(4, 6, 5, dtype=torch.uint8), labels, classes="cat\ndog\nhen\n")
    read = load_images(tensors(tmp_path, mean=[0.5], std=[0.5]), "train")
    assert read.images.get([0, 3]).shape == (2, 1, 6, 5)
    assert read.classes == ["cat", "dog", "hen"]


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ("valid", r"no .*valid\.safetensors; the folder has test, train"),
        ("train[5:5]", r"'train\[5:5\]' of .* is empty; train\.safetensors has 40 samples"),
        ("train[10", r"'train\[10' is no split; write"),
        ("train[a:b]", "is no split"),
    ],
)
def test_a_split_that_is_not_there_is_named(folder, split, says):
    with pytest.raises(ConfigError, match=says):
        load_images(tensors(folder), split)


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (torch.zeros(4, 3, 6, 5), [0, 1, 1, 0], r"images of .* are torch\.float32 \(4, 3, 6, 5\), not uint8"),
        (torch.zeros(4, 30, dtype=torch.uint8), [0, 1, 1, 0], r"\(4, 30\), not uint8 of N x C x H x W"),
        (torch.zeros(0, 3, 6, 5, dtype=torch.uint8), torch.zeros(0).long(), r"\(0, 3, 6, 5\)"),
        (torch.zeros(4, 1, 6, 5, dtype=torch.uint8), [0, 1, 1, 0], r"data\.mean: has 3 values, but .* 1 channels"),
        (torch.zeros(4, 3, 6, 5, dtype=torch.uint8), [0, 1, 1], r"labels of .* \(3,\), not whole numbers of \(4,\)"),
        (torch.zeros(4, 3, 6, 5, dtype=torch.uint8), [0.0, 1.0, 1.0, 0.0], r"labels of .* torch\.float32"),
        (torch.zeros(4, 3, 6, 5, dtype=torch.uint8), [0, -1, 1, 1], r"labels of .* not all from 0 to 1"),
    ],
)
def test_tensors_that_are_no_images_or_no_labels_are_refused(tmp_path, images, labels, says):
    write(tmp_path, "train", images, labels)
    with pytest.raises(ConfigError, match=says):
        load_images(tensors(tmp_path), "train")


def test_files_that_hold_something_else_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no \.safetensors file"):
        load_images(tensors(tmp_path), "train")
    save_file({"pixels": torch.zeros(3)}, tmp_path / "train.safetensors")
    with pytest.raises(ConfigError, match="has no tensor images or labels"):
        load_images(tensors(tmp_path), "train")
    (tmp_path / "train.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_images(tensors(tmp_path), "train")
