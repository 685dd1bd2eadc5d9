"""Losses, beside the formulas written out."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from distprune.config.schema import AlphaRamp, Phase, TemperatureRamp
from distprune.data import PADDING
from distprune.pruning import RoundsSchedule
from distprune.training.phases import Span
from distprune.training.ramps import Ramp, lay_out, stretch
from distprune.training.tasks import Classification, Distillation


def test_distillation_is_hintons_formula():
    student, teacher = nn.Linear(6, 4), nn.Linear(6, 4)
    images, labels = torch.randn(5, 6), torch.randint(4, (5,))
    output = Distillation(student, [teacher], alpha=0.7, temperature=3.0, autocast=nullcontext)(images, labels, 0)
    p = torch.softmax(teacher(images).double() / 3, 1)
    q = torch.softmax(student(images).double() / 3, 1)
    loss_kd = 9 * (p * (p / q).log()).sum() / 5
    loss_ce = -torch.softmax(student(images).double(), 1)[range(5), labels].log().mean()
    assert output.figures["loss_kd"].item() == pytest.approx(loss_kd.item(), rel=1e-5)
    assert output.figures["loss_ce"].item() == pytest.approx(loss_ce.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx((0.7 * loss_kd + 0.3 * loss_ce).item(), rel=1e-5)
    assert output.figures["top1"].item() == (student(images).argmax(1) == labels).float().mean().item()


def test_only_the_student_learns():
    student, teacher = nn.Linear(6, 4), nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    task = Distillation(student, [teacher], alpha=1.0, temperature=1.0, autocast=nullcontext)
    task(torch.randn(5, 6), torch.randint(4, (5,)), 0).loss.backward()
    assert student.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_label_smoothing_spreads_the_target():
    model = nn.Linear(6, 4)
    images, labels = torch.randn(5, 6), torch.randint(4, (5,))
    log_q = torch.log_softmax(model(images), 1)
    target = torch.full((5, 4), 0.2 / 4)
    target[range(5), labels] += 0.8
    expected = -(target * log_q).sum(1).mean()
    assert Classification(model, nullcontext, label_smoothing=0.2)(images, labels, 0).loss.item() == pytest.approx(
        expected.item()
    )


def test_one_teacher_gives_the_bits_of_the_formula_for_one():
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 50), nn.Linear(6, 50)
    images, labels = 20 * torch.randn(64, 6), torch.randint(50, (64,))
    output = Distillation(student, [teacher], alpha=0.7, temperature=3.0, autocast=nullcontext)(images, labels, 0)
    logits = student(images)
    own, target = (torch.log_softmax(x / 3.0, 1) for x in (logits, teacher(images)))
    loss_kd = nn.functional.kl_div(own, target, reduction="batchmean", log_target=True) * 3.0**2
    assert torch.equal(output.loss, 0.7 * loss_kd + (1 - 0.7) * nn.functional.cross_entropy(logits, labels))
    assert output.figures.keys() == {"loss", "loss_ce", "loss_kd", "top1"}


def test_of_several_teachers_the_mean_of_their_probabilities_is_learnt():
    student, *teachers = (nn.Linear(6, 4) for _ in range(4))
    images, labels = torch.randn(5, 6), torch.randint(4, (5,))
    task = Distillation(student, teachers, alpha=1.0, temperature=2.0, autocast=nullcontext)
    p = sum(torch.softmax(teacher(images).double() / 2, 1) for teacher in teachers) / 3
    q = torch.softmax(student(images).double() / 2, 1)
    loss_kd = 4 * (p * (p / q).log()).sum() / 5
    assert task(images, labels, 0).loss.item() == pytest.approx(loss_kd.item(), rel=1e-5)


@pytest.mark.parametrize(("shape", "quarter"), [("linear", 0.25), ("cosine", (1 - math.sqrt(0.5)) / 2)])
def test_a_ramp_begins_and_ends_as_asked(shape, quarter):
    ramp = lay_out(AlphaRamp(begin=0.9, end=0.5, shape=shape), 100, 180)
    assert [ramp.at(step) for step in (100, 140, 180)] == pytest.approx([0.9, 0.7, 0.5], abs=1e-12)
    assert ramp.at(120) == pytest.approx(0.9 - 0.4 * quarter, abs=1e-12)
    rising = lay_out(TemperatureRamp(begin=1.0, end=9.0, shape=shape), 0, 0)
    assert rising.at(0) == 1.0


def test_a_ramp_goes_over_the_phases_that_are_taught_and_over_each_round_by_itself():
    places = (("dense", 0), ("prune", 10), ("finetune", 20))
    spans = [Span(name, begin, begin + 10, Phase(), f"phases.{name}") for name, begin in places]
    assert stretch(spans[1], spans, ["prune", "finetune"]) == (10, 29)
    assert stretch(spans[2], spans, ["finetune"]) == (20, 29)
    assert stretch(spans[0], spans, ["finetune", "dense"]) == (0, 29)
    attempts = RoundsSchedule(0.9, begin=10, every=10, rounds=2).attempts
    rounds = [spans[0], *(Span("finetune", a.begin, a.end, Phase(), "phases.finetune", 0, a) for a in attempts)]
    assert stretch(rounds[2], rounds, ["dense", "finetune"]) == (20, 29)
    assert stretch(rounds[0], rounds, ["dense", "finetune"]) == (0, 9)


def test_weight_and_temperature_that_change_are_those_of_the_step_and_among_the_figures():
    student, teacher = nn.Linear(6, 4), nn.Linear(6, 4)
    images, labels = torch.randn(5, 6), torch.randint(4, (5,))
    alpha, temperature = Ramp(1.0, 0.0, "linear", 0, 10), Ramp(2.0, 4.0, "linear", 0, 10)
    task = Distillation(student, [teacher], alpha, temperature, nullcontext)
    for step, weight, degrees in ((0, 1.0, 2.0), (5, 0.5, 3.0), (10, 0.0, 4.0)):
        now = task(images, labels, step)
        fixed = Distillation(student, [teacher], weight, degrees, nullcontext)(images, labels, step)
        assert torch.equal(now.loss, fixed.loss)
        assert (now.figures["kd_alpha"].item(), now.figures["kd_temperature"].item()) == (weight, degrees)
        assert "kd_alpha" not in fixed.figures


def test_tokens_without_a_label_count_for_nothing_and_all_others_alike():
    student, teacher = nn.Linear(6, 4), nn.Linear(6, 4)
    texts, labels = torch.randn(3, 5, 6), torch.randint(4, (3, 5))
    labels[:, 3:], labels[0, 1] = PADDING, PADDING
    output = Distillation(student, [teacher], 0.7, 3.0, nullcontext)(texts, labels, 0)
    rows = labels != PADDING
    alone = Distillation(student, [teacher], 0.7, 3.0, nullcontext)(texts[rows], labels[rows], 0)
    for name, value in alone.figures.items():
        assert output.figures[name].item() == pytest.approx(value.item(), rel=1e-5), name
    theirs = torch.autograd.grad(alone.loss, student.weight)[0]
    assert torch.allclose(torch.autograd.grad(output.loss, student.weight)[0], theirs, atol=1e-6)
    plain = Classification(student, nullcontext)(texts, labels, 0)
    assert plain.loss.item() == pytest.approx(output.figures["loss_ce"].item())
