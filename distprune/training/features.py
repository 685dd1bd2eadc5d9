"""Outputs of modules of the student that are drawn to those of its teachers (FitNets, Romero et al. 2015)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distprune.config.schema import Distill, Feature
from distprune.errors import ConfigError
from distprune.pruning.prunable import unwrap
from distprune.training.student import Student


class Taps:
    """Takes the outputs of modules of a model that runs while the taps are open: `with taps: model(images)`.

    They are copied, since a module that follows may change them in place. Hooks stay on the modules and do nothing
    while the taps are shut; make taps before the model first runs compiled, which takes hooks as they are then.

    Args:
        model: wrapped or not.
        names: of modules, as in `named_modules()` of the bare model, each with the setting that asks for it.

    Raises:
        ConfigError: the model has no module of a name.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, str]) -> None:
        model = unwrap(model)
        modules = dict(model.named_modules())
        faults = [_unknown(key, name, modules) for name, key in names.items() if name not in modules]
        if faults:
            raise ConfigError(*faults)
        self._names = dict(names)
        self._open = False
        self._outputs: dict[str, object] = {}
        self._hooks = [modules[name].register_forward_hook(partial(self._keep, name)) for name in names]

    def __enter__(self) -> None:
        self._outputs.clear()
        self._open = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open = False

    def take(self) -> dict[str, Tensor]:
        """What the modules returned while the taps were last open, in float32, by name. It can be taken once.

        Of a tuple it is the first tensor, and of what has a `last_hidden_state` that; of a module that was called more
        than once, the last.

        Raises:
            ConfigError: a module was not called, or its output has no tensor of floats.
        """
        outputs = {n: o for n, o in self._outputs.items() if isinstance(o, Tensor) and o.is_floating_point()}
        faults = [
            f"{key}: {name!r} was called and returned a {type(self._outputs[name]).__name__}, not a tensor of floats"
            if name in self._outputs
            else f"{key}: {name!r} is not called when the model runs"
            for name, key in self._names.items()
            if name not in outputs
        ]
        self._outputs.clear()
        if faults:
            raise ConfigError(*faults)
        return outputs

    def remove(self) -> None:
        """Take the hooks off the modules."""
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str, _module: nn.Module, _inputs: object, output: object) -> None:
        if self._open:
            found = _first_tensor(output)
            if isinstance(found, Tensor) and found.is_floating_point():
                found = found.to(torch.float32, copy=True)
            self._outputs[name] = found


class Projections(nn.Module):
    """A learned linear map over channels for each pair of widths that differ; a 1 x 1 convolution is the same thing.

    FitNets calls them regressors.

    Args:
        widths: channels of student and teacher for each feature.
    """

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        for index, (own, theirs) in enumerate(widths):
            if own != theirs:
                self.add_module(str(index), nn.Linear(own, theirs))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Map each (rows, own channels) to (rows, their channels); keys are the numbers of features.

        Rows, since FSDP2 warns of modules that return views, as linear layers do of three dimensions.
        """
        return {index: self.get_submodule(index)(rows) for index, rows in features.items()}

    @property
    def own_widths(self) -> dict[str, int]:
        """Channels that come in, for each feature that is projected."""
        return {index: layer.in_features for index, layer in self.named_children() if isinstance(layer, nn.Linear)}


class FeatureLoss:
    """The weighted sum of distances between features of a student and of its teachers.

    Args:
        features: what is matched, and how.
        student: taps of the student.
        teachers: taps of each teacher.
        projections: as wrapped for training.
        projected: the numbers of the features that are projected.
        model: the student.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        student: Taps,
        teachers: Sequence[Taps],
        projections: nn.Module,
        projected: Collection[str],
        model: Student,
    ) -> None:
        self._features = features
        self._student = student
        self._teachers = teachers
        self._projections = projections
        self._projected = projected
        self._model = model

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Where student and teachers run on the same images."""
        with ExitStack() as stack:
            for taps in (self._student, *self._teachers):
                stack.enter_context(taps)
            yield

    def loss(self) -> Tensor:
        """The sum for the batch that was just watched, a scalar."""
        own, theirs = self._student.take(), [taps.take() for taps in self._teachers]
        pairs = [align(own[f.student], theirs[f.of][f.teacher]) for f in self._features]
        model = self._model.wrapped
        if isinstance(self._projections, DistributedDataParallel) and isinstance(model, DistributedDataParallel):
            # Of several micro-batches the last averages gradients over ranks; no_sync tells the student which it is.
            self._projections.require_backward_grad_sync = model.require_backward_grad_sync
        rows = {str(index): student.flatten(0, 1) for index, (student, _) in enumerate(pairs)}
        rows |= self._projections({index: rows[index] for index in self._projected})
        losses = [
            feature.weight * DISTANCES[feature.loss](student.float(), teacher.flatten(0, 1))
            for feature, student, (_, teacher) in zip(self._features, rows.values(), pairs, strict=True)
        ]
        return torch.stack(losses).sum()


def align(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two features of shape (B, C), (B, C, H, W) or (B, T, C) to (B, positions, C) with as many positions.

    Of two maps each is averaged to the smaller height and width of the two (adaptive average pooling). Where else
    positions differ in number or in kind, both are averaged over all of them.
    """
    same_kind = student.dim() == teacher.dim()
    if same_kind and student.dim() == 4:
        size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
        student, teacher = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
    student, teacher = _positions(student), _positions(teacher)
    if not same_kind or student.shape[1] != teacher.shape[1]:
        return student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    return student, teacher


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine over channels (last dimension), mean over all others."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "cosine": cosine_distance}


def student_taps(distill: Distill | None, model: nn.Module) -> tuple[Taps, Taps]:
    """Taps of what is matched of the student, and of what of it, as it is before pruning, is matched as teacher.

    Raises:
        ConfigError: see `Taps`.
    """
    if distill is None:
        return Taps(model, {}), Taps(model, {})
    own = {f.student: f"distill.features.{i}.student" for i, f in enumerate(distill.features)}
    return Taps(model, own), teacher_taps(distill, distill.dense, model)


def teacher_taps(distill: Distill | None, key: str | None, teacher: nn.Module) -> Taps:
    """Taps of what is matched of the teacher that the setting `key` names.

    Raises:
        ConfigError: see `Taps`.
    """
    if distill is None:
        return Taps(teacher, {})
    keys, features = list(distill.teachers), enumerate(distill.features)
    return Taps(teacher, {f.teacher: f"distill.features.{i}.teacher" for i, f in features if keys[f.of] == key})


def feature_widths(
    distill: Distill | None, student: Taps, dense: Taps, taught: Mapping[str, Mapping[str, Tensor]], batch: int
) -> list[tuple[int, int]]:
    """Channels of student and teacher for each feature, after all have run on the same images.

    Args:
        distill: says what is matched.
        student, dense: see `student_taps`.
        taught: what modules of the other teachers gave, by the setting that names the teacher.
        batch: how many images there were.

    Raises:
        ConfigError: a module's output is of no shape that can be matched, or see `Taps.take`.
    """
    if distill is None:
        return []
    own, theirs = student.take(), dense.take()
    teachers = [taught.get(key, theirs) for key in distill.teachers]
    pairs = [(own[f.student], teachers[f.of][f.teacher]) for f in distill.features]
    faults = [
        f"distill.features.{index}.{side}: {getattr(feature, side)!r} returns shape {tuple(output.shape)} for {batch} "
        "images; it must be (batch, channels), (batch, channels, height, width) or (batch, tokens, channels)"
        for index, (feature, pair) in enumerate(zip(distill.features, pairs, strict=True))
        for side, output in zip(("student", "teacher"), pair, strict=True)
        if output.dim() not in (2, 3, 4) or len(output) != batch
    ]
    if faults:
        raise ConfigError(*faults)
    return [(_positions(student).shape[2], _positions(teacher).shape[2]) for student, teacher in pairs]


def _positions(feature: Tensor) -> Tensor:
    """(B, positions, C) of a feature of any shape."""
    if feature.dim() == 2:
        return feature.unsqueeze(1)
    return feature.flatten(2).transpose(1, 2) if feature.dim() == 4 else feature


def _first_tensor(output: object) -> object:
    """What is matched of an output that may have several parts; the output itself where it has no tensor."""
    if isinstance(output, Tensor):
        return output
    name = "last_hidden_state"
    hidden = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if hidden is not None:
        return hidden
    parts = output if isinstance(output, (tuple, list)) else ()
    return next((part for part in parts if isinstance(part, Tensor)), output)


def _unknown(key: str, name: str, modules: Mapping[str, nn.Module]) -> str:
    known = [other for other in modules if other]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known[:20])}"
    return f"{key}: {type(modules['']).__name__.removeprefix('FSDP')} has no module {name!r}; {hint}"
