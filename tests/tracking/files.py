"""What the offline W&B files of a run folder hold."""

from dataclasses import dataclass

from distprune.tracking.wandb_file import read_items, read_records


@dataclass
class Segment:
    """What one start of a run left."""

    run: object
    config: dict
    rows: list


def segments(folder):
    """The segments of a run, the oldest first."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        records = list(read_records(path))
        rows = [read_items(record.history.item) for record in records if record.HasField("history")]
        for run in [record.run for record in records if record.HasField("run")]:  # none if killed before it was written
            found.append(Segment(run, read_items(run.config.update), rows))
    return found


def steps(segment):
    return [row["trainer/step"] for row in segment.rows]


def all_steps(found):
    """The steps of some segments, one after the other."""
    return [step for segment in found for step in steps(segment)]
