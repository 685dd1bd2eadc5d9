"""Caches in a folder of the test's own, and the real images beside the project."""

import os
from pathlib import Path

import pytest

from tests.data.made import keep_writes_in

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _caches(tmp_path_factory, monkeypatch):
    keep_writes_in(tmp_path_factory.mktemp("caches"), monkeypatch)


@pytest.fixture
def real_images():
    """The folder of one of the real sets, or a skipped test."""

    def find(name):
        folder = Path(os.environ.get("DISTPRUNE_DATA", ROOT.parent / "shared" / "data")) / name
        if not folder.is_dir():
            pytest.skip(f"no {name} at {folder}; DISTPRUNE_DATA names the folder that holds it")
        return str(folder)

    return find
