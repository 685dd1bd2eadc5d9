"""Blocks, rows and columns go as a whole, the lowest means first, as many as fit into the budget."""

import copy
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distprune.pruning import (
    Blocks,
    Bounds,
    Columns,
    CubicSchedule,
    ErdosRenyiKernel,
    GlobalAllocation,
    LampAllocation,
    LinearSchedule,
    Movement,
    NonFiniteError,
    OneShotSchedule,
    Pruner,
    Random,
    Rows,
    Taylor,
    UniformAllocation,
)
from tests.pruning.reference import Bag, Levels

PATTERNS = (Blocks(4, 4), Blocks(2, 1), Blocks(1, 4), Rows(), Columns())


def blocks_of(pattern, shape):
    """Index tuples of all blocks, row-major; each selects the weights of one."""
    extents = {
        Rows: lambda: (1, *shape[1:]),
        Columns: lambda: (shape[0], 1, *shape[2:]),
        Blocks: lambda: (pattern.outputs, pattern.inputs, *[1] * (len(shape) - 2)),
    }[type(pattern)]()
    steps = [range(0, length, extent) for length, extent in zip(shape, extents, strict=True)]
    return [
        tuple(slice(begin, begin + extent) for begin, extent in zip(first, extents, strict=True))
        for first in product(*steps)
    ]


def reference(weights, masks, k, pattern):
    """Masks after an update by sorting blocks: by their mean magnitude in float32, of equal ones the later first."""
    masks = [mask.clone() for mask in masks]
    blocks = []
    for number, weight in enumerate(weights):
        for place, index in enumerate(blocks_of(pattern, weight.shape)):
            values = weight[index].abs().double().flatten().tolist()
            mean = torch.tensor(math.fsum(values) / len(values)).float().item()
            blocks.append((bool(masks[number][index].any()), mean, -number, -place, index))
    zeros = 0
    for _, _, number, _, index in sorted(blocks, key=lambda block: block[:4]):
        zeros += weights[-number][index].numel()
        if zeros > k:
            break
        masks[-number][index] = False
    return masks


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 20, bias=False)
    )


def is_whole(pattern, mask):
    return all(mask[index].all() or not mask[index].any() for index in blocks_of(pattern, mask.shape))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([(), (1, 1), (2, 3)])), max_size=3),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.booleans(),
)
def test_blocks_are_those_of_a_sort(pattern, sizes, seed, few, levels, channels_last):
    torch.manual_seed(seed)
    shapes = [(4, 8), *((4 * out, 4 * inp, *kernel) for out, inp, kernel in sizes)]
    tensors = [torch.randint(-2, 3, shape) / 2 if few else torch.randn(shape) for shape in shapes]
    if channels_last:
        tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    bag = Bag(copy.deepcopy(tensors))
    levels = sorted(levels)
    optimizer = torch.optim.SGD(bag.parameters(), lr=0.0)
    levels[-1] = max(levels[-1], 0.9)
    pruner = Pruner(bag, optimizer, Levels(levels), include=["*"], min_weights=0, pattern=pattern)
    masks = [torch.ones_like(t, dtype=torch.bool) for t in tensors]
    for level in levels:
        k = round(level * pruner.weights)
        masks = reference([t * m for t, m in zip(tensors, masks, strict=True)], masks, k, pattern)
        report = pruner.step()
        for mask, ours in zip(masks, pruner.masks.values(), strict=True):
            assert torch.equal(mask, ours)
        assert report.zeros == sum(int((~mask).sum()) for mask in masks) <= k
        optimizer.step()
    assert pruner.is_final


@pytest.mark.parametrize("score", [Taylor(), Movement(), Random(3)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("allocation", [GlobalAllocation(), ErdosRenyiKernel()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("pattern", [Blocks(4, 4), Rows(), Columns()], ids=str)
def test_whatever_the_score_and_the_allocation_blocks_are_whole_at_every_update(score, allocation, pattern):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = Pruner(model, optimizer, CubicSchedule(0.7, 1, 9, 2), score=score, allocation=allocation, pattern=pattern)
    slack = sum(pattern.unit(t.weight.shape) for t in pruner.tensors)
    before = copy.deepcopy(pruner.masks)
    for step in range(10):
        assert pruner.is_final == (step == 9)
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        report = pruner.step()
        for name, mask in pruner.masks.items():
            assert is_whole(pattern, mask)
            assert not (mask & ~before[name]).any(), "pruned weights stay pruned"
        if report is not None:
            k = round(report.target_sparsity * report.weights)
            assert k - slack < report.zeros <= k
        before = copy.deepcopy(pruner.masks)
    assert pruner.is_final
    weights = dict(model.named_parameters())
    assert sum(int((weights[name] == 0).sum()) for name in pruner.masks) == pruner.zeros > 0


def test_a_block_of_a_convolution_lies_at_one_place_of_its_kernel():
    conv = nn.Conv2d(4, 4, 3, bias=False)
    conv.weight.data.fill_(1.0)[:, :, 1, 2] = 0.5
    pruner = Pruner(conv, torch.optim.SGD(conv.parameters()), OneShotSchedule(0.12), pattern=Blocks(4, 4))
    assert pruner.step().zeros == 16
    assert not pruner.masks["weight"][:, :, 1, 2].any()


def test_rows_of_different_sizes_compete_by_their_means():
    model = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[0].weight.data.copy_(torch.tensor([[1.0], [4.0]]).expand(2, 8))
    model[1].weight.data.copy_(torch.tensor([[3.0], [2.0]]).expand(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(model, optimizer, Levels([0.4, 0.45, 0.5]), pattern=Rows())
    left = []
    for _ in range(3):
        pruner.step()
        left.append([mask.any(1).tolist() for mask in pruner.masks.values()])
        optimizer.step()
    # 8 fit into 8 of 20 weights, and into 9; with 10 there is room for 2 more.
    assert left == [[[False, True], [True, True]]] * 2 + [[[False, True], [True, False]]]


def test_no_tensor_is_emptied_and_those_that_nearly_are_are_named():
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
    model[1].weight.data.mul_(1e-3)
    pruner = Pruner(model, torch.optim.SGD(model.parameters()), OneShotSchedule(0.6), pattern=Rows())
    report = pruner.step()
    assert pruner.masks["1.weight"].any(1).sum() == 1
    assert report.held == ("1.weight",)
    assert 0.6 * 192 - 8 < report.zeros <= 0.6 * 192


@pytest.mark.parametrize(
    ("bounds", "least", "most"), [({"2": Bounds(max=0.3)}, 0.65, 1.0), ({"last": Bounds(min=0.7)}, 0.7, 0.71)]
)
def test_bounds_are_kept_in_whole_blocks(bounds, least, most):
    model = net()
    model[2].weight.data.mul_(1e-3)
    options = {"pattern": Blocks(4, 4), "bounds": bounds}
    pruner = Pruner(model, torch.optim.SGD(model.parameters()), OneShotSchedule(0.6), **options)
    pruner.step()
    found = pruner.layers()
    assert least <= found["5.weight"].sparsity <= most
    assert 0.15 - 16 / 1152 < found["2.weight"].sparsity <= 0.3
    assert (found["2.weight"].sparsity > 0.3 - 16 / 1152) == ("2" in bounds)
    assert round(0.6 * pruner.weights) - 16 < pruner.zeros


def test_uniform_cuts_each_tensor_by_itself():
    model = net()
    options = {"allocation": UniformAllocation(), "pattern": Columns()}
    pruner = Pruner(model, torch.optim.SGD(model.parameters()), OneShotSchedule(0.5), **options)
    pruner.step()
    for tensor in pruner.tensors:
        unit, zeros = tensor.numel // tensor.weight.shape[1], pruner.layers()[tensor.name].zeros
        assert zeros % unit == 0
        assert tensor.numel / 2 - unit - 1 < zeros <= tensor.numel / 2 + 1


def test_states_go_on_and_know_whether_they_are_final():
    found = []
    for _ in range(2):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        found.append((model, optimizer, Pruner(model, optimizer, LinearSchedule(0.77, 0, 4, 2), pattern=Rows())))
    (_, optimizer, one), (_, again, other) = found
    for _ in range(4):
        one.step(), optimizer.step()
    other.load_state_dict(one.state_dict())
    assert not other.is_final
    for pruner, stepped in ((one, optimizer), (other, again)):
        pruner.step(), stepped.step()
    assert one.mask_digest == other.mask_digest
    assert one.is_final
    assert other.is_final
    assert one.zeros < round(0.77 * one.weights)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_counted_weight_by_weight(bad):
    model = net()
    pruner = Pruner(model, torch.optim.SGD(model.parameters()), OneShotSchedule(0.5), pattern=Blocks(4, 4))
    with torch.no_grad():
        model[2].weight[0, :2, 0, 0] = bad
    with pytest.raises(NonFiniteError, match=r"weights are NaN or infinite.*2\.weight: 2 of 1152"):
        pruner.step()
    assert pruner.zeros == 0


def test_the_largest_of_floats_are_summed_without_overflow():
    layer = nn.Linear(8, 8, bias=False).double()
    layer.weight.data.fill_(torch.finfo(torch.float64).max)[4:, :4] *= 0.5
    pruner = Pruner(layer, torch.optim.SGD(layer.parameters()), OneShotSchedule(0.25), pattern=Blocks(4, 4))
    pruner.step()
    assert not pruner.masks["weight"][4:, :4].any()
    assert pruner.zeros == 16


@pytest.mark.parametrize(
    ("pattern", "given", "message"),
    [
        (Blocks(4, 4), {"schedule": OneShotSchedule(0.001)}, "6 of 6272 weights, .* block of the pattern 4x4 has 16"),
        (Rows(), {"allocation": LampAllocation()}, "lamp weighs a layer as a whole"),
        (Rows(), {"schedule": OneShotSchedule(0.97)}, "min_weights=1 allow at most 6133 of 6488 weights"),
        (Blocks(64, 1), {}, "nothing to prune.*its output dimension 8 is no multiple of 64"),
    ],
)
def test_what_cannot_be_is_refused(pattern, given, message):
    model = net()
    arguments = {"schedule": OneShotSchedule(0.5), "pattern": pattern, **given}
    with pytest.raises(ValueError, match=message):
        Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), **arguments)


def test_what_blocks_do_not_divide_stays_dense():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 8, 1))
    pruner = Pruner(model, torch.optim.SGD(model.parameters()), OneShotSchedule(0.5), pattern=Blocks(4, 4))
    assert list(pruner.masks) == ["3.weight"]
    assert pruner.left_out == {
        "0.weight": "its input dimension 3 is no multiple of 4",
        "1.weight": "of a transposed convolution, whose input dimension is the first",
        "2.weight": "its output dimension 6 is no multiple of 4",
    }


@pytest.mark.parametrize("text", ["1x1", "0x4", "4", "axb", "4x4x4", "rows"])
def test_texts_that_are_no_blocks_are_refused(text):
    with pytest.raises(ValueError, match="4x4"):
        Blocks.parse(text)
