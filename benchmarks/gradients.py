"""What travels between two ranks, and how long it takes, when gradients of pruned weights are not sent.

    python benchmarks/gradients.py [--rounds 5]      # as root, on Linux with iproute2

Two network namespaces of this machine stand for two hosts; the link between them carries 1 Gbit/s each way (tc's token
bucket). A model of 25 M weights is trained in both, in turns, by DistributedDataParallel as it is and by
`GradientSync`, at sparsity 0 and 0.9. An exchange lasts from the first bucket that is ready to the last that is back,
packing included; a step is forward, backward, optimizer. Bytes are those that the link's own counters saw; ratios are
of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import commit, machine, write
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distprune.pruning import GradientSync, OneShotSchedule, Pruner

HOSTS, LINKS, ADDRESSES = ("distprune-a", "distprune-b"), ("dpa", "dpb"), ("10.213.9.1", "10.213.9.2")
WIDTH, LAYERS, BATCH = 2048, 6, 8
RATE, SPARSITIES = "1gbit", (0.0, 0.9)
WAYS = {"ddp": None, "dense": False, "packed": True, "auto": None}
"""How gradients travel: as DDP has it, by the hook in full, packed, and as measuring chooses."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each way (default: 5)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--sparsities", help=argparse.SUPPRESS)
    parser.add_argument("--ways", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.worker:
        sparsities = [float(sparsity) for sparsity in words.sparsities.split(",")]
        worker(Path(words.worker), sparsities, words.ways.split(","), words.rounds)
        return
    found = over_link(RATE, SPARSITIES, list(WAYS), words.rounds)
    result = {"machine": machine(), "torch": torch.__version__, "commit": commit(), "rate": RATE, **found}
    print(write("gradients", result))
    for sparsity, ways in found["sparsities"].items():
        for way, one in ways.items():
            exchange = (
                f"{one['exchange_ms']:9.1f} ms, {one['exchange_ratio']:5.2f} times" if "exchange_ms" in one else ""
            )
            step = f"{one['step_ms']:8.1f} ms, {one['step_ratio']:.2f} times"
            print(f"sparsity {sparsity:4} {way:7}{one['mbytes']:8.1f} MB  step {step}  exchange {exchange}")


def over_link(rate: str, sparsities: Sequence[float], ways: Sequence[str], rounds: int) -> dict[str, Any]:
    """What two hosts find, with a link of this rate between them; ratios are to the ways `ddp` and `dense`."""
    remove()
    try:
        connect(rate)
        out = Path(__file__).with_name("results") / ".gradients.json"
        started = [start(rank, out, sparsities, ways, rounds) for rank in (0, 1)]
        if any(code for code in [process.wait(timeout=900) for process in started]):
            sys.exit("a rank has failed")
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        out.unlink()
    finally:
        remove()
    return found


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def connect(rate: str) -> None:
    """Two hosts, and a link between them."""
    for host in HOSTS:
        ip("netns", "add", host)
        ip("-n", host, "link", "set", "lo", "up")
    ip("link", "add", LINKS[0], "netns", HOSTS[0], "type", "veth", "peer", "name", LINKS[1], "netns", HOSTS[1])
    for host, link, address in zip(HOSTS, LINKS, ADDRESSES, strict=True):
        ip("-n", host, "address", "add", f"{address}/30", "dev", link)
        ip("-n", host, "link", "set", link, "up")
        tbf = ["tbf", "rate", rate, "burst", "1mb", "latency", "50ms"]
        subprocess.run(["tc", "-n", host, "qdisc", "add", "dev", link, "root", *tbf], check=True)


def remove() -> None:
    """Take the hosts away."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for host in HOSTS:
        if host in listed.split():
            ip("netns", "delete", host)


def start(
    rank: int, out: Path, sparsities: Sequence[float], ways: Sequence[str], rounds: int
) -> subprocess.Popen[bytes]:
    words = [sys.executable, __file__, "--worker", str(out), "--rounds", str(rounds)]
    words += ["--sparsities", ",".join(map(str, sparsities)), "--ways", ",".join(ways)]
    environment = {
        **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29511",
        "GLOO_SOCKET_IFNAME": LINKS[rank], "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.Popen(["ip", "netns", "exec", HOSTS[rank], *words], env=environment)


class Timed(GradientSync):
    """Notes how long the exchanges of a step last."""

    def _exchange(self, bucket: Any) -> Any:
        if bucket.index() == 0:
            self.began = time.perf_counter()
        return super()._exchange(bucket)

    def _unpack(self, buffer: Tensor, part: Tensor, places: Tensor | None, is_last: bool, done: Any) -> Tensor:
        unpacked = super()._unpack(buffer, part, places, is_last, done)
        self.ended = time.perf_counter()
        return unpacked


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())]
    return nn.Sequential(*layers)


def worker(out: Path, sparsities: Sequence[float], ways: Sequence[str], rounds: int) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {f"{sparsity:g}": compared(sparsity, ways, rounds) for sparsity in sparsities}
    if dist.get_rank() == 0:
        weights = WIDTH * WIDTH * LAYERS
        out.write_text(json.dumps({"weights": weights, "batch": BATCH, "sparsities": found}), encoding="utf-8")
    dist.destroy_process_group()


def compared(sparsity: float, ways: Sequence[str], rounds: int) -> dict[str, Any]:
    """Bytes and times of some ways, in turns."""
    made: dict[str, tuple[DistributedDataParallel, torch.optim.Optimizer, Timed | None]] = {}
    for way in ways:
        model = DistributedDataParallel(network())
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        sync = None
        pruner = Pruner(model, optimizer, OneShotSchedule(final=sparsity or 0.5, at=0 if sparsity else 1 << 30))
        if way != "ddp":
            sync = Timed(pruner, model, WAYS[way])
        made[way] = (model, optimizer, sync)
        pruner.step()
    images = torch.randn(BATCH, WIDTH)
    seen: dict[str, dict[str, list[float]]] = {way: {"step": [], "exchange": [], "bytes": []} for way in ways}
    before_rounds = 8 if "auto" in ways else 2  # eight to choose by
    for number in range(rounds + before_rounds):
        for way, (model, optimizer, sync) in made.items():
            dist.barrier()
            before, began = sent(), time.perf_counter()
            model(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            step = time.perf_counter() - began
            if number >= before_rounds:
                seen[way]["step"].append(step)
                seen[way]["bytes"].append(sent() - before)
                seen[way]["exchange"].append(float("nan") if sync is None else sync.ended - sync.began)
    result: dict[str, Any] = {}
    for way, one in seen.items():
        result[way] = {
            "mbytes": statistics.median(one["bytes"]) / 1e6,
            "step_ms": 1e3 * statistics.median(one["step"]),
        }
        if way != "ddp":
            result[way]["exchange_ms"] = 1e3 * statistics.median(one["exchange"])
        if "ddp" in ways:
            result[way]["step_ratio"] = ratio(seen["ddp"]["step"], one["step"])
        if "dense" in ways and way != "ddp":
            result[way]["exchange_ratio"] = ratio(seen["dense"]["exchange"], one["exchange"])
    return result


def ratio(base: list[float], own: list[float]) -> float:
    """How many times as fast, the median over rounds."""
    return statistics.median([theirs / mine for theirs, mine in zip(base, own, strict=True)])


def sent() -> int:
    """Bytes that this host has sent."""
    link = LINKS[dist.get_rank()]
    return int(Path(f"/sys/class/net/{link}/statistics/tx_bytes").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
