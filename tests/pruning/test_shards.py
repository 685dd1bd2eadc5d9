import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distprune.pruning import fingerprints
from distprune.pruning.collectives import Ranks
from distprune.pruning.shards import CHUNK, Part, chunks, flat, local


@dataclass(frozen=True)
class Box:
    """A rectangular piece of a tensor, as slices."""

    whole: tuple[int, ...]
    slices: tuple[slice, ...]

    def of(self, tensor: torch.Tensor, order: tuple[int, ...] | None = None) -> torch.Tensor:
        """A copy of the piece of `tensor`, laid out in memory with dimension order[0] outermost."""
        piece = tensor[self.slices]
        order = order or tuple(range(piece.dim()))
        back = [order.index(d) for d in range(piece.dim())]
        return piece.permute(order).contiguous().clone().permute(back)

    @property
    def part(self) -> Part:
        start = tuple(s.start for s in self.slices)
        shape = tuple(s.stop - s.start for s in self.slices)
        return Part(self.whole, start, shape, copies=1, copy=0, layout=None)


@st.composite
def boxes(draw) -> Box:
    whole = tuple(draw(st.lists(st.integers(0, 5), max_size=5)))
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in whole]
    return Box(whole, tuple(slice(low, high) for low, high in ends))


@st.composite
def partitions(draw) -> list[Box]:
    """All pieces that cuts through every dimension, at random places, leave of a tensor; some of them empty."""
    whole = tuple(draw(st.lists(st.one_of(st.integers(0, 4), st.just(17)), max_size=3)))
    ranges = []
    for n in whole:
        cuts = [0, *sorted(draw(st.lists(st.integers(0, n), max_size=3))), n]
        ranges.append([slice(low, high) for low, high in itertools.pairwise(cuts)])
    return [Box(whole, slices) for slices in itertools.product(*ranges)]


def memory_order(tensor: torch.Tensor) -> list:
    return torch.as_strided(tensor, (tensor.numel(),), (1,)).tolist()


@given(boxes(), st.data())
def test_indices_of_a_part_are_those_of_a_slice_whatever_the_memory_order(box, data):
    positions = torch.arange(math.prod(box.whole)).view(box.whole)
    piece = box.of(positions, tuple(data.draw(st.permutations(range(len(box.whole))))))
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, piece.numel())] * 2)))
    assert box.part.indices(piece, begin, end).tolist() == memory_order(piece)[begin:end]
    assert flat(piece).tolist() == memory_order(piece)


@pytest.mark.parametrize("size", [0, 1])
def test_the_fewest_elements_can_be_viewed_as_another_type_though_they_have_a_stride(size):
    every_other = torch.ones(size, 2, dtype=torch.bool)[:, 0]
    assert every_other.stride() == (2,)
    assert flat(every_other).tolist() == [True] * size
    assert len(flat(every_other)[:0].view(torch.int64)) == 0


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_indices_of_conv_weights_cut_in_any_dimension(dim, memory_format):
    positions = torch.arange(5 * 4 * 3 * 2).view(5, 4, 3, 2)
    for start, stop in itertools.combinations(range(positions.shape[dim] + 1), 2):
        slices = [slice(0, n) for n in positions.shape]
        slices[dim] = slice(start, stop)
        box = Box((5, 4, 3, 2), tuple(slices))
        piece = box.of(positions).to(memory_format=memory_format)
        assert box.part.indices(piece, 0, piece.numel()).tolist() == flat(piece).tolist()


def test_indices_beyond_2_to_the_31_do_not_wrap():
    part = Part((2**20, 2**20), (2**19, 2**18), (2, 3), 1, 0, None)
    first = 2**39 + 2**18
    assert part.indices(torch.zeros(2, 3), 1, 5).tolist() == [first + 1, first + 2, first + 2**20, first + 2**20 + 1]
    assert part.indices(torch.zeros(3, 2).t(), 1, 3).tolist() == [first + 2**20, first + 1]


def digest(mask, part):
    return fingerprints.digest([mask], [part])[0]


@given(partitions(), st.data())
def test_digests_of_parts_add_up_to_that_of_the_whole_however_it_is_cut(parts, data):
    mask = torch.rand(parts[0].whole, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))) < 0.5
    whole = digest(mask, Part.of(mask, Ranks()))
    order = tuple(data.draw(st.permutations(range(mask.dim()))))
    assert sum(digest(box.of(mask, order), box.part) for box in parts) == whole


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(3, CHUNK + 5), (CHUNK // 2 + 3, 5)], ids=str)
def test_digests_of_parts_longer_than_a_chunk_add_up(shape, dim):
    mask = torch.rand(shape) < 0.5
    cuts = [0, shape[dim] // 3 + 1, shape[dim] - 1, shape[dim]]
    total = torch.zeros((), dtype=torch.int64)
    for low, high in itertools.pairwise(cuts):
        slices = [slice(0, n) for n in shape]
        slices[dim] = slice(low, high)
        box = Box(shape, tuple(slices))
        total += digest(box.of(mask), box.part)
    assert total == digest(mask, Part.of(mask, Ranks()))


@given(partitions(), st.data())
def test_digest_of_a_part_says_where_it_lies(parts, data):
    box = data.draw(st.sampled_from(parts))
    piece = box.of(torch.ones(box.whole, dtype=torch.bool))
    if piece.numel() == 0:
        assert digest(piece, box.part) == 0
        return
    for other in parts:
        if other.part.shape == box.part.shape and other != box:
            assert digest(piece, other.part) != digest(piece, box.part)


def test_a_tensor_that_is_no_dtensor_is_held_whole_by_every_rank():
    ranks = Ranks()
    ranks.rank, ranks.world_size = 2, 5
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    part = Part.of(weight, ranks)
    assert (part.whole, part.start, part.shape) == ((4, 3), (0, 0), (4, 3))
    assert (part.copies, part.copy, part.is_rows) == (5, 2, True)
    assert local(weight).data_ptr() == weight.data_ptr()
    assert not local(weight).requires_grad


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 30))
def test_chunks_cover_a_stretch_without_overlap(start, length, size):
    found = list(chunks(start, start + length, size))
    assert [i for low, high in found for i in range(low, high)] == list(range(start, start + length))
    assert all(0 < high - low <= size for low, high in found)


@pytest.mark.parametrize(
    ("length", "splits", "cuts"),
    [
        (12, (), []),
        (12, ((1, 3),), [4, 8]),
        (10, ((1, 3), (0, 2), (1, 2)), [2, 4, 6, 8, 9]),
        (2, ((1, 4),), [1]),
        (1, ((1, 4),), []),
    ],
)
def test_cuts_are_where_parts_begin_that_hold_something(length, splits, cuts):
    assert Part((6, length), (0, 0), (6, length), 1, 0, None, splits).cuts(1) == cuts
