"""Laws of the ExecuTorch program. What needs its library is skipped where it is not installed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fraqat import ActivationSpec, LayerRule, QuantSpec, WeightSpec, quantize_
from fraqat.errors import ConfigError, ModelError
from fraqat.export import ModelDescription, executorch
from fraqat.export.codes import layer_codes
from fraqat.export.executorch import ExecutorchTarget, OpenedProgram
from fraqat.export.target import ExportJob, Inputs, LayerPlace, Part

TARGET = ExecutorchTarget()
INPUTS = ActivationSpec(**TARGET.defaults["activation"])
WEIGHT = WeightSpec(**TARGET.defaults["weight"])
GROUP = WeightSpec(granularity="group", group_size=32, scale_dtype="bfloat16")
PLACE = LayerPlace("a", "Linear", (96, 64))
SPEC = QuantSpec(WEIGHT, INPUTS)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 96), nn.Linear(96, 48), nn.Linear(48, 33, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(nn.functional.silu(self.b(nn.functional.silu(self.a(x)))))


def student() -> nn.Module:
    """4 bits per group and per channel, and a row of 48 inputs, which is no multiple of 32, in bytes."""
    model = Toy()
    quantize_(model, SPEC, rules=[LayerRule(pattern="a", spec=QuantSpec(GROUP, INPUTS))])
    return model.eval()


def part(model: nn.Module) -> Part:
    def batches() -> Sequence[Inputs]:
        return [{"x": torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(i)) + i} for i in range(3)]

    return Part("toy", model, ("y",), batches, {"x": {0: "batch"}})


def job(model: nn.Module, folder: Path) -> ExportJob:
    folder.mkdir(exist_ok=True)
    description = ModelDescription("Toy", {"width": 64}, "zoo:none")
    return ExportJob(model, lambda: (part(model),), description, None, folder, say=lambda _: None)


@pytest.mark.parametrize(
    ("place", "spec", "expected"),
    [
        (PLACE, SPEC, SPEC),
        (PLACE, QuantSpec(GROUP, INPUTS), QuantSpec(GROUP, INPUTS)),
        (PLACE, QuantSpec(), SPEC),
        (PLACE, QuantSpec(WeightSpec(bits=8), INPUTS), QuantSpec(WeightSpec(bits=8), INPUTS)),
        (PLACE, QuantSpec(dataclasses.replace(GROUP, group_size=16), INPUTS), QuantSpec(GROUP, INPUTS)),
        (
            PLACE,
            QuantSpec(dataclasses.replace(GROUP, bits=6), INPUTS),
            QuantSpec(dataclasses.replace(WEIGHT, bits=6), INPUTS),
        ),
        (dataclasses.replace(PLACE, shape=(96, 48)), QuantSpec(GROUP, INPUTS), SPEC),
        (PLACE, QuantSpec(activation=None), None),
        (PLACE, QuantSpec(activation=ActivationSpec(bits=16)), None),
        (dataclasses.replace(PLACE, type_name="PointwiseConv"), SPEC, None),
    ],
)
def test_nearest_changes_only_what_xnnpack_cannot_compute(
    place: LayerPlace, spec: QuantSpec, expected: QuantSpec | None
) -> None:
    nearest = TARGET.nearest(place, spec)
    assert nearest == expected
    if nearest is not None:
        assert TARGET.nearest(place, nearest) == nearest


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_codes_come_back(bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 64)).to(torch.int8)
    content = executorch._packed(codes, bits)
    assert len(content) == 5 * 64 * bits // 8
    assert torch.equal(executorch._unpacked(content, bits, [5, 64]), codes)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (QuantSpec(dataclasses.replace(GROUP, scale_dtype="float32"), INPUTS), r"0\.weight"),
        (QuantSpec(dataclasses.replace(GROUP, bits=6), INPUTS), r"0\.weight"),
        (QuantSpec(WeightSpec(symmetric=False), INPUTS), r"0\.weight"),
        (QuantSpec(activation=None), r"0\.activation"),
    ],
)
def test_a_layer_that_xnnpack_would_round_is_refused(spec: QuantSpec, field: str) -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    quantize_(model, spec)
    with pytest.raises(ConfigError, match=f"{field}.*Fix: train with target: executorch-xnnpack"):
        executorch._stored_bits(layer_codes(model)["0"])


@functools.cache
def written(folder: Path) -> tuple[nn.Module, Path]:
    """Lowering takes seconds: once for all tests."""
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    model = student()
    TARGET.write(job(model, folder))
    return model, folder


@pytest.fixture
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    return written(tmp_path_factory.getbasetemp() / "executorch")


@pytest.mark.slow
def test_the_program_holds_the_integers_and_computes_the_student(
    exported: tuple[nn.Module, Path], sqnr_db: Callable[[Tensor, Tensor], float]
) -> None:
    model, folder = exported
    opened = TARGET.open(folder, model)
    codes = opened.codes()
    for name, layer in layer_codes(model).items():
        assert torch.equal(codes[name], layer.codes), name
    stored = json.loads((folder / "layers.json").read_text())
    assert [layer["bits"] for layer in stored["layers"].values()] == [4, 4, 8]
    assert stored["not_delegated"] == []
    for inputs in part(model).batches():
        with torch.no_grad():
            expected = model(**inputs)
        found = opened.run(part(model), inputs).outputs["y"]
        assert sqnr_db(expected, found) > 110
        assert sqnr_db(expected, 1.01 * found) < 110


@pytest.mark.slow
def test_another_integer_or_scale_is_noticed(exported: tuple[nn.Module, Path]) -> None:
    model, folder = exported
    content = (folder / "toy.pte").read_bytes()
    description = json.loads((folder / "layers.json").read_text())
    layer = layer_codes(model)["c"]
    codes = layer.codes.clone()
    codes[0, 0] ^= 1
    wrong = {
        "key": hashlib.sha256(executorch._packed(codes, 8)).hexdigest(),
        "scale_key": executorch._place(
            dataclasses.replace(layer, qparams=dataclasses.replace(layer.qparams, scale=1.01 * layer.qparams.scale)), 8
        )["scale_key"],
    }
    for field, value in wrong.items():
        changed = json.loads(json.dumps(description))
        changed["layers"]["c"][field] = value
        with pytest.raises(ModelError, match="lacks the integers or scales of c"):
            OpenedProgram(content, changed).codes()
    places = description["layers"]
    executorch._check_taken(content, places)
    with pytest.raises(ConfigError, match=r"c\.weight = 'not in the program'"):
        executorch._check_taken(content, {"c": places["c"] | wrong})


@pytest.mark.slow
def test_another_shape_is_refused(exported: tuple[nn.Module, Path]) -> None:
    model, folder = exported
    with pytest.raises(ConfigError, match=r"x = \(1, 8, 64\) is not possible: allowed is \[1, 7, 64\]"):
        TARGET.open(folder, model).run(part(model), {"x": torch.randn(2, 8, 64)})
