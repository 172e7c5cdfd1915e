"""Laws of the outlier statistics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fraqat.analysis import OutlierStatistics, input_outliers, tensor_outliers
from fraqat.errors import ConfigError, ModelError

N = 400_000


def draw(kind: str) -> Tensor:
    """Many values of one distribution."""
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(N, generator=generator, dtype=torch.float64)
    if kind == "normal":
        return torch.randn(N, generator=generator, dtype=torch.float64)
    if kind == "laplace":
        return -torch.sign(uniform - 0.5) * torch.log1p(-2 * (uniform - 0.5).abs())
    return uniform


@pytest.mark.parametrize(
    ("kind", "kurtosis", "tolerance"), [("normal", 3, 0.05), ("uniform", 1.8, 0.01), ("laplace", 6, 0.2)]
)
def test_kurtosis_is_that_of_the_distribution(kind: str, kurtosis: float, tolerance: float) -> None:
    assert tensor_outliers(draw(kind)).kurtosis == pytest.approx(kurtosis, abs=tolerance)


def test_share_and_percentile_of_a_normal_distribution() -> None:
    found = tensor_outliers(2.5 * draw("normal"))
    assert found.share_outside == pytest.approx(0.0027, abs=0.0003)
    assert found.percentile_abs == pytest.approx(2.5 * 3.2905, rel=0.03)
    assert found.deviation == pytest.approx(2.5, rel=0.01)
    assert found.count == N


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    shift=st.sampled_from([0.0, -3.0, 1e5]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_parts_give_what_the_whole_gives(sizes: list[int], shift: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    parts = [scale * (shift + torch.randn(n, generator=generator, dtype=torch.float64) ** 3) for n in sizes]
    whole = torch.cat(parts)
    statistics = OutlierStatistics()
    for part in parts:
        statistics.update(part)
    for part in reversed(parts):
        statistics.count_outside(part)
    found = statistics.result()
    offset = whole - whole.mean()
    variance = float(offset.square().mean())
    assert found.count == len(whole)
    assert found.mean == pytest.approx(float(whole.mean()), rel=1e-9, abs=1e-9 * scale)
    assert found.max_abs == float(whole.abs().max())
    if len(whole) > 2:
        assert found.kurtosis == pytest.approx(float(offset.pow(4).mean()) / variance**2, rel=1e-5)
        assert found.share_outside == float((offset.abs() > 3 * math.sqrt(variance)).double().mean())


def test_percentile_is_right_to_one_bin_however_large_the_largest_is() -> None:
    values = draw("laplace")
    expected = float(values.abs().kthvalue(math.ceil(0.999 * N)).values)
    with_giant = torch.cat([values, torch.tensor([1e9], dtype=torch.float64)])
    for found in (tensor_outliers(values), tensor_outliers(with_giant)):
        assert found.percentile_abs == pytest.approx(expected, rel=0.011)
    assert tensor_outliers(with_giant).max_over_percentile == pytest.approx(1e9 / expected, rel=0.011)


def test_scaling_changes_no_ratio() -> None:
    values = draw("normal")[:10_000]
    small, large = tensor_outliers(values / 1024), tensor_outliers(1024 * values)
    assert small.kurtosis == pytest.approx(large.kurtosis, rel=1e-12)
    assert small.share_outside == large.share_outside
    assert small.max_over_percentile == pytest.approx(large.max_over_percentile, rel=1e-12)


def test_equal_values_have_no_kurtosis_and_zeros_no_ratio() -> None:
    assert tensor_outliers(torch.full((9,), 0.7)).kurtosis is None
    zeros = tensor_outliers(torch.zeros(5))
    assert (zeros.max_abs, zeros.percentile_abs, zeros.max_over_percentile, zeros.share_outside) == (0, 0, None, 0)


class Network(nn.Module):
    """Calls one layer twice, one by keyword and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.named, self.never = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.named(input=self.twice(torch.tanh(self.twice(x))))


def test_inputs_are_those_of_all_calls_and_batches() -> None:
    torch.manual_seed(0)
    model = Network()
    batches = [torch.randn(n, 8) for n in (5, 1, 16)]
    seen: list[Tensor] = []
    handle = model.twice.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for batch in batches:
        model(batch)
    handle.remove()
    done: list[int] = []
    found = input_outliers(model, ["twice", "named", "never"], model, batches, on_batch=done.append)
    whole = tensor_outliers(torch.cat([x.flatten() for x in seen]))
    assert found["twice"].kurtosis == pytest.approx(whole.kurtosis, rel=1e-9)
    assert (found["twice"].max_abs, found["twice"].share_outside) == (whole.max_abs, whole.share_outside)
    assert found["twice"].percentile_abs == whole.percentile_abs
    assert found["twice"].count == 2 * 22 * 8
    assert found["named"].count == 22 * 8
    assert found["never"] is None
    assert done == [1, 2, 3, 4, 5, 6]
    assert not model.twice._forward_pre_hooks


def test_a_layer_with_one_loud_channel_stands_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    x = torch.randn(256, 64)
    quiet = input_outliers(model, ["0"], model, [x])["0"]
    x[:, 3] *= 60
    loud = input_outliers(model, ["0"], model, [x])["0"]
    assert quiet.kurtosis < 3.2
    assert loud.kurtosis > 100
    assert loud.share_outside > 2 * quiet.share_outside


def test_values_that_are_not_finite_name_the_layer_and_hooks_go() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].bias[2] = float("inf")
    with pytest.raises(ModelError, match=r"inputs of layer 1: the values hold NaN or infinity\. Fix:"):
        input_outliers(model, ["0", "1"], model, [torch.ones(2, 4)])
    assert not any(layer._forward_pre_hooks for layer in model)


def test_no_batches_and_unequal_passes_raise() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="batches = 0 is not possible"):
        input_outliers(model, ["0"], model, [])
    statistics = OutlierStatistics()
    statistics.update(torch.ones(3))
    statistics.count_outside(torch.ones(2))
    with pytest.raises(ConfigError, match="values of the second pass = 2 is not possible: allowed is 3"):
        statistics.result()
