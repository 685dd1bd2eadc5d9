"""The models of a run as artifacts of Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from distprune.tracking.logs import logger

TO_LOAD_IT = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What lies beside a model of transformers."""


def log_models(run: Any, folder: Path, summary: Mapping[str, Any]) -> None:
    """Log the dense, the best and the final model of a run that is done, as versions of one artifact of type model.

    Files are taken from the run folder when they are uploaded, and not copied: of an offline run it must stay where it
    is until `wandb sync` is through.

    Args:
        run: of W&B.
        folder: the run folder.
        summary: of the run.
    """
    dense = {"top1": summary["dense/top1"], "sparsity": 0.0, "step": None}
    final = {"top1": summary["eval/top1"], "sparsity": summary["prune/sparsity"], "step": summary["steps"]}
    aliases = ["final", sparsity_alias(final["sparsity"])]
    best = summary.get("best/step")
    try:
        _log(run, folder, "dense.safetensors", ["dense"], dense)
        if best is not None and best != summary["steps"]:
            _log(run, folder, "best.safetensors", ["best"], {**final, "top1": summary["best/top1"], "step": best})
        elif best is not None:
            aliases.append("best")
        _log(run, folder, "model.safetensors", aliases, final, TO_LOAD_IT)
    except Exception as error:  # no reason to lose the end of the run
        logger.warning(f"W&B has not taken all models ({error}); they are in {folder}")


def sparsity_alias(sparsity: float) -> str:
    """`sparsity-0.90` for 0.9; a third decimal only where two are not enough, and never 1.00 for less."""
    is_round = sparsity < 0.995 and abs(round(sparsity, 2) - sparsity) < 5e-4
    return f"sparsity-{sparsity:.2f}" if is_round else f"sparsity-{min(sparsity, 0.999):.3f}"


def _log(
    run: Any, folder: Path, name: str, aliases: list[str], about: Mapping[str, Any], beside: Sequence[str] = ()
) -> None:
    if not (folder / name).exists():
        logger.info(f"W&B gets no {name}: there is none")
        return
    artifact = wandb.Artifact(f"model-{run.id}", "model", metadata=dict(about))
    for file in (name, "config.yaml", *(file for file in beside if (folder / file).exists())):
        artifact.add_file(str((folder / file).absolute()), file, policy="immutable")
    run.log_artifact(artifact, aliases=aliases)
