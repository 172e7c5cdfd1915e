"""Laws of learned scales in layers: where they start, what trains them, what keeps them, and what a change of width does."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fraqat.errors import ConfigError
from fraqat.nn import (
    ActivationSpec,
    EngineSpec,
    IntegerLayers,
    LayerRule,
    QuantSpec,
    WeightSpec,
    describe,
    quantize_,
    quantized_layers,
    scale_parameters,
    set_bits_,
    unquantize_,
)
from fraqat.numerics import MIN_SCALE, RangeMethod, choose_qparams, fake_quantize

LEARNED = QuantSpec(WeightSpec(range_method="learned"))
MSE = QuantSpec(WeightSpec(range_method="mse"))
WEIGHTS = {
    "channel": WeightSpec(range_method="learned"),
    "channel, 4.5 bits": WeightSpec(4.5, range_method="learned"),
    "channel, bf16 scale": WeightSpec(range_method="learned", scale_dtype="bfloat16"),
    "tensor, 3 bits": WeightSpec(3, granularity="tensor", range_method="learned"),
    "narrow": WeightSpec(narrow=True, range_method="learned"),
}


def linear(spec: QuantSpec = LEARNED, *, width: int = 16, out: int = 8) -> Any:
    model = nn.Linear(width, out)
    quantize_(model, spec)
    return model


def shift_scales_(model: nn.Module) -> None:
    """As if they had been trained."""
    with torch.no_grad():
        for scale in scale_parameters(model):
            scale.mul_(0.6 + 0.5 * torch.rand_like(scale))


# --- where they live


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [{}, {"granularity": "tensor"}, {"granularity": "group", "group_size": 4}])
def test_scales_start_as_those_of_mse_clipping(tiny: Any, images: Tensor, scale_dtype: str, layout: dict) -> None:
    twin = copy.deepcopy(tiny)
    quantize_(tiny, QuantSpec(WeightSpec(range_method="learned", scale_dtype=scale_dtype, **layout)))
    quantize_(twin, QuantSpec(WeightSpec(range_method="mse", scale_dtype=scale_dtype, **layout)))
    assert torch.equal(tiny(images), twin(images))
    for (_, layer), (_, other) in zip(quantized_layers(tiny), quantized_layers(twin), strict=True):
        scale = layer.weight_quantizer.scale
        assert torch.equal(scale, other.weight_quantizer.qparams(other.weight).scale)
        assert (scale.dtype, scale.shape) == (
            torch.float32,
            layer.weight_quantizer.layout.scale_shape(tuple(layer.weight.shape)),
        )


def test_scales_are_saved_and_loaded(tiny: Any, images: Tensor, twin_names: tuple[str, ...]) -> None:
    twin = copy.deepcopy(tiny)
    before = list(tiny.state_dict())
    quantize_(tiny, LEARNED)
    shift_scales_(tiny)
    state = tiny.state_dict()
    assert set(state) - set(before) == {f"{name}.weight_quantizer.scale" for name in twin_names}
    quantize_(twin, LEARNED)
    assert not torch.equal(twin(images), tiny(images))
    twin.load_state_dict(state)
    assert torch.equal(twin(images), tiny(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_model_keeps_scales_and_their_gradients(tiny: Any, dtype: torch.dtype) -> None:
    quantize_(tiny, LEARNED)
    scales = scale_parameters(tiny)
    for scale in scales:
        scale.grad = torch.rand_like(scale)
    values = [(scale.detach().clone(), scale.grad.clone()) for scale in scales]
    tiny.to(dtype)
    assert tiny.proj_out.weight.dtype is dtype
    for scale, moved, (value, grad) in zip(scales, scale_parameters(tiny), values, strict=True):
        assert moved is scale
        assert scale.dtype is scale.grad.dtype is torch.float32
        assert torch.equal(scale, value)
        assert torch.equal(scale.grad, grad)


def test_scales_follow_the_device(tiny: Any) -> None:
    quantize_(tiny, LEARNED)
    tiny.to("meta")
    assert all(scale.is_meta for scale in scale_parameters(tiny))
    with torch.device("meta"):
        model = nn.Linear(8, 4)
    quantize_(model, LEARNED)
    set_bits_(model, 8)
    assert [tuple(scale.shape) for scale in scale_parameters(model)] == [(4, 1)]


def test_scale_parameters_are_those_of_the_layers_that_learn_them(tiny: Any, twin_names: tuple[str, ...]) -> None:
    quantize_(tiny, rules=[LayerRule("*.ff.*", spec=LEARNED)])
    learned = [name for name, layer in quantized_layers(tiny) if layer.spec == LEARNED]
    assert [id(s) for s in scale_parameters(tiny)] == [
        id(tiny.get_submodule(name).weight_quantizer.scale) for name in learned
    ]
    assert 0 < len(learned) < len(twin_names)
    assert scale_parameters(nn.Linear(3, 3)) == []


def test_report_counts_no_scales(tiny: Any) -> None:
    before = describe(tiny)
    report = quantize_(tiny, LEARNED)
    assert report.num_model_parameters == before.num_model_parameters
    assert [row.num_parameters for row in report.rows] == [row.num_parameters for row in before.rows]


def test_unquantize_removes_the_scales(tiny: Any, photograph: Callable) -> None:
    before = photograph(tiny)
    quantize_(tiny, LEARNED)
    unquantize_(tiny)
    assert photograph(tiny) == before
    assert scale_parameters(tiny) == []


# --- what trains


def test_scale_is_trained_where_the_weight_is(tiny: Any) -> None:
    tiny.transformer_blocks[1].attn1.to_k.weight.requires_grad_(False)
    quantize_(tiny, LEARNED, train="Attn", rules=[LayerRule("*.0.attn1.to_q", trainable=False)])
    trained = {name: layer.weight_quantizer.scale.requires_grad for name, layer in quantized_layers(tiny)}
    frozen = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_k")
    assert trained == {name: ".attn1." in name and name not in frozen for name in trained}
    assert any(trained.values())


@pytest.mark.parametrize("spec", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_integer_path_gives_the_gradients_of_the_floating_point_path(spec: WeightSpec) -> None:
    """Over several micro-batches, with clipped weights; an unbatched image takes the floating-point path in between."""
    model = nn.Sequential(nn.Linear(24, 16), nn.Unflatten(-1, (16, 1, 1)), nn.Conv2d(16, 8, 1))
    quantize_(model, QuantSpec(spec, ActivationSpec()))
    shift_scales_(model)
    reference = copy.deepcopy(model)
    integers = IntegerLayers(model, EngineSpec("float32"))
    assert integers.num_layers == 2
    batches = [torch.randn(5, 24), torch.randn(3, 24), torch.randn(24), torch.randn(7, 24)]
    for batch in batches:
        for run in (model, reference):
            run(batch).square().sum().backward()
    assert all(scale.grad is None for scale in scale_parameters(model)), "deferred until the end of the step"
    integers.finish_gradients_()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-6, atol=2e-6 * theirs.grad.abs().max().item())
    weight = model[0].weight
    assert 0 < torch.count_nonzero(weight.grad) < weight.numel()
    assert all(torch.count_nonzero(scale.grad) for scale in scale_parameters(model))


def test_gradient_of_a_loss_term_on_the_scale_itself_is_kept() -> None:
    model = linear()
    integers = IntegerLayers(model, EngineSpec("float32"))
    (scale,) = scale_parameters(model)
    model(torch.randn(4, 16)).sum().backward()
    integers.finish_gradients_()
    alone = scale.grad.clone()
    model.zero_grad()
    (model(torch.zeros(4, 16)).sum() + 3 * scale.sum()).backward()
    integers.finish_gradients_()
    assert torch.equal(scale.grad, torch.full_like(scale, 3.0))
    assert torch.count_nonzero(alone)


def test_released_layers_give_their_gradients_at_once_again() -> None:
    model = linear()
    integers = IntegerLayers(model, EngineSpec("float32"))
    integers.release_()
    model(torch.randn(4, 16)).sum().backward()
    assert torch.count_nonzero(scale_parameters(model)[0].grad)


def test_scale_trained_without_its_weight_takes_the_floating_point_path() -> None:
    model = linear()
    model.weight.requires_grad_(False)
    integers = IntegerLayers(model, EngineSpec("float32"))
    assert model.integer is None
    model(torch.randn(4, 16)).sum().backward()
    integers.finish_gradients_()
    assert torch.count_nonzero(scale_parameters(model)[0].grad)
    scale_parameters(model)[0].requires_grad_(False)
    integers.refresh_()
    assert model.integer is not None


@pytest.mark.parametrize("spec", [LEARNED, QuantSpec(WeightSpec(4.5))], ids=["learned", "clipped"])
def test_shared_weight_takes_the_floating_point_path(spec: QuantSpec) -> None:
    """Its gradient is the sum over its users, from which no layer's own can be had."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.body(self.body(self.embed(tokens))))

    model = Tied()
    quantize_(model, spec)
    reference = copy.deepcopy(model)
    integers = IntegerLayers(model, EngineSpec("float32"))
    assert integers.reasons == {"head": "shared weights"}
    assert integers.num_layers == 1
    for run in (model, reference):
        run(torch.arange(20)).square().sum().backward()
    integers.finish_gradients_()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5 * theirs.grad.abs().max().item())


def test_training_finds_good_scales_again() -> None:
    teacher = nn.Linear(64, 16)
    nn.init.normal_(teacher.weight)
    model = copy.deepcopy(teacher)
    quantize_(model, QuantSpec(WeightSpec(3, range_method="learned"), ActivationSpec()))
    integers = IntegerLayers(model, EngineSpec("float32"))
    scales = scale_parameters(model)
    x = torch.randn(256, 64)
    with torch.no_grad():
        start = (model(x) - teacher(x)).square().mean().item()
        scales[0].mul_(1.7)
    integers.refresh_()
    ids = {id(scale) for scale in scales}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in ids], "lr": 0.0},
        {"params": scales, "lr": 1e-2, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - teacher(x)).square().mean()
        loss.backward()
        integers.finish_gradients_()
        optimizer.step()
        integers.refresh_()
        losses.append(loss.item())
    assert losses[0] > 1.5 * start
    assert losses[-1] < 1.15 * start
    assert torch.equal(model.weight, teacher.weight)


# --- width


def test_width_without_training_is_that_of_mse_clipping(tiny: Any, images: Tensor) -> None:
    twin = copy.deepcopy(tiny)
    quantize_(tiny, LEARNED)
    quantize_(twin, MSE)
    for bits in (8, 5.5, 16, 4):
        set_bits_(tiny, bits)
        set_bits_(twin, bits)
        assert torch.equal(tiny(images), twin(images))


def test_change_of_width_keeps_what_was_learned_as_a_factor() -> None:
    layer = linear()
    set_bits_(layer, 8)
    (scale,) = scale_parameters(layer)
    factor = 0.7 + 0.6 * torch.rand_like(scale)
    with torch.no_grad():
        scale.mul_(factor)
    set_bits_(layer, 4)
    grid, layout = layer.weight_quantizer.grid, layer.weight_quantizer.layout
    searched = choose_qparams(layer.weight.detach(), grid, layout, RangeMethod.MSE).scale
    torch.testing.assert_close(scale.detach(), factor * searched, rtol=1e-6, atol=0)
    assert scale_parameters(layer)[0] is scale, "the optimizer holds this parameter"


def test_rows_of_zeros_survive_a_change_of_width() -> None:
    layer = linear()
    with torch.no_grad():
        layer.weight[2] = 0
    (scale,) = scale_parameters(layer)
    set_bits_(layer, 8)
    set_bits_(layer, 4)
    assert torch.isfinite(scale).all()
    assert torch.count_nonzero(layer.weight_quantizer(layer.weight)[2]) == 0


def test_negative_scale_is_used_as_the_smallest() -> None:
    layer = linear()
    (scale,) = scale_parameters(layer)
    with torch.no_grad():
        scale[0] = -1.0
    assert layer.weight_quantizer.qparams(layer.weight).scale[0] == MIN_SCALE
    layer(torch.randn(3, 16)).square().sum().backward()
    assert torch.isfinite(scale.grad).all()


@pytest.mark.parametrize("bits", [8, 12, 30])
def test_wide_layer_has_exact_codes(bits: float) -> None:
    layer = linear(QuantSpec(WeightSpec(bits, range_method="learned"), None))
    codes, qparams = layer.weight_quantizer.codes(layer.weight)
    value = (codes.to(qparams.scale.dtype) * qparams.scale).float()
    assert torch.equal(layer.weight_quantizer(layer.weight), value)
    grid, layout = layer.weight_quantizer.grid, layer.weight_quantizer.layout
    assert torch.equal(value, fake_quantize(layer.weight.detach(), qparams, grid, layout))
    layer(torch.randn(3, 16)).sum().backward()
    assert torch.isfinite(scale_parameters(layer)[0].grad).all()


# --- refusals


def test_learned_needs_a_symmetric_grid() -> None:
    with pytest.raises(ConfigError, match=r"weight.range_method = 'learned' .* symmetric grids. Fix: set symmetric"):
        WeightSpec(symmetric=False, range_method="learned")


def test_learned_is_refused_for_activations() -> None:
    with pytest.raises(ConfigError, match=r"activation.range_method = 'learned' .* max_abs, min_max, three_sigma"):
        ActivationSpec(range_method="learned")
