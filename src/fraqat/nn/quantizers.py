"""The quantizers that a layer owns: one for its weight, one for its input. State that training needs lives in buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from fraqat.errors import config_error
from fraqat.nn.buffers import KeepsBufferDtype, OtherWidths
from fraqat.nn.searching import can_search
from fraqat.nn.shards import is_sharded, own, own_rows, whole
from fraqat.nn.spec import ActivationSpec, WeightSpec
from fraqat.numerics import (
    FLOAT32_EXACT_BITS,
    NEEDS_HISTOGRAM,
    Granularity,
    Grid,
    GroupScales,
    Histogram,
    QParams,
    RangeMethod,
    RunningStatistics,
    ZeroPoint,
    choose_qparams,
    clamp_codes,
    covers_every_value,
    encode,
    estimate_range,
    fake_quantize,
    fake_quantize_learned,
    finish_scale,
    integer_group_scales,
    learned_scale_gradients,
    mse_clip_ratio,
    qparams_from_range,
    quantize,
    round_to_codes,
    zero_point_qparams,
)


class TensorLevels:
    """A grid's numbers as 0-dim tensors, changed in place, so that one compiled graph serves every width."""

    def __init__(self, qmin: Tensor, qmax: Tensor, range_divisor: Tensor, symmetric: bool):
        self.qmin, self.qmax, self.range_divisor, self.symmetric = qmin, qmax, range_divisor, symmetric


class WeightQuantizer(KeepsBufferDtype):
    """Fake-quantizes a weight at the current width.

    Buffers: `qmin`, `qmax`, `range_divisor`, `error_share` (0-dim, not saved); `clip_ratio` of the scale's shape, saved, only
    with range method `mse`.

    Parameter, only with range method `learned`: `scale`, float32 whatever the model is cast to, of the layout's scale shape,
    saved. What is used is `finish_scale` of it.

    Attributes:
        bits: Current width.
        known_max: Largest magnitude of the whole weight, of the scale's shape, where processes hold rows of it and it has one
            scale; None elsewhere.
        is_on_grid: Whether weights are quantized in full, and have codes; not at a wider width on the final grid.
        others: Scales or clippings of the other widths that the same weight serves; None where it serves one.
        defers_gradient: Whether backward passes leave the gradient of the quantized weight in `weight.grad` as it is, for
            `finish_gradient_` to complete once per optimizer step.
    """

    qmin: Tensor
    qmax: Tensor
    range_divisor: Tensor
    error_share: Tensor
    clip_ratio: Tensor | None
    scale: nn.Parameter | None
    others: OtherWidths | None

    def __init__(self, spec: WeightSpec, weight: Tensor):
        super().__init__()
        self.spec = spec
        self.layout = spec.layout()
        self.grid = spec.grid(spec.bits)
        self.is_bypassed = False
        self.defers_gradient = False
        self.bits = spec.bits
        self.known_max: Tensor | None = None
        self.is_on_grid = True  # kept, not derived: torch.compile would make a graph for every width that it reads
        device = weight.device
        for name in ("qmin", "qmax", "range_divisor", "error_share"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, device=device), persistent=False)
        shape = self.layout.scale_shape(tuple(weight.shape))
        has_ratio = spec.range_method is RangeMethod.MSE
        self.register_buffer("clip_ratio", torch.ones(shape, dtype=torch.float32, device=device) if has_ratio else None)
        self._set_grid_(spec.bits)
        self.refresh_(weight)
        is_learned = spec.range_method is RangeMethod.LEARNED
        self.register_parameter("scale", nn.Parameter(self._searched_scale(weight)) if is_learned else None)
        self.register_module("others", None)

    def serve_(self, widths: Iterable[float], weight: Tensor) -> None:
        """Gives each of several widths a learned scale or a clipping of its own; `set_bits_` then changes between them.

        Nothing to do for range methods that measure the weight at every call.

        Args:
            widths: The present one among them.
            weight: Whose scales are searched, at every width.
        """
        if self.scale is None and self.clip_ratio is None:
            return
        others = OtherWidths(widths)
        for bits in sorted(others.widths - {self.bits}):
            twin = WeightQuantizer(dataclasses.replace(self.spec, bits=bits), weight)
            state = twin.scale if twin.scale is not None else twin.clip_ratio
            assert state is not None
            if self.scale is not None:
                state.requires_grad_(self.scale.requires_grad)
            others.put_(bits, state)
        self.others = others

    def settle_(self, bits: float, weight: Tensor) -> None:
        """Makes a width the final one, and forgets the others."""
        self.set_bits_(bits, weight)
        self.spec = dataclasses.replace(self.spec, bits=bits)
        self.others = None

    def is_at(self, bits: float, *, on_final_grid: bool = False) -> bool:
        """Whether `set_bits_` with the same arguments would change nothing."""
        return self.bits == bits and self.grid.bits == self._grid_bits(bits, on_final_grid)

    def set_bits_(self, bits: float, weight: Tensor, *, on_final_grid: bool = False) -> None:
        """Changes the width in place.

        With `on_final_grid` the grid stays that of the final width b, and a wider one, B, is a share of its error:
        w + (Q_b(w) - w) 2^-(B - b). The error is that of B bits, the values that weights settle on are the final ones. Widths
        from b down have a grid of their own in any case.

        With `mse` the clipping is searched again for `weight`. A learned scale keeps what was learned, as a factor of what MSE
        clipping gives: s_new = s_old * s_mse(new width) / s_mse(old width). Keeping the covered range instead
        (s_old * divisor_old / divisor_new) would start 8 bits with the clipping that is best for 4 bits, and 4 bits with the
        range that is best for 8: on Gaussian weights per channel 17 and 2.4 dB of SQNR less.

        With several widths (`serve_`) each has its own scale or clipping, and gets it back as it was.
        """
        if self.others is not None and bits != self.bits:
            self._exchange_(self.others, bits, weight)
            return
        self.bits = bits
        grid_bits = self._grid_bits(bits, on_final_grid)
        self.is_on_grid = grid_bits == bits
        if grid_bits == self.grid.bits or self.scale is None or weight.is_meta:
            self._set_grid_(grid_bits)
        else:
            before = self._searched_scale(weight)
            self._set_grid_(grid_bits)
            self._keep_factor_(self.scale, before, weight)
        self.refresh_(weight)

    def _exchange_(self, others: OtherWidths, bits: float, weight: Tensor) -> None:
        """Takes the state of another width; one that is not served gets one that is searched now and not trained."""
        name = "clip_ratio" if self.scale is None else "scale"
        if self.bits in others.widths:
            others.put_(self.bits, getattr(self, name))
        self.bits, self.is_on_grid = bits, True
        self._set_grid_(bits)
        if bits in others.widths:
            setattr(self, name, others.take_(bits))
        elif self.scale is not None:
            self.scale = nn.Parameter(self._searched_scale(weight), requires_grad=False)
        else:
            self.clip_ratio = torch.ones_like(getattr(self, name))
            self.refresh_(weight)

    def follow_(self, before: Tensor, after: Tensor) -> None:
        """Makes scales fit a whole weight that something else than training has changed, as `set_bits_` fits another width."""
        if self.scale is not None and not after.is_meta:
            self._keep_factor_(self.scale, self._searched_scale(before), after)
        self.refresh_(after)

    @torch.no_grad()
    def _keep_factor_(self, scale: nn.Parameter, before: Tensor, weight: Tensor) -> None:
        """Changes a scale as MSE clipping has from `before`; in float64: exactly the new one where nothing was learned."""
        factor = (self._searched_scale(weight).double() / before.double())[own_rows(scale)]
        own(scale).copy_(own(scale) * factor)

    def refresh_(self, weight: Tensor) -> None:
        """Searches the MSE clipping for `weight` at the current width; nothing to do for the other methods."""
        if self.clip_ratio is not None and can_search(weight):
            ratio = mse_clip_ratio(weight.detach(), self.grid, self.layout, scale_dtype=self.spec.rounding_dtype)
            self.clip_ratio.copy_(ratio)

    def qparams(self, weight: Tensor, rows: slice | None = None) -> QParams:
        """Scale (and offset) of `weight` at the current width; constants for autograd.

        Args:
            weight: Whole, or the rows of it that this process holds.
            rows: Which ones these are; None for the whole weight.
        """
        if self.scale is not None:
            is_double = self.is_wide or weight.dtype == torch.float64
            held = whole(self.scale) if rows is None else own(self.scale)
            scale = held.detach().to(torch.float64 if is_double else torch.float32)
            return QParams(finish_scale(scale, self.spec.rounding_dtype))
        groups = self.group_scales(weight, rows)
        return self._measured(weight, self.spec.rounding_dtype, rows) if groups is None else QParams(groups.product)

    def group_scales(self, weight: Tensor, rows: slice | None = None) -> GroupScales | None:
        """The integer group scales of `weight` at the current width; None where the spec has none. `rows`: see `qparams`."""
        if self.spec.group_scale == "float":
            return None
        wanted = self._measured(weight, None, rows).scale
        dtype = self.spec.rounding_dtype
        return integer_group_scales(weight.detach(), wanted, self._levels(), self.layout, scale_dtype=dtype)

    def codes(self, weight: Tensor) -> tuple[Tensor, QParams]:
        """Integer codes of `weight` (its shape) and their affine map."""
        qparams = self.qparams(weight)
        return quantize(weight.detach(), qparams, self.grid, self.layout), qparams

    @property
    def max_abs_divisor(self) -> float | None:
        """What a row's largest magnitude is divided by to give its scale, where that is all there is to it; else None."""
        spec = self.spec
        is_plain = spec.range_method is RangeMethod.MAX_ABS and spec.granularity is Granularity.CHANNEL
        return self.grid.range_divisor if is_plain and spec.symmetric and spec.rounding_dtype is None else None

    def unchecked_codes(self, weight: Tensor, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Integers as floats, of the weight's shape, and the scale that makes values of them.

        The integers are codes, or codes times the group's multiplier where group scales are integers: within int8 up to 8 bits,
        with one scale per output channel. A weight that is not finite has a scale that is not. `rows`: see `qparams`.
        """
        groups = self.group_scales(weight, rows)
        qparams = self.qparams(weight, rows) if groups is None else QParams(groups.product)
        blocks = self.layout.split(weight.detach())
        codes = encode(blocks.to(torch.promote_types(blocks.dtype, self.grid.compute_dtype)), qparams, self.grid)
        integers = codes if groups is None else codes * groups.multiplier
        return self.layout.join(integers, tuple(weight.shape)), qparams.scale if groups is None else groups.channel

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` on the grid, same shape and dtype; straight-through gradient. `weight` itself while bypassed."""
        if self.is_bypassed:
            return weight
        quantized = self._fake_quantized(weight)
        # The gradient is shared in the same way: to the weight itself, and through the quantizer to weight and scale.
        return quantized if self.is_on_grid else torch.lerp(weight, quantized, self.error_share.to(weight.dtype))

    def _fake_quantized(self, weight: Tensor) -> Tensor:
        if self.scale is not None and not self.defers_gradient:
            return fake_quantize_learned(
                weight, self.scale, self._levels(), self.layout, scale_dtype=self.spec.rounding_dtype
            )
        masks_gradient = not self.defers_gradient
        return fake_quantize(weight, self.qparams(weight), self._levels(), self.layout, masks_gradient=masks_gradient)

    @torch.no_grad()
    def finish_gradient_(self, weight: Tensor) -> None:
        """Completes the backward passes that left the gradient of the quantized weight in `weight.grad`, in the rows held here.

        Linear in that gradient, so the same as completing each pass: zero where the weight is clipped at the current width, and
        with `learned` the scale's own gradient, added to what `scale.grad` holds (a loss term on the scale itself).
        """
        assert weight.grad is not None
        rows = own_rows(weight) if is_sharded(weight) else None
        values, gradient = own(weight.detach()), own(weight.grad)
        if not values.numel():
            return
        if self.scale is not None:
            grad, grad_scale = learned_scale_gradients(
                gradient, values, self.qparams(values, rows), self.grid, self.layout
            )
            gradient.copy_(grad)
            if self.scale.requires_grad:
                self._add_to_scale_gradient(grad_scale.to(self.scale.dtype))
            return
        method, rounding_dtype = self.spec.range_method, self.spec.rounding_dtype
        if self.spec.group_scale == "float" and covers_every_value(self.grid, method, scale_dtype=rounding_dtype):
            return
        blocks = self.layout.split(values)
        rounded = round_to_codes(
            blocks.to(torch.promote_types(blocks.dtype, self.grid.compute_dtype)), self.qparams(values, rows)
        )
        is_inside = clamp_codes(rounded, self.grid) == rounded
        gradient.mul_(self.layout.join(is_inside, tuple(values.shape)))

    def _add_to_scale_gradient(self, gradient: Tensor) -> None:
        assert self.scale is not None
        if self.scale.grad is not None:
            own(self.scale.grad).add_(gradient)
        elif is_sharded(self.scale):
            self.scale.grad = torch.zeros_like(self.scale)
            own(self.scale.grad).copy_(gradient)
        else:
            self.scale.grad = gradient

    def _levels(self) -> Grid | TensorLevels:
        # `grid` changes with the width: reading it here would make torch.compile recompile.
        if self.is_wide:
            return self.grid
        return TensorLevels(self.qmin, self.qmax, self.range_divisor, self.spec.symmetric)

    def _measured(self, weight: Tensor, scale_dtype: torch.dtype | None, rows: slice | None = None) -> QParams:
        ratio = self.clip_ratio
        if rows is not None and self.layout.granularity is Granularity.TENSOR:
            assert self.known_max is not None  # of rows that other processes hold too
            high = self.known_max if ratio is None else self.known_max * ratio
            return qparams_from_range(-high, high, self._levels(), scale_dtype=scale_dtype)
        return choose_qparams(
            weight.detach(),
            self._levels(),
            self.layout,
            self.spec.range_method,
            scale_dtype=scale_dtype,
            clip_ratio=ratio if rows is None or ratio is None else ratio[rows],
        )

    def _searched_scale(self, weight: Tensor) -> Tensor:
        """The scale of MSE clipping at the current width, float32."""
        if not can_search(weight):
            return torch.ones(self.layout.scale_shape(tuple(weight.shape)), dtype=torch.float32, device=weight.device)
        dtype = self.spec.rounding_dtype
        return choose_qparams(weight.detach(), self.grid, self.layout, RangeMethod.MSE, scale_dtype=dtype).scale.float()

    def _grid_bits(self, bits: float, on_final_grid: bool) -> float:
        return self.spec.bits if on_final_grid and bits > self.spec.bits else bits

    def _set_grid_(self, bits: float) -> None:
        self.grid = self.spec.grid(bits)
        self.is_wide = bits > FLOAT32_EXACT_BITS
        self._write_levels_()

    def _write_levels_(self) -> None:
        for name in ("qmin", "qmax", "range_divisor"):
            getattr(self, name).fill_(float(getattr(self.grid, name)))
        self.error_share.fill_(1.0 if self.is_on_grid else 2.0 ** (self.spec.bits - self.bits))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(device=moved.device)

        super()._apply(move, recurse)
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
        needs_values = self.spec.range_method in NEEDS_HISTOGRAM
        self.statistics = RunningStatistics(Histogram() if needs_values else None)

    def finish_observing_(self) -> None:
        """Fixes scale and zero point from the statistics collected.

        Raises:
            ConfigError: No input was seen.
        """
        assert self.statistics is not None
        assert self.scale is not None
        low, high = (
            torch.tensor(v, dtype=torch.float32, device=self.scale.device)
            for v in self.statistics.range(self.spec.range_method, self.grid, self.spec.percentile)
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
    def is_plain(self) -> bool:
        """Whether this is the default: 8 bits, symmetric, max-abs per token, scales in float32; engines have it in one pass."""
        spec = self.spec
        is_per_token = spec.granularity is Granularity.TOKEN and spec.range_method is RangeMethod.MAX_ABS
        return is_per_token and spec.bits == 8 and spec.symmetric and not spec.static and spec.rounding_dtype is None

    @property
    def is_passive(self) -> bool:
        """Whether inputs pass through as they are, observed or not."""
        return self.is_bypassed or self.statistics is not None

    def qparams(self, x: Tensor) -> QParams:
        """Scale and zero point for `x`, measured on it or fixed; constants for autograd.

        Raises:
            ConfigError: Static and not calibrated yet.
        """
        if self.scale is None and self.spec.zero_point is not ZeroPoint.FLOAT:
            low, high = estimate_range(x.detach(), self.layout, self.spec.range_method)
            return zero_point_qparams(low, high, self.grid, self.spec.zero_point)
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
