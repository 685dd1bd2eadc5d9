"""Packed weights: what is written comes back to the bit, and is small."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from distprune.models import build_model, load_weights
from distprune.models.packed import load_packed, save_packed

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool]


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).tolist() if tensor.numel() else []


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    dtype=st.sampled_from(TYPES),
    density=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_any_tensor_comes_back_to_the_bit(tmp_path_factory, shape, dtype, density, seed):
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    bits = torch.randint(256, (math.prod(shape), size), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        bits &= 1
    bits[torch.rand(len(bits), generator=generator) >= density] = 0
    tensor = bits.flatten().view(dtype).view(shape) if bits.numel() else torch.empty(shape, dtype=dtype)
    path = tmp_path_factory.mktemp("packed") / "a.safetensors"
    save_packed({"a.b": tensor, "c": torch.ones(3)}, path)
    again = load_packed(path)
    assert (again["a.b"].dtype, again["a.b"].shape, raw(again["a.b"])) == (dtype, torch.Size(shape), raw(tensor))
    assert torch.equal(again["c"], torch.ones(3))


def test_minus_zero_nan_and_the_smallest_numbers_are_kept(tmp_path):
    special = torch.zeros(1000)
    special[:6] = torch.tensor([-0.0, math.nan, math.inf, -math.inf, 1e-45, 1.0])
    save_packed({"w": special}, tmp_path / "p")
    with safe_open(tmp_path / "p", "pt") as file:
        stored = file.get_tensor("w")
    assert stored[:125].tolist() == [0b111111] + [0] * 124
    assert stored[125:].clone().view(torch.float32)[4:].tolist() == [torch.tensor(1e-45).item(), 1.0]
    assert raw(load_packed(tmp_path / "p")["w"]) == raw(special)


@pytest.mark.parametrize(("sparsity", "share"), [(0.9, 0.132), (0.98, 0.052), (0.0, 1.001)])
def test_a_large_tensor_takes_a_bit_for_each_element_and_what_is_left(tmp_path, sparsity, share):
    weight = torch.randn(1000, 1000)
    weight.view(-1)[: round(sparsity * 1_000_000)] = 0
    save_packed({"w": weight}, tmp_path / "p")
    assert (tmp_path / "p").stat().st_size < share * 4_000_000
    assert torch.equal(load_packed(tmp_path / "p")["w"], weight)


def test_strides_and_shared_memory_do_not_matter(tmp_path):
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    save_packed({"a": weight, "b": weight, "c": weight[:2]}, tmp_path / "p")
    again = load_packed(tmp_path / "p")
    assert torch.equal(again["a"], weight)
    assert torch.equal(again["c"], weight[:2])


def test_a_model_takes_packed_weights_as_any(tmp_path):
    model = build_model("digits_cnn", {}, 10)
    with torch.no_grad():
        model[8].weight[:, ::2] = 0
    save_packed(model.state_dict(), tmp_path / "packed.safetensors")
    again = build_model("digits_cnn", {}, 10)
    load_weights(again, str(tmp_path / "packed.safetensors"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_what_is_not_packed_or_damaged_is_refused(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="is not packed"):
        load_packed(tmp_path / "plain")
    about = {"version": 1, "tensors": {"w": ["float32", [16]]}, "channels": None}
    stored = {"w": torch.tensor([1, 1, *range(12)], dtype=torch.uint8)}
    save_file(stored, tmp_path / "more", {"packed": json.dumps(about)})
    with pytest.raises(ValueError, match="w has 2 bits set, but 12 bytes of values"):
        load_packed(tmp_path / "more")
    save_file(stored, tmp_path / "later", {"packed": json.dumps({**about, "version": 2})})
    with pytest.raises(ValueError, match="version 2"):
        load_packed(tmp_path / "later")
