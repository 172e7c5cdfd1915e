"""Puts smoothing and low-rank branches into a quantized model, and sets them from calibration data.

One procedure with three settings: SVDQuant (arXiv 2411.05007) smooths, takes the weight's largest singular values
into the branch and quantizes the rest; DiTAS (arXiv 2409.07756) smooths with factors gathered over the sampler's steps and fits
the branch to what quantization loses; SVDQAT trains what SVDQuant leaves.

Shape suffixes: T tokens, O output channels, K input channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fraqat.errors import config_error
from fraqat.nn.branch import BranchSpec, LowRankBranch, low_rank_factors
from fraqat.nn.integer_layers import shared_parameters
from fraqat.nn.layers import QuantizedLayer, QuantLinear
from fraqat.nn.quantizers import WeightQuantizer
from fraqat.nn.shards import own, own_rows, whole
from fraqat.nn.smoothing import ChannelMaximum, InputSmoothing, SmoothingSpec, smoothing_factors
from fraqat.nn.swap import quantized_layers, set_bypassed_


@dataclass(frozen=True)
class BranchFit:
    """What was found for one layer, measured on the tokens that were kept.

    Args:
        exponents: a and b of s = max|x|^a / max|w|^b; (0, 0) without smoothing.
        plain_sqnr_db: Of the layer's output, quantized without smoothing and branch; infinite where nothing is lost.
        sqnr_db: With them.
    """

    exponents: tuple[float, float]
    plain_sqnr_db: float
    sqnr_db: float


def add_branches_(model: nn.Module, branch: BranchSpec | None = None, smoothing: SmoothingSpec | None = None) -> int:
    """Gives every quantized layer a branch of zeros and a smoothing by ones, which change nothing yet.

    The state dict gains `smoothing.scale`, `branch.up` and `branch.down` for each layer. A branch is trained where the
    weight is.

    Args:
        model: Changed by `quantize_`.
        branch: None, or rank 0: no branch.
        smoothing: None: inputs stay as they are.

    Returns:
        How many layers were changed.

    Raises:
        ConfigError: The model is not quantized, has adapters, or quantizes a weight that something else uses too.
    """
    layers = dict(quantized_layers(model))
    if not layers:
        raise config_error("model", type(model).__name__, allowed="a quantized model", fix="call quantize_ first")
    has_branch = branch is not None and branch.rank > 0
    if not has_branch and smoothing is None:
        return 0
    shared = shared_parameters(model)
    for name, layer in layers.items():
        if layer.adapter is not None:
            raise config_error(
                "branch", name, allowed="layers without an adapter", fix="merge the adapters first, or leave them out"
            )
        if id(layer.weight) in shared:
            raise config_error(
                "branch",
                f"{name}, whose weight another module uses too",
                allowed="layers with a weight of their own, which branch and smoothing change",
                fix=f"skip it: a rule with pattern: {name} and skip: true",
            )
    for layer in layers.values():
        if smoothing is not None:
            layer.smoothing = InputSmoothing(smoothing, layer.weight)
        if branch is not None and has_branch:
            layer.branch = LowRankBranch(branch, layer.weight).requires_grad_(layer.weight.requires_grad)
    return len(layers)


@torch.no_grad()
def fold_components_(layer: QuantizedLayer, num_left: int) -> int:
    """Moves the components of least singular value from a branch whose rank decays into the weight that is quantized.

    W becomes W + U_i D_i with the thin matrices as they were rounded at use, so the layer in floating point computes what it
    did. A learned scale keeps what was learned as a factor of what MSE clipping gives, s_new = s_old s_mse(after) /
    s_mse(before), and with `mse` the clipping is searched again. Codes of integer engines are to be made anew. Where processes
    hold rows each, all must call together.

    Args:
        layer: With a branch.
        num_left: Components that stay.

    Returns:
        How many have left.
    """
    branch = layer.branch
    assert branch is not None
    num_leaving = branch.num_active - num_left
    if num_leaving <= 0:
        return 0
    before = whole(layer.weight).detach().clone()
    product_OK = branch.take_out_(num_left)
    own(layer.weight.detach()).add_(product_OK.view(before.shape)[own_rows(layer.weight)])
    layer.weight_quantizer.follow_(before, whole(layer.weight).detach())
    return num_leaving


def remove_spent_branches_(model: nn.Module) -> int:
    """Takes out every branch whose components have all left, so that plain quantized layers remain.

    Returns:
        How many layers had one.
    """
    spent = [layer for _, layer in quantized_layers(model) if layer.branch is not None and layer.branch.is_spent]
    for layer in spent:
        layer.branch = None
    return len(spent)


@torch.no_grad()
def initialize_branches_(
    model: nn.Module, forward: Callable[[object], object], batches: Iterable[object]
) -> dict[str, BranchFit]:
    """Sets smoothing, branch and residual of every layer from the float model's own inputs to it.

    For each candidate of the smoothing, W' = W diag(s) is split into branch and residual, and the error of the layer's output,
    with everything quantized as it will be, is summed over the tokens kept; the least one stays. The weight becomes the
    residual, `learned` scales and `mse` clipping are found for it anew. Layers are measured one by one: none sees the
    errors of those before it. Call it before `calibrate_`, whose static ranges are those of smoothed inputs, and before
    integer engines are attached.

    Args:
        model: Changed by `add_branches_`, at its final width.
        forward: Runs the model on one batch.
        batches: Calibration data. With `momentum`, one sample a batch, in the order of the sampler's steps.

    Returns:
        Layer name -> what was found; empty for a model without branches and smoothing.

    Raises:
        ConfigError: The data is empty, or a layer was never reached by it.
    """
    layers = {name: layer for name, layer in quantized_layers(model) if layer.has_extras}
    if not layers:
        return {}
    gathered = _gather(layers, forward, list(batches))
    silent = [name for name, inputs in gathered.items() if inputs.maximum.value_K is None]
    if silent:
        raise config_error(
            "calibration", silent[:3], allowed="data that reaches every layer", fix="skip these layers by a rule"
        )
    return {name: _fit_(layer, gathered.pop(name)) for name, layer in layers.items()}


class _LayerInputs:
    """What one layer was given: the largest magnitudes of everything, and some of the tokens."""

    def __init__(self, momentum: float | None, tokens_per_batch: int):
        self.maximum = ChannelMaximum(momentum)
        self.tokens_per_batch = tokens_per_batch
        self.kept: list[Tensor] = []

    def update(self, x_TK: Tensor) -> None:
        self.maximum.update(x_TK)
        place = torch.linspace(0, len(x_TK) - 1, min(self.tokens_per_batch, len(x_TK)), device=x_TK.device)
        self.kept.append(x_TK[place.long()].detach())


def _gather(
    layers: Mapping[str, QuantizedLayer], forward: Callable[[object], object], batches: list[object]
) -> dict[str, _LayerInputs]:
    """Inputs of the layers while nothing is quantized."""
    gathered: dict[str, _LayerInputs] = {}
    for name, layer in layers.items():
        spec = SmoothingSpec() if layer.smoothing is None else layer.smoothing.spec
        gathered[name] = _LayerInputs(spec.momentum, math.ceil(spec.num_tokens / max(1, len(batches))))
    handles = [
        layer.register_forward_pre_hook(_hook_for(gathered[name]), with_kwargs=True) for name, layer in layers.items()
    ]
    set_bypassed_(layers.values(), weights=True, inputs=True)
    try:
        for batch in batches:
            forward(batch)
    finally:
        set_bypassed_(layers.values(), weights=False, inputs=False)
        for handle in handles:
            handle.remove()
    return gathered


def _hook_for(inputs: _LayerInputs) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        inputs.update(_to_tokens(module, x))

    return hook


def _to_tokens(module: nn.Module, x: Tensor) -> Tensor:
    return x.movedim(-1 if isinstance(module, QuantLinear) else -3, -1).flatten(0, -2)


def _from_tokens(module: nn.Module, x_TK: Tensor) -> Tensor:
    """[1, T, K], or for a convolution one column of pixels [1, K, T, 1]."""
    return x_TK.unsqueeze(0) if isinstance(module, QuantLinear) else x_TK.t()[None, :, :, None]


class _Fitting:
    """Candidates of one layer are put into the layer itself, so that what is measured is what will run."""

    def __init__(self, layer: QuantizedLayer, inputs: _LayerInputs):
        self.layer = layer
        self.weight = layer.effective_weight(layer.weight).detach().clone().float()
        self.samples = [_from_tokens(layer, x_TK) for x_TK in inputs.kept]
        assert inputs.maximum.value_K is not None
        self.x_max_K = inputs.maximum.value_K
        self.w_max_K = self.weight.flatten(1).abs().amax(0)
        with _plain(layer, self.weight):
            set_bypassed_([layer], weights=True, inputs=True)
            self.wanted = [layer(x) for x in self.samples]
            set_bypassed_([layer], weights=False, inputs=False)
            self._renew_quantizers_()
            self.plain_error = self.error()
        self.power = sum(float(y.double().square().sum()) for y in self.wanted)

    def smooth_(self, exponents: tuple[float, float]) -> Tensor:
        """Sets the factors and gives W' = W diag(s) [O, K]."""
        if self.layer.smoothing is None:
            return self.weight.flatten(1)
        factors_K = smoothing_factors(self.x_max_K, self.w_max_K, exponents)
        self.layer.smoothing.scale.copy_(factors_K)
        return self.weight.flatten(1) * factors_K

    def put_(self, smoothed_OK: Tensor, target_OK: Tensor, *, exact: bool) -> float:
        """Fits the branch to `target_OK`, leaves the rest of W' to the quantizer, and gives the error of the output."""
        branch, residual_OK = self.layer.branch, smoothed_OK
        if branch is not None:
            up, down = low_rank_factors(target_OK, branch.up.shape[1], exact=exact)
            branch.up.copy_(up.to(branch.spec.torch_dtype))
            branch.down.copy_(down.to(branch.spec.torch_dtype))
            residual_OK = smoothed_OK - branch.product()
        self.layer.weight.copy_(residual_OK.view_as(self.layer.weight))
        self._renew_quantizers_()
        return self.error()

    def target(self, smoothed_OK: Tensor) -> Tensor:
        """What the branch is fitted to first."""
        branch = self.layer.branch
        if branch is None or branch.spec.start == "weight":
            return smoothed_OK
        quantizer = WeightQuantizer(self.layer.weight_quantizer.spec, smoothed_OK.view_as(self.weight))
        return smoothed_OK - quantizer(smoothed_OK.view_as(self.weight)).flatten(1)

    def left_by_residual(self, smoothed_OK: Tensor) -> Tensor:
        """W' - Q(R): what the branch should be, given the quantized residual."""
        return smoothed_OK - self.layer.weight_quantizer(self.layer.weight).flatten(1).float()

    def error(self) -> float:
        """Squared error of the layer's output on the tokens kept."""
        pairs = zip(self.samples, self.wanted, strict=True)
        return sum(float((self.layer(x).double() - y.double()).square().sum()) for x, y in pairs)

    def sqnr_db(self, error: float) -> float:
        if error == 0:
            return math.inf
        return 10 * math.log10(self.power / error) if self.power else -math.inf

    def _renew_quantizers_(self) -> None:
        """Clipping, learned scale and static range belong to what the layer holds now."""
        quantizer = self.layer.weight_quantizer
        quantizer.load_state_dict(WeightQuantizer(quantizer.spec, self.layer.weight).state_dict())
        activation = self.layer.activation_quantizer
        if activation is None or not activation.spec.static:
            return
        activation.start_observing()
        for x in self.samples:
            activation(self.layer.smoothed(x))
        activation.finish_observing_()


@contextmanager
def _plain(layer: QuantizedLayer, weight: Tensor) -> Generator[None]:
    """The layer with this weight and nothing beside it; its own weight is to be set afterwards."""
    smoothing, branch = layer.smoothing, layer.branch
    layer.smoothing, layer.branch = None, None
    layer.weight.copy_(weight)
    try:
        yield
    finally:
        layer.smoothing, layer.branch = smoothing, branch


def _fit_(layer: QuantizedLayer, inputs: _LayerInputs) -> BranchFit:
    fitting = _Fitting(layer, inputs)
    candidates = ((0.0, 0.0),) if layer.smoothing is None else layer.smoothing.spec.candidates()
    exponents = candidates[0]
    if len(candidates) > 1:
        errors: list[float] = []
        for candidate in candidates:
            smoothed_OK = fitting.smooth_(candidate)
            errors.append(fitting.put_(smoothed_OK, fitting.target(smoothed_OK), exact=False))
        finite = [math.inf if math.isnan(error) else error for error in errors]
        exponents = candidates[finite.index(min(finite))]
    smoothed_OK = fitting.smooth_(exponents)
    error = _iterate_(fitting, smoothed_OK)
    return BranchFit(exponents, fitting.sqnr_db(fitting.plain_error), fitting.sqnr_db(error))


def _iterate_(fitting: _Fitting, smoothed_OK: Tensor) -> float:
    """Fits branch and residual in turn, and leaves the best of them in the layer."""
    branch = fitting.layer.branch
    best_target = fitting.target(smoothed_OK)
    best = fitting.put_(smoothed_OK, best_target, exact=True)
    for _ in range(1, 1 if branch is None else branch.spec.iterations):
        target_OK = fitting.left_by_residual(smoothed_OK)
        error = fitting.put_(smoothed_OK, target_OK, exact=True)
        if not error < best:
            return fitting.put_(smoothed_OK, best_target, exact=True)
        best, best_target = error, target_OK
    return best
