"""What a person sees while a run goes on: one bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from distprune.tracking.tracker import Row

SHOWN = {
    "prune/round": "round {:.0f}",
    "train/loss": "loss {:.4f}",
    "train/top1": "top1 {:.2f}",
    "prune/sparsity": "sparsity {:.4f}",
    "eval/top1": "eval {:.2f} %",
    "train/samples_per_s": "{:.0f} samples/s",
}


class Progress:
    """Shows step, loss, sparsity, speed and time left, on stderr.

    Args:
        steps: tells the steps of the whole run, which may change.
        begin: the step it goes on from.
        unit: what a step is called.
    """

    def __init__(self, steps: Callable[[], int], begin: int = 0, unit: str = "step") -> None:
        self._steps = steps
        self._begin = begin
        self._unit = unit
        self._began = time.monotonic()
        self._shown: dict[str, float] = {}
        self._bar = None
        if sys.stderr.isatty():
            layout = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
            self._bar = tqdm(total=steps(), initial=begin, dynamic_ncols=True, bar_format=layout)

    def log(self, row: Row) -> None:
        """Bring the bar up to `row`, or print it as a line."""
        self.know(row)
        step = int(row["trainer/step"])
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(self._shown), refresh=False)
            self._bar.total = self._steps()
            self._bar.update(step - self._bar.n)
        elif row.keys() & {"train/loss", "eval/top1"}:
            sticky = {name: self._shown[name] for name in ("prune/sparsity",) if name in self._shown}
            text = self._text({**sticky, **row})
            print(f"{self._unit} {step}/{self._steps()}  {text}{self._left(step)}", file=sys.stderr, flush=True)

    def know(self, figures: Row) -> None:
        """Take figures from before, to be shown with those to come."""
        self._shown.update({name: value for name, value in figures.items() if name in SHOWN})

    def say(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        tqdm.write(text, file=sys.stderr)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Too much for a line."""

    def preempt(self) -> None:
        """Nothing to say; the caller prints how to go on."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _left(self, step: int) -> str:
        if step <= self._begin or step >= self._steps():
            return ""
        seconds = (time.monotonic() - self._began) / (step - self._begin) * (self._steps() - step)
        return f", {tqdm.format_interval(seconds)} left"

    @staticmethod
    def _text(figures: Mapping[str, float]) -> str:
        return ", ".join(SHOWN[name].format(figures[name]) for name in SHOWN if name in figures)
