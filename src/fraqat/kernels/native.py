"""The engine that this package brings along: a C++ kernel for CPUs with AMX, built at first use and kept on disk.

Shape suffixes: M tokens, K input channels, O output channels.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from fraqat.kernels.product import Operands

_SOURCE = Path(__file__).with_name("native.cpp")
_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "fma", "amx-tile", "amx-int8")
# A product and a sum contracted into one rounding would differ from the other engines.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", *(f"-m{i}" for i in _INSTRUCTIONS))
_COMPILERS = ("c++", "g++", "clang++")
_LANES, _DEPTH = 16, 64
_BUILD_LOCK = Lock()


class UnavailableError(RuntimeError):
    """The kernel cannot be built or run here; the text says why."""


class _Product(ctypes.Structure):
    """`Product` of the C++ source."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("codes", "packed", "weight_scale", "token_scale", "row_sums", "bias", "y")
        ),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_inputs", "num_outputs", "token_scale_stride")),
        *((name, ctypes.c_int32) for name in ("zero_point", "is_unsigned", "is_bfloat16", "num_threads")),
    )


class Native:
    """Exact sums in AMX tiles; zero point, scales, bias and rounding while they are in the nearest cache."""

    name = "native"

    def why_unavailable(self, device: torch.device) -> str:
        """Runs on x86 CPUs with AMX under Linux where a C++ compiler is at hand; the first call builds the kernel."""
        if device.type != "cpu":
            return f"runs on cpu, not on {device.type}"
        return _library_or_reason()[1]

    def prepare(self, codes_OK: Tensor) -> Tensor:
        """The codes in tiles of 16 output channels and 64 input channels, [ceil(O/16), ceil(K/64), 16, 16, 4]."""
        packed = _empty_tiles(codes_OK)
        _library().fraqat_pack(
            _address(codes_OK, torch.int8), *_sizes(codes_OK), _address(packed, torch.int8), torch.get_num_threads()
        )
        return packed

    def product(self, operands: Operands, prepared: Tensor) -> Tensor:
        """One pass over memory: the sums never leave the nearest cache."""
        codes_MK, num_outputs = operands.codes_MK, operands.weight_scale_O.shape[0]
        y_MO = torch.empty(codes_MK.shape[0], num_outputs, dtype=operands.out_dtype)
        if y_MO.numel() == 0:
            return y_MO
        assert prepared.shape[:2] == _tile_counts(num_outputs, codes_MK.shape[1])
        is_unsigned, has_offset = codes_MK.dtype == torch.uint8, operands.zero_point is not None
        product = _Product(
            codes=_address(codes_MK, torch.uint8 if is_unsigned else torch.int8),
            packed=_address(prepared, torch.int8),
            weight_scale=_address(operands.weight_scale_O, torch.float32),
            token_scale=_address(operands.token_scale, torch.float32),
            row_sums=_address(operands.row_sums_O, torch.int32) if has_offset else None,
            bias=None if operands.bias_O is None else _address(operands.bias_O, torch.float32),
            y=_address(y_MO, torch.float32, torch.bfloat16),
            num_tokens=codes_MK.shape[0],
            num_inputs=codes_MK.shape[1],
            num_outputs=num_outputs,
            token_scale_stride=int(operands.token_scale.numel() > 1),
            zero_point=0 if operands.zero_point is None else int(operands.zero_point),
            is_unsigned=is_unsigned,
            is_bfloat16=operands.out_dtype == torch.bfloat16,
            num_threads=torch.get_num_threads(),
        )
        _library().fraqat_product(ctypes.byref(product))
        return y_MO


def quantize_and_pack(
    weight_OK: Tensor,
    scale_O: Tensor,
    qmin: int,
    qmax: int,
    *,
    codes_OK: Tensor | None = None,
    row_sums_O: Tensor | None = None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a weight, as `Native.prepare` wants them too, in one pass over memory.

    codes = clamp(round(weight / scale), qmin, qmax)

    Args:
        weight_OK: float32 or bfloat16, contiguous.
        scale_O: float32, positive, contiguous.
        qmin: Least code, at least -128.
        qmax: Greatest code, at most 127.
        codes_OK, row_sums_O, packed: Where the results go, as an earlier call returned them; new tensors where None.

    Returns:
        The int8 codes [O, K], the int32 sum of each row, and the same codes in tiles.

    Numerics:
        The quotient is rounded as float32's division is, then to the nearest integer, ties to even: the codes are those
        of `torch.round(weight / scale)`.
    """
    codes_OK = torch.empty(weight_OK.shape, dtype=torch.int8) if codes_OK is None else codes_OK
    packed = _empty_tiles(codes_OK) if packed is None else packed
    row_sums_O = torch.empty(weight_OK.shape[0], dtype=torch.int32) if row_sums_O is None else row_sums_O
    _library().fraqat_quantize_weight(
        _address(weight_OK, torch.float32, torch.bfloat16),
        int(weight_OK.dtype == torch.bfloat16),
        _address(scale_O, torch.float32),
        *_sizes(weight_OK),
        ctypes.c_float(qmin),
        ctypes.c_float(qmax),
        _address(codes_OK, torch.int8),
        _address(packed, torch.int8),
        _address(row_sums_O, torch.int32),
        torch.get_num_threads(),
    )
    return codes_OK, row_sums_O, packed


def quantize_tokens(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit codes of each token, scaled by its largest magnitude, while the token is in cache.

    scale = max(max|x| / 127, least normal float32), codes = round(x / scale)

    Args:
        x_MK: float32 or bfloat16, contiguous.

    Returns:
        The int8 codes [M, K] and the float32 scales [M]. Where a token holds NaN or infinity so does its scale, and its
        codes mean nothing.

    Numerics:
        Bit for bit what torch's own operators give, in float32.
    """
    codes_MK = torch.empty(x_MK.shape, dtype=torch.int8)
    scale_M = torch.empty(x_MK.shape[0], dtype=torch.float32)
    _library().fraqat_quantize_tokens(
        _address(x_MK, torch.float32, torch.bfloat16),
        int(x_MK.dtype == torch.bfloat16),
        *_sizes(x_MK),
        _address(codes_MK, torch.int8),
        _address(scale_M, torch.float32),
        torch.get_num_threads(),
    )
    return codes_MK, scale_M


def _address(tensor: Tensor | None, *dtypes: torch.dtype) -> ctypes.c_void_p:
    """Where the kernel finds a tensor that is as it expects."""
    assert tensor is not None and tensor.dtype in dtypes and tensor.is_contiguous() and tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr())


def _sizes(matrix: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    rows, columns = matrix.shape
    return ctypes.c_int64(rows), ctypes.c_int64(columns)


def _tile_counts(num_outputs: int, num_inputs: int) -> tuple[int, int]:
    return -(-num_outputs // _LANES), -(-num_inputs // _DEPTH)


def _empty_tiles(codes_OK: Tensor) -> Tensor:
    return torch.empty(*_tile_counts(*codes_OK.shape), _LANES, _LANES, 4, dtype=torch.int8)


def _library() -> ctypes.CDLL:
    library, reason = _library_or_reason()
    if library is None:
        raise UnavailableError(reason)
    return library


def _library_or_reason() -> tuple[ctypes.CDLL | None, str]:
    with _BUILD_LOCK:
        return _load()


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    try:
        _check_cpu()
        library = ctypes.CDLL(str(_built_library(_cache_folder())))
        _check_results(library)
    except (UnavailableError, OSError) as error:
        return None, str(error)
    return library, ""


def _check_cpu() -> None:
    if platform.system() != "Linux":
        raise UnavailableError(f"runs under Linux, not under {platform.system()}")
    has_amx = torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    if not (has_amx and torch.cpu._is_avx512_bf16_supported()):  # pyright: ignore[reportPrivateUsage]
        raise UnavailableError("the CPU has no AMX")
    if not torch.cpu._init_amx():  # pyright: ignore[reportPrivateUsage]
        raise UnavailableError("the operating system does not let this process use AMX")


def _check_results(library: ctypes.CDLL) -> None:
    """One sum that float32 cannot hold, less all but its last one."""
    codes = torch.tensor([[127] * 1100 + [1]], dtype=torch.int8)
    row_sums = torch.tensor([127 * 127 * 1100], dtype=torch.int32)
    packed, y, one = _empty_tiles(codes), torch.zeros(1), torch.ones(1)
    library.fraqat_pack(_address(codes, torch.int8), *_sizes(codes), _address(packed, torch.int8), 1)
    product = _Product(
        codes=_address(codes, torch.int8),
        packed=_address(packed, torch.int8),
        weight_scale=_address(one, torch.float32),
        token_scale=_address(one, torch.float32),
        row_sums=_address(row_sums, torch.int32),
        y=_address(y, torch.float32),
        num_tokens=1,
        num_inputs=codes.shape[1],
        num_outputs=1,
        zero_point=1,
        num_threads=1,
    )
    library.fraqat_product(ctypes.byref(product))
    if y.item() != 1:
        raise UnavailableError("the kernel computes wrong sums on this CPU")


# --- Building -----------------------------------------------------------------------------------------------------


def _cache_folder() -> Path:
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
        raise UnavailableError("this user has no home folder: set FRAQAT_CACHE to a folder for the kernel") from error


def _built_library(folder: Path) -> Path:
    """The library of this source, made by this compiler; two processes may build it at once."""
    compiler = _find_compiler()
    key = "\n".join((_SOURCE.read_text(encoding="utf-8"), *compiler, *_FLAGS, platform.machine(), torch.__version__))
    library = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / library.name
            _compile((*compiler, *_FLAGS, str(_SOURCE), "-o", str(built)))
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
        raise UnavailableError(f"{command[0]} could not build the kernel: {lines[0]}")
