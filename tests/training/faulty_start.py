"""The main job with one fault before its start: `-m tests.training.faulty_start CONFIG ...`, with FAULT=kind:rank set.

Ranks believe to be on hosts of $PER_HOST ranks each.
"""

import os
import sys
import time

from distprune import train
from distprune.training import preflight

KIND, RANK = os.environ["FAULT"].split(":")
MINE = os.environ.get("RANK", "0") == RANK


def sleep(*_):
    time.sleep(600)


def no_gpu(_):
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore of it")


def another_version(versions=preflight.versions):
    return versions() | {"torch": "1.0"}


def refuse(*_):
    raise RuntimeError("no route to host")


def never_appears(_):
    return False


def an_hour_ago(clock=time.time):
    return clock() - 3600


FAULTS = {
    "late": ("host", sleep),
    "version": ("versions", another_version),
    "device": ("_device", no_gpu),
    "link": ("_sum", refuse),
    "hang": ("_sum", sleep),
    "folder": ("_appears", never_appears),
}

if __name__ == "__main__":
    per_host = int(os.environ.get("PER_HOST", 1))
    os.environ["SLURMD_NODENAME"] = f"node{int(os.environ['RANK']) // per_host}"
    os.environ["LOCAL_WORLD_SIZE"] = str(per_host)
    os.environ["DISTPRUNE_HOSTS"] = "node0 node1"
    if MINE and KIND == "clock":
        preflight.time.time = an_hour_ago
    elif MINE:
        setattr(preflight, *FAULTS[KIND])
    sys.exit(train.main())
