"""From YAML and `section.key=value` words to a configuration, and what is said where they are wrong."""

import pytest

from distprune.config import dump_config, json_schema, load_config
from distprune.errors import ConfigError
from tests.jobs import ROOT

JOB = """\
model:
  name: digits_cnn
data:
  source: digits
  mean: [0.3]
  std: [0.4]
phases:
  dense: {epochs: 2}
  prune: {epochs: 2}
prune:
  sparsity: 0.5
  every: 10
optimizer:
  name: sgd
  momentum: 0.9
"""
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem not in ("grid", "sweep"))


@pytest.fixture
def load(tmp_path):
    """Load `text`, as the file job.yaml, with overrides."""

    def load_text(text=JOB, *overrides):
        path = tmp_path / "job.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load_text


@pytest.fixture
def faults(load):
    """The faults that are reported, one line each, without the folder of the file."""

    def load_wrong(text=JOB, *overrides):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        head, *lines = str(caught.value).splitlines()
        assert head.endswith("job.yaml: 1 fault" if len(lines) == 1 else f"job.yaml: {len(lines)} faults")
        assert all(line.startswith("  - ") for line in lines)
        return ["job.yaml" + line.partition("job.yaml")[2] if "job.yaml" in line else line[4:] for line in lines]

    return load_wrong


def test_values_come_from_the_file_and_the_rest_are_defaults(load):
    config = load()
    assert (config.model.name, config.prune.sparsity, config.phases.dense.epochs) == ("digits_cnn", 0.5, 2)
    assert (config.train.batch_size, config.data.eval_split, config.distill) == (128, "test", None)


def test_overrides_replace_values_of_the_file_and_later_ones_win(load):
    config = load(JOB, "prune.sparsity=0.7", "prune.sparsity=0.8", "phases.finetune.steps=5")
    assert (config.prune.sparsity, config.prune.every, config.phases.finetune.steps) == (0.8, 10, 5)


def test_an_override_may_be_a_list_a_mapping_or_nothing(load):
    config = load(JOB, "prune.exclude=[first, 'fc.*']", "optimizer={name: adamw, eps: 1e-6}", "data.cache_dir=null")
    assert config.prune.exclude == ["first", "fc.*"]
    assert (config.optimizer.name, config.optimizer.eps) == ("adamw", 1e-6)
    assert config.data.cache_dir is None


def test_steps_on_the_command_line_take_the_place_of_the_epochs_of_the_file(load):
    config = load(JOB, "phases.dense.steps=5", "phases.finetune.steps=5", "phases.finetune.epochs=6")
    assert (config.phases.dense.steps, config.phases.dense.epochs) == (5, None)
    assert (config.phases.finetune.steps, config.phases.finetune.epochs) == (None, 6)


def test_an_optimizer_without_a_name_is_the_default_one(load):
    optimizer = load(JOB.replace("  name: sgd\n", "")).optimizer
    assert (optimizer.name, optimizer.momentum) == ("sgd", 0.9)


def test_an_override_may_hold_an_equals_sign(load):
    assert load(JOB, "model.name=torchvision:a=b").model.name == "torchvision:a=b"


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "+.1e-2", "10e-4", "0.001"])
def test_powers_of_ten_are_numbers(load, text):
    assert load(JOB, f"optimizer.weight_decay={text}").optimizer.weight_decay == 0.001
    assert load(JOB.replace("momentum: 0.9", f"weight_decay: {text}")).optimizer.weight_decay == 0.001


def test_a_word_that_looks_like_a_power_of_ten_stays_a_word(load):
    assert load(JOB, "run.dir=runs/1e-3", "data.name=e5").data.name == "e5"


def test_the_run_folder_is_named_after_the_file(load):
    assert load().run.dir == "runs/job"
    assert load(JOB, "run.dir=elsewhere").run.dir == "elsewhere"


def test_a_configuration_that_is_written_out_loads_as_the_same(load, tmp_path):
    config = load(
        JOB,
        "optimizer={name: adamw, eps: 1e-9}",
        "distill={teacher: {weights: teacher.pt, name: resnet20}}",
        "data.train_transforms=[{RandomCrop: {size: 8}}, RandomHorizontalFlip]",
        "run.seed=3",
    )
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_misspelt_key_is_reported_with_its_line_and_the_nearest_key(faults):
    assert faults(JOB.replace("every", "evry")) == ["job.yaml:12, prune.evry: unknown key; did you mean 'every'?"]


def test_a_key_like_no_other_is_answered_with_those_there_are(faults):
    (fault,) = faults(JOB + "  zzz: 1\n")
    assert fault == "job.yaml:16, optimizer.zzz: unknown key; known here: name, momentum, nesterov, weight_decay, fused"


def test_a_wrong_value_is_reported_with_its_line_and_what_was_given(faults):
    (fault,) = faults(JOB.replace("epochs: 2}\n  prune", "epochs: many}\n  prune"))
    assert fault.startswith("job.yaml:8, phases.dense.epochs: ")
    assert "number" in fault
    assert fault.endswith("got 'many'")


def test_what_the_command_line_got_wrong_is_not_blamed_on_the_file(faults):
    (fault,) = faults(JOB, "prune.every=0")
    assert fault.startswith("command line, prune.every: ")
    (fault,) = faults(JOB, "optimizer={name: adamw, momentum: 0.9}")
    assert fault.startswith("command line, optimizer.momentum: ")


def test_a_missing_key_is_named(faults):
    (fault,) = faults(JOB.replace("  mean: [0.3]\n", ""))
    assert fault.startswith("data.mean: is missing")


@pytest.mark.parametrize(("key", "value"), [("prune.sparsity", "1.5"), ("data.mean", "0.3"), ("model.name", "3")])
def test_a_wrong_value_of_a_required_key_is_one_fault(faults, key, value):
    (fault,) = faults(JOB, f"{key}={value}")
    assert fault.startswith(f"command line, {key}: ")
    assert "missing" not in fault


def test_all_faults_are_reported_at_once_those_of_single_keys_and_of_combinations(faults):
    text = JOB.replace("every: 10", "every: 0").replace("momentum: 0.9", "momentum: 0.0\n  nesterov: true")
    text = text.replace("name: digits_cnn", "nam: digits_cnn\n  name: digits_cnn")
    found = faults(text, "train.accumulate=200", "run.sed=1", "data.path=somewhere", "sparsity")
    starts = [
        "'sparsity' on the command line: ",
        "job.yaml:2, model.nam: unknown key",
        "job.yaml:13, prune.every: ",
        "command line, run.sed: unknown key",
        "command line, data.path: ",
        "job.yaml:17, optimizer.nesterov: ",
        "command line, train.accumulate: ",
    ]
    assert len(found) == len(starts)
    for start in starts:
        assert any(fault.startswith(start) for fault in found), start


def test_a_fault_is_not_reported_for_what_only_follows_from_another(faults):
    (fault,) = faults(JOB, "phases.prune.epochs=two")
    assert fault.startswith("command line, phases.prune.epochs: ")


def test_a_section_given_twice_is_a_fault(faults):
    (fault,) = faults(JOB + "prune:\n  sparsity: 0.9\n")
    assert "prune" in fault
    assert "job.yaml:16" in fault


def test_a_file_that_is_not_there_is_answered_with_the_nearest_name(tmp_path):
    (tmp_path / "digits.yaml").write_text(JOB, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot read .*digit\.yaml: No such file.*; did you mean .*digits\.yaml\?"):
        load_config(tmp_path / "digit.yaml")
    with pytest.raises(ConfigError, match=r"cannot read .*config\.yaml: No such file or directory$"):
        load_config(tmp_path / "nowhere" / "config.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model: [", "not valid YAML"),
        (b"model:\n\tname: x\n", "line 2"),
        (b"model: {name: a}\n---\nmodel: {name: b}\n", "single document"),
        (b"model: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"- model\n- data\n", "mapping of sections"),
        (b"digits", "mapping of sections"),
        (b"", "mapping of sections"),
        (b"\xff\xfe\x00", "not a text file"),
    ],
)
def test_a_file_that_is_no_configuration_says_so(tmp_path, content, words):
    (tmp_path / "job.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "job.yaml")
    assert words in str(caught.value)
    assert "job.yaml" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_of_the_project_load_and_name_the_schema(path):
    assert load_config(path).run.dir == f"runs/{path.stem}"
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"


def test_the_schema_for_editors_is_the_one_in_use():
    assert CONFIGS, "no configurations to complete"
    written = (ROOT / "configs" / "schema.json").read_text(encoding="utf-8")
    make = "from distprune.config import json_schema; print(json_schema(), end='')"
    assert written == json_schema(), f'out of date; run: python -c "{make}" > configs/schema.json'
