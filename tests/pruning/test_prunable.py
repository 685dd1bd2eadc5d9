import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distprune.pruning import Pruner, find_prunable
from distprune.pruning.prunable import unwrap
from distprune.pruning.shards import flat
from tests.pruning.reference import Levels, prunable


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3))
        self.table = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(()))


STEM, BLOCK, UP, HEAD = "stem.weight", "layer1.0.weight", "layer1.2.weight", "head.weight"


def names(model: nn.Module, **choice) -> list[str]:
    return [t.name for t in find_prunable(model, **choice).tensors]


def test_conv_and_linear_weights_are_pruned_by_default():
    assert names(Net()) == [STEM, BLOCK, UP, HEAD]


def test_offsets_follow_the_order_of_the_parameters():
    selection = find_prunable(Net())
    assert [(t.offset, t.end) for t in selection.tensors] == [(0, 108), (108, 252), (252, 324), (324, 354)]
    assert selection.numel == 354


@pytest.mark.parametrize(
    ("include", "chosen"),
    [
        (["head.weight"], [HEAD]),
        (["layer1.*.weight"], [BLOCK, UP]),
        (["layer1.?.bias"], ["layer1.0.bias", "layer1.2.bias"]),
        (["layer1.*"], [BLOCK, "layer1.0.bias", UP, "layer1.2.bias"]),
        (["layer1.[01]"], [BLOCK, "layer1.0.bias"]),
        (["head", "stem.weight"], [STEM, HEAD, "head.bias"]),
        (["first"], [STEM]),
        (["last"], [HEAD]),
        (["last", "first"], [STEM, HEAD]),
        (["norm", "table", "scale"], ["scale", "norm.weight", "norm.bias", "table.weight"]),
    ],
)
def test_include_takes_globs_over_parameters_and_modules(include, chosen):
    assert names(Net(), include=include) == chosen


@pytest.mark.parametrize(
    ("exclude", "chosen"),
    [
        (["head"], [STEM, BLOCK, UP]),
        (["layer1.*"], [STEM, HEAD]),
        (["*.0.weight"], [STEM, UP, HEAD]),
        (["first", "last"], [BLOCK, UP]),
    ],
)
def test_exclude_leaves_tensors_dense_and_names_them(exclude, chosen):
    selection = find_prunable(Net(), exclude=exclude)
    assert [t.name for t in selection.tensors] == chosen
    assert {n for n, reason in selection.left_out.items() if reason == "excluded"} == {STEM, BLOCK, UP, HEAD} - {
        *chosen
    }


def test_exclude_wins_over_include():
    assert names(Net(), include=["layer1.*.weight"], exclude=[UP]) == [BLOCK]


def test_offsets_count_only_what_is_pruned():
    assert [t.offset for t in find_prunable(Net(), exclude=["first"]).tensors] == [0, 144, 216]


@pytest.mark.parametrize("where", ["include", "exclude"])
@pytest.mark.parametrize(("typo", "meant"), [("heed", "head"), ("layer1.0.wieght", BLOCK), ("frist", "first")])
def test_pattern_that_matches_nothing_is_refused_with_the_nearest_name(where, typo, meant):
    with pytest.raises(ValueError, match=f"'{typo}'.*did you mean '{meant}'"):
        find_prunable(Net(), **{where: ["stem", typo]})


def test_pattern_unlike_any_name_is_refused_without_a_guess():
    with pytest.raises(ValueError, match=r"'§§§' matches no parameter$"):
        find_prunable(Net(), exclude=["§§§"])


def test_one_text_instead_of_a_list_of_patterns_is_refused():
    with pytest.raises(ValueError, match=r"\['head'\]"):
        find_prunable(Net(), include="head")


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    selection = find_prunable(model)
    assert [t.name for t in selection.tensors] == ["0.weight", "1.weight"]
    assert selection.numel == 32


def test_weight_tied_to_an_embedding_is_left_dense_unless_embeddings_are_asked_for():
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "hidden": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
    model["head"].weight = model["table"].weight
    assert names(model) == ["hidden.weight"]
    assert "embedding" in find_prunable(model).left_out["table.weight"]
    assert names(model, embeddings=True) == ["table.weight", "hidden.weight"]


def test_embeddings_are_pruned_on_request():
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "bag": nn.EmbeddingBag(3, 2), "head": nn.Linear(4, 2)})
    assert names(model) == ["head.weight"]
    assert names(model, embeddings=True) == ["table.weight", "bag.weight", "head.weight"]
    assert find_prunable(model, embeddings=True).left_out == {}
    assert names(model, include=["table"]) == ["table.weight"]


def test_embeddings_with_sparse_gradients_are_left_out_and_named():
    model = nn.ModuleDict({"table": nn.Embedding(9, 4, sparse=True), "head": nn.Linear(4, 2)})
    selection = find_prunable(model, embeddings=True)
    assert [t.name for t in selection.tensors] == ["head.weight"]
    assert "sparse gradients" in selection.left_out["table.weight"]


def test_frozen_tensors_are_left_out_and_named():
    model = Net()
    model.layer1.requires_grad_(False)
    selection = find_prunable(model)
    assert [t.name for t in selection.tensors] == [STEM, HEAD]
    assert {n for n, reason in selection.left_out.items() if "frozen" in reason} == {BLOCK, UP}


def test_attention_projections_are_pruned():
    assert names(nn.MultiheadAttention(4, 2)) == ["in_proj_weight", "out_proj.weight"]
    assert names(nn.MultiheadAttention(4, 2, kdim=3, vdim=5)) == [
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "out_proj.weight",
    ]


def test_compiled_model_keeps_the_names_of_the_bare_one():
    model = Net()
    compiled = torch.compile(model)
    assert unwrap(compiled) is model
    assert names(compiled, include=["layer1.*.weight", "last"]) == [BLOCK, UP, HEAD]
    assert find_prunable(compiled).tensors[0].weight is model.stem.weight


def test_model_without_prunable_weights_is_refused():
    with pytest.raises(ValueError, match="nothing to prune in LayerNorm"):
        find_prunable(nn.LayerNorm(3))


def test_nothing_left_to_prune_is_refused_with_the_reasons():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight: frozen.*1\.weight: excluded"):
        find_prunable(model, exclude=["1"])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_dtypes_that_have_no_magnitude_order_are_refused_by_name(dtype):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(torch.zeros(2, 2).to(dtype))
    with pytest.raises(ValueError, match=rf"1\.weight has dtype {dtype}.*bfloat16, float16, float32, float64"):
        find_prunable(model)
    assert names(model, exclude=["1"]) == ["0.weight"]


@pytest.mark.parametrize("lazy", [nn.LazyLinear(3), nn.LazyConv2d(3, 1)])
def test_lazy_model_that_has_not_run_is_refused(lazy):
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet: run the lazy model once"):
        find_prunable(nn.Sequential(nn.Linear(2, 2), lazy))


def test_lazy_model_that_has_run_is_pruned():
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.ones(1, 5))
    assert find_prunable(model).numel == 15


@pytest.mark.parametrize("view", [torch.zeros(4, 8)[:, :4], torch.zeros(4, 1).expand(4, 4)], ids=["gaps", "overlaps"])
def test_weight_that_is_a_view_with_gaps_or_overlaps_is_refused(view):
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(view)
    with pytest.raises(ValueError, match="weight is a strided view"):
        find_prunable(model)


def test_pruner_holds_what_find_prunable_chose():
    model = Net()
    pruner = Pruner(model, torch.optim.SGD(model.parameters()), Levels([0.5]), exclude=["last"], embeddings=True)
    assert list(pruner.masks) == [STEM, BLOCK, UP, "table.weight"]
    assert pruner.weights == 324 + 42
    assert pruner.left_out == {HEAD: "excluded"}


@st.composite
def tensors_in_any_memory_order(draw) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=5))
    order = draw(st.permutations(range(len(shape))))
    return torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


@given(tensors_in_any_memory_order(), st.integers(0, 2**40), st.data())
def test_indices_are_row_major_whatever_the_memory_order(tensor, offset, data):
    weight = nn.Parameter(tensor)
    row_major = torch.arange(weight.numel()).view(weight.shape) + offset
    in_memory_order = torch.empty_strided(weight.shape, weight.stride(), dtype=torch.int64).copy_(row_major)
    expected = torch.as_strided(in_memory_order, (weight.numel(),), (1,))
    start, stop = sorted((data.draw(st.integers(0, weight.numel())), data.draw(st.integers(0, weight.numel()))))
    assert torch.equal(prunable("w", weight, offset).indices(start, stop), expected[start:stop])
    assert torch.equal(flat(in_memory_order), expected)


def test_indices_of_channels_last_and_transposed_weights():
    conv = nn.Parameter(torch.zeros(2, 3, 1, 2).to(memory_format=torch.channels_last))
    assert prunable("w", conv, 100).indices(0, 6).tolist() == [100, 102, 104, 101, 103, 105]
    assert prunable("w", conv, 100).indices(5, 9).tolist() == [105, 106, 108, 110]
    transposed = nn.Parameter(torch.zeros(3, 2).t())
    assert prunable("w", transposed, 0).indices(1, 5).tolist() == [3, 1, 4, 2]


@pytest.mark.parametrize("transposed", [False, True])
def test_indices_beyond_2_to_the_31_do_not_wrap(transposed):
    weight = nn.Parameter(torch.zeros(2, 2).t() if transposed else torch.zeros(2, 2))
    far = prunable("w", weight, 2**33 - 1)
    assert far.indices(1, 3).tolist() == ([2**33 + 1, 2**33] if transposed else [2**33, 2**33 + 1])
    assert far.end == 2**33 + 3
