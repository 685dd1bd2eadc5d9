"""The same masks in one process and in 2, 3 and 4 ranks; the checks themselves are in `same_masks.py`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import same_masks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=[2, 3, 4], ids="{} ranks".format)
def outcomes(request, tmp_path_factory) -> list[dict[str, str]]:
    """What each rank found, from one launch of all checks."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)
    launched = subprocess.Popen(
        [*command, same_masks.__file__, str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = launched.communicate(timeout=240)
    finally:
        if launched.poll() is None:
            os.killpg(launched.pid, signal.SIGKILL)
    print(output)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("check", [check.__name__ for check in same_masks.CHECKS])
def test_ranks(outcomes, check):
    for rank, outcome in enumerate(outcomes):
        assert outcome.get(check, "did not run") == "", f"rank {rank}"
