"""Laws of static activations: calibrate first, then use, save and load."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fraqat.errors import ConfigError
from fraqat.nn import ActivationSpec, LayerRule, QuantSpec, WeightSpec, calibrate_, quantize_, unquantize_

STATIC = ActivationSpec(granularity="tensor", static=True, range_method="three_sigma")
ASYMMETRIC = ActivationSpec(granularity="tensor", static=True, range_method="min_max", symmetric=False)


def first_layer(activation: ActivationSpec) -> Any:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    quantize_(model, QuantSpec(WeightSpec(8), activation))
    return model


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(6, 16, generator=generator) ** 3 + 0.2 for _ in range(5)]


def everything() -> np.ndarray:
    return torch.cat(batches()).double().numpy()


@pytest.mark.parametrize("method", ["max_abs", "min_max", "three_sigma"])
@pytest.mark.parametrize("bits", [8, 16])
def test_symmetric_scale_comes_from_all_batches(method: str, bits: int) -> None:
    model = first_layer(ActivationSpec(bits, granularity="tensor", static=True, range_method=method))
    assert calibrate_(model, model, batches()) == 2
    x = everything()
    low, high = x.min(), x.max()
    if method == "three_sigma":
        low, high = max(low, x.mean() - 3 * x.std()), min(high, x.mean() + 3 * x.std())
    expected = max(-low, high) / (2 ** (bits - 1) - 1)
    assert model[0].activation_quantizer.scale.item() == pytest.approx(expected, rel=1e-6)
    assert model[0].activation_quantizer.zero_point is None


def test_asymmetric_scale_has_the_accelerators_integer_zero_point() -> None:
    model = first_layer(ASYMMETRIC)
    calibrate_(model, model, batches())
    x = everything()
    scale = (x.max() - x.min()) / 255
    quantizer = model[0].activation_quantizer
    assert quantizer.scale.item() == pytest.approx(scale, rel=1e-6)
    assert quantizer.zero_point.item() == round(-x.min() / scale)


@pytest.mark.parametrize("activation", [STATIC, ASYMMETRIC])
def test_calibrated_input_equals_torchs_fake_quantization(activation: ActivationSpec) -> None:
    model = first_layer(activation)
    calibrate_(model, model, batches())
    quantizer = model[0].activation_quantizer
    qmin, qmax = (-128, 127) if activation.symmetric else (0, 255)
    zero_point = 0 if quantizer.zero_point is None else int(quantizer.zero_point)
    x, step = 2 * torch.randn(50, 16), quantizer.scale.item()
    expected = torch.fake_quantize_per_tensor_affine(x, step, zero_point, qmin, qmax)
    is_tie = ((x.double() / step).abs() % 1 - 0.5).abs() < 1e-3
    torch.testing.assert_close(quantizer(x)[~is_tie], expected[~is_tie])
    assert quantizer(torch.tensor([1e9])).item() == pytest.approx(step * (qmax - zero_point))


def test_scale_does_not_depend_on_the_batch_it_is_used_on() -> None:
    model = first_layer(STATIC)
    calibrate_(model, model, batches())
    quantizer = model[0].activation_quantizer
    x = torch.randn(4, 16)
    assert torch.equal(quantizer(x)[0], quantizer(torch.cat([x[:1], 1000 * x]))[0])


def test_uncalibrated_use_is_refused() -> None:
    model = first_layer(STATIC)
    with pytest.raises(
        ConfigError, match=r"activation.static = True .* layers calibrated before use. Fix: call calibrate_"
    ):
        model(torch.randn(2, 16))


@torch.no_grad()
def test_calibration_is_saved_and_loaded() -> None:
    source = first_layer(ASYMMETRIC)
    calibrate_(source, source, batches())
    target = first_layer(ASYMMETRIC)
    state = source.state_dict()
    assert {"0.activation_quantizer.scale", "0.activation_quantizer.zero_point"} <= set(state)
    target.load_state_dict(state)
    x = torch.randn(3, 16)
    assert torch.equal(target(x), source(x))


def test_state_without_calibration_loads_as_uncalibrated() -> None:
    target = first_layer(STATIC)
    calibrate_(target, target, batches())
    target.load_state_dict(first_layer(STATIC).state_dict())
    with pytest.raises(ConfigError, match="call calibrate_"):
        target(torch.randn(2, 16))


@torch.no_grad()
def test_deep_copy_keeps_the_calibration() -> None:
    model = first_layer(STATIC)
    calibrate_(model, model, batches())
    x = torch.randn(3, 16)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_calibration_may_be_repeated() -> None:
    model = first_layer(STATIC)
    calibrate_(model, model, batches())
    first = model[0].activation_quantizer.scale.item()
    calibrate_(model, model, [10 * batch for batch in batches()])
    assert model[0].activation_quantizer.scale.item() == pytest.approx(10 * first, rel=1e-5)


def test_calibration_keeps_flags_weights_and_makes_no_gradient() -> None:
    model = first_layer(STATIC).eval()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    seen: list[bool] = []
    calibrate_(model, lambda batch: seen.append(model(batch).requires_grad), batches())
    assert not any(seen)
    assert torch.is_grad_enabled()
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_forward_function_chooses_what_runs() -> None:
    model = first_layer(STATIC)
    data: Iterator[dict[str, Tensor]] = ({"x": batch} for batch in batches())
    assert calibrate_(model, lambda batch: model(batch["x"]), data) == 2


def test_dynamic_model_needs_no_calibration() -> None:
    model = first_layer(ActivationSpec())
    assert calibrate_(model, model, []) == 0


def test_static_and_dynamic_layers_may_be_mixed() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    quantize_(model, rules=[LayerRule("1", spec=QuantSpec(WeightSpec(), STATIC))])
    assert calibrate_(model, model, batches()) == 1
    assert torch.isfinite(model(batches()[0])).all()


@pytest.mark.parametrize("first", [STATIC, ActivationSpec(2), None], ids=["static", "dynamic", "float"])
def test_layers_observe_what_the_float_model_would_give_them(first: ActivationSpec | None) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    inner = torch.cat([model[0](batch) for batch in batches()]).detach().double().numpy()
    last = ActivationSpec(granularity="tensor", static=True)
    quantize_(model, QuantSpec(WeightSpec(2), last), rules=[LayerRule("0", spec=QuantSpec(WeightSpec(2), first))])
    calibrate_(model, model, batches())
    assert model[1].activation_quantizer.scale.item() == pytest.approx(np.abs(inner).max() / 127, rel=1e-5)
    x = batches()[0]
    assert not torch.allclose(model(x), unquantized_output(model, x), rtol=0.05)


def unquantized_output(model: nn.Module, x: Tensor) -> Tensor:
    twin = copy.deepcopy(model)
    unquantize_(twin)
    return twin(x)


def test_static_convolution_is_calibrated_too() -> None:
    model = nn.Conv2d(4, 4, 1)
    quantize_(model, QuantSpec(WeightSpec(8), ActivationSpec(granularity="tensor", static=True)))
    x = torch.randn(2, 4, 3, 3)
    assert calibrate_(model, model, [x]) == 1
    assert model.activation_quantizer.scale.item() == pytest.approx(x.abs().max().item() / 127, rel=1e-6)


class Detour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layer_never_reached_is_refused_and_nothing_is_calibrated() -> None:
    model = Detour()
    quantize_(model, QuantSpec(WeightSpec(), STATIC))
    with pytest.raises(
        ConfigError, match=r"calibration = \['unused'\] .* reaches every static layer. Fix: skip these layers by a rule"
    ):
        calibrate_(model, model, batches())
    with pytest.raises(ConfigError, match="call calibrate_"):
        model(batches()[0])


def test_empty_data_is_refused() -> None:
    model = first_layer(STATIC)
    with pytest.raises(ConfigError, match=r"calibration = \['0', '2'\]"):
        calibrate_(model, model, [])


def broken(_: object) -> None:
    raise RuntimeError("stop")


@pytest.mark.parametrize(
    ("forward", "error"), [(broken, RuntimeError), (None, ConfigError)], ids=["model fails", "NaN in the data"]
)
def test_failing_calibration_leaves_the_former_one(forward: Callable | None, error: type[Exception]) -> None:
    model = first_layer(STATIC)
    calibrate_(model, model, batches())
    x = torch.randn(2, 16)
    before = model(x)
    with pytest.raises(error):
        calibrate_(model, forward or model, [torch.full((1, 16), float("nan"))])
    assert torch.equal(model(x), before)


def test_rounded_static_scale_is_exact_in_bfloat16() -> None:
    model = first_layer(ActivationSpec(granularity="tensor", static=True, scale_dtype="bfloat16"))
    calibrate_(model, model, batches())
    scale = model[0].activation_quantizer.scale
    assert torch.equal(scale, scale.bfloat16().float())


@torch.no_grad()
def test_casting_a_calibrated_model_keeps_its_scale() -> None:
    model = first_layer(STATIC)
    calibrate_(model, model, batches())
    scale = model[0].activation_quantizer.scale.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model[0].activation_quantizer.scale, scale)
    assert model(batches()[0].bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_ranges_that_clip_are_narrower_and_seen_over_all_batches(method: str, symmetric: bool) -> None:
    ranges = {}
    for name in ("max_abs" if symmetric else "min_max", method):
        spec = ActivationSpec(4, "tensor", True, symmetric=symmetric, range_method=name, percentile=99.0)
        model = first_layer(spec)
        calibrate_(model, model, batches())
        ranges[name] = model[0].activation_quantizer.scale.item()
    widest, clipped = ranges.values()
    assert 0.05 * widest < clipped < 0.95 * widest


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_a_range_that_needs_all_values_is_refused_for_dynamic_inputs(method: str) -> None:
    with pytest.raises(ConfigError, match="with static: true also percentile and mse"):
        ActivationSpec(range_method=method)


@pytest.mark.parametrize("percentile", [50.0, 100.1, -3.0])
def test_an_impossible_percentile_is_refused(percentile: float) -> None:
    with pytest.raises(ConfigError, match=r"activation\.percentile"):
        ActivationSpec(granularity="tensor", static=True, range_method="percentile", percentile=percentile)
