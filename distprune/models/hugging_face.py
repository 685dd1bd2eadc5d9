"""Models of Hugging Face's transformers, which is imported when one is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from distprune.errors import ConfigError
from distprune.hub import loading

CLASSES = {
    "text_classification": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
}
LOADING = {"dtype", "torch_dtype", "use_safetensors", "trust_remote_code", "device_map", "quantization_config"}
"""What transformers takes where settings go."""
LISTED = 4


def make_transformer(
    name: str, task: str, num_labels: int, settings: Mapping[str, Any], pretrained: bool, key: str
) -> nn.Module:
    """A model of transformers for a task, in float32, with the weights of its safetensors files or fresh ones.

    Args:
        name: on the Hugging Face hub, or a local folder. Without `pretrained` config.json is all that is needed.
        task: one of `CLASSES`.
        num_labels: of a classifier, unless `settings` says.
        settings: replace those of its config.json.
        pretrained: take its weights. What they lack, as a new head, is drawn.
        key: the configuration section, for messages.

    Raises:
        ConfigError: it is not there, or cannot do the task.
        MissingError: see `loading`.
    """
    if named := sorted(LOADING & settings.keys()):
        raise ConfigError(
            f"{key}.args: {', '.join(named)} is no setting of a model: weights become float32 (run.precision says what "
            "is computed in), they are read from safetensors files, and no code is loaded; leave it out"
        )
    if task == "text_classification":
        settings = {"num_labels": num_labels, **settings}
    with loading(f"{key}.name", name):
        import transformers

        config, unknown = transformers.AutoConfig.from_pretrained(
            name, return_unused_kwargs=True, trust_remote_code=False, **settings
        )
        if unknown:
            raise ConfigError(f"{key}.args: {type(config).__name__} has no {', '.join(map(repr, sorted(unknown)))}")
        auto = getattr(transformers, CLASSES[task])
        if pretrained:
            model, told = auto.from_pretrained(
                name, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
            _check_loaded(name, told, model.base_model_prefix, key)
        else:
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    # Of use when texts are generated, and memory lost when they are learnt from.
    model.config.use_cache = False
    assert isinstance(model, nn.Module)
    return model.train()


def _check_loaded(name: str, told: Mapping[str, Any], base: str, key: str) -> None:
    """Refuse files that do not fit; only heads may be new, and poolers, which masked language models lack."""
    faults = [f"{n} is {tuple(theirs)}, here {tuple(ours)}" for n, theirs, ours in sorted(told["mismatched_keys"])]
    lost = [n for n in sorted(told["missing_keys"]) if n.startswith(f"{base}.") and "pooler" not in n.split(".")]
    faults += [f"{n} is missing" for n in lost]
    if faults:
        more = f"; and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
        raise ConfigError(
            f"{key}.name: the weights of {name} do not fit: {'; '.join(faults[:LISTED])}{more}. Change {key}.args, or "
            "draw all of them with pretrained: false"
        )
