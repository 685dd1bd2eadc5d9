"""What a person sees: one line on a terminal, lines elsewhere."""

import fcntl
import io
import os
import re
import struct
import termios
from contextlib import suppress

import pytest

from distprune.tracking import Progress

REST = "sparsity 0.8934, eval 91.73 %, 12346 samples/s, 10:00 left"


class Terminal:
    """A terminal of so many columns in place of stderr."""

    def __init__(self, monkeypatch, columns):
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
        self._theirs = os.fdopen(theirs, "w", encoding="utf-8")
        monkeypatch.setattr("sys.stderr", self._theirs)

    def shown(self):
        """What has been written to it; it is gone then."""
        self._theirs.close()
        written = b""
        with suppress(OSError):  # the end
            while part := os.read(self._ours, 1 << 16):
                written += part
        os.close(self._ours)
        return written.decode().replace("\r\n", "\n")


ROW = {
    "trainer/step": 50,
    "train/loss": 0.25,
    "prune/sparsity": 0.5,
    "train/samples_per_s": 1234.0,
    "prune/update_ms": 1.0,
}
LONG = {
    "trainer/step": 15000,
    "prune/round": 3.0,
    "train/loss": 1.23456,
    "train/top1": 67.8,
    "prune/sparsity": 0.89341,
    "eval/top1": 91.73,
    "train/samples_per_s": 12345.6,
}


def test_a_terminal_gets_one_line_with_what_matters(monkeypatch):
    terminal = Terminal(monkeypatch, 100)
    progress = Progress(lambda: 100)
    progress.log(ROW)
    progress.say("a word")
    progress.finish(None)
    shown = terminal.shown()
    assert re.search(r"\rstep 50/100, loss 0.2500, sparsity 0.5000, 1234 samples/s, \d\d:\d\d left \|█+. *\|", shown)
    assert "a word\n" in shown
    assert "update" not in shown


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (200, f"step 15000/36000, round 3, loss 1.2346, top1 67.80, {REST}"),
        (100, "15000/36000, r3, loss 1.23, top1 67.8, sparse 0.893, eval 91.7%, 12346/s, 10:00"),
        (80, "15000/36000, r3, loss 1.23, sparse 0.893, eval 91.7%, 12346/s, 10:00"),
        (47, "15000/36000, sparse 0.893, eval 91.7%, 10:00"),
        (40, "15000/36000 zeros 89% eval 91.7% 10:00"),
        (20, "15000/36000 zeros"),
    ],
)
def test_a_narrow_terminal_shows_what_matters_most_and_does_not_wrap(monkeypatch, columns, line):
    terminal = Terminal(monkeypatch, columns)
    progress = Progress(lambda: 36000)
    progress.log({"trainer/step": 10000, "eval/top1": 9.0})
    monkeypatch.setattr(progress, "_left", lambda step: "10:00")
    progress.log(LONG)
    progress.finish(None)
    drawn = terminal.shown().removesuffix("\n").split("\r")
    assert all(len(part) < columns for part in drawn), "the last column stays free"
    assert drawn[-1].split(" |")[0].rstrip() == line


def test_elsewhere_each_logged_step_is_a_line(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    progress = Progress(lambda: 100)
    progress.log(ROW)
    progress.log({"trainer/step": 60, "prune/sparsity": 0.75})
    progress.log({"trainer/step": 100, "eval/top1": 98.125})
    progress.finish(None)
    lines = file.getvalue().splitlines()
    assert re.fullmatch(r"step 50/100  loss 0.2500, sparsity 0.5000, 1234 samples/s, \d\d:\d\d left", lines[0])
    assert lines[1] == "step 100/100  sparsity 0.7500, eval 98.12 %"
    assert len(lines) == 2
