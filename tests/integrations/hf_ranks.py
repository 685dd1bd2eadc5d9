"""What two gloo ranks have to show about pruning in the Trainer of transformers; see `tests/distributed/ranks.py`.

accelerate ignores FSDP on CPUs, so it is told here what it would find on GPUs.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import BertForSequenceClassification, Trainer

from distprune import Pruner
from distprune.integrations.transformers import PruningCallback
from distprune.integrations.whole_state import load_whole_state, whole_state
from distprune.pruning import NM, Movement, OneShotSchedule
from tests.distributed.ranks import from_all_ranks, messages_of, run_checks
from tests.integrations.hf import STEPS, parts, trainer_of
from tests.integrations.watch import assert_exact, assert_two_of_each_four, end_of
from tests.pruning.reference import Bag

FOLDER = Path(sys.argv[1])


class ShardedTrainer(Trainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BertLayer"],
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
        self.is_fsdp_enabled = True


def run(folder, trainer, resume=None, **settings):
    """Train; the trainer, and how it ended."""
    trained = trainer_of(FOLDER / folder, trainer=trainer, gradient_accumulation_steps=2, **settings)
    trained.train(resume_from_checkpoint=resume)
    pruning, watch = parts(trained)
    assert_exact(pruning.pruner, pruning.pruner.schedule.final)
    assert watch.zeros == sorted(watch.zeros)
    assert len(set(from_all_ranks((pruning.pruner.mask_digest, pruning.pruner.zeros)))) == 1
    assert not any("classifier" in name or "embeddings" in name for name in pruning.pruner.masks)
    optimizer = trained.optimizer.optimizer
    return trained, end_of(trained.model, optimizer, pruning.pruner)


def ddp_goes_on_to_the_same_bits(alone):
    trained, whole = run("ddp", Trainer)
    assert isinstance(trained.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert len(set(from_all_ranks(whole))) == 1
    _, resumed = run("ddp", Trainer, resume=str(FOLDER / "ddp" / f"checkpoint-{STEPS // 2}"))
    assert resumed == whole


def fsdp2_goes_on_to_the_same_bits(alone):
    trained, whole = run("fsdp", ShardedTrainer, optim="adamw_torch")
    assert all(isinstance(p, DTensor) for p in trained.model.parameters())
    _, resumed = run("fsdp", ShardedTrainer, resume=str(FOLDER / "fsdp" / f"checkpoint-{STEPS // 2}"))
    assert resumed == whole


def fsdp2_ends_with_two_of_each_four(alone):
    trained, _ = run("pattern", ShardedTrainer, pruning=PruningCallback(sparsity=0.5, every=2, pattern=NM(2, 4)))
    pruner = parts(trained)[0].pruner
    assert_two_of_each_four(pruner)
    trained.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trained.save_model(FOLDER / "whole")
    dist.barrier()
    saved = BertForSequenceClassification.from_pretrained(FOLDER / "whole").state_dict()
    assert sum(int((saved[name] == 0).sum()) for name in pruner.masks) == pruner.zeros


def states_of_any_shards_are_whole(alone):
    """Whole states of shards are those of one process, and become parts of others; gradients that were seen too."""
    mesh = init_device_mesh("cpu", (2,))
    tensors = [torch.randn(5, 7), torch.randn(3, 10, 3, 3), torch.randn(2, 9), torch.randn(17)]

    def pruner_of(placements, group=None):
        weights = [
            tensor.clone() if placement is None else distribute_tensor(tensor.clone(), mesh, [placement])
            for tensor, placement in zip(tensors, placements, strict=True)
        ]
        model = Bag(weights)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = Pruner(model, optimizer, OneShotSchedule(0.8, at=1), include=["*"], score=Movement(), group=group)
        return pruner, optimizer

    sharded, optimizer = pruner_of([Shard(0), Shard(1), Replicate(), None])
    for tensor in sharded.tensors:
        tensor.weight.grad = tensor.weight.detach() ** 3
    optimizer.step()
    sharded.step()
    state = whole_state(sharded)
    assert sharded.zeros == round(0.8 * sharded.weights)
    weights = [t.weight.detach() for t in sharded.tensors]
    tensors = [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights]
    for placements, group in (([None] * 4, alone), ([Shard(1), Shard(0), Shard(0), Shard(0)], None)):
        other, _ = pruner_of(placements, group)
        load_whole_state(other, state)
        assert (other.mask_digest, other.steps_done) == (sharded.mask_digest, 1)
        again = whole_state(other)
        assert all(torch.equal(again[k][name], state[k][name]) for k in ("masks", "observed") for name in state[k])
    other, _ = pruner_of([None] * 4, alone)
    other.tensors[0].local[other.tensors[0].local == 0] = 1.0
    assert "the masks are of other weights" in messages_of(ValueError, lambda: load_whole_state(other, state))[0]


def flat_shards_are_refused(alone):
    model = FullyShardedDataParallel(torch.nn.Linear(8, 8), device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters())
    start = PruningCallback(sparsity=0.9)._start
    assert "sharded by FSDP version 1" in messages_of(ValueError, lambda: start(model, optimizer, 9, None))[0]


CHECKS = [
    ddp_goes_on_to_the_same_bits,
    fsdp2_goes_on_to_the_same_bits,
    fsdp2_ends_with_two_of_each_four,
    states_of_any_shards_are_whole,
    flat_shards_are_refused,
]

if __name__ == "__main__":
    run_checks(CHECKS, FOLDER)
