"""What weights are worth, against plain torch; and scores of a user's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distprune.pruning import (
    Bounds,
    GlobalAllocation,
    LinearSchedule,
    Movement,
    NonFiniteError,
    Pruner,
    Random,
    Taylor,
    UniformAllocation,
)
from tests.pruning.reference import Bag, Levels


def train(net, optimizer, step):
    torch.manual_seed(step)
    optimizer.zero_grad()
    net(torch.randn(8, 12)).square().mean().backward()
    optimizer.step()


def net_and_optimizer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))
    return net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def lowest(scores: list[torch.Tensor], masks: list[torch.Tensor], k: int) -> list[list[bool]]:
    """Which stay once the k lowest scores are pruned, those that masks prune first."""
    flat = torch.cat([s.flatten() for s in scores]).double()
    flat[~torch.cat([m.flatten() for m in masks])] = -torch.inf
    order = sorted(range(len(flat)), key=lambda i: (flat[i].item(), -i))
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[order[:k]] = False
    return [part.tolist() for part in keep.split([s.numel() for s in scores])]


@pytest.mark.parametrize(("score", "forgets"), [(Taylor(), True), (Movement(), False)])
def test_scores_by_gradients_are_those_that_plain_torch_adds_up(score, forgets):
    net, optimizer = net_and_optimizer()
    weights = [net[0].weight, net[2].weight]
    schedule = LinearSchedule(final=0.6, begin=3, end=9, every=3, initial=0.2)
    pruner = Pruner(net, optimizer, schedule, score=score)
    sums, seen = [torch.zeros_like(w) for w in weights], 0

    def note(*_):
        nonlocal seen
        seen += 1
        for total, w in zip(sums, weights, strict=True):
            product = w.detach() * w.grad
            total += product.abs() if forgets else -product

    optimizer.register_step_pre_hook(note)
    for step in range(1, 10):
        train(net, optimizer, step)
        scores = [s / seen if forgets else s for s in sums]
        expected = lowest(scores, list(pruner.masks.values()), round(schedule.sparsity(step) * 340))
        report = pruner.step()
        assert (report is not None) == (step in (3, 6, 9))
        if report:
            assert [m.flatten().tolist() for m in pruner.masks.values()] == expected
            if forgets:
                sums, seen = [torch.zeros_like(w) for w in weights], 0
    assert pruner.zeros == 204


@pytest.mark.parametrize("score", [Taylor(), Movement()])
def test_scores_by_gradients_come_back_from_a_state_dict(score):
    outcomes = []
    for interrupted in (False, True):
        net, optimizer = net_and_optimizer()
        pruner = Pruner(net, optimizer, Levels([0.0] * 5 + [0.6]), score=score)
        for step in range(1, 6):
            train(net, optimizer, step)
            if interrupted and step == 3:
                state = pruner.state_dict()
                pruner.close()
                pruner = Pruner(net, optimizer, Levels([0.0] * 5 + [0.6]), score=score)
                pruner.load_state_dict(state)
            pruner.step()
        outcomes.append(pruner.mask_digest)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("score", [Taylor(), Movement()])
def test_a_score_that_has_seen_no_gradient_is_refused_and_nothing_changes(score):
    net, optimizer = net_and_optimizer()
    pruner = Pruner(net, optimizer, Levels([0.5]), score=score)
    with pytest.raises(ValueError, match=f"{type(score).__name__} has seen no gradient by step 0"):
        pruner.step()
    assert pruner.zeros == 0


def test_masks_of_another_score_are_refused():
    net, optimizer = net_and_optimizer()
    state = Pruner(net, optimizer, Levels([0.5])).state_dict()
    with pytest.raises(ValueError, match="another score"):
        Pruner(net, optimizer, Levels([0.5]), score=Taylor()).load_state_dict(state)


def test_random_scores_differ_by_seed_and_are_spread_evenly():
    def masks(seed):
        model = Bag([torch.ones(200, 100), torch.randn(10_000)])
        pruner = Pruner(model, torch.optim.SGD(model.parameters()), Levels([0.4]), include=["*"], score=Random(seed))
        pruner.step()
        return list(pruner.masks.values())

    first, again, other = masks(1), masks(1), masks(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    agree = (torch.cat([m.flatten() for m in first]) == torch.cat([m.flatten() for m in other])).double().mean()
    assert agree == pytest.approx(0.4**2 + 0.6**2, abs=0.02)  # of draws that know nothing of each other
    for mask in first:
        assert mask.double().mean() == pytest.approx(0.6, abs=0.03)
    rows = first[0].double().mean(1)
    assert rows.std() == pytest.approx((0.24 / 100) ** 0.5, rel=0.25)


def test_random_scores_do_not_depend_on_weights_nor_on_their_memory_format():
    weight = torch.randn(6, 5, 3, 3)
    digests = []
    for w in (weight, (weight * 100).to(memory_format=torch.channels_last)):
        model = Bag([w])
        pruner = Pruner(model, torch.optim.SGD(model.parameters()), Levels([0.5]), include=["*"], score=Random(3))
        pruner.step()
        digests.append(pruner.mask_digest)
    assert digests[0] == digests[1]


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=2, max_size=40), st.floats(0, 1, exclude_max=True))
def test_a_score_of_ones_own_is_one_function_and_may_be_negative(scores, level):
    worth = torch.tensor(scores)
    model = Bag([torch.ones(len(scores))])

    def score(piece):
        assert piece.tensor.name == "tensors.0"
        return worth[piece.indices]

    pruner = Pruner(
        model, torch.optim.SGD(model.parameters()), Levels([level]), include=["*"], score=score, min_weights=0
    )
    pruner.step()
    expected = lowest([worth], [torch.ones(len(scores), dtype=torch.bool)], round(level * len(scores)))
    assert [m.tolist() for m in pruner.masks.values()] == expected


@pytest.mark.parametrize("allocation", [GlobalAllocation(), UniformAllocation()])
def test_what_was_pruned_stays_pruned_whatever_its_score(allocation):
    model = Bag([torch.randn(30), torch.randn(20)])
    optimizer = torch.optim.SGD(model.parameters())
    worst = {}

    def score(piece):
        return torch.where(piece.weight == 0, 100.0, -piece.weight.abs()) + worst.get(piece.tensor.name, 0.0)

    pruner = Pruner(model, optimizer, Levels([0.2, 0.5]), include=["*"], score=score, allocation=allocation)
    pruner.step()
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    optimizer.step()
    pruner.step()
    assert pruner.zeros == 25
    assert not any((mask & ~before[name]).any() for name, mask in pruner.masks.items())


def test_scores_that_are_not_finite_are_refused():
    model = Bag([torch.ones(5)])
    pruner = Pruner(
        model,
        torch.optim.SGD(model.parameters()),
        Levels([0.4]),
        include=["*"],
        score=lambda p: p.weight / 0 - torch.inf,
    )
    with pytest.raises(NonFiniteError, match=r"scores are NaN or infinite at step 0: tensors\.0: 5 of 5"):
        pruner.step()


def test_scores_of_another_shape_are_refused():
    model = Bag([torch.ones(5)])
    pruner = Pruner(
        model, torch.optim.SGD(model.parameters()), Levels([0.4]), include=["*"], score=lambda p: p.weight.sum()
    )
    with pytest.raises(ValueError, match=r"the score of tensors\.0 has shape \(\), not \(5,\)"):
        pruner.step()


def test_what_was_observed_of_other_shapes_is_refused_and_nothing_changes():
    pruners = []
    for width in (5, 8):
        net = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(width, 4, bias=False))
        pruners.append(Pruner(net, torch.optim.SGD(net.parameters()), Levels([0.0]), score=Taylor()))
    ours, other = pruners
    other._scorer.observed["0.weight"].fill_(7.0)
    with pytest.raises(ValueError, match="other tensors"):
        ours.load_state_dict(other.state_dict())
    assert not any(seen.any() for seen in ours.state_dict()["observed"].values())


def test_the_threshold_of_negative_scores_is_not_that_of_a_layer_which_stays():
    model = Bag([-torch.arange(1.0, 11), -torch.arange(1.0, 11)])
    pruner = Pruner(
        model,
        torch.optim.SGD(model.parameters()),
        Levels([0.25]),
        include=["*"],
        score=lambda piece: piece.weight,
        allocation=UniformAllocation(),
        bounds={"first": Bounds(max=0.0)},
    )
    assert -6.0 <= pruner.step().threshold <= -5.0
