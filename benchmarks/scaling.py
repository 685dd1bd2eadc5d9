"""How an update, and a training step, depend on the number of ranks, the size of the model, the link and the sparsity.

    python benchmarks/scaling.py [--rounds 9] [--largest 1000] [--parts update,traffic,work,links]

Parts:
    update    an update on one rank and on two replicas (one thread each), in turns in one launch
    traffic   bytes handed to collectives in an update of shards on two ranks, by millions of weights up to --largest;
              1000 of them take 12 GB of memory
    work      weights that the busiest of 1 to 64 replicas looks at to find the threshold of ResNet-50
    links     steps of `gradients.py` over links of several rates, at several sparsities; as root, and on Linux

`page.py` fits the model of `docs/scaling.md` to the last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from common import RESULTS, commit, machine, write
from gradients import over_link
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from update import MODELS

from distprune.pruning import CubicSchedule, Pruner
from distprune.pruning.collectives import Ranks
from distprune.pruning.prunable import find_prunable
from distprune.pruning.threshold import share

PARTS = ("update", "traffic", "work", "links")
RANKS = (1, 2, 4, 8, 16, 32, 64)
MILLIONS = (1, 10, 100, 1000)
COLUMNS = 1000
RATES = ("200mbit", "1gbit", "5gbit")
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of each (default: 9)")
    parser.add_argument("--largest", type=int, default=1000, help="millions of weights (default: 1000)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which (default: {','.join(PARTS)})")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.worker:
        worker(Path(words.worker), words.parts.split(","), words.rounds, words.largest)
        return
    parts = words.parts.split(",")
    path = RESULTS / "scaling.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    measured: dict[str, Any] = {}
    if on_ranks := [part for part in parts if part in ("update", "traffic")]:
        measured |= launched(on_ranks, words.rounds, words.largest)
    if "work" in parts:
        measured["work"] = {str(ranks): busiest(ranks) for ranks in RANKS}
    if "links" in parts:
        measured["links"] = {rate: over_link(rate, SPARSITIES, ["packed"], words.rounds) for rate in RATES}
    origin = {"machine": machine(), "torch": torch.__version__, "commit": commit()}
    found |= {part: {**origin, "figures": figures} for part, figures in measured.items()}
    print(write("scaling", {"parts": found}))
    print(json.dumps(measured, indent=1))


def launched(parts: list[str], rounds: int, largest: int) -> dict[str, Any]:
    """What two ranks find."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        words += ["--worker", str(out), "--parts", ",".join(parts), "--rounds", str(rounds), "--largest", str(largest)]
        subprocess.run(words, check=True)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def worker(out: Path, parts: list[str], rounds: int, largest: int) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    if "update" in parts:
        found["update"] = {name: compared(name, rounds) for name in ("resnet50", "100M")}
    if "traffic" in parts:
        found["traffic"] = {str(size): traffic(size) for size in MILLIONS if size <= largest}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def compared(name: str, rounds: int) -> dict[str, Any]:
    """Updates by one rank while the other waits, and by both."""
    alone: Any = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    pruners = {}
    for ranks, group in (("1", alone), ("2", dist.group.WORLD)):
        model = MODELS[name]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        for weight in model.parameters():
            optimizer.state[weight]["momentum_buffer"] = torch.randn_like(weight)
        pruners[ranks] = Pruner(model, optimizer, CubicSchedule(0.9, begin=0, end=100, every=1), group=group)
    times: dict[str, list[float]] = {"1": [], "2": []}
    for step in range(50, 51 + rounds):
        for ranks, pruner in pruners.items():
            dist.barrier()
            began = time.perf_counter()
            if ranks == "2" or dist.get_rank() == 0:
                pruner._steps_done = step
                assert pruner.step() is not None
            dist.barrier()
            if step > 50:
                times[ranks].append(time.perf_counter() - began)
    low, median, high = statistics.quantiles([a / b for a, b in zip(times["1"], times["2"], strict=True)], n=4)
    medians = {ranks: 1e3 * statistics.median(own) for ranks, own in times.items()}
    return {"ms": medians, "faster": median, "low": low, "high": high}


def traffic(millions: int) -> dict[str, int]:
    """Collectives of one update of so many weights, half on each rank."""
    torch.manual_seed(dist.get_rank())
    rows = millions * 1000
    shard = torch.randn(rows // 2, COLUMNS).mul_(0.02)
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(COLUMNS, 1, bias=False)
    model.weight = nn.Parameter(DTensor.from_local(shard, mesh, [Shard(0)], run_check=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(model, optimizer, CubicSchedule(0.9, begin=0, end=100, every=1))
    pruner._steps_done = 50
    calls = 0
    sent = 0
    reduce = dist.all_reduce

    def counted(values: Tensor, *words: Any, **named: Any) -> Any:
        nonlocal calls, sent
        calls, sent = calls + 1, sent + values.nbytes
        return reduce(values, *words, **named)

    with patch.object(dist, "all_reduce", counted):
        report = pruner.step()
    assert report is not None
    return {"collectives": calls, "bytes": sent, "zeros": report.zeros}


class Simulated(Ranks):
    """One of many ranks, that talks to nobody."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank = rank
        self.world_size = world_size


def busiest(ranks: int) -> int:
    """Weights that the busiest of so many replicas looks at to find the threshold."""
    with torch.device("meta"):
        model = MODELS["resnet50"]()
    shares = (share(find_prunable(model, ranks=Simulated(rank, ranks)).tensors) for rank in range(ranks))
    return max(sum(stop - start for _, start, stop in pieces) for pieces in shares)


if __name__ == "__main__":
    main()
