"""`distprune prepare`: fetch and decode ahead what a run needs, so that jobs do without a network."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from huggingface_hub import constants

from distprune.analysis.plan import make_plan
from distprune.cache import cache_folder, is_offline
from distprune.config.schema import Teacher
from distprune.errors import ConfigError, MissingError
from distprune.models.weights import local_file


def prepare(path: str, overrides: Sequence[str] = ()) -> None:
    """Make everything a run is made of, which fetches what is not here, and print where it lies.

    Raises:
        ConfigError: something cannot be fetched, or would stop the run before its first step.
    """
    try:
        plan = make_plan(path, overrides, elsewhere=True)
    except MissingError as error:
        instead = "unset HF_HUB_OFFLINE to fetch it" if is_offline() else "run this where there is a network"
        raise ConfigError(*(f"{fault}; {instead}" for fault in error.faults)) from None
    config, (train, held_out) = plan.config, plan.samples
    print(f"data      {config.data.path or config.data.source}: {train:,} and {held_out:,} {plan.what_samples}")
    sources = {"model.weights": config.model.weights}
    for key, teacher in config.distill.teachers.items() if config.distill is not None else ():
        if isinstance(teacher, Teacher):
            sources[f"{key}.weights"] = teacher.weights
    for key, source in sources.items():
        if source is not None:
            file = local_file(source, key).absolute()
            print(f"weights   {file} ({file.stat().st_size / 1e6:,.1f} MB)")
    places = {"HF_HOME": constants.HF_HOME, "DISTPRUNE_CACHE": str(cache_folder()), "HF_HUB_OFFLINE": "1"}
    print("jobs find all of it, without a network, with")
    print(f"  export {' '.join(f'{name}={shlex.quote(value)}' for name, value in places.items())}")
