import pytest
import torch
from torch import nn

from distprune.structured import find_channels
from distprune.structured.attention import ThinAttention
from tests.structured.nets import pruned

MASKS = {
    "none": None,
    "bool": torch.ones(4, 6, dtype=torch.bool).triu(2),
    "float": torch.randn(4, 6, generator=torch.Generator().manual_seed(1)),
}


def attention(batch_first: bool = True, bias: bool = True) -> nn.MultiheadAttention:
    made = nn.MultiheadAttention(12, 3, dropout=0.2, bias=bias, batch_first=batch_first)
    if bias:
        nn.init.normal_(made.in_proj_bias)
        nn.init.normal_(made.out_proj.bias)
    return made.eval()


def inputs(batch_first: bool) -> list[torch.Tensor]:
    """2 samples; 4 positions ask 6."""
    shapes = [(2, 4, 12), (2, 6, 12), (2, 6, 12)]
    return [torch.randn(shape if batch_first else (shape[1], shape[0], shape[2])) for shape in shapes]


def padding(kind: str) -> torch.Tensor | None:
    hidden = torch.tensor([[False] * 5 + [True], [False] * 3 + [True] * 3])
    return {"none": None, "bool": hidden, "float": hidden.float() * -2}[kind]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pad", ["none", "bool", "float"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_with_all_heads_it_is_multi_head_attention(batch_first, pad, mask):
    for bias in (True, False):
        full = attention(batch_first, bias)
        thin = ThinAttention.like(full)
        given = inputs(batch_first)
        attn_mask, key_padding_mask = MASKS[mask], padding(pad)
        for weights, average in ((True, True), (True, False), (False, True)):
            options = {
                "key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "need_weights": weights,
                "average_attn_weights": average,
            }  # fmt: skip
            expected, expected_weights = full(*given, **options)
            found, found_weights = thin(*given, **options)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert (found_weights is None) == (expected_weights is None) == (not weights)
            if weights:
                torch.testing.assert_close(found_weights, expected_weights, rtol=1e-5, atol=1e-6)


class Attends(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = attention(batch_first)

    def forward(self, query, key, value, **options):
        return self.attention(query, key, value, need_weights=False, **options)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("left", [(0,), (1,), (0, 2)])
def test_without_heads_it_is_attention_whose_heads_are_0(left, batch_first):
    model, given = Attends(batch_first), inputs(batch_first)
    channels = find_channels(model, tuple(given))
    assert [(group.size, group.width) for group in channels.groups] == [(3, 4)]
    kept = torch.zeros(3, dtype=torch.bool)
    kept[list(left)] = True
    pruner = pruned(model.eval(), channels, kept)
    rows = model.attention.in_proj_weight.view(3, 3, 4, 12).abs().amax((0, 2, 3))
    assert (rows > 0).tolist() == kept.tolist()
    options = {"attn_mask": MASKS["float"], "key_padding_mask": padding("float")}
    masked = model(*given), model(*given, **options)
    state = model.state_dict()
    pruner.shrink()
    assert isinstance(model.attention, ThinAttention)
    assert model.attention.num_heads == len(left)
    torch.testing.assert_close((model(*given), model(*given, **options)), masked, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == state.keys()
    assert model.attention.out_proj.in_features == 4 * len(left)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(*given, **options).float(), masked[1], rtol=0.1, atol=0.1)


def test_attention_that_loses_no_head_stays_what_it_is():
    layer = nn.TransformerEncoderLayer(12, 3, 8, batch_first=True)
    channels = find_channels(nn.Sequential(layer), torch.randn(2, 4, 12))
    kept = torch.ones(channels.units, dtype=torch.bool)
    kept[next(group.begin for group in channels.groups if group.name == "0.linear1")] = False
    pruned(model := nn.Sequential(layer), channels, kept).shrink()
    assert isinstance(model[0].self_attn, nn.MultiheadAttention)


def test_dropout_is_that_of_training():
    thin = ThinAttention.like(attention()).train()
    given = inputs(True)
    for weights in (True, False):
        assert not torch.equal(thin(*given, need_weights=weights)[0], thin(*given, need_weights=weights)[0])
    thin.eval()
    assert torch.equal(thin(*given)[0], thin(*given)[0])


def test_a_mask_for_each_head_is_refused():
    with pytest.raises(ValueError, match="a mask for each head"):
        ThinAttention.like(attention())(*inputs(True), attn_mask=torch.zeros(6, 4, 6))


def test_hooks_stay_where_heads_go():
    model, given = Attends(True), inputs(True)
    seen = []
    model.attention.register_forward_pre_hook(lambda m, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True)
    model.attention.register_forward_hook(lambda m, args, output: seen.append(type(m).__name__))
    channels = find_channels(model, tuple(given))
    seen.clear()
    pruned(model, channels, torch.tensor([True, False, True])).shrink()
    model(*given)
    assert seen == [["need_weights"], "ThinAttention"]


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoders_run_their_fast_path_around_it_or_do_without(norm_first):
    layer = nn.TransformerEncoderLayer(12, 4, 8, 0.1, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    x = torch.randn(2, 6, 12)
    channels = find_channels(model, x)
    # The first layer keeps its heads, and with them the way it takes.
    kept = torch.ones(channels.units, dtype=torch.bool)
    for group in channels.groups:
        if group.name != "layers.0.self_attn":
            kept[group.begin] = False
    pruner = pruned(model, channels, kept)
    model.eval()
    hidden = padding("bool")
    masked = model(x), model(x, src_key_padding_mask=hidden)[~hidden]
    pruner.shrink()
    with torch.no_grad():
        found = model(x), model(x, src_key_padding_mask=hidden)[~hidden]
    torch.testing.assert_close(found, masked, rtol=1e-5, atol=1e-5)
