"""Pruning in the Trainer of transformers, on one process and on two ranks."""

import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load, save
from torch.utils.data import IterableDataset
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from distprune import CubicSchedule
from distprune.integrations.transformers import FILE, PruningCallback
from distprune.integrations.whole_state import whole_state
from distprune.pruning import NM, Bounds, LinearSchedule, Movement, OneShotSchedule, Taylor, UniformAllocation
from tests.distributed.ranks import launch
from tests.integrations.hf import STEPS, bert, parts, samples, trainer_of
from tests.integrations.watch import assert_exact, assert_two_of_each_four, end_of

RANKS = (
    "ddp_goes_on_to_the_same_bits",
    "fsdp2_goes_on_to_the_same_bits",
    "fsdp2_ends_with_two_of_each_four",
    "states_of_any_shards_are_whole",
    "flat_shards_are_refused",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    script = __file__.replace("test_transformers.py", "hf_ranks.py")
    return launch(script, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", RANKS)
def test_two_ranks(outcomes, check):
    for rank, outcome in enumerate(outcomes):
        assert outcome.get(check, "did not run") == "", f"rank {rank}"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_prunes_exactly_and_goes_on_to_the_same_bits(tmp_path, optimizer):
    def run(resume=None):
        model = bert()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        optimizers = (sgd, None) if optimizer == "sgd" else (None, None)
        trainer = trainer_of(tmp_path, model=model, optimizers=optimizers, gradient_accumulation_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        pruning, watch = parts(trainer)
        assert_exact(pruning.pruner, 0.9)
        assert watch.zeros == sorted(watch.zeros)
        return trainer, end_of(model, trainer.optimizer.optimizer, pruning.pruner)

    trainer, whole = run()
    (tmp_path / f"checkpoint-{STEPS // 2}" / FILE).stat()
    assert parts(trainer)[1].zeros[STEPS // 2 - 1] < parts(trainer)[0].pruner.zeros
    assert run(str(tmp_path / f"checkpoint-{STEPS // 2}"))[1] == whole


def test_figures_are_logged_with_those_of_training(tmp_path):
    trainer = trainer_of(tmp_path, eval_strategy="steps", eval_steps=8)
    trainer.train()
    pruning, watch = parts(trainer)
    for rows in (watch.logs, trainer.state.log_history):
        rows = [row for row in rows if "loss" in row]
        assert len(rows) == STEPS // 4
        assert rows[-1]["prune/sparsity"] == pruning.pruner.zeros / pruning.pruner.weights
        assert rows[-1]["prune/target_sparsity"] == 0.9
        assert rows[-1]["prune/threshold"] == pruning.report.threshold > 0
        assert rows[0]["prune/sparsity"] < rows[1]["prune/sparsity"]
    assert not any("prune/sparsity" in row for row in trainer.state.log_history if "eval_loss" in row)


def test_put_first_it_shows_its_figures_to_what_report_to_names(tmp_path):
    trainer = trainer_of(tmp_path)
    pruning, watch = parts(trainer)
    trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(watch))  # where those are
    trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(pruning))
    trainer.train()
    sparsities = [row["prune/sparsity"] for row in watch.logs if "loss" in row]
    assert len(sparsities) == STEPS // 4
    assert sparsities[-1] == pruning.pruner.sparsity
    assert_exact(pruning.pruner, 0.9)


def test_saved_models_have_the_same_zeros(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.save_model(tmp_path / "end")
    pruner = parts(trainer)[0].pruner
    for folder in (tmp_path / "end", tmp_path / f"checkpoint-{STEPS}"):
        saved = BertForSequenceClassification.from_pretrained(folder).state_dict()
        for name, mask in pruner.masks.items():
            assert torch.equal(saved[name] == 0, ~mask), name


def test_settings_reach_the_pruner(tmp_path):
    pruning = PruningCallback(
        schedule=lambda steps: LinearSchedule(0.5, 1, steps - 2, 3),
        score=Taylor(),
        allocation=UniformAllocation(),
        bounds={"*.query.weight": Bounds(max=0.25)},
        exclude=["*.key"],
        head=True,
        embeddings=True,
    )
    trainer = trainer_of(tmp_path, pruning)
    trainer.train()
    layers = pruning.pruner.layers()
    assert_exact(pruning.pruner, 0.5)
    assert pruning.pruner.schedule == LinearSchedule(0.5, 1, STEPS - 2, 3)
    assert all(layers[name].sparsity == 0.25 for name in layers if "query" in name)
    assert not any("key" in name for name in layers)
    assert {"classifier.weight", "bert.embeddings.word_embeddings.weight"} <= layers.keys()
    trainer = trainer_of(tmp_path, PruningCallback(sparsity=0.5, include=["classifier.weight"], begin=2, end=4))
    trainer.train()
    (name,) = parts(trainer)[0].pruner.masks
    assert name == "classifier.weight"
    assert parts(trainer)[0].pruner.schedule == CubicSchedule(0.5, 2, 4, 1)


def test_by_default_about_100_updates_from_a_tenth_to_seven_tenths():
    schedule = PruningCallback(sparsity=0.9)._schedule(10_000)
    assert schedule == CubicSchedule(0.9, 1000, 7000, 60)


SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("make", "dense", "pruned"),
    [
        (
            lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16)),
            {"model.embed_tokens.weight", "lm_head.weight"},
            7,
        ),
        (
            lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16, tie_word_embeddings=True)),
            {"model.embed_tokens.weight"},
            7,
        ),
        (
            lambda: DistilBertForSequenceClassification(
                DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=9)
            ),
            {"pre_classifier.weight", "classifier.weight"},
            6,
        ),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(
                    vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, tie_word_embeddings=False
                )
            ),
            {"shared.weight", "lm_head.weight"},
            16,
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=9)),
            {"transformer.wte.weight", "transformer.wpe.weight"},
            4,
        ),
        (
            lambda: MixtralForCausalLM(MixtralConfig(**SMALL, intermediate_size=8, num_local_experts=2)),
            {"model.embed_tokens.weight", "lm_head.weight"},
            6,
        ),
    ],
    ids=["llama", "tied", "distilbert", "t5", "gpt2", "mixtral"],
)
def test_heads_and_embeddings_stay_dense_and_all_linear_maps_are_pruned(make, dense, pruned):
    model = make()
    callback = PruningCallback(schedule=OneShotSchedule(0.5, at=0))
    callback._start(model, torch.optim.SGD(model.parameters()), 1, None)
    assert len(callback.pruner.tensors) == pruned
    assert not dense & callback.pruner.masks.keys()
    assert all("norm" not in name and "bias" not in name for name in callback.pruner.masks)
    assert_exact(callback.pruner, 0.5)


def test_patterns_leave_weights_dense_whose_inputs_lie_along_another_dimension():
    model = MixtralForCausalLM(MixtralConfig(**SMALL, intermediate_size=8, num_local_experts=2))
    callback = PruningCallback(schedule=OneShotSchedule(0.5, at=0), pattern=NM(2, 4))
    callback._start(model, torch.optim.SGD(model.parameters()), 1, None)
    assert_two_of_each_four(callback.pruner)
    assert all("self_attn" in name for name in callback.pruner.masks)
    assert {
        f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    } <= callback.pruner.left_out.keys()


def test_what_was_observed_can_be_written_whatever_its_memory_format():
    model = torch.nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters())
    callback = PruningCallback(schedule=OneShotSchedule(0.5, at=1), score=Movement())
    callback._start(model, optimizer, 2, None)
    model.weight.grad = torch.randn(4, 4, 3, 3)
    optimizer.step()
    saved = whole_state(callback.pruner)["observed"]
    written = load(save(saved))
    assert written.keys() == saved.keys() == {"weight"}
    assert torch.equal(written["weight"], callback.pruner.state_dict()["observed"]["weight"])


class Worse(TrainerCallback):
    """Makes each evaluation worse than the one before."""

    def __init__(self):
        self.count = 0

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.count += 1
        metrics["eval_loss"] = float(self.count)


def test_the_best_model_is_chosen_among_those_of_the_final_sparsity(tmp_path):
    trainer = trainer_of(
        tmp_path, PruningCallback(sparsity=0.9, begin=2, end=8, every=1), eval_strategy="steps", eval_steps=2,
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    trainer.callback_handler.callbacks.insert(0, Worse())
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 12  # no patience was lost before step 8, and two evaluations after it
    assert trainer.state.best_global_step == 8
    assert_exact(parts(trainer)[0].pruner, 0.9)


def test_training_that_ends_early_says_so(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    trainer = trainer_of(tmp_path, others=[Stop()])
    with pytest.warns(UserWarning, match=r"ended after 5 optimizer steps with a sparsity of 0\.\d+, before .* 0.9"):
        trainer.train()


def test_a_callback_can_train_twice(tmp_path):
    trainer = trainer_of(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
        first = parts(trainer)[0].pruner
        trainer.train()
    assert parts(trainer)[0].pruner is not first
    assert_exact(parts(trainer)[0].pruner, 0.9)
    assert not any(t.weight._post_accumulate_grad_hooks for t in first.tensors)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(samples())


def test_a_stream_needs_max_steps(tmp_path):
    trainer_of(tmp_path, data=Stream()).train()
    with pytest.raises(ValueError, match="max_steps"):
        trainer_of(tmp_path, data=Stream(), max_steps=-1).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of sparsity and schedule, got neither"),
        ({"sparsity": 0.9, "schedule": CubicSchedule(0.9, 0, 1)}, "got both"),
        ({"sparsity": 1.0}, "final sparsity must lie in"),
        ({"sparsity": 90}, "final sparsity must lie in"),
        ({"sparsity": 0.9, "begin": 1.5}, "begin must be a fraction"),
        ({"sparsity": 0.9, "every": 0}, "every must be at least 1 step"),
        ({"schedule": 0.9}, "schedule must be a Schedule, or a function"),
        ({"schedule": CubicSchedule(0.9, 0, 1), "end": 0.5}, "begin, end and every go with sparsity"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PruningCallback(**settings)


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (PruningCallback(sparsity=0.9, begin=0.8), "0 <= begin <= end"),
        (PruningCallback(schedule=lambda steps: steps), r"schedule\(16\) is no Schedule but 16"),
        (PruningCallback(sparsity=0.9, end=100), "sparsity of 0.* when training ends after 16 optimizer steps"),
        (PruningCallback(schedule=OneShotSchedule(0.9, at=17)), "sparsity of 0.0000 when training ends after 16"),
        (PruningCallback(sparsity=0.9, exclude=["encoder"]), "matches no parameter"),
    ],
)
def test_settings_that_do_not_fit_the_training(tmp_path, pruning, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, pruning).train()


def test_an_optimizer_of_the_model_is_needed():
    for optimizer in (None, torch.optim.SGD(bert().parameters())):
        with pytest.raises(ValueError, match="no optimizer trains this model"):
            PruningCallback(sparsity=0.9)._start(bert(), optimizer, 10, None)


def test_what_cannot_be_resumed(tmp_path):
    trainer_of(tmp_path / "run").train()
    checkpoint = tmp_path / "run" / "checkpoint-8"
    with pytest.raises(ValueError, match=f"goes on from step 8, but there is no {FILE} of that step in .*elsewhere"):
        trainer_of(tmp_path / "elsewhere").train(resume_from_checkpoint=str(checkpoint))
    trainer = trainer_of(tmp_path / "elsewhere", resume_from_checkpoint=str(checkpoint))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_exact(parts(trainer)[0].pruner, 0.9)
    with pytest.raises(
        ValueError,
        match=r"masks are of other tensors: missing \[\], unexpected .*self.key.weight",
    ):
        trainer_of(tmp_path / "run", PruningCallback(sparsity=0.9, exclude=["*.key"])).train(
            resume_from_checkpoint=str(checkpoint)
        )
    dense = bert()
    Trainer(dense, trainer_of(tmp_path / "run").args).save_model(str(checkpoint))
    with pytest.raises(ValueError, match="the masks are of other weights"):
        trainer_of(tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / FILE).unlink()
    with pytest.raises(
        ValueError, match=r"killed while .*, go on from the one before it: .* written without this callback"
    ):
        trainer_of(tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))


def test_the_libraries_are_not_imported_with_distprune():
    code = """
import sys, distprune, distprune.pruning, distprune.integrations.base
print({"transformers", "lightning", "pytorch_lightning"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
