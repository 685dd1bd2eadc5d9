"""Iterative magnitude pruning with rewinding, as the lottery ticket papers define it."""

import copy
import itertools

import pytest
import torch
from torch import nn

from distprune.config import load_config
from distprune.pruning import Pruner, RoundsSchedule
from distprune.training.phases import make_timetable
from tests.jobs import DIGITS

STEPS, EARLY, ROUNDS = 30, 6, 4


def train(model, optimizer, pruner, data, steps):
    for inputs, targets in itertools.islice(data, steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        pruner.step()


def test_weights_that_are_left_begin_each_round_at_their_early_values():
    # Frankle and Carbin 2019 (arXiv:1803.03635), strategy "iterative pruning with resetting": train, prune p^(1/n) of
    # what survives, reset what is left to its values in theta_0; Frankle et al. 2020 (arXiv:1912.05671) reset to
    # theta_k instead. Masks are nested: what was pruned stays pruned.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = RoundsSchedule(final=1 - 0.8**ROUNDS, begin=STEPS, every=STEPS - EARLY, rounds=ROUNDS)
    pruner = Pruner(model, optimizer, schedule)
    generator = torch.Generator().manual_seed(1)
    data = ((torch.randn(32, 12, generator=generator), torch.arange(32) % 4) for _ in itertools.count())
    train(model, optimizer, pruner, data, EARLY)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, pruner, data, STEPS - EARLY)  # the last step prunes for the first round
    places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    before = {name: torch.ones_like(mask) for name, mask in pruner.masks.items()}
    for number in range(1, ROUNDS + 1):
        assert pruner.zeros == round((1 - 0.8**number) * pruner.weights)
        trained = {name: value.clone() for name, value in model.named_parameters()}
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(state))
        pruner.mask_weights()
        for tensor in pruner.tensors:
            mask = pruner.masks[tensor.name]
            assert torch.equal(tensor.weight, weights[tensor.name] * mask)
            momentum = optimizer.state[tensor.weight]["momentum_buffer"]
            early = state["state"][places[id(tensor.weight)]]["momentum_buffer"]
            assert torch.equal(momentum, early * mask)
            assert not (mask & ~before[tensor.name]).any(), "nested"
            assert not trained[tensor.name][~mask].any()
        before = {name: mask.clone() for name, mask in pruner.masks.items()}
        if number < ROUNDS:
            train(model, optimizer, pruner, data, STEPS - EARLY)


def rates(recovery, rewind_to):
    # Renda, Frankle and Carbin 2020 (arXiv:2003.02389), table 1: ResNet-20 trains 182 epochs, 0.1 falling tenfold at
    # epochs 91 and 136. With 100 steps an epoch for 128 of them.
    phase = "{epochs: 182, lr: 0.1, schedule: step, milestones: [0.5, 0.7472527], gamma: 0.1}"
    words = ["phases.prune={}", "phases.finetune={}", f"phases.dense={phase}", f"prune.rounds.rewind_to={rewind_to}"]
    words += ["prune.rounds.count=2", f"prune.rounds.recovery={recovery}"]
    return make_timetable(load_config(DIGITS, words), steps_per_epoch=100).spans


@pytest.mark.parametrize("recovery", ["rewind_lr", "rewind_weights"])
@pytest.mark.parametrize("epoch", [0, 72, 100, 140])
def test_rewound_learning_rates_are_those_of_the_original_training_from_there_on(recovery, epoch):
    # The same, section 2: learning rate rewinding trains for t epochs more with the learning rates of the last t epochs
    # of the original training; weight rewinding does so too.
    dense, *rounds = rates(recovery, f"{{epochs: {epoch}}}")
    original = [dense.lr(step) for step in range(dense.begin, dense.end)]
    assert {round(rate, 6) for rate in original} == {0.1, 0.01, 0.001}
    assert [original.index(next(r for r in original if r < limit)) for limit in (0.09, 0.009)] == [9100, 13600]
    assert len(rounds) == 2
    for span in rounds:
        assert [span.lr(step) for step in range(span.begin, span.end)] == original[100 * epoch :]
