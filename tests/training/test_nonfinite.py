"""NaN and infinity in losses, gradients and what is saved."""

import pytest
import torch
from torch import nn

from distprune.training.nonfinite import DivergedError, LossWatch, refuse_nonfinite


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def watch_of(model, skip=True, gradients=True):
    return LossWatch(model, torch.device("cpu"), skip, gradients)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_is_remembered_by_its_step(model, bad):
    watch = watch_of(model, skip=False)
    for step, loss in enumerate([1.0, bad, 2.0, bad], 7):
        watch.begin()
        watch.add(torch.tensor(loss), step)
        assert watch.to_skip() is None
    assert watch.where() == ", first at step 8 on rank 0"


def test_nothing_is_said_of_losses_that_are_finite(model):
    watch = watch_of(model)
    watch.begin()
    watch.add(torch.tensor(3e38), 1)
    assert watch.to_skip() is None
    assert watch.where() == ""


def test_a_skipped_step_leaves_buffers_as_they_were_and_the_next_is_not_skipped(model):
    watch = watch_of(model)
    before = [buffer.clone() for buffer in model.buffers()]
    watch.begin()
    watch.add(model(torch.full((4, 3), torch.nan)).sum(), 1)
    assert watch.to_skip() == "the loss is NaN or infinite on rank 0"
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    watch.begin()
    watch.add(model(torch.randn(4, 3)).sum(), 1)
    assert watch.to_skip() is None
    assert not torch.equal(model[1].running_mean, before[0])


def test_a_gradient_that_is_not_finite_is_found_where_the_loss_is(model):
    for gradients, reason in ((True, "a gradient is NaN or infinite on rank 0"), (False, None)):
        watch = watch_of(model, gradients=gradients)
        watch.begin()
        (model[0].weight.flatten()[0] * 0).sqrt().backward()
        watch.add(torch.tensor(0.0), 1)
        assert not model[0].weight.grad.isfinite().all()
        assert watch.to_skip() == reason


def test_tensors_that_are_not_finite_are_not_saved():
    tensors = {f"t{i}": torch.ones(3) for i in range(6)} | {"steps": torch.tensor(3), "none": torch.zeros(0)}
    refuse_nonfinite(tensors, 5)
    for i in range(1, 6):
        tensors[f"t{i}"][1] = torch.nan
    with pytest.raises(DivergedError, match=r"at step 5: t1 on rank 0; t2 on rank 0; t3 on rank 0, and 2 more\. Noth"):
        refuse_nonfinite(tensors, 5)
