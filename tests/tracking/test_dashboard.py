"""`distprune dashboard`: what W&B is told of the workspace, without W&B."""

import json
import re
import sys
from pathlib import Path

import pytest

from distprune.cli import main
from distprune.tracking import dashboard
from tests.jobs import read_json

GOLDEN = Path(__file__).parent / "golden" / "dashboard.json"
"""Written anew by: python -m tests.tracking.test_dashboard"""


def told(value):
    """What is told, without what is not set and without the ids of panels, which are random."""
    if isinstance(value, dict):
        return {name: told(inner) for name, inner in value.items() if inner is not None and name != "__id__"}
    return [told(inner) for inner in value] if isinstance(value, list) else value


def panels(view):
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    """Neither a key nor a network."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_login")
def test_the_workspace_is_that_of_the_golden_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["dashboard", "--entity", "team", "--project", "nets", "--json", "--save-to", "board.json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert told(printed) == read_json(GOLDEN)
    assert printed == read_json("board.json")
    assert [path.name for path in tmp_path.iterdir()] == ["board.json"]


def test_every_section_shows_what_runs_log():
    found = panels(dashboard.view("team", "nets"))
    assert list(found) == [
        "progress", "sparsity", "sparsity by layer", "accuracy", "channels", "system", "comparison over runs",
    ]  # fmt: skip
    pages = (Path(__file__).parents[2] / "docs" / "wandb.md").read_text(encoding="utf-8")
    for name, of_section in found.items():
        lines = [panel["config"] for panel in of_section if panel["viewType"] == "Run History Line Plot"]
        assert {line["xAxis"] for line in lines} <= {"_runtime" if name == "system" else "trainer/step"}
        for metric in (metric for line in lines for metric in line["metrics"]):
            assert f"`{metric}`" in pages, "the names that are logged are listed there"
    patterns = [panel["config"].get("metricRegex") or "^$" for of_section in found.values() for panel in of_section]
    for metric in ("train/loss_kd", "prune/layer/0.weight", "eval/top1", "eval/held_out/top1", "eval/loss"):
        assert any(re.fullmatch(pattern, metric) for pattern in patterns), metric


@pytest.mark.usefixtures("no_login")
@pytest.mark.parametrize(
    ("key", "words"), [(None, ["no API key", "wandb login", "--json"]), ("0" * 40, ["cannot be reached", "--json"])]
)
def test_without_a_login_or_a_network_it_says_what_to_do(monkeypatch, capsys, key, words):
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    assert main(["dashboard"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(word in printed.err for word in words), printed.err
    assert len(printed.err.splitlines()) == 2


def test_without_the_package_it_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert main(["dashboard", "--json"]) == 2
    assert "pip install 'distprune[wandb]'" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named(capsys, tmp_path):
    assert main(["dashboard", "--save-to", str(tmp_path / "no" / "board.json")]) == 2
    assert "--save-to: cannot write" in capsys.readouterr().err


def test_a_file_below_a_file_is_refused(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert main(["dashboard", "--save-to", str(tmp_path / "file" / "x.json")]) == 2
    assert "--save-to: cannot write" in capsys.readouterr().err


def test_a_word_too_many_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["dashboard", "runs/digits"])
    assert ended.value.code == 2
    assert "unrecognized arguments: runs/digits" in capsys.readouterr().err


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(told(dashboard.view("team", "nets")), indent=1) + "\n", encoding="utf-8")
