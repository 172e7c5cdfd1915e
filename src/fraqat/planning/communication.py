"""What the processes of a step send each other, in bytes, and how long that takes: a model on paper, checked by measurement.

`benchmarks/parallel_step.py` compares the bytes with those of real gloo processes. Times are for machines that we do not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from fraqat.distill import ParallelSpec, repeated_blocks

_SCALE_BYTES = 4


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that FSDP2 gathers together: a block's, or all that are in no block.

    Args:
        shapes: Of the parameters that travel as floats, with their bytes per element.
        coded: Shapes of the weights that travel as codes.
        trained_shapes: Of those that have a gradient.
        is_block: Blocks are let go between forward and backward pass; the rest stays.
    """

    shapes: tuple[tuple[tuple[int, ...], int], ...]
    coded: tuple[tuple[int, ...], ...]
    trained_shapes: tuple[tuple[int, ...], ...]
    is_block: bool

    def gathered_bytes(self, num: int) -> int:
        """Size of the whole, padded so that `num` processes hold equally many rows."""
        floats = sum(padded_numel(shape, num) * itemsize for shape, itemsize in self.shapes)
        codes = sum(padded_numel((shape[0], prod(shape[1:]) + _SCALE_BYTES), num) for shape in self.coded)
        return floats + codes

    def gradient_bytes(self, num: int) -> int:
        """Size of the gradients in float32, padded likewise."""
        return 4 * sum(padded_numel(shape, num) for shape in self.trained_shapes)


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors that one process hands to collectives in one optimizer step: sizes of the whole, not of the wire.

    Args:
        gathered: Results of all-gathers of the student.
        teacher: The same of a sharded teacher.
        scattered: Inputs of reduce-scatters.
        reduced: Inputs of all-reduces.
    """

    gathered: int = 0
    teacher: int = 0
    scattered: int = 0
    reduced: int = 0


def padded_numel(shape: Sequence[int], num: int) -> int:
    """Elements of a tensor whose first axis is filled up to a multiple of `num` rows."""
    return -(-shape[0] // num) * num * prod(shape[1:])


def parameter_groups(model: nn.Module, coded: Iterable[str] = ()) -> list[ParameterGroup]:
    """How FSDP2 groups a model's parameters.

    Args:
        model: Whole; the meta device is enough.
        coded: Names of the weights that travel as codes.
    """
    names, seen = set(coded), set[int]()
    places = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[ParameterGroup] = []
    for module, is_block in (*((block, True) for block in repeated_blocks(model)), (model, False)):
        parameters = [p for p in module.parameters() if id(p) not in seen]
        seen.update(id(p) for p in parameters)
        groups.append(
            ParameterGroup(
                shapes=tuple((tuple(p.shape), p.itemsize) for p in parameters if places[id(p)] not in names),
                coded=tuple(tuple(p.shape) for p in parameters if places[id(p)] in names),
                trained_shapes=tuple(tuple(p.shape) for p in parameters if p.requires_grad),
                is_block=is_block,
            )
        )
    return groups


def step_traffic(
    student: Sequence[ParameterGroup],
    teacher: Sequence[ParameterGroup],
    parallel: ParallelSpec,
    num: int,
    parts: int,
) -> Traffic:
    """What one process hands to collectives in one step.

    Args:
        student, teacher: See `parameter_groups`.
        parallel: Mode and what travels.
        num: Processes.
        parts: Of the batch, in each process.
    """
    if num == 1:
        return Traffic()
    gathered_teacher = 0
    if parallel.teacher == "shard":
        # What is in no block is gathered once and stays.
        gathered_teacher = parts * sum(group.gathered_bytes(num) for group in teacher if group.is_block)
    if parallel.mode == "ddp":
        trained = sum(prod(shape) for group in student for shape in group.trained_shapes)
        return Traffic(teacher=gathered_teacher, reduced=4 * trained)
    shards = num if parallel.mode == "fsdp2" else (parallel.shards or num)
    as_codes = parallel.gather == "codes"
    gathered = sum(
        group.gathered_bytes(shards) * (1 if as_codes else parts * (2 if group.is_block else 1)) for group in student
    )
    gradients = sum(group.gradient_bytes(shards) for group in student)
    num_reductions = parts if parallel.reduce == "part" else 1
    return Traffic(
        gathered=gathered if shards > 1 else 0,
        teacher=gathered_teacher,
        scattered=num_reductions * gradients if shards > 1 else 0,
        reduced=num_reductions * gradients // shards if shards < num else 0,
    )


@dataclass(frozen=True)
class Links:
    """Rates of the network, for one device, each way.

    Args:
        node_size: Devices of a machine.
        inside_bytes_per_s: To the devices of the same machine.
        outside_bytes_per_s: To other machines.
    """

    node_size: int
    inside_bytes_per_s: float
    outside_bytes_per_s: float

    def ring_s(self, num_bytes: int, num: int) -> float:
        """Time of an all-gather or reduce-scatter of `num_bytes` in all over `num` neighbouring devices.

        A ring moves (num - 1) / num of it through every link; between machines the ring of each device's share has the slow
        link.
        """
        if num <= 1:
            return 0.0
        rate = self.inside_bytes_per_s if num <= self.node_size else self.outside_bytes_per_s
        return (num - 1) / num * num_bytes / rate

    def across_s(self, num_bytes: int, num_replicas: int) -> float:
        """Time of an all-reduce of `num_bytes` held by each device, over as many devices of other machines."""
        return 2 * (num_replicas - 1) / num_replicas * num_bytes / self.outside_bytes_per_s


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of one device: `compute`, what the network is busy with, and the step where they overlap.

    A step takes the longer of the two, as far as gathers run beside the computation of blocks before them.
    """

    compute_s: float
    gather_s: float
    reduce_s: float

    @property
    def step_s(self) -> float:
        """With overlap."""
        return max(self.compute_s, self.gather_s + self.reduce_s)


def step_time(traffic: Traffic, parallel: ParallelSpec, num: int, links: Links, compute_s: float) -> StepTime:
    """Time of a step.

    Args:
        traffic: See `step_traffic`.
        parallel: Its mode.
        num: Devices.
        links: Their network.
        compute_s: Of all parts of one device.
    """
    if parallel.mode == "ddp":
        reduce_s = 2 * links.ring_s(traffic.reduced, num)
        return StepTime(compute_s, links.ring_s(traffic.teacher, num), reduce_s)
    shards = num if parallel.mode == "fsdp2" else (parallel.shards or num)
    gather_s = links.ring_s(traffic.gathered, shards) + links.ring_s(traffic.teacher, num)
    reduce_s = links.ring_s(traffic.scattered, shards)
    if traffic.reduced:
        reduce_s += links.across_s(traffic.reduced, num // shards)
    return StepTime(compute_s, gather_s, reduce_s)
