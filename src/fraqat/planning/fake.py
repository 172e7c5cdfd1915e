"""Models and batches without memory, and a GPU's choice of kernels on a machine that has none.

A fake tensor has shape, dtype and device but no values; every operation on it costs microseconds, whatever its size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from fraqat.nn import quantized_layers
from fraqat.planning.devices import DeviceKind

_Copied = TypeVar("_Copied")

TRACE_DEVICE = "cpu"
"""Fake tensors live here: autograd on a fake GPU would need a torch that was built for it."""

# Functions that autocast runs in float32 on a GPU, and in the lower precision on a CPU: the difference of the two lists in
# ATen/autocast_mode.h and its CPU twin, as far as networks use them in a training step.
_GPU_FLOAT32_NAMES = frozenset(
    {
        "cosine_similarity",
        "cumprod",
        "cumsum",
        "exp",
        "expm1",
        "group_norm",
        "huber_loss",
        "kl_div",
        "l1_loss",
        "layer_norm",
        "log",
        "log10",
        "log1p",
        "log2",
        "log_softmax",
        "logsumexp",
        "mse_loss",
        "norm",
        "pow",
        "__pow__",
        "prod",
        "reciprocal",
        "rms_norm",
        "rsqrt",
        "smooth_l1_loss",
        "softmax",
        "softplus",
        "sum",
    }
)
_NONZERO = (Tensor.nonzero, torch.nonzero)
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def new_fake_mode() -> FakeTensorMode:
    """A mode in which tensors have no memory; small real tensors that a model keeps are taken in."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def to_fake(model: _Copied, mode: FakeTensorMode) -> _Copied:
    """A copy whose parameters and buffers are fake; ties, classes, hooks and flags stay.

    Args:
        model: On the meta device, or with memory; or several objects that hold one model.
        mode: Where the copy's tensors live.
    """
    memo: dict[int, Any] = {}
    models = [part for part in (model if isinstance(model, tuple) else (model,)) if isinstance(part, nn.Module)]
    with mode:
        for parameter in (parameter for part in models for parameter in part.parameters()):
            memo[id(parameter)] = nn.Parameter(_fake_like(parameter), requires_grad=parameter.requires_grad)
        for buffer in (buffer for part in models for buffer in part.buffers()):
            memo[id(buffer)] = _fake_like(buffer)
    fake = copy.deepcopy(model, memo)
    for part in fake if isinstance(fake, tuple) else (fake,):
        for _, layer in quantized_layers(part) if isinstance(part, nn.Module) else ():
            if layer.activation_quantizer is not None:
                layer.activation_quantizer.is_calibrated = (
                    True  # static scales need values before training, not for shapes
                )
    return fake


def fake_batch(batch: Mapping[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    """A batch of fake tensors of the same shapes; other values stay."""
    with mode:
        return {name: _fake_like(value) if isinstance(value, Tensor) else value for name, value in batch.items()}


class TraceRules(TorchFunctionMode):
    """What a step on fake CPU tensors needs beyond fake tensors themselves.

    Where a model asks for a value, the answer is the one that needs most memory: a condition is false (no mask is found to be
    empty, no layer is dropped); a mask of booleans and `nonzero` select everything. For a GPU, attention runs fused, without
    the matrix of scores, even where the model's caller chose plain products for a CPU, and autocast's GPU rules apply: norms,
    softmax, sums and losses in float32.

    Args:
        kind: Whose kernels.
    """

    def __init__(self, kind: DeviceKind):
        super().__init__()
        self.is_gpu = kind is DeviceKind.GPU

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__:
            try:
                return func(*args)
            except DataDependentOutputException:
                return False
        if func is Tensor.__getitem__ and _is_boolean(args[1]):
            return args[0].flatten(0, args[1].ndim - 1)
        if func in _NONZERO:
            return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        if self.is_gpu:
            if func is F.scaled_dot_product_attention:
                return _fused_attention(*args, **kwargs)
            if torch.is_autocast_enabled(TRACE_DEVICE) and getattr(func, "__name__", "") in _GPU_FLOAT32_NAMES:
                args = tuple(_to_float32(value) for value in args)
                kwargs = {name: _to_float32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The fused kernel keeps query, key, value, output and one float per row: the same on CPU and GPU."""
    if torch.is_autocast_enabled(TRACE_DEVICE):
        dtype = torch.get_autocast_dtype(TRACE_DEVICE)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (part.repeat_interleave(repeats, dim=-3) for part in (key, value))
    if attn_mask is not None and attn_mask.dtype != query.dtype:
        attn_mask = attn_mask.to(query.dtype)
    batch_shape = query.shape[:-3]
    if len(batch_shape) != 1:
        query, key, value = (part.reshape(-1, *part.shape[-3:]) for part in (query, key, value))
    fused: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output if len(batch_shape) == 1 else output.reshape(*batch_shape, *output.shape[-3:])


def _fake_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=TRACE_DEVICE)


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _LOW_PRECISION else value


def _is_boolean(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim > 0
