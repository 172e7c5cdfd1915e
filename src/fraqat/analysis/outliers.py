"""Outliers of inputs and weights: the paper's Fig. 5 (arXiv 2510.14823). Nothing measured is kept but sums and counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fraqat.errors import ModelError, config_error

PERCENTILE = 99.9
NUM_SIGMAS = 3.0
_CHUNK = 1 << 20
_BINS_PER_OCTAVE = 64
_OCTAVES = 160  # of magnitudes from 2^-80 to 2^80
_LOWEST_EXPONENT = -80


@dataclass(frozen=True)
class Outliers:
    """How far the values of one tensor, or of all inputs of a layer, lie from their bulk.

    Args:
        count: Values seen.
        mean, deviation: Exact; the deviation is that of the population.
        kurtosis: E[(x - mean)^4] / E[(x - mean)^2]^2, exact; 3 for a normal distribution, 1.8 for a uniform one. None where all
            values are equal.
        max_abs: Largest magnitude, exact.
        percentile_abs: 99.9th percentile of the magnitudes, to 1.1 %.
        share_outside: Share of the values more than three deviations away from the mean, exact; 0.0027 for a normal
            distribution.
    """

    count: int
    mean: float
    deviation: float
    kurtosis: float | None
    max_abs: float
    percentile_abs: float
    share_outside: float

    @property
    def max_over_percentile(self) -> float | None:
        """`max_abs / percentile_abs`: how many times finer a scale would be that clips the largest 0.1 %."""
        return self.max_abs / self.percentile_abs if self.percentile_abs > 0 else None


class OutlierStatistics:
    """Statistics of values that come in parts and are seen twice: first by `update`, then the same by `count_outside`.

    Numerics: float64. Moments of parts are joined by the formulas of Pébay (SAND2008-6212, Eq. 3.1), which do not cancel.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.max_abs = 0, 0.0, 0.0
        self._m2 = self._m3 = self._m4 = 0.0  # sums of powers of the distance to the mean
        self._magnitudes = _Magnitudes()
        self._num_checked = self._num_outside = 0

    def update(self, values: Tensor) -> None:
        """Adds values, any shape.

        Raises:
            ModelError: NaN or infinity.
        """
        for chunk in _chunks(values):
            if not bool(torch.isfinite(chunk).all()):
                raise ModelError("the values hold NaN or infinity. Fix: load a sound checkpoint, or another precision.")
            self._add_moments(chunk)
            self.max_abs = max(self.max_abs, float(chunk.abs().max()))
            self._magnitudes.update(chunk)

    def count_outside(self, values: Tensor) -> None:
        """The second pass: counts values more than three deviations away from the mean of the first pass."""
        limit = NUM_SIGMAS * self.deviation
        for chunk in _chunks(values):
            self._num_outside += int(((chunk - self.mean).abs() > limit).sum())
            self._num_checked += chunk.numel()

    @property
    def deviation(self) -> float:
        """Standard deviation of the population."""
        return math.sqrt(self._m2 / self.count) if self.count else 0.0

    def result(self) -> Outliers:
        """What was found.

        Raises:
            ConfigError: Nothing was seen, or the second pass saw another number of values than the first.
        """
        if not self.count or self._num_checked != self.count:
            raise config_error(
                "values of the second pass",
                self._num_checked,
                allowed=f"{self.count or 'one or more'}",
                fix="pass the same",
            )
        return Outliers(
            count=self.count,
            mean=self.mean,
            deviation=self.deviation,
            kurtosis=self.count * self._m4 / self._m2**2 if self._m2 > 0 else None,
            max_abs=self.max_abs,
            percentile_abs=min(self._magnitudes.percentile(PERCENTILE), self.max_abs),
            share_outside=self._num_outside / self.count,
        )

    def _add_moments(self, chunk: Tensor) -> None:
        n_a, n_b = self.count, chunk.numel()
        n = n_a + n_b
        mean_b = float(chunk.mean())
        offset = chunk - mean_b
        square = offset.square()
        b2, b3, b4 = float(square.sum()), float((square * offset).sum()), float(square.square().sum())
        delta, a2, a3 = mean_b - self.mean, self._m2, self._m3
        self._m4 += (
            b4
            + delta**4 * n_a * n_b * (n_a**2 - n_a * n_b + n_b**2) / n**3
            + 6 * delta**2 * (n_a**2 * b2 + n_b**2 * a2) / n**2
            + 4 * delta * (n_a * b3 - n_b * a3) / n
        )
        self._m3 += b3 + delta**3 * n_a * n_b * (n_a - n_b) / n**2 + 3 * delta * (n_a * b2 - n_b * a2) / n
        self._m2 += b2 + delta**2 * n_a * n_b / n
        self.mean += delta * n_b / n
        self.count = n


class _Magnitudes:
    """Counts of magnitudes over bins of equal ratio, 64 an octave, so that one giant does not blur the rest.

    `fraqat.numerics.Histogram` has bins of equal width up to the largest value: finer for ranges, coarser for tails.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_OCTAVES * _BINS_PER_OCTAVE + 1, dtype=torch.int64)  # the first one holds zeros

    def update(self, values: Tensor) -> None:
        magnitudes = values.abs()
        places = ((torch.log2(magnitudes) - _LOWEST_EXPONENT) * _BINS_PER_OCTAVE).floor().clamp(0, len(self.counts) - 2)
        places = torch.where(magnitudes > 0, places + 1, torch.zeros_like(places))
        self.counts += torch.bincount(places.long().flatten().cpu(), minlength=len(self.counts))

    def percentile(self, percent: float) -> float:
        """The middle (of logarithms) of the bin in which so many per cent of the magnitudes are reached."""
        cumulative = self.counts.cumsum(0)
        wanted = torch.tensor(math.ceil(percent / 100 * int(cumulative[-1])), dtype=torch.int64)
        place = int(torch.searchsorted(cumulative, wanted))
        return 0.0 if place == 0 else 2.0 ** (_LOWEST_EXPONENT + (place - 0.5) / _BINS_PER_OCTAVE)


def tensor_outliers(values: Tensor) -> Outliers:
    """Outliers of one tensor, any shape, as of a weight.

    Raises:
        ModelError: It holds NaN or infinity.
    """
    statistics = OutlierStatistics()
    statistics.update(values)
    statistics.count_outside(values)
    return statistics.result()


@torch.no_grad()
def input_outliers(
    model: nn.Module,
    names: Iterable[str],
    forward: Callable[[Any], object],
    batches: Iterable[Any],
    *,
    on_batch: Callable[[int], None] = lambda num_done: None,
) -> dict[str, Outliers | None]:
    """Outliers of the inputs of layers, over all calls of each.

    Args:
        model: The model as it is to be measured, usually in floating point; its training flag is left alone.
        names: Qualified names of the layers.
        forward: Runs the model on one batch, for example `lambda batch: model(batch)`; the same numbers at each call.
        batches: Data; run through the model twice.
        on_batch: Told how many runs are done, of two for each batch.

    Returns:
        Layer name -> outliers; None for a layer that was never called.

    Raises:
        ModelError: An input holds NaN or infinity; the message names the layer.
        ConfigError: There is no batch.
    """
    batches = list(batches)
    if not batches:
        raise config_error("batches", 0, allowed="one or more", fix="raise train.calibration_samples")
    statistics = {name: OutlierStatistics() for name in names}
    done = 0
    for see in (OutlierStatistics.update, OutlierStatistics.count_outside):
        with _inputs_seen(model, statistics, see):
            for batch in batches:
                forward(batch)
                done += 1
                on_batch(done)
    return {name: found.result() if found.count else None for name, found in statistics.items()}


@contextmanager
def _inputs_seen(
    model: nn.Module, statistics: Mapping[str, OutlierStatistics], see: Callable[[OutlierStatistics, Tensor], None]
) -> Generator[None]:
    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = cast(Tensor, args[0] if args else next(iter(kwargs.values())))
            try:
                see(statistics[name], value)
            except ModelError as error:
                raise ModelError(f"inputs of layer {name}: {error}") from None

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True) for name in statistics
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _chunks(values: Tensor) -> Iterable[Tensor]:
    """Pieces of a tensor in float64, on its device where that has float64."""
    flat = values.detach().flatten()
    flat = flat.cpu() if flat.device.type == "mps" else flat
    for chunk in flat.split(_CHUNK):
        if chunk.numel():
            yield chunk.double()
