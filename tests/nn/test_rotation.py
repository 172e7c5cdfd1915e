"""Rotations merged into weights change nothing that a model computes, and refuse what they would change."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fraqat.errors import ConfigError
from fraqat.nn import RotationSpec, ValuePath, quantize_, rotate_value_paths_
from fraqat.nn.rotation import orthogonal

HEADS, SIZE = 4, 12


class GroupedAttention(nn.Module):
    """Two heads of values for four of the result, and a reader with other channels beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.values = nn.Linear(16, 6 * HEADS), nn.Linear(16, 2 * SIZE)
        self.reader = nn.Linear(HEADS * SIZE + 5, 7)

    def forward(self, x_TI: Tensor) -> Tensor:
        weight_HTS = self.weights(x_TI).unflatten(1, (6, HEADS)).permute(2, 1, 0).softmax(-1)
        value_HTD = self.values(x_TI).unflatten(1, (2, SIZE)).transpose(0, 1).repeat_interleave(2, 0)
        heads_TO = (weight_HTS @ value_HTD).transpose(0, 1).flatten(1)
        return self.reader(torch.cat([heads_TO, x_TI[:6, :5]], 1))


PATH = ValuePath("attention", ("values",), (("reader", 0),), SIZE, HEADS)


def make_model() -> GroupedAttention:
    torch.manual_seed(0)
    return GroupedAttention()


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("size", [1, 2, 3, 12, 32, 48])
def test_matrices_are_orthogonal(kind: Any, size: int) -> None:
    matrix = orthogonal(size, kind, torch.Generator().manual_seed(0))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    if kind == "hadamard" and size == 32:
        assert torch.allclose(matrix.abs(), torch.full((32, 32), 32**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("spec", [RotationSpec(), RotationSpec("random"), RotationSpec(seed=7)])
def test_a_rotated_model_computes_what_it_did(spec: RotationSpec) -> None:
    model, x = make_model(), torch.randn(6, 16)
    expected, before = model(x), copy.deepcopy(model)
    rotate_value_paths_(model, [PATH], spec)
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert not torch.allclose(model.values.weight, before.values.weight, atol=0.01)
    assert not torch.allclose(
        model.reader.weight[:, : HEADS * SIZE], before.reader.weight[:, : HEADS * SIZE], atol=0.01
    )
    assert torch.equal(model.reader.weight[:, HEADS * SIZE :], before.reader.weight[:, HEADS * SIZE :])


def test_an_outlier_is_spread_over_its_head() -> None:
    model = make_model()
    with torch.no_grad():
        model.reader.weight[:, 3] = 50.0
    rotate_value_paths_(model, [ValuePath("a", ("values",), (("reader", 0),), 4, 12)], RotationSpec())
    assert model.reader.weight[:, :4].abs().max().item() == pytest.approx(25, abs=2)


def test_the_seed_decides_and_the_model_on_meta_only_has_shapes() -> None:
    models = [make_model() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        rotate_value_paths_(model, [PATH], RotationSpec(seed=seed))
    assert torch.equal(models[0].values.weight, models[1].values.weight)
    assert not torch.equal(models[0].values.weight, models[2].values.weight)
    rotate_value_paths_(make_model().to("meta"), [PATH], RotationSpec())


def shared(model: GroupedAttention) -> None:
    model.other = nn.Linear(16, 2 * SIZE)
    model.other.weight = model.values.weight


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        (shared, PATH, "rotation of values = 'shared by values.weight, other.weight'"),
        (lambda model: quantize_(model), PATH, "a plain nn.Linear that is not quantized yet"),
        (lambda model: None, ValuePath("a", ("values",), (("reader", 0),), 10, 4), "rotation of values = '24 output"),
        (lambda model: None, ValuePath("a", ("values",), (("reader", 9),), 12, 4), "rotation of reader = '53 input"),
    ],
)
def test_what_would_be_changed_is_refused_and_left(change: Any, path: ValuePath, message: str) -> None:
    model = make_model()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=re.escape(message)):
        rotate_value_paths_(model, [PATH, path] if path is not PATH else [path], RotationSpec())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rotation\.kind = 'dct'"):
        RotationSpec("dct")  # type: ignore[arg-type]
