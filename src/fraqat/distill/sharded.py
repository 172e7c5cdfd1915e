"""FSDP2 around a quantized student and its teacher: every process holds rows of each weight.

Shape suffixes: O output channels, K input channels, P rows that a process holds, padded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from fraqat.distill.checkpointing import repeated_blocks
from fraqat.distill.parallel import Predictor, TrainedModels
from fraqat.distill.sharding import REPLICATE, SHARD, check_shardable, make_mesh, reshard_, shard_teacher_
from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import DistillTask
from fraqat.distill.travel import travel_as_codes_
from fraqat.distill.workers import Workers
from fraqat.errors import config_error
from fraqat.nn import IntegerLayers, quantized_layers
from fraqat.nn.integer import WIDEST_BITS
from fraqat.nn.shards import own, whole
from fraqat.numerics import Granularity, RangeMethod
from fraqat.schedules import Schedule


class ShardedModels(TrainedModels):
    """Rows of the student in every process. Optimizer, average and clipping work on these rows, as plain tensors.

    Args:
        task, teacher, student, spec: See `TrainedModels`. The student's codes have been made already.
        workers: The processes.
        integers: Integer path of the student.
        schedule: Decides whether weights can travel as codes.

    Attributes:
        num_as_codes: Layers whose weights travel as codes.

    Raises:
        ConfigError: A setting that sharded models do not have.
    """

    is_sharded = True
    meets_in_passes = True

    def __init__(
        self,
        task: DistillTask,
        teacher: nn.Module,
        student: nn.Module,
        spec: TrainSpec,
        workers: Workers,
        integers: IntegerLayers | None,
        schedule: Schedule,
    ):
        _check_settings(student, spec, integers, schedule)
        super().__init__(task, teacher, student, spec)
        self._trained = {}  # FSDP frees a whole parameter once nothing holds it
        self.student = Predictor(task, student, copies_views=True)
        check_shardable(student, "student")
        parallel = spec.parallel
        device = next(student.parameters()).device
        self.mesh = make_mesh(parallel, workers, device)
        self.is_copy = parallel.mode == "hybrid" and self.mesh.get_local_rank(REPLICATE) > 0
        self._reduces_once = parallel.reduce == "batch"
        self._as_codes = parallel.gather == "codes"
        self._model, self._integers = student, integers
        for block in repeated_blocks(student):
            fully_shard(block, mesh=self.mesh, reshard_after_forward=not self._as_codes)
        self._root: FSDPModule = fully_shard(self.student, mesh=self.mesh)
        if parallel.teacher == "shard":
            shard_teacher_(self.teacher, teacher, init_device_mesh(device.type, (workers.num,)))
        self._shared = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self._own = {name: nn.Parameter(own(p.detach())) for name, p in self._shared.items()}
        self._one_scale = [
            layer
            for _, layer in quantized_layers(student)
            if layer.weight_quantizer.layout.granularity is Granularity.TENSOR
        ]
        self._serves_widths = bool(schedule.widths)
        if integers is not None:
            integers.is_sharded = True
        if spec.compile == "blocks":
            _renew_codes_before_blocks_(student)
        self.num_as_codes = travel_as_codes_(integers) if self._as_codes and integers is not None else 0
        self.weights_changed_()

    def part(self, *, is_last: bool) -> AbstractContextManager[Any]:
        self._root.set_requires_gradient_sync(is_last or not self._reduces_once)
        if self._as_codes:
            self._root.set_reshard_after_backward(is_last)  # one gather serves all parts of a batch
        return nullcontext()

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return self._own

    @property
    def sum_rows_(self) -> Callable[[Tensor], None]:
        return self._sum_rows_

    def _sum_rows_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.mesh.get_group(SHARD))

    def shared_parameters(self) -> dict[str, Tensor]:
        return dict(self._shared)

    def zero_grad_(self) -> None:
        for parameter in self._shared.values():
            parameter.grad = None

    def collect_gradients_(self) -> None:
        for name, parameter in self._shared.items():
            self._own[name].grad = None if parameter.grad is None else own(parameter.grad)

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        squares = [gradient.square().sum(dtype=torch.float64) for gradient in gradients]
        device = next(self._model.parameters()).device
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
        self._sum_rows_(total)
        return total.sqrt().float()

    def weights_changed_(self) -> None:
        if self._serves_widths:
            self._follow_scales_()
        self._share_maxima_()
        self.let_go_()

    def let_go_(self) -> None:
        reshard_(self.student)

    def full_state(self, *, keeps: bool = True) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, value in self._model.state_dict().items():
            full = whole(value).detach()
            if keeps:
                state[name] = full.cpu().clone()
        return state

    def _follow_scales_(self) -> None:
        """Tells FSDP where each learned scale is now: those of several widths change their places with the width.

        FSDP2 has no call for that; it keeps module and name of every parameter, to exchange rows and whole there.
        """
        places = {
            id(parameter): (module, name)
            for module in self.student.modules()
            for name, parameter in module.named_parameters(recurse=False)
        }
        sharded: list[Any] = [module for module in self.student.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for held in group.fsdp_params:
                    info = held._module_info  # of a parameter in rows: the width changes between batches
                    info.module, info.param_name = places[id(held.sharded_param)]

    @torch.no_grad()
    def _share_maxima_(self) -> None:
        """The largest magnitude of every weight that has one scale, in one message for all of them."""
        if not self._one_scale:
            return
        rows = [own(layer.weight.detach()) for layer in self._one_scale]
        device = rows[0].device
        maxima = torch.stack(
            [row.abs().amax().float() if row.numel() else torch.zeros((), device=device) for row in rows]
        )
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self.mesh.get_group(SHARD))
        for layer, largest in zip(self._one_scale, maxima, strict=True):
            layer.weight_quantizer.known_max = largest.view([1] * layer.weight.ndim)


def _renew_codes_before_blocks_(student: nn.Module) -> None:
    """Makes codes of gathered weights before their block is called: inside it, that takes a lock, where a graph would end."""

    def renew(block: nn.Module, args: Any) -> None:
        for _, layer in quantized_layers(block):
            if layer.integer is not None and not layer.integer.is_current:
                layer.renew_codes_()

    for block in repeated_blocks(student):
        block.register_forward_pre_hook(renew)  # after FSDP's, which gathers the weights


def _check_settings(student: nn.Module, spec: TrainSpec, integers: IntegerLayers | None, schedule: Schedule) -> None:
    parallel = spec.parallel
    if spec.compile not in ("none", "blocks"):
        raise config_error(
            "train.compile",
            spec.compile,
            allowed="none or blocks with sharded models, whose blocks are gathered and let go between graphs",
            fix="set train.compile: blocks",
        )
    for name, layer in quantized_layers(student):
        weight = layer.weight_quantizer.spec
        if weight.granularity is Granularity.TENSOR and weight.range_method not in (
            RangeMethod.MAX_ABS,
            RangeMethod.MSE,
        ):
            raise config_error(
                "train.parallel.mode",
                parallel.mode,
                allowed=f"ddp where one scale of a whole weight is found by {weight.range_method.value} ({name})",
                fix="use ddp, granularity: channel, or range_method: max_abs",
            )
    if parallel.gather != "codes":
        return
    widest = max(*schedule.choices, *schedule.widths, *(stage.bits for stage in schedule), 0.0)
    reason = (
        "weights where train.engine.name is reference"
        if integers is None
        else "weights where a stage is wider than 8 bits"
        if widest > WIDEST_BITS
        else "weights with schedule.grid: final, whose wider stages have no codes"
        if schedule.on_final_grid
        else "weights with train.low_rank, where a weight is no rows of its own"
        if spec.low_rank is not None
        else ""
    )
    if reason:
        raise config_error("train.parallel.gather", "codes", allowed=reason, fix="set train.parallel.gather: weights")
