"""The main job: `accelerate launch -m distprune.train CONFIG.yaml [section.key=value ...]`."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list

from distprune.analysis.tables import print_summary
from distprune.cli import STOPPED_EARLY
from distprune.config import dump_config, load_config
from distprune.errors import ConfigError, reason, remedy
from distprune.pruning import MaskHolder, MaskMismatchError, NonFiniteError, WeightMismatchError
from distprune.structured import ChannelPruner, kept_of
from distprune.tracking import JsonLines, Progress
from distprune.tracking.logs import log_to_file, logger
from distprune.training.checkpoint import Checkpoint, CheckpointError
from distprune.training.devices import make_accelerator
from distprune.training.evaluation import EvalResult
from distprune.training.hosts import host, slurm_job
from distprune.training.liveness import is_lost_rank
from distprune.training.nonfinite import DivergedError
from distprune.training.preflight import Preflight, PreflightError
from distprune.training.results import summarize, versions, write_best, write_tensors, write_transformer
from distprune.training.run_folder import RunFolder
from distprune.training.run_state import refuse_another_job
from distprune.training.setup import Job, make_job
from distprune.training.shrinking import ShrinkError
from distprune.training.stopping import Stopped
from distprune.training.validation import Figures, class_rows, top1s, validate

# Every rank meets these at the same place.
EXPECTED = (
    ConfigError,
    NonFiniteError,
    MaskMismatchError,
    WeightMismatchError,
    DivergedError,
    CheckpointError,
    ShrinkError,
)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, fit, close.

    Returns the exit code: 0 done, 1 failed, 2 the configuration is wrong, 75 stopped early, to go on when run again.
    """
    parser = argparse.ArgumentParser(prog="distprune.train", description="Prune a model while it trains.")
    parser.add_argument("config", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    words = parser.parse_args(argv)
    try:
        config = load_config(words.config, words.overrides)
        assert config.run.dir is not None
        folder = RunFolder(config.run.dir)
        if folder.is_done():
            refuse_another_job(folder.began_with(), config)
            if _rank() == 0:
                print(
                    f"{folder.path} is done; `distprune evaluate {folder.path}` counts its accuracy again. "
                    "Choose another run.dir for a new run."
                )
            return 0
        preflight = Preflight(config, folder)
        preflight.meet()
        accelerator = make_accelerator(config)
        preflight.try_links(accelerator.device)
        job = make_job(config, folder, accelerator)
        _claim(folder)
        log_to_file(folder.logs, job.accelerator.process_index)
        checkpoint = job.run_state.newest()
    except ConfigError as error:
        _tell_batch_script()
        report(f"{error}{remedy(error, [words.config, *words.overrides])}")
        return 2
    except PreflightError as error:
        report(str(error))
        _leave(1)
    except Exception as error:
        if not is_lost_rank(error):
            raise
        print(
            f"distprune: rank {_rank()}: another rank ended while the run was prepared: {reason(error)}",
            file=sys.stderr,
        )
        return 1
    try:
        preflight.log()
        return _run(job, folder, checkpoint)
    finally:
        job.liveness.stop()
        folder.release()
        if dist.is_initialized():
            dist.destroy_process_group()


def report(error: str) -> None:
    """Print what is wrong, once for all ranks."""
    if _rank() > 0:
        # Rank 0 has most likely met the same and the launcher is ending us. If not, this fault is ours alone.
        time.sleep(3)
    who = f"rank {_rank()}: " if _rank() > 0 else ""
    print(f"distprune: {who}{error}", file=sys.stderr)


def _tell_batch_script() -> None:
    """Let the batch script of a Slurm job know that the configuration is at fault; launchers hide exit codes."""
    if path := os.environ.get("DISTPRUNE_REFUSED"):
        with suppress(OSError):
            Path(path).touch()


def _claim(folder: RunFolder) -> None:
    """Let rank 0 take the folder, and every rank know whether it could."""
    faults: list[tuple[str, ...] | None] = [None]
    if _rank() == 0:
        try:
            folder.claim()
        except ConfigError as error:
            faults = [error.faults]
    if dist.is_initialized():
        dist.broadcast_object_list(faults, 0)
    if faults[0] is not None:
        raise ConfigError(*faults[0])


def _run(job: Job, folder: RunFolder, checkpoint: Checkpoint | None) -> int:
    job.stopper.listen()
    job.liveness.start()
    main_process, timetable = job.accelerator.is_main_process, job.timetable
    try:
        logger.info(f"{host()}, {job.accelerator.device}, process {os.getpid()}, {versions()}")
        if checkpoint is not None:
            checkpoint = job.run_state.restore(checkpoint)
            logger.info(f"going on from {checkpoint.path}")
            job.trainer.resume(checkpoint.state["progress"])
        if main_process:
            folder.write_status("running", job.trainer.step, timetable.steps)
            _open(job, folder, checkpoint)
        _conclude(job, folder, job.trainer.fit())
        logger.info("done")
        return 0
    except Stopped as stop:
        logger.info(str(stop))
        if main_process:
            with suppress(OSError):
                folder.write_status("preempted", job.trainer.step, timetable.steps, str(stop))
            job.trackers.preempt()
            job.trackers.finish(None)
            print(f"distprune: {stop}; the same command goes on", file=sys.stderr)
        with suppress(Exception):
            # A launcher whose ranks have ended may end the others, while rank 0 still closes its trackers.
            job.accelerator.wait_for_everyone()
        return STOPPED_EARLY
    except BaseException as error:
        _close_failed(job, folder, error)
        return 1


def _conclude(job: Job, folder: RunFolder, final: EvalResult) -> None:
    """Write the last of a run: what it has come to, weights, masks, the report."""
    trainer, main_process = job.trainer, job.accelerator.is_main_process
    validation = _validate(job, folder)
    summary = summarize(
        job.model,
        job.pruner,
        job.shrinking,
        trainer.dense or final,
        final,
        {
            **job.recovery.summary(),
            **job.run_state.best_figures(),
            "steps": trainer.step,
            "world_size": job.accelerator.num_processes,
            "wall_s": trainer.wall_seconds,
            "train_samples_per_s": trainer.step * trainer.batch_size / trainer.train_seconds,
            "seed": job.config.run.seed,
            **top1s(validation),
        },
    )
    write_tensors(folder, job.pruner, job.shrinking)
    if main_process:
        if not job.shrinking.removes and not kept_of(job.model):  # a config.json cannot tell widths that differ
            write_transformer(folder, job.model, job.train.tokenizer)
        folder.write_validation(validation)
        folder.write_json("summary.json", summary)
    if job.config.tracking.wandb.artifacts and job.config.tracking.wandb.mode != "disabled":
        write_best(folder, job.run_state, job.shrinking, trainer.step)  # and nothing of the model after that
    if main_process:
        columns, table = class_rows(validation)
        if table:
            job.trackers.table("validation/classes", columns, table)
        job.trackers.finish(summary)
        folder.write_status("done", trainer.step, trainer.step)
        print_summary(summary, folder.path, _report_of(folder))


def _validate(job: Job, folder: RunFolder) -> dict[str, Figures]:
    """Compare the dense and the pruned model, without the sets that an earlier start has done."""
    steps, main_process = job.trainer.step, job.accelerator.is_main_process
    model = {"steps": steps, "mask_digest": job.pruner.mask_digest}
    (known,) = broadcast_object_list([folder.validated_before(model) if main_process else {}])

    def keep(sets: dict[str, Figures]) -> None:
        if main_process:
            folder.keep_validation(model, sets)

    def look() -> None:
        job.liveness.moves()
        if (why := job.stopper.reason()) is not None:
            raise Stopped(f"stopped by {why} at step {steps}, while the model was validated")

    dense = job.tasks.dense()
    job.liveness.moves()
    return validate(dense, job.model, job.held_out, job.accelerator, look, known, keep)


def _open(job: Job, folder: RunFolder, checkpoint: Checkpoint | None) -> None:
    """Write what is known at the start, and let trackers take figures."""
    begin = job.trainer.step
    if checkpoint is None:
        folder.clear(dump_config(job.config))
    else:
        progress_then, tracker_id = checkpoint.state["progress"], checkpoint.state["tracker_id"]
        updated = checkpoint.state["pruner"]["steps_seen"] == begin
        folder.go_back_to(begin, with_step=progress_then["logged_at"] == begin, with_update=updated)
        if any(span.name == "dense" and begin < span.end for span in job.timetable.phases):
            folder.dense.unlink(missing_ok=True)  # of a start that was further: it will be made anew
        if tracker_id is not None and folder.tracker_id() is None:
            folder.write_text(folder.wandb_id.name, tracker_id)
    folder.write_text(folder.config.name, dump_config(job.config))
    progress = Progress(lambda: job.timetable.steps, begin)
    if job.config.tracking.wandb.mode == "auto" and find_spec("wandb") is None:
        logger.warning("tracking.wandb: wandb is not installed, so this run is not tracked by it; pip install wandb")
    elif job.config.tracking.wandb.mode != "disabled":
        from distprune.tracking.wandb import WandbTracker

        context = {"world_size": job.accelerator.num_processes, "versions": versions(), "slurm": slurm_job() or None}
        told, shapes = {**job.config.model_dump(), **context}, {n: x.shape for n, x in job.pruner.layers().items()}
        job.trackers.add(WandbTracker(job.config.tracking.wandb, folder.path, told, shapes))
    job.trackers.add(JsonLines(folder.metrics, folder.histograms))
    job.trackers.add(progress)
    device = torch.cuda.get_device_name() if job.accelerator.device.type == "cuda" else job.accelerator.device.type
    progress.say(
        f"{job.config.model.name}: {_what_is_pruned(job.pruner)}, to sparsity {job.config.prune.sparsity:g} in "
        f"{job.timetable.steps:,} steps on {job.accelerator.num_processes} x {device}; run folder {folder.path}"
    )
    if checkpoint is not None:
        progress.say(f"going on from step {begin}, {checkpoint.path}")
        progress.know({"prune/sparsity": job.pruner.sparsity})
    if (permuted := job.permuted) is not None:
        progress.say(
            f"{len(permuted.found)} chains of channels are in another order: {job.config.prune.pattern} keeps "
            f"{permuted.after:.2%} of all magnitude of the given weights, and without {permuted.before:.2%}"
        )
        for name, why in permuted.left_out.items():
            logger.info(f"input channels of {name} stay in their order: {why}")
    for warning in job.timetable.pruning.warnings:
        logger.warning(warning)


def _report_of(folder: RunFolder) -> Path | None:
    """Write the report of a run that is done; None where it cannot be, which the run does not fail for."""
    try:
        from distprune.report.page import write_report

        return write_report([str(folder.path)])
    except Exception as error:
        logger.warning(
            f"the report could not be written: {reason(error)}; `distprune report {folder.path}` tries again",
            exc_info=not isinstance(error, ConfigError),
        )
        return None


def _what_is_pruned(pruner: MaskHolder) -> str:
    if isinstance(pruner, ChannelPruner):
        groups = len(pruner.channels.groups)
        return f"{pruner.channels.units:,} prunable channels in {groups:,} groups, counted in {pruner.budget}"
    return f"{pruner.weights:,} prunable weights"


def _close_failed(job: Job, folder: RunFolder, error: BaseException) -> None:
    """Say which rank failed and why, in status.json, the log and on the terminal."""
    rank, step = job.accelerator.process_index, job.trainer.step
    interrupted, lost = isinstance(error, KeyboardInterrupt), is_lost_rank(error)
    no_room = isinstance(error, OSError) and error.errno in NO_ROOM
    if interrupted:
        reason = "stopped by a signal"
    elif lost:
        reason = f"another rank does not answer: {job.liveness.who_stopped()}"
    elif no_room:
        reason = f"{error}; make room, and the same command goes on"
    else:
        reason = f"{type(error).__name__}: {error}"
    text = f"rank {rank} at step {step}: {reason}"
    if lost:
        logger.info("what this rank saw of it", exc_info=error)  # in the log only
    else:
        job.liveness.fail(reason)
    if isinstance(error, EXPECTED) and not isinstance(error, CheckpointError):
        with suppress(Exception):
            job.run_state.settle()
    logger.error(text, exc_info=not (interrupted or lost or no_room or isinstance(error, EXPECTED)))
    with suppress(OSError):
        if (folder.status() or {}).get("state") == "running":
            folder.write_status("failed", step, job.timetable.steps, text)
    if rank > 0:
        print(f"distprune: {text}", file=sys.stderr)
    job.trackers.finish(None)


def _leave(code: int) -> NoReturn:
    """End the process without waiting for threads that wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


if __name__ == "__main__":
    sys.exit(main())
