"""Laws of branches whose rank decays: what leaves goes into the weight, the function stays, and a plain layer is left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fraqat.errors import ConfigError
from fraqat.nn import (
    BranchSpec,
    QuantSpec,
    RankSchedule,
    SmoothingSpec,
    WeightSpec,
    add_branches_,
    describe,
    fold_components_,
    initialize_branches_,
    quantize_,
    quantized_layers,
    remove_spent_branches_,
    set_bypassed_,
)

RANK = 6
LINEAR = RankSchedule("linear")


def fitted(method: str = "max_abs", *, smoothing: SmoothingSpec | None = None, **branch: Any) -> nn.Sequential:
    """A linear layer and a 1x1 convolution with branches of heavy-tailed weights, moved a little as training moves them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.Unflatten(1, (24, 1, 1)), nn.Conv2d(24, 16, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(parameter.abs().mul(20).square())
    quantize_(model, QuantSpec(WeightSpec(range_method=method)))
    add_branches_(model, BranchSpec(**{"rank": RANK, "rank_schedule": LINEAR, **branch}), smoothing)
    initialize_branches_(model, model, [torch.randn(64, 32)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.abs().mean() * torch.randn_like(parameter))
    return model


def layers(model: nn.Module) -> list[Any]:
    return [layer for _, layer in quantized_layers(model)]


def weights(model: nn.Module) -> list[Tensor]:
    """The matrices that the layers in floating point multiply by."""
    return [layer.effective_weight(layer.weight).detach().clone() for layer in layers(model)]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("total", "until"), [(200, 0.6), (7, 0.3), (50, 1.0), (2, 0.9)])
def test_the_rank_falls_to_zero_before_the_last_step(kind: Any, total: int, until: float) -> None:
    ranks = [RankSchedule(kind, until).rank_at(16, step, total) for step in range(total)]
    assert ranks[0] == 16 and ranks[-1] == 0
    assert ranks == sorted(ranks, reverse=True)
    assert all(rank == 0 for step, rank in enumerate(ranks) if step >= until * total)
    if total == 200:
        assert set(ranks) == set(range(17)) and min(ranks[:119]) > 0
        assert ranks[60] == 8  # half of the way, both kinds


def test_a_constant_rank_stays() -> None:
    assert [RankSchedule().rank_at(16, step, 10) for step in range(10)] == [16] * 10
    branch = fitted(rank_schedule=RankSchedule())[0].branch
    assert branch.active is None and set(branch.state_dict()) == {"up", "down"}


@pytest.mark.parametrize("smoothing", [None, SmoothingSpec()], ids=["plain", "smoothed"])
@pytest.mark.parametrize("branch", [{}, {"start": "error", "iterations": 3}, {"dtype": "float32"}], ids=str)
def test_folding_leaves_the_function_in_floating_point(smoothing: SmoothingSpec | None, branch: dict[str, Any]) -> None:
    model, x = fitted(smoothing=smoothing, **branch), torch.randn(8, 32)
    set_bypassed_(layers(model), weights=True, inputs=True)
    with torch.no_grad():
        wanted, before = model(x), weights(model)
        for num_left, num_leaving in ((4, 2), (3, 1), (0, 3)):
            assert [fold_components_(layer, num_left) for layer in layers(model)] == [num_leaving] * 2
            for now, then in zip(weights(model), before, strict=True):
                assert torch.allclose(now, then, rtol=0, atol=1e-6 * float(then.abs().max()))
            tolerance = 1e-5 if branch.get("dtype") == "float32" else 0.02  # the branch's own product is in bfloat16
            assert torch.allclose(model(x), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
    assert [fold_components_(layer, 0) for layer in layers(model)] == [0, 0]


def test_the_components_of_least_singular_value_leave_first() -> None:
    layer = layers(fitted())[0]
    up, down = (matrix.detach().bfloat16().double() for matrix in (layer.branch.up, layer.branch.down))
    values = [float(torch.linalg.svdvals(up[:, i : i + 1] @ down[i : i + 1])[0]) for i in range(RANK)]
    order = sorted(range(RANK), key=lambda i: values[i])
    for num_gone in range(1, RANK + 1):
        fold_components_(layer, RANK - num_gone)
        assert sorted(torch.nonzero(~layer.branch.active).flatten().tolist()) == sorted(order[:num_gone])


def test_a_component_that_has_left_is_inert() -> None:
    model, x = fitted(), torch.randn(8, 32)
    layer = layers(model)[0]
    fold_components_(layer, 2)
    gone = ~layer.branch.active
    before = model(x).detach()
    model(x).square().sum().backward()
    assert not layer.branch.up.grad[:, gone].any() and not layer.branch.down.grad[gone].any()
    assert layer.branch.up.grad[:, ~gone].any() and layer.branch.down.grad[~gone].any()
    with torch.no_grad():
        layer.branch.up[:, gone] += 1.0
        layer.branch.down[gone] -= 1.0
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("method", ["max_abs", "mse", "learned"])
def test_a_plain_quantized_model_is_left(method: str) -> None:
    model, x = fitted(method), torch.randn(8, 32)
    assert remove_spent_branches_(model) == 0
    for layer in layers(model):
        fold_components_(layer, 0)
    inert = model(x)
    assert remove_spent_branches_(model) == 2 and remove_spent_branches_(model) == 0
    assert torch.equal(model(x), inert)
    plain = nn.Sequential(nn.Linear(32, 24), nn.Unflatten(1, (24, 1, 1)), nn.Conv2d(24, 16, 1))
    quantize_(plain, QuantSpec(WeightSpec(range_method=method)))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), inert) and "rank" not in str(describe(model))


def test_a_learned_scale_keeps_its_factor_of_mse_clipping() -> None:
    model = fitted("learned")
    fresh = copy.deepcopy(model)
    for layer in layers(fresh):  # nothing learned: exactly the scale of the new weight
        layer.weight_quantizer.scale.data.copy_(layer.weight_quantizer._searched_scale(layer.weight))
    for layer, untrained in zip(layers(model), layers(fresh), strict=True):
        before = layer.weight_quantizer.scale / layer.weight_quantizer._searched_scale(layer.weight)
        fold_components_(layer, 1)
        fold_components_(untrained, 1)
        searched = layer.weight_quantizer._searched_scale(layer.weight)
        assert torch.allclose(layer.weight_quantizer.scale / searched, before, rtol=1e-6)
        assert torch.equal(untrained.weight_quantizer.scale, searched)


def test_mse_clipping_is_searched_again() -> None:
    layer = layers(fitted("mse"))[0]
    before = layer.weight_quantizer.clip_ratio.clone()
    fold_components_(layer, 0)
    found = layer.weight_quantizer.clip_ratio.clone()
    layer.weight_quantizer.refresh_(layer.weight)
    assert torch.equal(layer.weight_quantizer.clip_ratio, found) and not torch.equal(found, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RankSchedule("exponential"), "rank_schedule.kind = 'exponential' .* constant, linear, cosine"),
        (lambda: RankSchedule("linear", 0.0), "rank_schedule.until = 0.0 .* more than 0, at most 1"),
        (lambda: RankSchedule("linear", 1.5), "rank_schedule.until = 1.5"),
        (lambda: BranchSpec(0, rank_schedule=LINEAR), "rank_schedule.kind = 'linear' .* constant with branch.rank: 0"),
    ],
)
def test_impossible_schedules_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
