"""What the offline W&B files of a run folder hold."""

from dataclasses import dataclass

from distprune.tracking.wandb_file import kind_of, read_items, read_records


@dataclass
class Segment:
    """What one start of a run left: rows of figures, and of histograms and tables as (kind, step)."""

    run: object
    config: dict
    rows: list
    media: list


def segments(folder):
    """The segments of a run, the oldest first."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        records = list(read_records(path))
        every = [read_items(record.history.item) for record in records if record.HasField("history")]
        rows = [row for row in every if not kind_of(row)]
        media = [(kind_of(row), row["trainer/step"]) for row in every if kind_of(row)]
        for run in [record.run for record in records if record.HasField("run")]:  # none if killed before it was written
            found.append(Segment(run, read_items(run.config.update), rows, media))
    return found


def steps(segment):
    return [row["trainer/step"] for row in segment.rows]


def all_steps(found):
    """The steps of some segments, one after the other."""
    return [step for segment in found for step in steps(segment)]
