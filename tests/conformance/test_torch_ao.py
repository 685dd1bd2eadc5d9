"""2:4 at once, beside PyTorch's own sparsifier."""

import pytest
import torch
from torch import nn

from distprune.pruning import NM, OneShotSchedule, Pruner

sparsifiers = pytest.importorskip("torch.ao.pruning", reason="this torch has no torch.ao.pruning any more")


@pytest.mark.parametrize("shape", [(16, 32), (64, 8), (5, 4)], ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_masks_are_those_of_the_weight_norm_sparsifier(shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    theirs = nn.Sequential(nn.Linear(shape[1], shape[0]))
    theirs.load_state_dict(model.state_dict())
    pruner = Pruner(model, torch.optim.SGD(model.parameters()), OneShotSchedule(0.5), pattern=NM(2, 4))
    pruner.step()
    sparsifier = sparsifiers.WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(theirs, config=[{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    assert torch.equal(theirs[0].parametrizations.weight[0].mask.bool(), pruner.masks["0.weight"])
    sparsifier.squash_mask()
    assert torch.equal(theirs[0].weight, model[0].weight)
