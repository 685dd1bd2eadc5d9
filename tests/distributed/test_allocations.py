"""Allocations and scores on 2 and 3 ranks; the checks themselves are in `allocations.py`."""

import pytest

from tests.distributed import allocations
from tests.distributed.ranks import launch


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def outcomes(request, tmp_path_factory) -> list[dict[str, str]]:
    """What each rank found, from one launch of all checks."""
    return launch(allocations.__file__, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", [check.__name__ for check in allocations.CHECKS])
def test_ranks(outcomes, check):
    for rank, outcome in enumerate(outcomes):
        assert outcome.get(check, "did not run") == "", f"rank {rank}"
