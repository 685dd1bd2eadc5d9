"""Caches in a folder of the test's own."""

import pytest

from tests.data.made import keep_writes_in


@pytest.fixture(autouse=True)
def _caches(tmp_path_factory, monkeypatch):
    keep_writes_in(tmp_path_factory.mktemp("caches"), monkeypatch)
