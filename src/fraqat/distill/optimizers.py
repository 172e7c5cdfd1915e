"""AdamW with its state in float32 or in 8 bits, beside the parameters or on the host. The home of torchao in training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fraqat.distill.spec import OptimizerName, TrainSpec
from fraqat.distill.variance_adapted import VarianceAdaptedAdamW
from fraqat.errors import config_error
from fraqat.quiet import quiet_torchao

_BLOCK = 256
"""Elements of an 8-bit state that share a scale."""
_CODES, _SCALE, _SIGNED = "codes", "scale", "signed"
_RATE_FACTOR = "rate_factor"


Scales = Sequence[nn.Parameter] | Mapping[nn.Parameter, float]
"""Learned scales, or each with a factor of its learning rate."""
SumRows = Callable[[Tensor], None]
"""Adds a tensor up, in place, over the processes that hold rows of the same parameters."""


class TrainOptimizer(Protocol):
    """What the trainer needs from an optimizer."""

    def set_learning_rate_(self, learning_rate: float) -> None:
        """Takes effect at the next step."""
        ...

    def zero_grad(self) -> None:
        """Lets the gradients of the parameters leave memory."""
        ...

    def step(self) -> None:
        """Updates the parameters in place from their gradients; one without a gradient stays as it is."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and containers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict`; the parameters hold their own restored values already."""
        ...

    def parameters_changed_(self) -> None:
        """Call it when something else has changed the parameters; the state stays."""
        ...

    def state_tensors(self) -> list[Tensor]:
        """The state as plain tensors, for counting their memory."""
        ...


def make_optimizer(
    parameters: Sequence[nn.Parameter], spec: TrainSpec, scales: Scales = (), sum_rows_: SumRows | None = None
) -> TrainOptimizer:
    """The optimizer that a recipe names.

    Args:
        parameters: What is trained, all on one device.
        spec: Names it and gives its settings.
        scales: Those of `parameters` that are learned scales: they have a rate of their own and no weight decay. With a
            number for each, as `scale_rates` gives it, that is a further factor of its rate.
        sum_rows_: Where `parameters` are rows of others, which several processes share.

    Raises:
        ConfigError: torchao is not installed, or the state should leave for the host where the parameters are.
    """
    if spec.optimizer_device == "same":
        return DeviceOptimizer(parameters, spec, scales, sum_rows_)
    if _is_host(parameters[0].device):
        raise config_error(
            "train.optimizer_device",
            "host",
            allowed="same for a model on the CPU, which is the host",
            fix="set train.optimizer_device: same, or train on a GPU",
        )
    return HostOptimizer(parameters, spec, scales, sum_rows_)


class DeviceOptimizer:
    """AdamW with its state beside the parameters.

    Args:
        parameters: Updated in place.
        spec: `adamw` is torch's own, fused, with 8 bytes of state for a parameter; `adamw_adapted` is `VarianceAdaptedAdamW`
            with as many. `adamw_8bit` is torchao's, with 2 bytes and a float32 scale for 256 of them; it keeps a state in
            float32 where a tensor has fewer than 4096 elements or no multiple of 256. Its update is compiled, one graph for
            each shape, if `spec.compile` is not `none`.
        scales: Those of `parameters` that are learned scales.
        sum_rows_: See `make_optimizer`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        spec: TrainSpec,
        scales: Scales = (),
        sum_rows_: SumRows | None = None,
    ):
        groups = _groups(parameters, spec, scales)
        self._inner = _MAKERS[spec.optimizer](groups, spec, sum_rows_)
        # torchao compiles its update whatever we say; without train.compile there may be no compiler here.
        self._stance: Callable[[], AbstractContextManager[Any]] = nullcontext
        if spec.optimizer == "adamw_8bit":
            self._stance = _eager if spec.compile == "none" else _without_cache_warning

    def set_learning_rate_(self, learning_rate: float) -> None:
        """Takes effect at the next step."""
        for group in self._inner.param_groups:
            rate = learning_rate * group[_RATE_FACTOR]
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def zero_grad(self) -> None:
        """Lets the gradients of the parameters leave memory."""
        self._inner.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Updates the parameters in place from their gradients."""
        with self._stance():
            self._inner.step()

    def state_dict(self) -> dict[str, Any]:
        """torch's own format, but 8-bit tensors as dicts of their codes and scales: read back without torchao's classes."""
        values = self._inner.state_dict()
        states = {key: {name: _to_plain(v) for name, v in state.items()} for key, state in values["state"].items()}
        return {**values, "state": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict`."""
        states = {key: {name: _from_plain(v) for name, v in part.items()} for key, part in state["state"].items()}
        self._inner.load_state_dict({**state, "state": states})

    def parameters_changed_(self) -> None:
        """Nothing: the parameters are held here alone."""

    def state_tensors(self) -> list[Tensor]:
        """The state as plain tensors."""
        states = cast("dict[Any, dict[str, Any]]", self._inner.state)
        values = [value for state in states.values() for value in state.values() if isinstance(value, Tensor)]
        return [part for value in values for part in _plain_parts(value)]


class HostOptimizer:
    """AdamW on the host: device memory holds parameters and gradients, and no state.

    The host keeps float32 twins of the parameters and makes the step on them. A step sends the gradients there and the updated
    parameters back: 8 bytes of traffic for a parameter. The arithmetic is the host's, so the result differs from a step on the
    device in the last bits.

    Args:
        parameters: On a device; updated in place.
        spec: Which AdamW, as in `DeviceOptimizer`.
        scales: Those of `parameters` that are learned scales.
        sum_rows_: See `make_optimizer`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        spec: TrainSpec,
        scales: Scales = (),
        sum_rows_: SumRows | None = None,
    ):
        self._parameters = list(parameters)
        self._device = self._parameters[0].device
        self._twins = [nn.Parameter(self._host_like(parameter)) for parameter in self._parameters]
        self._gradients = [self._host_like(parameter) for parameter in self._parameters]
        factors = _factors(scales)
        pairs = zip(self._twins, self._parameters, strict=True)
        twins = {twin: factors[own] for twin, own in pairs if own in factors}
        self._inner = DeviceOptimizer(self._twins, spec, twins, sum_rows_)
        self._copy_to_host_()

    def set_learning_rate_(self, learning_rate: float) -> None:
        """Takes effect at the next step."""
        self._inner.set_learning_rate_(learning_rate)

    def zero_grad(self) -> None:
        """Lets the gradients on the device leave memory; the host keeps its buffers."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Gradients to the host, a step there, parameters back."""
        for parameter, twin, gradient in zip(self._parameters, self._twins, self._gradients, strict=True):
            twin.grad = None
            if parameter.grad is not None:
                twin.grad = gradient.copy_(parameter.grad, non_blocking=True)
        self._synchronize()
        self._inner.step()
        for parameter, twin in zip(self._parameters, self._twins, strict=True):
            if twin.grad is not None:
                # The next step waits for the device before it writes to the twins again.
                parameter.copy_(twin, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """The state alone: the twins equal the parameters."""
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict`, and takes the parameters as they are now."""
        self._inner.load_state_dict(state)
        self._copy_to_host_()

    def parameters_changed_(self) -> None:
        """Takes the parameters as they are now."""
        self._copy_to_host_()

    def state_tensors(self) -> list[Tensor]:
        """The state as plain tensors, all on the host; twins and buffers of the gradients are not among them."""
        return self._inner.state_tensors()

    @torch.no_grad()
    def _copy_to_host_(self) -> None:
        for parameter, twin in zip(self._parameters, self._twins, strict=True):
            twin.copy_(parameter)

    def _host_like(self, parameter: Tensor) -> Tensor:
        return torch.empty_like(parameter.detach(), device="cpu", pin_memory=self._device.type == "cuda")

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"


def _groups(parameters: Sequence[nn.Parameter], spec: TrainSpec, scales: Scales) -> list[dict[str, Any]]:
    """Adam's step does not shrink with the gradient, and a scale is small against the weights: it needs a smaller rate."""
    factors = _factors(scales)
    weights = [parameter for parameter in parameters if parameter not in factors]
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": spec.weight_decay, _RATE_FACTOR: 1.0}]
    for factor in sorted(set(factors.values()), reverse=True):
        learned = [parameter for parameter in parameters if factors.get(parameter) == factor]
        groups.append({"params": learned, "weight_decay": 0.0, _RATE_FACTOR: factor * spec.scale_rate})
    return [group for group in groups if group["params"]]


def _factors(scales: Scales) -> dict[nn.Parameter, float]:
    return dict(scales) if isinstance(scales, Mapping) else dict.fromkeys(scales, 1.0)


def _adamw(groups: list[dict[str, Any]], spec: TrainSpec, sum_rows_: SumRows | None) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups,
        lr=spec.learning_rate.peak,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        fused=True,
    )


def _adamw_8bit(groups: list[dict[str, Any]], spec: TrainSpec, sum_rows_: SumRows | None) -> torch.optim.Optimizer:
    if find_spec("torchao") is None:
        raise config_error(
            "train.optimizer",
            spec.optimizer,
            allowed="adamw where torchao is not installed",
            fix="pip install 'fraqat[optimizers]', or set train.optimizer: adamw",
        )
    with quiet_torchao():
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
    for is_signed in (True, False):
        OptimState8bit.zeros(
            (_BLOCK,), is_signed, _BLOCK
        )  # computes torchao's map of codes once, which fake tensors cannot
    return AdamW8bit(
        groups,
        lr=spec.learning_rate.peak,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        block_size=_BLOCK,
    )


def _adamw_adapted(groups: list[dict[str, Any]], spec: TrainSpec, sum_rows_: SumRows | None) -> torch.optim.Optimizer:
    return VarianceAdaptedAdamW(groups, spec.learning_rate.peak, spec.betas, spec.eps, spec.weight_decay, sum_rows_)


_Maker = Callable[[list[dict[str, Any]], TrainSpec, SumRows | None], torch.optim.Optimizer]
_MAKERS: Mapping[OptimizerName, _Maker] = {
    "adamw": _adamw,
    "adamw_adapted": _adamw_adapted,
    "adamw_8bit": _adamw_8bit,
}


def _to_plain(value: Any) -> Any:
    if not (isinstance(value, Tensor) and is_traceable_wrapper_subclass(value)):
        return value
    quantized = cast(Any, value)
    return {_CODES: quantized.codes, _SCALE: quantized.scale, _SIGNED: quantized.signed}


def _from_plain(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    with quiet_torchao():
        from torchao.optim.subclass_8bit import OptimState8bit
    codes, scale = value[_CODES], value[_SCALE]
    state = OptimState8bit.zeros(
        codes.shape, value[_SIGNED], codes.numel() // scale.numel(), codes.device, dtype=torch.float32
    )
    state.codes.copy_(codes)
    state.scale.copy_(scale)
    return state


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(tensor, name))]


def _eager() -> AbstractContextManager[Any]:
    stance: Any = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def _without_cache_warning() -> Generator[None]:
    """torch would keep compiled updates on disk under better names if torchao's tensors had a hash of their own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not implement _stable_hash_for_caching", category=UserWarning)
        yield
