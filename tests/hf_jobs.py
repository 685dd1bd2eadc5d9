"""Small texts, and tiny models of transformers with a tokenizer, in folders; and jobs that train them."""

import json
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.jobs import ROOT

WORDS = [f"w{number}" for number in range(20)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SHORT = (
    "phases={dense: {steps: 30, lr: 0.002}, prune: {steps: 20, lr: 0.001}, finetune: {steps: 10, lr: 0.001}}",
    "prune.every=5",
    "run.log_every=10",
    "train.batch_size=16",
    "train.accumulate=1",
    "run.precision=fp32",
    "eval.every=null",
    "eval.batch_size=64",
    "tracking.wandb.mode=disabled",
)


def write_tokenizer(folder, ends=True):
    """A tokenizer of words; with `ends` it puts [CLS] and [SEP] around texts and between two."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        marks = [("[CLS]", 2), ("[SEP]", 3)]
        made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", marks)
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if ends else ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_input_names=inputs,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)


def write_bert(folder, labels=2, **settings):
    """A tiny BERT without dropout, with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, **settings}
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_labels=labels, **sizes,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_llama(folder, **settings):
    """A tiny Llama with random weights and grouped queries, whose head is tied to its embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=32, tie_word_embeddings=True, **settings,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, ends=False)
    return folder


def write_lines(path, rows):
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_sentences(folder, train=160, test=48):
    """Sentences of 3 to 11 words, all of the first half or of the second, which is the label."""
    draw = random.Random(0)
    for split, count in (("train", train), ("validation", test)):
        labels = [draw.randrange(2) for _ in range(count)]
        texts = [[draw.choice(WORDS[10 * label :][:10]) for _ in range(draw.randint(3, 11))] for label in labels]
        pairs = zip(texts, labels, strict=True)
        rows = [{"sentence": " ".join(text), "second": text[-1], "label": label} for text, label in pairs]
        write_lines(folder / f"{split}.jsonl", rows)
    return folder


def write_rhymes(folder, train=200, test=40):
    """Texts in which each word but the first follows from the one before it."""
    draw = random.Random(0)
    for split, count in (("train", train), ("validation", test)):
        begins = [draw.randrange(20) for _ in range(count)]
        rows = [{"text": " ".join(WORDS[(begin + 3 * place) % 20] for place in range(20))} for begin in begins]
        write_lines(folder / f"{split}.jsonl", rows)
    return folder


def classifier(folder, *more):
    """configs/bert_sst2.yaml with a tiny model and small texts, which are written to `folder`."""
    write_bert(folder / "bert")
    write_sentences(folder / "sentences")
    words = (f"model.name=hf:{folder}/bert", "data.source=json", f"data.path={folder}/sentences", "data.max_length=32")
    return (str(ROOT / "configs" / "bert_sst2.yaml"), *words, "data.name=null", *SHORT, *more)


def language_model(folder, *more):
    """configs/llama.yaml with a tiny model and small texts, which are written to `folder`."""
    write_llama(folder / "llama")
    write_rhymes(folder / "rhymes")
    words = (f"model.name=hf:{folder}/llama", "data.source=json", f"data.path={folder}/rhymes", "data.max_length=16")
    return (str(ROOT / "configs" / "llama.yaml"), *words, "data.name=null", *SHORT, *more)
