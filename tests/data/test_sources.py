"""Where samples come from: the digits, parquet files, image folders; and what is said where something is missing."""

import hashlib
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from distprune.config.schema import Data
from distprune.data import load_images
from distprune.errors import ConfigError
from tests.data.made import parquet, random_images, write_folder, write_parquet


def digits(split):
    return load_images(Data(source="digits", mean=[0.3], std=[0.4]), split)


def pixels(data):
    """All images, N x H x W or N x H x W x 3."""
    return data.images.get(list(range(len(data)))).permute(0, 2, 3, 1).squeeze(-1).numpy()


def test_the_digits_are_those_of_scikit_learn_each_in_one_of_two_splits():
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1437, 360)
    theirs, labels = load_digits(return_X_y=True)
    grey = (theirs * 255 / 16).round().astype(int)
    expected = Counter((tuple(image.tolist()), label) for image, label in zip(grey, labels.tolist(), strict=True))
    ours = Counter(
        (tuple(image.ravel().tolist()), int(label))
        for split in (train, test)
        for image, label in zip(pixels(split), split.labels, strict=True)
    )
    assert ours == expected


def test_each_digit_is_held_out_as_often_as_it_appears():
    train, test = (digits(split).labels.bincount() for split in ("train", "test"))
    assert test.tolist() == pytest.approx(((train + test) * 360 / 1797).tolist(), abs=1)


def test_the_split_of_the_digits_never_changes():
    test = digits("test")
    content = pixels(test).tobytes() + test.labels.numpy().astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "a2fc2790f951761e"
    assert test.classes == [str(digit) for digit in range(10)]


@pytest.mark.parametrize(
    ("split", "part"),
    [("train[:100]", slice(100)), ("train[1400:]", slice(1400, None)), ("train[-10:-5]", slice(-10, -5))],
)
def test_slices_of_a_split_are_those_of_a_list(split, part):
    whole = digits("train")
    assert torch.equal(digits(split).labels, whole.labels[part])
    assert np.array_equal(pixels(digits(split)), pixels(whole)[part])


def test_percents_of_a_split_are_rounded():
    assert len(digits("test[:10%]")) == 36
    assert len(digits("train[10%:]")) == 1437 - 144


@pytest.mark.parametrize("split", ["val", "train[:", "train+test", ""])
def test_a_split_that_the_digits_do_not_have_is_answered_with_those_they_have(split):
    with pytest.raises(ConfigError, match="train and test"):
        digits(split)


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3)], ids=["grey", "colours"])
def test_parquet_files_are_read_as_they_were_written(tmp_path, shape):
    images, labels = random_images(9, shape), [0, 2, 1] * 3
    write_parquet(tmp_path / "set", "train", images, labels, datasets.ClassLabel(names=["ant", "bee", "cat"]))
    write_parquet(tmp_path / "set", "test", images[:3], labels[:3], datasets.ClassLabel(names=["ant", "bee", "cat"]))
    channels = len(shape) * 2 - 3
    data = load_images(parquet(tmp_path / "set", mean=[0.5] * channels, std=[0.5] * channels), "train")
    assert np.array_equal(pixels(data), np.stack(images))
    assert (data.labels.tolist(), data.labels.dtype, data.classes) == (labels, torch.int64, ["ant", "bee", "cat"])


def test_the_columns_may_have_other_names(tmp_path):
    table = datasets.load_dataset(
        "parquet", data_dir=str(write_parquet(tmp_path / "a", "train", random_images(3), [0, 1, 0]))
    )
    (tmp_path / "b").mkdir()
    table["train"].rename_columns({"image": "img", "label": "fine"}).to_parquet(tmp_path / "b" / "train.parquet")
    data = load_images(parquet(tmp_path / "b", image_column="img", label_column="fine"), "train")
    assert np.array_equal(pixels(data), np.stack(random_images(3)))
    assert data.labels.tolist() == [0, 1, 0]


def test_class_numbers_without_names_are_counted(tmp_path):
    write_parquet(tmp_path, "train", random_images(4), [0, 3, 1, 0], datasets.Value("int32"))
    assert load_images(parquet(tmp_path), "train").classes == ["0", "1", "2", "3"]


def test_an_image_folder_takes_its_classes_from_the_folders_in_it(tmp_path):
    images = random_images(6, (5, 5, 3))
    for split in ("train", "test"):
        write_folder(tmp_path, split, images, ["bee", "ant", "cat"] * 2)
    data = load_images(parquet(tmp_path, source="folder", mean=[0.5] * 3, std=[0.5] * 3), "test")
    assert data.classes == ["ant", "bee", "cat"]
    assert sorted(zip(data.labels.tolist(), [image.tobytes() for image in pixels(data)], strict=True)) == sorted(
        zip([1, 0, 2] * 2, [image.tobytes() for image in images], strict=True)
    )


def test_a_class_that_a_split_lacks_keeps_the_numbers_of_the_others(tmp_path):
    write_folder(tmp_path, "train", random_images(3), ["ant", "bee", "cat"])
    write_folder(tmp_path, "test", random_images(2), ["bee", "cat"])
    data = load_images(parquet(tmp_path, source="folder"), "test")
    assert (sorted(data.labels.tolist()), data.classes) == ([1, 2], ["ant", "bee", "cat"])


@pytest.fixture
def small(tmp_path):
    return write_parquet(tmp_path / "small", "train", random_images(4), [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("change", "split", "words"),
    [
        ({}, "val", r"split 'val' of parquet .*small: .*train"),
        ({}, "train[4:]", r"split 'train\[4:\]' of .*small.*(empty|no data)"),
        ({"path": "nowhere"}, "train", r"split 'train' of parquet nowhere"),
        (
            {"image_column": "imag"},
            "train",
            r"data\.image_column: train has no column 'imag'; it has image, label.*=image",
        ),
        ({"label_column": "labels"}, "train", r"data\.label_column: train has no column 'labels'.*=label"),
        ({"label_column": "image"}, "train", r"data\.label_column: 'image' of train holds Image.*not one class number"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(small, change, split, words):
    with pytest.raises(ConfigError, match=words):
        load_images(parquet(small, **change), split)


def test_a_column_without_images_is_named(small):
    with pytest.raises(ConfigError, match=r"data\.image_column: 'label' holds ClassLabel.*, not images"):
        assert load_images(parquet(small, image_column="label"), "train").images


@pytest.mark.parametrize(
    ("labels", "feature", "words"),
    [
        ([0, 1, -1, 1], datasets.Value("int64"), r"1 labels outside 0 to 1, the first \(-1\) at sample 2"),
        ([-1] * 4, datasets.ClassLabel(names=["a", "b"]), r"4 labels outside 0 to 1.*without labels cannot be used"),
        ([0.0, 1.0, 0.5, 1.0], datasets.Value("float32"), r"'label' of train holds .*float32"),
        (["a", "b", "a", "b"], datasets.Value("string"), r"'label' of train holds .*string"),
        ([0, 1, None, 1], datasets.ClassLabel(names=["a", "b"]), r"'label' of train"),
    ],
    ids=["negative", "unlabelled", "fractions", "texts", "missing"],
)
def test_labels_that_are_no_class_numbers_are_named(tmp_path, labels, feature, words):
    write_parquet(tmp_path, "train", random_images(4), labels, feature)
    with pytest.raises(ConfigError, match=r"data\.label_column: .*" + words):
        load_images(parquet(tmp_path), "train")
