import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from distprune.pruning import fingerprints, masks, rows
from distprune.pruning.collectives import Ranks
from distprune.pruning.shards import CHUNK, Part

SHAPES = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)
drawn_masks = npst.arrays(bool, SHAPES).map(lambda a: torch.from_numpy(np.asarray(a)))


def numpy_bits(mask: torch.Tensor) -> torch.Tensor:
    rows = mask.shape[0] if mask.dim() else 1
    bools = mask.contiguous().numpy().reshape(rows, mask.shape[1:].numel())
    return torch.from_numpy(np.packbits(bools, axis=1, bitorder="little"))


def digest(mask: torch.Tensor) -> int:
    """The fingerprint of a mask that is whole."""
    return int(fingerprints.digest([mask], [Part.of(mask, Ranks())]))


def test_first_element_of_a_row_is_the_lowest_bit_of_its_first_byte():
    row = [True, False, True, True, False, False, False, True, False, True]
    assert masks.pack(torch.tensor([row, row[::-1]])).tolist() == [[0b10001101, 0b10], [0b11000101, 0b10]]


@pytest.mark.parametrize(
    ("shape", "packed"),
    [((), (1, 1)), ((5,), (5, 1)), ((3, 8), (3, 1)), ((3, 9), (3, 2)), ((2, 3, 3, 3), (2, 4)), ((0, 3), (0, 1))],
)
def test_each_row_of_the_first_dimension_is_packed_by_itself(shape, packed):
    assert masks.packed_shape(torch.Size(shape)) == packed
    assert tuple(masks.pack(torch.ones(shape, dtype=torch.bool)).shape) == packed


@given(drawn_masks.filter(lambda m: m.dim() > 0), st.data())
def test_rows_of_a_mask_are_rows_of_it_packed(mask, data):
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, len(mask))] * 2)))
    assert torch.equal(masks.pack(mask)[low:high], masks.pack(mask[low:high].clone()))


@given(drawn_masks)
def test_packing_agrees_with_numpy(mask):
    packed = masks.pack(mask)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, numpy_bits(mask))


@given(drawn_masks)
def test_unpacking_brings_the_mask_back(mask):
    into = torch.rand(mask.shape) < 0.5
    masks.unpack(masks.pack(mask), into)
    assert torch.equal(into, mask)


@pytest.mark.parametrize(
    "shape",
    [
        *[(CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (3 * CHUNK + 5,)],
        *[(1, CHUNK - 1), (2, CHUNK + 1), (7, CHUNK // 3 + 1), (CHUNK // 3, 7)],
    ],
    ids=str,
)
def test_masks_longer_than_one_piece_pack_and_unpack(shape):
    mask = torch.rand(shape) < 0.5
    packed = masks.pack(mask)
    assert torch.equal(packed, numpy_bits(mask))
    into = torch.ones_like(mask)
    masks.unpack(packed, into)
    assert torch.equal(into, mask)


def test_memory_format_changes_neither_bits_nor_digest():
    mask = torch.rand(4, 3, 5, 5) < 0.5
    channels_last = mask.to(memory_format=torch.channels_last)
    assert torch.equal(masks.pack(channels_last), masks.pack(mask))
    assert digest(channels_last) == digest(mask)
    into = torch.ones_like(channels_last)
    masks.unpack(masks.pack(mask), into)
    assert torch.equal(into, mask)
    assert into.is_contiguous(memory_format=torch.channels_last)


@given(drawn_masks.filter(lambda m: m.numel() > 0), st.data())
def test_digest_changes_with_any_single_bit(mask, data):
    before = digest(mask)
    mask.view(-1)[data.draw(st.integers(0, mask.numel() - 1))] ^= True
    assert digest(mask) != before


@pytest.mark.parametrize("shape", [(12,), (1, 12), (3, 4), (2, 3, 2)], ids=str)
def test_digests_of_all_masks_of_twelve_bits_differ(shape):
    digests = {digest((torch.tensor(bits) >> torch.arange(12) & 1).bool().view(shape)) for bits in range(2**12)}
    assert len(digests) == 2**12


def test_digest_changes_when_two_bits_swap_places():
    mask = torch.zeros(64, dtype=torch.bool)
    seen = set()
    for place in range(64):
        mask.zero_()[place] = True
        seen.add(digest(mask))
    assert len(seen) == 64


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [0, 1, 7, 1023, 1024, 1025, 10_000])
def test_a_tally_counts_and_changes_with_any_single_bit(size, kept):
    mask = torch.rand(size) < kept
    (count,), (checksum,) = fingerprints.tally([mask]).tolist()
    assert count == mask.count_nonzero()
    for place in {0, size // 2, size - 1} & set(range(size)):
        mask[place] ^= True
        assert fingerprints.tally([mask])[1] != checksum
        mask[place] ^= True


@pytest.mark.parametrize("least_rows", [1, 7, 1024])
def test_many_masks_at_once_have_the_digests_and_counts_of_each_alone(least_rows, monkeypatch):
    shapes = [(5,), (3, 8), (64, 16, 3, 3), (0, 3), (2, CHUNK + 9), (), (130, 512), (64, 3, 7, 7)]
    many = [torch.rand(shape) < 0.4 for shape in shapes]
    many.append((torch.rand(8, 16, 3, 3) < 0.5).to(memory_format=torch.channels_last))
    many.append(torch.rand(40, 1024)[3:20] < 0.5)
    parts = [Part.of(mask, Ranks()) for mask in many[:-1]]
    parts.append(Part((40, 1024), (3, 0), (17, 1024), 2, 0, None))
    many.append(torch.rand(20, 7) < 0.5)
    parts.append(Part((40, 24), (3, 2), (20, 7), 6, 0, None))
    digests = torch.cat([fingerprints.digest([mask], [part]) for mask, part in zip(many, parts, strict=True)])
    tallies = torch.cat([fingerprints.tally([mask]) for mask in many], 1)
    monkeypatch.setattr(rows, "takes_many", lambda device: True)
    monkeypatch.setattr(rows, "LEAST_ROWS", least_rows)
    assert torch.equal(fingerprints.digest(many, parts), digests)
    assert torch.equal(fingerprints.tally(many), tallies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_all_at_once_are_masked_as_one_by_one(dtype, monkeypatch):
    many = [torch.randn(shape).to(dtype) for shape in [(5, 3), (), (8, 4, 3, 3)]]
    many[2] = many[2].to(memory_format=torch.channels_last)
    ones = [torch.rand(tensor.shape) < 0.5 for tensor in many]
    expected = [torch.where(mask, tensor, 0.0) for mask, tensor in zip(ones, many, strict=True)]
    monkeypatch.setattr(masks, "takes_many", lambda device: True)
    masks.apply_all(ones, many)
    assert all(torch.equal(tensor, wanted) for tensor, wanted in zip(many, expected, strict=True))


def test_combined_digest_knows_names_but_no_order():
    def combined(**digests):
        return fingerprints.combine(digests)

    one = combined(a=1, b=2)
    assert one == combined(b=2, a=1)
    assert len({one, combined(a=2, b=1), combined(a=1), combined(a=1, c=2)}) == 4
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
        torch.zeros(2, 1, dtype=torch.uint8),
        torch.zeros(4, 1, dtype=torch.uint8),
        torch.zeros(3, 2, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(3, 1, dtype=torch.bool),
    ],
    ids=["short", "long", "wide", "1-D", "bool"],
)
def test_packed_bits_that_do_not_fit_are_refused(packed):
    mask = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"packed mask of fc\.weight is .*, not torch\.uint8 \(3, 1\)"):
        masks.check_packed(packed, mask, "fc.weight")
    masks.check_packed(torch.zeros(3, 1, dtype=torch.uint8), mask, "fc.weight")
