"""Losses, beside the formulas written out."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from distprune.training.tasks import Classification, Distillation


def test_distillation_is_hintons_formula():
    student, teacher = nn.Linear(6, 4), nn.Linear(6, 4)
    images, labels = torch.randn(5, 6), torch.randint(4, (5,))
    output = Distillation(student, teacher, alpha=0.7, temperature=3.0, autocast=nullcontext)(images, labels)
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
    task = Distillation(student, teacher, alpha=1.0, temperature=1.0, autocast=nullcontext)
    task(torch.randn(5, 6), torch.randint(4, (5,))).loss.backward()
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
    assert Classification(model, nullcontext, label_smoothing=0.2)(images, labels).loss.item() == pytest.approx(
        expected.item()
    )
