"""How checks run on several gloo ranks: a script lists them, and one launch runs them all.

    python -m torch.distributed.run --standalone --nproc-per-node N SCRIPT FOLDER

with the repository on PYTHONPATH. Each rank runs every check, and writes to FOLDER/<rank>.json what went wrong, by
check, and "" where nothing did.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from distprune.pruning import bracket

ROOT = Path(__file__).parents[2]
MIB = 2**20


def launch(script: str, ranks: int, folder: Path) -> list[dict[str, str]]:
    """What each of `ranks` ranks found, from one launch of `script`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)
    launched = subprocess.Popen(
        [*command, script, str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = launched.communicate(timeout=480)
    finally:
        if launched.poll() is None:
            os.killpg(launched.pid, signal.SIGKILL)
    print(output)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def run_checks(checks: Sequence[Callable], folder: Path) -> None:
    """On each rank: call the checks, each with a process group of this rank alone."""
    torch.set_num_threads(1)
    bracket.SMALL, bracket.MOST_INSIDE = 0, 1  # the smallest models, too, are searched as large ones are
    dist.init_process_group("gloo", timeout=timedelta(seconds=180))
    own_groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    outcome = {}
    for check in checks:
        torch.manual_seed(0)
        try:
            check(own_groups[dist.get_rank()])
            outcome[check.__name__] = ""
        except Exception:
            outcome[check.__name__] = traceback.format_exc()
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(outcome))
        dist.barrier()
    dist.destroy_process_group()


def from_all_ranks(value) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def messages_of(error: type[Exception], act: Callable) -> list[str]:
    """The messages of the errors that `act` raises, by rank."""
    message = "no error"
    try:
        act()
    except error as raised:
        message = str(raised)
    return from_all_ranks(message)


def bits(tensors: Iterable[torch.Tensor]) -> str:
    """A fingerprint of the bytes of `tensors`."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


class Traffic(TorchDispatchMode):
    """Counts the collectives that run inside, whichever function started them, and the bytes handed to them."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()
        self.bytes = 0

    @property
    def calls(self) -> int:
        return sum(self.kinds.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = func._schema.name.split("::")[1].strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and kind != "wait_tensor":
            self.kinds[kind] += 1
            for arg in torch.utils._pytree.tree_leaves((args, kwargs)):
                self.bytes += arg.nbytes if isinstance(arg, torch.Tensor) else 0
        return func(*args, **(kwargs or {}))
