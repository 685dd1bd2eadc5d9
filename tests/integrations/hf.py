"""Tiny models of transformers, randomly initialised, and a Trainer that prunes them."""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from distprune.integrations.transformers import PruningCallback
from tests.integrations.watch import LIMIT, assert_clipped, assert_held

STEPS = 16


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def samples():
    ids = torch.randint(0, 50, (96, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": int(row[0] % 2)} for row in ids]


class Watch(TrainerCallback):
    """Stands behind a PruningCallback and looks at every step."""

    def __init__(self, pruning):
        self.pruning = pruning
        self.zeros = []
        self.logs = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        assert_clipped(self.pruning.pruner, model.parameters())

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        assert_held(self.pruning.pruner, optimizer)
        self.zeros.append(self.pruning.pruner.zeros)

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def arguments(folder, **settings):
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "logging_steps": 4,
        "save_steps": 8,
        "report_to": "none",
        "max_grad_norm": LIMIT,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **settings,
    }
    return TrainingArguments(str(folder), **settings)


def trainer_of(
    folder, pruning=None, *, model=None, trainer=Trainer, data=None, others=(), optimizers=(None, None), **settings
):
    pruning = pruning or PruningCallback(sparsity=0.9, every=2)
    return trainer(
        model or bert(),
        arguments(folder, **settings),
        train_dataset=data or samples(),
        eval_dataset=samples()[:16],
        callbacks=[pruning, Watch(pruning), *others],
        optimizers=optimizers,
    )


def parts(trainer):
    """The PruningCallback of a trainer, and what watches it."""
    found = {type(callback): callback for callback in trainer.callback_handler.callbacks}
    return found[PruningCallback], found[Watch]
