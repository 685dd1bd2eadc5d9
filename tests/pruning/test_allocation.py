"""How tensors share the budget, against what sorting says."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distprune.pruning import (
    Bounds,
    ErdosRenyiKernel,
    GlobalAllocation,
    LampAllocation,
    NonFiniteError,
    Pruner,
    Random,
    TableAllocation,
    UniformAllocation,
)
from distprune.pruning.limits import Limits, fill, make_limits
from distprune.pruning.pruner import GLOBAL
from tests.pruning.reference import Bag, Levels

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ALLOCATIONS = (
    GlobalAllocation(),
    LampAllocation(),
    UniformAllocation(),
    ErdosRenyiKernel(),
    TableAllocation({"tensors.0": 0.5, "*": 0.9}),
)


def pruner_of(tensors, levels=(0.5,), allocation=GLOBAL, bounds=None, min_weights=0, **options) -> Pruner:
    model = Bag(tensors)
    return Pruner(
        model, torch.optim.SGD(model.parameters(), lr=0.1), Levels(levels), include=["*"], allocation=allocation,
        bounds=bounds or {}, min_weights=min_weights, **options,
    )  # fmt: skip


def next_step(pruner: Pruner):
    pruner._optimizer.step()
    return pruner.step()


def kept(pruner: Pruner) -> list[list[bool]]:
    return [m.flatten().tolist() for m in pruner.masks.values()]


def zeros(pruner: Pruner) -> list[int]:
    return [layer.zeros for layer in pruner.layers().values()]


def magnitudes(tensors) -> list[list[float]]:
    return [t.detach().double().abs().flatten().tolist() for t in tensors]


weights = st.one_of(
    st.floats(-100, 100, width=16),
    st.sampled_from([0.0, 1.0, -1.0, 2.0, 0.5, 1e-30, 3e7]),
)


@st.composite
def bags(draw, most=7):
    """Tensors with few or many equal weights."""
    sizes = draw(st.lists(st.integers(0, 25), min_size=1, max_size=most).filter(any))
    values = draw(st.lists(weights, min_size=1, max_size=40))
    dtype = draw(st.sampled_from(DTYPES))
    drawn = st.sampled_from(values)
    return [torch.tensor([draw(drawn) for _ in range(n)], dtype=dtype) for n in sizes]


@st.composite
def budgets(draw):
    """Tensors, bounds of each, and sparsities that rise; they may contradict each other."""
    tensors = draw(bags())
    pairs = st.tuples(st.sampled_from([0, 0, 0.2, 0.5, 0.9]), st.sampled_from([0.3, 0.6, 0.9, 1, 1])).map(sorted)
    bounds = {f"tensors.{i}": Bounds(*draw(pairs)) for i in range(len(tensors))}
    levels = sorted(draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=3)))
    return tensors, bounds, levels, draw(st.integers(0, 2))


def limits_at_the_end(tensors, bounds, min_weights):
    highest = [
        max(min(math.floor(b.max * len(t) + 1e-9), len(t) - min_weights), 0)
        for t, b in zip(tensors, bounds.values(), strict=True)
    ]
    lowest = [math.ceil(b.min * len(t) - 1e-9) for t, b in zip(tensors, bounds.values(), strict=True)]
    return [min(low, high) for low, high in zip(lowest, highest, strict=True)], highest


@settings(max_examples=4 * settings().max_examples)
@given(budgets())
def test_bounds_and_budget_are_met_together_and_nothing_better_stays_pruned(drawn):
    tensors, bounds, levels, min_weights = drawn
    total, scores = sum(map(len, tensors)), magnitudes(tensors)
    least, highest = limits_at_the_end(tensors, bounds, min_weights)
    final = round(levels[-1] * total)
    if not sum(least) <= final <= sum(highest):
        with pytest.raises(ValueError, match=str(final)):
            pruner_of(tensors, levels, bounds=bounds, min_weights=min_weights)
        return
    pruner = pruner_of(tensors, levels, bounds=bounds, min_weights=min_weights)
    before = kept(pruner)
    for number, level in enumerate(levels):
        k = round(level * total)
        limits = make_limits(pruner.tensors, pruner._bounds, min_weights, zeros(pruner), k, final, [1] * len(tensors))
        lowest = limits.lowest
        assert limits.highest == tuple(highest)
        if k == final:
            assert all(low >= end for low, end in zip(lowest, least, strict=True))
        for low, end, gone in zip(lowest, least, zeros(pruner), strict=True):
            assert gone <= low <= max(gone, end)
            # In proportion, but for whole numbers: each tensor's may be one off, and has to make up for that of others.
            assert low - max(gone, end * k / max(final, 1)) <= len(tensors)
        _ = next_step(pruner) if number else pruner.step()
        now, counts = kept(pruner), zeros(pruner)
        assert sum(counts) == k
        assert all(low <= c <= high for low, c, high in zip(lowest, counts, highest, strict=True))
        assert all(not new or old for a, b in zip(now, before, strict=True) for new, old in zip(a, b, strict=True))
        # Who could have gone: of tensors below their highest. Who could have stayed: of tensors above their lowest.
        index = itertools.count()
        place = [[(score, -next(index)) for score in row] for row in scores]
        could_go, could_stay = [], []
        for i, (row, old) in enumerate(zip(now, before, strict=True)):
            stays = [place[i][j] for j, keep in enumerate(row) if keep]
            went = [place[i][j] for j, keep in enumerate(row) if not keep and old[j]]
            assert not stays or not went or max(went) < min(stays)
            could_go += stays if counts[i] < highest[i] else []
            could_stay += went if counts[i] > lowest[i] else []
        assert not could_go or not could_stay or max(could_stay) < min(could_go)
        before = now


def lamp_by_sort(tensors, k) -> list[list[bool]]:
    """w^2 over the sum of squares of the weights of the tensor that are not smaller; the k lowest go."""
    levels = []
    for row in magnitudes(tensors):
        for w in row:
            mass = math.fsum(v * v for v in row if v >= w)
            levels.append(w * w / mass if w * w > 0 else 0.0)
    order = sorted(range(len(levels)), key=lambda i: (levels[i], -i))
    gone = set(order[:k])
    index = itertools.count()
    return [[next(index) not in gone for _ in t] for t in tensors]


@settings(max_examples=3 * settings().max_examples)
@given(bags(), st.floats(0, 1, exclude_max=True))
def test_lamp_is_what_sorting_its_scores_gives(tensors, level):
    pruner = pruner_of(tensors, [level], LampAllocation())
    expected = lamp_by_sort(tensors, round(level * pruner.weights))
    pruner.step()
    assert kept(pruner) == expected


def test_lamp_of_many_different_weights_is_what_sorting_its_scores_gives():
    tensors = [torch.randn(n) * scale for n, scale in ((700, 1.0), (90, 30.0), (400, 1e-3), (5, 1.0))]
    pruner = pruner_of(tensors, [0.2, 0.9, 0.99], LampAllocation())
    for level in (0.2, 0.9, 0.99):
        expected = lamp_by_sort(tensors, round(level * pruner.weights))
        _ = next_step(pruner) if level > 0.2 else pruner.step()
        # Pruned weights have no mass, and what was pruned has no more than the lowest scores.
        assert kept(pruner) == expected


def test_lamp_does_not_depend_on_the_scale_of_a_tensor():
    tensors = [torch.randn(300), torch.randn(200)]
    plain, scaled = (pruner_of(t, [0.8], LampAllocation()) for t in (tensors, [tensors[0] * 1000, tensors[1]]))
    plain.step()
    scaled.step()
    assert kept(plain) == kept(scaled)


def test_lamp_takes_no_other_score():
    with pytest.raises(ValueError, match="lamp scales magnitudes"):
        pruner_of([torch.randn(4)], allocation=LampAllocation(), score=Random())


@given(
    st.lists(
        st.tuples(
            st.integers(0, 60), st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 1e6]), st.floats(0, 1), st.floats(0, 1)
        ),
        min_size=1,
        max_size=8,
    ),
    st.floats(0, 1),
)
def test_shares_in_proportion_meet_the_budget_within_limits(drawn, where):
    sizes, densities = [d[0] for d in drawn], [d[1] for d in drawn]
    limits = Limits(*zip(*(sorted((int(n * a), int(n * b))) for n, _, a, b in drawn), strict=True))
    k = round(sum(limits.lowest) + where * (sum(limits.highest) - sum(limits.lowest)))
    counts = fill(k, sizes, densities, limits)
    assert sum(counts) == k
    assert limits.clamp(counts) == counts
    # What is left of those at no limit, over size and density, is the same factor up to rounding.
    ranges = [
        ((n - c - 1) / (n * d), (n - c + 1) / (n * d))
        for n, d, c, low, high in zip(sizes, densities, counts, limits.lowest, limits.highest, strict=True)
        if low < c < high and d > 0
    ]
    assert not ranges or max(low for low, _ in ranges) <= min(high for _, high in ranges) + 1e-6


def test_uniform_prunes_all_tensors_alike():
    pruner = pruner_of([torch.randn(n) for n in (1000, 200, 30)], [0.9], UniformAllocation())
    pruner.step()
    assert zeros(pruner) == [900, 180, 27]


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda a: type(a).__name__)
def test_every_allocation_keeps_the_budget_and_prunes_the_smallest_of_each_tensor(allocation):
    tensors = [torch.randn(8, 20), torch.randn(40, 30), torch.randn(6, 4, 3, 3), torch.randint(-3, 4, (50, 7)).float()]
    n = [t.numel() for t in tensors]
    final = (0.5 * n[0] + 0.9 * sum(n[1:])) / sum(n)
    scores = magnitudes(tensors)
    pruner = pruner_of(tensors, [0.3, 0.6, final], allocation)
    for level in (0.3, 0.6, final):
        before = kept(pruner)
        _ = next_step(pruner) if level > 0.3 else pruner.step()
        assert sum(zeros(pruner)) == round(level * sum(n))
        for row, old, now in zip(scores, before, kept(pruner), strict=True):
            went = [(s, -i) for i, s in enumerate(row) if not now[i]]
            stays = [(s, -i) for i, s in enumerate(row) if now[i]]
            assert max(went, default=(-1, 0)) < min(stays)
            assert all(not new or past for new, past in zip(now, old, strict=True))


def test_a_table_is_met_at_the_end():
    sizes = (100, 300, 50)
    table = TableAllocation({"tensors.0": 0.5, "tensors.1": 0.9, "*": 0.2})
    pruner = pruner_of([torch.randn(n) for n in sizes], [0.2, 330 / 450], table)
    pruner.step()
    next_step(pruner)
    assert zeros(pruner) == [50, 270, 10]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"tensors.0": 0.5}, "no figure for tensors.1"),
        ({"tensors.0": 0.5, "tensor.1": 0.5}, "did you mean 'tensors.1'"),
        ({"*": 0.8}, "come to a sparsity of 0.8000 of all weights, but 0.5000 is asked for"),
        ({"*": 1.5}, r"must lie in \[0, 1\], got 1.5"),
    ],
)
def test_tables_that_do_not_fit_are_refused(table, said):
    with pytest.raises(ValueError, match=said):
        pruner_of([torch.randn(10), torch.randn(20)], [0.5], TableAllocation(table))


def test_global_pruning_leaves_no_layer_empty_and_says_which_it_held():
    tensors = [torch.randn(200), torch.rand(50) * 1e-3, torch.randn(100)]
    free, guarded = pruner_of(tensors, [0.5]), pruner_of(tensors, [0.5], min_weights=1)
    assert free.step().held == ()
    assert zeros(free)[1] == 50
    report = guarded.step()
    assert report.held == ("tensors.1",)
    assert zeros(guarded)[1] == 49
    assert report.zeros == 175
    assert kept(guarded)[1].index(True) == int(tensors[1].argmax())


def test_the_guard_is_on_unless_it_is_turned_off():
    model = Bag([torch.randn(200), torch.zeros(50)])
    pruner = Pruner(model, torch.optim.SGD(model.parameters()), Levels([0.5]), include=["*"])
    assert pruner.step().held == ("tensors.1",)


def test_what_bounds_do_not_allow_is_told_before_anything_is_pruned():
    tensors = [torch.randn(100), torch.randn(100)]
    with pytest.raises(
        ValueError, match=r"prune\.bounds of tensors\.0 and min_weights=1 allow at most 149 of 200 .*0\.745"
    ):
        pruner_of(tensors, [0.9], bounds={"*.0": Bounds(max=0.5)}, min_weights=1)
    with pytest.raises(ValueError, match=r"least sparsities of tensors\.0, tensors\.1 take 160 of 200 .*0\.8.*0\.5"):
        pruner_of(tensors, [0.5], bounds={"*": Bounds(min=0.8)})
    with pytest.raises(ValueError, match=r"tensors\.0 is to have at least 0\.6 and at most 0\.5"):
        pruner_of(tensors, [0.5], bounds={"*": Bounds(min=0.6), "first": Bounds(max=0.5)})
    with pytest.raises(ValueError, match="matches no parameter"):
        pruner_of(tensors, [0.5], bounds={"nothing": Bounds()})
    with pytest.raises(ValueError, match="min <= max"):
        Bounds(0.6, 0.5)


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_nonfinite_weights_are_refused_by_every_allocation(allocation, value):
    tensors = [torch.randn(50), torch.randn(50)]
    pruner = pruner_of(tensors, [0.7], allocation, bounds={"first": Bounds(min=0.5)})
    pruner.tensors[1].weight.detach()[7] = value
    with pytest.raises(NonFiniteError, match=r"tensors\.1: 1 of 50; nothing was pruned"):
        pruner.step()
    assert pruner.zeros == 0


@pytest.mark.parametrize("scale", [1e-170, 1e-100, 1e100])
def test_lamp_finds_its_way_where_squares_are_tiny_or_huge(scale):
    tensors = [torch.randn(8, 8, dtype=torch.float64) * scale, torch.randn(8, 8, dtype=torch.float64)]
    pruner = pruner_of(tensors, [0.5], LampAllocation())
    pruner.step()
    assert pruner.zeros == 64


def test_lamp_says_that_weights_are_too_large_to_be_squared():
    pruner = pruner_of([torch.randn(8, dtype=torch.float64) * 1e160], [0.5], LampAllocation())
    with pytest.raises(ValueError, match=r"lamp squares weights, and those of tensors\.0 are too large"):
        pruner.step()


def test_a_layer_that_is_to_be_empty_at_the_end_is_shared_out_at_once():
    highest = (2_359_999, *[199_999] * 53)
    counts = fill(20_000, [2_360_000, *[200_000] * 53], [0.0, *[0.2] * 53], Limits((0,) * 54, highest))
    assert sum(counts) == 20_000


def test_nan_in_a_layer_that_is_not_pruned_further_is_refused_too():
    pruner = pruner_of(
        [torch.randn(40), torch.randn(40)], [0.25, 0.5], UniformAllocation(), {"first": Bounds(max=0.25)}
    )
    pruner.step()
    pruner.tensors[0].weight.detach()[pruner.masks["tensors.0"]] = torch.nan
    with pytest.raises(NonFiniteError, match=r"tensors\.0: 30 of 40"):
        next_step(pruner)
