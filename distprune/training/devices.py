"""Devices, ranks and shards as the launcher says, and how long ranks wait for each other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    PartialState,
)
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, ParallelismConfig, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from distprune.config import Config
from distprune.errors import ConfigError, reason
from distprune.training.hosts import host

USE_MESH = "ACCELERATE_USE_PARALLELISM_CONFIG"


def make_accelerator(config: Config) -> Accelerator:
    """Devices and ranks as the launcher says, on the CPU where there is no accelerator or run.device says so.

    Raises:
        ConfigError: there are more processes than GPUs, the processes do not find each other, or shards are asked for
            in a way that is not supported.
    """
    gpus = torch.cuda.device_count()
    cpu = config.run.device == "cpu" or not torch.accelerator.is_available()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not cpu and torch.cuda.is_available() and local_ranks > gpus:
        raise ConfigError(
            f"{local_ranks} processes were launched on {host()}, which has {gpus} GPUs; lower --num_processes, or set "
            "run.device=cpu"
        )
    if cpu and config.run.precision == "fp16":
        raise ConfigError("run.precision: fp16 needs a GPU, and there is none; take bf16 or fp32")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    plugin, mesh = _fsdp_plugin(config, launched), _mesh(launched)
    if cpu:
        # On CPUs accelerate ignores shards, and fails on a mesh of them; they are set up below.
        os.environ.pop(USE_MESH, None)
    accelerator = Accelerator(
        # Without cpu=True, ranks on a machine without a GPU each believe that they are alone.
        cpu=cpu,
        mixed_precision={"fp32": "no"}.get(config.run.precision, config.run.precision),
        fsdp_plugin=plugin,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.integrity.start_timeout)),
        ],
    )
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched, but each sees {accelerator.num_processes}; check the accelerate "
            "configuration (launch/cpu.yaml works without a GPU)"
        )
    if cpu and plugin is not None:
        _shard_on_cpu(accelerator, plugin, mesh)
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the launcher asked for FSDP2 (or HSDP, which is FSDP2 on a mesh of two dimensions)."""
    return bool(accelerator.is_fsdp2)


def gradient_exchange(config: Config, accelerator: Accelerator) -> Literal["dense", "packed", "auto"]:
    """`train.gradients`; `auto` is dense where nothing is to be measured. Called on all ranks.

    That is so for shards, on GPUs (see `GradientSync`), and where more than two ranks are on one host: little is won
    within it, and the clock should not decide in which order more than two numbers are added up.

    Raises:
        ConfigError: gradients of shards are to be packed.
    """
    asked = config.train.gradients
    if asked == "packed" and is_sharded(accelerator):
        raise ConfigError(
            "train.gradients: packed is for replicas, which hold all gradients, and FSDP shards them; leave it out, or "
            "launch with launch/multi_gpu.yaml"
        )
    if asked != "auto":
        return asked
    if is_sharded(accelerator) or accelerator.device.type != "cpu":
        return "dense"
    within_a_host = accelerator.num_processes > 2 and len(set(gather_object([host()]))) == 1
    return "dense" if within_a_host else "auto"


def wrap(model: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Wrap or shard a model that is trained, as the launcher says, and its optimizer.

    Raises:
        ConfigError: it cannot be sharded into the modules that the launcher's FSDP settings choose.
    """
    try:
        return cast(tuple[nn.Module, AcceleratedOptimizer], accelerator.prepare(model, optimizer))
    except (ValueError, TypeError) as error:
        if not is_sharded(accelerator):
            raise
        raise ConfigError(
            f"launcher: {type(model).__name__} cannot be sharded as fsdp_auto_wrap_policy says: {reason(error)}; set "
            "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, and fsdp_transformer_layer_cls_to_wrap to the class of its "
            "layers, such as BertLayer"
        ) from error


def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shard a model that is not trained, in place, as the launcher's FSDP settings say."""
    return cast(nn.Module, fsdp2_prepare_model(accelerator, model))


def shard_beside(module: nn.Module, model: nn.Module) -> None:
    """Shard a module that trains beside a sharded model, in place and as one unit, over the same ranks."""
    fully_shard(module, mesh=next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor)))


def side_group(seconds: float) -> dist.ProcessGroup | None:
    """A gloo group of all ranks beside the default one, for what must not wait for a GPU; None for one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds)))


def limit_waiting(model: nn.Module, others: Iterable[dist.ProcessGroup | None], seconds: float) -> None:
    """Let ranks wait for each other this long at most, from now on.

    Args:
        model: through the groups of whose shards they talk, beside the default group.
        others: further groups.
        seconds: to wait.
    """
    if not dist.is_initialized():
        return
    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    groups = [dist.group.WORLD, *others, *(group for mesh in meshes for group in mesh.get_all_groups())]
    for group in groups:
        if group is not None:
            _set_timeout(timedelta(seconds=seconds), group)


def _set_timeout(timeout: timedelta, group: dist.ProcessGroup) -> None:
    # Newer versions of torch give it a public name.
    public: Any = getattr(dist, "set_timeout", None)
    if public is not None:
        public(timeout, group)
    else:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def _fsdp_plugin(config: Config, launched: int) -> FullyShardedDataParallelPlugin | None:
    if os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("launcher: FSDP version 1 is not supported; set fsdp_version: 2, as launch/fsdp2.yaml does")
    if launched == 1:
        raise ConfigError(
            "launcher: FSDP shards a model over several processes, but there is one; raise --num_processes, or take "
            "launch/one_gpu.yaml"
        )
    if config.model.channels_last:
        raise ConfigError("model.channels_last: FSDP takes contiguous weights only; leave it out")
    return FullyShardedDataParallelPlugin(
        # Weights stay float32 and autocast casts them, as under DDP; every rank has made the whole model already.
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_ram_efficient_loading=False,
    )


def _mesh(launched: int) -> ParallelismConfig | None:
    if os.environ.get(USE_MESH, "false") != "true":
        return None
    mesh = ParallelismConfig()
    replicas, shards = mesh.dp_replicate_size, mesh.dp_shard_size
    if mesh.total_size != replicas * shards or shards == 1:
        raise ConfigError(
            "launcher: of parallelism_config only dp_shard_size, and dp_replicate_size beside it, are supported; "
            "launch/hsdp.yaml has both"
        )
    if mesh.total_size != launched:
        raise ConfigError(
            f"launcher: parallelism_config has {replicas} replicas of {shards} shards, but there are {launched} "
            f"processes; set --num_processes {replicas * shards}, or other sizes"
        )
    return mesh


def _shard_on_cpu(
    accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin, mesh: ParallelismConfig | None
) -> None:
    """Give an accelerator on CPUs the shards that it would have on GPUs."""
    state = accelerator.state
    # Every AcceleratorState() that accelerate makes takes its type from PartialState anew.
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
    if mesh is not None:
        state.parallelism_config = mesh
        state.device_mesh = mesh.get_device_mesh("cpu")
