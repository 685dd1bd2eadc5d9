"""Data, weights and nets that the wrong jobs name."""

import datasets
import torch
from safetensors.torch import save_file

from distprune.models import build_model
from tests.data.made import random_images, write_folder, write_parquet
from tests.hf_jobs import write_bert, write_lines, write_llama, write_sentences

NETS = """\
from torch import nn

class Asserting(nn.Module):
    def __init__(self, side=32, num_classes=10):
        assert side % 16 == 0, "the side must be a multiple of 16"
        super().__init__()
        self.linear = nn.Linear(side * side, num_classes)

    def forward(self, images):
        assert images.shape[-1] == 32, "wrong image width"
        return self.linear(images.flatten(1))

class TwoOutputsInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, images):
        logits = self.linear(images.flatten(1))
        return (logits, logits) if self.training else logits

class TooLow:
    def __init__(self, final, begin, end, every, initial):
        self.final = final

    def sparsity(self, step):
        return self.final / 2

    def is_update(self, step):
        return True

class Words(nn.Module):
    def forward(self, images):
        return "words"

class First(nn.Module):
    def forward(self, images):
        return images[0]

class Aside(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.linear, self.aside, self.words, self.first = nn.Linear(64, num_classes), nn.Identity(), Words(), First()

    def forward(self, images):
        self.words(images)
        self.first(images.flatten(1))
        return self.linear(images.flatten(1))

def colour(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, num_classes))

def no_module():
    return [1, 2]
"""


def make_sets(folder):
    """Write everything to `folder`."""
    grey = random_images(80)
    number = datasets.Value("int64")
    for name, train_labels, test_labels, feature in (
        ("grey", [0, 1, 2] * 20, [0, 1] * 10, None),
        ("unlabelled", [0, 1, -1] * 20, [-1] * 20, datasets.ClassLabel(names=["0", "1"])),
        ("beyond", [0, 1, 2] * 20, [0, 7] * 10, number),
    ):
        write_parquet(folder / name, "train", grey[:60], train_labels, feature)
        write_parquet(folder / name, "test", grey[60:], test_labels, feature)
    for split in ("train", "test"):
        write_parquet(folder / "unequal", split, [*grey[:50], *random_images(10, (9, 8))], [0, 1] * 30)
        write_parquet(folder / "damaged", split, [*grey[:3], b"no image", *grey[4:60]], [0, 1] * 30)
        write_folder(folder / "colour", split, random_images(60, (8, 8, 3)), ["a", "b"] * 30)
    for name in ("nothing", "no_parquet"):
        (folder / name).mkdir()
    (folder / "no_parquet" / "train.parquet").write_text("the images", encoding="utf-8")
    (folder / "text.pt").write_text("the weights", encoding="utf-8")
    torch.save(build_model("lenet300", {}, 10).state_dict(), folder / "lenet.pt")
    torch.save(build_model("digits_cnn", {}, 4).state_dict(), folder / "four.pt")
    save_file(build_model("digits_cnn", {"width": 8}, 10).state_dict(), folder / "narrow.safetensors")
    write_bert(folder / "bert")
    write_llama(folder / "llama")
    write_bert(folder / "bare")
    (folder / "bare" / "model.safetensors").unlink()
    write_sentences(folder / "sentences")
    write_lines(folder / "unknown" / "train.jsonl", [{"sentence": "w1", "label": "good"}] * 60)
    (folder / "nets_of_a_user.py").write_text(NETS, encoding="utf-8")
