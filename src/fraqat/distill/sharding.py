"""What `parallel.py` and `sharded.py` share: a mesh of processes, and models whose weights lie in rows on it (FSDP2)."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from fraqat.distill.checkpointing import repeated_blocks
from fraqat.distill.spec import ParallelSpec
from fraqat.distill.teacher import StoredWeight
from fraqat.distill.workers import Workers
from fraqat.errors import config_error

SHARD, REPLICATE = "shard", "replicate"
"""Names of the axes of a mesh."""


def make_mesh(spec: ParallelSpec, workers: Workers, device: torch.device) -> DeviceMesh:
    """The processes as FSDP2 sees them: a line that shares one copy, or several such lines.

    Raises:
        ConfigError: The copies of `hybrid` do not have equally many processes.
    """
    num = workers.num
    if spec.mode != "hybrid":
        return init_device_mesh(device.type, (num,), mesh_dim_names=(SHARD,))
    size = spec.shards or workers.local_num
    if num % size:
        raise config_error(
            "train.parallel.shards",
            size,
            allowed=f"a divisor of the {num} processes",
            fix="choose how many processes share one copy of the student",
        )
    return init_device_mesh(device.type, (num // size, size), mesh_dim_names=(REPLICATE, SHARD))


def shard_teacher_(predictor: nn.Module, teacher: nn.Module, mesh: DeviceMesh) -> None:
    """Lets every process hold rows of the teacher's weights; blocks are made whole while they run."""
    for module in teacher.modules():
        if isinstance(module, StoredWeight):
            for name in ("stored_weight", "stored_scale"):
                stored = getattr(module, name)
                delattr(module, name)
                module.register_parameter(name, None if stored is None else nn.Parameter(stored, requires_grad=False))
    check_shardable(teacher, "teacher")
    for block in repeated_blocks(teacher):
        fully_shard(block, mesh=mesh)
    fully_shard(predictor, mesh=mesh)


def reshard_(model: nn.Module) -> None:
    """Leaves in this process its own rows of a sharded model."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_shardable(model: nn.Module, role: str) -> None:
    """Refuses parameters without an axis, which cannot be divided.

    Raises:
        ConfigError: There is one.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise config_error(
                "train.parallel.mode", "fsdp2", allowed=f"ddp: {name} of the {role} is a single number", fix="use ddp"
            )
