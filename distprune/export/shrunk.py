"""shrunk: the model of a run that pruned channels, without those that `prune.channels.shrink=never` left as zeros."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import nn

from distprune.errors import ConfigError
from distprune.export.source import Source
from distprune.structured.pruner import unpack_units
from distprune.structured.shrink import kept_of, note_kept, positions, resize
from distprune.training.logits import logits_of
from distprune.training.setup import find_prunable_channels
from distprune.training.shrinking import TOLERANCE


def shrunk(source: Source) -> nn.Module:
    """The model without its pruned channels; that of the source itself where they are gone.

    Raises:
        ConfigError: the run pruned no channels, or outputs change.
    """
    if source.run.config.prune.pattern != "channels":
        raise ConfigError(
            f"--format: shrunk takes away whole channels, and {source.run.folder.path} pruned "
            f"{source.run.config.prune.pattern or 'single weights'}; packed stores zeros in a bit, and "
            "prune.pattern=channels prunes what can be taken away"
        )
    model, inputs = source.model, source.held_out.first_inputs()
    if kept_of(model):
        return model
    channels = find_prunable_channels(source.run.config, model, inputs)
    assert channels is not None
    try:
        kept = unpack_units(channels, load_file(source.run.folder.masks))
    except ValueError as error:
        raise ConfigError(
            f"--format: {source.run.folder.masks} is of other channels than are found in the model now ({error}); take "
            "the versions of distprune, torch and torch-pruning of the run (summary.json)"
        ) from None
    with torch.no_grad():
        before = logits_of(model, inputs)
        where = positions(channels, torch.ones_like(kept), kept)
        resize(model, where)
        note_kept(model, where)
        after = logits_of(model, inputs)
    difference, largest = float((before - after).abs().max()), max(1.0, float(before.abs().max()))
    if not difference <= TOLERANCE["cpu"] * largest:
        raise ConfigError(f"--format: outputs change by {difference:.2g} without the channels; nothing was written")
    return model.eval()
