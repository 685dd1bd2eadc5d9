"""`prune.permute`: channels reordered once, before anything is wrapped."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from distprune.config import Config
from distprune.data import Inputs
from distprune.errors import ConfigError
from distprune.pruning import NM, Permutations, find_permutations
from distprune.pruning.chains import find_chains


def reorder_channels(model: nn.Module, inputs: Inputs, config: Config, accelerator: Accelerator) -> Permutations:
    """Reorder the channels of the bare model as `prune.permute` asks; on all ranks, each with the same weights.

    Rank 0 searches and tells the others, since processors may round differently.

    Args:
        model: in evaluation mode; changed in place.
        inputs: a few images, as the model takes them.
        config: of the run.
        accelerator: ranks.

    Returns:
        What was done.

    Raises:
        ConfigError: the model cannot be traced.
    """
    assert config.prune.pattern is not None
    assert isinstance(inputs, Tensor)
    pattern, found = NM.parse(config.prune.pattern), list[Permutations | str]([""])
    if accelerator.is_main_process:
        try:
            taken = (inputs.to(next(model.parameters()).device),)
            prune, device = config.prune, accelerator.device
            found = [
                find_permutations(model, pattern, taken, include=prune.include, exclude=prune.exclude, device=device)
            ]
        except ValueError as error:
            found = [str(error)]
    told: Permutations | str = broadcast_object_list(found)[0]
    if isinstance(told, str):
        raise ConfigError(f"prune.permute: {told}")
    told.apply(model)
    return told


def check_reorderable(model: nn.Module, inputs: Inputs) -> int:
    """How many chains of channels can be reordered in the model, which is in evaluation mode.

    Raises:
        ConfigError: it cannot be traced.
    """
    assert isinstance(inputs, Tensor)
    try:
        chains = find_chains(model, (inputs.to(next(model.parameters()).device),))
    except ValueError as error:
        raise ConfigError(f"prune.permute: {error}") from error
    return sum(chain.fixed is None for chain in chains)
