"""Laws of QuantLinear and QuantPointwiseConv: they compute with independently quantized operands."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fraqat.nn import ActivationSpec, QuantPointwiseConv, QuantSpec, WeightSpec, quantize_, set_bits_, unquantize_
from fraqat.numerics import BlockLayout, Granularity, Grid, RangeMethod, choose_qparams, fake_quantize

FRACTIONAL = (8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4)


def quantized_linear(spec: QuantSpec, *, width: int = 16, out: int = 8, dtype: torch.dtype | None = None) -> Any:
    model = nn.Linear(width, out, dtype=dtype)
    quantize_(model, spec)
    return model


@pytest.mark.parametrize("weight_bits", FRACTIONAL)
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_layer_is_the_linear_map_of_independently_quantized_operands(
    weight_bits: float, activation_bits: float, fake_rows: Callable
) -> None:
    layer = quantized_linear(QuantSpec(WeightSpec(weight_bits), ActivationSpec(activation_bits)))
    x = torch.randn(3, 5, 16)
    expected = F.linear(
        fake_rows(x.reshape(-1, 16), activation_bits).reshape(x.shape), fake_rows(layer.weight, weight_bits), layer.bias
    )
    assert torch.equal(layer(x), expected)


def test_group_layer_is_the_linear_map_of_independently_quantized_operands(fake_rows: Callable) -> None:
    layer = quantized_linear(QuantSpec(WeightSpec(4, granularity="group", group_size=8), ActivationSpec()))
    x = torch.randn(5, 16)
    weight = fake_rows(layer.weight.reshape(-1, 8), 4).reshape(8, 16)
    assert torch.equal(layer(x), F.linear(fake_rows(x, 8), weight, layer.bias))


@pytest.mark.parametrize(("granularity", "rows"), [("tensor", (1, -1)), ("sample", (3, -1)), ("token", (-1, 16))])
def test_activation_granularity_decides_which_inputs_share_a_scale(
    granularity: str, rows: tuple[int, int], fake_rows: Callable
) -> None:
    layer = quantized_linear(QuantSpec(WeightSpec(), ActivationSpec(granularity=granularity)))
    x = torch.randn(3, 5, 16)
    expected = F.linear(fake_rows(x.reshape(rows), 8).reshape(x.shape), fake_rows(layer.weight, 4), layer.bias)
    assert torch.equal(layer(x), expected)


def test_float_inputs_are_left_alone(fake_rows: Callable) -> None:
    layer = quantized_linear(QuantSpec(WeightSpec(5.5), None))
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), F.linear(x, fake_rows(layer.weight, 5.5), layer.bias))


def test_single_vector_is_one_token(fake_rows: Callable) -> None:
    layer = quantized_linear(QuantSpec())
    x = torch.randn(16)
    assert torch.equal(layer(x), layer(x[None])[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(WeightSpec(5.5, granularity="group", group_size=4))])
def test_pointwise_convolution_equals_the_linear_layer_on_the_same_numbers(bias: bool, spec: QuantSpec) -> None:
    conv, linear = nn.Conv2d(16, 8, 1, bias=bias), nn.Linear(16, 8, bias=bias)
    linear.load_state_dict(
        {name: value.flatten(1) if value.ndim == 4 else value for name, value in conv.state_dict().items()}
    )
    x = torch.randn(3, 16, 4, 5)
    quantize_(conv, spec)
    quantize_(linear, spec)
    assert type(conv) is QuantPointwiseConv
    torch.testing.assert_close(conv(x), linear(x.movedim(1, -1)).movedim(-1, 1), rtol=1e-5, atol=1e-6)
    operands, flat = conv.quantized_operands(x), linear.quantized_operands(x.movedim(1, -1))
    assert torch.equal(operands[0], flat[0].movedim(-1, 1))
    assert torch.equal(operands[1].flatten(1), flat[1])


def test_strided_pointwise_convolution_keeps_every_second_pixel() -> None:
    conv = nn.Conv2d(16, 8, 1, stride=2)
    dense = nn.Conv2d(16, 8, 1)
    dense.load_state_dict(conv.state_dict())
    x = torch.randn(2, 16, 5, 6)
    quantize_(conv)
    quantize_(dense)
    assert conv(x).shape == (2, 8, 3, 3)
    torch.testing.assert_close(conv(x), dense(x)[:, :, ::2, ::2])


@pytest.mark.parametrize("granularity", ["token", "sample", "tensor"])
def test_pixels_that_a_stride_leaves_out_have_no_part_in_the_scale(granularity: str) -> None:
    conv, dense = nn.Conv2d(16, 8, 1, stride=2), nn.Conv2d(16, 8, 1)
    dense.load_state_dict(conv.state_dict())
    for layer in (conv, dense):
        quantize_(layer, QuantSpec(WeightSpec(), ActivationSpec(granularity=granularity)))
    x = torch.randn(2, 16, 5, 6)
    x[:, :, 1] = 1e3
    torch.testing.assert_close(conv(x), dense(x[:, :, ::2, ::2]))
    assert torch.equal(conv(x[0]), conv(x[:1])[0])


@pytest.mark.parametrize("granularity", ["token", "sample", "tensor"])
def test_image_without_a_batch_axis_is_a_batch_of_one(granularity: str) -> None:
    conv = nn.Conv2d(16, 8, 1)
    quantize_(conv, QuantSpec(WeightSpec(), ActivationSpec(granularity=granularity)))
    x = torch.randn(16, 4, 5)
    assert torch.equal(conv(x), conv(x[None])[0])


@torch.no_grad()
def test_w8a8_is_close_to_float_and_w4a8_is_not(tiny: Any, images: Tensor, sqnr_db: Callable) -> None:
    expected = tiny(images)
    quantize_(tiny)
    at_4 = sqnr_db(expected, tiny(images))
    set_bits_(tiny, 8)
    at_8 = sqnr_db(expected, tiny(images))
    assert at_8 > 30
    assert 8 < at_4 < at_8 - 10


@torch.no_grad()
def test_error_grows_as_the_width_falls(tiny: Any, images: Tensor, sqnr_db: Callable) -> None:
    expected = tiny(images)
    quantize_(tiny, QuantSpec(WeightSpec(2), None))
    ladder = []
    for bits in (16, 12, 8, 6, 4, 3, 2):
        set_bits_(tiny, bits)
        ladder.append(sqnr_db(expected, tiny(images)))
    assert ladder == sorted(ladder, reverse=True)


@torch.no_grad()
def test_wide_layer_equals_float_to_its_last_digits(tiny: Any, images: Tensor, sqnr_db: Callable) -> None:
    expected = tiny(images)
    quantize_(tiny, QuantSpec(WeightSpec(32), ActivationSpec(32)))
    assert sqnr_db(expected, tiny(images)) > 120


def test_layer_above_24_bits_has_exact_codes_and_gradient() -> None:
    layer = quantized_linear(QuantSpec(WeightSpec(30), None))
    codes, qparams = layer.weight_quantizer.codes(layer.weight)
    weight = layer.weight.detach().double()
    scale = weight.abs().amax(dim=1, keepdim=True) / (2.0**29 - 1)
    assert codes.dtype is torch.int32
    assert torch.equal(codes.double(), torch.clamp(torch.round(weight / scale), -(2.0**29), 2.0**29 - 1))
    assert torch.equal(layer.weight_quantizer(layer.weight), (codes * qparams.scale).float())
    layer(torch.randn(3, 16)).sum().backward()
    assert layer.weight.grad.dtype is torch.float32
    assert torch.count_nonzero(layer.weight.grad) == layer.weight.numel()


@pytest.mark.parametrize("bits", FRACTIONAL)
@pytest.mark.parametrize(
    "spec",
    [
        WeightSpec(),
        WeightSpec(scale_dtype="bfloat16"),
        WeightSpec(narrow=True),
        WeightSpec(symmetric=False, range_method="min_max"),
        WeightSpec(granularity="group", group_size=4),
        WeightSpec(granularity="tensor", range_method="three_sigma"),
        WeightSpec(range_method="mse"),
        WeightSpec(range_method="learned", scale_dtype="bfloat16"),
    ],
    ids=["plain", "bf16 scale", "narrow", "asymmetric", "group", "tensor three sigma", "mse", "learned"],
)
def test_levels_as_tensors_equal_the_grid_bitwise(bits: float, spec: WeightSpec) -> None:
    """A layer computes with 0-dim tensors; the numeric core with plain numbers."""
    layer = quantized_linear(QuantSpec(spec, None), width=32)
    set_bits_(layer, bits)
    grid = Grid(bits, spec.symmetric, spec.narrow)
    weight = layer.weight.detach()
    qparams = choose_qparams(weight, grid, spec.layout(), spec.range_method, scale_dtype=spec.rounding_dtype)
    value = layer.weight_quantizer(layer.weight)
    assert torch.equal(value, fake_quantize(weight, qparams, grid, spec.layout()))
    codes, own = layer.weight_quantizer.codes(layer.weight)
    assert torch.equal(own.scale, qparams.scale)
    zero = 0 if own.offset is None else own.offset
    flat = codes.reshape(8, -1, 4) if spec.group_size else codes
    assert torch.equal((flat * own.scale + zero).reshape(weight.shape), value)
    assert grid.qmin <= codes.min() <= codes.max() <= grid.qmax


def test_gradient_of_the_layer_is_the_straight_through_estimate(fake_rows: Callable) -> None:
    layer = quantized_linear(QuantSpec(WeightSpec(4), ActivationSpec(8)))
    x = torch.randn(5, 16, requires_grad=True)
    incoming = torch.randn(5, 8)
    layer(x).backward(incoming)

    weight, scale = layer.weight.detach(), layer.weight.detach().abs().amax(dim=1, keepdim=True) / 7
    weight_mask = (torch.round(weight / scale) >= -8) & (torch.round(weight / scale) <= 7)
    x_fake, weight_fake = fake_rows(x.detach(), 8), fake_rows(weight, 4)
    torch.testing.assert_close(layer.weight.grad, (incoming.T @ x_fake) * weight_mask)
    torch.testing.assert_close(x.grad, incoming @ weight_fake)
    torch.testing.assert_close(layer.bias.grad, incoming.sum(0))


def test_clipped_weights_get_no_gradient() -> None:
    """5.5 bits: the divisor 2^4.5 - 1 = 21.6 rounds to 22, one beyond the last positive code."""
    layer = quantized_linear(QuantSpec(WeightSpec(5.5), None))
    with torch.no_grad():
        layer.weight.clamp_(-0.2, 0.2)
        layer.weight[:, 0], layer.weight[:, 1] = 0.25, -0.25
    layer(torch.randn(4, 16)).sum().backward()
    assert torch.count_nonzero(layer.weight.grad[:, 0]) == 0
    assert torch.count_nonzero(layer.weight.grad[:, 1:]) == 8 * 15


def test_training_at_low_width_lowers_the_loss() -> None:
    teacher, student = nn.Linear(16, 8), nn.Linear(16, 8)
    quantize_(student, QuantSpec(WeightSpec(4), ActivationSpec()))
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        x = torch.randn(32, 16)
        loss = F.mse_loss(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.05 * sum(losses[:10])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_model_keeps_the_quantizers_in_float32(dtype: torch.dtype) -> None:
    spec = QuantSpec(WeightSpec(5.5, range_method="mse"), ActivationSpec(granularity="tensor", static=True))
    layer = quantized_linear(spec)
    layer.activation_quantizer.scale.fill_(0.0123)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    assert len(before) == 6
    layer.to(dtype)
    assert layer.weight.dtype is dtype
    for name, buffer in layer.named_buffers():
        assert buffer.dtype is torch.float32
        assert torch.equal(buffer, before[name])


@torch.no_grad()
def test_half_precision_model_computes_with_unrounded_levels(fake_rows: Callable) -> None:
    layer = quantized_linear(QuantSpec(WeightSpec(5.5), None)).to(torch.bfloat16)
    expected = fake_rows(layer.weight.float(), 5.5).bfloat16()
    assert torch.equal(layer.weight_quantizer(layer.weight), expected)


@torch.no_grad()
def test_mse_clipping_is_saved_and_loaded() -> None:
    torch.manual_seed(0)
    source = nn.Linear(64, 8)
    source.weight.copy_(torch.randn(8, 64) ** 3)
    target = nn.Linear(64, 8)
    spec = QuantSpec(WeightSpec(3, range_method="mse"), None)
    quantize_(source, spec)
    quantize_(target, spec)
    state = source.state_dict()
    assert set(state) == {"weight", "bias", "weight_quantizer.clip_ratio"}
    assert state["weight_quantizer.clip_ratio"].min() < 0.9
    assert not torch.equal(target.weight_quantizer.clip_ratio, source.weight_quantizer.clip_ratio)
    target.load_state_dict(state)
    x = torch.randn(5, 64)
    assert torch.equal(target(x), source(x))


@torch.no_grad()
def test_mse_clipping_is_kept_between_changes_of_the_width_and_searched_at_each() -> None:
    layer = nn.Linear(64, 8)
    layer.weight.copy_(torch.randn(8, 64) ** 3)
    quantize_(layer, QuantSpec(WeightSpec(2, range_method="mse"), None))
    ratio = layer.weight_quantizer.clip_ratio.clone()
    layer.weight.mul_(torch.rand(8, 64))
    layer(torch.randn(2, 64))
    assert torch.equal(layer.weight_quantizer.clip_ratio, ratio)
    set_bits_(layer, 2)
    assert torch.equal(layer.weight_quantizer.clip_ratio, ratio)
    set_bits_(layer, 8)
    at_8 = layer.weight_quantizer.clip_ratio.clone()
    assert at_8.mean() > ratio.mean() + 0.1
    fresh = choose_qparams(layer.weight, Grid(8), BlockLayout(Granularity.CHANNEL), RangeMethod.MSE)
    assert torch.equal(layer.weight_quantizer.qparams(layer.weight).scale, fresh.scale)


@torch.no_grad()
def test_nan_activation_reaches_the_output() -> None:
    layer = quantized_linear(QuantSpec())
    x = torch.randn(3, 16)
    x[1, 2] = float("nan")
    assert torch.isnan(layer(x)).all(dim=1).tolist() == [False, True, False]


@torch.no_grad()
def test_layer_works_under_autocast(sqnr_db: Callable) -> None:
    layer = quantized_linear(QuantSpec(WeightSpec(8)))
    x = torch.randn(7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        value = layer(x)
    assert value.dtype is torch.bfloat16
    assert sqnr_db(layer(x), value) > 40


@torch.no_grad()
def test_float_twin_computes_with_the_master_weight() -> None:
    layer = quantized_linear(QuantSpec())
    twin = copy.deepcopy(layer)
    unquantize_(twin)
    x = torch.randn(2, 16)
    assert torch.equal(twin(x), F.linear(x, layer.weight, layer.bias))
