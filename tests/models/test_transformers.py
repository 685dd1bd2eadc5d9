"""Models of transformers by name: their weights or fresh ones, in float32, and what is said where they are missing."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from distprune.errors import ConfigError, MissingError
from distprune.models import build_model, load_weights
from tests.hf_jobs import write_bert, write_llama


def bert(folder, pretrained=True, **args):
    torch.manual_seed(1)
    return build_model(f"hf:{folder}", args, 2, "model", "text_classification", pretrained)


def test_weights_are_those_of_the_folder_and_a_head_of_another_size_is_refused(tmp_path):
    weights = load_file(write_bert(tmp_path / "bert") / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in bert(tmp_path / "bert").state_dict().items())
    with pytest.raises(ConfigError, match=r"classifier\.weight is \(2, 32\), here \(5, 32\)"):
        bert(tmp_path / "bert", num_labels=5)


def test_fresh_weights_take_the_config_alone_and_are_those_of_the_seed(tmp_path):
    weights = load_file(write_bert(tmp_path / "bert") / "model.safetensors")
    (tmp_path / "bert" / "model.safetensors").unlink()
    ones = [bert(tmp_path / "bert", **how).state_dict() for how in ({"pretrained": False}, {"pretrained": False})]
    name = "bert.pooler.dense.weight"
    assert torch.equal(ones[0][name], ones[1][name])
    assert not torch.equal(ones[0][name], weights[name])
    assert len(bert(tmp_path / "bert", False, num_hidden_layers=1, num_labels=7).classifier.weight) == 7


def test_half_precision_becomes_float32(tmp_path):
    folder = write_llama(tmp_path / "llama")
    weights = {n: w.bfloat16() for n, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = AutoConfig.from_pretrained(folder)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    for pretrained in (True, False):
        model = build_model(f"hf:{folder}", {}, 24, task="causal_lm", pretrained=pretrained)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_file_that_names_tied_weights_once_fits(tmp_path):
    folder = write_llama(tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    model = build_model(f"hf:{folder}", {}, 24, task="causal_lm")
    load_weights(model, str(folder / "model.safetensors"))
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("name", "args", "kind", "words"),
    [
        ("hf:nobody/nothing", {}, MissingError, r"model\.name: cannot load nobody/nothing: .*couldn't connect"),
        ("hf:FOLDER/none", {}, ConfigError, r"model\.name: .*none: no such folder"),
        ("hf:FOLDER/bert", {"layers": 3}, ConfigError, r"model\.args: BertConfig has no 'layers'"),
    ],
)
def test_what_is_missing_or_unknown_is_named(tmp_path, name, args, kind, words):
    write_bert(tmp_path / "bert")
    with pytest.raises(kind, match=words):
        build_model(name.replace("FOLDER", str(tmp_path)), args, 2, "model", "text_classification", True)


def test_without_transformers_the_message_says_what_to_install(monkeypatch):
    for module in ("transformers", "transformers.utils"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"needs transformers; pip install 'distprune\[transformers\]'"):
        build_model("hf:bert", {}, 2, task="text_classification")
