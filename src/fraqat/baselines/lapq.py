"""Loss-aware post-training quantization (LAPQ, Nahshan et al. 2021, arXiv 1911.07190), for weights.

At 4 bits and below the loss is steep in the step sizes and couples those of different layers, so they are chosen together:
step sizes of least L_p error for several p, the best p by a parabola through their losses, then Powell's method on the loss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fraqat.baselines.powell import minimize_powell
from fraqat.distill.guidance import training_task
from fraqat.distill.parts import to_device
from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import DistillTask
from fraqat.errors import NonFiniteLossError, config_error
from fraqat.nn import QuantizedLayer, quantized_layers
from fraqat.numerics import QParams, RangeMethod, choose_qparams, encode, finish_scale
from fraqat.numerics.qparams import MSE_RATIOS, decode

CALIBRATION_SEED = 19_110_719
_FIRST_STEP, _LAST_STEP = 0.05, 0.005
"""Of the logarithm of a step size: 5 % and 0.5 %."""
_PARABOLA = 3


@dataclass(frozen=True)
class LapqResult:
    """What the search found.

    Args:
        initial_loss: With the scales that the student came with.
        norm_losses: (p, loss) of every p tried, the interpolated one last.
        start_norm: The p from which Powell's method started; None where the initial scales were better than all.
        start_loss: Loss there.
        loss: Loss of the scales that the student has now; never more than `initial_loss`.
        num_evaluations: Calls of the calibration loss.
        multipliers: Layer -> factor of Powell's method on the step sizes of the start.
    """

    initial_loss: float
    norm_losses: tuple[tuple[float, float], ...]
    start_norm: float | None
    start_loss: float
    loss: float
    num_evaluations: int
    multipliers: dict[str, float]


class CalibrationLoss:
    """The distillation loss of a student on a few training batches: the same data, noise and teacher at every call.

    Args:
        task: Gives the data.
        teacher: Its predictions are computed once, here.
        student: Called in evaluation mode, without autocast; its training flag is put back.
        spec: Batch size, loss terms, and the seed of the data's order.
        num_batches: 1 or more.
    """

    def __init__(
        self, task: DistillTask, teacher: nn.Module, student: nn.Module, spec: TrainSpec, num_batches: int = 1
    ):
        if num_batches < 1:
            raise config_error("num_batches", num_batches, allowed="1 or more", fix="use 1")
        task = training_task(task, spec)
        self._task, self._student, self._spec = task, student, spec
        device = next(student.parameters()).device
        generator = torch.Generator().manual_seed(CALIBRATION_SEED)
        stream = iter(task.train_stream(spec.batch_size, spec.seed))
        batches = itertools.islice(stream, num_batches)
        self._inputs = [to_device(task.make_inputs(batch, generator), device) for batch in batches]
        with torch.no_grad():
            self._targets = [task.predict(teacher, inputs) for inputs in self._inputs]

    @torch.no_grad()
    def __call__(self) -> float:
        """Mean over the batches."""
        was_training = self._student.training
        self._student.eval()
        try:
            losses = [
                self._task.loss(self._task.predict(self._student, inputs), target, inputs, self._spec.losses).item()
                for inputs, target in zip(self._inputs, self._targets, strict=True)
            ]
        finally:
            self._student.train(was_training)
        return sum(losses) / len(losses)


@torch.no_grad()
def search_step_sizes_(
    student: nn.Module,
    calibration_loss: Callable[[], float],
    *,
    norms: Sequence[float] = (2.0, 2.4, 3.0, 3.5, 4.0),
    max_evaluations: int = 500,
) -> LapqResult:
    """Chooses all learned scales of a student together, for least calibration loss at the widths that its layers have now.

    1. For every p, each scale is the one of least sum |Q(w) - w|^p over the weights that share it.
    2. A parabola through the losses over p gives one more p; the best of these and of the initial scales is the start.
    3. Powell's method on the logarithms of one multiplier per layer. Within a layer the scales keep their ratios of step 1,
       so that there are as many variables as layers and not as many as channels.

    Only the learned scales change; weights, input quantizers and flags stay. An exception leaves the scales as they were.

    Args:
        student: With range method `learned` in at least one layer, and not prepared for integer kernels. Its layers' scales are
            set in place.
        calibration_loss: Loss of the student as it is when called, the same for the same scales; NaN counts as infinite. See
            `CalibrationLoss`.
        norms: Values of p, each more than 0.
        max_evaluations: Of the calibration loss, at least len(norms) + 2; never exceeded. A sweep of Powell's method takes
            about three per layer.

    Raises:
        ConfigError: Nothing to search, integer kernels, or impossible settings.
        NonFiniteLossError: No start has a finite loss.
    """
    layers = _learned_layers(student)
    norms = tuple(float(p) for p in norms)
    if not norms or any(not math.isfinite(p) or p <= 0 for p in norms) or len(set(norms)) < len(norms):
        raise config_error("norms", norms, allowed="different numbers above 0", fix="leave them out")
    if max_evaluations < len(norms) + 2:
        raise config_error("max_evaluations", max_evaluations, allowed=f"{len(norms) + 2} or more", fix="raise it")
    initial = {name: _scale(layer).clone() for name, layer in layers.items()}
    try:
        return _search(layers, initial, calibration_loss, norms, max_evaluations)
    except BaseException:
        _set_scales_(layers, initial)
        raise


def _search(
    layers: dict[str, QuantizedLayer],
    initial: dict[str, Tensor],
    calibration_loss: Callable[[], float],
    norms: tuple[float, ...],
    max_evaluations: int,
) -> LapqResult:
    def loss_of(scales: dict[str, Tensor]) -> float:
        _set_scales_(layers, scales)
        loss = calibration_loss()
        return math.inf if math.isnan(loss) else loss

    initial_loss = loss_of(initial)
    best_loss, best_norm, base = initial_loss, None, initial
    tried: list[tuple[float, float]] = []

    def try_norm(p: float) -> None:
        nonlocal best_loss, best_norm, base
        scales = {name: least_norm_scale(layer, p) for name, layer in layers.items()}
        loss = loss_of(scales)
        tried.append((p, loss))
        if loss < best_loss:
            best_loss, best_norm, base = loss, p, scales

    for p in norms:
        try_norm(p)
    interpolated = interpolate_norm(tried)
    if interpolated is not None:
        try_norm(interpolated)
    if not math.isfinite(best_loss):
        raise NonFiniteLossError(
            f"the calibration loss is {best_loss} for all of {len(tried) + 1} starts. Fix: check the model and its data."
        )
    names, num_before = list(layers), 1 + len(tried)

    def scaled(logarithms: tuple[float, ...]) -> dict[str, Tensor]:
        return {name: base[name] * math.exp(x) for name, x in zip(names, logarithms, strict=True)}

    found = minimize_powell(
        lambda point: loss_of(scaled(point)),
        [0.0] * len(names),
        best_loss,
        first_step=_FIRST_STEP,
        last_step=_LAST_STEP,
        max_evaluations=max_evaluations - num_before,
    )
    _set_scales_(layers, scaled(found.point))
    return LapqResult(
        initial_loss=initial_loss,
        norm_losses=tuple(tried),
        start_norm=best_norm,
        start_loss=best_loss,
        loss=found.value,
        num_evaluations=num_before + found.num_evaluations,
        multipliers={name: math.exp(x) for name, x in zip(names, found.point, strict=True)},
    )


@torch.no_grad()
def least_norm_scale(layer: QuantizedLayer, p: float) -> Tensor:
    """The scales of least sum |Q(w) - w|^p at the layer's current width, among 80 shares of the largest magnitude.

    Args:
        layer: On a symmetric grid.
        p: More than 0; 2 gives the scales of MSE clipping.

    Returns:
        float32, of the layout's scale shape.

    Numerics: errors are divided by the scale of the full range, so that no power underflows. One pass over the weight and the
        memory of three copies per share.
    """
    quantizer, weight = layer.weight_quantizer, layer.master_weight().detach()
    grid, layout, dtype = quantizer.grid, quantizer.layout, quantizer.spec.rounding_dtype
    blocks = layout.split(weight)
    blocks = blocks.to(torch.promote_types(blocks.dtype, grid.compute_dtype))
    dims = layout.reduce_dims(blocks.ndim)
    full = choose_qparams(weight, grid, layout, RangeMethod.MAX_ABS).scale
    best_error, best_scale = torch.full_like(full, math.inf), full
    for ratio in MSE_RATIOS:
        qparams = QParams(finish_scale(full * ratio, dtype))
        difference = (decode(encode(blocks, qparams, grid), qparams) - blocks) / full
        error = difference.abs_().pow_(p).sum(dim=dims, keepdim=True)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, qparams.scale, best_scale)
    return best_scale.float()


def interpolate_norm(losses: Sequence[tuple[float, float]]) -> float | None:
    """The p of least loss on the least-squares parabola through (p, loss), within the range of p.

    None where there is nothing new to try: fewer than three finite losses, no minimum (the parabola opens downwards), or a p
    that was tried.
    """
    points = [(p, loss) for p, loss in losses if math.isfinite(loss)]
    if len(points) < _PARABOLA:
        return None
    p, loss = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    centre, width = p.mean(), p.max() - p.min()
    u = (p - centre) / width
    design = torch.stack((torch.ones_like(u), u, u * u), dim=1)
    _, slope, curvature = torch.linalg.lstsq(design, (loss - loss.mean()).unsqueeze(1)).solution.flatten().tolist()
    if curvature <= 0:
        return None
    vertex = float(centre + width * (-slope / (2 * curvature)))
    vertex = min(max(vertex, p.min().item()), p.max().item())
    return None if any(vertex == known for known, _ in losses) else vertex


def _learned_layers(student: nn.Module) -> dict[str, QuantizedLayer]:
    layers = {name: layer for name, layer in quantized_layers(student) if layer.weight_quantizer.scale is not None}
    if not layers:
        raise config_error(
            "student",
            type(student).__name__,
            allowed="a model with learned scales",
            fix="quantize it with weight.range_method: learned",
        )
    if any(layer.integer is not None for layer in layers.values()):
        raise config_error(
            "train.engine", "integer", allowed="reference: codes would be stale", fix="release the engine first"
        )
    return layers


def _scale(layer: QuantizedLayer) -> nn.Parameter:
    scale = layer.weight_quantizer.scale
    assert scale is not None
    return scale


def _set_scales_(layers: dict[str, QuantizedLayer], scales: dict[str, Tensor]) -> None:
    for name, layer in layers.items():
        _scale(layer).copy_(scales[name])
