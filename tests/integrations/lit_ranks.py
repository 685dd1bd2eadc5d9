"""What two gloo ranks have to show about pruning in the Trainer of Lightning; see `tests/distributed/ranks.py`."""

import sys
from pathlib import Path

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.tensor import DTensor

from distprune.integrations.lightning import PruningCallback
from distprune.pruning import NM
from tests.distributed.ranks import from_all_ranks, run_checks
from tests.integrations.lit import Net, ShardedNet, loader, parts, trainer_of
from tests.integrations.watch import assert_exact, assert_two_of_each_four, end_of

FOLDER = Path(sys.argv[1])


def run(folder, module, strategy, resume=None, pruning=None):
    """Train; the module, and how it ended."""
    trainer = trainer_of(FOLDER / folder, pruning, strategy=strategy, devices=2, accumulate_grad_batches=2)
    trainer.fit(module, loader(), ckpt_path=resume)
    pruning, watch = parts(trainer)
    assert_exact(pruning.pruner, pruning.pruner.schedule.final)
    assert watch.zeros == sorted(watch.zeros)
    assert len(set(from_all_ranks((pruning.pruner.mask_digest, pruning.pruner.zeros)))) == 1
    return module, end_of(module, trainer.optimizers[0], pruning.pruner)


def ddp_goes_on_to_the_same_bits(alone):
    _, whole = run("ddp", Net(), DDPStrategy())
    assert len(set(from_all_ranks(whole))) == 1
    _, resumed = run("ddp", Net(), DDPStrategy(), resume=FOLDER / "ddp" / "epoch=1.ckpt")
    assert resumed == whole


def fsdp2_goes_on_to_the_same_bits(alone):
    for distributed in (True, False):
        folder = f"fsdp-{distributed}"
        strategies = [ModelParallelStrategy(2, 1, save_distributed_checkpoint=distributed) for _ in range(2)]
        module, whole = run(folder, ShardedNet(), strategies[0])
        assert all(isinstance(p, DTensor) for p in module.parameters())
        _, resumed = run(folder, ShardedNet(), strategies[1], resume=FOLDER / folder / "epoch=1.ckpt")
        assert resumed == whole


def fsdp2_ends_with_two_of_each_four(alone):
    pruning = PruningCallback(sparsity=0.5, every=2, pattern=NM(2, 4))
    run("pattern", ShardedNet(), ModelParallelStrategy(2, 1), pruning=pruning)
    assert_two_of_each_four(pruning.pruner)


CHECKS = [ddp_goes_on_to_the_same_bits, fsdp2_goes_on_to_the_same_bits, fsdp2_ends_with_two_of_each_four]

if __name__ == "__main__":
    run_checks(CHECKS, FOLDER)
