"""What a person sees: a bar on a terminal, lines elsewhere."""

import io
import re

from distprune.tracking import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


ROW = {
    "trainer/step": 50,
    "train/loss": 0.25,
    "prune/sparsity": 0.5,
    "train/samples_per_s": 1234.0,
    "prune/update_ms": 1.0,
}


def test_a_terminal_gets_one_bar_with_what_matters(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(lambda: 100)
    progress.log(ROW)
    progress.say("a word")
    progress.finish(None)
    shown = terminal.getvalue()
    assert "50/100" in shown
    assert "loss 0.2500, sparsity 0.5000, 1234 samples/s" in shown
    assert "a word\n" in shown
    assert "update" not in shown


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
