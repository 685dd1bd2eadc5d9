"""The nets of the papers: as many parameters as published, and the images they take."""

import pytest
import torch
from torch import nn

from distprune.models import build_model
from distprune.pruning import find_prunable


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_lenet_300_100_has_the_weights_of_lecun_1998():
    model = build_model("lenet300", {}, 10)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(784, 300), (300, 100), (100, 10)]
    assert find_prunable(model).numel == 266_200
    assert parameters(model) == 266_610
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_cifar_resnets_have_the_parameters_of_he_2015(depth, count):
    model = build_model(f"resnet{depth}", {}, 10)
    assert parameters(model) == count
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == depth - 1, "shortcuts have no weights (option A)"
    assert {conv.kernel_size for conv in convolutions} == {(3, 3)}


def test_cifar_resnets_halve_the_image_twice_and_end_with_the_mean_over_it():
    model = build_model("resnet20", {}, 10).eval()
    sizes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape)))
    features = []
    model.linear.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    model.layer3.register_forward_hook(lambda _, __, out: features.append(out))
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    torch.testing.assert_close(features[1], features[0].mean(dim=(2, 3)))


def test_a_shortcut_to_more_channels_takes_every_other_pixel_and_pads_with_zeros_on_both_sides():
    block = build_model("resnet20", {}, 10).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    x = torch.rand(1, 16, 8, 8)
    with torch.inference_mode():
        out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].count_nonzero() == out[:, 24:].count_nonzero() == 0


def test_the_net_of_the_digits_takes_images_of_8_by_8():
    assert build_model("digits_cnn", {}, 10)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert parameters(build_model("digits_cnn", {"width": 8}, 10)) < parameters(build_model("digits_cnn", {}, 10))
