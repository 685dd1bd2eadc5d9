"""How long an update of the masks takes, beside what else prunes globally, and beside one read of the weights.

    python benchmarks/update.py [--weights resnet50,100M] [--rounds 9] [--device cuda]

An update is all that `Pruner.step()` does at an update of a gradual schedule: scores, the exact threshold, masks,
weights and one momentum buffer zeroed, masks counted and compared. Peers: `torch.nn.utils.prune.global_unstructured`
with magnitudes to the same sparsity, and concatenation, `kthvalue` (`sort` and `topk` too on a GPU), masks and zeroing
of the same tensors in plain torch. All run in turns in one process; ratios are of the same round. Memory is the most
that an update or a peer holds beside what is there before, by torch's profiler or CUDA's allocator, masks not counted.
Figures of a GPU go to results/update_gpu.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from common import commit, machine, synchronize, write
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.profiler import ProfilerActivity, profile

from distprune import CubicSchedule, Pruner

STEPS = 100
FINAL = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="resnet50,100M", help="models (default: resnet50,100M)")
    parser.add_argument("--rounds", type=int, default=9, help="of each (default: 9)")
    parser.add_argument("--device", default="cpu", help="where the weights are (default: cpu)")
    parser.add_argument("--no-write", action="store_true", help="leave the results as they are")
    words = parser.parse_args()
    found = {name: measured(MODELS[name]().to(words.device), words.rounds) for name in words.weights.split(",")}
    result = {
        "machine": {**machine(words.device), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "commit": commit(),
        "models": found,
    }
    if not words.no_write:
        print(write("update" if words.device == "cpu" else "update_gpu", result))
    for name, figures in found.items():
        print(f"{name}, {figures['weights']:,} weights")
        for form, one in figures["forms"].items():
            ratio = figures["ratios"].get(form)
            told = "" if ratio is None else f"  {ratio['median']:7.1f} ({ratio['low']:.1f}-{ratio['high']:.1f}) times"
            print(f"  {form:22}{one['median_ms']:10.1f} ms  {one['bytes_per_weight']:6.2f} bytes a weight{told}")


def spread(model: nn.Module) -> nn.Module:
    """Draw weights of which no layer is emptied: each output channel has a size of its own."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                sizes = torch.exp(0.3 * torch.randn(len(weight), *[1] * (weight.dim() - 1)))
                weight.copy_(0.02 * torch.randn_like(weight) * sizes)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: spread(torchvision.models.resnet50()),
    "100M": lambda: spread(nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(6)))),
    "tiny": lambda: spread(nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(6)))),
}


def measured(model: nn.Module, rounds: int) -> dict[str, Any]:
    """Times by form, of so many rounds in the last part of a schedule, and ratios to those of an update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for weight in model.parameters():
        optimizer.state[weight]["momentum_buffer"] = torch.randn_like(weight)
    schedule = CubicSchedule(final=FINAL, begin=0, end=STEPS, every=1)
    pruner = Pruner(model, optimizer, schedule)
    tensors = [tensor.weight.detach() for tensor in pruner.tensors]
    buffers = [optimizer.state[tensor.weight]["momentum_buffer"] for tensor in pruner.tensors]
    sparsity, step = 0.0, STEPS // 2 - 1

    def update() -> None:
        nonlocal sparsity
        pruner._steps_done = step
        report = pruner.step()
        assert report is not None
        assert report.newly_pruned > 0
        sparsity = report.sparsity

    forms: dict[str, Callable[[], object]] = {
        "update": update,
        "read (sum)": lambda: torch.stack([weight.sum() for weight in tensors]).tolist(),
        "concat + kthvalue": lambda: by_hand(tensors, buffers, sparsity, kthvalue),
        "global_unstructured": lambda: peer(tensors, sparsity),
    }
    if tensors[0].is_cuda:
        forms["concat + sort"] = lambda: by_hand(tensors, buffers, sparsity, by_sort)
        forms["concat + topk"] = lambda: by_hand(tensors, buffers, sparsity, by_topk)
    times: dict[str, list[float]] = {form: [] for form in forms}
    memory = {}
    for number in range(rounds + 1):
        step += 1
        for form, run in forms.items():
            if number == 0:
                memory[form] = peak_on_gpu(run) if tensors[0].is_cuda else peak(run)
                continue
            synchronize(tensors[0].device)
            began = time.perf_counter()
            run()
            synchronize(tensors[0].device)
            times[form].append(time.perf_counter() - began)
    ratios = {
        form: quantiles([own / ours for own, ours in zip(times[form], times["update"], strict=True)])
        for form in forms
        if form != "update"
    }
    ratios["update"] = quantiles([a / b for a, b in zip(times["update"], times["read (sum)"], strict=True)])
    return {
        "weights": pruner.weights,
        "forms": {
            form: {
                "median_ms": 1e3 * statistics.median(own),
                "bytes_per_weight": memory[form] / pruner.weights,
            }
            for form, own in times.items()
        },
        "ratios": ratios,
    }


def by_hand(
    tensors: list[Tensor], buffers: list[Tensor], sparsity: float, kth: Callable[[Tensor, int], Tensor]
) -> list[Tensor]:
    """What one would write by hand; ties may go one way or the other."""
    scores = torch.cat([weight.abs().flatten() for weight in tensors])
    threshold = kth(scores, round(sparsity * len(scores)))
    masks = [weight.abs() > threshold for weight in tensors]
    for weight, buffer, mask in zip(tensors, buffers, masks, strict=True):
        weight.mul_(mask)
        buffer.mul_(mask)
    return masks


def kthvalue(scores: Tensor, k: int) -> Tensor:
    return scores.kthvalue(k).values


def by_sort(scores: Tensor, k: int) -> Tensor:
    return scores.sort().values[k - 1]


def by_topk(scores: Tensor, k: int) -> Tensor:
    return scores.topk(len(scores) - k + 1, sorted=False).values.min()


def peer(tensors: list[Tensor], sparsity: float) -> None:
    """On modules of its own, since it replaces parameters; they share memory with the model."""
    modules = [nn.Module() for _ in tensors]
    for module, weight in zip(modules, tensors, strict=True):
        module.weight = nn.Parameter(weight)  # of the same memory
    prune.global_unstructured(
        [(module, "weight") for module in modules], pruning_method=prune.L1Unstructured, amount=sparsity
    )


def peak(run: Callable[[], object]) -> int:
    """Bytes held at most beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    del kept
    held = most = 0
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def peak_on_gpu(run: Callable[[], object]) -> int:
    """The same of a GPU."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    del kept
    return torch.cuda.max_memory_allocated() - before


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "low": tenths[0], "high": tenths[-1]}


if __name__ == "__main__":
    main()
