"""Memory and rates of devices: a small table of published ones, and a measurement of this machine's."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from types import MappingProxyType

import torch

from fraqat.errors import choice_error

_TABLE_FILE = "devices.json"
_MIB, _GIGA, _TERA = 2**20, 1e9, 1e12

# Not in any data sheet. A copy reaches about 0.8 of the memory's rate; eager PyTorch starts an operation, with autograd, in
# about 8 microseconds; context, libraries and their workspaces take about 1 GiB, and the caching allocator's gaps 5 %.
_GPU_MEMORY_SHARE = 0.8
_GPU_OPERATION_S = 8e-6
_GPU_RESERVED_BYTES = 2**30
_GPU_GAP_SHARE = 0.05

# Layers of a middle size, one after the other, so that no weight waits in a cache; and what fake quantization is made of.
_NUM_ROWS, _WIDTH, _NUM_LAYERS = 512, 1024, 8
_NUM_ELEMENTS = 4_000_000
_ELEMENT_BYTES = 8 + 8 + 6
_NUM_TIMINGS = 7


class DeviceKind(StrEnum):
    """Which kernels run: attention and the precision rules of autocast differ between the two."""

    GPU = "gpu"
    CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """One accelerator or processor.

    Args:
        name: As `find_device` knows it.
        kind: GPU or CPU.
        memory_bytes: What one device has.
        flops_per_s: Precision -> rate that large matrix products reach (multiply and add count as two).
        bytes_per_s: Rate that elementwise operations read and write memory at.
        operation_s: Least time of one operation: its start.
        link_bytes_per_s: To the other devices of the node, each way.
        reserved_bytes: Taken by the driver, libraries and their workspaces.
        gap_share: Memory lost in the allocator's gaps, as a share of what tensors take.
        source: Where the figures come from.
    """

    name: str
    kind: DeviceKind
    memory_bytes: int
    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    operation_s: float
    link_bytes_per_s: float
    reserved_bytes: int = 0
    gap_share: float = 0.0
    source: str = ""


def _load_table() -> Mapping[str, Device]:
    text = (resources.files("fraqat.planning") / _TABLE_FILE).read_text(encoding="utf-8")
    devices = {
        name: Device(
            name=name,
            kind=DeviceKind(row["kind"]),
            memory_bytes=row["memory_mib"] * _MIB,
            flops_per_s={
                precision: row[f"{precision}_tflops"] * _TERA * row["matmul_share"]
                for precision in ("float32", "bfloat16")
            },
            bytes_per_s=row["memory_gb_per_s"] * _GIGA * _GPU_MEMORY_SHARE,
            operation_s=_GPU_OPERATION_S,
            link_bytes_per_s=row["link_gb_per_s"] * _GIGA,
            reserved_bytes=_GPU_RESERVED_BYTES,
            gap_share=_GPU_GAP_SHARE,
            source=row["source"],
        )
        for name, row in json.loads(text).items()
    }
    return MappingProxyType(devices)


DEVICES: Mapping[str, Device] = _load_table()
"""Devices by name; `devices.json` holds their published figures and sources."""

THIS_MACHINE = "this-cpu"
"""Name that makes `find_device` measure the processor it runs on."""


def find_device(name: str) -> Device:
    """A device by name, whatever its case, spaces and hyphens: `h100`, `rtx4090`, `A100-80`, or `this-cpu`.

    Raises:
        ConfigError: An unknown name.
    """
    if _plain(name) == _plain(THIS_MACHINE):
        return measure_device()
    for known, device in DEVICES.items():
        if _plain(known) == _plain(name):
            return device
    raise choice_error("device", name, (*DEVICES, THIS_MACHINE))


@torch.no_grad()
def measure_device(timer: Callable[[], float] = time.perf_counter) -> Device:
    """Rates of this machine's processor with the number of threads that torch uses: a second of small matrix products and
    elementwise operations, the least time of each.

    Args:
        timer: Clock in seconds; `time.process_time` on a busy machine with one thread.

    Returns:
        A device of kind CPU. Memory is all that the machine has; links are those to itself, as fast as its memory.
    """
    rates = {str(dtype).removeprefix("torch."): _matmul_rate(dtype, timer) for dtype in (torch.float32, torch.bfloat16)}
    x = torch.ones(_NUM_ELEMENTS)
    elementwise = (lambda: x * 1.5, lambda: torch.round(x), lambda: x.bfloat16())
    elementwise_s = sum(_least_time(run, timer) for run in elementwise)
    bytes_per_s = _ELEMENT_BYTES * _NUM_ELEMENTS / elementwise_s
    small = torch.ones(64)
    num_small = 200
    operation_s = _least_time(lambda: [small * 1.5 for _ in range(num_small)], timer) / num_small
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threads = torch.get_num_threads()
    return Device(
        name=f"this CPU, {threads} thread{'s' if threads > 1 else ''}",
        kind=DeviceKind.CPU,
        memory_bytes=memory,
        flops_per_s=rates,
        bytes_per_s=bytes_per_s,
        operation_s=operation_s,
        link_bytes_per_s=bytes_per_s,
        source=f"measured on {platform.processor() or platform.machine()}",
    )


def _matmul_rate(dtype: torch.dtype, timer: Callable[[], float]) -> float:
    x = torch.ones(_NUM_ROWS, _WIDTH, dtype=dtype)
    weights = [torch.ones(_WIDTH, _WIDTH, dtype=dtype) for _ in range(_NUM_LAYERS)]
    seconds = _least_time(lambda: [torch.nn.functional.linear(x, weight) for weight in weights], timer)
    return 2 * _NUM_LAYERS * _NUM_ROWS * _WIDTH * _WIDTH / seconds


def _least_time(run: Callable[[], object], timer: Callable[[], float]) -> float:
    run()
    times: list[float] = []
    for _ in range(_NUM_TIMINGS):
        start = timer()
        run()
        times.append(timer() - start)
    return min(times)


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
