"""What a training step costs with distprune, beside the same step written by hand, in turns in one process.

    python benchmarks/step.py [--cases pruner-resnet20,trainer,...] [--rounds 9]      # on a GPU, where there is one

Cases:
    pruner-resnet20   a loop by hand with accelerate, and the same with a `Pruner` at 90 % that updates its masks every
                      100 steps
    pruner-resnet50   the same at 224 x 224, with an update every 10 steps, which thus costs 10 times its share
    trainer           the main job in its dense phase, beside the loop by hand; both on batches that lie in memory
    pipeline          the same with images read, augmented and normalised: the loop by hand has torchvision's
                      transforms in a DataLoader, with as many workers
    teacher           the main job with a teacher, beside the loop by hand that runs the teacher forward, no more

The main job is `distprune.train` as users start it, with its logging, checks and stop path; between two of its steps
the other takes its turn. Each turn is timed as a whole; a ratio is of a turn and the mean of the turns beside it.
Results of cases that are not run are kept. Figures of a GPU go to results/step_gpu.json.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torchvision
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from common import RESULTS, commit, machine, synchronize, write
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from distprune.models import build_model
from distprune.pruning import OneShotSchedule, Pruner
from distprune.train import main as train
from distprune.training.splits import Split
from distprune.training.stopping import Stopper

BATCH, IMAGES, WORKERS = 128, 12800, 1
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LR, MOMENTUM, DECAY = 0.01, 0.9, 1e-4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Batches = Iterator[tuple[Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=f"which (default: {','.join(CASES)})")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default: 9)")
    parser.add_argument("--steps", type=int, help="in each turn, instead of the case's own number")
    parser.add_argument("--no-write", action="store_true", help="leave the results as they are")
    words = parser.parse_args()
    path = RESULTS / f"step{'' if DEVICE.type == 'cpu' else '_gpu'}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
    for name in words.cases.split(","):
        case, steps = CASES[name]
        steps = words.steps or steps
        AcceleratorState._reset_state(reset_partial_state=True)  # each case as in a process of its own
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = case(Path(folder), steps, words.rounds)
        where = {"machine": {**machine(DEVICE.type), "threads": torch.get_num_threads()}, "torch": torch.__version__}
        found[name] = one = {"steps": steps, **compared(ours, theirs, steps), **where, "commit": commit()}
        print(
            f"{name:16} {one['ours_ms']:8.1f} ms a step, by hand {one['by_hand_ms']:8.1f}; {one['ratio']:.3f} times "
            f"({one['low']:.3f}-{one['high']:.3f})",
            flush=True,
        )
        if not words.no_write:
            write(path.stem, {"cases": found})


def compared(ours: list[float], theirs: list[float], steps: int) -> dict[str, float]:
    """Times a step, and the median and quartiles of ratios; those of `ours` lie between two of `theirs`."""
    beside = [(before + after) / 2 for before, after in itertools.pairwise(theirs)]
    ratios = [own / other for own, other in zip(ours, beside, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "ours_ms": 1e3 * statistics.median(ours) / steps,
        "by_hand_ms": 1e3 * statistics.median(theirs) / steps,
        "ratio": median,
        "low": low,
        "high": high,
    }


class Loop:
    """A training loop as one writes it with accelerate.

    Args:
        model: bare.
        batches: what it learns, without end.
        accelerator: prepares the model.
        teacher: runs forward on each batch, and its answer is not used.
    """

    def __init__(
        self, model: nn.Module, batches: Batches, accelerator: Accelerator, teacher: nn.Module | None = None
    ) -> None:
        self.batches = batches
        self.teacher = teacher
        self.accelerator = accelerator
        optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=DECAY)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.after: Callable[[], object] = lambda: None

    def turn(self, steps: int) -> float:
        """Seconds that so many steps take."""
        synchronize(DEVICE)
        began = time.perf_counter()
        for inputs, labels in itertools.islice(self.batches, steps):
            if self.teacher is not None:
                with torch.no_grad():
                    self.teacher(inputs)
            loss = F.cross_entropy(self.model(inputs), labels)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.after()
        synchronize(DEVICE)
        return time.perf_counter() - began


def drawn(size: int, classes: int, count: int) -> Batches:
    """A few batches, over and over."""
    torch.manual_seed(0)
    few = [
        (torch.randn(count, 3, size, size).to(DEVICE), torch.randint(classes, (count,)).to(DEVICE)) for _ in range(4)
    ]
    return itertools.cycle(few)


def with_pruner(
    make: Callable[[], nn.Module], size: int, count: int, steps: int, rounds: int
) -> tuple[list[float], list[float]]:
    """A loop with a Pruner at 90 %, which updates its masks once in every turn, beside the same loop without."""
    accelerator = Accelerator(cpu=DEVICE.type == "cpu")
    classes = 10 if size == 32 else 1000
    plain, pruned = (Loop(make(), drawn(size, classes, count), accelerator) for _ in range(2))
    # From 0.9 on it rises by next to nothing, so that every update has all to do.
    schedule = Rising(steps)
    pruner = Pruner(pruned.model, pruned.optimizer, schedule)
    pruned.after = pruner.step
    for loop in (pruned, plain):
        loop.turn(steps)
    ours, theirs = [], [plain.turn(steps)]
    for _ in range(rounds):
        ours.append(pruned.turn(steps))
        theirs.append(plain.turn(steps))
    assert pruner.sparsity > 0.89
    return ours, theirs


class Rising(OneShotSchedule):
    """A little more at every update from 90 % on, as late in a gradual schedule."""

    def __init__(self, every: int) -> None:
        super().__init__(final=0.95, at=0)
        self.every = every

    def sparsity(self, step: int) -> float:
        return min(0.9 + 1e-5 * step / self.every, self.final)

    def is_update(self, step: int) -> bool:
        return step % self.every == 0


def pruner_resnet20(folder: Path, steps: int, rounds: int) -> tuple[list[float], list[float]]:
    return with_pruner(lambda: build_model("resnet20", {}, 10, "model", "images"), 32, BATCH, steps, rounds)


def pruner_resnet50(folder: Path, steps: int, rounds: int) -> tuple[list[float], list[float]]:
    return with_pruner(torchvision.models.resnet50, 224, 16, steps, rounds)


def trainer(folder: Path, steps: int, rounds: int) -> tuple[list[float], list[float]]:
    return beside_main_job(folder, steps, rounds, in_memory=True)


def pipeline(folder: Path, steps: int, rounds: int) -> tuple[list[float], list[float]]:
    return beside_main_job(folder, steps, rounds, in_memory=False)


def teacher(folder: Path, steps: int, rounds: int) -> tuple[list[float], list[float]]:
    return beside_main_job(folder, steps, rounds, in_memory=True, taught=True)


CASES: dict[str, tuple[Callable[[Path, int, int], tuple[list[float], list[float]]], int]] = {
    "pruner-resnet20": (pruner_resnet20, 100),
    "pruner-resnet50": (pruner_resnet50, 10),
    "trainer": (trainer, 50),
    "pipeline": (pipeline, 50),
    "teacher": (teacher, 50),
}


def beside_main_job(
    folder: Path, steps: int, rounds: int, in_memory: bool, taught: bool = False
) -> tuple[list[float], list[float]]:
    """Turns of the main job and of a loop by hand."""
    images, labels = picture_files(folder)
    model = build_model("resnet20", {}, 10, "model", "images")
    save_file(model.state_dict(), folder / "weights.safetensors")
    (folder / "job.yaml").write_text(yaml.safe_dump(job(folder, steps * (rounds + 2), taught)), encoding="utf-8")
    ours: list[float] = []
    theirs: list[float] = []
    loop: list[Loop] = []
    began = done = 0.0

    def by_hand() -> Loop:
        # Made when the main job has made its own accelerator: there is one state for all.
        accelerator = Accelerator(cpu=DEVICE.type == "cpu")
        batches = drawn(32, 10, BATCH) if in_memory else read(images, labels)
        own = build_model("resnet20", {}, 10, "model", "images")
        return Loop(own, batches, accelerator, model.eval().to(DEVICE) if taught else None)

    def after_step(stopper: Stopper) -> str | None:
        nonlocal began, done
        done += 1
        if done % steps == 0 and len(ours) < rounds:
            synchronize(DEVICE)
            if began:
                ours.append(time.perf_counter() - began)
            if not loop:
                loop.append(by_hand())
                loop[0].turn(steps)
            theirs.append(loop[0].turn(steps))
            began = time.perf_counter()
        return asked(stopper)

    asked = Stopper.after_step
    with ExitStack() as patched:
        patched.enter_context(patch.object(Stopper, "after_step", after_step))
        if in_memory:
            patched.enter_context(patch.object(Split, "train_batches", lambda *_: drawn(32, 10, BATCH)))
        patched.enter_context(redirect_stdout(io.StringIO()))
        code = train([str(folder / "job.yaml")])
    assert code == 0
    assert len(ours) == rounds
    return ours, theirs


def job(folder: Path, steps: int, taught: bool) -> dict[str, Any]:
    """The configuration of the main job; what it trains is not pruned before the last step."""
    config: dict[str, Any] = {
        "model": {"name": "resnet20"},
        "data": {
            "source": "tensors", "path": str(folder), "mean": MEAN, "std": STD, "workers": WORKERS,
            "train_transforms": [{"RandomCrop": {"size": 32, "padding": 4}}, "RandomHorizontalFlip"],
        },
        "phases": {"dense": {"steps": steps, "lr": LR, "schedule": "constant"}, "prune": {"steps": 1, "lr": LR}},
        "prune": {"sparsity": 0.9, "every": 1},
        "train": {"batch_size": BATCH},
        "optimizer": {"name": "sgd", "momentum": MOMENTUM, "weight_decay": DECAY},
        "tracking": {"wandb": {"mode": "disabled"}},
        "run": {"dir": str(folder / "run")},
    }  # fmt: skip
    if taught:
        weights = str(folder / "weights.safetensors")
        config["distill"] = {"teacher": {"weights": weights}, "phases": ["dense"]}
    return config


def picture_files(folder: Path) -> tuple[Tensor, Tensor]:
    """Write a data set of CIFAR-10's shapes; its images (uint8, N x 3 x 32 x 32) and labels."""
    images, labels = torch.randint(256, (IMAGES, 3, 32, 32), dtype=torch.uint8), torch.arange(IMAGES) % 10
    for split, count in (("train", IMAGES), ("test", 250)):
        save_file({"images": images[:count].clone(), "labels": labels[:count]}, folder / f"{split}.safetensors")
    return images, labels


class Pictures(Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10: pixels in memory, each image made and transformed when it is asked for."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = labels.tolist()
        self.transform = v2.Compose([
            v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def read(images: Tensor, labels: Tensor) -> Batches:
    """Batches as a DataLoader gives them, epoch by epoch."""
    loader = DataLoader(
        Pictures(images, labels), BATCH, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True,
        pin_memory=DEVICE.type == "cuda", prefetch_factor=4,
    )  # fmt: skip
    loader = Accelerator(cpu=DEVICE.type == "cpu").prepare(loader)
    while True:
        yield from loader


if __name__ == "__main__":
    main()
