"""The CIFAR-10 ResNets beside the project load, and see what they were trained to see."""

import os
from pathlib import Path

import pytest
import torch

from distprune.data import load_images, normalize
from distprune.models import build_model, load_weights
from tests.data.made import keep_writes_in, parquet

ROOT = Path(__file__).parents[2]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet56"])
def test_the_given_weights_load(given_weights, name):
    model = build_model(name, {}, 10)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    load_weights(model, given_weights(name))
    for key, value in model.state_dict().items():
        assert key.endswith("num_batches_tracked") or not torch.equal(value, fresh[key]), f"{key} was not loaded"


@pytest.fixture
def held_out(tmp_path, monkeypatch):
    """300 test images of CIFAR-10, normalised, and their labels."""
    folder = Path(os.environ.get("DISTPRUNE_DATA", ROOT.parent / "shared" / "data")) / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"no cifar10 at {folder}; DISTPRUNE_DATA names the folder that holds it")
    keep_writes_in(tmp_path, monkeypatch)
    data = load_images(parquet(folder, image_column="img", mean=MEAN, std=STD), "test[:300]")
    return normalize(data.images.get(list(range(300))), torch.tensor(MEAN), torch.tensor(STD)), data.labels


def test_resnet_20_recognises_nine_of_ten_images(given_weights, held_out):
    model = build_model("resnet20", {}, 10).eval()
    load_weights(model, given_weights("resnet20"))
    images, labels = held_out
    with torch.inference_mode():
        correct = (model(images).argmax(dim=1) == labels).double().mean()
    # 91.73 % of all test images; three standard deviations of 300.
    assert float(correct) == pytest.approx(0.9173, abs=0.048)
