"""What a run that does not fit in memory is told: what the planner counts, and what each option would save."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from fraqat.config import Recipe
from fraqat.distill.micro_batch import is_out_of_memory
from fraqat.errors import DeviceMemoryError, FraqatError
from fraqat.planning import DEVICES, Device, DeviceKind, Plan, PlanOptions, plan_training
from fraqat.workflows.sessions import Session

_GIB = 2**30


@contextmanager
def explain_out_of_memory(session: Session[Any], recipe: Recipe) -> Generator[None]:
    """Turns a lack of memory into a `DeviceMemoryError` with the planner's advice.

    Args:
        session: Of the run.
        recipe: Of the run or of a baseline.
    """
    try:
        yield
        return
    except (DeviceMemoryError, RuntimeError, MemoryError) as error:
        if not isinstance(error, DeviceMemoryError) and not is_out_of_memory(error):
            raise
        message = (
            str(error) if isinstance(error, DeviceMemoryError) else f"out of memory: {str(error).splitlines()[0]}."
        )
    # Outside of the handler, whose traceback holds the tensors of the failed step.
    raise DeviceMemoryError("\n".join([message, *_advice(session, recipe)]))


def _advice(session: Session[Any], recipe: Recipe) -> list[str]:
    device = current_device()
    try:
        plan = plan_training(session.workload(recipe), recipe.train, 1, device, PlanOptions(), always_advise=True)
    except FraqatError as error:
        return [f"There is no plan of it: {error}"]
    return [_counted(plan, device), *(f"  {line}" for line in plan.advice)]


def _counted(plan: Plan, device: Device) -> str:
    parts = sorted(plan.memory.parts.items(), key=lambda part: -part[1])
    named = ", ".join(f"{name} {num_bytes / _GIB:.2f}" for name, num_bytes in parts if num_bytes)
    needed, there = f"{plan.memory.num_bytes / _GIB:.2f}", f"{device.memory_bytes / _GIB:.1f} GiB of {device.name}"
    return f"The planner counts {needed} GiB of the {there} ({named}). What would save how much:"


def current_device() -> Device:
    """Where this process trains, with its own memory; rates, which no advice needs, are those of a known device."""
    known = DEVICES["H100"]
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        return dataclasses.replace(known, name=torch.cuda.get_device_name(), memory_bytes=memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return dataclasses.replace(
        known, name="this machine", kind=DeviceKind.CPU, memory_bytes=memory, reserved_bytes=0, gap_share=0.0
    )
