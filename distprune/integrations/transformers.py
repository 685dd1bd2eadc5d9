"""Pruning in the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distprune.integrations.base import CallbackBase
from distprune.integrations.whole_state import whole_state
from distprune.pruning import Prunable, Pruner
from distprune.pruning import masks as mask_ops
from distprune.pruning.shards import local

FILE = "pruning.safetensors"


class PruningCallback(CallbackBase, TrainerCallback):  # type: ignore[misc]
    """Prunes what a `transformers.Trainer` trains, on one device, under DDP and under FSDP2; settings are those of
    `CallbackBase`.

    - Masks are updated when an optimizer step is complete, whatever the accumulation of gradients.
    - Gradients of pruned weights are set to 0 in the backward pass, so clipping and `grad_norm` do not count them.
    - Each line of training figures says how sparse the model is (`prune/sparsity` and others), in `log_history` and to
      the callbacks behind this one. Those that `report_to` names come before it, unless it is put first:
      `trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(pruning))`.
    - A checkpoint has the masks in `pruning.safetensors`. Training goes on from it exactly, on as many ranks or others;
      it must lie in `output_dir`, or `TrainingArguments(resume_from_checkpoint=...)` say where.
    - The best metric so far is forgotten whenever more is pruned. So what `load_best_model_at_end` loads is the best at
      the final sparsity, or the last model where none was evaluated there; and `EarlyStoppingCallback` does not lose
      patience while sparsity rises.
    """

    _hooks: Sequence[Any] = ()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the Pruner; see `TrainerCallback`.

        Raises:
            ValueError: training goes on from a checkpoint without masks; or DeepSpeed trains; or see
                `CallbackBase._start`.
        """
        if args.deepspeed_plugin is not None:
            raise ValueError("DeepSpeed trains flat copies of the weights, which cannot be pruned; FSDP2 and DDP can")
        self._start(model, optimizer, state.max_steps, _read(args, state) if state.global_step else None)
        assert self.pruner is not None
        self._hooks = [_mask_gradient_in_backward(self.pruner, tensor) for tensor in self.pruner.tensors]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update the masks if that is due; see `TrainerCallback`."""
        if self._advance():
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Add figures to those of training; see `TrainerCallback`."""
        if "loss" in logs:
            for row in (logs, state.log_history[-1]):
                row.update(self._figures())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the masks into the checkpoint, but not in a search for hyperparameters; see `TrainerCallback`."""
        if state.is_hyper_param_search:
            return
        assert self.pruner is not None
        saved = whole_state(self.pruner)
        if args.should_save:
            _write(_checkpoint(args, state) / FILE, saved, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of model and optimizer; see `TrainerCallback`."""
        if (problem := self._finish()) and state.is_world_process_zero:
            warnings.warn(problem, stacklevel=2)

    def _finish(self) -> str | None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()
        return super()._finish()


def _mask_gradient_in_backward(pruner: Pruner, tensor: Prunable) -> Any:
    """Mask one gradient as soon as it is there: nothing else is called between backward and clipping."""

    def mask(weight: Tensor) -> None:
        if pruner.zeros and weight.grad is not None:
            mask_ops.apply(pruner.masks[tensor.name], local(weight.grad))

    return tensor.weight.register_post_accumulate_grad_hook(mask)  # type: ignore[no-untyped-call]


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _write(path: Path, saved: Mapping[str, Any], step: int) -> None:
    tensors = {f"{kind}/{name}": tensor for kind in ("masks", "observed") for name, tensor in saved[kind].items()}
    counts = {name: str(value) for name, value in saved.items() if isinstance(value, int)}
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata={**counts, "global_step": str(step)})
    os.replace(partial, path)


def _read(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """The masks of the checkpoint that training goes on from. The Trainer does not say where it lies."""
    named = args.resume_from_checkpoint
    folders = [*([Path(named)] if isinstance(named, (str, os.PathLike)) else []), _checkpoint(args, state)]
    for path in (folder / FILE for folder in folders):
        if not path.is_file():
            continue
        with safe_open(path, "pt") as file:
            counts = {name: int(value) for name, value in file.metadata().items()}
            if counts.pop("global_step") != state.global_step:
                continue
            saved: dict[str, Any] = {"masks": {}, "observed": {}, **counts}
            for key in file.keys():  # noqa: SIM118
                kind, _, name = key.partition("/")
                saved[kind][name] = file.get_tensor(key)
            return saved
    raise ValueError(
        f"training goes on from step {state.global_step}, but there is no {FILE} of that step in "
        f"{' or '.join(map(str, folders))}. If training was killed while it wrote that checkpoint, go on from the one "
        "before it: train(resume_from_checkpoint=...) with its folder. If the checkpoint lies elsewhere, say so in "
        "TrainingArguments(resume_from_checkpoint=...). If it was written without this callback, load its model and "
        "start anew in place of resuming"
    )
