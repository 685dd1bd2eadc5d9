"""The whole configuration of a run as typed models. Every key has a default or is asked for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
SCHEDULES = ("cubic", "linear", "polynomial", "exponential", "cosine", "oneshot")
SCORES = ("magnitude", "taylor", "movement", "random")
ALLOCATIONS = ("global", "uniform", "erk", "lamp")
SetName = Annotated[str, Field(pattern=r"^[\w-]+$")]
PhaseName = Literal["dense", "prune", "finetune"]
CorruptionKind = Literal["noise", "blur", "brightness", "contrast", "jpeg"]
HF = "hf:"
"""What the names of models of transformers begin with."""


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
    """lenet300, digits_cnn, mnist_cnn, resnet20, resnet32, resnet56, cifar_resnet18, torchvision:NAME, timm:NAME,
    package.module:function, or hf:NAME, a model of transformers from the Hugging Face hub or a local folder."""
    args: dict[str, Any] = {}
    """Keyword arguments of the constructor. num_classes (hf: num_labels) is filled in from the data where the model
    takes it. Of hf: settings of its config.json, and pretrained: false for fresh weights."""
    weights: str | None = None
    """Initial weights: .safetensors or a file for torch.load(weights_only=True), an https address, torchvision:NAME.
    Default: fresh ones; of hf: its own."""
    channels_last: bool = False
    """Keep convolution weights and images in channels_last memory format."""

    @property
    def is_trained(self) -> bool:
        """Whether it begins with trained weights."""
        return self.weights is not None or has_own_weights(self.name, self.args)


def has_own_weights(name: str, args: dict[str, Any]) -> bool:
    """Whether a model comes with trained weights: those of transformers do, unless told otherwise."""
    return name.startswith(HF) and bool(args.get("pretrained", True))


class Data(Section):
    """Images and their labels: where they come from, and what is done to them."""

    task: Literal["images"] = "images"
    """images: classify images; text_classification: classify texts; causal_lm: foretell the next token of texts."""
    source: Literal["digits", "parquet", "folder", "hub", "tensors"]
    """digits: scikit-learn's; parquet: a folder of files; folder: one image folder per class; hub: a data set name;
    tensors: a folder of SPLIT.safetensors with images and labels."""
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
    storage: Literal["auto", "memory", "stream", "device"] = "auto"
    """memory decodes once, into shared uint8; stream decodes in workers; auto: memory, for equal sizes up to 4 GiB;
    device: as memory, then held and transformed where the model is."""
    cache_dir: str | None = None
    """Where decoded images are kept. Default: $DISTPRUNE_CACHE, else ~/.cache/distprune."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes per rank."""


class Texts(Section):
    """Where texts come from, and how they become tokens."""

    source: Literal["hub", "parquet", "json", "csv", "text"]
    """hub: a data set name; else a folder of such files, named after their splits: train.jsonl, test.jsonl."""
    path: str
    """Folder, or name on the Hugging Face hub."""
    name: str | None = None
    """Configuration of a hub data set that has several."""
    train_split: str = "train"
    """Split to train on, with the slices of `datasets`: train[:45000]."""
    eval_split: str = "test"
    """Split to evaluate on."""
    text_column: str = "text"
    """Column that holds the texts."""
    tokenizer: str | None = None
    """Name on the Hugging Face hub, or a local folder. Default: that of model.name, of hf models."""
    max_length: Count = 128
    """Most tokens of a sample."""
    cache_dir: str | None = None
    """Where tokens are kept. Default: $DISTPRUNE_CACHE, else ~/.cache/distprune."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes per rank."""


class TextClassification(Texts):
    """Texts, or pairs of texts, and their labels. Texts are cut to max_length; batches are as long as their longest."""

    task: Literal["text_classification"]
    """images: classify images; text_classification: classify texts; causal_lm: foretell the next token of texts."""
    pair_column: str | None = None
    """Column of second texts, where pairs are classified."""
    label_column: str = "label"
    """Column that holds the class numbers."""


class CausalLM(Texts):
    """Texts whose next tokens are foretold: put one behind the other and cut into samples of max_length tokens."""

    task: Literal["causal_lm"]
    """images: classify images; text_classification: classify texts; causal_lm: foretell the next token of texts."""


def _task(value: Any) -> Any:
    return value.get("task", "images") if isinstance(value, dict) else getattr(value, "task", "images")


AnyData = Annotated[
    Annotated[Data, Tag("images")]
    | Annotated[TextClassification, Tag("text_classification")]
    | Annotated[CausalLM, Tag("causal_lm")],
    Discriminator(_task),
]


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
    gradients: Literal["dense", "packed", "auto"] = "auto"
    """How replicas (DDP) exchange gradients: all of them, without those of pruned weights, or as measuring chooses."""
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


def _arm(value: Any) -> str:
    """Which arm of a union of a plain value and a section a value is meant for."""
    return "(section)" if isinstance(value, (dict, Section)) else "(plain)"


class Limit(Section):
    """Bounds of the sparsity of a layer, met together with that of the model."""

    min: Share = 0.0
    """The least at the end; it rises as prune.sparsity does."""
    max: Share = 1.0
    """The greatest at any time."""


class Rounds(Section):
    """Iterative pruning: prune a share of what is left, train on, again; the share is the same in every round."""

    count: Count
    """How many rounds lead to prune.sparsity."""
    recovery: Literal["finetune", "rewind_lr", "rewind_weights"] = "finetune"
    """What a round trains. finetune: the phase finetune, from its first step; rewind_lr: the phase dense once more from
    rewind_to on, with its learning rates; rewind_weights: the same, from the weights as they were there."""
    rewind_to: Length | None = None
    """A place in the dense phase. Default for rewind_lr: its first step."""


class Guard(Section):
    """Rounds that cost too much accuracy are rolled back and tried again with half the step."""

    max_drop: Annotated[float, Field(ge=0, le=100)]
    """Percentage points of top-1 accuracy that the model may lose against what it was before pruning."""
    min_step: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """The smallest step that is tried after a refusal: the share that it prunes of what is left."""
    set: str | None = None
    """The set that counts, one of eval.sets. Default: data.eval_split."""


class Channels(Section):
    """Of prune.pattern channels: what the sparsity counts, what stays of layers, and when channels are removed."""

    budget: Literal["macs", "params", "channels"] = "macs"
    """What prune.sparsity is a fraction of: multiply-accumulates, parameters of the whole model, or channels."""
    norm: Literal["l2", "l1"] = "l2"
    """Of the magnitudes of all weights that share a channel: sum of squares, or of absolute values."""
    multiple: Count = 1
    """What is left of a layer is a multiple of so many channels; some hardware likes 8."""
    min_width: Count = 1
    """So many channels stay in every layer that has more."""
    shrink: Literal["end", "live", "never"] = "end"
    """When channels are removed from weights and optimizer state. end: once prune.sparsity is reached; live: while it
    rises too; never: they stay as zeros."""
    shrink_every: Count = 1
    """Updates of the masks between removals, of shrink live."""
    penalty: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a penalty in the dense phase that draws the weights of weak channels to 0 together (Fang et al. 2023);
    5e-4 is usual."""


class Prune(Section):
    """What is pruned, how far, and how fast."""

    sparsity: Fraction
    """Final fraction of the prunable weights that is zero."""
    initial: Fraction = 0.0
    """Sparsity at the first update."""
    schedule: str = "cubic"
    """How it rises: cubic, linear, polynomial, exponential, cosine, oneshot (all at once, before the phase prune), or
    package.module:Class, called with final, begin, end, every and initial."""
    power: Positive = 3.0
    """Of the schedule polynomial."""
    score: str = "magnitude"
    """What a weight is worth: magnitude, taylor, movement, random, or package.module:function."""
    allocation: Annotated[
        Annotated[str, Tag("(plain)")] | Annotated[dict[str, Share], Tag("(section)")], Discriminator(_arm)
    ] = "global"
    """How layers share the zeros: global, uniform, erk, lamp, or a table of final sparsities, {pattern: sparsity}, or
    a YAML file of one."""
    bounds: dict[str, Limit] = {}
    """Least and greatest sparsity of layers, by pattern as in include: {pattern: {min: 0.5, max: 0.9}}."""
    pattern: Annotated[str, Field(pattern=r"^(\d+:\d+|\d+x\d+|rows|columns|channels)$")] | None = None
    """Where zeros may be; null for anywhere. N:M, such as 2:4: of each M weights along the input dimension N are kept,
    and prune.sparsity is 1 - N / M. RxC, such as 4x4: blocks of R outputs by C inputs go as a whole; rows, columns: all
    weights of an output, of an input. Layers that a pattern does not fit stay dense, and prune.sparsity counts the
    others. channels: whole channels, filters and attention heads, which are then removed, see prune.channels."""
    channels: Channels = Channels()
    """Of pattern channels."""
    permute: bool = False
    """Before all else reorder channels so that a pattern N:M keeps more of the magnitude of model.weights, where the
    model computes the same (Pool and Yu 2021)."""
    min_weights: Annotated[int, Field(ge=0)] = 1
    """So many weights stay in every layer that has more; 0 lets layers be emptied."""
    every: Count = 100
    """Optimizer steps between updates."""
    length: Length | None = None
    """How long sparsity rises. Default: the whole prune phase."""
    rounds: Rounds | None = None
    """Iterative pruning, in place of a schedule and of the phase prune; null for none."""
    guard: Guard | None = None
    """Accuracy that rounds must keep; prune.sparsity is then the most that is tried."""
    include: list[str] = []
    """Globs over parameter or module names, or first / last; empty takes every conv and linear weight."""
    exclude: list[str] = []
    """What stays dense, in the same words."""
    embeddings: bool = False
    """Prune embedding tables too."""


class Teacher(Section):
    """A trained network to learn from."""

    weights: str | None = None
    """Its weights, as model.weights; models of hf: have their own."""
    name: str | None = None
    """Its model; default: the student's."""
    args: dict[str, Any] = {}
    """Keyword arguments of its constructor."""

    @property
    def is_trained(self) -> bool:
        """Whether it is told which weights it has."""
        return self.weights is not None or has_own_weights(self.name or "", self.args)


class Ramp(Section):
    """A number that changes while the teacher teaches: from its first step to its last, or in each round of pruning."""

    shape: Literal["linear", "cosine"] = "linear"
    """Evenly, or along half a cosine: slow, fast, slow."""


class AlphaRamp(Ramp):
    """A weight of the teacher that changes."""

    begin: Annotated[float, Field(ge=0, le=1)]
    """At the first step."""
    end: Annotated[float, Field(ge=0, le=1)]
    """At the last step."""


class TemperatureRamp(Ramp):
    """A temperature that changes."""

    begin: Positive
    """At the first step."""
    end: Positive
    """At the last step."""


class Feature(Section):
    """A module of the student whose output is drawn to that of one of a teacher (FitNets, Romero et al. 2015)."""

    student: str
    """A module of the student, as in its named_modules()."""
    teacher: str
    """A module of the teacher."""
    loss: Literal["mse", "cosine"] = "mse"
    """mse: mean over all elements; cosine: 1 - cosine over channels, mean over positions and batch."""
    weight: Positive = 1.0
    """Factor of the loss."""
    of: Annotated[int, Field(ge=0)] = 0
    """Which of several teachers, from 0."""


def _arm_or_list(value: Any) -> str:
    return "(list)" if isinstance(value, list) else _arm(value)


OneTeacher = Annotated[
    Annotated[Literal["dense"], Tag("(plain)")] | Annotated[Teacher, Tag("(section)")],
    Discriminator(_arm),
]


class Distill(Section):
    """alpha T^2 KL(teacher || student) + (1 - alpha) cross-entropy (Hinton et al. 2015), and features."""

    teacher: Annotated[
        Annotated[Literal["dense"], Tag("(plain)")]
        | Annotated[Teacher, Tag("(section)")]
        | Annotated[list[OneTeacher], Field(min_length=1), Tag("(list)")],
        Discriminator(_arm_or_list),
    ] = "dense"
    """dense: the model as it is before pruning; {weights: FILE}; {name: MODEL, weights: FILE}; or a list of these."""
    alpha: Annotated[
        Annotated[float, Field(ge=0, le=1), Tag("(plain)")] | Annotated[AlphaRamp, Tag("(section)")],
        Discriminator(_arm),
    ] = 0.9
    """Weight of the teacher: a number, or {begin: 0.9, end: 0.5, shape: linear}."""
    temperature: Annotated[
        Annotated[float, Field(gt=0), Tag("(plain)")] | Annotated[TemperatureRamp, Tag("(section)")],
        Discriminator(_arm),
    ] = 4.0
    """Softens the distributions: a number, or {begin: 8.0, end: 2.0, shape: linear}."""
    features: list[Feature] = []
    """Outputs of modules that are matched too."""
    phases: list[PhaseName] = ["prune", "finetune"]
    """Phases in which the teacher teaches."""
    sharded: bool = False
    """Shard the teacher as the launcher's FSDP settings shard the student; else every rank holds all of it."""

    @property
    def teachers(self) -> dict[str, Literal["dense"] | Teacher]:
        """All teachers in order, each by the setting that names it."""
        if isinstance(self.teacher, list):
            return {f"distill.teacher.{index}": teacher for index, teacher in enumerate(self.teacher)}
        return {"distill.teacher": self.teacher}

    @property
    def dense(self) -> str | None:
        """The setting that names the model before pruning, if it teaches."""
        return next((key for key, teacher in self.teachers.items() if teacher == "dense"), None)


class Eval(Section):
    """When the model is evaluated, beside the end of each phase."""

    every: Count | None = None
    """Optimizer steps between evaluations."""
    batch_size: Count = 500
    """Samples per forward pass and rank."""
    sets: dict[SetName, str] = {}
    """More sets to evaluate on, by a name of your own, each a split as data.eval_split: {held_out: "train[45000:]"}."""
    corruptions: Annotated[
        Annotated[bool, Tag("(plain)")] | Annotated[list[CorruptionKind], Tag("(list)")], Discriminator(_arm_or_list)
    ] = False
    """At the end, also compare the dense and the pruned model on corrupted images of data.eval_split, each kind at 3
    strengths: true for all kinds, or a list of noise, blur, brightness, contrast and jpeg."""


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
    artifacts: bool = False
    """Upload the dense, the best and the final model when the run is done, each as large as model.safetensors."""
    alerts: bool = True
    """Send an alert when accuracy collapses, and when the run is stopped, has failed or is done."""
    collapse: Annotated[float, Field(gt=0, le=100)] = 20.0
    """Percentage points below the dense model at which accuracy has collapsed."""


class WeightHistograms(Section):
    """Histograms of the weights of each layer: of the dense model, after updates of the masks, and of the final one."""

    every: Count = 1
    """Optimizer steps that lie between two updates of which there are histograms, at least."""


class Tracking(Section):
    """Where figures go beside metrics.jsonl and the terminal."""

    histograms: WeightHistograms | None = WeightHistograms()
    """Histograms of weights; null for none."""
    wandb: Wandb = Wandb()
    """Weights & Biases."""


class Config(Section):
    """A pruning job."""

    model: Model
    """The network that is pruned."""
    data: AnyData
    """What the model learns from: images, texts with labels, or texts."""
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
