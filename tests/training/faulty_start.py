"""The main job with one fault before its start: `-m tests.training.faulty_start CONFIG ...`, with FAULT=kind:rank set.

Every rank believes to be on a host of its own.
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
    "link": ("_sum", refuse),
    "hang": ("_sum", sleep),
    "folder": ("_appears", never_appears),
}

if __name__ == "__main__":
    os.environ["SLURMD_NODENAME"] = f"node{os.environ['RANK']}"
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    os.environ["DISTPRUNE_HOSTS"] = "node0 node1"
    if MINE and KIND == "clock":
        preflight.time.time = an_hour_ago
    elif MINE:
        setattr(preflight, *FAULTS[KIND])
    sys.exit(train.main())
