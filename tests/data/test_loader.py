"""Batches of ranks and workers: the same samples with the same pixels, each evaluated once."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from distprune.config.schema import Data
from distprune.data import PADDING, ImageSamples, Order, eval_loader, load_images, normalize, train_loader
from distprune.data.transforms import Transforms

AUGMENTED = [{"RandomCrop": {"size": 8, "padding": 1}}, {"RandomRotation": {"degrees": 20}}, "RandomHorizontalFlip"]


@pytest.fixture
def digits():
    return load_images(Data(source="digits", mean=[0.3], std=[0.4]), "train[:101]")


def train_steps(data, begin, count, ranks=1, accumulate=1, workers=0, chain=AUGMENTED):
    """The samples of each step, those of all ranks together."""
    order, made = Order(len(data), 20, seed=5), ImageSamples(data.images, data.labels, Transforms(chain, seed=5))
    parts = []
    for rank in range(ranks):
        loader = train_loader(made, order, begin, rank, ranks, accumulate, workers, pin_memory=False)
        micro = list(islice(loader, count * accumulate))
        parts.append([micro[i * accumulate : (i + 1) * accumulate] for i in range(count)])
    return [samples(*(batch for own in parts for batch in own[step])) for step in range(count)]


def untransformed(data):
    return ImageSamples(data.images, data.labels, Transforms([], 0))


def everything(data):
    return samples((data.images.get(list(range(len(data)))), data.labels))


def samples(*batches):
    """How often each image with its label appears in the batches."""
    seen = Counter()
    for images, labels in batches:
        seen.update((image.numpy().tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True))
    return seen


@pytest.mark.parametrize(("ranks", "accumulate", "workers"), [(1, 2, 0), (3, 1, 0), (2, 2, 0), (1, 1, 2), (2, 1, 2)])
def test_ranks_micro_batches_and_workers_change_neither_samples_nor_augmentation(digits, ranks, accumulate, workers):
    assert train_steps(digits, 0, 8, ranks, accumulate, workers) == train_steps(digits, 0, 8)


def test_a_later_start_goes_on_with_the_same_pixels(digits):
    assert train_steps(digits, 7, 5, ranks=2) == train_steps(digits, 0, 12)[7:]


def test_images_stay_with_their_labels(digits):
    assert sum(train_steps(digits, 0, 5, chain=[]), Counter()) <= everything(digits)


def test_a_sample_is_augmented_anew_in_each_epoch(digits):
    steps = train_steps(digits, 0, 10)
    first, second = sum(steps[:5], Counter()), sum(steps[5:], Counter())
    assert sum((first & second).values()) < 10


@pytest.mark.parametrize(
    ("ranks", "batch_size", "workers"), [(1, 1000, 0), (1, 7, 0), (3, 7, 0), (4, 50, 0), (2, 20, 2)]
)
def test_each_sample_is_evaluated_on_exactly_one_rank(digits, ranks, batch_size, workers):
    by_rank = [
        list(eval_loader(untransformed(digits), batch_size, rank, ranks, workers, pin_memory=False))
        for rank in range(ranks)
    ]
    sizes = [[len(images) for images, _ in batches] for batches in by_rank]
    assert all(size == sizes[0] for size in sizes), "ranks that compute together need as many batches"
    assert all(0 < size <= batch_size for size in sizes[0])
    counted = [(images[labels != PADDING], labels[labels != PADDING]) for rank in by_rank for images, labels in rank]
    assert samples(*counted) == everything(digits)


def test_an_evaluation_loader_can_be_read_again(digits):
    loader = eval_loader(untransformed(digits), 50, 0, 1, 0, pin_memory=False)
    assert samples(*loader) == samples(*loader) == everything(digits)


def test_reading_batches_leaves_the_random_numbers_of_the_process_alone(digits):
    state = torch.get_rng_state()
    train_steps(digits, 0, 2)
    list(eval_loader(untransformed(digits), 50, 0, 1, 0, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), state), "evaluating more often would change what dropout drops"


def test_normalising_is_plain_arithmetic_per_channel():
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = np.empty(images.shape)
    for channel in range(3):
        expected[:, channel] = (images[:, channel].numpy() / 255 - mean[channel]) / std[channel]
    result = normalize(images, torch.tensor(mean), torch.tensor(std))
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)


def test_images_that_are_floats_are_not_scaled_again():
    images = torch.rand(4, 1, 5, 6)
    expected = (images.numpy() - 0.5) / 0.25
    result = normalize(images, torch.tensor([0.5]), torch.tensor([0.25]))
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalising_leaves_the_images_themselves_alone(dtype):
    images = torch.arange(60).view(1, 3, 4, 5).to(dtype)
    before = images.clone()
    normalize(images, torch.full([3], 0.5), torch.full([3], 0.25))
    assert torch.equal(images, before)
