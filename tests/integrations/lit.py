"""A small LightningModule, and a Trainer that prunes it."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from distprune.integrations.lightning import PruningCallback
from tests.integrations.watch import LIMIT, assert_clipped, assert_held

EPOCHS, STEPS = 4, 16


class Net(pl.LightningModule):
    def __init__(self, optimizer="adamw"):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
        self.optimizer = optimizer

    def training_step(self, batch, index):
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        assert_clipped(parts(self.trainer)[0].pruner, self.parameters())

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class ShardedNet(Net):
    def configure_model(self):
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Watch(pl.Callback):
    """Stands behind a PruningCallback and looks at every step."""

    def __init__(self, pruning):
        self.pruning = pruning
        self.zeros = []
        self.logged = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        assert_held(self.pruning.pruner, trainer.optimizers[0])
        self.zeros.append(self.pruning.pruner.zeros)
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def loader(batch_size=4):
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(64, 16, generator=generator), torch.randint(2, (64,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size)


def trainer_of(folder, pruning=None, *others, **settings):
    pruning = pruning or PruningCallback(sparsity=0.9, every=2)
    checkpoints = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    settings = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": LIMIT,
        **settings,
    }
    return pl.Trainer(callbacks=[pruning, Watch(pruning), checkpoints, *others], **settings)


def parts(trainer):
    """The PruningCallback of a trainer, and what watches it."""
    found = {type(callback): callback for callback in trainer.callbacks}
    return found[PruningCallback], found[Watch]
