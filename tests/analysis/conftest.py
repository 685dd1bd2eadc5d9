"""A trained net for the digits, and a process that measures it as a user would."""

import os
import signal
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from distprune.config import load_config
from distprune.data import load_images, normalize
from distprune.models import build_model
from distprune.training.stopping import SIGNALS
from tests.jobs import DIGITS, ROOT


@contextmanager
def nothing_left_behind():
    """Take back what a command leaves behind in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with nothing_left_behind():
        yield


@pytest.fixture
def environment(tmp_path):
    """Environment variables of a launched process: nothing outside tmp_path is written."""
    return {**os.environ, "DISTPRUNE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}


def digits(split):
    """Normalised images and labels of the digits, all at once."""
    data = load_config(DIGITS).data
    table = load_images(data, split)
    images = table.images.get(list(range(len(table))))
    return normalize(images, torch.tensor(data.mean), torch.tensor(data.std)), table.labels


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file of weights after three passes over the digits, in steps of 1/64 so that many magnitudes are equal."""
    torch.manual_seed(0)
    model = build_model("digits_cnn", {}, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = digits("train")
    for _ in range(3):
        for part in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    state = {n: (64 * t).round() / 64 if t.dim() > 1 else t for n, t in model.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file(state, path)
    return path
