"""The dense and the pruned model side by side, at the end of a run."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from distprune.config import load_config
from distprune.data import PADDING, load_images, normalize
from distprune.models import build_model, load_weights
from distprune.train import main
from distprune.training import validation
from distprune.training.validation import compare
from tests.hf_jobs import classifier, language_model
from tests.jobs import DIGITS, SHORT, read_json, read_rows
from tests.training.runs import run as run_program


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*overrides, name="run"):
    assert main([str(DIGITS), *SHORT, f"run.dir={name}", *overrides]) == 0
    return read_json(f"{name}/validation.json")["sets"]


class Fixed(nn.Module):
    """Answers in its turn what it was told to."""

    def __init__(self, answers, classes):
        super().__init__()
        self.answers, self.classes = answers, classes

    def forward(self, inputs):
        return 5.0 * F.one_hot(self.answers[inputs.long()], self.classes).float()


def test_counts_are_those_of_a_plain_loop():
    labels = torch.randint(0, 4, (100,))
    labels[labels == 2] = 3
    before, after = (torch.where(torch.rand(100) < 0.7, labels, torch.randint(0, 4, (100,))) for _ in range(2))
    dense, pruned = Fixed(before, 4).train(), Fixed(after, 4).train()
    batches = [(part, labels[part]) for part in torch.arange(100).split(33)]
    batches.append((torch.tensor([0, 1, 2]), torch.tensor([int(labels[0]), PADDING, PADDING])))
    found = compare(dense, pruned, batches, ["ant", "bee", "cat", "dog"], Accelerator(cpu=True))
    assert dense.training
    assert pruned.training

    expected = {name: [0, 0, 0] for name in ("ant", "bee", "dog")}
    agree = lost = gained = 0
    for index in [*range(100), 0]:
        label, old, new = (int(x[index]) for x in (labels, before, after))
        for place, hit in enumerate((True, old == label, new == label)):
            expected[["ant", "bee", "cat", "dog"][label]][place] += hit
        agree += old == new
        lost += old == label != new
        gained += new == label != old
    assert (found["samples"], found["agree"], found["lost"], found["gained"]) == (101, agree, lost, gained)
    assert found["classes"] == [
        {"name": name, "samples": n, "dense": 100 * old / n, "pruned": 100 * new / n}
        for name, (n, old, new) in expected.items()
    ]
    for which, answers, place in (("dense", before, 1), ("pruned", after, 2)):
        assert found[which]["top1"] == pytest.approx(100 * sum(hits[place] for hits in expected.values()) / 101)
        logits = 5.0 * F.one_hot(answers[[*range(100), 0]], 4).float()
        assert found[which]["loss"] == pytest.approx(float(F.cross_entropy(logits, labels[[*range(100), 0]])))


def test_without_a_dense_model_there_is_nothing_to_compare_with():
    labels = torch.arange(4)
    found = compare(None, Fixed(labels, 4), [(labels, labels)], list("abcd"), Accelerator(cpu=True))
    assert found["pruned"]["top1"] == 100
    assert [found[key] for key in ("dense", "agree", "lost", "gained")] == [None] * 4
    assert found["classes"][0] == {"name": "a", "samples": 1, "dense": None, "pruned": 100.0}
    assert validation.top1s({"eval": found}) == {"validation/eval/pruned_top1": 100.0}


def test_a_loss_that_is_not_finite_is_null():
    labels = torch.arange(4)
    broken = Fixed(labels, 4)
    broken.forward = lambda inputs: torch.full((len(inputs), 4), torch.nan)
    found = compare(broken, Fixed(labels, 4), [(labels, labels)], list("abcd"), Accelerator(cpu=True))
    assert found["dense"]["loss"] is None
    json.dumps(found, allow_nan=False)


def test_a_run_ends_with_figures_of_all_sets_that_fit_its_summary(capsys):
    sets = run("eval.sets={more: 'train[:200]'}", "eval.corruptions=[blur]")
    assert list(sets) == ["eval", "more", "blur-1", "blur-2", "blur-3"]
    summary = read_json("run/summary.json")
    assert sets["eval"]["pruned"] == {"top1": summary["eval/top1"], "loss": summary["eval/loss"]}
    assert sets["more"]["pruned"] == {"top1": summary["eval/more/top1"], "loss": summary["eval/more/loss"]}
    assert sets["eval"]["dense"]["top1"] == summary["dense/top1"] == summary["validation/eval/dense_top1"]
    assert sets["blur-2"]["pruned"]["top1"] == summary["validation/blur-2/pruned_top1"]
    assert sets["blur-1"]["dense"]["loss"] < sets["blur-2"]["dense"]["loss"] < sets["blur-3"]["dense"]["loss"]
    assert not Path("run/validation-so-far.json").exists()

    data = load_config(DIGITS).data
    table = load_images(data, "test")
    images = normalize(table.images.get(list(range(360))), torch.tensor(data.mean), torch.tensor(data.std))
    right = {}
    for name in ("dense", "model"):
        model = build_model("digits_cnn", {}, 10).eval()
        load_weights(model, f"run/{name}.safetensors")
        with torch.no_grad():
            right[name] = model(images).argmax(1) == table.labels
    for number, found in enumerate(sets["eval"]["classes"]):
        of_class = table.labels == number
        assert (found["name"], found["samples"]) == (str(number), int(of_class.sum()))
        for name, key in (("dense", "dense"), ("model", "pruned")):
            assert found[key] == 100 * int(right[name][of_class].sum()) / found["samples"]
    assert sets["eval"]["lost"] == int((right["dense"] & ~right["model"]).sum())


@pytest.mark.parametrize(
    "settings",
    [("distill=null",), ("prune.pattern=channels", "prune.sparsity=0.5"), ("distill.teacher={weights: first.pt}",)],
    ids=["no teacher", "channels", "another teacher"],
)
def test_the_dense_model_is_read_back_where_it_is_no_teacher(settings):
    torch.save(build_model("digits_cnn", {}, 10).state_dict(), "first.pt")
    sets = run(*settings)
    summary = read_json("run/summary.json")
    assert sets["eval"]["dense"]["top1"] == summary["dense/top1"]
    assert sets["eval"]["pruned"]["top1"] == summary["eval/top1"]


def test_a_run_that_prunes_nothing_has_no_dense_model():
    assert run("phases.prune={}", "phases.finetune={}", "prune.sparsity=0", "distill=null")["eval"]["dense"] is None


def test_texts_have_classes_and_next_tokens_none(tmp_path):
    assert main([*classifier(tmp_path), "run.dir=texts"]) == 0
    texts = read_json("texts/validation.json")["sets"]["eval"]
    lines = (tmp_path / "sentences" / "validation.jsonl").read_text().splitlines()
    ones = sum(json.loads(line)["label"] for line in lines)
    assert [(one["name"], one["samples"]) for one in texts["classes"]] == [("0", 48 - ones), ("1", ones)]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*language_model(tmp_path), "run.dir=tokens"]) == 0
    tokens, summary = read_json("tokens/validation.json")["sets"]["eval"], read_json("tokens/summary.json")
    assert tokens["classes"] == []
    assert tokens["samples"] > 500
    assert tokens["pruned"] == {"top1": summary["eval/top1"], "loss": summary["eval/loss"]}
    assert tokens["agree"] + tokens["lost"] + tokens["gained"] <= tokens["samples"]


def test_a_validation_that_is_stopped_goes_on_with_the_sets_that_are_left(monkeypatch):
    job = ("eval.corruptions=[contrast]", "eval.batch_size=100")
    expected = run(*job, name="undisturbed")
    AcceleratorState._reset_state(reset_partial_state=True)
    counted = []

    def stopping(dense, pruned, batches, *more):
        counted.append(1)
        if len(counted) == 3:
            signal.raise_signal(signal.SIGTERM)
        return compare(dense, pruned, batches, *more)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(validation, "compare", stopping)
    try:
        assert main([str(DIGITS), *SHORT, "run.dir=run", *job]) == 75
        assert "while the model was validated" in read_json("run/status.json")["error"]
        assert list(read_json("run/validation-so-far.json")["sets"]) == ["eval", "contrast-1"]
        assert not Path("run/validation.json").exists()
        AcceleratorState._reset_state(reset_partial_state=True)
        assert run(*job) == expected
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(counted) == 3 + 2
    assert Path("run/validation.json").read_bytes() == Path("undisturbed/validation.json").read_bytes()
    assert not Path("run/validation-so-far.json").exists()
    steps = [row["trainer/step"] for row in read_rows("run")]
    assert steps == sorted(set(steps))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "launcher", "settings"),
    [(2, "cpu", ()), (2, "fsdp2", ("distill=null",)), (3, "fsdp2", ("distill.sharded=true",))],
)
def test_ranks_count_every_sample_once(tmp_path, start, processes, launcher, settings):
    """Against one process that reads the two files of weights."""
    folder = tmp_path / "run"
    job = ("eval.corruptions=[noise]", "run.dir=run", "phases.finetune.epochs=1", *settings)
    code, output = start(processes, *job, launcher=launcher)
    assert code == 0, output
    ours = read_json(folder / "validation.json")["sets"]
    words = [sys.executable, "-m", "distprune.cli", "validate", "run"]
    code, output = run_program(words, start.folder, start.environment)
    assert code == 0, output
    theirs = read_json(folder / "validation.json")["sets"]
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        for which in ("dense", "pruned"):
            assert found[which]["top1"] == theirs[name][which]["top1"], (name, which)
            assert found[which]["loss"] == pytest.approx(theirs[name][which]["loss"], rel=1e-4)
            found[which] = theirs[name][which]
        assert found == theirs[name]
