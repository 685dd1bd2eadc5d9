"""Weights that fit, and ways to save them."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).parents[2]


@pytest.fixture
def save(tmp_path):
    """Save a state (or anything else) to a file of the given name and return its path."""

    def write(state, name="weights.pt"):
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save(state, path)
        return str(path)

    return write


@pytest.fixture
def net():
    """Makes a small net with batch norm; its weights are others each time."""
    return lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


@pytest.fixture
def given_weights():
    """A file of trained weights beside the project, or a skipped test."""

    def find(name):
        data = Path(os.environ.get("DISTPRUNE_DATA", ROOT.parent / "shared" / "data"))
        found = sorted((data.parent / "models").glob(f"{name}-*.th"))
        if not found:
            pytest.skip(f"no weights of {name} in {data.parent / 'models'}; they lie beside the folder DISTPRUNE_DATA")
        return str(found[0])

    return find
