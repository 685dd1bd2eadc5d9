"""What must hold in anybody's training loop at every step, and what runs are compared by."""

import torch
from torch.distributed.tensor import DTensor

from distprune.pruning.shards import local
from tests.distributed.ranks import bits

LIMIT = 0.001  # of gradient norms; below all that come up


def assert_held(pruner, optimizer):
    """Pruned weights are +0, and so is what the optimizer has to say of them."""
    for tensor in pruner.tensors:
        pruned = ~pruner.masks[tensor.name]
        assert not local(tensor.weight).view(torch.int32)[pruned].any(), tensor.name
        for key, value in optimizer.state[tensor.weight].items():
            if isinstance(value, torch.Tensor) and value.shape == tensor.weight.shape:
                assert not local(value)[pruned].any(), (tensor.name, key)


def assert_clipped(pruner, parameters):
    """Gradients of pruned weights are 0, and were when the norm was counted."""
    for tensor in pruner.tensors:
        assert not local(tensor.weight.grad)[~pruner.masks[tensor.name]].any(), tensor.name
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    assert abs(float(norm) - LIMIT) < 1e-3 * LIMIT


def assert_exact(pruner, sparsity):
    """As many weights are 0 as the sparsity asks for; counted in the weights."""
    whole = whole_weights(pruner)
    total = sum(weight.numel() for weight in whole)
    assert sum(int((weight == 0).sum()) for weight in whole) == round(sparsity * total) == pruner.zeros


def assert_two_of_each_four(pruner):
    """Half of each group of four inputs is 0, of weights that are shaped (outputs, inputs)."""
    for weight in whole_weights(pruner):
        assert ((weight.unflatten(1, (-1, 4)) == 0).sum(2) == 2).all()


def whole_weights(pruner):
    return [t.weight.full_tensor() if isinstance(t.weight, DTensor) else t.weight for t in pruner.tensors]


def end_of(model, optimizer, pruner):
    """All that a run must end with alike: weights, optimizer state, masks, step."""
    states = [v for p in model.parameters() for v in optimizer.state.get(p, {}).values() if isinstance(v, torch.Tensor)]
    return (
        bits(local(p) for p in model.parameters()),
        bits(local(state) for state in states),
        pruner.mask_digest,
        pruner.steps_done,
    )
