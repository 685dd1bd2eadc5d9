"""What lies on the network is fetched ahead; jobs do without, and say what is missing."""

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants

from distprune.cli import main
from distprune.models import build_model
from distprune.models.weights import local_file
from tests.jobs import DIGITS, SHORT, read_json


@pytest.fixture
def address(tmp_path):
    """Serves weights of the digits net over http, with a hash in their name; the address of the file."""
    folder = tmp_path / "server"
    folder.mkdir()
    torch.save(build_model("digits_cnn", {}, 10).state_dict(), folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    (folder / "weights.pth").rename(folder / f"digits-{digest[:8]}.pth")
    (folder / "digits-abcdef00.pth").write_bytes((folder / f"digits-{digest[:8]}.pth").read_bytes())
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/digits-{digest[:8]}.pth"
        server.shutdown()
        thread.join()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def answer(monkeypatch, capsys, tmp_path):
    """Call the command; its exit code, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTPRUNE_CACHE", str(tmp_path / "cache"))

    def call(*words, offline):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        code = main([*words])
        return code, *capsys.readouterr()

    return call


def test_weights_are_fetched_once_and_jobs_need_no_network(answer, address, tmp_path):
    words = [str(DIGITS), f"model.weights={address}"]
    folder = tmp_path / "cache" / "weights" / hashlib.sha256(address.encode()).hexdigest()[:16]
    file = folder / address.rpartition("/")[2]

    code, _, said = answer("train", *words, *SHORT, offline=True)
    assert code == 2
    assert f"model.weights: {address} is not in {file.parent}, and HF_HUB_OFFLINE forbids to fetch it" in said
    assert said.endswith(f"this fetches it: distprune prepare {' '.join([*words, *SHORT[:3]])}\n")
    assert not (tmp_path / "runs").exists()

    code, _, said = answer("prepare", *words, offline=True)
    assert code == 2
    assert "unset HF_HUB_OFFLINE to fetch it" in said

    code, printed, said = answer("prepare", *words, offline=False)
    assert code == 0, said
    assert f"weights   {file} (" in printed
    assert f"DISTPRUNE_CACHE={tmp_path / 'cache'} HF_HUB_OFFLINE=1" in printed
    assert file.exists()

    code, _, said = answer("train", *words, *SHORT, "phases.dense.epochs=0", offline=True)
    assert code == 0, said
    assert read_json(tmp_path / "runs" / "digits" / "status.json")["state"] == "done"


def test_a_teacher_is_fetched_too(answer, address, tmp_path):
    words = [str(DIGITS), f"distill.teacher={{weights: '{address}'}}"]
    code, printed, said = answer("prepare", *words, offline=False)
    assert code == 0, said
    (file,) = (tmp_path / "cache").rglob("*.pth")
    assert str(file) in printed


def test_files_of_one_name_are_told_apart(tmp_path, address, monkeypatch):
    monkeypatch.setenv("DISTPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    base = address.rpartition("/")[0]
    for name in ("a", "b"):
        (tmp_path / "server" / name).mkdir()
        (tmp_path / "server" / name / "model.pth").write_text(name)
    assert [local_file(f"{base}/{name}/model.pth", "model.weights").read_text() for name in ("a", "b")] == ["a", "b"]


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ("BASE/digits-abcdef00.pth", 'invalid hash value (expected "abcdef00"'),
        ("BASE/none.pth", "HTTP Error 404"),
        ("http://127.0.0.1:9/none.pth", "Connection refused>; run this where there is a network"),
        ("BASE/", "names no file"),
        ("torchvision:ResNet50_Weights.NONE", "torchvision has no weights 'ResNet50_Weights.NONE'"),
        ("torchvision:Nonsense", "torchvision has no weights 'Nonsense'"),
    ],
)
def test_what_cannot_be_fetched_is_named_and_leaves_nothing(answer, address, tmp_path, weights, fault):
    weights = weights.replace("BASE", address.rpartition("/")[0])
    code, _, said = answer("prepare", str(DIGITS), f"model.weights={weights}", offline=False)
    assert code == 2
    assert fault in said
    assert not list((tmp_path / "cache").rglob("*.pth"))


def test_torchvision_weights_go_by_their_names(answer, tmp_path):
    words = ["torchvision:ResNet18_Weights.IMAGENET1K_V1"]
    code, _, said = answer("plan", str(DIGITS), f"model.weights={words[0]}", offline=True)
    assert code == 2
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth is not in" in said


def test_a_data_set_of_the_hub_that_is_missing_names_the_command(answer):
    words = [str(DIGITS), "data.source=hub", "data.path=nobody/nothing"]
    code, _, said = answer("plan", *words, offline=True)
    assert code == 2
    assert "cannot load split 'train' of hub nobody/nothing" in said
    assert said.endswith(f"distprune prepare {' '.join(words)}\n")
