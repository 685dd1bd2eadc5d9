"""The soak, short."""

import pytest

from tests.soak.kill_resume import soak


@pytest.mark.soak
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    assert soak(3, 2, 0, tmp_path)
