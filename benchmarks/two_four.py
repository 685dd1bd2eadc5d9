"""Linear layers with 2:4 weights on sparse tensor cores, beside the same layers dense, into results/two_four.json.

    python benchmarks/two_four.py [--rounds 5]

The layers are those of ViT-B/16, BERT-large and a Llama of 7 B; weights are pruned to 2:4 by `Pruner` with `NM(2, 4)`.
Half precision; kernels of cuSPARSELt and CUTLASS, in turns with dense ones, each timed as one eager call. Where there
is no such GPU nothing is measured, and only the weights are made and looked at.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from common import commit, machine, write
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from distprune.errors import ConfigError
from distprune.export.two_four import fits, need_gpu, time_layer
from distprune.pruning import NM, OneShotSchedule, Pruner

LAYERS = {"ViT-B/16": (768, 3072), "BERT-large": (1024, 4096), "Llama 7 B": (4096, 11008)}
"""Inputs and outputs."""
ROWS = (64, 1024, 8192)
KERNELS = {"cusparselt": SparseSemiStructuredTensorCUSPARSELT, "cutlass": SparseSemiStructuredTensorCUTLASS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each (default: 5)")
    words = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        need_gpu(device)
    except ConfigError:
        for inputs, outputs in LAYERS.values():
            assert fits(pruned(inputs, outputs, device).weight)
        print("not measured: it needs an NVIDIA GPU with sparse tensor cores (compute capability 8.0 or newer)")
        return
    found = {
        f"{name}, {rows} rows": compared(*shape, rows, device, words.rounds)
        for name, shape in LAYERS.items()
        for rows in ROWS
    }
    for name, one in found.items():
        told = ", ".join(f"{kernel} {one[kernel]}" for kernel in KERNELS)
        print(f"{name:24} dense {one['dense_ms']:.3f} ms; as fast by {told}")
    print(
        write("two_four", {"machine": machine("cuda"), "torch": torch.__version__, "commit": commit(), "layers": found})
    )


def pruned(inputs: int, outputs: int, device: torch.device) -> nn.Linear:
    """A layer with two zeros in each four inputs."""
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    Pruner(layer, optimizer, OneShotSchedule(final=0.5, at=0), pattern=NM(2, 4)).step()
    return layer


def compared(inputs: int, outputs: int, rows: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of the dense layer, and how many times as fast the kernels are; why one cannot run."""
    layers = {"dense": pruned(inputs, outputs, device).half()}
    images = torch.randn(rows, inputs, device=device, dtype=torch.half)
    result: dict[str, Any] = {}
    for kernel, kind in KERNELS.items():
        try:
            layer = pruned(inputs, outputs, device).half()
            layer.weight = nn.Parameter(kind.from_dense(layer.weight.detach()), requires_grad=False)
            layer(images)
            layers[kernel] = layer
        except (RuntimeError, ValueError, NotImplementedError) as error:
            result[kernel] = str(error)
    times = [{name: time_layer(layer, images) for name, layer in layers.items()} for _ in range(rounds)]
    result["dense_ms"] = statistics.median(one["dense"] for one in times)
    for kernel in layers.keys() - {"dense"}:
        result[kernel] = round(statistics.median(one["dense"] / one[kernel] for one in times), 3)
    return result


if __name__ == "__main__":
    main()
