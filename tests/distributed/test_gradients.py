"""Gradients of pruned weights are not sent, on 2 ranks; the checks themselves are in `gradients.py`."""

import pytest

from tests.distributed import gradients
from tests.distributed.ranks import launch


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict[str, str]]:
    """What each rank found, from one launch of all checks."""
    return launch(gradients.__file__, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", [check.__name__ for check in gradients.CHECKS])
def test_ranks(outcomes, check):
    for rank, outcome in enumerate(outcomes):
        assert outcome.get(check, "did not run") == "", f"rank {rank}"
