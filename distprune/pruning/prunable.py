"""Which tensors of a model are pruned, and where their elements lie among all prunable weights."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from distprune.pruning.collectives import Ranks
from distprune.pruning.shards import Part, flat, local

PRUNABLE_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
POSITION_WORDS = ("first", "last")


@dataclass(frozen=True)
class Prunable:
    """One prunable tensor and its place among all.

    The global index of an element is `offset` plus its row-major position in the unsharded tensor; offsets follow
    `named_parameters()`. `part` says what of it this rank holds.
    """

    name: str
    weight: nn.Parameter
    offset: int
    part: Part

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return self.weight.numel()

    @property
    def end(self) -> int:
        """The global index just behind the last element."""
        return self.offset + self.numel

    @property
    def local(self) -> Tensor:
        """This rank's part of the weight, on the same memory."""
        return local(self.weight)

    @property
    def unit(self) -> int:
        """How many weights each element that is selected on stands for."""
        return 1

    @property
    def held(self) -> int:
        """How many such elements this rank holds."""
        return self.local.numel()

    def indices(self, begin: int, end: int) -> Tensor:
        """Global indices (int64, 1-D) of the elements at `begin` to `end` of the local part in memory order."""
        return self.indices_at(torch.arange(begin, end, device=self.weight.device))

    def indices_at(self, places: Tensor) -> Tensor:
        """The same of elements at some places (int64, 1-D, overwritten) in memory order."""
        return self.part.indices_at(self.local, places).add_(self.offset)


@dataclass(frozen=True)
class Selection:
    """What is pruned, and which tensors of a prunable kind are not, with the reason (name -> reason)."""

    tensors: tuple[Prunable, ...]
    left_out: dict[str, str]

    @property
    def numel(self) -> int:
        """The number of prunable weights."""
        return sum(t.numel for t in self.tensors)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside `DistributedDataParallel` and `torch.compile`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def find_prunable(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    ranks: Ranks | None = None,
    unfit: Callable[[torch.Size, bool], str | None] | None = None,
) -> Selection:
    """Choose the tensors to prune.

    By default these are the weights of convolutions, linear layers and attention projections; a tensor that
    several modules share counts once. Frozen tensors are left out and named.

    Args:
        model: the model, wrapped or not; names are those of the unwrapped model.
        include: if given, only tensors that match one of these are pruned, of whatever kind. A pattern is a glob
            over parameter names (`layer1.*.weight`) or module names (`fc`), or `first` or `last`: the first or
            last tensor that is prunable by default.
        exclude: patterns of tensors to leave dense.
        embeddings: prune embedding tables, and weights tied to one, by default too.
        ranks: who prunes together; the default group where none is given.
        unfit: why tensors of a shape must be left out, if they must; told also whether it is that of a transposed
            convolution, (input, output, ...) and not (output, input, ...).

    Raises:
        ValueError: a pattern matches nothing (with the nearest name), nothing is left to prune, or a tensor is
            of a kind that cannot be pruned.
    """
    ranks = ranks or Ranks()
    reshard(model)
    model = unwrap(model)
    parameters = dict(model.named_parameters())
    default, left_out = prunable_by_default(model, embeddings)
    included = matching(include, parameters, default) if include else set(default)
    chosen = [name for name in parameters if name in included]
    left_out |= {name: "not included" for name in default if name not in chosen}
    excluded = matching(exclude, parameters, default)
    transposed = {id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvTransposeNd)}
    tensors: list[Prunable] = []
    offset = 0
    for name in chosen:
        weight = parameters[name]
        if name in excluded:
            left_out[name] = "excluded"
        elif not weight.requires_grad:
            left_out[name] = "frozen (requires_grad is False)"
        elif unfit is not None and (why := unfit(weight.shape, id(weight) in transposed)) is not None:
            left_out[name] = why
        else:
            tensors.append(Prunable(name, weight, offset, _part(name, weight, ranks)))
            offset += weight.numel()
    if not tensors:
        reasons = "; ".join(f"{n}: {r}" for n, r in left_out.items()) or "it has no conv or linear weight"
        raise ValueError(f"nothing to prune in {type(model).__name__}: {reasons}")
    pruned = {t.name for t in tensors}
    return Selection(tuple(tensors), {n: r for n, r in left_out.items() if n not in pruned})


def reshard(model: nn.Module) -> None:
    """Bring FSDP2's sharded parameters back: after a forward pass alone it shows and uses gathered copies of some."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def prunable_by_default(model: nn.Module, embeddings: bool) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """Tensors by name in the order of `named_parameters()`, and those left out because of embeddings."""
    weights: set[int] = set()
    tables: set[int] = set()
    sparse: set[int] = set()
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            weights.add(id(module.weight))
        elif hasattr(module, "in_proj_weight"):  # nn.MultiheadAttention, or what takes its place with fewer heads
            names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            weights.update(id(w) for n in names if (w := getattr(module, n, None)) is not None)
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            tables.add(id(module.weight))
            if module.sparse:
                sparse.add(id(module.weight))
    default: dict[str, nn.Parameter] = {}
    left_out: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in tables and not embeddings:
            left_out[name] = "an embedding (embeddings=True prunes it)"
        elif id(parameter) in sparse:
            left_out[name] = "an embedding with sparse gradients (sparse=False prunes it)"
        elif id(parameter) in weights | tables:
            default[name] = parameter
    return default, left_out


def matching(patterns: Sequence[str], names: Iterable[str], default: Iterable[str]) -> set[str]:
    """Those of `names` that match a pattern, see `find_prunable`; `first` and `last` are of `default`.

    Raises:
        ValueError: a pattern matches nothing; the message has the nearest name.
    """
    if isinstance(patterns, str):
        raise ValueError(f"patterns must be a list, got the text {patterns!r}; write [{patterns!r}]")
    ordered = list(default)
    modules = {n: n.rpartition(".")[0] for n in names}
    matched: set[str] = set()
    for pattern in patterns:
        if pattern in POSITION_WORDS:
            hits = set(ordered[:1] if pattern == "first" else ordered[-1:])
        else:
            hits = {n for n, m in modules.items() if fnmatchcase(n, pattern) or (m and fnmatchcase(m, pattern))}
        if not hits:
            known = [*modules, *modules.values(), *POSITION_WORDS]
            near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"pattern {pattern!r} matches no parameter{hint}")
        matched |= hits
    return matched


def _part(name: str, weight: nn.Parameter, ranks: Ranks) -> Part:
    """What of `weight` this rank holds, if it is of a kind that can be pruned."""
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{name} has no shape yet: run the lazy model once before pruning it")
    if weight.dtype not in PRUNABLE_DTYPES:
        kinds = ", ".join(sorted(str(d).removeprefix("torch.") for d in PRUNABLE_DTYPES))
        raise ValueError(f"{name} has dtype {weight.dtype}; prunable are {kinds}. Exclude it to leave it dense")
    try:
        flat(local(weight))
    except RuntimeError:
        raise ValueError(f"{name} is a strided view with gaps or overlaps; make it contiguous first") from None
    try:
        return Part.of(weight, ranks)
    except ValueError as error:
        raise ValueError(f"{name} cannot be pruned: {error}") from None
