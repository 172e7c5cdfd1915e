"""Picks the engine of every product by measuring, remembers it, and names it; one custom operator hides the choice from graphs.

A compiled graph holds `fraqat::scaled_product` with the plain codes as argument. Which engine runs, and the weight in that
engine's own layout, are looked up when the operator runs, so that one graph serves every engine and every width.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from fraqat.errors import config_error
from fraqat.kernels.native import Native
from fraqat.kernels.onednn import OneDnn
from fraqat.kernels.portable import FloatCodes, IntegerMatmul
from fraqat.kernels.product import Engine, Operands

_NUM_TIMINGS = 3
_HOPELESS = 5.0
"""Times the best engine so far, from which a first call is not repeated."""


class EngineName(StrEnum):
    """How a recipe names an engine."""

    AUTO = "auto"
    REFERENCE = "reference"
    NATIVE = "native"
    ONEDNN = "onednn"
    TRITON = "triton"
    INT_MM = "int_mm"
    FLOAT32 = "float32"


@dataclass(frozen=True)
class ProductShape:
    """What an engine is chosen for. `num_tokens` is rounded up to a power of two, so that ragged batches share a choice."""

    device: str
    num_tokens: int
    num_inputs: int
    num_outputs: int
    out_dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.num_tokens} x {self.num_inputs} -> {self.num_outputs}"


@dataclass(frozen=True)
class EngineChoice:
    """The engine of one shape, and the time of each that was tried, in milliseconds. One that was not measured has none."""

    shape: ProductShape
    engine: str
    times_ms: dict[str, float]


_MEASURED: dict[tuple[Any, ...], EngineChoice] = {}
"""What any table of this process has chosen with the same engines and threads: students of one shape follow one another."""


class EngineTable:
    """Which engine computes which shape.

    Args:
        name: `auto` measures all that are available; another name asks for that one.
        strict: Whether another engine than the one named is an error.
        counts_preparation: Whether the time to bring a weight into the engine's layout counts: it does in training, where
            every step has new codes, and does not in inference.
        engines: The candidates, in order of preference where only one is needed.

    Raises:
        ConfigError: The engine named is unavailable on `device`, and `strict`.
    """

    def __init__(
        self,
        device: torch.device,
        name: EngineName = EngineName.AUTO,
        *,
        strict: bool = False,
        counts_preparation: bool = True,
        engines: tuple[Engine, ...] | None = None,
    ):
        self.device = device
        self.counts_preparation = counts_preparation
        self.reasons: dict[str, str] = {}
        self._choices: dict[ProductShape, EngineChoice] = {}
        available: list[Engine] = []
        for engine in engines_for(device) if engines is None else engines:
            reason = engine.why_unavailable(device)
            if reason:
                self.reasons[engine.name] = reason
            else:
                available.append(engine)
        wanted = [engine for engine in available if engine.name == name]
        if name != EngineName.AUTO and not wanted:
            self.reasons.setdefault(name.value, f"not made for {device.type}")
        if name != EngineName.AUTO and not wanted and strict:
            raise config_error(
                "engine.name",
                str(name),
                allowed=f"one that runs here: {', '.join(engine.name for engine in available)}",
                fix=f"{self.reasons.get(name, 'choose one of these')}; or set strict: false",
            )
        self.candidates = tuple(wanted or available)
        self._by_name = {engine.name: engine for engine in self.candidates}

    @property
    def choices(self) -> tuple[EngineChoice, ...]:
        """What was chosen so far."""
        return tuple(self._choices.values())

    def engine_for(self, operands: Operands, codes_OK: Tensor) -> Engine:
        """The engine for these operands; measured when this process sees their shape first."""
        shape = _shape_of(operands, codes_OK)
        choice = self._choices.get(shape)
        if choice is None:
            engines = tuple((type(engine), engine.name) for engine in self.candidates)
            key = (str(self.device), torch.get_num_threads(), self.counts_preparation, engines, shape)
            choice = _MEASURED.get(key) or self._choose(shape, operands, codes_OK)
            self._choices[shape] = _MEASURED[key] = choice
        return self._by_name[choice.engine]

    def _choose(self, shape: ProductShape, operands: Operands, codes_OK: Tensor) -> EngineChoice:
        if len(self.candidates) == 1:
            return EngineChoice(shape, self.candidates[0].name, {})
        times: dict[str, float] = {}
        for engine in self.candidates:
            times[engine.name] = self._time_ms(engine, operands, codes_OK, min(times.values(), default=math.inf))
        return EngineChoice(shape, min(times, key=times.__getitem__), times)

    def _time_ms(self, engine: Engine, operands: Operands, codes_OK: Tensor, best_ms: float) -> float:
        """The lowest time of a few calls, or that of the first one where it is far from the best engine's so far."""
        prepared = engine.prepare(codes_OK)
        engine.product(operands, prepared)
        times: list[float] = []
        for _ in range(_NUM_TIMINGS):
            self._synchronize()
            start = time.perf_counter()
            engine.product(operands, engine.prepare(codes_OK) if self.counts_preparation else prepared)
            self._synchronize()
            times.append(1000 * (time.perf_counter() - start))
            if times[0] > _HOPELESS * best_ms:
                break
        return min(times)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class PreparedWeight:
    """A weight's codes in the layouts of the engines that use it; `handle` names it inside a graph.

    Args:
        table: Chooses the engine.
    """

    def __init__(self, table: EngineTable):
        self.table = table
        self._layouts: dict[str, Any] = {}
        number = next(_numbers)
        self.handle = torch.tensor(number)
        _WEIGHTS[number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedWeight:
        """A copy with a number of its own; a buffer that is the handle is copied to the same tensor."""
        copied = PreparedWeight(self.table)
        handle = copy.deepcopy(self.handle, memo)
        copied.handle = handle.copy_(copied.handle)
        return copied

    def renew(self, layouts: dict[str, Any] | None = None) -> None:
        """Forgets the layouts, for the codes have changed.

        Args:
            layouts: Those that came with the new codes, by the names of their engines.
        """
        self._layouts = dict(layouts or {})

    def layout(self, engine: str) -> Any:
        """The weight as the engine of this name has it, to be written over; None if it has none yet."""
        return self._layouts.get(engine)

    def product(self, operands: Operands, codes_OK: Tensor) -> Tensor:
        """y [M, O] of `Operands`, by the engine chosen for its shape."""
        engine = self.table.engine_for(operands, codes_OK)
        layout = self._layouts.get(engine.name)
        if layout is None:
            layout = engine.prepare(codes_OK)
            if not (self.table.counts_preparation and engine.is_layout_cheap):
                self._layouts[engine.name] = layout
        return engine.product(operands, layout)


_numbers: Iterator[int] = itertools.count()
_WEIGHTS: weakref.WeakValueDictionary[int, PreparedWeight] = weakref.WeakValueDictionary()


@torch.library.custom_op("fraqat::scaled_product", mutates_args=())
def scaled_product(
    codes: Tensor,
    token_scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    row_sums: Tensor | None,
    bias: Tensor | None,
    handle: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """The scaled integer product as one operator; the arguments are those of `Operands`.

    Args:
        codes: [M, K], int8 or uint8.
        token_scale: float32, [M] or [1].
        weight_codes: int8, [O, K].
        weight_scale: float32, [O].
        zero_point: int32, 0-dim, or None.
        row_sums: int32, [O], with a zero point.
        bias: float32, [O], or None.
        handle: That of the weight's `PreparedWeight`.
        out_dtype: float32 or bfloat16.

    Returns:
        y, [M, O].
    """
    operands = Operands(codes, weight_scale, token_scale, zero_point, row_sums, bias, out_dtype)
    with torch.autocast(codes.device.type, enabled=False):  # it would round the codes of a float engine's product
        return _WEIGHTS[int(handle)].product(operands, weight_codes)


@scaled_product.register_fake
def _(
    codes: Tensor,
    token_scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    row_sums: Tensor | None,
    bias: Tensor | None,
    handle: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], weight_codes.shape[0]), dtype=out_dtype)


def _shape_of(operands: Operands, codes_OK: Tensor) -> ProductShape:
    num_tokens = 1 << max(0, operands.num_tokens - 1).bit_length()
    num_outputs, num_inputs = codes_OK.shape
    return ProductShape(operands.codes_MK.device.type, num_tokens, num_inputs, num_outputs, operands.out_dtype)


def engines_for(device: torch.device) -> tuple[Engine, ...]:
    """The engines made for a kind of device, the usually fastest first, and those that run everywhere."""
    if device.type == "cuda" or "TRITON_INTERPRET" in os.environ:
        from fraqat.kernels.triton import Triton  # importing Triton takes a while

        return Triton(), IntegerMatmul(), FloatCodes()
    return Native(), OneDnn(), IntegerMatmul(), FloatCodes()
