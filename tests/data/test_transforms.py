"""Transforms named in the configuration: what is drawn for a sample depends on seed, epoch and index only."""

import random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from distprune.data.transforms import Transforms
from distprune.errors import ConfigError
from tests.data.made import random_images

CHAINS = {
    "whole batches": [{"RandomCrop": {"size": 8, "padding": 2}}, "RandomHorizontalFlip"],
    "one by one": [{"RandomRotation": {"degrees": 30}}, {"RandomErasing": {"p": 0.5}}],
    "both": [
        "RandomHorizontalFlip",
        {"RandomAffine": {"degrees": 20}},
        {"CenterCrop": {"size": 7}},
        "RandomVerticalFlip",
    ],
    "crop by torchvision": [{"RandomCrop": {"size": [8, 8], "padding": [1, 1]}}, {"RandomCrop": {"size": 6}}],
    "any size": [{"RandomResizedCrop": {"size": 8}}, "RandomHorizontalFlip"],
}
TOKENS = [(epoch, index) for epoch in (0, 3) for index in range(20)]


def images(count=40, shape=(8, 8)):
    return [torch.from_numpy(image)[None] for image in random_images(count, shape)]


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_a_sample_looks_the_same_whatever_samples_are_beside_it(chain):
    transforms = Transforms(chain, seed=7)
    together = transforms(images(), TOKENS)
    assert len({image.numpy().tobytes() for image in transforms(images()[:1] * 20, TOKENS[:20])}) > 1, "nothing drawn"
    alone = [transforms([image], [token]) for image, token in zip(images(), TOKENS, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, transforms(images()[::-1], TOKENS[::-1]).flip(0))
    assert torch.equal(together, Transforms(chain, seed=7)(images(), TOKENS))


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_seed_and_epoch_change_what_is_drawn(chain):
    same = images(1) * 20
    drawn = Transforms(chain, 7)(same, [(0, index) for index in range(20)])
    assert not torch.equal(drawn, Transforms(chain, 8)(same, [(0, index) for index in range(20)]))
    assert not torch.equal(drawn, Transforms(chain, 7)(same, [(1, index) for index in range(20)]))


def test_a_sample_looks_the_same_beside_images_of_other_sizes():
    transforms = Transforms(CHAINS["any size"], seed=7)
    square, tall = images(2), images(2, (12, 7))
    mixed = transforms([square[0], tall[0], square[1], tall[1]], TOKENS[:4])
    assert torch.equal(mixed[::2], transforms(square, TOKENS[:4:2]))
    assert torch.equal(mixed[1::2], transforms(tall, TOKENS[1:4:2]))


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_the_random_numbers_of_the_process_are_neither_used_nor_moved_on(chain):
    transforms = Transforms(chain, seed=7)
    torch.manual_seed(1)
    first = transforms(images(), TOKENS)
    torch.manual_seed(2)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(transforms(images(), TOKENS), first)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


@pytest.mark.parametrize(
    ("chain", "theirs"),
    [
        ([], []),
        ([{"Resize": {"size": [5, 9]}}, {"CenterCrop": {"size": 4}}], [v2.Resize([5, 9]), v2.CenterCrop(4)]),
        ([{"Pad": {"padding": 2}}, {"Resize": {"size": 6}}], [v2.Pad(2), v2.Resize(6)]),
        (
            [{"RandomRotation": {"degrees": [90, 90]}}, {"Pad": {"padding": 1}}],
            [v2.RandomRotation([90, 90]), v2.Pad(1)],
        ),
    ],
    ids=["nothing", "smaller", "padded", "behind a random one"],
)
def test_without_chance_images_come_out_as_from_torchvision_one_by_one(chain, theirs):
    expected = torch.stack([v2.Compose([v2.Identity(), *theirs])(image) for image in images()])
    assert torch.equal(Transforms(chain, seed=7)(images(), TOKENS), expected)


def test_images_come_out_as_they_were_read_in_bytes_and_channels():
    colours = [torch.from_numpy(image).permute(2, 0, 1) for image in random_images(20, (8, 8, 3))]
    batch = Transforms(CHAINS["both"], seed=7)(colours, TOKENS[:20])
    assert batch.dtype == torch.uint8
    assert batch.shape == (20, 3, 7, 7)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("RandomCorp", r"data\.x\.1: .*no 'RandomCorp'; did you mean 'RandomCrop'\?"),
        ("functional", r"data\.x\.1: .*no 'functional'"),
        ({"RandomCrop": {"sice": 3}}, r"data\.x\.1: RandomCrop does not take .*sice"),
        ("RandomCrop", r"data\.x\.1: RandomCrop does not take .*size"),
        ({"RandomHorizontalFlip": {"p": -1}}, r"data\.x\.1: RandomHorizontalFlip does not take"),
        ({"Resize": {}, "Pad": {}}, r"data\.x\.1: .*one per list entry"),
    ],
)
def test_a_wrong_transform_is_named_with_its_place(step, words):
    with pytest.raises(ConfigError, match=words):
        Transforms([{"CenterCrop": {"size": 8}}, step], seed=0, key="data.x")
