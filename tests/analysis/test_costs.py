"""What layers cost, against counts by hand."""

import torch
from torch import nn

from distprune.analysis.costs import layer_costs, parameters
from distprune.models import build_model


def test_layers_are_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 10))
    with torch.no_grad():
        model[0].weight[:6] = 0
    costs = layer_costs(model, torch.randn(4, 3, 4, 4))
    assert list(costs) == ["0", "3"]
    convolution, linear = costs.values()
    assert (convolution.weights, convolution.zeros, convolution.shape) == (216, 162, (8, 3, 3, 3))
    assert (convolution.macs, convolution.effective_macs) == (16 * 216, 16 * 54)
    assert (linear.macs, linear.effective_macs) == (1280, 1280)


def test_a_depthwise_convolution_works_within_channels():
    (cost,) = layer_costs(nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.randn(1, 8, 5, 5)).values()
    assert cost.macs == 25 * 8 * 9


def test_attention_counts_its_projections_and_what_tokens_do_with_each_other():
    attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with torch.no_grad():
        attention.self_attn.in_proj_weight.zero_()
    costs = layer_costs(attention, torch.randn(2, 5, 16))
    assert list(costs) == ["self_attn", "linear1", "linear2"]
    between = 2 * 5 * 5 * 16
    assert costs["self_attn"].weights == 4 * 16 * 16
    assert costs["self_attn"].macs == 5 * 4 * 16 * 16 + between
    assert costs["self_attn"].effective_macs == 5 * 16 * 16 + between


def test_a_whole_model_costs_what_is_published():
    model = build_model("resnet20", {}, 10)
    costs = layer_costs(model, torch.randn(2, 3, 32, 32))
    assert 40.5e6 < sum(cost.macs for cost in costs.values()) < 41e6
    assert sum(cost.weights for cost in costs.values()) == 268_336
    assert parameters(model)[0] == 269_722


def test_embeddings_are_listed_and_cost_nothing():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))
    costs = layer_costs(model, torch.tensor([[1, 2, 3]]))
    assert (costs["0"].weights, costs["0"].macs) == (160, 0)
    assert costs["1"].macs == 3 * 32
