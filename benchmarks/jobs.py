"""What benchmarks train: jobs by name, for `accuracy.py` to run and for `page.py` to tell of."""

from __future__ import annotations

from dataclasses import dataclass, replace

from common import WEIGHTS


@dataclass(frozen=True)
class Job:
    """What to train.

    Attributes:
        config: below configs.
        data: below --data.
        overrides: of the configuration.
        weights: below --models, to begin with.
        teacher: another job, whose first model teaches; or trained weights below --models, of one of WEIGHTS.
        begins_with: another job, whose model of the same seed this begins with.
        published: the best that is published: percent, and whose.
        asked: percent that ours should reach.
        seeds: how many runs, unless told otherwise.
    """

    config: str
    data: str
    overrides: tuple[str, ...] = ()
    weights: str | None = None
    teacher: str | None = None
    begins_with: str | None = None
    published: tuple[float, str] | None = None
    asked: float | None = None
    seeds: int = 3


MNIST = ("mnist_lenet300.yaml", "mnist")
CIFAR10 = ("cifar10_resnet20.yaml", "cifar10")
CHANNELS = ("cifar10_channels.yaml", "cifar10")
RESNET18 = ("cifar10_resnet18.yaml", "cifar10")
RESNET20, RESNET56 = WEIGHTS
SPARSE_MOMENTUM = "Sparse Momentum, Dettmers and Zettlemoyer 2019"
RENDA = "LR rewinding, Renda et al. 2020"
AT_80 = (91.75, f"{RENDA}, at 79.0 %")
AT_90 = (90.91, "weight rewinding, Renda et al. 2020, at 89.3 %")
GRADUAL = "progressive magnitude, arXiv:2606.12278"
UNPRUNED = ("prune.sparsity=0", "phases.prune={}", "phases.finetune={}", "distill=null")


def mnist(kept: int, published: tuple[float, str], asked: float) -> Job:
    """LeNet-300-100 of which so many percent are kept."""
    # Chosen on the last tenth of the training images.
    lr, method = (0.1, "train.clip_norm=1.0") if kept >= 5 else (0.05, "distill.temperature=2.0")
    overrides = (
        f"prune.sparsity={1 - kept / 100:g}", method,
        f"phases.prune={{epochs: 36, lr: {lr}, schedule: constant, warmup_steps: 400}}",
        f"phases.finetune={{epochs: 24, lr: {lr}}}",
    )  # fmt: skip
    return Job(*MNIST, overrides, teacher="mnist-teacher", published=published, asked=asked)


def cifar10(
    weights: str,
    sparsity: float,
    epochs: int,
    published: tuple[float, str],
    asked: float,
    batch: int = 512,
    seeds: int = 3,
) -> Job:
    """A trained ResNet, taught by ResNet-56."""
    lr = 0.1 * batch / 256
    overrides = (
        f"model.name={WEIGHTS[weights]}", f"prune.sparsity={sparsity:g}", "prune.every=50", "run.precision=bf16",
        f"train.batch_size={batch}",
        f"phases.prune={{epochs: {epochs // 3}, lr: {lr:g}, schedule: constant, warmup_steps: 200}}",
        f"phases.finetune={{epochs: {epochs - epochs // 3}, lr: {lr:g}}}",
    )  # fmt: skip
    return Job(*CIFAR10, overrides, weights, RESNET56, published=published, asked=asked, seeds=seeds)


def ablation(plain: Job, another: str, epochs: int, lr: float, rounds: Job) -> dict[str, Job]:
    """What each part of a method brings: the same pruning with one thing changed at a time.

    Args:
        plain: what is pruned, and how far, by its own dense self as teacher.
        another: teacher.
        epochs: of training, of which three in five raise the sparsity.
        lr: of all of it, but for the cosine that ends it.
        rounds: the same in rounds.
    """
    rising = 3 * epochs // 5
    gradual = replace(
        plain,
        overrides=(
            *plain.overrides, f"phases.prune={{epochs: {rising}, lr: {lr}, schedule: constant}}",
            f"phases.finetune={{epochs: {epochs - rising}, lr: {lr}}}",
        ),
    )  # fmt: skip
    at_once = ("phases.prune={}", f"phases.finetune={{epochs: {epochs}, lr: {lr}}}", "prune.schedule=oneshot")
    return {
        "teacher, global, cubic": gradual,
        "no teacher": changed(gradual, "distill=null"),
        "another teacher": replace(gradual, teacher=another),
        "uniform": changed(gradual, "prune.allocation=uniform"),
        "ERK": changed(gradual, "prune.allocation=erk"),
        "LAMP": changed(gradual, "prune.allocation=lamp"),
        "one-shot": changed(plain, *at_once),
        "rounds, LR anew": rounds,
    }


def changed(job: Job, *overrides: str) -> Job:
    """A job with further overrides."""
    return replace(job, overrides=(*job.overrides, *overrides))


LENET = Job(*MNIST, ("phases.dense={}",), begins_with="mnist-dense")
DENSE_LENET = ("phases.dense={epochs: 12, lr: 0.1}", "phases.prune={}", "phases.finetune={}")
IN_ROUNDS = "prune.rounds={count: 5, recovery: rewind_lr, rewind_to: {epochs: 6}}"
SMALL_RESNET = Job(*CIFAR10, ("run.precision=bf16",), RESNET20, seeds=1)
IN_SHORT_ROUNDS = ("phases.prune={}", "phases.finetune={epochs: 2, lr: 0.05}", "prune.rounds={count: 5}")
ABLATIONS = {
    # The dense net is trained once more, to the same bits, for rounds to repeat the last six of its twelve epochs.
    "LeNet-300-100 on MNIST at 98 %, 30 epochs": ("ablation-mnist", ablation(
        LENET, "mnist-teacher", 30, 0.1, Job(*MNIST, (*DENSE_LENET, IN_ROUNDS)),
    )),
    "ResNet-20 on CIFAR-10 at 90 %, 10 epochs": ("ablation-resnet20", ablation(
        SMALL_RESNET, RESNET56, 10, 0.05, changed(SMALL_RESNET, *IN_SHORT_ROUNDS),
    )),
}  # fmt: skip
"""By title: what the names of jobs begin with, and variants."""


def name_of(begins: str, variant: str) -> str:
    """The job that a variant of an ablation is."""
    return f"{begins}-{variant.lower().replace(', ', '-').replace(' ', '-')}"


JOBS = {
    "mnist-teacher": Job(
        *MNIST,
        (
            "model.name=mnist_cnn", "model.args={width: 8}", "phases.dense={epochs: 24, lr: 0.05}",
            "data.train_transforms=[{RandomCrop: {size: 28, padding: 2}}]", *UNPRUNED,
        ),
        seeds=1,
    ),
    "mnist-10": mnist(10, (98.67, SPARSE_MOMENTUM), 98.95),
    "mnist-5": mnist(5, (98.53, SPARSE_MOMENTUM), 98.90),
    "mnist-2": mnist(2, (98.35, GRADUAL), 98.60),
    "mnist-1": mnist(1, (97.64, SPARSE_MOMENTUM), 98.20),
    "mnist-self": Job(*MNIST, published=(98.35, GRADUAL)),
    "mnist-dense": Job(*MNIST, (*DENSE_LENET, "prune.sparsity=0", "distill=null")),
    "resnet20-80": cifar10(RESNET20, 0.8, 84, AT_80, 91.9),
    "resnet20-90": cifar10(RESNET20, 0.9, 84, AT_90, 91.0),
    # What two CPU cores do in an hour and a quarter.
    "resnet20-80-short": cifar10(RESNET20, 0.8, 42, AT_80, 91.9, batch=128, seeds=1),
    "resnet20-90-short": cifar10(RESNET20, 0.9, 42, AT_90, 91.0, batch=128, seeds=1),
    "resnet56-956": cifar10(RESNET56, 0.956, 84, (92.57, RENDA), 92.8),
    "resnet56-channels": Job(
        *CHANNELS,
        ("prune.sparsity=0.53", "prune.channels.penalty=5.0e-4", "phases.dense={epochs: 40, lr: 0.05}"),
        RESNET56, published=(93.77, "DepGraph, Fang et al. 2023, at 2.13 times fewer"), asked=93.8,
    ),
    "channels-short": Job(
        *CHANNELS,
        (
            "phases.prune={steps: 200, lr: 0.02, schedule: constant, warmup_steps: 10}",
            "phases.finetune={steps: 200, lr: 0.02}", "prune.every=20", "prune.channels.shrink_every=2",
        ),
        RESNET56, seeds=1,
    ),
    "guard": Job("cifar10_guard.yaml", "cifar10", (), RESNET20, seeds=1),
    "resnet18-dense": Job(*RESNET18, UNPRUNED),
    "resnet18-90": Job(
        *RESNET18, ("prune.sparsity=0.9", "phases.dense={}"), teacher="resnet18-dense", published=(95.06, GRADUAL),
        asked=95.3,
    ),
    "resnet18-95": Job(
        *RESNET18, ("prune.sparsity=0.95", "phases.dense={}"), teacher="resnet18-dense", published=(93.86, GRADUAL),
        asked=94.8,
    ),
    "fast-90": Job(
        *RESNET18,
        (
            "phases.dense={epochs: 5, lr: 0.4, schedule: constant, warmup_steps: 200}",
            "phases.prune={epochs: 9, lr: 0.4, schedule: constant}", "phases.finetune={epochs: 14, lr: 0.4}",
            "train.batch_size=512", "distill=null", "prune.every=20", "tracking.histograms=null",
        ),
        asked=94.0,
    ),
    **{name_of(begins, variant): job for begins, jobs in ABLATIONS.values() for variant, job in jobs.items()},
}  # fmt: skip
