"""Images in memory or streamed: the same pixels, decoded once per run of any number of processes."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from distprune.data import load_images
from distprune.errors import ConfigError
from tests.data.made import parquet, random_images, write_parquet

FORK = multiprocessing.get_context("fork")
LIMIT = 60


@pytest.fixture
def colours(tmp_path):
    """A folder with 40 images of 6 x 5 pixels in colour."""
    images = random_images(40, (6, 5, 3))
    write_parquet(tmp_path / "set", "test", random_images(40, (6, 5, 3), seed=1), [0, 1] * 20)
    return write_parquet(tmp_path / "set", "train", images, [0, 1] * 20)


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by one for each image that is decoded."""
    opened, original = [], Image.open

    def counting(*args, **kwargs):
        opened.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(Image, "open", counting)
    return opened


def rgb(folder, **more):
    return parquet(folder, mean=[0.5] * 3, std=[0.5] * 3, **more)


def pixels(config, split="train"):
    """All images, N x C x H x W."""
    data = load_images(config, split)
    return torch.stack(list(data.images.get(list(range(len(data)))))).numpy()


def expected(seed=0):
    return np.stack(random_images(40, (6, 5, 3), seed)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("storage", ["auto", "memory", "stream", "device"])
def test_images_are_the_same_pixels_however_they_are_stored(colours, storage):
    images = load_images(rgb(colours, storage=storage), "train").images
    assert len(images) == 40
    assert np.array_equal(torch.stack(list(images.get([3, 39, 3]))).numpy(), expected()[[3, 39, 3]])
    assert all(image.dtype == torch.uint8 for image in images.get([0, 1]))


def test_images_in_memory_are_decoded_once_and_streamed_ones_each_time(colours, decoded):
    memory = load_images(rgb(colours), "train").images
    once = len(decoded)
    for _ in range(3):
        memory.get(list(range(40)))
    assert 40 <= once == len(decoded)
    stream = load_images(rgb(colours, storage="stream"), "train").images
    assert len(decoded) == once
    stream.get([0, 1])
    stream.get([1])
    assert len(decoded) == once + 3


def test_a_second_run_takes_the_decoded_images_of_the_first(colours, decoded):
    first = pixels(rgb(colours))
    decoded.clear()
    assert np.array_equal(pixels(rgb(colours)), first)
    assert len(decoded) <= 1, "one image tells the size; the others lie in the cache"


def test_each_split_slice_and_number_of_channels_has_decoded_images_of_its_own(colours):
    assert np.array_equal(pixels(rgb(colours)), expected())
    assert np.array_equal(pixels(rgb(colours), "test"), expected(seed=1))
    assert np.array_equal(pixels(rgb(colours), "train[:20]"), expected()[:20])
    assert np.array_equal(pixels(rgb(colours), "train[20:]"), expected()[20:])
    assert pixels(parquet(colours)).shape == (40, 1, 6, 5)


def test_files_that_changed_are_decoded_anew(colours):
    pixels(rgb(colours))
    os.utime(next(colours.glob("train*")), (1, 1))
    write_parquet(colours, "train", random_images(40, (6, 5, 3), seed=2), [0, 1] * 20)
    assert np.array_equal(pixels(rgb(colours)), expected(seed=2))


def test_decoded_images_lie_in_the_folder_that_is_named(colours, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTPRUNE_CACHE", str(tmp_path / "by environment"))
    pixels(rgb(colours))
    pixels(rgb(colours, cache_dir=str(tmp_path / "by configuration")))
    for name in ("by environment", "by configuration"):
        assert sum(path.stat().st_size for path in (tmp_path / name).iterdir()) >= expected().nbytes


def test_writing_to_an_image_does_not_change_the_cache(colours):
    images = load_images(rgb(colours), "train").images
    images.get([0])[0].zero_()
    assert np.array_equal(pixels(rgb(colours)), expected())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_as_many_channels_are_read_as_mean_has_values(tmp_path, channels, storage):
    grey, colour = random_images(1, (4, 4))[0], random_images(1, (4, 4, 3))[0]
    write_parquet(tmp_path, "train", [grey, colour], [0, 1])
    read = pixels(parquet(tmp_path, storage=storage, mean=[0.5] * channels, std=[0.5] * channels))
    assert read.shape == (2, channels, 4, 4)
    if channels == 3:
        assert np.array_equal(read[0], np.stack([grey] * 3))
        assert np.array_equal(read[1], colour.transpose(2, 0, 1))
    else:
        assert np.array_equal(read[0, 0], grey)
        # Luma of ITU-R BT.601, which Pillow documents for this conversion.
        np.testing.assert_allclose(read[1, 0], colour @ [0.299, 0.587, 0.114], atol=1)


def test_images_of_unequal_sizes_are_streamed_unless_memory_is_asked_for(tmp_path):
    images = [*random_images(3, (4, 4)), *random_images(1, (5, 4))]
    write_parquet(tmp_path, "train", images, [0, 1, 0, 1])
    for _ in range(2):
        read = load_images(parquet(tmp_path), "train").images.get([0, 3])
        assert [tuple(image.shape) for image in read] == [(1, 4, 4), (1, 5, 4)]
        assert np.array_equal(read[1][0].numpy(), images[3])
        for storage in ("memory", "device"):
            with pytest.raises(
                ConfigError, match=rf"data\.storage: {storage} .*image 3 is 4x5, the first 4x4; use stream"
            ):
                assert load_images(parquet(tmp_path, storage=storage), "train").images


def test_a_set_above_the_limit_is_streamed_unless_memory_is_asked_for(colours, decoded, monkeypatch):
    monkeypatch.setattr("distprune.data.storage.MEMORY_LIMIT", 40 * 6 * 5 * 3 - 1)
    assert load_images(rgb(colours), "train").images
    assert len(decoded) == 1
    assert load_images(rgb(colours, storage="memory"), "train").images
    assert len(decoded) > 40


def in_new_process(function, *args):
    process = FORK.Process(target=function, args=args)
    process.start()
    return process


def decode_until_killed(config, images):
    """Decode some images and end as if by kill -9."""
    original, opened = Image.open, []

    def deadly(*args, **kwargs):
        opened.append(args)
        if len(opened) > images:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    Image.open = deadly
    pixels(config)


@pytest.mark.parametrize("images", [1, 25])
def test_what_a_killed_process_left_half_decoded_is_not_used(colours, images):
    process = in_new_process(decode_until_killed, rgb(colours), images)
    process.join(LIMIT)
    assert process.exitcode == -signal.SIGKILL
    assert np.array_equal(pixels(rgb(colours)), expected())


def decode_together(config, barrier, results):
    original, opened = Image.open, []

    def slow(*args, **kwargs):
        opened.append(args)
        time.sleep(0.01)
        return original(*args, **kwargs)

    Image.open = slow
    barrier.wait(LIMIT)
    results.put((pixels(config).tobytes(), len(opened)))


def test_processes_that_open_a_new_set_at_once_all_get_it_and_one_decodes_it(colours):
    barrier, results = FORK.Barrier(3), FORK.Queue()
    processes = [in_new_process(decode_together, rgb(colours), barrier, results) for _ in range(3)]
    read = [results.get(timeout=LIMIT) for _ in processes]
    for process in processes:
        process.join(LIMIT)
        assert process.exitcode == 0
    assert [images for images, _ in read] == [expected().tobytes()] * 3
    assert sum(opened for _, opened in read) == 40 + 3, "each process opens one image to learn the size"
