"""Laws of set_bits_."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fraqat.errors import ConfigError
from fraqat.nn import LayerRule, QuantSpec, WeightSpec, quantize_, quantized_layers, set_bits_


def widths(model: nn.Module) -> dict[str, float]:
    return {name: layer.weight_quantizer.bits for name, layer in quantized_layers(model)}


def levels(model: nn.Module) -> list[list[float]]:
    return [
        [float(q.qmin), float(q.qmax), float(q.range_divisor), q.grid.qmin, q.grid.qmax]
        for q in (layer.weight_quantizer for _, layer in quantized_layers(model))
    ]


@pytest.mark.parametrize("bits", [16, 8, 5.5, 4.25, 4])
def test_model_computes_at_the_width_that_was_set(tiny: Any, images: Tensor, fake_rows: Callable, bits: float) -> None:
    quantize_(tiny)
    set_bits_(tiny, bits)
    assert set(widths(tiny).values()) == {bits}
    layer = tiny.proj_out
    assert torch.equal(layer.weight_quantizer(layer.weight), fake_rows(layer.weight, bits))
    conv = tiny.transformer_blocks[0].ff.conv_point
    assert torch.equal(conv.weight_quantizer(conv.weight).flatten(1), fake_rows(conv.weight.flatten(1), bits))


def test_levels_are_changed_in_place(tiny: Any) -> None:
    quantize_(tiny)
    before = {name: (id(buffer), buffer.data_ptr()) for name, buffer in tiny.named_buffers()}
    set_bits_(tiny, 8)
    assert {name: (id(buffer), buffer.data_ptr()) for name, buffer in tiny.named_buffers()} == before


def test_width_set_and_set_back_gives_the_same_output(tiny: Any, images: Tensor) -> None:
    quantize_(tiny, QuantSpec(WeightSpec(range_method="mse")))
    before = tiny(images)
    set_bits_(tiny, 8)
    assert not torch.equal(tiny(images), before)
    set_bits_(tiny, 4)
    assert torch.equal(tiny(images), before)


def test_layer_never_goes_below_its_own_final_width(tiny: Any, twin_names: tuple[str, ...]) -> None:
    quantize_(tiny, rules=[LayerRule("proj_out", weight_bits=8), LayerRule("*.0.attn1.*", weight_bits=6)])
    assert set_bits_(tiny, 16) == len(twin_names)
    assert set(widths(tiny).values()) == {16}
    set_bits_(tiny, 5)
    expected = {name: 6 if ".0.attn1." in name else 8 if name == "proj_out" else 5 for name in twin_names}
    assert widths(tiny) == expected
    assert set_bits_(tiny, 4) == len(twin_names) - 5
    assert {widths(tiny)[name] for name in ("proj_out",)} == {8}


def test_spec_still_names_the_final_width(tiny: Any) -> None:
    quantize_(tiny)
    set_bits_(tiny, 8)
    assert {layer.spec.weight.bits for _, layer in quantized_layers(tiny)} == {4}


def test_where_sets_exactly_the_matching_layers_to_exactly_the_width(tiny: Any, twin_names: tuple[str, ...]) -> None:
    quantize_(tiny, rules=[LayerRule("proj_out", weight_bits=8)])
    assert set_bits_(tiny, 2.5, where="proj_out") == 1
    assert widths(tiny) == {name: 2.5 if name == "proj_out" else 4 for name in twin_names}
    assert set_bits_(tiny, 3, where="*.ff.*") == 4
    assert widths(tiny) == {name: 2.5 if name == "proj_out" else 3 if ".ff." in name else 4 for name in twin_names}
    assert set_bits_(tiny, 3, where="*") == len(twin_names) - 4


def test_only_changed_layers_are_counted(tiny: Any) -> None:
    quantize_(tiny)
    assert set_bits_(tiny, 4) == 0
    assert set_bits_(tiny, 8) == 13
    assert set_bits_(tiny, 8) == 0


def test_new_mse_clipping_belongs_to_the_current_weight(tiny: Any) -> None:
    quantize_(tiny, QuantSpec(WeightSpec(4, range_method="mse")))
    ratio = tiny.proj_out.weight_quantizer.clip_ratio.clone()
    with torch.no_grad():
        tiny.proj_out.weight.pow_(3)
    set_bits_(tiny, 5)
    set_bits_(tiny, 4)
    assert not torch.equal(tiny.proj_out.weight_quantizer.clip_ratio, ratio)


def test_only_layers_of_the_lowest_final_width_go_below_it(tiny: Any) -> None:
    quantize_(tiny, QuantSpec(WeightSpec(4)), rules=[LayerRule(pattern="proj_out", weight_bits=6)])
    assert set_bits_(tiny, 3, below_final=True) == sum(1 for _ in quantized_layers(tiny)) - 1
    bits = {name: layer.weight_quantizer.bits for name, layer in quantized_layers(tiny)}
    assert bits.pop("proj_out") == 6 and set(bits.values()) == {3}
    set_bits_(tiny, 8, below_final=True)
    assert {layer.weight_quantizer.bits for _, layer in quantized_layers(tiny)} == {8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"bits": 3},
            r"bits = 3 is not possible: allowed is 4, the final width, or more. Fix: pass below_final=True or where",
        ),
        ({"bits": 33}, r"bits = 33 .* 1 < bits <= 32"),
        ({"bits": float("nan")}, r"bits = nan .* a finite number"),
        ({"bits": float("inf")}, r"bits = inf .* a finite number"),
        ({"bits": 1, "where": "*"}, r"bits = 1 .* 1 < bits <= 32"),
        ({"bits": True, "where": "*"}, r"bits = True .* a finite number"),
        ({"bits": 1.5, "where": "*"}, r"narrow = True .* at least 2 bits"),
        ({"bits": 8, "where": "proj_in"}, r"where = 'proj_in' .* names here are transformer_blocks.0.attn1.to_q"),
        ({"bits": 8, "where": "patch_embed"}, r"where = 'patch_embed' "),
    ],
)
def test_failing_call_changes_nothing(tiny: Any, photograph: Callable, arguments: dict[str, Any], message: str) -> None:
    """The narrow layer is the last one, so that all others come before the failure."""
    quantize_(tiny, rules=[LayerRule("proj_out", spec=QuantSpec(WeightSpec(6, narrow=True)))])
    set_bits_(tiny, 7)
    before, numbers, bits = photograph(tiny), levels(tiny), widths(tiny)
    with pytest.raises(ConfigError, match=message):
        set_bits_(tiny, arguments["bits"], where=arguments.get("where"))
    assert photograph(tiny) == before
    assert levels(tiny) == numbers
    assert widths(tiny) == bits


def test_float_model_is_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match=r"model = 'TinyTransformer' .* a quantized model. Fix: call quantize_ first"):
        set_bits_(tiny, 4)


def test_width_may_cross_24_bits_both_ways(tiny: Any, images: Tensor) -> None:
    quantize_(tiny)
    at_4 = tiny(images)
    set_bits_(tiny, 32)
    assert torch.allclose(tiny.proj_out.weight_quantizer(tiny.proj_out.weight), tiny.proj_out.weight, rtol=1e-7, atol=0)
    set_bits_(tiny, 4)
    assert torch.equal(tiny(images), at_4)


@pytest.mark.parametrize("method", ["max_abs", "mse", "learned"])
@pytest.mark.parametrize("bits", [4, 4.25, 5, 8])
def test_on_the_final_grid_a_width_is_a_share_of_the_error(tiny: Any, method: str, bits: float) -> None:
    quantize_(tiny, QuantSpec(WeightSpec(range_method=method)))
    layer = tiny.proj_out
    final = layer.weight_quantizer(layer.weight).detach()
    set_bits_(tiny, bits, on_final_grid=True)
    wanted = layer.weight + (final - layer.weight) * 2.0 ** (4 - bits)
    torch.testing.assert_close(layer.weight_quantizer(layer.weight), wanted)
    assert layer.weight_quantizer.is_on_grid is (bits == 4)
    set_bits_(tiny, 4, on_final_grid=True)
    assert torch.equal(layer.weight_quantizer(layer.weight), final)


def test_on_the_final_grid_gradients_are_shared_in_the_same_way(tiny: Any) -> None:
    quantize_(tiny, QuantSpec(WeightSpec(range_method="learned")))
    quantizer, weight = tiny.proj_out.weight_quantizer, tiny.proj_out.weight
    incoming = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    quantizer(weight).backward(incoming)
    final, final_scale = weight.grad.clone(), quantizer.scale.grad.clone()
    weight.grad = quantizer.scale.grad = None
    set_bits_(tiny, 5, on_final_grid=True)
    quantizer(weight).backward(incoming)
    torch.testing.assert_close(weight.grad, (incoming + final) / 2)
    torch.testing.assert_close(quantizer.scale.grad, final_scale / 2)


def test_the_same_width_on_another_grid_is_a_change(tiny: Any, twin_names: tuple[str, ...]) -> None:
    quantize_(tiny)
    assert set_bits_(tiny, 5) == len(twin_names)
    assert set_bits_(tiny, 5) == 0
    assert set_bits_(tiny, 5, on_final_grid=True) == len(twin_names)
    assert set_bits_(tiny, 5, on_final_grid=True) == 0


def test_below_the_final_width_there_is_no_share(tiny: Any) -> None:
    quantize_(tiny)
    set_bits_(tiny, 3, where="proj_out", on_final_grid=True)
    quantizer = tiny.proj_out.weight_quantizer
    assert (quantizer.bits, quantizer.grid.bits, quantizer.is_on_grid) == (3, 3, True)
