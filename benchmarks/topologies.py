"""Short runs of the main job in the ways that a GPU offers, into results/topologies.json, or on a CPU to the screen.

    python benchmarks/topologies.py --data FOLDER --models FOLDER [--out runs/topologies] [--only fp32,bf16]
        [--at-once 4] [--tiny]

Each prunes ResNet-20 on CIFAR-10 (tensors, see `tensors.py`) to 90 % and is launched by accelerate: NCCL (on a CPU
gloo) in all but one, bf16, fp16 with its scaler, torch.compile, fused optimizers. A run passes that ends with exactly
as many zeros as asked for, counted anew in its files. Samples a second are those of a GPU that is shared by as many
runs as go on at once. `FSDP2`, which the main job takes from two processes on, is a loop of its own with one shard,
which passes where its masks are those of the model unsharded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import RESULTS, commit, machine, write
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distprune.models.cifar_resnet import resnet20
from distprune.pruning import CubicSchedule, Pruner

ROOT = Path(__file__).parents[1]
COMPILED = "run.compile=true"
WAYS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "alone": (None, ()),
    "fp32": ("multi_gpu", ()),
    "bf16": ("multi_gpu", ("run.precision=bf16",)),
    "fp16": ("multi_gpu", ("run.precision=fp16",)),
    "compile": ("multi_gpu", ("run.precision=bf16", COMPILED)),
    "fused SGD": ("multi_gpu", ("optimizer={name: sgd, fused: true}",)),
    "fused AdamW": ("multi_gpu", ("optimizer={name: adamw, fused: true}", "phases.prune.lr=0.001")),
    "packed gradients": ("multi_gpu", ("train.gradients=packed",)),
    "2:4": ("multi_gpu", ("prune.pattern='2:4'", "prune.sparsity=0.5")),
    "channels": ("multi_gpu", ("prune.pattern=channels", "prune.sparsity=0.5")),
}
"""Launcher and settings."""
GPU_ONLY = {"fp16"}
FSDP2 = "FSDP2"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of tensors (default: data)")
    parser.add_argument("--models", type=Path, default=Path("weights"), help="of trained weights (default: weights)")
    parser.add_argument("--out", type=Path, default=Path("runs/topologies"), help="of run folders")
    parser.add_argument("--only", default=",".join([*WAYS, FSDP2]), help="which (default: all)")
    parser.add_argument("--at-once", type=int, default=1, help="how many go on at a time (default: 1)")
    parser.add_argument("--tiny", action="store_true", help="a few steps")
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.sharded:
        sharded()
        return 0
    on_gpu = torch.cuda.is_available()
    path = RESULTS / "topologies.json"
    found: dict[str, Any] = {}
    if path.exists() and not words.tiny:
        found = json.loads(path.read_text(encoding="utf-8"))["ways"]
    passed = True
    with ThreadPoolExecutor(words.at_once) as pool:
        running = {}
        for name in words.only.split(","):
            if name in GPU_ONLY and not on_gpu:
                print(f"{name:18} not measured: it needs a GPU")
                continue
            running[pool.submit(tried_sharded) if name == FSDP2 else pool.submit(tried, name, words)] = name
        for done in as_completed(running):
            name, one = running[done], done.result()
            print(f"{name:18} {'passed' if one['passed'] else 'FAILED'}  {one['said']}", flush=True)
            passed &= one["passed"]
            if on_gpu and not words.tiny:
                place = {"machine": machine("cuda"), "torch": torch.__version__, "commit": commit()}
                found[name] = one | {"at_once": words.at_once} | place
                write(path.stem, {"ways": {way: found[way] for way in [*WAYS, FSDP2] if way in found}})
    return 0 if passed else 1


def tried(name: str, words: argparse.Namespace) -> dict[str, Any]:
    """Run one way in a process of its own."""
    launcher, settings = WAYS[name]
    folder = words.out / name.replace(", ", "-").replace(" ", "-").replace(":", "")
    shutil.rmtree(folder, ignore_errors=True)  # of another commit, perhaps
    steps = 10 if words.tiny else 300
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    command = [sys.executable] if launcher is None else [*launch, str(ROOT / "launch" / f"{launcher}.yaml")]
    command += [] if launcher is None else ["--num_processes", "1"]
    command += ["-m", "distprune.train", str(ROOT / "configs" / "cifar10_resnet20.yaml"), f"run.dir={folder}"]
    command += [
        f"data.path={words.data / 'cifar10'}", "data.source=tensors", "data.workers=0", "data.storage=device",
        f"model.weights={words.models / 'resnet20-12fca82f.th'}", "tracking.wandb.mode=disabled",
        f"phases.prune={{steps: {steps}, lr: 0.01}}", f"phases.finetune={{steps: {steps}, lr: 0.01}}",
        f"prune.every={steps // 10}", *settings,
    ]  # fmt: skip
    command += ["data.eval_split='test[:200]'", "train.batch_size=16"] if words.tiny else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"passed": False, "said": done.stderr[-2000:]}
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    zeros, total = summary["prune/zeros"], summary["prune/weights"]
    rate, top1 = summary["train_samples_per_s"], summary["eval/top1"]
    passed, what = True, "channels"
    if name != "channels":
        counted = sum(int((weights[layer] == 0).sum()) for layer in summary["prune/layers"])
        asked = round(summary["prune/target_sparsity"] * total)
        passed, what = counted == zeros == asked, f"zeros of {total:,}, {counted:,} in the file, {asked:,} asked for"
    said = f"{zeros:,} {what}; {rate:,.0f} samples/s, top1 {top1:.2f} %"
    return {"passed": passed, "said": said, "zeros": zeros, "samples_per_s": rate, "top1": top1}


def tried_sharded() -> dict[str, Any]:
    """The loop with one shard, in a process of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", __file__]
    done = subprocess.run([*command, "--sharded"], capture_output=True, text=True)
    return {"passed": not done.returncode, "said": done.stdout.strip() or done.stderr[-2000:]}


def sharded() -> None:
    """Prune a model in shards, and beside it the same whole; steps of rate 0, so that their weights stay the same."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    masks = {}
    for way in ("whole", "sharded"):
        torch.manual_seed(0)
        model = resnet20().to(device)
        if way == "sharded":
            fully_shard(model, mesh=init_device_mesh(device.type, (1,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        pruner = Pruner(model, optimizer, CubicSchedule(0.9, begin=0, end=20, every=5))
        pruner.step()
        for _ in range(20):
            images = torch.randn(16, 3, 32, 32, device=device)
            loss: Any = F.cross_entropy(model(images), torch.arange(16, device=device) % 10)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
        masks[way] = pruner.mask_digest
    dist.destroy_process_group()
    if masks["whole"] != masks["sharded"] or pruner.zeros != round(0.9 * pruner.weights):
        print(f"masks differ: {masks}, {pruner.zeros} zeros", flush=True)
        sys.exit(1)
    print(f"{pruner.zeros:,} of {pruner.weights:,} zeros, masks as of the whole model: {masks['whole']}")


if __name__ == "__main__":
    sys.exit(main())
