"""Laws of smoothing and low-rank branches: the same product, a smaller error, one state dict, both paths alike."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fraqat.errors import ConfigError
from fraqat.nn import (
    ActivationSpec,
    BranchSpec,
    IntegerLayers,
    LayerRule,
    QuantSpec,
    SmoothingSpec,
    WeightSpec,
    add_adapters_,
    add_branches_,
    calibrate_,
    describe,
    initialize_branches_,
    quantize_,
    quantized_layers,
    set_bits_,
    unquantize_,
)
from fraqat.nn.branch import low_rank_factors
from fraqat.nn.smoothing import ChannelMaximum, smoothing_factors
from fraqat.nn.swap import set_bypassed_

W4A8, W4A16 = QuantSpec(), QuantSpec(activation=None)
STATIC = QuantSpec(activation=ActivationSpec(granularity="tensor", static=True))
SVDQUANT = (BranchSpec(8), SmoothingSpec())
DITAS = (BranchSpec(8, start="error", iterations=10), SmoothingSpec(momentum=0.9))


class Model(nn.Module):
    """A linear layer and a strided 1x1 convolution with heavy-tailed weights: [N, 16, 32] -> [N, 24, 2, 2]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(32, 48)
        self.conv = nn.Conv2d(48, 24, 1, stride=2)
        with torch.no_grad():
            for layer in (self.linear, self.conv):
                normal = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.copy_(0.02 * normal * normal.abs().square())
                layer.bias.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(self.linear(x))
        return self.conv(y.transpose(1, 2).unflatten(2, (4, 4)))


def batches(num: int = 3) -> list[Tensor]:
    """Inputs whose channels differ by a factor of 100."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 16, 32, generator=generator) * torch.logspace(-1, 1, 32) for _ in range(num)]


def new_model(
    spec: QuantSpec = W4A8, branch: BranchSpec | None = None, smoothing: SmoothingSpec | None = None
) -> Model:
    model = Model()
    quantize_(model, spec)
    add_branches_(model, branch, smoothing)
    return model


def fitted_model(spec: QuantSpec, branch: BranchSpec | None, smoothing: SmoothingSpec | None) -> Model:
    model = new_model(spec, branch, smoothing)
    initialize_branches_(model, model, batches())
    calibrate_(model, model, batches())
    return model


def sqnr_db(wanted: Tensor, found: Tensor) -> float:
    return 10 * math.log10(float(wanted.square().sum() / (wanted - found).square().sum()))


def test_structure_alone_changes_nothing() -> None:
    x = batches()[0]
    assert torch.equal(new_model(W4A8, *SVDQUANT)(x), new_model()(x))


def test_without_quantization_the_product_is_the_original_one() -> None:
    model = fitted_model(W4A8, BranchSpec(8, dtype="float32"), SmoothingSpec())
    set_bypassed_([layer for _, layer in quantized_layers(model)], weights=True, inputs=True)
    torch.testing.assert_close(model(batches()[0]), Model()(batches()[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("branch", "smoothing"), [SVDQUANT, DITAS, (None, SmoothingSpec()), (BranchSpec(4), None)])
def test_the_effective_weight_is_the_original_one(branch: BranchSpec | None, smoothing: SmoothingSpec | None) -> None:
    model, original = fitted_model(W4A8, branch, smoothing), Model()
    for name, layer in quantized_layers(model):
        torch.testing.assert_close(layer.effective_weight(layer.weight), original.get_submodule(name).weight)
    unquantize_(model)
    torch.testing.assert_close(model(batches()[0]), original(batches()[0]), rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == original.state_dict().keys()


@pytest.mark.parametrize("spec", [W4A8, W4A16, STATIC], ids=["W4A8", "W4A16", "static"])
@pytest.mark.parametrize(("branch", "smoothing"), [SVDQUANT, DITAS], ids=["SVDQuant", "DiTAS"])
def test_heavy_tails_lose_less_than_when_quantized_plainly(
    spec: QuantSpec, branch: BranchSpec, smoothing: SmoothingSpec
) -> None:
    plain, model, x = new_model(spec), fitted_model(spec, branch, smoothing), batches(4)[3]
    calibrate_(plain, plain, batches())
    wanted, found, plainly = (each(x).detach() for each in (Model(), model, plain))
    assert sqnr_db(wanted, found) > sqnr_db(wanted, plainly) + 3


def test_smoothing_and_branch_each_lower_the_error_of_every_layer() -> None:
    for branch, smoothing in ((BranchSpec(8), None), (None, SmoothingSpec())):
        model = new_model(W4A8, branch, smoothing)
        fits = initialize_branches_(model, model, batches())
        assert fits.keys() == {"linear", "conv"}
        assert all(fit.sqnr_db > fit.plain_sqnr_db + 0.5 for fit in fits.values())


def test_the_exponent_with_the_least_error_is_taken() -> None:
    grid, found = (0.2, 0.5, 0.8), {}
    for exponents in (grid, *((value,) for value in grid)):
        model = new_model(W4A8, BranchSpec(4), SmoothingSpec(exponents, includes_none=False))
        found[exponents] = initialize_branches_(model, model, batches())
    for name in ("linear", "conv"):
        singles = {value: found[(value,)][name].sqnr_db for value in grid}
        assert found[grid][name].sqnr_db == max(singles.values())
        assert found[grid][name].exponents[0] == max(singles, key=lambda value: singles[value])


def test_candidates_are_the_grid_no_smoothing_and_on_request_the_input_alone() -> None:
    spec = SmoothingSpec((0.0, 0.3), activation_only=True)
    assert spec.candidates() == ((0.0, 0.0), (0.3, 0.0), (0.0, 1.0), (0.3, 0.7))
    assert len(SmoothingSpec().candidates()) == 20


def test_factors_are_svdquants_and_one_where_a_channel_is_zero() -> None:
    x_max, w_max = torch.tensor([4.0, 0.0, 9.0, 16.0]), torch.tensor([1.0, 2.0, 0.0, 0.25])
    torch.testing.assert_close(smoothing_factors(x_max, w_max, (0.5, 0.5)), torch.tensor([2.0, 1.0, 1.0, 8.0]))
    assert torch.equal(smoothing_factors(x_max, w_max, (0.0, 0.0)), torch.ones(4))


def test_maxima_are_of_everything_or_an_average_over_the_samples_in_order() -> None:
    whole, averaged = ChannelMaximum(None), ChannelMaximum(0.75)
    for x in (torch.tensor([[1.0, -8.0], [-2.0, 0.0]]), torch.tensor([[6.0, 4.0]])):
        whole.update(x)
        averaged.update(x)
    assert whole.value_K is not None and whole.value_K.tolist() == [6.0, 8.0]
    assert averaged.value_K is not None and averaged.value_K.tolist() == [3.0, 7.0]


def test_an_average_forgets_the_first_steps() -> None:
    order = batches()
    order[0] = order[0] * torch.linspace(1, 50, 32)
    scales = []
    for inputs in (order, order[::-1]):
        model = new_model(W4A8, None, SmoothingSpec((0.5,), includes_none=False, momentum=0.3))
        initialize_branches_(model, model, inputs)
        scales.append(model.linear.smoothing.scale)
    assert not torch.allclose(scales[0], scales[1])


@pytest.mark.parametrize("exact", [True, False])
def test_factors_are_the_nearest_matrix_of_their_rank(exact: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 320, generator=generator) * torch.logspace(0, -3, 320)
    state = torch.get_rng_state()
    up, down = low_rank_factors(weight, 12, exact=exact)
    assert torch.equal(torch.get_rng_state(), state)
    least = torch.linalg.svdvals(weight.double())[12:].square().sum().sqrt()
    assert float((weight - up @ down).norm()) <= (1 + 1e-5 if exact else 1.02) * float(least)


@pytest.mark.parametrize("start", ["weight", "error"])
def test_more_iterations_never_lose_more(start: str) -> None:
    fits = []
    for iterations in (1, 10):
        model = new_model(W4A16, BranchSpec(8, start=start, iterations=iterations), SmoothingSpec((0.5,)))
        fits.append(initialize_branches_(model, model, batches()))
    assert all(fits[1][name].sqnr_db >= fits[0][name].sqnr_db for name in fits[0])
    assert any(fits[1][name].sqnr_db > fits[0][name].sqnr_db for name in fits[0])


@pytest.mark.parametrize("spec", [W4A8, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("bits", [4.0, 8.0])
def test_integer_path_gives_outputs_and_gradients_of_the_floating_point_path(spec: QuantSpec, bits: float) -> None:
    floating = fitted_model(spec, *SVDQUANT)
    set_bits_(floating, bits)
    integer, x = copy.deepcopy(floating), batches()[0]
    integers = IntegerLayers(integer)
    assert integers.num_layers == 2
    # The second layer's input may fall on the other side of a rounding: it is compared on the same input.
    for name, given in (("linear", x), ("conv", nn.functional.gelu(floating.linear(x)).detach().transpose(1, 2))):
        given = given if name == "linear" else given.unflatten(2, (4, 4))
        layers = [model.get_submodule(name) for model in (floating, integer)]
        inputs = [given.clone().requires_grad_() for _ in layers]
        outputs = [layer(value) for layer, value in zip(layers, inputs, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        for output in outputs:
            output.square().sum().backward()
        pairs = [(value.grad for value in inputs)]
        pairs += [(layer.get_parameter(part).grad for layer in layers) for part in ("branch.up", "branch.down", "bias")]
        for expected, found in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    integers.finish_gradients_()
    for name in ("linear", "conv"):
        expected, found = (m.get_submodule(name).weight.grad for m in (floating, integer))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["max_abs", "mse", "learned"])
def test_state_dict_round_trip(method: str) -> None:
    spec = QuantSpec(WeightSpec(range_method=method), STATIC.activation)
    model, other, x = fitted_model(spec, *SVDQUANT), new_model(spec, *SVDQUANT), batches()[0]
    plain = {name for name in model.state_dict() if "branch" not in name and "smoothing" not in name}
    assert plain == new_model(spec).state_dict().keys()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_learned_scales_and_clipping_belong_to_the_residual() -> None:
    for method, name in (("learned", "scale"), ("mse", "clip_ratio")):
        spec = QuantSpec(WeightSpec(range_method=method))
        model = fitted_model(spec, *SVDQUANT)
        alone = Model()
        with torch.no_grad():
            alone.linear.weight.copy_(model.linear.weight)
        quantize_(alone, spec)
        mine, theirs = (getattr(m.linear.weight_quantizer, name) for m in (model, alone))
        assert torch.equal(mine, theirs)


def test_static_ranges_are_those_of_smoothed_inputs() -> None:
    model = fitted_model(STATIC, *SVDQUANT)
    largest = max(float(model.linear.smoothed(x).detach().abs().max()) for x in batches())
    assert float(model.linear.activation_quantizer.scale) == pytest.approx(largest / 127, rel=1e-6)


def test_the_same_data_gives_the_same_bits() -> None:
    first, second = (fitted_model(W4A8, BranchSpec(2), SmoothingSpec((0.3, 0.6))) for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_setting_twice_is_setting_once() -> None:
    model, x = (
        fitted_model(W4A8, BranchSpec(8, dtype="float32"), SmoothingSpec((0.5,), includes_none=False)),
        batches()[0],
    )
    before = model(x)
    initialize_branches_(model, model, batches())
    assert sqnr_db(before.detach(), model(x).detach()) > 30


def test_a_cast_model_keeps_its_factors_in_float32() -> None:
    model = fitted_model(W4A8, *SVDQUANT)
    before = model.linear.smoothing.scale.clone()
    model.bfloat16()
    assert model.linear.smoothing.scale.dtype == torch.float32 and torch.equal(model.linear.smoothing.scale, before)
    assert model(batches()[0].bfloat16()).dtype == torch.bfloat16


def test_autocast_changes_the_output_by_rounding_alone() -> None:
    model, x = fitted_model(W4A8, *SVDQUANT), batches()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert sqnr_db(model(x).detach(), y.detach().float()) > 20


def test_an_unbatched_input_gives_one_sample_of_the_batch() -> None:
    model = fitted_model(W4A8, *SVDQUANT)
    x = torch.randn(2, 48, 4, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.conv(x[1]), model.conv(x)[1])


def test_gradients_reach_both_branches_and_not_the_factors() -> None:
    model = fitted_model(W4A8, *SVDQUANT)
    model(batches()[0]).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
    assert "linear.smoothing.scale" in dict(model.named_buffers())


def test_a_frozen_layer_has_a_frozen_branch() -> None:
    model = Model()
    quantize_(model, rules=(LayerRule(pattern="conv", trainable=False),))
    add_branches_(model, *SVDQUANT)
    assert model.linear.branch.up.requires_grad and not model.conv.branch.up.requires_grad


def test_a_rank_never_exceeds_the_layer_and_none_leaves_the_branch_out() -> None:
    assert new_model(W4A8, BranchSpec(1000)).conv.branch.up.shape == (24, 24)
    model = new_model(W4A8, BranchSpec(0))
    assert model.linear.branch is None and "branch" not in " ".join(model.state_dict())


def test_the_report_names_what_stands_beside_the_product() -> None:
    assert "W4A8, smoothed, rank 8" in str(describe(new_model(W4A8, *SVDQUANT)))


def test_a_model_without_branches_needs_no_data() -> None:
    model = new_model()
    assert initialize_branches_(model, model, []) == {}


def test_layers_that_the_data_never_reaches_are_named() -> None:
    model = new_model(W4A8, *SVDQUANT)
    with pytest.raises(ConfigError, match=r"calibration = \['conv'\].*skip"):
        initialize_branches_(model, lambda batch: model.linear(batch), batches())
    assert not model.linear.weight_quantizer.is_bypassed


def test_a_weight_with_another_user_is_refused() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embedding"].weight
    quantize_(model)
    with pytest.raises(ConfigError, match=r"head, whose weight another module uses too.*skip"):
        add_branches_(model, *SVDQUANT)


def test_adapters_and_branches_exclude_each_other() -> None:
    model = new_model(W4A8, *SVDQUANT)
    with pytest.raises(ConfigError, match="low_rank"):
        add_adapters_(model)
    model = new_model()
    add_adapters_(model)
    with pytest.raises(ConfigError, match="adapter"):
        add_branches_(model, *SVDQUANT)


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="call quantize_ first"):
        add_branches_(Model(), *SVDQUANT)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"rank": -1}, "branch.rank = -1"),
        ({"start": "zero"}, "branch.start = 'zero'.*weight, error"),
        ({"iterations": 0}, "branch.iterations = 0"),
        ({"dtype": "float16"}, "branch.dtype = 'float16'.*bfloat16, float32"),
    ],
)
def test_an_impossible_branch_is_named(values: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        BranchSpec(**values)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"exponents": ()}, r"smoothing.exponents = \[\]"),
        ({"exponents": (1.5,)}, r"smoothing.exponents = \[1.5\]"),
        ({"momentum": 1.0}, "smoothing.momentum = 1.0"),
        ({"num_tokens": 0}, "smoothing.num_tokens = 0"),
    ],
)
def test_an_impossible_smoothing_is_named(values: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SmoothingSpec(**values)
