"""What a model costs: multiply-accumulates of its layers for one sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from distprune.structured.attention import ThinAttention
from distprune.structured.channels import Work
from distprune.structured.example import run, tensors
from distprune.structured.trace import CONVOLUTIONS


def measure(model: nn.Module, example: Any) -> list[Work]:
    """Run the model once, and count the multiply-accumulates of its layers."""
    macs: dict[tuple[str, tuple[int, ...]], int] = {}
    batch = len(next(iter(tensors(example))))

    def count(name: str, dims: tuple[int, ...], amount: int) -> None:
        macs[name, dims] = macs.get((name, dims), 0) + amount

    def convolution(name: str, module: Any, inputs: Sequence[Tensor], output: Tensor) -> None:
        passes = inputs[0] if module.transposed else output
        count(f"{name}.weight" if name else "weight", (0, 1), passes.numel() * module.weight[0].numel())

    def linear(name: str, module: Any, inputs: Sequence[Tensor], output: Tensor) -> None:
        if name not in projections:
            count(f"{name}.weight" if name else "weight", (0, 1), output.numel() * module.in_features)

    def attention(name: str, module: Any, inputs: Sequence[Tensor], output: Any) -> None:
        query, key = inputs[:2]
        queries, keys = query.numel() // module.embed_dim, key.numel() // module.embed_dim
        seen = key.shape[-2 if module.batch_first else 0]
        inner = module.num_heads * module.head_dim
        rows = f"{name}.in_proj_weight"
        count(rows, (0,), (queries + 2 * keys) * module.embed_dim * inner + 2 * queries * seen * inner)
        count(f"{name}.out_proj.weight", (1,), queries * module.embed_dim * inner)

    kinds = (nn.MultiheadAttention, ThinAttention)
    projections = {f"{name}.out_proj" for name, module in model.named_modules() if isinstance(module, kinds)}
    counters = ((CONVOLUTIONS, convolution), (nn.Linear, linear), (kinds, attention))
    hooks = []
    for name, module in model.named_modules():
        for kind, counter in counters:
            if isinstance(module, kind):
                hooks.append(
                    module.register_forward_hook(
                        lambda m, args, kwargs, output, name=name, counter=counter: counter(
                            name, m, [*args, *kwargs.values()], output
                        ),
                        with_kwargs=True,
                    )
                )
    try:
        run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return [Work(name, dims, amount // batch) for (name, dims), amount in macs.items()]
