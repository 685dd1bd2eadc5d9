"""From a name in the configuration to a model, and what is said where there is none."""

import importlib.util

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from distprune.errors import ConfigError
from distprune.models import build_model

NETS = """\
from torch import nn

def wide(num_classes, width=4):
    return nn.Linear(width, num_classes)

def fixed(width=4):
    return nn.Linear(width, 7)

class Own(nn.Linear):
    def __init__(self, num_classes=5):
        super().__init__(4, num_classes)

def lowercase(name):
    return name.lower()

constant = 3
"""


@pytest.fixture(autouse=True)
def _nets(tmp_path, monkeypatch):
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(NETS, encoding="utf-8")
    (package / "broken.py").write_text("import a_module_that_is_nowhere\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_of_an_own_package_is_called_with_the_number_of_classes_and_the_arguments():
    model = build_model("own_package.nets:wide", {"width": 6}, 3)
    assert (model.in_features, model.out_features) == (6, 3)


def test_a_class_of_an_own_package_will_do_too():
    assert build_model("own_package.nets:Own", {}, 3).out_features == 3


def test_a_function_that_does_not_know_the_number_of_classes_is_called_without():
    assert build_model("own_package.nets:fixed", {}, 3).out_features == 7


@pytest.mark.parametrize(
    "name",
    [
        "own_package.nets:wide",
        "resnet20",
        "lenet300",
        "digits_cnn",
        "mnist_cnn",
        "cifar_resnet18",
        "torchvision:resnet18",
    ],
)
def test_the_number_of_classes_comes_from_the_data_unless_the_arguments_set_it(name):
    def outputs(model):
        return [module for module in model.modules() if isinstance(module, nn.Linear)][-1].out_features

    assert outputs(build_model(name, {}, 3)) == 3
    assert outputs(build_model(name, {"num_classes": 12}, 3)) == 12


def test_a_torchvision_model_is_theirs_with_fresh_weights():
    torch.manual_seed(0)
    ours = build_model("torchvision:resnet18", {"width_per_group": 64}, 1000).state_dict()
    torch.manual_seed(0)
    theirs = torchvision_models.resnet18(weights=None).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet-20", r"no model 'resnet-20'; did you mean 'resnet20'\?.*torchvision:NAME.*package\.module:function"),
        ("qqq", r"no model 'qqq'; known are .*lenet300, mnist_cnn, resnet20"),
        ("torchvision:resnt50", r"torchvision has no model 'resnt50'; did you mean 'resnet50'\?"),
        ("own_package.net:wide", r"cannot import 'own_package\.net'"),
        ("own_package.broken:wide", r"cannot import 'own_package\.broken'.*a_module_that_is_nowhere"),
        ("own_package.nets:wyde", r"own_package\.nets has no function 'wyde'; did you mean 'wide'\?"),
        ("own_package.nets:constant", r"has no function 'constant'"),
        ("own_package.nets:", r"has no function ''"),
        (":wide", r":wide"),
    ],
)
def test_a_name_that_leads_nowhere_is_answered_with_the_nearest(name, words):
    with pytest.raises(ConfigError, match=r"student\.name: .*" + words):
        build_model(name, {}, 10, "student")


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("digits_cnn", {"wdith": 3}, r"args: digits_cnn cannot be made with .*'wdith'"),
        ("digits_cnn", {"width": "wide"}, r"args: digits_cnn cannot be made with"),
        ("digits_cnn", {"width": -1}, r"args: digits_cnn cannot be made with .*-1"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, r"args: torchvision:resnet18 cannot be made with"),
        ("torchvision:vit_b_16", {"image_size": 33}, r"args: torchvision:vit_b_16 cannot be made with .*patch size"),
        ("own_package.nets:lowercase", {"name": "NET"}, r"name: own_package\.nets:lowercase returns a str"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name, args, words):
    with pytest.raises(ConfigError, match=r"student\." + words):
        build_model(name, args, 10, "student")


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_timm_says_how_to_install_it():
    with pytest.raises(ConfigError, match=r"model\.name: timm:resnet18 needs timm; pip install 'distprune\[timm\]'"):
        build_model("timm:resnet18", {}, 10)


def test_a_timm_model_is_made_by_name():
    pytest.importorskip("timm", reason="timm is not installed")
    assert build_model("timm:resnet18", {}, 3).get_classifier().out_features == 3
    with pytest.raises(ConfigError, match=r"timm has no model 'resnt18'; did you mean 'resnet18'\?"):
        build_model("timm:resnt18", {}, 3)
