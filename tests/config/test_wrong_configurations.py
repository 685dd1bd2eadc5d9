"""Wrong configurations end with exit code 2 and one readable message, and nothing is written."""

import logging
import os
import signal
import subprocess
import sys

import pytest

from distprune.train import main
from tests.config.sets import make_sets
from tests.config.wrong_jobs import CASES, COLOUR, GREY, JOB, TEXTS, TOKENS
from tests.jobs import ROOT


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The folder of data, weights and nets that the cases name."""
    folder = tmp_path_factory.mktemp("sets")
    make_sets(folder)
    return folder


@pytest.fixture
def job(tmp_path, monkeypatch, sets):
    """Run the job with overrides in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(sets)
    (tmp_path / "job.yaml").write_text(JOB, encoding="utf-8")
    return lambda *words: main(["job.yaml", *(word.replace("SETS", str(sets)) for word in words)])


@pytest.fixture(autouse=True)
def _leave_no_handlers():
    """A run that begins leaves handlers behind, which must not outlive the test."""
    loggers = [logging.getLogger(name) for name in ("distprune", "py.warnings")]
    before = signal.getsignal(signal.SIGTERM), [list(logger.handlers) for logger in loggers]
    yield
    signal.signal(signal.SIGTERM, before[0])
    for logger, handlers in zip(loggers, before[1], strict=True):
        logger.handlers[:] = handlers
    logging.captureWarnings(False)


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def assert_one_message(text, words):
    """One head line, then one line a fault; every word of `words` somewhere in it."""
    head, *faults = text.splitlines()
    assert head.startswith("distprune: ")
    assert head.endswith("1 fault" if len(faults) == 1 else f"{len(faults)} faults")
    assert faults
    assert all(line.startswith("  - ") for line in faults), text
    assert "Traceback" not in text
    for word in words:
        assert word in text, f"{word!r} is not in the message:\n{text}"


@pytest.mark.parametrize(
    "words", [(), GREY, COLOUR, TEXTS, TOKENS], ids=["digits", "parquet", "folder", "texts", "tokens"]
)
def test_the_job_that_the_cases_get_wrong_is_right(job, words, capsys):
    assert job(*words) == 0, capsys.readouterr().err


@pytest.mark.parametrize(("words", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_wrong_configuration(job, words, expected, sets, tmp_path, capsys):
    before = files(tmp_path), files(sets)
    assert job(*words) == 2
    out, err = capsys.readouterr()
    assert_one_message(err, [word.replace("SETS", str(sets)) for word in expected])
    assert out == ""
    assert (files(tmp_path), files(sets)) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", ["not valid YAML", "job.yaml", "line 1"]),
        ("- model\n", ["mapping of sections"]),
        ("", ["mapping of sections"]),
        (JOB.replace("name: digits_cnn", ""), ["model.name", "missing"]),
        (JOB.replace("prune: {sparsity: 0.5, every: 2}\n", ""), ["prune", "missing"]),
        (JOB.replace("prune: {steps: 4}", "prune: {stepz: 4}"), ["job.yaml:10, phases.prune.stepz", "'steps'"]),
    ],
    ids=["no YAML", "list", "empty", "missing key", "missing section", "unknown key"],
)
def test_wrong_file(job, text, expected, tmp_path, capsys):
    (tmp_path / "job.yaml").write_text(text, encoding="utf-8")
    before = files(tmp_path)
    assert job() == 2
    assert_one_message(capsys.readouterr().err, expected)
    assert files(tmp_path) == before


def test_file_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.yaml").write_text(JOB, encoding="utf-8")
    assert main(["digit.yaml"]) == 2
    assert_one_message(capsys.readouterr().err, ["cannot read", "digit.yaml", "did you mean digits.yaml?"])
    assert [path.name for path in tmp_path.iterdir()] == ["digits.yaml"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prune.sparcity=0.5"], ["prune.sparcity", "did you mean 'sparsity'?"]),
        # What libraries log at this goes past pytest's capture, but not past the user's eyes.
        ([*GREY, "data.path=SETS/no_parquet"], ["no_parquet", "Parquet"]),
    ],
    ids=["unknown key", "file that is no parquet"],
)
def test_the_command_ends_with_code_2_and_one_message(words, expected, sets, tmp_path):
    (tmp_path / "job.yaml").write_text(JOB, encoding="utf-8")
    words = [word.replace("SETS", str(sets)) for word in words]
    program = [sys.executable, "-m", "distprune.train", "job.yaml", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 2
    assert_one_message(ended.stderr, expected)
    assert ended.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]
