"""A student whose weights are torchao's tensors of integers, made from our codes and scales without quantizing anew.

The only home of torchao in exports: its own format and ExecuTorch's lowering start from these tensors.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fraqat.export.codes import LayerCodes, layer_codes
from fraqat.nn import unquantize_
from fraqat.quiet import quiet_torchao

_INPUTS = "int8_asym_per_token"
"""A plain string: as a member of torchao's enumeration it cannot be read back from safetensors."""


def with_torchao_weights(
    student: nn.Module, dtype: torch.dtype = torch.float32, *, bits: Mapping[str, int] | None = None
) -> nn.Module:
    """A copy of a student with float layers, whose quantized weights are torchao's `IntxUnpackedToInt8Tensor`.

    Args:
        student: At its final width.
        dtype: Of everything that is not integers or scales.
        bits: Width to name by layer; see `intx_tensor`.
    """
    layers = layer_codes(student)
    model = copy.deepcopy(student)
    unquantize_(model)
    nn.Module.to(model, dtype)  # diffusers' own `to` warns
    for name, layer in layers.items():
        weight = intx_tensor(layer, dtype, bits=None if bits is None else bits[name])
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return model.eval()


def intx_tensor(layer: LayerCodes, dtype: torch.dtype = torch.float32, *, bits: int | None = None) -> Any:
    """The weight of one layer as torchao's tensor [O, K]: our codes, our scales, zero points 0.

    Args:
        layer: A linear layer of at most 8 bits, symmetric.
        dtype: What the tensor passes itself off as; it must be that of the inputs.
        bits: Width to name, if not the smallest that holds the codes. With it scales stay float32, as XNNPACK's lowering reads
            them.
    """
    with quiet_torchao():
        from torchao.quantization import IntxUnpackedToInt8Tensor
    codes_OK = layer.matrix.contiguous()
    num_rows, width = codes_OK.shape
    scale = layer.qparams.scale.float()
    scale_OG = scale.flatten(1) if layer.spec.weight.group_size else scale.flatten().expand(num_rows).unsqueeze(1)
    rounding_dtype = layer.spec.weight.rounding_dtype
    if rounding_dtype is not None and layer.groups is None and bits is None:
        scale_OG = scale_OG.to(rounding_dtype)
    return IntxUnpackedToInt8Tensor(
        qdata=codes_OK,
        scale=scale_OG.contiguous(),
        zero_point=torch.zeros(scale_OG.shape, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{bits or layer.grid.storage_bits}"),
        block_size=[1, width // scale_OG.shape[1]],
        dtype=dtype,
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
    # torchao cannot parse names without a dot; parameters of the model itself are never quantized.
    plain = {name: tensor for name, tensor in tensors.items() if "." not in name}
    nested = {name: tensor for name, tensor in tensors.items() if "." in name}
    names = [name for name in json.loads(metadata["tensor_names"]) if "." in name]
    state, _ = unflatten_tensor_state_dict(
        cast(Any, nested), cast(Any, {**metadata, "tensor_names": json.dumps(names)})
    )
    return plain | cast(dict[str, Tensor], state)


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
