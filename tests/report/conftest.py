"""Runs to report on, made once for all tests."""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from distprune.train import main
from tests.analysis.conftest import nothing_left_behind
from tests.jobs import DIGITS, SHORT, read_json
from tests.report.folders import add_analysis, add_exports, add_histograms, add_rounds, add_validation


@dataclass(frozen=True)
class Done:
    """A run that is done, and what it said on the terminal."""

    folder: Path
    said: str


def run(folder, *overrides):
    """A short run in `folder`; its exit code and what it said."""
    said = io.StringIO()
    with nothing_left_behind(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(DIGITS), *SHORT, f"run.dir={folder}", *overrides])
    return code, said.getvalue()


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """An unstructured run, as it is left."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    code, said = run(folder)
    assert code == 0, said
    return Done(folder, said)


@pytest.fixture(scope="session")
def channels(tmp_path_factory):
    """A run that takes whole channels out."""
    folder = tmp_path_factory.mktemp("runs") / "channels"
    code, said = run(folder, "prune.pattern=channels", "prune.sparsity=0.5")
    assert code == 0, said
    return Done(folder, said)


@pytest.fixture
def copied(done, tmp_path):
    """A copy of the unstructured run, to change."""
    return Path(shutil.copytree(done.folder, tmp_path / "runs" / "digits"))


@pytest.fixture(scope="session")
def full(done, tmp_path_factory):
    """The unstructured run, with all that other commands may have written; its name must be escaped."""
    folder = Path(shutil.copytree(done.folder, tmp_path_factory.mktemp("full") / "digits <b>&amp;"))
    layers = list(read_json(folder / "summary.json")["prune/layers"])
    add_analysis(folder, layers)
    add_validation(folder, classes=30)
    add_exports(folder)
    add_histograms(folder, layers)
    add_rounds(folder)
    return folder


@pytest.fixture(scope="session")
def four(done, full, channels, tmp_path_factory):
    """Four runs that differ."""
    sparser = Path(shutil.copytree(done.folder, tmp_path_factory.mktemp("sparser") / "digits-95"))
    config = (sparser / "config.yaml").read_text(encoding="utf-8")
    (sparser / "config.yaml").write_text(config.replace("  sparsity: 0.9\n", "  sparsity: 0.95\n"), encoding="utf-8")
    summary = read_json(sparser / "summary.json") | {"prune/sparsity": 0.95, "eval/top1": 90.0}
    (sparser / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return [done.folder, full, channels.folder, sparser]
