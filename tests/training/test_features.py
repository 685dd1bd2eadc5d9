"""Features of students and teachers, beside the sums written out."""

import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distprune.config.schema import Distill, Feature
from distprune.errors import ConfigError
from distprune.training.features import (
    FeatureLoss,
    Projections,
    Taps,
    align,
    cosine_distance,
    feature_widths,
    student_taps,
    teacher_taps,
)
from distprune.training.tasks import Distillation

IMAGES, LABELS = torch.randn(3, 1, 8, 8), torch.tensor([0, 2, 1])


def conv_net(width, stride=1):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(4)
    )


class Tokens(nn.Module):
    """A small transformer on rows of pixels: features are (B, 8, width)."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 4)

    def forward(self, images):
        return self.head(self.block(self.embed(images.squeeze(1))).mean(1))


class Parts(nn.Module):
    """Returns its input in a way that is no plain tensor."""

    def __init__(self, pack):
        super().__init__()
        self.pack = pack

    def forward(self, x):
        return self.pack(x)


class Output:
    def __init__(self, x):
        self.last_hidden_state = x


def lay_out(student, teachers, features):
    """The task that learns `features` from `teachers`, made as a run makes it, and its projections."""
    names = [{"weights": "x"} for _ in teachers]
    distill = Distill(teacher=names, features=[Feature(**feature) for feature in features])
    own, dense = student_taps(distill, student)
    taps = [teacher_taps(distill, key, teacher) for key, teacher in zip(distill.teachers, teachers, strict=True)]
    with own:
        student(IMAGES)
    seen = {}
    for key, tap, teacher in zip(distill.teachers, taps, teachers, strict=True):
        with tap:
            teacher(IMAGES)
        seen[key] = tap.take()
    projections = Projections(feature_widths(distill, own, dense, seen, len(IMAGES)))
    matched = FeatureLoss(
        distill.features, own, taps, projections, projections.own_widths, SimpleNamespace(wrapped=student)
    )
    return Distillation(student, teachers, 0.5, 2.0, nullcontext, features=matched), projections


def positions(feature):
    """(B, positions, C), by way of loops."""
    if feature.dim() == 4:
        rows = [feature[:, :, i, j] for i in range(feature.shape[2]) for j in range(feature.shape[3])]
        return torch.stack(rows, 1)
    return feature[:, None] if feature.dim() == 2 else feature


def test_two_conv_nets_of_other_width_and_size():
    student, teacher = conv_net(3, stride=2), conv_net(5)
    task, projections = lay_out(student, [teacher], [{"student": "0", "teacher": "0", "weight": 2.0}])
    output = task(IMAGES, LABELS, 0)
    own, theirs = student[0](IMAGES), teacher[0](IMAGES)
    weight, bias = projections.get_submodule("0").weight, projections.get_submodule("0").bias
    assert (own.shape[2:], theirs.shape[2:], weight.shape) == ((4, 4), (8, 8), (5, 3))
    total = 0.0
    for b in range(3):
        for i in range(4):
            for j in range(4):
                block = theirs[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
                total += (weight @ own[b, :, i, j] + bias - block).square().sum()
    expected = 2.0 * total / (3 * 16 * 5)
    assert output.figures["loss_feature"].item() == pytest.approx(expected.item(), rel=1e-5)
    parts = 0.5 * output.figures["loss_kd"] + 0.5 * output.figures["loss_ce"] + output.figures["loss_feature"]
    assert output.loss.item() == pytest.approx(parts.item(), rel=1e-6)


def test_a_conv_net_teaches_a_transformer_and_so_does_another_transformer():
    student, cnn, tokens = Tokens(6), conv_net(5), Tokens(10)
    task, projections = lay_out(
        student,
        [cnn, tokens],
        [
            {"student": "block", "teacher": "1", "loss": "cosine"},
            {"student": "block", "teacher": "block", "loss": "cosine", "weight": 0.5, "of": 1},
        ],
    )
    output = task(IMAGES, LABELS, 0)
    own = student.block(student.embed(IMAGES.squeeze(1)))
    a = projections.get_submodule("0")(own.mean(1))
    b = torch.relu(cnn[0](IMAGES)).mean((2, 3))
    from_cnn = (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
    a = projections.get_submodule("1")(own)
    b = tokens.block(tokens.embed(IMAGES.squeeze(1)))
    from_tokens = (1 - (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2))).mean()
    expected = from_cnn + 0.5 * from_tokens
    assert output.figures["loss_feature"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_widths_that_are_equal_get_no_projection():
    features = [{"student": name, "teacher": name} for name in ("0", "1", "3")]
    _, projections = lay_out(conv_net(3), [conv_net(5)], features)
    assert {name for name, _ in projections.named_parameters()} == {"0.weight", "0.bias", "1.weight", "1.bias"}
    task, projections = lay_out(conv_net(3), [conv_net(3)], features)
    assert not list(projections.parameters())
    task(IMAGES, LABELS, 0).loss.backward()


def test_student_and_projections_learn_and_the_teacher_does_not():
    student, teacher = conv_net(3), conv_net(5)
    task, projections = lay_out(student, [teacher], [{"student": "0", "teacher": "0"}])
    task(IMAGES, LABELS, 0).loss.backward()
    with_features = student[0].weight.grad.clone()
    assert projections.get_submodule("0").weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    student.zero_grad()
    Distillation(student, [teacher], 0.5, 2.0, nullcontext)(IMAGES, LABELS, 0).loss.backward()
    own = projections.get_submodule("0")(student[0](IMAGES).movedim(1, 3))
    (own - teacher[0](IMAGES).movedim(1, 3)).square().mean().backward()
    assert torch.allclose(student[0].weight.grad, with_features, atol=1e-6)


@pytest.mark.parametrize(("own", "theirs"), [((8, 8), (2, 4)), ((5, 7), (3, 7)), ((4, 9), (6, 5))])
def test_maps_are_averaged_to_the_smaller_height_and_width(own, theirs):
    student, teacher = torch.randn(2, 3, *own), torch.randn(2, 4, *theirs)
    height, width = min(own[0], theirs[0]), min(own[1], theirs[1])
    for whole, aligned in zip((student, teacher), align(student, teacher), strict=True):
        assert aligned.shape == (2, height * width, whole.shape[1])
        for i in range(height):
            for j in range(width):
                top, bottom = i * whole.shape[2] // height, -(-(i + 1) * whole.shape[2] // height)
                left, right = j * whole.shape[3] // width, -(-(j + 1) * whole.shape[3] // width)
                block = whole[:, :, top:bottom, left:right].mean((2, 3))
                assert torch.allclose(aligned[:, i * width + j], block, atol=1e-6)


@pytest.mark.parametrize(
    ("own", "theirs"),
    [((2, 3), (2, 4, 5, 5)), ((2, 9, 3), (2, 4, 3, 3)), ((2, 7, 3), (2, 6, 4)), ((2, 3), (2, 6, 4))],
    ids=["vector and map", "tokens and map", "fewer tokens", "vector and tokens"],
)
def test_positions_of_other_number_or_kind_are_averaged(own, theirs):
    student, teacher = torch.randn(own), torch.randn(theirs)
    for whole, aligned in zip((student, teacher), align(student, teacher), strict=True):
        assert torch.allclose(aligned, positions(whole).mean(1, keepdim=True), atol=1e-6)


def test_as_many_tokens_are_matched_one_by_one():
    student, teacher = torch.randn(2, 6, 3), torch.randn(2, 6, 4)
    assert all(torch.equal(a, b) for a, b in zip(align(student, teacher), (student, teacher), strict=True))
    student, teacher = torch.randn(2, 3), torch.randn(2, 4)
    assert [feature.shape for feature in align(student, teacher)] == [(2, 1, 3), (2, 1, 4)]


def test_cosine_sees_no_length():
    feature = torch.randn(2, 5, 3)
    assert cosine_distance(feature, 7 * feature).item() == pytest.approx(0, abs=1e-6)
    assert cosine_distance(feature, -0.1 * feature).item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize(
    "pack",
    [lambda x: (None, x, 2 * x), lambda x: [x], Output, lambda x: {"other": 2 * x, "last_hidden_state": x}],
    ids=["tuple", "list", "attribute", "mapping"],
)
def test_an_output_of_several_parts(pack):
    model = nn.Sequential(nn.Linear(4, 4), Parts(pack))
    taps = Taps(model, {"1": "key"})
    x = torch.randn(2, 4)
    with taps:
        model(x)
    assert torch.equal(taps.take()["1"], model[0](x))


@pytest.mark.parametrize(
    ("pack", "words"),
    [(lambda x: "words", "returned a str"), (lambda x: {"x": x}, "a dict"), (lambda x: x.long(), "not a tensor of")],
)
def test_an_output_without_a_feature_is_a_fault_of_the_configuration(pack, words):
    model = nn.Sequential(nn.Linear(4, 4), Parts(pack))
    taps = Taps(model, {"1": "distill.features.3.student"})
    with taps:
        model(torch.randn(2, 4))
    with pytest.raises(ConfigError, match=rf"distill\.features\.3\.student: '1' .*{words}"):
        taps.take()


def test_a_module_that_follows_in_place_does_not_change_what_is_matched():
    model = conv_net(3)
    taps = Taps(model, {"0": "key"})
    with taps:
        model(IMAGES)
    assert torch.equal(taps.take()["0"], model[0](IMAGES))


def test_nothing_is_taken_in_evaluation_and_nothing_is_kept_after_use():
    student, teacher = conv_net(3), conv_net(5)
    task, _ = lay_out(student, [teacher], [{"student": "0", "teacher": "0"}])
    kept = []
    clone = torch.Tensor.to

    def watched(self, *args, **kwargs):
        result = clone(self, *args, **kwargs)
        if kwargs.get("copy"):
            kept.append(weakref.ref(result))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", watched)
        student.eval()(IMAGES)
        teacher(IMAGES)
        assert not kept
        output = task(IMAGES, LABELS, 0)
        assert len(kept) == 2
    output.loss.backward()
    del output
    assert [reference() for reference in kept] == [None, None]


def test_compiled_in_place():
    student, teacher = conv_net(3), conv_net(5)
    task, _ = lay_out(student, [teacher], [{"student": "0", "teacher": "1"}])
    plain = task(IMAGES, LABELS, 0)
    plain.loss.backward()
    gradient = student[0].weight.grad.clone()
    student.zero_grad()
    torch._dynamo.reset()
    for model in (student, teacher):
        model.compile(backend="eager")
    with torch.no_grad():
        student.eval()(IMAGES)
    for _ in range(2):
        compiled = task(IMAGES, LABELS, 0)
        compiled.loss.backward()
        assert torch.allclose(compiled.figures["loss_feature"], plain.figures["loss_feature"])
        assert torch.allclose(student[0].weight.grad, gradient, atol=1e-6)
        student.zero_grad()
        with torch.no_grad():
            student(IMAGES)
    torch._dynamo.reset()
