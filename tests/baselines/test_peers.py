"""Laws of the peers: the same run as ours but for the quantizer, on the levels that they promise, refused without a word."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import ToyTask, toy_spec, toy_student, toy_teacher

from fraqat import ActivationSpec, LayerRule, QuantSpec, WeightSpec, quantize_
from fraqat.baselines import ParqSpec, PeerResult, peer_layers, train_peer, train_steps_
from fraqat.baselines.torchao_layers import FakeQuantizedPointwiseConv, prepare_qat_
from fraqat.distill import Batch, Distiller, make_optimizer, validation_loss
from fraqat.errors import ConfigError, NonFiniteLossError
from fraqat.nn import (
    BranchSpec,
    EngineSpec,
    LowRankSpec,
    add_adapters_,
    add_branches_,
    quantized_layers,
    unquantize_,
)
from fraqat.schedules import LearningRateSpec, Schedule, Stage

torchao = pytest.importorskip("torchao")
TRAINED = ("torchao-qat", "torchao-parq")
COSINE = LearningRateSpec(peak=2e-3, kind="cosine")


class RecordingTask(ToyTask):
    """Keeps every input that it makes."""

    def __init__(self, num_rows: int = 20):
        super().__init__(num_rows)
        self.made: list[Tensor] = []

    def make_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
        inputs = super().make_inputs(batch, generator)
        self.made.append(inputs["x"])
        return inputs


def peer(name: str, num_steps: int, student: nn.Module | None = None, **changes: Any) -> PeerResult:
    parq = changes.pop("parq", None)
    task = changes.pop("task", None) or ToyTask()
    teacher = changes.pop("teacher", None) or toy_teacher()
    return train_peer(name, task, teacher, student or toy_student(), num_steps, toy_spec(**changes), parq=parq)


def effective_weight(layer: nn.Linear) -> Tensor:
    """What the layer multiplies with: its output for the unit vectors."""
    quantizer: Any = getattr(layer, "weight_fake_quantizer", None)
    return (layer.weight if quantizer is None else quantizer(layer.weight)).detach()


def num_levels(weight: Tensor) -> int:
    """The most distinct values of a row."""
    return max(len(row.unique()) for row in weight.flatten(1))


@pytest.mark.parametrize("name", TRAINED)
def test_training_lowers_the_held_out_loss(name: str) -> None:
    before = peer("torchao-qat", 0).validation_loss
    result = peer(name, 200, batch_size=16, learning_rate=COSINE, autocast="bfloat16")
    assert result.num_steps == 200 and result.train_s > 0
    assert result.validation_loss < 0.7 * before
    assert result.validation_loss == validation_loss(ToyTask(), toy_teacher(), result.model, toy_spec(batch_size=16))


@pytest.mark.parametrize("name", TRAINED)
def test_every_channel_ends_on_sixteen_levels_at_most(name: str) -> None:
    student = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 4))
    quantize_(student)
    teacher = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 4))
    model = peer(name, 6, student, teacher=teacher).model
    last: Any = model[2]
    assert 8 < num_levels(effective_weight(last)) <= 16


def test_parq_is_off_the_levels_before_the_annealing_ends() -> None:
    """What makes the law above one of PARQ and not of the quantizer: the proximal map is soft at first."""
    seen: list[int] = []
    student = nn.Sequential(nn.Linear(64, 4), nn.SiLU(), nn.Linear(4, 4))
    teacher = nn.Sequential(nn.Linear(64, 4), nn.SiLU(), nn.Linear(4, 4))
    quantize_(student)

    class Wide(ToyTask):
        def make_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
            return {"x": torch.randn(len(batch["x"]), 64, generator=generator)}

    weight = student.get_parameter("0.weight")
    train_peer(
        "torchao-parq",
        Wide(),
        teacher,
        student,
        10,
        toy_spec(),
        parq=ParqSpec(anneal_end=0.5),
        on_step=lambda step, loss: seen.append(num_levels(weight.detach())),
    )
    assert seen[1] > 16
    assert max(seen[5:]) <= 16


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_data_order_and_noise_are_those_of_the_distiller(name: str, accumulation: int, tmp_path: Path) -> None:
    ours, theirs = RecordingTask(), RecordingTask()
    spec = toy_spec(accumulation=accumulation, validate_every=100)
    schedule = Schedule((Stage(0, 4.0, 0, 7),))
    Distiller(ours, toy_teacher(), toy_student(), schedule, spec, tmp_path).run()
    train_peer(name, theirs, toy_teacher(), toy_student(), 7, spec)
    assert len(ours.made) == len(theirs.made) > 7 * accumulation
    assert all(torch.equal(a, b) for a, b in zip(ours.made, theirs.made, strict=True))


@pytest.mark.parametrize("changes", [{}, {"autocast": "none", "clip_norm": None, "weight_decay": 0.1}])
def test_the_loop_trains_our_own_student_as_the_distiller_does_bit_for_bit(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """So that a difference between two methods is one of their quantizers."""
    rate = LearningRateSpec(peak=1e-2, warmup_steps=3)
    spec = toy_spec(accumulation=2, learning_rate=rate, engine=EngineSpec("reference"), **changes)
    ours, theirs = toy_student(dropout=0.1), toy_student(dropout=0.1)
    distiller = Distiller(ToyTask(), toy_teacher(), ours, Schedule((Stage(0, 4.0, 0, 9),)), spec, tmp_path)
    losses: list[float] = []
    distiller.on_step = lambda record: losses.append(record.loss)
    distiller.run()
    own_losses: list[float] = []
    teacher = toy_teacher().eval().requires_grad_(False)
    optimizer = make_optimizer(list(theirs.parameters()), spec)
    train_steps_(ToyTask(), teacher, theirs, optimizer, 9, spec, lambda step, loss: own_losses.append(loss))
    assert own_losses == losses
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_quantized_tensors_and_fake_quantizers_compute_the_same() -> None:
    """Post-training quantization is fake quantization that nobody trained: both paths through torchao agree."""
    dynamic, fake = peer("torchao-dynamic", 0), peer("torchao-qat", 0)
    assert dynamic.validation_loss == pytest.approx(fake.validation_loss, rel=1e-5)
    assert dynamic.num_steps == 0
    assert type(dynamic.model.get_parameter("0.weight").data).__name__ == "IntxUnpackedToInt8Tensor"


@pytest.mark.parametrize("name", [*TRAINED, "torchao-dynamic"])
def test_layers_are_in_the_state_that_our_rules_ask_for(name: str) -> None:
    student = toy_teacher()
    quantize_(student, rules=[LayerRule("0", skip=True), LayerRule("3", activation_bits=16)])
    before = student.get_parameter("0.weight").detach().clone()
    model = peer(name, 0 if name == "torchao-dynamic" else 2, student).model
    first, last = model[0], model[3]
    assert type(first) is nn.Linear
    assert len(first.weight[0].unique()) == 8
    assert torch.equal(first.weight, before) == (name == "torchao-dynamic")
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    weight: Any = last.weight
    weight = weight.dequantize() if name == "torchao-dynamic" else effective_weight(last)
    assert num_levels(weight) <= 16
    exact = nn.functional.linear(x, weight, last.bias)
    torch.testing.assert_close(last(x), exact, rtol=0, atol=1e-6)  # float inputs


@pytest.mark.parametrize("name", [*TRAINED, "torchao-dynamic"])
def test_eight_bit_inputs_are_rounded_per_token(name: str) -> None:
    model = peer(name, 0 if name == "torchao-dynamic" else 2).model
    layer: Any = model[0]
    weight = layer.weight.dequantize() if name == "torchao-dynamic" else effective_weight(layer)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = (-128 - torch.round(low / scale)).clamp(-128, 127)
    rounded = (torch.clamp(torch.round(x / scale) + zero, -128, 127) - zero) * scale
    torch.testing.assert_close(layer(x), nn.functional.linear(rounded, weight, layer.bias), rtol=0, atol=1e-6)
    assert (layer(x) - nn.functional.linear(x, weight, layer.bias)).abs().max() > 1e-4


@pytest.mark.parametrize("name", TRAINED)
def test_frozen_parameters_stay_and_frozen_weights_are_quantized_all_the_same(name: str) -> None:
    student = toy_teacher()
    quantize_(student, rules=[LayerRule("3", trainable=False)])
    before = {key: value.clone() for key, value in student.state_dict().items()}
    model = peer(name, 3, student).model
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("3."), key
    last: Any = model[3]
    assert last.weight_fake_quantizer is not None
    assert not torch.equal(effective_weight(last), last.weight)


@pytest.mark.parametrize("name", [*TRAINED, "torchao-dynamic"])
def test_a_pointwise_convolution_computes_what_the_linear_layer_does(name: str) -> None:
    class AsPixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x[:, :, None, None]).flatten(1)

    class AsTokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    torch.manual_seed(0)
    teacher, linear, conv = nn.Linear(8, 4), AsTokens(), AsPixels()
    with torch.no_grad():
        conv.inner.weight.copy_(linear.inner.weight[:, :, None, None])
        conv.inner.bias.copy_(linear.inner.bias)
    quantize_(linear)
    quantize_(conv)
    num_steps = 0 if name == "torchao-dynamic" else 4
    results = [peer(name, num_steps, model, teacher=teacher, autocast="none") for model in (linear, conv)]
    assert isinstance(conv.inner, FakeQuantizedPointwiseConv)
    assert results[0].validation_loss == pytest.approx(results[1].validation_loss, rel=1e-4)
    assert results[0].validation_loss > 1e-6


def test_a_map_of_pixels_is_quantized_pixel_by_pixel() -> None:
    conv = nn.Sequential(nn.Conv2d(6, 3, 1))
    quantize_(conv)
    layers = peer_layers(conv)
    unquantize_(conv)
    prepare_qat_(conv, layers, has_weights=lambda layer: True)
    x = torch.randn(2, 6, 4, 5)
    whole = conv(x)
    assert whole.shape == (2, 3, 4, 5)
    torch.testing.assert_close(conv(x[:, :, 1:2, 3:4]), whole[:, :, 1:2, 3:4])
    x[:, :, 0, 0] *= 100  # another pixel
    torch.testing.assert_close(conv(x)[:, :, 1, 3], whole[:, :, 1, 3])


def test_groups_share_a_scale() -> None:
    teacher = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 4))
    for name in TRAINED:
        student = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 4))
        spec = QuantSpec(WeightSpec(granularity="group", group_size=32))
        quantize_(student, spec, rules=[LayerRule("0", skip=True)])
        model = peer(name, 3, student, teacher=teacher).model
        weight = effective_weight(model[2])
        assert num_levels(weight) > 16
        assert num_levels(weight.reshape(-1, 32)) <= 16


def test_a_fused_encoder_does_not_skip_the_fake_quantizers() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        exact = encoder(x)
    quantize_(encoder)  # attention has no quantized layer
    layers = peer_layers(encoder)
    unquantize_(encoder)
    prepare_qat_(encoder, layers, has_weights=lambda layer: True)
    encoder.eval()
    with torch.no_grad():
        quantized = encoder(x)
    assert (quantized - exact).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (QuantSpec(WeightSpec(bits=4.5)), "weight.bits"),
        (QuantSpec(WeightSpec(symmetric=False, range_method="min_max")), "weight.symmetric"),
        (QuantSpec(WeightSpec(granularity="tensor")), "weight.granularity"),
        (QuantSpec(activation=ActivationSpec(bits=6)), "6 bits, token"),
        (QuantSpec(activation=ActivationSpec(granularity="tensor")), "8 bits, tensor"),
    ],
)
def test_what_torchao_cannot_say_is_refused(spec: QuantSpec, text: str) -> None:
    student = toy_teacher()
    quantize_(student, spec)
    with pytest.raises(ConfigError, match=text):
        peer("torchao-qat", 1, student)
    assert len(list(quantized_layers(student))) == 2  # untouched


@pytest.mark.parametrize(
    ("name", "num_steps", "changes", "text"),
    [
        ("torchao", 1, {}, "torchao-qat, torchao-parq, torchao-dynamic"),
        ("torchao-dynamic", 1, {}, "num_steps"),
        ("torchao-parq", 1, {}, "num_steps"),
        ("torchao-qat", -1, {}, "num_steps"),
        ("torchao-qat", 1, {"parq": ParqSpec()}, "parq"),
        ("torchao-qat", 1, {"ema_decay": 0.9}, "ema_decay"),
        ("torchao-parq", 2, {"optimizer": "adamw_8bit"}, "adamw_8bit"),
    ],
)
def test_settings_without_a_meaning_are_refused(name: str, num_steps: int, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        peer(name, num_steps, **changes)


def test_a_float_student_is_refused() -> None:
    with pytest.raises(ConfigError, match="call quantize_ first"):
        peer("torchao-qat", 1, toy_teacher())


def test_branches_and_adapters_are_refused() -> None:
    student = toy_student()
    add_branches_(student, BranchSpec(rank=2))
    with pytest.raises(ConfigError, match="low-rank branches"):
        peer("torchao-qat", 1, student)
    student = toy_student()
    add_adapters_(student, LowRankSpec(rank=2))
    with pytest.raises(ConfigError, match="peers train the weights"):
        peer("torchao-qat", 1, student)


def test_parq_refuses_a_weight_that_an_unquantized_module_uses_too() -> None:
    student = toy_teacher()
    quantize_(student)
    student.add_module("tied", nn.Identity())
    student.get_submodule("tied").register_parameter("weight", student.get_parameter("3.weight"))
    with pytest.raises(ConfigError, match=r"tied\.weight is tied"):
        peer("torchao-parq", 2, student)


@pytest.mark.parametrize("values", [{"anneal_start": 0.8}, {"anneal_end": 1.1}, {"steepness": 0}, {"quant_period": 0}])
def test_impossible_parq_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"parq\."):
        ParqSpec(**values)


@pytest.mark.parametrize("name", TRAINED)
def test_a_loss_that_is_not_finite_stops_the_run(name: str) -> None:
    teacher = toy_teacher()
    with torch.no_grad():
        teacher.get_parameter("3.bias").fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="loss is not finite at step 0 of 3"):
        peer(name, 3, teacher=teacher)


def test_importing_torchao_is_quiet() -> None:
    code = (
        "from fraqat.nn import quantize_; from torch import nn; import fraqat.baselines as b;"
        "from fraqat.baselines.torchao_layers import prepare_qat_;"
        "m = nn.Sequential(nn.Linear(8, 4)); quantize_(m); l = b.peer_layers(m);"
        "from fraqat.nn import unquantize_; unquantize_(m);"
        "prepare_qat_(m, l, has_weights=lambda x: True); print(type(m[0]).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "FakeQuantizedLinear"
    assert done.stderr == ""
