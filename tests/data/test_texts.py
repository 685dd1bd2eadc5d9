"""Texts as tokens, beside the tokenizer called on each text alone."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from distprune.config.schema import CausalLM, TextClassification
from distprune.data import PADDING, Order, eval_loader, load_texts, train_loader
from distprune.errors import ConfigError
from tests.hf_jobs import write_lines, write_rhymes, write_sentences, write_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def section(kind, folder, **more):
    task = {TextClassification: "text_classification", CausalLM: "causal_lm"}[kind]
    return kind(**{"task": task, "source": "json", "path": str(folder), **more})


def rows_of(folder, split="train"):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_texts_and_pairs_are_those_of_the_tokenizer_padded_to_the_longest(tmp_path, tokenizer):
    rows = rows_of(write_sentences(tmp_path / "set"))
    config = section(TextClassification, tmp_path / "set", text_column="sentence", pair_column="second", max_length=11)
    data = load_texts(config, "train", tokenizer)
    assert data.labels.tolist() == [row["label"] for row in rows]
    indices = [3, 0, 159, 3]
    inputs, labels = data.batch([(0, index) for index in indices])
    theirs = [
        tokenizer(rows[i]["sentence"], rows[i]["second"], truncation=True, max_length=11, padding="max_length")
        for i in indices
    ]
    assert inputs.keys() == {"input_ids", "attention_mask", "token_type_ids"}
    for name, values in inputs.items():
        assert values.tolist() == [one[name] for one in theirs], name
    assert labels.tolist() == [rows[i]["label"] for i in indices]
    short, _ = data.batch([(0, min(range(160), key=lambda i: len(rows[i]["sentence"])))])
    assert short["input_ids"].shape == (1, 8), "a multiple of 8"


def test_blocks_are_cut_from_all_texts_and_each_token_is_labelled_with_the_next(tmp_path, tokenizer):
    rows = rows_of(write_rhymes(tmp_path / "set", train=7))
    data = load_texts(section(CausalLM, tmp_path / "set", max_length=32), "train", tokenizer)
    flat = torch.tensor([token for row in rows for token in tokenizer(row["text"])["input_ids"]])
    assert len(data) == len(flat) // 32
    inputs, labels = data.batch([(0, index) for index in range(len(data))])
    assert torch.equal(inputs["input_ids"].flatten(), flat[: 32 * len(data)])
    assert torch.equal(labels[:, :-1], inputs["input_ids"][:, 1:])
    assert (labels[:, -1] == PADDING).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_the_batches_of_one_and_evaluate_each_sample_once(tmp_path, tokenizer, workers):
    write_rhymes(tmp_path / "set")
    data = load_texts(section(CausalLM, tmp_path / "set", max_length=16), "validation", tokenizer)
    loaders = [train_loader(data, Order(len(data), 12, 0), 3, rank, 2, 1, workers, False) for rank in range(2)]
    one = next(iter(train_loader(data, Order(len(data), 12, 0), 3, 0, 1, 1, 0, False)))
    two = [next(iter(loader)) for loader in loaders]
    assert torch.equal(one[0]["input_ids"], torch.cat([inputs["input_ids"] for inputs, _ in two]))
    counted = [labels for rank in range(3) for _, labels in eval_loader(data, 8, rank, 3, workers, False)]
    assert sum(int((labels != PADDING).sum()) for labels in counted) == 15 * len(data)


def test_tokens_are_made_once_for_each_tokenizer_and_length(tmp_path, tokenizer, monkeypatch):
    write_sentences(tmp_path / "set")
    config = section(TextClassification, tmp_path / "set", text_column="sentence", cache_dir=str(tmp_path / "tokens"))

    def load(**more):
        load_texts(config.model_copy(update=more), "train", tokenizer)
        return len(list((tmp_path / "tokens").glob("*.safetensors")))

    assert load() == 1
    with monkeypatch.context() as patched:
        patched.setattr(type(tokenizer), "__call__", None)
        assert load() == 1
    assert load(max_length=5) == 2
    tokenizer.add_tokens(["w100"])
    assert load() == 3


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (
            TextClassification,
            {"text_column": "sentense"},
            r"data\.text_column: train has no .*'sentense'.*=sentence",
        ),
        (TextClassification, {"pair_column": "label"}, r"data\.pair_column: 'label' holds .*, not texts"),
        (
            CausalLM,
            {"text_column": "sentence", "max_length": 512},
            r"data\.max_length: train has fewer than 512",
        ),
        (CausalLM, {"text_column": "gap"}, r"data\.text_column: text 2 is missing"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, tokenizer, kind, change, words):
    gaps = ["a", "b", None, "d"]
    write_lines(tmp_path / "train.jsonl", [{"sentence": "w1 w2", "gap": gap, "label": 0} for gap in gaps])
    with pytest.raises(ConfigError, match=words):
        load_texts(section(kind, tmp_path, **{"text_column": "sentence", **change}), "train", tokenizer)
