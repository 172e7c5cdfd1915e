"""The quantizers that a layer owns: one for its weight, one for its input. State that training needs lives in buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from fraqat.errors import config_error
from fraqat.nn.spec import ActivationSpec, WeightSpec
from fraqat.numerics import (
    FLOAT32_EXACT_BITS,
    Grid,
    QParams,
    RangeMethod,
    RunningStatistics,
    choose_qparams,
    clamp_codes,
    covers_every_value,
    encode,
    fake_quantize,
    mse_clip_ratio,
    qparams_from_range,
    quantize,
    round_to_codes,
)


class TensorLevels:
    """A grid's numbers as 0-dim tensors, changed in place, so that one compiled graph serves every width."""

    def __init__(self, qmin: Tensor, qmax: Tensor, range_divisor: Tensor, symmetric: bool):
        self.qmin, self.qmax, self.range_divisor, self.symmetric = qmin, qmax, range_divisor, symmetric


class KeepsBufferDtype(nn.Module):
    """Buffers follow `.to(device)` but keep their dtype: a bf16 model must not round its levels or scales."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(device=moved.device)
        return self


class WeightQuantizer(KeepsBufferDtype):
    """Fake-quantizes a weight at the current width.

    Buffers: `qmin`, `qmax`, `range_divisor` (0-dim, not saved); `clip_ratio` of the scale's shape, saved, only with range
    method `mse`.
    """

    qmin: Tensor
    qmax: Tensor
    range_divisor: Tensor
    clip_ratio: Tensor | None

    def __init__(self, spec: WeightSpec, weight: Tensor):
        super().__init__()
        self.spec = spec
        self.layout = spec.layout()
        self.grid = spec.grid(spec.bits)
        self.is_bypassed = False
        device = weight.device
        for name in ("qmin", "qmax", "range_divisor"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, device=device), persistent=False)
        shape = self.layout.scale_shape(tuple(weight.shape))
        has_ratio = spec.range_method is RangeMethod.MSE
        self.register_buffer("clip_ratio", torch.ones(shape, dtype=torch.float32, device=device) if has_ratio else None)
        self.set_bits_(spec.bits, weight)

    @property
    def bits(self) -> float:
        """Current width."""
        return self.grid.bits

    def set_bits_(self, bits: float, weight: Tensor) -> None:
        """Changes the width in place and, with `mse`, searches the clipping again for `weight`."""
        self.grid = self.spec.grid(bits)
        self.is_wide = bits > FLOAT32_EXACT_BITS
        self._write_levels_()
        self.refresh_(weight)

    def refresh_(self, weight: Tensor) -> None:
        """Searches the MSE clipping for `weight` at the current width; nothing to do for the other methods."""
        if self.clip_ratio is not None and not weight.is_meta:
            ratio = mse_clip_ratio(weight.detach(), self.grid, self.layout, scale_dtype=self.spec.rounding_dtype)
            self.clip_ratio.copy_(ratio)

    def qparams(self, weight: Tensor) -> QParams:
        """Scale (and offset) of `weight` at the current width; constants for autograd."""
        return choose_qparams(
            weight.detach(),
            self._levels(),
            self.layout,
            self.spec.range_method,
            scale_dtype=self.spec.rounding_dtype,
            clip_ratio=self.clip_ratio,
        )

    def codes(self, weight: Tensor) -> tuple[Tensor, QParams]:
        """Integer codes of `weight` (its shape) and their affine map."""
        qparams = self.qparams(weight)
        return quantize(weight.detach(), qparams, self.grid, self.layout), qparams

    def unchecked_codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes as floats, of the weight's shape, and their scale; a weight that is not finite has a scale that is not."""
        qparams = self.qparams(weight)
        blocks = self.layout.split(weight.detach())
        blocks = blocks.to(torch.promote_types(blocks.dtype, self.grid.compute_dtype))
        return self.layout.join(encode(blocks, qparams, self.grid), tuple(weight.shape)), qparams.scale

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` on the grid, same shape and dtype; straight-through gradient. `weight` itself while bypassed."""
        if self.is_bypassed:
            return weight
        return fake_quantize(weight, self.qparams(weight), self._levels(), self.layout)

    def mask_gradient_(self, weight: Tensor) -> None:
        """Zeroes the gradient of the weights that are clipped at the current width; a parameter with a gradient."""
        assert weight.grad is not None
        if covers_every_value(self.grid, self.spec.range_method, scale_dtype=self.spec.rounding_dtype):
            return
        blocks = self.layout.split(weight.detach())
        rounded = round_to_codes(
            blocks.to(torch.promote_types(blocks.dtype, self.grid.compute_dtype)), self.qparams(weight)
        )
        is_inside = clamp_codes(rounded, self.grid) == rounded
        weight.grad.mul_(self.layout.join(is_inside, tuple(weight.shape)))

    def _levels(self) -> Grid | TensorLevels:
        # `grid` changes with the width: reading it here would make torch.compile recompile.
        if self.is_wide:
            return self.grid
        return TensorLevels(self.qmin, self.qmax, self.range_divisor, self.spec.symmetric)

    def _write_levels_(self) -> None:
        for name in ("qmin", "qmax", "range_divisor"):
            getattr(self, name).fill_(float(getattr(self.grid, name)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._write_levels_()  # `to_empty` leaves them unset, and they are not in the state dict
        return self


class ActivationQuantizer(KeepsBufferDtype):
    """Fake-quantizes the input of a layer, with a scale measured at run time or fixed by calibration.

    Buffers, only when static: `scale` (0-dim, NaN until calibrated) and, if asymmetric, `zero_point`. Both are saved.
    """

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, spec: ActivationSpec, channel_axis: int, device: torch.device):
        super().__init__()
        self.spec = spec
        self.grid = spec.grid()
        self.layout = spec.layout(channel_axis)
        is_covered = covers_every_value(self.grid, spec.range_method, scale_dtype=spec.rounding_dtype)
        self.can_clip = spec.static or not is_covered
        self.statistics: RunningStatistics | None = None
        self.is_bypassed = False
        self.is_calibrated = not spec.static
        unset = torch.full((), float("nan"), device=device)
        self.register_buffer("scale", unset if spec.static else None)
        self.register_buffer("zero_point", unset.clone() if spec.static and not spec.symmetric else None)

    def start_observing(self) -> None:
        """Collects statistics of the inputs instead of quantizing them, until `finish_observing_`."""
        self.statistics = RunningStatistics()

    def finish_observing_(self) -> None:
        """Fixes scale and zero point from the statistics collected.

        Raises:
            ConfigError: No input was seen.
        """
        assert self.statistics is not None
        assert self.scale is not None
        low, high = (
            torch.tensor(v, dtype=torch.float32, device=self.scale.device)
            for v in self.statistics.range(self.spec.range_method)
        )
        qparams = qparams_from_range(
            low, high, self.grid, scale_dtype=self.spec.rounding_dtype, integer_zero_point=not self.spec.symmetric
        )
        self.set_static_(qparams)
        self.statistics = None

    def set_static_(self, qparams: QParams) -> None:
        """Fixes scale and zero point of a static quantizer to known values."""
        assert self.scale is not None
        self.scale.copy_(qparams.scale)
        if self.zero_point is not None and qparams.zero_point is not None:
            self.zero_point.copy_(qparams.zero_point)
        self.is_calibrated = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid, same shape and dtype; while observing or bypassed, `x` itself.

        Raises:
            ConfigError: Static and not calibrated yet.
        """
        if self.statistics is not None:
            self.statistics.update(x)
            return x
        if self.is_bypassed:
            return x
        return fake_quantize(x, self.qparams(x), self.grid, self.layout, can_clip=self.can_clip)

    @property
    def is_passive(self) -> bool:
        """Whether inputs pass through as they are, observed or not."""
        return self.is_bypassed or self.statistics is not None

    def qparams(self, x: Tensor) -> QParams:
        """Scale and zero point for `x`, measured on it or fixed; constants for autograd.

        Raises:
            ConfigError: Static and not calibrated yet.
        """
        if self.scale is None:
            return choose_qparams(
                x.detach(), self.grid, self.layout, self.spec.range_method, scale_dtype=self.spec.rounding_dtype
            )
        if not self.is_calibrated:
            raise config_error(
                "activation.static", True, allowed="layers calibrated before use", fix="call calibrate_ before training"
            )
        return QParams(self.scale, self.zero_point)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.scale is not None and not self.scale.is_meta:
            self.is_calibrated = bool(torch.isfinite(self.scale))
