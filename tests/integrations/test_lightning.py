"""Pruning in the Trainer of Lightning, on one process and on two ranks."""

import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from distprune import CubicSchedule
from distprune.integrations.lightning import PruningCallback
from tests.distributed.ranks import launch
from tests.integrations.lit import STEPS, Net, loader, parts, trainer_of
from tests.integrations.watch import LIMIT, assert_exact, end_of

RANKS = ("ddp_goes_on_to_the_same_bits", "fsdp2_goes_on_to_the_same_bits", "fsdp2_ends_with_two_of_each_four")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    script = __file__.replace("test_lightning.py", "lit_ranks.py")
    return launch(script, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", RANKS)
def test_two_ranks(outcomes, check):
    for rank, outcome in enumerate(outcomes):
        assert outcome.get(check, "did not run") == "", f"rank {rank}"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_prunes_exactly_and_goes_on_to_the_same_bits(tmp_path, optimizer):
    def run(resume=None):
        trainer, module = trainer_of(tmp_path, accumulate_grad_batches=4), Net(optimizer)
        trainer.fit(module, loader(), ckpt_path=resume)
        pruning, watch = parts(trainer)
        assert_exact(pruning.pruner, 0.9)
        assert watch.zeros == sorted(watch.zeros)
        assert pruning.pruner.steps_done == STEPS
        return end_of(module, trainer.optimizers[0], pruning.pruner)

    whole = run()
    assert run(tmp_path / "epoch=1.ckpt") == whole


def test_figures_are_logged(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.fit(Net(), loader())
    pruning, watch = parts(trainer)
    assert watch.logged[0]["prune/sparsity"] == 0
    last = trainer.callback_metrics
    assert last["prune/sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert last["prune/target_sparsity"] == pytest.approx(0.9)
    assert last["prune/threshold"] == pytest.approx(pruning.report.threshold)


def test_training_that_ends_early_says_so(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 20

    with pytest.warns(UserWarning, match=r"ended after 20 optimizer steps with a sparsity of 0\.\d+, before .* 0.9"):
        trainer_of(tmp_path, None, Stop()).fit(Net(), loader())


def test_callbacks_that_compare_models_are_warned_of(tmp_path):
    best = pl.callbacks.ModelCheckpoint(tmp_path / "best", monitor="prune/sparsity", mode="max")
    with pytest.warns(UserWarning, match="ModelCheckpoint may prefer a model from before the last update"):
        trainer_of(tmp_path, None, best).fit(Net(), loader())


class Manual(Net):
    """Takes its optimizer steps itself, with one optimizer or two."""

    def __init__(self, optimizers):
        super().__init__()
        self.automatic_optimization = False
        self.count = optimizers

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        parts(self.trainer)[0].pruner.mask_gradients()
        self.clip_gradients(optimizer, LIMIT, "norm")
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(self.parameters(), lr=1e-2) for _ in range(self.count)]


def test_manual_optimization(tmp_path):
    trainer = trainer_of(tmp_path, gradient_clip_val=None)
    trainer.fit(Manual(1), loader())
    assert_exact(parts(trainer)[0].pruner, 0.9)
    with pytest.raises(ValueError, match="configure_optimizers returns 2 optimizers"):
        trainer_of(tmp_path, gradient_clip_val=None).fit(Manual(2), loader())


def test_an_optimizer_is_needed(tmp_path):
    class Untrained(Net):
        def configure_optimizers(self):
            return None

    with pytest.raises(ValueError, match="no optimizer trains this model"):
        trainer_of(tmp_path).fit(Untrained(), loader())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(loader().dataset)


def test_the_number_of_steps_must_be_known_unless_the_schedule_has_its_own(tmp_path):
    stream = DataLoader(Stream(), 4)
    with pytest.raises(ValueError, match=r"how many optimizer steps .* set max_steps, or give a schedule"):
        trainer_of(tmp_path).fit(Net(), stream)
    for trainer in (
        trainer_of(tmp_path, max_steps=20),
        trainer_of(tmp_path, PruningCallback(schedule=CubicSchedule(0.9, 2, 10, 2))),
    ):
        trainer.fit(Net(), stream)
        assert_exact(parts(trainer)[0].pruner, 0.9)
    with pytest.raises(ValueError, match="training ends after 20 optimizer steps, and reaches"):
        trainer_of(tmp_path, PruningCallback(sparsity=0.9, end=30), max_steps=20).fit(Net(), stream)


def test_a_checkpoint_without_masks_is_refused(tmp_path):
    class Dense(Net):
        configure_gradient_clipping = pl.LightningModule.configure_gradient_clipping

    kept = pl.callbacks.ModelCheckpoint(tmp_path, filename="dense")
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=1, callbacks=[kept], **quiet).fit(Dense(), loader())
    with pytest.raises(ValueError, match=r"goes on from step 16, but .*dense.ckpt has no masks of it"):
        trainer_of(tmp_path).fit(Net(), loader(), ckpt_path=tmp_path / "dense.ckpt")


def test_a_trainer_that_goes_on_by_itself_is_refused(tmp_path):
    trainer, module = trainer_of(tmp_path, max_epochs=1), Net()
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 2
    with pytest.raises(ValueError, match="goes on from step 16, but this Trainer has no masks of it"):
        trainer.fit(module, loader())


def test_pytorch_lightning_will_do(tmp_path):
    code = """
import sys
sys.modules["lightning"] = None
import pytorch_lightning as pl
import torch
from torch import nn
from distprune.integrations.lightning import PruningCallback

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 8)
    def training_step(self, batch, index):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

pruning = PruningCallback(sparsity=0.5)
trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[pruning])
trainer.fit(Net(), torch.utils.data.DataLoader(torch.randn(16, 8), 2))
assert isinstance(pruning, pl.Callback)
print(pruning.pruner.zeros)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "32"
