"""Laws of the loss-aware search of step sizes: joint optimum, never worse, nothing else touched."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from toy import ToyTask, toy_spec, toy_teacher

from fraqat import QuantSpec, WeightSpec, quantize_
from fraqat.baselines import CalibrationLoss, search_step_sizes_
from fraqat.baselines.lapq import interpolate_norm, least_norm_scale
from fraqat.errors import ConfigError, NonFiniteLossError
from fraqat.nn import EngineSpec, IntegerLayers, quantized_layers, scale_parameters

LEARNED = QuantSpec(WeightSpec(bits=3, range_method="learned"))


def learned_student(spec: QuantSpec = LEARNED) -> nn.Module:
    student = toy_teacher()
    quantize_(student, spec)
    return student


def learned_scales(student: nn.Module) -> list[Tensor]:
    return [scale.detach().clone() for scale in scale_parameters(student)]


class QuadraticLoss:
    """A coupled quadratic of the logarithms of each layer's mean scale over that of the start, least at `optimum`."""

    def __init__(self, student: nn.Module, optimum: tuple[float, ...]):
        self.student, self.optimum = student, torch.tensor(optimum)
        self.start = self.logarithms()
        self.num_calls = 0

    def logarithms(self) -> Tensor:
        return torch.stack([scale.detach().log().mean() for scale in scale_parameters(self.student)])

    def __call__(self) -> float:
        self.num_calls += 1
        x, y = (self.logarithms() - self.start - self.optimum).tolist()
        return 5 + 3 * x * x + 5 * x * y + 3 * y * y


def test_the_joint_optimum_of_a_coupled_quadratic_loss_is_found() -> None:
    student = learned_student()
    loss = QuadraticLoss(student, (0.3, -0.2))
    result = search_step_sizes_(student, loss)
    found = loss.logarithms() - loss.start
    torch.testing.assert_close(found, loss.optimum, rtol=0, atol=0.02)
    assert result.loss == pytest.approx(5, abs=1e-3)
    assert result.num_evaluations == loss.num_calls <= 500
    assert loss() == pytest.approx(result.loss, rel=1e-6)


def calibrated(student: nn.Module, num_batches: int = 5) -> CalibrationLoss:
    return CalibrationLoss(ToyTask(), toy_teacher(), student, toy_spec(), num_batches)


def test_the_search_lowers_the_distillation_loss() -> None:
    student = learned_student()
    loss = calibrated(student)
    before = loss()
    result = search_step_sizes_(student, loss)
    assert result.initial_loss == before
    assert result.loss == loss() < 0.95 * before
    assert result.loss <= result.start_loss <= min(value for _, value in result.norm_losses)
    assert [p for p, _ in result.norm_losses[:5]] == [2, 2.4, 3, 3.5, 4]
    assert result.multipliers.keys() == {"0", "3"}


@pytest.mark.parametrize("max_evaluations", [7, 8, 10, 30])
def test_never_worse_than_the_start_and_never_over_budget(max_evaluations: int) -> None:
    student = learned_student()
    loss = calibrated(student)
    for _ in range(3):  # each search starts where the last one ended
        before = loss()
        result = search_step_sizes_(student, loss, max_evaluations=max_evaluations)
        assert result.loss == loss() <= result.initial_loss == before
        assert result.num_evaluations <= max_evaluations


def test_good_scales_are_kept_where_every_start_is_worse() -> None:
    student = learned_student()
    at_start = learned_scales(student)

    def distance() -> float:
        return sum((a - b).abs().sum().item() for a, b in zip(learned_scales(student), at_start, strict=True))

    for scale in scale_parameters(student):
        scale.data.mul_(1.7)
    at_start = learned_scales(student)
    result = search_step_sizes_(student, distance)
    assert result.start_norm is None
    assert result.loss == 0
    assert all(torch.equal(a, b) for a, b in zip(learned_scales(student), at_start, strict=True))


def test_nothing_but_the_scales_changes() -> None:
    student = learned_student().train()
    loss = calibrated(student)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    random = torch.get_rng_state()
    search_step_sizes_(student, loss, max_evaluations=40)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, state[name])}
    assert changed == {"0.weight_quantizer.scale", "3.weight_quantizer.scale"}
    assert student.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in student.parameters())
    assert {layer.weight_quantizer.bits for _, layer in quantized_layers(student)} == {3}


def test_scales_of_a_layer_keep_their_ratios_after_the_start() -> None:
    student = learned_student()
    result = search_step_sizes_(student, calibrated(student))
    assert result.start_norm is not None
    for name, layer in quantized_layers(student):
        scale = layer.weight_quantizer.scale
        assert scale is not None
        expected = least_norm_scale(layer, result.start_norm) * result.multipliers[name]
        torch.testing.assert_close(scale.detach(), expected)


def test_an_exception_leaves_the_scales_as_they_were() -> None:
    student = learned_student()
    before = learned_scales(student)
    num_calls = 0

    def failing() -> float:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 9:
            raise KeyboardInterrupt
        return 1 / num_calls

    with pytest.raises(KeyboardInterrupt):
        search_step_sizes_(student, failing)
    assert all(torch.equal(a, b) for a, b in zip(learned_scales(student), before, strict=True))


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6.5])
def test_the_second_norm_gives_the_scales_of_mse_clipping(bits: float, scale_dtype: str) -> None:
    student = learned_student(QuantSpec(WeightSpec(bits=bits, range_method="learned", scale_dtype=scale_dtype)))
    for _, layer in quantized_layers(student):
        start = layer.weight_quantizer.scale
        assert start is not None
        torch.testing.assert_close(least_norm_scale(layer, 2.0), start.detach())


def test_a_higher_norm_clips_less() -> None:
    """The largest error counts more: the p-th power of a clipped outlier dominates the rest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4))
    nn.init.normal_(model.get_parameter("0.weight"))
    quantize_(model, LEARNED)
    layer = next(layer for _, layer in quantized_layers(model))
    scales = [least_norm_scale(layer, p).mean().item() for p in (1.0, 2.0, 4.0, 16.0)]
    assert scales == sorted(scales)
    assert scales[0] < 0.9 * scales[-1]


def test_all_zero_rows_and_groups_have_finite_scales() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    model.get_parameter("0.weight").data[1] = 0
    quantize_(model, QuantSpec(WeightSpec(range_method="learned", granularity="group", group_size=4)))
    layer = next(layer for _, layer in quantized_layers(model))
    scale = least_norm_scale(layer, 3.0)
    assert scale.shape == layer.weight_quantizer.qparams(layer.weight).scale.shape
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())


def test_a_parabola_gives_the_norm_of_least_loss() -> None:
    assert interpolate_norm([(p, (p - 2.7) ** 2 + 1) for p in (2.0, 2.4, 3.0, 3.5, 4.0)]) == pytest.approx(2.7)
    assert interpolate_norm([(p, (p - 9) ** 2) for p in (2.0, 3.0, 3.5)]) is None  # the end of the range was tried
    assert interpolate_norm([(p, -p * p) for p in (2.0, 3.0, 4.0)]) is None
    assert interpolate_norm([(2.0, 1.0), (3.0, math.inf), (4.0, 2.0)]) is None


def test_calibration_is_the_same_at_every_call_and_reads_training_data() -> None:
    task, student = ToyTask(), learned_student()
    loss = CalibrationLoss(task, toy_teacher(), student, toy_spec(), 2)
    assert loss() == loss()
    task.validation = None  # pyright: ignore[reportAttributeAccessIssue]
    assert CalibrationLoss(task, toy_teacher(), student, toy_spec(), 2)() == loss()
    with torch.no_grad():
        student.get_parameter("0.weight_quantizer.scale").mul_(3)
    assert loss() > CalibrationLoss(task, student, student, toy_spec(), 2)() == 0
    with pytest.raises(ConfigError, match="num_batches"):
        CalibrationLoss(task, toy_teacher(), student, toy_spec(), 0)


def test_losses_that_are_not_finite_are_avoided_or_refused() -> None:
    student = learned_student()
    first = learned_scales(student)[0].mean().item()

    def cliff() -> float:
        mean = learned_scales(student)[0].mean().item()
        return math.nan if mean > 1.2 * first else 2 - mean / first

    result = search_step_sizes_(student, cliff)
    assert math.isfinite(result.loss) and result.loss < 1
    assert learned_scales(student)[0].mean().item() <= 1.2 * first
    before = learned_scales(student)
    with pytest.raises(NonFiniteLossError, match="starts"):
        search_step_sizes_(student, lambda: math.nan)
    assert all(torch.equal(a, b) for a, b in zip(learned_scales(student), before, strict=True))


def test_what_cannot_be_searched_is_refused() -> None:
    def loss() -> float:
        return 1.0

    student = toy_teacher()
    quantize_(student)
    with pytest.raises(ConfigError, match="range_method: learned"):
        search_step_sizes_(student, loss)
    student = learned_student()
    with pytest.raises(ConfigError, match="norms"):
        search_step_sizes_(student, loss, norms=(2, 2))
    with pytest.raises(ConfigError, match="norms"):
        search_step_sizes_(student, loss, norms=(2, 0))
    with pytest.raises(ConfigError, match="max_evaluations"):
        search_step_sizes_(student, loss, max_evaluations=6)
    IntegerLayers(student, EngineSpec("float32"))
    with pytest.raises(ConfigError, match="stale"):
        search_step_sizes_(student, loss)
