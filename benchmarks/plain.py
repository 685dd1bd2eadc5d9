"""The training script that `start.py` compares the main job with: ResNet-18 on images of a folder, by accelerate.

    accelerate launch benchmarks/plain.py FOLDER

It ends after its first step and prints the time of day then.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.transforms import v2

TRANSFORM = v2.Compose([
    v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
])  # fmt: skip


def transformed(rows: dict[str, Any]) -> dict[str, Any]:
    return {"images": [TRANSFORM(image.convert("RGB")) for image in rows["image"]], "labels": rows["label"]}


def main() -> None:
    accelerator = Accelerator(cpu=True)
    data = datasets.load_dataset("parquet", data_dir=sys.argv[1], split="train").with_transform(transformed)
    loader = DataLoader(data, 64, shuffle=True, drop_last=True, num_workers=1)
    model = resnet18(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        loss = F.cross_entropy(model(batch["images"]), batch["labels"])
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        break
    if accelerator.is_main_process:
        print(f"first step {time.time()}", flush=True)


if __name__ == "__main__":
    main()
