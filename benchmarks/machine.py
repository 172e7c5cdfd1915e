"""What a record of a benchmark says about where it was made."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch


def device_name(device: str = "cpu") -> str:
    """The GPU, or the kind of CPU with the widest of its units that matter here: their products differ tenfold in speed."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if torch.cpu._is_amx_tile_supported():  # pyright: ignore[reportPrivateUsage]
        return f"{platform.machine()} with AMX"
    units = torch.backends.cpu.get_cpu_capability()
    return platform.machine() if units in ("DEFAULT", "NO AVX") else f"{platform.machine()} with {units}"


def commit() -> str:
    """Short name of the commit that is checked out; empty outside of a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip()
