"""What is wrong with keys of a configuration that are each right by themselves."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import get_args

from distprune.config.schema import (
    ALLOCATIONS,
    HF,
    SCHEDULES,
    SCORES,
    SGD,
    CausalLM,
    Channels,
    Config,
    CorruptionKind,
    Data,
    Length,
    Phase,
    Phases,
    Prune,
    Teacher,
    TextClassification,
    Texts,
)
from distprune.entries import near


def combination_faults(config: Config) -> list[str]:
    """All faults, one line each."""
    faults = [*_phase_faults(config), *_prune_faults(config), *_rounds_faults(config), *_teacher_faults(config)]
    faults += _image_faults(config, config.data) if isinstance(config.data, Data) else _text_faults(config, config.data)
    optimizer = config.optimizer
    if isinstance(optimizer, SGD) and optimizer.nesterov and optimizer.momentum == 0:
        faults.append("optimizer.nesterov: needs a momentum above 0; set optimizer.momentum")
    if config.run.device == "cpu" and config.run.precision == "fp16":
        faults.append("run.precision: fp16 needs a GPU; take bf16 or fp32 with run.device=cpu")
    if config.tracking.wandb.mode in ("online", "offline") and find_spec("wandb") is None:
        faults.append(
            f"tracking.wandb.mode: {config.tracking.wandb.mode} takes wandb, which is not installed; pip install "
            "wandb, or set tracking.wandb.mode=disabled"
        )
    faults += _set_faults(config)
    if config.train.accumulate > config.train.batch_size:
        faults.append(
            f"train.accumulate: {config.train.accumulate} micro-batches cannot share train.batch_size "
            f"{config.train.batch_size}; lower it"
        )
    return faults


def _set_faults(config: Config) -> list[str]:
    faults = []
    for name in config.eval.sets:
        if name in ("top1", "loss", "samples", "perplexity"):
            faults.append(f"eval.sets.{name}: eval/{name} is a figure of data.eval_split; choose another name")
        elif name == "eval":
            faults.append("eval.sets.eval: is the name of data.eval_split; choose another")
        elif config.eval.corruptions and re.fullmatch(rf"({'|'.join(get_args(CorruptionKind))})-[1-3]", name):
            faults.append(f"eval.sets.{name}: is the name of a set of eval.corruptions; choose another")
    if config.eval.corruptions and not isinstance(config.data, Data):
        faults.append("eval.corruptions: corrupts images, and data.task is of texts; leave it out")
    return faults


def _image_faults(config: Config, data: Data) -> list[str]:
    faults = []
    names: dict[str, str | None] = {"model": config.model.name}
    for key, teacher in config.distill.teachers.items() if config.distill is not None else ():
        names[key] = teacher.name if isinstance(teacher, Teacher) else None
    for key, name in names.items():
        if name is not None and name.startswith(HF):
            faults.append(
                f"{key}.name: {name} takes texts; set data.task to text_classification or causal_lm, or take one "
                "of images"
            )
    if data.source == "digits" and data.path is not None:
        faults.append("data.path: digits ships with scikit-learn and takes no path; leave it out")
    if data.source != "digits" and data.path is None:
        faults.append(f"data.path: source {data.source} needs one; set data.path")
    if data.source == "tensors" and data.storage == "stream":
        faults.append("data.storage: stream decodes images, and tensors are decoded; leave it out")
    if data.storage == "device" and data.workers:
        faults.append("data.workers: data.storage=device has none, for eval.corruptions neither; set data.workers=0")
    if len(data.mean) not in (1, 3):
        faults.append(f"data.mean: has {len(data.mean)} values; give 1 to read images as grey, or 3 as RGB")
    if len(data.mean) != len(data.std):
        faults.append(f"data.mean: {len(data.mean)} values, but data.std has {len(data.std)}; give as many of each")
    return faults


def _text_faults(config: Config, data: Texts) -> list[str]:
    faults = []
    if data.tokenizer is None and not config.model.name.startswith(HF):
        faults.append(f"data.tokenizer: is missing, and model {config.model.name} has none of its own; name one")
    if isinstance(data, CausalLM) and data.max_length < 2:
        faults.append("data.max_length: a next token takes samples of 2 tokens at least; raise it")
    if isinstance(data, TextClassification) and data.pair_column == data.text_column:
        faults.append("data.pair_column: is data.text_column; name the column of second texts, or leave it out")
    pretrained = config.model.args.get("pretrained", True)
    if config.model.name.startswith(HF) and not isinstance(pretrained, bool):
        faults.append(f"model.args.pretrained: must be true or false, got {pretrained!r}")
    if config.model.channels_last:
        faults.append("model.channels_last: is for images; leave it out")
    return faults


def is_empty(length: Length) -> bool:
    """Whether a phase is skipped."""
    return not length.steps and not length.epochs


def _is_gradual(prune: Prune) -> bool:
    """Whether sparsity rises within the phase prune."""
    return prune.rounds is None and prune.schedule != "oneshot"


def _phase_faults(config: Config) -> list[str]:
    phases: dict[str, Phase] = {name: getattr(config.phases, name) for name in Phases.model_fields}
    faults = []
    lengths: dict[str, Length] = {f"phases.{name}": phase for name, phase in phases.items()}
    if config.prune.length is not None:
        lengths["prune.length"] = config.prune.length
    if config.prune.rounds is not None and config.prune.rounds.rewind_to is not None:
        lengths["prune.rounds.rewind_to"] = config.prune.rounds.rewind_to
    for key, length in lengths.items():
        if length.steps is not None and length.epochs is not None:
            faults.append(f"{key}: gives both steps and epochs; leave one out")
    for name, phase in phases.items():
        if phase.milestones and phase.schedule != "step":
            faults.append(f"phases.{name}.milestones: only for schedule step, not {phase.schedule}; set schedule: step")
        if phase.schedule == "step" and not phase.milestones:
            faults.append(f"phases.{name}.milestones: schedule step needs at least one, such as [0.5, 0.75]")
        if phase.min_lr > phase.lr:
            faults.append(f"phases.{name}.min_lr: {phase.min_lr} is above lr {phase.lr}")
        if phase.steps and phase.warmup_steps >= phase.steps:
            faults.append(
                f"phases.{name}.warmup_steps: {phase.warmup_steps} leaves nothing of {phase.steps} steps; shorten it"
            )
    if all(is_empty(phase) for phase in phases.values()):
        faults.append("phases: all are of length 0; give one of them steps or epochs")
    elif config.prune.sparsity > 0 and _is_gradual(config.prune) and is_empty(phases["prune"]):
        faults.append(
            f"phases.prune: has no length, so prune.sparsity {config.prune.sparsity} is never reached; "
            "give it steps or epochs, or set prune.sparsity to 0"
        )
    return faults


def _prune_faults(config: Config) -> list[str]:
    prune, faults = config.prune, []
    if prune.initial > prune.sparsity:
        faults.append(f"prune.initial: {prune.initial} is above prune.sparsity {prune.sparsity}; sparsity only rises")
    choices = {"schedule": SCHEDULES, "score": SCORES, "allocation": ALLOCATIONS}
    for key, known in choices.items():
        value = getattr(prune, key)
        if isinstance(value, str) and value not in known and (key == "allocation" or ":" not in value):
            others = (
                "a table {pattern: sparsity}, or a YAML file of one" if key == "allocation" else "package.module:name"
            )
            hint = "" if value != "lamp" else "; lamp is an allocation: prune.allocation=lamp"
            faults.append(f"prune.{key}: no {key} {value!r}{near(value, known)}, and {others}{hint}")
    if prune.schedule == "oneshot":
        if prune.initial > 0:
            faults.append("prune.initial: oneshot prunes once; leave it out")
        if prune.length is not None:
            faults.append("prune.length: oneshot prunes once; leave it out")
    if prune.schedule != "polynomial" and prune.power != 3.0:
        faults.append(f"prune.power: only for schedule polynomial, not {prune.schedule}; set prune.schedule=polynomial")
    if prune.allocation == "lamp" and prune.score != "magnitude":
        faults.append(
            f"prune.allocation: lamp scales magnitudes, and takes no score {prune.score}; leave out prune.score"
        )
    if prune.score in ("taylor", "movement") and is_empty(config.phases.dense):
        if not _is_gradual(prune) or prune.initial > 0:
            faults.append(
                f"prune.score: {prune.score} has seen no gradient when pruning begins; give phases.dense some steps "
                "at a low rate"
            )
    faults += [*_pattern_faults(prune), *_permute_faults(config), *_channel_faults(config)]
    for pattern, limit in prune.bounds.items():
        if limit.min > limit.max:
            faults.append(f"prune.bounds.{pattern}: min {limit.min} is above max {limit.max}")
    return faults


def _channel_faults(config: Config) -> list[str]:
    prune, faults = config.prune, list[str]()
    if prune.pattern != "channels":
        if prune.channels != Channels():
            faults.append("prune.channels: only for prune.pattern channels; set prune.pattern=channels")
        return faults
    if prune.allocation not in ("global", "uniform"):
        faults.append("prune.allocation: channels are compared as global or uniform; take one of these")
    if prune.min_weights != Prune(sparsity=0).min_weights:
        faults.append("prune.min_weights: counts weights; of channels it is prune.channels.min_width")
    if prune.embeddings:
        faults.append("prune.embeddings: embeddings have no channels that can be removed; leave it out")
    for pattern, limit in prune.bounds.items():
        if limit.min > 0:
            faults.append(f"prune.bounds.{pattern}.min: layers have no least sparsity in channels; give max only")
    if prune.score != "magnitude" and prune.channels.norm != Channels().norm:
        faults.append(f"prune.channels.norm: is of magnitudes, not of prune.score {prune.score}; leave it out")
    if prune.channels.shrink_every != 1 and prune.channels.shrink != "live":
        faults.append(f"prune.channels.shrink_every: only for shrink live, not {prune.channels.shrink}")
    if prune.channels.shrink == "live" and prune.rounds is not None:
        faults.append("prune.channels.shrink: live removes what prune.rounds may have to bring back; take end")
    if prune.channels.penalty > 0 and is_empty(config.phases.dense):
        faults.append("prune.channels.penalty: works in the phase dense, which has no length; give it some steps")
    if prune.channels.shrink != "never" and config.distill is not None and config.distill.features:
        faults.append(
            f"distill.features: their widths change with prune.channels.shrink {prune.channels.shrink}; take never"
        )
    return faults


def _pattern_faults(prune: Prune) -> list[str]:
    pattern, faults = prune.pattern, list[str]()
    if pattern is None or pattern == "channels":
        return faults
    if prune.allocation == "lamp":
        faults.append("prune.allocation: lamp weighs layers as a whole, and prune.pattern parts of them; take another")
    if ":" in pattern:
        kept, size = map(int, pattern.split(":"))
        if not 1 <= kept < size:
            faults.append(f"prune.pattern: {pattern} must satisfy 1 <= N < M; 2:4 keeps two of each four")
        elif round(prune.sparsity, 9) != (full := round(1 - kept / size, 9)):
            faults.append(f"prune.sparsity: is {prune.sparsity}, and that of prune.pattern {pattern} {full}")
        if prune.guard is not None:
            faults.append(f"prune.guard: may end before prune.pattern {pattern} is complete; leave one out")
    elif "x" in pattern:
        outputs, inputs = map(int, pattern.split("x"))
        if outputs * inputs < 2:
            faults.append(f"prune.pattern: a block {pattern} must have two weights or more; 4x4 has 16")
    return faults


def _permute_faults(config: Config) -> list[str]:
    if not config.prune.permute:
        return []
    faults = []
    if not isinstance(config.data, Data):
        faults.append("prune.permute: reorders the channels of models of images, not of texts; leave it out")
    if config.prune.pattern is None or ":" not in config.prune.pattern:
        faults.append("prune.permute: reorders channels for groups; set prune.pattern to N:M, or leave it out")
    if config.model.weights is None:
        faults.append(
            "prune.permute: reorders trained channels, and there are none; set model.weights, or leave it out"
        )
    if config.distill is not None:
        teachers = list(config.distill.teachers.values())
        if any(feature.of < len(teachers) and teachers[feature.of] != "dense" for feature in config.distill.features):
            faults.append(
                "prune.permute: changes the order of the student's channels, and distill.features compares them with "
                "those of a teacher from a file; leave one out, or take teacher dense"
            )
    return faults


def _rounds_faults(config: Config) -> list[str]:
    prune, phases, faults = config.prune, config.phases, list[str]()
    guard, rounds = prune.guard, prune.rounds
    if guard is not None:
        if rounds is None:
            faults.append("prune.guard: judges rounds, and there are none; give prune.rounds, such as {count: 10}")
        if guard.set is not None and guard.set not in config.eval.sets:
            hint = near(guard.set, sorted(config.eval.sets)) if config.eval.sets else "; eval.sets has none"
            faults.append(f"prune.guard.set: no set {guard.set!r}{hint}")
    if rounds is None:
        return faults
    usual = Prune(sparsity=prune.sparsity)
    for key in ("schedule", "initial", "length"):
        if getattr(prune, key) != getattr(usual, key):
            faults.append(f"prune.{key}: prune.rounds says how sparse when; leave one out")
    if prune.sparsity == 0:
        faults.append("prune.rounds: there is nothing to prune at prune.sparsity 0; leave it out, or raise that")
    if not is_empty(phases.prune):
        faults.append("phases.prune: with prune.rounds there is no such phase; leave it out, or set phases.prune={}")
    needed, other = ("finetune", None) if rounds.recovery == "finetune" else ("dense", "finetune")
    if is_empty(getattr(phases, needed)):
        what = "trains it" if rounds.recovery == "finetune" else "trains it once more"
        faults.append(f"phases.{needed}: has no length, and every round with recovery {rounds.recovery} {what}")
    if other is not None and not is_empty(getattr(phases, other)):
        faults.append(
            f"phases.{other}: recovery {rounds.recovery} trains the phase dense instead; leave it out, or set {{}}"
        )
    if rounds.recovery == "finetune" and rounds.rewind_to is not None:
        faults.append("prune.rounds.rewind_to: recovery finetune does not rewind; leave it out")
    nowhere = rounds.rewind_to is None or (rounds.rewind_to.steps is None and rounds.rewind_to.epochs is None)
    if rounds.recovery == "rewind_weights" and nowhere:
        faults.append("prune.rounds.rewind_to: is missing; early in the dense phase is usual, such as {epochs: 2}")
    return faults


def _teacher_faults(config: Config) -> list[str]:
    distill = config.distill
    if distill is None:
        return []
    faults = [
        f"{key}.weights: is missing; name the file of the teacher's weights"
        for key, teacher in distill.teachers.items()
        if isinstance(teacher, Teacher) and not teacher.is_trained
    ]
    if not distill.phases:
        faults.append("distill.phases: is empty, so the teacher never teaches; name a phase, or set distill to null")
    elif config.prune.rounds is not None and "finetune" not in distill.phases:
        faults.append("distill.phases: rounds of prune.rounds count as finetune, so the teacher never teaches; add it")
    for index, feature in enumerate(distill.features):
        if feature.of >= len(distill.teachers):
            faults.append(
                f"distill.features.{index}.of: {feature.of}, but the teachers of distill.teacher are numbered from 0 "
                f"to {len(distill.teachers) - 1}"
            )
    if distill.dense is None:
        return faults
    if list(distill.teachers.values()).count("dense") > 1:
        faults.append("distill.teacher: dense is there twice; leave one out")
    if is_empty(config.phases.dense) and not config.model.is_trained:
        faults.append(
            f"{distill.dense}: dense would be an untrained model; give phases.dense a length, or set model.weights"
        )
    if "dense" in distill.phases:
        faults.append("distill.phases: the dense phase makes the teacher and cannot have it; leave dense out")
    return faults
