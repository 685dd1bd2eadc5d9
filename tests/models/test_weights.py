"""Trained weights from files: what loads, what is refused, and that a refusal changes nothing."""

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from distprune.errors import ConfigError
from distprune.models import load_weights


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def refused(net):
    """Assert that a file is refused, with one of each pattern in the message and the model as it was."""

    def check(path, *patterns):
        model = net()
        before = copy.deepcopy(model)
        with pytest.raises(ConfigError) as caught:
            load_weights(model, str(path))
        assert len(caught.value.faults) == 1
        (fault,) = caught.value.faults
        assert fault.startswith("model.weights: ")
        assert str(path) in fault
        assert len(str(caught.value).splitlines()) == 2
        for pattern in patterns:
            assert pattern in fault
        assert_same_state(model, before)

    return check


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.pth", "weights.th"])
def test_what_was_saved_is_loaded(net, save, name):
    trained, model = net(), net()
    load_weights(model, save(trained.state_dict(), name))
    assert_same_state(model, trained)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_prefixes_of_ddp_and_of_compiling_are_taken_off(net, save, name, prefix):
    trained, model = net(), net()
    load_weights(model, save({prefix + key: value for key, value in trained.state_dict().items()}, name))
    assert_same_state(model, trained)


@pytest.mark.parametrize("envelope", ["state_dict", "model", "model_state_dict"])
def test_weights_in_the_envelope_of_a_training_checkpoint_are_found(net, save, envelope):
    trained, model = net(), net()
    state = {f"module.{key}": value for key, value in trained.state_dict().items()}
    load_weights(model, save({envelope: state, "epoch": 3, "optimizer": {"state": {}}}))
    assert_same_state(model, trained)


def test_checkpoints_from_before_batch_norm_counted_batches_load(net, save):
    trained, model = net(), net()
    state = {key: value for key, value in trained.state_dict().items() if "num_batches" not in key}
    load_weights(model, save(state))
    assert_same_state(model, trained)


def test_a_model_whose_own_names_begin_with_module_takes_its_own_weights(save):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    trained, model = Wrapper(), Wrapper()
    load_weights(model, save(trained.state_dict()))
    assert_same_state(model, trained)


def test_weights_of_another_precision_are_converted(net, save):
    trained, model = net().half(), net()
    load_weights(model, save(trained.state_dict(), "half.safetensors"))
    assert_same_state(model, trained.float())


def test_keys_that_are_missing_or_too_many_are_listed(net, save, refused):
    state = net().state_dict()
    state["4.extra"] = state.pop("3.bias")
    refused(save(state), "does not fit Sequential", "missing: 3.bias", "not in the model: 4.extra")


def test_other_shapes_are_listed_with_both(net, save, refused):
    state = net().state_dict()
    state["3.weight"] = torch.zeros(5, 8)
    refused(save(state), "3.weight (5, 8), here (3, 8)")


def test_all_kinds_of_misfits_are_in_one_message(net, save, refused):
    state = net().state_dict()
    del state["0.bias"]
    refused(save({**state, "new": torch.ones(1), "3.bias": torch.ones(9)}), "0.bias", "new", "3.bias (9,), here (3,)")


def test_of_many_misfits_some_are_named_and_the_others_counted(save, refused):
    refused(save({f"layer{i:02}.weight": torch.ones(1) for i in range(20)}), "layer00.weight", "and 12 more")


def test_a_file_that_is_not_there_is_named(tmp_path, refused):
    refused(tmp_path / "none.pt", "no such file")
    refused(tmp_path / "none.safetensors", "no such file")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b"the weights", b"<html>Not Found</html>", b"PK\x03\x04", b"\x80\x02.", bytes(100)],
    ids=["empty", "greeting", "text", "web page", "zip", "pickle of nothing", "zeros"],
)
def test_a_file_that_holds_no_weights_is_refused(tmp_path, refused, name, content):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "cannot read")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_file_that_was_cut_off_is_refused(net, save, refused, name):
    path = Path(save(net().state_dict(), name))
    path.write_bytes(path.read_bytes()[:-40])
    refused(path, "cannot read")


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"a": 1}, torch.ones(3), {1: torch.ones(3)}, {"state_dict": [torch.ones(3)]}],
    ids=["list", "numbers", "tensor", "numbered tensors", "list in an envelope"],
)
def test_a_file_of_something_else_is_refused(save, refused, content):
    refused(save(content), "holds no state_dict")


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save_bare(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [torch.save, save_bare])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, refused, write):
    mark, path = tmp_path / "executed", tmp_path / "weights.pt"
    write({"0.weight": Malicious(mark)}, path)
    refused(path, "cannot read")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(mark)))
    assert mark.exists(), "the pickle is harmless and shows nothing"


def test_a_whole_model_is_refused_where_its_weights_are_wanted(net, save, refused):
    refused(save(net()), "cannot read")
