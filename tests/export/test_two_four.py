"""Which layers become 2:4, with stand-ins for the kernel and for the clock: no GPU is needed."""

import pytest
import torch
from torch import nn

from distprune.errors import ConfigError
from distprune.export import two_four


@pytest.fixture
def model():
    """Four linear layers: 2:4 and large, 2:4 and small, dense, and one that no input reaches."""
    model = nn.ModuleDict({"large": nn.Linear(64, 64), "small": nn.Linear(8, 8), "dense": nn.Linear(8, 8)})
    model["idle"] = nn.Linear(8, 8)
    with torch.no_grad():
        for name in ("large", "small", "idle"):
            model[name].weight.view(-1, 4)[:, ::2] = 0
    return model


def measured(model, timer, convert=lambda weight: weight.clone()):
    inputs = {name: torch.zeros(2, model[name].in_features) for name in ("large", "small", "dense")}
    return two_four.choose(model, inputs, timer, convert)


def test_a_layer_is_sparse_where_that_was_measured_to_be_faster(model):
    dense = {name: layer.weight for name, layer in model.items()}
    times = {"large": (2.0, 1.0), "small": (1.0, 1.0)}

    def timer(layer, inputs):
        name = next(n for n, m in model.items() if m is layer)
        return times[name][layer.weight is not dense[name]]

    choices = measured(model, timer)
    assert [name for name, choice in choices.items() if choice.sparse] == ["large"]
    assert (choices["large"].dense_ms, choices["large"].sparse_ms) == (2.0, 1.0)
    assert "sparse takes 1.000 ms, dense 1.000 ms" in choices["small"].why
    assert choices["dense"].why == "its weights are not 2:4"
    assert choices["idle"].why == "it is not called as a module"
    assert all(layer.weight is dense[name] for name, layer in model.items()), "measuring leaves no trace"


def test_a_shape_that_the_kernel_refuses_stays_dense(model):
    def refuse(weight):
        raise RuntimeError("64 x 64 is too small\nsecond line")

    choices = measured(model, lambda layer, inputs: 1.0, refuse)
    assert choices["large"].why == "its shape does not fit the kernel: 64 x 64 is too small"
    assert not choices["large"].sparse


def test_what_is_2_4_is_seen_in_the_weights():
    weight = torch.ones(2, 8)
    assert not two_four.fits(weight)
    weight[:, [0, 3, 4, 5]] = 0
    assert two_four.fits(weight)
    assert not two_four.fits(torch.zeros(4, 6)), "4 does not divide the inputs"
    assert not two_four.fits(torch.zeros(4, 4, 1, 1)), "a convolution"


def test_weights_are_converted_and_inputs_are_those_of_the_run(model):
    seen = two_four.inputs_of_layers(model, lambda: model["small"](torch.full((3, 8), 2.0)))
    assert list(seen) == ["small"]
    assert torch.equal(seen["small"], torch.full((3, 8), 2.0))
    two_four.apply(model, ["large"], lambda weight: 2 * weight)
    assert not model["large"].weight.requires_grad


def test_machines_without_sparse_tensor_cores_are_told():
    with pytest.raises(ConfigError, match="compute capability 8"):
        two_four.need_gpu(torch.device("cpu"))
