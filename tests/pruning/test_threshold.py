import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distprune.pruning import NonFiniteError, Pruner
from distprune.pruning.collectives import Ranks
from distprune.pruning.radix import digit_widths, kth_smallest
from distprune.pruning.scorer import Scorer
from distprune.pruning.scores import DOUBLE, SIGNED, SINGLE, magnitude
from distprune.pruning.shards import CHUNK
from distprune.pruning.threshold import Search, share
from tests.pruning.reference import Bag, Levels, prunable, prune_by_sort

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((0,), (1,), (), (5,), (3, 4), (0, 3), (17,), (2, 3, 2, 2), (4, 1, 1, 1), (6, 2, 3, 1))
TIES = (-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0)
TINY = (-0.0, 0.0, 5e-324, -5e-324, 1e-310, 1.4e-45, -1.4e-45, 2.8e-45, 1e-40, -9.2e-41, 6e-8, -6e-8, 1.2e-7, 6.1e-5)
FLOATS = st.floats(-60000, 60000)


def pruner_of(tensors: list[torch.Tensor], levels: list[float]) -> tuple[Pruner, torch.optim.Optimizer]:
    """A Pruner of nothing but `tensors`, which may be emptied, and the optimizer whose steps it counts."""
    model = Bag(tensors)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Pruner(model, optimizer, Levels(levels), include=["*"], min_weights=0), optimizer


def pruned(tensors: list[torch.Tensor], sparsity: float) -> Pruner:
    """A Pruner after one update to `sparsity`."""
    pruner, _ = pruner_of(tensors, [sparsity])
    pruner.step()
    return pruner


def keeps(pruner: Pruner) -> list[list[bool]]:
    """Which weights stay, per tensor, row-major."""
    return [m.flatten().tolist() for m in pruner.masks.values()]


def zeroed(pruner: Pruner) -> list[int]:
    """The global indices of the pruned weights."""
    return [i for i, kept in enumerate(itertools.chain(*keeps(pruner))) if not kept]


def arranged(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if layout == "every other" and tensor.dim() > 0:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor


def fill(tensors: list[torch.Tensor], values: list[float], generator: torch.Generator) -> None:
    """New weights: each drawn from `values`, or, where there are none, each different."""
    for tensor in tensors:
        if values:
            places = torch.randint(len(values), tensor.shape, generator=generator)
            new = torch.tensor(values, dtype=torch.float64)[places]
        else:
            new = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.detach().copy_(new)


tensors_of_any_kind = st.lists(
    st.builds(
        lambda shape, dtype, layout: arranged(torch.zeros(shape, dtype=dtype), layout),
        st.sampled_from(SHAPES),
        st.sampled_from(DTYPES),
        st.sampled_from(["contiguous", "channels_last", "transposed", "every other"]),
    ),
    min_size=1,
    max_size=6,
)
values_to_draw_from = st.one_of(
    st.just([]),
    st.just(list(TIES)),
    st.just(list(TINY)),
    st.lists(st.sampled_from(TIES + TINY), min_size=1, max_size=3),
    st.lists(FLOATS, min_size=1, max_size=12),
)


@settings(max_examples=3 * settings().max_examples)
@given(
    tensors_of_any_kind,
    values_to_draw_from,
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4).map(sorted),
    st.integers(0, 2**32),
)
def test_masks_are_those_of_a_stable_sort(tensors, values, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    pruner, optimizer = pruner_of(tensors, levels)
    weights = [t.weight for t in pruner.tensors]
    for step, level in enumerate(levels):
        if step > 0:
            optimizer.step()
        fill(weights, values, generator)  # what training does, and worse: pruned weights come back
        before, k = pruner.zeros, round(level * pruner.weights)
        expected = prune_by_sort(weights, list(pruner.masks.values()), k)
        pruner.step()
        assert keeps(pruner) == expected
        assert pruner.zeros == sum(not kept for part in expected for kept in part) == k
        if k > before:
            assert not any(w[~m].any() for w, m in zip(weights, pruner.masks.values(), strict=True))


def test_tensors_longer_than_a_chunk_are_pruned_as_by_a_stable_sort():
    ties = torch.randint(-9, 9, (200, 1400)).bfloat16().t()
    channels_last = torch.randn(20, 16, 5, 5).to(memory_format=torch.channels_last)
    pruner, optimizer = pruner_of([torch.randn(CHUNK + 3), ties, channels_last], [0.3, 0.6])
    weights = [t.weight for t in pruner.tensors]
    for _ in range(2):
        k = round(pruner.schedule.sparsity(pruner.steps_done) * pruner.weights)
        expected = prune_by_sort(weights, list(pruner.masks.values()), k)
        pruner.step()
        assert keeps(pruner) == expected
        optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparsity_0_prunes_nothing(dtype):
    pruner, _ = pruner_of([torch.zeros(4, dtype=dtype), torch.ones(3, dtype=dtype)], [0.0])
    report = pruner.step()
    assert (report.zeros, report.newly_pruned, report.threshold) == (0, 0, 0.0)
    assert keeps(pruner) == [[True] * 4, [True] * 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 33, 1000])
def test_all_weights_but_one_can_be_pruned(dtype, n):
    pruner = pruned([torch.full((n // 2,), -1.0, dtype=dtype), torch.ones(n - n // 2, dtype=dtype)], 1 - 1 / n)
    assert zeroed(pruner) == list(range(1, n))


@pytest.mark.parametrize(("n", "sparsity"), [(1, 0.6), (10, 0.96), (3, 1 - 1e-9)])
def test_every_weight_is_pruned_where_rounding_says_so(n, sparsity):
    pruner = pruned([torch.randn(n)], sparsity)
    assert (pruner.zeros, pruner.sparsity) == (n, 1.0)


@pytest.mark.parametrize(("sparsity", "zeros"), [(0.25, 2), (0.35, 4), (0.05, 0), (0.15, 2), (0.45, 4)])
def test_halves_are_rounded_to_even(sparsity, zeros):
    assert pruned([torch.randn(10)], sparsity).zeros == zeros


def test_ties_are_split_by_row_major_place_in_channels_last_weights():
    weight = torch.ones(1, 2, 2, 2).to(memory_format=torch.channels_last)
    assert keeps(pruned([weight], 0.25)) == [[True] * 6 + [False] * 2]


def test_weights_that_are_zero_of_themselves_are_split_like_any_other_tie():
    weights = [torch.tensor([0.0, -0.0, 3.0, 0.0]), torch.tensor([0.0, 5.0, -0.0, 0.0])]
    pruner, optimizer = pruner_of(weights, [1 / 8, 3 / 8, 4 / 8, 7 / 8])
    dropped = []
    for _ in range(4):
        pruner.step()
        optimizer.step()
        dropped.append(zeroed(pruner))
    assert dropped == [[7], [4, 6, 7], [3, 4, 6, 7], [0, 1, 2, 3, 4, 6, 7]]


def test_equal_scores_of_different_dtypes_tie():
    pruner = pruned([torch.full((2,), 0.5, dtype=d) for d in DTYPES], 5 / 8)
    assert keeps(pruner) == [[True, True], [True, False], [False, False], [False, False]]


def test_float64_scores_are_told_apart_where_float32_would_not():
    weight = torch.tensor([1 + 3e-16, 1.0, 1 + 5e-16], dtype=torch.float64)
    assert keeps(pruned([weight], 1 / 3)) == [[True, False, True]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_parts_what_is_pruned_from_what_stays(dtype):
    weight = torch.randn(1000).to(dtype)
    pruner, _ = pruner_of([weight.clone()], [0.371])
    threshold = pruner.step().threshold
    kept = pruner.masks["tensors.0"]
    assert weight[~kept].abs().max() <= threshold <= weight[kept].abs().min()


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_weights_are_refused_and_nothing_changes(dtype, value):
    model = Bag([torch.randn(50).to(dtype), torch.randn(30), torch.randn(20)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
    pruner = Pruner(model, optimizer, Levels([0.0, 0.2, 0.4, 0.6]), include=["*"])
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        pruner.step()
    with torch.no_grad():
        alive = pruner.masks["tensors.0"].nonzero().view(-1)[:3]
        model.tensors[0][alive] = value
        model.tensors[2][pruner.masks["tensors.2"].nonzero().view(-1)[0]] = value
    optimizer.step()

    def everything():
        states = [v for p in model.parameters() for v in optimizer.state[p].values()]
        tensors = [*model.parameters(), *pruner.masks.values(), *states]
        return [t.detach().clone().view(torch.uint8) if t.dim() else t.clone() for t in tensors]

    before, digest, zeros = everything(), pruner.mask_digest, pruner.zeros
    with pytest.raises(NonFiniteError, match=r"step 3: tensors\.0: 3 of 50; tensors\.2: 1 of 20; nothing was pruned"):
        pruner.step()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert (pruner.mask_digest, pruner.zeros) == (digest, zeros)


def test_update_refused_for_nonfinite_weights_is_made_up_for_once_they_are_mended():
    model = Bag([torch.tensor([1.0, torch.nan, 3.0, 4.0])])
    pruner = Pruner(model, torch.optim.SGD(model.parameters()), Levels([0.5]), include=["*"])
    with pytest.raises(NonFiniteError):
        pruner.step()
    model.tensors[0].detach()[1] = 2.0
    assert pruner.step() is not None
    assert model.tensors[0].tolist() == [0.0, 0.0, 3.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_largest_finite_weight_is_not_taken_for_infinite(dtype):
    weight = torch.tensor([torch.finfo(dtype).max, 1.0], dtype=dtype)
    assert keeps(pruned([weight], 0.5)) == [[True, False]]


def sorted_floats(dtype: torch.dtype) -> torch.Tensor:
    bits = torch.arange(0x7C00 if dtype == torch.float16 else 0x7F80, dtype=torch.int16)
    return bits.view(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key_format", [SINGLE, DOUBLE])
def test_keys_sort_as_every_finite_half_precision_magnitude_does(dtype, key_format):
    values = sorted_floats(dtype)
    assert (values.double().diff() > 0).all()
    assert (key_format.keys(values).diff() > 0).all()
    assert torch.equal(key_format.values(key_format.keys(values)), values.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_signed_keys_sort_as_every_finite_half_precision_float_does(dtype):
    values = torch.cat([-sorted_floats(dtype)[1:].flip(0), sorted_floats(dtype)])
    keys = SIGNED.keys(values)
    assert (keys.diff() > 0).all()
    assert torch.equal(SIGNED.values(keys), values.double())
    assert 0 < keys.min() <= keys.max() < SIGNED.infinite < 1 << SIGNED.bits


def test_signed_keys_know_one_zero_and_put_what_is_not_finite_on_top():
    zero, minus = SIGNED.keys(torch.tensor([0.0, -0.0]))
    assert zero == minus
    strange = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf])
    assert (SIGNED.keys(strange) == SIGNED.infinite).all()
    assert (SIGNED.keys(torch.tensor([1e300], dtype=torch.float64)) == SIGNED.infinite).all()


@pytest.mark.parametrize(("other", "format"), [(torch.bfloat16, SINGLE), (torch.float64, DOUBLE)])
def test_models_with_a_float64_weight_are_compared_in_float64(other, format):
    weights = [torch.nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, other)]
    assert Scorer(magnitude, [prunable("w", weight) for weight in weights]).format is format


class ManyRanks(Ranks):
    """Stands for `times` ranks whose data are all the same, so that counts exceed what memory could hold."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.sums, self.bytes = times, 0, 0

    def sum(self, counts: torch.Tensor) -> torch.Tensor:
        self.sums += 1
        self.bytes += counts.nbytes
        return counts.mul_(self.times)


@given(st.lists(st.lists(st.integers(0, 2**20 - 1), min_size=1, max_size=40), min_size=1, max_size=9), st.data())
def test_kth_smallest_of_many_groups_is_that_of_each_by_itself(groups, data):
    ks = [data.draw(st.integers(1, len(keys))) for keys in groups]
    parts = [(group, torch.tensor(keys), 1) for group, keys in enumerate(groups)]
    digits = digit_widths(20, 2 ** data.draw(st.integers(0, 14)))
    for keys, k, found in zip(
        groups, ks, kth_smallest(lambda: iter(parts), ks, digits, Ranks(), torch.device("cpu")), strict=True
    ):
        kth = sorted(keys)[k - 1]
        if found.rank == found.equal:
            assert sum(key <= found.key for key in keys) == k
        else:
            assert (found.key, found.equal) == (kth, keys.count(kth))
            assert found.rank == k - sum(key < kth for key in keys)


@pytest.mark.parametrize("groups", [1, 2, 54, 161, 1000, 70_000])
@pytest.mark.parametrize("bits", [31, 32, 63])
def test_counts_of_all_groups_stay_few(groups, bits):
    digits = digit_widths(bits, groups)
    assert sum(digits) == bits
    assert groups << max(digits) <= max(2**16, 2 * groups)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50), st.sampled_from([1, 2**31, 2**33 + 1]), st.data())
def test_kth_smallest_counts_beyond_2_to_the_31(keys, times, data):
    k = data.draw(st.integers(1, len(keys) * times))
    ranks = ManyRanks(times)
    parts = torch.tensor(keys, dtype=torch.int32).split(7)
    (found,) = kth_smallest(lambda: ((0, part, 1) for part in parts), [k], digit_widths(31), ranks, torch.device("cpu"))
    kth = sorted(keys)[(k - 1) // times]
    below = sum(key < kth for key in keys) * times
    equal = keys.count(kth) * times
    if found.rank == found.equal:
        assert sum(key <= found.key for key in keys) * times == k
    else:
        assert (found.key, found.rank, found.equal) == (kth, k - below, equal)


def test_kth_smallest_of_more_than_2_to_the_31_weights_stays_within_a_mebibyte():
    keys = SINGLE.keys(torch.ones(100))
    ranks = ManyRanks(2**33)
    (found,) = kth_smallest(
        lambda: iter([(0, keys, 1)]), [50 * 2**33 + 1], digit_widths(31), ranks, torch.device("cpu")
    )
    assert (found.rank, found.equal) == (50 * 2**33 + 1, 100 * 2**33)
    assert ranks.sums == 2
    assert ranks.bytes <= 2**20


class LastOfManyRanks(Ranks):
    """The last rank, where the others hold `zeros` weights that are 0."""

    def __init__(self, world_size: int, zeros: int) -> None:
        super().__init__()
        self.rank, self.world_size, self.zeros = world_size - 1, world_size, zeros

    def sum(self, counts: torch.Tensor) -> torch.Tensor:
        counts[0, 0] += self.zeros
        self.zeros = 0  # zeros do not share a digit with the threshold, so they count once
        return counts


@pytest.mark.parametrize("beyond", [2**31, 2**32, 2**33])
def test_weights_and_ties_beyond_global_index_2_to_the_31_are_cut_exactly(beyond):
    world_size = beyond // 18 + 2
    offset = 18 * (world_size - 1)  # each rank counts 18 weights; the last has those of the two small tensors
    weights = [torch.nn.Parameter(w) for w in (torch.zeros(()).expand(offset), torch.ones(4, 3).t(), torch.ones(6))]
    masks = [torch.ones((), dtype=torch.bool).expand(offset), *(torch.ones_like(w).bool() for w in weights[1:])]
    ranks = LastOfManyRanks(world_size, offset)
    tensors = [prunable(n, w, o, ranks) for n, w, o in zip("abc", weights, (0, offset, offset + 12), strict=True)]
    for pruned in range(1, 19):
        ranks.zeros = offset
        cut = Search(tensors, masks, [0, 0, 0], Scorer(magnitude, tensors), ranks).together(offset + pruned)
        kept = [t.indices(0, t.numel)[cut.keeps(t, SINGLE.keys(torch.ones(t.numel)), 0)] for t in tensors[1:]]
        assert torch.cat(kept).sort().values.tolist() == list(range(offset, offset + 18 - pruned))


@given(st.lists(st.sampled_from([0, 1, 2, 7, 100]), min_size=1, max_size=8), st.integers(1, 9))
def test_ranks_share_all_weights_without_overlap_and_evenly(sizes, world_size):
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    weights = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    ranks = Ranks()
    ranks.world_size = world_size
    counted, per_rank = [], []
    for ranks.rank in range(world_size):
        tensors = [prunable("w", w, o, ranks) for w, o in zip(weights, offsets, strict=True)]
        pieces = share(tensors)
        mine = [tensors[number].offset + i for number, start, stop in pieces for i in range(start, stop)]
        counted += mine
        per_rank.append(len(mine))
    assert counted == list(range(sum(sizes)))
    assert max(per_rank) - min(per_rank) <= 1
