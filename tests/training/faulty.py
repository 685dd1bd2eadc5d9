"""The main job with one fault in it: `-m tests.training.faulty CONFIG ...`, with FAULT=kind:rank:step set."""

import os
import signal
import subprocess
import sys

import torch

from distprune import train
from distprune.pruning.shards import local
from distprune.training.trainer import Trainer

KIND, RANK, STEP = os.environ["FAULT"].split(":")


def flip_a_mask_bit(trainer):
    mask = next(mask for mask in reversed(trainer.pruner.masks.values()) if mask.numel())
    mask.view(-1)[0] ^= True


def flip_a_weight_bit(trainer):
    weight = next(p for p in trainer.student.bare.parameters() if p.numel())
    local(weight).view(-1).view(torch.int32)[0] ^= 1


def make_a_weight_nan(trainer):
    kept = trainer.pruner.masks["8.weight"].view(-1).nonzero()[0]
    trainer.pruner.tensors[2].local.view(-1)[kept] = torch.nan


# A launcher gives a rank 30 s to obey SIGTERM, which one that is frozen does not.
END_WHEN_ASKED = (
    "trap '' TERM; while grep -qE 'ShdPnd:.*[0-38-b].{3}$' /proc/$0/status; do sleep 0.1; done; kill -KILL $0"
)


def freeze(_):
    subprocess.Popen(["sh", "-c", END_WHEN_ASKED, str(os.getpid())])
    os.kill(os.getpid(), signal.SIGSTOP)


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(_):
    raise ZeroDivisionError("of its own")


def make_a_loss_nan(trainer):
    task = trainer.loss_watch.add
    trainer.loss_watch.add = lambda loss, step: (task(loss * torch.nan, step), setattr(trainer.loss_watch, "add", task))


FAULTS = {
    "mask": flip_a_mask_bit,
    "weight": flip_a_weight_bit,
    "nan": make_a_weight_nan,
    "loss": make_a_loss_nan,
    "freeze": freeze,
    "die": die,
    "fail": fail,
}


def after_step(trainer, span, original=Trainer._after_step):
    original(trainer, span)
    if trainer.step == int(STEP) and trainer.accelerator.process_index == int(RANK):
        FAULTS[KIND](trainer)


if __name__ == "__main__":
    Trainer._after_step = after_step
    sys.exit(train.main())
