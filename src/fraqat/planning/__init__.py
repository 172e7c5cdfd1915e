"""What a training run will need: memory, time and the size of the result, from one step on tensors without memory."""

from fraqat.planning.compute_optimal import (
    ComputeOptimal,
    WidthPlan,
    compute_optimal,
    optimal_share,
    optimal_tokens,
    tokens_per_byte,
    tokens_per_sample,
)
from fraqat.planning.devices import DEVICES, THIS_MACHINE, Device, DeviceKind, find_device, measure_device
from fraqat.planning.memory import MemoryUse, PlanOptions, Sharding, device_memory
from fraqat.planning.plan import Plan, plan_training
from fraqat.planning.recorder import Category, Phase
from fraqat.planning.result_size import ResultSize, packed_size
from fraqat.planning.roofline import phase_times_s
from fraqat.planning.step import StepTrace, Workload, squared_error, trace_step

__all__ = [
    "DEVICES",
    "THIS_MACHINE",
    "Category",
    "ComputeOptimal",
    "Device",
    "DeviceKind",
    "MemoryUse",
    "Phase",
    "Plan",
    "PlanOptions",
    "ResultSize",
    "Sharding",
    "StepTrace",
    "WidthPlan",
    "Workload",
    "compute_optimal",
    "device_memory",
    "find_device",
    "measure_device",
    "optimal_share",
    "optimal_tokens",
    "packed_size",
    "phase_times_s",
    "plan_training",
    "squared_error",
    "tokens_per_byte",
    "tokens_per_sample",
    "trace_step",
]
