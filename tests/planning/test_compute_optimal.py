"""Laws of the predicted share and length of quantized training, and of the width for a memory budget."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toy_workload import LENGTH, make_student, make_workload

from fraqat.errors import ConfigError
from fraqat.nn import LayerRule, QuantSpec, WeightSpec, quantize_
from fraqat.planning import (
    compute_optimal,
    optimal_share,
    optimal_tokens,
    packed_size,
    tokens_per_byte,
    tokens_per_sample,
)


def test_the_share_is_the_published_formula() -> None:
    for s in (2.0, 18.6, 1e3, 7.7e4):
        assert optimal_share(s) == pytest.approx(math.exp(math.log(s) - 6.7297 / math.log(s)) / s)
    assert 0.09 < optimal_share(18.6) < 0.15  # short trainings: 10 to 15 %
    assert optimal_share(77_000) > 0.54  # long ones: 55 % and more


@given(st.floats(1.001, 1e12), st.floats(1.01, 100))
def test_the_share_grows_with_the_length(s: float, factor: float) -> None:
    assert 0 <= optimal_share(s) <= optimal_share(s * factor) < 1


@given(st.floats(2, 1e6), st.sampled_from([1.0, 3.0, 4.0, 4.5, 6.0]))
def test_the_optimal_length_has_the_optimal_share(before: float, bits: float) -> None:
    num_weights = 10**8
    pretraining = before * num_weights * bits / 8
    tokens = optimal_tokens(pretraining, num_weights, bits)
    whole = pretraining + tokens
    share = optimal_share(tokens_per_byte(whole, num_weights, bits))
    assert tokens == pytest.approx(share * whole, rel=1e-6, abs=1e-9 * whole)


def test_a_narrower_model_has_more_tokens_per_byte_and_trains_longer() -> None:
    lengths = [optimal_tokens(1e12, 10**9, bits) for bits in (2, 3, 4, 6)]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("s", [1.0, 0.5, -1.0, math.nan])
def test_one_token_per_byte_is_refused(s: float) -> None:
    with pytest.raises(ConfigError, match=r"total_tokens_per_byte = .* more than 1"):
        optimal_share(s)


def test_too_little_pretraining_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--pretraining-tokens = 100 is not possible: allowed is more than 5e\+08"):
        optimal_tokens(100, 10**9, 4)


def test_tokens_are_the_positions_of_the_layers() -> None:
    assert tokens_per_sample(make_workload()) == LENGTH


def test_layers_at_fewer_positions_count_less() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.condition = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) + self.condition(x[:, :1])

    with torch.device("meta"):
        model = Conditioned()
    quantize_(model)
    assert tokens_per_sample(make_workload(model)) == (LENGTH + 1) / 2


def test_a_packed_size_at_another_width_is_that_of_a_model_of_this_width() -> None:
    def model(bits: float) -> nn.Module:
        with torch.device("meta"):
            made = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 31), nn.Linear(31, 8))
        quantize_(made, QuantSpec(WeightSpec(bits=bits)), rules=(LayerRule("2", weight_bits=max(6, bits)),))
        return made

    for bits in (2.0, 3.0, 4.0, 4.5, 6.0, 8.0):
        assert packed_size(model(4), bits=bits) == packed_size(model(bits))
    assert packed_size(model(4)) == packed_size(model(4), bits=4)


def test_the_widest_width_within_the_budget_is_chosen() -> None:
    workload = make_workload(make_student(hidden=256))
    sizes = {bits: packed_size(workload.student, bits=bits).num_bytes for bits in (3, 4, 5)}
    found = compute_optimal(workload, 8, 100, memory_budget_bytes=sizes[4])
    assert found.chosen is not None
    assert found.chosen.bits == 4
    assert compute_optimal(workload, 8, 100, memory_budget_bytes=sizes[5] - 1).chosen == found.chosen
    assert "widest within" in str(found.to_table())
    none = compute_optimal(workload, 8, 100, memory_budget_bytes=10)
    assert none.chosen is None
    assert "no width fits" in str(none.to_table())
    with pytest.raises(ConfigError, match="--memory-budget = 0"):
        compute_optimal(workload, 8, 100, memory_budget_bytes=0)


def test_the_table_counts_the_run_in_tokens() -> None:
    workload = make_workload()
    num_weights = packed_size(workload.student).num_quantized_weights
    found = compute_optimal(workload, 8, 100, pretraining_tokens=1e7)
    rows = {row["bits"]: row for row in json.loads(json.dumps(found.to_table().to_json()))["rows"]}
    row = rows[4.0]
    assert row["run, tokens per byte"] == pytest.approx(8 * 100 * LENGTH / (num_weights / 2))
    assert row["best tokens"] == pytest.approx(optimal_tokens(1e7, num_weights, 4))
    assert row["best steps"] == math.ceil(row["best tokens"] / (8 * LENGTH))
    assert row["best share"] == pytest.approx(row["best tokens"] / (row["best tokens"] + 1e7))
    notes = "\n".join(found.to_table().notes)
    assert "2509.22935" in notes
    assert "distils a finished model" in notes
    assert "quantized weights are outside" in notes
    without = compute_optimal(workload, 8, 100, memory_budget_bytes=10**9).to_table()
    assert "2509.22935" not in "\n".join(without.notes)
    assert without.rows[0][-1] is None
