"""What a model costs: multiply-accumulates of its layers for one sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distprune.structured.channels import Work
from distprune.structured.example import run, tensors
from distprune.structured.trace import CONVOLUTIONS


def measure(model: nn.Module, example: Any) -> list[Work]:
    """Run the model once, and count the multiply-accumulates of its layers."""
    macs: dict[tuple[str, tuple[int, ...]], int] = {}
    batch = len(next(iter(tensors(example))))

    def count(name: str, dims: tuple[int, ...], amount: int) -> None:
        macs[name, dims] = macs.get((name, dims), 0) + amount

    def convolution(name: str, module: Any, inputs: Any, output: Tensor) -> None:
        passes = inputs[0] if module.transposed else output
        count(f"{name}.weight" if name else "weight", (0, 1), passes.numel() * module.weight[0].numel())

    def linear(name: str, module: Any, inputs: Any, output: Tensor) -> None:
        count(f"{name}.weight" if name else "weight", (0, 1), output.numel() * module.in_features)

    def attention(name: str, module: Any, inputs: Any, output: Any) -> None:
        queries, keys = inputs[0].numel() // module.embed_dim, inputs[1].numel() // module.embed_dim
        seen = inputs[1].shape[1 if module.batch_first else 0]
        rows = f"{name}.in_proj_weight"
        count(rows, (0,), (queries + 2 * keys) * module.embed_dim**2 + 2 * queries * seen * module.embed_dim)
        count(f"{name}.out_proj.weight", (1,), queries * module.embed_dim**2)

    counters = ((CONVOLUTIONS, convolution), (nn.Linear, linear), (nn.MultiheadAttention, attention))
    hooks = []
    for name, module in model.named_modules():
        for kinds, counter in counters:
            if isinstance(module, kinds):
                hooks.append(
                    module.register_forward_hook(lambda m, i, o, name=name, counter=counter: counter(name, m, i, o))
                )
    try:
        run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return [Work(name, dims, amount // batch) for (name, dims), amount in macs.items()]
