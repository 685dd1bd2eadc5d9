"""Models of transformers in the main job: figures, files, ranks, shards, stops, teachers and channels."""

import json
import math
import signal
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from distprune.cli import main as command
from distprune.train import main
from tests.data.made import keep_writes_in
from tests.hf_jobs import classifier, language_model, write_bert, write_llama
from tests.jobs import ROOT, read_json, read_rows
from tests.training.runs import reached, run, whole

LONG = (
    "phases={dense: {steps: 20, lr: 0.002}, prune: {steps: 30, lr: 0.001}, finetune: {steps: 60, lr: 0.001}}",
    "train.accumulate=2",
    "run.log_every=2",
)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keep_writes_in(tmp_path / "caches", monkeypatch)
    AcceleratorState._reset_state(reset_partial_state=True)


def printed(capsys, *words):
    capsys.readouterr()
    assert command([*words]) == 0
    return capsys.readouterr().out


def zeros_of(weights, names):
    return sum(int((weights[name] == 0).sum()) for name in names)


def test_a_classifier_is_pruned_without_its_head_and_loads_as_a_model_of_transformers(tmp_path, capsys):
    words = classifier(tmp_path)
    assert main([*words, "run.dir=run"]) == 0
    summary, weights = read_json("run/summary.json"), load_file("run/model.safetensors")
    assert summary["prune/weights"] == 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 32, "attention, MLP, pooler"
    assert summary["prune/zeros"] == round(0.8 * summary["prune/weights"])
    assert summary["eval/top1"] == summary["dense/top1"] == 100.0
    assert "eval/perplexity" not in summary
    assert all("train/loss_kd" in row for row in read_rows("run") if row["trainer/step"] > 30 and "train/loss" in row)

    counted = json.loads(printed(capsys, "evaluate", "run"))
    assert counted["eval/top1"] == summary["eval/top1"]
    assert counted["eval/loss"] == pytest.approx(summary["eval/loss"], rel=1e-6)

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained("run"), AutoTokenizer.from_pretrained("run")
    assert zeros_of(dict(model.named_parameters()), summary["prune/layers"]) == summary["prune/zeros"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert AutoModel.from_pretrained("run").config.architectures == ["BertForSequenceClassification"]
    texts = tokenizer(["w3 w1 w4 w1 w5", "w15 w11"], padding=True, return_tensors="pt")
    assert model.eval()(**texts).logits.argmax(1).tolist() == [0, 1]

    plan = " ".join(printed(capsys, "plan", *words, "run.dir=other").split())
    assert "160 training and 48 evaluation texts, 2 classes" in plan
    assert "left dense: classifier.weight" in plan
    assert "left dense: bert.embeddings.word_embeddings.weight" in plan
    assert "untrained" not in plan


def test_next_tokens_are_foretold_and_counted_one_by_one(tmp_path, capsys):
    assert main([*language_model(tmp_path), "run.dir=run"]) == 0
    summary = read_json("run/summary.json")
    assert summary["prune/zeros"] == round(0.5 * summary["prune/weights"])
    assert summary["eval/perplexity"] == pytest.approx(math.exp(summary["eval/loss"]))
    assert 20 > summary["eval/perplexity"] > 1

    model, tokenizer = AutoModelForCausalLM.from_pretrained("run"), AutoTokenizer.from_pretrained("run")
    assert model.config.use_cache
    assert zeros_of(dict(model.named_parameters()), summary["prune/layers"]) == summary["prune/zeros"]
    lines = (tmp_path / "rhymes" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    ids = torch.tensor([token for line in lines for token in tokenizer(json.loads(line)["text"])["input_ids"]])
    blocks = ids[: len(ids) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        theirs = model.eval()(input_ids=blocks, labels=blocks)
    assert summary["eval/loss"] == pytest.approx(theirs.loss.item(), rel=1e-5)
    right = theirs.logits[:, :-1].argmax(-1) == blocks[:, 1:]
    assert summary["eval/top1"] == pytest.approx(100 * right.float().mean().item(), rel=1e-6)
    assert json.loads(printed(capsys, "evaluate", "run"))["eval/samples"] == right.numel()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "job"), [("cpu", language_model), pytest.param("fsdp2", classifier, marks=pytest.mark.soak)]
)
def test_two_ranks_learn_the_same_and_go_on_to_the_same_bytes(tmp_path, environment, launcher, job):
    words = [*job(tmp_path), *LONG]
    text = (ROOT / "launch" / f"{launcher}.yaml").read_text(encoding="utf-8")
    layers = "TRANSFORMER_BASED_WRAP\n  fsdp_transformer_layer_cls_to_wrap: BertLayer"
    (tmp_path / "launch.yaml").write_text(text.replace("SIZE_BASED_WRAP", layers), encoding="utf-8")
    program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    program += ["--config_file", str(tmp_path / "launch.yaml"), "-m", "distprune.train", *words]

    def start(name, **when):
        return run([*program, f"run.dir={name}"], tmp_path, environment, **when)

    code, output = start("undisturbed")
    assert code == 0, output
    _, output = start("stopped", send=signal.SIGTERM, once=reached(tmp_path / "stopped", 24))
    assert read_json("stopped/status.json")["state"] == "preempted", output
    code, output = start("stopped")
    assert code == 0, output
    assert whole(tmp_path / "stopped") == whole(tmp_path / "undisturbed")
    summary = read_json("stopped/summary.json")
    assert zeros_of(load_file("stopped/model.safetensors"), summary["prune/layers"]) == summary["prune/zeros"]

    assert main([*words, "train.accumulate=1", "run.dir=alone"]) == 0
    alone = read_json("alone/summary.json")
    assert summary["prune/zeros"] == alone["prune/zeros"]
    for a, b in zip(read_rows("alone"), read_rows("stopped"), strict=True):
        if "train/loss" in a and a["trainer/step"] <= 20:
            assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-3)


def test_teachers_come_from_folders_and_files_and_pairs_from_two_columns(tmp_path):
    pairs = ("data.pair_column=second", "phases.dense={}", "phases.prune.steps=6", "phases.finetune.steps=2")
    words = classifier(tmp_path, *pairs, "prune.every=2")
    write_bert(tmp_path / "wide", hidden_size=48)
    teachers = f"[dense, {{name: 'hf:{tmp_path}/wide'}}, {{weights: {tmp_path}/bert/model.safetensors}}]"
    features = "[{student: bert.encoder.layer.1, teacher: bert.encoder.layer.1, of: 1}]"
    assert main([*words, "run.dir=run", f"distill.teacher={teachers}", f"distill.features={features}"]) == 0
    row = next(row for row in read_rows("run") if "train/loss" in row)
    assert row["train/loss_kd"] > 0
    assert row["train/loss_feature"] > 0


def test_heads_and_embeddings_are_pruned_on_request(tmp_path):
    words = classifier(tmp_path, "phases.dense={}", "phases.prune.steps=2", "phases.finetune.steps=0", "distill=null")
    assert main([*words, "run.dir=run", "prune.include=[classifier.weight, '*word_embeddings*']"]) == 0
    assert read_json("run/summary.json")["prune/layers"].keys() == {
        "bert.embeddings.word_embeddings.weight",
        "classifier.weight",
    }


def test_a_model_without_weights_is_drawn_from_its_config(tmp_path):
    words = classifier(tmp_path, "phases.dense.steps=2", "phases.prune.steps=2", "phases.finetune.steps=0")
    (tmp_path / "bert" / "model.safetensors").unlink()
    assert main([*words, "run.dir=run", "model.args={pretrained: false, num_hidden_layers: 1}"]) == 0
    assert read_json("run/summary.json")["prune/weights"] == 4 * 32 * 32 + 2 * 32 * 64 + 32 * 32


def test_heads_and_channels_of_an_mlp_are_removed_from_bert(tmp_path, capsys):
    words = classifier(tmp_path, "prune.pattern=channels", "prune.sparsity=0.4", "prune.channels={budget: channels}")
    assert main([*words, "run.dir=run"]) == 0
    summary, weights = read_json("run/summary.json"), load_file("run/model.safetensors")
    assert summary["params/total"] == sum(weight.numel() for weight in weights.values()) < summary["params/dense"]
    shapes = [layer["shape"] for name, layer in summary["prune/layers"].items() if name.endswith("self.value")]
    assert shapes == [[2], [2]]
    assert len(weights["bert.encoder.layer.0.attention.self.value.weight"]) in (16, 32)
    assert len(weights["bert.encoder.layer.0.intermediate.dense.weight"]) < 64
    assert not (tmp_path / "run" / "config.json").exists(), "no config.json tells of such widths"
    assert json.loads(printed(capsys, "evaluate", "run"))["eval/top1"] == summary["eval/top1"] > 90


def test_channels_of_an_mlp_are_removed_from_llama(tmp_path, capsys):
    words = language_model(
        tmp_path, "prune.pattern=channels", "prune.sparsity=0.3", "prune.channels={budget: channels}"
    )
    assert main([*words, "run.dir=run"]) == 0
    summary = read_json("run/summary.json")
    assert all(name.endswith("up_proj") for name in summary["prune/layers"]), "and what gates it"
    assert summary["params/total"] < summary["params/dense"]
    assert json.loads(printed(capsys, "evaluate", "run"))["eval/top1"] == summary["eval/top1"]


def test_a_decoder_classifies_with_the_padding_of_the_tokenizer(tmp_path):
    write_llama(tmp_path / "llama")
    words = classifier(tmp_path, f"model.name=hf:{tmp_path}/llama", f"data.tokenizer={tmp_path}/llama")
    assert main([*words, "run.dir=run"]) == 0
    assert read_json("run/summary.json")["eval/top1"] > 90
    assert read_json("run/config.json")["pad_token_id"] == 0


def test_each_layer_of_a_classifier_is_pruned_alone(tmp_path, capsys):
    printed(capsys, "sensitivity", *classifier(tmp_path), "--sparsities", "0.9", "--out", "found")
    layers = read_json("found/sensitivity.json")["layers"]
    assert len(layers) == 13, "six of each layer, and the pooler"
    assert "classifier.weight" not in layers


@pytest.mark.parametrize("key", ["model.name=hf:", "data.tokenizer="])
def test_what_is_on_the_hub_only_is_named_with_the_command_that_fetches_it(tmp_path, capsys, key):
    words = classifier(tmp_path, f"data.tokenizer={tmp_path}/bert", f"{key}nobody/nothing")
    assert main([*words]) == 2
    said = capsys.readouterr().err
    assert f"  - {key.partition('=')[0]}: cannot load nobody/nothing: " in said
    assert "this fetches it: distprune prepare " in said
    assert command(["prepare", *words]) == 2
    assert "unset HF_HUB_OFFLINE to fetch it" in capsys.readouterr().err


def test_prepare_makes_what_a_job_is_made_of(tmp_path, capsys):
    assert f"data      {tmp_path}/rhymes: 250 and 50 blocks of tokens" in printed(
        capsys, "prepare", *language_model(tmp_path)
    )
