"""Corrupted images: the same wherever they are made, worse at each strength, still images."""

import pytest
import torch

from distprune.config.schema import Data
from distprune.data import ImageSamples, eval_loader, load_images
from distprune.data.corruptions import KINDS, CorruptedSamples, Corruption, corruptions
from distprune.data.transforms import Transforms
from distprune.errors import ConfigError

ALL = corruptions(True)
BY_NAME = pytest.mark.parametrize("corruption", ALL, ids=[corruption.name for corruption in ALL])


@pytest.fixture(scope="module")
def digits():
    data = load_images(Data(source="digits", mean=[0.5], std=[0.5]), "test[:40]")
    return ImageSamples(data.images, data.labels, Transforms([], 0))


def photo(channels, side):
    """A smooth picture with an edge: uint8, channels x side x side."""
    ramp = torch.linspace(20, 200, side)
    image = torch.stack([ramp[:, None] * (0.5 + 0.2 * c) + 0.3 * ramp for c in range(channels)])
    image[:, side // 2 :, side // 3 :] /= 2
    return image.round().to(torch.uint8)


def samples_of(images):
    class Images:
        def __len__(self):
            return len(images)

        def batch(self, tokens):
            indices = [index for _, index in tokens]
            return images[indices], torch.tensor(indices)

    return Images()


def all_of(samples, rank=0, world_size=1, size=40, workers=0):
    loader = eval_loader(samples, size, rank, world_size, workers, pin_memory=False)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return images[labels >= 0]


def test_there_are_five_kinds_at_three_strengths_and_a_list_chooses_kinds():
    assert [c.name for c in ALL][:4] == ["noise-1", "noise-2", "noise-3", "blur-1"]
    assert len({c.name for c in ALL}) == 15
    assert [c.name for c in corruptions(["jpeg", "noise"])] == [*(c.name for c in ALL[:3]), *(c.name for c in ALL[-3:])]
    assert corruptions(False) == corruptions([]) == []


@BY_NAME
def test_an_image_is_the_same_in_any_batch_in_any_order_on_any_rank(digits, corruption):
    samples = CorruptedSamples(digits, corruption, seed=3)
    whole = all_of(samples)
    assert torch.equal(whole, all_of(samples, size=7))
    parts = torch.cat([all_of(samples, rank, world_size=3, size=5) for rank in range(3)])
    assert torch.equal(whole, parts)
    backwards, _ = samples.batch([(0, index) for index in reversed(range(40))])
    assert torch.equal(whole, backwards.flip(0))


def test_workers_make_the_same_images(digits):
    for corruption in (ALL[2], ALL[5]):
        samples = CorruptedSamples(digits, corruption, seed=3)
        assert torch.equal(all_of(samples), all_of(samples, size=10, workers=2))


def test_noise_depends_on_seed_strength_and_sample_and_nothing_else_is_drawn():
    same = photo(3, 32).expand(20, 3, 32, 32)
    before = torch.get_rng_state()
    noisy = {seed: all_of(CorruptedSamples(samples_of(same), ALL[0], seed)) for seed in (0, 1)}
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(noisy[0], noisy[1])
    assert len({image.numpy().tobytes() for image in noisy[0]}) == 20
    weak, strong = (all_of(CorruptedSamples(samples_of(same), c, 0)).float() - same.float() for c in ALL[:2])
    correlation = torch.corrcoef(torch.stack([weak.flatten(), strong.flatten()]))[0, 1]
    assert abs(correlation) < 0.05
    assert weak.std() == pytest.approx(0.04 * 255, rel=0.05)
    for corruption in ALL[3:]:
        images = all_of(CorruptedSamples(samples_of(same), corruption, 0))
        assert len({image.numpy().tobytes() for image in images}) == 1, corruption.name


@pytest.mark.parametrize("side", [8, 32, 96, 224])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_strength_changes_an_image_more_and_leaves_an_image(kind, channels, side):
    image = photo(channels, side)
    changes = []
    for strength in (1, 2, 3):
        made = Corruption(kind, strength)(image, draw=1)
        assert (made.dtype, made.shape) == (torch.uint8, image.shape)
        changes.append(float((made.float() - image.float()).square().mean()))
    assert 0 < changes[0] < changes[1] < changes[2]


def test_extremes_are_clipped_and_do_not_wrap_around():
    for value in (0, 255):
        flat = torch.full((3, 32, 32), value, dtype=torch.uint8)
        for corruption in ALL:
            assert (corruption(flat, draw=1).float() - value).abs().max() < 130, corruption.name


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 9), (3, 40, 5)])
def test_images_that_are_smaller_than_a_blur_are_blurred_all_the_same(shape):
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    assert Corruption("blur", 3)(image, draw=1).shape == shape


def test_blur_is_a_gaussian():
    """Beside both dimensions at once, in float64, from the formula."""
    image = torch.randint(0, 256, (1, 20, 24), dtype=torch.uint8)
    steps = torch.arange(-3, 4, dtype=torch.float64)
    line = (-steps.square() / 2).exp()
    kernel = line[:, None] * line / line.sum() ** 2
    edged = torch.nn.functional.pad(image.double()[None], [3] * 4, mode="reflect")
    expected = torch.nn.functional.conv2d(edged, kernel[None, None])[0]
    assert (Corruption("blur", 3)(image, draw=1).double() - expected).abs().max() <= 0.501


def test_what_are_no_pixels_cannot_be_corrupted():
    floats = CorruptedSamples(samples_of(torch.rand(2, 3, 8, 8)), ALL[0], 0)
    with pytest.raises(ConfigError, match=r"eval\.corruptions: takes uint8 images"):
        floats.batch([(0, 0)])
