"""MNIST and CIFAR-10 as they lie beside the project."""

import pytest

from distprune.data import load_images
from tests.data.made import parquet


def test_mnist_loads(real_images):
    config = parquet(real_images("mnist"))
    test = load_images(config, "test")
    assert len(test) == 10_000
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    first = load_images(config, "train[:500]")
    assert first.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    (image,) = first.images.get([0])
    assert tuple(image.shape) == (1, 28, 28)
    grey = sum(float(image.double().mean()) for image in first.images.get(list(range(500)))) / 500 / 255
    assert grey == pytest.approx(0.1307, abs=0.01)


def test_cifar10_loads(real_images):
    config = parquet(real_images("cifar10"), image_column="img", mean=[0.5] * 3, std=[0.5] * 3)
    test = load_images(config, "test")
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert (len(test), test.classes) == (10_000, names)
    assert test.labels[:5].tolist() == [names.index(name) for name in ("cat", "ship", "ship", "airplane", "frog")]
    assert test.labels.bincount().tolist() == [1000] * 10
    few = load_images(config, "test[:100]")
    assert {tuple(image.shape) for image in few.images.get(list(range(100)))} == {(3, 32, 32)}
