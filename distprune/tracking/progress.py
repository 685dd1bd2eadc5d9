"""What a person sees while a run goes on: one line on a terminal, lines in a file elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from distprune.tracking.tracker import Histogram, Row

SHOWN = {
    "prune/round": ("round {:.0f}", "r{:.0f}"),
    "train/loss": ("loss {:.4f}", "loss {:.3g}"),
    "train/top1": ("top1 {:.2f}", "top1 {:.1f}"),
    "prune/sparsity": ("sparsity {:.4f}", "sparse {:.3f}", "zeros {:.0%}"),
    "eval/top1": ("eval {:.2f} %", "eval {:.1f}%", "eval {:.1f}%"),
    "train/samples_per_s": ("{:.0f} samples/s", "{:.0f}/s"),
}
"""In the order in which they are shown: in full, in short, and, of those that are left last, in the least."""
FIRST_TO_GO = ("", "train/top1", "prune/round", "train/samples_per_s", "train/loss")
LEAST_BAR = 12
"""Columns; a shorter one says nothing."""


class Progress:
    """Shows step, loss, sparsity, accuracy, speed and time left, on stderr.

    On a terminal it is one line that never wraps: where it is narrow words are shorter, and what matters least is left
    out.

    Args:
        steps: tells the steps of the whole run, which may change.
        begin: the step it goes on from.
        unit: what a step is called; may change.
    """

    def __init__(self, steps: Callable[[], int], begin: int = 0, unit: str = "step") -> None:
        self._steps = steps
        self._begin = begin
        self.unit = unit
        self._began = time.monotonic()
        self._shown: dict[str, float] = {}
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps(), initial=begin, dynamic_ncols=True, bar_format="{desc}")
            self._fill(begin)

    def log(self, row: Row) -> None:
        """Bring the line up to `row`, or print another."""
        self.know(row)
        step = int(row["trainer/step"])
        if self._bar is not None:
            self._fill(step)
        elif row.keys() & {"train/loss", "eval/top1"}:
            sticky = {name: self._shown[name] for name in ("prune/sparsity",) if name in self._shown}
            left = self._left(step)
            text = ", ".join(_words({**sticky, **row}, 0) + ([f"{left} left"] if left else []))
            print(f"{self.unit} {step}/{self._steps()}  {text}", file=sys.stderr, flush=True)

    def log_histograms(self, step: int, layers: Mapping[str, Histogram]) -> None:
        """Nothing to show."""

    def know(self, figures: Row) -> None:
        """Take figures from before, to be shown with those to come."""
        self._shown.update({name: value for name, value in figures.items() if name in SHOWN})

    def say(self, text: str) -> None:
        """Print one line, above the other where there is one."""
        tqdm.write(text, file=sys.stderr)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Too much for a line."""

    def preempt(self) -> None:
        """Nothing to say; the caller prints how to go on."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Leave the line as it is."""
        if self._bar is not None:
            self._bar.close()

    def _fill(self, step: int) -> None:
        """Draw the line of a terminal anew, with a bar where there is room for one."""
        bar = self._bar
        assert bar is not None
        columns = (bar.format_dict["ncols"] or 80) - 1  # in the last one some terminals wrap
        line = self._line(step, columns)
        bar.bar_format = "{desc} |{bar}|" if columns - len(line) >= LEAST_BAR + 3 else "{desc}"
        bar.set_description_str(line, refresh=False)
        bar.total = self._steps()
        bar.n = step
        bar.refresh()

    def _line(self, step: int, columns: int) -> str:
        """What fits into so many columns: first in full, then in short, then without what matters least."""
        place, left = f"{step}/{self._steps()}", self._left(step)
        shown = dict(self._shown)
        lines = [", ".join([f"{self.unit} {place}", *_words(shown, 0), *([f"{left} left"] if left else [])])]
        for name in FIRST_TO_GO:
            shown.pop(name, None)
            lines.append(", ".join([place, *_words(shown, 1), *([left] if left else [])]))
        lines.append(" ".join([place, *_words(shown, 2), left]))
        return next((line for line in lines if len(line) <= columns), lines[-1][:columns])

    def _left(self, step: int) -> str:
        """The time that the other steps will take, as long as that is known."""
        if step <= self._begin or step >= self._steps():
            return ""
        seconds = (time.monotonic() - self._began) / (step - self._begin) * (self._steps() - step)
        return tqdm.format_interval(seconds)


def _words(figures: Mapping[str, float], length: int) -> list[str]:
    return [SHOWN[name][length].format(figures[name]) for name in SHOWN if name in figures]
