"""Laws of low-rank training: the same gradients on both paths, a plain model at the end, nothing dense that trains."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fraqat.errors import ConfigError
from fraqat.nn import (
    IntegerLayers,
    LowRankSpec,
    QuantSpec,
    WeightSpec,
    add_adapters_,
    merge_adapters_,
    quantize_,
    quantized_layers,
    set_bits_,
)

X = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1))


def new_model(bits: float = 4.0, rank: int = 4, *, trained: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16))
    quantize_(model)
    add_adapters_(model, LowRankSpec(rank))
    if trained:
        with torch.no_grad():
            for _, layer in quantized_layers(model):
                layer.adapter.up.normal_(0, 0.05)
    set_bits_(model, bits)
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bits", [4.0, 4.5, 8.0])
def test_integer_path_gives_the_gradients_of_the_floating_point_path(bits: float) -> None:
    floating, integer = new_model(bits), new_model(bits)
    IntegerLayers(integer)
    torch.testing.assert_close(integer(X), floating(X), rtol=1e-5, atol=1e-6)
    expected, found = gradients(floating, X), gradients(integer, X)
    assert expected.keys() == found.keys() == {f"{i}.adapter.{part}" for i in (0, 2) for part in ("up", "down")}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_an_untrained_adapter_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16))
    quantize_(plain)
    assert torch.equal(new_model(trained=False)(X), plain(X))


@pytest.mark.parametrize("has_integers", [False, True])
def test_merging_changes_no_code_and_leaves_a_plain_model(has_integers: bool) -> None:
    model = new_model().bfloat16() if has_integers else new_model()
    before = {name: layer.weight_quantizer.codes(layer.master_weight())[0] for name, layer in quantized_layers(model)}
    assert merge_adapters_(model) == 2
    for name, layer in quantized_layers(model):
        assert torch.equal(layer.weight_quantizer.codes(layer.weight)[0], before[name])
    assert not [name for name in model.state_dict() if "adapter" in name]


def test_only_adapters_train_and_their_loss_falls() -> None:
    model, target = new_model(trained=False), X @ torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
    integers = IntegerLayers(model)
    frozen = copy.deepcopy({n: p for n, p in model.named_parameters() if not p.requires_grad})
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(X) - target).square().mean()
        loss.backward()
        integers.finish_gradients_()
        optimizer.step()
        integers.refresh_()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    for name, parameter in frozen.items():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_a_rank_never_exceeds_the_layer() -> None:
    shapes = {tuple(layer.adapter.down.shape) for _, layer in quantized_layers(new_model(rank=1000))}
    assert shapes == {(24, 24), (16, 40)}


@pytest.mark.parametrize("rank", [0, -1])
def test_an_impossible_rank_is_named(rank: int) -> None:
    with pytest.raises(ConfigError, match=r"low_rank.rank = .* 1 or more"):
        LowRankSpec(rank)


def test_learned_scales_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    quantize_(model, QuantSpec(WeightSpec(range_method="learned")))
    with pytest.raises(ConfigError, match="learned"):
        add_adapters_(model)


def test_a_model_without_a_trained_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    quantize_(model)
    with pytest.raises(ConfigError, match="low_rank"):
        add_adapters_(model)
