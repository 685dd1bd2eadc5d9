import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from distprune.pruning import masks
from distprune.pruning.threshold import CHUNK

SHAPES = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)
drawn_masks = npst.arrays(bool, SHAPES).map(lambda a: torch.from_numpy(np.asarray(a)))


def numpy_bits(mask: torch.Tensor) -> list[int]:
    return np.packbits(mask.contiguous().numpy().reshape(-1), bitorder="little").tolist()


def test_first_element_is_the_lowest_bit_of_the_first_byte():
    mask = torch.tensor([True, False, True, True, False, False, False, True, False, True])
    assert masks.pack(mask).tolist() == [0b10001101, 0b10]


@given(drawn_masks)
def test_packing_agrees_with_numpy(mask):
    packed = masks.pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == numpy_bits(mask)


@given(drawn_masks)
def test_unpacking_brings_the_mask_back(mask):
    into = torch.rand(mask.shape) < 0.5
    masks.unpack(masks.pack(mask), into)
    assert torch.equal(into, mask)


@pytest.mark.parametrize("numel", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_masks_longer_than_one_piece_pack_and_unpack(numel):
    mask = torch.rand(numel) < 0.5
    packed = masks.pack(mask)
    assert packed.tolist() == numpy_bits(mask)
    into = torch.ones_like(mask)
    masks.unpack(packed, into)
    assert torch.equal(into, mask)


def test_memory_format_changes_neither_bits_nor_digest():
    mask = torch.rand(4, 3, 5, 5) < 0.5
    channels_last = mask.to(memory_format=torch.channels_last)
    assert masks.pack(channels_last).tolist() == masks.pack(mask).tolist()
    assert masks.digest(channels_last) == masks.digest(mask)
    into = torch.ones_like(channels_last)
    masks.unpack(masks.pack(mask), into)
    assert torch.equal(into, mask)
    assert into.is_contiguous(memory_format=torch.channels_last)


@given(drawn_masks.filter(lambda m: m.numel() > 0), st.data())
def test_digest_changes_with_any_single_bit(mask, data):
    before = int(masks.digest(mask))
    mask.view(-1)[data.draw(st.integers(0, mask.numel() - 1))] ^= True
    assert int(masks.digest(mask)) != before


def test_digests_of_all_masks_of_twelve_bits_differ():
    digests = {int(masks.digest((torch.tensor(bits) >> torch.arange(12) & 1).bool())) for bits in range(2**12)}
    assert len(digests) == 2**12


def test_digest_changes_when_two_bits_swap_places():
    mask = torch.zeros(64, dtype=torch.bool)
    seen = set()
    for place in range(64):
        mask.zero_()[place] = True
        seen.add(int(masks.digest(mask)))
    assert len(seen) == 64


def test_combined_digest_knows_names_but_no_order():
    one = masks.combine({"a": 1, "b": 2})
    assert one == masks.combine({"b": 2, "a": 1})
    assert len({one, masks.combine({"a": 2, "b": 1}), masks.combine({"a": 1}), masks.combine({"a": 1, "c": 2})}) == 4
    assert len(one) == 16
    assert int(one, 16) >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_apply_turns_anything_into_plus_zero_and_touches_nothing_else(dtype):
    values = torch.tensor([1.5, -1.5, -0.0, 0.0, torch.nan, torch.inf, -torch.inf, 6e-8], dtype=dtype).repeat(2)
    tensor = values.clone()
    masks.apply(torch.arange(16) >= 8, tensor)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    assert tensor[:8].view(bits).tolist() == [0] * 8
    assert torch.equal(tensor[8:].view(bits), values[8:].view(bits))


def test_apply_pairs_elements_by_place_and_not_by_memory():
    tensor = torch.arange(1.0, 25.0).view(2, 3, 2, 2)
    mask = torch.rand(tensor.shape) < 0.5
    expected = torch.where(mask, tensor, 0.0)
    masks.apply(mask.to(memory_format=torch.channels_last), tensor)
    assert torch.equal(tensor, expected)


def test_apply_works_on_parameters_that_take_part_in_a_graph():
    weight = torch.nn.Parameter(torch.ones(3))
    masks.apply(torch.tensor([True, False, True]), weight)
    assert weight.tolist() == [1.0, 0.0, 1.0]
    assert weight.requires_grad


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(1, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(2, 1, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.bool),
    ],
    ids=["short", "long", "2-D", "bool"],
)
def test_unpacking_what_does_not_fit_is_refused(packed):
    mask = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"does not fit a tensor of \(3, 4\)"):
        masks.unpack(packed, mask)
    assert mask.all()
