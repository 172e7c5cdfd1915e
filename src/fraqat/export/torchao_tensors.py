"""A student whose weights are torchao's tensors of integers, made from our codes and scales without quantizing anew.

The only home of torchao in exports: its own format and ExecuTorch's lowering start from these tensors.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from fraqat.export.codes import LayerCodes, layer_codes
from fraqat.nn import unquantize_

_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
_INPUTS = "int8_asym_per_token"
"""A plain string: as a member of torchao's enumeration it cannot be read back from safetensors."""


def with_torchao_weights(student: nn.Module, names: frozenset[str] | None = None) -> nn.Module:
    """A copy of a student with float layers, whose quantized weights are torchao's `IntxUnpackedToInt8Tensor`.

    Args:
        student: At its final width.
        names: Layers to give such a weight; the others get scale * code in float32. None: all of them.
    """
    layers = layer_codes(student)
    model = copy.deepcopy(student)
    unquantize_(model)
    for name, layer in layers.items():
        is_chosen = names is None or name in names
        weight = intx_tensor(layer) if is_chosen else intx_tensor(layer).dequantize().reshape(layer.codes.shape)
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return model.eval()


def intx_tensor(layer: LayerCodes) -> Any:
    """The weight of one layer as torchao's tensor [O, K]: our codes, our scales, zero points 0."""
    with quiet_torchao():
        from torchao.quantization import IntxUnpackedToInt8Tensor
    codes_OK = layer.codes_OK.contiguous()
    num_rows, width = codes_OK.shape
    scale = layer.qparams.scale.float()
    scale_OG = scale.flatten(1) if layer.spec.weight.group_size else scale.flatten().expand(num_rows).unsqueeze(1)
    rounding_dtype = layer.spec.weight.rounding_dtype
    if rounding_dtype is not None and layer.groups is None:
        scale_OG = scale_OG.to(rounding_dtype)
    return IntxUnpackedToInt8Tensor(
        qdata=codes_OK,
        scale=scale_OG.contiguous(),
        zero_point=torch.zeros(scale_OG.shape, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{layer.grid.storage_bits}"),
        block_size=[1, width // scale_OG.shape[1]],
        dtype=torch.float32,
        activation_quantization=None if layer.spec.activation is None else _INPUTS,
    )


def flatten_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Plain tensors and the metadata of a safetensors file that torchao's loaders read."""
    with quiet_torchao():
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return flatten_tensor_state_dict(cast(Any, state))


def stored_codes(model: nn.Module) -> dict[str, Tensor]:
    """Layer name -> integers of every weight that is such a tensor."""
    with quiet_torchao():
        from torchao.quantization import IntxUnpackedToInt8Tensor
    return {
        name.removesuffix(".weight"): cast(Any, parameter).qdata
        for name, parameter in model.named_parameters()
        if isinstance(parameter.data, IntxUnpackedToInt8Tensor)
    }


def read_state(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Undoes `flatten_state`."""
    with quiet_torchao():
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    state, rest = unflatten_tensor_state_dict(cast(Any, dict(tensors)), cast(Any, dict(metadata)))
    assert not rest
    return cast(dict[str, Tensor], state)


def quantization_config(bits: int, group_size: int | None, *, has_inputs: bool) -> dict[str, Any]:
    """The `quantization_config` of a model's `config.json`, from which the loaders learn that torchao reads the weights.

    What each weight is lies in the safetensors metadata; this names the kind of the first one.
    """
    with quiet_torchao():
        from torchao.core.config import config_to_dict
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerAxis, PerGroup
    granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
    dtype = getattr(torch, f"int{bits}")
    config = (
        Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
        if has_inputs
        else IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
    )
    return {"quant_method": "torchao", "quant_type": {"default": config_to_dict(config)}}


@contextmanager
def quiet_torchao() -> Generator[None]:
    """torchao warns at its import about libraries that we do not use."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torchao")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
