"""A Weights & Biases sweep: `wandb sweep` and `wandb agent` themselves, against a server of our own."""

import json
import os
import re
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.jobs import ROOT, SHORT, read_json
from tests.tracking.files import segments, steps
from tests.training.runs import reached, run

SWEEP, FIRST, SECOND = "sweep123", "trial001", "trial002"
QUICK = dict(word.split("=") for word in SHORT if "wandb" not in word)


class Server(ThreadingHTTPServer):
    """What the two commands ask of W&B: an agent that runs nothing is given the next of `trials`, or told to end."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.config, self.trials = "", []

    def answer(self, query, variables):
        """The data of a GraphQL query, by its name."""
        (name,) = re.findall(r"\b(?:query|mutation)\s+(\w+)", query)
        return getattr(self, name)(variables)

    def Viewer(self, _):
        return {"viewer": {"id": "1", "entity": "team", "username": "user", "email": "", "flags": "{}", "teams": None}}

    def UpsertSweep(self, variables):
        self.config = variables["config"]
        project = {"id": "2", "name": variables["projectName"], "entity": {"id": "3", "name": "team"}}
        return {"upsertSweep": {"sweep": {"name": SWEEP, "project": project}, "configValidationWarnings": []}}

    def SweepWithRuns(self, variables):
        assert variables["sweep"] == SWEEP
        return {"project": {"sweep": {"id": "4", "name": SWEEP, "config": self.config, "runs": {"edges": []}}}}

    def CreateAgent(self, _):
        return {"createAgent": {"agent": {"id": "5"}}}

    def Heartbeat(self, variables):
        commands = []
        if not json.loads(variables["runState"]):
            commands.append(self.trials.pop(0) if self.trials else {"type": "exit"})
        return {"agentHeartbeat": {"agent": {"id": "5"}, "commands": json.dumps(commands)}}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = b""
        if self.path == "/graphql":
            request = json.loads(body)
            answer = json.dumps({"data": self.server.answer(request["query"], request.get("variables"))}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def trial(kind, name, parameters):
    """What W&B tells an agent to start."""
    args = {key: {"value": value} for key, value in parameters.items()}
    return {"type": kind, "run_id": name, "program": "distprune/train.py", "args": args}


def run_wandb(words, where, port, once=None):
    """Run to the end, which SIGTERM brings about `once()`; returns the exit code and what was printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    wandb = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline"}
    environment = {**clean, "PATH": path, "HOME": str(where), **wandb}
    return run(words, where, environment, signal.SIGTERM, once)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, server):
    """A trial that is stopped with its agent, and an agent that goes on with it and does another."""
    where = tmp_path_factory.mktemp("sweep")
    (where / "wandb").mkdir()
    for name in ("configs", "launch"):
        (where / name).symlink_to(ROOT / name)
    code, output = run_wandb(["wandb", "sweep", "configs/sweep.yaml"], where, server.server_port)
    assert code == 0, output
    assert f"wandb agent team/distprune/{SWEEP}" in output
    grid = {key: of["values"] for key, of in yaml.safe_load(server.config)["parameters"].items()}
    first, second = ({key: values[end] for key, values in grid.items()} for end in (0, -1))
    agent = ["wandb", "agent", "--forward-signals", f"team/distprune/{SWEEP}"]
    folders = where / "runs" / SWEEP

    server.trials = [trial("run", FIRST, {**first, **QUICK, "phases.dense.epochs": 20})]
    _, stopped = run_wandb(agent, where, server.server_port, once=reached(folders / FIRST, 10))
    then = read_json(folders / FIRST / "status.json")

    # Parameters of a trial that goes on are the whole configuration of its run, with what W&B added to it.
    known = yaml.safe_load((folders / FIRST / "config.yaml").read_text(encoding="utf-8"))
    known |= {"world_size": 2, "_wandb": {"t": {"1": [1, 5]}}, **first}
    server.trials = [trial("resume", FIRST, known), trial("run", SECOND, {**second, **QUICK})]
    code, output = run_wandb(agent, where, server.server_port)
    assert code == 0, output
    assert server.trials == []
    return SimpleNamespace(
        folders=folders, of={FIRST: first, SECOND: second}, then=then, stopped=stopped, output=output
    )


@pytest.mark.slow
def test_each_trial_has_its_own_folder_and_parameters(sweep):
    assert sorted(folder.name for folder in sweep.folders.iterdir()) == [FIRST, SECOND], sweep.output
    for name, parameters in sweep.of.items():
        assert read_json(sweep.folders / name / "status.json")["state"] == "done", sweep.output
        config = yaml.safe_load((sweep.folders / name / "config.yaml").read_text(encoding="utf-8"))
        assert config["run"]["dir"] == f"runs/{SWEEP}/{name}"
        assert {"prune.sparsity": config["prune"]["sparsity"], "run.seed": config["run"]["seed"]} == parameters
    assert not set(sweep.of[FIRST].items()) & set(sweep.of[SECOND].items())


@pytest.mark.slow
def test_runs_are_those_of_the_sweep(sweep):
    for name, parameters in sweep.of.items():
        assert (sweep.folders / name / "wandb_id").read_text() == name
        found = segments(sweep.folders / name)
        assert [(s.run.run_id, s.run.sweep_id) for s in found] == [(name, SWEEP)] * (2 if name == FIRST else 1)
        for config in (segment.config for segment in found):
            assert config["prune"]["sparsity"] == config["prune.sparsity"] == parameters["prune.sparsity"]


@pytest.mark.slow
def test_a_trial_that_is_stopped_goes_on_with_the_next_agent(sweep):
    assert sweep.then["state"] == "preempted", sweep.stopped
    assert 10 <= sweep.then["step"] < sweep.then["steps"]
    before, after = map(steps, segments(sweep.folders / FIRST))
    assert before[-1] <= sweep.then["step"] <= after[0] < after[-1] == sweep.then["steps"]
    assert f"going on from step {sweep.then['step']}" in sweep.output


def test_auto_is_online_in_a_sweep_unless_the_environment_says_otherwise(monkeypatch, tmp_path):
    from distprune.config.schema import Wandb
    from distprune.tracking.wandb import _mode

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert _mode(Wandb()) == "offline"
    monkeypatch.setenv("WANDB_SWEEP_ID", SWEEP)
    assert _mode(Wandb()) == "online"
    assert _mode(Wandb(mode="offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert _mode(Wandb()) == "offline"
