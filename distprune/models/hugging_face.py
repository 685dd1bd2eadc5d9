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
            model = auto.from_pretrained(
                name, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
        else:
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    # Of use when texts are generated, and memory lost when they are learnt from.
    model.config.use_cache = False
    assert isinstance(model, nn.Module)
    return model.train()
