"""The whole configuration of a run as typed models. Every key has a default or is asked for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
PhaseName = Literal["dense", "prune", "finetune"]


class Section(BaseModel):
    """A part of the configuration: unknown keys and wrong types are refused, values do not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Run(Section):
    """Where and how the run happens."""

    dir: str | None = None
    """Run folder. Default: runs/NAME, after the configuration file."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds weights, sample order and augmentation."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes the accelerator that is there."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type; weights stay float32."""
    compile: bool = False
    """Compile student and teacher with torch.compile."""
    log_every: Count = 50
    """Optimizer steps between logged lines."""
    max_minutes: Positive | None = None
    """Time budget of one start: then a checkpoint is written and the run stops, to go on when started again."""


class Model(Section):
    """A network from the registry."""

    name: str
    """lenet300, digits_cnn, resnet20, resnet32, resnet56, torchvision:NAME, timm:NAME, or package.module:function."""
    args: dict[str, Any] = {}
    """Keyword arguments of the constructor. num_classes is filled in from the data where the model takes it."""
    weights: str | None = None
    """Initial weights: .safetensors or a file for torch.load(weights_only=True), an https address, torchvision:NAME."""
    channels_last: bool = False
    """Keep convolution weights and images in channels_last memory format."""


class Data(Section):
    """Where samples come from, and what is done to images."""

    source: Literal["digits", "parquet", "folder", "hub"]
    """digits: scikit-learn's; parquet: a folder of files; folder: one image folder per class; hub: a data set name."""
    path: str | None = None
    """Folder, or name on the Hugging Face hub. Not for digits."""
    name: str | None = None
    """Configuration of a hub data set that has several."""
    train_split: str = "train"
    """Split to train on, with the slices of `datasets`: train[:45000]."""
    eval_split: str = "test"
    """Split to evaluate on."""
    image_column: str = "image"
    """Column that holds the images."""
    label_column: str = "label"
    """Column that holds the class numbers."""
    train_transforms: list[str | dict[str, dict[str, Any]]] = []
    """torchvision.transforms.v2 by name, each a name or {Name: {argument: value}}."""
    eval_transforms: list[str | dict[str, dict[str, Any]]] = []
    """The same for evaluation images."""
    mean: list[float]
    """Mean of pixels scaled to [0, 1]: one value reads images as grey, three as RGB."""
    std: list[Positive]
    """Standard deviation of pixels scaled to [0, 1], as many values as mean."""
    storage: Literal["auto", "memory", "stream"] = "auto"
    """memory decodes once, into shared uint8; stream decodes in workers; auto: memory, for equal sizes up to 4 GiB."""
    cache_dir: str | None = None
    """Where decoded images are kept. Default: $DISTPRUNE_CACHE, else ~/.cache/distprune."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes per rank."""


class Length(Section):
    """A stretch of training: steps or epochs, not both."""

    steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps."""
    epochs: Annotated[float, Field(ge=0)] | None = None
    """Passes over the training data; rounded to whole steps."""


class Phase(Length):
    """One phase of the run with its learning rate. Without steps and epochs it is skipped."""

    lr: Positive = 0.1
    """Peak learning rate."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """cosine falls to min_lr; step multiplies by gamma at each milestone; constant stays."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Where cosine ends."""
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = []
    """Fractions of the phase at which `step` falls."""
    gamma: Positive = 0.1
    """Factor of `step`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises linearly from 0."""


class Phases(Section):
    """dense trains the model, prune raises its sparsity, finetune goes on at the final sparsity."""

    dense: Phase = Phase()
    """Training before pruning; skipped when starting from trained weights."""
    prune: Phase = Phase()
    """Training while the sparsity rises."""
    finetune: Phase = Phase()
    """Training at the final sparsity."""


class Train(Section):
    """What one optimizer step is made of."""

    batch_size: Count = 128
    """Samples per optimizer step over all ranks."""
    accumulate: Count = 1
    """Micro-batches each rank splits its share into."""
    clip_norm: Positive | None = None
    """Largest gradient norm, counted after masking."""
    label_smoothing: Fraction = 0.0
    """Label smoothing of the cross-entropy."""
    on_nonfinite: Literal["error", "skip_step"] = "error"
    """A loss that is NaN or infinite ends the run; or the step is left out on all ranks, at a wait per step."""


class SGD(Section):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    """sgd"""
    momentum: Fraction = 0.9
    """Momentum."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty."""
    fused: bool = False
    """torch's fused kernel."""


class AdamW(Section):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"]
    """adamw"""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Decay rates of the moments."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    fused: bool = False
    """torch's fused kernel."""


def _optimizer_name(value: Any) -> Any:
    return value.get("name", "sgd") if isinstance(value, dict) else getattr(value, "name", "sgd")


Optimizer = Annotated[Annotated[SGD, Tag("sgd")] | Annotated[AdamW, Tag("adamw")], Discriminator(_optimizer_name)]


class Prune(Section):
    """What is pruned, how far, and how fast."""

    sparsity: Fraction
    """Final fraction of the prunable weights that is zero."""
    initial: Fraction = 0.0
    """Sparsity at the first update."""
    every: Count = 100
    """Optimizer steps between updates."""
    length: Length | None = None
    """How long sparsity rises. Default: the whole prune phase."""
    include: list[str] = []
    """Globs over parameter or module names, or first / last; empty takes every conv and linear weight."""
    exclude: list[str] = []
    """What stays dense, in the same words."""
    embeddings: bool = False
    """Prune embedding tables too."""


class Teacher(Section):
    """A trained network to learn from."""

    weights: str
    """Its weights, as model.weights."""
    name: str | None = None
    """Its model; default: the student's."""
    args: dict[str, Any] = {}
    """Keyword arguments of its constructor."""


class Distill(Section):
    """Logit distillation (Hinton et al. 2015): alpha T^2 KL(teacher || student) + (1 - alpha) cross-entropy."""

    teacher: Annotated[
        Annotated[Literal["dense"], Tag("(word)")] | Annotated[Teacher, Tag("(model)")],
        Discriminator(lambda value: "(model)" if isinstance(value, (dict, Teacher)) else "(word)"),
    ] = "dense"
    """dense: the model as it is before pruning; or {weights: FILE}, {name: MODEL, weights: FILE}."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Weight of the teacher."""
    temperature: Positive = 4.0
    """Softens both distributions."""
    phases: list[PhaseName] = ["prune", "finetune"]
    """Phases in which the teacher teaches."""
    sharded: bool = False
    """Shard the teacher as the launcher's FSDP settings shard the student; else every rank holds all of it."""


class Eval(Section):
    """When the model is evaluated, beside the end of each phase."""

    every: Count | None = None
    """Optimizer steps between evaluations."""
    batch_size: Count = 500
    """Images per forward pass and rank."""


class Checkpoint(Section):
    """When the state of a run is saved, beside the end of each phase and the moment it is stopped."""

    every: Count | None = 1000
    """Optimizer steps between checkpoints; null leaves them to the ends of phases."""
    keep: Annotated[int, Field(ge=2)] = 2
    """How many of the newest are kept, beside the first and the best at the final sparsity."""
    max_failures: Count = 3
    """How many saves in a row may fail before the run does."""
    background: bool = False
    """Train on while a checkpoint is written, from a copy in CPU memory."""


class Integrity(Section):
    """What is checked while the run goes on, and how long ranks wait for each other."""

    every: Count | None = None
    """Optimizer steps between comparisons of the weights of replicas, bit by bit; null for none."""
    start_timeout: Positive = 1800.0
    """Seconds that ranks wait for each other before the first step is done."""
    timeout: Positive = 600.0
    """Seconds that they wait from then on. More must not pass between what ranks do together."""


class Wandb(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where there are an API key and a network, else offline; disabled does not import wandb."""
    project: str = "distprune"
    """Project."""
    entity: str | None = None
    """Team or user."""
    name: str | None = None
    """Name of the run. Default: that of the run folder."""
    group: str | None = None
    """Group of runs."""
    job_type: str = "prune"
    """Kind of the run."""
    tags: list[str] = []
    """Tags."""


class Tracking(Section):
    """Where figures go beside metrics.jsonl and the terminal."""

    wandb: Wandb = Wandb()
    """Weights & Biases."""


class Config(Section):
    """A pruning job."""

    model: Model
    """The network that is pruned."""
    data: Data
    """Images and labels."""
    prune: Prune
    """What is pruned, how far, and how fast."""
    phases: Phases = Phases()
    """How long each phase takes, and its learning rate."""
    train: Train = Train()
    """What one optimizer step is made of."""
    optimizer: Optimizer = SGD()
    """sgd or adamw, by name."""
    distill: Distill | None = None
    """A teacher to learn from; null for none."""
    eval: Eval = Eval()
    """When the model is evaluated."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state of the run is saved."""
    integrity: Integrity = Integrity()
    """What is checked while the run goes on."""
    run: Run = Run()
    """Where and how the run happens."""
    tracking: Tracking = Tracking()
    """Where figures go."""


def combination_faults(config: Config) -> list[str]:
    """What is wrong with keys that are each right by themselves, one line a fault."""
    faults = [*_phase_faults(config), *_teacher_faults(config)]
    data, prune, optimizer = config.data, config.prune, config.optimizer
    if data.source == "digits" and data.path is not None:
        faults.append("data.path: digits ships with scikit-learn and takes no path; leave it out")
    if data.source != "digits" and data.path is None:
        faults.append(f"data.path: source {data.source} needs one; set data.path")
    if len(data.mean) not in (1, 3):
        faults.append(f"data.mean: has {len(data.mean)} values; give 1 to read images as grey, or 3 as RGB")
    if len(data.mean) != len(data.std):
        faults.append(f"data.mean: {len(data.mean)} values, but data.std has {len(data.std)}; give as many of each")
    if prune.initial > prune.sparsity:
        faults.append(f"prune.initial: {prune.initial} is above prune.sparsity {prune.sparsity}; sparsity only rises")
    if isinstance(optimizer, SGD) and optimizer.nesterov and optimizer.momentum == 0:
        faults.append("optimizer.nesterov: needs a momentum above 0; set optimizer.momentum")
    if config.run.device == "cpu" and config.run.precision == "fp16":
        faults.append("run.precision: fp16 needs a GPU; take bf16 or fp32 with run.device=cpu")
    if config.train.accumulate > config.train.batch_size:
        faults.append(
            f"train.accumulate: {config.train.accumulate} micro-batches cannot share train.batch_size "
            f"{config.train.batch_size}; lower it"
        )
    return faults


def is_empty(length: Length) -> bool:
    """Whether a phase is skipped."""
    return not length.steps and not length.epochs


def _phase_faults(config: Config) -> list[str]:
    phases: dict[str, Phase] = {name: getattr(config.phases, name) for name in Phases.model_fields}
    faults = []
    lengths: dict[str, Length] = {f"phases.{name}": phase for name, phase in phases.items()}
    if config.prune.length is not None:
        lengths["prune.length"] = config.prune.length
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
    elif config.prune.sparsity > 0 and is_empty(phases["prune"]):
        faults.append(
            f"phases.prune: has no length, so prune.sparsity {config.prune.sparsity} is never reached; "
            "give it steps or epochs, or set prune.sparsity to 0"
        )
    return faults


def _teacher_faults(config: Config) -> list[str]:
    distill = config.distill
    if distill is None or distill.teacher != "dense":
        return []
    faults = []
    if is_empty(config.phases.dense) and config.model.weights is None:
        faults.append(
            "distill.teacher: dense would be an untrained model; give phases.dense a length, or set model.weights"
        )
    if "dense" in distill.phases:
        faults.append("distill.phases: the dense phase makes the teacher and cannot have it; leave dense out")
    return faults
