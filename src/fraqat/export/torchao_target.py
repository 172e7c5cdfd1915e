"""A Hugging Face folder with torchao's integer tensors, for `from_pretrained` of diffusers and transformers."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fraqat.errors import ModelError, config_error
from fraqat.export.codes import layer_codes
from fraqat.export.packed import tied_names
from fraqat.export.packed_target import OpenedModel
from fraqat.export.target import (
    FLOAT_DTYPES,
    Bound,
    ExportJob,
    LayerPlace,
    OpenedExport,
    Target,
    fitted_activation,
    fitted_weight,
)
from fraqat.export.torchao_tensors import (
    flatten_state,
    quantization_config,
    read_state,
    stored_codes,
    with_torchao_weights,
)
from fraqat.files import save_tensors, write_json_atomic
from fraqat.nn import ActivationSpec, QuantSpec, unquantize_
from fraqat.numerics import Granularity, RangeMethod, ZeroPoint
from fraqat.quiet import quiet_torchao

CONFIG_FILE = "config.json"
_PIPELINE_FILE = "model_index.json"
_WEIGHTS = {True: "diffusion_pytorch_model.safetensors", False: "model.safetensors"}
"""By whether diffusers reads the folder."""
_COPIED = (".json", ".txt", ".model", ".jinja", ".spm")
_WIDEST_BITS = 8.0
_INPUT_BITS = 8.0


@final
class TorchaoTarget(Target):
    """`IntxUnpackedToInt8Tensor`: integer weights, inputs quantized per token to int8 with an integer zero point."""

    name = "torchao"
    summary = "Hugging Face folder that diffusers and transformers load with torchao installed"
    extra = "optimizers"
    requires = ("torchao",)
    defaults = MappingProxyType(
        {
            "weight": {"scale_dtype": "bfloat16"},
            "activation": {"symmetric": False, "range_method": "min_max", "zero_point": "integer"},
        }
    )
    bound = Bound(
        110.0, 110.0, "the same operations on the same values in float32; a sum may be taken in another order"
    )

    def nearest(self, place: LayerPlace, spec: QuantSpec) -> QuantSpec | None:
        """Linear layers with symmetric weights up to 8 bits; 8-bit inputs per token with an integer zero point, or none."""
        if place.type_name != "Linear":
            return None
        weight = fitted_weight(spec.weight, bits=min(spec.weight.bits, _WIDEST_BITS), symmetric=True)
        return QuantSpec(weight, token_inputs(spec.activation, ZeroPoint.INTEGER))

    def write(self, job: ExportJob) -> None:
        """Writes `config.json`, weights, and the original's other files."""
        is_diffusers = "_class_name" in job.description.config or _is_pipeline(job.origin)
        source = job.origin
        if source is not None and _is_pipeline(source):
            source = source / "transformer"
        config = _config(job, source)
        quantization = _quantization_config(job.student)
        model = with_torchao_weights(job.student, FLOAT_DTYPES[job.float_dtype])
        tensors, metadata = flatten_state(model)
        tied = _drop_tied(job.student, tensors)
        if config.get("tie_word_embeddings") and not tied:
            config["tie_word_embeddings"] = False
        if not is_diffusers:
            config["dtype"] = job.float_dtype
        config["quantization_config"] = quantization
        save_tensors(tensors, job.folder / _WEIGHTS[is_diffusers], metadata | {"format": "pt"})
        if source is not None:
            for file in sorted(source.iterdir()):
                if file.is_file() and file.name != CONFIG_FILE and _is_copied(file):
                    shutil.copyfile(file, job.folder / file.name)
        write_json_atomic(job.folder / CONFIG_FILE, config)
        keyword = "torch_dtype" if is_diffusers else "dtype"
        job.say(f"{len(stored_codes(model))} layers of integers; load with {keyword}=torch.{job.float_dtype}")

    def open(self, folder: Path, student: nn.Module) -> OpenedExport:
        """The model with torchao's tensors, computed by torchao, in place of the student."""
        state = _read_weights(folder)
        model = copy.deepcopy(student)
        unquantize_(model)
        _load_(model, state)
        return OpenedModel(model, student, stored_codes(model))


def token_inputs(activation: ActivationSpec | None, zero_point: ZeroPoint) -> ActivationSpec | None:
    """8-bit inputs per token with a zero point; None (weight-only) where they were wider or not quantized."""
    if activation is None or activation.bits > _INPUT_BITS:
        return None
    return fitted_activation(
        activation,
        bits=_INPUT_BITS,
        granularity=Granularity.TOKEN,
        static=False,
        symmetric=False,
        range_method=RangeMethod.MIN_MAX,
        scale_dtype="float32",
        zero_point=zero_point,
    )


def _quantization_config(student: nn.Module) -> dict[str, Any]:
    layers = layer_codes(student)
    if not layers:
        raise config_error("student", "no quantized layer", allowed="at least one", fix="quantize a linear layer")
    for name, layer in layers.items():
        if layer.type_name != "Linear":
            raise config_error(
                f"{name}.type", layer.type_name, allowed="Linear", fix=f"add a rule {{pattern: {name}, skip: true}}"
            )
        if layer.spec.weight.bits > _WIDEST_BITS or not layer.spec.weight.symmetric:
            raise config_error(
                f"{name}.weight",
                f"{layer.spec.weight.bits:g} bits, symmetric: {layer.spec.weight.symmetric}",
                allowed="at most 8 bits, symmetric: true",
                fix="train with target: torchao",
            )
    first = next(iter(layers.values()))
    has_inputs = first.spec.activation is not None
    return quantization_config(first.grid.storage_bits, first.spec.weight.group_size, has_inputs=has_inputs)


def _is_pipeline(folder: Path | None) -> bool:
    return folder is not None and (folder / _PIPELINE_FILE).is_file()


def _is_copied(file: Path) -> bool:
    is_weight_list = file.name.endswith(".index.json")
    return file.suffix in _COPIED and not is_weight_list and file.name not in ("quality.json", "manifest.json")


def _config(job: ExportJob, source: Path | None) -> dict[str, Any]:
    """The original's `config.json`, or one from the description."""
    if source is None or not (source / CONFIG_FILE).is_file():
        name = job.description.class_name
        return {"_class_name": name, "architectures": [name]} | job.description.config
    try:
        return dict(json.loads((source / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{source / CONFIG_FILE} cannot be read: {error!r}. Fix: download the original again."
        ) from error


def _drop_tied(student: nn.Module, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Removes the second names of unquantized parameters: the loaders tie them again."""
    tied = tied_names(student)
    for name in tied:
        tensors.pop(name, None)
    return tied


def _read_weights(folder: Path) -> dict[str, Tensor]:
    paths = [folder / name for name in _WEIGHTS.values() if (folder / name).is_file()]
    if not paths:
        raise ModelError(f"{folder} has neither {' nor '.join(_WEIGHTS.values())}. Fix: export again.")
    try:
        with safe_open(paths[0], framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            return read_state(tensors, stream.metadata() or {})
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{paths[0]} cannot be read: {error!r}. Fix: export again.") from error


def _load_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts tensors in the place of parameters, in float32, as the loaders do when they are asked for float32."""
    owners = dict(model.named_modules())
    for name, tensor in state.items():
        owner, _, field = name.rpartition(".")
        module = owners.get(owner)
        if module is None or not hasattr(module, field):
            raise ModelError(f"the export has {name!r}, the student has not. Fix: use the run that it was made from.")
        tensor = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        with quiet_torchao():
            if field in module._parameters:  # pyright: ignore[reportPrivateUsage]
                module._parameters[field] = nn.Parameter(tensor, requires_grad=False)  # pyright: ignore[reportPrivateUsage]
            else:
                module._buffers[field] = tensor  # pyright: ignore[reportPrivateUsage]
