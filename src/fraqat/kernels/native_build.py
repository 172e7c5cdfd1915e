"""Builds the C++ kernels at first use and keeps the library on disk."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.cpp", "native_backward.cpp"))
_HEADERS = (Path(__file__).with_name("native_tiles.h"),)
_INSTRUCTIONS = (
    *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "fma"),
    *("amx-tile", "amx-int8", "amx-bf16"),
)
# A product and a sum contracted into one rounding would differ from the other engines.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", *(f"-m{i}" for i in _INSTRUCTIONS))
_COMPILERS = ("c++", "g++", "clang++")


class UnavailableError(RuntimeError):
    """The kernels cannot be built or run here; the text says why."""


def check_cpu() -> None:
    """Raises `UnavailableError` where the kernels cannot run; lets this process use AMX."""
    if platform.system() != "Linux":
        raise UnavailableError(f"runs under Linux, not under {platform.system()}")
    has_amx = torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    if not (has_amx and torch.cpu._is_avx512_bf16_supported()):  # pyright: ignore[reportPrivateUsage]
        raise UnavailableError("the CPU has no AMX")
    if not torch.cpu._init_amx():  # pyright: ignore[reportPrivateUsage]
        raise UnavailableError("the operating system does not let this process use AMX")


def cache_folder() -> Path:
    """`native` in `$FRAQAT_CACHE`, else in `fraqat` in the user's cache folder; nobody else may write there."""
    if root := os.environ.get("FRAQAT_CACHE"):
        folder = Path(root) / "native"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "fraqat" / "native"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    others_write = stat.S_IWGRP | stat.S_IWOTH
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & others_write:
        raise UnavailableError(f"{folder} is not a folder that only this user can write to")
    return folder


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise UnavailableError("this user has no home folder: set FRAQAT_CACHE to a folder for the kernels") from error


def built_library(folder: Path) -> Path:
    """The library of these sources, made by this compiler; two processes may build it at once."""
    compiler = _find_compiler()
    sources = (path.read_text(encoding="utf-8") for path in (*_SOURCES, *_HEADERS))
    key = "\n".join((*sources, *compiler, *_FLAGS, platform.machine(), torch.__version__))
    library = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / library.name
            _compile((*compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(built)))
            os.replace(built, library)
    return library


def _find_compiler() -> tuple[str, ...]:
    """`$CXX` with its arguments, else the first that is installed."""
    if chosen := os.environ.get("CXX"):
        return tuple(shlex.split(chosen))
    for name in _COMPILERS:
        if path := shutil.which(name):
            return (path,)
    raise UnavailableError(f"no C++ compiler was found ({', '.join(_COMPILERS)}; set CXX to name one)")


def _compile(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError as error:
        raise UnavailableError(f"the C++ compiler cannot be run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
        raise UnavailableError(f"{command[0]} could not build the kernels: {lines[0]}")
