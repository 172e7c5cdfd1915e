"""Laws of the optimizers: 8-bit states, and states on the host."""

from __future__ import annotations

import io
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import toy_spec

from fraqat.distill import (
    DeviceOptimizer,
    HostOptimizer,
    TrainOptimizer,
    TrainSpec,
    VarianceAdaptedAdamW,
    make_optimizer,
)
from fraqat.distill import optimizers as optimizers_module
from fraqat.errors import ConfigError

SHAPES = ((64, 64), (16, 512), (7,), (3, 1000))
LARGE, SMALL = SHAPES[:2], SHAPES[2:]
"""torchao quantizes the state of the first two; the third has too few elements, the fourth is no multiple of 256 in all."""


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]


def take_steps(
    optimizer: TrainOptimizer, trained: list[nn.Parameter], steps: range, without: tuple[int, ...] = ()
) -> None:
    for step in steps:
        optimizer.set_learning_rate_(1e-3 * (step + 1))
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        for i, parameter in enumerate(trained):
            gradient = torch.randn(parameter.shape, generator=generator)
            if i not in without:
                parameter.grad = gradient.to(parameter.device)
        optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def assert_equal(left: list[nn.Parameter], right: list[nn.Parameter]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def state_bytes(optimizer: TrainOptimizer) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in optimizer.state_tensors())


@pytest.mark.parametrize("name", ["adamw", "adamw_adapted", "adamw_8bit"])
@pytest.mark.parametrize("kind", [DeviceOptimizer, HostOptimizer])
def test_a_state_goes_through_a_file_bitwise(name: Any, kind: Any) -> None:
    spec = toy_spec(optimizer=name, weight_decay=0.1)
    whole, cut = parameters(), parameters()
    take_steps(kind(whole, spec), whole, range(6))
    first = kind(cut, spec)
    take_steps(first, cut, range(3))
    state = through_a_file({"optimizer": first.state_dict(), "weights": [p.detach() for p in cut]})
    resumed = parameters()
    second = kind(resumed, spec)
    with torch.no_grad():
        for parameter, value in zip(resumed, state["weights"], strict=True):
            parameter.copy_(value)
    second.load_state_dict(state["optimizer"])
    take_steps(second, resumed, range(3, 6))
    assert_equal(resumed, whole)


def test_a_saved_8_bit_state_holds_plain_tensors_alone() -> None:
    trained = parameters()
    optimizer = DeviceOptimizer(trained, toy_spec(optimizer="adamw_8bit"))
    take_steps(optimizer, trained, range(1))

    def types_in(value: Any) -> set[type]:
        if isinstance(value, dict):
            return set().union(*(types_in(part) for part in value.values()))
        return set().union(*(types_in(part) for part in value)) if isinstance(value, list | tuple) else {type(value)}

    assert types_in(optimizer.state_dict()) <= {Tensor, float, int, bool, type(None)}


def test_an_8_bit_state_has_two_bytes_and_scales_for_256_where_a_tensor_is_large() -> None:
    trained = parameters()
    optimizer = DeviceOptimizer(trained, toy_spec(optimizer="adamw_8bit"))
    take_steps(optimizer, trained, range(1))
    large = sum(rows * columns for rows, columns in LARGE)
    small = 7 + 3 * 1000
    step_bytes, map_bytes = 4 * len(SHAPES), 2 * 256 * 4 * len(LARGE)
    assert state_bytes(optimizer) == 2 * (large + 4 * large // 256) + 8 * small + step_bytes + map_bytes


def test_8_bit_steps_stay_near_float32_steps() -> None:
    moved: dict[str, list[Tensor]] = {}
    for name in ("adamw", "adamw_8bit"):
        start, trained = parameters(), parameters()
        take_steps(DeviceOptimizer(trained, toy_spec(optimizer=name)), trained, range(10))
        moved[name] = [(p - q).detach() for p, q in zip(trained, start, strict=True)]
    for exact, rounded, shape in zip(moved["adamw"], moved["adamw_8bit"], SHAPES, strict=True):
        error = (exact - rounded).norm() / exact.norm()
        assert error < (0.05 if shape in LARGE else 1e-5), shape


def moves(name: Any, steps: range) -> list[Tensor]:
    """What the last of the steps moves; all of them go to weights at 0, so that no small move is rounded."""
    trained = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = DeviceOptimizer(trained, toy_spec(optimizer=name))
    take_steps(optimizer, trained, steps[:-1])
    with torch.no_grad():
        for parameter in trained:
            parameter.zero_()
    take_steps(optimizer, trained, steps[-1:])
    return [parameter.detach() for parameter in trained]


def test_an_adapted_step_has_the_signs_and_the_norm_of_adams_and_its_squares() -> None:
    for plain, adapted in zip(moves("adamw", range(5)), moves("adamw_adapted", range(5)), strict=True):
        expected = plain
        if plain.ndim > 1:
            expected = plain * plain.abs()
            expected = expected * (plain.norm() / expected.norm())
        torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-9)


def test_the_first_adapted_step_is_adams() -> None:
    for plain, adapted in zip(moves("adamw", range(1)), moves("adamw_adapted", range(1)), strict=True):
        torch.testing.assert_close(adapted, plain, rtol=1e-4, atol=0)


def test_a_run_of_adamw_goes_on_adapted() -> None:
    trained, start = parameters(), parameters()
    first = DeviceOptimizer(trained, toy_spec())
    take_steps(first, trained, range(3))
    second = DeviceOptimizer(trained, toy_spec(optimizer="adamw_adapted"))
    second.load_state_dict(through_a_file(first.state_dict()))
    take_steps(second, trained, range(3, 4))
    assert second.state_dict()["state"][0]["step"] == 4
    assert all(not torch.equal(p, q) for p, q in zip(trained, start, strict=True))


def test_adapted_steps_in_a_loop_of_ones_own_shorten_what_cancels() -> None:
    weight = nn.Parameter(torch.zeros(1, 2))
    optimizer = VarianceAdaptedAdamW([weight], lr=1e-2)
    for step in range(40):
        weight.grad = torch.tensor([[1.0, 1.0 if step % 2 else -1.0]])
        optimizer.step()
        optimizer.zero_grad()
    steady, cancelling = weight.abs()[0].tolist()
    assert steady > 0.39
    assert cancelling < 0.01
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_an_adapted_step_without_any_gradient_moves_nothing() -> None:
    trained = [nn.Parameter(torch.ones(4, 4))]
    optimizer = DeviceOptimizer(trained, toy_spec(optimizer="adamw_adapted"))
    trained[0].grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.equal(trained[0], torch.ones(4, 4))


@pytest.mark.parametrize("name", ["adamw", "adamw_adapted", "adamw_8bit"])
def test_a_step_on_the_host_is_the_step(name: Any) -> None:
    spec = toy_spec(optimizer=name, weight_decay=0.1)
    here, hosted = parameters(), parameters()
    take_steps(DeviceOptimizer(here, spec), here, range(4))
    take_steps(HostOptimizer(hosted, spec), hosted, range(4))
    assert_equal(here, hosted)


def test_a_parameter_without_a_gradient_does_not_move_on_the_host() -> None:
    here, hosted, start = parameters(), parameters(), parameters()
    take_steps(DeviceOptimizer(here, toy_spec()), here, range(3), without=(1,))
    take_steps(HostOptimizer(hosted, toy_spec()), hosted, range(3), without=(1,))
    assert_equal(here, hosted)
    assert torch.equal(hosted[1], start[1])


def test_a_host_is_no_place_for_a_model_that_is_there() -> None:
    with pytest.raises(ConfigError, match=r"train.optimizer_device = 'host' .* same for a model on the CPU"):
        make_optimizer(parameters(), toy_spec(optimizer_device="host"))


def test_without_torchao_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train.optimizer = 'adamw_8bit' .* pip install 'fraqat\[optimizers\]'"):
        make_optimizer(parameters(), toy_spec(optimizer="adamw_8bit"))


def test_a_training_step_does_not_import_torchao_unasked() -> None:
    code = "import sys, fraqat.distill; assert 'torchao' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_the_import_of_torchao_is_silent_and_leaves_the_loggers_alone() -> None:
    code = (
        "import logging, torch\n"
        "from fraqat.distill import TrainSpec, make_optimizer\n"
        "make_optimizer([torch.nn.Parameter(torch.ones(2))], TrainSpec(optimizer='adamw_8bit'))\n"
        "assert logging.getLogger('torchao').level == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_gpu_holds_no_state_of_a_host_optimizer(name: Any) -> None:
    on_device, on_host = parameters("cuda"), parameters()
    spec = TrainSpec(optimizer=name, optimizer_device="host")
    optimizer = make_optimizer(on_device, spec)
    take_steps(optimizer, on_device, range(4))
    take_steps(DeviceOptimizer(on_host, spec), on_host, range(4))
    torch.cuda.synchronize()
    assert_equal(on_device, on_host)
    assert {tensor.device.type for tensor in optimizer.state_tensors()} == {"cpu"}


def test_torchao_is_there_for_these_tests() -> None:
    assert find_spec("torchao") is not None


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_learned_scales_have_a_rate_of_their_own_and_do_not_decay(optimizer: str) -> None:
    weight, scale = (nn.Parameter(torch.full((8,), 2.0)) for _ in range(2))
    spec = toy_spec(optimizer=optimizer, weight_decay=0.5, scale_rate=0.1)
    made = make_optimizer([weight, scale], spec, [scale])
    made.set_learning_rate_(0.01)
    for parameter in (weight, scale):
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    assert torch.equal(scale, torch.full((8,), 2.0))
    assert weight.detach() == pytest.approx(torch.full((8,), 2.0 * (1 - 0.01 * 0.5)))
    again = make_optimizer([weight, scale], spec, [scale])
    again.load_state_dict(made.state_dict())
    for parameter in (weight, scale):
        parameter.grad = torch.ones_like(parameter)
    before = [weight.detach().clone(), scale.detach().clone()]
    again.set_learning_rate_(0.01)
    again.step()
    moved = [float((a - b.detach()).abs().max()) for a, b in zip(before, (weight, scale), strict=True)]
    assert moved[1] == pytest.approx(0.1 * (moved[0] - 0.01 * 0.5 * float(before[0][0])), rel=1e-3)
