"""Random crops and flips of whole batches, against what they are defined as."""

import numpy as np
import pytest
import torch

from distprune.data.transforms import Transforms

SIZE, PADDING = 6, 2
PLACES = SIZE + 2 * PADDING - SIZE + 1
DRAWS = [(epoch, index) for epoch in range(50) for index in range(100)]


def one_image():
    """1 x 6 x 6, every pixel another value and none that of the padding."""
    return torch.arange(1, SIZE * SIZE + 1, dtype=torch.uint8).view(1, SIZE, SIZE)


def windows(image, size, padding):
    """All crops of a C x H x W image, by their place (row, column) after padding."""
    padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)))
    rows, columns = (side - size + 1 for side in padded.shape[1:])
    return {(y, x): padded[:, y : y + size, x : x + size] for y in range(rows) for x in range(columns)}


def places_of(crops, image, size, padding):
    by_pixels = {window.tobytes(): place for place, window in windows(image, size, padding).items()}
    assert len(by_pixels) == len(windows(image, size, padding))
    return [by_pixels[crop.numpy().tobytes()] for crop in crops]


def deviation(counts, expected):
    """Pearson's chi-squared."""
    return sum((count - expected) ** 2 / expected for count in counts)


def crops_of(draws, seed=0):
    crop = Transforms([{"RandomCrop": {"size": SIZE, "padding": PADDING}}], seed)
    return places_of(crop([one_image()] * len(draws), draws), one_image(), SIZE, PADDING)


def test_a_crop_is_a_window_of_the_padded_image_and_all_windows_are_as_likely():
    places = crops_of(DRAWS)
    counts = [places.count((y, x)) for y in range(PLACES) for x in range(PLACES)]
    # 24 degrees of freedom; a fair draw exceeds 60 once in 15,000 times.
    assert deviation(counts, len(DRAWS) / PLACES**2) < 60


def test_a_crop_of_part_of_an_image_of_three_channels_takes_the_same_window_of_each():
    image = torch.stack([one_image()[0], one_image()[0] + 50, one_image()[0] + 100])
    crop = Transforms([{"RandomCrop": {"size": 4}}], seed=0)
    places = places_of(crop([image] * 200, DRAWS[:200]), image, 4, 0)
    assert len(set(places)) == 9


def test_flips_happen_at_the_rate_asked_for_and_mirror_left_and_right():
    for p in (0.0, 0.2, 0.5, 1.0):
        flip = Transforms([{"RandomHorizontalFlip": {"p": p}}], seed=0)
        flipped = 0
        for image in flip([one_image()] * len(DRAWS), DRAWS).numpy():
            mirrored = image[:, :, 0].tolist() == one_image()[:, :, -1].tolist()
            assert np.array_equal(image, one_image().numpy()[:, :, ::-1] if mirrored else one_image().numpy())
            flipped += mirrored
        assert abs(flipped - p * len(DRAWS)) <= 4 * (p * (1 - p) * len(DRAWS)) ** 0.5


def test_a_flip_behind_a_crop_does_not_depend_on_where_it_was_cut():
    chain = Transforms([{"RandomCrop": {"size": SIZE, "padding": PADDING}}, "RandomHorizontalFlip"], seed=0)
    mirrored = {window[:, :, ::-1].tobytes(): place for place, window in windows(one_image(), SIZE, PADDING).items()}
    flipped = [mirrored.get(image.numpy().tobytes()) for image in chain([one_image()] * len(DRAWS), DRAWS)]
    counts = [flipped.count((y, x)) for y in range(PLACES) for x in range(PLACES)]
    assert deviation(counts, len(DRAWS) / 2 / PLACES**2) < 60


def test_each_transform_of_a_chain_draws_for_itself():
    twice = Transforms(["RandomHorizontalFlip", "RandomHorizontalFlip"], seed=0)([one_image()] * len(DRAWS), DRAWS)
    flipped = sum(not torch.equal(image, one_image()) for image in twice)
    assert abs(flipped - len(DRAWS) / 2) <= 4 * (len(DRAWS) / 4) ** 0.5


@pytest.mark.parametrize("other", ["epoch", "index", "seed"])
def test_draws_of_another_epoch_sample_or_seed_are_unrelated(other):
    draws = [(epoch, index) for epoch in range(0, 50, 2) for index in range(0, 100, 2)]
    changed = [(e + (other == "epoch"), i + (other == "index")) for e, i in draws]
    pairs = zip(crops_of(draws), crops_of(changed, seed=int(other == "seed")), strict=True)
    agreeing = sum(a == b for a, b in pairs)
    assert agreeing == pytest.approx(len(draws) / PLACES**2, abs=4 * (len(draws) / PLACES**2) ** 0.5)
